"""Running steps: in this process, in processes side by side, or under torchrun; interrupted, they go on where they were.

SIGTERM, and SIGUSR1 of a batch system that needs the machine, end a run with the code 75: a training writes a checkpoint
first, other steps are lost.
"""

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from dnnlib.cli import INTERRUPTED
from dnnlib.experiment.steps import LAUNCHER, REPLACED, Step, mark_done, set_aside, to_do, was_done
from dnnlib.util import usable_cores

ROOT = Path(__file__).resolve().parents[2]  # where the scripts are
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
_told = []  # signals that have arrived in this process


class Stopped(str):
    """An error line of a step that was told to stop: the same command goes on."""


@contextlib.contextmanager
def _told_to_stop(react: Callable[[], None]) -> Iterator[None]:
    """Remember the signals that arrive, and react to them at once. Only in a main thread, where they are heard."""

    def handle(number, frame):
        _told.append(number)
        react()

    heard = SIGNALS if threading.current_thread() is threading.main_thread() else []
    before = [(number, signal.signal(number, handle)) for number in heard]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def execute(out: str | Path, step: Step, load_scripts: Callable[[], dict]) -> str | None:
    """Run one step in this process, its output into <out>/logs/<name>.log; marks it done. Returns None or an error line.

    load_scripts: -> {file name: click command}.
    """
    log = Path(out) / "logs" / f"{step.name}.log"
    if _told:
        return Stopped(f"step {step.name} was not begun")
    log.parent.mkdir(parents=True, exist_ok=True)
    start, end = time.time(), lambda: sys.exit(INTERRUPTED)
    with (
        open(log, "w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        print(shlex.join(step.argv), flush=True)
        try:
            with _told_to_stop(end):  # a training listens itself
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
    if code == INTERRUPTED:
        return Stopped(f"step {step.name} was stopped (see {log})")
    if code:
        return f"step {step.name} ended with code {code} (see {log})"
    mark_done(out, step, time.time() - start)
    return None


def _launch(step, log):
    """Run a step in several processes; its exit code."""
    argv = [str(ROOT / word) if word == step.script else word for word in step.argv[1:]]
    arguments = (argv, str(log), os.getpid())
    child = multiprocessing.get_context("spawn").Process(target=_torchrun, args=arguments, daemon=True)
    child.start()
    try:
        child.join()
    except SystemExit:
        child.terminate()  # torchrun tells its workers
        child.join()
        raise
    return child.exitcode


def _torchrun(argv, log, parent):
    """torchrun in a process of its own, its output and that of its workers into the file `log`."""
    from dnnlib.launch import main

    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    _exit_with(parent, lambda: os.kill(os.getpid(), signal.SIGTERM))  # the workers end with it
    main(argv)


def _exit_with(parent, end=lambda: os._exit(1)):
    """Start a thread that ends this process when `parent` is gone: an orphan would race against the resumed run."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        end()

    threading.Thread(target=watch, daemon=True).start()


def share(gpus: Sequence[str], jobs: int, index: int) -> list[str]:
    """The GPUs of one of `jobs` processes: every jobs-th, one at least, which others share where there are too few."""
    return [gpus[i % len(gpus)] for i in range(index, max(index + 1, len(gpus)), jobs)] if gpus else []


def default_jobs(steps: Sequence[Step], gpus: Sequence[str]) -> int:
    """Steps side by side: as many as have all the GPUs that they start processes on; without GPUs a core each, at most 8."""
    most = max((step.processes(len(gpus)) for step in steps), default=1)
    return max(1, len(gpus) // most) if gpus else max(1, min(usable_cores(), 8) // most)


def _begin(parent, places, variables):
    """Of a process that steps will run in: it ends with its parent, and sees the GPUs of one of the places."""
    _exit_with(parent)
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: _told.append(number))
    os.environ.update(variables)
    if visible := places.get():
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible)


def run(
    steps: list[Step],
    out: str | Path,
    load_scripts: Callable[[], dict],
    jobs: int = 1,
    progress: bool = True,
    gpus: Sequence[str] = (),
) -> None:
    """Run the steps that are not done yet, stage by stage, `jobs` at a time. Raises ValueError at the first that fails.

    load_scripts: picklable function -> {file name: click command}. gpus: names of those that the jobs have to share (see
    `share`). Ends the program with the code 75 where a signal stopped it.
    """
    unknown = next((s for s in steps if s.script not in load_scripts()), None)
    if unknown is not None:
        raise ValueError(f"step {unknown.name} runs {unknown.script}; known scripts: {', '.join(load_scripts())}")
    todo = to_do(out, steps)
    large = max(todo, key=lambda step: step.processes(len(gpus)), default=None)
    if jobs > 1 and gpus and large and (wanted := large.processes(len(gpus))) > (given := len(share(gpus, jobs, 0))):
        raise ValueError(
            f"--jobs={jobs}: step {large.name} starts {wanted} processes on {given} of {len(gpus)} GPUs: lower it"
        )
    _told.clear()
    if again := [step.name for step in todo if not step.summary and was_done(out, step)]:
        shown = ", ".join(again[:3]) + (f" and {len(again) - 3} more" if len(again) > 3 else "")
        print(
            f"Done again, since command, inputs or outputs changed: {shown} (earlier results: {out}/{REPLACED})",
            file=sys.stderr,
        )
    for step in todo:
        set_aside(out, step)
    bar = tqdm(total=len(steps), initial=len(steps) - len(todo), unit="step", disable=not progress, file=sys.stderr)
    tell_all = lambda: [child.terminate() for child in multiprocessing.active_children()]
    with bar, contextlib.ExitStack() as stack:
        pool = None
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, usable_cores() // jobs)))}
            places = context.SimpleQueue()
            for index in range(jobs):
                places.put(share(gpus, jobs, index))
            pool = concurrent.futures.ProcessPoolExecutor(jobs, context, _begin, (os.getpid(), places, threads))
            stack.enter_context(pool)
        stack.enter_context(_told_to_stop(tell_all))
        for _, group in itertools.groupby(todo, key=lambda step: step.stage):
            for step, error in _run_stage(list(group), out, load_scripts, pool):
                if error is not None:
                    if pool is not None:
                        pool.shutdown(cancel_futures=True)
                    if _told or isinstance(error, Stopped):
                        print(f"Stopped: {error}; run the same command again to go on", file=sys.stderr, flush=True)
                        sys.exit(INTERRUPTED)
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
