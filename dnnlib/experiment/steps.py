"""One step of an experiment: its command line, what it reads and writes, and whether it has been done on these inputs."""

import fnmatch
import functools
import glob
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dnnlib.reading import read_json
from dnnlib.util import each_of, file_sum, json_sum, traits, write_json
from dnnlib.writers import Writers

LAUNCHER = "torchrun"
LAUNCHER_OPTIONS = {"standalone"}  # what may stand between torchrun and the script: switches, and options with a value
LAUNCHER_VALUES = {
    "nproc_per_node",
    "nnodes",
    "node_rank",
    "master_addr",
    "master_port",
    "rdzv_backend",
    "rdzv_endpoint",
}
# Options that name what a command writes; of a script its own.
OUTPUTS = {"dest", "outdir", "figure", "tables", "save", "results-dir", "figures-dir"}
SCRIPT_OUTPUTS = {"dataset_tool.py": {"holdout", "val"}}
REPLACED = "replaced"  # folder of outputs that a step made before its command or inputs changed


@dataclass(eq=False)  # steps are themselves, not alike
class Step:
    """One command line: a script and its arguments, or `torchrun` with options before them. Steps with the same `stage`
    are independent of each other.

    needs: the earlier steps whose outputs its command line names. A `summary` reads what other steps wrote: it is done
    again whenever one of them was.
    """

    name: str
    argv: list[str]
    stage: int
    summary: bool = False
    needs: list = field(default_factory=list)

    @functools.cached_property
    def key(self) -> str:
        """Identity: the command line without its launcher (no result depends on how many processes compute it), size and
        time of the outside files and folders it names, identities of the steps it needs.
        """
        outside = {path: traits(path) for path in sorted(self.reads) if os.path.isfile(path) or path in self.folders}
        return json_sum([self.command, outside, [step.key for step in self.needs]])

    def processes(self, gpus: int) -> int:
        """How many the launcher starts on a machine; `gpu` and `auto` are one on each of `gpus`."""
        words = self.argv if self.argv[0] == LAUNCHER else []
        found = [word.partition("=")[2] for word in _joined(words) if "nproc_per_node" in word.replace("-", "_")]
        return (int(found[-1]) if found[-1].isdigit() else max(gpus, 1)) if found else 1

    @property
    def script(self) -> str:
        """The script of the command line. Raises ValueError where the launcher would start anything else."""
        if self.argv[0] != LAUNCHER:
            return self.argv[0]
        words = iter(self.argv[1:])
        for word in words:
            name, equals, _ = word.removeprefix("--").replace("-", "_").partition("=")
            if not word.startswith("-"):
                return word
            if name in LAUNCHER_VALUES:
                equals or next(words, None)
            elif name not in LAUNCHER_OPTIONS or equals:
                known = ", ".join(sorted(LAUNCHER_OPTIONS | LAUNCHER_VALUES))
                raise ValueError(f"step {self.name}: {word} is no option for {LAUNCHER} here; known: {known}")
        raise ValueError(f"step {self.name}: {LAUNCHER} starts no script")

    @property
    def command(self) -> list[str]:
        """The command line from the script on."""
        return self.argv[self.argv.index(self.script) :]

    @functools.cached_property
    def words(self) -> list[str]:
        """The arguments; where one is --each=LIST, those of every model after each other."""
        each = next((word.removeprefix("--each=") for word in self.command if word.startswith("--each=")), "%s")
        return [word for words in each_of(each, self.command[1:]) for word in words]

    @functools.cached_property
    def writes(self) -> set[str]:
        """Paths (files, folders, or stems of files) that the command line says it writes."""
        names = OUTPUTS | SCRIPT_OUTPUTS.get(self.script, set())
        options = (word[2:].partition("=") for word in self.words if word.startswith("--"))
        return {os.path.normpath(value) for name, _, value in options if name in names and value}

    @property
    def folders(self) -> set[str]:
        """Outside folders that whole options name."""
        values = {
            os.path.normpath(word.partition("=")[2]) for word in self.words if word.startswith("--") and "=" in word
        }
        return {path for path in values & self.reads if path != "." and os.path.isdir(path)}

    @functools.cached_property
    def reads(self) -> set[str]:
        """All that may be a path in the command line and is not written by it; `%s`, `%class`, ... stand for anything."""
        found = set()
        for word in self.words:
            value = word.partition("=")[2] if word.startswith("--") else word
            found |= {value, value.partition(":")[2], *re.split(r"[,:]", value)}
        return {os.path.normpath(re.sub(r"%[a-z]+", "*", path)) for path in found if path} - self.writes


def _joined(words):
    """Launcher words with values of their own in one: `--nnodes 2` as `--nnodes=2`."""
    words = iter(words)
    for word in words:
        known = word.startswith("-") and word.lstrip("-").replace("-", "_") in LAUNCHER_VALUES
        yield f"{word}={next(words, '')}" if known else word


def link(steps: list[Step], root: str) -> None:
    """Fill in what each step needs: earlier steps that write what it names."""
    root, writers = os.path.normpath(root), Writers()
    for step in steps:
        for path in step.writes:
            writers.add(path, step)
    inside = root + os.sep
    for step in steps:
        found = {}
        for path in sorted(step.reads | step.writes):
            earlier = {id(w): w for w in writers.of(path, root) if w.stage < step.stage}
            found |= earlier
            if earlier or (path + os.sep).startswith(inside):
                step.reads.discard(path)  # the rest is from outside
        step.needs = [other for other in steps if id(other) in found]


def _marker(out, step):
    return Path(out) / "steps" / f"{step.name}.json"


def _read_marker(out, step):
    try:
        marker = read_json(_marker(out, step))
        return marker if isinstance(marker["key"], str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files(out, step):
    """Sorted paths of all files that a step's outputs consist of now; the experiment's own folder says nothing of one."""
    found = set()
    for path in sorted(step.writes - {os.path.normpath(out)}):
        if os.path.isdir(path):
            found |= {str(p) for p in Path(path).rglob("*") if p.is_file()}
        else:
            found |= {p for p in [path, *glob.glob(glob.escape(path) + ".*")] if os.path.isfile(p)}
    return sorted(found)


def _state(path):
    """[size, time, sha256] of a file."""
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        return [stat.st_size, stat.st_mtime_ns, file_sum(file)]


def _unchanged(path, then):
    """Whether a file is what it was; its content is read only where its time has changed, as in copies of results."""
    try:
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns] == then[:2] or (stat.st_size == then[0] and _state(path)[2] == then[2])
    except (OSError, TypeError, IndexError):
        return False


def is_done(out: str | Path, step: Step) -> bool:
    """Whether this very command line has been completed on these inputs, and what it wrote is still there."""
    marker = _read_marker(out, step)
    if marker is None:
        return False
    if "files" not in marker:  # written by an earlier version, which knew the command line only
        return marker["key"] == json_sum(step.argv)
    return marker["key"] == step.key and all(_unchanged(path, then) for path, then in marker["files"].items())


def mark_done(out: str | Path, step: Step, seconds: float) -> None:
    """Keep the command line, how long it took, and the state of the files that it wrote."""
    record = {"key": step.key, "argv": step.argv, "seconds": round(seconds, 3)}
    record["files"] = {path: _state(path) for path in _files(out, step)}
    write_json(_marker(out, step), record)


def to_do(out: str | Path, steps: Iterable[Step]) -> list[Step]:
    """Of `steps`, in order, those that are not done, and what needs one of these."""
    names = {step.name for step in steps if not is_done(out, step)}
    for step in steps:  # in order: what needs a step that is done again is done again
        if names and (step.summary or names & {other.name for other in step.needs}):
            names.add(step.name)
    return [step for step in steps if step.name in names]


def choose(steps: list[Step], patterns: Iterable[str], indices: Iterable[int] | None, file: str) -> list[Step]:
    """The steps of these names or patterns (`train-*`), and of these indices; all where none are given. Raises ValueError."""
    patterns, indices, chosen = list(patterns), list(indices or ()), set()
    for pattern in patterns:
        found = {i for i, step in enumerate(steps) if fnmatch.fnmatchcase(step.name, pattern)}
        if not found:
            raise ValueError(f"--step={pattern} is no step of {file}: see --list")
        chosen |= found
    if wrong := [i for i in indices if not 0 <= i < len(steps)]:
        raise ValueError(f"--index={wrong[0]}: {file} has steps 0 to {len(steps) - 1}")
    chosen |= set(indices)
    return [step for i, step in enumerate(steps) if i in chosen] if patterns or indices else list(steps)


def with_needs(out: str | Path, steps: list[Step], chosen: list[Step], allowed: bool) -> list[Step]:
    """The chosen steps with what they need and is not done. Raises ValueError that names these where not `allowed`."""
    lacking = {step.name for step in missing(out, to_do(out, chosen))}
    if lacking and not allowed:
        shown = [step.name for step in steps if step.name in lacking]
        more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
        these = chosen[0].name if len(chosen) == 1 else f"{len(chosen)} steps"
        raise ValueError(
            f"{these}: not done yet, but needed: {', '.join(shown[:5])}{more}; first do these, or add --with-needs"
        )
    names = lacking | {step.name for step in chosen}
    return [step for step in steps if step.name in names]


def arrays(out: str | Path, steps: list[Step], chosen: list[Step]) -> list[tuple[int, str, list[int]]]:
    """What is to do of the chosen steps, as job arrays, one for every entry of the file with something to do, in order:
    (index of its first step; its steps, counted from there, such as 0-3,7; the arrays before it that have to be done).
    """
    todo, found, at = to_do(out, chosen), [], {}
    for step in todo:
        first = next(i for i, other in enumerate(steps) if other.stage == step.stage)
        if step.stage not in at:
            at[step.stage] = len(found)
            found.append((first, [], set(range(len(found))) if step.summary else set()))
        found[-1][1].append(steps.index(step) - first)
        found[-1][2].update(at[other.stage] for other in step.needs if other.stage in at)
    return [(first, _ranges(numbers), sorted(after)) for first, numbers, after in found]


def _ranges(numbers):
    """Ascending integers as 0-3,7."""
    runs = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def missing(out: str | Path, steps: Iterable[Step]) -> list[Step]:
    """The earlier steps that `steps` need and that are not done, with what these lack themselves, in order."""
    found, look = {}, list(steps)
    chosen = {step.name for step in look}
    while look:
        for other in look.pop().needs:
            if other.name not in found and other.name not in chosen and not is_done(out, other):
                found[other.name] = other
                look.append(other)
    return sorted(found.values(), key=lambda step: step.stage)


def was_done(out: str | Path, step: Step) -> bool:
    """Whether the step of this name has been completed once, if with another command line or on other inputs."""
    return _read_marker(out, step) is not None


def set_aside(out: str | Path, step: Step) -> None:
    """Before a step is done again: what it wrote moves to <out>/replaced, so that nothing old stays in its place."""
    if not was_done(out, step):
        return  # never finished: the command itself resumes
    root, target = os.path.normpath(out), Path(out) / REPLACED / f"{step.name}-{int(time.time() * 1e3)}"
    for path in sorted(step.writes):
        for place in [path, *glob.glob(glob.escape(path) + ".*")]:
            if place != root and os.path.lexists(place):
                target.mkdir(parents=True, exist_ok=True)
                os.replace(place, target / (os.path.basename(place) + "~"))  # no search for results finds it
    _marker(out, step).unlink(missing_ok=True)
