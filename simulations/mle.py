"""Maximum likelihood for the small networks of the theory experiments: one rule for every network.

`fit` trains one network per (learning rate, batch size, length) and keeps the best; `compare` calls it once on all data, and
once per source on that source's data. Nothing else differs between the two.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch

from simulations.configs import ArmConfig, EbmConfig, Rule


class Conditional(torch.nn.Module):
    """A network that is told the source; all of its parameters are bounded."""

    embeddings = ("labels",)  # names of the parameters that lie in [0, 1]

    def project(self, bound: float) -> None:
        """Clip to the parameter space, in place: embeddings to [0, 1], everything else to [-bound, bound]."""
        for name, parameter in self.named_parameters():
            parameter.clamp_(-bound, bound)
            if name in self.embeddings:
                parameter.clamp_(0, 1)


class MLP(torch.nn.Module):
    """L affine layers with ReLU between (class F(L, W, S, B) of the theory paper, dense)."""

    def __init__(
        self,
        inputs: int,  # width W_0
        outputs: int,  # width W_L
        width: int,  # of all hidden layers
        layers: int,  # affine layers L >= 1
    ) -> None:
        super().__init__()
        widths = [inputs] + [width] * (layers - 1) + [outputs]
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        for layer in self.layers:
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            torch.nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)

    @property
    def num_params(self) -> int:
        """Dense S: all weights and biases."""
        return sum(p.numel() for p in self.parameters())


@dataclasses.dataclass(frozen=True)
class Fit:
    """The chosen network and how it was found."""

    model: torch.nn.Module
    nll: float  # per sample, on the selection data
    lr: float
    batch: int
    steps: int  # after which it was taken


def fit(
    build: Callable[[], Conditional],  # makes a fresh network from torch's global generator
    loss: Callable[[Conditional, torch.Tensor], torch.Tensor],  # mean -log p of the samples with these indices [b]
    size: int,  # number of samples, >= 1
    rule: Rule,
    seed: int,  # of the split, the initial weights and the data order
) -> Fit:
    """Train networks by minibatch maximum likelihood and return the best by `rule.select`.

    The global generator is left as it was. Raises ValueError for size < 1.
    """
    if size < 1:
        raise ValueError("a network cannot be fitted to no samples")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    kept = min(size - 1, max(1, round(rule.holdout * size))) if rule.select == "holdout" else 0
    train, selection = order[kept:], order[:kept] if kept else order
    best = None
    for lr, batch, steps in itertools.product(rule.lrs, rule.batches, rule.steps):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build()
        found = _train(model, loss, train, selection, lr, batch, steps, rule, seed)
        if best is None or found.nll < best.nll:
            best = found
    return best


def _train(model, loss, train, selection, lr, batch, steps, rule, seed) -> Fit:
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)  # fused: one call per step
    best = Fit(model, math.inf, lr, batch, 0)
    state, waited, queue = None, 0, train[:0]
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        if len(queue) < min(batch, len(train)):  # next pass over the data
            queue = torch.cat([queue, train[torch.randperm(len(train), generator=generator)]])
        index, queue = queue[:batch], queue[batch:]
        optimizer.zero_grad(set_to_none=True)
        loss(model, index).backward()
        optimizer.step()
        with torch.no_grad():
            model.project(rule.bound)
        if step != steps and (not rule.early or step % rule.eval_every):
            continue
        with torch.no_grad():
            nll = float(loss(model, selection))
        waited += 1
        if state is None or nll < best.nll:
            state, waited = copy.deepcopy(model.state_dict()), 0
            best = dataclasses.replace(best, nll=nll if math.isfinite(nll) else math.inf, steps=step)
        if rule.select == "holdout" and waited >= rule.patience:
            break
    model.load_state_dict(state)
    return best


def mixed_fields(config: ArmConfig | EbmConfig, draw: Callable[[], np.ndarray]) -> np.ndarray:
    """sqrt(sim) f_0 + sqrt(1 - sim) g_k of the sources [K, ...], where each `draw` is a random field; f_0 belongs to all.

    * path: g_k = cos(a_k) f_1 + sin(a_k) f_2 with angles a_k evenly spaced over a half circle. Sources differ in one
      number, as they do for the paper's networks, whose label embedding enters through one scalar.
    * independent: g_k = f_k, a new field for each source; realisable only by a network that stores them all.
    """
    common = draw()
    if config.family == "path":
        angles = np.pi * (np.arange(config.K) + 0.5) / config.K
        own = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ np.stack([draw(), draw()])
    else:
        own = np.stack([draw() for _ in range(config.K)])
    return math.sqrt(config.sim) * common + math.sqrt(1 - config.sim) * own


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Average TV errors over the sources of one data set, and what helps to read them."""

    single: float
    multi: float
    empty: int  # sources without data; each counts as TV = 1 in `single`
    histogram: float  # error of observed frequencies per source: no model, no sharing
    pooled: float  # mean TV of a source to the average of all sources: what ignoring the label costs
    uniform: float  # mean TV of a source to the uniform distribution
    params: int  # S of one MLP
    single_steps: float
    multi_steps: int


def compare(
    truth: np.ndarray,  # densities or probabilities of the K sources [K, G]
    uniform: np.ndarray,  # of the uniform distribution [G]
    tv: Callable,  # total variation of two of these
    sources: np.ndarray,  # of all samples [n]
    train: Callable,  # (which samples [b], their labels [b], number of labels) -> Fit
    density: Callable,  # (model, label) -> [G]
    histogram: Callable,  # which samples [b] -> observed frequencies [G]
) -> Outcome:
    """One network for all sources against one for each; a source without data counts as TV = 1."""
    multi = train(np.arange(len(sources)), sources, len(truth))
    errors, steps, frequencies = np.ones(len(truth)), [], np.ones(len(truth))
    for k, p in enumerate(truth):
        own = np.flatnonzero(sources == k)
        if len(own):  # with one source: the same data, network, rule and seed
            single = multi if len(truth) == 1 else train(own, np.zeros_like(own), 1)
            errors[k], frequencies[k] = tv(density(single.model, 0), p), tv(histogram(own), p)
            steps.append(single.steps)
    average = truth.mean(axis=0)
    return Outcome(
        single=float(np.mean(errors)),
        multi=float(np.mean([tv(density(multi.model, k), p) for k, p in enumerate(truth)])),
        empty=len(truth) - len(steps),
        histogram=float(np.mean(frequencies)),
        pooled=float(np.mean([tv(p, average) for p in truth])),
        uniform=float(np.mean([tv(p, uniform) for p in truth])),
        params=multi.model.mlp.num_params,
        single_steps=float(np.mean(steps)),
        multi_steps=multi.steps,
    )
