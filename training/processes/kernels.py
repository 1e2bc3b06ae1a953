"""Noise kernels: the law of unit noise. Training noise and the prior of `heun` are `sigma * unit_noise`."""

import torch

from torch_utils import random


def number(name, value) -> float:
    """An option as a float. Raises ValueError that names it for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} = {value!r}: give a number") from None


class GaussianKernel:
    """Standard normal noise (EDM, and every linear diffusion)."""

    def unit_noise(self, shape, generator=None, device=None, dtype=torch.float32):
        """Noise of unit scale and shape `shape` = [N, *data_shape].

        generator: None, a torch.Generator, or a StackedRandomGenerator of N seeds. device: default the generator's.
        """
        return random.randn(shape, generator, device, dtype)
