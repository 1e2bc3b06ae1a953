"""What starting costs: processor time of a whole run of 64 images, by turns in this tree and in others. Prints a table.

python benchmarks/start.py --tree=../before --repeats=3
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dnnlib import cli  # noqa: E402

TRAIN = ["--preset=digits8", "--duration=64", "--batch=64", "--device=cpu"]


def cpu_seconds(tree, script, *options):
    """User and system time of a script of a tree, with one thread."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tree / script), *options]
    subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@cli.command()
@click.option("--tree", metavar="DIR", type=click.Path(exists=True), multiple=True, help="Another checkout; repeatable")
@click.option("--repeats", type=cli.COUNT, default=3, help="Of which the median is printed")
def main(tree, repeats):
    """Time `train_edm2.py --preset=digits8 --duration=64` and print a Markdown table."""
    trees = [ROOT, *(Path(path).resolve() for path in tree)]
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/digits.zip"
        cpu_seconds(ROOT, "dataset_tool.py", "convert", "--source=sklearn:digits", f"--dest={data}")
        seconds = {path: [] for path in trees}
        for turn in range(repeats):
            for number, path in enumerate(trees):
                outdir = f"--outdir={folder}/{turn}-{number}"
                seconds[path].append(cpu_seconds(path, "train_edm2.py", *TRAIN, f"--data={data}", outdir))
    print("| tree | CPU seconds of 64 images |\n| --- | --- |")
    for path, found in seconds.items():
        print(f"| {path.name} | {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f}) |")


if __name__ == "__main__":
    main()
