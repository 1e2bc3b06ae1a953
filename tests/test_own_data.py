"""A folder of photos as people have them, from the folder to the table, and the script that does it."""

import csv
import os
import shutil
import stat
import subprocess
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from small_runs import ROOT, one_line, python, run

import run_experiment
from dnnlib import experiment
from training.fit import title

CLASSES = ["Häuser, alt", "sea & sky", "10"]
KINDS = ["RGB", "L", "CMYK", "RGBA", "LA", "P", "1"]  # the first three as JPEG with an orientation, the others as PNG
YAML = ROOT / "experiments" / "own-data.yaml"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 photos of mixed sizes, modes and orientations in three class folders, with what file managers leave beside them."""
    root = tmp_path_factory.mktemp("own") / "my photos, 2024"
    rng = np.random.RandomState(0)
    for k, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        (root / name / "Thumbs.db").write_bytes(b"x")
        for i in range(20):
            width, height = rng.randint(9, 60, 2)
            waves = np.sin(np.arange(width) / (k + 1) + i)[None, :, None] + np.cos(np.arange(height) / 3)[:, None, None]
            pixels = np.clip(120 + 50 * waves + rng.randint(40, size=3), 0, 255).astype(np.uint8)
            kind, exif = KINDS[i % len(KINDS)], PIL.Image.Exif()
            exif[0x0112] = 1 + i % 8
            image = PIL.Image.fromarray(pixels).convert(kind)
            if KINDS.index(kind) < 3:
                image.save(root / name / f"é {i}.jpg", exif=exif)
            else:
                image.save(root / name / f"{i}.png")
    return root


def listed(photos, out, *more):
    command = [YAML, "--set", f"source={photos}", "--budget=smoke", f"--out={out}", "--list", *more]
    return {line.split()[2]: line.split()[1] for line in run(run_experiment.main, *command).stdout.splitlines()}


def test_from_the_folder_to_the_table(photos, tmp_path, monkeypatch):
    """In a place of its own, with the folder of results that is made by default."""
    place, held = tmp_path / "été, 1", tmp_path / "held"
    place.mkdir()
    monkeypatch.chdir(place)
    command = [ROOT / "run_experiment.py", YAML, "--set", f"source={photos}", "--budget=smoke", "--jobs=1"]
    printed = python(*command, cwd=place, timeout=None).stdout
    (out,) = Path("results").iterdir()
    assert "held-out denoising loss: multi better than single in" in printed
    assert "Both arms saw the same images: " in printed
    rows = list(csv.DictReader((out / "table.csv").open()))
    assert {r["source"] for r in rows} == {*(title(k, sorted(CLASSES)) for k in range(3)), "mean"} and {
        r["arm"] for r in rows
    } == {"multi", "single"}
    with PIL.Image.open(out / "comparison.png") as image:
        assert image.width > 800
    assert set(listed(photos, out).values()) == {"done"}
    shutil.copytree(photos, held)
    changed = experiment.load(
        YAML, "smoke", {"source": str(held), "out": str(out)}, {"classes": lambda path: [0, 1, 2]}
    )
    assert not experiment.is_done(out, changed[1][0])


def test_it_says_which_sources_it_found(photos, tmp_path):
    said = run(run_experiment.main, YAML, "--set", f"source={photos}", f"--out={tmp_path}", "--list").stderr
    assert said == "3 sources: 10: 20, Häuser, alt 20, sea & sky 20 (3 stray files ignored)\n"


def test_sources_are_those_of_the_folder_or_the_chosen_ones(photos, tmp_path):
    names = listed(photos, tmp_path)
    assert [n for n in names if n.startswith("train-single") and n.endswith("seed0")] == [
        f"train-single-{k}-seed0" for k in range(3)
    ]
    chosen = listed(photos, tmp_path, "--set", "sources=0,2")
    assert "train-single-2-seed0" in chosen and "train-single-1-seed0" not in chosen


def test_folders_that_are_no_sources(photos, tmp_path):
    call = [YAML, f"--out={tmp_path}/out"]
    one_line(run_experiment.main, *call, says=["source has no value", "--set source="])
    one_line(run_experiment.main, *call, "--set", "source=", says="--set source=")
    one_line(run_experiment.main, *call, "--set", f"source={tmp_path}/none", says=f"{tmp_path}/none")
    one_line(run_experiment.main, *call, "--set", f"source={photos / '10'}", says=["10", "class index", "sub-folders"])
    too_many = [*call, "--set", f"source={photos}", "--set", "per_source=18", "--jobs=1"]
    error = run(run_experiment.main, *too_many, code=2).stderr.splitlines()[-1]
    assert "--per-source=18" in error and "20 usable images" in error


def test_the_script_answers_before_the_set_up_and_hands_over_the_folder(photos, tmp_path):
    """In a copy with a stand-in for the environment's Python, which prints what it is given."""
    shutil.copytree(ROOT / "bash_files", tmp_path / "bash_files")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)

    def script(*words, code=0, **more):
        environment = {**os.environ, **more}
        command = ["bash", str(tmp_path / "bash_files" / "own_data.sh"), *words]
        done = subprocess.run(command, cwd=photos.parent, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done

    for words in (["--help"], [photos.name, "--help"]):
        assert "FOLDER [OPTIONS]" in script(*words, PYTHON="/none").stdout
    for words in ([], ["none"], ["--budget=smoke", photos.name]):
        error = script(*words, code=2, PYTHON="/none").stderr
        assert error.startswith("Error: FOLDER ") and error.count("\n") == 1
    assert not (tmp_path / ".venv").exists()

    fake = tmp_path / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    stamp = 'echo "$(cat requirements.txt pyproject.toml | cksum) cpu" > .venv/.set-up'
    subprocess.run(stamp, shell=True, cwd=tmp_path, check=True)
    words = script(photos.name, "--budget=smoke", "--set", "seeds=0,1").stdout.splitlines()
    given = ["--set", f"source={photos.resolve()}", "--budget=smoke", "--set", "seeds=0,1"]
    assert words == ["run_experiment.py", "experiments/own-data.yaml", *given]
