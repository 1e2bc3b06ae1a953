"""Stable targets: posterior means over a reference batch in place of the clean image (Xu et al., ICLR 2023)."""

import math

import torch


def stf_targets(x, references, sigma, D=math.inf, mask=None):
    """Posterior means of the clean images over a reference batch: stable targets (Xu et al., ICLR 2023, eq. 9).

    x [B, ...] noisy, references [R, ...] clean, sigma [B] (or anything that flattens to it) or one number, D the number of
    augmented dimensions of the kernel (inf: Gaussian), mask [B, R] bool: which references count for which example.
    Returns targets [B, ...] in x's type and weights [B, R] float64 that sum to one. Weights are formed in the log domain,
    -(N+D)/2 log1p(d^2 / (sigma^2 D)) (PFGM++ eq. 4); memory is O(B R + R N). Raises ValueError where the mask leaves
    an example no reference.
    """
    flat_x = x.reshape(len(x), -1).to(torch.float64)  # [B, N]
    flat_r = references.reshape(len(references), -1).to(torch.float64)  # [R, N]
    D = float(D)
    variance = torch.as_tensor(sigma, device=x.device).reshape(-1, 1).to(torch.float64) ** 2  # [B or 1, 1]
    centre = flat_r.mean(dim=0)  # distances from a matmul lose digits far from the origin
    a, b = flat_x - centre, flat_r - centre
    d2 = (a.square().sum(1, keepdim=True) - 2 * a @ b.t() + b.square().sum(1)).clamp(min=0)  # [B, R]
    if math.isinf(D):
        log_weights = -d2 / (2 * variance)
    else:
        log_weights = -(flat_x.shape[1] + D) / 2 * torch.log1p(d2 / (variance * D))
    if mask is not None:
        if not bool(mask.any(dim=1).all()):
            raise ValueError("an example has no reference of its own source: raise --stf-refs")
        log_weights = log_weights.masked_fill(~mask, -math.inf)
    weights = log_weights.softmax(dim=1)
    return (weights @ flat_r).reshape(x.shape).to(x.dtype), weights


class StableTargets:
    """Stable targets for a DenoisingLoss: each example's own image and `num_references` others, of its own label.

    references: callable (n, generator) -> (images [n, ...], labels [n, K] or None), clean and encoded.
    D: augmented dimensions of the kernel. (Xu et al., "Stable Target Field", ICLR 2023.)
    """

    def __init__(self, references, num_references, D=math.inf):
        self.references = references
        self.num_references = num_references
        self.D = D

    def __call__(self, draws, generator):
        images, labels = self.references(self.num_references, generator)
        images = torch.cat([draws.images, images.to(draws.images)])
        mask = None
        if draws.labels is not None and labels is not None:
            keys = torch.cat([draws.labels, labels.to(draws.labels)])
            mask = (draws.labels[:, None] == keys[None]).all(dim=2)  # [B, R]
            mask |= (draws.labels == 0).all(dim=1)[:, None]  # a dropped label belongs to every source
        targets, _ = stf_targets(draws.images + draws.noise, images, draws.sigma, self.D, mask)
        return targets
