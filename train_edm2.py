"""Train a diffusion model on one data source or many, on one process or, under torchrun, on several."""

import json

import click

from dnnlib import cli
from dnnlib.options import options
from training import presets
from training.config import RUN, TrainingConfig, make_config

EXAMPLES = """
\b
Examples:
  # The three digits 0, 1, 2 on a CPU, then the same again to resume:
  python train_edm2.py --outdir=training-runs/digits --data=datasets/digits.zip --preset=digits8
\b
  # Multi-source ImageNet-256 in latents on 8 GPUs:
  torchrun --standalone --nproc_per_node=8 train_edm2.py --outdir=training-runs/sim3-10c-1000 \\
      --data=datasets/latent_datasets/sim3/inet-256-10c-1000.zip --preset=edm2-img256-xs-10c-1000 \\
      --batch=8192 --status=64Ki --snapshot=16Mi --checkpoint=64Mi
\b
  # Score 10000 images of every 8 million-th snapshot against a reference while training: training-runs/c10/metrics
  python train_edm2.py --outdir=training-runs/c10 --data=datasets/cifar10.zip --preset=edm2-cifar10-xxs --snapshot=2Mi \
      --checkpoint=4Mi --eval-every=8Mi --eval-ref=dataset-refs/cifar10.npz --eval-num=10000
\b
  # One small model for each of the digits 0, 1, 2, side by side in one process:
  python train_edm2.py --each=0,1,2 --outdir=training-runs/digit-%s --data=datasets/digit-%s.zip --preset=digits8
\b
Exit codes: 0 done, 1 training failed, 2 bad input, 75 stopped by SIGTERM, SIGINT or SIGUSR1 after writing a checkpoint
(run the same command again to go on).
"""


@cli.command(epilog=EXAMPLES)
@cli.under(
    "What to run",
    cli.output("--outdir", RUN, metavar="DIR", required=True, help="Run folder; an existing run is resumed"),
    click.option("--preset", metavar="NAME", help="Where all other defaults come from, see --list-presets"),
    click.option("--resume", metavar="FILE", help="Continue from this checkpoint"),
    click.option(
        "--each",
        metavar="LIST",
        help="A small model for each entry, side by side; %s stands for it elsewhere (LIST/LIST: %1, %2)",
    ),
)
@options(TrainingConfig)
@cli.under("Selection", click.option("--chunks", type=cli.COUNT, help="jest, easy, diverse: number of chunks"))
@cli.under(
    "Running",
    cli.device_option,
    click.option("--profile", is_flag=True, help="Also say where a step goes, and leave a trace in the run folder"),
)
@cli.plugin_option
@cli.listing("--list-presets", presets.listed, "Print the presets with their sizes and sources")
@cli.listing("--list-processes", cli.names_in("training.processes", "REGISTRY"), "Print the values of --process")
@cli.listing("--list-selections", cli.names_in("training.selection", "FUNCTIONS"), "Print the values of --select")
@click.option("-n", "--dry-run", is_flag=True, help="Print the configuration, check all, plan, and stop")
def main(outdir, resume, device, profile, dry_run, each, **given):
    """Train a diffusion model on one data source or many. Run the same command again to resume."""
    if each and (resume or profile):
        option = "--resume" if resume else "--profile"
        raise ValueError(f"{option} is not for models side by side (these resume from their own folders): leave it out")
    config = configure(**given)
    runs = {own["outdir"]: configure(**own) for own in each} if each else {outdir: config}
    if dry_run:
        print(json.dumps(config.to_dict(), indent=2), flush=True)
        from training import dry_run as trial

        for folder, one in runs.items():
            trial.of_training(one, folder, resume, device, snapshots_of(one))
        print("Dry run; exiting.")
        return 0
    if each:
        from training import side_by_side

        return side_by_side.train_command(runs, device)
    from training import setup

    return setup.train_command(config, outdir, resume, device, snapshots_of(config), profile)


def snapshots_of(config):
    """Hooks that score the snapshots of a run, or None."""
    if not config.eval_nimg:
        return None
    from metrics import snapshots

    return snapshots.while_training(config)


def configure(
    data, preset, chunks, outdir=None, resume=None, device=None, profile=None, dry_run=None, each=None, **given
):
    """The TrainingConfig of the options of a command line."""
    if not data:
        raise click.UsageError("Missing option '--data'.")
    if not preset:
        raise presets.ask()
    if chunks is not None:
        given["select_options"] = {"num_chunks": chunks}
    return make_config(preset, data=data, **given)


if __name__ == "__main__":
    main()
