"""Run an experiment file: its steps in order, those already done skipped, several side by side."""

import contextlib
from pathlib import Path

import click

from dnnlib import cli, experiment, outputs
from dnnlib.reading import parse_yaml
from dnnlib.util import locked, one_of, reason, visible_gpus

EXAMPLES = """
\b
Examples:
  python run_experiment.py experiments/quickstart.yaml
  python run_experiment.py experiments/quickstart.yaml --list
  python run_experiment.py experiments/quickstart.yaml --set sources=0,1,2,3 --set per_source=100
  python run_experiment.py experiments/own-data.yaml --set source=photos
  # Some steps, with what they need: all training, each on a GPU of its own where there are several
  python run_experiment.py experiments/quickstart.yaml --step='train-*' --with-needs
  # What it would take, before anything runs; the same as jobs of SLURM
  python run_experiment.py experiments/imagenet.yaml --budget=full --dry-run
  bash bash_files/slurm/experiment.sh experiments/imagenet.yaml --budget=full
\b
Exit codes: 0 done, 2 bad input or a step that failed, 75 stopped by SIGTERM or SIGUSR1 (run the same command again).
"""


def load_scripts():
    """The scripts that steps may run, by file name."""
    import calculate_metrics
    import dataset_tool
    import generate_images
    import reconstruct_phema
    import train_edm2
    from simulations import run_robustness, run_small_vae, run_solvers, run_stable_targets, run_toy

    return {
        "train_edm2.py": train_edm2.main,
        "generate_images.py": generate_images.main,
        "calculate_metrics.py": calculate_metrics.cmdline,
        "dataset_tool.py": dataset_tool.main,
        "reconstruct_phema.py": reconstruct_phema.main,
        "simulations/run_robustness.py": run_robustness.main,
        "simulations/run_small_vae.py": run_small_vae.main,
        "simulations/run_solvers.py": run_solvers.main,
        "simulations/run_stable_targets.py": run_stable_targets.main,
        "simulations/run_toy.py": run_toy.main,
    }


def class_ids(source):
    """Of a data set, for settings such as `sources: {classes: "{source}"}`; says on stderr which they are."""
    from training.dataset.convert import class_ids

    ids, understood = class_ids(source)
    if understood:
        click.echo(understood, err=True)
    return ids


def find_file(ctx, param, path):
    """The experiment file: where it is named, or one of ours, so that their names work from any folder."""
    own = Path(__file__).parent / "experiments" / Path(path).name
    if Path(path).is_file():
        return path
    if not own.is_file():
        names = [file.name for file in sorted(own.parent.glob("*.yaml"))]
        raise ValueError(f"FILE={path}: no such file; as one of ours it {one_of(Path(path).name, names)}")
    return str(own)


def _of_imagenet(name):
    """The function of training/dataset/cells.py of that name."""

    def read(text):
        from training.dataset import cells

        return getattr(cells, name)(text)

    return read


READERS = {"classes": class_ids, "cells": _of_imagenet("cells"), "levels": _of_imagenet("levels")}


def parse_setting(text, texts=()):
    """'name=value' -> (name, value), the value of `texts` as written, of others read as YAML; a comma-separated list of
    scalars is a list.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}: give NAME=VALUE")
    if name in texts:
        return name, value
    try:
        parts = [parse_yaml(part) for part in value.split(",")]
        return name, parse_yaml(value) if len(parts) == 1 or value.lstrip().startswith(("[", "{")) else parts
    except ValueError as err:
        raise ValueError(f"--set {text}: the value is not readable ({reason(err)})") from err


@cli.command(epilog=EXAMPLES)
@click.argument("file", metavar="FILE", callback=find_file)
@cli.under(
    "What to run",
    click.option("--budget", metavar="NAME", help="Named overrides in the file, e.g. smoke; several with commas"),
    click.option("--set", "settings", metavar="NAME=VALUE", multiple=True, help="Override one setting; repeatable"),
    cli.output("--outdir --out", outputs.RESULTS, metavar="DIR", help="Where the results go; default: results/<name>"),
)
@cli.under(
    "Which steps",
    click.option(
        "--list", "list_only", is_flag=True, help="Print the steps, with their index and whether they are done"
    ),
    click.option(
        "--arrays", is_flag=True, help="Print what is to do as job arrays: first index, array, those before it"
    ),
    click.option(
        "--step", "names", metavar="NAME", multiple=True, help="Only this, or a pattern: 'train-*'; repeatable"
    ),
    click.option("--index", type=cli.INTS, metavar="LIST", help="Only the steps of these indices, e.g. 4 or 0,2-7"),
    click.option("--with-needs", is_flag=True, help="--step, --index: first do what these need and is not done"),
    click.option("--jobs", type=cli.COUNT, help="Steps side by side; default: a GPU each, else a core each, at most 8"),
)
@click.option("-n", "--dry-run", is_flag=True, help="Check all that can be checked, print what it would take, and stop")
@click.option("--seconds", type=cli.Float(0, 600), default=5, help="--dry-run: measurement on this machine; 0: none")
def main(file, budget, settings, outdir, list_only, arrays, names, index, with_needs, jobs, dry_run, seconds):
    """Run the experiment described by FILE. Run the same command again to resume."""
    texts = experiment.texts(file)
    overrides = dict(parse_setting(text, texts) for text in settings)
    if outdir is not None:
        overrides["out"] = outdir
    settings, steps = experiment.load(file, budget, overrides, READERS)
    out, all_steps = settings["out"], not names and index is None
    chosen = experiment.choose(steps, names, index, file)
    if list_only:
        for i, step in enumerate(steps):
            if step in chosen:
                print(f"{i:4d} {'done' if experiment.is_done(out, step) else 'todo'} {step.name}")
        return
    chosen = experiment.with_needs(out, steps, chosen, with_needs)
    if arrays:
        for first, numbers, after in experiment.arrays(out, steps, chosen):
            print(first, numbers, ",".join(map(str, after)) or "-")
        return
    outputs.check("--outdir", out, outputs.RESULTS, [outputs.Named("FILE", file)])
    if dry_run:
        from metrics.detectors import require_weights
        from training.dry_run import of_experiment

        print(of_experiment(out, chosen, load_scripts(), seconds, {"calculate_metrics.py": require_weights}))
        return
    with locked(out) if all_steps else contextlib.nullcontext():  # single steps may run side by side
        gpus = visible_gpus()
        experiment.run(chosen, out, load_scripts, jobs or experiment.default_jobs(chosen, gpus), gpus=gpus)
    if all_steps and settings.get("print"):
        with open(settings["print"].replace("{out}", out), encoding="utf-8") as text:
            print(text.read())


if __name__ == "__main__":
    main()
