"""Snapshots of the published systems: what their files hold, in the form of our own header and tensors.

EDM2 (NVlabs/edm2) and AJEST, EDM (NVlabs/edm), PFGM++ (Newbeeer/pfgmpp) and the 2-D toys; CLD and MDM are in foreign_joint.py.
Files are read as data (torch_utils/torch_pickles.py); the tables below say which class of ours a class of theirs is.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import torch

from dnnlib.reading import require_file
from dnnlib.util import reason
from torch_utils import foreign_joint, torch_pickles
from torch_utils.pickles import plain
from torch_utils.torch_pickles import Object, state_dict

SUFFIXES = (".pkl", ".pt", *foreign_joint.SUFFIXES)

_EDM = "img_resolution img_channels label_dim use_fp16"
# Networks that ours stands for, by their constructor's positional arguments.
_NETWORKS = {
    "Precond": "img_resolution img_channels label_dim use_fp16 sigma_data logvar_channels",
    "EDMPrecond": f"{_EDM} sigma_min sigma_max sigma_data model_type",
    "VPPrecond": f"{_EDM} beta_d beta_min M epsilon_t model_type",
    "VEPrecond": f"{_EDM} sigma_min sigma_max model_type",
    "iDDPMPrecond": f"{_EDM} C_1 C_2 M model_type",
    "ToyModel": "in_dim num_layers hidden_dim sigma_data",
}
_ENCODERS = {
    "StandardRGBEncoder": "",
    "StabilityVAEEncoder": "vae_name raw_mean raw_std final_mean final_std batch_size",
}
# What these networks consist of: other names mean other code.
_PARTS = """UNet Block MPConv MPFourier MPLinear MPSiLU ModuleDict ModuleList Sequential SongUNet DhariwalUNet UNetBlock Conv2d
Linear GroupNorm PositionalEmbedding FourierEmbedding"""
_KERNEL = ("pfgmpp", "D", "N")  # of PFGM++'s preconditioners: the noise they were trained with
# Of integers among the arguments of a network, which is made before its tensors are compared.
_MOST = {"num_blocks": 64, "num_layers": 256, "channel_mult": 64, "channel_mult_emb": 64, "channel_mult_noise": 64}
_MOST_OTHERS = 2**15


def is_foreign(path: str | Path) -> bool:
    """Whether a file name is that of another system's snapshot."""
    return Path(str(path).split("?")[0]).suffix in SUFFIXES


def nimg_of(path: str | Path) -> tuple[int | None, str | None]:
    """(images seen, EMA std) by the file name <prefix>-<kimg>-<std>.<suffix>; None where it does not say.

    Snapshots are multiples of 1024 images, which is how the thousands of the name give the number back.
    """
    match = re.search(r"-(\d{1,9})-(\d\.\d+)\.\w+$", str(path))
    if match is None:
        return None, None
    kimg = int(match[1])
    nimg = (kimg * 1000 + 999) // 1024 * 1024
    return nimg if nimg // 1000 == kimg else None, match[2]


def _arguments(made, names):
    """Constructor arguments of an object by name, plain data with lists for arrays."""
    args, kwargs = plain(made.state.get("_init_args") or ()), plain(made.state.get("_init_kwargs") or {})
    names = names.split()
    if len(args) > len(names):
        raise ValueError(f"{made.name} was made with {len(args)} arguments without names")
    found = {str(key): _simple(value) for key, value in (dict(zip(names, args, strict=False)) | kwargs).items()}
    found.pop("class_name", None)
    for name, value in found.items():
        parts, most = value if isinstance(value, list) else [value], _MOST.get(name, _MOST_OTHERS)
        if len(parts) > 16 or any(isinstance(n, list) or (isinstance(n, int) and not 0 <= n <= most) for n in parts):
            raise ValueError(f"{made.name}({name[:60]}={value!r:.60}) is larger than any network")
    return found


def _simple(value):
    if isinstance(value, (list, tuple)):
        return [_simple(part) for part in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if not isinstance(value, (bool, int, float, str, type(None))):
        raise ValueError(f"an argument of type {type(value).__name__}")
    return value


def _described(made, table, what):
    """{"class", "kwargs"} of an object whose class is in a table."""
    if not isinstance(made, Object) or made.name not in table:
        name = made.name if isinstance(made, Object) else type(made).__name__
        raise ValueError(f"holds {name!r:.60} as {what}; known: {', '.join(table)}")
    return {"class": made.name, "kwargs": _arguments(made, table[made.name])}


def _kernel(net, description):
    """The noise that a network of PFGM++ says it was trained with; None where it says nothing: Gaussian."""
    said = {name: net.state.get(name, description["kwargs"].get(name)) for name in _KERNEL}
    for name in _KERNEL:
        description["kwargs"].pop(name, None)
    if said["pfgmpp"] is None:
        return None
    D = said["D"] if said["pfgmpp"] else "inf"
    if not (D == "inf" or (isinstance(D, (int, float)) and D > 0)):
        raise ValueError(f"D={D!r:.40} of PFGM++")
    return {"class": "PFGMpp", "kwargs": {"D": D if D == "inf" else float(D)}}


def _about(made):
    """What a loss or an augmentation pipe was set to, for the record."""
    if not isinstance(made, Object):
        return None
    return {"class": made.name[:60]} | {
        k: _simple(v) for k, v in torch_pickles.attributes(made).items() if k != "training"
    }


def _network(content, part):
    """(layout, network object, the rest of the file)."""
    if isinstance(content, Object):
        return "toy", content, {}
    if not isinstance(content, dict):
        raise ValueError("holds no network")
    if "pytorch-lightning_version" in content:
        raise ValueError("is a checkpoint of Lightning: name it .ckpt")
    if not isinstance(content.get(part), Object):
        if any(isinstance(content.get(name), dict) for name in ("net", "ema", "model", "state_dict")):
            raise ValueError("holds tensors and no description of their network: give its network-snapshot")
        held = ", ".join(sorted(str(name)[:30] for name in content)[:8])
        raise ValueError(f"holds no network {part!r}, but {held}")
    return "training state" if "optimizer_state" in content else "snapshot", content[part], content


def read(path: str | Path, part: str = "ema") -> tuple[dict, dict[str, torch.Tensor]]:
    """(header, tensors) of another system's snapshot, as torch_utils.persistence has them of ours; nothing is executed.

    part: "ema", or "net" where the file keeps the raw network beside. Tensors are named as in `state_dict` of the network,
    in the type they were stored in. Raises ValueError, in one line that names the file, for anything else.
    """
    if not Path(path).exists():
        raise ValueError(f"{path}: no such snapshot")
    require_file(path)
    try:
        content = torch_pickles.load(path)
        if Path(path).suffix in foreign_joint.SUFFIXES:
            return foreign_joint.read(content, path, part)
        layout, net, rest = _network(content, part)
        described = _described(net, _NETWORKS, "network")
        for name, module in torch_pickles.modules(net):
            if name and module.name not in _PARTS.split():
                raise ValueError(f"{name} is a {module.name!r:.60}, which none of these networks has")
        encoder = {"class": "IdentityEncoder" if layout == "toy" else "StandardRGBEncoder", "kwargs": {}}
        if rest.get("encoder") is not None:
            encoder = _described(rest["encoder"], _ENCODERS, "encoder")
        nimg, ema = nimg_of(path)
        step = rest.get("step")
        options = {name: _about(rest[name]) for name in ("loss_fn", "augment_pipe") if rest.get(name) is not None}
        loss = options.get("loss_fn") or {}
        options |= {name: loss[name] for name in ("P_mean", "P_std", "sigma_data") if name in loss}
        header = dict(
            net=described,
            encoder=encoder,
            process=_kernel(net, described),
            nimg=step if isinstance(step, int) else nimg,
            ema=(ema or "ema") if part == "ema" and layout != "toy" else None,
            options=options,
            dataset={
                str(k): _simple(v) for k, v in plain(rest.get("dataset_kwargs") or {}).items() if k != "class_name"
            },
            source={"file": Path(path).name, "layout": layout, "part": part if rest else None},
        )
        return header, state_dict(net)
    except Exception as err:  # a crafted file fails in any way at all
        raise ValueError(f"{path}: {reason(err)}") from err
