"""Conditional Gaussian estimation on many sources (multi-source theory paper, Sec. 4.1, App. E.1, Figure 1).

`sweep` computes a whole sweep, vectorised, with the random draws of the published simulation in the published order;
`simulate` computes one training set. Command: run_gaussian.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from dnnlib.util import one_of
from simulations.bounds import gaussian_bound
from simulations.configs import GaussianConfig
from simulations.gaussian_exact import expected_tv, tv_unit_gaussians
from simulations.sweeps import SIDES, head, moments

PAPER_SEEDS = (3, 33, 520, 2025, 25731)
PAPER_SWEEPS = {"K": (1, 3, 5, 10, 15), "n": (100, 300, 500, 1000, 5000), "sim": (0.0, 0.3, 0.5, 0.7, 1.0)}
FIELDS = ("K", "D", "sim", "n")  # published columns after the swept value and the seed
_BLOCK_ELEMENTS = 1 << 22  # random numbers held at once (16 MiB)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Errors of both estimators on one training set."""

    empirical_single: float  # 1/2 mean |p_hat / p - 1| over the test pairs, as published
    empirical_multi: float
    tv_single: float  # exact R_TV of the fitted means
    tv_multi: float
    empty_single: int  # sources without an estimate; each counts as TV = 1
    empty_multi: int


def simulate(config: GaussianConfig, seed: int, block_elements: int = _BLOCK_ELEMENTS) -> Outcome:
    """Draw one training set, fit both estimators, and measure their average TV error.

    The draws equal the published simulation's: training labels, standard normals source by source, test labels,
    standard normals source by source, all from torch's CPU generator. At most about `block_elements` normals are held
    in memory, so n = 1e6 at D = 1000 works; the block size does not change the draws. All arithmetic after the float32
    draws is float64 and uses log-density ratios, so no dimension overflows.
    """
    K, n, D, d1 = config.K, config.n, config.D, config.d1
    generator = torch.Generator().manual_seed(seed)
    probs = torch.full([K], 1.0 / K)

    def draw(size):
        labels = torch.multinomial(probs, size, replacement=True, generator=generator)
        counts = np.bincount(labels.numpy(), minlength=K)
        return counts, _draw_sources(counts, D, d1, block_elements, generator)

    # Fit.
    counts, parts = draw(n)
    mean, sums = np.zeros([K, D]), np.zeros([K, D])
    mean[:, :d1] = np.arange(1, K + 1)[:, None]
    for k, x in parts:
        sums[k] += x.sum(axis=0, dtype=np.float64)
    seen = counts > 0
    single = sums / np.maximum(counts, 1)[:, None] - mean  # [K, D], error of the estimated means
    multi = single.copy()
    multi[:, d1:] = sums[:, d1:].sum(axis=0) / n  # the shared true mean is zero

    # Exact error of the fit.
    errors = np.stack([single, multi])  # [2, K, D]
    known = np.stack([seen, seen if d1 > 0 else np.ones_like(seen)])  # [2, K]
    square = np.einsum("akd,akd->ak", errors, errors)
    tv = np.where(known, tv_unit_gaussians(np.sqrt(square)), 1.0).mean(axis=1)

    # The published estimate of it.
    found = []
    for k, x in draw(config.test_size)[1]:
        log_ratio = np.einsum("rd,ad->ar", x - mean[k], errors[:, k]) - 0.5 * square[:, k, None]
        found.append(np.where(known[:, k, None], 0.5 * np.abs(np.expm1(log_ratio)), 1.0))  # [2, r]
    empirical = np.concatenate(found, axis=1).sum(axis=1) / config.test_size
    return Outcome(*empirical.tolist(), *tv.tolist(), *(~known).sum(axis=1).tolist())


def _draw_sources(
    counts: np.ndarray, D: int, d1: int, block_elements: int, generator: torch.Generator
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (source, its points or a part of them, [r, D] float32), sources ascending.

    A source is drawn in one call of shape (count, D) if that is at most `block_elements`, else in pieces of a multiple of
    16 numbers with at least 16 in the last: torch, which fills normals in blocks of 16, then returns the same numbers.
    """
    rows = max(16, block_elements // D // 16 * 16)
    for k, left in enumerate(counts.tolist()):
        while left:
            piece = left if left <= rows or (left - rows) * D < 16 else rows
            x = torch.randn([piece, D], generator=generator).numpy()
            x[:, :d1] += np.float32(k + 1)
            yield k, x
            left -= piece


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Outcomes of a sweep: `outcomes[v][s]` for value v and seed s."""

    tag: str
    configs: tuple[GaussianConfig, ...]
    seeds: tuple[int, ...]
    outcomes: tuple[tuple[Outcome, ...], ...]

    def array(self, name: str) -> np.ndarray:
        """One field of `Outcome` as an array [values, seeds]."""
        return np.array([[getattr(o, name) for o in row] for row in self.outcomes])


def sweep_configs(tag: str, values: Sequence[float] | None = None, **fixed: float) -> tuple[GaussianConfig, ...]:
    """The cells of the sweep over `tag` ("K", "n" or "sim"); `values` default to the published ones.

    Raises ValueError for an unknown tag, no values, or a value out of range.
    """
    if tag not in PAPER_SWEEPS:
        raise ValueError(f"tag={tag!r} {one_of(tag, PAPER_SWEEPS)}")
    values = PAPER_SWEEPS[tag] if values is None else values
    if not len(values):
        raise ValueError(f"the sweep over {tag} has no values")
    return tuple(dataclasses.replace(GaussianConfig(**fixed), **{tag: v}) for v in values)


def sweep(
    tag: str,  # what varies: "K", "n" or "sim"
    values: Sequence[float] | None = None,  # default: the published five
    seeds: Sequence[int] = PAPER_SEEDS,  # each one training and test set
    progress: Callable[[list], Iterable] = iter,  # wraps the list of runs, e.g. tqdm
    **fixed: float,  # K, n, D, sim, test_size: what does not vary
) -> Sweep:
    """Run a whole sweep: every value with every seed (each run re-seeds, so noise is common across `sim`).

    Raises ValueError for an unknown tag, no values or seeds, or a value out of range.
    """
    configs = sweep_configs(tag, values, **fixed)
    if not len(seeds):
        raise ValueError("seeds is empty; give at least one")
    runs = progress([(config, seed) for config in configs for seed in seeds])
    flat = [simulate(config, seed) for config, seed in runs]
    outcomes = tuple(tuple(flat[i : i + len(seeds)]) for i in range(0, len(flat), len(seeds)))
    return Sweep(tag, configs, tuple(seeds), outcomes)


def orders(config: GaussianConfig) -> tuple[float, float]:
    """(single, multi) sqrt(P/n): what the paper plots as theoretical bound; no constant, no logarithm."""
    return (config.K * config.D / config.n) ** 0.5, (((config.K - 1) * config.d1 + config.D) / config.n) ** 0.5


def seed_rows(result: Sweep) -> list[dict[str, object]]:
    """One row per value and seed."""
    rows = []
    for config, outcomes in zip(result.configs, result.outcomes, strict=True):
        for seed, o in zip(result.seeds, outcomes, strict=True):
            row = head(result.tag, config, seed, FIELDS) | _published(config, o.empirical_single, o.empirical_multi)
            row |= {f"exact TV of {side}": getattr(o, f"tv_{side}") for side in SIDES}
            rows.append(row | _empty([o]) | {"test size": config.test_size})
    return rows


def summary_rows(result: Sweep, delta: float = 0.05, B: float | None = None) -> list[dict[str, object]]:
    """One row per value: the published columns in the published order, then standard errors and exact columns.

    delta: the bounds hold with probability >= 1 - delta. B: box [-B, B] that holds every true mean entry; default K, the
    smallest (the means are 1..K). Raises ValueError for B < K, or delta outside (0, 1/2].
    """
    rows = []
    for config, outcomes in zip(result.configs, result.outcomes, strict=True):
        if B is not None and config.d1 and B < config.K:
            raise ValueError(
                f"B={B} must be >= K={config.K}, since the source means are 1..K; raise --B or leave it out"
            )
        bound = gaussian_bound(config.K, config.n, config.D, config.d1, config.K if B is None else B, delta)
        expected = expected_tv(config.K, config.n, config.D, config.d1)
        measured, exact = (moments(outcomes, field) for field in ("empirical_{}", "tv_{}"))
        seed = sum(result.seeds) / len(result.seeds)
        row = {k: v if k == result.tag else float(v) for k, v in head(result.tag, config, seed, FIELDS).items()}
        row |= _published(config, *(measured[side][0] for side in SIDES))
        row |= {
            **{f"standard error of empirical {side}": measured[side][1] for side in SIDES},
            "standard error of advantage": measured["advantage"][1],
            **{f"exact TV of {side}": exact[side][0] for side in SIDES},
            **{f"standard error of exact {side}": exact[side][1] for side in SIDES},
            "exact advantage (abs)": exact["advantage"][0],
            "standard error of exact advantage": exact["advantage"][1],
            **{f"expected TV of {side}": value for side, value in zip(SIDES, expected, strict=True)},
            **{f"sharp bound of {side}": bound[side].sharp for side in SIDES},
            **{f"published bound of {side}": bound[side].published for side in SIDES},
            **{f"sharp bound of {side} vacuous": int(bound[side].vacuous) for side in SIDES},
            **{f"published bound of {side} vacuous": int(bound[side].vacuous_published) for side in SIDES},
            "beta_sim": bound.beta_sim,
            "ratio": bound.ratio,
            "runs": len(outcomes),
            "runs with a source without data": sum(o.empty_single > 0 for o in outcomes),
            **_empty(outcomes),
            "test size": config.test_size,
        }
        rows.append(row)
    return rows


def _empty(outcomes: Sequence[Outcome]) -> dict[str, int]:
    return {f"sources without estimate ({side})": sum(getattr(o, f"empty_{side}") for o in outcomes) for side in SIDES}


def _published(config: GaussianConfig, single: float, multi: float) -> dict[str, object]:
    order = orders(config)
    return {
        "theoretical TV bound of single": order[0],
        "theoretical TV bound of multi": order[1],
        "theoretical advantage (abs)": order[0] - order[1],
        "empirical TV of single": single,
        "empirical TV of multi": multi,
        "advantage (abs)": single - multi,
    }
