"""Total-variation bounds of the multi-source theory paper with all their constants. Command: run_bounds.py.

Every bound has the form R_TV <= g(log N, n, delta) with probability >= 1 - delta, where N is the upper bracketing
number of the model class and R_TV the TV error averaged over the sources:

    published (Theorem 3.2)  g = 3 sqrt((log N + log(1/delta)) / n),      N at eps = 1/n
    sharp     (Eq. 12)       g = 1/2 sqrt(eps (eps + 4) + 2 (eps + 2) (eps + 2 q / n)),   q = log N + log(1/delta)

and log N = P * ell with a parameter count P (multi or single source) and a logarithm ell that both share.

`published` always uses ell as it is printed. `sharp` uses a corrected ell (corrected=False: as printed):

* Gaussian: the printed proof integrates a d-dimensional bracket as if d = 1. Repaired, the grid step
  eps / (1 + d) is fine enough only for eps below about 2 / d; above, the corrected form takes the largest step that is.
* ARM: the last line of the covering lemma drops a factor de inside the logarithm; the corrected form has it.
* EBM: one display loses a factor n and another misplaces a parenthesis; the consistent form is used for both.
* `positions` (optional): number of places for the S non-zero weights. The printed count fixes the sparsity pattern;
  with `positions` the corrected form adds log binomial(positions, S) per network.

All take K sources, n samples of all of them together, the failure probability delta in (0, 1/2], and optionally eps, the
bracket size of Eq. 12 (default 1/n); they raise ValueError for an argument out of range.

The printed beta_sim of the ARM has denominator S+D+(D+M+K)de+de; only S+D+(D+M)de+de satisfies the printed ratio
identity sqrt(1 - (K-1)/K beta_sim), and that is what `arm_bound` returns.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable
from numbers import Real


class _Record:
    """Attribute and item access: bound.multi.sharp == bound["multi"]["sharp"]."""

    def __getitem__(self, name: str):
        if not isinstance(name, str) or name.startswith("_") or not hasattr(self, name):
            raise KeyError(name)
        return getattr(self, name)


@dataclasses.dataclass(frozen=True)
class Side(_Record):
    """Bound of one model class (multi or single source)."""

    params: int  # P, the exponent of the bracketing number
    log_n: float  # log bracketing number behind `sharp`
    log_n_published: float  # log bracketing number behind `published`
    sharp: float  # Eq. 12
    published: float  # Theorem 3.2, constant 3
    order: float  # sqrt(P / n): what the paper plots; neither constant nor logarithm
    vacuous: bool  # sharp >= 1: says nothing, since TV <= 1
    vacuous_published: bool  # published >= 1


@dataclasses.dataclass(frozen=True)
class Bound(_Record):
    """Bounds of both model classes. Flat names such as `multi_sharp`, `single_published` exist as well."""

    model: str
    multi: Side
    single: Side
    n: float
    delta: float
    eps: float  # bracket size behind `sharp`
    ell: float  # the logarithm behind `sharp`
    ell_published: float
    beta_sim: float  # share of the parameters that is shared
    ratio: float  # sqrt(P_multi / P_single) = sqrt(1 - (K-1)/K beta_sim)
    ratio_sharp: float  # multi.sharp / single.sharp
    ratio_published: float  # multi.published / single.published

    @property
    def vacuous(self) -> dict[str, dict[str, bool]]:
        """{"multi": {"sharp": bool, "published": bool}, "single": ...}"""
        sides = {"multi": self.multi, "single": self.single}
        return {name: {"sharp": s.vacuous, "published": s.vacuous_published} for name, s in sides.items()}

    def __getattr__(self, name: str):
        side, _, field = name.partition("_")
        if side in ("multi", "single") and field in Side.__dataclass_fields__:
            return getattr(object.__getattribute__(self, side), field)
        raise AttributeError(f"Bound has no {name!r}; it has {', '.join(self.__dataclass_fields__)}")


def general_bound(
    log_n: float, n: float, delta: float, log_n_single: float | None = None, eps: float | None = None
) -> Bound:
    """Bounds from log bracketing numbers that you know.

    log_n is log N[](1/n; P_multi, L1) >= 0 (at `eps`, if given), log_n_single the same for P_single, by default equal.
    Returns params = order = ell = 0 and ratio = sqrt(log_n / log_n_single); beta_sim is 0, because one pair of numbers does
    not tell K.
    """
    log_n_single = log_n if log_n_single is None else log_n_single
    eps = _check(eps, n=n, delta=delta, log_n=log_n, log_n_single=log_n_single)
    sides = [(0, value, value) for value in (log_n, log_n_single)]
    ratio = math.sqrt(log_n / log_n_single) if log_n_single else 1.0
    return _bound("general", sides, n, delta, eps, (0.0, 0.0), 0.0, ratio)


def gaussian_bound(
    K: int, n: float, d: int, d1: int, B: float, delta: float, *, eps: float | None = None, corrected: bool = True
) -> Bound:
    """N(mu_k, I_d) with d1 source-specific and d - d1 shared mean entries in [-B, B] (Theorem 4.1, Lemma B.1).

    ell = log(2 (1 + d) B n + 1), P_multi = (K - 1) d1 + d, P_single = K d, beta_sim = (d - d1) / d.

    The box [-B, B] must hold every true mean entry.
    """
    eps = _check(eps, K=K, n=n, delta=delta, d=d, B=B)
    if d1 != int(d1) or not 0 <= d1 <= d:
        raise ValueError(f"d1={d1} must be a whole number within [0, d={d}]")
    step = eps / (1.0 + d)
    if corrected:
        step = min(step, _largest_gaussian_step(d, eps))
    ells = math.log1p(2.0 * B / step), math.log1p(2.0 * (1.0 + d) * B * n)
    return _family("gaussian", K, n, delta, eps, d - d1, d1, ells)


def arm_bound(
    K: int,
    n: float,
    D: int,
    M: int,
    de: int,
    L: int,
    W: int,
    S: int,
    B: float,
    delta: float,
    *,
    eps: float | None = None,
    corrected: bool = True,
    positions: int | None = None,
) -> Bound:
    """Autoregressive model on [M]^D (Theorem 4.3, Lemmas C.6 and C.7).

    ell = log(24 e D n (L + 3) max(B, 1)^(L + 2) (W + 1)^L), corrected: + log de.
    P_multi = S + D + (D + M + K) de, P_single = K (S + D + (D + M + 1) de).

    D, M, de: sequence length, vocabulary, embedding width; L, W, S, B: affine layers of the MLP, its largest width
    (>= D and M), non-zero parameters and largest absolute parameter.
    """
    eps = _check(eps, K=K, n=n, delta=delta, D=D, M=M, de=de, L=L, W=W, S=S, B=B)
    if max(D, M) > W:
        raise ValueError(f"W={W} must be >= max(D={D}, M={M}): width includes the input and the output")
    base = math.log(24.0 * math.e * D * (L + 3)) + (L + 2) * math.log(max(B, 1.0)) + L * math.log(W + 1.0)
    ell = base - math.log(eps) + (math.log(de) if corrected else 0.0)
    shared = S + D + (D + M) * de
    extra = _patterns(positions, S) if corrected else 0.0
    return _family("arm", K, n, delta, eps, shared, de, (ell, base + math.log(n)), extra)


def ebm_bound(
    K: int,
    n: float,
    de: int,
    L: int,
    W: int,
    S: int,
    B: float,
    delta: float,
    *,
    D: int | None = None,
    eps: float | None = None,
    corrected: bool = True,
    positions: int | None = None,
) -> Bound:
    """Energy-based model on [0, 1]^D (Theorem 4.4, Lemmas D.1 and D.2).

    ell = log(12 e n (L + 1) max(B, 1)^(L + 1) (W + 1)^L), P_multi = S + K de, P_single = K (S + de).

    de: width of the source embedding; L, W, S, B: affine layers of the MLP, its largest width, non-zero parameters and
    largest absolute parameter. The data dimension D is only used to check W >= D + de.
    """
    eps = _check(eps, K=K, n=n, delta=delta, de=de, L=L, W=W, S=S, B=B)
    if D is not None and D + de > W:
        raise ValueError(f"W={W} must be >= D + de = {D + de}: width includes the input")
    base = math.log(12.0 * math.e * (L + 1)) + (L + 1) * math.log(max(B, 1.0)) + L * math.log(W + 1.0)
    extra = _patterns(positions, S) if corrected else 0.0
    return _family("ebm", K, n, delta, eps, S, de, (base - math.log(eps), base + math.log(n)), extra)


FAMILIES: dict[str, Callable[..., Bound]] = {
    "general": general_bound,
    "gaussian": gaussian_bound,
    "arm": arm_bound,
    "ebm": ebm_bound,
}


def solve_n(target: float, value: Callable[[int], float], largest: int = 10**18) -> int:
    """Smallest n with value(n) <= target, for a `value` that falls with n (all bounds here do).

    Raises:
        ValueError: target <= 0, or not reached at `largest`.
    """
    if not target > 0:
        raise ValueError(f"target-tv={target} must be > 0")
    found = 1 + bisect.bisect_left(range(1, largest), True, key=lambda n: value(n) <= target)
    if value(found) > target:
        raise ValueError(f"target-tv={target} is not reached below n={largest:.0e}; raise the target")
    return found


def _largest_gaussian_step(d: int, eps: float) -> float:
    """Largest grid step eta whose bracket gap (1 - eta)^(-d/2) exp(d (1 - eta) eta / 2) - 1 is <= eps."""
    target, low, high = math.log1p(eps), 0.0, 1.0 - 1e-12
    for _ in range(200):
        middle = 0.5 * (low + high)
        log_gap = -0.5 * d * math.log1p(-middle) + 0.5 * d * (1.0 - middle) * middle
        low, high = (middle, high) if log_gap <= target else (low, middle)
    return low


def _patterns(positions: int | None, S: int) -> float:
    if positions is None:
        return 0.0
    if positions < S:
        raise ValueError(f"positions={positions} must be >= S={S}")
    return math.lgamma(positions + 1) - math.lgamma(S + 1) - math.lgamma(positions - S + 1)


def _family(model, K, n, delta, eps, shared, own, ells, extra=0.0) -> Bound:
    """shared, own: parameters of all sources and of each; ells: of sharp and published; extra: nats per network."""
    sizes = (1, shared + K * own), (K, K * (shared + own))  # networks and parameters of multi and single
    sides = [(params, params * ells[0] + count * extra, params * ells[1]) for count, params in sizes]
    beta_sim = shared / (shared + own)
    return _bound(model, sides, n, delta, eps, ells, beta_sim, math.sqrt(1.0 - (K - 1) / K * beta_sim))


def _bound(model, sides, n, delta, eps, ells, beta_sim, ratio) -> Bound:
    """sides: (params, log_n, log_n_published) of multi and single."""
    multi, single = (_side(*side, n, delta, eps) for side in sides)
    ratios = ratio, multi.sharp / single.sharp, multi.published / single.published
    return Bound(model, multi, single, n, delta, eps, *ells, beta_sim, *ratios)


def _side(params: int, log_n: float, log_n_published: float, n: float, delta: float, eps: float) -> Side:
    q, q_published = (value + math.log(1.0 / delta) for value in (log_n, log_n_published))
    sharp = 0.5 * math.sqrt((eps + 4.0) * eps + 2.0 * (eps + 2.0) * (eps + 2.0 * q / n))
    published = 3.0 * math.sqrt(q_published / n)
    return Side(params, log_n, log_n_published, sharp, published, math.sqrt(params / n), sharp >= 1.0, published >= 1.0)


def _check(eps: float | None, **values: float) -> float:
    """The bracket size, by default 1/n. Raises ValueError for an argument out of range."""
    for name, value in (values if eps is None else values | {"eps": eps}).items():
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{name}={value} must be a finite number")
        ranges = {
            "delta": (0.0 < value <= 0.5, "lie within (0, 0.5]"),
            "eps": (0.0 < value <= 1.0, "lie within (0, 1]"),
            "B": (value > 0, "be > 0"),
            **dict.fromkeys(("log_n", "log_n_single"), (value >= 0, "be a finite number >= 0")),
        }
        holds, rule = ranges.get(name, (value >= 1 and value == int(value), "be a whole number >= 1"))
        if not holds:
            raise ValueError(f"{name}={value} must {rule}")
    return 1.0 / values["n"] if eps is None else eps
