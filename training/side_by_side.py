"""Several small models trained side by side in one process: one step of all of them over stacked weights.

Every model keeps a run of its own: data, labels, draws, validation, stopping, files. Common are the forward and backward
pass (torch.func.vmap), the optimizer's step and the averages', over one matrix with a row per model, of which the runs hold
views. Equal to training one after another up to rounding; worth it where one model is too small to fill the machine.
"""

import contextlib
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from dnnlib import cli
from torch_utils import distributed as dist
from training import setup
from training.choices import OPTIMIZERS, choose
from training.config import TrainingConfig, option_name
from training.hooks import standard_hooks, stop_on_signal
from training.losses import Draws
from training.setup import Run
from training.training_loop import TrainingFailed, TrainingLoop

OWN = {
    "data",
    "data_content",
    "max_images",
    "seed",
    "lr",
    "init",
    "init_classes",
}  # options in which the models may differ


def check(runs: Sequence[Run]) -> None:
    """Raises ValueError unless the runs can take their steps together."""
    first = runs[0].config
    for run in runs:
        config = run.config
        for name, value in config.fixed().items():
            if name not in OWN and value != first.fixed()[name]:
                raise ValueError(
                    f"{option_name(name)}={value}: models side by side share it, one has {first.fixed()[name]}"
                )
        for name, plain in dict(dropout=0.0, select="none", grad_clip=None, compile=False).items():
            if getattr(config, name) != plain:
                raise ValueError(
                    f"{option_name(name)}={getattr(config, name)}: not for models side by side; leave it out"
                )
        if any(p.requires_grad for p in run.objective.loss.parameters()):
            raise ValueError(f"--process={config.process} is learned: not for models side by side")
        if _shapes(run.objective) != _shapes(runs[0].objective):
            raise ValueError(f"--data={config.data}: another network than for {first.data}: give images of one shape")
    if dist.get_world_size() > 1:
        raise ValueError("models are trained side by side by one process: start without torchrun")


def _shapes(module):
    return {name: value.shape for name, value in module.state_dict().items()}


def _rows(models: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """[G, P]: the tensors of G models, end to end; they become views of it."""
    rows = torch.stack([torch.cat([t.detach().flatten() for t in own]) for own in models])
    for row, own in zip(rows, models, strict=True):
        for t, part in zip(own, row.split([t.numel() for t in own]), strict=True):
            t.data = part.view(t.shape)
    return rows


class Stack:
    """Models in step, that is after the same number of images: their weights, averages and optimizer states in rows."""

    def __init__(self, loops: Sequence[TrainingLoop]) -> None:
        self.loops, first = list(loops), loops[0]
        self.names = [name for name, p in first.objective.named_parameters() if p.requires_grad]
        self.shapes = [p.shape for p in first.parameters]
        self.sizes = [p.numel() for p in first.parameters]
        self.weights = torch.nn.Parameter(_rows([loop.parameters for loop in loops]))
        copies = zip(*([] if loop.ema is None else loop.ema.copies for loop in loops), strict=True)
        self.averages = [_rows([list(average.parameters()) for average in same]) for same in copies]
        buffers = [dict(loop.objective.named_buffers()) for loop in loops]
        self.buffers = {name: torch.stack([b[name] for b in buffers]) for name in buffers[0]}
        group = dict(params=[self.weights], lr_scale=1.0)
        self.optimizer = choose(OPTIMIZERS, "optimizer", first.parts.config.optimizer)(first.parts.config, [group])
        self._read_states()
        write = lambda index, optimizer: self._write_state(index)
        self.handles = [
            loop.optimizer.register_state_dict_pre_hook(functools.partial(write, index))
            for index, loop in enumerate(loops)
        ]

    def close(self) -> None:
        """Give every run its optimizer state back."""
        for index, handle in enumerate(self.handles):
            handle.remove()
            self._write_state(index)

    def _read_states(self):
        """The state of the common optimizer from those of the runs: what has a weight's shape in rows, the rest once."""
        states = [[loop.optimizer.state.get(p) for p in loop.parameters] for loop in self.loops]
        if not states[0][0]:
            return
        like = next(i for i, shape in enumerate(self.shapes) if len(shape))
        common = self.optimizer.state[self.weights]
        for name, value in states[0][like].items():
            per_weight = torch.is_tensor(value) and value.shape == self.shapes[like]
            common[name] = _rows([[s[name].clone() for s in own] for own in states]) if per_weight else value

    def _write_state(self, index):
        loop = self.loops[index]
        for name, value in self.optimizer.state[self.weights].items():
            per_weight = torch.is_tensor(value) and value.shape == self.weights.shape
            parts = self._parts(value[index]) if per_weight else [value] * len(self.shapes)
            for p, part in zip(loop.parameters, parts, strict=True):
                loop.optimizer.state[p][name] = part.clone() if torch.is_tensor(part) else part

    def _parts(self, rows):
        """The tensors of all weights, [..., *shape] each, from [..., P]."""
        parts = rows.split(self.sizes, dim=-1)
        return [
            part.unflatten(-1, shape) if len(shape) else part[..., 0]
            for part, shape in zip(parts, self.shapes, strict=True)
        ]

    def _losses(self, parameters, buffers, draws):
        """The losses of one model, for vmap."""
        missing = {name: None for name, value in self.draws[0].items() if value is None}
        return functional_call(self.loops[0].objective, (parameters, buffers), (Draws(**draws, **missing),))

    def step(self) -> None:
        """What `TrainingLoop.step` does, for all models."""
        loops, first = self.loops, self.loops[0]
        candidates = [loop.candidates() for loop in loops]
        self.draws = [
            Draws.cat(loop.selector.minibatches(loop.objective, given))
            for loop, given in zip(loops, candidates, strict=True)
        ]
        given = {
            name: torch.stack([own[name] for own in self.draws]) for name, v in self.draws[0].items() if v is not None
        }
        leaves = [part.data.requires_grad_() for part in self._parts(self.weights)]  # each with a version of its own
        first.objective.train()
        with sdpa_kernel(SDPBackend.MATH):  # the others know no models side by side
            losses = vmap(self._losses)(dict(zip(self.names, leaves, strict=True)), self.buffers, given)  # [G, N, ...]
            total = losses.sum() * (first.parts.loss_scaling / first.batch_size)
            gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        self.weights.grad = torch.cat([g.reshape(len(loops), -1) for g in gradients], dim=1)
        self._apply(losses.detach(), [loop.parts.learning_rate(loop.state.cur_nimg) for loop in loops])
        for loop, done in zip(loops, candidates, strict=True):
            loop.advance(done)
        self._average()

    def _apply(self, losses, rates):
        finite = self.weights.grad.norm(dim=1).isfinite()
        for loop, own, good, lr in zip(self.loops, losses, finite, rates, strict=True):
            loop.stats.report("Loss/loss", own)
            loop.stats.report("Loss/learning_rate", lr)
            loop.stats.report("Progress/nonfinite_steps", (~good).double())
            loop.bad_steps = torch.where(good, 0, loop.bad_steps + 1)
        torch.nan_to_num(self.weights.grad, nan=0, posinf=0, neginf=0, out=self.weights.grad)
        for group in self.optimizer.param_groups:
            group["lr"] = max(rates)
        before = self.weights.detach().clone() if min(rates) < max(rates) else None
        self.optimizer.step()
        if before is not None:  # the step of every optimizer here is proportional to the rate
            shares = before.new_tensor(rates)[:, None] / max(rates)
            self.weights.data.copy_(before.lerp_(self.weights.data, shares))

    @torch.no_grad()
    def _average(self):
        first = self.loops[0]
        if first.ema is not None:
            betas = first.ema.betas(first.state.cur_nimg, first.batch_size)
            for average, beta in zip(self.averages, betas, strict=True):
                average.lerp_(self.weights, 1 - beta)


def train_command(configs: dict[str, TrainingConfig], device: str | None = None) -> int:
    """`train` in the folders that are the keys, with the exit code of train_edm2.py."""
    device = dist.init(device)
    try:
        loops = train(list(configs.values()), list(configs), device)
    except TrainingFailed as err:
        print(f"Error: {err}", file=sys.stderr, flush=True)
        return 1
    finally:
        dist.shutdown()
    return cli.INTERRUPTED if any(loop.interrupted for loop in loops) else 0


def train(
    configs: Sequence[TrainingConfig], outdirs: Sequence[str | Path], device: torch.device | str = "cpu"
) -> list[TrainingLoop]:
    """Train or resume one run per configuration in its folder, with the standard hooks and log.txt of each.

    Raises ValueError for bad input before anything is written; TrainingFailed if one of the trainings breaks down.
    """
    runs = [setup.build(config, device) for config in configs]
    check(runs)
    for run, outdir in zip(runs, outdirs, strict=True):
        run.check(outdir)
    hooks, loops, logs = [standard_hooks(run) for run in runs], [], {}
    stop = stop_on_signal()  # the last one hears the signals
    with contextlib.ExitStack() as stack:
        for run, own, outdir in zip(runs, hooks, outdirs, strict=True):
            Path(outdir).mkdir(parents=True, exist_ok=True)
            log = stack.enter_context(open(Path(outdir) / "log.txt", "a", encoding="utf-8"))
            with contextlib.redirect_stdout(log):
                loops.append(run.loop(outdir, own))
            logs[loops[-1]] = log
        total = sum(run.periods.total_nimg for run in runs)
        bar = stack.enter_context(tqdm(total=total, unit="img", unit_scale=True, mininterval=1.0))
        _run(loops, logs, stop, bar)
    return loops


def _run(loops, logs, stop, bar):
    """Steps of those that are furthest behind, until all are done."""
    turns, stack, over = {loop: loop.turns(quiet=True) for loop in loops}, None, False
    while turns and not over:
        behind = min(loop.state.cur_nimg for loop in turns)
        now = [loop for loop in turns if loop.state.cur_nimg == behind]
        for loop in now:
            with contextlib.redirect_stdout(logs[loop]):
                if next(turns[loop], turns) is turns:
                    del turns[loop]
        now = [loop for loop in now if loop in turns]
        if stack is not None and stack.loops != now:
            stack.close()
            stack = None
        if now:
            stack = stack or Stack(now)
            stack.step()
            over = stop()
        bar.update(sum(loop.state.cur_nimg for loop in loops) - bar.n)
    if over:  # those behind the others have saved what they have
        for loop in now:
            loop.interrupted = True
            with contextlib.redirect_stdout(logs[loop]):
                next(turns[loop], None)
