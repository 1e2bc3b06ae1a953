"""Several arms of an experiment side by side: means over training seeds, differences to one arm of the same seed, a figure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from dnnlib.util import natural_key, write_text
from metrics.results import of_detector, read_scores
from metrics.table import collect, half_width, markdown, write_csv

COLUMNS = ("bits_per_dim", "agreement", "fd", "precision", "recall", "density", "coverage")
SHOWN = ("bits_per_dim", "agreement", "fd", "recall")  # in the figure

Arms = dict[str, dict[str, dict[str, float]]]  # arm -> column -> training seed -> value


def read_arms(scores: str, section: str, metric: str | None) -> Arms:
    """The numbers of all arms in one section, arms in natural order.

    Raises ValueError for files without these numbers, or where an arm lacks a seed that others have.
    """
    rows = [row for row in of_detector(read_scores(scores), metric) if row.section == section]
    cells, seeds = collect(rows), {row.tags["seed"] for row in rows}
    arms = {}
    names = [name for column in COLUMNS for name in (column, f"{column}_se")]
    for arm in sorted({row.tags["arm"] for row in rows}, key=natural_key):
        arms[arm] = {name: cells[arm, section, name].by_seed() for name in names if (arm, section, name) in cells}
        if not arms[arm]:
            raise ValueError(f"--scores={scores}: section {section!r} of arm {arm} holds none of {', '.join(COLUMNS)}")
        if lacking := seeds - {row.tags["seed"] for row in rows if row.tags["arm"] == arm}:
            raise ValueError(f"arm {arm} lacks the seeds {', '.join(sorted(lacking))}, which others have")
    return arms


def _seeds(arms: Arms) -> list[str]:
    return sorted({seed for columns in arms.values() for found in columns.values() for seed in found})


def _complete(arms: Arms, names: Sequence[str]) -> list[str]:
    """The columns that every arm has for every seed."""
    count = len(_seeds(arms))
    return [name for name in names if all(len(columns.get(name, ())) == count for columns in arms.values())]


def to_markdown(arms: Arms, against: str) -> str:
    """Means over seeds and differences to the arm `against`, ± half of their 95 % intervals (`table.half_width`)."""
    names = _complete(arms, COLUMNS)
    level, change = [], []
    shown = lambda mean, half, sign="": f"{mean:{sign}.4f}" + ("" if half is None else f" ± {half:.4f}")
    for arm, columns in arms.items():
        values = [list(columns[name].values()) for name in names]
        errors = [list(columns.get(f"{name}_se", {}).values()) for name in names]
        halves = [half_width(v, e if len(e) == len(v) else ()) for v, e in zip(values, errors, strict=True)]
        level.append([arm, *(shown(fmean(v), half) for v, half in zip(values, halves, strict=True))])
        if arm != against:
            pairs = [list(zip(columns[n].values(), arms[against][n].values(), strict=True)) for n in names]
            found = [[a - b for a, b in pair] for pair in pairs]
            change.append([arm, *(shown(fmean(v), half_width(v), "+") for v in found)])
    seeds = len(_seeds(arms))
    how = f"Student's t over {seeds} training seeds" if seeds > 1 else "of one training seed, over images alone"
    return (
        f"Mean ± half of the 95 % interval, {how}\n\n{markdown(['arm', *names], level)}\n\n"
        f"Difference to {against} of the same seed, ± half of the 95 % interval\n\n{markdown(['arm', *names], change)}\n"
    )


def figure(stem: Path, arms: Arms) -> list[Path]:
    """A panel per column; a line per arm: mean with its 95 % interval, single seeds as small dots below."""
    from metrics import figures

    names, places = _complete(arms, SHOWN), range(len(arms))
    fig, axes = figures.figure(len(names), 2.6, 0.22 * len(arms) + 1.2, sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        seeds = [list(columns[name].values()) for columns in arms.values()]
        style = {"linestyle": "none", "marker": "o", "markersize": 4, "color": figures.PALETTE[0], "label": "mean"}
        figures.intervals(axis, [*map(fmean, seeds)], places, [*map(half_width, seeds)], across=True, **style)
        if len(seeds[0]) > 1:
            y = [i + 0.3 for i, values in enumerate(seeds) for _ in values]
            dots = {"linestyle": "none", "marker": ".", "markersize": 3, "color": figures.NEUTRAL}
            axis.plot(sum(seeds, []), y, label="a training seed", **dots)
        axis.locator_params(axis="x", nbins=4)
        axis.set(xlabel=figures.TITLES.get(name, name), ylim=(len(arms) - 0.4, -0.6))
        axis.set_yticks(places, list(arms))
    figures.legend(fig, loc="outside upper center", ncols=2)
    return figures.save(fig, stem, dpi=150)


def write_arms_report(
    scores: str, stem: str | Path, against: str, arms: Sequence[str] | None, section: str, metric: str | None
) -> list[Path]:
    """Write stem.md, stem.csv, stem.png and stem.svg; returns their paths.

    arms: which, in this order; None: `against`, then all. section: "overall", or "mean" of the sources. Raises ValueError
    as `read_arms` does, and for arms without scores.
    """
    found = read_arms(scores, section, metric)
    if unknown := {against, *(arms or ())} - set(found):
        raise ValueError(f"arm {min(unknown)!r} is in no score file; there are: {', '.join(found)}")
    chosen = {arm: found[arm] for arm in (*(arms or (against, *found)), against)}
    rows = []
    for (arm, columns), seed in itertools.product(chosen.items(), _seeds(chosen)):
        rows.append({"arm": arm, "seed": seed} | {name: columns.get(name, {}).get(seed, "") for name in COLUMNS})
    text, table = write_text(f"{stem}.md", to_markdown(chosen, against)), write_csv(f"{stem}.csv", rows)
    return [text, table, *figure(Path(stem), chosen)]
