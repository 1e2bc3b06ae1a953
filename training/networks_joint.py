"""Networks that see the whole state of a linear diffusion, as CLD and MDM train them, and the fair joint denoiser.

A joint network brings the score of all variables, and is also a denoiser of the usual contract: given y at noise level
sigma, what else the state holds is noise that is independent of the data, so it is put back. Validation, sample grids,
guidance and Heun's sampler need to know no more.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_utils.persistence import persistent
from training.networks_edm.layers import require
from training.networks_edm.precond import MODELS
from training.networks_edm2 import UNet
from training.networks_toy import JointMLP, JointResNet
from training.processes import Process
from training.processes.states import apply_matrix, expand

PARAMETERIZATIONS = ("denoiser", "noise", "score", "mixed")
TIME_CODES = ("t", "log-t", "log-sigma")


def _edm2(resolution, inputs, outputs, label_dim, **more):
    return UNet(resolution, inputs, label_dim, **more)  # as many outputs as inputs; those not needed are left out


BODIES = {**MODELS, "EDM2UNet": _edm2, "JointMLP": JointMLP, "JointResNet": JointResNet}


def solve(L: Tensor, u: Tensor, transposed: bool = False) -> Tensor:
    """L^-1 u or L^-T u over the variables; L lower triangular [V, V] or [N, V, V], u [N, V, *data_shape] float64."""
    L = L.to(u.device)
    flat = u.flatten(2)
    L = L.expand(len(u), *L.shape[-2:])
    if transposed:
        return torch.linalg.solve_triangular(L.mT, flat, upper=True).reshape(u.shape)
    return torch.linalg.solve_triangular(L, flat, upper=False).reshape(u.shape)


@persistent
class JointPrecond(torch.nn.Module):
    """A network on the V * C channels of a state [N, V, C, H, W], variable by variable (MDM §6, CLD §1).

    parameterization: what the network F(u, t) returns for the variables from `first` on.

    noise      eps_hat in u = F u_0 + L eps; the score is -L^-T eps_hat (MDM's noise_pred, CLD's plain score).
    score      the score itself (MDM's score_pred).
    mixed      eps_hat = L' Sigma^-1 u + F with Sigma the diagonal of C, as if data had variance 0 where data receive no
               noise, and 1 where they do (CLD's mixed score, §4.1 and §5).
    denoiser   D(u, t) = c_skip y + c_out F(whitened u, ln(sigma)/4): one output for the data, EDM's preconditioning.

    L is the root of `process.perturbation(t, hybrid, cov_eps)`. The process is no part of the network: `bind` gives it one,
    which a loaded snapshot has done. `time_code` is what F is told of the time.
    """

    sigma_min = 0.0
    body = "model"  # what is compiled: all else is V x V work on the CPU

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,  # 0: unconditional
        sigma_data: float = 0.5,
        variables: int = 2,  # V of the process
        first: int = 0,  # the network predicts variables first, ..., V - 1
        parameterization: str = "noise",
        hybrid: bool = True,  # kernel: auxiliaries integrated out, or given
        cov_eps: float = 0.0,  # on the diagonal of the covariance (CLD's numerical_eps)
        time_code: str = "t",
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ):
        super().__init__()
        require("parameterization", parameterization, PARAMETERIZATIONS)
        require("time_code", time_code, TIME_CODES)
        require("model_type", model_type, BODIES)
        if not 0 <= first < variables:
            raise ValueError(f"first={first}: give the index of one of {variables} variables")
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.sigma_data, self.variables, self.first = float(sigma_data), variables, first
        self.parameterization, self.hybrid, self.cov_eps = parameterization, bool(hybrid), float(cov_eps)
        self.time_code = time_code
        self.outputs = 1 if parameterization == "denoiser" else variables - first
        self.model = BODIES[model_type](
            img_resolution, variables * img_channels, self.outputs * img_channels, label_dim, **model_kwargs
        )
        shape, generator = [variables, img_channels, img_resolution, img_resolution], torch.Generator().manual_seed(0)
        rest = torch.randn(shape, generator=generator, device="cpu")
        self.register_buffer("rest", rest, persistent=False)  # of the state, where a denoiser is asked for
        self._bound = ()

    def bind(self, process: Process) -> JointPrecond:
        """Use this process; it stays outside of the module's own parameters. Raises ValueError for another V."""
        if getattr(process, "V", None) != self.variables or process.beta is None:
            raise ValueError(
                f"{process!r} does not fit a joint network of {self.variables} variables: give the linear diffusion it "
                "was trained for"
            )
        if self.parameterization != "denoiser" and self.first > process.first_noised():
            raise ValueError(
                f"first={self.first}: {process!r} adds noise to variables from {process.first_noised()} on"
            )
        self._bound = (process,)
        return self

    @property
    def process(self) -> Process:
        if not self._bound:
            raise ValueError("this joint network has no process yet: bind(process)")
        return self._bound[0]

    @property
    def sigma_max(self) -> float:
        """The noisiest level that the process reaches."""
        with torch.no_grad():
            return float(self.process.sigma(1.0)) if self._bound else math.inf

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """Noise levels beyond the end of the process are its end."""
        return torch.as_tensor(sigma).clamp(max=self.sigma_max)

    def raw(self, u: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """F(u, t) [N, outputs, C, H, W] float32 for u [N, V, C, H, W], t [N]."""
        if self.time_code == "log-sigma":
            code = self.process.sigma(t).log() / 4
        else:
            code = t.log() if self.time_code == "log-t" else t
        if labels is None:
            labels = torch.zeros([len(u), self.label_dim], device=u.device)
        labels = labels.to(torch.float32).reshape(-1, self.label_dim).expand(len(u), -1) if self.label_dim else None
        flat = u.to(torch.float32).flatten(1, 2)
        out = self.model(flat, code.detach().to(flat), labels)[:, : self.outputs * self.img_channels]
        return out.to(torch.float32).unflatten(1, (self.outputs, self.img_channels))

    def noise(self, u: Tensor, t: Tensor, labels: Tensor | None = None, root: Tensor | None = None) -> Tensor:
        """eps_hat of the predicted variables [N, V - first, C, H, W] float64. root: L [N, V, V], where it is known."""
        if root is None:
            root = self.process.perturbation(t, self.hybrid, self.cov_eps)[1]
        out = self.raw(u, t, labels).to(torch.float64)
        if self.parameterization == "noise":
            return out
        inner = root[..., self.first :, self.first :].to(u.device)
        if self.parameterization == "score":
            return -apply_matrix(inner.mT, out)
        mean, cov = self.process.kernel(t.cpu())
        variance = torch.diagonal(cov, dim1=-2, dim2=-1) + self.cov_eps
        if self.first == 0:
            variance = torch.cat([variance[..., :1] + mean[..., :1] ** 2, variance[..., 1:]], dim=-1)
        variance = variance[..., self.first :].to(u.device)
        return out + apply_matrix(inner.mT, u[:, self.first :].to(torch.float64) / expand(variance, u))

    def denoised(self, u: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Posterior mean of x0 [N, C, H, W] float64 for states u [N, V, C, H, W] at times t [N]."""
        u, process = u.to(torch.float64), self.process
        if self.parameterization == "denoiser":
            y, sigma = process.project(u, t)
            parts = process.kernel_parts(t).to(u.device)
            return self._preconditioned(y, sigma, parts.a, apply_matrix(parts.W, u), t, labels)[0]
        return self._completed(u, t, labels)[0]

    def _preconditioned(self, y, sigma, a, white, t, labels):
        """(D, y - D), the second without subtracting what is nearly equal."""
        total = expand(sigma**2 + self.sigma_data**2, y)
        scale = (1 + self.sigma_data**2 * a.square()).rsqrt()  # whitened u to unit variance,
        scale = torch.where(a < 0, -scale, scale).expand(len(y), -1)  # the data's sign: that of W jumps with t
        out = self.raw(expand(scale, white) * white, t, labels)[:, 0].to(y.dtype)
        out = expand(sigma, y) * self.sigma_data * total.rsqrt() * out
        return self.sigma_data**2 / total * y + out, expand(sigma**2, y) / total * y - out

    def _completed(self, u, t, labels):
        """(posterior mean, score of all variables) from the noise of the last ones, those that receive noise.

        E[eps | u] = L^-1 u - a E[x0 | u] has one unknown per data dimension, so any of its rows gives the others.
        """
        process, first = self.process, self.process.first_noised()
        own = process.perturbation(t, self.hybrid, self.cov_eps)[1]
        eps = self.noise(u, t, labels, own)[:, first - self.first :]
        known = -solve(own[..., first:, first:], eps, transposed=True)  # the score of variables first, ...
        L = process.cholesky(t).expand(len(u), -1, -1)
        mean = process.kernel(t)[0].expand(len(u), -1)
        a = torch.linalg.solve_triangular(L, mean[..., None], upper=False)[..., 0].to(u)  # [N, V]
        white = solve(L, u)
        eps = -apply_matrix(L[..., first:, first:].mT, known)
        part = expand(a[:, first:], u)
        denoised = (part * (white[:, first:] - eps)).sum(1) / part.square().sum(1)
        score = -solve(L, white - expand(a, u) * denoised[:, None], transposed=True)
        return denoised, torch.cat([score[:, :first], known], dim=1)

    def score(self, u: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """grad log p_t(u) [N, V, C, H, W] of all variables, in u's type; t scalar or [N].

        Of the variables that the network does not predict it has the digits that `LinearProcess.score` leaves them; the
        denoiser form, whose raw output is y - D, has all.
        """
        t = torch.as_tensor(t, dtype=torch.float64, device=u.device).expand(len(u))
        if self.parameterization == "denoiser":
            wide = u.to(torch.float64)
            y, sigma = self.process.project(wide, t)
            parts = self.process.kernel_parts(t).to(u.device)
            found = self._preconditioned(y, sigma, parts.a, apply_matrix(parts.W, wide), t, labels)
            return self.process.score(wide, t, *found).to(u.dtype)
        return self._completed(u.to(torch.float64), t, labels)[1].to(u.dtype)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        return_logvar: bool = False,
        aux_noise: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Denoise x [N, C, H, W] at noise level sigma, scalar or [N]: the state is x and noise.

        aux_noise: [N, V, C, H, W] standard normal, the rest of the state; default the same for every call and sample.
        Levels above `sigma_max` are denoised there, scaled to its standard deviation.
        """
        if x.device.type == "meta":  # the cost, without values
            labels = class_labels if self.label_dim else None
            out = self.model(
                torch.empty([len(x), self.rest[:, :, 0, 0].numel(), *x.shape[2:]], device="meta"), sigma, labels
            )
            return (out, x.new_zeros([len(x), 1, 1, 1])) if return_logvar else out
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1).expand(len(x))
        y, top = x.to(torch.float64), self.sigma_max
        level, sd = sigma.clamp(max=top), self.sigma_data
        y = y * expand(((level**2 + sd**2) / (sigma**2 + sd**2)).sqrt(), y)
        t = self.process.time(level.detach())
        with torch.no_grad():
            parts = self.process.kernel_parts(t).to(x.device)
        rest = (self.rest.expand(len(x), *self.rest.shape) if aux_noise is None else aux_noise).to(y)
        along = expand(parts.a / parts.snr.sqrt()[..., None], rest)  # unit vectors
        white = rest - along * (along * rest).sum(1, keepdim=True) + expand(parts.a, rest) * y[:, None]
        if self.parameterization == "denoiser":
            denoised = self._preconditioned(y, level, parts.a, white, t, class_labels)[0]
        else:
            sheared = apply_matrix(parts.L, white)
            u = torch.linalg.solve_triangular(parts.T, sheared.flatten(2), upper=True, unitriangular=True)
            denoised = self.denoised(u.reshape(white.shape), t, class_labels)
        denoised = denoised.to(torch.float32)
        return (denoised, torch.zeros([len(x), 1, 1, 1], device=x.device)) if return_logvar else denoised
