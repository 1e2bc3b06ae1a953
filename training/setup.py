"""From a TrainingConfig to the parts of a run. Each choice by name is one entry of one dict below.

An entry of your own (`ARCHS["mine"] = build_mine`) is a choice of `train_edm2.py` at once.
"""

import functools
import inspect
import json
import math
import subprocess
import warnings
from pathlib import Path

import numpy as np
import torch

from dnnlib.util import atomic_write
from torch_utils import checkpoint, persistence
from torch_utils import distributed as dist
from torch_utils.random import hash_seed
from training import encoders, losses, phema, processes, selection
from training.config import LINEAR, check_same_run
from training.dataset import ImageFolderDataset, load_arrays
from training.feed import CACHE_BYTES, Feed
from training.networks_edm2 import Precond
from training.processes.options import make_process
from training.schedules import SCHEDULES
from training.training_loop import Periods, training_loop

# --- networks ---------------------------------------------------------------------------------------------------------


def _given(**options):
    return {name: value for name, value in options.items() if value is not None}


def build_edm2(config, interface):
    """The EDM2 U-Net (training/networks_edm2.py)."""
    return Precond(
        **interface,
        use_fp16=config.fp16,
        sigma_data=config.sigma_data,
        dropout=config.dropout,
        **_given(
            model_channels=config.channels,
            channel_mult=config.channel_mult,
            num_blocks=config.num_blocks,
            attn_resolutions=config.attn_resolutions,
            channels_per_head=config.channels_per_head,
        ),
        **config.net_options,
    )


_SONG = dict(model_type="SongUNet", model_channels=128, channel_mult=[2, 2, 2])
_EDM_ARCHS = {
    "ddpmpp": dict(
        _SONG, embedding_type="positional", encoder_type="standard", decoder_type="standard",
        channel_mult_noise=1, resample_filter=[1, 1],
    ),
    "ncsnpp": dict(
        _SONG, embedding_type="fourier", encoder_type="residual", decoder_type="standard",
        channel_mult_noise=2, resample_filter=[1, 3, 3, 1],
    ),
    "adm": dict(model_type="DhariwalUNet", model_channels=192, channel_mult=[1, 2, 3, 4]),
}  # fmt: skip
_PRECONDS = {"edm": "EDMPrecond", "vp": "VPPrecond", "ve": "VEPrecond"}


def build_edm(config, interface):
    """The EDM-era networks (training/networks_edm/): ddpmpp, ncsnpp, adm with EDM, VP or VE preconditioning."""
    from training import networks_edm

    options = dict(_EDM_ARCHS[config.arch])
    options.update(
        _given(
            model_channels=config.channels,
            channel_mult=config.channel_mult,
            num_blocks=config.num_blocks,
            attn_resolutions=config.attn_resolutions,
            augment_dim=augment_pipe(config).label_dim if config.augment else None,
        )
    )
    if config.precond == "edm":
        options["sigma_data"] = config.sigma_data
    options.update(config.net_options)
    build = getattr(networks_edm, _PRECONDS[config.precond])
    return build(**interface, use_fp16=config.fp16, dropout=config.dropout, **options)


ARCHS = {"edm2": build_edm2, "ddpmpp": build_edm, "ncsnpp": build_edm, "adm": build_edm}

# --- losses -----------------------------------------------------------------------------------------------------------

# common: keywords of every DenoisingLoss; references: callable (n, generator) -> clean examples.
LOSSES = {
    "edm2": lambda config, common, references: losses.EDM2Loss(config.P_mean, config.P_std, **common),
    "edm": lambda config, common, references: losses.EDMLoss(config.P_mean, config.P_std, **common),
    "vp": lambda config, common, references: losses.VPLoss(**common),
    "ve": lambda config, common, references: losses.VELoss(**common),
    "process": lambda config, common, references: build_process_loss(config, common),
}


def build_process_loss(config, common):
    """The loss of a linear process (training/losses/process.py)."""
    from training.losses.process import ProcessLoss

    process = common["kernel"]
    if not hasattr(process, "project"):
        raise ValueError(f"--loss=process needs a linear process, not --process={config.process}: take --loss=edm2")
    laws = _given(time_sampling=config.time_sampling, weighting=config.weighting, t_min=config.t_min)
    return ProcessLoss(process, **common, **laws, lr_scale=config.process_lr_scale)


def build_process(config):
    """The noise of a run: a kernel or process of training/processes."""
    if config.process == "pfgmpp":
        return processes.get("pfgmpp", **_given(D=config.aug_dim))
    if config.process in LINEAR or config.process_options:
        process = make_process(config.process, config.process_options, seed=config.seed, learn=True)
        if isinstance(process, torch.nn.Module) and config.loss != "process":
            raise ValueError(f"--process={config.process} is learned by --loss=process, not --loss={config.loss}")
        return process
    return processes.get(config.process)


def augment_pipe(config):
    """EDM's augmentations (EDM appendix F.2) at the probability of --augment."""
    from training.augment import AugmentPipe

    return AugmentPipe(p=config.augment, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)


def _augmented(references, augment):
    """References that are augmented as the training images are, each on its own."""

    def draw(n, generator):
        images, labels = references(n, generator)
        return augment(images, generator)[0], labels

    return draw if augment is not None else references


def build_loss(config, references):
    """The loss of a run. references: callable (n, generator) -> (images, labels), clean and encoded, for stable targets."""
    kernel = build_process(config)
    if not hasattr(kernel, "unit_noise"):
        raise ValueError(
            f"--process={config.process} has no training noise of its own: train with edm and sample with it"
        )
    augment = augment_pipe(config) if config.augment else None
    uncertainty = config.uncertainty
    if uncertainty is None and not getattr(kernel, "logvar_default", True):
        uncertainty = False  # the head would chase a mean that does not exist
    stable = None
    if config.stf:
        stable = losses.StableTargets(_augmented(references, augment), config.stf_refs, getattr(kernel, "D", math.inf))
    common = _given(
        sigma_data=config.sigma_data, kernel=kernel, augment=augment, label_dropout=config.label_dropout,
        uncertainty=uncertainty, stable_targets=stable,
    )  # fmt: skip
    return _choose(LOSSES, "loss", config.loss)(config, common, references)


def _choose(table, option, name):
    if name not in table:
        raise ValueError(f"--{option}={name} is unknown; known: {', '.join(sorted(table))}")
    return table[name]


# --- optimization -----------------------------------------------------------------------------------------------------

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "adamax": torch.optim.Adamax}

EMAS = {
    "power": lambda config, objective: phema.PowerFunctionEMA(objective, config.ema_std),
    "halflife": lambda config, objective: phema.HalfLifeEMA(objective, config.ema_halflife, config.ema_rampup),
    "decay": lambda config, objective: phema.DecayEMA(objective, config.ema_decay),
}

# --- selection --------------------------------------------------------------------------------------------------------


def build_selector(config, device, ema=None):
    """IdentitySelector, or a LossSelector around the function named by --select. ema: for --reference=ema."""
    if config.select == "none":
        return selection.IdentitySelector()
    reference = None
    if config.reference == "ema":
        if ema is None:
            raise ValueError("--reference=ema needs an average of the weights: not with --ema=none")
        reference = ema.get()[0][0].net
    elif config.reference is not None:
        reference = persistence.load_snapshot(config.reference, device).net
    return selection.LossSelector(
        _choose(selection.FUNCTIONS, "select", config.select),
        reference=reference,
        filter_ratio=config.filter_ratio,
        scope=config.select_scope,
        score_scale=config.score_scale,
        when=config.select_when,
        select_from=config.select_from,
        select_until=math.inf if config.select_until is None else config.select_until,
        cheap=config.select_cheap,
        options=config.select_options,
    )


# --- the run ----------------------------------------------------------------------------------------------------------


def open_dataset(config):
    """The training data. Raises ValueError where --cond asks for labels that are not there."""
    dataset = ImageFolderDataset(
        config.data, use_labels=config.cond, xflip=config.xflip, max_size=config.max_images, random_seed=config.seed
    )
    if config.cond and not dataset.has_labels:
        raise ValueError(f"--data={config.data} has no labels: give --cond=False, or a data set with dataset.json")
    return dataset


ENCODERS = {
    "rgb": encoders.StandardRGBEncoder,
    "dequantize": encoders.UniformDequantizer,
    "center": encoders.CenterEncoder,
    "logit": encoders.LogitEncoder,
}


def choose_encoder(dataset, name=None):
    """The encoder of a data set: by name, or by its channels, except that float arrays other than VAE latents stay."""
    image, _ = dataset[0]
    if name is not None:
        make = _choose(ENCODERS, "encoder", name)
        if image.dtype != np.uint8:
            raise ValueError(f"--encoder={name} is for pixels, and the data are {image.dtype} arrays: leave it out")
        return make()
    if image.dtype == np.float32 and dataset.num_channels != 8:
        return encoders.IdentityEncoder()
    return encoders.for_channels(dataset.num_channels)


def interface_of(dataset, encoder):
    """{img_resolution, img_channels, label_dim} as the network sees them."""
    image, label = dataset[0]
    latent = encoder.encode_latents(torch.as_tensor(image)[None])
    return dict(img_resolution=latent.shape[-1], img_channels=latent.shape[1], label_dim=len(label))


SIZES = ("channels", "channel_mult", "num_blocks", "attn_resolutions", "channels_per_head", "net_options")


def build_network(config, interface, device):
    """The network with weights that depend on the seed alone, or from --init."""
    torch.manual_seed(hash_seed(config.seed, 0))
    build = _choose(ARCHS, "arch", config.arch)
    _choose(_PRECONDS, "precond", config.precond)
    try:
        net = build(config, interface).to(device)
    except (TypeError, ZeroDivisionError, OverflowError, RuntimeError) as err:
        if isinstance(err, torch.OutOfMemoryError):
            raise
        given = _given(**{name: getattr(config, name) for name in SIZES})
        why = (str(err).splitlines() or [type(err).__name__])[0]
        raise ValueError(
            f"--arch={config.arch} cannot be built with {given} for images of {interface} ({why}): give other sizes"
        ) from err
    if config.init is not None:
        donor = persistence.load_snapshot(config.init, device).net
        try:
            net.load_state_dict(donor.state_dict())
        except RuntimeError as err:
            raise ValueError(f"--init={config.init} does not fit the network ({str(err).splitlines()[0]})") from err
    return net.train().requires_grad_(True)


def _references(dataset, encoder, device):
    """Random clean examples of the data set, by generator: what losses with reference images are built with."""
    arrays = None  # decoded once where the data set is small

    def references(n, generator):
        nonlocal arrays
        index = torch.randint(len(dataset), [n], generator=generator, device=generator.device)
        if arrays is None and dataset[0][0].nbytes * len(dataset) < CACHE_BYTES:
            arrays = load_arrays(dataset)
        if arrays is None:
            items = [dataset[i] for i in index.tolist()]
            chosen = [torch.stack([torch.as_tensor(part) for part in column]) for column in zip(*items, strict=True)]
        else:
            chosen = [a[index.cpu()] for a in arrays]
        images, labels = (a.to(device) for a in chosen)
        return encoder.encode_latents(images, generator), labels if labels.shape[1] else None

    return references


def git_commit():
    """The commit of this checkout, or None."""
    try:
        out = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
        return out.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def check_inputs(config, outdir, resume=None):
    """Raises ValueError for what would fail later: another run in `outdir`, unreadable data, unknown names."""
    check_same_run(outdir, config)
    dataset = open_dataset(config)
    choose_encoder(dataset, config.encoder)
    tables = (
        (ARCHS, "arch"),
        (_PRECONDS, "precond"),
        (LOSSES, "loss"),
        (OPTIMIZERS, "optimizer"),
        (SCHEDULES, "lr_schedule"),
    )
    for table, name in tables:
        _choose(table, name.replace("_", "-"), getattr(config, name))
    if config.select != "none":
        function = _choose(selection.FUNCTIONS, "select", config.select)
        selection.check_choice(function, config.reference is not None, config.select_when, config.select_options)
    if resume is not None:
        checkpoint.load(resume, mmap=True)  # the format; whether it fits this network shows later
    build_loss(config, None)
    if config.val_data:
        ImageFolderDataset(config.val_data)
    for name in ("init", "reference"):
        if getattr(config, name) not in (None, "ema"):
            persistence.read_header(getattr(config, name))


def grid_shape(config):
    """([C, R, R], label_dim, sources present) of the latents that the network makes: what a sample grid needs."""
    dataset = open_dataset(config)
    interface = interface_of(dataset, choose_encoder(dataset, config.encoder))
    shape = [interface["img_channels"], interface["img_resolution"], interface["img_resolution"]]
    present = sorted({int(k) for k in dataset.raw_labels}) if dataset.has_onehot_labels else None
    return shape, interface["label_dim"], present


def train(config, outdir, device="cpu", resume=None, hooks=None):
    """Run (or resume) the training that `config` describes in the folder `outdir`; returns the TrainingLoop.

    resume: a checkpoint to continue from; None takes the newest sound one in `outdir`, if any. hooks: dict of
    on_status, on_snapshot, stop_requested (see TrainingLoop). Raises ValueError for bad input before anything is
    written, TrainingFailed if training breaks down.
    """
    return prepare(config, outdir, device, resume)(hooks)


def prepare(config, outdir, device="cpu", resume=None):
    """All of `train` that can find fault with the input and writes nothing; returns start(hooks) -> TrainingLoop."""
    outdir = Path(outdir)
    device = torch.device(device)
    check_same_run(outdir, config)
    dataset = open_dataset(config)
    encoder = choose_encoder(dataset, config.encoder)
    interface = interface_of(dataset, encoder)
    _fast_math(config)
    net = build_network(config, interface, device)
    loss = build_loss(config, _references(dataset, encoder, device)).to(device)
    objective = losses.Objective(net, loss)
    optimizer = _choose(OPTIMIZERS, "optimizer", config.optimizer)(
        objective.param_groups(), lr=config.lr, betas=tuple(config.betas), weight_decay=config.weight_decay
    )
    schedule = _choose(SCHEDULES, "lr-schedule", config.lr_schedule)
    ema = _choose({"none": lambda *_: None, **EMAS}, "ema", config.ema)(config, objective)
    selector = build_selector(config, device, ema)
    _warn_no_effect(config)
    feed = Feed(
        dataset,
        seed=config.seed,
        block=config.block,
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        workers=config.workers,
    )
    if resume is None:
        resume = dist.broadcast_object(str(checkpoint.newest_sound(outdir) or "") if dist.get_rank() == 0 else None)
    parts = (
        objective,
        feed,
        encoder,
        selector,
        optimizer,
        ema,
        functools.partial(_learning_rate, schedule, config, selector),
    )
    return functools.partial(_start, config, outdir, parts, interface, resume or None)


def _start(config, outdir, parts, interface, resume, hooks=None):
    objective, dataset = parts[0], parts[1].dataset
    if dist.get_rank() == 0:
        outdir.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_leftovers(outdir)
        with atomic_write(outdir / "training_options.json", "w") as file:
            json.dump(config.to_dict(), file, indent=2)
    dist.barrier()
    dist.print0(f"Network: {sum(p.numel() for p in objective.net.parameters()):,} parameters, {interface}")
    header = dict(
        options=config.to_dict(),
        dataset=dict(
            path=str(config.data), num_images=len(dataset), label_dim=dataset.label_dim, class_names=dataset.class_names
        ),
        git_commit=git_commit(),
    )
    return training_loop(
        *parts,
        outdir,
        Periods(
            total_nimg=config.total_nimg,
            slice_nimg=config.slice_nimg,
            status_nimg=config.status_nimg,
            snapshot_nimg=config.snapshot_nimg,
            checkpoint_nimg=config.checkpoint_nimg,
            keep=config.keep,
        ),
        batch_size=config.batch_size,
        batch_gpu=config.batch_gpu or None,
        seed=config.seed,
        loss_scaling=config.loss_scaling,
        grad_clip=config.grad_clip,
        header=header,
        snapshot_dtype=torch.float16 if config.snapshot_fp16 else None,
        resume=resume,
        **(hooks or {}),
    )


def _learning_rate(schedule, config, selector, cur_nimg):
    more = {"selection": selector.progress()} if "selection" in inspect.signature(schedule).parameters else {}
    return schedule(cur_nimg, config.batch_size, config.lr, config.decay, config.rampup, **more)


def _fast_math(config):
    torch.backends.cudnn.benchmark = config.bench
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def _warn_no_effect(config):
    """Options that are given but do nothing deserve a word."""
    if config.select == "none" and config.reference is not None:
        warnings.warn("--reference has no effect without --select", stacklevel=2)
    if config.precond != "edm" and config.arch == "edm2":
        warnings.warn(f"--precond={config.precond} has no effect: --arch=edm2 has its own", stacklevel=2)
    if config.label_dropout and not config.cond:
        warnings.warn("--label-dropout has no effect without labels", stacklevel=2)
