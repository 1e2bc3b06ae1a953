"""Gaussian sweep: the library's vectorised call against one torch MultivariateNormal per test point.

Both sides run in this process, on one thread, with the same draws, and must agree to 1e-6. The second table times whole
commands, imports included. Prints JSON.

    python benchmarks/gaussian.py --tag=K
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # before torch and numpy load

from dnnlib import cli  # noqa: E402


def plain_sweep(tag: str) -> list[list[float]]:
    """The published experiment the direct way: three densities per test point in a Python loop. [values, 2]"""
    import torch
    from torch.distributions import MultivariateNormal

    from simulations.gaussian import PAPER_SEEDS, sweep_configs

    table = []
    for config in sweep_configs(tag):
        K, D, d1 = config.K, config.D, config.d1
        means = torch.zeros(K, D)
        means[:, :d1] = torch.arange(1.0, K + 1)[:, None]

        def draw(size, means=means, K=K, D=D):
            labels = torch.multinomial(torch.ones(K) / K, size, replacement=True)
            x = torch.zeros(size, D)
            for k in range(K):
                at = labels == k
                if at.any():
                    x[at] = torch.randn(int(at.sum()), D) + means[k]
            return x, labels

        totals = [0.0, 0.0]
        for seed in PAPER_SEEDS:
            torch.manual_seed(seed)
            x, y = draw(config.n)
            single = torch.stack([x[y == k].mean(0) for k in range(K)])
            multi = single.clone()
            multi[:, d1:] = x[:, d1:].mean(0)
            x, y = draw(config.test_size)
            eye = torch.eye(D)
            for point, label in zip(x, y, strict=True):
                truth = MultivariateNormal(means[label], eye).log_prob(point).exp()
                for side, fit in enumerate((single, multi)):
                    density = MultivariateNormal(fit[label], eye).log_prob(point).exp()
                    totals[side] += 0.5 * abs((density / truth).item() - 1) / config.test_size
        table.append([total / len(PAPER_SEEDS) for total in totals])
    return table


@cli.command()
@click.option("--tag", type=cli.Choice(["K", "n", "sim"]), default="K", show_default=True)
@click.option(
    "--repeats", type=click.IntRange(min=1), default=20, show_default=True, help="Calls of the fast side; median."
)
@click.option("--plain-only", is_flag=True, hidden=True, help="Only the plain loop (for the whole-command comparison).")
def main(tag: str, repeats: int, plain_only: bool) -> None:
    """Time one published sweep on both sides."""
    if plain_only:
        plain_sweep(tag)
        return
    import numpy as np
    import torch

    from simulations.gaussian import sweep

    torch.set_num_threads(1)
    start = time.perf_counter()
    want = np.array(plain_sweep(tag))
    plain = time.perf_counter() - start

    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = sweep(tag)
        times.append(time.perf_counter() - start)
    got = np.stack([result.array(f"empirical_{side}").mean(1) for side in ("single", "multi")], axis=1)
    difference = float(np.abs(got - want).max())
    if difference > 1e-6:
        raise click.ClickException(f"the two sides differ by {difference}")
    fast = float(np.median(times))

    commands = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in {
            "plain": [__file__, f"--tag={tag}", "--plain-only"],
            "run_gaussian": [str(ROOT / "simulations/run_gaussian.py"), f"--tag={tag}", f"--results-dir={folder}"],
        }.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            commands[name] = time.perf_counter() - start
    report = {
        "tag": tag,
        "plain_s": plain,
        "library_s": fast,
        "ratio": plain / fast,
        "max_difference": difference,
        "plain_command_s": commands["plain"],
        "command_s": commands["run_gaussian"],
        "command_ratio": commands["plain"] / commands["run_gaussian"],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
