"""What a preset or a network costs before it runs: operations, memory, bytes on disk, time on GPUs and on this machine."""

import json

import click

from dnnlib import cli

EXAMPLES = """
\b
Examples:
  # EDM2's sizes, and how long each would take on this machine (ten seconds of measurement each):
  python count_flops.py --preset=edm2-img512-xs,edm2-img512-s,edm2-img512-m
\b
  # One's own data and options, without a measurement:
  python count_flops.py --preset=small64 --data=datasets/photos.zip --duration=2Mi --batch-gpu=32 --seconds=0
\b
  # A network from a file: parameters and operations of one evaluation:
  python count_flops.py --net=edm2-img512-s-2147483-0.130.pkl
"""


@cli.command(epilog=EXAMPLES)
@click.option(
    "--preset", type=cli.STRINGS, metavar="NAMES", default="digits8", help="Rows of training/presets.py, or all"
)
@click.option("--net", metavar="SNAPSHOT", help="A network instead: parameters and operations, as JSON")
@click.option("--data", metavar="ZIP|DIR", help="Shape of the images; default: what the preset is made for")
@click.option("--resolution", type=cli.COUNT, help="Side of the images as the network sees them")
@click.option("--channels", type=cli.COUNT, help="Their channels")
@click.option("--classes", type=click.IntRange(min=0), help="Their sources; 0: no labels")
@click.option("--duration", type=cli.NIMG, help="Training images; default: the preset's")
@click.option("--batch-gpu", type=cli.NIMG, help="Micro-batch that the memory of a step is for; default: the batch")
@click.option("--precision", type=cli.Choice(["fp32", "tf32", "bf16", "fp16"]), help="On GPUs; default: the preset's")
@click.option("--mfu", type=cli.Float(0.01, 1), default=0.4, show_default=True, help="Assumed share of a GPU's peak")
@click.option(
    "--seconds", type=cli.Float(0, 600), default=10, show_default=True, help="Of measurement on this machine; 0: none"
)
@click.option("--json", "as_json", is_flag=True, help="Print all that was counted as JSON")
def main(net, as_json, **given):
    """Count operations, memory and bytes; estimate the time on A100, H100, H200 and here. stdout: a table."""
    from metrics.table import markdown
    from training import cost

    if net is not None:
        print(json.dumps(cost.of_file(net), indent=2))
        return
    plans = cost.plans(**given)
    print(json.dumps(plans, indent=2) if as_json else markdown(*cost.rows(plans)))


if __name__ == "__main__":
    main()
