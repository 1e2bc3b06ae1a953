"""Bounds on the average TV error of multi- and single-source training, and the sample size that a target needs."""

if not __package__:
    import _here

import dataclasses
import inspect
import json
from pathlib import Path

import click

from dnnlib import cli, outputs
from dnnlib.util import write_json
from simulations import bounds
from simulations.configs import shared_count
from simulations.sweeps import DELTA

BOUND = outputs.Kind("a bound", outputs.json_with("model", "inputs"))
_COUNT = click.IntRange(min=1)
_DEFAULTS = {  # the paper's simulations; it has no EBM one
    "gaussian": {"K": 5, "d": 10, "B": 5.0, "n": 500},
    "arm": {"K": 3, "D": 10, "M": 2, "de": 64, "L": 5, "W": 64, "B": 1.0, "n": 10000},
    "ebm": {"K": 3, "D": 2, "de": 4, "L": 3, "W": 32, "B": 1.0, "n": 10000},
    "general": {"n": 500},
}


@cli.command()
@click.option("--model", type=cli.Choice(list(bounds.FAMILIES)), default="gaussian", help="Model family")
@click.option("--K", "K", type=_COUNT, help="Sources  [gaussian 5, arm 3, ebm 3]")
@click.option("--n", "n", type=_COUNT, help="Samples of all sources together  [500; arm, ebm 10000]")
@DELTA
@click.option("--eps", type=cli.Float(0, 1, min_open=True), help="Bracket size of the sharp bound  [1/n]")
@click.option("--log-n", "log_n", type=cli.Float(min=0), help="general: log bracketing number of the multi class")
@click.option("--log-n-single", "log_n_single", type=cli.Float(min=0), help="general: of the single class  [--log-n]")
@click.option("--d", "d", type=_COUNT, help="gaussian: dimension  [10]")
@click.option("--d1", "d1", type=click.IntRange(min=0), help="gaussian: source-specific dimensions  [from --beta]")
@click.option("--beta", "--sim", "beta", type=cli.Float(0, 1), help="gaussian: share of shared dimensions  [0.5]")
@click.option("--B", "B", type=cli.Float(0, min_open=True), help="Largest absolute parameter  [gaussian 5, else 1]")
@click.option("--D", "D", type=_COUNT, help="arm: sequence length  [10]; ebm: dimension, checks W >= D + de  [2]")
@click.option("--M", "M", type=_COUNT, help="arm: vocabulary  [2]")
@click.option("--de", "de", type=_COUNT, help="arm, ebm: embedding width  [arm 64, ebm 4]")
@click.option("--L", "L", type=_COUNT, help="arm, ebm: affine layers  [arm 5, ebm 3]")
@click.option("--W", "W", type=_COUNT, help="arm, ebm: largest width, input and output included  [arm 64, ebm 32]")
@click.option("--S", "S", type=_COUNT, help="arm, ebm: non-zero MLP parameters  [all of a dense MLP]")
@click.option("--positions", type=_COUNT, help="arm, ebm: places for these; counts sparsity patterns")
@click.option("--as-published", is_flag=True, help="Sharp bound with the logarithm as printed, errors included")
@click.option("--target-tv", type=cli.Float(0, min_open=True), help="Error to reach; needs --solve-for")
@click.option("--solve-for", type=cli.Choice(["n"]), help="Smallest n whose bound is at most --target-tv")
@cli.output("--dest --out out", BOUND, type=click.Path(path_type=Path), help="Write the JSON here as well")
def main(model, n, delta, eps, as_published, target_tv, solve_for, out, **options):
    """Print the bounds of the theory paper as JSON, with constants, beta_sim, ratio and vacuity.

    "sharp" is Eq. 12, "published" Theorem 3.2 (constant 3). A bound >= 1 is vacuous.

    \b
    Examples:
      python simulations/run_bounds.py --model=gaussian --K=5 --n=5000 --d=10 --d1=5
      python simulations/run_bounds.py --target-tv=0.1 --solve-for=n
      python simulations/run_bounds.py --model=arm --K=10 --D=12 --n=1000000
    """
    if (target_tv is None) != (solve_for is None):
        raise click.UsageError("--target-tv and --solve-for=n belong together; give both or neither")
    if solve_for and (n is not None or eps is not None):
        raise click.UsageError("--solve-for=n finds n and uses eps = 1/n; leave --n and --eps out")
    takes = {*inspect.signature(bounds.FAMILIES[model]).parameters, *(["beta"] if model == "gaussian" else [])}
    for name, value in options.items():
        if value is not None and name not in takes:
            click.echo(f"Warning: --{name.replace('_', '-')} has no effect on --model={model}", err=True)
    used = _DEFAULTS[model] | {k: v for k, v in options.items() if v is not None and k in takes}
    n = n or used["n"]
    _complete(model, used)

    def evaluate(size):
        extra = {} if model == "general" else {"corrected": not as_published}
        return bounds.FAMILIES[model](n=size, delta=delta, eps=eps, **used, **extra)

    report = {"model": model, "inputs": used | {"delta": delta}}
    if solve_for:
        report["target_tv"] = target_tv
        report["n"] = _required(model, target_tv, evaluate, used)
    else:
        bound = evaluate(n)
        report |= dataclasses.asdict(bound) | {"vacuous": bound.vacuous}
        if model == "gaussian":
            report["expected_tv"] = _expected(used, n)
    if out:
        write_json(out, report)
    print(json.dumps(report, indent=2))


def _complete(model, used):
    """Fill in what follows from other options: d1 from beta, S from a dense MLP."""
    del used["n"]
    if model == "general" and "log_n" not in used:
        raise click.UsageError("--model=general needs --log-n, the log bracketing number at 1/n")
    if model == "gaussian":
        beta = used.pop("beta", None)
        if beta is not None and "d1" in used:
            raise click.UsageError("--d1 and --beta exclude each other; give one")
        used.setdefault("d1", used["d"] - shared_count(0.5 if beta is None else beta, used["d"]))
    if model in ("arm", "ebm") and "S" not in used:
        first, last = (used["D"], used["M"]) if model == "arm" else (used["D"] + used["de"], 1)
        widths = [first] + [used["W"]] * (used["L"] - 1) + [last]
        used["S"] = sum((a + 1) * b for a, b in zip(widths, widths[1:], strict=False))


def _expected(used, n):
    """The Gaussian's exact expected error."""
    from simulations.gaussian_exact import expected_tv

    single, multi = expected_tv(used["K"], n, used["d"], used["d1"])
    return {"multi": multi, "single": single}


def _required(model, target, evaluate, used):
    """{"multi": {"sharp": n, ...}, "single": ...}; the Gaussian also by its exact expected error."""
    report = {
        side: {f: bounds.solve_n(target, lambda m, a=side, f=f: evaluate(m)[a][f]) for f in ("sharp", "published")}
        for side in ("multi", "single")
    }
    for side in report if model == "gaussian" else ():
        expected = lambda m, a=side: _expected(used, m)[a]
        report[side]["expected_tv"] = bounds.solve_n(target, expected, largest=10**9)
    return report


if __name__ == "__main__":
    main()
