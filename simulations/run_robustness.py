"""Frechet distance of trained models under injected noise, fewer steps and rounded weights: one CSV and figure for each."""

import json
import sys
from pathlib import Path

import click

if not __package__:  # run as a file: the packages are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import cli  # noqa: E402

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


@cli.command(epilog=EXAMPLES)
@click.option(
    "--net",
    "nets",
    metavar="[LABEL=]SNAPSHOT",
    multiple=True,
    required=True,
    help="Snapshot, run folder or pattern; repeatable, the same label for training seeds. Default label: its D",
)
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
def main(nets, data, ref, detector, experiments, alphas, steps, bits, num_steps, policy, num, samplings, class_idx, batch,
         dest, device, dry_run):  # fmt: skip
    """Measure how much trained models forgive. Run the same command again to resume; stdout: the files, as JSON."""
    from torch_utils import distributed as dist

    check(alphas, steps, bits, samplings, num)
    if class_idx != "balanced":
        if not class_idx.isdigit():
            raise ValueError(f"--class={class_idx}: give a source id (0, 1, ...) or balanced")
        class_idx = int(class_idx)
    from simulations.studies import robustness  # late: torch takes seconds to import, --help should not

    values = {"alphas": alphas, "steps": steps, "bits": bits, "num_steps": num_steps}
    chosen = {name: robustness.settings_of(name, **values) for name in experiments}
    cells = len({s for settings in chosen.values() for _, s in settings}) * len(nets) * len(samplings)
    if dry_run:
        print(json.dumps({"cells": cells, "images": cells * num, "nets": nets, "experiments": experiments}))
        return
    device = dist.init(device)
    click.get_current_context().call_on_close(dist.shutdown)
    judge = robustness.Judge(detector, data, ref, device)
    models = robustness.open_models(nets, device)
    files = run(
        models, chosen, judge, samplings, num, dest, policy=policy, class_idx=class_idx, batch=batch, device=device
    )
    dist.print0(json.dumps({"files": [str(file) for file in files]}))


def check(alphas, steps, bits, samplings, num):
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


def run(models, experiments, judge, samplings, num, dest, **options):
    """Measure the grid into the folder `dest`: CSV files after every new cell, figures and summary.md at the end."""
    from tqdm import tqdm

    from dnnlib.util import write_text
    from metrics.table import read_csv, write_csv
    from simulations.studies import robustness

    dest, writer = Path(dest), robustness.is_writer()
    paths = {name: dest / f"robustness-{name}.csv" for name in experiments}
    known = [row for path in paths.values() if path.is_file() for row in read_csv(path)]
    known = [row for row in known if set(robustness.KEY) <= set(row)]
    total = sum(map(len, experiments.values())) * len(models) * len(samplings)
    with tqdm(total=total, unit="cell", disable=not writer, file=sys.stderr) as bar:

        def on_row(rows, fresh):
            bar.update()
            if fresh and writer:
                for name in experiments:
                    if rows[name]:
                        write_csv(paths[name], _plain(rows[name]))

        rows = robustness.run_grid(models, experiments, judge, samplings, num, known, on_row, **options)
    files = []
    if writer:
        for name in experiments:
            files.append(write_csv(paths[name], _plain(rows[name])))
            files += robustness.plot(rows[name], name, dest / f"robustness-{name}")
        text = "\n\n".join(robustness.markdown(rows[name], name) for name in experiments)
        files.append(write_text(dest / "summary.md", text + "\n"))
    return files


def _plain(rows):
    """Rows as a CSV file can hold them: an infinite D as the word, no empty scores."""
    return [{k: "none" if v is None else str(v) if v == float("inf") else v for k, v in row.items()} for row in rows]


if __name__ == "__main__":
    main()
