"""Densities in the plane: train on points by the real loop, sample through any process and solver, plot."""

if not __package__:
    import _here

import json
from dataclasses import dataclass

import click
import numpy as np

from dnnlib import atomic_write, cli, outputs
from dnnlib.options import from_options, opt, options
from dnnlib.util import write_json
from training.config import RUN
from training.sampling import ProcessChoice

EXAMPLES = """
\b
Examples:
  # CLD's toy problem: train, then trajectories, score field, densities and likelihood in one picture
  python simulations/run_toy.py train --dataset=multimodal_swissroll --outdir=results/toy --process=cld \\
      --process-options=M=0.25,beta=4:4 --weighting=reweightedv2 --time-sampling=uniform
  python simulations/run_toy.py sample --net=results/toy --process=cld --solver=sscs --steps=50 --dest=points.npz
  python simulations/run_toy.py plot --net=results/toy --process=cld --figure=figures/toy
"""
SCORES = outputs.Kind("scores of a network of points", outputs.json_with("sliced_w2"))
POINTS = outputs.Kind("a file of points", outputs.zip_with("points.npy"))
NET = click.option("--net", metavar="FILE|DIR", required=True, help="Snapshot of a network of points, or run folder")


@dataclass
class Training(ProcessChoice):
    """What is trained."""

    dataset: str = opt("multimodal_swissroll", "Of simulations/toy_data.py", metavar="NAME")
    points: int = opt(1 << 15, "Points of the data set", type=cli.NIMG, at_least=1)
    preset: str | None = opt(None, "Everything below as published, but for what is given", choices=("cld-toy",))
    arch: str = opt(
        "residual", "A denoiser, or CLD's networks of the whole state", choices=("residual", "mlp", "resnet")
    )
    prediction: str | None = opt(None, "Of mlp, resnet", choices=("noise", "score", "mixed"), shown="noise")
    transition: str | None = opt(None, "Of mlp, resnet", choices=("hybrid", "conditional"), shown="hybrid")
    objective: str | None = opt(None, "Of mlp, resnet", choices=("noise", "elbo"), shown="noise")
    cov_eps: float | None = opt(None, "Of mlp, resnet: added to covariances (CLD: 1e-6)", at_least=0, shown="0")
    time_sampling: str | None = opt(None, "Law of t", choices=("uniform", "importance", "snr"), shown="the loss's own")
    weighting: str | None = opt(
        None, "Of the loss", choices=("likelihood", "reweightedv1", "reweightedv2"), shown="the loss's own"
    )
    t_min: float | None = opt(None, "Lowest t; default: where sigma is 0.002, of mlp and resnet 1e-3", above=0)
    steps: int | None = opt(
        None, "Training steps", "--train-steps", "--steps", at_least=1, shown="2000, or the preset's"
    )
    batch: int = opt(512, "Points per step", at_least=1)
    lr: float | None = opt(None, "Learning rate", above=0, shown="2e-3, or the preset's")
    hidden_dim: int | None = opt(None, "Width of the network", "--channels", at_least=2, shown="128; resnet: 64")
    seed: int = opt(0, "Of everything random", at_least=0)


@dataclass
class Way(ProcessChoice):
    """How points are sampled."""

    solver: str = opt("sscs", "How to get back", choices=("em", "sscs", "flow"))
    time_grid: str = opt("quadratic", "Grid of steps", choices=("sigma", "uniform", "quadratic"))
    prior: str = opt("matched", "Start", choices=("matched", "stationary"))
    steps: int = opt(100, "Solver steps", at_least=1)
    num: int = opt(2048, "Points", at_least=1)
    seed: int = opt(0, "Of everything random", at_least=0)


@dataclass
class Measured:
    """How a network is measured as CLD does."""

    num: int = opt(10000, "Samples of every solver; a fifth of them for the likelihood", at_least=10)
    tolerance: float = opt(1e-5, "Of the adaptive flow", above=0)
    seed: int = opt(0, "Of everything random", at_least=0)


@cli.group(epilog=EXAMPLES)
def main():
    """Train, sample and plot on 2-D data: multimodal_swissroll, diamond, 25gaussians, rings, mixture, tree."""


@main.command()
@cli.output("--outdir", RUN, metavar="DIR", required=True, help="Run folder")
@options(Training)
def train(outdir, **given):
    """Train a denoiser of points, with EDM's noise levels or a process's own."""
    from simulations import toy

    toy.train(from_options(Training, given), outdir)


@main.command()
@NET
@options(Way)
@cli.output("--dest", POINTS, metavar="NPZ", required=True, help="points [n, 2], times, states [steps + 1, n, V, 2]")
def sample(net, dest, **given):
    """Sample points, and keep the way of every variable."""
    from simulations import toy

    way = from_options(Way, given)
    snapshot, process = toy.open_points(net, way)
    points, times, states = toy.trajectories(snapshot.net, process, way)
    with atomic_write(dest) as file:
        np.savez(file, points=points.numpy(), times=times, states=states.float().numpy())


@main.command()
@NET
@options(Measured)
@cli.output("--dest", SCORES, metavar="JSON", required=True, help="Scores")
def compare(net, dest, **given):
    """CLD's solvers at 20 and 50 evaluations and the likelihood bound of a network of the whole state, as CLD measures."""
    from simulations.studies import cld_toy

    write_json(dest, cld_toy.measure(net, from_options(Measured, given)))


@main.command()
@click.option("--scores", metavar="GLOB", required=True, help="Files of compare")
@cli.output(
    "--dest", outputs.TABLE, metavar="CSV", required=True, help="A line per network; the table beside it as .md"
)
def table(scores, dest):
    """Networks of compare beside those of the official code."""
    from simulations.studies import cld_toy

    print(cld_toy.table(scores, dest))


@main.command()
@NET
@click.option("--dataset", metavar="NAME", help="Default: what the network was trained on")
@options(Way)
@cli.output("--figure", outputs.FIGURE, metavar="STEM", default="figures/toy", help="Figure without suffix")
def plot(net, dataset, figure, **given):
    """Trajectories of data and auxiliaries, score field, density against truth; prints quality and likelihood as JSON."""
    from simulations import toy

    way = from_options(Way, given)
    snapshot, process = toy.open_points(net, way)
    dataset = dataset or snapshot.header.get("dataset", {}).get("path", "")
    print(json.dumps(toy.plot(snapshot.net, process, dataset, figure, way), indent=2))


if __name__ == "__main__":
    main()
