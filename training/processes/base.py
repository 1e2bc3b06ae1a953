"""What a noise kernel and a process are. Training noise and the prior of `heun` are `sigma * unit_noise`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from torch_utils import random
from torch_utils.persistence import persistent
from torch_utils.random import Device, Generator, Shape
from training.processes.states import apply_matrix

Times = float | torch.Tensor  # forward times, of any batch shape [...]


def number(name: str, value: object) -> float:
    """An option as a float. Raises ValueError that names it for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} = {value!r}: give a number") from None


def positive(name: str, value: object) -> float:
    """An option as a finite float > 0; else ValueError."""
    if not 0 < number(name, value) < math.inf:
        raise ValueError(f"{name} = {value}: give a finite number > 0")
    return float(value)


def as_time(t: Times) -> torch.Tensor:
    """Times as float64."""
    return torch.as_tensor(t, dtype=torch.float64)


def is_linear(process: object) -> bool:
    """Whether it is a process with the methods of `Process`, and no mere noise kernel; base classes do not matter."""
    return getattr(process, "linear", hasattr(process, "project"))


def aug_dim(kernel: object) -> float:
    """Augmented dimensions D of a kernel (PFGM++); inf for Gaussian noise and for kernels that do not say."""
    return getattr(kernel, "aug_dim", math.inf)


def noise_law(kernel: object) -> str:
    """The law of a kernel's noise in words, the same for all that are Gaussian: None, linear processes, D = inf."""
    plain = kernel is None or type(kernel) is GaussianKernel or is_linear(kernel)
    if plain or (aug_dim(kernel) == math.inf and hasattr(kernel, "aug_dim")):
        return "Gaussian"
    options = getattr(kernel, "init_kwargs", {})
    return f"{type(kernel).__name__}({', '.join(f'{name}={value}' for name, value in options.items())})"


@persistent
class GaussianKernel:
    """Standard normal noise. A kernel of your own needs `unit_noise(shape, generator=None)` only."""

    linear = False  # True: a Process

    def unit_noise(
        self, shape: Shape, generator: Generator = None, device: Device = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Noise of unit scale and shape `shape` = [N, *data_shape]. device: default the generator's."""
        return random.randn(shape, generator, device, dtype)


class Process(GaussianKernel):
    """Diffusion whose state is Gaussian given the data: p(u_t | x0) = N(m x0, C) in every data dimension.

    The state u [N, V, *data_shape] holds V variables per data dimension, variable 0 is the data; t in [0, T] is forward
    time. What it says about x0 is y ~ N(x0, sigma^2) with sigma^-2 = snr = m' C^-1 m, so one denoiser D(y; sigma) serves
    every process. Matrices and times are float64; results have the batch shape [...] of t and live on its device.

    A process gives                     what
    V                                   number of variables
    transition(t)                       F [..., V, V]: E[u_t | u_0] = F u_0
    kernel(t, hybrid=True)              mean [..., V] and cov [..., V, V] of p(u_t | x0 = 1), the auxiliaries integrated out;
                                        hybrid=False: F and cov of p(u_t | u_0), where nothing is
    cholesky(t)                         L [..., V, V], lower triangular, L L' = cov; not differentiable
    snr(t), snr_rate(t)                 snr [...], inf at t = 0, and -d snr / dt >= 0: twice the ELBO's weight on |D - x0|^2
    time(sigma)                         the time of a noise level > 0
    project(u, t)                       y = m' C^-1 u / snr [N, *data_shape] and sigma; t: scalar or [N], as sigma
    score(u, t, denoised)               grad log p_t(u) = -C^-1 (u - m D) [N, V, *data_shape], D [N, *data_shape]
    drift(u, t), diffusion(t)           forward: du = drift dt + G dW, G [..., V, V]
    stationary(t)                       covariance [V, V] of the published prior
    and for SSCS and the flow, from t down to t_next < t:
    splitting(t, t_next)                (F, L) of the time-reversed Ornstein-Uhlenbeck part: u <- F u + L noise
    noise_power(t, t_next)              covariance [..., V, V] of the noise that the forward process adds meanwhile
    rotation(t, t_next)                 the part of the flow [..., V, V] that leaves the stationary law alone
    precision()                         inverse stationary covariance [V, V]
    """

    linear = True
    T = 1.0
    beta = None  # rate beta(t) of a diffusion given by matrices Q and D (LinearProcess)

    def sigma(self, t: Times) -> torch.Tensor:
        """EDM noise level snr^-1/2."""
        return self.snr(t).rsqrt()

    def prepare(self, times: Sequence[float] | torch.Tensor) -> None:
        """Compute ahead what a solver needs at these times."""

    def prior_covariance(self, prior: str, t: Times | None = None, sigma_data: float = 0.5) -> torch.Tensor:
        """[V, V] covariance of the start at time t (default T): "stationary", or "matched", C + sigma_data^2 m m'."""
        t = self.T if t is None else t
        if prior == "stationary":
            return self.stationary(t)
        if prior != "matched":
            raise ValueError(f"prior {prior!r}: choose matched or stationary")
        mean, cov = self.kernel(t)
        return cov + sigma_data**2 * mean[..., :, None] * mean[..., None, :]

    def prior_sample(
        self, shape: Shape, generator: Generator = None, prior: str = "stationary", device: Device = None, **at: Times
    ) -> torch.Tensor:
        """Draw a start state of shape [N, V, *data_shape]; at: t and sigma_data of `prior_covariance`.

        "matched" is where data of standard deviation sigma_data really is at t. Raises ValueError for another V.
        """
        if len(shape) < 2 or shape[1] != self.V:
            raise ValueError(f"shape {tuple(shape)}: this process has {self.V} variables, [N, {self.V}, ...]")
        noise = random.randn(shape, generator, device, torch.float64)
        root = torch.linalg.cholesky(self.prior_covariance(prior, **at).detach())
        return apply_matrix(root, noise)
