"""--profile: a table and a trace of the steps, and not one bit of the run changed."""

import gzip
import json
import re
import sys
import time

import pytest
import torch
from small_runs import assert_identical, final_state, run, small_command, small_config

import train_edm2
from training import setup
from training.profiling import PARTS, TRACE, StepProfile


def rows(text, names):
    """{name: [numbers]} of the lines of a table."""
    found = {m[1]: m[2] for m in re.finditer(r"^  (\S+) +([\d .%]+)$", text, re.M) if m[1] in names}
    return {name: [float(word.rstrip("%")) for word in numbers.split()] for name, numbers in found.items()}


@pytest.mark.parametrize(
    "more", [["--batch-gpu=64"], ["--select=jest", "--reference=ema", "--chunks=4", "--duration=1Ki"]]
)
def test_a_profile_changes_nothing(digits, tmp_path, more):
    for name in ("plain", "profiled"):
        flag = ["--profile"] if name == "profiled" else []
        done = run(train_edm2.main, *small_command(digits, tmp_path / name, "--dropout=0.1", *more, *flag))
    kimg = 1 if "--duration=1Ki" in more else 2
    assert_identical(final_state(tmp_path / "plain", kimg), final_state(tmp_path / "profiled", kimg))
    text = (tmp_path / "profiled" / "profile.txt").read_text()
    assert text in done.stdout and len(text.splitlines()) < 25
    steps = int(re.search(r"Profile of (\d+) steps of 128 images", text)[1])
    assert steps == (5 if kimg == 1 else 8)  # of 8 steps, after 3; of 16
    table = rows(text, PARTS)
    assert list(table) == list(PARTS)
    assert sum(row[1] for row in table.values()) == pytest.approx(100, abs=0.5)  # percent
    assert all(row[0] > 0 for row in table.values())
    assert (table["draw"][1] > 20) == ("--select=jest" in more)  # scores are part of the choice
    events = json.loads(gzip.decompress((tmp_path / "profiled" / TRACE).read_bytes()))["traceEvents"]
    spans = [
        event for event in events if event.get("name") == "step: forward" and event.get("cat") == "user_annotation"
    ]
    assert len(spans) == steps * (2 if "--batch-gpu=64" in more else 1)  # micro-batches
    assert sum(span["dur"] for span in spans) / 1e3 / steps == pytest.approx(table["forward"][0], rel=0.2)
    assert not (tmp_path / "plain" / "profile.txt").exists()


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(WAIT)
        return gradient


WAIT = 0.3  # seconds: more than any part takes by itself


@pytest.mark.parametrize("part", ["draw", "forward", "backward", "optimizer", "average"])
def test_each_part_is_what_it_takes(digits, tmp_path, monkeypatch, part):
    """A wait in a part shows there; what watches is gone afterwards."""
    run = setup.build(small_config(digits, total_nimg=192, batch_size=64, snapshot_nimg=0, status_nimg=0, block=64))

    def slow(function):
        return lambda *args, **kwargs: (time.sleep(WAIT), function(*args, **kwargs))[1]

    if part == "backward":
        run.objective.net.register_forward_hook(lambda module, inputs, out: (SlowBackward.apply(out[0]), out[1]))
    elif part == "optimizer":
        module = sys.modules["torch.optim.adam"]
        monkeypatch.setattr(module, "adam", slow(module.adam))
    else:
        owner, name = dict(
            draw=(run.objective.loss, "draw"), forward=(run.objective.net, "forward"), average=(run.ema, "update")
        )[part]
        setattr(owner, name, slow(getattr(owner, name)))
    own = vars(run.ema).get("update")
    with StepProfile(run, tmp_path, skip=1, steps=2) as profile:
        run.start(tmp_path / "run")
    assert profile.seconds[part] >= 2 * WAIT
    assert vars(run.ema).get("update") == own and not {"candidates", "minibatches"} & vars(run.selector).keys()
