"""A number against an option that was swept: EMA lengths, guidance weights, steps. One curve per arm, its optimum with an
interval over training seeds."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dnnlib.util import natural_key, write_text
from metrics.results import of_detector, read_scores, require_comparable
from metrics.table import collect, grouped, markdown, mean_interval, paired_difference, write_csv

LARGER_IS_BETTER = {"agreement", "precision", "recall", "density", "coverage"}


class Curve(NamedTuple):
    """The numbers of one arm."""

    x: npt.NDArray[np.float64]  # swept values, ascending, [X]
    y: npt.NDArray[np.float64]  # a row per training seed, means over sampling seeds, [S, X]
    seeds: list[str]


class Optimum(NamedTuple):
    """Where a curve is best, by training seeds."""

    each: list[float | None]  # of every seed; None: at an end of the range, where no optimum can be seen
    mean: float | None  # of all seeds; None where one of them has none
    interval: tuple[float, float] | None  # 95 %, Student's t; None for a single seed


def read_curves(
    scores: str, over: str, measure: str = "denoising_loss", section: str = "overall", metric: str | None = None
) -> dict[str, Curve]:
    """{arm: curve} of the score files that match a pattern; `over`: the tag that holds the swept value.

    Raises ValueError where a file lacks a tag, a value is no number, the measure is not there, fewer than three values
    were measured, or a seed lacks a value that others have.
    """
    rows = [row for row in map(_named, read_scores(scores, [over, "seed"])) if row.section == section]
    chosen = [row for row in of_detector(rows, metric) if measure in row.numbers]
    if not chosen:
        held = sorted({name for row in rows for name in row.numbers})
        raise ValueError(
            f"--scores={scores}: no {measure} in section {section!r}; there: {', '.join(held) or 'nothing'}"
        )
    require_comparable(chosen)  # also between the arms
    curves, arms = {}, grouped((row.tags.get("arm", "all"), row) for row in chosen)
    for arm in sorted(arms, key=natural_key):
        # A cell per value, so that seeds, sampling seeds and references are checked as in every report.
        cells = collect(replace(row, tags=row.tags | {"arm": row.tags[over]}) for row in arms[arm])
        found = {
            _number(over, value): cells[value, section, measure].by_seed()
            for value, _, name in cells
            if name == measure
        }
        if len(found) < len({row.tags[over] for row in arms[arm]}):
            raise ValueError(f"--over={over}: arm {arm} has a value twice, written in two ways")
        seeds = sorted(set().union(*found.values()), key=natural_key)
        if lacking := [f"{over}={x:g}, seed {s}" for x, values in found.items() for s in seeds if s not in values]:
            raise ValueError(f"arm {arm} lacks scores of {'; '.join(lacking[:5])}: measure them, or leave out the rest")
        if len(found) < 3:
            raise ValueError(f"--over={over}: {len(found)} values of arm {arm}; an optimum needs three at least")
        x = sorted(found)
        curves[arm] = Curve(np.array(x), np.array([[found[v][seed] for v in x] for seed in seeds]), seeds)
    return curves


def _named(row):
    """The loss of all images under the name that it has per source."""
    known = row.detector == "denoising" and "loss" in row.numbers
    return replace(row, numbers={"denoising_loss": row.numbers["loss"]}) if known else row


def _number(over, text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"--over={over}: the tag {over}={text} is no number")
    return value


def vertex(x: npt.ArrayLike, y: npt.ArrayLike, log: bool) -> float | None:
    """Where the parabola through the lowest point and its neighbours is lowest; x ascending. None: at an end of the range.

    log: the parabola is one of log x.
    """
    at = int(np.argmin(y))
    if not 0 < at < len(y) - 1:
        return None
    t, values = (np.asarray(v, np.float64)[at - 1 : at + 2] for v in (np.log(x) if log else x, y))
    square, slope, _ = np.polyfit(t - t[1], values - values[1], 2)
    place = t[1] - slope / (2 * square) if square > 0 else t[1]  # all three equal
    return float(np.exp(place) if log else place)


def optimum(curve: Curve, measure: str) -> Optimum:
    """The best value of every seed's own curve, their mean (geometric, where all values are positive) and its interval."""
    log, sign = bool(curve.x[0] > 0), -1 if measure in LARGER_IS_BETTER else 1
    each = [vertex(curve.x, sign * y, log) for y in curve.y]
    if None in each:
        return Optimum(each, None, None)
    to, back = (math.log, math.exp) if log else (float, float)
    mean, _, low, high = mean_interval([to(v) for v in each])
    return Optimum(each, back(mean), None if math.isnan(low) else (back(low), back(high)))


def to_markdown(curves: dict[str, Curve], over: str, measure: str) -> str:
    """Per arm: the optimum, and mean with interval at every value, also of the difference to the best mean."""
    text = ""
    for arm, curve in curves.items():
        best, sign = optimum(curve, measure), -1 if measure in LARGER_IS_BETTER else 1
        at = int(np.argmin(sign * curve.y.mean(axis=0)))
        lines = []
        for i, x in enumerate(curve.x):
            mean, _, low, high = mean_interval(curve.y[:, i])
            gap, _, *ends = paired_difference(curve.y[:, i], curve.y[:, at])
            other = (
                ""
                if i == at
                else f"{gap:+.4g}" + ("" if math.isnan(ends[0]) else f" ({ends[0]:+.4g} to {ends[1]:+.4g})")
            )
            lines.append([f"{x:g}", f"{mean:.4f}" + ("" if math.isnan(low) else f" ({low:.4f} to {high:.4f})"), other])
        text += f"{arm}: {_sentence(best, over, len(curve.seeds))}\n\n"
        text += markdown([over, measure, f"difference to {over} = {curve.x[at]:g}"], lines) + "\n\n"
    return text + "In brackets: 95 % intervals over training seeds (Student's t), differences within seeds.\n"


def _sentence(best, over, count):
    if best.mean is None:
        ends = sum(v is None for v in best.each)
        return f"no optimum inside the range for {ends} of {count} training seeds: sweep further"
    if best.interval is None:
        return f"optimum at {over} = {best.mean:.3g} (one training seed: no interval)"
    low, high = best.interval
    return f"optimum at {over} = {best.mean:.3g} (95 % interval {low:.3g} to {high:.3g} over {count} training seeds)"


def figure(stem: str | Path, curves: dict[str, Curve], over: str, measure: str, label: str | None = None) -> list[Path]:
    """Mean and 95 % band of every arm, single seeds as thin lines where there is one arm, optima with their intervals."""
    from metrics import figures

    fig, axis = figures.figure(width=4.6, height=3.2)
    for style, (arm, curve) in zip(figures.look(list(curves)), curves.items(), strict=True):
        means, _, low, high = np.transpose([mean_interval(column) for column in curve.y.T])
        axis.plot(curve.x, means, markersize=3.5, label=arm if len(curves) > 1 else "all images", **style)
        figures.band(axis, curve.x, low, high, color=style["color"])
        for y in curve.y if len(curves) == 1 and len(curve.y) > 1 else ():
            axis.plot(curve.x, y, color=figures.NEUTRAL, lw=0.4, alpha=0.5)
        best = optimum(curve, measure)
        if best.mean is not None:
            low, high = best.interval or (math.nan, math.nan)
            name = f"optimum {best.mean:.3g}" + (f" ({low:.3g} to {high:.3g})" if best.interval else "")
            found = {"marker": "D", "markersize": 5, "linestyle": "none", "color": "black", "zorder": 5, "label": name}
            height, half = [np.interp(best.mean, curve.x, means)], [[best.mean - low], [high - best.mean]]
            figures.intervals(axis, [best.mean], height, half, across=True, **found)
    if curve.x[0] > 0 and curve.x[-1] / curve.x[0] > 5:
        figures.x_ticks(axis, list(curve.x), log=True)
    axis.set(xlabel=label or over, ylabel=figures.TITLES.get(measure, measure.replace("_", " ")))
    figures.legend(axis)
    return figures.save(fig, stem, dpi=150)


def write_sweep(
    scores: str,
    stem: str | Path,
    over: str,
    measure: str = "denoising_loss",
    section: str = "overall",
    metric: str | None = None,
    label: str | None = None,
) -> dict:
    """Write stem.md, stem.csv (all seeds), stem.png and stem.svg; returns the optima as plain data."""
    curves = read_curves(scores, over, measure, section, metric)
    rows = [
        {"arm": arm, over: float(x), "seed": seed, measure: float(value)}
        for arm, curve in curves.items()
        for seed, line in zip(curve.seeds, curve.y, strict=True)
        for x, value in zip(curve.x, line, strict=True)
    ]
    files = [write_text(f"{stem}.md", to_markdown(curves, over, measure)), write_csv(f"{stem}.csv", rows)]
    files += figure(stem, curves, over, measure, label)
    return {
        "files": [str(file) for file in files],
        "optimum": {arm: optimum(c, measure)._asdict() for arm, c in curves.items()},
    }
