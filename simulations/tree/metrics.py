"""All published measurements of a toy network on the tree: loss, distance to fully denoised truth, branches, scores.

Pais et al. 2025 (arXiv 2509.15267). Every number depends on how many samples it is measured on; state it beside.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import Module

from dnnlib.util import write_json
from simulations import tree
from simulations.configs import TreeConfig
from simulations.tree.training import TreeFeed, TreeLoss, load_toy
from torch_utils.random import seeded_generator
from training.samplers import heun, heun_states

SIGMA_MAX = 5.0  # noise level at which the tree has dissolved
SAMPLER = dict(num_steps=32, sigma_min=0.002, sigma_max=SIGMA_MAX, rho=7)
OUTER_DEPTH = 5  # "external" branches: depth 5 and 6 of class A
LEVELS = (0.002, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # noise levels of the loss curve


@dataclass(frozen=True)
class Points:
    """What a metric is measured on: fresh points of some classes of the tree."""

    cls: str = "A"
    num: int = 1024
    seed: int = 1
    device: str = "cpu"
    min_depth: int = 0

    def mixture(self) -> tree.GaussianMixture:
        return tree.ground_truth(self.cls, self.min_depth, device=self.device)

    def start(self) -> torch.Tensor:
        """Exact draws at noise level SIGMA_MAX, in units of it, [num, 2, 1, 1]."""
        points = self.mixture().sample((self.num,), SIGMA_MAX, seeded_generator(self.device, self.seed, 4))
        return points.reshape(self.num, 2, 1, 1) / SIGMA_MAX


@functools.lru_cache(maxsize=16)
def _draws(on, level):
    """Draws of fresh points with exact targets; level: one noise level for all, None: the training density."""
    feed = TreeFeed(on.mixture(), on.seed, block=on.num, device=on.device)
    loss = TreeLoss(on.mixture())
    if level is not None:
        loss.sample_sigma = lambda n, generator, device: torch.full([n], level, device=device)
    (_, points, _), *_ = feed.blocks(0, on.num)
    return loss, loss.draw(points, generator=seeded_generator(feed.device, on.seed, 3))


@torch.no_grad()
def average_loss(net: Module, on: Points, level: float | None = None) -> float:
    """Mean of sigma^2 |score_true - score|^2 / 2 over fresh points. A perfect network scores 0 on its own classes.

    On the outer branches alone even a perfect network of the whole tree scores .187: other branches pull at its points.
    """
    loss, draws = _draws(on, level)
    return float(loss.evaluate(net, draws).mean())


@functools.lru_cache(maxsize=16)
def _truth(on):
    """Where the exact flow takes the start points, [num, 2]."""
    return heun(on.mixture().denoiser(), on.start(), **SAMPLER).flatten(1)


def samples(net: Module, on: Points, gnet: Module | None = None, guidance: float = 1.0) -> torch.Tensor:
    """Points [num, 2] that the network makes of exact draws at noise level 5 (32 Heun steps down to 0.002)."""
    return heun(net, on.start(), gnet=gnet, guidance=guidance, **SAMPLER).flatten(1)


def trajectories(
    net: Module, start: torch.Tensor, gnet: Module | None = None, guidance: float = 1.0, **options: float
) -> torch.Tensor:
    """All states [num_steps + 1, N, 2] on the way of points [N, 2] from sigma_max to 0. options: instead of SAMPLER's."""
    options = {**SAMPLER, **options}
    noise = start.reshape(len(start), 2, 1, 1) / options["sigma_max"]
    states = heun_states(net, noise, gnet=gnet, guidance=guidance, **options)
    return torch.stack([state.state.flatten(1) for state in states])


def l2_distance(net: Module, on: Points, gnet: Module | None = None, guidance: float = 1.0) -> float:
    """Mean distance between where the network and where the exact flow take the same start points.

    With guidance it says how far guidance bends the map. On the outer branches the floor is .479 (class A).
    """
    return float((samples(net, on, gnet, guidance) - _truth(on)).norm(dim=1).mean())


def evaluate(
    net: Module,
    on: Points,
    guide: Module | None = None,
    guidance: float = 3.0,
    external=False,
    mandala=True,
    levels=False,
) -> dict[str, float]:
    """All metrics of a network as {name: number}; with a guide also those of the guided network, `guided_*`.

    loss, L2_metric; with `external` out_loss, out_L2_metric (class A only); with `mandala` mandala_score and
    classification_score; with `levels` loss_per_level, a dict. Raises ValueError for external branches of other classes.
    """
    if external and on.cls != "A":
        raise ValueError(f"--external is defined for class A only, not --cls={on.cls}")
    outer = replace(on, min_depth=OUTER_DEPTH)
    result = {"loss": average_loss(net, on)}
    kinds = {"": (None, 1.0)} if guide is None else {"": (None, 1.0), "guided_": (guide, guidance)}
    for prefix, guided in kinds.items():
        made = samples(net, on, *guided)
        result[f"{prefix}L2_metric"] = float((made - _truth(on)).norm(dim=1).mean())
        if mandala:
            result[f"{prefix}mandala_score"] = tree.mandala_score(made, on.cls)
            result[f"{prefix}classification_score"] = tree.classification_score(made, on.cls)
        if external:
            result[f"{prefix}out_L2_metric"] = l2_distance(net, outer, *guided)
    if external:
        result["out_loss"] = average_loss(net, outer)
    if levels:
        result["loss_per_level"] = {level: average_loss(net, on, level) for level in LEVELS}
    return result


def _evaluate_all(networks: dict[str, Module | None], on: Points, *options, **more) -> dict:
    """`evaluate` of each of these networks that is there, flat: {<who>_<name>: number}."""
    found = {who: evaluate(net, on, *options, **more) for who, net in networks.items() if net is not None}
    return {f"{who}_{name}": value for who, metrics in found.items() for name, value in metrics.items()}


def validation_hook(on: Points, flow: bool = True) -> Callable[[object], dict[str, float]]:
    """on_status hook of a toy run: loss and, with `flow`, L2 distance of the averaged and of the raw network."""

    def on_status(loop):
        fields = {}
        for who, net in (("ema", loop.ema.get()[0][0].net), ("learner", loop.objective.net)):
            training = net.training
            net.eval()
            fields[f"Validation/{who}_loss"] = average_loss(net, on)
            if flow:
                fields[f"Validation/{who}_L2_metric"] = l2_distance(net, on)
            net.train(training)
        return fields

    return on_status


def test(on: Points, net: str, ema: str | None, guide: str | None, guidance: float, **which: bool) -> dict:
    """What `run_tree.py test` prints: learner_*, ema_*, guide_*, floor_* metrics of snapshots (paths), flat.

    which: external, mandala and levels, as for `evaluate`.
    """
    net, ema, guide = (load_toy(path, on.device) for path in (net, ema, guide))
    result = {"n_samples": on.num, "seed": on.seed, "guidance": guidance if guide else None}
    result |= _evaluate_all({"learner": net, "ema": ema}, on, guide, guidance, **which)
    if guide is not None:
        result["guide_loss"] = average_loss(guide, on)
        if which["external"]:
            result["guide_out_loss"] = average_loss(guide, replace(on, min_depth=OUTER_DEPTH))
    return result | _evaluate_all({"floor": on.mixture().denoiser()}, on, **which | {"levels": False})


def write_test(config: TreeConfig, outdir: str | Path, net: Module, ema: Module) -> None:
    """At the end of a run: all metrics of the raw and the averaged network into test.json, and on stdout."""
    guide, on = load_toy(config.guide, config.device), Points(config.cls, device=config.device)
    scores = _evaluate_all({"learner": net, "ema": ema}, on, guide, config.guidance, external=config.cls == "A")
    found = {"n_samples": on.num} | scores
    write_json(Path(outdir) / "test.json", found)
    print(json.dumps(found, indent=2))
