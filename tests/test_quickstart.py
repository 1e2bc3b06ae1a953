"""The commands a newcomer types, at smoke size: the quickstart and the grid, start to end, interrupted and resumed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import PIL.Image
from small_runs import ROOT, python


def command(name, out, *more):
    return ["run_experiment.py", f"experiments/{name}.yaml", "--budget=smoke", f"--out={out}", *more]


def markers(out):
    return {p.stem: p.stat().st_mtime_ns for p in (out / "steps").glob("*.json")}


def test_quickstart(tmp_path):
    printed = python(*command("quickstart", tmp_path, "--jobs=1"), timeout=None).stdout
    assert "multi better than single in" in printed
    assert "Both arms saw the same images" in printed
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [(r["source"], r["arm"]) for r in rows] == [(s, a) for s in ("0", "1", "mean") for a in ("multi", "single")]
    assert all(float(r["fd"]) > 0 and 0 <= float(r["agreement"]) <= 1 for r in rows)
    log = (tmp_path / "logs" / "detector.log").read_text()
    detector = json.JSONDecoder().raw_decode(log[log.index("{") :])[0]
    assert detector["accuracy"] >= 0.97, "the detector must know its digits"
    with PIL.Image.open(tmp_path / "comparison.png") as image:
        assert image.width > 800
    before = markers(tmp_path)
    python(*command("quickstart", tmp_path, "--jobs=1"))
    assert markers(tmp_path) == before, "the second run did steps again"


def test_grid_interrupted_twice(tmp_path):
    """Killed twice on the way, the same command finishes, and no completed step is done again."""
    for seconds in (12, 12):
        arguments = [sys.executable, *command("grid", tmp_path, "--jobs=1")]
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen(arguments, cwd=ROOT, start_new_session=True, **silent)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        before = markers(tmp_path)
    printed = python(*command("grid", tmp_path, "--jobs=1"), timeout=None).stdout
    after = markers(tmp_path)
    assert before.items() <= after.items(), "a completed step was done again"
    listed = python(*command("grid", tmp_path, "--list")).stdout
    assert listed.count(" done ") == len(after) and " todo " not in listed
    assert printed.count("both arms saw the same images") == 3 and "WARNING" not in printed
    groups = {line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")}
    assert {"control-self", "control-shuffled", "all"} <= groups
