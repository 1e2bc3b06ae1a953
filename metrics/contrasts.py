"""Declared contrasts: what an experiment tests, in a number per training seed, with p, Holm, and what it could have seen.

A contrast is about the gain of some score rows over others of the same source and seed, in a number that should be small.
The seeds are the sample: means over sources first, then Student's t over seeds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from dnnlib.experiment import read
from metrics.results import Row
from metrics.table import detectable, grouped, mean_interval, p_of_zero

PERMUTATIONS = 9999


@dataclass(frozen=True)
class Contrast:
    """The mean gain, or its slope per doubling of the tag `over`, or its rank correlation with how alike two sources are."""

    name: str
    of: dict  # tags of the rows; a list of values: any of these
    against: dict
    measure: str = "bits_per_dim"
    over: str | None = None
    rank: str | None = None  # the detector whose numbers <rank>_<source> are distances between sources
    section: str | None = None  # "overall" or "mean"; None: single sources


@dataclass
class Result:
    """What the seeds say of a contrast."""

    contrast: Contrast
    seeds: dict[str, float]
    effect: float
    error: float
    low: float
    high: float
    p: float
    detectable: float  # smallest true effect that would have been seen with probability POWER at p < 0.05
    holm: float = field(default=math.nan)

    @property
    def row(self) -> dict[str, object]:
        """A line of contrasts.csv."""
        numbers = {name: getattr(self, name) for name in ("effect", "error", "low", "high", "p", "holm", "detectable")}
        return {"contrast": self.contrast.name, **numbers, "seeds": len(self.seeds)}


def read_contrasts(path: str) -> list[Contrast]:
    """The `contrasts` of an experiment file. Raises ValueError."""
    known = {f.name for f in dataclasses.fields(Contrast)}
    found = []
    for index, entry in enumerate(read(path).get("contrasts") or []):
        where = f"{path}, contrast {index}"
        if not isinstance(entry, dict) or set(entry) - known or not {"name", "of", "against"} <= set(entry):
            raise ValueError(f"{where}: give name, of and against, and perhaps {', '.join(sorted(known))}")
        if not all(isinstance(entry[side], dict) for side in ("of", "against")):
            raise ValueError(f"{where}: of and against map tags to values")
        found.append(Contrast(**entry))
    if not found:
        raise ValueError(f"{path} declares no contrasts: add a list `contrasts` of name, of, against")
    return found


def chosen(rows: Sequence[Row], tags: dict, measure: str, section: str | None = None) -> list[Row]:
    """The rows of a section (None: of single sources) that have these tags (a list: any of its values) and the number."""
    allowed = {k: [str(v) for v in (values if isinstance(values, list) else [values])] for k, values in tags.items()}
    fits = lambda row: all(row.tags.get(k) in values for k, values in allowed.items())
    here = lambda row: of_one_source(row) if section is None else row.section == section
    return [row for row in rows if measure in row.numbers and here(row) and fits(row)]


def of_one_source(row: Row) -> bool:
    """Whether a row is about a source, and, of samples of one, about that one."""
    return row.section not in ("overall", "mean") and row.tags.get("source", row.section) == row.section


def gains(rows: Sequence[Row], contrast: Contrast) -> list[tuple[Row, float]]:
    """(row, how much smaller its number is than the mean of `against`) of the same source, seed, and value of `over`.

    Raises ValueError for a side without rows, or a row without its counterpart.
    """
    measure, over = contrast.measure, contrast.over
    free = over if over and over not in contrast.against else None
    key = lambda row: (row.tags["seed"], row.section, row.tags.get(free) if free else None)
    base = grouped(
        (key(row), row.numbers[measure]) for row in chosen(rows, contrast.against, measure, contrast.section)
    )
    found = []
    for row in chosen(rows, contrast.of, measure, contrast.section):
        if key(row) not in base:
            raise ValueError(f"contrast {contrast.name!r}: {row.file} (source {row.section}) has no counterpart")
        found.append((row, fmean(base[key(row)]) - row.numbers[measure]))
    if not found:
        raise ValueError(f"contrast {contrast.name!r}: no scores with {measure} have the tags {contrast.of}")
    return found


def examine(rows: Sequence[Row], contrast: Contrast) -> Result:
    """The effect, its 95 % interval (Student's t over seeds), p and what could have been detected. Raises ValueError."""
    if contrast.rank is None:
        cells = grouped(((row.tags["seed"], row.section), (row, gain)) for row, gain in gains(rows, contrast))
        value = _slope if contrast.over else lambda pairs, over: fmean(gain for _, gain in pairs)
        per_source = (((seed), value(pairs, contrast.over)) for (seed, _), pairs in cells.items())
        seeds, p = {seed: fmean(values) for seed, values in grouped(per_source).items()}, None
    else:
        seeds, p = _rank_correlation(rows, contrast)
    values = list(seeds.values())
    if len(values) < 2:
        raise ValueError(f"contrast {contrast.name!r}: scores of two training seeds or more are needed")
    effect, error, low, high = mean_interval(values)
    if p is None:
        p = p_of_zero(values)
    return Result(contrast, seeds, effect, error, low, high, p, detectable(error, len(values)))


def _slope(pairs, over):
    """Of the gain per doubling of the tag `over`."""
    x = np.log2([float(row.tags[over]) for row, _ in pairs])
    if np.ptp(x) == 0:
        raise ValueError(f"a slope over {over} needs scores of two values of it or more")
    return float(np.polyfit(x, [gain for _, gain in pairs], 1)[0])


def _rank_correlation(rows, contrast):
    """({seed: mean over targets of Spearman's correlation of gain and nearness}, p by permuting the sources, two-sided)."""
    found = gains(rows, contrast)
    members = grouped((row.file, row.section) for row, _ in found)
    names = sorted({row.section for row, _ in found}, key=lambda s: (len(s), s))
    seeds = sorted({row.tags["seed"] for row, _ in found})
    shape = (len(seeds), len(names), len(names))
    gain, near = np.full(shape, np.nan), np.full(shape, np.nan)
    for row, value in found:
        other = [s for s in members[row.file] if s != row.section]
        if len(other) != 1:
            raise ValueError(f"contrast {contrast.name!r}: {row.file} is not about a pair of sources")
        gain[seeds.index(row.tags["seed"]), names.index(row.section), names.index(other[0])] = value
    for row in rows:
        if row.detector == contrast.rank and row.tags["seed"] in seeds and row.section in names:
            for j, other in enumerate(names):
                distance = row.numbers.get(f"{contrast.rank}_{other}", np.nan)
                near[seeds.index(row.tags["seed"]), names.index(row.section), j] = -distance
    off = ~np.eye(len(names), dtype=bool)
    if np.isnan(gain[:, off]).any() or np.isnan(near[:, off]).any():
        raise ValueError(
            f"contrast {contrast.name!r}: not every pair of sources has a gain and a distance in every seed"
        )
    a, b = _unit_ranks(gain, off), _unit_ranks(near, off)
    per_seed = np.einsum("sij,sij->s", a, b) / len(names)
    generator, seen = np.random.default_rng(0), abs(per_seed.mean())
    hits = 0
    for _ in range(PERMUTATIONS):
        order = generator.permutation(len(names))
        hits += abs(np.einsum("sij,sij->", a, b[:, order][:, :, order]) / (len(seeds) * len(names))) >= seen - 1e-12
    return dict(zip(seeds, per_seed.tolist(), strict=True)), (1 + hits) / (1 + PERMUTATIONS)


def _unit_ranks(values, off):
    """Ranks of each row [..., i, :] without its diagonal, centred and of unit norm (zero where all are equal)."""
    import scipy.stats

    ranks = np.zeros_like(values)
    for index in np.ndindex(values.shape[:-1]):
        own = scipy.stats.rankdata(values[index][off[index[-1]]])
        own = own - own.mean()
        ranks[index][off[index[-1]]] = own / (np.linalg.norm(own) or 1)
    return ranks


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for all of them being tested (Holm 1979), in the order given."""
    order, found, highest = np.argsort(p), [0.0] * len(p), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        found[index] = highest
    return found


def examine_all(rows: Sequence[Row], contrasts: Sequence[Contrast]) -> list[Result]:
    """Results of all contrasts, Holm's adjustment over all of them."""
    results = [examine(rows, contrast) for contrast in contrasts]
    for result, adjusted in zip(results, holm([r.p for r in results]), strict=True):
        result.holm = adjusted
    return results
