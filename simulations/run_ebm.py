"""Energy-based models on K sources in one or two dimensions: one network for all against one each."""

if not __package__:
    import _here

from dnnlib import cli
from simulations import sweeps
from simulations.configs import EbmConfig

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
        "seeds": [0, 1, 2, 3, 4],
    },
    "large": _SWEEPS | {  # hours
        "values": _SWEEPS["values"] | {"K": [1, 2, 4, 8, 16, 32], "n": [100, 300, 1000, 3000, 10_000, 30_000]},
        "rule": {"steps": (60, 200, 600, 2000, 6000), "early": False, "batches": (1000,), "lrs": (3e-3, 1e-2, 2e-2)},
        "seeds": list(range(10)),
    },
}  # fmt: skip


@cli.command()
@sweeps.sweep_options(EbmConfig, BUDGETS)
def main(**options):
    """Train energy-based models on K sources, together and apart, and measure the TV error by quadrature.

    Writes <tag>/results_<tag>.csv (means, standard errors, predicted ratio) and <tag>/results_<tag>_seeds.csv.
    Finished cells are kept: the same command resumes. stdout: the files, as JSON. Budgets: smoke takes seconds, small
    minutes, large hours.

    \b
    Examples:
      python simulations/run_ebm.py --budget=smoke
      python simulations/run_ebm.py --tag=n --D=2 --modes=2
    """
    from simulations import bounds, ebm

    def bound(c, outcome, largest, delta):
        return bounds.ebm_bound(c.K, c.n, c.de, c.L, max(c.W, c.D + c.de), outcome.params, largest, delta, D=c.D)

    sweeps.run("ebm", BUDGETS, options, EbmConfig, ebm.run_cell, bound)


if __name__ == "__main__":
    main()
