"""The 2-D tree mixture of EDM2's autoguidance example, exactly, and the scores that AJEST measured on it.

Karras et al. 2024 (arXiv 2406.02507): two classes of branching trees made of thin Gaussians, smoothed by
noise of standard deviation sigma. Pais et al. 2025 (arXiv 2509.15267) for the mandala and classification scores.
Densities use log-sum-exp and closed-form 2x2 inverses, so that they are finite everywhere.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

ORIGIN = (0.0030, 0.0325)
SCALE = (1.3136, 1.3844)
MAX_DEPTH = 7
SEED = 2
LEVEL = -2.12  # log-density level of the scores; it encloses 99.3 % of the mass of both classes
CELL, CELLS = 0.03, 101  # mandala grid: side and number of square cells per axis, centred on ORIGIN
ELEMENTS = 1 << 15  # of the [points, components] tensors of one evaluation: they stay in the processor's cache


class Component(NamedTuple):
    """One Gaussian of the tree."""

    cls: str
    depth: int
    phi: float  # unnormalised weight
    mu: np.ndarray  # [2]
    Sigma: np.ndarray  # [2, 2]


def _branch(rnd, cls, depth, pos, angle):
    """Components of a branch and of all that grow from it, depth first; every branch draws three normals."""
    if depth == MAX_DEPTH:
        return []
    direction = np.array([np.cos(angle), np.sin(angle)])
    length = 0.292 * 0.8**depth * (1 + rnd.randn() * 0.2)
    thick = 0.2 * 0.8**depth / length
    size = np.array(SCALE) * length * 0.06
    along = np.outer(direction, direction)
    Sigma = (along + (np.eye(2) - along) * thick**2) * np.outer(size, size)
    out = [
        Component(cls, depth, length * 0.5**depth, (pos + direction * length * t) * np.array(SCALE), Sigma)
        for t in np.linspace(0.07, 0.93, num=8)
    ]
    for sign in (1, -1):
        turned = angle + sign * 0.7**depth * (1 + rnd.randn() * 0.2)
        out += _branch(rnd, cls, depth + 1, pos + direction * length, turned)
    return out


@functools.cache
def components() -> tuple[Component, ...]:
    """All 2032 components: class A (initial angle pi/4), then B (5 pi/4), from one random stream."""
    rnd = np.random.RandomState(SEED)
    start = np.array(ORIGIN)
    tree = _branch(rnd, "A", 0, start, math.pi / 4)
    return tuple(tree + _branch(rnd, "B", 0, start, 5 * math.pi / 4))


class GaussianMixture(torch.nn.Module):
    """Mixture of 2-D Gaussians, smoothed on request by isotropic noise.

    Buffers phi [K] (sums to 1), mu [K, 2], Sigma [K, 2, 2]. Points x are [..., 2]; sigma >= 0 is a scalar or [...].
    """

    def __init__(self, phi: ArrayLike, mu: ArrayLike, Sigma: ArrayLike, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        phi = np.asarray(phi, dtype=np.float64)
        self.register_buffer("phi", torch.tensor(phi / phi.sum(), dtype=dtype))
        self.register_buffer("mu", torch.tensor(np.asarray(mu), dtype=dtype))
        self.register_buffer("Sigma", torch.tensor(np.asarray(Sigma), dtype=dtype))
        L, Q = torch.linalg.eigh(torch.tensor(np.asarray(Sigma), dtype=torch.float64))
        self.register_buffer("_L", L.to(dtype))  # [K, 2] variances
        self.register_buffer("_Q", Q.to(dtype))  # [K, 2, 2] axes in columns
        size = 1 << 16  # look-up table of component indices, filled in proportion to the weights
        edges = torch.cat([torch.zeros(1), self.phi.to(torch.float32).cumsum(0)]) * size + 0.5
        counts = edges.to(torch.int64).clamp(max=size).diff()
        table = torch.repeat_interleave(torch.arange(len(phi)), counts)
        self.register_buffer("_table", torch.nn.functional.pad(table, (0, size - len(table))))

    def _terms(self, x, sigma):
        """x [M, 2], sigma [M] -> log(phi_k N_k) [M, K] and the whitened differences (Sigma_k + sigma^2)^-1 (mu_k - x)."""
        v = sigma[:, None] ** 2
        a, b, d = self.Sigma[:, 0, 0] + v, self.Sigma[:, 0, 1], self.Sigma[:, 1, 1] + v  # [M, K], [K], [M, K]
        det = (self._L[:, 0] + v) * (self._L[:, 1] + v)  # no cancellation
        dx, dy = (self.mu[:, i] - x[:, i : i + 1] for i in range(2))  # [M, K]
        gx, gy = (d * dx - b * dy) / det, (a * dy - b * dx) / det
        logs = self.phi.log() - 0.5 * (dx * gx + dy * gy + det.log()) - math.log(2 * math.pi)
        return logs, gx, gy

    def _evaluate(self, function, x, sigma):
        """Apply function(logs, gx, gy) to batches of points; results keep x's leading shape."""
        x = torch.as_tensor(x, dtype=self.mu.dtype, device=self.mu.device)
        sigma = torch.as_tensor(sigma, dtype=self.mu.dtype, device=self.mu.device).broadcast_to(x.shape[:-1])
        flat, levels = x.reshape(-1, 2), sigma.reshape(-1)
        batch = max(ELEMENTS // len(self.phi), 1)
        parts = zip(flat.split(batch), levels.split(batch), strict=True)
        out = torch.cat([function(*self._terms(points, sigmas)) for points, sigmas in parts])
        return out.reshape(x.shape[:-1] + out.shape[1:])

    def logp(self, x: ArrayLike, sigma: ArrayLike = 0) -> torch.Tensor:
        """Log-density [...] of the mixture smoothed by sigma."""
        return self._evaluate(lambda logs, gx, gy: logs.logsumexp(dim=1), x, sigma)

    def pdf(self, x: ArrayLike, sigma: ArrayLike = 0) -> torch.Tensor:
        """Density [...]."""
        return self.logp(x, sigma).exp()

    def score(self, x: ArrayLike, sigma: ArrayLike = 0) -> torch.Tensor:
        """Gradient of logp [..., 2]."""

        def mean(logs, gx, gy):
            weights = logs.softmax(dim=1)
            return torch.stack([(weights * gx).sum(dim=1), (weights * gy).sum(dim=1)], dim=1)

        return self._evaluate(mean, x, sigma)

    def sample(
        self, shape: int | tuple, sigma: ArrayLike = 0, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Points [*shape, 2]: all component indices are drawn first, then all normals (EDM2's order)."""
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        device = self.mu.device
        draw_on = device if generator is None else generator.device
        index = self._table[torch.randint(len(self._table), shape, generator=generator, device=draw_on).to(device)]
        noise = torch.randn([*shape, 2], generator=generator, device=draw_on, dtype=self.mu.dtype).to(device)
        sigma = torch.as_tensor(sigma, dtype=self.mu.dtype, device=device).broadcast_to(shape)
        Q = self._Q[index]  # [*shape, 2, 2]
        spread = (self._L[index] + sigma[..., None] ** 2).sqrt()
        rotated = (Q.transpose(-1, -2) @ noise[..., None])[..., 0]  # Q' noise
        return self.mu[index] + (Q @ (spread * rotated)[..., None])[..., 0]

    def denoiser(self, sigma_data: float = 0.5) -> ExactDenoiser:
        """The exact denoiser of this mixture, net(x [N, 2, 1, 1], sigma, labels) -> [N, 2, 1, 1], for every solver."""
        return ExactDenoiser(self, sigma_data)


class ExactDenoiser(torch.nn.Module):
    """D(x; sigma) = x + sigma^2 score(x; sigma) of a mixture (Tweedie)."""

    label_dim, img_channels, img_resolution, sigma_min, sigma_max = 0, 2, 1, 0.0, float("inf")

    def __init__(self, mixture: GaussianMixture, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.mixture = mixture
        self.sigma_data = sigma_data

    def forward(self, x, sigma, class_labels=None, return_logvar=False, **kwargs):
        points = x.flatten(1)
        sigma = torch.as_tensor(sigma, device=x.device).to(points.dtype).reshape(-1).expand(len(x))
        score = self.mixture.score(points, sigma).to(points.dtype)
        denoised = (points + sigma[:, None] ** 2 * score).reshape(x.shape)
        return (denoised, denoised.new_zeros([len(x), 1, 1, 1])) if return_logvar else denoised


def ground_truth(
    classes: str = "A", min_depth: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> GaussianMixture:
    """The tree of the given classes ("A", "B" or "AB") as a GaussianMixture.

    min_depth restricts it to the outer branches (AJEST's external branches: class A, min_depth 5). Raises ValueError
    for unknown classes.
    """
    if not classes or not set(classes) <= {"A", "B"}:
        raise ValueError(f"classes={classes!r} of the tree are unknown; choose A, B or AB (--cls)")
    if not 0 <= min_depth < MAX_DEPTH:
        raise ValueError(f"min_depth={min_depth} is outside 0 .. {MAX_DEPTH - 1}, the depths of the tree")
    chosen = [c for c in components() if c.cls in classes and c.depth >= min_depth]
    mixture = GaussianMixture([c.phi for c in chosen], [c.mu for c in chosen], [c.Sigma for c in chosen], dtype)
    return mixture.to(device)


def _points(samples):
    """Samples [N, 2] or [N, 2, 1, 1], tensor or array -> float64 tensor [N, 2]."""
    samples = torch.as_tensor(samples).detach().to("cpu", torch.float64)
    samples = samples.flatten(1) if samples.ndim > 1 else samples
    if samples.ndim != 2 or samples.shape[1] != 2 or not len(samples):
        raise ValueError(f"samples of shape {list(samples.shape)} given; needs points [N, 2] or [N, 2, 1, 1], N > 0")
    return samples


def _hits(samples, classes):
    """(cells of the points inside the grid window [M, 2], which points lie on the tree [M]). What is not finite is outside."""
    lower, upper = (torch.tensor(ORIGIN, dtype=torch.float64) + sign * CELL * CELLS / 2 for sign in (-1, 1))
    inside = samples[((samples >= lower) & (samples <= upper)).all(dim=1)]
    hit = ground_truth(classes, dtype=torch.float64).logp(inside) >= LEVEL
    return ((inside - lower) / CELL).to(torch.int64), hit


def mandala_score(samples: ArrayLike, classes: str = "A") -> float:
    """Share of grid cells holding a sample on the tree, among all cells that hold a sample (AJEST's "unique" score).

    samples [N, 2]. A precision over occupied cells of side 0.03, no coverage: it falls with the number of samples (the
    truth itself: .993 at 512, .969 at 16384), so state N beside it. 0 if no sample lies in the window.
    """
    cells, hit = _hits(_points(samples), classes)
    return len(cells[hit].unique(dim=0)) / len(cells.unique(dim=0)) if len(cells) else 0.0


def classification_score(samples: ArrayLike, classes: str = "A") -> float:
    """Share of all samples [N, 2] that lie on the tree: log p >= -2.12 inside the window (AJEST's "non-unique" score)."""
    samples = _points(samples)
    return int(_hits(samples, classes)[1].sum()) / len(samples)
