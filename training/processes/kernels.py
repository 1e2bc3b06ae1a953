"""Noise kernels: the law of unit noise. Training noise and the prior of `heun` are `sigma * unit_noise`."""

import math
import warnings

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


class PFGMpp(GaussianKernel):
    """PFGM++ noise with D augmented dimensions: multivariate Student-t with D degrees of freedom (PFGM++ eq. 5).

    The perturbation kernel p_r(x|y) ~ (|x-y|^2 + r^2)^(-(N+D)/2) at r = sigma sqrt(D) is the law of
    y + sigma g / sqrt(u), g ~ N(0, I_N), u ~ Gamma(D/2, rate D/2), one u per sample. D may be any number > 0, or inf
    (or "inf"), which is Gaussian. The mean of the training loss is finite for D > 2 only, its variance for D > 4.

    Raises ValueError unless D > 0. Warns for D <= 4.
    """

    def __init__(self, D=2048.0):
        self.D = number("D", D)
        if not self.D > 0:
            raise ValueError(f"D = {D}: the number of augmented dimensions must be > 0, or inf")
        if self.D <= 2:
            warnings.warn(f"D = {D}: the training loss has no finite mean for D <= 2", stacklevel=2)
        elif self.D <= 4:
            warnings.warn(f"D = {D}: the training loss has no finite variance for D <= 4", stacklevel=2)

    def __repr__(self):
        return f"PFGMpp(D={self.D:g})"

    @property
    def logvar_default(self) -> bool:
        """Whether the network's uncertainty head is on by default: it needs a loss of finite mean."""
        return self.D > 2

    def spec(self) -> dict:
        """Plain description, see `training.processes.from_spec`."""
        return {"name": "pfgmpp", "D": self.D if math.isfinite(self.D) else "inf"}

    def unit_noise(self, shape, generator=None, device=None, dtype=torch.float32):
        """Noise of unit scale, as `GaussianKernel.unit_noise`.

        The Gaussian direction is drawn from `generator`, the radius from a child of it: the same seed shares its
        direction, and everything drawn later, across all D. D = inf is bit-identical to the Gaussian.
        """
        if math.isinf(self.D):
            return super().unit_noise(shape, generator, device, dtype)
        child = random.child_generator(generator, device=device or "cpu")  # before g: the state moves on
        gauss = super().unit_noise(shape, generator, device, dtype)  # [N, ...]
        gamma = random.standard_gamma(self.D / 2, shape[0], child, gauss.device) / (self.D / 2)  # [N]
        scale = gamma.rsqrt().reshape(-1, *[1] * (gauss.ndim - 1))
        return (gauss.to(torch.float64) * scale).to(dtype)
