"""Loss variance with and without stable targets, for trained networks."""

if not __package__:
    import _here

import click

from dnnlib import cli
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
@click.option("--net", "nets", metavar="[LABEL=]SNAPSHOT", multiple=True, required=True, help=NETS)
@click.option("--data", metavar="DIR|ZIP", required=True, help="Training images")
@click.option("--stf-refs", type=click.IntRange(min=1), default=512, help="Reference images per 64 evaluated ones")
@click.option("--num", "--num-images", type=click.IntRange(min=2), default=4096, help="Images with noise to evaluate")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of images, noise and references")
@click.option("--dest", metavar="FILE", required=True, help="Table (.csv)")
@click.option("--device", metavar="NAME", help="cuda, cpu, ...; default: cuda where there is one")
def main(nets, data, stf_refs, num, seed, dest, device):
    """Evaluate the training loss of each network against one-image and against stable targets, on the same draws."""
    from simulations.studies import robustness, stable_targets
    from torch_utils import distributed as dist
    from torch_utils import persistence
    from training.config import TrainingConfig
    from training.dataset import ImageFolderDataset
    from training.encoders import StandardRGBEncoder
    from training.processes import GaussianKernel

    device = dist.init(device)
    rows = []
    for model in robustness.open_models(nets, device):
        options = persistence.read_header(model.path).get("options", {})
        dataset = ImageFolderDataset(data, use_labels=bool(model.net.label_dim))
        density = {name: options.get(name, getattr(TrainingConfig, name)) for name in ("P_mean", "P_std")}
        found = stable_targets.loss_statistics(
            model.net, model.kernel or GaussianKernel(), dataset, model.encoder or StandardRGBEncoder(), **density,
            num=num, num_references=stf_refs, seed=seed,
        )  # fmt: skip
        rows += [{"label": model.label, "net": model.path, **row} for row in found]
    print_files([write_csv(dest, rows)])
    dist.shutdown()


if __name__ == "__main__":
    main()
