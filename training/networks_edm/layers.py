"""Layers and the residual block shared by the EDM-era U-Nets (Karras et al. 2022, "EDM").

Parameter names, creation order and random draws follow the released checkpoints, so that their state_dicts load and
a given seed initialises a network alike.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dnnlib.util import one_of
from training.magnitude import LOOKUP_WIDTH, count_heads, project


def require(name: str, value: str, known: Collection[str]) -> None:
    """Raises ValueError unless `value` is one of the known ones."""
    if value not in known:
        raise ValueError(f"{name}={value!r} {one_of(value, known)}")


def init_tensor(shape: Sequence[int], mode: str, fan_in: int, fan_out: int) -> Tensor:
    """Random initial values: Glorot ("xavier") or He ("kaiming"), uniform or normal."""
    require("init_mode", mode, ("xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal"))
    fan = (fan_in + fan_out) / 2 if mode.startswith("xavier") else fan_in
    if mode.endswith("uniform"):
        return math.sqrt(3 / fan) * (torch.rand(*shape) * 2 - 1)
    return math.sqrt(1 / fan) * torch.randn(*shape)


class Linear(torch.nn.Module):
    """x [..., in_features] -> [..., out_features], weights drawn before the bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        init_mode: str = "kaiming_normal",
        init_weight: float = 1.0,
        init_bias: float = 0.0,
    ):
        super().__init__()
        self.in_features = in_features
        fans = {"mode": init_mode, "fan_in": in_features, "fan_out": out_features}
        self.weight = torch.nn.Parameter(init_tensor([out_features, in_features], **fans) * init_weight)
        self.bias = torch.nn.Parameter(init_tensor([out_features], **fans) * init_bias) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] >= LOOKUP_WIDTH and x.ndim == 2:
            y = project(x, self.weight.to(x.dtype))
            return y if self.bias is None else y + self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv2d(torch.nn.Module):
    """Convolution with optional 2x resampling before it; kernel=0 only resamples.

    x [N, in_channels, H, W] -> [N, out_channels, H', W'], H' = H, 2H (up) or H/2 (down).
    `fused_resample` changes the padding order: no padding between the convolution and the resampling filter.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,  # odd side length, 0: no convolution
        bias: bool = True,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),  # 1-D taps, normalised to sum 1, used along both axes
        fused_resample: bool = False,
        init_mode: str = "kaiming_normal",
        init_weight: float = 1.0,
        init_bias: float = 0.0,
    ):
        if up and down:
            raise ValueError("up=True and down=True exclude each other; choose one")
        super().__init__()
        self.out_channels = out_channels
        self.up = up
        self.down = down
        self.fused_resample = fused_resample
        fans = {"mode": init_mode, "fan_in": in_channels * kernel**2, "fan_out": out_channels * kernel**2}
        self.weight = self.bias = None
        if kernel:
            self.weight = torch.nn.Parameter(
                init_tensor([out_channels, in_channels, kernel, kernel], **fans) * init_weight
            )
            if bias:
                self.bias = torch.nn.Parameter(init_tensor([out_channels], **fans) * init_bias)
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        taps = taps.ger(taps)[None, None] / taps.sum().square()  # [1, 1, n, n]
        self.register_buffer("resample_filter", taps if up or down else None)

    def _resample(self, x, padding):
        if self.resample_filter is None:
            return x
        kernel = self.resample_filter.to(x.dtype).mul(4 if self.up else 1).tile([x.shape[1], 1, 1, 1])
        convolve = F.conv_transpose2d if self.up else F.conv2d
        return convolve(x, kernel, groups=x.shape[1], stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        pad_f = 0 if self.resample_filter is None else (self.resample_filter.shape[-1] - 1) // 2
        if self.weight is None:
            return self._resample(x, pad_f)
        weight = self.weight.to(x.dtype)
        pad_w = weight.shape[-1] // 2
        if self.fused_resample and self.up:
            x = F.conv2d(self._resample(x, max(pad_f - pad_w, 0)), weight, padding=max(pad_w - pad_f, 0))
        elif self.fused_resample and self.down:
            x = self._resample(F.conv2d(x, weight, padding=pad_w + pad_f), 0)
        else:
            x = F.conv2d(self._resample(x, pad_f), weight, padding=pad_w)
        return x if self.bias is None else x + self.bias.to(x.dtype).reshape(1, -1, 1, 1)


class GroupNorm(torch.nn.GroupNorm):
    """Group normalisation in 32 groups, or fewer of at least 4 channels."""

    def __init__(self, num_channels: int, eps: float = 1e-5):
        num_groups = min(32, num_channels // 4)
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(
                f"{num_channels} channels cannot be split into groups of at least 4; "
                "choose model_channels as a multiple of 32 (or of 4 below 128)"
            )
        super().__init__(num_groups, num_channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class PositionalEmbedding(torch.nn.Module):
    """x [N] -> [N, num_channels]: cosines, then sines, of geometrically spaced frequencies."""

    def __init__(self, num_channels: int, endpoint: bool = False):
        super().__init__()
        self.num_channels, self.endpoint = num_channels, endpoint

    def forward(self, x: Tensor) -> Tensor:
        half = self.num_channels // 2
        freqs = torch.arange(half, dtype=torch.float32, device=x.device) / (half - self.endpoint)
        freqs = (1 / 10000) ** freqs
        x = x.ger(freqs.to(x.dtype))  # [N, C/2]
        return torch.cat([x.cos(), x.sin()], dim=1)


class FourierEmbedding(torch.nn.Module):
    """x [N] -> [N, num_channels]: cosines, then sines, of random frequencies (buffer `freqs`)."""

    def __init__(self, num_channels: int, scale: float = 16):
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x.ger((2 * math.pi * self.freqs).to(x.dtype))  # [N, C/2]
        return torch.cat([x.cos(), x.sin()], dim=1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention for q, k, v [B, C, L]; weights in float32 whatever the inputs' type. -> [B, C, L]"""
    logits = torch.einsum("bcq,bck->bqk", q.float(), (k / math.sqrt(k.shape[1])).float())
    return torch.einsum("bqk,bck->bcq", logits.softmax(dim=2).to(v.dtype), v)


@dataclass(frozen=True)
class BlockStyle:
    """What all residual blocks of a U-Net have in common; `init*` are keywords of Linear and Conv2d."""

    emb_channels: int
    num_heads: int | None = None  # where there is attention; None: out_channels // channels_per_head
    channels_per_head: int = 64
    dropout: float = 0.0
    skip_scale: float = 1.0
    eps: float = 1e-5
    resample_filter: Sequence[float] = (1, 1)
    resample_proj: bool = False  # 1x1 convolution on the skip path whenever it resamples
    adaptive_scale: bool = True  # the embedding scales and shifts, instead of being added
    init: dict = field(default_factory=dict)
    init_zero: dict = field(default_factory=lambda: {"init_weight": 0.0})  # of layers that begin near zero
    init_attn: dict | None = None  # None: init


class UNetBlock(torch.nn.Module):
    """Residual block with embedding, resampling and self-attention, for DDPM++, NCSN++ and ADM alike.

    x [N, in_channels, H, W], emb [N or 1, emb_channels] -> [N, out_channels, H', W'].
    Attention silently disappears when out_channels < channels_per_head and num_heads is None, as in the release.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: BlockStyle,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.style = style
        heads = style.channels_per_head, style.num_heads
        self.num_heads = count_heads(out_channels, *heads) if attention else 0
        resample = {"up": up, "down": down, "resample_filter": style.resample_filter}
        init, init_zero = style.init, style.init_zero

        self.norm0 = GroupNorm(in_channels, eps=style.eps)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, **resample, **init)
        self.affine = Linear(style.emb_channels, out_channels * (2 if style.adaptive_scale else 1), **init)
        self.norm1 = GroupNorm(out_channels, eps=style.eps)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, **init_zero)
        self.skip = None
        if in_channels != out_channels or up or down:
            kernel = 1 if style.resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel=kernel, **resample, **init)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=style.eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, kernel=1, **(style.init_attn or init))
            self.proj = Conv2d(out_channels, out_channels, kernel=1, **init_zero)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        y = self.conv0(F.silu(self.norm0(x)))  # [N, out, H', W']
        params = self.affine(emb)[:, :, None, None].to(x.dtype)  # [N, out or 2 out, 1, 1]
        if self.style.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            y = F.silu(torch.addcmul(shift, self.norm1(y), scale + 1))
        else:
            y = F.silu(self.norm1(y + params))
        y = self.conv1(F.dropout(y, p=self.style.dropout, training=self.training))
        x = (y + (x if self.skip is None else self.skip(x))) * self.style.skip_scale
        if self.num_heads:
            n, c = x.shape[:2]
            qkv = self.qkv(self.norm2(x)).reshape(n * self.num_heads, c // self.num_heads, 3, -1)
            x = (self.proj(attention(*qkv.unbind(2)).reshape(x.shape)) + x) * self.style.skip_scale
        return x


class LogVariance(torch.nn.Module):
    """Optional uncertainty head: log-variance u(sigma) [N, 1, 1, 1] from Fourier features of ln(sigma)/4, 0 at first.

    sigma [N, 1, 1, 1]; the loss it serves is the multi-task weighting of EDM2, after Kendall et al. 2018.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.fourier = FourierEmbedding(channels, scale=1)
        self.linear = Linear(channels, 1, init_weight=0.0)

    def forward(self, sigma: Tensor) -> Tensor:
        return self.linear(self.fourier(sigma.log().flatten() / 4)).reshape(-1, 1, 1, 1)
