"""The EDM2 network: a magnitude-preserving U-Net and its preconditioning.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2), CVPR 2024, arXiv 2312.02696:
section 2.3 (magnitude preservation), appendix B.6-B.8 (eq. 47-102). Constructor arguments, state_dict names, shapes,
order of random draws and outputs agree with the reference, so weights are interchangeable.

Every learned layer and every fixed function keeps the expected magnitude (RMS per element) of its input.
"""

import contextlib
import copy
import itertools
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, hardtanh, silu
from torch.nn.functional import scaled_dot_product_attention as attend

from torch_utils.persistence import persistent
from training.magnitude import (
    SILU,
    MPConv,
    MPFourier,
    NormalizedOnce,
    count_heads,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize,
    resample,
    resample_kernel,
)


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
        self.resample_mode = resample_mode
        kernel = resample_kernel(resample_filter) if resample_mode != "keep" else None
        self.register_buffer("resample_kernel", kernel, persistent=False)
        self.num_heads = count_heads(out_channels, channels_per_head) if attention else 0
        if attention and self.num_heads == 0:
            # The reference drops it without a word; weights only fit if we do the same.
            warnings.warn(
                f"attention is left out: {out_channels} channels are fewer than channels_per_head={channels_per_head}",
                stacklevel=2,
            )
        self.dropout = dropout
        self.clip_act = clip_act
        self.folded = False
        self.emb_gain = torch.nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, kernel=[3, 3])
        self.emb_linear = MPConv(emb_channels, out_channels, kernel=[])
        self.conv_res1 = MPConv(out_channels, out_channels, kernel=[3, 3])
        self.conv_skip = MPConv(in_channels, out_channels, kernel=[1, 1]) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, out_channels * 3, kernel=[1, 1]) if self.num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, kernel=[1, 1]) if self.num_heads else None

        # MP-Sum is keep x + constant y; its constants and MP-SiLU's go into the weights, which costs no pass over images.
        norms = [math.sqrt((1 - t) ** 2 + t**2) for t in (res_balance, attn_balance)]
        self.res_keep, self.attn_keep = ((1 - t) / n for t, n in zip((res_balance, attn_balance), norms, strict=True))
        self.conv_res0.constant, self.conv_res1.constant = 1 / SILU, res_balance / norms[0] / SILU
        if self.num_heads:
            self.attn_proj.constant = attn_balance / norms[1]

    def forward(self, x: Tensor, emb: Tensor, scale: Tensor | None = None) -> Tensor:
        """x [N, C, H, W], emb [N, E] -> [N, C', H', W']. scale [N, C']: what emb means for this block, where it is known."""
        inplace = self.folded and not torch.is_grad_enabled()
        before, x = x, resample(x, self.resample_kernel, self.resample_mode)
        if self.flavor == "enc":
            if self.conv_skip is not None:
                x = self.conv_skip(x)
            x = normalize(x, dim=1)  # pixel norm

        y = self.conv_res0(silu(before if self.conv_res0.upsamples else x), scaled=True)
        c = self.emb_linear(emb, gain=self.emb_gain) + 1 if scale is None else scale
        c = c[:, :, None, None].to(y.dtype)
        y = silu(y.mul_(c), inplace=True) if inplace else silu(y * c)
        if self.training and self.dropout:
            y = dropout(y, p=self.dropout)
        y = self.conv_res1(y, scaled=True)

        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        add = torch.Tensor.add_ if inplace else torch.add
        x = add(y, x, alpha=self.res_keep)
        if self.num_heads:
            x = add(self._attend(x, scaled=True), x, alpha=self.attn_keep)
        if self.clip_act is not None:  # clip, with a gradient in one pass
            x = hardtanh(x, -self.clip_act, self.clip_act, inplace=inplace)
        return x

    def _attend(self, x, scaled=False):
        n, channels, height, width = x.shape
        if self.folded or torch.compiler.is_compiling():  # pixels first, and rows sorted: nothing is copied
            qkv = self.attn_qkv(x, arrange=None if self.folded else self._by_head)
            qkv = qkv.permute(0, 2, 3, 1).reshape(n, height * width, self.num_heads, 3, -1)
            q, k, v = normalize(qkv, dim=4).permute(3, 0, 2, 1, 4).unbind(0)  # each [N, heads, HW, Ch]
            y = attend(q, k, v).transpose(1, 2).reshape(n, height, width, channels).permute(0, 3, 1, 2)
            return self.attn_proj(y, scaled=scaled)
        qkv = self.attn_qkv(x).reshape(n, self.num_heads, -1, 3, height * width)  # [N, heads, Ch, 3, HW]
        qkv = normalize(qkv.permute(0, 1, 3, 4, 2).contiguous(), dim=4)  # [N, heads, 3, HW, Ch]
        y = attend(*qkv.unbind(2))  # [N, heads, HW, Ch]
        return self.attn_proj(y.transpose(2, 3).reshape(n, channels, height, width), scaled=scaled)

    def _by_head(self, rows):
        """Rows of [heads, Ch, 3] as [heads, 3, Ch]."""
        return rows.unflatten(0, (self.num_heads, -1, 3)).transpose(1, 2).flatten(0, 2)

    def fold(self, dtype: torch.dtype) -> None:
        """See UNet.fold."""
        self.folded = True
        cpu = self.emb_gain.device.type == "cpu"  # a transposed convolution was measured there alone
        nearest = self.resample_mode == "up" and self.resample_kernel is None and cpu
        for layer in self.children():
            if isinstance(layer, MPConv) and layer.weight.ndim == 4:
                layer.fold(dtype, upsamples=layer is self.conv_res0 and nearest)
        if self.num_heads:
            self.attn_qkv.ready = self._by_head(self.attn_qkv.ready)


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
        self.scales, self.widths, self.layout = None, [], torch.contiguous_format  # see `fold`
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
        x = x.contiguous(memory_format=torch.channels_last if torch.compiler.is_compiling() else self.layout)
        scales = itertools.repeat(None)
        if self.scales is not None:
            scales = iter((emb @ self.scales).add(1).split(self.widths, dim=1))
        skips = []
        for name, block in self.enc.items():
            x = block(x) if "conv" in name else block(x, emb, next(scales))
            skips.append(x)
        for name, block in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop(), t=self.concat_balance)
            x = block(x, emb, next(scales))
        return self.out_conv(x, gain=self.out_gain)

    def fold(self, dtype: torch.dtype) -> None:
        """From here on the weights stay: normalise, scale and cast them once, for images with their channels last; take
        the embeddings of all blocks in one product.
        """
        self.layout = torch.channels_last
        blocks = [block for block in (*self.enc.values(), *self.dec.values()) if isinstance(block, Block)]
        self.widths = [block.out_channels for block in blocks]
        scales = [block.emb_linear.effective(block.emb_gain) for block in blocks]
        self.scales = torch.cat(scales).t().contiguous()  # [E, sum of widths]
        for layer in self.modules():
            if isinstance(layer, Block):
                layer.fold(dtype)
        for layer in (self.emb_noise, self.emb_label, *self.enc.values(), self.out_conv):
            if isinstance(layer, MPConv):
                layer.fold(dtype if layer.weight.ndim == 4 else torch.float32)


def compile_network(net: torch.nn.Module, frozen: bool = False) -> None:
    """From here on, calls of F of a preconditioned network, else of the network, go through torch.compile.

    One graph without breaks, for every shape anew; state_dict and copies stay as they are. ValueError without a compiler.
    frozen: its weights stay, so on a CPU calls without gradients keep them in the order that convolutions want.
    """
    from torch._inductor import config as inductor  # takes a second to import

    cpu = next(net.parameters()).device.type == "cpu"
    if cpu and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++")))):
        raise ValueError(
            "--compile needs a C++ compiler (g++ or clang++), and there is none: install one or leave it out"
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    body = getattr(net, net.body) if hasattr(net, "body") else net
    body.compile(fullgraph=True, dynamic=False)
    if frozen and cpu:  # around calls: the graph is made in the first of them
        body._compiled_call_impl = inductor.patch(freezing=True)(body._compiled_call_impl)


class Preconditioned(torch.nn.Module):
    """What preconditioned denoisers share: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM eq. 7).

    Subclasses make F and give `log_variance`. A conditional network given no labels uses a zero vector, which is a trained
    null label only with label dropout.
    """

    body = "model"  # the attribute that holds F
    foldable, is_folded = False, False  # whether `fold` does anything, and has
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

    def working_type(self, device: torch.device, force_fp32: bool = False) -> torch.dtype:
        """The type that F computes in."""
        able = device.type in ("cuda", "meta") or self.reduced_dtype == "bfloat16"  # meta: what a GPU would do
        reduced = self.use_fp16 and not force_fp32 and able
        return getattr(torch, self.reduced_dtype) if reduced else torch.float32

    def function(self, dtype: torch.dtype) -> torch.nn.Module:
        """F, ready to compute in `dtype`."""
        return getattr(self, self.body)

    def fold(self) -> None:
        """Do once what every evaluation with the present weights would do; parameters stay as they are."""

    def folded(self, compiled: bool = False) -> "Preconditioned":
        """This network for many evaluations with the weights that it has now: same outputs to 5e-7, parameters shared.

        Itself while it trains or parameters may get gradients, is watched by hooks, or has a forward of its own. compiled: by
        `compile_network`.
        """
        body = getattr(self, self.body)
        own = type(self).forward is not Preconditioned.forward or "forward" in vars(self) or body._compiled_call_impl
        watched = any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())
        learns = self.training or (torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()))
        if learns or own or watched or self.is_folded or not (compiled or self.foldable):
            return self
        net = copy.deepcopy(self, {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())})
        net.is_folded = True
        with torch.no_grad():
            net.fold()
        if compiled:
            compile_network(net, frozen=True)
        return net

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
        if isinstance(sigma, (int, float)):  # an upload would stall an accelerator
            sigma = torch.full([1], sigma, dtype=torch.float32, device=x.device)
        sigma = torch.as_tensor(sigma, device=x.device).to(torch.float32).reshape(-1, 1, 1, 1)
        if class_labels is None:
            class_labels = torch.zeros([1, self.label_dim], device=x.device)
        labels = class_labels.to(torch.float32).reshape(-1, self.label_dim) if self.label_dim else None
        dtype = self.working_type(x.device, force_fp32)

        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        output = self.function(dtype)((c_in * x).to(dtype), c_noise.flatten(), labels, **options)
        denoised = c_skip * x + c_out * output[:, : self.img_channels].to(torch.float32)
        return (denoised, self.log_variance(sigma, len(x))) if return_logvar else denoised


@persistent
class Precond(Preconditioned):
    """EDM2's denoiser with learned uncertainty: EDM's preconditioning, log-variance u(sigma) (EDM2 eq. 21)."""

    body, foldable = "unet", True

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
        self.layers = self.once = None  # of all steps, of the present one: see `step`
        self.whole = None  # of a folded network: [F as it is trained]
        self.unet = UNet(img_resolution, img_channels, label_dim, **unet_kwargs)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1, kernel=[])

    def log_variance(self, sigma: Tensor, num: int) -> Tensor:
        return self.logvar_linear(self.logvar_fourier(sigma.flatten().log() / 4)).reshape(-1, 1, 1, 1)

    def function(self, dtype: torch.dtype) -> torch.nn.Module:
        if self.once is not None and self.training and torch.is_grad_enabled():
            self.once.prepare()
        return self.unet if self.whole is None or dtype == self.folded_type else self.whole[0]

    @contextlib.contextmanager
    def step(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """One step of training: in here weights are normalised and overwritten by the first forward pass alone, and
        gradients reach the parameters at the end, together; until then they are at what the function given makes of these.
        The published way, once per pass, differs by 1e-6.
        """
        if self.layers is None or self.layers.fan_in.device != self.unet.out_gain.device:
            layers = [layer for layer in self.unet.modules() if isinstance(layer, MPConv)]
            self.layers = NormalizedOnce([layer for layer in layers if layer.weight.dtype == torch.float32])
        self.once = self.layers
        try:
            yield self.once.leaf
            self.once.backward()
        finally:
            self.once.forget()
            self.once = None

    def fold(self) -> None:
        self.folded_type = self.working_type(self.unet.out_gain.device)
        tensors = (*self.unet.parameters(), *self.unet.buffers())
        self.whole = [copy.deepcopy(self.unet, {id(tensor): tensor for tensor in tensors})]  # for other types
        self.unet.fold(self.folded_type)
