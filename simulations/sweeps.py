"""Sweeps of one quantity, several seeds each: options, running, tables and figures of the theory commands."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import click

from dnnlib import cells, cli, outputs
from dnnlib.options import options
from metrics.table import mean_and_error, read_csv, write_csv
from simulations.bounds import Bound
from simulations.configs import Rule

HERE = Path(__file__).resolve().parent
FOLDER = click.Path(file_okay=False, path_type=Path)
DELTA = click.option(
    "--delta", type=cli.Float(0, 0.5, min_open=True), default=0.05, help="The bounds may fail with this probability"
)
SIDES = ("single", "multi")
COUNTING, INTERVAL = "counting, no network", " (95 % interval)"
REFERENCES = ("histogram", "pooled", "uniform")  # errors that need no network


def decorators(*chosen: Callable) -> Callable:
    """One decorator of several, the first of them outermost."""
    return lambda function: functools.reduce(lambda f, decorator: decorator(f), reversed(chosen), function)


def place(*flags: str, at: str | None, type: click.ParamType = FOLDER, **more: object) -> Callable:
    """An option for where things lie, by default `at` this place beside the scripts, so that commands work from any folder."""
    return click.option(*flags, type=type, default=at and HERE / at, show_default=at and f"simulations/{at}", **more)


WRITES = {"cls": cli.Output, "writes": outputs.RESULTS}  # of an option for a folder of results


def results_dir(folder: str | None, help: str, **more: object) -> Callable:
    """--results-dir, by default `folder` of simulations/results; more: WRITES, where the command writes there: --outdir."""
    flags = ["--outdir"] * bool(more) + ["--results-dir", "--results_dir", "results_dir"]
    return place(*flags, at=folder and f"results/{folder}", metavar="DIR", help=help, **more)


def values_options(tags: Sequence[str]) -> Callable:
    """--K-values and so on."""
    kinds = {tag: cli.FLOATS if tag == "sim" else cli.INTS for tag in tags}
    made = [
        click.option(f"--{t}-values", f"{t}_values", type=kinds[t], help=f"Values of {t} if it varies") for t in tags
    ]
    return decorators(*made)


def figure_stem(name: str) -> Callable:
    """Where one figure goes, by default `name` in simulations/figures; its suffix may be left out."""
    stem = lambda ctx, param, path: path.with_suffix("") if path.suffix in (".png", ".svg") else path
    kind, help = click.Path(path_type=Path), "Figure, written as .png and .svg"
    how = {"callback": stem, "cls": cli.Output, "writes": outputs.FIGURE}
    return place("--figure", "--save", "save", at=f"figures/{name}", type=kind, metavar="FILE", help=help, **how)


def figure_options(folder: str, script: str) -> Callable:
    """Where a plot command reads and writes, and the resolution."""
    figures_dir = place("--figures-dir", at="figures", metavar="DIR", help="For the figures", **WRITES)
    dpi = click.option("--dpi", type=click.IntRange(50, 1200), default=200, help="Resolution of the PNG")
    return decorators(results_dir(folder, f"Where {script} wrote"), figures_dir, dpi)


def sweep_options(config: type, budgets: Mapping) -> Callable:
    """Options of a command that trains: the sweeps, the fields of `config` and `Rule`, seeds and what else `run` takes."""
    tags = list(budgets["smoke"]["values"])
    return decorators(
        cli.under(
            "What to run",
            click.option("--tag", type=cli.Choice([*tags, "all"]), default="all", help="What varies"),
            click.option("--budget", type=cli.Choice(list(budgets)), default="small", help="Defaults of what follows"),
            values_options(tags),
            results_dir(None, "Where results go; default: simulations/results/<experiment>/<budget>", **WRITES),
            click.option("--seeds", type=cli.SEEDS, help="Seeds of truth, data and networks, e.g. 0-4"),
        ),
        cli.under("Problem and network", options(config)),
        cli.under("Training and choice of networks", options(Rule)),
        click.option("--fresh", is_flag=True, help="Run finished cells again"),
        click.option("--threads", type=cli.COUNT, default=1, help="CPU threads; the networks are small"),
        DELTA,
    )


def print_files(files: Iterable[Path]) -> None:
    """What was written, as JSON."""
    print(json.dumps({"files": [str(file) for file in files]}))


def run(
    experiment: str,  # "arm" or "ebm", the name of the results folder
    budgets: Mapping,  # name -> config, fixed (per tag), values (per tag), rule and seeds
    given: Mapping,  # command-line values of `sweep_options`; None leaves the budget's
    config_type: type,
    run_cell: Callable,  # (config, rule, seed) -> Outcome
    bound: Callable,  # (config, outcome, largest parameter, delta) -> Bound
    published: Mapping | None = None,  # per tag: swept value -> (single, multi)
) -> None:
    """Run sweeps, write results_<tag>.csv and results_<tag>_seeds.csv, and print the files as JSON.

    Raises ValueError for a value that the configuration or the rule refuses, before anything runs.
    """
    import torch  # late: takes seconds to import, --help should not
    from tqdm import tqdm

    from simulations.mle import Outcome

    torch.set_num_threads(given["threads"])
    plan, given = budgets[given["budget"]], {k: v for k, v in given.items() if v is not None}
    folder = given.get("results_dir") or HERE / "results" / experiment / given["budget"]
    seeds = given.get("seeds", plan["seeds"])
    own, rule = ({k: given[k] for k in kind.__dataclass_fields__ if k in given} for kind in (config_type, Rule))
    rule = Rule(**plan["rule"] | rule)
    sweeps = {}
    for tag in plan["values"] if given["tag"] == "all" else [given["tag"]]:
        base = config_type(**plan["config"] | plan["fixed"].get(tag, {}) | own)
        values = given.get(f"{tag}_values", plan["values"][tag])
        sweeps[tag] = [dataclasses.replace(base, **{tag: v}) for v in values]  # all are checked before any runs

    files = []
    for tag, configs in sweeps.items():
        outcomes = cells.run(
            [(config, rule, seed) for config in configs for seed in seeds], run_cell, folder / "cells",
            read=lambda found: Outcome(**found), fresh=given["fresh"],
            progress=lambda todo: tqdm(todo, desc=f"{experiment} {tag}", unit="cell", file=sys.stderr),  # noqa: B023
        )  # fmt: skip
        rows, per_seed = [], []
        for i, config in enumerate(configs):
            found = outcomes[i * len(seeds) : (i + 1) * len(seeds)]
            bounds = bound(config, found[0], rule.bound, given["delta"])
            rows.append(head(tag, config) | _summary(found, bounds))
            if published is not None:
                paper = config_type(**budgets["paper"]["fixed"].get(tag, {}))  # beside its own setting only
                same = all(getattr(config, name) == getattr(paper, name) for name in {"K", "n", "D", "M"} - {tag})
                single, multi = published[tag].get(getattr(config, tag), ("", "")) if same else ("", "")
                rows[-1] |= {"published TV of single": single, "published TV of multi": multi}
                rows[-1]["published ratio"] = multi / single if multi else ""
            per_seed += [head(tag, config, seed) | dataclasses.asdict(o) for seed, o in zip(seeds, found, strict=True)]
        files.append(write_csv(folder / tag / f"results_{tag}.csv", rows))
        files.append(write_csv(folder / tag / f"results_{tag}_seeds.csv", per_seed))
    print_files(files)


def head(tag: str, config, seed: float | None = None, fields: Sequence[str] = ()) -> dict[str, object]:
    """The swept value, the seed if it is a row of one, and the rest of the configuration or some `fields` of it."""
    row = {tag: getattr(config, tag)} | ({} if seed is None else {"seed": seed})
    return row | {k: getattr(config, k) for k in fields or config.__dataclass_fields__ if k != tag}


def _summary(outcomes: Sequence, bound: Bound) -> dict[str, object]:
    """Means and standard errors over seeds of one cell, beside the prediction."""
    found = moments(outcomes)
    single, multi = (found[side][0] for side in SIDES)
    return {
        "seeds": len(outcomes),
        **{f"TV of {side}": found[side][0] for side in SIDES},
        "advantage (abs)": found["advantage"][0],
        **{f"standard error of {name}": error for name, (_, error) in found.items()},
        "measured ratio": multi / single if single else 1.0,
        "predicted ratio": bound.ratio,
        "beta_sim": bound.beta_sim,
        **{f"sharp bound of {side}": bound[side].sharp for side in SIDES},
        "sharp bound of multi vacuous": int(bound.multi.vacuous),
        "sources without data": sum(o.empty for o in outcomes),
        **{f"TV of {name}": mean_and_error(getattr(o, name) for o in outcomes)[0] for name in REFERENCES},
    }


def moments(outcomes: Sequence, field: str = "{}") -> dict[str, tuple[float, float]]:
    """{"single", "multi", "advantage"}: mean and standard error of both errors (fields of an outcome) and their difference."""
    single, multi = ([getattr(o, field.format(side)) for o in outcomes] for side in SIDES)
    found = (single, multi, [s - m for s, m in zip(single, multi, strict=True)])
    return {name: mean_and_error(values) for name, values in zip((*SIDES, "advantage"), found, strict=True)}


def figure_command(experiment: str, all_tags: list[str]) -> click.Command:
    """The command behind plot_arm.py and plot_ebm.py."""
    text = (
        f"Draw {experiment}.png and .svg: TV errors and the ratio multi/single, measured and predicted.\n\n\b\n"
        f"Examples:\n  python simulations/run_{experiment}.py\n  python simulations/plot_{experiment}.py"
    )

    @cli.command(help=text)
    @figure_options(f"{experiment}/small", f"run_{experiment}.py")
    @click.option("--tag", "tags", type=cli.Choice(all_tags), multiple=True, help="Sweeps to draw; default: all")
    @click.option("--name", default=experiment, help="File name without suffix")
    def command(results_dir, figures_dir, dpi, tags, name):
        print_files(plot(list(tags) or all_tags, results_dir, Path(figures_dir) / name, dpi))

    return command


def read_results(results_dir: str | Path, tag: str) -> list[dict]:
    """Rows of results_<tag>.csv, by ascending swept value. Raises ValueError if it is missing or empty."""
    return sorted(read_csv(Path(results_dir) / tag / f"results_{tag}.csv"), key=lambda row: row[tag])


def plot(tags: list[str], results_dir: str | Path, stem: Path, dpi: int = 200) -> list[Path]:
    """Errors above, ratio multi / single below, a column per sweep; published values as open markers where there are any.

    Bars are 95 % intervals over seeds (Student's t); beside the networks stands counting, each source by itself.
    """
    from metrics import figures

    tables = [read_results(results_dir, tag) for tag in tags]
    width = max(2.05, 5.6 / len(tags))  # room for the legend
    fig, axes = figures.figure(columns=len(tags), rows=2, width=width, height=1.9, sharex="col", squeeze=False)
    for column, (tag, rows) in enumerate(zip(tags, tables, strict=True)):
        errors, ratio = axes[0][column], axes[1][column]
        x, ends = [row[tag] for row in rows], []
        for side in SIDES:
            style = {"color": figures.LINE[side], "marker": figures.MARKER[side], "markersize": 4.5}
            y, error = (
                [r[f"TV of {side}"] for r in rows],
                [half_width(r[f"standard error of {side}"], r["seeds"]) for r in rows],
            )
            style |= {"linestyle": figures.DASH[side]}
            ends += _curve(errors, rows, tag, y, error, f"published TV of {side}", figures.LABEL[side], style)
        counted = [row["TV of histogram"] for row in rows]
        errors.plot(x, counted, color=figures.NEUTRAL, linestyle="-.", linewidth=1.2, label=COUNTING)
        figures.pad(errors, [0, *ends, *counted], share=0.05)
        ratio.axhline(1, color=figures.NEUTRAL, linewidth=0.7)
        y, error = (
            [row["measured ratio"] for row in rows],
            [half_width(_ratio_error(row), row["seeds"]) for row in rows],
        )
        style = {"color": "black", "marker": "D", "markersize": 4}
        ends = _curve(ratio, rows, tag, y, error, "published ratio", "ratio", style)
        predicted = [row["predicted ratio"] for row in rows]
        ratio.plot(x, predicted, color=figures.NEUTRAL, linestyle="--", linewidth=1.2, label="ratio, predicted")
        figures.pad(ratio, [0, *ends, *predicted], share=0.05)
        figures.x_ticks(ratio, x, log=tag == "n", share=0.3 if tag == "n" else 0.13)
        ratio.set_xlabel(f"({'abcd'[column]}) {figures.PANEL_LABELS[tag]}", fontsize=9)
    axes[0][0].set_ylabel("Average TV error")
    axes[1][0].set_ylabel("Ratio multi / single")
    _legend(fig, axes, [*figures.LABEL.values(), "ratio"], columns=4 if len(tags) == 4 else 2)
    fig.align_ylabels(axes[:, 0])
    return figures.save(fig, stem, dpi)


def _curve(axis, rows, tag, y, error, published, label, style) -> list[float]:
    """Draw measured values with error bars and published ones; returns the ends of all."""
    from metrics import figures

    x = [row[tag] for row in rows]
    several = any(map(math.isfinite, error))
    figures.intervals(axis, x, y, error, label=label + INTERVAL * several, **style)
    known = [(row[tag], row[published]) for row in rows if row.get(published) not in (None, "")]
    if known:
        open_marker = {"linestyle": ":", "linewidth": 1, "markerfacecolor": "white", "label": f"{label}, published"}
        axis.plot(*zip(*known, strict=True), **style | open_marker)
    bars = [half if math.isfinite(half) else 0.0 for half in error]
    ends = [a + sign * half for a, half in zip(y, bars, strict=True) for sign in (-1, 1)]
    return [*ends, *(value for _, value in known)]


def _legend(fig, axes, names, columns) -> None:
    handles = {handle.get_label(): handle for axis in axes.flat for handle in axis.get_legend_handles_labels()[0]}
    order = [f"{name}{kind}" for name in names for kind in (INTERVAL, "", ", published", ", predicted")] + [COUNTING]
    shown = {label: handles[label] for label in order if label in handles}
    style = dict(loc="outside upper center", ncols=columns, fontsize=8.5, columnspacing=1.3, handlelength=1.9)
    fig.legend(shown.values(), shown, **style)


def half_width(error: float, seeds: int) -> float:
    """Half of the 95 % interval of a mean over seeds, from its standard error (Student's t); nan for a single seed."""
    from scipy.stats import t

    return error * float(t.ppf(0.975, seeds - 1)) if seeds > 1 else math.nan


def _ratio_error(row: Mapping) -> float:
    """Standard error of multi / single by the delta method; the variance of their difference gives the covariance."""
    s, m = row["TV of single"], row["TV of multi"]
    vs, vm, vd = (row[f"standard error of {k}"] ** 2 for k in ("single", "multi", "advantage"))
    if not s or not m:
        return 0.0
    covariance = 0.5 * (vs + vm - vd)
    return m / s * math.sqrt(max(0.0, vs / s**2 + vm / m**2 - 2 * covariance / (s * m)))
