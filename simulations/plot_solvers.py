"""Figure and table of run_solvers.py: error against network evaluations, for every process, solver and grid."""

import json
from pathlib import Path

from simulations import style
from simulations.solvers import ARMS, summarise

TITLES = {
    "gaussian": ("Gaussian, exact", "Wasserstein error"),
    "mixture": ("nine Gaussians", "sliced Wasserstein error"),
    "digits": ("digits, trained denoiser", "Frechet distance, mean of sources"),
}
COLORS = dict(zip(ARMS, ("#333333", "#D9730D", "#C0392B", "#3C8F3A", "#2A6FBB", "#8E44AD", "#8C6D1F"), strict=True))


def read(dest):
    """{experiment: rows} of what lies in the folder. Raises ValueError if nothing does."""
    found = {name: Path(dest) / f"{name}.json" for name in TITLES}
    rows = {name: json.loads(path.read_text()) for name, path in found.items() if path.is_file()}
    if not rows:
        raise ValueError(f"--dest={dest}: no results; run run_solvers.py gaussian, mixture or digits first")
    return rows


def over_sources(stats):
    """{(arm, grid, nfe): (mean, standard error)} averaged over sources, whose errors are independent."""
    groups = {}
    for (arm, grid, nfe, _), value in stats.items():
        groups.setdefault((arm, grid, nfe), []).append(value)
    return {key: (sum(m for m, _ in v) / len(v), sum(e**2 for _, e in v) ** 0.5 / len(v)) for key, v in groups.items()}


def plot_solvers(dest, stem, grids=("uniform", "quadratic")):
    """Draw one panel per experiment and grid at `stem`; returns a Markdown table."""
    everything = read(dest)
    fig, axes = style.figure(len(everything), 3.6, 3.0, rows=len(grids), squeeze=False)
    for column, (name, rows) in enumerate(everything.items()):
        stats = over_sources(summarise(rows))
        for line, grid in enumerate(grids):
            axis = axes[line, column]
            for arm in ARMS:
                points = sorted(
                    (k[2], *v)
                    for k, v in stats.items()
                    if k[0] == arm and k[1] in (grid, "sigma"[: 5 * (arm == "EDM Heun")])
                )
                if points:
                    nfe, mean, error = zip(*points, strict=True)
                    axis.errorbar(
                        nfe, mean, error, marker="o", markersize=3, color=COLORS[arm], label=arm, linewidth=1.1
                    )
            floor = [v[0] for k, v in stats.items() if k[0] == "data"]
            if floor:
                axis.axhline(floor[0], color=style.NEUTRAL, linestyle=":", linewidth=1)
            axis.set(xscale="log", yscale="log", title=f"{TITLES[name][0]}, {grid} grid")
            nfes = sorted({row["nfe"] for row in rows if row["nfe"]})
            axis.set_xticks(nfes, [str(n) for n in nfes])
            axis.xaxis.set_tick_params(which="minor", bottom=False, top=False, labelbottom=False)
            nfes = sorted({row["nfe"] for row in rows if row["nfe"]})
            axis.set_xticks(nfes, [str(n) for n in nfes])
            axis.xaxis.set_tick_params(which="minor", bottom=False, top=False, labelbottom=False)
            axis.set(xlabel="network evaluations", ylabel=TITLES[name][1])
    axes[0, 0].legend(fontsize=7)
    style.save(fig, stem, dpi=110)
    return "\n\n".join(table(name, rows) for name, rows in everything.items()) + "\n"


def table(name, rows):
    """Markdown: a line per arm and grid, a column per number of evaluations, mean +- standard error over seeds."""
    sources = sorted({row["source"] for row in rows if "source" in row}) or [None]
    nfes = sorted({row["nfe"] for row in rows if row["nfe"]})
    stats = summarise(rows)
    lines = [f"| {TITLES[name][0]} | grid |" + "".join(f" {n} |" for n in nfes), "| --- | --- |" + " --- |" * len(nfes)]
    for arm, grid in dict.fromkeys((row["arm"], row["grid"]) for row in rows):
        cells = []
        for nfe in nfes if arm != "data" else (0,):
            values = [stats.get((arm, grid, nfe, s)) for s in sources]
            spread = all(v and v[1] for v in values)
            cells.append(", ".join(f"{v[0]:.3g}" + (f" ± {v[1]:.1g}" if spread else "") if v else "-" for v in values))
        lines.append(f"| {arm} | {grid} |" + "".join(f" {cell} |" for cell in cells))
    return "\n".join(lines)
