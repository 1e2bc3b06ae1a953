"""Which data selection is worth its cost? Several arms and seeds on the tree, one table, one figure."""

if not __package__:
    import _here

import json

import click

from dnnlib import cli, outputs
from simulations.run_tree import CLASSES, DEVICE
from simulations.sweeps import place, print_files

EXAMPLES = """
\b
Examples:
  # The table of docs/selection.md (about 25 minutes of one core):
  python simulations/run_tree_sweep.py
\b
  # The published size and arms (80 minutes of one core):
  python simulations/run_tree_sweep.py --batch=4096 --train-steps=4096 --snapshot-iter=256 --num=16384 \\
      --arms=baseline,random,ajest,early-ajest,late-ajest,iajest
"""


ARMS = "baseline,random,jest,ajest,early-ajest,diverse"


@cli.command(epilog=EXAMPLES)
@click.option("--arms", type=cli.STRINGS, default=ARMS, help="Also: late-ajest, iajest")
@click.option("--seeds", type=cli.SEEDS, default="0,73,172,231,357", help="Training seeds")
@click.option(
    "--batch", "--batch-size", "batch_size", type=click.IntRange(min=16), default=1024, help="Points drawn per step"
)
@click.option("--train-steps", "--total-iter", "total_iter", type=cli.COUNT, default=1000, help="Training steps")
@click.option("--snapshot-iter", type=click.IntRange(min=1), default=48, help="Steps between the snapshots to compare")
@click.option("--reference-iter", type=click.IntRange(min=1), default=512, help="Steps of the reference (width 32)")
@click.option("--reference-batch", type=click.IntRange(min=1), default=4096, help="Its batch size")
@click.option(
    "--num", "--n-samples", "n_samples", type=click.IntRange(min=1), default=2048, help="Samples behind each score"
)
@CLASSES
@click.option("--jobs", type=click.IntRange(min=1), default=1, help="Seeds side by side; makes times noisy")
@place("--outdir", at="results/tree-sweep", type=click.STRING, metavar="DIR", cls=cli.Output, writes=outputs.RESULTS)
@cli.output("--figure", outputs.FIGURE, metavar="STEM", help="Figure; default: <outdir>/selection-tree")
@DEVICE
@click.option("-n", "--dry-run", is_flag=True, help="Print the runs and stop")
def main(arms, seeds, reference_iter, reference_batch, n_samples, jobs, outdir, figure, dry_run, **options):
    """Compare data selections at equal steps, equal trained samples and equal time. Run again to resume.

    Writes table.csv (a row per run and comparison), table.md (mean and standard deviation over seeds) and the figure.
    """
    if dry_run:
        print(json.dumps({"arms": arms, "seeds": seeds, "outdir": outdir, **options}, indent=2))
        print("Dry run; exiting.")
        return
    from simulations.tree import sweep as tree_sweep
    from simulations.tree import training as tree_training
    from torch_utils import distributed

    distributed.init(options["device"])
    base = tree_training.TreeConfig(**options)
    paths = tree_sweep.run(base, arms, seeds, outdir, n_samples, reference_iter, reference_batch, figure, jobs)
    print_files(paths)


if __name__ == "__main__":
    main()
