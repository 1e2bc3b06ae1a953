"""Energy-based models on K sources in one or two dimensions: one network for all against one each."""

import sys
from pathlib import Path

import click

if not __package__:  # run as a file: the packages are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulations.sweep_command import run_sweeps, training_options  # noqa: E402
from simulations.theory_io import ListOption, OneLineCommand  # noqa: E402

_SWEEPS = {
    "config": {},
    "fixed": {},
    "values": {"K": [1, 2, 4, 8], "n": [100, 300, 1000, 3000], "sim": [0.0, 0.5, 0.8, 1.0]},
}
BUDGETS = {
    "smoke": {  # seconds
        "config": {"K": 2, "n": 200, "D": 1, "de": 2, "W": 8},
        "fixed": {},
        "values": {"K": [1, 2], "n": [50, 200], "sim": [0.0, 1.0]},
        "rule": {"steps": (50,), "batches": (50,)},
        "seeds": [0, 1, 2],
    },
    "small": _SWEEPS | {  # minutes on one core
        "rule": {"steps": (60, 200, 600), "early": False, "batches": (1000,)},
        "seeds": [0, 1, 2],
    },
    "large": _SWEEPS | {
        "values": _SWEEPS["values"] | {"K": [1, 2, 4, 8, 16, 32], "n": [100, 300, 1000, 3000, 10_000, 30_000]},
        "rule": {"steps": (60, 200, 600, 2000, 6000), "early": False, "batches": (1000,), "lrs": (3e-3, 1e-2, 2e-2)},
        "seeds": list(range(10)),
    },
}  # fmt: skip


# fmt: off  (one option a line)
@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--tag", type=click.Choice(["K", "n", "sim", "all"]), default="all", help="What varies.")
@click.option(
    "--budget",
    type=click.Choice(list(BUDGETS)),
    default="small",
    help="Defaults of what follows: seconds, minutes, hours.",
)
@click.option("--K-values", "K_values", type=ListOption(int, 1), help="Numbers of sources.")
@click.option("--n-values", "n_values", type=ListOption(int, 1), help="Sample sizes.")
@click.option("--sim-values", "sim_values", type=ListOption(float, 0, 1), help="True similarities.")
@click.option("--K", "K", type=click.IntRange(min=1), help="Sources, unless they vary.")
@click.option("--n", "n", type=click.IntRange(min=1), help="Samples of all sources, unless they vary.")
@click.option("--D", "D", type=click.IntRange(1, 2), help="Data dimension.")
@click.option("--modes", type=click.IntRange(min=1), help="Highest cosine frequency of the log-densities, per axis.")
@training_options
def main(tag, budget, **options):
    """Train energy-based models on K sources, together and apart, and measure the TV error by quadrature.

    Writes <tag>/results_<tag>.csv (means, standard errors, predicted ratio) and <tag>/results_<tag>_seeds.csv.
    Finished cells are kept: the same command resumes. stdout: the files, as JSON.

    \b
    Examples:
      python simulations/run_ebm.py --budget=smoke
      python simulations/run_ebm.py --tag=n --D=2 --modes=2
    """
    from simulations.bounds import ebm_bound
    from simulations.ebm import EbmConfig, EbmOutcome, run_cell

    def bound(c, outcome, largest, delta):
        return ebm_bound(c.K, c.n, c.de, c.L, max(c.W, c.D + c.de), outcome.params, largest, delta, D=c.D)

    tags = ["K", "n", "sim"] if tag == "all" else [tag]
    run_sweeps("ebm", budget, BUDGETS[budget], tags, options, EbmConfig, EbmOutcome, run_cell, bound)


# fmt: on


if __name__ == "__main__":
    main()
