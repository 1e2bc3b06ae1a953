"""Curves of training runs, against trained images or time; several runs are overlaid."""

if not __package__:
    import _here

from pathlib import Path

import click

from dnnlib import cli
from dnnlib.util import one_of
from simulations.sweeps import figure_stem, print_files

AXES = ("images", "steps", "time", "cpu")


@cli.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--keys", type=cli.STRINGS, help="Fields of stats.jsonl, a panel each; default: all usual ones there are")
@click.option("--x", "axes", type=cli.STRINGS, default="images", help=f"Any of {', '.join(AXES)}")
@click.option("--log/--linear", default=True, help="Logarithmic where positive values differ much")
@figure_stem("runs")
def main(runs, keys, axes, log, save):
    """Draw run folders, of the toy and of image training alike: loss, validation by noise level and source, learning rate,
    throughput, learned processes, and scores of snapshots by weight average.

    \b
    Example:
      python simulations/plot_run.py simulations/results/tree-sweep/*-seed0 --x=images,cpu
    """
    unknown = set(axes) - set(AXES)
    if unknown:
        raise click.UsageError(f"--x={min(unknown)} {one_of(min(unknown), AXES)}")
    from metrics import curves, figures

    names = [Path(run).name for run in runs]
    names = names if len(set(names)) == len(names) else runs
    lines = {name: curves.read_run(run) for name, run in zip(names, runs, strict=True)}
    if not curves.panels(lines, keys):
        present = sorted({key for run in lines.values() for line in run for key in line})
        raise ValueError(f"none of the usual fields is there; give --keys from {', '.join(present)}")
    print_files(figures.save(curves.draw(lines, keys, axes, log), save))


if __name__ == "__main__":
    main()
