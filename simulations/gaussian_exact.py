"""Exact total-variation errors of the Gaussian experiment: no simulation, no torch.

Setting (multi-source theory paper, Sec. 4.1 and App. E.1): K sources, uniform p(y), x | k ~ N(mu_k, I_D); n training
pairs in all, so n_k ~ Binomial(n, 1/K). The single-source estimate of mu_k is the mean of source k; the multi-source
estimate uses that mean in the first d1 entries and the mean of all n points in the D - d1 shared ones.

A source without data has no estimate where it would need one. Its error is then defined as the largest possible,
TV = 1, here as in the simulation.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betainc, erf, gammaln

_NODES = np.arange(-420, 421) / 10.0  # log tan t; the trapezoidal rule converges exponentially in it
_WEIGHTS = 0.1 / (math.pi * np.cosh(_NODES))  # (2 / pi) dt
_LOG_INV_SIN2 = np.logaddexp(0.0, -2.0 * _NODES)  # -log sin^2 t
_MAX_WINDOW = 2000  # more counts than this: polynomial in n_k instead of one quadrature per count


def tv_unit_gaussians(distance: ArrayLike) -> np.ndarray:
    """TV(N(a, I), N(b, I)) = erf(|a - b| / (2 sqrt 2)) from the distance |a - b| (any shape)."""
    return erf(np.asarray(distance, dtype=np.float64) / (2.0 * math.sqrt(2.0)))


def expected_tv_student(count: ArrayLike, d: int) -> np.ndarray:
    """E TV when all d mean entries have variance 1/count: 2 T_d(sqrt(d / (4 count))) - 1, with Student's t CDF T_d.

    `count` may be an array; a count of 0 gives 1.
    """
    return betainc(0.5, d / 2.0, 1.0 / (1.0 + 4.0 * np.asarray(count, dtype=np.float64)))


def expected_tv_given_counts(count: ArrayLike, n: int, d: int, d1: int) -> np.ndarray:
    """E TV when d1 mean entries have variance 1/count and d - d1 have variance 1/n, independently.

    Integral over t in [0, pi/2] of (2/pi) (1 - (1 + 1/(4 count sin^2 t))^(-d1/2) (1 + 1/(4 n sin^2 t))^(-(d-d1)/2)).

    count: training points of the source, any shape; 0 gives 1 if d1 > 0. n: training points of all sources. d, d1:
    dimensions, and how many of them are source-specific.
    """
    count = np.asarray(count, dtype=np.float64)
    inv_sin2 = np.exp(_LOG_INV_SIN2)
    log_f = -0.5 * (d - d1) * np.log1p(inv_sin2 / (4.0 * n))
    if d1 > 0:
        safe = np.where(count > 0, count, 1.0)[..., None]
        log_f = log_f - 0.5 * d1 * np.log1p(inv_sin2 / (4.0 * safe))
    value = -np.expm1(log_f) @ _WEIGHTS
    return np.where(count > 0, value, 1.0) if d1 > 0 else np.broadcast_to(value, count.shape)


@functools.lru_cache(maxsize=4096)
def expected_tv(K: int, n: int, d: int, d1: int) -> tuple[float, float]:
    """(single, multi): expectation of R_TV over training sets of n points, n_k ~ Binomial(n, 1/K).

    Raises ValueError for K < 1, n < 1, d < 1, or d1 outside [0, d].
    """
    if K < 1 or n < 1 or d < 1 or not 0 <= d1 <= d:
        raise ValueError(f"expected_tv needs K, n, d >= 1 and 0 <= d1 <= d, got K={K}, n={n}, d={d}, d1={d1}")
    single = _average_over_counts(lambda c: expected_tv_student(c, d), n, K)
    multi = _average_over_counts(lambda c: expected_tv_given_counts(c, n, d, d1), n, K) if d1 < d else single
    return single, multi


def _average_over_counts(function, n: int, K: int) -> float:
    """E function(n_k), n_k ~ Binomial(n, 1/K)."""
    if K == 1:
        return float(function(np.array([n]))[0])
    mean, sd = n / K, math.sqrt(n * (K - 1)) / K
    low, high = max(0, math.floor(mean - 12 * sd - 30)), min(n, math.ceil(mean + 12 * sd + 30))
    counts = np.arange(low, high + 1, dtype=np.float64)
    log_pmf = -gammaln(counts + 1) - gammaln(n - counts + 1) + counts * -math.log(K - 1)
    weights = np.exp(log_pmf - log_pmf.max())
    weights /= weights.sum()
    if len(counts) <= _MAX_WINDOW:
        return float(function(counts) @ weights)
    unit = np.cos(np.pi * (np.arange(65) + 0.5) / 65)  # the window is narrow: 65 Chebyshev nodes give all digits
    nodes = 0.5 * (low + high) + 0.5 * (high - low) * unit
    polynomial = np.polynomial.chebyshev.Chebyshev.fit(nodes, function(nodes), 32, domain=[low, high])
    return float(polynomial(counts) @ weights)
