"""All published measurements of a toy network on the tree: loss, distance to fully denoised truth, branches, scores.

Pais et al. 2025 (arXiv 2509.15267). Every number depends on how many samples it is measured on; state it beside.
"""

import functools
import json
from pathlib import Path

import torch

from dnnlib.util import write_json
from simulations import tree
from simulations.tree.training import TreeFeed, TreeLoss, load_toy
from torch_utils.random import seeded_generator
from training.samplers import heun, heun_states

SIGMA_MAX = 5.0  # noise level at which the tree has dissolved
SAMPLER = dict(num_steps=32, sigma_min=0.002, sigma_max=SIGMA_MAX, rho=7)
OUTER_DEPTH = 5  # "external" branches: depth 5 and 6 of class A
LEVELS = (0.002, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # noise levels of the loss curve


@functools.lru_cache(maxsize=16)
def _points(cls, min_depth, num, seed, level, device):
    """Draws of `num` fresh points with exact targets; level: one noise level for all, None: the training density."""
    mixture = tree.ground_truth(cls, min_depth, device=device)
    feed = TreeFeed(mixture, seed, block=num, device=device)
    loss = TreeLoss(mixture)
    if level is not None:
        loss.sample_sigma = lambda n, generator, device: torch.full([n], level, device=device)
    (_, points, _), *_ = feed.blocks(0, num)
    return loss, loss.draw(points, generator=seeded_generator(feed.device, seed, 3))


@torch.no_grad()
def average_loss(net, cls="A", min_depth=0, num=4096, seed=1, level=None, device="cpu"):
    """Mean of sigma^2 |score_true - score|^2 / 2 over `num` fresh points. A perfect network scores 0 on its own classes.

    On the outer branches alone even a perfect network of the whole tree scores .187: other branches pull at its points.
    """
    loss, draws = _points(cls, min_depth, num, seed, level, str(device))
    return float(loss.evaluate(net, draws).mean())


def _start(cls, min_depth, num, seed, device):
    """Exact draws at noise level SIGMA_MAX, in units of it, [num, 2, 1, 1]."""
    mixture = tree.ground_truth(cls, min_depth, device=device)
    return mixture.sample((num,), SIGMA_MAX, seeded_generator(device, seed, 4)).reshape(num, 2, 1, 1) / SIGMA_MAX


@functools.lru_cache(maxsize=16)
def _truth(cls, min_depth, num, seed, device):
    """Where the exact flow takes the start points, [num, 2]."""
    exact = tree.ground_truth(cls, min_depth, device=device).denoiser()
    return heun(exact, _start(cls, min_depth, num, seed, device), **SAMPLER).flatten(1)


def samples(net, cls="A", num=1024, seed=1, gnet=None, guidance=1.0, min_depth=0, device="cpu"):
    """Points [num, 2] that the network makes of exact draws at noise level 5 (32 Heun steps down to 0.002)."""
    start = _start(cls, min_depth, num, seed, str(device))
    return heun(net, start, gnet=gnet, guidance=guidance, **SAMPLER).flatten(1)


def trajectories(net, start, gnet=None, guidance=1.0, sigma_max=SIGMA_MAX, num_steps=32):
    """All states [num_steps + 1, N, 2] on the way of points [N, 2] from sigma_max to 0."""
    noise = start.reshape(len(start), 2, 1, 1) / sigma_max
    options = {**SAMPLER, "sigma_max": sigma_max, "num_steps": num_steps}
    states = heun_states(net, noise, gnet=gnet, guidance=guidance, **options)
    return torch.stack([state.state.flatten(1) for state in states])


def l2_distance(net, cls="A", num=1024, seed=1, gnet=None, guidance=1.0, min_depth=0, device="cpu"):
    """Mean distance between where the network and where the exact flow take the same start points.

    With guidance it says how far guidance bends the map. On the outer branches the floor is .479 (class A).
    """
    made = samples(net, cls, num, seed, gnet, guidance, min_depth, device)
    return float((made - _truth(cls, min_depth, num, seed, str(device))).norm(dim=1).mean())


def evaluate(net, guide=None, *, cls="A", num=1024, seed=1, guidance=3.0, external=False, mandala=True, device="cpu"):
    """All metrics of a network as {name: number}; with a guide also those of the guided network, `guided_*`.

    loss, L2_metric; with `external` out_loss, out_L2_metric (class A only); with `mandala` mandala_score and
    classification_score. Raises ValueError for external branches of other classes.
    """
    if external and cls != "A":
        raise ValueError(f"--external is defined for class A only, not --cls={cls}")
    result = {"loss": average_loss(net, cls, num=num, seed=seed, device=device)}
    kinds = {"": (None, 1.0)} if guide is None else {"": (None, 1.0), "guided_": (guide, guidance)}
    truth = _truth(cls, 0, num, seed, str(device))
    for prefix, (gnet, weight) in kinds.items():
        made = samples(net, cls, num, seed, gnet, weight, device=device)
        result[f"{prefix}L2_metric"] = float((made - truth).norm(dim=1).mean())
        if mandala:
            result[f"{prefix}mandala_score"] = tree.mandala_score(made, cls)
            result[f"{prefix}classification_score"] = tree.classification_score(made, cls)
        if external:
            result[f"{prefix}out_L2_metric"] = l2_distance(net, cls, num, seed, gnet, weight, OUTER_DEPTH, device)
    if external:
        result["out_loss"] = average_loss(net, cls, OUTER_DEPTH, num, seed, device=device)
    return result


def validation_hook(cls="A", num=512, seed=1, flow=True, device="cpu"):
    """on_status hook of a toy run: loss and, with `flow`, L2 distance of the averaged and of the raw network."""

    def on_status(loop):
        fields = {}
        for who, net in (("ema", loop.ema.get()[0][0].net), ("learner", loop.objective.net)):
            training = net.training
            net.eval()
            fields[f"Validation/{who}_loss"] = average_loss(net, cls, num=num, seed=seed, device=device)
            if flow:
                fields[f"Validation/{who}_L2_metric"] = l2_distance(net, cls, num, seed, device=device)
            net.train(training)
        return fields

    return on_status


def test(net, ema=None, guide=None, guidance=3.0, levels=False, **options):
    """What `run_tree.py test` prints: learner_*, ema_*, guide_*, floor_* metrics of snapshots (paths), flat.

    options: cls, num, seed, external, mandala and device of `evaluate`.
    """
    where = {name: options[name] for name in ("cls", "num", "seed", "device")}
    guide_net = load_toy(guide, where["device"]) if guide else None
    result = {"n_samples": where["num"], "seed": where["seed"], "guidance": guidance if guide else None}
    for who, path in (("learner", net), ("ema", ema)):
        if path is not None:
            network = load_toy(path, where["device"])
            metrics = evaluate(network, guide_net, guidance=guidance, **options)
            result.update({f"{who}_{name}": value for name, value in metrics.items()})
            if levels:
                result[f"{who}_loss_per_level"] = {
                    level: average_loss(network, level=level, **where) for level in LEVELS
                }
    if guide_net is not None:
        result["guide_loss"] = average_loss(guide_net, **where)
        if options["external"]:
            result["guide_out_loss"] = average_loss(guide_net, min_depth=OUTER_DEPTH, **where)
    exact = tree.ground_truth(where["cls"], device=where["device"]).denoiser()
    result.update({f"floor_{name}": value for name, value in evaluate(exact, **options).items()})
    return result


def write_test(config, outdir, net, ema, num=1024):
    """At the end of a run: all metrics of the raw and the averaged network into test.json, and on stdout."""
    guide = load_toy(config.guide, config.device) if config.guide else None
    options = dict(cls=config.cls, num=num, guidance=config.guidance, device=config.device, external=config.cls == "A")
    found = {"n_samples": num}
    for who, network in (("learner", net), ("ema", ema)):
        found.update({f"{who}_{name}": value for name, value in evaluate(network, guide, **options).items()})
    write_json(Path(outdir) / "test.json", found)
    print(json.dumps(found, indent=2))
