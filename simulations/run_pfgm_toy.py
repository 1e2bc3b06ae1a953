"""PFGM++'s toy notebook: two clusters in 1000 dimensions at several D, judged by its own MMD."""

if not __package__:
    import _here

import click

from dnnlib import cli, outputs
from metrics.table import write_csv
from simulations.sweeps import print_files

EXAMPLES = """
\b
Example (the notebook's D = 100 and others, five seeds; minutes):
  python simulations/run_pfgm_toy.py --aug-dims=100,inf --seeds=0-4 --dest=out/toy.csv
"""


@cli.command(epilog=EXAMPLES)
@click.option("--aug-dims", type=cli.FLOATS, default="100", show_default=True, help="D > 0, or inf")
@click.option("--seeds", type=cli.SEEDS, default="0-4", show_default=True, help="Of points, weights and noise")
@click.option(
    "--num", type=cli.COUNT, default=1000, show_default=True, help="Points of each cluster; as many are sampled"
)
@click.option("--epochs", type=cli.COUNT, default=200, show_default=True, help="Of training")
@cli.output("--dest", outputs.TABLE, metavar="FILE", required=True, help="Table (.csv)")
def main(aug_dims, seeds, num, epochs, dest):
    """Train and sample a small network for each D and seed; its MMD beside that of fresh data."""
    from simulations.studies import pfgm_toy

    print_files([write_csv(dest, pfgm_toy.rows(aug_dims, seeds, num, epochs))])


if __name__ == "__main__":
    main()
