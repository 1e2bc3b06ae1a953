"""Figure and tables of run_solvers.py: error against network evaluations, for every process, solver and grid."""

import json
import math
from pathlib import Path

from metrics import figures
from metrics.table import markdown, mean_and_error
from simulations.studies.solvers import ARMS, IN_SIGMA, REFERENCE, differences, summarise

TITLES = {
    "gaussian": ("Gaussian, exact", "Wasserstein error"),
    "mixture": ("nine Gaussians", "sliced Wasserstein error"),
    "digits": ("digits, trained denoiser", "Frechet distance, mean of sources"),
}
HUES = "333333 999999 D9730D C0392B 3C8F3A 2A6FBB 7FB2E5 8E44AD C58FD9 8C6D1F D4B75A"
COLORS = {arm: f"#{hue}" for arm, hue in zip(ARMS, HUES.split(), strict=True)}


def read(dest: str | Path) -> dict[str, list[dict]]:
    """{experiment: rows} of what lies in the folder. Raises ValueError if nothing does."""
    found = {name: Path(dest) / f"{name}.json" for name in (*TITLES, "bound")}
    rows = {name: json.loads(path.read_text()) for name, path in found.items() if path.is_file()}
    if not any(name in TITLES for name in rows):
        raise ValueError(f"--dest={dest}: no results; run run_solvers.py gaussian, mixture or digits first")
    return rows


def over_sources(stats: dict[tuple, tuple[float, float]]) -> dict[tuple, tuple[float, float]]:
    """{(arm, grid, nfe): (mean, standard error)} averaged over sources, whose errors are independent."""
    groups = {}
    for (arm, grid, nfe, _), value in stats.items():
        groups.setdefault((arm, grid, nfe), []).append(value)
    return {key: (sum(m for m, _ in v) / len(v), sum(e**2 for _, e in v) ** 0.5 / len(v)) for key, v in groups.items()}


def plot_solvers(dest: str | Path, stem: str | Path, grids: tuple = ("uniform", "quadratic")) -> str:
    """Draw one panel per experiment and grid at `stem`, and the agreement of the arms on digits at `stem`-sources.

    Returns Markdown tables. Arms without a time grid (Heun, RK45) are in both rows.
    """
    everything = read(dest)
    bound = everything.pop("bound", None)
    fig, axes = figures.figure(len(everything), 3.6, 3.0, rows=len(grids), squeeze=False)
    for column, (name, rows) in enumerate(everything.items()):
        stats = over_sources(summarise(rows))
        for line, grid in enumerate(grids):
            axis = axes[line, column]
            worst = sorted(_curves(axis, stats, (grid, "adaptive")))
            axis.set(xscale="log", yscale="log", title=f"{TITLES[name][0]}, {grid} grid")
            nfes = fixed_nfes(rows)
            axis.set_xticks(nfes, [str(n) for n in nfes])
            axis.xaxis.set_tick_params(which="minor", bottom=False, top=False, labelbottom=False)
            axis.set(xlabel="network evaluations", ylabel=TITLES[name][1])
            if len(worst) > 1:  # one arm that diverges hides nothing
                axis.set_ylim(top=min(2 * worst[-2], axis.get_ylim()[1]))
    handles = {h.get_label(): h for axis in axes.flat for h in axis.get_legend_handles_labels()[0]}
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=(len(handles) + 1) // 2, fontsize=8)
    figures.save(fig, stem, dpi=110)
    tables = [table(name, rows) for name, rows in everything.items()]
    if "digits" in everything:
        _agreement(everything["digits"], f"{stem}-sources")
        tables.append(difference_table(everything["digits"]))
    return "\n\n".join(tables + ([bound_table(bound)] if bound else [])) + "\n"


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


def _agreement(rows, stem):
    """Every arm's error less the reference's at the largest budget, a panel per source, with 2 standard errors."""
    found = differences(rows)
    sources = sorted({key[2] for key in found})
    names = list(dict.fromkeys(key[:2] for key in found))
    fig, axes = figures.figure(len(sources), 2.6, 0.2 * len(names) + 0.9, sharey=True, squeeze=False)
    for axis, source in zip(axes[0], sources, strict=True):
        values = [found[(*name, source)] for name in names]
        axis.errorbar(
            [v[0] for v in values], range(len(names)), xerr=[2 * v[1] for v in values], fmt="o", markersize=4,
            color=figures.NEUTRAL,
        )  # fmt: skip
        axis.axvline(0, color=figures.LINE["single"], linewidth=1)
        axis.set_yticks(range(len(names)), [f"{arm}, {grid}" for arm, grid in names])
        axis.set(title=f"source {source}", xlabel=f"FD less that of {REFERENCE}")
        axis.set_xscale("symlog", linthresh=3)
        axis.set_xticks([-3, 0, 3, 100], ["-3", "0", "3", "100"])
    axes[0, 0].invert_yaxis()
    figures.save(fig, stem, dpi=110)


def fixed_nfes(rows: list[dict]) -> list[int]:
    """The numbers of evaluations that were asked for."""
    return sorted({row["nfe"] for row in rows if row["nfe"] and "tolerance" not in row})


def number(value: tuple[float, float]) -> str:
    """mean +- standard error, without the latter where there is none."""
    mean, error = value
    return f"{mean:.3g}" + (f" ± {error:.1g}" if error else "")


def table(name: str, rows: list[dict]) -> str:
    """A line per arm and grid, a column per number of evaluations, mean +- standard error over seeds, per source."""
    sources = sorted({row["source"] for row in rows if "source" in row}) or [None]
    nfes, stats, lines, adaptive = fixed_nfes(rows), summarise(rows), [], []
    for arm, grid in dict.fromkeys((row["arm"], row["grid"]) for row in rows):
        if grid == "adaptive":
            found = sorted({key[2] for key in stats if key[:2] == (arm, grid)})
            values = [", ".join(number(stats[arm, grid, nfe, s]) for s in sources) for nfe in found]
            adaptive.append(f"{arm}: " + "; ".join(f"{v} at {n}" for n, v in zip(found, values, strict=True)))
            continue
        values = [[stats.get((arm, grid, nfe, s)) for s in sources] for nfe in (nfes if arm != "data" else (0,))]
        cells = [", ".join(number(v) if v else "-" for v in group) for group in values]
        lines.append([arm, grid, *cells, *[""] * (len(nfes) - len(cells))])
    return markdown([TITLES[name][0], "grid", *map(str, nfes)], lines) + "".join(f"\n\n{line}" for line in adaptive)


def difference_table(rows: list[dict]) -> str:
    """Error less the reference's at the largest budget, per source, with the largest deviation in standard errors."""
    found = differences(rows)
    sources = sorted({key[2] for key in found})
    lines = []
    for arm, grid in dict.fromkeys(key[:2] for key in found):
        values = [found[arm, grid, s] for s in sources]
        worst = max(abs(mean) / error if error else math.inf for mean, error in values)
        lines.append([arm, grid, *map(number, values), f"{worst:.1f}"])
    return markdown([f"less {REFERENCE}", "grid", *(f"source {s}" for s in sources), "largest / s.e."], lines)


def bound_table(rows: list[dict]) -> str:
    """Bits/dim per process, its difference from the first one per image, and the same with common draws."""
    by = {}
    for row in rows:
        by.setdefault((row["draws"], row["process"]), []).append(row["bits"])
    first, *others = dict.fromkeys(row["process"] for row in rows)
    lines = [[first, number(mean_and_error(by["own", first])), "", ""]]
    for name in others:
        own, common = ([a - b for a, b in zip(by[d, name], by[d, first], strict=True)] for d in ("own", "common"))
        gaps = [number(mean_and_error(own)), f"{max(map(abs, common)):.1g}"]
        lines.append([name, number(mean_and_error(by["own", name])), *gaps])
    ends = f"sigma {rows[0]['sigma_min']:.3g} to {rows[0]['sigma_max']:.3g}"
    return markdown(
        [f"bound, {ends}", "bits/dim", f"less {first}, own draws", "largest gap of an image, common draws"], lines
    )
