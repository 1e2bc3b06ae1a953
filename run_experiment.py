"""Run an experiment file: its steps in order, those already done skipped, several side by side."""

import contextlib
from pathlib import Path

import click

from dnnlib import cli, experiment, outputs
from dnnlib.reading import parse_yaml
from dnnlib.util import locked, one_of, reason, usable_cores

EXAMPLES = """
\b
Examples:
  python run_experiment.py experiments/quickstart.yaml
  python run_experiment.py experiments/quickstart.yaml --list
  python run_experiment.py experiments/quickstart.yaml --set sources=0,1,2,3 --set per_source=100
  python run_experiment.py experiments/own-data.yaml --set source=photos
  python run_experiment.py experiments/quickstart.yaml --step=train-multi-seed0
  sbatch --array=0-7 --wrap='python run_experiment.py sweep.yaml --index=$SLURM_ARRAY_TASK_ID'
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
    click.option("--step", "names", metavar="NAME", multiple=True, help="Run only this step; repeatable"),
    click.option("--index", type=click.IntRange(min=0), help="Run only the step of this index (for job arrays)"),
    click.option("--jobs", type=cli.COUNT, help="Steps side by side; default: number of cores, at most 8"),
)
def main(file, budget, settings, outdir, list_only, names, index, jobs):
    """Run the experiment described by FILE. Run the same command again to resume."""
    texts = experiment.texts(file)
    overrides = dict(parse_setting(text, texts) for text in settings)
    if outdir is not None:
        overrides["out"] = outdir
    settings, steps = experiment.load(file, budget, overrides, {"classes": class_ids})
    if index is not None:
        if index >= len(steps):
            raise ValueError(f"--index={index}: {file} has steps 0 to {len(steps) - 1}")
        names = (*names, steps[index].name)
    unknown = set(names) - {step.name for step in steps}
    if unknown:
        raise ValueError(f"--step={sorted(unknown)[0]} is no step of {file}: see --list")
    if list_only:
        for i, step in enumerate(steps):
            if not names or step.name in names:
                print(f"{i:4d} {'done' if experiment.is_done(settings['out'], step) else 'todo'} {step.name}")
        return
    outputs.check("--outdir", settings["out"], outputs.RESULTS, [outputs.Named("FILE", file)])
    chosen = [step for step in steps if not names or step.name in names]
    with contextlib.nullcontext() if names else locked(settings["out"]):  # single steps may run side by side
        experiment.run(chosen, settings["out"], load_scripts, jobs or min(usable_cores(), 8))
    if not names and settings.get("print"):
        with open(settings["print"].replace("{out}", settings["out"]), encoding="utf-8") as text:
            print(text.read())


if __name__ == "__main__":
    main()
