"""One training run as plain data: every option once, with its default, help and bounds; checked before any work starts."""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dnnlib import cli, options, outputs
from dnnlib.options import opt
from training import choices, presets, trackers

# One line per option; `free`: a resumed run may change it, since it touches no random draw.
_data = functools.partial(opt, group="Data")
_net = functools.partial(opt, group="Network")
_noise = functools.partial(opt, group="Noise and loss")
_optim = functools.partial(opt, group="Optimization")
_select = functools.partial(opt, group="Selection")
_run = functools.partial(opt, group="Running")
_period = functools.partial(_run, type=cli.NIMG, at_least=0, free=True)

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")  # meaning: torch_utils/precision.py
TIME_SAMPLING, WEIGHTING = ("uniform", "importance", "snr"), ("likelihood", "reweightedv1", "reweightedv2")
PARAMETERIZATIONS, PREDICTIONS = ("reduced", "joint-denoiser", "joint"), ("noise", "score", "mixed")
WHEN, CHEAP = ("always", "early", "late"), ("half", "levels", "lowres")

JOINT = ("prediction", "predict", "transition", "cov_eps", "objective", "elbo_samples", "switch_at")

RUN = outputs.Kind(
    "a run folder",
    outputs.folder_with(
        r"training_options\.json", r"log\.txt", r"stats\.jsonl", r"(network-snapshot|training-state)-.*"
    ),
    folder=True,
)


@dataclass
class TrainingConfig:
    """Field names as in the presets. Lengths in images; None leaves a choice to the part that it belongs to."""

    data: str = _data("", "Data set (see dataset_tool.py)", metavar="ZIP|DIR")
    preset: str = ""  # where the defaults came from; for the record
    data_content: str | None = None  # fingerprint of the data, filled in when they are opened
    cond: bool = _data(True, "Class-conditional training")
    xflip: bool = _data(False, "Add mirrored copies of all images")
    max_images: int | None = _data(None, "Use so many images of the data set", at_least=1)
    val_data: str | None = _data(None, "Held-out data for the validation loss", metavar="ZIP|DIR", free=True)
    encoder: str | None = _data(None, "Of pixels", choices=choices.ENCODERS, shown="by the data")

    arch: str = _net("edm2", "Architecture", choices=choices.ARCHS)
    precond: str = _net("edm", "Preconditioning of ddpmpp, ncsnpp, adm", choices=choices.PRECONDS)
    channels: int | None = _net(None, "Base width", "--channels", "--cbase", at_least=1, at_most=2**16)
    channel_mult: list | None = _net(
        None, "Width per level", "--channel-mult", "--cres", type=cli.INTS, above=0, at_most=1024
    )
    num_blocks: int | None = _net(None, "Blocks per level", at_least=1, at_most=1000)
    attn_resolutions: list | None = _net(None, "Resolutions with attention, e.g. 16,8", type=cli.INTS, at_least=0)
    channels_per_head: int | None = _net(None, "Width of an attention head", at_least=1, at_most=2**16)
    dropout: float = _net(0.0, "Dropout probability", at_least=0, at_most=1)
    fp16: bool = _net(True, "Reduced precision on GPUs: fp16 there, fp32 on the CPU")
    precision: str | None = _net(None, "Of the arithmetic; wins over --fp16", choices=PRECISIONS, shown="by --fp16")
    net_options: dict = field(default_factory=dict)  # further constructor arguments

    process: str = _noise("edm", "Noise: a name in training.processes.REGISTRY, such as pfgmpp or cld", metavar="NAME")
    process_options: dict = _noise({}, "Of the process: M=0.25,beta=4:4,init_aux_var=0.01", type=cli.MAPPING)
    aug_dim: float | None = _noise(None, "Augmented dimensions of pfgmpp, or inf", metavar="D", above=0, infinite=True)
    loss: str = _noise("edm2", "Loss; process: a process's own noise levels", choices=choices.LOSSES)
    time_sampling: str | None = _noise(None, "Of loss process: law of t", choices=TIME_SAMPLING, shown="snr")
    weighting: str | None = _noise(None, "Of loss process: weight", choices=WEIGHTING, shown="likelihood")
    t_min: float | None = _noise(None, "Its lowest t", above=0, shown="where sigma is 0.002; joint: 1e-3")
    parameterization: str = _noise(
        "reduced",
        "What the network sees: noisy data, or the whole state; joint: as CLD and MDM",
        choices=PARAMETERIZATIONS,
    )
    prediction: str | None = _noise(None, "Of joint: what the network returns", choices=PREDICTIONS, shown="noise")
    predict: str | None = _noise(None, "Of joint: for which variables", choices=("noised", "all"), shown="noised")
    transition: str | None = _noise(
        None, "Of joint: hsm or dsm of CLD", choices=("hybrid", "conditional"), shown="hybrid"
    )
    cov_eps: float | None = _noise(None, "Of joint: added to covariances (CLD)", at_least=0, shown="0")
    objective: str | None = _noise(None, "Of joint", choices=("noise", "elbo"), shown="noise")
    elbo_samples: int | None = _noise(None, "Of joint: times and noises per image", at_least=1, shown="1")
    switch_at: int | None = _noise(
        None, "Of joint: images after which noise prediction becomes elbo", type=cli.NIMG, at_least=0
    )
    process_lr_scale: float = _noise(0.1, "Learned process: learning rate relative to the network's", at_least=0)
    sigma_data: float = _noise(0.5, "Standard deviation of the data (dataset_tool.py inspect)", above=0)
    P_mean: float = _noise(-0.4, "Mean of ln sigma")
    P_std: float = _noise(1.0, "Standard deviation of ln sigma", above=0)
    label_dropout: float = _noise(0.0, "Probability of a zeroed label", at_least=0, at_most=1)
    uncertainty: bool | None = _noise(None, "Learned log-variance in the loss", shown="the loss's own")
    augment: float = _noise(0.0, "Probability of EDM's augmentations", at_least=0, at_most=1)
    stf: bool = _noise(False, "Stable targets: posterior means over reference images")
    stf_refs: int = _noise(1024, "Reference images per noise block", above=0)

    total_nimg: int = _optim(8 << 30, "Training images, e.g. 64Mi", "--duration", type=cli.NIMG, above=0, free=True)
    batch_size: int = _optim(2048, "Total batch over all processes", "--batch", type=cli.NIMG, above=0)
    optimizer: str = _optim("adam", "Optimizer", choices=choices.OPTIMIZERS)
    betas: list = _optim([0.9, 0.99], "Of the optimizer", at_least=0, below=1)
    weight_decay: float = _optim(0.0, "Of the optimizer", at_least=0)
    grad_clip: float | None = _optim(None, "Global norm of the gradient", above=0)
    lr: float = _optim(0.01, "Reference learning rate", above=0)
    lr_schedule: str = _optim("edm2", "Learning rate over time", choices=choices.SCHEDULES)
    decay: float = _optim(70000, "Batches before the learning rate decays; 0: never", at_least=0)
    rampup: float = _optim(10.0, "Learning-rate ramp-up, million images", metavar="MIMG", at_least=0)
    ema: str = _optim("power", "Kind of weight average", choices=choices.EMAS)
    ema_std: list = _optim([0.05, 0.10], "power: relative stds", above=0, at_most=12**-0.5)
    ema_halflife: float = _optim(0.5, "halflife: million images", metavar="MIMG", above=0)
    ema_rampup: float | None = 0.09
    ema_decay: float = _optim(0.9999, "decay: per step", at_least=0, below=1)
    loss_scaling: float = _optim(1.0, "Loss scale", "--ls", above=0)

    select: str = _select("none", "none, or a function of training/selection/functions.py", metavar="NAME")
    reference: str | None = _select(None, "Reference; ema: the learner's own average", metavar="SNAPSHOT")
    filter_ratio: float = _select(0.8, "Share of the candidates that is discarded", at_least=0, below=1)
    select_when: str = _select("always", "Until / from the learner beating the reference", choices=WHEN)
    select_scope: str = _select("global", "Choose over all processes or in each", choices=("global", "rank"))
    select_from: int = _select(0, "Select from so many images on", type=cli.NIMG, at_least=0)
    select_until: int | None = _select(None, "Select until so many images", type=cli.NIMG, at_least=0)
    score_scale: float = _select(1.0, "Factor on the losses that are compared", above=0)
    select_cheap: str | None = _select(None, "Cheaper scores; training stays exact", choices=CHEAP)
    select_options: dict = field(default_factory=dict)  # --chunks and other keywords of the selection function

    seed: int = _run(0, "Of everything random", at_least=0)
    block: int | None = _run(
        None, "Data positions that share a noise generator", at_least=1, shown="divisor of the batch"
    )
    batch_gpu: int = _run(0, "Largest micro-batch per process; 0: no limit", type=cli.NIMG, at_least=0, free=True)
    bench: bool = _run(True, "cuDNN benchmarking", free=True)
    compile: bool = _run(False, "Compile the network: pays back after a thousand steps; weights differ by rounding")
    slice_nimg: int = _period(0, "Train at most so many images now", "--slice")
    status_nimg: int = _period(128 << 10, "Interval of status lines; 0: none", "--status")
    snapshot_nimg: int = _period(8 << 20, "Interval of snapshots; 0: none", "--snapshot")
    checkpoint_nimg: int = _period(128 << 20, "Interval of checkpoints; 0: last only", "--checkpoint")
    patience: int = _run(
        0, "End after so many status lines without a lower validation loss; 0: never", at_least=0, free=True
    )
    keep: int = _run(0, "Checkpoints to keep; 0: all", at_least=0, free=True)
    workers: int = _run(2, "Loader processes", at_least=0, at_most=256, free=True)  # more would take the machine down
    init: str | None = _run(None, "Start a new run from these weights", metavar="SNAPSHOT")
    init_classes: str | None = _run(
        None, "--init for other sources: a new label embedding, or by class names", choices=("new", "names")
    )
    grid: bool = _run(True, "Sample grid at every snapshot", free=True)
    grid_nimg: int = _period(0, "Interval of further sample grids; 0: none", "--grid-every")
    log: str | None = _run(None, "Also send statistics and grids to a tracker", choices=trackers.TRACKERS, free=True)
    eval_nimg: int = _period(0, "Interval of scores of the snapshots; 0: none", "--eval-every")
    eval_ref: str | None = _run(
        None, "Reference of these: a file of calculate_metrics.py ref", metavar="FILE", free=True
    )
    eval_metrics: str | None = _run(
        None,
        "Their detectors, as calculate_metrics.py --metrics [default: those of the file]",
        metavar="LIST",
        free=True,
    )
    eval_num: int = _run(50000, "Their number of images", at_least=2, free=True)
    vae: str | None = _run(
        None, "VAE of their latents: local folder, or name on the hub", metavar="DIR|NAME", free=True
    )
    snapshot_fp16: bool = _run(False, "Store snapshots in half precision", free=True)

    def check(self) -> "TrainingConfig":
        """Raises ValueError, naming the option, for values that cannot work together. Returns self."""
        if self.aug_dim is not None:
            self.aug_dim = float(self.aug_dim)  # "inf", as it is stored
        options.check(self)
        self._require(len(self.betas) == 2, "betas", "must be two numbers")
        self._require(len(self.ema_std) > 0, "ema_std", "must be at least one number")
        for name in ("status_nimg", "snapshot_nimg", "checkpoint_nimg", "total_nimg", "slice_nimg"):
            value, unit, units = getattr(self, name), self.batch_size, f"--batch={self.batch_size}"
            if name in ("snapshot_nimg", "checkpoint_nimg"):
                unit, units = math.lcm(unit, 1024), f"{units} and of 1Ki (1024)"
            self._require(
                value % unit == 0, name, f"must be a multiple of {units}, such as {value // unit * unit or unit}"
            )
        every, unit = self.eval_nimg, self.snapshot_nimg
        self._require(not every or unit and every % unit == 0, "eval_nimg", f"must be a multiple of --snapshot={unit}")
        self._require(not every or self.eval_ref, "eval_nimg", "needs a reference: give --eval-ref=FILE")
        for name in ("eval_ref", "eval_metrics"):
            self._require(every or getattr(self, name) is None, name, "belongs to --eval-every=NIMG")
        labelled = not self.augment or self.arch != "edm2"
        self._require(labelled, "augment", "needs a network with augmentation labels: --arch=ddpmpp|ncsnpp|adm")
        every, unit = self.grid_nimg, self.status_nimg
        self._require(not every or unit and every % unit == 0, "grid_nimg", f"must be a multiple of --status={unit}")
        self._require(self.grid or not every, "grid_nimg", "needs --grid=True")
        looks = self.val_data and self.status_nimg
        self._require(looks or not self.patience, "patience", "needs the status lines of --val-data=ZIP")
        self._require(self.aug_dim is None or self.process == "pfgmpp", "aug_dim", "belongs to --process=pfgmpp")
        self._require(self.init or not self.init_classes, "init_classes", "belongs to --init=SNAPSHOT")
        if self.process_options:
            from training.processes.options import parse_options

            self.process_options = parse_options(self.process_options)
        for name in ("time_sampling", "weighting", "t_min"):
            fits = getattr(self, name) is None or self.loss in ("process", "joint")
            self._require(fits, name, f"belongs to --loss=process, not {self.loss}")
        for name in JOINT:
            fits = getattr(self, name) is None or self.parameterization == "joint"
            self._require(fits, name, "belongs to --parameterization=joint")
        joint = self.parameterization == "joint"
        self._require(joint == (self.loss == "joint"), "parameterization", f"does not go with --loss={self.loss}")
        whole = self.parameterization != "reduced"
        self._require(
            not (whole and self.augment or joint and self.stf), "parameterization", "goes without --augment, --stf"
        )
        narrow = whole and self.precision in ("bf16", "fp16")
        self._require(
            not narrow,
            "precision",
            f"is none of networks of the whole state (--parameterization={self.parameterization}): give fp32",
        )
        if self.block is None:
            self.block = max(b for b in range(1, min(self.batch_size, 32) + 1) if self.batch_size % b == 0)
        return self

    def _require(self, ok, name, remedy):
        if not ok:
            raise ValueError(f"{option_name(name)}={getattr(self, name)} {remedy}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data that every JSON reader takes: an infinite D is the word inf."""
        values = dataclasses.asdict(self)
        return values if self.aug_dim is None or math.isfinite(self.aug_dim) else {**values, "aug_dim": "inf"}

    def fixed(self) -> dict[str, Any]:
        """The options that a resumed run must not change."""
        free = {"preset"} | {name for name, own in options.declared(TrainingConfig).items() if own.free}
        return {name: value for name, value in self.to_dict().items() if name not in free}


def option_name(name: str) -> str:
    """The command-line option of a field."""
    return "--chunks" if name == "select_options" else options.flag(TrainingConfig, name)


def has_own_levels(process: str) -> bool:
    """Whether a process of that name says at which noise levels to train: linear diffusions other than EDM's own."""
    if process == "edm":
        return False
    from training import processes

    return processes.is_linear(processes.REGISTRY.get(process))


def make_config(preset: str | None = None, **given: Any) -> TrainingConfig:
    """TrainingConfig from a preset's row and explicit options (None: not given), checked. Raises ValueError."""
    row = presets.get(preset) if preset else {}
    fields = {f.name for f in dataclasses.fields(TrainingConfig)}
    unknown = {*row, *given} - fields
    if unknown:
        raise ValueError(f"unknown training options {sorted(unknown)}; known: {', '.join(sorted(fields))}")
    row.update({name: value for name, value in given.items() if value is not None})
    chosen = any(given.get(name) is not None for name in ("arch", "precond")) or "loss" not in row
    if chosen and given.get("loss") is None and row.get("arch", "edm2") != "edm2":
        row["loss"] = row.get("precond", "edm")  # the loss that a preconditioning was made with
    if given.get("loss") is None and has_own_levels(row.get("process", "edm")):
        row["loss"] = "process"  # its own noise levels and weight
    if given.get("loss") is None and row.get("parameterization") == "joint":
        row["loss"] = "joint"
    return TrainingConfig(**{**row, "preset": preset or ""}).check()


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines 'option: old -> new' for the options that a resumed run must not change.

    An option that one side does not know has its default there: the run is older, or newer, than the option. Data are the
    same if their content is, wherever they lie; by their path, where the run is older than that knowledge.
    """
    defaults = TrainingConfig().fixed()
    contents = old.get("data_content"), new.get("data_content")
    lines = []
    if None not in contents and contents[0] != contents[1]:
        lines.append(f"--data: other images than before ({old.get('data')} -> {new.get('data')})")
    for name in sorted(defaults.keys() - {"data_content", *(["data"] if None not in contents else [])}):
        a, b = (json.loads(json.dumps(side.get(name, defaults.get(name)))) for side in (old, new))
        if a != b:
            lines.append(f"{option_name(name)}: {a} -> {b}")
    return lines


def check_same_run(run_dir: str | Path, identity: dict[str, Any]) -> None:
    """Raises ValueError if `run_dir` holds a run with other options than `identity` (see setup.Run)."""
    path = Path(run_dir) / "training_options.json"
    if not path.is_file():
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        changed = differences(old, identity)
    except (ValueError, AttributeError, TypeError) as err:
        raise ValueError(f"{path}: not readable ({err}); choose another --outdir") from err
    if changed:
        raise ValueError(
            f"--outdir={run_dir} holds a run with other options ({'; '.join(changed)}): "
            f"give the same ones to resume it, or another --outdir"
        )
