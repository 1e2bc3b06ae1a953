"""Training step and sampling, ours against EDM2 as published (benchmarks/reference) and against a plain loop."""

import multiprocessing

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
COMPILED = ["ours, compiled"]


def _serve(pipe, make, arguments):
    function = make(*arguments)
    *_, device = arguments
    while pipe.recv():
        step.synchronize(device)
        begin = step.clock_of(device)()
        found = function()
        step.synchronize(device)
        pipe.send((step.clock_of(device)() - begin, found))


class Arm:
    """A function in a process of its own, whose memory is like that of a run. make(*arguments, device) -> function."""

    def __init__(self, make, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        context.Process(target=_serve, args=(other, make, arguments), daemon=True).start()
        other.close()

    def __call__(self):
        """(seconds of a call, what it returned)."""
        self.pipe.send(True)
        return self.pipe.recv()


def turns(arms, repeats, warmup):
    """({name: seconds [repeats]}, {name: what it returned}) of arms, which take turns."""
    seconds, found = {name: [] for name in arms}, {}
    for turn in range(warmup + repeats):
        for name in list(arms)[:: 1 if turn % 2 else -1]:
            spent, found[name] = arms[name]()
            if turn >= warmup:
                seconds[name].append(spent)
    for arm in arms.values():
        arm.pipe.send(False)
    return {name: np.array(kept) for name, kept in seconds.items()}, found


def ratios(title, seconds):
    """Lines of the table: ratio to the reference, turn by turn."""
    base = seconds["reference"]
    for name, kept in seconds.items():
        low, middle, high = np.quantile(kept / base, [0.25, 0.5, 0.75])
        yield f"| {title} | {name} | {np.median(kept) * 1e3:.1f} | {middle:.3f} | {low:.3f} to {high:.3f} |"


def make(case, device):
    """(config, loop, the reference's network with the same weights), the same in every process."""
    torch.manual_seed(0)
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


def trained(name, case, device):
    """A function that trains for a step."""
    if name != "reference":
        dist.init(str(device))
    config, loop, published = make(case, device)
    if name.startswith("ours"):
        if name.endswith("compiled"):
            compile_network(loop.objective.net)
        return loop.step
    images, labels = (torch.as_tensor(part).to(device) for part in load_arrays(loop.feed.dataset))
    if name == "plain":
        return step.PlainStep(loop.objective.net, config, (images, labels), device)
    labels = labels if labels.ndim == 2 else torch.nn.functional.one_hot(labels.long(), CLASSES)
    return reference.Trainer(published, images.float(), labels.float(), config.batch_size).step


def train(case, device, repeats, warmup, compiled):
    """Lines of the training step."""
    arms = {name: Arm(trained, name, case, device) for name in ("reference", "plain", "ours", *COMPILED[:compiled])}
    seconds, _ = turns(arms, repeats, warmup)
    yield from ratios(f"training step {case}x{case}, batch {CASES[case][1]}", seconds)


def outside(case, device, repeats, warmup, compiled):
    """Share of the loop outside forward, backward and optimizer (its step and its clearing of gradients)."""
    dist.init(str(device))
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


def sampled(name, guided, case, device):
    """A function that samples a batch."""
    if name != "reference":
        dist.init(str(device))
    _, loop, published = make(case, device)
    net, published = loop.objective.net.eval().requires_grad_(False), published.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn([CASES[case][2], CASES[case][0], int(case), int(case)], generator=generator).to(device)
    labels = torch.eye(CLASSES, device=device)[torch.arange(len(noise)) % CLASSES]
    if name == "reference":
        guide = (reference.Unlabelled(published), GUIDANCE) if guided else ()
        return lambda: reference.heun(published, noise, labels, *guide, num_steps=STEPS).cpu()
    ours = GuidedDenoiser(net, NullLabels(net), GUIDANCE) if guided else net
    if name.endswith("compiled"):
        ours = for_sampling(ours, compiled=True)
    return lambda: heun(ours, noise, labels, num_steps=STEPS).cpu()


def sample(case, device, repeats, warmup, compiled):
    """Lines of Heun, and of Heun with classifier-free guidance."""
    for title, guided in (("Heun", False), ("Heun, guided", True)):
        arms = {name: Arm(sampled, name, guided, case, device) for name in ("reference", "ours", *COMPILED[:compiled])}
        seconds, found = turns(arms, repeats, warmup)
        expected = found.pop("reference")
        for name, images in found.items():
            error = float((images - expected).norm() / expected.norm())
            assert error < 1e-4, f"the samples of {name} differ by {error:.2e}"
        yield from ratios(f"{title}, {STEPS} steps {case}x{case}, batch {CASES[case][2]}", seconds)


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
