"""Several small models trained side by side in one process against one after another: seconds of one step of all of them.

python benchmarks/side_by_side.py --models=10 --batch=8,16,64
"""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import cli


@cli.command()
@click.option("--preset", metavar="NAME", default="digits8", help="Row of training/presets.py")
@click.option("--models", type=cli.INTS, default="10", help="How many of them; several with commas")
@click.option("--batch", type=cli.INTS, default="8,16,64", help="Images of each model and step; several with commas")
@click.option("--channels", type=click.IntRange(min=1), help="Base width; default: the preset's")
@click.option("--steps", type=click.IntRange(min=1), default=7, help="To time, after two; medians, turn by turn")
@cli.device_option
def main(**options):
    """Print a Markdown table."""
    from measures import side_by_side

    side_by_side.run(**options)


if __name__ == "__main__":
    main()
