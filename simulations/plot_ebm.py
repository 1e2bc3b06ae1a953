"""Figure of the energy-based experiment from the files of run_ebm.py."""

import json
import sys
from pathlib import Path

import click

if not __package__:  # run as a file: the packages are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulations.theory_io import FIGURES_DIR, RESULTS_DIR, OneLineCommand  # noqa: E402

TAGS = ["K", "n", "sim"]


# fmt: off  (one option a line)
@click.command(cls=OneLineCommand)
@click.option(
    "--results-dir",
    "--results_dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS_DIR / "ebm" / "small",
    show_default="simulations/results/ebm/small",
    help="Where run_ebm.py wrote.",
)
@click.option(
    "--figures-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=FIGURES_DIR,
    show_default="simulations/figures",
    help="Where the figure goes.",
)
@click.option("--tag", "tags", type=click.Choice(TAGS), multiple=True, help="Sweeps to draw, repeated.  [default: all]")
@click.option("--name", default="ebm", show_default=True, help="File name without suffix.")
@click.option("--dpi", type=click.IntRange(50, 1200), default=200, show_default=True, help="Resolution of the PNG.")
def main(results_dir, figures_dir, tags, name, dpi):
    """Draw ebm.png and .svg: TV errors and the ratio multi/single, measured and predicted.

    \b
    Examples:
      python simulations/run_ebm.py
      python simulations/plot_ebm.py
    """
    from simulations.sweep_figure import plot_sweeps

    files = plot_sweeps(list(tags) or TAGS, results_dir, figures_dir, name, dpi)
    print(json.dumps({"files": [str(f) for f in files]}))


# fmt: on


if __name__ == "__main__":
    main()
