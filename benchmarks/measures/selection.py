"""What selection costs: JEST's closed form (O(B)) beside the B x B form, and a training step with each kind of selection."""

import statistics
import time

import click
import torch

from training import selection, setup
from training.config import make_config
from training.dataset import ArrayDataset
from training.encoders import IdentityEncoder
from training.feed import Feed
from training.losses import Draws, Objective
from training.selection.functions import jointly_sample_batch
from training.training_loop import Periods, TrainingLoop

ARMS = {  # name -> function, options of the selector
    "none": None,
    "random": ("random", {}),
    "hard": ("hard", {}),
    "jest": ("jest", {}),
    "jest, cheap=half": ("jest", {"cheap": "half"}),
    "jest, cheap=lowres": ("jest", {"cheap": "lowres"}),
    "jest, cheap=levels": ("jest", {"cheap": "levels"}),
    "diverse": ("diverse", {}),
}


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


class OnePass(selection.LossSelector):
    """The published arrangement: forward with gradients over all candidates, in training mode, then index."""

    def minibatches(self, objective, candidates):
        draws = Draws.cat(list(candidates))
        losses = objective(draws).flatten(1)
        with torch.no_grad():
            reference = self.reference_losses(objective, draws)
        chosen = self.function(
            losses.mean(1), reference, size=candidates.batch, generator=candidates.generator, **self.options
        )
        losses[chosen].sum().backward()
        yield draws[chosen[:1]]  # the loop wants something to train on; one example more is its smallest

    def reference_losses(self, objective, draws):
        return objective.loss.evaluate(self.scorer.reference, draws).flatten(1).mean(1)


def make_loop(config, interface, arm, filter_ratio, chunks, device="cpu"):
    """The real training loop on random images; reference: the same architecture at half the width."""
    shape = [512, interface["img_channels"], interface["img_resolution"], interface["img_resolution"]]
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(config.sigma_data).numpy()
    data = ArrayDataset(images, (torch.arange(512) % 10).numpy(), num_classes=10)
    torch.manual_seed(0)
    objective = Objective(setup.build_network(config, interface, device), setup.build_loss(config, None).to(device))
    selector = selection.IdentitySelector()
    if arm is not None:
        name, options = arm
        function = selection.FUNCTIONS["jest" if name == "one-pass" else name]
        small = make_config(preset=config.preset, channels=config.channels // 2)
        reference = setup.build_network(small, interface, device).eval().requires_grad_(False)
        more = {"num_chunks": chunks} if name in ("jest", "diverse", "one-pass") else {}
        kind = OnePass if name == "one-pass" else selection.LossSelector
        selector = kind(function, reference, filter_ratio, options=more, **options)
    optimizer = setup.OPTIMIZERS[config.optimizer](config, objective.param_groups())
    ema, periods = setup.EMAS[config.ema](config, objective), Periods(config.batch_size)
    parts = (objective, Feed(data, block=config.block, device=device), IdentityEncoder(), selector, optimizer, ema)
    return TrainingLoop(setup.Run(*parts, lambda nimg: 1e-4, periods, config.batch_size), ".")


def step_times(preset, filter_ratio, chunks, steps, device="cpu"):
    """{arm: median seconds of a training step}; the arms take turns, so that a busy machine is busy for all."""
    config = make_config(preset=preset)
    side = {"digits8": 8, "digits28": 28}[preset]
    interface = dict(img_resolution=side, img_channels=1, label_dim=10)
    arms = {**ARMS, "jest, one pass (published)": ("one-pass", {})}
    loops = {name: make_loop(config, interface, arm, filter_ratio, chunks, device) for name, arm in arms.items()}
    times = {name: [] for name in loops}
    for i in range(steps + 2):
        for name, loop in loops.items():
            start = time.perf_counter()
            loop.step()
            float(loop.bad_steps)  # waits for the device
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def run(batch, chunks, repeats, steps, preset, filter_ratio):
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
    if steps:
        times = step_times(preset, filter_ratio, chunks, steps)
        click.echo(f"\ntraining step, {preset}, {filter_ratio:g} of the candidates discarded")
        for name, seconds in times.items():
            click.echo(f"{name:28s} {seconds * 1e3:9.1f} ms  {seconds / times['none']:6.2f} x none")
