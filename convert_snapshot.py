"""Read a snapshot of EDM2, EDM, PFGM++ or this project as data, say what it holds, write it as .safetensors."""

import json

import click

from dnnlib import cli, outputs

EXAMPLES = """
\b
Examples:
  # What is in a file (nothing in it is executed):
  python convert_snapshot.py --net=edm2-img512-xs-2147483-0.135.pkl
\b
  # A published network as a snapshot of this project, for every command that takes --net:
  python convert_snapshot.py --net=training-state-193177.pt --dest=pfgmpp-ffhq.safetensors
\b
  # Its tensors alone, by their names in the network, for other programs:
  python convert_snapshot.py --net=training-runs/digits --state-dict --dest=weights.safetensors
\b
  # For diffusers (networks that it has, those of --arch=adm): UNet2DModel.from_pretrained("adm")
  python convert_snapshot.py --net=edm-imagenet-64x64-cond-adm.pkl --folder --dest=adm
"""
FOLDER = outputs.Kind(
    "a folder of diffusers",
    outputs.folder_of(r"config\.json", r"scheduler_config\.json", r"diffusion_pytorch_model\.safetensors"),
    folder=True,
)
TENSORS = outputs.Kind("a .safetensors file of tensors alone", outputs.safetensors_with())
FORMS = {"snapshot": outputs.SNAPSHOT, "tensors": TENSORS, "folder": FOLDER}


def form_of(o):
    """Which of FORMS the flags ask for."""
    if o["state_dict"] and o["folder"]:
        raise click.UsageError("--state-dict and --folder are two forms: give one")
    return "tensors" if o["state_dict"] else "folder" if o["folder"] else "snapshot"


@cli.command(epilog=EXAMPLES)
@click.option("--net", metavar="SNAPSHOT", required=True, help="File, URL, or run folder (its newest snapshot)")
@cli.output(
    "--dest",
    lambda o: FORMS[form_of(o)],
    metavar="FILE|DIR",
    help="Write this .safetensors file (or folder); default: only say what is there",
)
@click.option("--part", type=cli.Choice(["ema", "net"]), default="ema", help="Of a file with both: averaged or raw")
@click.option("--state-dict", is_flag=True, help="Tensors alone, without description")
@click.option("--folder", is_flag=True, help="A folder for diffusers: config.json, weights, scheduler")
def main(net, dest, part, **form):
    """Convert snapshots. stdout: what was found, as JSON."""
    from torch_utils.conversion import convert

    print(json.dumps(convert(net, dest, part, form_of(form)), indent=2))


if __name__ == "__main__":
    main()
