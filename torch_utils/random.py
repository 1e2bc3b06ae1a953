"""Randomness as an argument: per-sample generators, derived generators, seeds from integers.

Every function that draws takes `generator`, which may be None (PyTorch's global generator), a `torch.Generator`, or a
`StackedRandomGenerator` (one generator per sample).
"""

import hashlib
import operator

import torch


def hash_seed(*values: int) -> int:
    """Seed in [0, 2^31) from integers: Python's tuple hash modulo 2^31, which is not salted (EDM2's global reseeding).

    `hash_seed(0, 1) == 16979904`. Raises ValueError for anything but integers: hashes of strings are salted.
    """
    try:
        return hash(tuple(operator.index(value) for value in values)) % (1 << 31)
    except TypeError:
        raise ValueError(f"hash_seed takes integers, not {values!r}") from None


def seeded_generator(device, *values: int) -> torch.Generator:
    """A generator on `device` seeded with `hash_seed(*values)`, e.g. `(seed, position in the data order)`."""
    return torch.Generator(device).manual_seed(hash_seed(*values))


class StackedRandomGenerator:
    """One `torch.Generator` per sample, so sample i depends on its own seed only, not on batch or process (EDM).

    Seeds are taken modulo 2^32. Streams of CPU and CUDA generators differ.
    """

    def __init__(self, device, seeds):
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(int(seed) % (1 << 32)) for seed in seeds]

    def __len__(self):
        return len(self.generators)

    def _stack(self, draw, size, dtype=None, device=None, layout=None):
        if not len(size) or size[0] != len(self.generators):
            raise ValueError(f"size {tuple(size)}: the first dimension must be the number of seeds, {len(self)}")
        if not self.generators:
            return torch.empty(tuple(size), dtype=dtype, device=device or self.device)
        draws = torch.stack([draw(tuple(size[1:]), generator) for generator in self.generators])
        return draws.to(device=device or self.device)

    def randn(self, size, *, dtype=None, device=None, layout=torch.strided):
        """Standard normal draws of shape `size`; `size[0]` is the number of seeds, each seed draws `size[1:]`."""

        def draw(shape, generator):
            return torch.randn(shape, generator=generator, dtype=dtype, layout=layout, device=self.device)

        return self._stack(draw, size, dtype, device)

    def randn_like(self, input):
        """Standard normal draws with the shape, type, layout and device of `input`."""
        return self.randn(input.shape, dtype=input.dtype, layout=input.layout, device=input.device)

    def randint(self, *args, size, dtype=torch.int64, device=None):
        """Integers below `args[0]`, or in `[args[0], args[1])`, of shape `size`; each seed draws `size[1:]`."""

        def draw(shape, generator):
            return torch.randint(*args, size=shape, generator=generator, dtype=dtype, device=self.device)

        return self._stack(draw, size, dtype, device)


Generator = torch.Generator | StackedRandomGenerator | None  # what every function that draws takes


def default_generator(device="cpu") -> torch.Generator:
    """PyTorch's global generator of `device`."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


def child_generator(generator=None, *key: int, device="cpu"):
    """A generator derived from the present state of `generator`, which is left untouched.

    What is drawn from the child, however much, changes nothing of what the parent yields. The same parent state and
    `key` give the same child, different keys independent children. None derives from the global generator of
    `device`; a StackedRandomGenerator gives a StackedRandomGenerator of children.
    """
    if isinstance(generator, StackedRandomGenerator):
        child = StackedRandomGenerator(generator.device, [])
        child.generators = [child_generator(parent, *key) for parent in generator.generators]
        return child
    parent = default_generator(device) if generator is None else generator
    digest = hashlib.blake2b(parent.get_state().numpy().tobytes(), digest_size=8)
    digest.update(repr(tuple(int(value) for value in key)).encode())
    # The top bit stays clear: seeds are signed 64-bit integers.
    return torch.Generator(parent.device).manual_seed(int.from_bytes(digest.digest(), "little") >> 1)


def randn(shape, generator=None, device=None, dtype=torch.float32):
    """Standard normal draws from any kind of generator, moved to `device` (default: the generator's, else the CPU)."""
    if isinstance(generator, StackedRandomGenerator):
        return generator.randn(shape, dtype=dtype, device=device)
    source = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=source).to(device or source or "cpu")


def rand(shape, generator=None, device=None, dtype=torch.float32):
    """Uniform draws on [0, 1) from any kind of generator, as `randn`."""
    if isinstance(generator, StackedRandomGenerator):

        def draw(size, one):
            return torch.rand(size, generator=one, dtype=dtype, device=generator.device)

        return generator._stack(draw, shape, dtype, device)
    source = device if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, dtype=dtype, device=source).to(device or source or "cpu")


def standard_gamma(concentration: float, count: int, generator=None, device=None):
    """`count` draws of Gamma(concentration, rate 1) as float64, never zero, from any kind of generator."""

    def draw(number, one, where):
        shape = torch.full((number,), float(concentration), dtype=torch.float64, device=where)
        return torch._standard_gamma(shape, generator=one)  # the only sampler that takes a generator

    if isinstance(generator, StackedRandomGenerator):
        if len(generator) != count:
            raise ValueError(f"{count} draws from {len(generator)} per-sample generators")
        draws = [draw(1, one, generator.device) for one in generator.generators]
        gamma = torch.cat(draws) if draws else torch.empty(0, dtype=torch.float64, device=generator.device)
    else:
        gamma = draw(count, generator, (device or "cpu") if generator is None else generator.device)
    return gamma if device is None else gamma.to(device)
