"""Loss and metric curves of runs, against trained images and against time."""

if not __package__:
    import _here

from pathlib import Path

import click

from dnnlib import cli
from dnnlib.util import one_of, read_stats
from simulations.sweeps import figure_stem, print_files

AXES = {
    "images": ("Progress/kimg", "trained images (thousands)"),
    "steps": ("Progress/iteration", "steps"),
    "time": ("Timing/total_sec", "seconds"),
    "cpu": ("Timing/cpu_sec", "CPU seconds"),
}
CURVES = ["Loss/loss", "Loss/validation", "Validation/ema_loss", "Validation/ema_L2_metric", "Selection/time_share"]


def draw(runs: dict[str, list[dict]], keys: list[str], axes: list[str], log: bool = True):
    """Figure with a row per key and a column per axis; runs: {name: lines of stats.jsonl}."""
    from metrics import figures

    fig, grid = figures.figure(columns=len(axes), rows=len(keys), width=4.2, height=2.6, squeeze=False)
    for row, key in zip(grid, keys, strict=True):
        for axis, which in zip(row, axes, strict=True):
            field, label = AXES[which]
            for i, (name, lines) in enumerate(runs.items()):
                points = [(line[field], line[key]) for line in lines if line.get(key) is not None and field in line]
                if points:
                    marker = "." if len(points) < 30 else None
                    axis.plot(*zip(*points, strict=True), f"C{i % 10}", label=name, marker=marker)  # a run, a colour
            values = [v for line in axis.get_lines() for v in line.get_ydata()]
            if log and values and min(values) > 0:
                axis.set_yscale("log")
            axis.set(xlabel=label, ylabel=key)
    handles = {line.get_label(): line for axis in grid.flat for line in axis.get_lines()}
    shown = {name: handles[name] for name in runs if name in handles}
    grid[0, 0].legend(shown.values(), shown, fontsize=7)
    return fig


@cli.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option(
    "--keys", type=cli.STRINGS, help=f"Fields of stats.jsonl; default: those present of {', '.join(CURVES)}, Process/*"
)
@click.option("--x", "axes", type=cli.STRINGS, default="images,time", help=f"Any of {', '.join(AXES)}")
@click.option("--log/--linear", default=True, help="Logarithmic where all values are positive")
@figure_stem("--save", "runs")
def main(runs, keys, axes, log, save):
    """Draw loss and metric curves of run folders, of the toy and of image training alike.

    \b
    Example:
      python simulations/plot_run.py simulations/results/tree-sweep/*-seed0 --x=images,cpu
    """
    unknown = set(axes) - set(AXES)
    if unknown:
        raise click.UsageError(f"--x={min(unknown)} {one_of(min(unknown), AXES)}")
    names = [Path(run).name for run in runs]
    names = names if len(set(names)) == len(names) else runs
    lines = {name: read_stats(run) for name, run in zip(names, runs, strict=True)}
    present = {key for run in lines.values() for line in run for key, value in line.items() if value is not None}
    missing = set(keys or ()) - present
    if missing:
        raise ValueError(f"--keys={sorted(missing)[0]} is in no stats.jsonl; there are: {', '.join(sorted(present))}")
    learned = sorted(key for key in present if key.startswith("Process/"))  # matrices
    keys = keys or [key for key in CURVES if key in present] + learned
    if not keys:
        raise ValueError(f"none of the usual fields is there; give --keys from {', '.join(sorted(present))}")
    from metrics import figures

    print_files(figures.save(draw(lines, keys, axes, log), save))


if __name__ == "__main__":
    main()
