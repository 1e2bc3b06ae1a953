"""Magnitude-preserving layers (EDM2 section 2.3, appendix B.6-B.8): what a network of unit magnitudes is made of.

Learned layers normalise their weights; fixed functions keep the expected magnitude (RMS per element) of their input.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, conv_transpose2d, interpolate, linear, pad, silu

EPS = 1e-4  # of normalisation
TINY = 1e-30  # a root of a mean square that counts as zero
SILU = 0.596  # RMS of silu of a standard normal


class _Normalize(torch.autograd.Function):
    """x over (eps + RMS) with the RMS beside it; the gradient takes half of the passes that autograd's would."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, dim, eps):
        # A strided vector norm costs several times this.
        rms = x.to(torch.float32).square().mean(dim=dim, keepdim=True).sqrt_()
        return x / (rms + eps).to(x.dtype), rms

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.dim, ctx.eps = inputs
        ctx.save_for_backward(*output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        y, rms = ctx.saved_tensors
        along = (grad * y).mean(dim=ctx.dim, keepdim=True, dtype=torch.float32) / -rms.clamp_min(TINY)
        return torch.addcmul(grad / (rms + ctx.eps).to(y.dtype), y, along.to(y.dtype)), None, None


def normalize(x: Tensor, dim: int | Sequence[int] | None = None, eps: float = EPS) -> Tensor:
    """x over (eps + RMS over `dim`), EDM2 eq. 47. `dim` defaults to all axes but the first.

    The mean square is accumulated in float32 whatever the type of x; eps is added outside the root. At x = 0 the gradient
    is that of x / eps.
    """
    if not torch.is_grad_enabled() and isinstance(dim, int) and x.stride(dim) == 1:  # a norm along memory is cheaper
        rms = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.float32) / math.sqrt(x.shape[dim])
        return x / (rms + eps).to(x.dtype)
    function = _Normalize.apply if torch.is_grad_enabled() else _Normalize.forward
    return function(x, list(range(1, x.ndim)) if dim is None else dim, eps)[0]


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) / 0.596 (EDM2 eq. 81): 0.596 is the RMS of silu of a standard normal."""
    return silu(x) / SILU


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """Linear interpolation a -> b at t, scaled back to unit magnitude (EDM2 eq. 88)."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, dim: int = 1, t: float = 0.5) -> Tensor:
    """Concatenate a and b with relative weights 1 - t and t at unit magnitude (EDM2 eq. 103)."""
    na, nb = a.shape[dim], b.shape[dim]
    c = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (c / math.sqrt(na) * (1 - t)), b * (c / math.sqrt(nb) * t)], dim=dim)


def resample_kernel(f: Sequence[float]) -> Tensor | None:
    """[1, 1, n, n] of the 1-D filter f at sum 1; None for the box [1, 1], which needs none. ValueError if n is odd."""
    taps = torch.tensor(f, dtype=torch.float32, device="cpu")
    if taps.ndim != 1 or len(taps) % 2 != 0:
        raise ValueError(f"resample_filter={taps.tolist()} must be one-dimensional with an even number of taps")
    return None if len(taps) == 2 and taps[0] == taps[1] else (taps.outer(taps) / taps.sum() ** 2)[None, None]


def resample(x: Tensor, f: Sequence[float] | Tensor | None = (1, 1), mode: str = "keep") -> Tensor:
    """Resample [N, C, H, W] by 2: mode "keep", "down" or "up". f: even-length 1-D filter, or its `resample_kernel`."""
    if mode not in ("keep", "down", "up"):
        raise ValueError(f"resample mode {mode!r} is none of keep, down, up")
    if mode == "keep":
        return x
    kernel = f if f is None or torch.is_tensor(f) else resample_kernel(f)
    if kernel is None and mode == "down":
        return avg_pool2d(x, 2)
    if kernel is None and torch.compiler.is_compiling():  # torch 2.13 loses the gradient of `interpolate`, pixels first
        pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
        return pixels.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
    if kernel is None:
        return interpolate(x, scale_factor=2.0, mode="nearest")
    padding, channels = (kernel.shape[-1] - 1) // 2, x.shape[1]
    kernel = kernel.to(x).expand(channels, 1, -1, -1)
    if mode == "down":
        return conv2d(x, kernel, groups=channels, stride=2, padding=padding)
    return conv_transpose2d(x, kernel * 4, groups=channels, stride=2, padding=padding)


def count_heads(channels: int, channels_per_head: int, num_heads: int | None = None) -> int:
    """Attention heads of a layer: num_heads, or so many that each has channels_per_head or somewhat more; 0: too few
    channels. Raises ValueError where they do not divide the channels.
    """
    heads = num_heads
    if heads is None:
        heads = channels // channels_per_head if channels_per_head > 0 else -1
    if heads < 0 or (heads and channels % heads):
        given = f"channels_per_head={channels_per_head}" if num_heads is None else f"num_heads={num_heads}"
        raise ValueError(f"{given} does not make heads of equal width of {channels} channels: give a divisor")
    return heads


class MPFourier(torch.nn.Module):
    """Magnitude-preserving Fourier features (EDM2 eq. 75): [N] -> [N, num_channels]."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32).ger(self.freqs.to(torch.float32)) + self.phases.to(torch.float32)
        return (y.cos() * math.sqrt(2)).to(x.dtype)


LOOKUP_WIDTH = 4096  # from so many classes on, the CPU looks rows of weights up


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, K] @ weight [C, K].T; for large K and rows with one entry each, such as labels, that column times the entry."""
    if x.shape[1] >= LOOKUP_WIDTH and x.device.type == "cpu" and not torch.compiler.is_compiling():
        entries = x != 0
        if bool((entries.sum(dim=1) <= 1).all()):  # an accelerator would have to be waited for
            index = entries.int().argmax(dim=1)
            return weight.t()[index] * x.gather(1, index[:, None])
    return x @ weight.t()


class _Normalized(torch.autograd.Function):
    """W [C, ...] factor / (eps + rms), rms [C, 1, ...] that of its rows; the gradient takes two passes over W."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, rms, factor):
        return weight * (factor / (EPS + rms))

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, rms, ctx.factor = inputs
        ctx.save_for_backward(weight, rms)

    @staticmethod
    def backward(ctx, grad):
        weight, rms = ctx.saved_tensors
        scale = ctx.factor / (EPS + rms)
        along = (grad * weight).flatten(1).mean(dim=1).reshape(rms.shape)
        return torch.addcmul(grad * scale, weight, -along * scale / ((EPS + rms) * rms.clamp_min(TINY))), None, None


def packable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves images of this type on this device, and torch offers it packed weights: not in every build."""
    offered = hasattr(torch.ops.mkldnn, "_convolution_pointwise") and hasattr(
        torch._C._nn, "mkldnn_reorder_conv2d_weight"
    )
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and offered
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    )


def packed(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """[C, K, 3, 3] in the order that oneDNN wants for images of `shape`; conv2d would reorder them at every call."""
    dense = weight.to_dense() if weight.is_mkldnn else weight.contiguous()
    return torch._C._nn.mkldnn_reorder_conv2d_weight(dense.to_mkldnn(), [1, 1], [1, 1], [1, 1], 1, shape)


def convolve_packed(x: Tensor, weight: Tensor) -> Tensor:
    """conv2d by weights that are `packed`; it has no gradient."""
    return torch.ops.mkldnn._convolution_pointwise(x, weight, None, [1, 1], [1, 1], [1, 1], 1, "none", [], "")


class MPConv(torch.nn.Module):
    """Convolution or (kernel=[]) fully connected layer with forced weight normalisation (EDM2 eq. 47, 66).

    While training, each forward pass overwrites the stored weight by its normalised self (in `weights_once`: the first
    one only); the normalisation inside the graph then projects the gradient onto the sphere's tangent. No bias.
    """

    constant = 1.0  # factor that the weights have where the caller asks for it
    ready: Tensor | None = None  # `effective(constant)` where it is known already
    upsamples = False  # `ready` is for images before nearest upsampling, see `fold`
    shape: Sequence[int] | None = None  # of the images that `ready` is packed for, () for none yet; None: it never is

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int]):
        super().__init__()
        self.out_channels = out_channels
        self.weight = torch.nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def effective(self, factor: float = 1.0) -> Tensor:
        """The weights that act, times `factor`: float32, of norm `factor` per output."""
        w = self.weight.to(torch.float32)
        with torch.no_grad():
            rms = torch.linalg.vector_norm(w.flatten(1), dim=1) / math.sqrt(w[0].numel())
            rms = rms.reshape(-1, *[1] * (w.ndim - 1))
            if self.training:
                self.weight.div_(EPS + rms)
                rms = rms / (EPS + rms) if self.weight.dtype == torch.float32 else rms
        return _Normalized.apply(w, rms, factor / math.sqrt(w[0].numel()))

    def forward(
        self,
        x: Tensor,
        gain: float | Tensor = 1,
        scaled: bool = False,
        arrange: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """gain: factor on the output. scaled: the output times `constant`. arrange: weights -> weights in another order."""
        constant = self.constant if scaled else 1.0
        known = self.ready is not None and constant == self.constant and (self.training or not self.ready.requires_grad)
        w = (self.ready if known else self.effective(constant)).to(x.dtype)
        w = w if arrange is None else arrange(w)
        if self.weight.ndim == 2:
            y = project(x, w)
        elif w.ndim == 2:  # a folded 1x1 convolution
            y = linear(x.permute(0, 2, 3, 1), w).permute(0, 3, 1, 2)
        elif self.upsamples:
            y = conv_transpose2d(x, w, stride=2, padding=1)
        elif self.shape is not None and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            if self.shape != x.shape:
                self.ready, self.shape = packed(w, x.shape), x.shape
            y = convolve_packed(x, self.ready)
        else:
            y = conv2d(x, w.to_dense() if w.is_mkldnn else w, padding=w.shape[-1] // 2)
        return y * gain if torch.is_tensor(gain) or gain != 1 else y

    def fold(self, dtype: torch.dtype, upsamples: bool = False) -> None:
        """Keep the weights that act, in `dtype`; those of a 1x1 convolution as a matrix.

        upsamples: a 3x3 convolution of images after nearest upsampling by 2 becomes a transposed one of the images before,
        which takes 4/9 of the products.
        """
        w, self.upsamples = self.effective(self.constant), upsamples
        if upsamples:
            w = 4 * avg_pool2d(pad(w.flip(2, 3).transpose(0, 1), (1, 1, 1, 1)), 2, stride=1)
        elif w.ndim == 4 and w.shape[-1] == 1:
            w = w.flatten(1)
        elif w.ndim == 4 and packable(w.device, dtype):
            self.shape = ()
        self.ready = (w.to(memory_format=torch.channels_last) if w.ndim == 4 else w).to(dtype)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self.ready is not None and self.ready.is_mkldnn:  # cannot be copied
            state |= {"ready": self.ready.to_dense(), "shape": ()}
        return state


class NormalizedOnce:
    """Weights of a network's layers that are normalised once, for several forward and backward passes.

    By the same formulas as `MPConv.effective`, for the rows of all layers together: few small operations.
    """

    def __init__(self, layers: Sequence[MPConv]):
        self.layers, self.passes = layers, 0  # forward passes so far
        self.of_weight = {layer.weight: layer for layer in layers}
        rows = [layer.weight.flatten(1) for layer in layers]
        self.sizes, like = [len(w) for w in rows], dict(device=rows[0].device, dtype=torch.float32)
        self.fan_in = torch.cat([torch.full([len(w)], w.shape[1], **like) for w in rows])
        self.factor = torch.cat([torch.full([layer.out_channels], layer.constant, **like) for layer in layers])
        self.factor /= self.fan_in.sqrt()

    def _split(self, values):
        """[rows of all layers] -> one tensor per layer that multiplies its weights."""
        parts = zip(values.split(self.sizes), self.layers, strict=True)
        return [part.reshape(-1, *[1] * (layer.weight.ndim - 1)) for part, layer in parts]

    @torch.no_grad()
    def prepare(self) -> None:
        """Called by every forward pass; the first overwrites the weights and keeps those that act, the same for all."""
        self.passes += 1
        if self.passes > 1:
            return
        weights = [layer.weight for layer in self.layers]
        rms = torch.cat([torch.linalg.vector_norm(w.flatten(1), dim=1) for w in weights]) / self.fan_in.sqrt()
        first = 1 / (EPS + rms)
        self.rms = rms * first
        self.scale = self.factor / (EPS + self.rms)
        for layer, w, a, b in zip(self.layers, weights, self._split(first), self._split(self.scale), strict=True):
            layer.ready = (w.mul_(a) * b).requires_grad_(w.requires_grad)

    def leaf(self, parameter: Tensor) -> Tensor:
        """What has the gradient of a parameter until `backward`: the weights that act in its place, or itself."""
        layer = self.of_weight.get(parameter)
        return parameter if layer is None else layer.ready

    @torch.no_grad()
    def backward(self) -> None:
        """Gradients of all passes through the normalisation; then weights are normalised once per pass, as published."""
        if not self.passes:
            return
        used = [layer.ready.grad is not None for layer in self.layers]
        rows = [
            torch.linalg.vecdot(layer.ready.grad.flatten(1), layer.weight.flatten(1))
            if here
            else torch.zeros_like(part)
            for layer, part, here in zip(self.layers, self.rms.split(self.sizes), used, strict=True)
        ]
        along = torch.cat(rows) * self.scale / (-self.fan_in * (EPS + self.rms) * self.rms.clamp_min(TINY))
        parts = zip(self.layers, self._split(self.scale), self._split(along), used, strict=True)
        for layer, scale, coefficient, here in parts:
            if here:
                grad, weight = layer.ready.grad.mul_(scale).addcmul_(layer.weight, coefficient), layer.weight
                weight.grad = grad if weight.grad is None else weight.grad.add_(grad)

        rms, more = self.rms, torch.ones_like(self.rms)
        for _ in range(self.passes - 1):
            more, rms = more / (EPS + rms), rms / (EPS + rms)
        if self.passes > 1:
            for layer, factor in zip(self.layers, self._split(more), strict=True):
                layer.weight.mul_(factor)

    def forget(self) -> None:
        self.passes = 0
        for layer in self.layers:
            layer.ready = None
