"""What a Fréchet distance costs: ours, the matrix square root of scipy, and the span of few samples, turn by turn.

    python benchmarks/frechet.py [--width 1024] [--images 5000] [--spread 0.5] [--few 200] [--repeats 3]

Processor time. Full rank: random features of `--images` images on random axes, all forms on the same moments: `sqrtm` as
FID's first code has it, the singular values of the factors' product, and ours (eigenvalues of a Gram matrix of it). Fewer
images than features: the same moments by ours and by `sqrtm`; and with the statistics included, in the span of the samples.
"""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import cli


@cli.command()
@click.option("--width", default=1024, show_default=True, type=click.IntRange(min=2))
@click.option("--images", default=5000, show_default=True, type=click.IntRange(min=2))
@click.option("--spread", default=0.5, show_default=True, help="Standard deviation of the features' log scales")
@click.option("--few", default=200, show_default=True, type=click.IntRange(min=2))
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1))
def main(**options):
    """Print one table: seconds, ratio to ours, value."""
    from measures import frechet

    frechet.run(**options)


if __name__ == "__main__":
    main()
