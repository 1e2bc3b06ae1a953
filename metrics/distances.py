"""Distances between two sets of images, computed from feature statistics or from the features themselves.

Everything here is a function of numbers: it knows no detector, no file and no process group.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike


def _matrix(x, name, ndim):
    x = torch.as_tensor(x).detach().to("cpu", torch.float64)
    if x.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimension(s), got shape {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name}: holds values that are not finite")
    return x


def _feature_pair(generated, reference, at_least):
    x, y = _matrix(generated, "generated", 2), _matrix(reference, "reference", 2)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"generated and reference features differ in width: {x.shape[1]} and {y.shape[1]}")
    for name, rows in (("generated", len(x)), ("reference", len(y))):
        if rows < at_least:
            raise ValueError(f"{name}: {rows} images are too few, this measure needs at least {at_least}")
    return x, y


def _factor(sigma):
    """A with A A' = sigma: Cholesky where sigma is clearly regular, else by eigenvalues.

    Directions below float64 resolution (rank-deficient sigma) are dropped: their roots would be noise of size 1e-8.
    """
    sigma = (sigma + sigma.T) / 2
    lower, failed = torch.linalg.cholesky_ex(sigma)
    pivots = lower.diagonal().square()
    if len(sigma) and not failed and pivots.amin() > 1e-9 * pivots.amax():
        return lower  # [F, F]
    values, vectors = torch.linalg.eigh(sigma)
    keep = values > values.abs().amax() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()  # [F, rank]


class Gaussian(NamedTuple):
    """A normal distribution by its mean and a factor A of its covariance A A', as narrow as its rank allows."""

    mean: torch.Tensor  # [F]
    factor: torch.Tensor  # [F, R]

    @classmethod
    def of_moments(cls, mu: ArrayLike, sigma: ArrayLike) -> Gaussian:
        """mu: [F], sigma: [F, F] symmetric positive semi-definite. Raises ValueError for shapes and what is not finite."""
        mu, sigma = _matrix(mu, "mu", 1), _matrix(sigma, "sigma", 2)
        if sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"mu and sigma differ in width: shapes {list(mu.shape)} and {list(sigma.shape)}")
        return cls(mu, _factor(sigma))

    @classmethod
    def of_features(cls, features: ArrayLike) -> Gaussian:
        """Mean and covariance (n - 1) of features [n, F], n >= 2; no matrix [F, F] where n <= F.

        There the factor has n - 1 columns: a reflection takes the direction of the mean, in which centred rows are zero,
        to the first row, which is left out.
        """
        x = _matrix(features, "features", 2)
        n, mu = len(x), x.mean(0)
        if n < 2:
            raise ValueError(f"features: {n} image(s) are too few, mean and covariance need at least 2")
        x = x - mu
        if n > x.shape[1]:
            return cls(mu, _factor(x.T @ x / (n - 1)))
        mirror = torch.full([n], n**-0.5, dtype=x.dtype)
        mirror[0] -= 1
        x = x - torch.outer(mirror, mirror @ x) * (2 / mirror.square().sum())  # [n, F], first row 0
        return cls(mu, x[1:].T / (n - 1) ** 0.5)


def frechet(a: Gaussian, b: Gaussian) -> float:
    """`frechet_distance` of two Gaussians of the same width: with factors A and B, work on A' B alone.

    The singular values of A' B are roots of the eigenvalues of its smaller Gram matrix, which is faster; where rounding of
    these (eps times the largest) could change the distance by more than 1e-10 of itself, they are found directly.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of different widths: {len(a.mean)} and {len(b.mean)}")
    apart = (a.mean - b.mean).square().sum() + a.factor.square().sum() + b.factor.square().sum()
    m = a.factor.T @ b.factor
    m = m if m.shape[0] <= m.shape[1] else m.T
    if 0 in m.shape:  # one covariance is zero
        return float(apart)
    values = torch.linalg.eigvalsh(m @ m.T)
    roots = values.clamp(min=0).sqrt()
    distance, error = apart - 2 * roots.sum(), torch.finfo(m.dtype).eps * values[-1] * (1 / roots).sum()
    if not error < 1e-10 * distance:
        distance = apart - 2 * torch.linalg.svdvals(m).sum()
    return max(float(distance), 0.0)  # rounding can leave -1e-13 for equal statistics


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Heusel et al. 2017, eq. 6; "FID" with Inception features).

    ``|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2)``. The trace of the root is the sum of the singular
    values of ``A1' A2`` where ``A A' = sigma`` (Cholesky, or symmetric eigen-decomposition where sigma is singular): no
    root of a non-symmetric product, no epsilon, and fewer images than features are exact to float64.

    mu1, mu2: [F]; sigma1, sigma2: [F, F] symmetric positive semi-definite; arrays or tensors of any float type.
    Raises ValueError when shapes disagree or a value is not finite.
    """
    return frechet(Gaussian.of_moments(mu1, sigma1), Gaussian.of_moments(mu2, sigma2))


def _mmd2_unbiased(x, y, degree, gamma, coef0):
    kernel = lambda a, b: (gamma * a @ b.T + coef0) ** degree
    m, n = len(x), len(y)
    kxx, kyy = kernel(x, x), kernel(y, y)
    within = (kxx.sum() - kxx.trace()) / (m * (m - 1)) + (kyy.sum() - kyy.trace()) / (n * (n - 1))
    return float(within - 2 * kernel(x, y).mean())


def kid(
    generated: ArrayLike,  # [N, F] features of generated images
    reference: ArrayLike,  # [M, F] features of reference images
    *,
    subset_size: int | None = 1000,  # images per subset; None: always all images at once
    num_subsets: int = 100,  # subsets averaged, when either side is larger than subset_size
    seed: int = 0,  # of the subsets
    degree: int = 3,
    gamma: float | None = None,  # None: 1 / F
    coef0: float = 1.0,
    return_std: bool = False,  # also the standard deviation over subsets (0 when all images fit in one)
) -> float | tuple[float, float]:
    """Kernel Inception Distance (Binkowski et al. 2018): unbiased squared MMD, kernel (gamma x'y + coef0)^degree.

    When both sides hold at most `subset_size` images the U-statistic of all of them is returned and nothing is random.
    Returns a float, or (mean, sd). The estimate is unbiased, so it may be negative.
    """
    x, y = _feature_pair(generated, reference, at_least=2)
    options = (degree, 1 / x.shape[1] if gamma is None else gamma, coef0)
    if subset_size is None or max(len(x), len(y)) <= subset_size:
        values = [_mmd2_unbiased(x, y, *options)]
    else:
        if subset_size < 2 or num_subsets < 1:
            raise ValueError(f"subset_size={subset_size}, num_subsets={num_subsets}: need at least 2 and 1")
        rng = np.random.default_rng(seed)
        draw = lambda z: z[torch.from_numpy(rng.permutation(len(z))[:subset_size])]
        values = [_mmd2_unbiased(draw(x), draw(y), *options) for _ in range(num_subsets)]
    mean = float(np.mean(values))
    return (mean, float(np.std(values))) if return_std else mean


def _squared_distances(x, y):
    """[N, F], [M, F] -> [N, M]; the fast form |x|^2 - 2 x'y + |y|^2, so accurate to about 1e-15 (|x|^2 + |y|^2)."""
    return (x.square().sum(1, keepdim=True) - 2 * x @ y.T + y.square().sum(1)).clamp_min_(0)


def _radii2(x, k, chunk):
    """Squared distance of every row to its k-th nearest other row; the row itself is the 0-th."""
    rows = []
    for start, part in enumerate(x.split(chunk)):
        d2 = _squared_distances(part, x)
        d2.diagonal(start * chunk).zero_()
        rows.append(d2.kthvalue(k + 1, dim=1).values)
    return torch.cat(rows)


def prdc(*, generated: ArrayLike, reference: ArrayLike, k: int = 5, chunk: int = 2048) -> dict[str, float]:
    """Precision, recall (Kynkaanniemi et al. 2019, eqs. 1-2), density, coverage (Naeem et al. 2020) by k-NN balls.

    generated: [N, F], reference: [M, F] features, N and M > k; both by keyword, because swapping them swaps precision
    and recall. Balls are closed (distance <= radius), as in Kynkaanniemi et al. Memory is O(chunk * max(N, M)).
    Returns a dict of four floats.
    """
    if k < 1:
        raise ValueError(f"k={k}: at least one neighbour is needed")
    x, y = _feature_pair(generated, reference, at_least=k + 1)
    center = y.mean(0)  # distances keep more digits near the origin
    x, y = x - center, y - center
    slack = 1e-12 * max(float(x.square().sum(1).max()), float(y.square().sum(1).max()))  # exact ties count as inside
    radii_x, radii_y = _radii2(x, k, chunk) + slack, _radii2(y, k, chunk) + slack
    inside_reference, recalled, covered = [], torch.zeros(len(y), dtype=bool), torch.zeros(len(y), dtype=bool)
    for part, radii in zip(x.split(chunk), radii_x.split(chunk), strict=True):
        d2 = _squared_distances(part, y)  # [n, M]
        hits = d2 <= radii_y
        inside_reference.append(hits.sum(1))
        covered |= hits.any(0)
        recalled |= (d2 <= radii[:, None]).any(0)
    inside_reference = torch.cat(inside_reference).double()
    return {
        "precision": float((inside_reference > 0).double().mean()),
        "recall": float(recalled.double().mean()),
        "density": float(inside_reference.mean() / k),
        "coverage": float(covered.double().mean()),
    }


def nearest_distance(samples: ArrayLike, reference: ArrayLike, chunk: int = 2048) -> np.ndarray:
    """Euclidean distance of every sample to its nearest reference row: [N, F], [M, F] -> [N] float64.

    Small distances of samples to training images, beside those of held-out images, show memorisation. The neighbour is
    found by matrix products and its distance then taken from the difference, so a copy is at exactly 0.
    """
    x, y = _feature_pair(samples, reference, at_least=1)
    center = y.mean(0)
    found = [part - y[_squared_distances(part - center, y - center).argmin(1)] for part in x.split(chunk)]
    return torch.cat(found).norm(dim=1).numpy()
