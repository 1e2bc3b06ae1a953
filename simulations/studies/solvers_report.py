"""Figure and tables of run_solvers.py: error against network evaluations, for every process, solver and grid."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from metrics import figures
from metrics.contrasts import holm
from metrics.table import grouped, markdown, mean_and_error, mean_interval
from simulations.studies.solvers import ARMS, IN_SIGMA, REFERENCE, cell_of, differences, summarise

TITLES = {
    "gaussian": ("Gaussian, exact", "$W_2$ error"),
    "mixture": ("nine Gaussians", "sliced $W_2$"),
    "digits": ("trained on digits", "Fréchet distance"),
}
KINDS = ("Heun", "churn", "EM", "SSCS", "flow", "RK45")  # of solvers
LOOKS = dict(zip(KINDS, figures.look(KINDS), strict=True))
GRID_DASH = {"uniform": ":", "quadratic": "-", "sigma": "-", "adaptive": "-."}

Curves = dict[
    tuple[str, str], list[tuple[int, float, float]]
]  # (arm, grid) -> (evaluations, mean, half of 95 % interval)


def plot_solvers(dest: str | Path, stem: str | Path) -> str:
    """Draw the experiments at `stem`, and the agreement of the arms on digits at `stem`-sources.

    Returns Markdown tables. Raises ValueError if there is nothing.
    """
    everything = {name: found for name in (*TITLES, "bound") if (found := _rows(Path(dest), name))}
    bound = everything.pop("bound", None)
    if not everything:
        raise ValueError(f"--outdir={dest}: no results; run run_solvers.py gaussian, mixture or digits first")
    draw({name: curves_of(rows) for name, rows in everything.items()}, stem)
    tables = [_table(name, rows) for name, rows in everything.items()]
    if "digits" in everything:
        tables.append(_differences(differences(everything["digits"]), f"{stem}-sources"))
    return "\n\n".join(tables + ([_bound_table(bound)] if bound else [])) + "\n"


def _rows(dest, name):
    """The rows of NAME.json in the folders seed... of a folder, or where there are none in itself."""
    files = sorted(dest.glob(f"seed*/{name}.json")) or [*dest.glob(f"{name}.json")]
    return [row for path in files for row in json.loads(path.read_text())]


def curves_of(rows: Sequence[dict]) -> Curves:
    """Means over sources, then over seeds with their intervals (nan for one seed), by arm and grid."""
    curves = defaultdict(list)
    for (arm, grid, _), found in grouped((cell_of(row), row) for row in rows).items():
        seeds = grouped((row["seed"], row["error"]) for row in found).values()
        mean, _, low, _ = mean_interval(fmean(errors) for errors in seeds)
        curves[arm, grid].append((round(fmean(row["nfe"] for row in found)), mean, mean - low))
    return {key: sorted(points) for key, points in curves.items()}


def draw(experiments: Mapping[str, Curves], stem: str | Path) -> list[Path]:
    """Small multiples: a row per experiment, a column per process, a line per solver and grid; Heun in grey."""
    processes = list(dict.fromkeys(arm.split()[0] for arm in ARMS))
    fig, axes = figures.figure(len(processes), 2.1, 1.9, rows=len(experiments), squeeze=False, sharey="row")
    for line, (name, curves) in zip(axes, experiments.items(), strict=True):
        highest = sorted(max(mean for _, mean, _ in points) for key, points in curves.items() if key[0] in ARMS)
        top = 1.5 * highest[max(0, round(0.8 * len(highest)) - 1)]  # what diverges does not hide the others
        nfes = sorted({nfe for (_, grid), found in curves.items() for nfe, *_ in found if nfe and grid != "adaptive"})
        line[0].set(yscale="log", ylabel="\n".join(TITLES[name]))
        for axis, process in zip(line, processes, strict=True):
            _draw_panel(axis, curves, process, top)
            figures.x_ticks(axis, nfes, log=True, share=0.15)
            axis.set_xlim(nfes[0] / 1.3, 1.3 * max(nfe for found in curves.values() for nfe, *_ in found))
        ends = [mean - (half if math.isfinite(half) else 0) for found in curves.values() for _, mean, half in found]
        lowest = min(end for end in ends if end > 0)
        line[0].set_ylim(lowest / 1.5, top * 1.2)
        figures.log_decades(line[0])
    for axis, process in zip(axes[0], processes, strict=True):
        axis.set_title(process if process == "learned" else process.upper())
    for axis in axes[-1]:
        axis.set_xlabel("network evaluations")
    figures.legend(fig, loc="outside lower center", ncols=4)
    return figures.save(fig, stem, dpi=150)


def _draw_panel(axis, curves, process, top):
    own = {key: found for key, found in curves.items() if key[0].split()[0] == process and key[0] in ARMS}
    own = {(arm, grid): found for (arm, grid), found in own.items() if grid != "sigma" or ARMS[arm][2] in IN_SIGMA}
    for (arm, grid), points in curves.items():
        if arm == "data":
            style = {"color": "black", "linewidth": 0.8, "linestyle": (0, (1, 3)), "label": "fresh data"}
            axis.axhline(points[0][1], **style)
        elif arm == REFERENCE and (arm, grid) not in own:
            nfe, mean, _ = zip(*points, strict=True)
            axis.plot(nfe, mean, color="#BBBBBB", linewidth=1, label=f"{REFERENCE}, to compare", zorder=1)
    for (arm, grid), points in own.items():
        kind = arm.split()[1]
        label = kind if grid in ("sigma", "adaptive") else f"{kind}, {grid} grid"
        face = {} if grid != "uniform" else {"markerfacecolor": "white"}
        style = LOOKS[kind] | {"linestyle": GRID_DASH[grid], "markersize": 3.5, "linewidth": 1.1, **face}
        inside = [point if point[1] <= top else (point[0], math.nan, math.nan) for point in points]
        figures.intervals(axis, *zip(*inside, strict=True), label=label, **style)
        above = [nfe for nfe, mean, _ in points if mean > top]
        beyond = {"marker": (3, 0, 0), "linestyle": "none", "color": LOOKS[kind]["color"], "clip_on": False}
        if above:
            axis.plot(above, [top] * len(above), **beyond, label=f"{kind}: beyond the axis")
    if not own:
        axis.text(0.5, 0.5, "not run", transform=axis.transAxes, ha="center", color=figures.NEUTRAL)


def _differences(found, stem):
    """Every arm's error less the reference's at the largest budget, per source, with paired 95 % intervals: drawn at `stem`,
    and as a table with the smallest p, and that after Holm's adjustment for all of the table.
    """
    sources = sorted({key[2] for key in found})
    names = list(dict.fromkeys(key[:2] for key in found))
    draw_differences(found, stem)
    adjusted = dict(zip(found, holm([p for *_, p in found.values()]), strict=True))
    lines = []
    for name in names:
        keys = [(*name, source) for source in sources]
        values = [f"{mean:.3g} ({low:.3g} to {high:.3g})" for mean, _, low, high, _ in (found[key] for key in keys)]
        smallest = (min(table[key] for key in keys) for table in ({k: v[-1] for k, v in found.items()}, adjusted))
        lines.append([*name, *values, *(f"{p:.2g}" for p in smallest)])
    return markdown([f"less {REFERENCE}", "grid", *(f"source {s}" for s in sources), "smallest p", "after Holm"], lines)


def draw_differences(found: Mapping[tuple, tuple], stem: str | Path) -> list[Path]:
    """A panel per source: {(arm, grid, source): (difference, _, low, high, ...)} of `solvers.differences`."""
    sources = sorted({key[2] for key in found})
    names = list(dict.fromkeys(key[:2] for key in found))
    fig, axes = figures.figure(len(sources), 2.6, 0.2 * len(names) + 1.4, sharey=True, sharex=True, squeeze=False)
    ends = [end for _, _, low, high, *_ in found.values() for end in (low, high)]
    linear = 3  # symmetric logarithmic beyond
    for axis, source in zip(axes[0], sources, strict=True):
        mean, _, low, high, *_ = zip(*(found[(*name, source)] for name in names), strict=True)
        half = [[m - a for m, a in zip(mean, low, strict=True)], [b - m for m, b in zip(mean, high, strict=True)]]
        style = dict(marker="o", markersize=4, linestyle="none", color=figures.PALETTE[0], label="difference")
        figures.intervals(axis, mean, range(len(names)), half, across=True, **style)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(names)), [f"{arm}, {grid}" for arm, grid in names])
        axis.set_title(f"source {source}")
        axis.set_xscale("symlog", linthresh=linear)
        axis.set_xticks(ticks := [-100, -3, 0, 3, 100], [f"{tick}" for tick in ticks])
        axis.set_xlim(min(1.5 * min(ends), -linear * 1.3), 1.5 * max(*ends, linear))
    axes[0, 0].invert_yaxis()
    fig.supxlabel(f"{figures.TITLES['fd']} minus that of {REFERENCE}; logarithmic beyond ±{linear}", fontsize=9)
    figures.legend(fig, loc="outside upper center", ncols=1)
    return figures.save(fig, stem, dpi=150)


def _fixed_nfes(rows):
    """The numbers of evaluations that were asked for."""
    return sorted({row["nfe"] for row in rows if row["nfe"] and "tolerance" not in row})


def _number(value):
    """mean +- standard error, without the latter where there is none."""
    mean, error = value
    return f"{mean:.3g}" + (f" ± {error:.1g}" if error else "")


def _table(name, rows):
    """A line per arm and grid, a column per number of evaluations, mean +- standard error over seeds, per source."""
    sources = sorted({row["source"] for row in rows if "source" in row}) or [None]
    nfes, stats, lines, adaptive = _fixed_nfes(rows), summarise(rows), [], []

    def cell(*key):
        found = [stats.get((*key, source)) for source in sources]
        return ", ".join(_number(value) if value else "-" for value in found)

    for arm, grid in dict.fromkeys((row["arm"], row["grid"]) for row in rows):
        if grid == "adaptive":
            own = sorted({key[2] for key in stats if key[:2] == (arm, grid)})
            adaptive.append(f"\n\n{arm}: " + "; ".join(f"{cell(arm, grid, nfe)} at {nfe}" for nfe in own))
        else:
            values = [cell(arm, grid, nfe) for nfe in (nfes if arm != "data" else (0,))]
            lines.append([arm, grid, *values, *[""] * (len(nfes) - len(values))])
    return markdown([TITLES[name][0], "grid", *map(str, nfes)], lines) + "".join(adaptive)


def _bound_table(rows):
    """Bits/dim per process, its difference from the first one per image, and the same with common draws."""
    by = grouped(((row["draws"], row["process"]), row["bits"]) for row in rows)
    first, *others = dict.fromkeys(row["process"] for row in rows)
    lines = [[first, _number(mean_and_error(by["own", first])), "", ""]]
    for name in others:
        own, common = ([a - b for a, b in zip(by[d, name], by[d, first], strict=True)] for d in ("own", "common"))
        gaps = [_number(mean_and_error(own)), f"{max(map(abs, common)):.1g}"]
        lines.append([name, _number(mean_and_error(by["own", name])), *gaps])
    ends = f"sigma {rows[0]['sigma_min']:.3g} to {rows[0]['sigma_max']:.3g}"
    header = [f"bound, {ends}", "bits/dim", f"less {first}, own draws", "largest gap of an image, common draws"]
    return markdown(header, lines)
