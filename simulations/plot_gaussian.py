"""Figures of the Gaussian experiment from the files of run_gaussian.py."""

if not __package__:
    import _here

from pathlib import Path

import click

from dnnlib import cli
from simulations.configs import exact_fraction, shared_count
from simulations.sweeps import SIDES, figure_options, half_width, print_files, read_results

OPTIONS = figure_options("gaussian", "run_gaussian.py")
_PAPER_LABELS = {"K": "(a) Number of Sources", "n": "(b) Sample Size", "sim": "(c) Distribution Similarity"}


def plot_paper_panel(tag: str, results_dir: Path, figures_dir: Path, dpi: int = 200) -> list[Path]:
    """One panel of the paper's Figure 1: empirical TV (left axis) and sqrt(P/n) (right axis)."""
    from matplotlib.ticker import MaxNLocator

    from metrics import figures

    rows = read_results(results_dir, tag)
    x = [row[tag] for row in rows]
    fig, left = figures.figure()
    right = left.twinx()
    handles = []
    for axis, column, colors, line in (
        (left, "empirical TV", figures.EMPIRICAL, figures.EMPIRICAL_LINE),
        (right, "theoretical TV bound", figures.THEORETICAL, figures.THEORETICAL_LINE),
    ):
        curves = {side: [row[f"{column} of {side}"] for row in rows] for side in SIDES}
        for side, y in curves.items():
            handles += axis.plot(x, y, color=colors[side], label=f"{column.split()[0]}, {side}", **line)
        figures.pad(
            axis, sum(curves.values(), [])
        )  # each axis by its own range, as in the paper: compare shapes, not heights
        axis.yaxis.set_major_locator(MaxNLocator(5))
        axis.tick_params(labelsize=12)
        axis.grid(False)
    figures.x_ticks(left, x, share=0.16 if tag == "n" else 0.12)
    left.set_xlabel(_PAPER_LABELS[tag], fontsize=14)
    left.set_ylabel("Empirical TV Error", fontsize=14)
    right.set_ylabel("Theoretical Bound", fontsize=14)
    fig.legend(handles=handles, loc="outside upper center", ncols=2, columnspacing=1.2, handlelength=2.4)
    return figures.save(fig, Path(figures_dir) / f"gaussian_{tag}", dpi)


def plot_overview(results_dir: Path, figures_dir: Path, name: str = "gaussian", dpi: int = 200) -> list[Path]:
    """Three panels side by side: measured TV with error bands, and the exact expectation."""
    from metrics import figures

    fig, axes = figures.figure(columns=3, width=2.6, height=2.5)
    for letter, tag, axis in zip("abc", ("K", "n", "sim"), axes, strict=True):
        rows = read_results(results_dir, tag)
        x = [row[tag] for row in rows]
        fine, curve = _exact(tag, x, rows[0])
        for index, side in enumerate(SIDES):
            color = figures.LINE[side]
            y = [row[f"empirical TV of {side}"] for row in rows]
            half = [half_width(row[f"standard error of empirical {side}"], row["runs"]) for row in rows]
            lower, upper = ([a + s * b for a, b in zip(y, half, strict=True)] for s in (-1, 1))
            figures.band(axis, x, lower, upper, color=color)
            style = {"linestyle": "none", "marker": figures.MARKER[side], "markersize": 4.5, "color": color}
            label = f"{figures.LABEL[side]}, {rows[0]['runs']} run{'s' * (rows[0]['runs'] > 1)}"
            axis.plot(x, y, label=label, **style)
            label = f"{figures.LABEL[side]}, exact expectation"
            axis.plot(
                fine, [c[index] for c in curve], color=color, linestyle=figures.DASH[side], linewidth=1.3, label=label
            )
        figures.x_ticks(axis, x, log=tag == "n", share=0.2 if tag == "n" else 0.12)
        if tag == "n":
            figures.log_y(axis)
        axis.set_xlabel(f"({letter}) {figures.PANEL_LABELS[tag]}")
    axes[0].set_ylabel("Average TV error")
    figures.legend(fig, loc="outside upper center", ncols=2)
    return figures.save(fig, Path(figures_dir) / name, dpi)


def _exact(tag: str, x: list, row: dict) -> tuple[list, list[tuple[float, float]]]:
    """(positions, expected TV of single and multi there): more points than were simulated."""
    from simulations.gaussian_exact import expected_tv

    D = int(row["D"])
    if tag == "sim":
        shared = {value: shared_count(value, D) for value in x}
        if all(exact_fraction(value) * D == count for value, count in shared.items()):  # else a staircase
            shared |= {j / D: j for j in range(min(shared.values()), max(shared.values()) + 1)}
    else:
        low, high = min(x), max(x)
        grid = {round(low * (high / low) ** (i / 40)) for i in range(41)}
        shared = dict.fromkeys(grid | {int(v) for v in x}, shared_count(row["sim"], D))
    fine = sorted(shared)
    cells = [row | {tag: value} for value in fine]
    return fine, [expected_tv(int(c["K"]), int(c["n"]), D, D - shared[v]) for v, c in zip(fine, cells, strict=True)]


def paper_panel_command(tag: str) -> click.Command:
    """The command behind plot_gaussian_K.py, _n.py and _sim.py."""

    @cli.command(help=f"Draw gaussian_{tag}.png and .svg: Figure 1 {_PAPER_LABELS[tag]}.")
    @OPTIONS
    def command(results_dir, figures_dir, dpi):
        print_files(plot_paper_panel(tag, results_dir, figures_dir, dpi))

    return command


@cli.command()
@OPTIONS
@click.option("--name", default="gaussian", help="File name without suffix")
def main(results_dir, figures_dir, dpi, name):
    """Draw the three sweeps side by side, with error bands and exact expected errors.

    \b
    Examples:
      python simulations/run_gaussian.py --tag=all
      python simulations/plot_gaussian.py
    """
    print_files(plot_overview(results_dir, figures_dir, name, dpi))


if __name__ == "__main__":
    main()
