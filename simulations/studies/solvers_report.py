"""Figure and tables of run_solvers.py: error against network evaluations, for every process, solver and grid."""

import json
from pathlib import Path

from metrics import figures
from metrics.contrasts import holm
from metrics.table import grouped, markdown, mean_and_error
from simulations.studies.solvers import ARMS, IN_SIGMA, REFERENCE, differences, summarise

TITLES = {
    "gaussian": ("Gaussian, exact", "Wasserstein error"),
    "mixture": ("nine Gaussians", "sliced Wasserstein error"),
    "digits": ("digits, trained denoiser", "Frechet distance, mean of sources"),
}
HUES = "333333 999999 D9730D C0392B 3C8F3A 2A6FBB 7FB2E5 8E44AD C58FD9 8C6D1F D4B75A"
COLORS = {arm: f"#{hue}" for arm, hue in zip(ARMS, HUES.split(), strict=True)}
ROWS = ("uniform", "quadratic")  # of panels, by time grid


def plot_solvers(dest: str | Path, stem: str | Path) -> str:
    """Draw one panel per experiment and grid at `stem`, and the agreement of the arms on digits at `stem`-sources.

    Returns Markdown tables. Arms without a time grid (Heun, RK45) are in both rows. Raises ValueError if there is nothing.
    """
    files = {name: Path(dest) / f"{name}.json" for name in (*TITLES, "bound")}
    everything = {name: json.loads(path.read_text()) for name, path in files.items() if path.is_file()}
    bound = everything.pop("bound", None)
    if not everything:
        raise ValueError(f"--outdir={dest}: no results; run run_solvers.py gaussian, mixture or digits first")
    fig, axes = figures.figure(len(everything), 3.6, 3.0, rows=len(ROWS), squeeze=False)
    for column, (name, rows) in zip(axes.T, everything.items(), strict=True):
        stats, nfes = _over_sources(summarise(rows)), _fixed_nfes(rows)
        for axis, grid in zip(column, ROWS, strict=True):
            worst = sorted(_curves(axis, stats, (grid, "adaptive")))
            axis.set(xscale="log", yscale="log", title=f"{TITLES[name][0]}, {grid} grid")
            axis.set_xticks(nfes, [str(n) for n in nfes])
            axis.xaxis.set_tick_params(which="minor", bottom=False, top=False, labelbottom=False)
            axis.set(xlabel="network evaluations", ylabel=TITLES[name][1])
            if len(worst) > 1:  # one arm that diverges hides nothing
                axis.set_ylim(top=min(2 * worst[-2], axis.get_ylim()[1]))
    handles = {h.get_label(): h for axis in axes.flat for h in axis.get_legend_handles_labels()[0]}
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=(len(handles) + 1) // 2, fontsize=8)
    figures.save(fig, stem, dpi=110)
    tables = [_table(name, rows) for name, rows in everything.items()]
    if "digits" in everything:
        tables.append(_differences(differences(everything["digits"]), f"{stem}-sources"))
    return "\n\n".join(tables + ([_bound_table(bound)] if bound else [])) + "\n"


def _over_sources(stats):
    """{(arm, grid, nfe): (mean, standard error)} averaged over sources, whose errors are independent."""
    groups = grouped((key[:3], value) for key, value in stats.items())
    return {key: (sum(m for m, _ in v) / len(v), sum(e**2 for _, e in v) ** 0.5 / len(v)) for key, v in groups.items()}


def _curves(axis, stats, grids):
    """Draw the arms, and return the largest error of each."""
    worst = []
    for arm in ARMS:
        chosen = ("sigma",) if ARMS[arm][2] in IN_SIGMA else grids
        points = sorted((k[2], *v) for k, v in stats.items() if k[0] == arm and k[1] in chosen)
        if points:
            nfe, mean, error = zip(*points, strict=True)
            axis.errorbar(nfe, mean, error, marker="o", markersize=3, color=COLORS[arm], label=arm, linewidth=1.1)
            worst.append(max(mean))
    for key, value in stats.items():
        if key[0] == "data":
            axis.axhline(value[0], color=figures.NEUTRAL, linestyle=":", linewidth=1)
    return worst


def _differences(found, stem):
    """Every arm's error less the reference's at the largest budget, per source, with 95 % intervals (Welch): drawn at `stem`,
    and as a table with the smallest p, and that after Holm's adjustment for all of the table.
    """
    sources = sorted({key[2] for key in found})
    names = list(dict.fromkeys(key[:2] for key in found))
    fig, axes = figures.figure(len(sources), 2.6, 0.2 * len(names) + 0.9, sharey=True, squeeze=False)
    for axis, source in zip(axes[0], sources, strict=True):
        mean, _, low, *_ = zip(*(found[(*name, source)] for name in names), strict=True)
        style = dict(fmt="o", markersize=4, color=figures.NEUTRAL)
        axis.errorbar(mean, range(len(names)), xerr=[m - end for m, end in zip(mean, low, strict=True)], **style)
        axis.axvline(0, color=figures.LINE["single"], linewidth=1)
        axis.set_yticks(range(len(names)), [f"{arm}, {grid}" for arm, grid in names])
        axis.set(title=f"source {source}", xlabel=f"FD less that of {REFERENCE}")
        axis.set_xscale("symlog", linthresh=3)
        axis.set_xticks([-3, 0, 3, 100], ["-3", "0", "3", "100"])
    axes[0, 0].invert_yaxis()
    figures.save(fig, stem, dpi=110)
    adjusted = dict(zip(found, holm([p for *_, p in found.values()]), strict=True))
    lines = []
    for name in names:
        keys = [(*name, source) for source in sources]
        values = [f"{mean:.3g} ({low:.3g} to {high:.3g})" for mean, _, low, high, _ in (found[key] for key in keys)]
        smallest = (min(table[key] for key in keys) for table in ({k: v[-1] for k, v in found.items()}, adjusted))
        lines.append([*name, *values, *(f"{p:.2g}" for p in smallest)])
    return markdown([f"less {REFERENCE}", "grid", *(f"source {s}" for s in sources), "smallest p", "after Holm"], lines)


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
