"""Stable targets: posterior means over a reference batch in place of the clean image (Xu et al., ICLR 2023)."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from training.losses.denoising import Draws
from training.processes.pfgmpp import posterior_weights


def stf_targets(
    x: Tensor, references: Tensor, sigma: Tensor | float, D: float = math.inf, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Posterior means of the clean images over a reference batch: stable targets (Xu et al., ICLR 2023, eq. 9).

    x [B, ...] noisy, references [R, ...] clean, sigma [B] or one number, D the number of augmented dimensions of the kernel
    (inf: Gaussian), mask [B, R] bool: which references count for which example. Returns targets [B, ...] in x's type and
    weights [B, R] float64 that sum to one; memory is O(B R + R N). Raises ValueError where the mask leaves an example no
    reference.
    """
    if mask is not None and not bool(mask.any(dim=1).all()):
        raise ValueError("an example has no reference of its own source: raise --stf-refs")
    return _targets(x, references, sigma, D, mask)


def _equal_rows(a, b):
    """[A, B]: which rows of a [A, K] and b [B, K] are equal; without waiting for a device, as unique() does."""
    same = torch.ones(len(a), len(b), dtype=torch.bool, device=a.device)
    for left, right in zip(a.split(64, dim=1), b.split(64, dim=1), strict=True):
        same &= (left[:, None] == right).all(dim=2)
    return same


def _targets(x, references, sigma, D, mask):
    weights = posterior_weights(x, references, sigma, D, mask)
    return (weights @ references.to(torch.float64).flatten(1)).reshape(x.shape).to(x.dtype), weights


class StableTargets:
    """Stable targets for a DenoisingLoss: each example's own image and `num_references` others, of its own label.

    references: callable (n, generator) -> (images [n, ...], labels [n, K] or None), clean and encoded.
    D: augmented dimensions of the kernel. (Xu et al., "Stable Target Field", ICLR 2023.)
    """

    def __init__(self, references: Callable, num_references: int, D: float = math.inf):
        self.references, self.num_references, self.D = references, num_references, D

    def __call__(self, draws: Draws, generator: Generator) -> Tensor:
        images, labels = self.references(self.num_references, generator)
        images = torch.cat([draws.images, images.to(draws.images)])
        mask = None
        if draws.labels is not None and labels is not None:
            mask = _equal_rows(
                draws.labels, torch.cat([draws.labels, labels.to(draws.labels)])
            )  # [B, R], itself among them
            mask |= (draws.labels == 0).all(dim=1)[:, None]  # a dropped label belongs to every source
        return _targets(draws.images + draws.noise, images, draws.sigma, self.D, mask)[0]
