"""Running steps: in this process, in processes side by side, or under torchrun; interrupted, they go on where they were."""

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
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from dnnlib.experiment.steps import LAUNCHER, Step, is_done, mark_done, set_aside
from dnnlib.util import usable_cores

ROOT = Path(__file__).resolve().parents[2]  # where the scripts are


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
    mark_done(out, step, time.time() - start)
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
        set_aside(out, step)
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
