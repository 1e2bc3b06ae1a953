"""Densities in the plane: train on points by the real loop, sample through any process and solver, plot."""

if not __package__:
    import _here

import json
from pathlib import Path

import click
import numpy as np

from dnnlib import atomic_write, cli
from dnnlib.options import options as fields
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

NET = click.option(
    "--net", metavar="FILE|DIR", required=True, help="Snapshot of a network of points, or its run folder"
)
SOLVER = click.option("--solver", metavar="NAME", default="sscs", help="em, sscs or flow")
GRID = click.option(
    "--time-grid", type=click.Choice(["sigma", "uniform", "quadratic"]), default="quadratic", help="Grid of steps"
)
PRIOR = click.option("--prior", type=click.Choice(["matched", "stationary"]), default="matched", help="Start")
STEPS = click.option("--steps", type=click.IntRange(min=1), default=100, help="Solver steps")
NUM = click.option("--num", type=click.IntRange(min=1), default=2048, help="Points")
SEED = click.option("--seed", type=click.IntRange(min=0), default=0, help="Of everything random")


@cli.group(epilog=EXAMPLES)
def main():
    """Train, sample and plot on 2-D data: multimodal_swissroll, diamond, 25gaussians, rings, mixture, tree."""


@main.command()
@click.option("--dataset", metavar="NAME", default="multimodal_swissroll", help="Of simulations/toy_data.py")
@click.option("--outdir", metavar="DIR", required=True, help="Run folder")
@fields(ProcessChoice)
@click.option("--time-sampling", type=click.Choice(["uniform", "importance", "snr"]), default="snr", help="Law of t")
@click.option(
    "--weighting",
    type=click.Choice(["likelihood", "reweightedv1", "reweightedv2"]),
    default="likelihood",
    help="Of the loss",
)
@click.option("--t-min", type=cli.Float(min=0, min_open=True), help="Lowest t; default: where sigma is 0.002")
@click.option("--steps", type=click.IntRange(min=1), default=2000, help="Training steps")
@click.option("--batch", type=click.IntRange(min=1), default=512, help="Points per step")
@click.option("--lr", type=cli.Float(), default=2e-3, help="Learning rate")
@click.option("--channels", "hidden_dim", type=click.IntRange(min=2), default=128, help="Width of the network")
@SEED
def train(outdir, process, **options):
    """Train a denoiser of points, with EDM's noise levels or a process's own."""
    from simulations import toy

    toy.train(outdir=Path(outdir), process=process or "edm", **options)


def _open(net, process, options):
    from torch_utils.persistence import load_snapshot
    from training.processes import is_linear
    from training.processes.options import make_process

    snapshot = load_snapshot(net)
    if snapshot.net.img_channels != 2 or snapshot.net.img_resolution != 1:
        raise ValueError(f"--net={net}: not a network of points; train one with run_toy.py train")
    if process is None and not options and is_linear(snapshot.process):
        return snapshot, snapshot.process
    return snapshot, make_process(process or "cld", options, trained=snapshot.process)


@main.command()
@NET
@fields(ProcessChoice)
@SOLVER
@GRID
@PRIOR
@STEPS
@NUM
@SEED
@click.option("--dest", metavar="NPZ", required=True, help="points [n, 2], times, states [steps + 1, n, V, 2]")
def sample(net, process, process_options, time_grid, dest, **options):
    """Sample points, and keep the way of every variable."""
    from simulations import toy

    snapshot, process = _open(net, process, process_options)
    points, times, states = toy.trajectories(snapshot.net, process, grid=time_grid, **options)
    with atomic_write(dest) as file:
        np.savez(file, points=points.numpy(), times=times, states=states.float().numpy())


@main.command()
@NET
@click.option("--dataset", metavar="NAME", help="Default: what the network was trained on")
@fields(ProcessChoice)
@SOLVER
@GRID
@PRIOR
@STEPS
@NUM
@SEED
@click.option("--figure", metavar="STEM", default="figures/toy", help="Figure without suffix")
def plot(net, dataset, process, process_options, time_grid, figure, **options):
    """Trajectories of data and auxiliaries, score field, density against truth; prints quality and likelihood as JSON."""
    from simulations import toy

    snapshot, process = _open(net, process, process_options)
    dataset = dataset or snapshot.header.get("dataset", {}).get("path", "")
    print(json.dumps(toy.plot(snapshot.net, process, dataset, figure, grid=time_grid, **options), indent=2))


if __name__ == "__main__":
    main()
