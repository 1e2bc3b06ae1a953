"""The EDM2 network: a magnitude-preserving U-Net and its preconditioning.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), CVPR 2024, arXiv 2312.02696:
section 2.3 (magnitude preservation), appendix B.6-B.8 (eq. 47-102). Constructor arguments, state_dict names, shapes,
order of random draws and outputs agree with the reference, so weights are interchangeable.

Every learned layer and every fixed function keeps the expected magnitude (RMS per element) of its input.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, dropout, scaled_dot_product_attention, silu

from torch_utils.persistence import persistent


def normalize(x: Tensor, dim: int | Sequence[int] | None = None, eps: float = 1e-4) -> Tensor:
    """x over (eps + RMS over `dim`), EDM2 eq. 47. `dim` defaults to all axes but the first.

    The norm is accumulated in float32 whatever the type of x; eps is added outside the root.
    """
    if dim is None:
        dim = list(range(1, x.ndim))
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32)
    norm = torch.add(eps, norm, alpha=math.sqrt(norm.numel() / x.numel()))
    return x / norm.to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) / 0.596 (EDM2 eq. 81): 0.596 is the RMS of silu of a standard normal."""
    return silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Linear interpolation a -> b at t, scaled back to unit magnitude (EDM2 eq. 88)."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, dim: int = 1, t: float = 0.5) -> Tensor:
    """Concatenate a and b with relative weights 1 - t and t at unit magnitude (EDM2 eq. 103)."""
    na, nb = a.shape[dim], b.shape[dim]
    c = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (c / math.sqrt(na) * (1 - t)), b * (c / math.sqrt(nb) * t)], dim=dim)


def resample(x: Tensor, f: Sequence[float] = (1, 1), mode: str = "keep") -> Tensor:
    """Resample [N, C, H, W] by 2 with the even-length 1-D filter f: mode "keep", "down" or "up"."""
    if mode == "keep":
        return x
    f = np.asarray(f, dtype=np.float32)
    if f.ndim != 1 or len(f) % 2 != 0:
        raise ValueError(f"resample_filter={f.tolist()} must be one-dimensional with an even number of taps")
    pad = (len(f) - 1) // 2
    f = f / f.sum()
    channels = x.shape[1]
    kernel = torch.as_tensor(np.outer(f, f)[None, None], dtype=x.dtype, device=x.device).expand(channels, 1, -1, -1)
    if mode == "down":
        return conv2d(x, kernel, groups=channels, stride=2, padding=pad)
    if mode == "up":
        return conv_transpose2d(x, kernel * 4, groups=channels, stride=2, padding=pad)
    raise ValueError(f"resample mode {mode!r} is none of keep, down, up")


class MPFourier(torch.nn.Module):
    """Magnitude-preserving Fourier features (EDM2 eq. 75): [N] -> [N, num_channels]."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * np.pi * torch.randn(num_channels))
        self.register_buffer("phases", 2 * np.pi * torch.rand(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32).ger(self.freqs.to(torch.float32)) + self.phases.to(torch.float32)
        return (y.cos() * math.sqrt(2)).to(x.dtype)


LOOKUP_WIDTH = 4096  # from so many classes on, rows of weights are looked up


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, K] @ weight [C, K].T; for large K and rows with one entry each, such as labels, that column times the entry."""
    if x.shape[1] >= LOOKUP_WIDTH and not x.is_meta:
        entries = x != 0
        if bool((entries.sum(dim=1) <= 1).all()):
            index = entries.int().argmax(dim=1)
            return weight.t()[index] * x.gather(1, index[:, None])
    return x @ weight.t()


class MPConv(torch.nn.Module):
    """Convolution or (kernel=[]) fully connected layer with forced weight normalisation (EDM2 eq. 47, 66).

    While training, each forward pass overwrites the stored weight by its normalised self; the normalisation inside
    the graph then projects the gradient onto the sphere's tangent. No bias.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int]):
        super().__init__()
        self.out_channels = out_channels
        self.weight = torch.nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: Tensor, gain: float | Tensor = 1) -> Tensor:
        w = self.weight.to(torch.float32)
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(w))
        w = normalize(w) * (gain / math.sqrt(w[0].numel()))
        w = w.to(x.dtype)
        if w.ndim == 2:
            return project(x, w)
        return conv2d(x, w, padding=w.shape[-1] // 2)


class Block(torch.nn.Module):
    """One residual block of the U-Net, encoder or decoder flavour (EDM2 figure 21)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        flavor: str = "enc",  # or "dec"
        resample_mode: str = "keep",  # "keep", "up" or "down"
        resample_filter: Sequence[float] = (1, 1),
        attention: bool = False,  # self-attention at the end of the block
        channels_per_head: int = 64,
        dropout: float = 0,  # probability, while training
        res_balance: float = 0.3,  # weight of the residual branch in its MP-Sum
        attn_balance: float = 0.3,  # weight of the attention branch in its MP-Sum
        clip_act: float | None = 256,  # outputs are clamped to +-clip_act; None: not at all
    ):
        super().__init__()
        self.out_channels = out_channels
        self.flavor = flavor
        self.resample_filter = resample_filter
        self.resample_mode = resample_mode
        self.num_heads = out_channels // channels_per_head if attention else 0
        if attention and self.num_heads == 0:
            # The reference drops it without a word; weights only fit if we do the same.
            warnings.warn(
                f"attention is left out: {out_channels} channels are fewer than channels_per_head={channels_per_head}",
                stacklevel=2,
            )
        self.dropout = dropout
        self.res_balance = res_balance
        self.attn_balance = attn_balance
        self.clip_act = clip_act
        self.emb_gain = torch.nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, kernel=[3, 3])
        self.emb_linear = MPConv(emb_channels, out_channels, kernel=[])
        self.conv_res1 = MPConv(out_channels, out_channels, kernel=[3, 3])
        self.conv_skip = MPConv(in_channels, out_channels, kernel=[1, 1]) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, out_channels * 3, kernel=[1, 1]) if self.num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, kernel=[1, 1]) if self.num_heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = resample(x, f=self.resample_filter, mode=self.resample_mode)
        if self.flavor == "enc":
            if self.conv_skip is not None:
                x = self.conv_skip(x)
            x = normalize(x, dim=1)  # pixel norm

        y = self.conv_res0(mp_silu(x))
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * c[:, :, None, None].to(y.dtype))
        if self.training and self.dropout:
            y = dropout(y, p=self.dropout)
        y = self.conv_res1(y)

        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, t=self.res_balance)
        if self.num_heads:
            x = mp_sum(x, self._attend(x), t=self.attn_balance)
        if self.clip_act is not None:
            x = x.clip(-self.clip_act, self.clip_act)
        return x

    def _attend(self, x):
        n, channels, height, width = x.shape
        qkv = self.attn_qkv(x).reshape(n, self.num_heads, -1, 3, height * width)  # [N, heads, Ch, 3, HW]
        q, k, v = normalize(qkv, dim=2).unbind(3)  # each [N, heads, Ch, HW]
        y = scaled_dot_product_attention(*(z.transpose(2, 3) for z in (q, k, v)))  # [N, heads, HW, Ch]
        return self.attn_proj(y.transpose(2, 3).reshape(n, channels, height, width))


class UNet(torch.nn.Module):
    """The EDM2 U-Net (EDM2 figure 21, table 6): F(x [N,C,R,R], noise_labels [N], class_labels [N,K] or None)."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,  # 0: unconditional
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),  # width of each resolution level, in model_channels
        channel_mult_noise: int | None = None,  # width of the Fourier features; None: that of level 0
        channel_mult_emb: int | None = None,  # width of the embedding; None: the widest level
        num_blocks: int = 3,  # encoder blocks per level; the decoder has one more
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,  # weight of the class embedding against the noise embedding
        concat_balance: float = 0.5,  # weight of the skip against the main path
        **block_kwargs: Any,
    ):
        super().__init__()
        widths = [model_channels * x for x in channel_mult]
        factor = 2 ** (len(widths) - 1)
        if img_resolution % factor or img_resolution < factor:
            raise ValueError(
                f"img_resolution={img_resolution} must be a multiple of {factor}, since channel_mult="
                f"{list(channel_mult)} halves it {len(widths) - 1} times: shorten channel_mult or resize the data"
            )
        cnoise = model_channels * channel_mult_noise if channel_mult_noise is not None else widths[0]
        cemb = model_channels * channel_mult_emb if channel_mult_emb is not None else max(widths)
        self.label_balance = label_balance
        self.concat_balance = concat_balance
        self.out_gain = torch.nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(cnoise)
        self.emb_noise = MPConv(cnoise, cemb, kernel=[])
        self.emb_label = MPConv(label_dim, cemb, kernel=[]) if label_dim else None

        self.enc = torch.nn.ModuleDict()
        cout = img_channels + 1
        for level, width in enumerate(widths):
            res = img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = MPConv(cout, width, kernel=[3, 3])
                cout = width
            else:
                self.enc[f"{res}x{res}_down"] = Block(cout, cout, cemb, resample_mode="down", **block_kwargs)
            attend = {"attention": res in attn_resolutions, **block_kwargs}
            for i in range(num_blocks):
                self.enc[f"{res}x{res}_block{i}"] = Block(cout, width, cemb, **attend)
                cout = width

        self.dec = torch.nn.ModuleDict()
        skips = [block.out_channels for block in self.enc.values()]
        for level, width in reversed(list(enumerate(widths))):
            res = img_resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = Block(cout, cout, cemb, "dec", attention=True, **block_kwargs)
                self.dec[f"{res}x{res}_in1"] = Block(cout, cout, cemb, "dec", **block_kwargs)
            else:
                self.dec[f"{res}x{res}_up"] = Block(cout, cout, cemb, "dec", resample_mode="up", **block_kwargs)
            attend = {"attention": res in attn_resolutions, **block_kwargs}
            for i in range(num_blocks + 1):
                self.dec[f"{res}x{res}_block{i}"] = Block(cout + skips.pop(), width, cemb, "dec", **attend)
                cout = width
        self.out_conv = MPConv(cout, img_channels, kernel=[3, 3])

    def forward(self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None) -> Tensor:
        emb = self.emb_noise(self.emb_fourier(noise_labels))  # [N, cemb]
        if self.emb_label is not None:
            scaled = class_labels * math.sqrt(class_labels.shape[1])
            emb = mp_sum(emb, self.emb_label(scaled), t=self.label_balance)
        emb = mp_silu(emb)

        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # a constant channel stands in for biases
        skips = []
        for name, block in self.enc.items():
            x = block(x) if "conv" in name else block(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop(), t=self.concat_balance)
            x = block(x, emb)
        return self.out_conv(x, gain=self.out_gain)


class Preconditioned(torch.nn.Module):
    """What preconditioned denoisers share: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM eq. 7).

    Subclasses make F and give `log_variance`. A conditional network given no labels uses a zero vector, which is a trained
    null label only with label dropout.
    """

    body = "model"  # the attribute that holds F
    reduced_dtype = "float16"
    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int, use_fp16: bool, sigma_data: float):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_data = use_fp16, sigma_data

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in, c_noise) for sigma [N, 1, 1, 1]; EDM's own (EDM table 1, last column)."""
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4

    def log_variance(self, sigma: Tensor, num: int) -> Tensor:
        """u(sigma) [num, 1, 1, 1] or [1, 1, 1, 1] for sigma [N, 1, 1, 1]."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None = None,
        force_fp32: bool = False,
        return_logvar: bool = False,
        **options: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Denoise x [N, C, R, R] at noise level sigma ([N] or scalar, > 0), labels [N, K] one-hot or soft, or None.

        Returns x0_hat [N, C, R, R] float32, and with `return_logvar` also u(sigma) [N, 1, 1, 1]. options: those of F.
        """
        x = x.to(torch.float32)
        sigma = torch.as_tensor(sigma, device=x.device).to(torch.float32).reshape(-1, 1, 1, 1)
        if class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device)
        labels = class_labels.to(torch.float32).reshape(-1, self.label_dim) if self.label_dim else None
        reduced = (
            self.use_fp16
            and not force_fp32
            and (
                x.device.type in ("cuda", "meta") or self.reduced_dtype == "bfloat16"  # meta: what a GPU would do
            )
        )
        dtype = getattr(torch, self.reduced_dtype) if reduced else torch.float32

        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        output = getattr(self, self.body)((c_in * x).to(dtype), c_noise.flatten(), labels, **options)
        denoised = c_skip * x + c_out * output[:, : self.img_channels].to(torch.float32)
        return (denoised, self.log_variance(sigma, len(x))) if return_logvar else denoised


@persistent
class Precond(Preconditioned):
    """EDM2's denoiser with learned uncertainty: EDM's preconditioning, log-variance u(sigma) (EDM2 eq. 21)."""

    body = "unet"

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,  # number of sources; 0: unconditional
        use_fp16: bool = True,  # reduced precision: float16 on GPUs alone, bfloat16 everywhere
        sigma_data: float = 0.5,  # expected standard deviation of the training data
        logvar_channels: int = 128,  # width of the uncertainty head
        reduced_dtype: str = "float16",  # what use_fp16 means: "float16" or "bfloat16"
        **unet_kwargs: Any,
    ):
        super().__init__(img_resolution, img_channels, label_dim, use_fp16, sigma_data)
        if reduced_dtype not in ("float16", "bfloat16"):
            raise ValueError(f"reduced_dtype={reduced_dtype!r} is none of float16, bfloat16")
        self.reduced_dtype = reduced_dtype
        self.unet = UNet(img_resolution, img_channels, label_dim, **unet_kwargs)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1, kernel=[])

    def log_variance(self, sigma: Tensor, num: int) -> Tensor:
        return self.logvar_linear(self.logvar_fourier(sigma.flatten().log() / 4)).reshape(-1, 1, 1, 1)
