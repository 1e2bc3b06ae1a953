"""How published detectors resize: not as one would today, and features follow the difference."""

from __future__ import annotations

import functools

import torch

from torch_utils.devices import constant, send

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]


@functools.lru_cache(maxsize=16)
def _taps(size, side, device):
    """Lower and upper pixel, and how far between them, of `side` outputs along an axis of `size`; sent once."""
    at = torch.arange(side, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)
    low = at.floor()
    return [send(t, device) for t in (low.long(), (low + 1).clamp(max=size - 1).long(), at - low)]


def tf1_bilinear(images: torch.Tensor, side: int) -> torch.Tensor:
    """TensorFlow 1's bilinear resize of float32 images [N, C, H, W] to [N, C, side, side].

    No half-pixel shift, no antialias: output i reads at i * (in / side), the ratio and the product rounded to float32.
    """
    if images.shape[2:] == (side, side):
        return images
    (top, bottom, down), (left, right, across) = (_taps(size, side, images.device) for size in images.shape[2:])
    wide = images[..., left]
    wide = wide + (images[..., right] - wide) * across
    tall = wide[..., top, :]
    return tall + (wide[..., bottom, :] - tall) * down[:, None]


def bicubic(images: torch.Tensor, side: int, antialias: bool = True) -> torch.Tensor:
    """Bicubic resize of float32 images [N, C, H, W] to [N, C, side, side]; nothing is rounded or clamped.

    The kernel has A = -0.5 with antialias, as Pillow's, and A = -0.75 without.
    """
    resize = torch.nn.functional.interpolate
    return resize(images, size=(side, side), mode="bicubic", align_corners=False, antialias=antialias)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """RGB images [N, 3, H, W] from 0 to 255, minus the mean and by the standard deviation of ImageNet."""
    mean, std = (constant(values, images.device)[:, None, None] for values in (MEAN, STD))
    return (images / 255 - mean) / std
