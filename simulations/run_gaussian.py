"""Single- against multi-source estimation of Gaussians: the paper's Figure 1 and its exact counterparts."""

import json
import sys
from pathlib import Path

import click

if not __package__:  # run as a file: the packages are one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import cli  # noqa: E402
from metrics.table import write_csv  # noqa: E402
from simulations.theory_io import RESULTS_DIR, ListOption, OneLineCommand  # noqa: E402


# fmt: off  (one option a line)
@click.command(cls=OneLineCommand, context_settings={"show_default": True})
@click.option("--tag", type=click.Choice(["K", "n", "sim", "all"]), required=True, help="What varies.")
@click.option(
    "--results-dir",
    "--results_dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS_DIR / "gaussian",
    show_default="simulations/results/gaussian",
    help="Where <tag>/results_<tag>.csv goes.",
)
@click.option(
    "--seeds", type=ListOption(int, 0, 2**63 - 1), help="Seeds, e.g. 3,33 or 0-99.  [default: 3,33,520,2025,25731]"
)
@click.option("--num-seeds", type=click.IntRange(min=1), help="Instead of --seeds: 0 to this number minus one.")
@click.option("--K", "num_sources", type=click.IntRange(min=1), default=5, help="Sources, unless they vary.")
@click.option(
    "--n", "num_train", type=click.IntRange(min=1), default=500, help="Training points in all, unless they vary."
)
@click.option("--sim", type=cli.Float(0, 1), default=0.5, help="Share of shared dimensions, unless it varies.")
@click.option("--D", "--d", "dim", type=click.IntRange(min=1), default=10, help="Data dimension.")
@click.option("--test-size", type=click.IntRange(min=1), default=500, help="Test pairs behind the empirical TV.")
@click.option(
    "--values", type=ListOption(float, 0), help="Values of a single --tag (instead of the option named after it)."
)
@click.option("--K-values", "k_values", type=ListOption(int, 1), help="Numbers of sources.  [default: 1,3,5,10,15]")
@click.option(
    "--n-values", "n_values", type=ListOption(int, 1), help="Training sizes.  [default: 100,300,500,1000,5000]"
)
@click.option(
    "--sim-values", "sim_values", type=ListOption(float, 0, 1), help="Similarities.  [default: 0,0.3,0.5,0.7,1]"
)
@click.option("--delta", type=cli.Float(0, 0.5, min_open=True), default=0.05, help="Failure probability of the bounds.")
@click.option("--B", "box", type=cli.Float(0, min_open=True), help="Bounds: box [-B, B] of the means.  [default: K]")
def main(
    tag,
    results_dir,
    seeds,
    num_seeds,
    num_sources,
    num_train,
    sim,
    dim,
    test_size,
    values,
    k_values,
    n_values,
    sim_values,
    delta,
    box,
):
    """Estimate Gaussian means from K sources, together and apart, and measure the TV error.

    Writes results_<tag>.csv (the published columns, then standard errors, exact errors and bounds) and
    results_<tag>_seeds.csv (one row per seed). stdout: the files, as JSON.

    \b
    Examples:
      python simulations/run_gaussian.py --tag=K
      python simulations/run_gaussian.py --tag=all --num-seeds=200
      python simulations/run_gaussian.py --tag=n --n-values=1000,1000000 --D=1000 --seeds=3
    """
    if seeds and num_seeds:
        raise click.UsageError("--seeds and --num-seeds exclude each other; give one")
    sweeps = {"K": k_values, "n": n_values, "sim": sim_values}
    if values:
        if tag == "all":
            raise click.UsageError(
                "--values needs a single --tag; with --tag=all use --K-values, --n-values, --sim-values"
            )
        if sweeps[tag]:
            raise click.UsageError(f"--values and --{tag}-values exclude each other; give one")
        if tag != "sim" and any(v != int(v) for v in values):
            raise click.UsageError(f"--values={values} must be whole numbers for --tag={tag}")
        sweeps[tag] = values if tag == "sim" else [int(v) for v in values]

    from simulations import gaussian  # late: torch takes seconds to import, --help should not

    seeds = list(range(num_seeds)) if num_seeds else seeds or gaussian.PAPER_SEEDS
    files = []
    for name in ["K", "n", "sim"] if tag == "all" else [tag]:
        result = gaussian.sweep(name, sweeps[name], seeds, num_sources, num_train, dim, sim, test_size, _progress(name))
        rows = gaussian.summary_rows(result, delta, box)
        files.append(write_csv(results_dir / name / f"results_{name}.csv", rows))
        files.append(write_csv(results_dir / name / f"results_{name}_seeds.csv", gaussian.seed_rows(result)))
        empty = sum(row["sources without estimate (single)"] for row in rows)
        if empty:
            click.echo(f"{name}: {empty} source(s) had no data; each counts as TV = 1 (see the columns)", err=True)
    print(json.dumps({"files": [str(f) for f in files]}))


# fmt: on


def _progress(name):
    if not sys.stderr.isatty():
        return iter
    from tqdm import tqdm

    return lambda runs: tqdm(runs, desc=name, unit="run")


if __name__ == "__main__":
    main()
