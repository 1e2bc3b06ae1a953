"""Analytic side of PFGM++ (Xu et al. 2023): radius law, posterior-mean denoiser of finite data, phase alignment.

N is the data dimension, D the number of augmented dimensions (any number > 0, or inf: Gaussian), sigma = r / sqrt(D).
Only these quantities need N; sampling (`PFGMpp.unit_noise`) does not.
"""

import math
import warnings

import numpy as np
import torch
from scipy import special, stats

from torch_utils import random
from training.processes.kernels import GaussianKernel, number


def log_kernel(squared_distance, sigma, N, D):
    """Log of the perturbation kernel up to a constant of x: -(N + D)/2 log(1 + |x - y|^2 / (D sigma^2)).

    PFGM++ eq. 5 at r = sigma sqrt(D), in the form that keeps its digits for large D; D = inf: -|x - y|^2 / (2 sigma^2).
    """
    ratio = squared_distance / sigma**2
    return -ratio / 2 if math.isinf(D) else -(N + D) / 2 * torch.log1p(ratio / D)


def log_prob(noise, sigma, D):
    """Log density [n] of noise [n, *data_shape] = x - y under the kernel, with its normaliser."""
    noise = noise.to(torch.float64).flatten(1)
    N = noise.shape[1]
    if math.isinf(D):
        constant = -N / 2 * math.log(2 * math.pi)
    else:
        gamma = special.gammaln([(N + D) / 2, D / 2])
        constant = gamma[0] - gamma[1] - N / 2 * math.log(math.pi * D)
    return log_kernel(noise.square().sum(1), sigma, N, D) + constant - N * math.log(sigma)


def radius_quantile(p, N, D, sigma=1.0):
    """Quantile of |x - y|: (R / (sigma sqrt(D)))^2 ~ BetaPrime(N/2, D/2); D = inf: chi with N degrees of freedom.

    p: array of probabilities. Returns float64 of p's shape.
    """
    p = np.asarray(p, dtype=np.float64)
    if math.isinf(D):
        return sigma * np.sqrt(stats.chi2.ppf(p, N))
    share, rest = special.betaincinv(N / 2, D / 2, p), special.betaincinv(D / 2, N / 2, 1 - p)
    return sigma * np.sqrt(D * share / rest)


def radius_cdf(R, N, D, sigma=1.0):
    """P(|x - y| <= R)."""
    ratio = (np.asarray(R, dtype=np.float64) / sigma) ** 2
    return stats.chi2.cdf(ratio, N) if math.isinf(D) else special.betainc(N / 2, D / 2, ratio / (ratio + D))


def radius_mode(N, D, sigma=1.0):
    """Mode of |x - y|."""
    return sigma * math.sqrt(N - 1) if math.isinf(D) else sigma * math.sqrt(D * (N - 1) / (D + 1))


def radius_mean(N, D, sigma=1.0):
    """Mean of |x - y|; inf for D <= 1."""
    if math.isinf(D):
        return sigma * math.sqrt(2) * math.exp(special.gammaln((N + 1) / 2) - special.gammaln(N / 2))
    if D <= 1:
        return math.inf
    log_ratio = special.betaln(N / 2 + 0.5, D / 2 - 0.5) - special.betaln(N / 2, D / 2)
    return sigma * math.sqrt(D) * math.exp(log_ratio)


def posterior_weights(x, data, sigma, D):
    """Posterior [B, n] of the data points given noisy x: softmax of `log_kernel`, float64.

    x: [B, *data_shape]; data: [n, *data_shape]; sigma: scalar or [B].
    """
    x, data = x.to(torch.float64).flatten(1), data.to(torch.float64).flatten(1)
    center = data.mean(0)  # distances by one product; centring keeps its digits
    x, data = x - center, data - center
    squared = (x.square().sum(1, keepdim=True) + data.square().sum(1) - 2 * x @ data.mT).clamp_min(0)
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1, 1)
    return torch.softmax(log_kernel(squared, sigma, x.shape[1], float(D)), dim=1)


class PosteriorMean:
    """The optimal denoiser of a finite data set for PFGM++ noise: sum_i w_i y_i (any D; D = inf: Gaussian noise).

    data: [n, *data_shape]. labels: [n, K] one-hot, or None; given labels, a sample's posterior is over its own class.
    """

    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self, data, D=math.inf, labels=None):
        self.data, self.D = data.to(torch.float64), float(D)
        if not self.D > 0:
            raise ValueError(f"D = {D}: give a number > 0 or inf")
        self.labels, self.label_dim = labels, 0 if labels is None else labels.shape[1]
        self.sigma_data = float(self.data.std(unbiased=False))

    def __call__(self, x, sigma, class_labels=None):
        """D(x; sigma) in x's type."""
        weights = posterior_weights(x, self.data.to(x.device), sigma, self.D)
        if class_labels is not None and self.labels is not None:
            weights = weights * (class_labels.to(torch.float64) @ self.labels.to(torch.float64).mT)
            weights = weights / weights.sum(1, keepdim=True)
        return (weights @ self.data.to(x.device).flatten(1)).reshape(x.shape).to(x.dtype)


def mean_tvd(data, kernel, sigmas, num_samples=1000, generator=None):
    """Mean total variation distance of the posterior over the data from uniform, at each noise level.

    1/2 sum_i |w_i - 1/n|, averaged over noisy samples x (PFGM++ Figure 3): near 1 where x knows its datum, near 0 where
    it has forgotten it. Plotted against sigma = r / sqrt(D) the curves of different D coincide: phase alignment.
    data: [n, *data_shape]; kernel: PFGMpp or GaussianKernel. Returns (mean, standard error), float64 [len(sigmas)].
    """
    D, n = getattr(kernel, "D", math.inf), len(data)
    index = torch.arange(num_samples, device=data.device) % n
    noise = kernel.unit_noise((num_samples, *data.shape[1:]), generator, device=data.device, dtype=torch.float64)
    means, errors = [], []
    for sigma in sigmas:
        weights = posterior_weights(data[index].to(torch.float64) + sigma * noise, data, sigma, D)
        tvd = (weights - 1 / n).abs().sum(1) / 2
        means.append(tvd.mean())
        errors.append(tvd.std() / math.sqrt(num_samples))
    return torch.stack(means), torch.stack(errors)


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
