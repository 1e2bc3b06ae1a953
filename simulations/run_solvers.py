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
  python simulations/run_solvers.py digits --net=results/quickstart/runs/multi-seed0 \\
      --data=results/quickstart/data/heldout.zip --detector=results/quickstart/detector.safetensors
  python simulations/run_solvers.py plot --figure=docs/figures/linear-nfe
"""

DEST = click.option("--dest", metavar="DIR", default="results/linear", help="Where the rows go")
NFES = click.option("--nfe", "nfes", type=cli.INTS, default="10,20,50,100,200", help="Network evaluations per sample")
SEEDS = click.option("--seeds", type=cli.SEEDS, default="0-2", help="Sampling seeds")


def progress(items):
    return tqdm(items, unit="cell")


def write(dest, name, rows):
    with atomic_write(Path(dest) / f"{name}.json", "w") as file:
        json.dump(rows, file, indent=1)


@cli.group(epilog=EXAMPLES)
def main():
    """Sample one denoiser through many processes and solvers, and measure what it costs."""


@main.command()
@NFES
@DEST
def gaussian(nfes, dest):
    """N(0.3, 0.25): the exact Wasserstein error of every solver, without Monte Carlo."""
    from simulations.solvers import exact_rows

    write(dest, "gaussian", exact_rows(nfes, progress=progress))


@main.command()
@NFES
@SEEDS
@click.option("--num", type=click.IntRange(min=16), default=2048, help="Samples")
@DEST
def mixture(nfes, seeds, num, dest):
    """Nine Gaussians with their exact denoiser: sliced Wasserstein error."""
    from simulations.solvers import mixture_rows

    write(dest, "mixture", mixture_rows(nfes, seeds, num, progress=progress))


@main.command()
@click.option(
    "--net", metavar="FILE|DIR", required=True, help="Snapshot of a class-conditional network on small images"
)
@click.option("--data", metavar="ZIP", required=True, help="Held-out images")
@click.option("--detector", metavar="FILE", required=True, help="Of calculate_metrics.py detector")
@NFES
@SEEDS
@click.option("--per-source", type=click.IntRange(min=4), default=50, help="Samples per source and seed")
@click.option("--grids", type=cli.STRINGS, default="sigma,uniform,quadratic", help="Time grids")
@DEST
def digits(net, data, detector, nfes, seeds, per_source, grids, dest):
    """A trained denoiser: Frechet distance per source. Rows already in the file are kept, so it can go on."""
    from metrics.detectors import get_detectors
    from simulations.solvers import cells, digit_rows
    from torch_utils.persistence import load_snapshot
    from training.dataset import ImageFolderDataset, load_arrays

    images, labels = load_arrays(ImageFolderDataset(data))
    ids = labels.argmax(dim=1)
    heldout = {int(k): images[ids == k] for k in ids.unique()}
    judge = next(iter(get_detectors(f"classifier:{detector}").values()))
    path = Path(dest) / "digits.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    done = {(row["arm"], row["grid"], row["nfe"]) for row in rows}
    snapshot = load_snapshot(net)
    for cell in progress([c for c in cells(nfes, grids) if c not in done]):
        with torch.no_grad():
            rows.extend(digit_rows(snapshot, judge.features, heldout, [cell], seeds, per_source))
        write(dest, "digits", rows)


@main.command()
@click.option("--figure", metavar="STEM", default="docs/figures/linear-nfe", help="Figure without suffix")
@DEST
def plot(figure, dest):
    """Draw what there is, and print it as a table."""
    from simulations.plot_solvers import plot_solvers

    print(plot_solvers(dest, figure))


if __name__ == "__main__":
    main()
