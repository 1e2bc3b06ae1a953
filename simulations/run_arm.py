"""Autoregressive models on K sources: one network for all against one each, with exact errors."""

if not __package__:
    import _here

from dnnlib import cli
from simulations import sweeps
from simulations.configs import ArmConfig

# Theory paper, App. E.2: TV of single and multi. Which n and D belong to the K table and so on is inferred from the
# entries that the tables share.
PUBLISHED = {
    "K": {1: (0.0763, 0.0763), 3: (0.1212, 0.1145), 5: (0.1519, 0.1318), 7: (0.1787, 0.1364), 10: (0.2127, 0.1369)},
    "n": {1000: (0.5680, 0.5491), 3000: (0.3516, 0.3467), 5000: (0.2882, 0.2747), 10000: (0.2036, 0.1922),
          30000: (0.1212, 0.1145)},
    "D": {10: (0.2036, 0.1922), 12: (0.3785, 0.3530), 14: (0.5932, 0.5068), 16: (0.7242, 0.5747), 18: (0.7505, 0.6289)},
    "sim": {},  # the knob is ours
}  # fmt: skip

_PAPER = {
    "config": {},
    "fixed": {"K": {"n": 30_000}},
    "values": {tag: list(table) for tag, table in PUBLISHED.items()} | {"sim": [0.0, 0.5, 0.8, 0.9, 1.0]},
}
BUDGETS = {
    "smoke": {  # seconds
        "config": {"K": 2, "n": 200, "D": 4, "de": 4, "W": 8, "L": 3},
        "fixed": {},
        "values": {"K": [1, 2], "n": [50, 200], "D": [3, 4], "sim": [0.0, 1.0]},
        "rule": {"steps": (50,), "batches": (50,)},
        "seeds": [0, 1, 2],
    },
    "small": _PAPER | {  # about half an hour on one core; at one rate alone some trainings stop in a poor optimum
        "rule": {"steps": (800,), "lrs": (3e-3, 1e-2)},
        "seeds": [0, 1, 2, 3, 4],
    },
    "paper": _PAPER | {  # days: the published grid of batch sizes and learning rates
        "rule": {"steps": (50_000,), "batches": (100, 300, 500), "lrs": (1e-5, 1e-4, 1e-3), "eval_every": 200},
        "seeds": [0, 1, 2, 3, 4],
    },
}  # fmt: skip


@cli.command()
@sweeps.sweep_options(ArmConfig, BUDGETS)
def main(**options):
    """Train autoregressive models on K sources, together and apart, and measure the exact TV error.

    Writes <tag>/results_<tag>.csv (means, standard errors, published and predicted values) and
    <tag>/results_<tag>_seeds.csv. Finished cells are kept: the same command resumes. stdout: the files, as JSON.
    Budgets: smoke takes seconds, small half an hour, paper days.

    \b
    Examples:
      python simulations/run_arm.py --budget=smoke
      python simulations/run_arm.py --tag=K
      python simulations/run_arm.py --tag=sim --family=independent --outdir=results/independent
      python simulations/run_arm.py --tag=K --family=dirichlet --sim=0 --outdir=results/unstructured
    """
    from simulations import arm, bounds

    def bound(c, outcome, largest, delta):
        width = max(c.W, c.D, c.M)
        return bounds.arm_bound(c.K, c.n, c.D, c.M, c.de, c.L, width, outcome.params, largest, delta)

    sweeps.run("arm", BUDGETS, options, ArmConfig, arm.run_cell, bound, PUBLISHED)


if __name__ == "__main__":
    main()
