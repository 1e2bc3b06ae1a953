"""What a run does at status lines and snapshots besides writing them: validation loss, sample grids, stop requests.

The loop calls these through its contract; it knows none of them.
"""

import signal

import torch

from torch_utils import distributed as dist
from torch_utils.random import StackedRandomGenerator
from training.images import save_grid
from training.samplers import heun
from training.validation import denoising_loss

GRID_COLUMNS = 8
GRID_ROWS = 16  # sources shown at most
GRID_CHANNELS_TOTAL = 2**23  # elements of a grid; larger images get fewer columns


def validation_hook(dataset, **options):
    """on_status hook: validation loss of the first average of the weights on `dataset`, on rank 0."""

    def on_status(loop):
        if dist.get_rank() != 0:
            return {}
        averages = loop.ema.get() if loop.ema is not None else [(loop.objective, "ema")]
        net = averages[0][0].net
        training = net.training
        result = denoising_loss(net.eval(), dataset, loop.encoder, **options)
        net.train(training)
        fields = {"Loss/validation": result["loss"]}
        fields.update({f"Loss/validation_sigma{s}": v for s, v in result["levels"].items()})
        fields.update({f"Loss/validation_source{k}": v for k, v in result.get("sources", {}).items()})
        return fields

    return on_status


def grid_hook(shape, label_dim, sources=None, num_steps=18, seed=0):
    """on_snapshot hook: `samples-<kimg>.png` with a row per source, from the first average, on rank 0.

    shape: [C, R, R] of the latents. sources: label ids to show (None: the first ones).
    """
    columns = max(1, min(GRID_COLUMNS, GRID_CHANNELS_TOTAL // (shape[0] * shape[1] * shape[2] * GRID_ROWS)))
    rows = list(range(label_dim) if sources is None else sources)[:GRID_ROWS] or [None]

    @torch.no_grad()
    def on_snapshot(loop, averages):
        if dist.get_rank() != 0:
            return
        net = averages[0][0].net
        kernel = getattr(loop.objective.loss, "kernel", None)
        device = loop.feed.device
        pictures, training = [], net.training
        net.eval()
        for label in rows:
            generator = StackedRandomGenerator(device, range(seed, seed + columns))
            size = [columns, *shape]
            noise = generator.randn(size, device=device) if kernel is None else kernel.unit_noise(size, generator)
            onehot = None
            if label is not None:
                onehot = torch.eye(label_dim, device=device)[[label] * columns]
            pictures.append(loop.encoder.decode(heun(net, noise.to(device), onehot, num_steps=num_steps)).cpu())
        net.train(training)
        titles = None if rows == [None] else rows
        save_grid(loop.run_dir / f"samples-{loop.kimg:07d}.png", pictures, titles)

    return on_snapshot


class StopOnSignal:
    """stop_requested hook: True once SIGTERM or SIGINT has arrived; a second SIGINT interrupts at once."""

    def __init__(self):
        self.requested = False
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __call__(self):
        return self.requested
