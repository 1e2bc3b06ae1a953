"""Curves of training runs: what stats.jsonl and the scores of snapshots say, a panel per quantity, runs overlaid."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dnnlib.util import natural_key, read_stats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Mapping[str, Sequence[dict]]  # name -> lines, as `read_run` gives them

AXES = {
    "images": ("Progress/kimg", "training images (thousands)"),
    "steps": ("Progress/iteration", "steps"),
    "time": ("Timing/total_sec", "time (s)"),
    "cpu": ("Timing/cpu_sec", "CPU time (s)"),
}
SPEED = "Timing/img_per_sec"
SCORES = Path("metrics") / "metrics.jsonl"  # in a run folder: scores of its snapshots, see metrics/snapshots.py
# Title of a panel and the fields that it shows; what a field has in brackets tells its lines apart. Of several runs, what
# stands after BY is an axis.
BY = " by "
PANELS = (
    ("training loss", r"Loss/loss"),
    ("validation loss", r"Loss/validation|Validation/ema_loss"),
    ("validation loss by noise level σ", r"Loss/validation_sigma(.+)"),
    ("validation loss by source", r"Loss/validation_source(.+)"),
    ("L2 metric of the average", r"Validation/ema_L2_metric"),
    ("learning rate", r"Loss/learning_rate"),
    ("throughput (images/s)", SPEED),
    ("time spent on selecting (share)", r"Selection/time_share"),
    ("learned Q", r"Process/Q(\d+)"),
    ("learned D", r"Process/D(\d+)"),
)


@dataclass
class Panel:
    """One quantity: its title, and {what tells lines apart ("" if nothing): field}."""

    title: str
    fields: dict[str, str]

    @property
    def of_levels(self) -> bool:
        """Whether its fields are the same loss at different noise levels, or of different sources."""
        return self.title.startswith(f"validation loss{BY}")


def read_run(run: str | Path) -> list[dict]:
    """The lines of a run's stats.jsonl with its throughput, then one per scored snapshot: `Metrics/<distance>/<average>`.

    Raises ValueError for a folder without stats.jsonl.
    """
    lines = [dict(line) for line in read_stats(run)]
    for line in lines:
        if line.get("Timing/sec_per_kimg"):
            line[SPEED] = 1e3 / line["Timing/sec_per_kimg"]
    scores = Path(run) / SCORES
    if not scores.is_file():
        return lines
    try:
        return [*lines, *_scored([json.loads(row) for row in scores.read_text(encoding="utf-8").splitlines()])]
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"{scores}: not the scores of snapshots ({type(err).__name__}: {err})") from err


def _scored(rows):
    """A line per snapshot, its lowest score over blocks of images."""
    from metrics.evaluate import literature_name

    found = {}
    for row in (row for row in rows if row["kimg"] is not None):
        for detector, result in row["metrics"].items():
            numbers = {name: result["overall"].get(name) for name in ("fd", "kid")}
            for name, value in numbers.items():
                key = f"Metrics/{literature_name(detector, name)}/{row['ema']}"
                line = found.setdefault(row["kimg"], {"Progress/kimg": row["kimg"]})
                if value is not None:
                    line[key] = min(value, line.get(key, math.inf))
    return [found[kimg] for kimg in sorted(found)]


def panels(runs: Runs, keys: Sequence[str] | None = None) -> list[Panel]:
    """What there is to show; keys: a panel for each of these fields instead. Raises ValueError for one that is nowhere."""
    present = {name for lines in runs.values() for line in lines for name, v in line.items() if v is not None}
    if missing := set(keys or ()) - present:
        raise ValueError(f"--keys={min(missing)} is in no stats.jsonl; there are: {', '.join(sorted(present))}")
    if keys:
        return [Panel(key, {"": key}) for key in keys]
    measured = sorted({name.rpartition("/")[0] for name in present if name.startswith("Metrics/")})
    scores = [(f"{name.removeprefix('Metrics/')}{BY}average", rf"{re.escape(name)}/(.+)") for name in measured]
    found = []
    for title, pattern in (*PANELS, *scores):
        matches = (re.fullmatch(pattern, name) for name in sorted(present, key=natural_key))
        fields = {(match.groups() or ("",))[0] or "": match[0] for match in matches if match}
        if fields:
            found.append(Panel(title, fields))
    return found


def best_line(lines: Sequence[dict]) -> dict | None:
    """The line of the lowest validation loss; None where there was no validation."""
    looks = [line for line in lines if line.get("Loss/validation") is not None]
    return min(looks, key=lambda line: line["Loss/validation"], default=None)


def styles(runs: Runs, labels: Mapping[str, str]) -> dict[str, dict]:
    """A colour, line style and marker for each label, told apart without colour, too."""
    from metrics import figures

    names = list(dict.fromkeys(labels.get(name, name) for name in runs))
    return dict(zip(names, figures.look(names), strict=True))


def draw_panel(
    axis: Axes, panel: Panel, runs: Runs, which: str = "images", log: bool = True, labels: Mapping = {}
) -> None:  # noqa: B006
    """Draw one quantity of all runs: a line per field; of several runs, the losses of levels and sources as a profile, at each
    run's lowest validation loss.

    which: of AXES; labels: {run: label}, runs of one label look alike.
    """
    from metrics import figures

    look, seen = styles(runs, labels), set()
    axis.set(title=panel.title, xlabel=AXES[which][1])
    if len(runs) > 1 and panel.of_levels and len(panel.fields) > 1:
        _profile(axis, panel, runs, look, labels)
    else:
        shades = dict(zip(panel.fields, figures.colours(list(panel.fields)), strict=True))
        for name, lines in runs.items():
            label = labels.get(name, name)
            for i, (part, field) in enumerate(panel.fields.items()):
                points = [(x, line[field]) for line in lines if line.get(field) is not None
                          for x in [_place(line, lines, which)] if x is not None]  # fmt: skip
                if not points:
                    continue
                style = dict(look[label], markersize=3 if len(points) < 12 else 0)
                if len(runs) == 1 and len(panel.fields) > 1:
                    style["color"] = shades[part]
                elif i:
                    style["linestyle"] = ("-", "--", ":")[i % 3]
                text = label if not part else part if len(runs) == 1 else f"{label}, {part}"
                axis.plot(*zip(*points, strict=True), label=None if text in seen else text, **style)
                seen.add(text)
        if len(panel.fields) > 1:
            axis.legend(fontsize=7, ncols=1 + len(seen) // 5)
    values = [v for line in axis.get_lines() for v in line.get_ydata()]
    if log and values and min(values) > 0 and max(values) > 4 * min(values):
        figures.log_y(axis)


def _place(line, lines, which):
    """Where a line stands on an axis; a score has the time of the status line of as many images."""
    field = AXES[which][0]
    if field in line or which == "images":
        return line.get(field)
    same = (other for other in lines if other.get("Progress/kimg") is not None and field in other)
    return next((o[field] for o in same if int(o["Progress/kimg"]) == int(line.get("Progress/kimg", -1))), None)


def _profile(axis, panel, runs, look, labels):
    from metrics import figures

    levels, order = "level" in panel.title, list(look)
    for name, lines in runs.items():
        best, label = best_line(lines) or {}, labels.get(name, name)
        shift = 0.5 * ((order.index(label) + 0.5) / len(order) - 0.5)
        points = [(float(part) if levels else i + shift, best[field])
                  for i, (part, field) in enumerate(panel.fields.items()) if best.get(field) is not None]  # fmt: skip
        if points:
            style = dict(look[label], markersize=4)
            axis.plot(*zip(*points, strict=True), **(style if levels else {**style, "linestyle": ""}), label=label)
    axis.set(
        xlabel=panel.title.partition(BY)[2],
        title="lowest validation loss" + panel.title.removeprefix("validation loss"),
    )
    if levels:
        figures.x_ticks(axis, sorted(map(float, panel.fields)), log=True)
    else:
        axis.set_xticks(range(len(panel.fields)), list(panel.fields))


def draw(
    runs: Runs, keys: Sequence[str] | None = None, axes: Sequence[str] = ("images",), log: bool = True, columns: int = 3
) -> Figure:
    """All panels for each of `axes` in rows of `columns`, one legend of the runs below."""
    from metrics import figures

    shown = [(panel, which) for which in axes for panel in panels(runs, keys)]
    across = min(columns, len(shown))
    fig, grid = figures.figure(across, 3.8, 2.7, rows=-(-len(shown) // across), squeeze=False)
    for axis, (panel, which) in zip(grid.flat, shown, strict=False):
        draw_panel(axis, panel, runs, which, log)
    for axis in grid.flat[len(shown) :]:
        axis.axis("off")
    handles = {}
    for line in (line for axis in grid.flat for line in axis.get_lines() if line.get_label() in runs):
        handles.setdefault(line.get_label(), line)
    known = [name for name in runs if name in handles]
    if len(runs) > 1:
        ncols = max(1, min(len(known), int(11 * across // max(4 + len(name) for name in known))))
        fig.legend([handles[name] for name in known], known, loc="outside lower center", ncols=ncols, fontsize=8)
    else:
        fig.suptitle(next(iter(runs)), fontsize=10)
    return fig


def describe(runs: Runs, panel: Panel, labels: Mapping[str, str] = {}) -> str:  # noqa: B006
    """A panel in a sentence, for those who cannot see it: where its first field ends, lowest to highest of each label."""
    ends: dict[str, list[float]] = {}
    field = next(iter(panel.fields.values()))
    last: Callable = lambda lines: next((line[field] for line in reversed(lines) if line.get(field) is not None), None)
    for name, lines in runs.items():
        if (value := last(lines)) is not None:
            ends.setdefault(labels.get(name, name), []).append(value)
    span = lambda v: f"{min(v):.3g}" + ("" if min(v) == max(v) else f" to {max(v):.3g}")
    return f"{panel.title}: at the end " + ", ".join(f"{span(v)} ({name})" for name, v in ends.items())
