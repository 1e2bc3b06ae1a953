"""JEST selection: the closed form (O(B)) beside the pairwise B x B form, in one run.

    python benchmarks/selection.py [--batch 4096] [--chunks 16] [--repeats 3]

Prints one line per method, the ratio of their times, and the time of the closed form at B = 65536.
"""

import statistics
import time

import click
import torch

from training.selection_functions import jointly_sample_batch


def pairwise_sample(learner_loss, reference_loss, size, num_chunks):
    """JEST as its definition reads: a B x B score matrix, and its rows and columns of the selected set per chunk."""
    scores = learner_loss[:, None] - reference_loss  # [B, B]
    selected = torch.empty(0, dtype=torch.int64)
    for chunk in range(num_chunks):
        if chunk == 0:
            logits = torch.zeros_like(learner_loss)
        else:
            mask = torch.zeros_like(learner_loss)
            mask[selected] = 1
            logits = (scores.diagonal() + mask @ scores + scores @ mask) / (2 * len(selected) + 1)
            logits[selected] = -torch.inf
        picked = torch.multinomial(logits.softmax(0), size // num_chunks, replacement=False)
        selected = torch.cat([selected, picked])
    return selected


def median_seconds(function, repeats):
    times = []
    for _ in range(repeats + 1):  # the first call warms up
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@click.command()
@click.option("--batch", default=4096, show_default=True, help="Candidates B of the side-by-side run.")
@click.option("--chunks", default=16, show_default=True, help="Chunks.")
@click.option("--repeats", default=3, show_default=True, help="Timed calls; the median is reported.")
def main(batch, chunks, repeats):
    """Time the O(B) selection against the B x B form."""
    torch.manual_seed(0)
    learner, reference = torch.rand(batch), torch.rand(batch)
    size = chunks * (batch // 5 // chunks)
    pairwise = median_seconds(lambda: pairwise_sample(learner, reference, size, chunks), repeats)
    closed = median_seconds(lambda: jointly_sample_batch(learner, reference, size=size, num_chunks=chunks), repeats)
    big = torch.rand(2, 65536)
    large = median_seconds(lambda: jointly_sample_batch(*big, num_chunks=chunks), repeats)
    click.echo(f"pairwise  B={batch:6d}  {pairwise * 1e3:9.2f} ms  {batch**2 * 4 / 2**20:8.1f} MiB scores")
    click.echo(f"closed    B={batch:6d}  {closed * 1e3:9.2f} ms  {batch * 8 / 2**20:8.3f} MiB scores")
    click.echo(f"ratio     {pairwise / closed:.1f}")
    click.echo(f"closed    B= 65536  {large * 1e3:9.2f} ms")


if __name__ == "__main__":
    main()
