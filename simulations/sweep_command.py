"""What the commands of arm and ebm share: options of training and selection, running planned sweeps, drawing them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import click

from dnnlib import cli
from metrics.table import write_csv
from simulations.theory_io import FIGURES_DIR, RESULTS_DIR, ListOption, OneLineCommand


# fmt: off  (one option a line)
def training_options(function):
    """Options of seeds, networks, training and selection. Those without a default take the budget's."""
    options = [
        click.option(
            "--results-dir",
            "--results_dir",
            type=click.Path(file_okay=False, path_type=Path),
            help="Where results go.  [default: simulations/results/<experiment>/<budget>]",
        ),
        click.option("--seeds", type=ListOption(int, 0, 2**31), help="Seeds of truth, data and networks, e.g. 0-4."),
        click.option("--fresh", is_flag=True, help="Run finished cells again."),
        click.option(
            "--threads", type=click.IntRange(min=1), default=1, help="CPU threads; the networks are too small for more."
        ),
        click.option("--sim", type=cli.Float(0, 1), help="True similarity of the sources, unless it varies."),
        click.option(
            "--family",
            type=click.Choice(["path", "independent"]),
            help="Sources differ in one number or in everything.",
        ),
        click.option("--scale", type=cli.Float(min=0), help="Size of the log-probability field."),
        click.option("--de", type=click.IntRange(min=1), help="Embedding width."),
        click.option("--W", "W", type=click.IntRange(min=1), help="Hidden width."),
        click.option("--L", "L", type=click.IntRange(min=1), help="Affine layers."),
        click.option("--lrs", type=ListOption(float, 0), help="Learning rates to choose from."),
        click.option("--batches", type=ListOption(int, 1), help="Batch sizes to choose from."),
        click.option(
            "--steps", type=ListOption(int, 1), help="Lengths of training to choose from, in optimizer steps."
        ),
        click.option(
            "--early/--last", "early", default=None, help="Take a training's best weights on the way, or its last."
        ),
        click.option(
            "--eval-every",
            type=click.IntRange(min=1),
            help="With --early: steps between looks at the selection likelihood.",
        ),
        click.option(
            "--patience",
            type=click.IntRange(min=1),
            help="With --early: looks without improvement that end a training.",
        ),
        click.option(
            "--holdout",
            type=cli.Float(0, 1, min_open=True, max_open=True),
            help="Share of the data held out for selection.",
        ),
        click.option(
            "--select", type=click.Choice(["holdout", "train"]), help="Choose by held-out or by training likelihood."
        ),
        click.option(
            "--bound",
            "--B",
            "bound",
            type=cli.Float(0, min_open=True),
            help="B: parameters are clipped to [-B, B].",
        ),
        click.option(
            "--delta",
            type=cli.Float(0, 0.5, min_open=True),
            default=0.05,
            help="Failure probability of the bounds.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


# fmt: on


def run_sweeps(
    experiment: str,
    budget: str,
    plan: Mapping,
    tags: list[str],
    options: Mapping,
    config_type: type,
    outcome_type: type,
    run_cell: Callable,
    bound: Callable,
    published: Mapping | None = None,
) -> None:
    """Run the sweeps of a plan, write results_<tag>.csv and results_<tag>_seeds.csv, and print the files as JSON.

    Args:
        experiment:  "arm" or "ebm", the name of the results folder.
        budget:      name of the plan.
        plan:        config, fixed (per tag), values (per tag), rule and seeds.
        tags:        sweeps to run.
        options:     command-line values; None leaves the plan's.
        config_type, outcome_type, run_cell: the experiment.
        bound:       (config, outcome, largest parameter, delta) -> Bound.
        published:   per tag: swept value -> (single, multi).

    Raises:
        ValueError: a value that the configuration or the rule refuses, before anything runs.
    """
    import torch  # late: takes seconds to import, --help should not

    from simulations.cells import run_cells, seed_rows, summary_row
    from simulations.mle import Rule

    torch.set_num_threads(options["threads"])
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if v is not None}
    folder = given.get("results_dir") or RESULTS_DIR / experiment / budget
    seeds = given.get("seeds") or plan["seeds"]
    rule = Rule(**plan["rule"] | {k: given[k] for k in Rule.__dataclass_fields__ if k in given})
    own = {k: given[k] for k in config_type.__dataclass_fields__ if k in given}
    sweeps = {}
    for tag in tags:
        base = config_type(**plan["config"] | plan["fixed"].get(tag, {}) | own)
        values = given.get(f"{tag}_values") or plan["values"][tag]
        sweeps[tag] = [dataclasses.replace(base, **{tag: v}) for v in values]  # all are checked before any runs

    files = []
    for tag, configs in sweeps.items():
        progress = _progress(f"{experiment} {tag}")
        table = run_cells(configs, seeds, rule, run_cell, outcome_type, folder / "cells", given["fresh"], progress)
        rows = [
            summary_row(
                tag,
                config,
                outcomes,
                bound(config, outcomes[0], rule.bound, given["delta"]),
                (published or {}).get(tag),
            )
            for config, outcomes in zip(configs, table, strict=True)
        ]
        files.append(write_csv(folder / tag / f"results_{tag}.csv", rows))
        files.append(write_csv(folder / tag / f"results_{tag}_seeds.csv", seed_rows(tag, configs, seeds, table)))
    print(json.dumps({"files": [str(f) for f in files]}))


def _progress(name: str):
    from tqdm import tqdm

    return lambda cells: tqdm(cells, desc=name, unit="cell", file=sys.stderr)


def figure_command(experiment: str, all_tags: list[str]) -> click.Command:
    """The command behind plot_arm.py and plot_ebm.py."""
    folder = {"type": click.Path(file_okay=False, path_type=Path)}
    tag_help = "Sweeps to draw, repeated.  [default: all]"
    help_text = (
        f"Draw {experiment}.png and .svg: TV errors and the ratio multi/single, measured and predicted.\n\n\b\n"
        f"Examples:\n  python simulations/run_{experiment}.py\n  python simulations/plot_{experiment}.py"
    )

    @click.command(cls=OneLineCommand, help=help_text)
    @click.option(
        "--results-dir",
        "--results_dir",
        **folder,
        default=RESULTS_DIR / experiment / "small",
        show_default=f"simulations/results/{experiment}/small",
        help=f"Where run_{experiment}.py wrote.",
    )
    @click.option(
        "--figures-dir",
        **folder,
        default=FIGURES_DIR,
        show_default="simulations/figures",
        help="Where the figure goes.",
    )
    @click.option("--tag", "tags", type=click.Choice(all_tags), multiple=True, help=tag_help)
    @click.option("--name", default=experiment, show_default=True, help="File name without suffix.")
    @click.option("--dpi", type=click.IntRange(50, 1200), default=200, show_default=True, help="Resolution of the PNG.")
    def command(results_dir, figures_dir, tags, name, dpi):
        from simulations.sweep_figure import plot_sweeps

        files = plot_sweeps(list(tags) or all_tags, results_dir, figures_dir, name, dpi)
        print(json.dumps({"files": [str(f) for f in files]}))

    return command
