"""Weight files of published detectors: where they may lie, whether they are the published ones, what is in them.

`given` says where to look, as in --weights=NAME=...: a file, a folder, a URL, or `download`; with @SHA256 (or its first 8
digits or more) for a file that is another than the published one on purpose, @any for whatever it is. Nothing is
downloaded without being asked for, and reading a file executes nothing.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch

from dnnlib import download
from dnnlib.reading import require_file
from dnnlib.util import file_sum, reason
from torch_utils import torch_pickles

WRAPPED = ("model_state_dict", "state_dict", "model")  # where training checkpoints keep their weights


@dataclasses.dataclass(frozen=True)
class Weights:
    """A published weight file."""

    detector: str  # that needs it
    network: str
    names: tuple[str, ...]  # that the file goes by
    url: str  # official source
    licence: str
    size: int | None = None  # bytes
    sha256: str | None = None  # None: nobody published it

    def __str__(self) -> str:
        size = f"{self.size} bytes" if self.size else "size not published"
        return f"{' or '.join(self.names)} ({size}, sha256 {self.sha256 or 'not published'}, {self.licence})"


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """A file that was found; its sha256 was compared with the published one, or with the one that was asked for."""

    path: Path
    sha256: str
    published: bool  # whether it is the published file

    def identity(self, name: str) -> str:
        """The name alone for the published weights: what files of others mean by it."""
        return name if self.published else f"{name}:{self.sha256[:16]}"


def folders() -> list[Path]:
    """Where weight files are looked for: our cache, and torch's, in which other tools keep the same files."""
    torch_home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch"
    return [download.cache_root() / "weights", Path(torch_home).expanduser() / "hub" / "checkpoints"]


def cached(weights: Weights) -> Path | None:
    """The file in one of the caches, whatever it holds; None where there is none."""
    places = [folder / name for folder in folders() for name in weights.names]
    return next((path for path in [*places, download.cache_path(weights.url)] if path.is_file()), None)


def _locate(weights, given):
    """The path that is meant. Raises ValueError, with everything that a user needs to get the file, where there is none."""
    if given == "download" or download.is_url(given or ""):
        url = weights.url if given == "download" else given
        print(f"{weights.detector}: weights from {url}", file=sys.stderr)
        return download.cached(url)
    looked = [Path(given).expanduser()] if given else folders()
    inside = [looked[0], *(looked[0] / name for name in weights.names)]
    found = next((path for path in inside if path.is_file()), None) if given else cached(weights)
    if found is None:
        raise ValueError(
            f"detector '{weights.detector}' ({weights.network}) needs {weights}; not in {' or '.join(map(str, looked))}: "
            f"put it there, or give --weights={weights.detector}=FILE, or =download for {weights.url}"
        )
    return found


def find(weights: Weights, given: str | None = None) -> WeightFile:
    """The weight file, checked: at `given` or in one of `folders`.

    Raises ValueError, in one line with the remedy, for a file that is missing or has another sha256 than expected.
    """
    given, at, wanted = given.rpartition("@") if given and _pin(given) else (given, "", "")
    path = require_file(_locate(weights, given))
    with open(path, "rb") as file:
        found = file_sum(file)
    if wanted not in ("", "any") and not found.startswith(wanted.lower()):
        raise ValueError(f"{path}: sha256 is {found}, not {wanted} as asked for")
    if not at and weights.sha256 not in (None, found):
        held = path.stat().st_size
        size = f"{held} bytes, not {weights.size}; " if weights.size not in (None, held) else ""
        raise ValueError(
            f"{path}: {size}sha256 is {found}, expected {weights.sha256} of {weights.names[0]}; other weights on purpose: "
            f"--weights={weights.detector}={path}@any"
        )
    return WeightFile(path, found, found == weights.sha256)


def _pin(given):
    return re.search(r"@(any|[0-9a-fA-F]{8,64})$", given)


def without_pin(given: str) -> str:
    """The path of `given`, which may carry a sha256."""
    return given.rpartition("@")[0] if _pin(given) else given


def read(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """{name: tensor} of a .safetensors file or one of torch.save, also where a checkpoint wraps it; executes nothing.

    Raises ValueError that names the file and the reason.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        found = torch_pickles.load(path)
        while isinstance(found, dict) and (inner := next((n for n in WRAPPED if isinstance(found.get(n), dict)), None)):
            found = found[inner]
        if isinstance(found, torch_pickles.Object) or not isinstance(found, dict):
            raise ValueError("holds an object, not the tensors of a network by name")
        kinds = (torch_pickles.Tensor,)
        if wrong := next((n for n, v in found.items() if not (isinstance(n, str) and isinstance(v, kinds))), None):
            raise ValueError(f"entry {wrong!r:.60} is no tensor")
        return {name: tensor.value() for name, tensor in found.items()}
    except (ValueError, safetensors.SafetensorError) as err:
        raise ValueError(f"{path}: no readable weight file ({reason(err):.300})") from None


def fill(net: torch.nn.Module, state: Mapping[str, torch.Tensor], path: str | os.PathLike) -> torch.nn.Module:
    """`net`, made on the device `meta`, with exactly the tensors of a file, in float32.

    Raises ValueError that says which check failed: the first tensor that is missing, too much, of another shape or kind, or
    not finite. Counters of batch norms may be there or not.
    """
    counters = lambda names: {name for name in names if not name.endswith("num_batches_tracked")}
    own = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    require_names(counters(own), counters(state), path)
    for name in counters(own):
        tensor = state[name]
        if tuple(tensor.shape) != own[name]:
            raise ValueError(f"{path}: tensor '{name}' has shape {list(tensor.shape)}, expected {list(own[name])}")
    require_finite({name: state[name] for name in counters(own)}, path)
    values = {name: state[name].float() if name in counters(own) else torch.tensor(0) for name in own}
    net.load_state_dict(values, assign=True)
    return net.eval().requires_grad_(False)


def require_names(expected: Iterable[str], held: Iterable[str], path: str | os.PathLike) -> None:
    """Raises ValueError that names the first tensor that is missing or too much."""
    expected, held = set(expected), set(held)
    for what, names in (("lacks", expected - held), ("holds an unexpected", held - expected)):
        if names:
            raise ValueError(
                f"{path}: {what} tensor '{min(names):.80}' ({len(names)} such): weights of another network"
            )


def require_finite(state: Mapping[str, torch.Tensor], path: str | os.PathLike) -> None:
    """Raises ValueError that names the first tensor that holds something else than finite numbers."""
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{path}: tensor '{name:.80}' holds what are no finite numbers; get the file again")


def renamed(state: Mapping[str, torch.Tensor], table: Iterable[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """A state with names rewritten by regular expressions (pattern, replacement), one after the other."""
    result = {}
    for name, tensor in state.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result
