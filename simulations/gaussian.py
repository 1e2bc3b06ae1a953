"""Conditional Gaussian estimation on many sources (multi-source theory paper, Sec. 4.1, App. E.1, Figure 1).

`sweep` computes a whole sweep, vectorised, with the random draws of the published simulation in the published order;
`simulate` computes one training set. Command: run_gaussian.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from metrics.table import mean_and_error
from simulations.bounds import gaussian_bound
from simulations.configs import GaussianConfig
from simulations.gaussian_exact import expected_tv, tv_unit_gaussians

PAPER_SEEDS = (3, 33, 520, 2025, 25731)
PAPER_SWEEPS = {"K": (1, 3, 5, 10, 15), "n": (100, 300, 500, 1000, 5000), "sim": (0.0, 0.3, 0.5, 0.7, 1.0)}
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
    mean = np.zeros([K, D])
    mean[:, :d1] = np.arange(1, K + 1)[:, None]
    buffer = _buffer(D, max(n, config.test_size), block_elements)

    # Fit.
    counts = _counts(probs, n, generator)
    sums = np.zeros([K, D])
    for x, sources, starts, _ in _blocks(counts, D, d1, buffer, generator):
        sums[sources] += np.add.reduceat(x, starts, axis=0, dtype=np.float64)  # [len(sources), D]
    seen = counts > 0
    single = sums / np.maximum(counts, 1)[:, None] - mean  # [K, D], error of the estimated means
    multi = single.copy()
    multi[:, d1:] = sums[:, d1:].sum(axis=0) / n  # the shared true mean is zero
    known_multi = seen if d1 > 0 else np.ones_like(seen)

    # Exact error of the fit.
    errors = np.stack([single, multi])  # [2, K, D]
    known = np.stack([seen, known_multi])  # [2, K]
    square = np.einsum("akd,akd->ak", errors, errors)
    tv = np.where(known, tv_unit_gaussians(np.sqrt(square)), 1.0).mean(axis=1)

    # The published estimate of it.
    test_counts = _counts(probs, config.test_size, generator)
    total = np.zeros(2)
    for x, _, _, label in _blocks(test_counts, D, d1, buffer, generator):
        z = x - mean[label]  # [r, D] float64
        for side in range(2):
            log_ratio = np.einsum("rd,rd->r", z, errors[side, label]) - 0.5 * square[side, label]
            total[side] += np.where(known[side, label], 0.5 * np.abs(np.expm1(log_ratio)), 1.0).sum()
    empirical = total / config.test_size
    return Outcome(
        *(float(v) for v in empirical), *(float(v) for v in tv), int(K - seen.sum()), int(K - known_multi.sum())
    )


def _counts(probs: torch.Tensor, size: int, generator: torch.Generator) -> np.ndarray:
    labels = torch.multinomial(probs, size, replacement=True, generator=generator)
    return np.bincount(labels.numpy(), minlength=len(probs))


def _buffer(D: int, rows: int, block_elements: int) -> torch.Tensor:
    # A multiple of 16 rows, because torch fills normals in blocks of 16; 16 rows more for a remainder below one block.
    limit = max(16, block_elements // D // 16 * 16)
    return torch.empty([min(rows, limit) + 16, D])


def _blocks(
    counts: np.ndarray, D: int, d1: int, buffer: torch.Tensor, generator: torch.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (x [r, D] float32, sources [s], first row of each source [s], source of each row [r]), sources ascending.

    A source is drawn in one call of shape (count, D) if it fits into the buffer, else in pieces of a multiple of 16
    numbers with at least 16 in the last: torch then returns the same numbers as in one call.
    """
    view, rows = buffer.numpy(), len(buffer) - 16
    pieces: list[tuple[int, int]] = []  # (source, rows)
    used = 0

    def block():
        sources = np.array([k for k, _ in pieces])
        lengths = np.array([length for _, length in pieces])
        label = np.repeat(sources, lengths)
        view[:used, :d1] += (label + 1).astype(np.float32)[:, None]
        return view[:used], sources, np.cumsum(lengths) - lengths, label

    for k, count in enumerate(counts.tolist()):
        left = count
        while left:
            if used and used + left > rows:
                yield block()
                pieces, used = [], 0
            piece = left if left <= rows else rows // 16 * 16
            if 0 < (left - piece) * D < 16:
                piece = left
            buffer[used : used + piece].normal_(generator=generator)
            pieces.append((k, piece))
            used += piece
            left -= piece
    if used:
        yield block()


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

    Raises:
        ValueError: unknown tag, no values, or a value out of range.
    """
    if tag not in PAPER_SWEEPS:
        raise ValueError(f"tag={tag!r} is unknown; use one of {', '.join(PAPER_SWEEPS)}")
    values = PAPER_SWEEPS[tag] if values is None else values
    if not len(values):
        raise ValueError(f"the sweep over {tag} has no values")
    return tuple(dataclasses.replace(GaussianConfig(**fixed), **{tag: v}) for v in values)


def sweep(
    tag: str,
    values: Sequence[float] | None = None,
    seeds: Sequence[int] = PAPER_SEEDS,
    progress: Callable[[list], Iterable] = iter,
    **fixed: float,
) -> Sweep:
    """Run a whole sweep: every value with every seed (each run re-seeds, so noise is common across `sim`).

    Args:
        tag:       what varies: "K", "n" or "sim".
        values:    its values (default: the published five).
        seeds:     seeds, each one training and test set.
        progress:  wraps the list of runs, e.g. tqdm.
        fixed:     K, n, D, sim, test_size: what does not vary.

    Raises:
        ValueError: unknown tag, no values or seeds, or a value out of range.
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
            order = orders(config)
            row = _head(result.tag, config, seed) | _published(order, (o.empirical_single, o.empirical_multi))
            row |= {
                "exact TV of single": o.tv_single,
                "exact TV of multi": o.tv_multi,
                "sources without estimate (single)": o.empty_single,
                "sources without estimate (multi)": o.empty_multi,
                "test size": config.test_size,
            }
            rows.append(row)
    return rows


def summary_rows(result: Sweep, delta: float = 0.05, B: float | None = None) -> list[dict[str, object]]:
    """One row per value: the published columns in the published order, then standard errors and exact columns.

    Args:
        result: a sweep.
        delta:  the bounds hold with probability >= 1 - delta.
        B:      box [-B, B] that holds every true mean entry; default K, the smallest (the means are 1..K).

    Raises:
        ValueError: B < K, or delta outside (0, 1/2].
    """
    rows = []
    for config, outcomes in zip(result.configs, result.outcomes, strict=True):
        if B is not None and config.d1 and B < config.K:
            raise ValueError(
                f"B={B} must be >= K={config.K}, since the source means are 1..K; raise --B or leave it out"
            )
        bound = gaussian_bound(config.K, config.n, config.D, config.d1, config.K if B is None else B, delta)
        expected = expected_tv(config.K, config.n, config.D, config.d1)
        measured, exact = (_moments(outcomes, kind) for kind in ("empirical", "tv"))
        seed = sum(result.seeds) / len(result.seeds)
        row = _head(result.tag, config, seed, floats=True)
        row |= _published(orders(config), (measured["single"][0], measured["multi"][0]))
        sides = {"single": bound.single, "multi": bound.multi}
        row |= {
            "standard error of empirical single": measured["single"][1],
            "standard error of empirical multi": measured["multi"][1],
            "standard error of advantage": measured["advantage"][1],
            "exact TV of single": exact["single"][0],
            "exact TV of multi": exact["multi"][0],
            "standard error of exact single": exact["single"][1],
            "standard error of exact multi": exact["multi"][1],
            "exact advantage (abs)": exact["advantage"][0],
            "standard error of exact advantage": exact["advantage"][1],
            "expected TV of single": expected[0],
            "expected TV of multi": expected[1],
            **{f"sharp bound of {name}": side.sharp for name, side in sides.items()},
            **{f"published bound of {name}": side.published for name, side in sides.items()},
            **{f"sharp bound of {name} vacuous": int(side.vacuous) for name, side in sides.items()},
            **{f"published bound of {name} vacuous": int(side.vacuous_published) for name, side in sides.items()},
            "beta_sim": bound.beta_sim,
            "ratio": bound.ratio,
            "runs": len(outcomes),
            "runs with a source without data": sum(o.empty_single > 0 for o in outcomes),
            "sources without estimate (single)": sum(o.empty_single for o in outcomes),
            "sources without estimate (multi)": sum(o.empty_multi for o in outcomes),
            "test size": config.test_size,
        }
        rows.append(row)
    return rows


def _moments(outcomes: Sequence[Outcome], kind: str) -> dict[str, tuple[float, float]]:
    """Mean and standard error of both estimators' errors and of their difference."""
    pairs = [(getattr(o, f"{kind}_single"), getattr(o, f"{kind}_multi")) for o in outcomes]
    single, multi = zip(*pairs, strict=True)
    found = {"single": single, "multi": multi, "advantage": [s - m for s, m in pairs]}
    return {name: mean_and_error(values) for name, values in found.items()}


def _head(tag: str, config: GaussianConfig, seed: float, floats: bool = False) -> dict[str, object]:
    """The swept variable first, then seed and the rest of K, D, sim, n."""
    rest = {name: getattr(config, name) for name in ("K", "D", "sim", "n") if name != tag}
    return {tag: getattr(config, tag), "seed": seed} | {k: float(v) if floats else v for k, v in rest.items()}


def _published(order: tuple[float, float], empirical: tuple[float, float]) -> dict[str, object]:
    return {
        "theoretical TV bound of single": order[0],
        "theoretical TV bound of multi": order[1],
        "theoretical advantage (abs)": order[0] - order[1],
        "empirical TV of single": empirical[0],
        "empirical TV of multi": empirical[1],
        "advantage (abs)": empirical[0] - empirical[1],
    }
