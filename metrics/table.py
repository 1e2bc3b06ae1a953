"""Tables of results: means with errors, differences with intervals, and the one reader and writer of CSV and Markdown."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from dnnlib.util import write_text
from metrics.results import Row, require_comparable


def write_csv(path: str | Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write rows (all with the keys of the first) as CSV, floats with all their digits.

    Raises ValueError where a value is NaN or infinite, or there is no row.
    """
    if not rows:
        raise ValueError(f"no rows to write to {path}")
    for key, value in itertools.chain.from_iterable(row.items() for row in rows):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"column {key!r} of {path} is {value}; refusing to write it")
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: int(v) if isinstance(v, bool) else v for k, v in row.items()} for row in rows)
    return write_text(path, buffer.getvalue())


def read_csv(path: str | Path) -> list[dict[str, object]]:
    """Read a CSV file; cells that are numbers become int or float. Raises ValueError for no file and for no rows."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; run the run_*.py script first, or pass --results-dir")
    with open(path, newline="", encoding="utf-8") as file:
        rows = [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]
    if not rows:
        raise ValueError(f"{path} holds no rows; run the run_*.py script again")
    return rows


def _number(text: str) -> object:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def markdown(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, without a newline at its end."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _mean_and_variance(values: Iterable[float]) -> tuple[float, float, int]:
    values = [float(v) for v in values]
    mean, n = fmean(values), len(values)
    return mean, math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else math.nan, n


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1); NaN deviation for a single value."""
    mean, variance, _ = _mean_and_variance(values)
    return mean, math.sqrt(variance)


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for a single value)."""
    mean, variance, n = _mean_and_variance(values)
    return mean, math.sqrt(variance / n) if n > 1 else 0.0


def mean_interval(values: Iterable[float]) -> tuple[float, float, float, float]:
    """Mean, its standard error, and the ends of its 95 % interval (Student's t); a single value has no error: NaN."""
    import scipy.stats

    mean, variance, n = _mean_and_variance(values)
    if n < 2:
        return mean, math.nan, math.nan, math.nan
    error = math.sqrt(variance / n)
    half = float(scipy.stats.t.ppf(0.975, n - 1)) * error
    return mean, error, mean - half, mean + half


def paired_difference(a: Iterable[float], b: Iterable[float]) -> tuple[float, float, float, float]:
    """`mean_interval` of a - b over pairs. Raises ValueError for sequences of different lengths."""
    return mean_interval(x - y for x, y in zip(a, b, strict=True))


POWER = 0.8  # of the smallest effect that is called detectable


def detectable(error: float, count: int, level: float = 0.05, power: float = POWER) -> float:
    """The true mean that a two-sided t-test over `count` values of this standard error finds with probability `power`."""
    import scipy.optimize
    import scipy.stats

    df = count - 1
    critical = scipy.stats.t.ppf(1 - level / 2, df)
    # The other tail is nothing where this one is not.
    excess = lambda shift: scipy.stats.nct.sf(critical, df, shift) - power
    return float(scipy.optimize.brentq(excess, 0, 1.6 * critical + 2)) * error


def p_of_zero(values: Sequence[float]) -> float:
    """Two-sided p of the mean being zero (Student's t); values without spread give 0, or 1 if they are zero."""
    import scipy.stats

    return float(scipy.stats.ttest_1samp(values, 0).pvalue) if len(set(values)) > 1 else float(values[0] == 0)


def half_width(values: Iterable[float], errors: Sequence[float] = ()) -> float | None:
    """Half of the 95 % interval of a mean over training seeds (Student's t); None where there is none.

    errors: of a single training seed, the standard errors over images (`<name>_se` of score files) of the means that the
    value is a mean of; 1.96 times their error stands in for what only more seeds could show.
    """
    values = list(values)
    if len(values) > 1:
        mean, _, low, _ = mean_interval(values)
        return mean - low
    return 1.96 * math.hypot(*errors) / len(errors) if values and errors else None


def grouped(pairs: Iterable[tuple[object, object]]) -> dict[object, list]:
    """{key: its values} of pairs (key, value), both in order of appearance."""
    groups = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


@dataclass
class Cell:
    """One number of one arm in one section: its values by (training seed, sampling seed)."""

    values: dict[tuple[str, str], float] = field(default_factory=dict)

    def by_seed(self) -> dict[str, float]:
        """Means over sampling seeds, one per training seed, in order of the seeds."""
        seeds = grouped((seed, value) for (seed, _), value in self.values.items())
        return {seed: fmean(v) for seed, v in sorted(seeds.items())}

    def by_sampling(self) -> dict[str, float]:
        """The values of the only training seed, one per sampling seed; empty where there are several."""
        return {q: value for (_, q), value in sorted(self.values.items())} if len(self.by_seed()) == 1 else {}

    @property
    def mean(self) -> float:
        """Over training seeds."""
        return fmean(self.by_seed().values())

    @property
    def sd_training(self) -> float | None:
        """Spread over training seeds; None for one seed."""
        means = self.by_seed().values()
        return mean_and_deviation(means)[1] if len(means) > 1 else None

    @property
    def sd_sampling(self) -> float | None:
        """Spread over sampling seeds within training seeds (pooled); None for one sampling seed."""
        groups = grouped((seed, value) for (seed, _), value in self.values.items())
        variances = [mean_and_deviation(v)[1] ** 2 for v in groups.values() if len(v) > 1]
        return math.sqrt(fmean(variances)) if variances else None


Cells = dict[tuple[str, str, str], Cell]  # by arm, section, name of the number


def collect(rows: Iterable[Row]) -> Cells:
    """The Cells of rows of one detector (`results.of_detector`).

    Raises ValueError where two score files bring the same number: one would hide the other; where an arm lacks a section
    for some of its seeds; and where sections were not compared with the same images (`results.require_comparable`).
    """
    rows, cells, files = list(rows), defaultdict(Cell), {}
    require_comparable(rows)
    _require_complete(rows)
    for row in rows:
        arm, seed, sampling = row.tags["arm"], row.tags["seed"], row.tags["sampling"]
        for name, value in row.numbers.items():
            values = cells[arm, row.section, name].values
            if (seed, sampling) in values:
                where = f"arm {arm}, {row.section}, seed {seed}, sampling {sampling}"
                other = files[arm, row.section, name, seed, sampling]
                raise ValueError(
                    f"{row.file}: another score file has {name} of {where}: {other}; tell them apart with --tag"
                )
            values[seed, sampling], files[arm, row.section, name, seed, sampling] = value, row.file
    return cells


def _require_complete(rows):
    """Every section of an arm has every (seed, sampling) that the arm has; the ValueError names what is missing."""
    present = grouped(((r.detector, r.tags["arm"]), (r.section, r.tags["seed"], r.tags["sampling"])) for r in rows)
    for (detector, arm), found in present.items():
        sections, draws = {section for section, *_ in found}, {tuple(draw) for _, *draw in found}
        whole = {(section, *draw) for section, draw in itertools.product(sections, draws)}
        if missing := sorted(whole - set(found)):
            shown = "; ".join(f"source {s}, seed {seed}, sampling {q}" for s, seed, q in missing[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise ValueError(f"arm {arm} lacks scores ({detector}) of {shown}{more}: score them, or leave out the rest")


def numbers(cells: Cells, arm: str, source: str, name: str, sources: Sequence[str]) -> list[float | None]:
    """Mean, spread over training seeds and spread over sampling seeds; of "mean": their means over the sources."""
    found = [cells[arm, s, name] for s in (sources if source == "mean" else [source]) if (arm, s, name) in cells]
    parts = ("mean", "sd_training", "sd_sampling")
    known = ([v for cell in found if (v := getattr(cell, part)) is not None] for part in parts)
    return [fmean(values) if values else None for values in known]


def half_width_of(
    cells: Cells, arm: str, source: str, name: str, sources: Sequence[str], images: bool = True
) -> float | None:
    """`half_width` of what `numbers` gives the mean of: of one source, or of "mean" over the sources.

    images: of a single training seed, over images alone, where that is known; False: None, as figures have it.
    """
    chosen = [s for s in (sources if source == "mean" else [source]) if (arm, s, name) in cells]
    found, errors = ([cells[arm, s, n] for s in chosen if (arm, s, n) in cells] for n in (name, f"{name}_se"))
    seeds = seeds_mean(found, [1] * len(found)).values() if found else ()
    return half_width(seeds, [cell.mean for cell in errors] if images and len(errors) == len(found) else ())


@dataclass
class Verdict:
    """Relative advantage of arm `better` over arm `other` in one number that should be small."""

    better: str
    other: str
    wins: int  # sources in which `better` has the smaller mean
    advantage: float  # mean over sources of (other - better) / other
    standard_error: float | None  # of the differences between the arms' equal training seeds; None with a single one
    interval: tuple[float, float] | None  # 95 %, Student's t
    per_source: dict[str, float]
    levels: dict[str, float]  # arm -> mean over sources
    over: str = "training"  # seeds that the interval is over
    detectable: float | None = None  # the smallest advantage that so many pairs find four times in five

    def __str__(self) -> str:
        wins = f"{self.better} better than {self.other} in {self.wins} of {len(self.per_source)} sources"
        line = f"{wins}, mean advantage {self.advantage:.1%}"
        if self.interval is None:
            return f"{line} (one training seed per arm: no uncertainty known)"
        low, high = self.interval
        clear = "clear of zero" if low > 0 or high < 0 else "zero is inside"
        if clear == "zero is inside" and self.detectable:
            clear += f"; {self.detectable:.1%} would have been seen four times in five"
        only = "" if self.over == "training" else " over sampling seeds alone, of one training per arm"
        return f"{line} +- {self.standard_error:.1%} (95 % interval{only} {low:.1%} to {high:.1%}: {clear})"


def verdict(
    cells: Cells, sources: Sequence[str], better: str = "multi", other: str = "single", column: str = "fd"
) -> Verdict:
    """Compare two arms over the sources, with the uncertainty that the training seeds show.

    One model of the shared arm serves all sources, so the seeds of both arms are averaged over sources first; the arms are
    then paired by training seed, which stands for the draw of the data, too, where every seed has its own; seeds of which
    the arms have none in common are paired in their order. With one training seed per arm the interval is over the sampling
    seeds that both have, and says nothing of other trainings. Raises ValueError where an arm has no scores.
    """
    for arm in (better, other):
        if missing := [s for s in sources if (arm, s, column) not in cells]:
            raise ValueError(f"arm {arm!r} has no {column!r} for source {', '.join(missing)}: score these first")
    base, mine = ([cells[arm, s, column].mean for s in sources] for arm in (other, better))
    per_source = {s: (b - m) / b for s, b, m in zip(sources, base, mine, strict=True)}
    wins, advantage = sum(v > 0 for v in per_source.values()), fmean(per_source.values())
    # Of each arm's relative mean over sources, by training seed.
    relative = [seeds_mean([cells[arm, s, column] for s in sources], base) for arm in (other, better)]
    if set(relative[0]).isdisjoint(relative[1]):  # nothing in common, as where an arm is compared with itself
        pairs = list(zip(*(values.values() for values in relative), strict=False))
    else:
        pairs = [(value, relative[1][seed]) for seed, value in relative[0].items() if seed in relative[1]]
    over = "training"
    if len(pairs) == 1:
        drawn = [
            seeds_mean([cells[arm, s, column] for s in sources], base, Cell.by_sampling) for arm in (other, better)
        ]
        if len(common := [q for q in drawn[0] if q in drawn[1]]) > 1:
            pairs, over = [(drawn[0][q], drawn[1][q]) for q in common], "sampling"
    _, error, *interval = paired_difference(*zip(*pairs, strict=True))
    error, interval = (error, tuple(interval)) if len(pairs) > 1 else (None, None)
    least = None if error is None else detectable(error, len(pairs))
    levels = {better: fmean(mine), other: fmean(base)}
    return Verdict(better, other, wins, advantage, error, interval, per_source, levels, over, least)


def seeds_mean(
    cells: Sequence[Cell], units: Sequence[float], seeds: Callable[[Cell], dict[str, float]] = Cell.by_seed
) -> dict[str, float]:
    """Means over cells, each in its own unit, by training seed (or other `seeds`), for every seed that all cells have."""
    tables = [seeds(cell) for cell in cells]
    common = sorted(set.intersection(*map(set, tables)))
    return {seed: fmean(t[seed] / unit for t, unit in zip(tables, units, strict=True)) for seed in common}
