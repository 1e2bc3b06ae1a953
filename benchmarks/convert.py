"""How much faster `dataset_tool.py convert` is on more cores, a worker each: wall time, turn by turn, on JPEGs as of ImageNet.

    OMP_NUM_THREADS=1 python benchmarks/convert.py [--images 3000] [--workers 1,2] [--repeats 5]

Other load only adds: the ratio is that of the smallest times. The data sets are compared byte by byte.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import PIL.Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import cli
from training.dataset.convert import convert

KINDS = {
    "64x64, center-crop": dict(resolution=(64, 64), transform="center-crop"),
    "256x256, center-crop-dhariwal": dict(resolution=(256, 256), transform="center-crop-dhariwal"),
}


def photos(folder: Path, count: int) -> None:
    """JPEGs of about 500x375 in ten class folders: noise at several scales, qualities 88 to 96, some 100 KB each."""
    rng = np.random.RandomState(0)
    for i in range(count):
        size = tuple(np.maximum(rng.normal([500, 375], [60, 50]), 200).astype(int))
        layers = [
            PIL.Image.fromarray(rng.randint(0, 256, [k, k, 3], np.uint8)).resize(size, PIL.Image.BICUBIC)
            for k in (4, 12, 40, 120)
        ]
        pixels = np.mean([np.asarray(layer, np.float32) for layer in layers], axis=0)
        pixels += rng.normal(0, 6, pixels.shape[:2])[..., None]
        path = folder / f"class{i % 10}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=int(rng.randint(88, 97)))


@cli.command()
@click.option("--images", default=3000, show_default=True, type=click.IntRange(min=1))
@click.option("--workers", default="1,2", show_default=True, type=cli.INTS, help="Compared with the first of them")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(min=1))
def main(images, workers, repeats):
    """Print a Markdown table: seconds (smallest of the turns) and ratios."""
    with tempfile.TemporaryDirectory() as folder:
        source, dest = Path(folder) / "photos", Path(folder) / "data.zip"
        photos(source, images)
        cores = sorted(os.sched_getaffinity(0))
        print("| | workers, cores | seconds (all turns) | ratio |\n| --- | --- | --- | --- |")
        for name, options in KINDS.items():
            seconds, contents = {count: [] for count in workers}, set()
            for _ in range(repeats):
                for count, found in seconds.items():
                    os.sched_setaffinity(0, cores[:count])  # of this thread, and of those that it starts
                    begin = time.perf_counter()
                    convert(str(source), str(dest), workers=count, overwrite=True, **options)
                    found.append(time.perf_counter() - begin)
                    contents.add(dest.read_bytes())
            if len(contents) > 1:
                raise click.ClickException("the data sets differ")
            for count, found in seconds.items():
                ratio, turns = min(seconds[workers[0]]) / min(found), ", ".join(f"{s:.2f}" for s in found)
                print(f"| {name} | {count} | {min(found):.2f} ({turns}) | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
