"""The training loop. It knows contracts only: an Objective, a selector, averages, and hooks; no process, loss or data set.

One step: the selector turns candidates into micro-batches of Draws; losses are summed over them on every process;
gradients are summed over processes and divided by the number of trained examples. All randomness but the network's own
dropout is a function of (seed, position in the data order), see training/feed.py.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from tqdm import tqdm

from dnnlib.util import format_time, reason, write_text
from torch_utils import checkpoint, persistence
from torch_utils import distributed as dist
from torch_utils.random import hash_seed
from torch_utils.training_stats import Collector
from training.feed import Candidates

if TYPE_CHECKING:
    from training.setup import Run

SHOW_LOSS = 2.0  # seconds between two looks of the progress bar at the loss, which wait for the device
MAX_BAD_STEPS = 100  # consecutive steps without one finite gradient, after which training stops


REMEDY = "look at the data (dataset_tool.py inspect), lower --lr or --ls, or train with --fp16=False"
STATUS = (  # of the status line: word, statistic, format
    ("kimg", "Progress/kimg", "9.1f"),
    ("sec/tick", "Timing/sec_per_tick", "8.2f"),
    ("sec/kimg", "Timing/sec_per_kimg", "7.3f"),
    ("maintenance", "Timing/maintenance_sec", "7.2f"),
    ("cpumem", "Resources/cpu_mem_gb", "6.2f"),
    ("gpumem", "Resources/peak_gpu_mem_gb", "6.2f"),
    ("reserved", "Resources/peak_gpu_mem_reserved_gb", "6.2f"),
    ("loss", "Loss/loss", "9.4f"),
)


class TrainingFailed(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


@dataclasses.dataclass
class Periods:
    """Lengths and intervals in images; 0 switches an interval off."""

    total_nimg: int
    slice_nimg: int = 0  # train at most so many images in this invocation
    status_nimg: int = 128 << 10
    snapshot_nimg: int = 8 << 20
    checkpoint_nimg: int = 128 << 20
    keep: int = 0  # checkpoints to keep; 0: all


@dataclasses.dataclass
class State:
    """Where the training stands."""

    cur_nimg: int = 0  # images trained on
    position: int = 0  # place in the data order: candidates read
    elapsed: float = 0.0  # seconds, over all invocations


class TrainingLoop:
    """Everything that one run holds. `run()` trains until the total, the slice or a stop request."""

    def __init__(
        self,
        run: "Run",  # the parts, see training/setup.py
        run_dir: str | Path,  # existing folder
        on_status: Callable | None = None,  # (loop) -> dict of further statistics or None; called on every process
        on_snapshot: Callable | None = None,  # (loop) -> None; called on every process
        on_stats: Callable | None = None,  # (loop, a line of stats.jsonl; None at the end) -> None; called on rank 0
        stop_requested: Callable | None = None,  # () -> bool; True on any process ends training after the step
        finished: Callable | None = None,  # (loop) -> why training is over before its time, or None; asked on rank 0
    ) -> None:
        periods, batch = run.periods, run.batch_size
        assert periods.snapshot_nimg % 1024 == periods.checkpoint_nimg % 1024 == 0, periods
        lengths = dataclasses.asdict(periods)
        assert all(value % batch == 0 for name, value in lengths.items() if name != "keep"), (periods, batch)
        if periods.snapshot_nimg:  # fail now, and not at the first snapshot
            run.objective.description(), persistence.describe(run.encoder)
        self.parts, self.run_dir = run, Path(run_dir)
        self.objective, self.feed, self.encoder, self.selector = run.objective, run.feed, run.encoder, run.selector
        self.optimizer, self.ema, self.batch_size, self.periods = run.optimizer, run.ema, batch, periods
        self.on_status, self.on_snapshot, self.on_stats = on_status, on_snapshot, on_stats
        self.stop_requested = stop_requested or (lambda: False)
        self.finished = finished or (lambda loop: None)
        self.state = State()
        self.stats = Collector(self.feed.device)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.bad_steps = torch.zeros([], device=self.feed.device)  # consecutive steps without finite gradients
        self.interrupted = False

    def averages(self) -> list[tuple[torch.nn.Module, str]]:
        """[(Objective, name)]: the averages of the weights, or the weights themselves where none is kept."""
        return self.ema.get() if self.ema is not None else [(self.objective, "ema")]

    @contextlib.contextmanager
    def average(self) -> Iterator[torch.nn.Module]:
        """The first average in eval mode, for hooks; the mode is restored after."""
        objective = self.averages()[0][0]
        training = objective.training
        try:
            yield objective.eval()
        finally:
            objective.train(training)

    # --- saving and loading ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Everything a resumed run needs, as plain types."""
        return {
            "options": self.parts.identity,
            "state": dataclasses.asdict(self.state),
            "objective": dict(self.objective.state_dict()),  # a plain dict: modules may put anything into its _metadata
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "selector": self.selector.state_dict(),
        }

    def load(self, path: str | Path) -> None:
        """Continue from a checkpoint. Raises ValueError if it is damaged or does not fit."""
        data = checkpoint.load(path)
        try:
            self.objective.load_state_dict(data["objective"])
            self.optimizer.load_state_dict(data["optimizer"])
            if self.ema is not None:
                self.ema.load_state_dict(data["ema"])
            self.selector.load_state_dict(data["selector"])
            self.state = State(**data["state"])
        except (KeyError, RuntimeError, TypeError) as err:
            raise ValueError(f"{path}: does not fit this model ({reason(err)})") from err

    def _trim_stats(self):
        """Drop the lines of stats.jsonl that an interrupted invocation left and this one writes again."""
        path = self.run_dir / "stats.jsonl"
        if dist.get_rank() != 0 or not path.is_file():
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        last = self.state.cur_nimg / 1e3 or -1  # the very first line is written again, too
        kept = [line for line in lines if _kimg_of(line) <= last]
        if kept != lines:
            write_text(path, "".join(kept))

    def save_checkpoint(self) -> None:
        self._check_ranks_agree()
        if dist.get_rank() == 0:
            checkpoint.save(self.run_dir / f"training-state-{self.kimg:07d}.pt", self.state_dict())
            checkpoint.remove_old(self.run_dir, self.periods.keep)
        dist.barrier()

    def save_snapshot(self, path: str | Path, objective: torch.nn.Module, name: str, **header: object) -> None:
        """Write one of `averages()`, with further plain data in the header."""
        what = dict(encoder=self.encoder, process=objective.noise, dtype=self.parts.snapshot_dtype)
        header = dict(self.parts.header, nimg=self.state.cur_nimg, ema=name, **header)
        persistence.save_snapshot(path, objective.net, **what, **header)

    def save_snapshots(self) -> None:
        if dist.get_rank() == 0:
            for objective, name in self.averages():
                path = self.run_dir / f"network-snapshot-{self.kimg:07d}-{name}.safetensors"
                self.save_snapshot(path, objective, name)
        if self.on_snapshot is not None:
            self.on_snapshot(self)
        dist.barrier()

    @property
    def kimg(self) -> int:
        return self.state.cur_nimg // 1000

    def _check_ranks_agree(self):
        """All processes must hold the same weights; a difference means diverged or broken hardware."""
        total = torch.stack([p.detach().double().sum() for p in self.parameters]).sum().reshape(1)
        low, high = dist.all_reduce_(total.clone(), "min"), dist.all_reduce_(total.clone(), "max")
        if not torch.equal(low, high) and bool(low.isfinite()):
            raise TrainingFailed("the processes hold different weights: resume from the last checkpoint")

    # --- one step ----------------------------------------------------------------------------------------------------

    def candidates(self) -> Candidates:
        """What the selector chooses from in the next step."""
        parts = (self.feed, self.encoder, self.objective.loss, self.state.position)
        if hasattr(self.objective.loss, "at"):  # what changes within a run
            self.objective.loss.at(self.state.cur_nimg)
        count = self.selector.candidates(self.batch_size)
        return Candidates(*parts, count, self.batch_size, self.state.cur_nimg, self.parts.batch_gpu)

    def advance(self, candidates: Candidates) -> None:
        """Count a step on these candidates as done."""
        self.state.position += candidates.count
        self.state.cur_nimg += self.batch_size

    def step(self) -> None:
        """Train on one batch; returns nothing, reports Loss/loss and Loss/learning_rate."""
        seed = hash_seed(self.parts.seed, dist.get_rank(), self.state.cur_nimg)  # of the network's own dropout
        torch.default_generator.manual_seed(seed)
        if self.feed.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        candidates = self.candidates()
        self.optimizer.zero_grad(set_to_none=True)
        if not (self.objective.training and self.objective.net.training):  # since the last look by a hook
            self.objective.train()
        count = rounds = 0
        self.stats.report("Loss/loss", [])
        alike, reduction = self._alike(), None
        with getattr(self.objective.net, "step", contextlib.nullcontext)() as leaf:  # what is done once for all passes
            for draws in self.selector.minibatches(self.objective, candidates):
                losses = self.objective(draws)
                self.stats.report("Loss/loss", losses)
                if alike and count + len(draws) == self.batch_size // dist.get_world_size():  # the last pass
                    reduction = dist.Reduction(self.parameters if leaf is None else map(leaf, self.parameters))
                (losses.sum() * (self.parts.loss_scaling / self.batch_size)).backward()
                count, rounds = count + len(draws), rounds + 1
            if reduction is not None:
                reduction.finish()
        lr = self.parts.learning_rate(self.state.cur_nimg)
        self.stats.report("Loss/learning_rate", lr)
        self._apply_gradients(lr, count, rounds, reduction is not None)
        self.advance(candidates)
        if self.ema is not None:
            self.ema.update(self.state.cur_nimg, self.batch_size)

    def _alike(self):
        """Whether every process has as many micro-batches as the others, so that gradients can be reduced on the way."""
        ranks, block = dist.get_world_size(), getattr(self.feed, "block", 0)
        return (
            ranks > 1
            and getattr(self.selector, "keeps_all", False)
            and bool(block)
            and self.batch_size % (ranks * block) == 0
        )

    def _apply_gradients(self, lr, count, rounds, reduced):
        if dist.get_world_size() > 1 and not reduced:
            dist.Reduction(self.parameters).finish()
        for p in self.parameters:
            if p.grad is None:  # the loss never touched it
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self.parameters]
        # Gradients are sums over examples / batch_size; what the ranks trained on together need not be batch_size.
        extra = torch.tensor([count, self.stop_requested(), *[0] * dist.get_world_size()], dtype=torch.float64)
        extra[2 + dist.get_rank()] = rounds
        trained, stop, *all_rounds = dist.all_reduce_(extra).tolist()  # on the host: no device is waited for
        if len(set(all_rounds)) > 1:  # forward passes may overwrite weights (EDM2): as often on one rank as on another
            dist.broadcast_(self.parameters, src=all_rounds.index(max(all_rounds)))
        self.interrupted = stop > 0
        if trained < 1:
            raise TrainingFailed("no example was selected on any process: lower the filter ratio")
        if trained != self.batch_size:
            torch._foreach_mul_(gradients, self.batch_size / trained)
        norms = torch.stack(torch._foreach_norm(gradients))
        finite = norms.isfinite().all()
        self.bad_steps = torch.where(finite, 0, self.bad_steps + 1)
        self.stats.report("Progress/nonfinite_steps", ~finite)
        if finite.device.type != "cpu" or not finite:  # an accelerator is not waited for
            for g in gradients:
                torch.nan_to_num(g, nan=0, posinf=0, neginf=0, out=g)
            norms = torch.stack(torch._foreach_norm(gradients)) if self.parts.grad_clip else norms
        if self.parts.grad_clip:
            total = torch.linalg.vector_norm(norms)
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.parts.grad_clip, total)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.optimizer.step()
        if self.state.cur_nimg // self.batch_size % MAX_BAD_STEPS == 0 and int(self.bad_steps) >= MAX_BAD_STEPS:
            raise TrainingFailed(
                f"the last {int(self.bad_steps)} steps had non-finite gradients, at {self.kimg} kimg: {REMEDY}"
            )

    # --- status ------------------------------------------------------------------------------------------------------

    def _status(self, clock):
        now = time.time()
        process = psutil.Process(os.getpid())
        memory = process.memory_info().rss
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                memory += child.memory_info().rss
        gpu = self.feed.device.type == "cuda"
        fields = {
            "Progress/kimg": self.state.cur_nimg / 1e3,
            "Timing/total_sec": self.state.elapsed + now - clock.start,
            "Timing/sec_per_tick": now - clock.tick,
            "Timing/sec_per_kimg": clock.training / max(clock.nimg, 1) * 1e3,
            "Timing/maintenance_sec": now - clock.tick - clock.training,
            "Resources/cpu_mem_gb": memory / 2**30,
            "Resources/peak_gpu_mem_gb": torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0,
            "Resources/peak_gpu_mem_reserved_gb": torch.cuda.max_memory_reserved() / 2**30 if gpu else 0.0,
        }
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        fields.update(self.stats.means())
        fields.update(self.selector.statistics() if hasattr(self.selector, "statistics") else {})
        fields["Progress/nonfinite_loss_share"] = self.stats.nonfinite_share.get("Loss/loss", 0.0)
        if fields.get("Progress/nonfinite_steps"):
            share = fields["Progress/nonfinite_steps"]
            dist.print0(f"Warning: {share:.1%} of the steps had non-finite gradients; these entries were set to zero")
        if self.on_status is not None:
            fields.update(self.on_status(self) or {})
        if dist.get_rank() == 0:
            shown = [f"{word} {fields[name]:<{form}}" for word, name, form in STATUS if fields.get(name) is not None]
            shown.insert(1, f"time {format_time(fields['Timing/total_sec']):<12s}")
            dist.print0("Status: " + " ".join(shown))
            with open(self.run_dir / "stats.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({**fields, "timestamp": now}) + "\n")
            if self.on_stats is not None:
                self.on_stats(self, fields)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _over(self):
        """Why training is over before its time, the same on every process."""
        return dist.broadcast_object(self.finished(self) if dist.get_rank() == 0 else None)

    def _due(self, period, anyway=False):
        return bool(period) and (anyway or self.state.cur_nimg % period == 0)

    def run(self) -> State:
        """Train. Returns the final State; `interrupted` tells whether a stop request ended it."""
        with contextlib.closing(self.turns()) as turns:  # the bar ends before an error is said
            for _ in turns:
                self.step()
        return self.state

    def turns(self, quiet: bool = False) -> Iterator[None]:
        """All that `run` does around its steps: yields when one is to be done. quiet: without a progress bar."""
        periods, state = self.periods, self.state
        start = state.cur_nimg
        stop = periods.total_nimg
        if periods.slice_nimg:
            unit = periods.checkpoint_nimg or periods.snapshot_nimg or self.batch_size
            rounded = (start + periods.slice_nimg) // unit * unit
            stop = min(stop, rounded if rounded > start else start + periods.slice_nimg)
        if stop <= start:
            dist.print0(f"Nothing to do: {start} of {periods.total_nimg} images are already trained.")
            if dist.get_rank() == 0:  # an interruption may have come before this
                checkpoint.remove_old(self.run_dir, periods.keep)
            return
        self._trim_stats()
        if why := self._over():
            dist.print0(f"Nothing to do: {why}.")
            return
        dist.print0(f"Training from {start / 1e3:g} kimg to {stop / 1e3:g} kimg:")
        clock = _Clock()
        shown = dict(unit="img", unit_scale=True, disable=quiet or dist.get_rank() != 0, mininterval=1.0)
        bar, said = tqdm(total=periods.total_nimg, initial=start, **shown), time.time()
        try:
            while True:
                done, over = state.cur_nimg >= stop or self.interrupted, None
                fresh = state.cur_nimg != start or start == 0
                if fresh and self._due(periods.status_nimg, done):
                    self._status(clock)
                    clock.restart_tick()
                    if over := self._over():
                        dist.print0(f"Finished early: {over}.")
                        done = True
                if fresh and self._due(periods.snapshot_nimg, over or state.cur_nimg >= periods.total_nimg):
                    self.save_snapshots()
                if state.cur_nimg != start and (done or self._due(periods.checkpoint_nimg)):
                    state.elapsed += clock.lap()
                    self.save_checkpoint()
                if done:
                    break
                with clock.step(self.batch_size):
                    yield
                bar.update(self.batch_size)
                if not bar.disable and time.time() - said > SHOW_LOSS:
                    said, loss = time.time(), self.stats.so_far("Loss/loss")
                    bar.set_description_str("" if loss is None else f"loss {loss:.4f} ", refresh=False)
        finally:
            bar.close()
            if self.on_stats is not None and dist.get_rank() == 0:
                self.on_stats(self, None)
        steps = (state.cur_nimg - start) // self.batch_size
        if int(self.bad_steps) >= steps:
            raise TrainingFailed(f"all {steps} steps had non-finite gradients: nothing was learned; {REMEDY}")


def _kimg_of(line):
    """Progress/kimg of a line of stats.jsonl; infinity for one that is not whole."""
    try:
        return json.loads(line)["Progress/kimg"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


class _Clock:
    """Seconds since the start, since the last status, and of those spent in training steps."""

    def __init__(self):
        self.start = self.tick = time.time()
        self.training, self.nimg = 0.0, 0

    def restart_tick(self):
        self.tick, self.training, self.nimg = time.time(), 0.0, 0

    def lap(self):
        now = time.time()
        seconds, self.start = now - self.start, now
        return seconds

    @contextlib.contextmanager
    def step(self, nimg):
        begin = time.time()
        yield
        self.training += time.time() - begin
        self.nimg += nimg
