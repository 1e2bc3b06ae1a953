"""From positions in the data order to training examples with their noise, independent of how the work is split.

The data order is cut into blocks of `block` consecutive positions. Everything random about a block (encoder noise, noise
level, augmentation, noise, label dropout) comes from one generator seeded by (seed, first position). Processes and
micro-batches take whole blocks, so neither their number nor their size changes any draw. Where a loss allows it, the blocks
of a micro-batch share the arithmetic, each with its own generator.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.data

from torch_utils.devices import send
from torch_utils.distributed import share
from torch_utils.random import BlockGenerator, hash_seed, seeded_generator
from training.dataset import Dataset, label_rows, load_raw, order
from training.encoders import Encoder
from training.losses import Draws, Loss

CACHE_BYTES = 2**29  # data sets that decode to less stay in memory as tensors, on the device


def block_slices(position: int, count: int, block: int) -> list[tuple[int, int]]:
    """[(first, size)] blocks of the positions position .. position + count - 1; the last one may be shorter."""
    return [(first, min(block, position + count - first)) for first in range(position, position + count, block)]


class Feed:
    """Blocks of (first position, images uint8 or float32 [b, C, H, W], labels [b, K]) on `device`, for this rank.

    Small data sets live in the device's memory; larger ones come through a DataLoader with `workers` processes ahead.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int = 0,  # of the data order
        block: int = 32,  # positions per block
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,  # loader processes, for data sets that do not fit in memory
        cache: bool | None = None,  # keep all decoded images in memory; None: if they take less than CACHE_BYTES
    ) -> None:
        self.dataset, self.seed, self.block = dataset, seed, block
        self.device = torch.device(device)
        self.rank, self.world_size, self.workers = rank, world_size, workers
        if cache is None:
            image, _ = dataset[0]
            cache = image.nbytes * len(dataset) < CACHE_BYTES
        self.arrays = [send(part, self.device) for part in load_raw(dataset)] if cache else None
        self.loader, self.expected = None, None

    def slices(self, position: int, count: int) -> list[tuple[int, int]]:
        """[(first, size)] of this rank's blocks among the positions position .. position + count - 1."""
        return share(block_slices(position, count, self.block), self.rank, self.world_size)

    def order(self, first: int, size: int) -> np.ndarray:
        """Data-set indices [size] at the positions from `first` on."""
        return order(range(first, first + size), len(self.dataset), self.seed)

    def blocks(self, position: int, count: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Blocks of this rank among the positions position .. position + count - 1."""
        slices = self.slices(position, count)
        for first, size in slices:
            if self.arrays is not None:
                yield first, *self._kept(torch.as_tensor(self.order(first, size)))
            else:
                chosen = self._next(position, count, restart=first == slices[0][0])
                yield first, *(send(part, self.device) for part in chosen)

    def examples(self, index: torch.Tensor) -> list[torch.Tensor]:
        """[images [n, C, H, W], labels [n, K]] of data-set indices [n], on `device`."""
        if self.arrays is not None:
            return self._kept(index)
        chosen = torch.utils.data.default_collate([self.dataset[i] for i in index.tolist()])
        return [send(part, self.device) for part in chosen]

    def _kept(self, index):
        """[images, labels] that are in memory: one-hot rows only of these, however many classes there are."""
        images, labels = self.arrays
        index = send(index, images.device)
        return [images[index], label_rows(labels[index], self.dataset.label_dim)]

    def _rounds(self, position, count):
        """Endless lists of data-set indices, one list per block of this rank; rounds follow each other without a gap."""
        while True:
            for first, size in self.slices(position, count):
                yield self.order(first, size).tolist()
            position += count

    def _next(self, position, count, restart):
        if restart and self.expected != (position, count):  # first use, or the number of candidates changed
            ahead = dict(num_workers=self.workers, prefetch_factor=4 if self.workers else None)
            rounds, pin = self._rounds(position, count), self.device.type == "cuda"
            self.loader = iter(torch.utils.data.DataLoader(self.dataset, batch_sampler=rounds, pin_memory=pin, **ahead))
        self.expected = (position + count, count)
        try:
            return next(self.loader)
        except ValueError as err:  # a loader process wraps the message into its traceback
            raise ValueError(str(err).strip().splitlines()[-1].removeprefix("ValueError: ")) from err


class Candidates:
    """What a selector chooses from in one step: iterating draws micro-batches of Draws lazily, in data order.

    batch: images to train on in this step, over all ranks. count: candidates over all ranks. generator: a CPU generator,
    the same on every rank, for the selection's own choices. cur_nimg: images trained on so far. first: index, among the
    candidates of all ranks, of this rank's first one.
    """

    def __init__(
        self,
        feed: Any,  # Feed, or anything with its contract
        encoder: Encoder,
        loss: Loss,
        position: int,
        count: int,
        batch: int,
        cur_nimg: int,
        max_batch: int | None = None,
    ) -> None:
        self.feed, self.encoder, self.loss = feed, encoder, loss
        self.position, self.count, self.batch, self.cur_nimg = position, count, batch, cur_nimg
        self.max_batch = max_batch or count
        self.generator = torch.Generator().manual_seed(hash_seed(feed.seed, position, 1))
        slices = share(block_slices(position, count, feed.block), feed.rank, feed.world_size)
        self.first = slices[0][0] - position if slices else 0

    def __iter__(self):
        held = []
        for blocks in self._groups():
            held.append(self.draw(blocks))
            while sum(map(len, held)) >= self.max_batch:
                joined = Draws.cat(held)
                yield joined[: self.max_batch]
                held = [joined[self.max_batch :]] if len(joined) > self.max_batch else []
        if held:
            yield Draws.cat(held)

    def _groups(self):
        """Lists of blocks that are drawn together: a micro-batch at a time, where that changes no bit."""
        ours = type(self.encoder).__module__.startswith("training.")
        # Vector units take 32 numbers at a time at most, and round what is left over by other code.
        together = getattr(self.loss, "separable", False) and ours and self.feed.block % 32 == 0
        group, size = [], 0
        for block in self.feed.blocks(self.position, self.count):
            group, size = [*group, block], size + len(block[1])
            if not together or size >= self.max_batch:
                yield group
                group, size = [], 0
        if group:
            yield group

    def draw(self, blocks: list[tuple[int, torch.Tensor, torch.Tensor]]) -> Draws:
        """The Draws of blocks (first position, images, labels), each a function of (seed, first position, images) alone."""
        firsts, images, labels = zip(*blocks, strict=True)
        generators = [seeded_generator(self.feed.device, self.feed.seed, first) for first in firsts]
        generator = BlockGenerator(generators, map(len, images)) if len(blocks) > 1 else generators[0]
        images, labels = (part[0] if len(part) == 1 else torch.cat(part) for part in (images, labels))
        latents = self.encoder.encode_latents(images, generator)
        return self.loss.draw(latents, labels if labels.shape[1] else None, generator)
