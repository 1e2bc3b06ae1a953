"""Every published configuration by name, as plain data: values of TrainingConfig fields.

A preset is one row; an option given on the command line wins over it. Published results stand in trailing comments.
"""

import os
from itertools import product

from dnnlib.util import format_nimg, one_of

Mi = 2**20


_EDM2_COLUMNS = ("total_nimg", "channels", "lr", "decay", "dropout", "P_mean", "P_std")


def _edm2(*row, **more):
    return dict(zip(_EDM2_COLUMNS, row, strict=True), arch="edm2", loss="edm2", batch_size=2048, **more)


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

# Multi-source experiments (Wang et al., ICML 2025, arXiv 2502.14583): K classes, n images of each, 256x256 in latents. Two
# sources that agree on 1c-1000 alone: the 13 rows of the published code, and the three of the paper's table 2 (for n = 500 and
# 1000 alike). The code halves the learning rate at the start of the decay (schedule edm2-halved), of which the paper says
# nothing; --lr-schedule=edm2 is EDM2's. Published scripts add --batch=8192. FID of the paper: 25.84 to 32.69.
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
    "table2-1c": (176 * Mi, 0.0050, 2500),
    "table2-3c": (256 * Mi, 0.0060, 4000),
    "table2-10c": (1536 * Mi, 0.0120, 6000),
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
PRESETS["pfgmpp-ffhq64-ddpmpp"] = dict(PRESETS["edm-ffhq64-ddpmpp"], process="pfgmpp", aug_dim=128.0)  # FID 2.43

# Networks of the whole state as published. CLD (arXiv 2112.07068): lengths are iterations times 16 GPUs' batch, its flips are
# drawn, ours are copies. MDM (arXiv 2302.07261): its YAML files, with HoUNet for MNIST, too, whose size is the paper's
# (they have TinyUNet); it has none for ALDA and ImageNet. Its learned matrices have no fixed speed, ours have.
_JOINT = dict(
    parameterization="joint", cond=False, lr_schedule="constant", betas=[0.9, 0.999], decay=0, fp16=False, time_sampling=None,
)  # fmt: skip
_CLD = dict(
    _JOINT, process="cld", prediction="mixed", predict="noised", transition="hybrid", objective="noise", arch="ncsnpp",
    weighting="reweightedv2", process_options=dict(m_inv=4, gamma=0.04, beta0=4, beta1=0), t_min=1e-5, channels=128,
    dropout=0.1, attn_resolutions=[16], ema="decay", ema_decay=0.9999, grad_clip=1.0, xflip=True, encoder="rgb",
)  # fmt: skip
PRESETS["cld-cifar10"] = dict(  # FID 2.25 by the flow, 2.23 by EM; <= 3.31 bits/dim
    _CLD, channel_mult=[1, 2, 2, 2], num_blocks=8, cov_eps=1e-9, lr=2e-4, batch_size=128, total_nimg=800_000 * 128, rampup=12.8,
)  # fmt: skip
_PLAIN = dict(
    embedding_type="positional", encoder_type="standard", channel_mult_noise=1, resample_filter=[1, 1]
)  # of ncsnpp
_CELEBA = dict(
    _CLD, channel_mult=[1, 1, 2, 2, 2, 2, 2], net_options=_PLAIN, cov_eps=1e-6, lr=1e-4, batch_size=64, rampup=6.4
)
PRESETS["cld-celebahq256-paper"] = dict(_CELEBA, num_blocks=2, total_nimg=320_000 * 64)  # no number published
PRESETS["cld-celebahq256-postpaper"] = dict(
    _CELEBA, num_blocks=4, total_nimg=600_000 * 64, process_options=dict(m_inv=4, gamma=0.04, beta0=0.1, beta1=6.9),
    optimizer="adamw", weight_decay=0.01, t_min=1e-3,
)  # fmt: skip
# Points, not images: simulations/run_toy.py train --preset=cld-toy; their data are drawn anew at every step. Nothing published;
# the official code, after 20000 steps: NLL bound -0.31 nats, sliced W2 of SSCS in 50 steps 0.064.
_IMAGES = ("channels", "attn_resolutions", "dropout", "xflip", "encoder")  # what points do not have
PRESETS["cld-toy"] = {name: value for name, value in _CLD.items() if name not in _IMAGES} | dict(
    arch="points-mlp", prediction="noise", cov_eps=1e-6, lr=1e-3, batch_size=512, total_nimg=800_000 * 512, rampup=0.0,
    ema_decay=0.999, sigma_data=0.72,
)  # fmt: skip
_MDM = dict(
    _JOINT, prediction="noise", predict="all", transition="hybrid", objective="elbo", t_min=1e-3, arch="hounet", num_blocks=2,
    attn_resolutions=[16], lr=2e-4, batch_size=128, rampup=0.0, ema="none", grad_clip=2.0, encoder="logit", sigma_data=2.0,
    process_lr_scale=1.0,
)  # fmt: skip
_MDM_DATA = {
    "cifar10": dict(channels=128, channel_mult=[1, 2, 2, 2], xflip=True, total_nimg=15_000_064),
    "mnist": dict(channels=32, channel_mult=[1, 2, 2], total_nimg=18_000_000),
    "imagenet32": dict(channels=128, channel_mult=[1, 2, 2, 2], total_nimg=15_000_064),
}
_MDM_PROCESSES = {  # bits/dim of the review version: CIFAR-10, MNIST; none known of learned3 and ImageNet
    "vp": ("vp", {}),  # 3.36, 1.089
    "cld": ("cld", {}),  # 3.563, 0.920
    "alda": ("alda", {}),  # 4.700, 2.061
    "malda": ("malda", {"V": 3}),  # 2.634, 0.507, which the later version does not repeat
    "learned2": ("learned", {"V": 2}),  # 3.009, 0.960
    "learned3": ("learned", {"V": 3}),
}
for (_data, _sizes), (_name, (_process, _options)) in product(_MDM_DATA.items(), _MDM_PROCESSES.items()):
    PRESETS[f"mdm-{_data}-{_name}"] = dict(_MDM, **_sizes, process=_process, process_options=_options)

# Small enough for a CPU: 8x8 and 28x28 grey digits.
_DIGITS = dict(
    arch="edm2", loss="edm2", channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=16,
    batch_size=64, lr=0.01, decay=500, rampup=0.02, P_mean=-0.4, P_std=1.2, sigma_data=0.75, ema_std=[0.10], fp16=False,
)  # fmt: skip
PRESETS["digits8"] = dict(_DIGITS, total_nimg=128 << 10)
PRESETS["digits28"] = dict(_DIGITS, total_nimg=256 << 10, channel_mult=[1, 2, 2], attn_resolutions=[7])

# 50 to 5000 photos. Measured in core-seconds per kimg on 2 cores of a CPU server, and memory of the process; validation loss on
# 300 crops of scikit-learn's two photos, still falling (small64: 100 others, of their right quarters, are held out).
_SMALL = dict(_DIGITS, sigma_data=0.5, attn_resolutions=[8], total_nimg=256 << 10)
PRESETS["small32"] = dict(_SMALL, channel_mult=[1, 2, 4])  # 13 s/kimg, 0.9 GiB; loss 1.39 to 0.84 in 6 kimg
PRESETS["small64"] = dict(_SMALL, channel_mult=[1, 2, 4, 4])  # 48 s/kimg, 2.1 GiB; loss 1.49 to 0.93 in 4.8 kimg


# Beginning of the names: what the rows are for, and where they come from.
FAMILIES = {
    "digits": "grey digits of 8x8 and 28x28 on a CPU",
    "small": "photos of one's own, 50 to 5000 of 32x32 and 64x64",
    "edm2-img64": "ImageNet at 64x64; EDM2, table 6",
    "edm2-img512": "ImageNet at 512x512 as VAE latents; EDM2, table 6",
    "edm2-img256-xs-table2": "K ImageNet classes at 256x256 as VAE latents; Wang et al. 2025, table 2 of the paper",
    "edm2-img256": "K ImageNet classes, n images each, at 256x256 as VAE latents; Wang et al. 2025, published code",
    "edm2-tiny": "Tiny ImageNet at 64x64; Pais et al. 2025",
    "edm2-cifar10": "CIFAR-10; Pais et al. 2025",
    "edm": "CIFAR-10 and FFHQ at 64x64; EDM",
    "pfgmpp": "CIFAR-10 and FFHQ at 64x64; PFGM++",
    "cld": "networks of the whole state; CLD",
    "mdm": "networks of the whole state; MDM",
}


def by_family() -> dict[str, list[str]]:
    """{what for: names} of all presets, each at the longest beginning of FAMILIES; the user's own come last."""
    found = {text: [] for text in FAMILIES.values()} | {"of one's own": []}
    for name in PRESETS:
        start = max((start for start in FAMILIES if name.startswith(start)), key=len, default=None)
        found[FAMILIES.get(start, "of one's own")].append(name)
    return {text: names for text, names in found.items() if names}


def listed() -> list[str]:
    """The presets as a table for people: images seen in training, batch, width, learning rate."""
    lines = []
    for text, names in by_family().items():
        lines += [
            "",
            f"{text[0].upper()}{text[1:]}",
            f"  {'--preset':30}{'--duration':>12}{'--batch':>9}{'--channels':>12}{'--lr':>8}",
        ]
        for name in names:
            row = PRESETS[name]
            length, width = format_nimg(row["total_nimg"]), row.get("channels", "")
            lines.append(f"  {name:30}{length:>12}{row['batch_size']:>9}{width:>12}{row['lr']:>8g}")
    return lines[1:]


def ask() -> ValueError:
    """What to say to whoever names no preset: one line with all of them."""
    known = []
    for names in by_family().values():
        start = os.path.commonprefix(names).rpartition("-")[0] if len(names) > 1 else ""
        start += "-" * bool(start)
        ends = ",".join(name[len(start) :] for name in names)
        known.append(f"{start}{{{ends}}}" if start else ends)
    return ValueError(f"--preset is missing: choose one for the data, see --list-presets; known: {' '.join(known)}")


def get(name: str) -> dict:
    """A copy of a preset's row. Raises ValueError for an unknown name, listing the known ones."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} {one_of(name, PRESETS, '--list-presets')}")
    return dict(PRESETS[name])


def interface(
    name: str, resolution: int | None = None, channels: int | None = None, classes: int | None = None
) -> dict:
    """{img_resolution, img_channels, label_dim} of the data that a preset is made for; what is given wins."""
    row, grey, latent = get(name), name.startswith("digits") or "mnist" in name, "img512" in name or "img256" in name
    known = {"digits8": 8, "digits28": 28, "small32": 32, "cld-toy": 1}
    sides = {"celebahq256": 256, "cifar": 32, "img256": 32, "imagenet32": 32, "mnist": 28}
    side = known.get(name) or next((side for word, side in sides.items() if word in name), 64)
    labels = 10 if grey or "cifar" in name else 200 if "tiny" in name else 1000
    return dict(
        img_resolution=resolution or side,
        img_channels=channels or (1 if grey else 4 if latent else 2 if name == "cld-toy" else 3),
        label_dim=(labels if row.get("cond", True) else 0) if classes is None else classes,
    )


def misfit(name: str, interface: dict[str, int]) -> str | None:
    """That a preset for latents is given pixels, or the other way round; None where it fits, or nothing is known."""
    kinds = (
        [shape["img_channels"] == 4 for shape in (globals()["interface"](name), interface)] if name in PRESETS else []
    )
    if len(set(kinds)) < 2:
        return None
    are, wants = ("latents", "pixels") if kinds[1] else ("pixels", "latents (dataset_tool.py encode)")
    return f"--preset={name} is for {wants}, and the data are {are}"


# Published combinations of network, guide and guidance weight for generate_images.py --preset.
#
# EDM2 (Karras et al. 2024, arXiv 2312.02696) and autoguidance (arXiv 2406.02507): ImageNet at 512x512 (latents) and 64x64,
# 32 Heun steps. Averages were reconstructed after training; a file name ends with the relative width of its average.

MODEL_ROOT = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions"

_METRICS = {"fid": "fid", "dino": "fd_dinov2"}

# size: (last kimg; width of the average and published value, for FID and for FD-DINOv2;
# with guidance by the unconditional XS network with the same average: width, weight and value, for each)
_IMG512 = {
    "xs": ("2147483", ("0.135", 3.53), ("0.200", 103.39), ("0.045", 1.40, 2.91), ("0.150", 1.70, 79.94)),
    "s": ("2147483", ("0.130", 2.56), ("0.190", 68.64), ("0.025", 1.40, 2.23), ("0.085", 1.90, 52.32)),
    "m": ("2147483", ("0.100", 2.25), ("0.155", 58.44), ("0.030", 1.20, 2.01), ("0.015", 2.00, 41.98)),
    "l": ("1879048", ("0.085", 2.06), ("0.155", 52.25), ("0.015", 1.20, 1.88), ("0.035", 1.70, 38.20)),
    "xl": ("1342177", ("0.085", 1.96), ("0.155", 45.96), ("0.020", 1.20, 1.85), ("0.030", 1.70, 35.67)),
    "xxl": ("0939524", ("0.070", 1.91), ("0.150", 42.84), ("0.015", 1.20, 1.81), ("0.015", 1.70, 33.09)),
}
_IMG64 = {  # without guidance, for FID
    "s": ("1073741", "0.075", 1.58), "m": ("2147483", "0.060", 1.43),
    "l": ("1073741", "0.040", 1.33), "xl": ("0671088", "0.040", 1.33),
}  # fmt: skip

_ROWS = {}  # preset: (net, guide, guidance weight, published value of the metric that ends the name)

for _size, (_kimg, *_plain, _, _) in _IMG512.items():
    for _metric, (_std, _value) in zip(_METRICS, _plain, strict=True):
        _ROWS[f"edm2-img512-{_size}-{_metric}"] = (f"edm2-img512-{_size}-{_kimg}-{_std}", None, 1.0, _value)

for _size, (_kimg, _std, _value) in _IMG64.items():
    _ROWS[f"edm2-img64-{_size}-fid"] = (f"edm2-img64-{_size}-{_kimg}-{_std}", None, 1.0, _value)

for _size, (_kimg, _, _, *_guided) in _IMG512.items():
    for _metric, (_std, _weight, _value) in zip(_METRICS, _guided, strict=True):
        _net, _guide = f"edm2-img512-{_size}-{_kimg}-{_std}", f"edm2-img512-xs-uncond-2147483-{_std}"
        _ROWS[f"edm2-img512-{_size}-guid-{_metric}"] = (_net, _guide, _weight, _value)

_ROWS.update({  # autoguidance: guided by a smaller network from early in its training
    "edm2-img512-s-autog-fid": ("edm2-img512-s-2147483-0.070", "edm2-img512-xs-0134217-0.125", 2.10, 1.34),
    "edm2-img512-s-autog-dino": ("edm2-img512-s-2147483-0.120", "edm2-img512-xs-0134217-0.165", 2.45, 36.67),
    "edm2-img512-xxl-autog-fid": ("edm2-img512-xxl-0939524-0.075", "edm2-img512-m-0268435-0.155", 2.05, 1.25),
    "edm2-img512-xxl-autog-dino": ("edm2-img512-xxl-0939524-0.130", "edm2-img512-m-0268435-0.205", 2.30, 24.18),
    "edm2-img512-s-uncond-autog-fid":
        ("edm2-img512-s-uncond-2147483-0.070", "edm2-img512-xs-uncond-0134217-0.110", 2.85, 3.86),
    "edm2-img512-s-uncond-autog-dino":
        ("edm2-img512-s-uncond-2147483-0.090", "edm2-img512-xs-uncond-0134217-0.125", 2.90, 90.39),
    "edm2-img64-s-autog-fid": ("edm2-img64-s-1073741-0.045", "edm2-img64-xs-0134217-0.110", 1.70, 1.01),
    "edm2-img64-s-autog-dino": ("edm2-img64-s-1073741-0.105", "edm2-img64-xs-0134217-0.175", 2.20, 31.85),
})  # fmt: skip

GENERATION_PRESETS = {
    name: dict(net=net, gnet=guide, guidance=weight, published={_METRICS[name.rsplit("-", 1)[1]]: value})
    for name, (net, guide, weight, value) in _ROWS.items()
}


def generation_preset(name: str, root: str = MODEL_ROOT) -> dict:
    """{net, gnet, guidance, published} of a preset, files as `<root>/<name>.pkl`; gnet is None without guidance.

    root: URL or folder that holds the published files; in a folder `<name>.safetensors`, as convert_snapshot.py writes it,
    comes first. Raises ValueError for an unknown name, listing the known ones.
    """
    if name not in GENERATION_PRESETS:
        raise ValueError(f"--preset={name} {one_of(name, GENERATION_PRESETS, '--list-presets')}")
    row = GENERATION_PRESETS[name]
    return row | {key: row[key] and published_file(root, row[key]) for key in ("net", "gnet")}


def generation_listed() -> list[str]:
    """A line for each combination: guidance, and the published value of its metric."""
    lines = []
    for name, row in GENERATION_PRESETS.items():
        guided = f"guided by {row['gnet']} with weight {row['guidance']:g}" if row["gnet"] else "not guided"
        lines.append(f"{name:32}{', '.join(f'{k} {v:g}' for k, v in row['published'].items()):18}{guided}")
    return lines


def published_file(root: str, name: str) -> str:
    """`<root>/<name>.pkl`, or the converted file beside it."""
    path = f"{str(root).rstrip('/')}/{name}"
    return f"{path}.safetensors" if os.path.isfile(f"{path}.safetensors") else f"{path}.pkl"
