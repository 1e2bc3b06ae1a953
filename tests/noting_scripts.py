"""Scripts of a line for experiments in tests, without the time that torch takes to import."""

import os
import pathlib
import signal
import sys
import time

import click


@click.command()
@click.option("--text", default="")
@click.option("--source")
@click.option("--dest", required=True)
@click.option("--beside", help="Wait for this file")
def note(text, source, dest, beside):
    """Write a text, and which GPUs are visible."""
    dest = pathlib.Path(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    dest.write_text(f"{text} {os.environ.get('CUDA_VISIBLE_DEVICES')}")
    while beside and not os.path.exists(beside):
        time.sleep(0.05)


@click.command()
@click.option("--dest", required=True)
@click.option("--deaf", is_flag=True)
def wait(dest, deaf):
    """Like a training: stops at a signal with the code 75; the second time it finishes. --deaf: a step that does not listen."""
    dest, begun = pathlib.Path(dest), pathlib.Path(f"{dest}-begun")
    if begun.exists():
        dest.write_text("done")
        return None
    told = []
    if not deaf:
        for name in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(name, lambda number, frame: told.append(number))
    begun.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text(str(os.getpid()))
    for _ in range(600):
        time.sleep(0.05)
        if told:
            return 75
    return 1


def load():
    return {"note.py": note, "wait.py": wait}


if __name__ == "__main__":  # FILE OUT JOBS
    from dnnlib import experiment

    settings, steps = experiment.load(sys.argv[1], overrides={"out": sys.argv[2]})
    import noting_scripts

    experiment.run(steps, settings["out"], noting_scripts.load, int(sys.argv[3]), progress=False)
