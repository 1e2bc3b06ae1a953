"""The order in which examples are read: a permutation per epoch, a function of (seed, position) alone."""

import functools

import numpy as np
import torch


def epoch_permutation(n, seed=0, epoch=0, shuffle=True):
    """int64 [n]: the order of one pass over n items (EDM2's infinite sampler); identity without shuffling."""
    if n < 1:
        raise ValueError("a data order needs at least one item")
    return _permutation(int(n), int(seed), int(epoch)).copy() if shuffle else np.arange(n, dtype=np.int64)


@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    # CPython's hash of a tuple of integers is not salted: part of the published order.
    permutation = np.arange(n, dtype=np.int64)
    np.random.RandomState(hash((seed, epoch)) % (1 << 31)).shuffle(permutation)
    permutation.flags.writeable = False
    return permutation


def order(positions, n, seed=0, shuffle=True):
    """Data-set indices (int64, shape of `positions`) of global positions in the endless order over n items."""
    positions = np.asarray(positions, dtype=np.int64)
    if n < 1:
        raise ValueError("a data order needs at least one item")
    if positions.size and positions.min() < 0:
        raise ValueError("positions in the data order start at 0")
    epochs, offsets = positions // n, positions % n
    if not shuffle:
        return offsets
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        mask = epochs == epoch
        indices[mask] = _permutation(int(n), int(seed), int(epoch))[offsets[mask]]
    return indices


class InfiniteSampler(torch.utils.data.Sampler):
    """Endless indices: rank r takes positions start_idx + r, + num_replicas, ... of the shuffled epochs (EDM2)."""

    def __init__(
        self,
        dataset,         # Anything with a length.
        rank=0,          # This process.
        num_replicas=1,  # Number of processes.
        shuffle=True,    # False: file order, over and over.
        seed=0,          # Seed of the epoch permutations.
        start_idx=0,     # Global position of rank 0's first item.
    ):  # fmt: skip
        if len(dataset) < 1:
            raise ValueError("InfiniteSampler needs a data set with at least one item")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank={rank} must lie in 0..num_replicas-1 with num_replicas={num_replicas}")
        if start_idx < 0:
            raise ValueError(f"start_idx={start_idx} must not be negative")
        self.dataset_size = len(dataset)
        self.start_idx = int(start_idx) + int(rank)
        self.stride = int(num_replicas)
        self.shuffle = bool(shuffle)
        self.seed = int(seed)

    def __iter__(self):
        position, epoch, permutation = self.start_idx, None, None
        while True:
            if epoch != position // self.dataset_size:
                epoch = position // self.dataset_size
                permutation = epoch_permutation(self.dataset_size, self.seed, epoch, self.shuffle)
            yield int(permutation[position % self.dataset_size])
            position += self.stride
