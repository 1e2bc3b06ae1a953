"""Experiment files: named settings, budgets that override them, and steps that are command lines of this project's scripts.

    name: quickstart
    settings: {sources: [0, 1, 2], duration: 64Ki}
    budgets: {smoke: {duration: 2Ki}}
    steps:
      - name: train-{source}
        foreach: {source: sources}
        run: train_edm2.py --outdir={out}/runs/{source} --duration={duration}

`{name}` in a step is a setting, `{out}` the folder of the results, `{file}` the experiment file, and `{name,}` a list joined by
commas. `foreach` repeats the step for every combination of the lists it names (or writes out); an entry that is a mapping
sets several names at once, which later names may be lists of. A setting without a value must be given with --set, and
`{classes: "{source}"}` is the list of the classes in a data set (what may stand there besides, and what it reads, the caller
says).
The repetitions of one step are independent of each other and may run side by side; steps follow each other in order.
A run line may start with `torchrun --standalone --nproc_per_node=2`: the step then runs in so many processes.
`summary: true` marks a step that is done again whenever another one was. A step is done when its marker
`<out>/steps/<name>.json` holds the same command line. Interrupting loses the steps in progress only.
"""

import collections
import concurrent.futures
import contextlib
import functools
import glob
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from dnnlib.reading import read_json, read_yaml
from dnnlib.util import file_sum, reason, usable_cores, write_json
from dnnlib.writers import Writers

ROOT = Path(__file__).resolve().parents[1]  # where the scripts are
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
MOST_STEPS, MOST_REPLACED = 2000, 1000  # steps of one entry, settings in one word
REPLACED = "replaced"  # folder of outputs that a step made before its command or inputs changed


@dataclass
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
        """Identity: the command line, size and time of the outside files and folders it names, identities of the steps it
        needs.
        """
        outside = {path: _traits(path) for path in sorted(self.reads) if os.path.isfile(path) or path in self.folders}
        return _digest([self.argv, outside, [step.key for step in self.needs]])

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

    @functools.cached_property
    def words(self) -> list[str]:
        """The arguments; where one is --each=A,B, all of them for A, then for B, which `%s` stands for."""
        each = next(
            (word.removeprefix("--each=").split(",") for word in self.argv if word.startswith("--each=")), ["%s"]
        )
        return [word.replace("%s", entry) for entry in each for word in self.argv[1:]]

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
        """All that may be a path in the command line and is not written by it; `%s` stands for anything."""
        found = set()
        for word in self.words:
            value = word.partition("=")[2] if word.startswith("--") else word
            found |= {value, value.partition(":")[2], *re.split(r"[,:]", value)}
        return {os.path.normpath(path.replace("%s", "*")) for path in found if path} - self.writes


def _traits(path):
    """Size and time of a file; of a folder a digest over all that is in it, links followed."""
    if os.path.isfile(path):
        return [os.path.getsize(path), os.stat(path).st_mtime_ns]
    found, seen = [], set()
    for folder, folders, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else sorted(folders)  # links may lead in circles
        for name in [] if real in seen else sorted(files):
            file = os.path.join(folder, name)
            traits = os.stat(file, follow_symlinks=os.path.exists(file))
            found.append([os.path.relpath(file, path), traits.st_size, traits.st_mtime_ns])
        seen.add(real)
    return _digest(found)


def _digest(content):
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _link(steps, root):
    """Fill in what each step needs: earlier steps that write what it names."""
    root, writers = os.path.normpath(root), Writers()
    for step in steps:
        for path in step.writes:
            writers.add(path, step)
    for step in steps:
        found = {id(w): w for path in step.reads | step.writes for w in writers.of(path, root) if w.stage < step.stage}
        step.needs = [other for other in steps if id(other) in found]
        inside = root + os.sep
        step.reads = {path for path in step.reads if not (path + os.sep).startswith(inside)}  # the rest is from outside


def _fill(template, values, where, done=None):
    """The template with `{name}` replaced, in what replaces it too; done: one entry per replacement so far."""
    done = [] if done is None else done

    def replace(match):
        name, comma = match[1], match[2]
        done.append(name)
        if len(done) > MOST_REPLACED:
            raise ValueError(f"{where}: settings that refer to each other stand for too much")
        if name not in values:
            raise ValueError(f"{where}: no setting named {name!r}; known: {', '.join(sorted(values))}")
        value = values[name]
        if comma:
            return ",".join(str(v) for v in (value if isinstance(value, list) else [value]))
        # A setting may be made of others; it must not contain itself.
        rest = {key: v for key, v in values.items() if key != name}
        return _fill(value, rest, where, done) if isinstance(value, str) else str(value)

    return re.sub(r"\{(\w+)(,?)\}", replace, template)


def _combinations(foreach, values, where):
    """All assignments of a `foreach` mapping, in order."""
    assignments = [{}]
    for name, items in (foreach or {}).items():
        longer = []
        for assignment in assignments:
            chosen = items
            if isinstance(items, str):  # a setting, or an entry of a mapping that an earlier name went through
                known = {**values, **assignment}
                if items not in known:
                    raise ValueError(f"{where}: foreach names the setting {items!r}, which is not there")
                chosen = known[items]
            for item in chosen if isinstance(chosen, list) else [chosen]:
                named = item if isinstance(item, dict) else {name: item}
                if not all(isinstance(key, str) for key in named):
                    raise ValueError(f"{where}: foreach {name} must map names to values")
                longer.append({**assignment, **named})
        assignments = longer
        if len(assignments) > MOST_STEPS:
            raise ValueError(f"{where}: foreach makes more than {MOST_STEPS} steps")
    return assignments


def _folder_name(name, budget, overrides):
    """Where results go by default: another budget or setting is another experiment, which must not mix with this one.

    Letters, digits and `-_.` only; where several choices would read alike, a hash tells them apart.
    """
    choices = [] if budget in (None, "default") else [budget]
    choices += [part for key, value in overrides.items() if key != "out" for part in (key, value)]
    parts = [str(part) for part in choices]
    plain = re.sub(r"[^\w.-]+", "", re.sub(r"[,=]\s*", "-", "-".join([str(name), *parts])))
    if len(plain) <= 100 and all(re.fullmatch(r"[\w.]+", part) for part in parts):
        return plain
    return f"{plain[:100]}-{hashlib.sha256(repr(choices).encode()).hexdigest()[:6]}"


def read(path: str | Path) -> dict:
    """The content of an experiment file: settings, budgets and steps are there. ValueError with the file and what is wrong."""
    try:
        spec = read_yaml(path)
    except (OSError, ValueError) as err:
        raise ValueError(f"{path}: not a readable experiment file ({reason(err)})") from err
    if not isinstance(spec, dict) or not isinstance(spec.get("steps"), list):
        raise ValueError(f"{path}: an experiment file is a mapping with the keys name, settings, budgets and steps")
    for key in ("settings", "budgets"):
        if not isinstance(spec.get(key) or {}, dict) or not all(isinstance(n, str) for n in spec.get(key) or {}):
            raise ValueError(f"{path}: {key} must map names to values")
    for stage, entry in enumerate(spec["steps"]):
        where = f"{path}, step {stage}"
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "run")):
            raise ValueError(f"{where}: a step has a name and a run line")
        if not isinstance(entry.get("foreach") or {}, dict):
            raise ValueError(f"{where}: foreach must map names to lists")
    return {**spec, "settings": spec.get("settings") or {}, "budgets": spec.get("budgets") or {}}


def texts(path: str | Path) -> set[str]:
    """Settings that are a text, or must be given, and that no foreach goes through: their values are taken as written."""
    spec = read(path)
    listed = {
        name for entry in spec["steps"] for name in (entry.get("foreach") or {}).values() if isinstance(name, str)
    }
    return {name for name, value in spec["settings"].items() if value is None or isinstance(value, str)} - listed


def load(
    path: str | Path,
    budget: str | None = None,
    overrides: dict | None = None,
    readers: dict[str, Callable[[str], list]] | None = None,
) -> tuple[dict, list[Step]]:
    """The settings and the steps of an experiment file. Raises ValueError with the file and what is wrong.

    budget: names (comma-separated) of entries under `budgets`, applied in order; overrides: {setting: value}, last.
    readers: {name: function of a text}; a setting `{name: text}` becomes what the function returns.
    """
    spec = read(path)
    name = spec.get("name") or Path(path).stem
    settings, budgets = dict(spec["settings"]), {"default": {}, **spec["budgets"]}
    for part in (budget or "default").split(","):
        if part not in budgets:
            raise ValueError(f"--budget={part} is unknown to {path}; known: {', '.join(sorted(budgets))}")
        if not isinstance(budgets[part] or {}, dict) or not all(isinstance(n, str) for n in budgets[part] or {}):
            raise ValueError(f"{path}: the budget {part} must map names to values")
        settings.update(budgets[part] or {})
    unknown = set(overrides or {}) - {*settings, "out"}
    if unknown:
        raise ValueError(
            f"--set {sorted(unknown)[0]}: {path} has no such setting; known: {', '.join(sorted(settings))}"
        )
    settings.update(overrides or {})
    wanted = [name for name, value in spec["settings"].items() if value is None]
    missing = next((name for name in wanted if settings[name] in (None, "")), None)
    if missing is not None:
        raise ValueError(f"{path}: {missing} has no value; give --set {missing}=...")
    settings.setdefault("out", "results/" + _folder_name(name, budget, overrides or {}))
    settings.setdefault("file", os.fspath(path))
    for name, value in settings.items():
        if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in (readers or {}):
            ((reader, text),) = value.items()
            settings[name] = readers[reader](_fill(str(text), settings, f"{path}, {name}"))
    steps = []
    for stage, entry in enumerate(spec["steps"]):
        where = f"{path}, step {stage}"
        try:
            words = shlex.split(entry["run"])
        except ValueError as err:
            raise ValueError(f"{where}: the run line is not readable ({err})") from err
        if not words:
            raise ValueError(f"{where}: run must name a script")
        for assignment in _combinations(entry.get("foreach"), settings, where):
            values = {**settings, **assignment}
            argv = []
            for word in words:
                text = _fill(word, values, where)
                # A word that is one setting may hold several options.
                argv.extend(shlex.split(text) if re.fullmatch(r"\{\w+\}", word) else [text])
            steps.append(Step(_fill(entry["name"], values, where), argv, stage, bool(entry.get("summary"))))
    names = [step.name for step in steps]
    strange = next((n for n in names if "/" in n or n in ("", ".", "..") or not n.isprintable()), None)
    if strange is not None:
        raise ValueError(f"{path}: a step is called {strange!r}, which cannot be the name of a file: use letters and -")
    double = next((n for n, count in collections.Counter(names).items() if count > 1), None)
    if double is not None:
        raise ValueError(f"{path}: two steps are called {double!r}: put what differs into the name")
    for step in steps:
        step.script  # noqa: B018 (raises for what may not be started)
    _link(steps, settings["out"])
    return settings, steps


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
        return marker["key"] == _digest(step.argv)
    return marker["key"] == step.key and all(_unchanged(path, then) for path, then in marker["files"].items())


def _set_aside(out, step):
    """Before a step is done again: what it wrote moves to <out>/replaced, so that nothing old stays in its place."""
    if _read_marker(out, step) is None:
        return  # never finished: the command itself resumes
    root, target = os.path.normpath(out), Path(out) / REPLACED / f"{step.name}-{int(time.time() * 1e3)}"
    for path in sorted(step.writes):
        for place in [path, *glob.glob(glob.escape(path) + ".*")]:
            if place != root and os.path.lexists(place):
                target.mkdir(parents=True, exist_ok=True)
                os.replace(place, target / (os.path.basename(place) + "~"))  # no search for results finds it
    _marker(out, step).unlink(missing_ok=True)


def execute(out: str | Path, step: Step, load_scripts: Callable[[], dict]) -> str | None:
    """Run one step in this process, its output into <out>/logs/<name>.log; marks it done. Returns None or an error line.

    load_scripts: -> {file name: click command}.
    """
    log = Path(out) / "logs" / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.time()
    with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        print(shlex.join(step.argv), flush=True)
        try:
            if step.argv[0] == LAUNCHER:
                code = _launch(step, log)
            else:
                code = load_scripts()[step.script].main(step.argv[1:], prog_name=step.script, standalone_mode=False)
        except SystemExit as err:
            code = err.code
        except Exception as err:
            traceback.print_exc()
            message = err.format_message() if hasattr(err, "format_message") else str(err)
            return f"step {step.name}: {message or type(err).__name__} (see {log})"
    if code:
        return f"step {step.name} ended with code {code} (see {log})"
    record = {"key": step.key, "argv": step.argv, "seconds": round(time.time() - start, 3)}
    record["files"] = {path: _state(path) for path in _files(out, step)}
    write_json(_marker(out, step), record)
    return None


def _launch(step, log):
    """Run a step in several processes; its exit code."""
    argv = [str(ROOT / word) if word == step.script else word for word in step.argv[1:]]
    arguments = (argv, str(log), os.getpid())
    child = multiprocessing.get_context("spawn").Process(target=_torchrun, args=arguments, daemon=True)
    child.start()
    child.join()
    return child.exitcode


def _torchrun(argv, log, parent):
    """torchrun in a process of its own, its output and that of its workers into the file `log`."""
    from torch.distributed import run

    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    _exit_with(parent, lambda: os.kill(os.getpid(), signal.SIGTERM))  # the workers end with it
    run.main(argv)


def _exit_with(parent, end=lambda: os._exit(1)):
    """Start a thread that ends this process when `parent` is gone: an orphan would race against the resumed run."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        end()

    threading.Thread(target=watch, daemon=True).start()


def run(
    steps: list[Step], out: str | Path, load_scripts: Callable[[], dict], jobs: int = 1, progress: bool = True
) -> None:
    """Run the steps that are not done yet, stage by stage, `jobs` at a time. Raises ValueError at the first that fails.

    load_scripts: picklable function -> {file name: click command}.
    """
    unknown = next((s for s in steps if s.script not in load_scripts()), None)
    if unknown is not None:
        raise ValueError(f"step {unknown.name} runs {unknown.script}; known scripts: {', '.join(load_scripts())}")
    names = {step.name for step in steps if not is_done(out, step)}
    for step in steps:  # in order: what needs a step that is done again is done again
        if names and (step.summary or names & {other.name for other in step.needs}):
            names.add(step.name)
    todo = [step for step in steps if step.name in names]
    for step in todo:
        _set_aside(out, step)
    bar = tqdm(total=len(steps), initial=len(steps) - len(todo), unit="step", disable=not progress, file=sys.stderr)
    with bar, contextlib.ExitStack() as stack:
        pool = None
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // jobs)))
            pool = concurrent.futures.ProcessPoolExecutor(jobs, context, _exit_with, (os.getpid(),))
            stack.enter_context(pool)
        for _, group in itertools.groupby(todo, key=lambda step: step.stage):
            for step, error in _run_stage(list(group), out, load_scripts, pool):
                if error is not None:
                    if pool is not None:
                        pool.shutdown(cancel_futures=True)
                    raise ValueError(error)
                bar.set_postfix_str(step.name, refresh=False)
                bar.update()


def _run_stage(steps, out, load_scripts, pool):
    if pool is None:
        for step in steps:
            yield step, execute(out, step, load_scripts)
        return
    futures = {pool.submit(execute, out, step, load_scripts): step for step in steps}
    for future in concurrent.futures.as_completed(futures):
        try:
            yield futures[future], future.result()
        except concurrent.futures.process.BrokenProcessPool:
            yield futures[future], f"step {futures[future].name}: its process was killed; run again to go on"
