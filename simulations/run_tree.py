"""The 2-D tree: train toy networks with and without data selection, test them, draw autoguidance."""

if not __package__:
    import _here

import json

import click

from dnnlib import cli
from dnnlib.options import options
from simulations.configs import TreeConfig
from simulations.sweeps import figure_stem, place, print_files
from training.config import RUN

EXAMPLES = """
\b
Examples:
  # A small reference, then a learner trained on what the reference makes learnable (AJEST), and both tested:
  python simulations/run_tree.py train --dim=32 --train-steps=512 --outdir=out/tree/ref
  python simulations/run_tree.py train --select=jest --guide=out/tree/ref --outdir=out/tree/ajest
  python simulations/run_tree.py test --net=out/tree/ajest --guide=out/tree/ref --external --mandala
  python simulations/run_tree.py plot --net=out/tree/ajest --gnet=out/tree/ref
"""


@cli.group(epilog=EXAMPLES)
def main():
    """The tree mixture of EDM2's autoguidance paper, with AJEST's selection and metrics."""


CLASSES = click.option("--cls", type=cli.Choice(["A", "B", "AB"]), default="A", help="Classes of the tree")
GUIDANCE = click.option("--guidance", type=cli.Float(), default=3.0, help="Guidance weight")
SEED = click.option("--seed", type=click.IntRange(min=0), default=1)
DEVICE = click.option("--device", metavar="NAME", default="cpu", help="cuda, cpu, ...")


@main.command()
@cli.under(
    "The run",
    place(
        "--outdir",
        at="results/tree/run",
        type=click.STRING,
        metavar="DIR",
        help="Run folder",
        cls=cli.Output,
        writes=RUN,
    ),
    options(TreeConfig),
)
@cli.under(
    "Selection as published",
    click.option("--guidance/--no-guidance", "use_guide", default=None, help="Use --guide; default: if it is given"),
    click.option("--selection", "random", is_flag=True, help="Same as --select=random"),
    click.option("--acid", is_flag=True, help="Same as --select=jest"),
    click.option("--early", is_flag=True, help="Select until the learner beats the reference"),
    click.option("--late", is_flag=True, help="Select from then on"),
)
@cli.under(
    "Measured",
    click.option("--val/--no-val", default=True, help="Loss and L2 distance at every snapshot"),
    click.option("--test/--no-test", default=True, help="All metrics at the end, into test.json"),
    click.option("--viz/--no-viz", default=False, help="Draw samples at the end, into samples.png"),
)
@click.option("-n", "--dry-run", is_flag=True, help="Print the configuration and stop")
def train(outdir, val, test, viz, dry_run, **given):
    """Train one toy network. --batch points are drawn per step; with --select a part of them is trained on. It takes
    minutes and is not resumed: after an interruption it wants another folder. run_tree_sweep.py keeps finished runs.
    """
    fields = _resolve(**given)
    from dataclasses import asdict

    from simulations.tree import metrics as tree_metrics
    from simulations.tree import training as tree_training
    from torch_utils import distributed

    config = TreeConfig(**fields).check()
    distributed.init(config.device)
    if dry_run:
        print(json.dumps(asdict(config), indent=2))
        print("Dry run; exiting.")
        return
    points = tree_metrics.Points(config.cls, num=512, device=config.device)
    hook = tree_metrics.validation_hook(points) if val else None
    loop = tree_training.train(config, outdir, hook)
    ema = loop.ema.get()[0][0].net
    if test:
        tree_metrics.write_test(config, outdir, loop.objective.net.eval(), ema)
    if viz:
        from simulations.tree import plots as tree_plots

        tree_plots.write_samples(config, outdir, ema)


def _resolve(use_guide, random, acid, early, late, **fields):
    """Fields of a TreeConfig: those that were given, and those that other options stand for."""
    if early and late:
        raise click.UsageError("--early and --late exclude each other; give one")
    if (random or acid) and fields["select"] not in (None, "none"):
        raise click.UsageError("--selection and --acid stand for --select=random and --select=jest; give one")
    if use_guide and fields["guide"] is None:
        raise click.UsageError("--guidance needs a guide: give --guide")
    if use_guide is False:
        fields["guide"] = None
    if random or acid:
        fields["select"] = "jest" if acid else "random"
    given = {name: value for name, value in fields.items() if value is not None}
    return given | {"when": "early" if early else "late" if late else "always"}


@main.command()
@click.option("--net", "--net-path", "net", metavar="SNAPSHOT", required=True, help="File, or run folder")
@click.option("--ema", "--ema-path", "ema", metavar="SNAPSHOT", help="Average of the same run, measured beside")
@click.option("--guide", "--guide-path", "guide", metavar="SNAPSHOT", help="Guide; adds the guided metrics")
@GUIDANCE
@CLASSES
@click.option(
    "--num", "--n-samples", "num", type=click.IntRange(min=1), default=1024, help="Samples; scores depend on it"
)
@click.option("--external", is_flag=True, help="Also on the outer branches (class A)")
@click.option("--mandala", is_flag=True, help="Also mandala and classification score")
@click.option("--levels", is_flag=True, help="Also the loss per noise level")
@SEED
@DEVICE
def test(cls, num, seed, device, **options):
    """Measure snapshots. stdout: JSON, with what the exact mixture itself scores under `floor`."""
    from simulations.tree import metrics as tree_metrics
    from torch_utils import distributed

    distributed.init(device)
    print(json.dumps(tree_metrics.test(tree_metrics.Points(cls, num, seed, device), **options), indent=2))


@main.command()
@click.option("--net", metavar="SNAPSHOT", help="Main network: file, or run folder")
@click.option("--gnet", "--guide", "gnet", metavar="SNAPSHOT", help="Guide")
@click.option(
    "--models", metavar="DIR", help="Folder or URL of the published ones: clsA-layers04-dim64/iter4096.pkl, ..."
)
@GUIDANCE
@CLASSES
@figure_stem("tree-autoguidance")
@SEED
@DEVICE
def plot(net, gnet, models, guidance, cls, save, seed, device):
    """Draw the autoguidance figure: samples, densities and trajectories with and without guidance."""
    from training.presets import published_file

    if models is not None:
        net = net or published_file(models, "clsA-layers04-dim64/iter4096")
        gnet = gnet or published_file(models, "clsA-layers04-dim32/iter0512")
    if net is None or gnet is None:
        raise ValueError("--net or --gnet is missing: give both, or --models=DIR of the published ones")
    from metrics import figures
    from simulations.tree import plots as tree_plots
    from simulations.tree.training import load_toy
    from torch_utils import distributed

    distributed.init(device)
    figure = tree_plots.autoguidance_figure(load_toy(net, device), load_toy(gnet, device), guidance, cls, seed, device)
    print_files(figures.save(figure, save))


if __name__ == "__main__":
    main()
