"""Training step and sampling, ours against EDM2 as published (benchmarks/reference) and against a plain loop."""

import copy

import numpy as np
import reference
import torch

from dnnlib.util import write_text
from measures import step
from torch_utils import distributed as dist
from training.config import make_config
from training.dataset import load_arrays
from training.guidance import GuidedDenoiser, NullLabels, for_sampling
from training.magnitude import NormalizedOnce
from training.networks_edm2 import compile_network
from training.samplers import heun

_SMALL = dict(channel_mult=[1, 2])
CASES = {  # side: (channels of the images, batch to train, batch to sample, sizes)
    "8": (3, 64, 64, dict(channels=32, num_blocks=1, attn_resolutions=[4], channels_per_head=32, **_SMALL)),
    "16": (3, 32, 32, dict(channels=64, num_blocks=2, attn_resolutions=[8], channels_per_head=64, **_SMALL)),
    "32": (3, 16, 4, dict(channels=64)),
    "64": (4, 2, 1, dict(channels=128)),  # EDM2-XS
}
CLASSES, STEPS, GUIDANCE = 10, 18, 2.0


def turns(functions, device, repeats, warmup):
    """{name: seconds [repeats]} of the functions, which take turns."""
    seconds = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name in list(functions)[:: 1 if turn % 2 else -1]:
            step.synchronize(device)
            begin = step.clock_of(device)()
            functions[name]()
            step.synchronize(device)
            if turn >= warmup:
                seconds[name].append(step.clock_of(device)() - begin)
    return {name: np.array(kept) for name, kept in seconds.items()}


def ratios(title, seconds):
    """Lines of the table: ratio to the reference, turn by turn."""
    base = seconds["reference"]
    for name, kept in seconds.items():
        low, middle, high = np.quantile(kept / base, [0.25, 0.5, 0.75])
        yield f"| {title} | {name} | {np.median(kept) * 1e3:.1f} | {middle:.3f} | {low:.3f} to {high:.3f} |"


def make(case, device):
    """(config, loop, the reference's network with the same weights)."""
    channels, batch, _, sizes = CASES[case]
    lengths = {f"{name}_nimg": 0 for name in ("status", "snapshot", "checkpoint")}
    config = make_config(None, data="random", batch_size=batch, total_nimg=batch, **lengths, **sizes)
    interface = dict(img_resolution=int(case), img_channels=channels, label_dim=CLASSES)
    loop = step.make_loop(config, interface, device)
    net = loop.objective.net
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 0:  # gains start at zero, which would leave most of the network without gradient
                p.fill_(0.7 if name.endswith("out_gain") else 0.3)
    sizes = {"model_channels" if name == "channels" else name: value for name, value in sizes.items()}
    published = reference.Denoiser(**interface, **sizes).to(device)
    published.load_state_dict(net.state_dict())
    return config, loop, published


def train(case, device, repeats, warmup, compiled):
    """Lines of the training step."""
    config, loop, published = make(case, device)
    images, labels = (torch.as_tensor(part).to(device) for part in load_arrays(loop.feed.dataset))
    plain = step.PlainStep(loop.objective.net, config, (images, labels), device)
    labels = labels if labels.ndim == 2 else torch.nn.functional.one_hot(labels.long(), CLASSES).float()
    functions = {"reference": reference.Trainer(published, images.float(), labels, config.batch_size).step}
    functions |= {"plain": plain, "ours": loop.step}
    if compiled:
        fast = make(case, device)[1]
        compile_network(fast.objective.net)
        functions["ours, compiled"] = fast.step
    yield from ratios(
        f"training step {case}x{case}, batch {config.batch_size}", turns(functions, device, repeats, warmup)
    )


def outside(case, device, repeats, warmup, compiled):
    """Share of the loop outside forward, backward and optimizer (its step and its clearing of gradients)."""
    loop, clock, inside = make(case, device)[1], step.clock_of(device), []

    def timed(function):
        def call(*args, **kwargs):
            begin = clock()
            try:
                return function(*args, **kwargs)
            finally:
                step.synchronize(device)
                inside.append(clock() - begin)

        return call

    kept = torch.Tensor.backward, NormalizedOnce.backward
    for part, name in ((loop.objective, "forward"), (loop.optimizer, "step"), (loop.optimizer, "zero_grad")):
        setattr(part, name, timed(getattr(part, name)))
    torch.Tensor.backward, NormalizedOnce.backward = map(timed, kept)
    try:
        shares = []
        for turn in range(warmup + repeats):
            inside.clear()
            begin = clock()
            loop.step()
            share = 1 - sum(inside) / (clock() - begin)
            shares += [share] if turn >= warmup else []
    finally:
        torch.Tensor.backward, NormalizedOnce.backward = kept
    low, middle, high = np.quantile(shares, [0.25, 0.5, 0.75])
    yield f"| loop outside forward, backward, optimizer, {case}x{case} | ours | - | {middle:.3f} | {low:.3f} to {high:.3f} |"


def sample(case, device, repeats, warmup, compiled):
    """Lines of Heun, and of Heun with classifier-free guidance."""
    _, loop, published = make(case, device)
    net, published = loop.objective.net.eval(), published.eval()
    noise = torch.randn([CASES[case][2], CASES[case][0], int(case), int(case)], device=device)
    labels = torch.eye(CLASSES, device=device)[torch.arange(len(noise)) % CLASSES]
    guide, unlabelled = NullLabels(net), reference.Unlabelled(published)
    with torch.no_grad():
        kinds = {
            "Heun": (net, lambda: reference.heun(published, noise, labels, num_steps=STEPS)),
            "Heun, guided": (
                GuidedDenoiser(net, guide, GUIDANCE),
                lambda: reference.heun(published, noise, labels, unlabelled, GUIDANCE, STEPS),
            ),
        }
        for title, (ours, theirs) in kinds.items():
            found, expected = heun(ours, noise, labels, num_steps=STEPS), theirs()
            error = float((found - expected).norm() / expected.norm())
            assert error < 1e-4, f"the samples differ by {error:.2e}"
            functions = {"reference": theirs, "ours": lambda ours=ours: heun(ours, noise, labels, num_steps=STEPS)}
            if compiled:
                fast = for_sampling(copy.copy(ours), compiled=True)
                functions["ours, compiled"] = lambda fast=fast: heun(fast, noise, labels, num_steps=STEPS)
            yield from ratios(
                f"{title}, {STEPS} steps {case}x{case}, batch {len(noise)}", turns(functions, device, repeats, warmup)
            )


WHAT = {"train": train, "outside": outside, "sample": sample}


def run(cases, what, compiled, device, repeats, warmup, dest):
    for name, given, known in (("cases", cases, CASES), ("what", what, WHAT)):
        if not given or set(given) - set(known):
            raise ValueError(f"--{name}={','.join(given)}: give some of {', '.join(known)}")
    device = dist.init(device)
    lines = ["| what | which | median [ms] | ratio to the reference | quartiles |", "| --- | --- | --- | --- | --- |"]
    print(f"{step.machine(device)}\n\n" + "\n".join(lines), flush=True)
    for case in cases:
        for name in what:
            for line in WHAT[name](case, device, repeats, warmup, compiled):
                print(line, flush=True)
                lines.append(line)
    if dist.get_rank() == 0 and dest is not None:
        write_text(dest, f"{step.machine(device)}\n\n" + "\n".join(lines) + "\n")
