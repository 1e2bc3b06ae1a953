"""The order in which examples are read: a permutation per epoch, a function of (seed, position) alone. Needs no torch."""

import functools

import numpy as np
from numpy.typing import ArrayLike


@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    # CPython's hash of a tuple of integers is not salted: part of the published order (EDM2's infinite sampler).
    permutation = np.arange(n, dtype=np.int64)
    np.random.RandomState(hash((seed, epoch)) % (1 << 31)).shuffle(permutation)
    return permutation


def order(positions: ArrayLike, n: int, seed: int = 0, shuffle: bool = True) -> np.ndarray:
    """Data-set indices (int64, shape of `positions`) of global positions in the endless order over n items."""
    positions = np.asarray(positions, dtype=np.int64)
    if n < 1 or (positions.size and positions.min() < 0):
        raise ValueError("a data order needs at least one item, and positions that start at 0")
    epochs, offsets = positions // n, positions % n
    if not shuffle:
        return offsets
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs):
        mask = epochs == epoch
        indices[mask] = _permutation(int(n), int(seed), int(epoch))[offsets[mask]]
    return indices
