"""Several small models trained side by side in one process against one after another: seconds of one step of all of them."""

import torch

from measures import step
from torch_utils import distributed as dist
from training import presets
from training.config import make_config
from training.side_by_side import Stack


def loops_of(preset, models, batch, device, channels):
    """So many training loops of a preset, each with weights and data order of its own."""
    interface = presets.interface(preset)
    lengths = {f"{name}_nimg": 0 for name in ("status", "snapshot", "checkpoint")}
    sizes = {} if channels is None else {"channels": channels, "channels_per_head": channels}
    configs = [
        make_config(preset, data="random", batch_size=batch, total_nimg=batch, seed=k, **lengths, **sizes)
        for k in range(models)
    ]
    loops = [step.make_loop(config, interface, device) for config in configs]
    for loop, config in zip(loops, configs, strict=True):
        loop.parts.config = config
    return loops


def run(preset, models, batch, channels, steps, device):
    device = dist.init(device)
    print(
        f"{step.machine(device)}\n\n| models | batch | one after another [ms] | side by side [ms] | ratio | images/s |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for count in models:
        for size in batch:
            alone, together = (loops_of(preset, count, size, device, channels) for _ in range(2))
            both = [lambda alone=alone: [loop.step() for loop in alone], Stack(together).step]
            first, second = step.timed(both, device, steps, 2)
            row = (
                count,
                size,
                f"{first * 1e3:.0f}",
                f"{second * 1e3:.0f}",
                f"{first / second:.2f}",
                f"{count * size / second:.0f}",
            )
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
            assert torch.isfinite(together[0].parameters[0]).all()
