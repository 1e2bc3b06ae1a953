"""Several arms of an experiment side by side: means over training seeds, differences to one arm of the same seed, a figure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from dnnlib.util import natural_key, write_text
from metrics.results import of_detector, read_scores
from metrics.table import collect, markdown, mean_and_deviation, paired_difference, write_csv

COLUMNS = ("agreement", "fd", "precision", "recall", "density", "coverage")
SHOWN = ("agreement", "fd", "recall")  # in the figure

Arms = dict[str, dict[str, dict[str, float]]]  # arm -> column -> training seed -> value


def read_arms(scores: str, section: str, metric: str | None) -> Arms:
    """The numbers of all arms in one section, arms in natural order.

    Raises ValueError for files without these numbers, or where an arm lacks a seed that others have.
    """
    rows = [row for row in of_detector(read_scores(scores), metric) if row.section == section]
    cells, seeds = collect(rows), {row.tags["seed"] for row in rows}
    arms = {}
    for arm in sorted({row.tags["arm"] for row in rows}, key=natural_key):
        arms[arm] = {name: cells[arm, section, name].by_seed() for name in COLUMNS if (arm, section, name) in cells}
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
    """Means ± standard deviations over seeds, and mean ± standard error of the differences to the arm `against`."""
    names = _complete(arms, COLUMNS)
    level, change = [], []
    for arm, columns in arms.items():
        spread = [mean_and_deviation(columns[name].values()) for name in names]
        level.append([arm, *(f"{mean:.4f} ± {sd:.4f}" for mean, sd in spread)])
        if arm != against:
            pairs = [paired_difference(columns[n].values(), arms[against][n].values())[:2] for n in names]
            change.append([arm, *(f"{mean:+.4f} ± {error:.4f}" for mean, error in pairs)])
    return (
        f"Mean ± standard deviation of {len(_seeds(arms))} training seeds\n\n{markdown(['arm', *names], level)}\n\n"
        f"Difference to {against} of the same seed, mean ± standard error\n\n{markdown(['arm', *names], change)}\n"
    )


def figure(stem: Path, arms: Arms) -> list[Path]:
    """A panel per column, a point with its standard deviation per arm, single seeds as small dots."""
    from metrics import figures

    names = _complete(arms, SHOWN)
    fig, axes = figures.figure(columns=len(names), width=3.4, height=3.0, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for i, columns in enumerate(arms.values()):
            values = columns[name].values()
            mean, sd = mean_and_deviation(values)
            axis.errorbar([i], [mean], yerr=[0 if math.isnan(sd) else sd], marker="o", color="#222222", capsize=3, lw=1)
            axis.scatter([i + 0.18] * len(values), values, s=8, color="#888888", lw=0)
        axis.set_xticks(range(len(arms)), list(arms), rotation=35, ha="right", fontsize=8)
        axis.set_title({"fd": "Fréchet distance"}.get(name, name), fontsize=10)
    return figures.save(fig, stem, dpi=130)


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
