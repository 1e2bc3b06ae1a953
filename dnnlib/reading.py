"""Files that anybody may have written: regular ones only, of bounded size; JSON and YAML that unfold to bounded data.

A pipe or a device would block or never end, and a few bytes of YAML can stand for more data than there is memory. All
functions raise ValueError, in one line that says what is wrong.
"""

import json
import os
import stat
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnnlib.util import reason

if TYPE_CHECKING:
    import numpy

MOST_BYTES = 2**28  # of a JSON file: labels of five million images
MOST_CONFIG = 2**18  # of a YAML file, in characters
MOST_NODES = 100_000  # of a YAML file, aliases written out
MOST_DEPTH = 64

_KINDS = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}
_KINDS[stat.S_IFDIR] = "folder"


def require_file(path: str | os.PathLike, most: int | None = None) -> Path:
    """`path`, if it is a regular file (or a link to one) of at most `most` bytes. OSError where there is none."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        kind = _KINDS.get(stat.S_IFMT(about.st_mode), "special file")
        raise ValueError(f"{os.fspath(path)}: is a {kind}; give a regular file")
    if most is not None and about.st_size > most:
        raise ValueError(
            f"{os.fspath(path)}: has {about.st_size} bytes, more than the {most} that such a file may have"
        )
    return Path(path)


def nested(value: Any, depth: int = MOST_DEPTH) -> bool:
    """Whether lists and dicts lie more than `depth` deep in one another."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 0 or any(nested(part, depth - 1) for part in parts if isinstance(part, (dict, list)))


def _integer(text):
    number = int(text)
    return number if -(2**63) <= number < 2**63 else _no_number(f"{text:.20}...")


def _no_number(text):
    raise ValueError(f"{text} is no finite number of 64 bits")


def parse_json(data: bytes | str) -> Any:
    """The content of a JSON text: integers of 64 bits, no NaN and no infinity."""
    try:
        return json.loads(data, parse_int=_integer, parse_constant=_no_number)
    except RecursionError as err:
        raise ValueError("not valid JSON (nested too deeply)") from err
    except ValueError as err:  # bad JSON, bad UTF-8, endless digits
        raise ValueError(f"not valid JSON ({reason(err)})") from err


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file. OSError where it cannot be opened."""
    return parse_json(require_file(path, MOST_BYTES).read_bytes())


def parse_yaml(text: str) -> Any:
    """The content of a YAML text: plain data; aliases may be used as long as what they stand for stays small."""
    import yaml

    if len(text) > MOST_CONFIG:
        raise ValueError(f"{len(text)} characters, more than the {MOST_CONFIG} that are read")
    kind = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = count = 0
    try:
        for event in yaml.parse(text, kind):  # the parser itself does not recurse
            opens, closes = isinstance(event, yaml.CollectionStartEvent), isinstance(event, yaml.CollectionEndEvent)
            depth, count = depth + opens - closes, count + 1
            _require(depth <= MOST_DEPTH and count <= 2 * MOST_NODES, "nested too deeply, or too much of it")
        loader = kind(text)
        try:
            node = loader.get_single_node()
            _require_small(node)
            value = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except Exception as err:  # the constructors of numbers and dates fail in any way
        raise ValueError(" ".join(str(err).split()) or type(err).__name__) from err
    return _require_integers(value)


def _require(holds, message):
    if not holds:
        raise ValueError(message)


def _require_small(node):
    """Walks a YAML tree as if every alias were written out."""
    waiting, count = [(node, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        parts = node.value if node is not None and not isinstance(node.value, str) else ()
        parts = [part for entry in parts for part in (entry if isinstance(entry, tuple) else (entry,))]
        count += 1 + len(parts)
        _require(depth <= MOST_DEPTH and count <= MOST_NODES, "aliases that stand for too much")
        waiting += [(part, depth + 1) for part in parts]


def _require_integers(value):
    """The value, whose integers 64 bits can hold."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        waiting += [*part, *part.values()] if isinstance(part, dict) else part if isinstance(part, (list, set)) else ()
        _require(type(part) is not int or abs(part) < 2**63, "an integer of more than 64 bits")
    return value


def read_yaml(path: str | os.PathLike) -> Any:
    """The content of a YAML file. OSError where it cannot be opened."""
    return parse_yaml(require_file(path, 4 * MOST_CONFIG).read_text(encoding="utf-8"))


def require_honest(archive: zipfile.ZipFile) -> None:
    """Refuses a zip, before anything in it is read, whose members unpack to much more than the file could hold."""
    for info in archive.infolist():
        if info.file_size > max(2**26, 100 * info.compress_size):
            raise ValueError(f"{info.filename} unpacks from {info.compress_size} bytes to {info.file_size}")


def read_npz(path: str | os.PathLike) -> "dict[str, numpy.ndarray]":
    """The arrays of an npz file, no objects among them. OSError where it cannot be opened."""
    import numpy

    try:
        with zipfile.ZipFile(require_file(path)) as archive:
            require_honest(archive)
        with numpy.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except OSError:
        raise
    except Exception as err:  # zip and the headers of arrays fail in many ways
        raise ValueError(f"no readable npz file ({reason(err):.200})") from err
    _require(all(isinstance(array, numpy.ndarray) for array in arrays.values()), "it holds what is no array")
    return arrays
