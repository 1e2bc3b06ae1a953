"""Train a diffusion model on one data source or many, on one process or, under torchrun, on several."""

import sys

import click

from dnnlib import cli
from training import presets

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
Exit codes: 0 done, 1 training failed, 2 bad input, 75 stopped by SIGTERM or SIGINT after writing a checkpoint
(run the same command again to go on).
"""

CHOICES = {
    "optimizer": click.Choice(["adam", "adamw", "adamax"]),
    "schedule": click.Choice(["ajest", "edm2", "edm2-halved", "constant", "cosine"]),
    "ema": click.Choice(["power", "halflife", "decay", "none"]),
    "when": click.Choice(["always", "early", "late"]),
    "scope": click.Choice(["global", "rank"]),
    "time_sampling": click.Choice(["uniform", "importance", "snr"]),
    "weighting": click.Choice(["likelihood", "reweightedv1", "reweightedv2"]),
    "cheap": click.Choice(["half", "levels", "lowres"]),
}


def options(function):
    """All options; a name left out keeps the preset's value, and without a preset the default of TrainingConfig."""
    table = [
        # What to train on.
        click.option("--outdir", metavar="DIR", required=True, help="Run folder; an existing run is resumed"),
        click.option("--data", metavar="ZIP|DIR", required=True, help="Data set (see dataset_tool.py)"),
        click.option("--val-data", metavar="ZIP|DIR", help="Held-out data for the validation loss"),
        click.option("--cond", type=bool, help="Class-conditional training"),
        click.option("--xflip", type=bool, help="Add mirrored copies of all images"),
        click.option("--encoder", metavar="NAME", help="Of pixels: rgb, dequantize, center or logit"),
        click.option("--max-images", type=click.IntRange(min=1), help="Use so many images of the data set"),
        click.option("--preset", metavar="NAME", default="edm2-img512-s", help="Row of training/presets.py"),
        # Network.
        click.option("--arch", metavar="NAME", help="edm2, ddpmpp, ncsnpp or adm"),
        click.option("--precond", metavar="NAME", help="Of ddpmpp, ncsnpp, adm: edm, vp or ve"),
        click.option("--channels", "--cbase", "channels", type=click.IntRange(1, 2**16), help="Base width"),
        click.option("--channel-mult", "--cres", "channel_mult", type=cli.INTS, help="Width per level, e.g. 1,2,3,4"),
        click.option("--num-blocks", type=click.IntRange(1, 1000), help="Blocks per level"),
        click.option("--attn-resolutions", type=cli.INTS, help="Resolutions with attention, e.g. 16,8"),
        click.option("--channels-per-head", type=click.IntRange(1, 2**16), help="Width of an attention head"),
        click.option("--dropout", type=cli.Float(0, 1), help="Dropout probability"),
        click.option("--fp16", type=bool, help="Reduced precision on GPUs"),
        # Noise and loss.
        click.option(
            "--process",
            metavar="NAME",
            help="Noise: edm, pfgmpp, vp, cld, alda, malda, learned, or linear with Q and D",
        ),
        click.option("--process-options", type=cli.MAPPING, help="Of the process: M=0.25,beta=4:4,init_aux_var=0.01"),
        click.option("--time-sampling", type=CHOICES["time_sampling"], help="Law of t of such a process [snr]"),
        click.option("--weighting", type=CHOICES["weighting"], help="Its weight [likelihood]"),
        click.option("--t-min", type=cli.Float(min=0, min_open=True), help="Its lowest t [where sigma is 0.002]"),
        click.option(
            "--process-lr-scale", type=cli.Float(), help="Learned: learning rate relative to the network's [0.1]"
        ),
        click.option(
            "--aug-dim",
            type=cli.Float(infinite=True),
            metavar="D",
            help="Augmented dimensions of pfgmpp, any number > 0 or inf",
        ),
        click.option("--loss", metavar="NAME", help="edm2, edm, vp, ve, or process: a process's own noise levels"),
        click.option("--P_mean", "P_mean", type=cli.Float(), help="Mean of ln sigma"),
        click.option("--P_std", "P_std", type=cli.Float(), help="Standard deviation of ln sigma"),
        click.option("--sigma-data", type=cli.Float(), help="Standard deviation of the data (dataset_tool.py inspect)"),
        click.option("--uncertainty", type=bool, help="Learned log-variance in the loss"),
        click.option("--label-dropout", type=cli.Float(0, 1), help="Probability of a zeroed label"),
        click.option("--augment", type=cli.Float(0, 1), help="Probability of EDM's augmentations"),
        click.option("--stf", type=bool, help="Stable targets: posterior means over reference images"),
        click.option("--stf-refs", type=click.IntRange(min=1), help="Reference images per noise block"),
        # Optimization.
        click.option("--duration", "total_nimg", type=cli.NIMG, help="Total training images, e.g. 64Mi"),
        click.option("--batch", "batch_size", type=cli.NIMG, help="Total batch over all processes"),
        click.option("--optimizer", type=CHOICES["optimizer"]),
        click.option("--betas", type=cli.FLOATS, help="Of the optimizer, e.g. 0.9,0.99"),
        click.option("--weight-decay", type=cli.Float()),
        click.option("--grad-clip", type=cli.Float(), help="Global norm of the gradient"),
        click.option("--lr", type=cli.Float(), help="Reference learning rate"),
        click.option("--lr-schedule", type=CHOICES["schedule"]),
        click.option("--decay", type=cli.Float(), help="Batches before the learning rate decays; 0: never"),
        click.option("--rampup", type=cli.Float(), metavar="MIMG", help="Learning-rate ramp-up, million images"),
        click.option("--ema", type=CHOICES["ema"], help="Kind of weight average"),
        click.option("--ema-std", type=cli.FLOATS, help="power: relative stds, e.g. 0.05,0.10"),
        click.option("--ema-halflife", type=cli.Float(), metavar="MIMG", help="halflife: million images"),
        click.option("--ema-decay", type=cli.Float(), help="decay: per step"),
        click.option("--ls", "loss_scaling", type=cli.Float(), help="Loss scale"),
        # Selection.
        click.option("--select", metavar="NAME", help="none, or a function of training/selection/functions.py"),
        click.option(
            "--reference", metavar="SNAPSHOT", help="Reference of the selection; ema: the learner's own average"
        ),
        click.option("--filter-ratio", type=cli.Float(), help="Share of the candidates that is discarded"),
        click.option("--chunks", type=click.IntRange(min=1), help="jest, easy, diverse: number of chunks"),
        click.option("--select-when", type=CHOICES["when"], help="Until / from the learner beating the reference"),
        click.option("--select-scope", type=CHOICES["scope"], help="Choose over all processes or in each"),
        click.option("--select-from", type=cli.NIMG, help="Select from so many images on"),
        click.option("--select-until", type=cli.NIMG, help="Select until so many images"),
        click.option("--select-cheap", type=CHOICES["cheap"], help="Cheaper scores; training stays exact"),
        click.option("--score-scale", type=cli.Float(), help="Factor on the losses that are compared"),
        # Running.
        click.option("--batch-gpu", type=cli.NIMG, help="Largest micro-batch per process; 0: no limit"),
        click.option("--bench", type=bool, help="cuDNN benchmarking"),
        click.option("--status", "status_nimg", type=cli.NIMG, help="Interval of status lines; 0: none"),
        click.option("--snapshot", "snapshot_nimg", type=cli.NIMG, help="Interval of snapshots; 0: none"),
        click.option("--checkpoint", "checkpoint_nimg", type=cli.NIMG, help="Interval of checkpoints; 0: last only"),
        click.option("--keep", type=click.IntRange(min=0), help="Checkpoints to keep; 0: all"),
        click.option("--slice", "slice_nimg", type=cli.NIMG, help="Train at most so many images now"),
        click.option("--seed", type=click.IntRange(min=0), help="Of everything random"),
        click.option("--block", type=click.IntRange(min=1), help="Data positions that share one noise generator"),
        click.option("--workers", type=cli.WORKERS, help="Loader processes"),
        click.option("--grid", type=bool, help="Sample grid at every snapshot"),
        click.option("--snapshot-fp16", type=bool, help="Store snapshots in half precision"),
        click.option("--resume", metavar="FILE", help="Continue from this checkpoint"),
        click.option("--init", metavar="SNAPSHOT", help="Start a new run from these weights"),
        click.option("--device", metavar="NAME", help="cuda, cpu, ...; default: cuda where there is one"),
        click.option("-n", "--dry-run", is_flag=True, help="Print the configuration and stop"),
    ]
    for option in reversed(table):
        function = option(function)
    return function


@cli.command(epilog=EXAMPLES)
@options
def main(outdir, preset, chunks, resume, device, dry_run, **given):
    """Train a diffusion model on one data source or many. Run the same command again to resume."""
    from training.config import make_config

    presets.get(preset)
    if not outdir:
        raise click.UsageError("--outdir is empty: name a folder for the run")
    if chunks is not None:
        given["select_options"] = {"num_chunks": chunks}
    config = make_config(preset, **given)
    if dry_run:
        import json

        print(json.dumps(config.to_dict(), indent=2))
        print("Dry run; exiting.")
        return 0
    return run(config, outdir, resume, device)


def run(config, outdir, resume=None, device=None):
    """Train as `config` says in the folder `outdir`; returns the exit code. Used by run_experiment.py too."""
    from contextlib import nullcontext
    from pathlib import Path

    from dnnlib import Logger
    from torch_utils import distributed as dist
    from training import hooks, setup
    from training.dataset import ImageFolderDataset
    from training.training_loop import TrainingFailed

    device = dist.init(device)
    outdir = Path(outdir)
    setup.check_inputs(config, outdir, resume)
    chosen = {"stop_requested": hooks.StopOnSignal()}
    if config.val_data:
        chosen["on_status"] = hooks.validation_hook(ImageFolderDataset(config.val_data, use_labels=config.cond))
    if config.grid:
        chosen["on_snapshot"] = hooks.grid_hook(*setup.grid_shape(config))
    start = setup.prepare(config, outdir, device, resume)
    outdir.mkdir(parents=True, exist_ok=True)
    first = dist.get_rank() == 0
    with Logger(outdir / "log.txt") if first else nullcontext():
        try:
            loop = start(chosen)
        except TrainingFailed as err:
            print(f"Error: {err}", file=sys.stderr, flush=True)
            return 1
        except RuntimeError as err:
            if not dist.is_lost_peer(err):
                raise
            print(f"Error: {dist.LOST_PEER}: run the same command again to resume", file=sys.stderr, flush=True)
            return 1
        finally:
            dist.shutdown()
        if loop.interrupted:
            if first:  # the group is gone: every process would take itself for the first
                print("Stopped by a signal; run the same command again to go on.", flush=True)
            return cli.INTERRUPTED
        if first:
            print("Done.", flush=True)
    return 0


if __name__ == "__main__":
    main()
