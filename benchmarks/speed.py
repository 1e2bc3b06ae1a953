"""Training step and sampling, ours against EDM2 as published (benchmarks/reference) and against a plain loop.

All take turns with the same weights and shapes, each in a process of its own, whose memory is as in a run; the table holds
ratios to the published formulation, the median over the turns with its quartiles. "plain" is our network in a loop as it is
usually written (benchmarks/step.py).

OMP_NUM_THREADS=1 python benchmarks/speed.py --cases=8,16,32 --what=train,outside
OMP_NUM_THREADS=1 python benchmarks/speed.py --cases=8,32 --what=sample --compile
"""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import cli, outputs


@cli.command()
@click.option("--cases", type=cli.STRINGS, default="8,16,32", help="Sides of the images: some of 8, 16, 32, 64")
@click.option("--what", type=cli.STRINGS, default="train,outside,sample", help="Some of train, outside, sample")
@click.option("--compile", "compiled", is_flag=True, help="Also ours through torch.compile")
@cli.device_option
@click.option("--repeats", type=click.IntRange(min=1), default=10, help="Turns to time")
@click.option("--warmup", type=click.IntRange(min=0), default=2, help="Turns before")
@cli.output("--dest", outputs.TABLE, metavar="FILE", help="Also write the table to this Markdown file")
def main(**options):
    """Time training and sampling against EDM2 as published and print a Markdown table of ratios."""
    from measures import speed

    speed.run(**options)


if __name__ == "__main__":
    main()
