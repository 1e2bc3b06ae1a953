"""Train a small autoencoder on one's own images: for VAE latents where Stable Diffusion's is too large or not at hand."""

if not __package__:
    import _here

import json

import click

from dnnlib import cli, outputs
from metrics.commands import start

EXAMPLES = """
\b
Example:
  python simulations/run_small_vae.py --data=datasets/mnist32.zip --outdir=models/small-vae
  python dataset_tool.py encode --source=datasets/mnist32.zip --dest=datasets/mnist32-latents.zip --vae=models/small-vae
"""
VAE = outputs.Kind(
    "a folder of an autoencoder",
    outputs.folder_of(r"config\.json", r"diffusion_pytorch_model\.safetensors"),
    folder=True,
)


@cli.command(epilog=EXAMPLES)
@click.option("--data", metavar="DIR|ZIP", required=True, help="Training images, RGB or grey")
@cli.output("--outdir --dest dest", VAE, metavar="DIR", required=True, help="Folder for --vae of all commands")
@click.option(
    "--widths",
    type=cli.INTS,
    default="16,32,32",
    help="Channels per level, multiples of 8; each but the first halves the sides",
)
@click.option("--epochs", type=click.IntRange(min=1), default=10, help="Passes over the images")
@click.option("--batch", type=click.IntRange(min=1), default=64, help="Images per step")
@click.option("--kl", type=click.FloatRange(min=0), default=1e-3, help="Weight of the KL")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Of weights, order and noise")
@cli.device_option
def main(data, dest, widths, device, **options):
    """Train an AutoencoderKL of diffusers whose latents have the units of Stable Diffusion's, and write its folder."""
    from tqdm import tqdm

    from simulations.studies import small_vae
    from training.dataset import ImageFolderDataset, load_raw

    device = start(device, alone="an autoencoder is trained")
    images, _ = load_raw(ImageFolderDataset(data))
    vae = small_vae.build(widths, options["seed"]).to(device)
    found = small_vae.train(
        vae, small_vae.rgb(images), **options, progress=lambda e: tqdm(e, "autoencoder", unit="epoch")
    )
    small_vae.save(vae, dest)
    print(json.dumps({"dest": dest, "parameters": vae.num_parameters()} | found))


if __name__ == "__main__":
    main()
