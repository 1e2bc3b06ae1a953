"""EDM's variance-exploding process (Karras et al. 2022): y = x0 + sigma n, with time t = sigma."""

from __future__ import annotations

import torch

from torch_utils.persistence import persistent
from training.processes.base import Process, Times, as_time, positive
from training.processes.states import expand


@persistent
class EDM(Process):
    """du = sqrt(2 sigma) dW in time t = sigma in [0, sigma_max]: mean x0, standard deviation sigma (EDM, eq. 5-6)."""

    V = 1

    def __init__(self, sigma_max: float = 80.0):
        self.T = self.sigma_max = positive("sigma_max", sigma_max)

    def __repr__(self):
        return f"EDM(sigma_max={self.sigma_max:g})"

    def sigma(self, t: Times) -> torch.Tensor:
        return as_time(t)

    def time(self, sigma: Times) -> torch.Tensor:
        return as_time(sigma)

    def snr(self, t: Times) -> torch.Tensor:
        return as_time(t) ** -2

    def snr_rate(self, t: Times) -> torch.Tensor:
        return 2 * as_time(t) ** -3

    def transition(self, t: Times) -> torch.Tensor:
        return torch.ones_like(as_time(t))[..., None, None]

    def kernel(self, t: Times, hybrid: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        F = self.transition(t)
        return (F[..., 0] if hybrid else F), as_time(t)[..., None, None] ** 2

    def cholesky(self, t: Times) -> torch.Tensor:
        return as_time(t)[..., None, None].clone()

    def project(self, u: torch.Tensor, t: Times) -> tuple[torch.Tensor, torch.Tensor]:
        return u[:, 0], as_time(t)

    def score(self, u: torch.Tensor, t: Times, denoised: torch.Tensor) -> torch.Tensor:
        return (denoised.to(u.dtype).unsqueeze(1) - u) / expand(as_time(t), u).to(u.dtype) ** 2

    def drift(self, u: torch.Tensor, t: Times) -> torch.Tensor:
        return torch.zeros_like(u)

    def diffusion(self, t: Times) -> torch.Tensor:
        return (2 * as_time(t))[..., None, None].sqrt()  # d sigma^2 / dt = 2 sigma

    def splitting(self, t: Times, t_next: Times) -> tuple[torch.Tensor, torch.Tensor]:
        """Brownian motion."""
        return self.transition(t), self.noise_power(t, t_next).clamp_min(0).sqrt()

    def noise_power(self, t: Times, t_next: Times) -> torch.Tensor:
        return (as_time(t) ** 2 - as_time(t_next) ** 2)[..., None, None]

    def rotation(self, t: Times, t_next: Times) -> torch.Tensor:
        return self.transition(t)

    def precision(self) -> torch.Tensor:
        """Zero: the process never becomes stationary."""
        return torch.zeros(1, 1, dtype=torch.float64)

    def stationary(self, t: Times) -> torch.Tensor:
        return as_time(t)[..., None, None] ** 2
