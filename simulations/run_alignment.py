"""Phase alignment of PFGM++: what a noisy image knows of its datum, over r and over sigma, for several D."""

if not __package__:
    import _here

import click

from dnnlib import cli, outputs
from metrics.table import write_csv
from simulations.sweeps import print_files

EXAMPLES = """
\b
Example (PFGM++ Figure 3, on digits; seconds):
  python dataset_tool.py convert --source=sklearn:digits --dest=datasets/digits.zip
  python simulations/run_alignment.py --data=datasets/digits.zip --dest=out/alignment.csv --figure=out/alignment
"""


@cli.command(epilog=EXAMPLES)
@click.option("--data", metavar="DIR|ZIP", required=True, help="Images, of any size")
@click.option("--aug-dims", type=cli.FLOATS, default="16,256,4096,65536,inf", show_default=True, help="D > 0, or inf")
@click.option(
    "--sigmas", type=cli.FLOATS, default="0.1,0.2,0.5,1,2,5,10,20,40,80", show_default=True, help="Noise levels"
)
@click.option("--num", type=click.IntRange(min=2), default=2000, show_default=True, help="Noisy images")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of the noise")
@cli.output("--dest", outputs.TABLE, metavar="FILE", required=True, help="Table (.csv)")
@cli.output("--figure", outputs.FIGURE, metavar="STEM", help="Figure without suffix; default: none")
def main(data, aug_dims, sigmas, num, seed, dest, figure):
    """Measure how far the posterior over the data is from uniform, for noisy images of it."""
    from simulations.studies import alignment
    from training.dataset import ImageFolderDataset

    found = alignment.rows(ImageFolderDataset(data), aug_dims, sigmas, num, seed)
    print_files([write_csv(dest, found), *(alignment.plot(found, figure) if figure else [])])


if __name__ == "__main__":
    main()
