"""One training run as plain data: every option with its default, checked before any work starts."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from training import presets

LINEAR = ("vp", "cld", "alda", "malda", "learned", "linear")  # processes that say at which noise levels to train

# What a resumed run may change: lengths, intervals and how the work is split. None of these touches a random draw.
FREE_TO_CHANGE = {
    "total_nimg", "slice_nimg", "status_nimg", "snapshot_nimg", "checkpoint_nimg", "keep", "batch_gpu", "workers", "bench",
    "val_data", "grid", "snapshot_fp16", "preset",
}  # fmt: skip


@dataclass
class TrainingConfig:
    """Field names as in the presets; the command line's names where they differ are in comments. Lengths in images."""

    data: str = ""  # zip or folder
    preset: str = ""  # where the defaults came from; for the record
    cond: bool = True  # class-conditional
    xflip: bool = False  # add mirrored copies
    max_images: int | None = None  # use so many images of the data set
    val_data: str | None = None  # held-out data for the validation loss

    # Network.
    arch: str = "edm2"
    precond: str = "edm"  # of the EDM-era networks
    channels: int | None = None  # None: the architecture's own default
    channel_mult: list | None = None
    num_blocks: int | None = None
    attn_resolutions: list | None = None
    channels_per_head: int | None = None
    dropout: float = 0.0
    fp16: bool = True
    net_options: dict = field(default_factory=dict)  # further constructor arguments

    # Noise and loss.
    process: str = "edm"
    process_options: dict = field(default_factory=dict)  # of a linear process: M, beta, init_aux_var, V, ...
    aug_dim: float | None = None  # D of PFGM++
    loss: str = "edm2"
    time_sampling: str | None = None  # loss "process", which is that of linear processes: law of t; None: snr
    weighting: str | None = None  # loss "process": None: likelihood
    t_min: float | None = None  # loss "process": lower end of t; None: where sigma is 0.002
    process_lr_scale: float = 0.1  # learned processes: learning rate as a multiple of the network's
    encoder: str | None = None  # pixels: rgb, dequantize, center or logit; None: by the data
    sigma_data: float = 0.5
    P_mean: float = -0.4
    P_std: float = 1.0
    label_dropout: float = 0.0
    uncertainty: bool | None = None  # None: the loss's own default, off where the process forbids it
    augment: float = 0.0  # probability of EDM's augmentation pipeline
    stf: bool = False
    stf_refs: int = 1024

    # Optimization.
    total_nimg: int = 8 << 30  # --duration
    batch_size: int = 2048  # --batch
    optimizer: str = "adam"
    betas: list = field(default_factory=lambda: [0.9, 0.99])
    weight_decay: float = 0.0
    grad_clip: float | None = None
    lr: float = 0.01
    lr_schedule: str = "edm2"
    decay: float = 70000  # batches
    rampup: float = 10.0  # million images
    ema: str = "power"
    ema_std: list = field(default_factory=lambda: [0.05, 0.10])
    ema_halflife: float = 0.5  # million images
    ema_rampup: float | None = 0.09
    ema_decay: float = 0.9999
    loss_scaling: float = 1.0  # --ls

    # Selection.
    select: str = "none"
    reference: str | None = None  # snapshot of the reference network
    filter_ratio: float = 0.8
    select_when: str = "always"
    select_scope: str = "global"
    select_from: int = 0
    select_until: int | None = None
    score_scale: float = 1.0
    select_cheap: str | None = None  # half, lowres or levels: cheaper scores
    select_options: dict = field(default_factory=dict)  # chunks and other keywords of the selection function

    # Running.
    seed: int = 0
    block: int | None = None  # positions of the data order that share one noise generator; None: largest divisor <= 32
    batch_gpu: int = 0  # micro-batch per process; 0: no limit
    bench: bool = True
    slice_nimg: int = 0
    status_nimg: int = 128 << 10
    snapshot_nimg: int = 8 << 20
    checkpoint_nimg: int = 128 << 20
    keep: int = 0
    workers: int = 2
    init: str | None = None  # snapshot whose weights start the run
    grid: bool = True  # draw a sample grid at every snapshot
    snapshot_fp16: bool = False

    def check(self):
        """Raises ValueError, naming the option, for values that cannot work together. Returns self."""
        for field_ in dataclasses.fields(self):
            value = getattr(self, field_.name)
            numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, float)]
            ok = all(map(math.isfinite, numbers)) or field_.name == "aug_dim"
            _require(ok, field_.name, value, "must be finite")
        positive = ("total_nimg", "batch_size", "lr", "P_std", "sigma_data", "loss_scaling", "stf_refs", "score_scale")
        for name in positive:
            _require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        for name in (
            "process_lr_scale",
            "decay",
            "rampup",
            "weight_decay",
            "batch_gpu",
            "slice_nimg",
            "keep",
            "workers",
            "seed",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        ok = self.channel_mult is None or all(0 < m <= 1024 for m in self.channel_mult)
        _require(ok, "channel_mult", self.channel_mult, "must be factors between 1 and 1024")
        ok = self.attn_resolutions is None or all(r >= 0 for r in self.attn_resolutions)
        _require(ok, "attn_resolutions", self.attn_resolutions, "must not be negative")
        for name in ("dropout", "label_dropout", "augment"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must lie in [0, 1]")
        _require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", self.betas, "must be two in [0, 1)"
        )
        _require(self.grad_clip is None or self.grad_clip > 0, "grad_clip", self.grad_clip, "must be positive")
        _require(self.ema_halflife > 0, "ema_halflife", self.ema_halflife, "must be positive")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "must lie in [0, 1)")
        _require(0 <= self.filter_ratio < 1, "filter_ratio", self.filter_ratio, "must lie in [0, 1): it is discarded")
        ok = self.ema_std and all(0 < std <= 12**-0.5 for std in self.ema_std)
        _require(ok, "ema_std", self.ema_std, "must lie in (0, 0.2887)")
        for name in ("status_nimg", "snapshot_nimg", "checkpoint_nimg", "total_nimg", "slice_nimg"):
            value, unit, units = getattr(self, name), self.batch_size, f"--batch={self.batch_size}"
            if name in ("snapshot_nimg", "checkpoint_nimg"):
                unit, units = math.lcm(unit, 1024), f"{units} and of 1Ki (1024)"
            ok = value >= 0 and value % unit == 0
            _require(ok, name, value, f"must be a multiple of {units}, such as {value // unit * unit or unit}")
        if self.augment and self.arch == "edm2":
            raise ValueError(
                f"--augment={self.augment} needs a network with augmentation labels: --arch=ddpmpp|ncsnpp|adm"
            )
        if self.aug_dim is not None:
            self.aug_dim = float(self.aug_dim)  # "inf", as it is stored
            _require(self.process == "pfgmpp", "aug_dim", self.aug_dim, "belongs to --process=pfgmpp")
            _require(self.aug_dim > 0, "aug_dim", self.aug_dim, "must be positive or inf")
        if self.process_options:
            from training.processes.options import parse_options

            self.process_options = parse_options(self.process_options)
        for name in ("time_sampling", "weighting", "t_min"):
            value = getattr(self, name)
            _require(
                value is None or self.loss == "process", name, value, f"belongs to --loss=process, not {self.loss}"
            )
        if self.block is None:
            self.block = max(b for b in range(1, min(self.batch_size, 32) + 1) if self.batch_size % b == 0)
        _require(self.block >= 1, "block", self.block, "must be at least 1")
        return self

    def to_dict(self):
        """Plain data that every JSON reader takes: an infinite D is the word inf."""
        values = dataclasses.asdict(self)
        return values if self.aug_dim is None or math.isfinite(self.aug_dim) else {**values, "aug_dim": "inf"}


# How fields are called on the command line where the name is another.
OPTION_NAMES = {
    "total_nimg": "duration", "batch_size": "batch", "slice_nimg": "slice", "status_nimg": "status",
    "snapshot_nimg": "snapshot", "checkpoint_nimg": "checkpoint", "loss_scaling": "ls", "select_options": "chunks",
}  # fmt: skip


def option_name(name):
    """The command-line option of a field."""
    name = OPTION_NAMES.get(name, name)
    return "--" + (name if name.startswith("P_") else name.replace("_", "-"))


def _require(ok, name, value, remedy):
    if not ok:
        raise ValueError(f"{option_name(name)}={value} {remedy}")


def make_config(preset=None, **options):
    """TrainingConfig from a preset's row and explicit options (None: not given), checked. Raises ValueError."""
    row = presets.get(preset) if preset else {}
    fields = {f.name for f in dataclasses.fields(TrainingConfig)}
    unknown = {*row, *options} - fields
    if unknown:
        raise ValueError(f"unknown training options {sorted(unknown)}; known: {', '.join(sorted(fields))}")
    row.update({name: value for name, value in options.items() if value is not None})
    chosen = any(options.get(name) is not None for name in ("arch", "precond")) or "loss" not in row
    if chosen and options.get("loss") is None and row.get("arch", "edm2") != "edm2":
        row["loss"] = row.get("precond", "edm")  # the loss that a preconditioning was made with
    if row.get("process") in LINEAR and options.get("loss") is None:
        row["loss"] = "process"  # its own noise levels and weight
    return TrainingConfig(**{**row, "preset": preset or ""}).check()


def differences(old, new):
    """Lines 'option: old -> new' for the options that a resumed run must not change.

    An option that one side does not know has its default there: the run is older, or newer, than the option.
    """
    defaults = TrainingConfig().to_dict()
    lines = []
    for name in sorted({*old, *new} - FREE_TO_CHANGE):
        a, b = (json.loads(json.dumps(side.get(name, defaults.get(name)))) for side in (old, new))
        if a != b:
            lines.append(f"{option_name(name)}: {a} -> {b}")
    return lines


def check_same_run(run_dir, config):
    """Raises ValueError if `run_dir` holds a run with other options than `config`."""
    path = Path(run_dir) / "training_options.json"
    if not path.is_file():
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise ValueError(f"{path}: not readable ({err}); choose another --outdir") from err
    changed = differences(old, config.to_dict())
    if changed:
        raise ValueError(
            f"--outdir={run_dir} holds a run with other options ({'; '.join(changed)}): "
            f"give the same ones to resume it, or another --outdir"
        )
