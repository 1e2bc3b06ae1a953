"""What a training step and sampling cost: a table for a preset on this machine, on the CPU or a GPU."""

import copy
import datetime
import os
import platform
import statistics
import time

import torch

from dnnlib import atomic_write
from torch_utils import distributed as dist
from torch_utils.precision import PRECISIONS, use
from training import phema, presets, selection, setup
from training.config import make_config
from training.dataset import ArrayDataset, label_rows, load_arrays
from training.encoders import IdentityEncoder
from training.feed import Feed
from training.losses import Objective
from training.samplers import heun
from training.training_loop import Periods, TrainingLoop


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_of(device):
    """Seconds of the processor for one thread, which other load does not change; else seconds on the wall."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def timed(functions, device, repeats, warmup):
    """Median seconds of a call of each function, over `repeats` calls in turn after `warmup`; other load hits all alike."""
    seconds, clock = [[] for _ in functions], clock_of(device)
    for i in range(warmup + repeats):
        for function, kept in zip(functions, seconds, strict=True):
            synchronize(device)
            begin = clock()
            function()
            synchronize(device)
            if i >= warmup:
                kept.append(clock() - begin)
    return [statistics.median(kept) for kept in seconds]


class PlainStep:
    """The training step as it is usually written; its network starts as a copy of `net`."""

    def __init__(self, net, config, data, device):
        self.net = copy.deepcopy(net)
        self.averages = [copy.deepcopy(net).requires_grad_(False) for _ in config.ema_std]
        self.images, self.labels = (a.to(device) for a in data)
        self.config, self.count = config, 0
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-4, betas=tuple(config.betas))

    def __call__(self):
        config, device = self.config, self.images.device
        self.optimizer.zero_grad(set_to_none=True)
        micro = min(config.batch_gpu or config.batch_size, config.batch_size)
        for start in range(0, config.batch_size, micro):
            size = min(micro, config.batch_size - start)
            chosen = torch.randint(len(self.images), [size], device=device)
            images, labels = self.images[chosen], self.labels[chosen] if self.labels.shape[1] else None
            sigma = (torch.randn([size, 1, 1, 1], device=device) * config.P_std + config.P_mean).exp()
            noisy = images + torch.randn_like(images) * sigma
            weight = (sigma**2 + config.sigma_data**2) / (sigma * config.sigma_data) ** 2
            if config.loss == "edm2":
                denoised, logvar = self.net(noisy, sigma.flatten(), labels, return_logvar=True)
                loss = weight / logvar.exp() * (denoised - images) ** 2 + logvar
            else:
                loss = weight * (self.net(noisy, sigma.flatten(), labels) - images) ** 2
            (loss.sum() / config.batch_size).backward()
        for p in self.net.parameters():
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0, posinf=0, neginf=0, out=p.grad)
        self.optimizer.step()
        self.count += 1
        with torch.no_grad():
            for std, average in zip(config.ema_std, self.averages, strict=True):
                beta = (1 - 1 / self.count) ** (phema.std_to_exp(std) + 1)
                for p, q in zip(self.net.parameters(), average.parameters(), strict=True):
                    q.lerp_(p, 1 - float(beta))


@torch.no_grad()
def plain_heun(net, noise, labels, num_steps, sigma_min=0.002, sigma_max=80.0, rho=7):
    """EDM, algorithm 1, in float64 as published."""
    index = torch.arange(num_steps, dtype=torch.float64, device=noise.device)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = [*((high + index / max(num_steps - 1, 1) * (low - high)) ** rho), torch.zeros_like(index[0])]
    x = noise.double() * sigmas[0]
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = (x - net(x.float(), sigma.float(), labels).double()) / sigma
        ahead = x + (following - sigma) * slope
        if following > 0:
            slope_ahead = (ahead - net(ahead.float(), following.float(), labels).double()) / following
            ahead = x + (following - sigma) * (slope + slope_ahead) / 2
        x = ahead
    return x


def make_loop(config, interface, device):
    """The real training loop on random data of the right shape."""
    shape = [256, interface["img_channels"], interface["img_resolution"], interface["img_resolution"]]
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % interface["label_dim"] if interface["label_dim"] else None
    data = ArrayDataset(
        torch.randn(shape, generator=generator).mul(config.sigma_data).numpy(),
        None if labels is None else labels.numpy(),
        num_classes=interface["label_dim"] or None,
    )
    net = setup.build_network(config, interface, device)
    objective = Objective(net, setup.build_loss(config, None).to(device))
    optimizer = setup.OPTIMIZERS[config.optimizer](config, objective.param_groups())
    ema, periods = setup.EMAS[config.ema](config, objective), Periods(config.batch_size)
    feed = Feed(data, block=config.block, device=device)
    parts = (objective, feed, IdentityEncoder(), selection.IdentitySelector(), optimizer, ema)
    run = setup.Run(*parts, lambda nimg: 1e-4, periods, config.batch_size, config.batch_gpu or None)
    return TrainingLoop(run, ".")


def measure(config, interface, device, precision, compiled, steps, warmup, sampling_steps):
    """One row: seconds per step, images per second, seconds per sampled batch, peak memory."""
    use(precision, device)
    config.precision = precision
    loop = make_loop(config, interface, device)
    parameters = sum(p.numel() for p in loop.objective.net.parameters())
    plain = PlainStep(loop.objective.net, config, load_arrays(loop.feed.dataset), device)
    if compiled:
        for net in (loop.objective.net, plain.net):
            net.compile()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step, plain_step = timed([loop.step, plain], device, steps, warmup)
    net, plain_net = loop.objective.net.eval(), plain.net.eval()
    shape = [config.batch_size, interface["img_channels"], interface["img_resolution"], interface["img_resolution"]]
    noise = torch.randn(shape, device=device)
    labels = None
    if interface["label_dim"]:
        labels = label_rows(torch.arange(len(noise), device=device) % interface["label_dim"], interface["label_dim"])
    sample, plain_sample = timed(
        [
            lambda: heun(net, noise, labels, num_steps=sampling_steps),
            lambda: plain_heun(plain_net, noise, labels, sampling_steps),
        ],
        device, max(steps // 5, 2), 1,
    )  # fmt: skip
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return [
        precision,
        "yes" if compiled else "no",
        f"{parameters / 1e6:.2f} M",
        f"{step * 1e3:.1f}",
        f"{plain_step * 1e3:.1f}",
        f"{plain_step / step:.2f}",
        f"{config.batch_size / step:.0f}",
        f"{sample * 1e3:.0f}",
        f"{plain_sample * 1e3:.0f}",
        f"{plain_sample / sample:.2f}",
        f"{config.batch_size / sample:.1f}",
        "-" if memory is None else f"{memory:.2f}",
    ]


def table(rows, sampling_steps):
    """Markdown."""
    head = [
        "precision", "compiled", "parameters", "training step [ms]", "plain [ms]", "plain / ours", "training [img/s]",
        f"sampling a batch, {sampling_steps} steps [ms]", "plain [ms]", "plain / ours", "sampling [img/s]",
        "peak memory of both [GiB]",
    ]  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def machine(device):
    """What was measured on, in a line."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}"
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), model)
    clock = ", processor time" if clock_of(device) is time.process_time else ""
    load = f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else ""
    return f"{model}, {torch.get_num_threads()} thread(s){load}, PyTorch {torch.__version__}{clock}"


def run(
    preset,
    batch,
    batch_gpu,
    resolution,
    channels,
    classes,
    device,
    precision,
    compiled,
    steps,
    warmup,
    sampling_steps,
    dest,
):
    known = {"precision": (precision, PRECISIONS), "compile": (compiled, ("no", "yes"))}
    for name, (given, allowed) in known.items():
        if not given or set(given) - set(allowed):
            raise ValueError(f"--{name}={','.join(given)}: give some of {', '.join(allowed)}")
    lengths = {} if batch is None else {f"{name}_nimg": 0 for name in ("status", "snapshot", "checkpoint")}
    if batch is not None:
        lengths["total_nimg"] = batch
    config = make_config(preset, data="random", batch_size=batch, batch_gpu=batch_gpu, **lengths)
    device = dist.init(device)
    rows = []
    for kind in precision:
        for choice in compiled:
            interface = presets.interface(preset, resolution, channels, classes)
            rows.append(measure(config, interface, device, kind, choice == "yes", steps, warmup, sampling_steps))
            print(table(rows[-1:], sampling_steps).splitlines()[-1], flush=True)
    text = f"Preset `{preset}`, batch {config.batch_size}, {machine(device)}.\n\n" + table(rows, sampling_steps)
    print("\n" + text)
    if dest is not None:
        note = "" if torch.cuda.is_available() else (
            "\nNo GPU was available to this measurement: fp16, bf16 and compiled runs on a GPU are not in the table.\n"
        )  # fmt: skip
        date = datetime.date.today().isoformat()
        with atomic_write(dest, "w") as file:
            file.write(f"# Cost of a training step and of sampling\n\nMedians; {date}. " + text + note)
