"""The look of every figure: colours, markers, sizes, and how a figure is saved. Headless."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from dnnlib.util import atomic_write

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Figure 1 of the multi-source theory paper.
EMPIRICAL = {"single": "#FF9900", "multi": "#8CD282"}
THEORETICAL = {"single": "#FF7F50", "multi": "#8FBC8F"}
EMPIRICAL_LINE = {"linestyle": "-", "marker": "s", "markersize": 6, "alpha": 0.6}
THEORETICAL_LINE = {"linestyle": "--", "marker": "D", "markersize": 7, "alpha": 0.7}

# Further figures: told apart by readers who confuse red and green (Okabe & Ito 2008), by marker and by line style.
LINE = {"single": "#D55E00", "multi": "#0072B2"}
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#777777")
MARKERS = "oXD^v<>pP*"
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKER = {"single": "s", "multi": "o"}
LABEL = {"single": "single-source", "multi": "multi-source"}
DASH = {"single": "--", "multi": "-"}
NEUTRAL = "#555555"
INTERVAL = "95 % interval"
BAND = f"_{INTERVAL}"  # label of what is drawn as one; no entry of a legend
RANGE = "_range"  # of a band from the lowest to the highest of a few blocks
SAYS = {
    BAND: f"mean, {INTERVAL}",
    RANGE: "line: lowest block of seeds; band: up to the highest",
}  # in the title of a legend
TITLES = {
    "fd": "Fréchet distance",
    "fd_at_floor_size": "Fréchet distance at the floor's size",
    "kid": "kernel distance",
    "denoising_loss": "held-out denoising loss",
    "bits_per_dim": "bits/dim",
    "agreement": "agreement (share)",
    "recall": "recall (share)",
    "precision": "precision (share)",
}
PANEL_LABELS = {
    "K": "Number of sources $K$",
    "n": "Sample size $n$",
    "sim": "Distribution similarity",
    "D": "Sequence length $D$",
}

_RC = {
    "font.family": "serif",
    "font.serif": ["DejaVu Serif"],
    "mathtext.fontset": "dejavuserif",
    "font.size": 9,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "legend.frameon": False,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "xtick.direction": "in",
    "ytick.direction": "in",
    "xtick.top": True,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "svg.hashsalt": "multi-source",
    "figure.constrained_layout.use": True,
}


def figure(
    columns: int = 1, width: float = 4.0, height: float = 3.0, rows: int = 1, **kwargs: object
) -> tuple[Figure, Axes | np.ndarray]:
    """(figure, axes) of `columns` x `rows` panels, each width x height inches, in the shared style."""
    plt.rcParams.update(_RC)
    return plt.subplots(rows, columns, figsize=(columns * width, rows * height), **kwargs)


def stacked(rows: Sequence[tuple[int, float]], width: float) -> tuple[Figure, list[np.ndarray]]:
    """(figure, a row of axes for each of `rows`) of (number of panels, height in inches): panels of a row share its y axis.

    width: of the figure, inches; rows have panels of different widths.
    """
    plt.rcParams.update(_RC)
    heights = [height for _, height in rows]
    fig = plt.figure(figsize=(width, sum(heights)))
    parts = fig.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    return fig, [part.subplots(1, n, sharey=True, squeeze=False)[0] for part, (n, _) in zip(parts, rows, strict=True)]


def colours(names: Sequence[object]) -> list:
    """A colour for each of several lines: the arms multi and single have theirs, others take shades from dark to light."""
    shades = [plt.get_cmap("viridis")(0.85 * i / max(len(names) - 1, 1)) for i in range(len(names))]
    return [LINE.get(name, shade) for name, shade in zip(names, shades, strict=True)]


def look(names: Sequence[str]) -> list[dict]:
    """Colour, marker and line style for each of several unordered lines; the arms multi and single have theirs."""
    found, step = [], len(PALETTE)
    for i, name in enumerate(names):
        own = {"color": PALETTE[i % step], "marker": MARKERS[i % len(MARKERS)], "linestyle": DASHES[i % len(DASHES)]}
        known = {"color": LINE, "marker": MARKER, "linestyle": DASH}
        found.append({key: known[key].get(name, value) for key, value in own.items()})
    return found


def ordered(names: Sequence[object]) -> list[dict]:
    """Colour, marker and line style for lines that have an order, from dark to light."""
    return [style | {"color": shade} for style, shade in zip(look(range(len(names))), colours(names), strict=True)]


def intervals(
    axis: Axes, x: npt.ArrayLike, y: npt.ArrayLike, half: npt.ArrayLike, across: bool = False, **style: object
) -> None:
    """Points [N] with bars of half-widths [N], or (below, above) [2, N]; None, nan, inf, as of one seed: no bar.

    across: bars along x.
    """
    bars = np.array(half, np.float64)  # None: nan
    bars[~np.isfinite(bars)] = np.nan
    bars = np.maximum(bars, 0)  # of equal values, but for rounding
    if np.isnan(bars).all():
        style.pop("capsize", None)
        axis.plot(x, y, **style)
    else:
        axis.errorbar(x, y, **{"xerr" if across else "yerr": bars}, **{"capsize": 2.5, "elinewidth": 1} | style)


def band(axis: Axes, x: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike, **style: object) -> None:
    """A band [N] from `low` to `high`; nan, as of one seed: no band there."""
    if np.isfinite([low, high]).all(axis=0).any():
        axis.fill_between(x, low, high, **{"alpha": 0.18, "linewidth": 0, "label": BAND} | style)


def spreads(axis: Axes) -> set[str]:
    """Which of `SAYS` an axis shows: error bars and bands of 95 % intervals, bands from the lowest to the highest."""
    bars = {BAND for drawn in axis.containers if isinstance(drawn, ErrorbarContainer)}
    return bars | ({str(drawn.get_label()) for drawn in axis.collections} & set(SAYS))


def legend(place: Axes | Figure, **style: object) -> None:
    """The legend of an axis, or of all axes of a figure, if there are labels; says what error bars and bands are."""
    axes = place.axes if isinstance(place, Figure) else [place]
    entries = (zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes)
    shown = {label: handle for found in entries for handle, label in found}
    if shown:
        seen = set().union(*map(spreads, axes))
        title = "\n".join(says for kind, says in SAYS.items() if kind in seen) or None
        place.legend(shown.values(), shown, **{"title": title} | style)


def pad(axis: Axes, values: Sequence[float], share: float = 0.1) -> None:
    """Limits of a y axis: its values plus 10 % of their range, as in the paper."""
    low, high = min(values), max(values)
    margin = (high - low or abs(high) or 1.0) * share
    axis.set_ylim(low - margin, high + margin)


def x_ticks(axis: Axes, values: Sequence[float], log: bool = False, share: float = 0.12) -> None:
    """Ticks at the last of the ascending `values` and at all whose labels then do not touch; no others.

    log: a logarithmic axis, a little wider than its values; share: of the axis, that a label takes.
    """
    if log:
        axis.set_xscale("log")
        axis.set_xlim(values[0] / 1.3, values[-1] * 1.3)
        axis.xaxis.set_minor_locator(NullLocator())
    place = [math.log(v) for v in values] if log else list(values)
    gap, kept = share * (place[-1] - place[0]), [len(place) - 1]
    for i in reversed(range(len(place) - 1)):
        if place[kept[-1]] - place[i] >= gap:
            kept.append(i)
    axis.set_xticks([values[i] for i in kept])
    axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")


def log_x(axis: Axes, values: Sequence[float], share: float = 0.2) -> None:
    """A logarithmic x axis over positive values with those of 1, 2, 5, 10, 20, ... whose labels do not touch."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    round_values = [v for power in powers for v in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= v <= high]
    x_ticks(axis, round_values or [low, high], log=True, share=share)
    axis.set_xlim(low / 1.1, high * 1.1)


def slanted(names: Sequence[str], room: int) -> dict[str, object]:
    """How tick labels stand: level where each has at most `room` letters, else slanted, so that none touches another."""
    return {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > room else {}


def log_y(axis: Axes) -> None:
    """A logarithmic y axis with 0.05, 0.1, 0.2, ... instead of powers of ten."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def log_decades(axis: Axes) -> None:
    """Ticks at powers of ten of a logarithmic y axis of several decades, every second where there are many."""
    low, high = (math.log10(end) for end in axis.get_ylim())
    axis.yaxis.set_major_locator(LogLocator(base=100 if high - low > 4 else 10))
    axis.yaxis.set_minor_locator(NullLocator())


def save(fig: Figure, stem: str | Path, dpi: int = 200) -> list[Path]:
    """Write stem.png and stem.svg atomically and close the figure; returns their paths."""
    for kind, metadata in (("png", None), ("svg", {"Date": None})):
        with atomic_write(f"{stem}.{kind}") as file:
            fig.savefig(file, format=kind, dpi=dpi, bbox_inches="tight", pad_inches=0.03, metadata=metadata)
    plt.close(fig)
    return [Path(f"{stem}.png"), Path(f"{stem}.svg")]
