"""Between which times a solver of a process runs, in which steps, and the state that it starts from."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from training.ablation import roots
from training.processes import Process
from training.processes.score import require_linear

Level = float | None


def _own(net, name, otherwise):
    """An attribute of a denoiser, which has all of the contract; what brings its score may do without."""
    return float(getattr(net, name, otherwise) if hasattr(net, "score") else getattr(net, name))


@torch.no_grad()
def endpoints(
    net: Any,
    process: Process,
    *,
    grid: str = "sigma",
    t_min: Level = None,
    t_max: Level = None,
    sigma_min: Level = None,
    sigma_max: Level = None,
) -> tuple[float, float]:
    """(t_max, t_min) that a solver runs between, forward times.

    t_min: default t(sigma_min); sigma_min: default 0.002, or the network's if that is larger.
    t_max: default t(sigma_max), or T where the process does not get so far; sigma_max: default 80, or the network's if
    smaller. With a uniform or quadratic grid and an explicit t_min the default is T: the published grids.

    Warns if the data still shows at t_max (sigma < 10 sigma_data). Raises ValueError if t_min >= t_max.
    """
    require_linear(process)
    end = getattr(process, "T", 1.0)
    top = float(process.sigma(end))
    if t_max is None:
        if sigma_max is None:
            sigma_max = min(80.0, _own(net, "sigma_max", math.inf))
        published = grid != "sigma" and t_min is not None
        t_max = end if published or sigma_max >= top else float(process.time(sigma_max))
    if t_min is None:
        if sigma_min is None:
            sigma_min = max(0.002, _own(net, "sigma_min", 0.0))
        t_min = float(process.time(min(sigma_min, top)))
    if not 0 < t_min < t_max <= end * (1 + 1e-9):
        raise ValueError(f"t_min = {t_min:g}, t_max = {t_max:g}: need 0 < t_min < t_max <= {end:g}")
    reached = float(process.sigma(t_max))
    if reached < 10 * _own(net, "sigma_data", 0.0):
        warnings.warn(
            f"{process!r} reaches only sigma = {reached:.3g} < 10 sigma_data: the start of sampling depends on the data",
            stacklevel=3,
        )
    return float(t_max), float(t_min)


@torch.no_grad()
def time_grid(
    net: Any, process: Process, num_steps: int, *, grid: str = "sigma", rho: float = 7.0, **ends: Level
) -> Tensor:
    """Forward times of `num_steps` steps, [num_steps + 1] decreasing float64, between `endpoints` (ends: its options).

    grid: "sigma" is EDM's in noise levels (exponent rho), "uniform" is linear in t, "quadratic" is
    t_min + (t_max - t_min) ((K - i) / K)^2, large steps first (CLD, MDM).
    """
    if num_steps is None or num_steps < 1:
        raise ValueError(f"num_steps = {num_steps}: at least one step is needed")
    t_max, t_min = endpoints(net, process, grid=grid, **ends)
    left = 1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    if grid == "uniform":
        times = t_min + (t_max - t_min) * left
    elif grid == "quadratic":
        times = t_min + (t_max - t_min) * left**2
    elif grid == "sigma":
        low, high = roots(rho, *(float(process.sigma(t)) for t in (t_min, t_max)))
        times = process.time((low + (high - low) * left).clamp(low, high) ** rho)
    else:
        raise ValueError(f"grid {grid!r}: choose sigma, uniform or quadratic")
    times[0], times[-1] = t_max, t_min
    return times


ENDPOINT_OPTIONS = ("grid", "t_min", "t_max", "sigma_min", "sigma_max")


@torch.no_grad()
def start_state(
    net: Any,
    process: Process,
    shape: Sequence[int],
    generator: Any = None,
    *,
    prior: str = "matched",
    device: str | torch.device | None = None,
    times: Sequence[float] | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Latents [N, V, *data_shape] for the solvers below, at the time where they start.

    shape: that of the images, [N, *data_shape]. prior: "matched", N(0, C + sigma_data^2 m m') as the data really are
    at that time, or "stationary", N(0, S) as published, with its mismatch. times and options as given to the solver.
    """
    ends = {key: value for key, value in options.items() if key in ENDPOINT_OPTIONS}
    t = float(times[0]) if times is not None else endpoints(net, process, **ends)[0]
    shape = (shape[0], process.V, *shape[1:])
    known = {"sigma_data": float(net.sigma_data)} if prior == "matched" else {}
    return process.prior_sample(shape, generator, prior=prior, t=t, device=device, **known)
