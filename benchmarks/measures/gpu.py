"""Everything that needs a GPU, in one run of at most eight minutes without a network; see gpu.sh."""

import copy
import datetime
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from dnnlib.util import write_text
from measures import selection as selection_benchmark  # the files beside this one
from measures import step as step_benchmark
from metrics.table import markdown
from torch_utils import distributed as dist
from torch_utils.precision import PRECISIONS, precise, use
from training import cost, presets, setup
from training.config import make_config
from training.dataset import label_rows
from training.guidance import for_sampling
from training.networks_edm2 import compile_network
from training.samplers import heun

ROOT = Path(__file__).resolve().parents[2]
SIZES = {  # preset: (batch of training, batch of sampling)
    "digits8": (2048, 2048), "edm2-img512-xs": (128, 128), "edm2-img512-s": (128, 128), "edm2-img512-m": (64, 64),
}  # fmt: skip


class Budget:
    """Seconds that are left of those given."""

    def __init__(self, seconds):
        self.end = time.monotonic() + seconds

    def left(self):
        return self.end - time.monotonic()


def shown(error):
    """The first line of an error, for a cell of a table."""
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}".replace("|", "/")


def rows_until(budget, cases, need, measure, width):
    """A row per case: its name and what `measure` returns, or why there is nothing. need: seconds a case should have left."""
    for name, *case in cases:
        if budget.left() < need:
            yield [name, "not reached: no time left", *["-"] * (width - 1)]
            continue
        try:
            yield [name, *measure(*case)]
        except Exception as error:  # the other rows are worth having
            yield [name, shown(error), *["-"] * (width - 1)]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def network(preset, device):
    """(network with gains that let every part show, inputs of 4 images)."""
    torch.manual_seed(0)
    interface = presets.interface(preset)
    net = setup.build_network(make_config(preset, data="random"), interface, device).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 0:
                p.fill_(1.0 if name.endswith("out_gain") else 0.3)
    side = interface["img_resolution"]
    x = torch.randn([4, interface["img_channels"], side, side], device=device)
    sigma = torch.tensor([0.02, 0.2, 2.0, 20.0], device=device)
    labels = label_rows(torch.arange(4, device=device), interface["label_dim"])
    return net, (x * (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1), sigma, labels)


def outputs_of(net, inputs, precision, compiled):
    """(denoised images, gradient of their sum of squares with respect to all weights) in a precision."""
    use(precision, inputs[0].device)
    net = precise(copy.deepcopy(net), precision)
    if compiled:
        compile_network(net)
    denoised = net(*inputs)
    gradients = torch.autograd.grad(denoised.square().sum(), [*net.parameters()], allow_unused=True)
    return denoised.detach(), torch.cat([g.flatten() for g in gradients if g is not None])


def exactness(preset, device, budget, compiled):
    """Rows: relative error of outputs and gradients against float32 of the CPU."""
    net, inputs = network(preset, "cpu")
    truth = outputs_of(net, inputs, "fp32", False)
    net, inputs = net.to(device), [part.to(device) for part in inputs]

    def errors(precision, compiled):
        found = outputs_of(net, inputs, precision, compiled)
        apart = [float((a.cpu() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
        return [f"{value:.1e}" for value in apart]

    cases = [(f"{preset} {p}{' compiled' if c else ''}", p, c) for c in compiled for p in supported(device)]
    yield from rows_until(budget, cases, 20 if device.type == "cuda" else 0, errors, 2)


def supported(device):
    return [name for name in PRECISIONS if device.type == "cuda" or name in ("fp32", "bf16")]


def speed(preset, device, precision, compiled, tiny):
    """Cells: training and sampling images per second, utilisation of the peak, memory."""
    batch, sampled = (4, 4) if tiny else SIZES[preset]
    lengths = dict(total_nimg=batch, **{f"{name}_nimg": 0 for name in ("status", "snapshot", "checkpoint")})
    use(precision, device)
    config = make_config(preset, data="random", batch_size=batch, precision=precision, **lengths)
    interface = presets.interface(preset)
    loop = step_benchmark.make_loop(config, interface, device)
    net = loop.objective.net
    counted = cost.of_net(net)
    sampler = copy.deepcopy(net).eval().requires_grad_(False)
    if compiled:
        compile_network(net)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    repeats = 1 if tiny else 8
    (seconds,) = step_benchmark.timed([loop.step], device, repeats, 0 if tiny else 3)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    side, steps = interface["img_resolution"], 1 if tiny else 4
    noise = torch.randn([sampled, interface["img_channels"], side, side], device=device)
    labels = label_rows(torch.arange(sampled, device=device) % interface["label_dim"], interface["label_dim"])
    sampler = for_sampling(sampler, compiled=compiled)
    with torch.no_grad():
        (one,) = step_benchmark.timed(
            [lambda: heun(sampler, noise, labels, num_steps=steps)], device, 1 if tiny else 3, 1
        )
    rate = counted.training_flops * batch / seconds
    card = next((name for name in cost.PEAKS if name in name_of(device)), None)
    mfu = f"{rate / cost.PEAKS[card][precision] / 1e12:.1%}" if card else "-"
    evaluations = 2 * steps - 1
    return [
        batch, f"{batch / seconds:.4g}", f"{rate / 1e12:.3g}", mfu,
        f"{sampled / one * evaluations / cost.EVALUATIONS:.4g}",
        "-" if peak is None else f"{peak:.2f}",
    ]  # fmt: skip


def one_process(device, tiny):
    """Rows: a run under torchrun with one process (NCCL or gloo) beside a plain one, weights compared; collectives."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        try:
            tensors = [torch.arange(5.0, device=device), torch.ones([3, 2], device=device)]
            for t in tensors:
                t.requires_grad_().grad = t.detach() + 1
            dist.Reduction(tensors).finish(), dist.broadcast_(tensors), dist.barrier()
            same = all(torch.equal(t.grad, t + 1) for t in tensors)
        finally:
            torch.distributed.destroy_process_group()
        yield [f"{backend}: sum, broadcast, barrier of one process", "identical" if same else "DIFFERENT"]
        data = f"{folder}/data.zip"
        python = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
        size = [
            "--batch=64",
            "--duration=512" if tiny else "--duration=8Ki",
            "--status=0",
            "--snapshot=0",
            "--checkpoint=0",
        ]
        made = [
            sys.executable,
            "dataset_tool.py",
            "convert",
            "--source=sklearn:digits",
            f"--dest={data}",
            "--per-source=20",
        ]
        subprocess.run(made, cwd=ROOT, check=True, capture_output=True, timeout=60)
        states = []
        for name, launcher in (("torchrun", python), ("plain", [sys.executable])):
            command = [
                *launcher,
                "train_edm2.py",
                f"--outdir={folder}/{name}",
                f"--data={data}",
                "--preset=digits8",
                *size,
            ]
            done = subprocess.run(
                [*command, "--grid=False", f"--device={device.type}"],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=120,
            )
            if done.returncode:
                raise RuntimeError(done.stderr.strip().splitlines()[-1])
            (path,) = Path(folder, name).glob("training-state-*.pt")
            states.append(torch.load(path, weights_only=True, map_location="cpu")["objective"])
        apart = max(float((a - states[1][k]).abs().max()) for k, a in states[0].items())
        yield ["weights of a run under torchrun and of a plain one", f"{apart:.1e} apart"]


def name_of(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else step_benchmark.machine(device).split(",")[0]


def sections(device, tiny, budget):
    """(title, text) of every section, as it is measured."""
    presets_ = ["digits8"] if tiny else [*SIZES]
    compiled = [False] if tiny else [False, True]
    head = ["", "outputs", "gradients"]
    rows = [row for preset in presets_[:2] for row in exactness(preset, device, budget, compiled)]
    yield "Exactness: relative error against float32 on the CPU", markdown(head, rows)
    head = ["", "batch", "trained images/s", "TFLOP/s", "MFU", "samples/s (63 evaluations)", "peak memory [GiB]"]
    kinds = [p for p in ("fp32", "bf16") if p in supported(device)] if tiny else ["bf16", "fp16", "tf32"]
    cases = [
        (f"{p} {k}{' compiled' * c}", p, device, k, c, tiny)
        for c in compiled
        for k in kinds[: 3 - 2 * c]
        for p in presets_
    ]
    need = 30 if device.type == "cuda" else 0
    yield "Speed and memory", markdown(head, rows_until(budget, cases, need, speed, len(head) - 1))
    try:
        rows = [*one_process(device, tiny)]
    except Exception as error:
        rows = [["processes", shown(error)]]
    yield "One process of a group", markdown(["", "result"], rows)

    def steps():
        times = selection_benchmark.step_times("digits8", 0.8, 8, 1 if tiny else 10, device)
        return [", ".join(f"{name} {seconds / times['none']:.2f}" for name, seconds in times.items())]

    cases = [("digits8, 64 of 320, time relative to none",)]
    yield "Selection step", markdown(["", "arms"], rows_until(budget, cases, 0, steps, 1))
    where = "training.side_by_side"
    if importlib.util.find_spec(where) is None:
        yield "K models side by side", f"{where} is not there yet."
        return
    rows = rows_until(budget, [("digits8, batch 64", 2 if tiny else 10)], 0, lambda k: side_by_side(k, device, tiny), 3)
    yield "K models side by side", markdown(["", "K", "one after another / side by side", "steps/s of all"], rows)


def side_by_side(count, device, tiny):
    """Cells: K, how many times faster a step of K stacked models is, and its rate."""
    from training.side_by_side import Stack

    config, interface = make_config("digits8", data="random"), presets.interface("digits8")
    loops = [[step_benchmark.make_loop(config, interface, device) for _ in range(count)] for _ in range(2)]
    stack = Stack(loops[1])
    ways = [lambda: [loop.step() for loop in loops[0]], stack.step]
    one, together = step_benchmark.timed(ways, device, 1 if tiny else 10, 0 if tiny else 3)
    return [count, f"{one / together:.2f}", f"{1 / together:.3g}"]


def run(device, tiny, seconds, dest):
    budget, device = Budget(seconds), dist.init(device)
    date = datetime.date.today().isoformat()
    before = Path(dest).read_text(encoding="utf-8") if os.path.exists(dest) else ""
    text = f"\n## {name_of(device)}, {date}\n\n`benchmarks/gpu.sh`: {step_benchmark.machine(device)}.\n"
    for title, section in sections(device, tiny, budget):
        part = f"\n### {title}\n\n{section}\n"
        print(part, flush=True)
        text += part
        write_text(dest, before.rstrip() + "\n" + text)
