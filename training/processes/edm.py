"""EDM's variance-exploding process: y = x0 + sigma n, with time t = sigma."""

import torch

from torch_utils import random
from training.processes.kernels import GaussianKernel, number
from training.processes.states import expand


class EDM(GaussianKernel):
    """du = sqrt(2 sigma) dW in time t = sigma: mean x0, standard deviation sigma (EDM, Karras et al. 2022, eq. 5-6).

    The process contract with one variable, V = 1: state [N, 1, *data_shape]. Time runs from 0 to `T = sigma_max`,
    the prior is N(0, sigma_max^2). Raises ValueError unless sigma_max > 0.
    """

    V = 1

    def __init__(self, sigma_max: float = 80.0):
        self.sigma_max = number("sigma_max", sigma_max)
        if not 0 < self.sigma_max < float("inf"):
            raise ValueError(f"sigma_max = {sigma_max}: give a finite number > 0")

    def __repr__(self):
        return f"EDM(sigma_max={self.sigma_max:g})"

    @property
    def T(self) -> float:
        return self.sigma_max

    def spec(self) -> dict:
        """Plain description, see `training.processes.from_spec`."""
        return {"name": "edm", "sigma_max": self.sigma_max}

    @staticmethod
    def _time(t):
        return torch.as_tensor(t, dtype=torch.float64)

    def sigma(self, t):
        """Noise level of the time; here the time itself."""
        return self._time(t)

    def snr(self, t):
        """Signal-to-noise ratio sigma^-2 per unit signal."""
        return self._time(t) ** -2

    def time(self, sigma):
        """Time of the noise level; here the noise level itself."""
        return self._time(sigma)

    def snr_rate(self, t):
        """-d snr / dt >= 0: twice the ELBO's weight on |D - x0|^2."""
        return 2 * self._time(t) ** -3

    def transition(self, t):
        """F [..., 1, 1]: the identity."""
        return torch.ones_like(self._time(t))[..., None, None]

    def kernel(self, t, hybrid=True):
        """(mean [..., 1], cov [..., 1, 1]) of p(u_t | x0); hybrid=False: the mean map F instead of its first column."""
        F = self.transition(t)
        return (F[..., 0] if hybrid else F), self._time(t)[..., None, None] ** 2

    def cholesky(self, t):
        """L [..., 1, 1] with L L' = cov."""
        return self._time(t)[..., None, None].clone()

    def project(self, u, t):
        """(y [N, *data_shape], sigma): the EDM-noised image that u [N, 1, *data_shape] carries."""
        return u[:, 0], self.sigma(t).to(u.device)

    def score(self, u, t, denoised):
        """(D - y) / sigma^2 as [N, 1, *data_shape]; denoised: [N, *data_shape]."""
        return (denoised.to(u.dtype).unsqueeze(1) - u) / expand(self._time(t), u).to(u.dtype) ** 2

    def drift(self, u, t):
        """Forward drift: zero."""
        return torch.zeros_like(u)

    def diffusion(self, t):
        """G [..., 1, 1] with G G' = d sigma^2 / dt = 2 sigma."""
        return (2 * self._time(t))[..., None, None].sqrt()

    def splitting(self, t, t_next):
        """(F, L) of the exact noise half step of SSCS from t down to t_next < t: Brownian motion."""
        F = self.transition(t)
        return F, (self._time(t) ** 2 - self._time(t_next) ** 2).clamp_min(0)[..., None, None].sqrt()

    def prepare(self, times):
        """Nothing to compute ahead."""

    def noise_power(self, t, t_next):
        """Variance that the forward process adds between t_next and t, [..., 1, 1]."""
        return (self._time(t) ** 2 - self._time(t_next) ** 2)[..., None, None]

    def rotation(self, t, t_next):
        """Identity [..., 1, 1]: nothing moves but by noise."""
        return self.transition(t)

    def precision(self):
        """Inverse stationary covariance [1, 1]: zero, the process never becomes stationary."""
        return torch.zeros(1, 1, dtype=torch.float64)

    def prior_covariance(self, prior="stationary", t=None, sigma_data=0.5):
        """[1, 1] covariance of the sampler's start: sigma^2 ("stationary") or sigma^2 + sigma_data^2 ("matched")."""
        sigma = self._time(self.T if t is None else t)
        extra = {"stationary": 0.0, "matched": sigma_data**2}
        if prior not in extra:
            raise ValueError(f"prior {prior!r}: choose matched or stationary")
        return (sigma**2 + extra[prior])[..., None, None]

    def prior_sample(
        self, shape, generator=None, *, prior="stationary", t=None, sigma_data=0.5, device=None, dtype=torch.float64
    ):
        """Draw a start state of shape [N, 1, *data_shape], see `LinearProcess.prior_sample`."""
        if len(shape) < 2 or shape[1] != 1:
            raise ValueError(f"shape {tuple(shape)}: EDM's state has 1 variable, [N, 1, ...]")
        std = self.prior_covariance(prior, t, sigma_data).sqrt().item()
        return random.randn(shape, generator, device, dtype) * std
