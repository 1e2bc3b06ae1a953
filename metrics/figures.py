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
    if np.isnan(bars).all():
        style.pop("capsize", None)
        axis.plot(x, y, **style)
    else:
        axis.errorbar(x, y, **{"xerr" if across else "yerr": bars}, **{"capsize": 2.5, "elinewidth": 1} | style)


def has_bars(axis: Axes) -> bool:
    """Whether an axis shows error bars."""
    return any(isinstance(drawn, ErrorbarContainer) or getattr(drawn, "errorbar", None) for drawn in axis.containers)


def legend(axis: Axes, **style: object) -> None:
    """The legend of an axis, if it has labels, which says what its error bars are."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(**{"title": f"mean, {INTERVAL}" if has_bars(axis) else None} | style)


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


def log_y(axis: Axes) -> None:
    """A logarithmic y axis with 0.05, 0.1, 0.2, ... instead of powers of ten."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def save(fig: Figure, stem: str | Path, dpi: int = 200) -> list[Path]:
    """Write stem.png and stem.svg atomically and close the figure; returns their paths."""
    for kind, metadata in (("png", None), ("svg", {"Date": None})):
        with atomic_write(f"{stem}.{kind}") as file:
            fig.savefig(file, format=kind, dpi=dpi, bbox_inches="tight", pad_inches=0.03, metadata=metadata)
    plt.close(fig)
    return [Path(f"{stem}.png"), Path(f"{stem}.svg")]
