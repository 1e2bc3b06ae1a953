"""Several small models trained side by side in one process against one after another: seconds of one step of all of them.

python benchmarks/side_by_side.py --models=10 --batch=8,16,64
"""

import sys
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import step

from dnnlib import cli
from torch_utils import distributed as dist
from training import presets
from training.config import make_config
from training.side_by_side import Stack


def loops_of(preset, models, batch, device, channels):
    """So many training loops of a preset, each with weights and data order of its own."""
    interface = presets.interface(preset)
    lengths = {f"{name}_nimg": 0 for name in ("status", "snapshot", "checkpoint")}
    sizes = {} if channels is None else {"channels": channels, "channels_per_head": channels}
    configs = [
        make_config(preset, data="random", batch_size=batch, total_nimg=batch, seed=k, **lengths, **sizes)
        for k in range(models)
    ]
    loops = [step.make_loop(config, interface, device) for config in configs]
    for loop, config in zip(loops, configs, strict=True):
        loop.parts.config = config
    return loops


@cli.command()
@click.option("--preset", metavar="NAME", default="digits8", help="Row of training/presets.py")
@click.option("--models", type=cli.INTS, default="10", help="How many of them; several with commas")
@click.option("--batch", type=cli.INTS, default="8,16,64", help="Images of each model and step; several with commas")
@click.option("--channels", type=click.IntRange(min=1), help="Base width; default: the preset's")
@click.option("--steps", type=click.IntRange(min=1), default=7, help="To time, after two; medians, turn by turn")
@click.option("--device", metavar="NAME", help="cuda, cpu, ...; default: cuda where there is one")
def main(preset, models, batch, channels, steps, device):
    """Print a Markdown table."""
    device = dist.init(device)
    print(
        f"{step.machine(device)}\n\n| models | batch | one after another [ms] | side by side [ms] | ratio | images/s |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for count in models:
        for size in batch:
            alone, together = (loops_of(preset, count, size, device, channels) for _ in range(2))
            both = [lambda alone=alone: [loop.step() for loop in alone], Stack(together).step]
            first, second = step.timed(both, device, steps, 2)
            row = (
                count,
                size,
                f"{first * 1e3:.0f}",
                f"{second * 1e3:.0f}",
                f"{first / second:.2f}",
                f"{count * size / second:.0f}",
            )
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
            assert torch.isfinite(together[0].parameters[0]).all()


if __name__ == "__main__":
    main()
