"""Error against network evaluations for every process and solver: a Gaussian (exact), a mixture, and trained digits."""

import json
from pathlib import Path

import click
import torch
from tqdm import tqdm

from dnnlib import atomic_write, cli

EXAMPLES = """
\b
Examples:
  python simulations/run_solvers.py gaussian
  python simulations/run_solvers.py mixture --seeds=0-3
  # The whole experiment on digits: data, detector, training, all of the below (an hour of one core)
  python run_experiment.py experiments/linear-digits.yaml
  python simulations/run_solvers.py digits --net=results/linear-digits/runs/denoiser \\
      --data=results/linear-digits/data/heldout.zip --detector=results/linear-digits/detector.safetensors
  python simulations/run_solvers.py bound --net=results/linear-digits/runs/denoiser \\
      --data=results/linear-digits/data/heldout.zip
  python simulations/run_solvers.py plot --figure=docs/figures/linear-nfe
"""

DEST = click.option("--dest", metavar="DIR", default="results/linear", help="Where the rows go")
NFES = click.option("--nfe", "nfes", type=cli.INTS, default="10,20,50,100,200", help="Network evaluations per sample")
SEEDS = click.option("--seeds", type=cli.SEEDS, default="0-3", help="Sampling seeds")
ARMS = click.option("--arms", type=cli.STRINGS, help="Some of the processes with their solvers [all]")
GRIDS = click.option("--grids", type=cli.STRINGS, default="sigma,uniform,quadratic", help="Time grids")
LEARNED = click.option("--learned", metavar="FILE|DIR", help="Snapshot of the learned process [random matrices]")
NET = click.option("--net", metavar="FILE|DIR", required=True, help="Snapshot of a network on small images")
DATA = click.option("--data", metavar="ZIP", required=True, help="Held-out images")


def progress(items):
    return tqdm(items, unit="cell")


def write(dest, name, rows):
    with atomic_write(Path(dest) / f"{name}.json", "w") as file:
        json.dump(rows, file, indent=1)


def read_learned(path):
    """The learned process of a snapshot, or None. Raises ValueError if it holds none."""
    from torch_utils.persistence import load_snapshot
    from training.processes import Learned

    if path is None:
        return None
    process = load_snapshot(path).process
    if not isinstance(process, Learned):
        raise ValueError(f"--learned={path} holds no learned process; train one with --process=learned")
    return process.requires_grad_(False)


@cli.group(epilog=EXAMPLES)
def main():
    """Sample one denoiser through many processes and solvers, and measure what it costs."""


@main.command()
@NFES
@ARMS
@GRIDS
@LEARNED
@DEST
def gaussian(nfes, arms, grids, learned, dest):
    """N(0.3, 0.25): the exact Wasserstein error of every fixed-step solver, without Monte Carlo."""
    from simulations.studies.solvers import cells, choose_arms, exact_rows

    chosen = cells(nfes, grids, choose_arms(arms))
    write(dest, "gaussian", exact_rows(chosen, learned=read_learned(learned), progress=progress))


@main.command()
@NFES
@SEEDS
@click.option("--num", type=click.IntRange(min=16), default=4096, help="Samples")
@ARMS
@GRIDS
@LEARNED
@DEST
def mixture(nfes, seeds, num, arms, grids, learned, dest):
    """Nine Gaussians with their exact denoiser: sliced Wasserstein error."""
    from simulations.studies.solvers import cells, choose_arms, mixture_rows

    chosen = cells(nfes, grids, choose_arms(arms))
    write(dest, "mixture", mixture_rows(chosen, seeds, num, learned=read_learned(learned), progress=progress))


@main.command()
@NET
@DATA
@click.option("--detector", metavar="FILE", required=True, help="Of calculate_metrics.py detector")
@NFES
@SEEDS
@click.option("--per-source", type=click.IntRange(min=4), default=100, help="Samples per source and seed")
@ARMS
@GRIDS
@LEARNED
@DEST
def digits(net, data, detector, nfes, seeds, per_source, arms, grids, learned, dest):
    """A trained denoiser: Frechet distance per source. Cells and seeds that are in the file already are kept."""
    from metrics.detectors import get_detectors
    from simulations.studies.solvers import cell_of, cells, choose_arms, digit_rows
    from torch_utils.persistence import load_snapshot
    from training.dataset import ImageFolderDataset, load_arrays

    images, labels = load_arrays(ImageFolderDataset(data))
    ids = labels.argmax(dim=1)
    heldout = {int(k): images[ids == k] for k in ids.unique()}
    judge = next(iter(get_detectors(f"classifier:{detector}").values()))
    path = Path(dest) / "digits.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    if any(row.get("per_source") != per_source for row in rows):
        raise ValueError(
            f"--per-source={per_source}: {path} has rows of another number of samples; take another --dest"
        )
    done = {(cell_of(row), row["seed"]) for row in rows}
    snapshot, learned = load_snapshot(net), read_learned(learned)
    chosen = cells(nfes, grids, choose_arms(arms))
    for seed, cell in progress([(s, c) for s in seeds for c in chosen if (c, s) not in done]):
        with torch.no_grad():
            rows.extend(digit_rows(snapshot, judge.features, heldout, cell, seed, per_source, learned))
        write(dest, "digits", rows)


@main.command()
@NET
@DATA
@click.option("--samples", type=click.IntRange(min=1), default=64, help="Network evaluations per image and process")
@click.option("--num", type=click.IntRange(min=2), default=300, help="Images, at most")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the draws")
@LEARNED
@DEST
def bound(net, data, samples, num, seed, learned, dest):
    """Bits/dim through every process between the same ends: once with draws of their own, once with common ones."""
    from simulations.studies.solvers import bound_rows
    from torch_utils.persistence import load_snapshot
    from training.dataset import ImageFolderDataset, load_arrays

    images, labels = load_arrays(ImageFolderDataset(data))
    images, labels = images[:num].float() / 127.5 - 1, labels[:num]
    net, learned = load_snapshot(net).net, read_learned(learned)
    labels = labels if getattr(net, "label_dim", 0) else None
    rows = []
    for draws in ("own", "common"):
        found = bound_rows(net, images, labels, samples, draws == "common", seed, learned, progress)
        rows += [dict(row, draws=draws) for row in found]
    write(dest, "bound", rows)


@main.command()
@click.option("--figure", metavar="STEM", default="docs/figures/linear-nfe", help="Figure without suffix")
@click.option("--tables", metavar="FILE", help="Write the tables there instead of printing them")
@DEST
def plot(figure, tables, dest):
    """Draw what there is, and print it as Markdown tables."""
    from simulations.studies.solvers_report import plot_solvers

    text = plot_solvers(dest, figure)
    if tables is None:
        print(text)
        return
    with atomic_write(tables, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
