"""Non-leaking augmentation (Karras et al. 2020 "ADA", as used by EDM, appendix F.2).

The network is told which augmentation each image received (`augment_labels`), so that at sampling time, with no
labels, it produces clean images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from torch_utils.devices import constant

# Low-pass decomposition taps of the symlet wavelet sym6; they sum to sqrt(2).
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
# Of the steps in the order of application: geometry, then colour.
LABEL_COLUMNS = dict(xflip=1, yflip=1, rotate_int=2, translate_int=2, scale=1, rotate_frac=2, aniso=2, translate_frac=2)
LABEL_COLUMNS |= dict(brightness=1, contrast=1, lumaflip=1, hue=2, saturation=1)


def _matrix(rows, device):
    """Stack nested numbers and [N] tensors into [N, R, C] (or [1, R, C] when all are numbers)."""
    number = lambda v: torch.full([], v, dtype=torch.float32, device=device)
    flat = [v.to(torch.float32) if torch.is_tensor(v) else number(v) for row in rows for v in row]
    flat = torch.broadcast_tensors(*[v.reshape(-1) for v in flat])
    return torch.stack(flat, dim=-1).reshape(-1, len(rows), len(rows[0]))


def _translate2d(tx, ty, device):
    return _matrix([[1, 0, tx], [0, 1, ty], [0, 0, 1]], device)


def _scale2d(sx, sy, device):
    return _matrix([[sx, 0, 0], [0, sy, 0], [0, 0, 1]], device)


def _rotate2d(angle, device):
    cos, sin = torch.cos(angle), torch.sin(angle)
    return _matrix([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], device)


def _rotate_luma(angle, device):
    """4x4 rotation of colours by `angle` about the grey axis (1, 1, 1)/sqrt(3) (Rodrigues)."""
    v = 1 / math.sqrt(3)
    cos, sin = torch.cos(angle), torch.sin(angle)
    c, s = v * v * (1 - cos), v * sin
    rows = [[c + cos, c - s, c + s, 0], [c + s, c + cos, c - s, 0], [c - s, c + s, c + cos, 0], [0, 0, 0, 1]]
    return _matrix(rows, device)


@dataclass
class AugmentPipe:
    """Random flips, shifts, affine maps and colour changes with the labels that describe them.

    `pipe(images [N, C, H, W], generator=None) -> (images [N, C, H, W], labels [N, label_dim])`. Each enabled step
    draws a parameter for every image, then a uniform u, and keeps the parameter where u < multiplier * p. A label of
    all zeros means "untouched"; with p = 0 images come back as they are. Draws come from `generator` on its own
    device, else from torch's global generator. Images are padded by one common margin per batch, which changes no
    pixel beyond rounding. Raises ValueError for colour changes of images with other than 1 or 3 channels and for
    rotate_int of non-square images.
    """

    p: float = 1  # overall probability multiplier
    xflip: float = 0  # probability multipliers of the steps, 0: off (no draws, no label columns)
    yflip: float = 0
    rotate_int: float = 0  # multiples of 90 degrees
    translate_int: float = 0  # whole pixels
    translate_int_max: float = 0.125  # relative to the image size
    scale: float = 0
    rotate_frac: float = 0  # any angle
    aniso: float = 0  # stretch along a random axis
    translate_frac: float = 0  # fractions of a pixel
    scale_std: float = 0.2  # log2 of the scale
    rotate_frac_max: float = 1  # of a half turn
    aniso_std: float = 0.2  # log2 of the stretch
    aniso_rotate_prob: float = 0.5  # probability of a random stretch axis (else x)
    translate_frac_std: float = 0.125  # relative to the image size
    brightness: float = 0
    contrast: float = 0
    lumaflip: float = 0  # mirror colours about the grey axis
    hue: float = 0
    saturation: float = 0
    brightness_std: float = 0.2
    contrast_std: float = 0.5  # log2
    hue_max: float = 1  # of a half turn
    saturation_std: float = 1  # log2

    def __post_init__(self):
        if self.p < 0:
            raise ValueError(f"augmentation probability p={self.p} is negative; give 0 <= p <= 1 (--augment)")

    @classmethod
    def edm(cls, p: float) -> AugmentPipe:
        """EDM's choice for CIFAR-10, FFHQ and AFHQv2: geometry only, fair coin for horizontal flips, 9 labels."""
        return cls(p=p, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)

    @property
    def label_dim(self) -> int:
        """Number of label columns: the `augment_dim` of the network."""
        return sum(columns for name, columns in LABEL_COLUMNS.items() if getattr(self, name) > 0)

    def __call__(self, images: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        if images.ndim != 4:
            raise ValueError(f"images of shape {list(images.shape)} given; augmentation needs [N, C, H, W]")
        draws = _Draws(images, generator, self.p)
        labels = [torch.zeros([len(images), 0], device=images.device)]
        out = self._blit(images, draws, labels)
        out = self._geometry(out, draws, labels)
        out = self._colour(out, draws, labels)
        labels = torch.cat([label.to(torch.float32).reshape(len(images), -1) for label in labels], dim=1)
        # The filters of an identity transform round in the last digit; p = 0 is to be the identity itself.
        return (images, labels) if self.p == 0 else (out, labels)

    def _blit(self, images, draws, labels):
        """Pixel-exact steps: flips, quarter turns, whole-pixel shifts."""
        n, _, h, w = images.shape
        for name, axis in (("xflip", 3), ("yflip", 2)):
            if getattr(self, name) > 0:
                flip = draws.keep(draws.integers(2, [n, 1, 1, 1]), getattr(self, name))
                images = torch.where(flip == 1, images.flip(axis), images)
                labels.append(flip)
        if self.rotate_int > 0:
            if h != w:
                raise ValueError(f"rotate_int needs square images, not {h}x{w}; switch it off or crop")
            turn = draws.keep(draws.integers(4, [n, 1, 1, 1]), self.rotate_int)
            images = torch.where((turn == 1) | (turn == 2), images.flip(3), images)
            images = torch.where((turn == 2) | (turn == 3), images.flip(2), images)
            images = torch.where((turn == 1) | (turn == 3), images.transpose(2, 3), images)
            labels += [(turn == 1) | (turn == 2), (turn == 2) | (turn == 3)]
        if self.translate_int > 0:
            shift = draws.keep(draws.uniform([2, n, 1, 1, 1]), self.translate_int, [1, n, 1, 1, 1])
            tx = shift[0].mul(w * self.translate_int_max).round().to(torch.int64)  # [N, 1, 1, 1]
            ty = shift[1].mul(h * self.translate_int_max).round().to(torch.int64)
            x = torch.arange(w, device=images.device).reshape(1, 1, 1, w)
            y = torch.arange(h, device=images.device).reshape(1, 1, h, 1)
            x = w - 1 - (w - 1 - (x - tx) % max(2 * w - 2, 1)).abs()  # [N, 1, 1, W], mirrored borders
            y = h - 1 - (h - 1 - (y + ty) % max(2 * h - 2, 1)).abs()  # [N, 1, H, 1]
            images = images.gather(3, x.expand(images.shape)).gather(2, y.expand(images.shape))
            labels += [tx / (w * self.translate_int_max), ty / (h * self.translate_int_max)]
        return images

    def _geometry(self, images, draws, labels):
        """Affine steps, composed as one inverse map per image and executed by one band-limited resampling."""
        n, _, h, w = images.shape
        device = images.device
        inverse = torch.eye(3, device=device).expand(n, 3, 3)
        if self.scale > 0:
            k = draws.keep(draws.normal([n]), self.scale)
            s = k.mul(self.scale_std).exp2()
            inverse = inverse @ _scale2d(1 / s, 1 / s, device)
            labels.append(k)
        if self.rotate_frac > 0:
            angle = draws.keep(draws.uniform([n]) * (math.pi * self.rotate_frac_max), self.rotate_frac)
            inverse = inverse @ _rotate2d(angle, device)
            labels += [torch.stack([angle.cos() - 1, angle.sin()], dim=1)]
        if self.aniso > 0:
            k = draws.normal([n])
            angle = draws.uniform([n]) * math.pi
            k = draws.keep(k, self.aniso)
            angle = draws.keep_with_probability(angle, self.aniso_rotate_prob)
            s = k.mul(self.aniso_std).exp2()
            inverse = inverse @ _rotate2d(-angle, device) @ _scale2d(1 / s, s, device) @ _rotate2d(angle, device)
            labels += [torch.stack([k * angle.cos(), k * angle.sin()], dim=1)]
        if self.translate_frac > 0:
            k = draws.keep(draws.normal([2, n]), self.translate_frac, [1, n])
            shift = k * self.translate_frac_std
            inverse = inverse @ _translate2d(-shift[0] * w, -shift[1] * h, device)
            labels.append(k.t())
        enabled = max(self.scale, self.rotate_frac, self.aniso, self.translate_frac) > 0
        return resample_affine(images, inverse) if enabled and self.p != 0 else images

    def _colour(self, images, draws, labels):
        """Colour steps, composed as one affine map of (R, G, B, 1) per image."""
        n, channels, h, w = images.shape
        device = images.device
        eye = torch.eye(4, device=device)
        grey = constant((1.0, 1.0, 1.0, 0.0), device) / math.sqrt(3)
        grey = grey.ger(grey)  # [4, 4] projector on the luma axis
        matrix = eye.expand(n, 4, 4)
        if self.brightness > 0:
            k = draws.keep(draws.normal([n]), self.brightness)
            b = k * self.brightness_std
            matrix = _matrix([[1, 0, 0, b], [0, 1, 0, b], [0, 0, 1, b], [0, 0, 0, 1]], device) @ matrix
            labels.append(k)
        if self.contrast > 0:
            k = draws.keep(draws.normal([n]), self.contrast)
            c = k.mul(self.contrast_std).exp2()
            matrix = _matrix([[c, 0, 0, 0], [0, c, 0, 0], [0, 0, c, 0], [0, 0, 0, 1]], device) @ matrix
            labels.append(k)
        if self.lumaflip > 0:
            k = draws.keep(draws.integers(2, [n, 1, 1]), self.lumaflip)
            matrix = (eye - 2 * grey * k) @ matrix
            labels.append(k)
        if self.hue > 0:
            angle = draws.keep(draws.uniform([n]) * (math.pi * self.hue_max), self.hue)
            matrix = _rotate_luma(angle, device) @ matrix
            labels += [torch.stack([angle.cos() - 1, angle.sin()], dim=1)]
        if self.saturation > 0:
            k = draws.keep(draws.normal([n, 1, 1]), self.saturation)
            matrix = (grey + (eye - grey) * k.mul(self.saturation_std).exp2()) @ matrix
            labels.append(k)
        if not max(self.brightness, self.contrast, self.lumaflip, self.hue, self.saturation) > 0:
            return images
        matrix = matrix.to(images.dtype)
        if channels == 3:
            pixels = matrix[:, :3, :3] @ images.reshape(n, 3, h * w) + matrix[:, :3, 3:]
        elif channels == 1:
            mean = matrix[:, :3].mean(dim=1, keepdim=True)  # [N, 1, 4]
            pixels = images.reshape(n, 1, h * w) * mean[:, :, :3].sum(dim=2, keepdim=True) + mean[:, :, 3:]
        else:
            raise ValueError(f"colour augmentation needs 1 or 3 channels, not {channels}; switch it off")
        return pixels.reshape(n, channels, h, w)


class _Draws:
    """Random draws on the generator's device, delivered on the images' device."""

    def __init__(self, images, generator, p):
        self.device = images.device
        self.kwargs = {"generator": generator, "device": images.device if generator is None else generator.device}
        self.p = p

    def normal(self, shape):
        return torch.randn(shape, **self.kwargs).to(self.device)

    def uniform(self, shape):
        """Uniform on [-1, 1)."""
        return torch.rand(shape, **self.kwargs).to(self.device) * 2 - 1

    def integers(self, high, shape):
        return torch.randint(high, shape, **self.kwargs).to(self.device)

    def keep_with_probability(self, value, probability, shape=None):
        mask = torch.rand(shape or value.shape, **self.kwargs).to(self.device) < probability
        return torch.where(mask, value, torch.zeros_like(value))

    def keep(self, value, multiplier, shape=None):
        return self.keep_with_probability(value, multiplier * self.p, shape)


def _filter_axis(images, taps, axis, stride, padding):
    """Depthwise 1-D correlation of [N, C, H, W] with taps along axis 2 or 3."""
    channels = images.shape[1]
    shape = [1, 1, -1, 1] if axis == 2 else [1, 1, 1, -1]
    one_axis = lambda value, other: (value, other) if axis == 2 else (other, value)
    kernel = taps.reshape(shape).tile([channels, 1, 1, 1])
    return F.conv2d(images, kernel, groups=channels, stride=one_axis(stride, 1), padding=one_axis(padding, 0))


def _upsample_axis(images, taps, axis):
    """Insert zeros between samples along an axis and low-pass: length L -> 2 L."""
    spread = torch.stack([images, torch.zeros_like(images)], dim=axis + 1).flatten(axis, axis + 1)
    spread = spread.narrow(axis, 0, spread.shape[axis] - 1)
    return _filter_axis(spread, taps.flip(0), axis, stride=1, padding=(len(taps) + 1) // 2)


def resample_affine(images: Tensor, inverse: Tensor) -> Tensor:
    """Apply a geometric transform to images [N, C, H, W], given as output-to-input maps `inverse` [N, 3, 3].

    Coordinates in pixels from the image centre, x right, y down; borders are mirrored. Resampling happens at twice
    the resolution between sym6 low-pass filters, whose orthogonality makes the identity map lossless.
    """
    h, w = images.shape[2:]
    g = inverse.to(torch.float32)
    taps = constant(tuple(SYM6), images.device, images.dtype)
    pad = len(SYM6) // 4  # 3 pixels at the original size

    # Mirror-pad as far as any corner of the batch reaches outside.
    cx, cy = (w - 1) / 2, (h - 1) / 2
    corners = constant(((-cx, cx, cx, -cx), (-cy, -cy, cy, cy), (1, 1, 1, 1)), images.device)
    reach = (g @ corners)[:, :2].transpose(0, 1).flatten(1)  # [2, 4 N]
    margin = torch.cat([-reach, reach]).amax(dim=1)  # left, top, right, bottom
    margin = margin + constant((pad * 2 - cx, pad * 2 - cy) * 2, images.device)
    margin = margin.clamp(min=0).minimum(constant((w - 1.0, h - 1.0) * 2, images.device))
    left, top, right, bottom = (int(m) for m in margin.ceil().tolist())
    images = F.pad(images, [left, right, top, bottom], mode="reflect")
    g = _translate2d((left - right) / 2, (top - bottom) / 2, g.device) @ g

    for axis in (3, 2):
        images = _upsample_axis(images, taps, axis)
    g = _scale2d(2, 2, g.device) @ g @ _scale2d(0.5, 0.5, g.device)
    g = _translate2d(-0.5, -0.5, g.device) @ g @ _translate2d(0.5, 0.5, g.device)

    out_h, out_w = (h + pad * 2) * 2, (w + pad * 2) * 2
    in_h, in_w = images.shape[2:]
    g = _scale2d(2 / in_w, 2 / in_h, g.device) @ g @ _scale2d(out_w / 2, out_h / 2, g.device)
    grid = F.affine_grid(g[:, :2], [images.shape[0], images.shape[1], out_h, out_w], align_corners=False)
    images = F.grid_sample(images, grid.to(images.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)

    for axis in (3, 2):
        images = _filter_axis(images, taps, axis, stride=2, padding=(len(taps) - 1) // 2)
        images = images.narrow(axis, pad, images.shape[axis] - 2 * pad)
    return images
