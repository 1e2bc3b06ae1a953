"""PFGM++ (Xu et al. 2023): its noise, and the posterior mean over finite data, which is its optimal denoiser.

N is the data dimension, D the number of augmented dimensions (any number > 0, or inf: Gaussian), sigma = r / sqrt(D).
"""

from __future__ import annotations

import math
import warnings

import torch

from torch_utils import random
from torch_utils.persistence import persistent
from torch_utils.random import Device, Generator, Shape
from training.processes.base import GaussianKernel, number
from training.processes.states import expand


def log_kernel(squared_distance: torch.Tensor, sigma: torch.Tensor, N: int, D: float) -> torch.Tensor:
    """Log of the perturbation kernel up to a constant of x: -(N + D)/2 log(1 + |x - y|^2 / (D sigma^2)).

    PFGM++ eq. 5 at r = sigma sqrt(D), in the form that keeps its digits for large D; D = inf: -|x - y|^2 / (2 sigma^2).
    """
    if math.isinf(D):
        return -squared_distance / (2 * sigma**2)
    return -(N + D) / 2 * torch.log1p(squared_distance / (sigma**2 * D))


def posterior_weights(
    x: torch.Tensor, data: torch.Tensor, sigma: float | torch.Tensor, D: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Posterior [B, n] of the data points given noisy x: softmax of `log_kernel`, float64.

    x: [B, *data_shape]; data: [n, *data_shape]; sigma: scalar or [B]; mask: [B, n] bool, points that may be meant.
    """
    x, data = x.to(torch.float64).flatten(1), data.to(torch.float64).flatten(1)
    center = data.mean(0)  # distances by one product; centring keeps its digits
    x, data = x - center, data - center
    squared = (x.square().sum(1, keepdim=True) - 2 * x @ data.mT + data.square().sum(1)).clamp_min(0)
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1, 1)
    log_weights = log_kernel(squared, sigma, x.shape[1], float(D))
    return torch.softmax(log_weights if mask is None else log_weights.masked_fill(~mask, -math.inf), dim=1)


class PosteriorMean:
    """The optimal denoiser of a finite data set for PFGM++ noise: sum_i w_i y_i (any D; D = inf: Gaussian noise).

    data: [n, *data_shape]. labels: [n, K] one-hot, or None; given labels, a sample's posterior is over its own class.
    """

    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self, data: torch.Tensor, D: float = math.inf, labels: torch.Tensor | None = None):
        self.data, self.D = data.to(torch.float64), float(D)
        if not self.D > 0:
            raise ValueError(f"D = {D}: give a number > 0 or inf")
        self.labels, self.label_dim = labels, 0 if labels is None else labels.shape[1]
        self.sigma_data = float(self.data.std(unbiased=False))

    def __call__(
        self, x: torch.Tensor, sigma: float | torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """D(x; sigma) in x's type."""
        weights = posterior_weights(x, self.data.to(x.device), sigma, self.D)
        if class_labels is not None and self.labels is not None:
            weights = weights * (class_labels.to(torch.float64) @ self.labels.to(torch.float64).mT)
            weights = weights / weights.sum(1, keepdim=True)
        return (weights @ self.data.to(x.device).flatten(1)).reshape(x.shape).to(x.dtype)


@persistent
class PFGMpp(GaussianKernel):
    """PFGM++ noise with D augmented dimensions: multivariate Student-t with D degrees of freedom (PFGM++ eq. 5).

    The perturbation kernel p_r(x|y) ~ (|x-y|^2 + r^2)^(-(N+D)/2) at r = sigma sqrt(D) is the law of
    y + sigma g / sqrt(u), g ~ N(0, I_N), u ~ Gamma(D/2, rate D/2), one u per sample. D may be any number > 0, or inf
    (or "inf"), which is Gaussian. The mean of the training loss is finite for D > 2 only, its variance for D > 4.
    """

    def __init__(self, D: float | str = 2048.0):
        self.D = self.aug_dim = number("D", D)
        if not self.D > 0:
            raise ValueError(f"D = {D}: the number of augmented dimensions must be > 0, or inf")
        if self.D <= 4:
            what = "mean for D <= 2" if self.D <= 2 else "variance for D <= 4"
            warnings.warn(f"D = {D}: the training loss has no finite {what}", stacklevel=3)

    def __repr__(self):
        return f"PFGMpp(D={self.D:g})"

    def unit_noise(
        self, shape: Shape, generator: Generator = None, device: Device = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """As `GaussianKernel.unit_noise`: the direction is drawn from `generator`, the radius from a child of it.

        So a seed shares its direction, and everything drawn later, across all D; D = inf is bit-identical to the Gaussian.
        """
        if math.isinf(self.D):
            return super().unit_noise(shape, generator, device, dtype)
        child = random.child_generator(generator, device=device or "cpu")  # before g: the state moves on
        gauss = super().unit_noise(shape, generator, device, dtype)  # [N, ...]
        gamma = random.standard_gamma(self.D / 2, shape[0], child, gauss.device) / (self.D / 2)  # [N]
        return (gauss.to(torch.float64) * expand(gamma.rsqrt(), gauss)).to(dtype)
