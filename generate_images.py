"""Generate images from a snapshot, with per-sample seeds, any number of processes, labels beside the images."""

import click

from dnnlib import cli
from dnnlib.options import options
from training import sampling

EXAMPLES = """
\b
Examples:
  # 64 images, ten sources in turn, and one picture with a row per source:
  python generate_images.py --net=training-runs/digits/network-snapshot-0000131-0.100.safetensors \\
      --outdir=out/digits --seeds=0-63 --class=balanced --grid
\b
  # Autoguidance on two GPUs:
  torchrun --standalone --nproc_per_node=2 generate_images.py --net=main.safetensors --gnet=weak.safetensors \\
      --guidance=2 --outdir=out/guided --seeds=0-49999 --subdirs
\b
  # The same network through critically damped Langevin diffusion with its splitting solver, 50 evaluations:
  python generate_images.py --net=training-runs/digits --outdir=out/cld --seeds=0-63 --class=balanced \\
      --process=cld --process-options=M=0.25,beta=4:4 --solver=sscs --time-grid=quadratic --steps=50
"""


def generate_images(*args, **kwargs):
    """See training.generation.generate_images: a generator of batches, importable without its dependencies."""
    from training.generation import generate_images as generate

    return generate(*args, **kwargs)


@cli.command(epilog=EXAMPLES)
@cli.under(
    "What to generate",
    cli.output("--outdir", sampling.IMAGES, metavar="DIR", required=True, help="Where to write the images"),
    click.option("--seeds", type=cli.SEEDS, default="16-19", help="Random seeds, e.g. 1,2,5-10"),
    click.option("--subdirs", is_flag=True, help="A folder for every 1000 seeds"),
    click.option("--grid", is_flag=True, help="Also write <outdir>-grid.png with a row per source"),
)
@options(sampling.Sampling)
@cli.under("Running", cli.device_option)
@cli.plugin_option
@sampling.listings
def main(outdir, subdirs, seeds, grid, device, **given):
    """Generate images. Seed s gives the same noise and label whatever the batch size and number of processes."""
    chosen = sampling.take(given)

    from training import generation

    generation.run(chosen, seeds, outdir, subdirs, grid, device)


if __name__ == "__main__":
    main()
