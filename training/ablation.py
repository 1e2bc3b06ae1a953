"""EDM's sampler of ablations: discretisation, schedule, scaling and order chosen apart (EDM sec. 3, table 1).

It solves the probability flow dx/dt = (sigma'/sigma + s'/s) x - sigma' s/sigma D(x/s; sigma) of any schedule sigma(t) and
scaling s(t). With its defaults it is EDM's own sampler; VP's, VE's and iDDPM's are other choices of the same.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dnnlib.util import one_of
from torch_utils.devices import send
from training.guidance import guided
from training.networks_edm.precond import iddpm_levels
from training.states import State, last_of

METHODS = ("heun", "euler")
DISCRETIZATIONS = ("edm", "vp", "ve", "iddpm")
SCHEDULES = ("linear", "vp", "ve")
SCALINGS = ("none", "vp")


@dataclass
class Ablation:
    """The choices of EDM table 1; noise levels None: those of the discretisation, within the network's."""

    num_steps: int = 18
    method: str = "heun"  # second order; "euler": first
    disc: str = "edm"  # where the noise levels lie
    schedule: str = "linear"  # sigma(t)
    scaling: str = "none"  # s(t)
    alpha: float = 1.0  # where the second evaluation lies in a step: 1 Heun, 1/2 midpoint, 2/3 Ralston
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0  # edm: exponent of the noise levels
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0
    dtype: torch.dtype = torch.float64

    epsilon_s = 1e-3  # last time of VP
    beta_d, beta_min = 19.9, 0.1  # VP as published, for its default noise levels
    C_1, C_2, M = 0.001, 0.008, 1000  # of iDDPM

    def __post_init__(self) -> None:
        known = {"method": METHODS, "disc": DISCRETIZATIONS, "schedule": SCHEDULES, "scaling": SCALINGS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"--{name}={getattr(self, name)} {one_of(getattr(self, name), values)}")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"--alpha={self.alpha} must lie in (0, 1]")
        if self.num_steps < 1:
            raise ValueError(f"num_steps = {self.num_steps}: at least one step is needed")

    def levels(self, net: Any) -> tuple[Tensor, "_Flow"]:
        """(noise levels [num_steps] as the network knows them, schedule and scaling)."""
        vp = [math.sqrt(math.expm1(self.beta_d * t**2 / 2 + self.beta_min * t)) for t in (self.epsilon_s, 1)]
        low, high = {"vp": vp, "ve": (0.02, 100.0), "iddpm": (0.002, 81.0), "edm": (0.002, 80.0)}[self.disc]
        low = max(low if self.sigma_min is None else self.sigma_min, net.sigma_min)
        high = min(high if self.sigma_max is None else self.sigma_max, net.sigma_max)
        if not 0 < low < high:
            raise ValueError(f"noise levels from {low:g} to {high:g}: need 0 < sigma_min < sigma_max")
        flow = _Flow(self.schedule, self.scaling, low, high, self.epsilon_s)
        if "vp" in (self.disc, self.schedule) and not flow.rises(self.epsilon_s):
            raise ValueError(
                f"no VP schedule spans the noise levels from {low:g} to {high:g}: give a lower --sigma_min"
            )
        part = torch.arange(self.num_steps, dtype=torch.float64) / max(self.num_steps - 1, 1)
        if self.disc == "vp":
            sigmas = flow.vp_sigma(1 + part * (self.epsilon_s - 1))
        elif self.disc == "ve":
            sigmas = (high**2 * (low**2 / high**2) ** part).sqrt()
        elif self.disc == "iddpm":
            u = iddpm_levels(self.M, self.C_1, self.C_2, torch.float64)
            u = u[(u >= low) & (u <= high)]
            if len(u) == 0:
                raise ValueError(f"iDDPM has no noise level from {low:g} to {high:g}")
            sigmas = u[((len(u) - 1) * part).round().to(torch.int64)]
        else:
            ends = roots(self.rho, high, low)
            sigmas = (ends[0] + part * (ends[1] - ends[0])) ** self.rho
        return _rounded(net)(sigmas), flow


class _Flow:
    """sigma(t), its derivative and inverse, and s(t) with s'(t)/s(t). VP's betas are those that span the noise levels."""

    def __init__(self, schedule, scaling, low, high, epsilon):
        logs = math.log1p(low**2), math.log1p(high**2)
        self.beta_d = 2 * (logs[0] / epsilon - logs[1]) / (epsilon - 1)
        self.beta_min = logs[1] - self.beta_d / 2
        self.schedule, self.scaled = schedule, scaling == "vp"

    def vp_sigma(self, t):
        return torch.expm1(self.beta_d * t**2 / 2 + self.beta_min * t).sqrt()

    def rises(self, epsilon):
        """Whether VP's noise level rises over the times from epsilon to 1."""
        return min(self.beta_min + self.beta_d * t for t in (epsilon, 1)) > 0

    def sigma(self, t):
        return {"vp": self.vp_sigma, "ve": torch.sqrt, "linear": lambda t: t}[self.schedule](t)

    def slope(self, t):
        """sigma'(t)"""
        if self.schedule == "vp":
            return (self.beta_min + self.beta_d * t) * (self.sigma(t) + 1 / self.sigma(t)) / 2
        return 1 / (2 * t.sqrt()) if self.schedule == "ve" else torch.ones_like(t)

    def time(self, sigma):
        if self.schedule == "vp":
            return ((self.beta_min**2 + 2 * self.beta_d * torch.log1p(sigma**2)).sqrt() - self.beta_min) / self.beta_d
        return sigma**2 if self.schedule == "ve" else sigma

    def scale(self, t):
        return 1 / (1 + self.sigma(t) ** 2).sqrt() if self.scaled else torch.ones_like(t)

    def scale_slope(self, t):
        """s'(t) / s(t)"""
        return -self.sigma(t) * self.slope(t) * self.scale(t) ** 2 if self.scaled else torch.zeros_like(t)


def roots(rho: float, *sigmas: float) -> list[float]:
    """sigma^(1/rho) of every noise level. Raises ValueError where that is no number."""
    try:
        return [sigma ** (1 / rho) for sigma in sigmas]
    except (OverflowError, ZeroDivisionError):
        raise ValueError(
            f"rho={rho} (--rho) is no exponent for noise levels up to {max(sigmas):g}: give 1 or more"
        ) from None


def _rounded(net):
    """Noise levels -> those nearest to them that the network was trained for."""
    return getattr(net, "round_sigma", lambda sigma: sigma)


@torch.no_grad()
def ablation_states(
    net: Callable,
    noise: Tensor,
    labels: Tensor | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    **options: Any,
) -> Iterator[State]:
    """Generator of States of `ablation`: x after every step, `time` the noise level; the last one is the image."""
    chosen = Ablation(**options)
    sigmas, flow = chosen.levels(net)
    times = torch.cat([flow.time(sigmas), sigmas.new_zeros(1)])
    churned = [chosen.S_min <= float(flow.sigma(t)) <= chosen.S_max for t in times]  # asked of the host
    times = send(times, noise.device)

    def slope(x, t):
        sigma, scale, rate = flow.sigma(t), flow.scale(t), flow.slope(t)
        denoised = net((x / scale).to(chosen.dtype), sigma.to(chosen.dtype), labels).to(x.dtype)
        return (rate / sigma + flow.scale_slope(t)) * x - rate * scale / sigma * denoised

    x = noise.to(chosen.dtype) * (flow.sigma(times[0]) * flow.scale(times[0])).to(chosen.dtype)
    yield State(0, float(sigmas[0]), x)
    for step, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
        sigma = flow.sigma(t)
        gamma = min(chosen.S_churn / chosen.num_steps, math.sqrt(2) - 1) if churned[step] else 0
        t_hat = flow.time(_rounded(net)(sigma + gamma * sigma))
        added = (flow.sigma(t_hat) ** 2 - sigma**2).clip(min=0).sqrt() * flow.scale(t_hat) * chosen.S_noise
        x = flow.scale(t_hat) / flow.scale(t) * x + added * randn_like(x)  # drawn at every step, as in EDM
        h = t_next - t_hat
        first = slope(x, t_hat)
        if chosen.method == "euler" or step == chosen.num_steps - 1:
            x = x + h * first
        else:
            second = slope(x + chosen.alpha * h * first, t_hat + chosen.alpha * h)
            x = x + h * ((1 - 1 / (2 * chosen.alpha)) * first + 1 / (2 * chosen.alpha) * second)
        x = x.to(chosen.dtype)
        yield State(step + 1, float(sigmas[step + 1]) if step + 1 < len(sigmas) else 0.0, x)


def ablation(
    net: Callable,
    noise: Tensor,
    labels: Tensor | None = None,
    gnet: Callable | None = None,
    guidance: float = 1,
    **options: Any,
) -> Tensor:
    """EDM's sampler of ablations: noise [N, *data_shape] -> images; options: fields of `Ablation`."""
    return last_of(ablation_states(guided(net, gnet, guidance), noise, labels, **options)).state
