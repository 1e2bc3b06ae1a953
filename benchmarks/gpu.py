"""Everything that needs a GPU, in one run of at most eight minutes without a network; see gpu.sh.

Sections run in order until the time is used up; what is not reached, or fails, says so in its row. The result is appended to a
Markdown file with the machine's name. `--device=cpu --tiny` is the same code at the smallest size, which the tests run.
"""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import cli, outputs


@cli.command()
@click.option("--device", metavar="NAME", default="cuda", show_default=True, help="cuda, or cpu for a try")
@click.option("--tiny", is_flag=True, help="The smallest sizes, of no meaning but that the script works")
@click.option(
    "--seconds", type=cli.Float(1), default=440, show_default=True, help="Time after which nothing new is begun"
)
@cli.output("--dest", outputs.TABLE, metavar="FILE", required=True, help="Markdown file to append to")
def main(**options):
    """Measure exactness, speed, memory, collectives and selection on a GPU; append the tables to FILE."""
    from measures import gpu

    gpu.run(**options)


if __name__ == "__main__":
    main()
