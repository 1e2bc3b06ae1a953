"""Snapshots of any system that is read, as our own file or as a plain state_dict; and what a file says about itself."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch

from dnnlib.util import atomic_write
from torch_utils import persistence


def floating_types(state: dict[str, torch.Tensor]) -> list[str]:
    """Names of the floating-point types among tensors."""
    return sorted({str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()})


def convert(path: str, dest: str | Path | None = None, part: str = "ema", plain: bool = False) -> dict:
    """Read a snapshot as data, write it to `dest` (None: nowhere) and return what was found, as plain data.

    part: "ema" or "net" of a file that keeps both. plain: tensors by their names in the network and no description, for
    other programs. Numbers keep the type they were stored in. Raises ValueError for what cannot be read, and for a dest
    that does not end with .safetensors or is the file itself.
    """
    source = persistence.resolve(path)
    if dest is not None and Path(dest).suffix != ".safetensors":
        raise ValueError(f"--dest={dest}: snapshots are written as .safetensors")
    if dest is not None and Path(dest).resolve() == source.resolve():
        raise ValueError(f"--dest={dest} is the file that is read: give another name")
    header, state = persistence.read_snapshot(source, part=part)
    snapshot = persistence.assemble(source, header, state)  # also where nothing is written: the tensors must fit
    found = {name: header[name] for name in ("net", "encoder", "process", "nimg", "ema", "options", "dataset", "source")
             if header.get(name) is not None}  # fmt: skip
    found |= {"parameters": sum(p.numel() for p in snapshot.net.parameters()), "types": floating_types(state)}
    if dest is None:
        return found
    if plain:
        tensors = {name.removeprefix("net."): value.contiguous().clone() for name, value in state.items()}
        with atomic_write(dest) as file:
            file.write(safetensors.torch.save(tensors))
    else:
        known = {name: header[name] for name in ("nimg", "ema", "options", "dataset", "sources", "source", "git_commit")
                 if name in header}  # fmt: skip
        stored = {f"net.{name}" for name, _ in snapshot.net.named_parameters()}
        types = {state[name].dtype for name in stored if state[name].is_floating_point()}
        dtype = types.pop() if len(types) == 1 else None
        parts = dict(encoder=snapshot.encoder, process=snapshot.process)
        persistence.save_snapshot(dest, snapshot.net, **parts, dtype=dtype, **known)
    return found | {"dest": str(dest)}
