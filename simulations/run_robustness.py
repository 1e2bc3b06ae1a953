"""Fréchet distance of trained models under injected noise, fewer steps and rounded weights: one CSV and figure for each."""

if not __package__:
    import _here

import json
from dataclasses import dataclass
from pathlib import Path

import click

from dnnlib import cli, outputs
from dnnlib.options import from_options, opt, options
from dnnlib.util import write_text
from metrics.commands import start
from metrics.table import write_csv
from simulations.sweeps import print_files

EXAMPLES = """
\b
Examples:
  # Two values of D, two training seeds each, scored by a classifier trained on real images:
  python simulations/run_robustness.py --net=runs/D16-seed0 --net=runs/D16-seed1 --net=runs/Dinf-seed0 \\
      --net=runs/Dinf-seed1 --data=datasets/heldout.zip --detector=classifier:detector.safetensors --dest=out/robustness
\b
  # The grid of the paper on CIFAR-10, sampling on two GPUs:
  torchrun --standalone --nproc_per_node=2 simulations/run_robustness.py --net=128=runs/D128 --net=inf=runs/edm \\
      --ref=refs/cifar10.npz --num-images=50000 --dest=out/robustness
"""
NETS = click.option(
    "--net", "nets", metavar="[LABEL=]SNAPSHOT", multiple=True, required=True,
    help="Snapshot, run folder or pattern; repeatable, the same label for training seeds. Default label: its D",
)  # fmt: skip


@dataclass
class Grid:
    """What is sampled, and how."""

    experiments: list = opt(["alpha", "steps", "bits"], "Some of alpha, steps, bits", type=cli.STRINGS)
    alpha: list = opt([0.0, 0.1, 0.2], "Injected noise", at_least=0)
    steps: list = opt([10, 12, 14, 16, 18, 20, 22, 24], "Numbers of steps", type=cli.INTS, at_least=1)
    bits: list = opt([9, 8, 7, 6, 5], "Bits per weight", type=cli.INTS, at_least=1, at_most=24)
    num_steps: int = opt(18, "Steps where they do not vary", at_least=1)
    policy: str = opt("role", "What to round", "--quantize-policy", choices=("role", "original"))
    num: int = opt(1000, "Images per cell", "--num", "--num-images", at_least=2)
    samplings: list = opt([0], "First seed of each sampling, e.g. 0,50000,100000", type=cli.INTS)
    class_idx: str | int = opt("balanced", "Sources to generate", "--class", metavar="N|balanced")
    batch: int = opt(256, "Largest batch per process", at_least=1)
    vae: str | None = opt(
        None, "VAE of latents: local folder, or name on the hub to download [default: local]", metavar="DIR|NAME"
    )

    def __post_init__(self) -> None:
        ordered = sorted(self.samplings)
        if any(b - a < self.num for a, b in zip(ordered[:-1], ordered[1:], strict=True)):
            reach = f"seeds of one sampling are first to first + {self.num - 1}"
            raise ValueError(f"--samplings={self.samplings} overlap: {reach}")
        if self.class_idx != "balanced":
            if not self.class_idx.isdigit():
                raise ValueError(f"--class={self.class_idx}: give a source id (0, 1, ...) or balanced")
            self.class_idx = int(self.class_idx)


@cli.command(epilog=EXAMPLES)
@NETS
@click.option("--data", metavar="DIR|ZIP", help="Reference images")
@click.option("--ref", metavar="FILE", help="Reference statistics (calculate_metrics.py ref), instead of --data")
@click.option("--detector", metavar="SPEC", default="pixel", help="pixel, classifier:FILE, ...")
@options(Grid)
@cli.output(
    "--outdir --dest dest",
    outputs.RESULTS,
    metavar="DIR",
    required=True,
    help="Where robustness-<experiment>.csv, .png and .svg, growth.png and summary.md go",
)
@cli.device_option
@click.option("-n", "--dry-run", is_flag=True, help="Print the size of the grid and stop")
def main(nets, data, ref, detector, dest, device, dry_run, **given):
    """Measure how much trained models forgive. Run the same command again to resume; stdout: the files, as JSON."""
    grid = from_options(Grid, given)

    from simulations.studies import robustness  # late: torch takes seconds to import, --help should not
    from torch_utils.distributed import get_rank
    from training.encoders import use_vae

    settings = {setting for found in robustness.settings_of(grid).values() for _, setting in found}
    if dry_run:
        cells = len(settings) * len(nets) * len(grid.samplings)
        counts = {"cells": cells, "images": cells * grid.num}
        print(json.dumps(counts | {"nets": nets, "experiments": grid.experiments}))
        return
    device, dest = start(device), Path(dest)
    judge = robustness.Judge(detector, data, ref, device)
    models = robustness.open_models(nets, device)
    for model in models:
        use_vae(model.snapshot.encoder, grid.vae)
    rows = robustness.run_grid(models, grid, judge, dest / "cells", device)
    if get_rank() == 0:
        files = []
        for name, part in rows.items():
            files.append(write_csv(dest / f"robustness-{name}.csv", part))
            files += robustness.plot(part, name, dest / f"robustness-{name}")
        files += robustness.plot_growths(rows, dest / "growth")
        text = "\n\n".join(robustness.markdown(part, name) for name, part in rows.items())
        print_files([*files, write_text(dest / "summary.md", text + "\n")])


if __name__ == "__main__":
    main()
