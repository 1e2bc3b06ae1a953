"""Networks as folders that the library diffusers reads: config.json, weights as .safetensors, and a scheduler's settings.

Of the networks here diffusers has ADM (Dhariwal & Nichol 2021), its `UNet2DModel` with scaling and shifting embeddings: that
of EDM's ImageNet-64 and of everything with --arch=adm. It holds F of EDM eq. 7; EDM's preconditioning around it is that of
diffusers' `EDMEulerScheduler`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import safetensors.torch
import torch

from dnnlib.util import atomic_write, write_text
from torch_utils.persistence import Snapshot

CONFIG, WEIGHTS, SCHEDULER = "config.json", "diffusion_pytorch_model.safetensors", "scheduler_config.json"
HEAD = 64  # channels of an attention head of ADM
ABSENT = {
    "Precond": "diffusers has no EDM2 network (its layers keep magnitudes)",
    "SongUNet": "diffusers has no DDPM++ or NCSN++ as EDM trained them (blocks scaled by the root of 1/2, their own skips)",
}
INSTEAD = "write its tensors with --state-dict"

_RESNET = {"norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2"}
_RESNET |= {"skip": "conv_shortcut"}
_OUTSIDE = {
    "map_layer0": "time_embedding.linear_1",
    "map_layer1": "time_embedding.linear_2",
    "out_norm": "conv_norm_out",
    "out_conv": "conv_out",
}


def require_known(snapshot: Snapshot) -> None:
    """Raises ValueError, with the remedy, for a network that diffusers does not have."""
    kind = type(snapshot.net).__name__
    model = getattr(snapshot.net, "init_kwargs", {}).get("model_type", kind)
    if model != "DhariwalUNet":
        raise ValueError(f"{ABSENT.get(model, f'diffusers has no network like {kind}')}: {INSTEAD}")


def unet(snapshot: Snapshot, state: dict[str, torch.Tensor]) -> tuple[dict, dict[str, torch.Tensor]]:
    """(config, tensors) of the UNet2DModel that computes what the ADM inside snapshot.net computes.

    state: its tensors as they are stored, `net.model.<name>`; labels of augmentations, which sampling leaves out, are
    left out, as is the head that weighs the loss. Raises ValueError for another network, and for widths that
    UNet2DModel cannot have.
    """
    require_known(snapshot)
    state = {n.removeprefix("net.model."): v for n, v in state.items() if n.startswith("net.model.")}
    state = {n: v for n, v in state.items() if not n.startswith("map_augment.") and "resample_filter" not in n}
    levels, places = _places(state)
    widths = [state[f"enc.{res}x{res}_block0.conv1.weight"].shape[0] for res in levels]
    attends = [f"enc.{res}x{res}_block0.qkv.weight" in state for res in levels]
    groups = {min(32, len(v) // 4) for n, v in state.items() if re.search(r"norm\d?\.weight$", n)}
    if len(groups) > 1 or state["map_layer0.weight"].shape[1] != widths[0]:
        raise ValueError(f"diffusers has no ADM of widths {widths} (one number of groups, first width once): {INSTEAD}")
    if f"dec.{levels[-1]}x{levels[-1]}_in0.qkv.weight" not in state:
        raise ValueError(f"diffusers has no ADM with so few channels ({widths[-1]}) in the middle: {INSTEAD}")
    tensors = {}
    for name, value in state.items():
        _add(tensors, name, value, places)
    labels = state["map_label.weight"].shape[1] if "map_label.weight" in state else None
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": snapshot.net.img_resolution,
        "in_channels": state[f"enc.{levels[0]}x{levels[0]}_conv.weight"].shape[1],
        "out_channels": state["out_conv.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": sum(n.endswith("norm0.weight") and f"enc.{levels[0]}x" in n for n in state),
        "down_block_types": ["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": HEAD,
        "norm_num_groups": (group := groups.pop()),
        "attn_norm_num_groups": group,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "time_embedding_dim": state["map_layer0.weight"].shape[0],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "num_class_embeds": labels,
    }
    return config, tensors


def _places(state):
    """(resolutions from high to low, {our block: its place in a UNet2DModel})."""
    levels = sorted({int(n.split("x")[0][4:]) for n in state if n.startswith("enc.")}, reverse=True)
    places = {}
    for name in dict.fromkeys(".".join(n.split(".")[:2]) for n in state if n.startswith(("enc.", "dec."))):
        side, _, res, what, index = re.fullmatch(r"(enc|dec)\.(\d+)x(\d+)_([a-z]+)(\d*)", name).groups()
        level = levels.index(int(res))
        if side == "enc":  # what leads to a level is the end of the one before
            kinds = {"block": f"down_blocks.{level}.resnets.{index}", "down": f"down_blocks.{level - 1}.downsamplers.0"}
            places[name] = (kinds | {"conv": "conv_in"})[what]
        else:
            up = len(levels) - 1 - level
            kinds = {"block": f"up_blocks.{up}.resnets.{index}", "up": f"up_blocks.{up - 1}.upsamplers.0"}
            places[name] = (kinds | {"in": f"mid_block.resnets.{index}"})[what]
    return levels, places


def _add(tensors, name, value, places):
    """Put one tensor of ours where UNet2DModel has it."""
    block, _, rest = name.rpartition(".")
    outer, _, part = block.rpartition(".")
    if name == "map_label.weight":
        tensors["class_embedding.weight"] = value.T
    elif block in _OUTSIDE:
        tensors[f"{_OUTSIDE[block]}.{rest}"] = value
    elif block in places:
        tensors[f"{places[block]}.{rest}"] = value
    elif part in _RESNET:
        tensors[f"{places[outer]}.{_RESNET[part]}.{rest}"] = value
    else:
        attention = places[outer].replace("resnets", "attentions")
        value = value.flatten(1) if value.ndim > 1 else value  # 1x1 convolutions are linear layers there
        if part == "qkv":  # a head's channels, and of each q, k and v
            split = value.reshape(-1, HEAD, 3, *value.shape[1:])
            for i, letter in enumerate("qkv"):
                tensors[f"{attention}.to_{letter}.{rest}"] = split[:, :, i].flatten(0, 1)
        else:
            tensors[f"{attention}.{'group_norm' if part == 'norm2' else 'to_out.0'}.{rest}"] = value


def scheduler(snapshot: Snapshot) -> dict | None:
    """Settings of an EDMEulerScheduler with EDM's preconditioning and noise levels; None for another preconditioning."""
    if type(snapshot.net).__name__ != "EDMPrecond":
        return None
    levels = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": float(snapshot.net.sigma_data), "rho": 7.0}
    return {"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon", "sigma_schedule": "karras"} | levels


def write(dest: str | Path, snapshot: Snapshot, state: dict[str, torch.Tensor]) -> list[str]:
    """Write config, weights and, where there is one, the scheduler into the folder `dest`; returns their names."""
    config, tensors = unet(snapshot, state)
    texts = {CONFIG: config, SCHEDULER: scheduler(snapshot)}
    with atomic_write(Path(dest) / WEIGHTS) as file:
        file.write(safetensors.torch.save({n: v.contiguous().clone() for n, v in tensors.items()}, {"format": "pt"}))
    for name, content in texts.items():
        if content is not None:
            write_text(Path(dest) / name, json.dumps(content, indent=2) + "\n")
    return [name for name in (CONFIG, WEIGHTS, SCHEDULER) if texts.get(name, True) is not None]
