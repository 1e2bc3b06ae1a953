"""What a training step and sampling cost: a table for a preset on this machine, on the CPU or a GPU.

Beside ours, in the same process and turn by turn, the plain formulation: one draw of noise from the global generator, the
loss, backward, `nan_to_num` and averages parameter by parameter, torch's Adam; sampling as EDM's algorithm 1 reads. Same
network, same shapes: the ratio is what exactness (seeded blocks, checks, statistics) costs or saves.

python benchmarks/step.py --preset=digits8 --device=cpu --dest=benchmarks/RESULTS_step.md
python benchmarks/step.py --preset=edm2-img512-xs --batch=64 --precision=fp32,fp16,bf16 --compile=no,yes
"""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import cli, outputs


@cli.command()
@click.option("--preset", metavar="NAME", default="digits8", help="Row of training/presets.py")
@click.option("--batch", type=cli.NIMG, help="Images per step and sampled batch; default: the preset's")
@click.option("--batch-gpu", type=cli.NIMG, help="Largest micro-batch; 0: no limit")
@click.option("--resolution", type=click.IntRange(min=1), help="Default: what the preset is made for")
@click.option("--channels", type=click.IntRange(min=1), help="Of the images; default: what the preset is made for")
@click.option("--classes", type=click.IntRange(min=0), help="Default: what the preset is made for")
@cli.device_option
@click.option("--precision", type=cli.STRINGS, default="fp32", help="Some of fp32, tf32, bf16, fp16")
@click.option("--compile", "compiled", type=cli.STRINGS, default="no", help="no, yes, or both: no,yes")
@click.option("--steps", type=click.IntRange(min=1), default=10, help="Training steps to time, after the warm-up")
@click.option("--warmup", type=click.IntRange(min=0), default=3, help="Training steps before")
@click.option("--sampling-steps", type=click.IntRange(min=1), default=18, help="Heun steps")
@cli.output("--dest", outputs.TABLE, metavar="FILE", help="Also write the table to this Markdown file")
def main(**options):
    """Time the training step and sampling of a preset and print a Markdown table."""
    from measures import step

    step.run(**options)


if __name__ == "__main__":
    main()
