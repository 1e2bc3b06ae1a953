"""Averages of the weights with any EMA length, made after training from the snapshots of the run (EDM2 sec. 3)."""

import json

import click

from dnnlib import cli, outputs

EXAMPLES = """
\b
Examples:
  # Six lengths at the end of a run that stored two averages at every snapshot:
  python reconstruct_phema.py --indir=training-runs/digits --outdir=out/phema --outstd=0.050,0.070,...,0.150
\b
  # At an earlier time, from NVIDIA's raw snapshots, only what is not there yet:
  python reconstruct_phema.py --indir=raw-snapshots/edm2-img512-xs --outdir=out/phema --outprefix=edm2-img512-xs \\
      --outkimg=134217 --outstd=0.125 --skip
\b
  # Which length is best? Score all of them on held-out images (or with `gen`), and draw the curve:
  for f in out/phema/*.safetensors; do python calculate_metrics.py loss --net=$f --data=datasets/heldout.zip \\
      --dest=out/scores/$(basename $f).json --tag=seed=0 --tag=ema=$(basename ${f##*-} .safetensors); done
  python calculate_metrics.py sweep --scores='out/scores/*.json' --over=ema --dest=out/ema
"""
AVERAGES = outputs.Kind("a folder of averages", outputs.folder_with(r".*-\d+-\d\.\d+\.safetensors"), folder=True)


@cli.command(epilog=EXAMPLES)
@click.option("--indir", metavar="DIR", type=click.Path(exists=True, file_okay=False), required=True, help="Snapshots")
@click.option("--inprefix", metavar="NAME", help="Only those named NAME-<kimg>-<std>")
@click.option("--instd", metavar="LIST", help="Only these stored EMA lengths")
@cli.output("--outdir", AVERAGES, metavar="DIR", type=click.Path(), required=True, help="Where to write")
@click.option("--outprefix", metavar="NAME", default="phema", help="Files are NAME-<kimg>-<std>.safetensors")
@click.option("--outstd", metavar="LIST", required=True, help="EMA lengths to make: 0.100 or 0.010,0.015,...,0.250")
@click.option("--outkimg", metavar="KIMG", type=click.IntRange(min=1), help="Time to end at; default: the latest")
@click.option("--skip", is_flag=True, help="Leave out what exists already")
@click.option("--batch", type=cli.COUNT, default=8, help="Averages made in one pass over the files; costs memory")
def main(**options):
    """Reconstruct averages. stdout: inputs, outputs and the relative L2 error of each fitted profile, as JSON."""
    from training.phema import reconstruct_command

    print(json.dumps(reconstruct_command(**options), indent=2))


if __name__ == "__main__":
    main()
