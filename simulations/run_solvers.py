"""Error against network evaluations for every process and solver: a Gaussian (exact), a mixture, and trained digits."""

if not __package__:
    import _here

import json
from dataclasses import dataclass
from pathlib import Path

import click

from dnnlib import cli, outputs
from dnnlib.options import from_options, opt, options
from dnnlib.util import write_text

EXAMPLES = """
\b
Examples:
  python simulations/run_solvers.py gaussian
  python simulations/run_solvers.py mixture --seeds=0-3
  # The whole experiment on digits: data, detector, training, all of the below (an hour of one core)
  python run_experiment.py experiments/linear-digits.yaml
  python simulations/run_solvers.py digits --net=results/linear-digits/runs/denoiser-seed0 \\
      --data=results/linear-digits/data/heldout-seed0.zip --detector=results/linear-digits/detector.safetensors
  python simulations/run_solvers.py bound --net=results/linear-digits/runs/denoiser-seed0 \\
      --data=results/linear-digits/data/heldout-seed0.zip
  python simulations/run_solvers.py plot --figure=docs/figures/linear-nfe
"""


@dataclass
class Study:
    """Which cells are sampled, and where their rows go."""

    nfes: list = opt([10, 20, 50, 100, 200], "Network evaluations per sample", "--nfe", type=cli.INTS)
    arms: list = opt([], "Some of the processes with their solvers [all]", type=cli.STRINGS)
    grids: list = opt(["sigma", "uniform", "quadratic"], "Time grids", type=cli.STRINGS)
    learned: str | None = opt(None, "Snapshot of the learned process [random matrices]", metavar="FILE|DIR")
    dest: str = opt("results/linear", "Where the rows go", "--outdir", "--dest", metavar="DIR", writes=outputs.RESULTS)


WITHOUT_CELLS = ("nfes", "arms", "grids")
SEEDS = click.option("--seeds", type=cli.SEEDS, default="0-3", help="Sampling seeds")
NET = click.option("--net", metavar="FILE|DIR", required=True, help="Snapshot of a network on small images")
DATA = click.option("--data", metavar="ZIP", required=True, help="Held-out images")


def measure(name: str, given: dict, *arguments) -> None:
    """Write the rows of one experiment to DEST/NAME.json."""
    from simulations.studies import solvers  # late: torch takes seconds to import, --help should not

    study = from_options(Study, given)
    rows = solvers.EXPERIMENTS[name](study, *arguments)
    write_text(Path(study.dest) / f"{name}.json", json.dumps(rows, indent=1))


@cli.group(epilog=EXAMPLES)
def main():
    """Sample one denoiser through many processes and solvers, and measure what it costs."""


@main.command()
@options(Study)
def gaussian(**given):
    """N(0.3, 0.25): the exact Wasserstein error of every fixed-step solver, without Monte Carlo."""
    measure("gaussian", given)


@main.command()
@SEEDS
@click.option("--num", type=click.IntRange(min=16), default=4096, help="Samples")
@options(Study)
def mixture(seeds, num, **given):
    """Nine Gaussians with their exact denoiser: sliced Wasserstein error."""
    measure("mixture", given, seeds, num)


@main.command()
@NET
@DATA
@click.option("--detector", metavar="FILE", required=True, help="Of calculate_metrics.py detector")
@SEEDS
@click.option("--per-source", type=click.IntRange(min=4), default=100, help="Samples per source and seed")
@options(Study)
def digits(net, data, detector, seeds, per_source, **given):
    """A trained denoiser: Fréchet distance per source. Finished cells are kept, and so are other rows in the file."""
    measure("digits", given, net, data, detector, seeds, per_source)


@main.command()
@NET
@DATA
@click.option("--samples", type=click.IntRange(min=1), default=64, help="Network evaluations per image and process")
@click.option("--num", type=click.IntRange(min=2), default=300, help="Images, at most")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the draws")
@options(Study, WITHOUT_CELLS)
def bound(net, data, samples, num, seed, **given):
    """Bits/dim through every process between the same ends: once with draws of their own, once with common ones."""
    measure("bound", given, net, data, num, samples, seed)


@main.command()
@cli.output("--figure", outputs.FIGURE, metavar="STEM", default="docs/figures/linear-nfe", help="Figure without suffix")
@cli.output("--tables", outputs.TABLE, metavar="FILE", help="Write the tables there instead of printing them")
@options(Study, [*WITHOUT_CELLS, "learned"])
def plot(figure, tables, **given):
    """Draw what there is in --outdir and its folders seed*, and print it as Markdown tables."""
    from simulations.studies.solvers_report import plot_solvers

    text = plot_solvers(from_options(Study, given).dest, figure)
    if tables is None:
        print(text)
    else:
        write_text(tables, text)


if __name__ == "__main__":
    main()
