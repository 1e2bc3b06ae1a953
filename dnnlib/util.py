"""Small utilities shared by every room: EasyDict, a tee for log.txt, atomic writes, locks, number formats."""

import contextlib
import difflib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO


class EasyDict(dict):
    """A dict whose entries are also attributes. Raises AttributeError for a missing name."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as err:
            raise AttributeError(name) from err

    __setattr__, __delattr__ = dict.__setitem__, dict.__delitem__


@contextlib.contextmanager
def logged(path: str | Path) -> Iterator[None]:
    """Mirror stdout and stderr to a file (append, flushed).

    Carriage-return progress bars stay on the terminal: only whole lines reach the file.
    """
    with (
        open(path, "a", encoding="utf-8") as file,
        contextlib.redirect_stdout(_Tee(sys.stdout, file)),
        contextlib.redirect_stderr(_Tee(sys.stderr, file)),
    ):
        yield


class _Tee:
    def __init__(self, stream, file):
        self.stream, self.file = stream, file

    def write(self, text):
        count = self.stream.write(text)
        if "\r" not in text and not self.file.closed:
            self.file.write(text)
            self.file.flush()
        return count

    def __getattr__(self, name):
        return getattr(self.stream, name)


TEMPORARY = (
    ".dnnlib-tmp"  # `.NAME.xxxxxxxx.dnnlib-tmp`: a file or folder NAME that is being written; nobody else's name
)
REPLACED = ".old"  # behind it: the folder NAME of before, until the new one stands in its place


INTERRUPTIONS = (KeyboardInterrupt, SystemExit)  # after which the same command may go on


def partial(path: str | Path, key: str) -> Path:
    """Where a file or folder is written by work that can go on; key: 16 hex digits, of all that its content depends on."""
    return Path(path).with_name(f".{Path(path).name}.{key}{TEMPORARY}")


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb", key: str | None = None) -> Iterator[IO]:
    """Open a temporary neighbour of `path` for writing; it takes the name of `path` only when all went well.

    The data is on the disk before the rename, so a crash leaves either the old file or the new one.
    A failed write raises OSError that names `path`, and leaves nothing behind; what is no file is not replaced.
    key: as of `partial`; what was written there before an interruption is there again, to be read or written over.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "is no regular file; give another place", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    if key is None:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    else:
        temporary = partial(path, key)
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with os.fdopen(fd, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp gives 0600: restore what a plain open() would have given
        os.replace(temporary, path)
    except BaseException as err:
        if key is None or not isinstance(err, INTERRUPTIONS):
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if isinstance(err, OSError) and err.errno is not None and err.filename is None:
            raise OSError(err.errno, f"{err.strerror}; free some space or choose another place", str(path)) from err
        raise


def remove_leftovers(folder: str | Path, name: str | None = None, deep: bool = False, key: str | None = None) -> None:
    """Delete what writes that were cut short left in `folder`: of the file or folder `name`, or of all (deep: also below).

    A folder that was about to be replaced gets its name back. For the holder of the lock; other hidden files stay, and
    what work of this key can go on with.
    """
    names = re.compile(
        rf"\.({'.+' if name is None else re.escape(name)})\.([a-z0-9_]{{8}}|[0-9a-f]{{16}}){re.escape(TEMPORARY)}"
        rf"({REPLACED})?"
    )
    for path in sorted(Path(folder).rglob(f".*{TEMPORARY}*") if deep else Path(folder).glob(f".*{TEMPORARY}*")):
        match = names.fullmatch(path.name)
        if match and match[3] and not path.with_name(match[1]).exists():
            os.replace(path, path.with_name(match[1]))
        elif match and match[2] == key and not match[3]:
            continue
        elif match and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif match:
            path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file atomically, line ends as they are; returns its path."""
    with atomic_write(path, "w") as file:
        file.write(text)
    return Path(path)


def write_json(path: str | Path, value: object) -> Path:
    """Write strict JSON atomically; returns its path. Raises ValueError for NaN or infinity."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def traits(path: str | Path) -> list | str:
    """Size and time of a file; of a folder a digest over all that is in it, links followed."""
    if os.path.isfile(path):
        return [os.path.getsize(path), os.stat(path).st_mtime_ns]
    found, seen = [], set()
    for folder, folders, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(folders)  # links may lead in circles
        for name in [] if real in seen else sorted(files):
            file = os.path.join(folder, name)
            stat = os.stat(file, follow_symlinks=os.path.exists(file))
            found.append([os.path.relpath(file, path), stat.st_size, stat.st_mtime_ns])
        seen.add(real)
    return json_sum(found)


def json_sum(content: object) -> str:
    """sha256 (hex) of plain data."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def file_sum(file: IO[bytes]) -> str:
    """sha256 (hex) of the rest of a binary file."""
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


def read_stats(run: str | Path) -> list[dict]:
    """The lines of a run's stats.jsonl (a folder, or the file). Raises ValueError for anything else."""
    path = Path(run) / "stats.jsonl" if Path(run).is_dir() else Path(run)
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as err:
        raise ValueError(f"{run}: no readable stats.jsonl ({reason(err)}); give run folders") from err


LOCK_NAME = ".dnnlib-lock"
_HELD = set()  # open lock files; a forked child must not keep what its parent held beyond the parent's end
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [file.close() for file in _HELD])


class Lock:
    """What the holder of a lock may know and say."""

    def __init__(self, file: IO | None = None):
        self.file = file
        if file is not None:
            file.seek(0)
        self.unfinished = [] if file is None else file.read().splitlines()[1:]  # of a holder that was killed

    def announce(self, status: os.stat_result) -> None:
        """Say that what has this status will take the place now: the next holder may replace it, if this one is killed."""
        if self.file is not None:
            self.file.write(f"{_identity(status)}\n")
            self.file.flush()

    def wrote(self, path: str | Path) -> bool:
        """Whether a holder that was killed had put there what is there."""
        return _identity(os.stat(path)) in self.unfinished


def _identity(status):
    return f"{status.st_dev}:{status.st_ino}:{status.st_mtime_ns}"


@contextlib.contextmanager
def locked(path: str | Path, beside: bool = False) -> Iterator[Lock]:
    """Hold the folder `path`, or (beside: the lock lies in the folder around it) the file or folder `path`, for this process.

    Folders are made if need be, and go again where nothing came of it. The end of the process, however it comes, lets go.
    Advisory (flock): network file systems may lock for each machine only (NFS before Linux 2.6.12, or mounted with nolock)
    or not at all (said in a warning); there, and where there is no fcntl, run one command at a time. Raises ValueError that
    says who holds it.
    """
    path = Path(path)
    place = path.with_name(f".{path.name}{LOCK_NAME}") if beside else path / LOCK_NAME
    made = [folder for folder in place.parents if not folder.exists()]
    try:
        import fcntl
    except ImportError:  # Windows
        place.parent.mkdir(parents=True, exist_ok=True)
        yield Lock()
        return
    while True:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(place, "a+", encoding="utf-8")  # noqa: SIM115 (held until the end of the block)
        except FileNotFoundError:
            continue  # another holder has just removed the folder
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.readline(200).strip() or "another process"
            file.close()
            raise ValueError(f"{path} is being written by {holder}: wait for it, or give another place") from None
        except OSError as err:  # a file system without locks
            print(f"Warning: {path} cannot be locked ({err.strerror}): one command at a time", file=sys.stderr)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(place)):
                break  # and not a file that its last holder has removed
        file.close()
    with file:
        _HELD.add(file)
        lock = Lock(file)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield lock
        finally:
            _HELD.discard(file)
            place.unlink(missing_ok=True)
            for folder in made:
                with contextlib.suppress(OSError):  # not empty: something came of it
                    folder.rmdir()


_NIMG = re.compile(r"([0-9]{1,18})(Ki|Mi|Gi|)")
_UNITS = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def parse_nimg(text: str | int) -> int:
    """A count of images: an integer, or an integer with Ki, Mi or Gi. Raises ValueError."""
    match = _NIMG.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{text!r} is no count of images: give an integer, or one with Ki, Mi or Gi, such as 64Ki")
    return int(match[1]) * _UNITS[match[2]]


def format_nimg(nimg: int) -> str:
    """The inverse of `parse_nimg`, in the largest unit that divides the count."""
    for unit in ("Gi", "Mi", "Ki"):
        if nimg and nimg % _UNITS[unit] == 0:
            return f"{nimg // _UNITS[unit]}{unit}"
    return str(nimg)


MAX_SEEDS = 100_000_000
_RANGE = re.compile(r"\s*([-+]?[0-9]{1,18})(?:([-+])([0-9]{1,18}))?\s*")


def parse_integers(text: str, what: str = "integers", most: int = 1_000_000) -> list[int]:
    """A list such as '0,3,16-19' (ranges inclusive) or '1000+50' (50 from 1000 on). Raises ValueError."""
    values = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"{text!r} is no list of {what}: give integers and ranges, such as 0,3,16-19 or 1000+50")
        first = last = int(match[1])
        if match[2]:
            last = int(match[3]) if match[2] == "-" else first + int(match[3]) - 1
        if not 0 <= last - first < most - len(values):
            why = "is an empty range" if last < first else f"makes them more than {most}"
            raise ValueError(f"{text!r} is no list of {what}: {part.strip()!r} {why}")
        values.extend(range(first, last + 1))
    return values


def parse_seeds(text: str | int) -> list[int]:
    """`parse_integers` without negative ones. Raises ValueError."""
    seeds = parse_integers(str(text), "seeds", MAX_SEEDS)
    if min(seeds) < 0:
        raise ValueError(f"{text!r} is no list of seeds: they are not negative")
    return seeds


def each_of(value: str, words: Sequence[str]) -> list[list[str]]:
    """The words of a command line for each of `value`: of a list `A,B`, whose entries `%s` stands for, or of several
    lists `A,B/C,D`, whose combinations `%1` and `%2` stand for. ValueError for a list that is empty or repeats an entry.
    """
    lists = [[entry for entry in part.split(",") if entry] for part in value.split("/")]
    if any(not part or len(part) != len(set(part)) for part in lists):
        raise ValueError(f"--each={value}: give different entries, separated by commas")
    found = []
    for entries in itertools.product(*lists):
        names = {"%s": entries[0]} if len(lists) == 1 else {f"%{k}": entry for k, entry in enumerate(entries, 1)}
        fill = lambda word, names=names: re.sub("|".join(names), lambda match: names[match[0]], word)
        found.append([fill(word) for word in words])
    return found


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_of(value: object, names: Iterable[str], listed: str = "") -> str:
    """What to say of a value that is none of some names: the nearest, and all, or with which option to see them."""
    names = list(names)
    near = " or ".join(difflib.get_close_matches(str(value), names, n=2))
    known = f"{listed} names all" if listed and near else f"known: {', '.join(sorted(names))}"
    return f"is unknown{f' (did you mean {near}?)' if near else ''}; {known}"


def visible_gpus() -> list[str]:
    """Names, for CUDA_VISIBLE_DEVICES, of the GPUs that this process may use."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def reason(err: Exception) -> str:
    """What an exception says, in one line; its type where it says nothing."""
    return (str(err) or type(err).__name__).splitlines()[0]


def natural_key(text: str) -> tuple:
    """Sort key that orders numbers within names by their value: a-2 before a-10, cfg-1.25 before cfg-1.5."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(float(part) if "." in part else int(part)) if i % 2 else part for i, part in enumerate(parts)], text


def format_time(seconds: float) -> str:
    """'7s', '3m 07s', '2h 03m 07s' or '1d 02h 03m'."""
    s = int(round(float(seconds)))
    if s < 60:
        return f"{s}s"
    if s < 60 * 60:
        return f"{s // 60}m {s % 60:02}s"
    if s < 24 * 60 * 60:
        return f"{s // 3600}h {s // 60 % 60:02}m {s % 60:02}s"
    return f"{s // 86400}d {s // 3600 % 24:02}h {s // 60 % 60:02}m"
