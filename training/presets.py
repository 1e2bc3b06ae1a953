"""Every published configuration by name, as plain data: values of TrainingConfig fields.

A preset is one row; an option given on the command line wins over it. Published results stand in trailing comments.
"""

from itertools import product

from training.presets_generation import GENERATION_PRESETS, generation_preset

__all__ = ["GENERATION_PRESETS", "PRESETS", "generation_preset", "get"]

Mi = 2**20


def _edm2(duration, channels, lr, decay, dropout, P_mean, P_std, **more):
    return dict(
        arch="edm2",
        loss="edm2",
        total_nimg=duration,
        batch_size=2048,
        channels=channels,
        lr=lr,
        decay=decay,
        dropout=dropout,
        P_mean=P_mean,
        P_std=P_std,
        **more,
    )


# EDM2 (arXiv 2312.02696), table 6. ImageNet-512 in VAE latents, ImageNet-64 in pixels.
PRESETS = {
    "edm2-img512-xxs": _edm2(2048 * Mi, 64, 0.0170, 70000, 0.00, -0.4, 1.0),
    "edm2-img512-xs": _edm2(2048 * Mi, 128, 0.0120, 70000, 0.00, -0.4, 1.0),  # FID 3.53
    "edm2-img512-s": _edm2(2048 * Mi, 192, 0.0100, 70000, 0.00, -0.4, 1.0),  # FID 2.56
    "edm2-img512-m": _edm2(2048 * Mi, 256, 0.0090, 70000, 0.10, -0.4, 1.0),  # FID 2.25
    "edm2-img512-l": _edm2(1792 * Mi, 320, 0.0080, 70000, 0.10, -0.4, 1.0),  # FID 2.06
    "edm2-img512-xl": _edm2(1280 * Mi, 384, 0.0070, 70000, 0.10, -0.4, 1.0),  # FID 1.96
    "edm2-img512-xxl": _edm2(896 * Mi, 448, 0.0065, 70000, 0.10, -0.4, 1.0),  # FID 1.91
    "edm2-img64-xs": _edm2(1024 * Mi, 128, 0.0120, 35000, 0.00, -0.8, 1.6),
    "edm2-img64-s": _edm2(1024 * Mi, 192, 0.0100, 35000, 0.00, -0.8, 1.6),  # FID 1.58
    "edm2-img64-m": _edm2(2048 * Mi, 256, 0.0090, 35000, 0.10, -0.8, 1.6),  # FID 1.43
    "edm2-img64-l": _edm2(1024 * Mi, 320, 0.0080, 35000, 0.10, -0.8, 1.6),  # FID 1.33
    "edm2-img64-xl": _edm2(640 * Mi, 384, 0.0070, 35000, 0.10, -0.8, 1.6),  # FID 1.33
}

# Multi-source experiments (Wang et al., ICML 2025, arXiv 2502.14583): K classes, n images of each, 256x256 in latents.
# Their code halves the learning rate at the start of the decay (schedule edm2-halved). Paper: 28.4 to 32.7 FID.
_MULTI_SOURCE = {
    "1c-100": (50331648, 0.0040, 4000),
    "1c-500": (134217728, 0.0040, 2000),
    "1c-1000": (184549376, 0.0050, 2500),
    "3c-100": (67108864, 0.0020, 2000),
    "3c-500": (67108864, 0.0020, 2500),
    "3c-1000": (67108864, 0.0020, 2500),
    "5c-100": (67108864, 0.0040, 4000),
    "5c-500": (134217728, 0.0060, 4000),
    "5c-1000": (100663296, 0.0060, 4000),
    "10c-100": (67108864, 0.0030, 3000),
    "10c-500": (100663296, 0.0030, 3000),
    "10c-1000": (402653184, 0.0060, 3000),
    "10c-1000-nlr": (1610612736, 0.0040, 6000),
}
for _name, (_duration, _lr, _decay) in _MULTI_SOURCE.items():
    PRESETS[f"edm2-img256-xs-{_name}"] = _edm2(_duration, 128, _lr, _decay, 0.00, -0.4, 1.0, lr_schedule="edm2-halved")

# Autoguided data selection (Pais et al. 2025, arXiv 2509.15267): EDM2 scaled to the size of the data set.
PRESETS["edm2-cifar10-xxs"] = _edm2(83808256, 64, 0.0170, 2731, 0.00, -0.4, 1.0, rampup=0.389120)
PRESETS["edm2-tiny-xxs"] = _edm2(167618560, 64, 0.0170, 5463, 0.00, -0.4, 1.0, rampup=0.780288)
PRESETS["edm2-tiny-xs"] = _edm2(167618560, 128, 0.0120, 5463, 0.00, -0.4, 1.0, rampup=0.780288)

# EDM (arXiv 2206.00364) and PFGM++ (arXiv 2302.04265), which share everything but the noise kernel.
_CIFAR = dict(channel_mult=[2, 2, 2], total_nimg=200_000_000, batch_size=512, lr=1e-3, dropout=0.13, augment=0.12)
_FFHQ = dict(channel_mult=[1, 2, 2, 2], total_nimg=200_000_000, batch_size=256, lr=2e-4, dropout=0.05, augment=0.15)
_EDM = dict(
    loss="edm", precond="edm", channels=128, P_mean=-1.2, P_std=1.2, lr_schedule="constant", rampup=10.0,
    betas=[0.9, 0.999], ema="halflife", ema_halflife=0.5, ema_rampup=0.05, fp16=False,
)  # fmt: skip
for _system, _arch, _labels in product(("edm", "pfgmpp"), ("ddpmpp", "ncsnpp"), ("", "-cond")):
    # Published minimum FID, ncsnpp: pfgmpp D=2048 1.91 (cond 1.74), D=128 1.92, D=64 1.96; edm 1.98 (cond 1.79).
    _noise = dict(process="pfgmpp", aug_dim=2048.0) if _system == "pfgmpp" else {}
    PRESETS[f"{_system}-cifar10-{_arch}{_labels}"] = dict(_EDM, **_CIFAR, **_noise, arch=_arch, cond=bool(_labels))
PRESETS["edm-ffhq64-ddpmpp"] = dict(_EDM, **_FFHQ, arch="ddpmpp", cond=False)  # FID 2.39
PRESETS["pfgmpp-ffhq64-ddpmpp"] = dict(  # FID 2.43 at D=128
    _EDM, **_FFHQ, arch="ddpmpp", cond=False, process="pfgmpp", aug_dim=128.0
)

# Small enough for a CPU: 8x8 and 28x28 grey digits.
_DIGITS = dict(
    arch="edm2", loss="edm2", channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=16,
    batch_size=64, lr=0.01, decay=500, rampup=0.02, P_mean=-0.4, P_std=1.2, sigma_data=0.75, ema_std=[0.10], fp16=False,
)  # fmt: skip
PRESETS["digits8"] = dict(_DIGITS, total_nimg=128 << 10)
PRESETS["digits28"] = dict(_DIGITS, total_nimg=256 << 10, channel_mult=[1, 2, 2], attn_resolutions=[7])


def get(name):
    """A copy of a preset's row. Raises ValueError for an unknown name, listing the known ones."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; known: {', '.join(sorted(PRESETS))}")
    return dict(PRESETS[name])
