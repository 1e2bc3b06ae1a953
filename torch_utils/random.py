"""Randomness as an argument: per-sample generators, derived generators, seeds from integers.

Every function that draws takes `generator`, which may be None (PyTorch's global generator), a `torch.Generator`, or a
`StackedRandomGenerator` (one generator per sample).
"""

from __future__ import annotations

import copy
import functools
import hashlib
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from torch_utils.devices import send

Device = torch.device | str | None
Shape = Sequence[int]


def hash_seed(*values: int) -> int:
    """Seed in [0, 2^31) from integers: Python's tuple hash modulo 2^31, which is not salted (EDM2's global reseeding).

    `hash_seed(0, 1) == 16979904`. Raises ValueError for anything but integers: hashes of strings are salted.
    """
    try:
        return hash(tuple(operator.index(value) for value in values)) % (1 << 31)
    except TypeError:
        raise ValueError(f"hash_seed takes integers, not {values!r}") from None


def seeded_generator(device: Device, *values: int) -> torch.Generator:
    """A generator on `device` seeded with `hash_seed(*values)`, e.g. `(seed, position in the data order)`."""
    return torch.Generator(device).manual_seed(hash_seed(*values))


class StackedRandomGenerator:
    """One `torch.Generator` per sample, so sample i depends on its own seed only, not on batch or process (EDM).

    Seeds are taken modulo 2^32. Streams of CPU and CUDA generators differ. `size[0]` of every draw is the number of
    seeds, each of which draws `size[1:]`.
    """

    def __init__(self, device: Device, seeds: Iterable[int]):
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(int(seed) % (1 << 32)) for seed in seeds]

    def __len__(self):
        return len(self.generators)

    def _draw(self, function, size, dtype=None, device=None, **options):
        """`function(size[1:], generator=...)` of every seed, stacked."""
        if not len(size) or size[0] != len(self):
            raise ValueError(f"size {tuple(size)}: the first dimension must be the number of seeds, {len(self)}")
        options.update(dtype=dtype, device=self.device)
        draws = self._each(lambda shape, generator: function(shape, generator=generator, **options), tuple(size[1:]))
        return send(draws if len(self) else torch.empty(tuple(size), dtype=dtype), device or self.device)

    def _each(self, function, shape):
        return torch.stack([function(shape, generator) for generator in self.generators]) if len(self) else None

    def randn(self, size: Shape, **options: Any) -> torch.Tensor:
        """Standard normal draws of shape `size`. options: dtype, device, layout."""
        return self._draw(torch.randn, size, **options)

    def randn_like(self, input: torch.Tensor) -> torch.Tensor:
        """Standard normal draws with the shape, type, layout and device of `input`."""
        return self.randn(input.shape, dtype=input.dtype, layout=input.layout, device=input.device)

    def randint(self, *args: int, size: Shape, dtype: torch.dtype = torch.int64, **options: Any) -> torch.Tensor:
        """Integers below `args[0]`, or in `[args[0], args[1])`, of shape `size`. options: device, layout."""
        return self._draw(functools.partial(torch.randint, *args), size, dtype, **options)


class BlockGenerator(StackedRandomGenerator):
    """One generator per block of consecutive samples, which draws for its block what it would draw for it alone.

    generators: on one device. sizes: samples of each block.
    """

    def __init__(self, generators: Iterable[torch.Generator], sizes: Iterable[int]):
        self.generators, self.sizes = list(generators), list(sizes)
        self.device = self.generators[0].device

    def __len__(self):
        return sum(self.sizes)

    def _each(self, function, shape):
        blocks = zip(self.generators, self.sizes, strict=True)
        return torch.cat([function((size, *shape), generator) for generator, size in blocks])


Generator = torch.Generator | StackedRandomGenerator | None  # what every function that draws takes


def default_generator(device: Device = "cpu") -> torch.Generator:
    """PyTorch's global generator of `device`."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


def child_generator(generator: Generator = None, device: Device = "cpu") -> torch.Generator | StackedRandomGenerator:
    """A generator derived from the present state of `generator`, which is left untouched.

    The same parent state gives the same child. None derives from the global generator of `device`; a
    StackedRandomGenerator gives one of children.
    """
    if isinstance(generator, StackedRandomGenerator):
        child = copy.copy(generator)
        child.generators = [child_generator(parent) for parent in generator.generators]
        return child
    parent = default_generator(device) if generator is None else generator
    digest = hashlib.blake2b(parent.get_state().numpy().tobytes() + b"()", digest_size=8).digest()
    # The top bit stays clear: seeds are signed 64-bit integers.
    return torch.Generator(parent.device).manual_seed(int.from_bytes(digest, "little") >> 1)


def _draw(function, shape, generator, device, dtype):
    if isinstance(generator, StackedRandomGenerator):
        return generator._draw(function, shape, dtype, device)
    source = device if generator is None else generator.device
    return send(function(tuple(shape), generator=generator, dtype=dtype, device=source), device or source or "cpu")


def randn(
    shape: Shape, generator: Generator = None, device: Device = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Standard normal draws from any kind of generator, moved to `device` (default: the generator's, else the CPU)."""
    return _draw(torch.randn, shape, generator, device, dtype)


def rand(
    shape: Shape, generator: Generator = None, device: Device = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Uniform draws on [0, 1) from any kind of generator, as `randn`."""
    return _draw(torch.rand, shape, generator, device, dtype)


def standard_gamma(
    concentration: float, count: int, generator: Generator = None, device: Device = None
) -> torch.Tensor:
    """`count` draws of Gamma(concentration, rate 1) as float64, never zero, from any kind of generator."""

    def draw(shape, generator, dtype, device):  # the only sampler that takes a generator
        return torch._standard_gamma(torch.full(shape, float(concentration), dtype=dtype, device=device), generator)

    return _draw(draw, (count,), generator, device, torch.float64)
