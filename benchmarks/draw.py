"""What drawing a batch costs: the feed beside concatenation after every block, the same draws in every bit. Prints a table.

OMP_NUM_THREADS=1 python benchmarks/draw.py --batch=2048 --resolution=32
"""

import statistics
import sys
import time
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import cli


def quadratic(candidates):
    """Block after block, each put behind what there is."""
    from training.losses import Draws

    found = None
    for block in candidates.feed.blocks(candidates.position, candidates.count):
        draws = candidates.draw([block])
        found = draws if found is None else Draws.cat([found, draws])
    return found


@cli.command()
@click.option("--batch", type=cli.NIMG, default="2048", help="Images per step")
@click.option("--resolution", type=click.IntRange(min=1), default=32, help="Side of the images, of three channels")
@click.option("--repeats", type=click.IntRange(min=1), default=7, help="Of which the median is printed")
def main(batch, resolution, repeats):
    """Time the draws of a training step and print a Markdown row."""
    import numpy as np
    import torch

    from training.dataset import ArrayDataset
    from training.encoders import StandardRGBEncoder
    from training.feed import Candidates, Feed
    from training.losses import EDM2Loss

    images = np.random.RandomState(0).randint(0, 256, [2 * batch, 3, resolution, resolution]).astype(np.uint8)
    candidates = Candidates(Feed(ArrayDataset(images)), StandardRGBEncoder(), EDM2Loss(), 0, batch, batch, 0)
    (ours,), plain = candidates, quadratic(candidates)
    assert all(torch.equal(ours[name], plain[name]) for name in ("images", "sigma", "weight", "noise"))
    seconds = {function: [] for function in (quadratic, list)}
    for _ in range(repeats):
        for function, kept in seconds.items():
            begin = time.process_time()
            function(candidates)
            kept.append(time.process_time() - begin)
    before, now = (statistics.median(kept) * 1e3 for kept in seconds.values())
    print("| batch | block by block [ms] | ours [ms] | ratio |\n| --- | --- | --- | --- |")
    print(f"| {batch} x 3x{resolution}x{resolution} | {before:.0f} | {now:.0f} | {now / before:.2f} |")


if __name__ == "__main__":
    main()
