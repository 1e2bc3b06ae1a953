"""What a run does at status lines and snapshots besides writing them: validation, sample grids, trackers, stop requests.

The loop calls these through its contract; it knows none of them.
"""

import math
import os
import signal
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from dnnlib.util import read_stats
from torch_utils import distributed as dist
from torch_utils.random import StackedRandomGenerator
from training.dataset import Dataset, label_rows
from training.fit import title
from training.images import save_grid
from training.samplers import heun
from training.trackers import tracker_hooks
from training.training_loop import REMEDY, TrainingFailed, TrainingLoop
from training.validation import HeldOut

if TYPE_CHECKING:
    from training.setup import Run

STOPPING = "Finishing this step, then writing a checkpoint ... (Ctrl-C again: stop at once, without)"
GRID_COLUMNS = 8
GRID_ROWS = 16  # sources shown at most
GRID_CHANNELS_TOTAL = 2**23  # elements of a grid; larger images get fewer columns


def standard_hooks(run: "Run") -> dict:
    """The hooks of train_edm2.py for a training.setup.Run."""
    chosen = {"stop_requested": stop_on_signal()}
    if run.held_out is not None:
        looks = Validation(run.held_out, run.periods.status_nimg, run.config.patience)
        chosen |= {"on_status": looks.on_status, "finished": looks.finished}
    if isinstance(run.objective.noise, torch.nn.Module):
        chosen["on_status"] = with_matrices(chosen.get("on_status"))
    if run.config.grid and _can_decode(run.encoder, run.feed.device):
        chosen["on_snapshot"] = grid_hook(*grid_labels(run.feed.dataset))
        if run.config.grid_nimg:
            chosen["on_status"] = with_grids(chosen["on_snapshot"], run.config.grid_nimg, chosen.get("on_status"))
    if run.config.log:
        chosen = joined(chosen, tracker_hooks(run))
    return chosen


def with_grids(grid: Callable, every: int, on_status: Callable | None = None) -> Callable:
    """on_status hook that also makes a grid at every multiple of `every` images."""

    def fields(loop):
        if loop.state.cur_nimg % every == 0:
            grid(loop)
        return on_status(loop) if on_status else None

    return fields


def with_matrices(on_status: Callable | None = None) -> Callable:
    """on_status hook that adds what a learned process is now: Process/Q01, Process/D00, ..., Process/min_eigenvalue of D.

    Raises TrainingFailed where D is not positive semi-definite.
    """

    def fields(loop):
        process = loop.objective.noise
        with torch.no_grad():
            Q, D = process.Q, process.D
            smallest = float(torch.linalg.eigvalsh(D)[0])
        if not smallest >= 0:
            raise TrainingFailed(
                f"D of the learned process has the eigenvalue {smallest:g} at {loop.kimg} kimg; {REMEDY}"
            )
        found = {f"Process/Q{i}{j}": float(Q[i, j]) for i in range(process.V) for j in range(i + 1, process.V)}
        found |= {
            f"Process/D{i}{j}": float(D[i, j]) for i in range(process.V) for j in range(i, process.V) if D[i, j] != 0
        }
        return (on_status(loop) if on_status else {}) | found | {"Process/min_eigenvalue": smallest}

    return fields


def joined(first: dict, second: dict) -> dict:
    """Hooks of both; where both have `on_snapshot`, the second one's is called after the first one's."""
    both = first | second
    if "on_snapshot" in first and "on_snapshot" in second:
        both["on_snapshot"] = lambda loop: [hooks["on_snapshot"](loop) for hooks in (first, second)] and None
    return both


def _can_decode(encoder, device):
    """Whether the encoder makes images; warns, on rank 0, if not. Others make no grids."""
    if dist.get_rank() != 0:
        return True
    try:
        encoder.init(device)
    except ValueError as err:
        warnings.warn(f"training goes on without sample grids: {err}", stacklevel=3)
        return False
    return True


class Validation:
    """The validation loss of the first average of the weights at every status line, on rank 0.

    A look is a status line at a multiple of the interval, so that a run that was stopped and resumed looks as often as an
    unbroken one. The snapshot of the lowest loss so far is `BEST`; training is over after `patience` looks (0: never)
    without a lower one. What happened before a resume is read from stats.jsonl.
    """

    BEST = "network-snapshot-best.safetensors"

    def __init__(self, dataset: Dataset, interval: int, patience: int = 0) -> None:
        self.held_out = HeldOut(dataset) if dist.get_rank() == 0 else None
        self.interval, self.patience = interval, patience
        self.losses = None  # of all looks; None: not read yet

    def on_status(self, loop: TrainingLoop) -> dict[str, float]:
        """Fields of the status line."""
        if self.held_out is None:
            return {}
        with loop.average() as average:
            try:
                result = self.held_out.denoising_loss(average.net, loop.encoder, getattr(average.loss, "kernel", None))
            except ValueError as err:
                raise TrainingFailed(f"validation at {loop.kimg} kimg: {err}; {REMEDY}") from None
        if loop.state.cur_nimg % self.interval == 0:
            if result["loss"] < min(self._looks(loop), default=math.inf):
                loop.save_snapshot(loop.run_dir / self.BEST, *loop.averages()[0], validation_loss=result["loss"])
            self.losses.append(result["loss"])
        fields = {"Loss/validation": result["loss"]}
        fields |= {f"Loss/validation_sigma{s}": v for s, v in result["levels"].items()}
        return fields | {f"Loss/validation_source{k}": v for k, v in result.get("sources", {}).items()}

    def _looks(self, loop):
        if self.losses is None:
            lines = read_stats(loop.run_dir) if (loop.run_dir / "stats.jsonl").is_file() else []
            looks = [line for line in lines if round(line["Progress/kimg"] * 1e3) % self.interval == 0]
            self.losses = [line["Loss/validation"] for line in looks if "Loss/validation" in line]
        return self.losses

    def finished(self, loop: TrainingLoop) -> str | None:
        """Why training is over before its time, if it is."""
        looks = self._looks(loop) if self.patience and self.held_out is not None else []
        if len(looks) - 1 - looks.index(min(looks)) < self.patience if looks else True:
            return None
        return f"the validation loss has not fallen for {self.patience} looks (lowest: {min(looks):.4f})"


def grid_labels(dataset: Dataset) -> tuple[torch.Tensor | None, list[str] | None]:
    """Labels of the rows of a grid, [rows, GRID_COLUMNS, K], and their titles; (None, None) without labels.

    A row for each of the first sources; where labels are vectors, two rows of training images' own, drawn by seed 0.
    """
    if not dataset.has_labels:
        return None, None
    if dataset.has_onehot_labels:
        shown = dataset.sources[:GRID_ROWS]
        rows = label_rows(torch.tensor(shown), dataset.label_dim)[:, None].expand(-1, GRID_COLUMNS, -1)
        return rows, [title(source, dataset.class_names) for source in shown]
    raw = torch.from_numpy(dataset.raw_labels)
    drawn = torch.randint(len(raw), [2, GRID_COLUMNS], generator=torch.Generator().manual_seed(0))
    return raw[drawn], None


def grid_hook(labels: torch.Tensor | None = None, titles: list[str] | None = None) -> Callable:
    """on_snapshot hook: `samples-<kimg>.png` with a row per row of `grid_labels`, from the first average once it is trained.

    All rows show the same noise, and are sampled in one batch, or in parts of the run's micro-batch.
    """

    @torch.no_grad()
    def on_snapshot(loop):
        if dist.get_rank() != 0 or loop.state.cur_nimg == 0:
            return
        device, kernel = loop.feed.device, getattr(loop.objective.loss, "kernel", None)
        with loop.average() as average:
            net = average.net
            shape = [net.img_channels, net.img_resolution, net.img_resolution]
            columns = max(1, min(GRID_COLUMNS, GRID_CHANNELS_TOTAL // (math.prod(shape) * GRID_ROWS)))
            rows = 1 if labels is None else len(labels)
            generator, size = StackedRandomGenerator(device, range(columns)), [columns, *shape]
            noise = generator.randn(size, device=device) if kernel is None else kernel.unit_noise(size, generator)
            noise = noise.to(device).repeat(rows, 1, 1, 1)
            given = None if labels is None else labels[:, :columns].flatten(0, 1).to(device)
            most = loop.parts.batch_gpu or len(noise)
            parts = zip(noise.split(most), [None] * len(noise) if given is None else given.split(most), strict=False)
            decode = loop.encoder.decode
            pictures = torch.cat([decode(heun(net, part, row, num_steps=18)) for part, row in parts]).cpu()
        save_grid(loop.run_dir / f"samples-{loop.kimg:07d}.png", pictures.split(columns), titles)

    return on_snapshot


def stop_on_signal() -> Callable:
    """stop_requested hook: True once SIGTERM, SIGINT or SIGUSR1 has arrived; a second SIGINT interrupts at once."""
    arrived = []

    def handle(number, frame):
        if arrived and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not arrived and dist.get_rank() == 0:  # unbuffered: the signal may have come in the midst of a print
            os.write(2, f"\n{STOPPING}\n".encode())
        arrived.append(number)

    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):  # the last of batch systems; Windows has none
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handle)
    return lambda: bool(arrived)
