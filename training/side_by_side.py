"""Several small models trained side by side in one process: one step of all of them over stacked weights.

Every model keeps a run of its own: data, labels, draws, validation, stopping, files. Common are the forward and backward
pass (torch.func.vmap), the optimizer's step and the averages', over stacked tensors of which the
runs hold views. Equal to training one after another up to rounding; worth it where one model does not fill the machine.
"""

import contextlib
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

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
from training.magnitude import MPConv, NormalizedOnce
from training.setup import Run
from training.training_loop import TrainingFailed, TrainingLoop

MOST = 10  # models of one pass: more of them find no place in a processor's caches
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


def _stacked(models: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """[G, ...] for each of the tensors that G models have; those of the models become views of it."""
    stacks = [torch.stack([t.detach() for t in same]) for same in zip(*models, strict=True)]
    for same, stack in zip(zip(*models, strict=True), stacks, strict=True):
        for t, own in zip(same, stack, strict=True):
            t.data = own
    return stacks


class Stack:
    """Models in step, that is after the same number of images: their weights, averages and optimizer states stacked."""

    def __init__(self, loops: Sequence[TrainingLoop]) -> None:
        self.loops, first = list(loops), loops[0]
        self.names = [name for name, p in first.objective.named_parameters() if p.requires_grad]
        self.weights = [torch.nn.Parameter(w) for w in _stacked([loop.parameters for loop in loops])]
        copies = zip(*([] if loop.ema is None else loop.ema.copies for loop in loops), strict=True)
        self.averages = [_stacked([list(average.parameters()) for average in same]) for same in copies]
        buffers = [dict(loop.objective.named_buffers()) for loop in loops]
        self.buffers = {name: torch.stack([b[name] for b in buffers]) for name in buffers[0]}
        layers = {f"{n}.weight": m for n, m in first.objective.named_modules() if isinstance(m, MPConv)}
        self.layers, self.rest = {}, {}  # weights by name: to be normalised, as one layer with the rows of all models
        for name, w in zip(self.names, self.weights, strict=True):
            if name in layers and w.dtype == torch.float32:
                rows = dict(out_channels=len(w) * w.shape[1], constant=layers[name].constant)
                self.layers[name] = SimpleNamespace(weight=w.data.flatten(0, 1).requires_grad_(), ready=None, **rows)
            else:
                self.rest[name] = w
        self.once = NormalizedOnce(list(self.layers.values())) if self.layers else None
        group = dict(params=self.weights, lr_scale=1.0)
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
        """The state of the common optimizer from those of the runs: what has a weight's shape stacked, the rest once."""
        states = [[loop.optimizer.state.get(p) for p in loop.parameters] for loop in self.loops]
        if not states[0][0]:
            return
        for w, *same in zip(self.weights, *states, strict=True):
            for name, value in same[0].items():
                own = [s[name] for s in same]
                self.optimizer.state[w][name] = torch.stack(own) if _per_weight(name, value) else value

    def _write_state(self, index):
        loop = self.loops[index]
        for p, w in zip(loop.parameters, self.weights, strict=True):
            for name, value in self.optimizer.state[w].items():
                value = value[index] if _per_weight(name, value) else value
                loop.optimizer.state[p][name] = value.clone() if torch.is_tensor(value) else value

    def step(self) -> None:
        """What `TrainingLoop.step` does, for all models."""
        loops = self.loops
        candidates = [loop.candidates() for loop in loops]
        draws = [
            Draws.cat(loop.selector.minibatches(loop.objective, given))
            for loop, given in zip(loops, candidates, strict=True)
        ]
        given = {name: torch.stack([own[name] for own in draws]) for name, v in draws[0].items() if v is not None}
        losses = self._backward(given, [name for name, v in draws[0].items() if v is None])
        for loop, own in zip(loops, losses, strict=True):
            loop.stats.report("Loss/loss", own)
        self._apply([loop.parts.learning_rate(loop.state.cur_nimg) for loop in loops])
        for loop, done in zip(loops, candidates, strict=True):
            loop.advance(done)
        self._average()

    def _backward(self, given, missing):
        """Gradients of all weights; returns the losses [G, N, ...]."""
        first = self.loops[0]
        if self.once is not None:
            self.once.prepare()
        ready = {name: layer.ready for name, layer in self.layers.items()}
        tensors = {
            f"{name.removesuffix('weight')}ready": w.unflatten(0, (len(self.loops), -1)) for name, w in ready.items()
        }

        def losses_of_one(tensors, buffers, draws):
            return functional_call(first.objective, (tensors, buffers), (Draws(**draws, **dict.fromkeys(missing)),))

        first.objective.train()
        with sdpa_kernel(SDPBackend.MATH):  # the others know no models side by side
            losses = vmap(losses_of_one)(tensors | self.rest, self.buffers, given)
            total = losses.sum() * (first.parts.loss_scaling / first.batch_size)
            found = torch.autograd.grad(total, [*ready.values(), *self.rest.values()], materialize_grads=True)
        for tensor, grad in zip([*ready.values(), *self.rest.values()], found, strict=True):
            tensor.grad = grad
        if self.once is not None:
            for layer in self.layers.values():
                layer.weight.grad = None
            self.once.backward()
            self.once.forget()
            for name, w in zip(self.names, self.weights, strict=True):
                if name in self.layers:
                    w.grad = self.layers[name].weight.grad.view_as(w)
        return losses.detach()

    def _apply(self, rates):
        gradients = [w.grad for w in self.weights]
        norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) if g.ndim > 1 else g for g in gradients])
        finite = norms.isfinite().all(dim=0)
        for loop, good, lr in zip(self.loops, finite, rates, strict=True):
            loop.stats.report("Loss/learning_rate", lr)
            loop.stats.report("Progress/nonfinite_steps", (~good).double())
            loop.bad_steps = torch.where(good, 0, loop.bad_steps + 1)
        for g in gradients:
            torch.nan_to_num(g, nan=0, posinf=0, neginf=0, out=g)
        for group in self.optimizer.param_groups:
            group["lr"] = max(rates)
        before = torch._foreach_add([w.data for w in self.weights], 0) if min(rates) < max(rates) else None
        self.optimizer.step()
        if before is not None:  # the step of every optimizer here is proportional to the rate
            shares = before[0].new_tensor(rates) / max(rates)
            for old, w in zip(before, self.weights, strict=True):
                w.data.copy_(old.lerp_(w.data, shares.reshape(-1, *[1] * (w.ndim - 1))))

    @torch.no_grad()
    def _average(self):
        first = self.loops[0]
        if first.ema is not None:
            betas = first.ema.betas(first.state.cur_nimg, first.batch_size)
            for average, beta in zip(self.averages, betas, strict=True):
                torch._foreach_lerp_(average, self.weights, 1 - beta)


def _per_weight(name, value):
    """Whether a part of an optimizer's state belongs to each model: all but the count of steps."""
    return torch.is_tensor(value) and name != "step"


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
    turns, stacks, over = {loop: loop.turns(quiet=True) for loop in loops}, [], False
    while turns and not over:
        behind = min(loop.state.cur_nimg for loop in turns)
        now = [loop for loop in turns if loop.state.cur_nimg == behind]
        for loop in now:
            with contextlib.redirect_stdout(logs[loop]):
                if next(turns[loop], turns) is turns:
                    del turns[loop]
        now = [loop for loop in now if loop in turns]
        if [loop for stack in stacks for loop in stack.loops] != now:
            for stack in stacks:
                stack.close()
            stacks = [Stack(now[k : k + MOST]) for k in range(0, len(now), MOST)]
        for stack in stacks:
            stack.step()
        over = bool(now) and stop()
        bar.update(sum(loop.state.cur_nimg for loop in loops) - bar.n)
    if over:  # those behind the others have saved what they have
        for loop in now:
            loop.interrupted = True
            with contextlib.redirect_stdout(logs[loop]):
                next(turns[loop], None)
