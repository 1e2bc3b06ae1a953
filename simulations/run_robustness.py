"""Frechet distance of trained models under injected noise, fewer steps and rounded weights: one CSV and figure for each."""

if not __package__:
    import _here

import json
import sys
from pathlib import Path

import click

from dnnlib import cli
from dnnlib.util import write_text
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
NETS = "Snapshot, run folder or pattern; repeatable, the same label for training seeds. Default label: its D"


@cli.command(epilog=EXAMPLES)
@click.option("--net", "nets", metavar="[LABEL=]SNAPSHOT", multiple=True, required=True, help=NETS)
@click.option("--data", metavar="DIR|ZIP", help="Reference images")
@click.option("--ref", metavar="FILE", help="Reference statistics (calculate_metrics.py ref), instead of --data")
@click.option("--detector", metavar="SPEC", default="pixel", help="pixel, classifier:FILE, ...")
@click.option("--experiments", type=cli.STRINGS, default="alpha,steps,bits", help="Some of alpha, steps, bits")
@click.option("--alpha", "alphas", type=cli.FLOATS, default="0,0.1,0.2", help="Injected noise")
@click.option("--steps", type=cli.INTS, default="10,12,14,16,18,20,22,24", help="Numbers of steps")
@click.option("--bits", type=cli.INTS, default="9,8,7,6,5", help="Bits per weight")
@click.option("--num-steps", type=click.IntRange(min=1), default=18, help="Steps where they do not vary")
@click.option(
    "--quantize-policy", "policy", type=click.Choice(["role", "original"]), default="role", help="What to round"
)
@click.option("--num", "--num-images", type=click.IntRange(min=2), default=1000, help="Images per cell")
@click.option("--samplings", type=cli.INTS, default="0", help="First seed of each sampling, e.g. 0,50000,100000")
@click.option("--class", "class_idx", default="balanced", metavar="N|balanced", help="Sources to generate")
@click.option("--batch", type=click.IntRange(min=1), default=256, help="Largest batch per process")
@click.option("--dest", metavar="DIR", required=True, help="Where robustness-<experiment>.csv, .png and .svg go")
@click.option("--device", metavar="NAME", help="cuda, cpu, ...; default: cuda where there is one")
@click.option("-n", "--dry-run", is_flag=True, help="Print the size of the grid and stop")
def main(nets, data, ref, detector, experiments, samplings, num, dest, device, dry_run, **options):
    """Measure how much trained models forgive. Run the same command again to resume; stdout: the files, as JSON."""
    from torch_utils import distributed as dist

    values = {name: options.pop(name) for name in ("alphas", "steps", "bits", "num_steps")}
    check(samplings, num, **values)
    if options["class_idx"] != "balanced":
        if not options["class_idx"].isdigit():
            raise ValueError(f"--class={options['class_idx']}: give a source id (0, 1, ...) or balanced")
        options["class_idx"] = int(options["class_idx"])
    from simulations.studies import robustness  # late: torch takes seconds to import, --help should not

    chosen = {name: robustness.settings_of(name, **values) for name in experiments}
    cells = len({s for settings in chosen.values() for _, s in settings}) * len(nets) * len(samplings)
    if dry_run:
        print(json.dumps({"cells": cells, "images": cells * num, "nets": nets, "experiments": experiments}))
        return
    device = dist.init(device)
    click.get_current_context().call_on_close(dist.shutdown)
    judge = robustness.Judge(detector, data, ref, device)
    models = robustness.open_models(nets, device)
    dest = Path(dest)
    rows = robustness.run_grid(
        models, chosen, judge, samplings, num, dest / "cells", progress=_progress, device=device, **options
    )
    if robustness.is_writer():
        files = []
        for name, part in rows.items():
            files.append(write_csv(dest / f"robustness-{name}.csv", [_plain(row) for row in part]))
            files += robustness.plot(part, name, dest / f"robustness-{name}")
        text = "\n\n".join(robustness.markdown(part, name) for name, part in rows.items())
        print_files([*files, write_text(dest / "summary.md", text + "\n")])


def check(samplings, num, alphas, steps, bits, **_):
    """Raises ValueError for values that would fail later."""
    if any(a < 0 for a in alphas):
        raise ValueError(f"--alpha={alphas}: must not be negative")
    if any(s < 1 for s in steps):
        raise ValueError(f"--steps={steps}: at least one step is needed")
    if any(not 1 <= b <= 24 for b in bits):
        raise ValueError(f"--bits={bits}: must lie in 1 to 24")
    ordered = sorted(samplings)
    if any(b - a < num for a, b in zip(ordered[:-1], ordered[1:], strict=True)):
        raise ValueError(f"--samplings={samplings} overlap: seeds of one sampling are first to first + {num - 1}")


def _progress(cells):
    from tqdm import tqdm

    from simulations.studies import robustness

    return tqdm(cells, unit="cell", disable=not robustness.is_writer(), file=sys.stderr)


def _plain(row):
    """A row as a CSV file can hold it: an infinite D as the word, no empty scores."""
    return {k: "none" if v is None else str(v) if v == float("inf") else v for k, v in row.items()}


if __name__ == "__main__":
    main()
