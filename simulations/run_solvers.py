"""Error against network evaluations for every process and solver: a Gaussian (exact), a mixture, and trained digits."""

if not __package__:
    import _here

import json
import sys
from pathlib import Path

import click

from dnnlib import cells, cli
from dnnlib.util import write_text
from simulations.sweeps import decorators

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
SEEDS = click.option("--seeds", type=cli.SEEDS, default="0-3", help="Sampling seeds")
LEARNED = click.option("--learned", metavar="FILE|DIR", help="Snapshot of the learned process [random matrices]")
NET = click.option("--net", metavar="FILE|DIR", required=True, help="Snapshot of a network on small images")
DATA = click.option("--data", metavar="ZIP", required=True, help="Held-out images")
GRID = (
    click.option("--nfe", "nfes", type=cli.INTS, default="10,20,50,100,200", help="Network evaluations per sample"),
    click.option("--arms", type=cli.STRINGS, help="Some of the processes with their solvers [all]"),
    click.option("--grids", type=cli.STRINGS, default="sigma,uniform,quadratic", help="Time grids"),
    LEARNED,
    DEST,
)


def progress(items):
    from tqdm import tqdm

    return tqdm(items, unit="cell", file=sys.stderr)


def write(dest, name, rows):
    write_text(Path(dest) / f"{name}.json", json.dumps(rows, indent=1))


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
@decorators(GRID)
def gaussian(nfes, arms, grids, learned, dest):
    """N(0.3, 0.25): the exact Wasserstein error of every fixed-step solver, without Monte Carlo."""
    from simulations.studies import solvers

    chosen = solvers.cells(nfes, grids, arms)
    write(dest, "gaussian", solvers.exact_rows(chosen, read_learned(learned), progress))


@main.command()
@SEEDS
@click.option("--num", type=click.IntRange(min=16), default=4096, help="Samples")
@decorators(GRID)
def mixture(nfes, seeds, num, arms, grids, learned, dest):
    """Nine Gaussians with their exact denoiser: sliced Wasserstein error."""
    from simulations.studies import solvers

    chosen = solvers.cells(nfes, grids, arms)
    write(dest, "mixture", solvers.mixture_rows(chosen, seeds, num, read_learned(learned), progress))


@main.command()
@NET
@DATA
@click.option("--detector", metavar="FILE", required=True, help="Of calculate_metrics.py detector")
@SEEDS
@click.option("--per-source", type=click.IntRange(min=4), default=100, help="Samples per source and seed")
@decorators(GRID)
def digits(net, data, detector, nfes, seeds, per_source, arms, grids, learned, dest):
    """A trained denoiser: Frechet distance per source. Finished cells are kept, and so are other rows in the file."""
    from metrics.detectors import get_detectors
    from simulations.studies import solvers
    from torch_utils import persistence
    from training.dataset import ImageFolderDataset, load_arrays

    chosen = solvers.cells(nfes, grids, arms)
    path = Path(dest) / "digits.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if any(row.get("per_source") != per_source for row in rows):
        raise ValueError(
            f"--per-source={per_source}: {path} has rows of another number of samples; take another --dest"
        )
    dataset = ImageFolderDataset(data)
    images, labels = load_arrays(dataset)
    ids = labels.argmax(dim=1)
    heldout = {int(k): images[ids == k] for k in ids.unique()}
    ((name, judge),) = get_detectors(f"classifier:{detector}").items()
    snapshot, process = persistence.load_snapshot(net), read_learned(learned)
    inputs = [per_source, name, dataset.content_hash()]
    inputs += [cells.digest(persistence.resolve(file)) for file in (net, learned) if file]
    found = cells.run(
        [(seed, cell) for seed in seeds for cell in chosen],
        lambda seed, cell: solvers.digit_rows(snapshot, judge.features, heldout, cell, seed, per_source, process),
        Path(dest) / "digits",
        identity=lambda seed, cell: [seed, cell, inputs],
        progress=progress,
    )
    rows = {(solvers.cell_of(row), row["seed"], row["source"]): row for row in [*rows, *sum(found, [])]}
    write(dest, "digits", list(rows.values()))


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
    else:
        write_text(tables, text)


if __name__ == "__main__":
    main()
