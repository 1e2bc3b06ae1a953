"""Single- against multi-source estimation of Gaussians: the paper's Figure 1 and its exact counterparts."""

if not __package__:
    import _here

import functools

import click

from dnnlib import cli
from dnnlib.options import options
from metrics.table import write_csv
from simulations import sweeps
from simulations.configs import GaussianConfig

TAGS = ["K", "n", "sim"]


@cli.command()
@click.option("--tag", type=cli.Choice([*TAGS, "all"]), required=True, help="What varies")
@sweeps.results_dir("gaussian", "Where <tag>/results_<tag>.csv goes", **sweeps.WRITES)
@click.option("--seeds", type=cli.SEEDS, help="Seeds, e.g. 3,33 or 0-99; default: 3,33,520,2025,25731")
@click.option("--num-seeds", type=click.IntRange(min=1), help="Instead of --seeds: 0 to this number minus one")
@options(GaussianConfig)
@click.option("--values", type=cli.FLOATS, help="Values of a single --tag (instead of the option named after it)")
@sweeps.values_options(TAGS)
@sweeps.DELTA
@click.option("--B", "box", type=cli.Float(0, min_open=True), help="Bounds: box [-B, B] of the means; default: K")
def main(tag, results_dir, seeds, num_seeds, values, delta, box, **given):
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
    varied = {name: given.pop(f"{name}_values") for name in TAGS}
    if values:
        if tag == "all":
            raise click.UsageError(
                "--values needs a single --tag; with --tag=all use --K-values, --n-values, --sim-values"
            )
        if varied[tag]:
            raise click.UsageError(f"--values and --{tag}-values exclude each other; give one")
        if tag != "sim" and any(v != int(v) for v in values):
            raise click.UsageError(f"--values={values} must be whole numbers for --tag={tag}")
        varied[tag] = values if tag == "sim" else [int(v) for v in values]

    from tqdm import tqdm

    from simulations import gaussian  # late: torch takes seconds to import, --help should not

    seeds = list(range(num_seeds)) if num_seeds else seeds or gaussian.PAPER_SEEDS
    fixed = {name: value for name, value in given.items() if value is not None}
    tags = TAGS if tag == "all" else [tag]
    for name in tags:
        gaussian.sweep_configs(name, varied[name], **fixed)  # all are checked before any runs
    files = []
    for name in tags:
        progress = functools.partial(tqdm, desc=name, unit="run", disable=None)  # shown on a terminal only
        result = gaussian.sweep(name, varied[name], seeds, progress, **fixed)
        rows = gaussian.summary_rows(result, delta, box)
        files.append(write_csv(results_dir / name / f"results_{name}.csv", rows))
        files.append(write_csv(results_dir / name / f"results_{name}_seeds.csv", gaussian.seed_rows(result)))
        empty = sum(row["sources without estimate (single)"] for row in rows)
        if empty:
            click.echo(f"{name}: {empty} source(s) had no data; each counts as TV = 1 (see the columns)", err=True)
    sweeps.print_files(files)


if __name__ == "__main__":
    main()
