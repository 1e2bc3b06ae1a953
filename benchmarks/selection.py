"""What selection costs: JEST's closed form (O(B)) beside the B x B form, and a training step with each kind of selection.

    python benchmarks/selection.py [--batch 4096] [--chunks 16] [--repeats 3] [--steps 10] [--preset digits8]

All in one process, median times. The step part trains a preset on random images of its shape through the real loop, with
`--filter-ratio` of the candidates discarded, beside the published arrangement: all candidates forward with gradients, the
losses of the chosen ones indexed, backward through the whole graph.
"""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import cli


@cli.command()
@click.option("--batch", default=4096, show_default=True, help="Candidates B of the side-by-side run.")
@click.option("--chunks", default=16, show_default=True, help="Chunks.")
@click.option("--repeats", default=3, show_default=True, help="Timed calls; the median is reported.")
@click.option("--steps", default=10, show_default=True, help="Timed training steps of each selection; 0: none.")
@click.option("--preset", type=cli.Choice(["digits8", "digits28"]), default="digits8", show_default=True)
@click.option("--filter-ratio", default=0.8, show_default=True, help="Share of the candidates that is discarded.")
def main(**options):
    """Time the O(B) selection against the B x B form, and training steps with and without selection."""
    from measures import selection

    selection.run(**options)


if __name__ == "__main__":
    main()
