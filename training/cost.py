"""What training and sampling cost, before they start: operations, memory, bytes on disk, hours on GPUs and here.

Nothing is run: the network, its optimizer and averages stand on the meta device, where tensors have shapes and no memory, and
torch counts what a step would do. Hours follow from a device's peak and an assumed utilisation of it, on this machine from a
short measurement.
"""

import collections
import copy
import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from torch_utils.persistence import load_snapshot
from training import presets, setup
from training.choices import EMAS, OPTIMIZERS, choose, given
from training.config import TrainingConfig, make_config
from training.losses import Objective
from training.selection import FUNCTIONS
from training.selection.functions import requirements_of

# TFLOP/s without sparsity, of the SXM cards, and GB of memory (NVIDIA's data sheets). A multiply-add is two operations.
_HOPPER = dict(fp32=66.9, tf32=494.7, bf16=989.4, fp16=989.4)
PEAKS = {"A100": dict(fp32=19.5, tf32=156.0, bf16=312.0, fp16=312.0), "H100": _HOPPER, "H200": _HOPPER}
MEMORY_GB = {"A100": 80, "H100": 80, "H200": 141}
EVALUATIONS = 63  # of the network per sample: 32 Heun steps
MFU = 0.4  # assumed utilisation of the peak; benchmarks/gpu.sh measures it
LAUNCH = 5e-6  # seconds assumed to start an operation on a GPU: what small networks wait for

_OPERATORS = {
    "convolution": "convolution",
    "mm": "matmul",
    "addmm": "matmul",
    "bmm": "attention",
    "baddbmm": "attention",
}


@dataclass(frozen=True)
class NetCost:
    """Of a denoiser, per image. A multiply-add counts as two operations; what is elementwise (1 % in EDM2) is not counted."""

    parameters: int
    operators: dict[str, int]  # operations of one evaluation by kind: convolution, matmul, attention
    training_flops: int  # forward and backward
    activation_bytes: int  # kept for the backward pass; attention matrices included, which fused kernels do not keep
    fixed_bytes: int  # kept as well, however many images: normalised weights
    weight_bytes: int  # of parameters and buffers
    launches: int  # operations of a training step that are no views, however many images

    @property
    def flops(self) -> int:
        """Of one evaluation."""
        return sum(self.operators.values())


@dataclass(frozen=True)
class RunCost(NetCost):
    """Of a training run, on one process."""

    state_bytes: int  # weights, gradients, optimizer and averages in memory
    snapshot_bytes: int  # of one file
    snapshots: int  # files in all
    checkpoint_bytes: int
    checkpoints: int  # files that are kept
    scoring_flops: float  # per trained image: candidates through the learner, and a reference that is as large
    images: int
    steps: int

    def training_memory(self, batch: int) -> int:
        """Bytes at the peak of a step with micro-batches of `batch` images, without the library's own."""
        return self.state_bytes + self.fixed_bytes + batch * self.activation_bytes

    @property
    def disk_bytes(self) -> int:
        return self.snapshot_bytes * self.snapshots + self.checkpoint_bytes * self.checkpoints


def _inputs(net, batch, device):
    """Arguments of an evaluation of `batch` images."""
    x = torch.zeros([batch, net.img_channels, net.img_resolution, net.img_resolution], device=device)
    labels = torch.zeros([batch, net.label_dim], device=device) if net.label_dim else None
    return x, torch.ones([batch], device=device), labels


class _Counter(TorchDispatchMode):
    """Operations by kind, by torch's table of formulas; its FlopCounterMode also decomposes, at three times the time."""

    def __init__(self):
        super().__init__()
        self.flops, self.launches = collections.Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, operator = func(*args, **(kwargs or {})), func._overloadpacket
        self.launches += not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if operator in flop_registry:
            kind = _OPERATORS.get(str(operator).partition(".")[2], "attention")
            self.flops[kind] += flop_registry[operator](*args, **(kwargs or {}), out_val=out)
        return out


def _bytes(state: Any) -> int:
    """Of all tensors in nested containers."""
    if torch.is_tensor(state):
        return state.numel() * state.element_size()
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(_bytes, values))


MANY = 10007  # images of the counted step: a prime, so that what grows with the batch is told from what does not


def of_net(net: torch.nn.Module) -> NetCost:
    """The cost of a denoiser, which stays as it is."""
    net = copy.deepcopy(net).to("meta").train().requires_grad_(True)
    inputs = _inputs(net, MANY, "meta")
    own = {t.untyped_storage()._cdata for t in [*net.parameters(), *net.buffers(), *inputs] if t is not None}
    kept = {}  # storage: bytes

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = 0 if storage._cdata in own else storage.nbytes()
        return tensor

    with _Counter() as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        denoised, logvar = net(*inputs, return_logvar=True)
        forward = {kind: flops // MANY for kind, flops in counter.flops.items()}
        images = sum(size for size in kept.values() if size % MANY == 0)
        (denoised.sum() + logvar.sum()).backward()
    return NetCost(
        parameters=sum(p.numel() for p in net.parameters()),
        operators=forward,
        training_flops=sum(counter.flops.values()) // MANY,
        activation_bytes=images // MANY,
        fixed_bytes=sum(kept.values()) - images,
        weight_bytes=_bytes(dict(net.state_dict())),
        launches=counter.launches,
    )


def of_run(config: TrainingConfig, interface: dict[str, int]) -> RunCost:
    """The cost of the run that `config` describes, for data of the shape `interface` (see `presets.interface`, `shape_of`).

    Raises ValueError for a network that cannot be built.
    """
    net = _network(config, interface)
    cost = of_net(net)
    with torch.device("meta"):
        objective = Objective(net, setup.build_loss(config, None).to("meta"))
        optimizer = OPTIMIZERS[config.optimizer](config, objective.param_groups())
        ema = EMAS[config.ema](config, objective)
        for p in objective.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    kept = [dict(objective.state_dict()), optimizer.state_dict()["state"]]
    if ema is not None:
        kept.append(ema.state_dict())
    averages = max(len(config.ema_std), 1) if config.ema == "power" else 1
    periods = [_times(config.total_nimg, config.snapshot_nimg) + 1, _times(config.total_nimg, config.checkpoint_nimg)]
    narrow = sum(p.numel() * (p.element_size() - 2) for p in net.parameters()) if config.snapshot_fp16 else 0
    return RunCost(
        **vars(cost),
        state_bytes=_bytes(kept) + sum(_bytes(p.grad) for p in objective.parameters()),
        snapshot_bytes=cost.weight_bytes - narrow,
        snapshots=averages * periods[0] if config.snapshot_nimg else 0,
        checkpoint_bytes=_bytes(kept),
        checkpoints=min(periods[1], config.keep or math.inf),
        scoring_flops=_scoring(config) * cost.flops,
        images=config.total_nimg,
        steps=config.total_nimg // config.batch_size,
    )


def _times(total, period):
    return -(-total // period) if period else 1


def _network(config, interface):
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return setup.build_network(config, interface, torch.device("meta"))


def _scoring(config):
    """Evaluations per trained image that choose it."""
    function = None if config.select == "none" else choose(FUNCTIONS, "select", config.select)
    if function is None or getattr(function, "count_only", False):
        return 0.0
    needs = requirements_of(function)
    return (("learner_loss" in needs) + ("reference_loss" in needs)) / (1 - config.filter_ratio)


def measured_rate(
    config: TrainingConfig, interface: dict[str, int], seconds: float = 10.0, device: torch.device | str = "cpu"
) -> tuple[float, str]:
    """(FLOP/s of a training step here, what was measured): forward and backward of the network of `config`.

    A network that would not fit into the time or the memory is replaced by the same one of half the width, again and again; its
    rate is close as long as both are limited by their convolutions.
    """
    device, name, net = torch.device(device), "the preset itself", _network(config, interface)
    memory = psutil.virtual_memory().available / 4 if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] / 2
    budget = seconds / 4 * _convolution_rate(device)
    while not _fits(cost := of_net(net), budget, memory) and (narrow := _narrower(config)):
        config = narrow
        net, name = _network(config, interface), f"the same network with --channels={config.channels}"
    batch = max(1, min(config.batch_gpu or config.batch_size, int(budget / cost.training_flops), 256))
    with torch.random.fork_rng():
        net = setup.build_network(config, interface, device).train()
    inputs = _inputs(net, batch, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        denoised, logvar = net(*inputs, return_logvar=True)
        (denoised.sum() + logvar.sum()).backward()
        wait()
        times.append(time.perf_counter() - begin)
    best = sorted(times[1:])[len(times) // 4]  # other load only adds
    return cost.training_flops * batch / best, name


def _convolution_rate(device):
    """FLOP/s of a 3x3 convolution: how many operations there is time for."""
    x, weight = torch.randn([4, 64, 32, 32], device=device), torch.randn([64, 64, 3, 3], device=device)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        float(torch.conv2d(x, weight, padding=1)[0, 0, 0, 0])
        times.append(time.perf_counter() - begin)
    return 2 * x.numel() * weight[0].numel() / min(times)


def _fits(cost, budget, memory):
    return cost.training_flops <= budget and 2 * cost.weight_bytes + cost.fixed_bytes + cost.activation_bytes <= memory


def _narrower(config):
    """The configuration at about half the width, in whole attention heads, or None."""
    unit = config.channels_per_head or 64
    width = (config.channels or 0) // 2 // unit * unit
    return dataclasses.replace(config, channels=width) if width else None


# --- plans ------------------------------------------------------------------------------------------------------------


def shape_of(config: TrainingConfig) -> dict[str, int]:
    """{img_resolution, img_channels, label_dim} of the data of `config`. Raises ValueError where training would."""
    dataset = setup.open_dataset(config)
    return setup.interface_of(dataset, setup.choose_encoder(dataset, config.encoder))


def plan(
    config: TrainingConfig,
    interface: dict[str, int],
    seconds: float = 0.0,
    mfu: float = MFU,
    precision: str | None = None,
    device: torch.device | str = "cpu",
) -> dict:
    """What the run will take, as plain data: counts, GB of memory and disk, and hours of one device each.

    seconds: of the measurement on this machine, on `device`; 0: none.
    mfu, precision: assumed of GPUs; None: the precision of `config`.
    """
    cost, precision = of_run(config, interface), precision or config.precision or ("fp16" if config.fp16 else "fp32")
    per_image = cost.training_flops + cost.scoring_flops
    micro = min(config.batch_gpu or config.batch_size, config.batch_size)
    basis = f"{precision} at {mfu:.0%} of the peak, {LAUNCH * 1e6:.0f} us per operation, assumed"
    rates = {name: (PEAKS[name][precision] * 1e12 * mfu, LAUNCH, basis) for name in PEAKS}
    if seconds:
        rate, basis = measured_rate(config, interface, seconds, device)
        rates["here"] = rate, 0.0, f"measured: {basis}"
    devices = {}
    for name, (rate, launch, basis) in rates.items():
        trained = micro / max(micro * per_image / rate, cost.launches * launch)
        sampled = micro / max(micro * cost.flops / rate, cost.launches * launch / 3) / EVALUATIONS
        hours = cost.images / trained / 3600
        devices[name] = dict(images_per_second=trained, hours=hours, samples_per_second=sampled, basis=basis)
    return {
        "preset": config.preset,
        "interface": interface,
        "parameters": cost.parameters,
        "gflops": {"evaluation": cost.flops / 1e9, "step_per_image": per_image / 1e9},
        "operators_gflops": {name: flops / 1e9 for name, flops in cost.operators.items()},
        "images": cost.images,
        "steps": cost.steps,
        "memory_gb": {
            "state": (cost.state_bytes + cost.fixed_bytes) / 1e9,
            "per_image": cost.activation_bytes / 1e9,
            "step": cost.training_memory(micro) / 1e9,
        },
        "disk_gb": {
            "snapshot": cost.snapshot_bytes / 1e9,
            "checkpoint": cost.checkpoint_bytes / 1e9,
            "all": cost.disk_bytes / 1e9,
        },
        "files": {"snapshots": cost.snapshots, "checkpoints": cost.checkpoints},
        "devices": devices,
    }


def duration(hours: float) -> str:
    """In words."""
    for unit, size in (("years", 24 * 365.25), ("days", 24), ("hours", 1), ("minutes", 1 / 60)):
        if hours >= 2 * size:
            return f"{hours / size:.1f} {unit}"
    return f"{hours * 3600:.0f} seconds"


HEAD = (
    "preset", "parameters", "GFLOP per evaluation", "GFLOP per trained image", "memory [GB]: state", "per image",
    "snapshot [GB]", "checkpoint [GB]", "disk of a run [GB]",
)  # fmt: skip


def rows(plans: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of a table of plans: per device trained images and samples per second, and the time of the run."""
    head, lines = list(HEAD), []
    for name in plans[0]["devices"]:
        head += [f"{name}: trained images/s", "samples/s", "run"]
    for what in plans:
        numbers = [
            *what["gflops"].values(),
            *[what["memory_gb"][k] for k in ("state", "per_image")],
            *what["disk_gb"].values(),
        ]
        line = [what["preset"], f"{what['parameters'] / 1e6:.4g} M", *(f"{value:.3g}" for value in numbers)]
        for row in what["devices"].values():
            line += [f"{row['images_per_second']:.3g}", f"{row['samples_per_second']:.3g}", duration(row["hours"])]
        lines.append(line)
    return head, lines


def plans(
    preset: list[str],
    data: str | None = None,
    duration: int | None = None,
    batch_gpu: int | None = None,
    seconds: float = 0.0,
    mfu: float = MFU,
    precision: str | None = None,
    **shape: int | None,
) -> list[dict]:
    """`plan` of each preset ("all": of every one); shape: `resolution`, `channels`, `classes`, which win over the data's.

    Raises ValueError for an unknown preset, and for data that do not fit.
    """
    found = []
    for name in presets.PRESETS if preset == ["all"] else preset:
        config = make_config(name, data=data or "random", total_nimg=duration, batch_gpu=batch_gpu)
        interface = presets.interface(name, **shape)
        if data is not None:
            own = dict(zip(("resolution", "channels", "classes"), shape_of(config).values(), strict=True))
            interface = presets.interface(name, **own | given(**shape))
        found.append(plan(config, interface, seconds, mfu, precision))
    return found


def of_file(path: str) -> dict:
    """The cost of the network of a snapshot, as plain data. Raises ValueError as load_snapshot does."""
    cost = of_net(load_snapshot(path).net)
    return dataclasses.asdict(cost) | {"flops": cost.flops}
