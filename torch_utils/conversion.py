"""Snapshots of any system that is read, as our own file or as a plain state_dict; and what a file says about itself."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from dnnlib.util import atomic_write
from torch_utils import diffusers_folder, persistence


def floating_types(state: dict[str, torch.Tensor]) -> list[str]:
    """Names of the floating-point types among tensors."""
    return sorted({str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()})


def stored_type(snapshot: persistence.Snapshot, state: dict[str, torch.Tensor]) -> torch.dtype | None:
    """The type that a file keeps the network's parameters in; None: several."""
    tensors = [state[f"net.{name}"] for name, _ in snapshot.net.named_parameters()]
    types = {value.dtype for value in tensors if value.is_floating_point()}
    return types.pop() if len(types) == 1 else None


# What a header says beside the format and the parts.
_ABOUT = ("nimg", "ema", "options", "dataset", "sources", "source", "git_commit")


def save_alike(dest: str | Path, snapshot: persistence.Snapshot, dtype: torch.dtype | None, **header: object) -> None:
    """Write a snapshot that was read, with all that its header says; `header` wins. dtype: of the parameters."""
    about = {name: snapshot.header[name] for name in _ABOUT if name in snapshot.header} | header
    parts = dict(encoder=snapshot.encoder, process=snapshot.process, dtype=dtype)
    persistence.save_snapshot(dest, snapshot.net, **parts, **about)


def convert(path: str, dest: str | Path | None = None, part: str = "ema", form: str = "snapshot") -> dict:
    """Read a snapshot as data, write it to `dest` (None: nowhere) and return what was found, as plain data.

    part: "ema" or "net" of a file that keeps both. form: "snapshot"; "tensors" by their names in the network and no
    description, for other programs; "folder" for diffusers. Numbers keep the type they were stored in. Raises ValueError
    for what cannot be read, a file that does not end with .safetensors or is the file itself, and a network that
    diffusers does not have.
    """
    source = persistence.resolve(path)
    if dest is not None and form != "folder" and Path(dest).suffix != ".safetensors":
        raise ValueError(f"--dest={dest}: snapshots are written as .safetensors")
    if dest is not None and Path(dest).resolve() == source.resolve():
        raise ValueError(f"--dest={dest} is the file that is read: give another name")
    header, state = persistence.read_snapshot(source, part=part)
    snapshot = persistence.assemble(source, header, state)  # also where nothing is written: the tensors must fit
    found = {name: header[name] for name in ("net", "encoder", "process", *_ABOUT) if header.get(name) is not None}
    found |= {"parameters": sum(p.numel() for p in snapshot.net.parameters()), "types": floating_types(state)}
    if dest is None:
        return found
    if form == "folder":
        return found | {"dest": str(dest), "files": diffusers_folder.write(dest, snapshot, state)}
    if form == "tensors":
        tensors = {name.removeprefix("net."): value.contiguous().clone() for name, value in state.items()}
        with atomic_write(dest) as file:
            file.write(safetensors.torch.save(tensors))
    else:
        save_alike(dest, snapshot, stored_type(snapshot, state))
    return found | {"dest": str(dest)}
