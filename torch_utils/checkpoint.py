"""Training states on disk: plain types, written atomically, with a checksum beside them, the newest sound one found again."""

from __future__ import annotations

import contextlib
import re
import sys
import zipfile
from pathlib import Path

import torch

from dnnlib.reading import require_honest
from dnnlib.util import atomic_write, file_sum, reason, write_text

_NAME = re.compile(r"training-state-(\d+)\.pt")


def _sum_path(path):
    return path.with_name(path.name + ".sha256")


def save(path: str | Path, state: dict) -> None:
    """Write `state` (plain containers and tensors) to `path` and its sha256 (in sha256sum's format) beside it.

    The checksum appears first, so a file under its final name always has one. Where `path` exists already (two
    checkpoints within the same 1000 images) both sums stand there until the new file has taken the name.
    """
    path = Path(path)
    with atomic_write(path, "w+b") as file:
        torch.save(state, file)
        file.seek(0)
        line = f"{file_sum(file)}  {path.name}\n"
        earlier = _wanted(path) if path.is_file() else []
        write_text(_sum_path(path), line + "".join(f"{old}  {path.name}\n" for old in earlier))
    if earlier:
        write_text(_sum_path(path), line)


def _wanted(path):
    """The sums that the checksum file lists, newest first; empty if there is none."""
    try:
        lines = _sum_path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    return [line.split()[0] for line in lines if line.strip()]


def damage(path: str | Path) -> str | None:
    """None for a sound checkpoint, else a phrase that says what is wrong with it."""
    path = Path(path)
    wanted = _wanted(path)
    if not wanted:
        return "its checksum file is missing"
    with open(path, "rb") as file:
        return None if file_sum(file) in wanted else "its checksum does not match"


def load(path: str | Path, mmap: bool = False) -> dict:
    """Read a checkpoint to the CPU, executing nothing. Raises ValueError for a missing, damaged or foreign file.

    A file without a checksum beside it (a copy) is checked by the archive's own. mmap: leave tensors on the disk until used.
    """
    path = Path(path)
    if not path.is_file() or path.suffix == ".safetensors":
        raise ValueError(f"{path}: no such checkpoint; give a training-state-*.pt (weights alone: --init=SNAPSHOT)")
    if _wanted(path) and (why := damage(path)):
        raise ValueError(f"{path}: damaged ({why}); resume from an earlier one")
    try:
        with zipfile.ZipFile(path) as archive:
            require_honest(archive)
            if not _wanted(path) and (bad := archive.testzip()):
                raise ValueError(f"damaged at {bad}")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as err:  # zip, pickle and storage errors have no common base
        raise ValueError(f"{path}: not a readable checkpoint ({reason(err)})") from err


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Paths of the checkpoints in a run folder, oldest first."""
    found = [(int(m[1]), p) for p in Path(run_dir).glob("training-state-*.pt") if (m := _NAME.fullmatch(p.name))]
    return [p for _, p in sorted(found)]


def newest_sound(run_dir: str | Path) -> Path | None:
    """The newest checkpoint whose checksum matches (else that is whole), None if there is none. stderr names damaged ones.

    Raises ValueError if there are checkpoints and all are damaged: starting over is the user's decision.
    """
    paths = list_checkpoints(run_dir)
    for path in reversed(paths):
        if (why := damage(path)) is None:
            return path
        print(f"Warning: {path} is damaged ({why}); looking for an earlier checkpoint", file=sys.stderr)
    for path in reversed(paths):
        if not _wanted(path):  # copied without its checksum: the archive has its own
            with contextlib.suppress(ValueError):
                load(path, mmap=True)
                return path
    if paths:
        raise ValueError(f"{run_dir}: all checkpoints are damaged: restore one, or remove them to start over")
    return None


def remove_old(run_dir: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints (0 keeps all), and only once the newest one reads back sound."""
    paths = list_checkpoints(run_dir)
    if keep < 1 or len(paths) <= keep:
        return
    if why := damage(paths[-1]):
        raise OSError(f"{paths[-1]} was written but {why}: check the disk; older checkpoints were kept")
    for path in paths[:-keep]:
        path.unlink(missing_ok=True)
        _sum_path(path).unlink(missing_ok=True)
