"""At which noise levels to train the reduced denoiser, and with which weight: the laws of the CLD and MDM papers.

The published objectives are integrals over t of weight(t) |D(y; sigma(t)) - x0|^2. `NoiseLevels.draw` turns uniform
numbers into times of a chosen density and returns weight / density, so the objective never depends on the density.
"""

from __future__ import annotations

import torch

from training.processes.base import Process, Times, as_time, is_linear

SAMPLINGS = ("uniform", "importance", "snr")
WEIGHTINGS = ("likelihood", "reweightedv1", "reweightedv2")


def importance_time(uniform: Times, process: Process, t_min: float) -> torch.Tensor:
    """Quantiles of MDM's importance density, beta(t) / (1 - e^-B(t)) on [t_min, 1]; float64, exact inverse.

    The same law for every process: it is that of VP. B(t) is the integral of beta. uniform: values in [0, 1].
    """
    uniform = as_time(uniform)
    low, high = (process.beta_integral(t).expm1().log() for t in (t_min, 1.0))
    return process.beta_integral_inverse(torch.nn.functional.softplus(low + uniform * (high - low)))


def importance_density(t: Times, process: Process, t_min: float) -> torch.Tensor:
    """Density of `importance_time` at t."""
    low, high = (process.beta_integral(value).expm1().log() for value in (t_min, 1.0))
    return process.beta(t) / -torch.expm1(-process.beta_integral(t)) / (high - low)


def snr_law(
    uniform: torch.Tensor, snr_min: torch.Tensor, snr_max: torch.Tensor, sigma_data: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sigma, weight) with log(1 + sigma_data^2 snr) uniform between the ends; needs no process.

    weight: that of the likelihood, 1/2 d snr, divided by the density. It equals EDM's
    (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 times a constant.
    """
    variance = sigma_data**2
    low, high = torch.log1p(variance * snr_min), torch.log1p(variance * snr_max)
    level = low + uniform * (high - low)
    snr = torch.expm1(level) / variance
    return snr.rsqrt(), 0.5 * (high - low) * level.exp() / variance


@torch.no_grad()
def weight(process: Process, t: Times, weighting: str = "likelihood") -> torch.Tensor:
    """Weight on |D - x0|^2 at time t (float64, t's shape) of the objective that is uniform in t.

    likelihood: 1/2 m' C^-1 (2 D beta) C^-1 m = -1/2 d snr/dt, maximum likelihood. reweightedv2: the error of the
    noise prediction, summed over the variables that receive noise (CLD's, MDM's cld_noise_pred; VP: snr).
    reweightedv1: the same with each variable times its D beta (CLD §4.2). EDM has the first only.
    """
    if weighting == "likelihood":
        return process.snr_rate(t) / 2
    t = as_time(t)
    L, mean = process.cholesky(t).cpu(), process.kernel(t)[0].cpu()
    a = torch.linalg.solve_triangular(L, mean[..., None], upper=False)[..., 0]  # noise prediction error per D - x0
    noise = torch.diagonal(process.D)
    factor = (noise > 0).to(a.dtype) if weighting == "reweightedv2" else noise * process.beta(t).cpu()[..., None]
    return (a.square() * factor).sum(-1).to(t.device)


class NoiseLevels:
    """Noise levels of a process for training the reduced denoiser.

    sampling: "uniform" in t, "importance" (MDM's density), or "snr" (log(1 + sigma_data^2 snr) uniform: lowest
    variance, and the only one that needs no time). weighting: see `weight`.
    """

    def __init__(self, process: Process, sampling: str, weighting: str, t_min: float, sigma_data: float = 0.5):
        for name, value, known in (("sampling", sampling, SAMPLINGS), ("weighting", weighting, WEIGHTINGS)):
            if value not in known:
                raise ValueError(f"{name} {value!r}: choose one of {', '.join(known)}")
        given = is_linear(process) and process.beta is not None  # by matrices Q and D
        if not given and not (is_linear(process) and (sampling, weighting) == ("snr", "likelihood")):
            raise ValueError(f"{sampling} sampling with {weighting} weighting is not defined for {process!r}")
        self.process, self.sampling, self.weighting, self.sigma_data = process, sampling, weighting, float(sigma_data)
        self.t_min = float(t_min)
        if not 0 < self.t_min < process.T:
            raise ValueError(f"t_min = {t_min}: give a time in (0, {process.T:g})")

    @torch.no_grad()
    def draw(self, uniform: Times) -> tuple[torch.Tensor, torch.Tensor]:
        """(sigma, weight), float64 on uniform's device, from uniform numbers in [0, 1) of any shape.

        The mean of weight * |D(x0 + sigma n; sigma) - x0|^2 is the objective's integral over [t_min, T].
        """
        uniform = as_time(uniform)
        process, t_min = self.process, self.t_min
        if self.sampling == "snr":
            ends = process.snr(process.T), process.snr(t_min)
            sigma, value = snr_law(uniform, *ends, self.sigma_data)
            if self.weighting == "likelihood":
                return sigma, value
            t = process.time(sigma.clamp(*(float(end.rsqrt()) for end in reversed(ends))))
            return sigma, value * 2 / process.snr_rate(t) * weight(process, t, self.weighting)
        if self.sampling == "uniform":
            t, density = t_min + (process.T - t_min) * uniform, 1 / (process.T - t_min)
        else:
            t = importance_time(uniform, process, t_min).clamp(t_min, process.T)
            density = importance_density(t, process, t_min)
        return process.sigma(t), weight(process, t, self.weighting) / density
