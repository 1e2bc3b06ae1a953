"""Preconditioning of the EDM-era networks: EDM, VP, VE and iDDPM (EDM table 1)."""

import math
from typing import Any

import torch
from torch import Tensor

from torch_utils.persistence import persistent
from training.networks_edm.hounet import HoUNet
from training.networks_edm.layers import LogVariance, require
from training.networks_edm.unets import DhariwalUNet, SongUNet
from training.networks_edm2 import Preconditioned


class _Precond(Preconditioned):
    """What the four preconditioners share.

    model_type: a key of MODELS, more: its arguments. sigma_data: standard deviation of the data, for losses and
    solvers (only EDM's preconditioning uses it). logvar_channels: width of the uncertainty head, 0: none, u = 0.
    """

    outputs_per_channel = 1

    def __init__(
        self, img_resolution, img_channels, label_dim, use_fp16, model_type, sigma_data=0.5, logvar_channels=0,
        reduced_dtype="float16", **more,
    ):  # fmt: skip
        require("model_type", model_type, MODELS)
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, sigma_data)
        require("reduced_dtype", reduced_dtype, ("float16", "bfloat16"))
        self.reduced_dtype = reduced_dtype
        outputs = img_channels * self.outputs_per_channel
        self.model = MODELS[model_type](img_resolution, img_channels, outputs, label_dim, **more)
        # Created after the model and only on request: state_dicts and seeded weights of the release stay valid.
        self.logvar = LogVariance(logvar_channels) if logvar_channels else None

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise level the network was trained for, in the shape of sigma."""
        return torch.as_tensor(sigma)

    def log_variance(self, sigma: Tensor, num: int) -> Tensor:
        return (torch.zeros_like(sigma) if self.logvar is None else self.logvar(sigma)).expand(num, 1, 1, 1)


@persistent
class EDMPrecond(_Precond):
    """EDM's own preconditioning (EDM Table 1, last column)."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,  # 0: unconditional
        use_fp16: bool = False,  # half precision on a GPU
        sigma_min: float = 0,
        sigma_max: float = float("inf"),
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        **model_kwargs: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, sigma_data, **model_kwargs)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max


@persistent
class VPPrecond(_Precond):
    """Variance preserving (DDPM, Song et al.) seen as a denoiser (EDM Table 1, first column). x is not VP-scaled."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        beta_d: float = 19.9,  # extent of the noise schedule
        beta_min: float = 0.1,  # its slope at t = 0
        M: int = 1000,  # number of time steps of the original
        epsilon_t: float = 1e-5,  # smallest time
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs)
        self.beta_d, self.beta_min, self.M, self.epsilon_t = beta_d, beta_min, M, epsilon_t
        # float32 on purpose: cancellation makes sigma(1e-5) = 2^-10, which released networks carry.
        limits = torch.tensor([epsilon_t, 1.0], dtype=torch.float32, device="cpu")
        self.sigma_min, self.sigma_max = self.sigma(limits).tolist()

    def sigma(self, t: Tensor | float) -> Tensor:
        """Noise level at time t (float32)."""
        t = t if torch.is_tensor(t) else torch.as_tensor(t)
        return ((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt()

    def sigma_inv(self, sigma: Tensor | float) -> Tensor:
        """Time at which the noise level is sigma."""
        sigma = torch.as_tensor(sigma)
        return ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * self.sigma_inv(sigma)


@persistent
class VEPrecond(_Precond):
    """Variance exploding (NCSN, Song et al.) seen as a denoiser (EDM Table 1, second column)."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.02,
        sigma_max: float = 100,
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ones_like(sigma), sigma, torch.ones_like(sigma), (0.5 * sigma).log()


def iddpm_levels(M: int, C_1: float, C_2: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Noise levels u [M + 1] of improved DDPM, falling to 0 (EDM Appendix C.3.4)."""
    steps = torch.arange(M + 1, dtype=dtype, device="cpu")
    alpha_bar = (0.5 * math.pi * steps / M / (C_2 + 1)).sin() ** 2
    ratio = (alpha_bar[:-1] / alpha_bar[1:]).clip(min=C_1)  # [M]
    u = torch.zeros(M + 1, dtype=dtype, device="cpu")
    for j in range(M, 0, -1):
        u[j - 1] = ((u[j] ** 2 + 1) / ratio[j - 1] - 1).sqrt()
    return u


@persistent
class iDDPMPrecond(_Precond):
    """Improved DDPM (Nichol & Dhariwal 2021) seen as a denoiser (EDM Table 1, third column).

    The network has twice the output channels (its learned variances); only the first half is used.
    """

    outputs_per_channel = 2

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        C_1: float = 0.001,  # largest ratio of successive signal levels kept
        C_2: float = 0.008,  # offset of the cosine schedule
        M: int = 1000,  # number of time steps
        model_type: str = "DhariwalUNet",
        **model_kwargs: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs)
        self.C_1, self.C_2, self.M = C_1, C_2, M
        if not 1 <= M <= 10_000:
            raise ValueError(f"M={M}: the number of time steps must lie in 1..10000")
        u = iddpm_levels(M, C_1, C_2)
        self.register_buffer("u", torch.tensor(u.tolist()))
        self.sigma_min, self.sigma_max = float(u[M - 1]), float(u[0])

    def round_sigma(self, sigma: Tensor | float, return_index: bool = False) -> Tensor:
        sigma = torch.as_tensor(sigma)
        index = (sigma.to(self.u).reshape(-1, 1) - self.u).abs().argmin(dim=1)  # of [N, M + 1]
        result = index if return_index else self.u[index].to(sigma.dtype)
        return result.reshape(sigma.shape).to(sigma.device)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c_noise = (self.M - 1 - self.round_sigma(sigma, return_index=True)).to(torch.float32)
        return torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise


MODELS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet, "HoUNet": HoUNet}
