"""What a training run is made of, by name: each choice is one entry of one dict. Nothing heavy is imported before use.

An entry of your own (`ARCHS["mine"] = build_mine`) is a choice of `train_edm2.py` at once, and in its help.
"""

import importlib
from collections.abc import Callable
from typing import Any

from dnnlib.util import one_of
from training.schedules import SCHEDULES as SCHEDULES  # one of the choices


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def choose(table: dict[str, Any], option: str, name: str) -> Any:
    """The entry of a registry. Raises ValueError that names the option and the known names."""
    if name not in table:
        raise ValueError(f"--{option}={name} {one_of(name, table)}")
    return table[name]


def _late(module):
    """name -> attribute of a module that is imported when asked."""
    return lambda name: getattr(importlib.import_module(module), name)


_losses, _phema, _encoders = _late("training.losses"), _late("training.phema"), _late("training.encoders")
_networks, _optim = _late("training.networks_edm"), _late("torch.optim")


def _sizes(config) -> dict[str, Any]:
    """Sizes that all U-Nets take; those left out are the architecture's own."""
    same = {name: getattr(config, name) for name in ("channel_mult", "num_blocks", "attn_resolutions")}
    return given(model_channels=config.channels, **same)


def _precision(config) -> dict[str, Any]:
    from torch_utils.precision import arguments

    return arguments(config.precision, config.fp16)


def _joint(config, interface, model_type, **sizes):
    """A network of the whole state of the process, in single precision."""
    from training.networks_joint import JointPrecond
    from training.processes.options import make_process

    process, form = make_process(config.process, config.process_options, learn=True), config.prediction or "noise"
    if process.beta is None:
        raise ValueError(
            f"--parameterization={config.parameterization} needs a linear diffusion: not {process!r} (--process)"
        )
    if config.parameterization == "joint-denoiser":
        first, form, code = 0, "denoiser", "log-sigma"
    else:
        first = 0 if config.predict == "all" else process.first_noised()
        logarithm = sizes.get("embedding_type") == "fourier" or model_type in ("EDM2UNet", "JointResNet")
        code = "log-t" if logarithm else "t"
    kernel = dict(hybrid=config.transition != "conditional", cov_eps=config.cov_eps or 0.0)
    state = dict(variables=process.V, first=first, parameterization=form, time_code=code, **kernel)
    return JointPrecond(**interface, sigma_data=config.sigma_data, model_type=model_type, **state, **sizes)


def _edm2(config, interface):
    from training.networks_edm2 import Precond

    options = _sizes(config) | given(channels_per_head=config.channels_per_head) | config.net_options
    options["dropout"] = config.dropout
    if config.parameterization != "reduced":
        return _joint(config, interface, "EDM2UNet", **options)
    options |= dict(interface, sigma_data=config.sigma_data) | _precision(config) | options
    return Precond(**options)


_SONG = dict(model_type="SongUNet", model_channels=128, channel_mult=[2, 2, 2], decoder_type="standard")
_EDM_ARCHS = {
    "ddpmpp": dict(
        _SONG, embedding_type="positional", encoder_type="standard", channel_mult_noise=1, resample_filter=[1, 1]
    ),
    "ncsnpp": dict(
        _SONG, embedding_type="fourier", encoder_type="residual", channel_mult_noise=2, resample_filter=[1, 3, 3, 1]
    ),
    "adm": dict(model_type="DhariwalUNet", model_channels=192, channel_mult=[1, 2, 3, 4]),
    "hounet": dict(model_type="HoUNet"),
}
PRECONDS = {"edm": "EDMPrecond", "vp": "VPPrecond", "ve": "VEPrecond"}  # classes of training/networks_edm/precond.py


def _edm(config, interface):
    options = dict(dropout=config.dropout) | _EDM_ARCHS[config.arch] | _sizes(config)
    if config.parameterization != "reduced":
        return _joint(config, interface, **options | config.net_options)
    options |= interface | _precision(config)
    if config.augment:
        options["augment_dim"] = augment_pipe(config).label_dim
    if config.precond == "edm":
        options["sigma_data"] = config.sigma_data
    return _networks(PRECONDS[config.precond])(**options | config.net_options)


def _points(model_type):
    def make(config, interface):
        if config.parameterization == "reduced":
            raise ValueError(f"--arch={config.arch} sees the whole state: give --parameterization=joint")
        return _joint(config, interface, model_type, **given(hidden_dim=config.channels))

    return make


# (TrainingConfig, {img_resolution, img_channels, label_dim}) -> denoiser.
ARCHS: dict[str, Callable] = {"edm2": _edm2, "ddpmpp": _edm, "ncsnpp": _edm, "adm": _edm, "hounet": _edm}
ARCHS |= {"points-mlp": _points("JointMLP"), "points-resnet": _points("JointResNet")}  # CLD's, for data of 1x1


def augment_pipe(config: Any) -> Any:
    """EDM's augmentations (EDM appendix F.2) at the probability of --augment."""
    from training.augment import AugmentPipe

    return AugmentPipe.edm(config.augment)


def _process(config, common, references):
    from training.losses.process import ProcessLoss
    from training.processes import is_linear

    process = common["kernel"]
    if not is_linear(process):
        raise ValueError(f"--loss=process needs a linear process, not --process={config.process}: take --loss=edm2")
    laws = given(time_sampling=config.time_sampling, weighting=config.weighting, t_min=config.t_min)
    return ProcessLoss(process, **common, **laws, lr_scale=config.process_lr_scale)


def _joint_loss(config, common, references):
    from training.losses.joint import JointLoss

    names = ("objective", "weighting", "time_sampling", "t_min", "cov_eps", "elbo_samples", "switch_at")
    options = given(**{name: getattr(config, name) for name in names})
    hybrid, own = config.transition != "conditional", dict(label_dropout=config.label_dropout)
    return JointLoss(common["kernel"], hybrid=hybrid, lr_scale=config.process_lr_scale, **own, **options)


# (TrainingConfig, keywords of every DenoisingLoss, references: (n, generator) -> clean examples) -> Loss.
LOSSES: dict[str, Callable] = {
    "edm2": lambda config, common, references: _losses("EDM2Loss")(config.P_mean, config.P_std, **common),
    "edm": lambda config, common, references: _losses("EDMLoss")(config.P_mean, config.P_std, **common),
    "vp": lambda config, common, references: _losses("VPLoss")(**common),
    "ve": lambda config, common, references: _losses("VELoss")(**common),
    "process": _process,
    "joint": _joint_loss,
}


def _adam(name, fused=True):
    def make(config, groups):
        options = dict(lr=config.lr, betas=tuple(config.betas), weight_decay=config.weight_decay)
        if fused and all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"]):
            options["fused"] = True  # 0.26 of the time at 124 M parameters
        return _optim(name)(groups, **options)

    return make


# (TrainingConfig, parameter groups with `lr_scale`) -> optimizer.
OPTIMIZERS: dict[str, Callable] = {
    "adam": _adam("Adam"),
    "adamw": _adam("AdamW"),
    "adamax": _adam("Adamax", fused=False),
}

# (TrainingConfig, Objective) -> average of the weights, or None.
EMAS: dict[str, Callable] = {
    "power": lambda config, objective: _phema("PowerFunctionEMA")(objective, config.ema_std),
    "halflife": lambda config, objective: _phema("HalfLifeEMA")(objective, config.ema_halflife, config.ema_rampup),
    "decay": lambda config, objective: _phema("DecayEMA")(objective, config.ema_decay),
    "none": lambda config, objective: None,
}

# () -> encoder of uint8 pixels.
ENCODERS: dict[str, Callable] = {
    "rgb": lambda: _encoders("StandardRGBEncoder")(),
    "dequantize": lambda: _encoders("UniformDequantizer")(),
    "center": lambda: _encoders("CenterEncoder")(),
    "logit": lambda: _encoders("LogitEncoder")(),
}
