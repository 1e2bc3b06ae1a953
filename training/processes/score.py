"""How a network becomes the score that solvers and likelihoods call: `score(u, t) -> [N, V, *data_shape]`.

A network that brings its own `score(u, t)` (a joint network, or any test double) is used as it is. A denoiser sees
y = m' C^-1 u / snr at noise level sigma(t), which is all that the state says about the data. A joint network is a denoiser,
too, and is used as one under any process but the one whose state it sees.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_utils.devices import send
from training.processes.base import Process, is_linear
from training.processes.states import expand


def require_linear(process: object) -> None:
    """Raises ValueError for a noise kernel that is no linear process (PFGM++)."""
    if not is_linear(process):
        raise ValueError(
            f"{process!r} is a noise kernel without a linear-process view: use heun, or a process such as edm or cld"
        )


def brings_score(net: Any, process: Process) -> bool:
    """Whether `net` has a `score(u, t)` for the states of this process."""
    if not hasattr(net, "score"):
        return False
    own = getattr(net, "process", None)
    return own is None or not callable(net) or same_process(own, process)


def same_process(one: Process, other: Process) -> bool:
    """Whether two processes are the same diffusion: equal matrices, rate and start."""
    if one is other:
        return True
    facts = [(getattr(p, "beta_range", None), getattr(p, "init_aux_var", None), p.V) for p in (one, other)]
    if facts[0] != facts[1] or facts[0][0] is None:
        return False
    return all(torch.equal(getattr(one, name).detach(), getattr(other, name).detach()) for name in "QDS")


class DenoiserScore:
    """Score of a process from an EDM denoiser `net(y, sigma, labels)`, guided or not.

    net_dtype: what the network is fed, float32 as trained. States are float64, so y is rounded; the first-order effect
    of that, with the slope c_skip = sigma_data^2 / (sigma^2 + sigma_data^2) which every EDM denoiser nearly has at low
    noise, is given back. So scores stay exact to noise levels below float32's resolution.
    """

    def __init__(
        self, net: Callable, process: Process, labels: Tensor | None = None, net_dtype: torch.dtype = torch.float32
    ):
        self.net, self.process, self.labels, self.net_dtype = net, process, labels, net_dtype
        self.sigma_data = float(net.sigma_data)

    def denoise(self, y: Tensor, sigma: Tensor) -> Tensor:
        """D(y; sigma) in y's type; y: [N, *data_shape], sigma: scalar or [N]."""
        sigma = send(sigma, y.device).expand(len(y))
        rounded = y.to(self.net_dtype)
        denoised = self.net(rounded, sigma.to(self.net_dtype), self.labels).to(y.dtype)
        if y.dtype == self.net_dtype:
            return denoised
        skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        return denoised + expand(skip, y).to(y.dtype) * (y - rounded.to(y.dtype)).detach()

    def denoised(self, u: Tensor, t: float | Tensor) -> Tensor:
        """Posterior mean of x0 [N, *data_shape] for the state u [N, V, *data_shape] at time t."""
        return self.denoise(*self.process.project(u, t))

    def __call__(self, u: Tensor, t: float | Tensor) -> Tensor:
        return self.process.score(u, t, self.denoised(u, t))


class GivenScore:
    """Score of a network that brings its own: `net.score(u, t)`, or `net.score(u, t, labels)` if it takes labels."""

    def __init__(self, net: Any, process: Process | None, labels: Tensor | None = None):
        self.net, self.process = net, process
        parameters = [] if labels is None else inspect.signature(net.score).parameters.values()
        takes_labels = len(parameters) >= 3 or any(p.kind == p.VAR_POSITIONAL for p in parameters)
        self.arguments = (labels,) if takes_labels else ()

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data; what brings its score may do without where nobody asks."""
        return float(self.net.sigma_data)

    def denoised(self, u: Tensor, t: float | Tensor) -> Tensor:
        """Posterior mean of x0 [N, *data_shape] from the score (Tweedie): y + sigma^2 m' score."""
        y, sigma = self.process.project(u, t)
        mean = self.process.kernel(t)[0].detach().to(u)  # [..., V]
        shift = (mean[..., None, :] @ self(u, t).flatten(2))[:, 0].reshape(y.shape)
        return y + expand(sigma**2, y).to(y.dtype) * shift.to(y.dtype)

    def __call__(self, u: Tensor, t: float | Tensor) -> Tensor:
        return self.net.score(u, t, *self.arguments).to(u.dtype)


def make_score(
    net: Any, process: Process, labels: Tensor | None = None, net_dtype: torch.dtype = torch.float32
) -> DenoiserScore | GivenScore:
    """The score of `net` under `process`: callable (u, t) -> [N, V, *data_shape], with `.denoised(u, t)`.

    Raises ValueError if the process has no linear-process view (PFGM++ at finite D).
    """
    require_linear(process)
    if brings_score(net, process):
        return GivenScore(net, process, labels)
    return DenoiserScore(net, process, labels, net_dtype)
