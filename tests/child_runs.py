"""Command lines in children of a process that has imported everything: quick to start, and free to be killed.

A child may be told to die at a chosen moment (see `arm`); nothing in the program knows of it.
"""

import fnmatch
import multiprocessing
import os
import pathlib
import resource
import signal
import socket
import sys

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "scipy", "train_edm2", "training.setup", "training.hooks", "training.generation"]
    + [
        "calculate_metrics",
        "dataset_tool",
        "generate_images",
        "metrics.classifier",
        "metrics.evaluate",
        "sklearn.datasets",
    ]
)


def arm(moment):
    """Send this process a signal at a moment: (signal, what, pattern or count).

    what: "step" (count-th optimizer step), "item" (count-th of a data set), "half-written" (a file with such a name is cut in
    half before it is renamed), "before-rename", "after-rename", "before-removal", "after-removal" (of a file of such a name).
    """
    number, what, which = moment

    def strike():
        os.kill(os.getpid(), number)

    def matches(path):
        return fnmatch.fnmatch(os.path.basename(str(path)), which)

    if what == "step":
        from training.training_loop import TrainingLoop

        original, count = TrainingLoop._apply_gradients, [0]

        def apply_gradients(self, *args):
            count[0] += 1
            if count[0] == which:
                strike()
            return original(self, *args)

        TrainingLoop._apply_gradients = apply_gradients
    elif what == "item":
        from training.dataset.writing import DatasetWriter

        added, items = DatasetWriter.add, [0]

        def add(self, *args):
            added(self, *args)
            items[0] += 1
            if items[0] == which:
                strike()

        DatasetWriter.add = add
    elif "removal" in what:
        original_unlink = pathlib.Path.unlink

        def unlink(self, *args, **kwargs):
            if what.startswith("before") and matches(self):
                strike()
            original_unlink(self, *args, **kwargs)
            if what.startswith("after") and matches(self):
                strike()

        pathlib.Path.unlink = unlink
    else:
        original_replace = os.replace

        def replace(source, target, **kwargs):
            if what == "half-written" and matches(target):
                if number == signal.SIGKILL:
                    os.truncate(source, os.path.getsize(source) // 2)
                strike()
            if what == "before-rename" and matches(target):
                strike()
            original_replace(source, target, **kwargs)
            if what == "after-rename" and matches(target):
                strike()

        os.replace = replace


def child(script, arguments, log, moment, env, file_limit):
    """Runs in the child."""
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    import torch

    torch.set_num_threads(1)
    os.environ.update(env)
    if moment is not None:
        arm(moment)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    module = __import__(script)
    command = getattr(module, "main", None) or module.cmdline
    command.main([str(a) for a in arguments], prog_name=script)


def start(script, arguments, log, moment=None, env=None, file_limit=None):
    """Start `script`.py with arguments; its output goes to the file `log`. Returns the process."""
    process = CONTEXT.Process(target=child, args=(script, list(arguments), str(log), moment, env or {}, file_limit))
    process.start()
    return process


def wait(process, timeout=240):
    """Exit code, negative for a signal."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError("the process did not end")
    return process.exitcode


def run(script, arguments, log, **options):
    """(exit code, output) of a command line."""
    code = wait(start(script, arguments, log, **options))
    return code, pathlib.Path(log).read_text()


def ranks(count):
    """The environment variables of `count` processes as torchrun sets them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return [dict(common, RANK=str(r), LOCAL_RANK=str(r)) for r in range(count)]
