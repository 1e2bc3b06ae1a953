"""Loss variance with and without stable targets, for trained networks."""

if not __package__:
    import _here

import click

from dnnlib import cli, outputs
from metrics.commands import start
from metrics.table import write_csv
from simulations.run_robustness import NETS
from simulations.sweeps import print_files

EXAMPLES = """
\b
Example:
  python simulations/run_stable_targets.py --net=off=runs/D128-seed0 --net=on=runs/stf-seed0 --data=datasets/train.zip \\
      --dest=out/stable-targets.csv
"""


@cli.command(epilog=EXAMPLES)
@NETS
@click.option("--data", metavar="DIR|ZIP", required=True, help="Training images")
@click.option("--stf-refs", type=click.IntRange(min=1), default=512, help="Reference images per 64 evaluated ones")
@click.option("--num", "--num-images", type=click.IntRange(min=2), default=4096, help="Images with noise to evaluate")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of images, noise and references")
@cli.output("--dest", outputs.TABLE, metavar="FILE", required=True, help="Table (.csv)")
@cli.device_option
def main(nets, data, stf_refs, num, seed, dest, device):
    """Evaluate the training loss of each network against one-image and against stable targets, on the same draws."""
    from simulations.studies import robustness, stable_targets
    from training import fit
    from training.config import TrainingConfig
    from training.dataset import ImageFolderDataset

    rows = []
    for model in robustness.open_models(nets, start(device)):
        snapshot = model.snapshot
        dataset = ImageFolderDataset(data, use_labels=bool(snapshot.net.label_dim))
        fit.check_data(f"--data={data}", dataset, fit.of_snapshot("--net", snapshot))
        density = [snapshot.options.get(name, getattr(TrainingConfig, name)) for name in ("P_mean", "P_std")]
        found = stable_targets.loss_statistics(
            snapshot.net, snapshot.kernel, dataset, snapshot.encoder, *density, num, stf_refs, seed=seed
        )
        rows += [{"label": model.label, "net": model.path, **row} for row in found]
    print_files([write_csv(dest, rows)])


if __name__ == "__main__":
    main()
