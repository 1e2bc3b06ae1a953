"""Where a training step goes: seconds of each part, the slowest operators, and a trace for chrome://tracing or perfetto.dev.

The parts of a Run are watched from outside; the loop and its numbers stay as they are.
"""

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dnnlib.util import write_text

if TYPE_CHECKING:
    from training.setup import Run

TRACE, TABLE = "profile-trace.json.gz", "profile.txt"
PARTS = ("draw", "forward", "backward", "gradients", "optimizer", "average", "rest")
OPERATORS = 12  # shown in the table


class StepProfile:
    """Context manager around Run.start: `steps` training steps are profiled after the first `skip`.

    draw: candidates, and their scores and choice where examples are selected; gradients: their reduction over processes and
    clean-up; average: that of the weights. On a GPU the parts wait for the device, so that each is what it takes.
    """

    def __init__(self, run: "Run", folder: str | Path, skip: int = 3, steps: int = 8) -> None:
        self.run, self.folder, self.skip, self.steps = run, Path(folder), skip, steps
        self.device = run.feed.device
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        self.profiler = profile(activities=activities)
        self.begun = 0  # steps that began
        self.done = 0  # profiled steps that ended
        self.running = False
        self.seconds = Counter()
        self.part, self.since, self.span = None, 0.0, None
        self.patches = contextlib.ExitStack()

    def _switch(self, part):
        """End the current part and begin another, or None."""
        if not self.running or part == self.part:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.part is not None:
            self.seconds[self.part] += now - self.since
            self.span.__exit__(None, None, None)
        self.part, self.since = part, now
        if part is not None:
            self.span = record_function(f"step: {part}")
            self.span.__enter__()

    def _begin(self):
        self.begun += 1
        if self.begun == self.skip + 1:
            self.running = True
            self.profiler.start()
        self._switch("rest")

    def _end(self):
        self._switch(None)
        if self.running:
            self.done += 1
            if self.done == self.steps:
                self._finish()

    def _replace(self, owner: Any, name: str, function: Any):
        """Until the end; what the owner had of its own comes back, else that of its class."""
        own = (setattr, owner, name, vars(owner)[name]) if name in vars(owner) else (delattr, owner, name)
        setattr(owner, name, function)
        self.patches.callback(*own)

    def __enter__(self):
        run = self.run
        candidates, minibatches = run.selector.candidates, run.selector.minibatches

        def begin(batch):
            self._begin()
            return candidates(batch)

        def watched(objective, chosen) -> Iterator:
            draws = minibatches(objective, chosen)
            while True:
                self._switch("draw")
                item = next(draws, None)
                self._switch("gradients" if item is None else "rest")
                if item is None:
                    return
                yield item

        def forward(module, arguments):
            if self.part == "rest":
                self._switch("forward")

        def backward(module, arguments, output):
            if self.part == "forward":
                self._switch("backward")

        self._replace(run.selector, "candidates", begin)
        self._replace(run.selector, "minibatches", watched)
        ended = (lambda *_: self._switch("rest")) if run.ema is not None else (lambda *_: self._end())
        for hook in (
            run.objective.register_forward_pre_hook(forward),
            run.objective.register_forward_hook(backward),
            run.optimizer.register_step_pre_hook(lambda *_: self._switch("optimizer")),
            run.optimizer.register_step_post_hook(ended),
        ):
            self.patches.callback(hook.remove)
        if run.ema is not None:
            update = run.ema.update

            def average(*arguments):
                self._switch("average")
                update(*arguments)
                self._end()

            self._replace(run.ema, "update", average)
        return self

    def __exit__(self, *error):
        self.patches.close()
        if self.running:  # training ended before
            self._switch(None)
            self._finish()

    def _finish(self):
        self.running = False
        self.profiler.stop()
        if not self.done:
            return
        part = self.folder / f".{os.getpid()}-{TRACE}"
        self.profiler.export_chrome_trace(str(part))
        os.replace(part, self.folder / TRACE)
        text = self.table()
        write_text(self.folder / TABLE, text + "\n")
        print(text, flush=True)

    def table(self) -> str:
        """The profiled steps on one screen."""
        batch, total = self.run.batch_size, sum(self.seconds.values())
        lines = [
            f"Profile of {self.done} steps of {batch} images: {total / self.done * 1e3:.2f} ms each, "
            f"{batch * self.done / total:.4g} images/s (trace: {TRACE})",
            f"  {'part':<12s} {'ms/step':>10s} {'share':>7s}",
        ]
        for name in PARTS:
            lines.append(
                f"  {name:<12s} {self.seconds[name] / self.done * 1e3:10.2f} {self.seconds[name] / total:7.1%}"
            )
        kind = "device" if self.device.type == "cuda" else "cpu"
        own = lambda event: getattr(event, f"self_{kind}_time_total")
        events = [e for e in self.profiler.key_averages() if not e.key.startswith("step: ") and own(e) > 0]
        lines.append(f"  {'operator':<44s} {'ms/step':>10s} {'calls/step':>10s}")
        for event in sorted(events, key=own, reverse=True)[:OPERATORS]:
            lines.append(
                f"  {event.key[:44]:<44s} {own(event) / 1e3 / self.done:10.2f} {event.count / self.done:10.1f}"
            )
        return "\n".join(lines)
