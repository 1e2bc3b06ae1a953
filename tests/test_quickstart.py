"""The commands a newcomer types, at smoke size, start to end, interrupted and resumed."""

import csv
import hashlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time

import PIL.Image
import pytest
from small_runs import ROOT, python, run

import report
import run_experiment
from dnnlib import experiment
from dnnlib.util import read_stats
from training.dataset import ImageFolderDataset


def command(name, out, *more):
    return ["run_experiment.py", f"experiments/{name}.yaml", "--budget=smoke", f"--out={out}", *more]


def markers(out):
    return {p.stem: p.stat().st_mtime_ns for p in (out / "steps").glob("*.json")}


def test_quickstart(tmp_path):
    """README's variation with its own output folder, in a place whose name holds what shells and option lists trip over."""
    place = tmp_path / "my runs, é=1"
    place.mkdir()
    given = [ROOT / "run_experiment.py", "experiments/quickstart.yaml", "--budget=smoke", "--jobs=1"]
    given += ["--set", "sources=0,1", "--set", "per_source=25"]
    printed = python(*given, cwd=place, timeout=None).stdout
    (tmp_path,) = (place / "results").iterdir()
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
    python(*given, cwd=place)
    assert markers(tmp_path) == before, "the second run did steps again"
    run(report.main, tmp_path, f"--out={tmp_path / 'report.html'}")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'type="radio" name="arm-1" value="([^"]*)"', page) == ["multi", "single", "real images"]
    assert json.loads(re.search(r'data-at="([^"]*)"', page)[1]) == [
        0.5,
        1.0,
        2.0,
        None,
    ]  # thousand images of each source
    assert "Held-out denoising loss: multi better than single in" in page


def test_multi_vs_single_interrupted_twice(tmp_path):
    """Killed twice on the way, the same command finishes, and no completed step is done again."""
    for seconds in (12, 12):
        arguments = [sys.executable, *command("multi-vs-single", tmp_path, "--jobs=1")]
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen(arguments, cwd=ROOT, start_new_session=True, **silent)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        before = markers(tmp_path)
    printed = python(*command("multi-vs-single", tmp_path, "--jobs=1"), timeout=None).stdout
    after = markers(tmp_path)
    assert before.items() <= after.items(), "a completed step was done again"
    listed = python(*command("multi-vs-single", tmp_path, "--list")).stdout
    assert listed.count(" done ") == len(after) and " todo " not in listed
    groups = {line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")}
    assert {"real", "shuffled", "again", "more sources (bits per doubling of K)"} <= groups
    assert len(list(csv.DictReader((tmp_path / "contrasts.csv").open()))) == 5
    lines = list(csv.DictReader((tmp_path / "seeds.csv").open()))
    assert len(lines) == 2 * (3 * 6 + 3 + 6) and all(float(line["best_kimg"]) > 0 for line in lines)


def test_no_image_is_in_two_parts(tmp_path):
    """Training, validation and test images of every seed share none, by the hash of their pixels."""
    settings, steps = experiment.load(ROOT / "experiments" / "multi-vs-single.yaml", "smoke", {"out": str(tmp_path)})
    made = ("base", "pool-real-seed0", "pool-shuffled-seed0", "test-real-seed0", "test-shuffled-seed0")
    made += ("data-real-all-n25-seed0", "data-real-all-n100-seed0", "data-shuffled-all-n25-seed0")
    experiment.run([step for step in steps if step.name in made], tmp_path, run_experiment.load_scripts, progress=False)
    hashes = lambda name: {
        hashlib.sha256(image.tobytes()).hexdigest() for image, _ in ImageFolderDataset(tmp_path / name)
    }
    for pool in ("real", "shuffled"):
        train = hashes(f"data/{pool}-all-n25-seed0.zip")
        val, test, rest = (hashes(f"data/{pool}-{part}-seed0.zip") for part in ("val", "test", "rest"))
        assert train and val and test <= rest and not (train & val or train & rest or val & rest)
    assert hashes("data/real-all-n25-seed0.zip") < hashes("data/real-all-n100-seed0.zip")
    sources = [ImageFolderDataset(tmp_path / f"data/{pool}-all-n25-seed0.zip") for pool in ("real", "shuffled")]
    assert sources[0].sources == sources[1].sources == [0, 1, 2]


@pytest.mark.slow
def test_joint_mnist(tmp_path):
    """The comparison of networks of the whole state runs through, and its contrasts are those of the per-seed numbers."""
    settings, steps = experiment.load(ROOT / "experiments" / "joint-mnist.yaml", "smoke", {"out": str(tmp_path)})
    experiment.run(steps, tmp_path, run_experiment.load_scripts, progress=False)
    rows = list(csv.DictReader((tmp_path / "own.csv").open()))
    assert {r["arm"] for r in rows} == {
        f"{f}-{k}" for f in ("reduced", "joint-denoiser", "joint") for k in ("cld", "learned2")
    }
    assert len(rows) == 12 and all(float(r["bits_per_dim"]) > 0 and float(r["fd"]) > 0 for r in rows)
    tested = {r["contrast"]: float(r["effect"]) for r in csv.DictReader((tmp_path / "contrasts.csv").open())}
    assert len(tested) == 8
    mean = lambda form, name: statistics.fmean(
        float(r[name]) for r in rows if r["arm"] in (f"{form}-cld", f"{form}-learned2")
    )
    for name, says in (
        ("bits_per_dim", "joint, as MDM, against reduced (bits/dim, own bound)"),
        ("fd", "joint, as MDM, against reduced (FD)"),
    ):
        assert math.isclose(tested[says], mean("reduced", name) - mean("joint", name), rel_tol=1e-6)


@pytest.mark.slow
def test_learned_start(tmp_path):
    """Learned matrices beside the same ones held: these stay as they were, those move and are a process at every line."""
    settings, steps = experiment.load(ROOT / "experiments" / "learned-start.yaml", "smoke", {"out": str(tmp_path)})
    experiment.run(steps, tmp_path, run_experiment.load_scripts, progress=False)
    for arm in ("learned", "held"):
        lines = read_stats(tmp_path / "runs" / f"{arm}-seed1")
        assert len(lines) > 10 and all(line["Process/min_eigenvalue"] > 0 for line in lines)
        assert (len({line["Process/Q01"] for line in lines}) == 1) == (arm == "held")
    rows = list(csv.DictReader((tmp_path / "contrasts.csv").open()))
    assert len(rows) == 4 and all(math.isfinite(float(row["effect"])) for row in rows)
