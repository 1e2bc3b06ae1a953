"""Small networks for 2-D densities. Points are images of one pixel, [N, 2, 1, 1], wherever a denoiser is asked for."""

import math
from typing import Any

import torch
from torch import Tensor

from torch_utils.persistence import persistent
from training.magnitude import MPConv, mp_silu


class MPSiLU(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return mp_silu(x)


class _PointDenoiser(torch.nn.Module):
    """What denoisers of points share: the attributes and the call of the denoiser contract.

    net(x [N, in_dim, 1, 1], sigma [N] or scalar, class_labels [N, label_dim] or None, return_logvar) -> [N, in_dim, 1, 1]
    and, on request, the log-variance [N, 1, 1, 1]. Labels None mean the zero vector; further keywords are ignored.
    """

    label_dim = 0
    img_resolution = 1
    sigma_min = 0.0
    sigma_max = float("inf")

    def __init__(self):
        super().__init__()
        self.logvar = None  # ln(sigma)/4 [N, 1] -> log-variance [N, 1]; None: zero

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        return_logvar: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        sigma = torch.as_tensor(sigma, device=x.device).to(torch.float32).reshape(-1, 1).expand(len(x), 1)
        denoised = self.denoise(x.to(torch.float32).flatten(1), sigma, class_labels).reshape(x.shape)
        if not return_logvar:
            return denoised
        logvar = torch.zeros_like(sigma) if self.logvar is None else self.logvar(sigma.log() / 4)
        return denoised, logvar.reshape(-1, 1, 1, 1)


@persistent
class ToyModel(_PointDenoiser):
    """EDM2's toy network: an energy-like log-density of points, whose gradient is the score (arXiv 2406.02507).

    `logp` and `point_score` take points x [..., 2] and sigma > 0, scalar or [...]. Called as a denoiser,
    net(x [N, 2, 1, 1], sigma [N] or scalar) -> x + sigma^2 point_score(x; sigma).
    """

    def __init__(self, in_dim: int = 2, num_layers: int = 4, hidden_dim: int = 64, sigma_data: float = 0.5):
        super().__init__()
        self.img_channels = in_dim
        self.sigma_data = sigma_data
        layers = [MPConv(in_dim + 2, hidden_dim, kernel=[])]
        for _ in range(num_layers):
            layers += [MPSiLU(), MPConv(hidden_dim, hidden_dim, kernel=[])]
        self.layers = torch.nn.Sequential(*layers)
        self.gain = torch.nn.Parameter(torch.zeros([]))

    def logp(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Unnormalised log-density G(x; sigma) [...] = gain mean(y^2) / sigma - |x/s|^2 / 2, s^2 = sigma_data^2 + sigma^2."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).broadcast_to(x.shape[:-1]).unsqueeze(-1)
        x = x / (self.sigma_data**2 + sigma**2).sqrt()
        y = self.layers(torch.cat([x, sigma.log() / 4, torch.ones_like(sigma)], dim=-1))
        return y.square().mean(dim=-1) * self.gain / sigma.squeeze(-1) - x.square().sum(dim=-1) / 2

    def point_score(self, x: Tensor, sigma: Tensor | float, graph: bool = False) -> Tensor:
        """Gradient of logp [..., 2]; graph=True: differentiable, for training."""
        with torch.enable_grad():
            x = x if graph and x.requires_grad else x.detach().requires_grad_(True)
            return torch.autograd.grad(self.logp(x, sigma).sum(), x, create_graph=graph)[0]

    def denoise(self, points: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Denoised points [N, 2] for sigma [N, 1]; differentiable where gradients are wanted."""
        return points + sigma**2 * self.point_score(points, sigma[:, 0], graph=torch.is_grad_enabled())


@persistent
class MLPDenoiser(_PointDenoiser):
    """Residual MLP with EDM preconditioning for points [N, in_dim, 1, 1], optionally conditional and uncertain."""

    def __init__(
        self,
        label_dim: int = 0,  # 0: unconditional
        hidden_dim: int = 128,  # width, even
        num_layers: int = 4,  # residual layers
        sigma_data: float = 0.5,
        logvar_channels: int = 0,  # width of the uncertainty head; 0: none
        in_dim: int = 2,
    ):
        if hidden_dim < 2 or hidden_dim % 2:
            raise ValueError(f"hidden_dim={hidden_dim} must be even and at least 2")
        super().__init__()
        self.img_channels = in_dim
        self.label_dim = label_dim
        self.sigma_data = sigma_data
        self.map_x = torch.nn.Linear(in_dim, hidden_dim)
        self.map_noise = torch.nn.Linear(hidden_dim, hidden_dim)
        self.map_label = torch.nn.Linear(label_dim, hidden_dim, bias=False) if label_dim else None
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(hidden_dim) for _ in range(num_layers))
        self.inner = torch.nn.ModuleList(torch.nn.Linear(2 * hidden_dim, hidden_dim) for _ in range(num_layers))
        self.outer = torch.nn.ModuleList(torch.nn.Linear(hidden_dim, hidden_dim) for _ in range(num_layers))
        self.out = torch.nn.Linear(hidden_dim, in_dim)
        torch.nn.init.zeros_(self.out.weight)
        torch.nn.init.zeros_(self.out.bias)
        if logvar_channels:
            last = torch.nn.Linear(logvar_channels, 1)
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)
            self.logvar = torch.nn.Sequential(torch.nn.Linear(1, logvar_channels), torch.nn.SiLU(), last)
        # Angles of ln(sigma)/4: periods from 40 down to 1/4, several times the range of useful noise levels and finer.
        freqs = torch.logspace(math.log10(2 * math.pi / 40), math.log10(2 * math.pi * 4), hidden_dim // 2)
        self.register_buffer("freqs", freqs)

    def denoise(self, points: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Denoised points [N, in_dim] for sigma [N, 1]."""
        variance = sigma**2 + self.sigma_data**2
        angle = sigma.log() / 4 * self.freqs
        emb = self.map_noise(torch.cat([angle.cos(), angle.sin()], dim=1))  # [N, hidden]
        if self.map_label is not None and class_labels is not None:
            labels = class_labels.to(torch.float32).reshape(-1, self.label_dim)
            emb = emb + self.map_label(labels) * math.sqrt(self.label_dim)
        emb = torch.nn.functional.silu(emb)
        h = self.map_x(points / variance.sqrt())
        for norm, inner, outer in zip(self.norms, self.inner, self.outer, strict=True):
            h = h + outer(torch.nn.functional.silu(inner(torch.cat([norm(h), emb], dim=1))))
        skip, scale = self.sigma_data**2 / variance, sigma * self.sigma_data / variance.sqrt()
        return skip * points + scale * self.out(h)


class JointMLP(torch.nn.Module):
    """CLD's and MDM's network of points: [u, t], four hidden layers of 128 with SiLU (CLD §9.2, MDM §13).

    forward(x [N, in_channels, 1, 1], t [N], labels ignored) -> [N, out_channels, 1, 1]. 50,562 parameters from 4 to 2.
    """

    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0, hidden_dim: int = 128,
        num_layers: int = 4,
    ):  # fmt: skip
        super().__init__()
        _require_points(img_resolution, label_dim)
        widths = [in_channels + 1] + [hidden_dim] * num_layers
        layers = [part for width in widths[:-1] for part in (torch.nn.Linear(width, hidden_dim), torch.nn.SiLU())]
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(hidden_dim, out_channels))

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), t[:, None]], dim=1))[..., None, None]


class JointResNet(torch.nn.Module):
    """CLD's residual network of points (CLD §9.2): every layer also sees the time code, ln t. 84,996 parameters from 4 to 2."""

    def __init__(
        self, img_resolution: int, in_channels: int, out_channels: int, label_dim: int = 0, hidden_dim: int = 64,
        num_layers: int = 20,
    ):  # fmt: skip
        super().__init__()
        _require_points(img_resolution, label_dim)
        self.first = torch.nn.Linear(in_channels + 1, hidden_dim)
        self.inner = torch.nn.ModuleList(torch.nn.Linear(hidden_dim + 1, hidden_dim) for _ in range(num_layers))
        self.last = torch.nn.Linear(hidden_dim + 1, out_channels)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        silu, code = torch.nn.functional.silu, t[:, None]
        h = silu(self.first(torch.cat([x.flatten(1), code], dim=1)))
        for layer in self.inner:
            h = silu(h + layer(torch.cat([h, code], dim=1)))
        return self.last(torch.cat([h, code], dim=1))[..., None, None]


def _require_points(img_resolution, label_dim):
    if img_resolution != 1 or label_dim:
        raise ValueError(
            f"img_resolution={img_resolution}, label_dim={label_dim}: this network takes points without labels, 1 and 0"
        )
