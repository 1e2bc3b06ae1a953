"""Generate images from a snapshot, with per-sample seeds, any number of processes, labels beside the images."""

import click

from dnnlib import cli

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

# Options that other scripts share.


def process_options(function):
    """--process and --process-options."""
    function = click.option(
        "--process-options",
        type=cli.MAPPING,
        help="Of the process: M=0.25,beta=4:4,init_aux_var=0.01; V=3; full=true; Q=0:-1;1:0 (lists by :, rows by ;)",
    )(function)
    return click.option(
        "--process",
        metavar="NAME",
        help="edm, vp, cld, alda, malda, learned, linear, or a snapshot whose process to take",
    )(function)


def solver_options(function):
    """How to solve the process back."""
    table = [
        click.option("--solver", metavar="NAME", help="heun, em, sscs, ode (adaptive RK45) or flow  [default: heun]"),
        click.option(
            "--time-grid", type=click.Choice(["sigma", "uniform", "quadratic"]), default="sigma", help="Grid of steps"
        ),
        click.option(
            "--prior", type=click.Choice(["matched", "stationary"]), default="matched", help="Start of a process"
        ),
        click.option("--t-min", type=cli.Float(min=0, min_open=True), help="Last time, instead of --sigma_min"),
        click.option(
            "--denoise",
            type=click.Choice(["yes", "no", "mean", "euler"]),
            default="yes",
            help="End with the denoiser; the state; without the last noise (MDM); a noise-free step (CLD)",
        ),
        click.option(
            "--half-step", type=click.Choice(["exact", "published"]), default="exact", help="sscs: integrals of beta"
        ),
        click.option("--rtol", type=cli.Float(min=0, min_open=True), default=1e-5, help="ode: relative tolerance"),
        click.option("--atol", type=cli.Float(min=0, min_open=True), default=1e-5, help="ode: absolute tolerance"),
    ]
    for option in reversed(table):
        function = option(function)
    return function


class ClassChoice(click.ParamType):
    """A class index, or `balanced`: seed modulo the number of sources."""

    name = "N|balanced"

    def convert(self, value, param, ctx):
        if value == "balanced" or (isinstance(value, int) and value >= 0):
            return value
        if str(value).isdigit():
            return int(value)
        self.fail(f"{value!r} is neither a class index nor 'balanced'", param, ctx)


def generate_images(*args, **kwargs):
    """See training.generation.generate_images: a generator of batches, importable without its dependencies."""
    from training.generation import generate_images as generate

    return generate(*args, **kwargs)


@cli.command(epilog=EXAMPLES)
@click.option("--net", metavar="SNAPSHOT", help="Network snapshot")
@click.option("--gnet", metavar="SNAPSHOT", help="Guiding network; null: --net itself without its label")
@click.option("--preset", metavar="NAME", help="Published combination of --net, --gnet and --guidance")
@click.option("--outdir", metavar="DIR", required=True, help="Where to write the images")
@click.option("--subdirs", is_flag=True, help="A folder for every 1000 seeds")
@click.option("--seeds", type=cli.SEEDS, default="16-19", help="Random seeds, e.g. 1,2,5-10")
@click.option("--class", "class_idx", type=ClassChoice(), help="Class label; default: random per seed")
@click.option("--sources", type=cli.INTS, help="With --class=balanced: cycle through these labels only")
@click.option("--batch", "max_batch_size", type=click.IntRange(min=1), default=32, help="Largest batch per process")
@click.option("--grid", is_flag=True, help="Also write <outdir>-grid.png with a row per source")
@click.option("--steps", "num_steps", type=click.IntRange(min=1), default=32, help="Sampling steps")
@click.option("--sigma_min", type=cli.Float(min=0, min_open=True), default=0.002, help="Lowest noise level")
@click.option("--sigma_max", type=cli.Float(min=0, min_open=True), default=80, help="Highest noise level")
@click.option("--rho", type=cli.Float(min=0, min_open=True), default=7, help="Exponent of the time steps")
@click.option("--guidance", type=cli.Float(), default=1, help="Guidance strength; 1: none")
@click.option("--guidance-interval", type=cli.FLOATS, metavar="LO,HI", help="Guide only at noise levels in (LO, HI]")
@click.option("--S_churn", "S_churn", type=cli.Float(min=0), default=0, help="Stochasticity strength")
@click.option("--S_min", "S_min", type=cli.Float(min=0), default=0, help="Lowest noise level of churn")
@click.option(
    "--S_max", "S_max", type=cli.Float(min=0, infinite=True), default=float("inf"), help="Highest noise level of churn"
)
@click.option("--S_noise", "S_noise", type=cli.Float(), default=1, help="Noise inflation of churn")
@click.option(
    "--aug-dim",
    type=cli.Float(infinite=True),
    metavar="D",
    help="Refuse a snapshot that was not trained with this D of PFGM++",
)
@click.option("--inject-noise", type=cli.Float(min=0), metavar="ALPHA", help="Add ALPHA sigma eps before every step")
@click.option(
    "--quantize-bits", type=click.IntRange(1, 24), metavar="B", help="Round weights to so many bits  [default: no]"
)
@click.option(
    "--quantize-policy",
    type=click.Choice(["role", "original"]),
    default="role",
    help="Weights to round: inner resolution levels, or by name as published",
)
@process_options
@solver_options
@click.option("--device", metavar="NAME", help="cuda, cpu, ...; default: cuda where there is one")
def main(outdir, grid, subdirs, device, **options):
    """Generate images. Seed s gives the same noise and label whatever the batch size and number of processes."""
    from training import generation

    generation.run(outdir, grid, subdirs, device, **options)


if __name__ == "__main__":
    main()
