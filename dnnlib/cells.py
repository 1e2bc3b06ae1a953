"""A resumable map: each finished cell of a grid is kept as a file, so that long work can be interrupted and run again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dnnlib.util import write_text


def run(
    cells: Sequence[tuple],
    work: Callable,
    folder: str | Path,
    *,
    identity: Callable = lambda *cell: cell,
    read: Callable = lambda result: result,
    fresh: bool = False,
    keep: bool = True,
    looked: Callable[[], object] = lambda: None,
    progress: Callable[[list], Iterable] = iter,
) -> list:
    """[work(*cell) for cell in cells]; results that lie in `folder` are read instead, and equal cells are worked on once.

    Args:
        cells:    arguments of `work`, which returns plain data or a dataclass of such.
        folder:   one JSON file per finished cell.
        identity: (*cell) -> all that the result depends on, as plain data or dataclasses; default: the arguments.
        read:     stored plain data -> result; where it raises KeyError, TypeError or ValueError, the cell is run again.
        fresh:    run finished cells again.
        keep:     write the files (of several processes that work on the same cells together, one does).
        looked:   called once when all files have been read: a barrier, where processes work together, so that none finds a
                  cell that another has only just written.
        progress: wraps the list of cells that are run, e.g. tqdm.
    """
    named = lambda value: [type(value).__name__, dataclasses.asdict(value)]
    names = [json.dumps(identity(*cell), default=named, sort_keys=True) for cell in cells]
    files = {name: Path(folder) / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json" for name in names}
    results = {}
    for name, path in ({} if fresh else files).items():
        with contextlib.suppress(OSError, KeyError, TypeError, ValueError):  # absent, damaged, or of an older form
            results[name] = read(json.loads(path.read_text(encoding="utf-8"))["result"])
    looked()
    missing = {name: cell for name, cell in zip(names, cells, strict=True) if name not in results}
    for name in progress(list(missing)):
        text = json.dumps({"cell": json.loads(name), "result": work(*missing[name])}, default=dataclasses.asdict)
        if keep:
            write_text(files[name], text)
        results[name] = read(json.loads(text)["result"])  # the same, run or read
    return [results[name] for name in names]


def digest(path: str | Path) -> str:
    """What tells the content of a file apart, for an identity."""
    return "sha256:" + hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
