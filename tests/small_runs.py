"""Runs of a few seconds that several tests share. Imported by tests and by the scripts that they start."""

import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from click.testing import CliRunner

from training.config import make_config

ROOT = Path(__file__).parents[1]

NET = dict(channels=8, channels_per_head=8)
PERIODS = dict(total_nimg=2048, status_nimg=1024, snapshot_nimg=1024, checkpoint_nimg=1024)
CALM = dict(batch_size=128, rampup=0.01, workers=0, grid=False)


def assert_quick(work, seconds=1.0):
    """Of this process's own time: what a refusal takes. Once more where it took longer, since the first one may import."""
    for last in (False, True):
        before = time.process_time()
        result = work()
        spent = time.process_time() - before
        if spent < seconds:
            return result
        assert not last, f"{spent:.1f} seconds: {result}"


def small_config(data, **options):
    """A TrainingConfig of 16 steps on 8x8 digits; options win."""
    return make_config("digits8", **{"data": str(data), **NET, **PERIODS, **CALM, **options})


def small_command(data, outdir, *more):
    """The same run as a command line of train_edm2.py."""
    options = [f"--outdir={outdir}", f"--data={data}", "--preset=digits8", "--channels=8", "--channels-per-head=8"]
    options += ["--batch=128", "--duration=2Ki", "--status=1Ki", "--snapshot=1Ki", "--checkpoint=1Ki", "--rampup=0.01"]
    return [*options, "--workers=0", "--grid=False", "--device=cpu", *more]


def run(command, *arguments, code=0):
    """A click command as a user types it, without the time that a new interpreter takes; checks the code (or: one of)."""
    result = CliRunner().invoke(command, [str(a) for a in arguments])
    codes = code if isinstance(code, tuple) else [code]
    assert result.exit_code in codes, (result.exit_code, result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def python(*arguments, processes=1, code=0, **options):
    """`python ARGUMENTS` in the repository, or so many processes under torchrun; the exit code is checked."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    given = dict(cwd=ROOT, capture_output=True, text=True, timeout=300)
    done = subprocess.run([sys.executable, *launcher, *map(str, arguments)], **{**given, **options})
    assert done.returncode == code, done.stderr
    return done


def one_line(command, *arguments, says=()):
    """A mistake: exit code 2, and one line that says all of `says` (a text or several), progress aside. Returns the line."""
    result = run(command, *arguments, code=2)
    lines = [line for line in result.stderr.splitlines() if line.strip() and not re.search(r"/s\]|s/\w+\]", line)]
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    for part in [says] if isinstance(says, str) else says:
        assert part in lines[0], lines[0]
    return lines[0]


def final_state(run_dir, kimg=2):
    """The content of a checkpoint without the clock."""
    state = torch.load(Path(run_dir) / f"training-state-{kimg:07d}.pt", weights_only=True)
    state["state"].pop("elapsed")
    return state


def assert_identical(a, b, where="state"):
    """Plain containers and tensors equal in every bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{where}[{i}]")
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b), where
    else:
        assert a == b, where
