"""What a run does at status lines and snapshots besides writing them: validation loss, sample grids, stop requests.

The loop calls these through its contract; it knows none of them.
"""

import math
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from torch_utils import distributed as dist
from torch_utils.random import StackedRandomGenerator
from training.dataset import Dataset
from training.images import save_grid
from training.samplers import heun
from training.validation import HeldOut

if TYPE_CHECKING:
    from training.setup import Run

GRID_COLUMNS = 8
GRID_ROWS = 16  # sources shown at most
GRID_CHANNELS_TOTAL = 2**23  # elements of a grid; larger images get fewer columns


def standard_hooks(run: "Run") -> dict:
    """The hooks of train_edm2.py for a training.setup.Run."""
    chosen = {"stop_requested": stop_on_signal()}
    if run.held_out is not None:
        chosen["on_status"] = validation_hook(run.held_out)
    if run.config.grid:
        dataset = run.feed.dataset
        sources = sorted({int(k) for k in dataset.raw_labels}) if dataset.has_onehot_labels else None
        chosen["on_snapshot"] = grid_hook(sources)
    return chosen


def validation_hook(dataset: Dataset) -> Callable:
    """on_status hook: validation loss of the first average of the weights on `dataset`, on rank 0."""
    held_out = HeldOut(dataset) if dist.get_rank() == 0 else None

    def on_status(loop):
        if held_out is None:
            return {}
        with loop.average() as average:
            result = held_out.denoising_loss(average.net, loop.encoder)
        fields = {"Loss/validation": result["loss"]}
        fields |= {f"Loss/validation_sigma{s}": v for s, v in result["levels"].items()}
        return fields | {f"Loss/validation_source{k}": v for k, v in result.get("sources", {}).items()}

    return on_status


def grid_hook(sources: list[int] | None) -> Callable:
    """on_snapshot hook: `samples-<kimg>.png` with a row per source (None: the first ones), from the first average."""

    @torch.no_grad()
    def on_snapshot(loop):
        if dist.get_rank() != 0:
            return
        device, kernel = loop.feed.device, getattr(loop.objective.loss, "kernel", None)
        pictures = []
        with loop.average() as average:
            net = average.net
            shape = [net.img_channels, net.img_resolution, net.img_resolution]
            columns = max(1, min(GRID_COLUMNS, GRID_CHANNELS_TOTAL // (math.prod(shape) * GRID_ROWS)))
            rows = list(range(net.label_dim) if sources is None else sources)[:GRID_ROWS] or [None]
            for label in rows:
                generator = StackedRandomGenerator(device, range(columns))
                size = [columns, *shape]
                noise = generator.randn(size, device=device) if kernel is None else kernel.unit_noise(size, generator)
                onehot = None if label is None else torch.eye(net.label_dim, device=device)[[label] * columns]
                pictures.append(loop.encoder.decode(heun(net, noise.to(device), onehot, num_steps=18)).cpu())
        titles = None if rows == [None] else rows
        save_grid(loop.run_dir / f"samples-{loop.kimg:07d}.png", pictures, titles)

    return on_snapshot


def stop_on_signal() -> Callable:
    """stop_requested hook: True once SIGTERM or SIGINT has arrived; a second SIGINT interrupts at once."""
    arrived = []

    def handle(number, frame):
        if arrived and number == signal.SIGINT:
            raise KeyboardInterrupt
        arrived.append(number)

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return lambda: bool(arrived)
