"""The one door for what commands write: nothing that they read, nothing of another kind, by one command at a time.

An option that names an output says of which kind (`cli.Output`, or `opt(..., writes=KIND)`); before a command starts, its
outputs are compared with all other paths of its command line, and held until it ends (dnnlib/cli.py). A kind is declared
where it is written.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dnnlib.reading import MOST_BYTES, parse_json, read_json
from dnnlib.util import Lock, locked, remove_leftovers


@dataclass(frozen=True)
class Kind:
    """What an output is, and how one is recognised."""

    name: str  # with its article
    holds: Callable[
        [Path], bool
    ]  # whether an existing file or folder is one; what raises OSError, ValueError... is none
    folder: bool | None = False  # None: a file, or a folder that is replaced as a whole
    files: Callable[[Path], list[Path]] = lambda path: [path]  # what is written where the option says `path`
    beside: tuple[str, ...] = ()  # ends of files that may be written beside it
    lock: bool = True  # False: several commands may write into it


class Named(NamedTuple):
    """A path of a command line."""

    option: str
    path: str
    collection: bool = False  # everything inside is read
    written: bool = False  # another output


def paths_in(text: str) -> list[str]:
    """What may be a path in the value of an option: itself, what it matches as a pattern, the parts of a list or spec."""
    parts = dict.fromkeys([text, text.partition(":")[2], text.partition("=")[2], *re.split(r"[,:]", text)])
    patterns = [part.replace("%s", "*") for part in parts if re.search(r"[*?\[]|%s", part)]
    return [part for part in [*parts, *(path for p in patterns for path in glob.glob(p))] if part]


def check(option: str, path: str | Path, kind: Kind, others: Iterable[Named] = ()) -> None:
    """Raises ValueError, before anything is written, for a place that a command must not write to.

    others: the other paths of the command. What is written must be none of them and lie in no collection of them; what
    exists must be empty, or of this kind.
    """
    others = list(others)
    shared = kind.folder and not kind.lock and os.path.isdir(path)  # results are added, also beside what is read
    for place in kind.files(Path(path)):
        where, real = f"{option}={place}", os.path.realpath(place)
        for other in others:
            known = os.path.realpath(other.path)
            both = os.path.exists(real) and os.path.exists(known)
            if not shared and ((both and os.path.samefile(real, known)) or (other.written and real == known)):
                raise ValueError(f"{where} is what {other.option} names: give another place")
            if other.collection and _inside(real, known) and not (place.suffix == ".json" and place.stem != "dataset"):
                raise ValueError(f"{where} lies inside {other.option}={other.path}, all of which is read: go elsewhere")
            if kind.folder is None and _inside(known, real) and (both or other.written):
                raise ValueError(f"{where} is replaced as a whole, but {other.option}={other.path} lies inside")
        if os.path.lexists(place) and not _is_of(kind, place):
            raise ValueError(f"{where} exists and is not {kind.name}: it is not replaced, give another place")
        for end in kind.beside:
            check(option, f"{place}{end}", PICTURE, others)
        around = next(folder for folder in Path(real).parents if folder.exists())
        if not around.is_dir() or not os.access(around, os.W_OK):
            raise ValueError(f"{where}: cannot write in {around}; give a place in a writable folder")


def _inside(path, folder):
    return path.startswith(os.path.join(folder, ""))


def _is_of(kind, place):
    if place.is_dir():
        if kind.folder is not False and not any(place.iterdir()):
            return True
    elif not place.exists() and place.is_symlink():
        return True  # to nothing
    elif not place.is_file() or place.stat().st_size == 0:
        return place.is_file() and kind.folder is not True
    if kind.folder not in (None, place.is_dir()):
        return False
    return _tried(kind.holds, place)


@contextlib.contextmanager
def claimed(
    option: str, path: str | Path, kind: Kind, others: Iterable[Named] = (), new: bool = False, key: str | None = None
) -> Iterator[Lock]:
    """Hold an output for this command, checked, without the leftovers of commands that were killed; `check`'s errors.

    new: what exists, and is no empty folder and not what a killed command had just put there, is refused. Of several
    processes the first one holds it. key: of leftovers that the command goes on with (util.partial).
    """
    check(option, path, kind, others)
    place = kind.files(Path(path))[0]
    if not kind.lock or (os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"):
        yield Lock()
        return
    with contextlib.ExitStack() as stack:
        inside = kind.folder is True
        try:
            lock = stack.enter_context(locked(place, beside=not inside))
        except ValueError as err:
            raise ValueError(f"{option}={err}") from None
        except OSError as err:
            raise ValueError(f"{option}={path}: {err.strerror}; give a place in a writable folder") from None
        if inside:
            remove_leftovers(place, deep=True)
        for end in ["", *kind.beside]:
            remove_leftovers(place.parent, place.name + end, key=key)
        if new:
            refuse_existing(option, place, lock)
        yield lock


def refuse_existing(option: str, path: str | Path, lock: Lock | None = None) -> None:
    """Raises ValueError where something is that only --overwrite may replace."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())) and not (lock and lock.wrote(path)):
        raise ValueError(f"{option}={path}: exists already; choose another name or pass --overwrite")


# --- What kinds are recognised by -------------------------------------------------------------------------------------


def _tried(holds, path):
    try:
        return holds(path)
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        RuntimeError,
        zipfile.BadZipFile,
    ):
        return False


def json_with(*keys: str) -> Callable[[Path], bool]:
    """A file of one JSON object with these entries."""

    def holds(path):
        content = read_json(path)
        return isinstance(content, dict) and set(keys) <= set(content)

    return holds


def zip_with(member: str, text: bytes = b"") -> Callable[[Path], bool]:
    """A zip (also .npz) with this member, in which the text stands."""

    def holds(path):
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            return not text or text in file.read(2**20)

    return holds


def safetensors_with(text: str = "") -> Callable[[Path], bool]:
    """A safetensors file in whose description the text stands; by default, one without description."""

    def holds(path):
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            content = parse_json(file.read(size)) if size < MOST_BYTES else {}
        description = content.get("__metadata__", {}).get("header", "")
        return text in description if text else not description

    return holds


def folder_with(*patterns: str) -> Callable[[Path], bool]:
    """A folder with an entry that matches one of the regular expressions, hidden ones aside; or with none at all."""

    def holds(path):
        names = [name for name in os.listdir(path) if not name.startswith(".")]
        return not names or any(re.fullmatch("|".join(patterns), name) for name in names)

    return holds


def folder_of(*patterns: str) -> Callable[[Path], bool]:
    """A folder all of whose entries match, hidden ones aside."""
    return lambda path: all(re.fullmatch("|".join(patterns), name) for name in os.listdir(path) if name[0] != ".")


def _starts(*magic):
    return lambda path: path.open("rb").read(200).lstrip().startswith(magic)


def _text_with(sign):
    return lambda path: b"\0" not in (data := path.open("rb").read(2**16)) and sign in data


_TABLES = {".csv": _text_with(b",")} | dict.fromkeys([".md", ".txt", ""], _text_with(b"|"))
_PICTURES = {".png": _starts(b"\x89PNG"), ".svg": _starts(b"<?xml", b"<svg")}


def _format_of(formats):
    return lambda path: path.suffix in formats and formats[path.suffix](path)


def written(name: str, *ends: str, folder: bool = False) -> Kind:
    """Tables and pictures, each recognised by its format: files `path` + end, or in the folder `path`."""
    join = lambda path, end: path / end if folder else Path(f"{path}{end}")
    return Kind(name, _format_of(_TABLES | _PICTURES), files=lambda path: [join(path, end) for end in ends], lock=False)


FIGURE = written("a figure", ".png", ".svg")
TABLE = Kind("a table", _format_of(_TABLES), lock=False)
PICTURE = Kind("a picture", _format_of(_PICTURES), lock=False)
SNAPSHOT = Kind("a snapshot of this project", safetensors_with("diffusion snapshot"))
# What several commands and steps put their results into: anything but what is one thing as a whole.
RESULTS = Kind(
    "a folder of results",
    lambda path: (
        not re.search(r"^(dataset|training_options)\.json$|^network-snapshot-", "\n".join(os.listdir(path)), re.M)
    ),
    folder=True,
    lock=False,
)
