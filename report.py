"""One page to look at: tables, samples over training, curves, options and theory of experiments and runs."""

import json

import click

from dnnlib import cli
from metrics.page import PAGE

EXAMPLES = """
\b
Examples:
  # The page of an experiment; open it with any browser, send it to anybody:
  python report.py results/quickstart --out=quickstart.html
\b
  # Two runs side by side, then a plan:
  python report.py training-runs/a training-runs/b plans/mine --out=compare.html
"""


@cli.command(epilog=EXAMPLES)
@click.argument("folders", metavar="DIR...", nargs=-1, required=True)
@cli.output("--dest --out out", PAGE, metavar="FILE", default="report.html", help="The page; one of before is replaced")
def main(folders, out):
    """Write one self-contained HTML page about folders of results (run_experiment.py, plan.py) and of runs."""
    from metrics.page import write_page

    print(json.dumps({"files": [str(write_page(folders, out))]}))


if __name__ == "__main__":
    main()
