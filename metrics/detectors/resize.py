"""How published detectors resize: not as one would today, and features follow the difference."""

from __future__ import annotations

import torch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]


def tf1_bilinear(images: torch.Tensor, side: int) -> torch.Tensor:
    """TensorFlow 1's bilinear resize of float32 images [N, C, H, W] to [N, C, side, side].

    No half-pixel shift, no antialias: output i reads at i * (in / side), the ratio and the product rounded to float32.
    """

    def taps(size):
        at = torch.arange(side, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)
        low = at.floor()
        return [t.to(images.device) for t in (low.long(), (low + 1).clamp(max=size - 1).long(), at - low)]

    if images.shape[2:] == (side, side):
        return images
    (top, bottom, down), (left, right, across) = (taps(size) for size in images.shape[2:])
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
    mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images / 255 - mean) / std
