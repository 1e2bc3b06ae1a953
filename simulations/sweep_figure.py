"""The figure that plot_arm.py and plot_ebm.py draw: errors above, ratio multi/single below, one column per sweep."""

from __future__ import annotations

import math
from pathlib import Path

from metrics import figures
from metrics.table import read_csv

_ARMS = ("single", "multi")
_LEGEND = [
    f"{name}{kind}"
    for name in (*figures.LABEL.values(), "ratio")
    for kind in (" (± standard error)", ", published", ", predicted")
]


def plot_sweeps(tags: list[str], results_dir: Path, figures_dir: Path, name: str, dpi: int = 200) -> list[Path]:
    """Draw results_<tag>.csv of each tag; published values as open markers where there are any.

    Raises:
        ValueError: a result file is missing or empty.
    """
    tables = [sorted(read_csv(Path(results_dir) / t / f"results_{t}.csv"), key=lambda r, t=t: r[t]) for t in tags]
    width = max(2.05, 5.6 / len(tags))  # room for the legend
    fig, axes = figures.figure(columns=len(tags), rows=2, width=width, height=1.9, sharex="col", squeeze=False)
    for column, (tag, rows) in enumerate(zip(tags, tables, strict=True)):
        errors, ratio = axes[0][column], axes[1][column]
        _errors(errors, rows, tag)
        _ratio(ratio, rows, tag)
        figures.x_ticks(ratio, [row[tag] for row in rows], log=tag == "n", share=0.28 if tag == "n" else 0.13)
        letter = "abcd"[column]
        ratio.set_xlabel(f"({letter}) {figures.PANEL_LABELS[tag]}", fontsize=9)
    axes[0][0].set_ylabel("Average TV error")
    axes[1][0].set_ylabel("Ratio multi / single")
    handles = {}
    for axis in axes.ravel():
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = [label for label in _LEGEND if label in handles]
    columns = 4 if len(tags) == 4 else 2
    fig.legend([handles[x] for x in labels], labels, loc="outside upper center", ncols=columns, fontsize=8.5,
               columnspacing=1.3, handlelength=1.9)  # fmt: skip
    fig.align_ylabels(axes[:, 0])
    return figures.save(fig, Path(figures_dir) / name, dpi)


def _errors(axis, rows: list[dict], tag: str) -> None:
    x = [row[tag] for row in rows]
    top = 0.0
    for arm in _ARMS:
        color = figures.LINE[arm]
        y, e = [row[f"TV of {arm}"] for row in rows], [row[f"standard error of {arm}"] for row in rows]
        axis.errorbar(x, y, e, color=color, marker=figures.MARKER[arm], markersize=4.5, capsize=2, elinewidth=1,
                      label=f"{figures.LABEL[arm]} (± standard error)")  # fmt: skip
        top = max(top, *(a + b for a, b in zip(y, e, strict=True)))
        known = [(row[tag], row[key]) for row in rows if row.get(key := f"published TV of {arm}") not in (None, "")]
        if known:
            axis.plot(*zip(*known, strict=True), color=color, linestyle=":", linewidth=1, marker=figures.MARKER[arm],
                      markersize=4.5, markerfacecolor="white", label=f"{figures.LABEL[arm]}, published")  # fmt: skip
            top = max(top, *(y for _, y in known))
    axis.set_ylim(0, 1.07 * top)


def _ratio(axis, rows: list[dict], tag: str) -> None:
    x = [row[tag] for row in rows]
    measured = [row["measured ratio"] for row in rows]
    error = [_ratio_error(row) for row in rows]
    axis.axhline(1, color=figures.NEUTRAL, linewidth=0.7)
    axis.errorbar(
        x,
        measured,
        error,
        color="black",
        marker="o",
        markersize=4,
        capsize=2,
        elinewidth=1,
        label="ratio (± standard error)",
    )
    known = [(row[tag], row["published ratio"]) for row in rows if row.get("published ratio") not in (None, "")]
    if known:
        axis.plot(*zip(*known, strict=True), color="black", linestyle=":", linewidth=1, marker="o", markersize=4,
                  markerfacecolor="white", label="ratio, published")  # fmt: skip
    axis.plot(x, [row["predicted ratio"] for row in rows], color=figures.NEUTRAL, linestyle="--", linewidth=1.2,
              label="ratio, predicted")  # fmt: skip
    axis.set_ylim(bottom=0)


def _ratio_error(row: dict) -> float:
    """Standard error of multi / single by the delta method; the variance of their difference gives the covariance."""
    s, m = row["TV of single"], row["TV of multi"]
    vs, vm, vd = (row[f"standard error of {k}"] ** 2 for k in ("single", "multi", "advantage"))
    if not s or not m:
        return 0.0
    covariance = 0.5 * (vs + vm - vd)
    return m / s * math.sqrt(max(0.0, vs / s**2 + vm / m**2 - 2 * covariance / (s * m)))
