"""Distances between two sets of images, computed from feature statistics or from the features themselves.

Everything here is a function of numbers: it knows no detector, no file and no process group.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from numpy.typing import ArrayLike

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # [N, F], [M, F] -> [N, M]
WIDE_RATIO, WIDE_SHARE = 2, 0.2  # beyond these a ball of k nearest neighbours is no neighbourhood, see `Manifolds.wide`


def _matrix(x, name, ndim):
    x = torch.as_tensor(x).detach().to("cpu", torch.float64)
    if x.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimension(s), got shape {tuple(x.shape)}")
    if not (x.sum().isfinite() or x.isfinite().all()):
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
    """[F, R] A with A A' = sigma: Cholesky with pivots, so that its columns fall in length, to the rank R of sigma.

    Directions below float64 resolution (rank-deficient sigma) are dropped: their roots would be noise of size 1e-8.
    """
    lower, order, rank, _ = scipy.linalg.lapack.dpstrf(sigma.numpy().T, lower=1)
    upper = torch.from_numpy(lower.T)[:rank].triu_()  # [R, F]
    return upper[:, order.argsort()].T


class Gaussian(NamedTuple):
    """A normal distribution by its mean and a factor A of its covariance A A', as narrow as its rank allows."""

    mean: torch.Tensor  # [F]
    factor: torch.Tensor  # [F, R]
    count: int = 0  # images that it was estimated from; 0: not known

    @classmethod
    def of_moments(cls, mu: ArrayLike, sigma: ArrayLike, count: int = 0) -> Gaussian:
        """mu: [F], sigma: [F, F] symmetric positive semi-definite. Raises ValueError for shapes and what is not finite."""
        mu, sigma = _matrix(mu, "mu", 1), _matrix(sigma, "sigma", 2)
        if sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"mu and sigma differ in width: shapes {list(mu.shape)} and {list(sigma.shape)}")
        if (sigma.sum(0) - sigma.sum(1)).abs().amax() > 1e-6 * len(mu) * sigma.diagonal().amax():
            raise ValueError("sigma is not symmetric")
        return cls(mu, _factor(sigma), count)

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
            return cls(mu, _factor(x.T @ x / (n - 1)), n)
        mirror = torch.full([n], n**-0.5, dtype=x.dtype)
        mirror[0] -= 1
        x = x - torch.outer(mirror, mirror @ x) * (2 / mirror.square().sum())  # [n, F], first row 0
        return cls(mu, x[1:].T / (n - 1) ** 0.5, n)


def frechet(a: Gaussian, b: Gaussian) -> float:
    """`frechet_distance` of two Gaussians of the same width: with factors A and B, work on A' B alone.

    Its singular values are roots of the eigenvalues of its smaller Gram matrix, which is fast. Where the rounding of these
    (eps times the largest) could change the distance by more than 1e-10 of itself, the triangle R of A' B = Q R goes first:
    as the columns of A and B fall in length, so do the rows of R, and the eigenvalues of a matrix that is graded in this
    way are known relative to themselves (Barlow & Demmel 1990). What is not graded is left to a singular value
    decomposition.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of different widths: {len(a.mean)} and {len(b.mean)}")
    apart = (a.mean - b.mean).square().sum() + a.factor.square().sum() + b.factor.square().sum()
    m = a.factor.T @ b.factor
    m = m if m.shape[0] >= m.shape[1] else m.T
    if 0 in m.shape:  # one covariance is zero
        return float(apart)
    eps, lengths = torch.finfo(m.dtype).eps, [g.factor.square().sum(0) for g in (a, b)]
    if all(v.amin() > 1e-5 * v.amax() for v in lengths):
        values = torch.linalg.eigvalsh(m.T @ m)
        roots = values.clamp(min=0).sqrt()
        distance = apart - 2 * roots.sum()
        if eps * values[-1] * (1 / roots).sum() < 1e-10 * distance:
            return float(distance)
    triangle = torch.linalg.qr(m, mode="r").R
    gram = triangle @ triangle.T
    graded = gram.diagonal() / triangle.diagonal().square()  # a few units where rows are graded
    order = gram.diagonal().argsort(descending=True)  # as the reduction to three diagonals goes
    gram = gram[order][:, order]
    nuclear = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
    if not eps * graded.amax() * nuclear < 1e-10 * (apart - 2 * nuclear):
        nuclear = torch.linalg.svdvals(triangle).sum()
    return max(float(apart - 2 * nuclear), 0.0)  # rounding can leave -1e-13 for equal statistics


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Heusel et al. 2017, eq. 6; "FID" with Inception features).

    ``|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2)``. The trace of the root is the sum of the singular
    values of ``A1' A2`` where ``A A' = sigma`` (pivoted Cholesky, to the rank of sigma): no root of a non-symmetric
    product, no epsilon, and fewer images than features are exact to float64.

    mu1, mu2: [F]; sigma1, sigma2: [F, F] symmetric positive semi-definite; arrays or tensors of any float type.
    Raises ValueError when shapes disagree or a value is not finite.
    """
    return frechet(Gaussian.of_moments(mu1, sigma1), Gaussian.of_moments(mu2, sigma2))


def frechet_errors(
    a: Gaussian, b: Gaussian, x: ArrayLike | None = None, y: ArrayLike | None = None
) -> list[float | None]:
    """Standard errors of `frechet` that come from the images behind a and from those behind b; None where not given.

    x: [N, F] features of a's images (or of an even share of them), y: [M, F] of b's, with `a.count` and `b.count` images.
    By the infinitesimal jackknife (Jaeckel 1972): the distance is differentiable in the weight of an image, with influence

        2 (mu_a - mu_b)'(x - mu_a) + N/(N - 1) ((x - mu_a)' (x - mu_a) - (x - mu_a)' T (x - mu_a)),
        T = B (B' S_a B)^-1/2 B',  S_b = B B',

    T the optimal transport of a to b, and their variance over N is that of the limit law (Rippl, Munk & Sturm 2016). The
    error is of the distance at this number of images, which is above that of the distributions. It is at most sqrt(2) too
    large where these are equal, and holds with fewer images than features. A bootstrap does not: drawn with replacement,
    images that repeat add a bias of their own, and lower the rank.
    """
    m = a.factor.T @ b.factor
    wide = m.shape[0] <= m.shape[1]
    _, left = torch.linalg.eigh(m @ m.T if wide else m.T @ m)
    right = m.T @ left if wide else m @ left
    roots = right.norm(dim=0)  # the singular values, to more digits than the roots of the eigenvalues
    kept = roots > 1e-9 * roots.amax() if len(roots) else roots > 0
    left, right, roots = left[:, kept], right[:, kept] / roots[kept], roots[kept].sqrt()
    u, v = (left, right) if wide else (right, left)
    errors = []
    for own, other, turn, rows in ((a, b, v, x), (b, a, u, y)):
        if rows is None or own.count < 2:
            errors.append(None)
            continue
        centred = _matrix(rows, "features", 2) - own.mean
        transported = centred @ (other.factor @ turn / roots)
        second = (centred.square().sum(1) - transported.square().sum(1)) * own.count / (own.count - 1)
        influence = 2 * centred @ (own.mean - other.mean) + second
        errors.append(float(influence.std() / own.count**0.5))
    return errors


def frechet_infinity(generated: ArrayLike, reference: Gaussian, seed: int = 0) -> float | None:
    """Fréchet distance of infinitely many generated images to the same reference (Chong & Forsyth 2020: FID_infinity).

    generated: [N, F]. The distance is linear in 1/N (its bias) once N is several F: the line through it and its mean over
    two halves, which have the same images and so hardly any noise of their own, is followed to 1/N = 0. The standard error
    is that of the distance. None with fewer than 8 F images, of which halves are not on the line yet.
    """
    x = _matrix(generated, "generated", 2)
    if len(x) < 8 * x.shape[1]:
        return None
    halves = x[np.random.default_rng(seed).permutation(len(x))].chunk(2)
    whole, *parts = (frechet(Gaussian.of_features(part), reference) for part in (x, *halves))
    return 2 * whole - sum(parts) / 2


class Discrepancy(NamedTuple):
    """An estimate of the squared maximum mean discrepancy."""

    value: float
    error: float | None  # standard error; None with fewer than three images on a side
    deviation: float  # over subsets, which says how much one subset varies, and not how sure the value is


def polynomial_kernel(degree: int = 3, gamma: float | None = None, coef0: float = 1.0) -> Kernel:
    """(gamma x'y + coef0)^degree, gamma 1/F where it is None: the kernel of KID."""
    return lambda a, b: ((1 / a.shape[1] if gamma is None else gamma) * a @ b.T + coef0) ** degree


def gaussian_kernel(bandwidth: float) -> Kernel:
    """exp(-|x - y|^2 / (2 bandwidth^2))."""
    return lambda a, b: (_squared_distances(a, b) / (-2 * bandwidth**2)).exp_()


def median_distance(features: ArrayLike, most: int = 1000) -> float:
    """Median distance of two different rows of [N, F], of at most so many evenly spaced: the usual bandwidth."""
    x = _matrix(features, "features", 2)
    x = x[:: -(-len(x) // most)]
    return float(torch.nn.functional.pdist(x - x.mean(0)).median())


def _mmd2(x, y, kernel, chunk=2048):
    """Unbiased estimate from all rows, and what it loses without row i of x, [N], and of y, [M]."""
    m, n, rows_x, rows_y, across = len(x), len(y), [], [], []
    for rows, z in ((rows_x, x), (rows_y, y)):
        for start, part in enumerate(z.split(chunk)):
            values = kernel(part, z)
            values.diagonal(start * chunk).zero_()
            rows.append(values.sum(1))
    columns = torch.zeros(n, dtype=x.dtype)
    for part in x.split(chunk):
        values = kernel(part, y)
        across.append(values.sum(1))
        columns += values.sum(0)
    rows_x, rows_y, across = map(torch.cat, (rows_x, rows_y, across))
    within, value = [rows.sum() / (k * (k - 1)) for rows, k in ((rows_x, m), (rows_y, n))], 0
    between = across.sum() / (m * n)
    value = within[0] + within[1] - 2 * between
    if min(m, n) < 3:
        return float(value), None, None
    lost = []
    for rows, cross, k, l, inside in ((rows_x, across, m, n, within[0]), (rows_y, columns, n, m, within[1])):
        without = (rows.sum() - 2 * rows) / ((k - 1) * (k - 2)) - 2 * (across.sum() - cross) / ((k - 1) * l)
        lost.append(inside - 2 * between - without)
    return float(value), *lost


def mmd(
    *,
    generated: ArrayLike,  # [N, F] features
    reference: ArrayLike,  # [M, F]
    kernel: Kernel | None = None,  # None: that of KID
    subset_size: int | None = 1000,  # images per subset; None: always all images at once
    num_subsets: int = 100,  # subsets averaged, when either side is larger than subset_size
    seed: int = 0,  # of the subsets
) -> Discrepancy:
    """Squared maximum mean discrepancy, unbiased (Gretton et al. 2012, eq. 3), with its standard error.

    When both sides hold at most `subset_size` images the U-statistic of all of them is returned and nothing is random. The
    error is the jackknife over images: the root of the sum of squares of what the value (a mean over subsets) loses when an
    image is left out of the subsets that have it. By Efron & Stein (1981) its square is no smaller than the variance, on
    average, whatever the subsets share. Raises ValueError for sizes that no subset can have.
    """
    x, y = _feature_pair(generated, reference, at_least=2)
    kernel = kernel or polynomial_kernel()
    if subset_size is None or max(len(x), len(y)) <= subset_size:
        draws = [(torch.arange(len(x)), torch.arange(len(y)))]
    else:
        if subset_size < 2 or num_subsets < 1:
            raise ValueError(f"subset_size={subset_size}, num_subsets={num_subsets}: need at least 2 and 1")
        rng = np.random.default_rng(seed)
        draw = lambda z: torch.from_numpy(rng.permutation(len(z))[:subset_size])
        draws = [(draw(x), draw(y)) for _ in range(num_subsets)]
    values, lost = [], [torch.zeros(len(z), dtype=x.dtype) for z in (x, y)]
    for rows in draws:
        value, *parts = _mmd2(x[rows[0]], y[rows[1]], kernel)
        values.append(value)
        for total, index, part in zip(lost, rows, parts, strict=True):
            if part is not None:
                total[index] += part / len(draws)
    error = float(torch.cat(lost).norm()) if parts[0] is not None else None
    return Discrepancy(float(np.mean(values)), error, float(np.std(values)))


def kid(
    generated: ArrayLike,  # [N, F] features of generated images
    reference: ArrayLike,  # [M, F] features of reference images
    *,
    degree: int = 3,
    gamma: float | None = None,  # None: 1 / F
    coef0: float = 1.0,
    return_std: bool = False,  # also the standard deviation over subsets (0 when all images fit in one)
    **options: int | None,  # subset_size, num_subsets, seed, see `mmd`
) -> float | tuple[float, float]:
    """Kernel Inception Distance (Binkowski et al. 2018): `mmd` with kernel (gamma x'y + coef0)^degree.

    Returns a float, or (mean, sd). The estimate is unbiased, so it may be negative.
    """
    kernel = polynomial_kernel(degree, gamma, coef0)
    found = mmd(generated=generated, reference=reference, kernel=kernel, **options)
    return (found.value, found.deviation) if return_std else found.value


def inception_score(logits: ArrayLike, splits: int = 10) -> tuple[float, float]:
    """Inception Score (Salimans et al. 2016) of logits [N, K] and its standard error: exp of the mean KL(p(y|x) | p(y)).

    The mean over `splits` parts in the order of the images, as published. The error is that of the mean of the divergences,
    which is the infinitesimal jackknife: to first order p(y) adds nothing. Raises ValueError for fewer than two images per
    part.
    """
    logits = torch.as_tensor(logits)
    impossible = (logits == -torch.inf).all(0)  # classes that no image can have
    log_p = _matrix(logits[:, ~impossible], "logits", 2).log_softmax(1)
    if len(log_p) < 2 * splits:
        raise ValueError(f"logits of {len(log_p)} images are too few for {splits} parts")
    scores, variances = [], []
    for part in log_p.tensor_split(splits):
        divergences = (part.exp() * (part - part.logsumexp(0) + np.log(len(part)))).sum(1)
        scores.append(divergences.mean().exp())
        variances.append(scores[-1].square() * divergences.var() / len(part))
    return float(torch.stack(scores).mean()), float(torch.stack(variances).sum().sqrt() / splits)


def _squared_distances(x, y):
    """[N, F], [M, F] -> [N, M]; the fast form |x|^2 - 2 x'y + |y|^2, so accurate to about 1e-15 (|x|^2 + |y|^2)."""
    return (x.square().sum(1, keepdim=True) - 2 * x @ y.T + y.square().sum(1)).clamp_min_(0)


def _radii2(x, k, chunk, parts, groups):
    """[1 + groups, N] squared distance of every row to its k-th nearest other row; then the same without part g of the rows.

    The row itself is the 0-th. parts: [N] integers from 0 to groups - 1.
    """
    most, rows = min(len(x), 2 * k + 9 if groups else k + 1), []
    for start, part in enumerate(x.split(chunk)):
        d2 = _squared_distances(part, x)
        d2.diagonal(start * chunk).zero_()
        near, index = (v.numpy() for v in d2.topk(most, largest=False))  # [n, most], ascending
        found = [near[:, k]]
        for g in range(groups):
            left = parts[index] != g
            left[:, 0] = True
            place = (left.cumsum(1) <= k).sum(1).clip(max=most - 1)  # of the k-th neighbour that is left
            found.append(np.take_along_axis(near, place[:, None], axis=1)[:, 0])
        rows.append(np.stack(found))
    return np.concatenate(rows, axis=1)


class Manifolds(NamedTuple):
    """Precision, recall, density and coverage."""

    values: dict[str, float]
    errors: dict[str, float | None]  # standard errors, where they were asked for
    ratio: float  # reference images in a ball around a generated image, over those of equal distributions (k M / N)
    share: float  # the same, over all reference images

    @property
    def wide(self) -> str | None:
        """Why recall means nothing, if so: noise, outliers and few images have balls that hold whatever there is."""
        if self.ratio <= WIDE_RATIO and self.share <= WIDE_SHARE:
            return None
        return (
            f"recall means nothing: the balls of nearest neighbours around generated images hold {self.share:.1%} of the "
            f"reference images each, {self.ratio:.3g} times those of equal distributions"
        )


def manifolds(
    *, generated: ArrayLike, reference: ArrayLike, k: int = 5, chunk: int = 2048, groups: int = 0, seed: int = 0
) -> Manifolds:
    """`prdc` with standard errors: the jackknife that leaves out one of `groups` random parts of either side (0: none).

    Left-out groups, because a count of nearest neighbours is not smooth enough to leave out single images (Shao & Wu 1989),
    and the copies that a bootstrap draws are neighbours at distance 0.
    """
    if k < 1:
        raise ValueError(f"k={k}: at least one neighbour is needed")
    x, y = _feature_pair(generated, reference, at_least=k + 1)
    center = y.mean(0)  # distances keep more digits near the origin
    x, y = x - center, y - center
    slack = 1e-12 * max(float(x.square().sum(1).max()), float(y.square().sum(1).max()))  # exact ties count as inside
    groups = groups if min(len(x), len(y)) > max(2 * groups, 2 * k + 8) else 0
    rng, everything = np.random.default_rng(seed), [np.ones(len(z), dtype=bool) for z in (x, y)]
    parts = [rng.permutation(len(z)) % max(groups, 1) for z in (x, y)]
    radii_x, radii_y = (_radii2(z, k, chunk, part, groups) + slack for z, part in zip((x, y), parts, strict=True))
    versions = [(*everything, radii_x[0], radii_y[0])]  # images that are kept, and their balls
    for g in range(groups):
        kept_x, kept_y = (part != g for part in parts)
        versions.append((kept_x, everything[1], np.where(kept_x, radii_x[1 + g], -1), radii_y[0]))
        versions.append((everything[0], kept_y, radii_x[0], np.where(kept_y, radii_y[1 + g], -1)))
    counts = np.zeros((len(versions), len(x)), dtype=np.int64)  # reference balls that a generated image is in
    recalled, covered = (np.zeros((len(versions), len(y)), dtype=bool) for _ in range(2))
    held = 0  # reference images in generated balls
    for start in range(0, len(x), chunk):
        rows = slice(start, start + chunk)
        d2 = _squared_distances(x[rows], y).numpy()  # [n, M]
        for v, (kept, _, rx, ry) in enumerate(versions):
            hits, balls = d2 <= ry, d2 <= rx[rows, None]
            counts[v, rows], recalled[v] = np.count_nonzero(hits, axis=1), recalled[v] | balls.any(0)
            covered[v] |= (hits if kept.all() else hits[kept[rows]]).any(0)
            held += 0 if v else np.count_nonzero(balls)
    names, found = ("precision", "recall", "density", "coverage"), []
    for v, (kept_x, kept_y, *_) in enumerate(versions):
        inside = counts[v, kept_x]
        of_y = (recalled[v, kept_y].mean(), covered[v, kept_y].mean())
        found.append([(inside > 0).mean(), of_y[0], inside.mean() / k, of_y[1]])
    (values, *others), errors = np.array(found), [None] * 4
    if groups:
        errors = ((groups - 1) * (np.var(others[::2], axis=0) + np.var(others[1::2], axis=0))) ** 0.5
        errors = errors.tolist()
    share = held / (len(x) * len(y))
    pair = (dict(zip(names, column, strict=True)) for column in (values.tolist(), errors))
    return Manifolds(*pair, ratio=share * len(x) / k, share=share)


def prdc(*, generated: ArrayLike, reference: ArrayLike, k: int = 5, chunk: int = 2048) -> dict[str, float]:
    """Precision, recall (Kynkaanniemi et al. 2019, eqs. 1-2), density, coverage (Naeem et al. 2020) by k-NN balls.

    generated: [N, F], reference: [M, F] features, N and M > k; both by keyword, because swapping them swaps precision
    and recall. Balls are closed (distance <= radius), as in Kynkaanniemi et al. Memory is O(chunk * max(N, M)).
    Returns a dict of four floats; warns where recall means nothing (`Manifolds.wide`).
    """
    found = manifolds(generated=generated, reference=reference, k=k, chunk=chunk)
    if found.wide:
        warnings.warn(found.wide, stacklevel=2)
    return found.values


def nearest_distance(samples: ArrayLike, reference: ArrayLike, chunk: int = 2048) -> np.ndarray:
    """Euclidean distance of every sample to its nearest reference row: [N, F], [M, F] -> [N] float64.

    Small distances of samples to training images, beside those of held-out images, show memorisation. The neighbour is
    found by matrix products and its distance then taken from the difference, so a copy is at exactly 0.
    """
    x, y = _feature_pair(samples, reference, at_least=1)
    center = y.mean(0)
    found = [part - y[_squared_distances(part - center, y - center).argmin(1)] for part in x.split(chunk)]
    return torch.cat(found).norm(dim=1).numpy()
