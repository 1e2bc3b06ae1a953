"""Dry runs: of a training and of an experiment; they refuse what the real run would, and say what it would take."""

import json
import re
import shutil

import numpy as np
import PIL.Image
import psutil
import pytest
from small_runs import ROOT, one_line, run, small_command

import dataset_tool
import run_experiment
import train_edm2
from dnnlib import experiment
from training import cost, dry_run, presets, setup
from training.config import make_config

DIGITS = {"img_resolution": 8, "img_channels": 1, "label_dim": 10}


@pytest.fixture(autouse=True)
def known_rate(monkeypatch):
    """The measurement of this machine is tested in test_cost.py."""
    monkeypatch.setattr(cost, "measured_rate", lambda *args: (1e9, "nothing"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 32x32 photos without labels."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.RandomState(0)
    for i in range(3):
        PIL.Image.fromarray(rng.randint(0, 256, [32, 32, 3], np.uint8)).save(root / f"{i}.png")
    return root


def trial(*words, **options):
    return run(train_edm2.main, *words, "--dry-run", **options)


def test_it_says_what_the_run_takes(digits, tmp_path):
    command = small_command(digits, tmp_path / "run")
    done = trial(*command)
    assert json.loads(done.stdout.rpartition("Dry run")[0])["channels"] == 8
    sizes = dict(channels=8, channels_per_head=8, batch_size=128)
    periods = dict(total_nimg=2048, snapshot_nimg=1024, checkpoint_nimg=1024)
    found = cost.of_run(make_config("digits8", data=str(digits), **sizes, **periods), DIGITS)
    assert f"Estimate: {found.parameters:,} parameters" in done.stderr
    assert "data: 48 images, 8x8x1 pixels, 3 of 10 sources" in done.stderr
    assert "16 steps of 128 images, 2,048 in all" in done.stderr
    assert f"disk: {found.disk_bytes / 1e9:.3g} GB of" in done.stderr and "3 snapshots, 2 checkpoints" in done.stderr
    hours = found.images * found.training_flops / 1e9 / 3600
    assert f"one H100 1 seconds, this machine {cost.duration(hours)}" in re.sub(r"H100 \d+", "H100 1", done.stderr)
    assert not (tmp_path / "run").exists()


def test_it_refuses_what_the_run_refuses(digits, photos, tiny_vae, tmp_path, monkeypatch):
    """The same line as the real run's, and nothing is written."""
    small = lambda data, *more: [*small_command(data, tmp_path / "run"), *more]
    for words, says in {
        (*small(tmp_path / "none.zip"),): "none.zip",
        (*small(photos),): "has no labels: give --cond=False",
        (*small(digits, "--channel-mult=1,1,1,1,1"),): "img_resolution=8",
        (*small(digits, f"--val-data={photos}"),): f"--val-data={photos}",
        (*small(digits, f"--init={tmp_path}/none.safetensors"),): "none.safetensors",
        (*small(digits, "--select=jest"),): "reference",
        (*small(digits, "--eval-every=1Ki", f"--eval-ref={tmp_path}/none.npz"),): "none.npz",
        (*small(digits, "--resume=none.pt"),): "none.pt",
    }.items():
        line = trial(*words, code=2).stderr.splitlines()[-1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(setup.Run, "start", lambda *args: pytest.fail("it would start"))
            assert one_line(train_edm2.main, *words, says=says) == line
        assert not (tmp_path / "run").exists()


def test_it_warns_of_pixels_for_a_preset_of_latents(photos, tiny_vae, tmp_path):
    sizes = ["--channels=8", "--channels-per-head=8", "--num-blocks=1", "--channel-mult=1", "--batch-gpu=1"]
    words = [
        f"--outdir={tmp_path}/run",
        f"--data={photos}",
        "--cond=False",
        "--preset=edm2-img512-xs",
        *sizes,
        "--device=cpu",
    ]
    done = trial(*words, code=(0, 2))
    assert "--preset=edm2-img512-xs is for latents (dataset_tool.py encode), and the data are pixels" in done.stderr
    zipped = tmp_path / "latents.zip"
    run(dataset_tool.main, "encode", f"--source={photos}", f"--dest={zipped}", f"--vae={tiny_vae[0]}")
    done = trial(*words[:1], f"--data={zipped}", *words[2:], code=(0, 2))
    assert "Warning" not in done.stderr and "16x16x4 latents, no labels" in done.stderr
    assert presets.misfit("small32", dict(img_channels=4)) and not presets.misfit("", dict(img_channels=4))


def test_it_refuses_what_does_not_fit_in_memory_or_on_the_disk(digits, tmp_path, monkeypatch):
    command = small_command(digits, tmp_path / "run", "--batch=512", "--duration=4Ki")
    config = make_config("digits8", data=str(digits), channels=8, channels_per_head=8, batch_size=512)
    estimated = dry_run._plan(config, DIGITS, 0, "cpu", 1)["memory_gb"]
    enough = estimated["state"] + 100 * estimated["per_image"]
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=enough * 1e9))
    assert "give --batch-gpu=64" in trial(*command, code=2).stderr.splitlines()[-1]
    trial(*command, "--batch-gpu=64")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    error = trial(*command, code=2).stderr.splitlines()[-1]
    assert "the run writes" in error and "1e-06 GB are free" in error


def test_of_an_experiment(tmp_path):
    """Every step is parsed, the first are tried, trainings are planned for data that are not there yet; nothing is written."""
    call = ["--budget=smoke", f"--out={tmp_path}/out", "--dry-run"]
    said = run(run_experiment.main, ROOT / "experiments" / "quickstart.yaml", *call).stdout
    _, steps = experiment.load(ROOT / "experiments" / "quickstart.yaml", "smoke", {"out": f"{tmp_path}/out"})
    assert f"{len(steps)} of {len(steps)} steps to do" in said
    assert "2 x train-multi-seed0: digits8, 32 steps, 2,048 images" in said and "4 x train-single-0-seed0" in said
    assert "Training in all: 12,288 images, one H100 " in said and ", this machine " in said
    assert not (tmp_path / "out").exists()


def test_data_sets_of_an_experiment_count_on_the_disk(tmp_path, monkeypatch):
    """The first as its dry run has it, the second, of the first, by reckoning: 30 of 8x8 and the rest."""
    path, first = tmp_path / "x.yaml", "dataset_tool.py convert --source=sklearn:digits --dest={out}/d.zip"
    parts = "--sources=0,1,2 --per-source=10 --dest={out}/e.zip --holdout={out}/h.zip"
    second = f"dataset_tool.py convert --source={{out}}/d.zip {parts}"
    path.write_text(
        f"settings: {{out: {tmp_path}/out}}\nsteps:\n  - {{name: one, run: '{first}'}}\n  - {{name: two, run: '{second}'}}"
    )
    call = [path, "--dry-run", "--seconds=0"]
    said = [float(line.split(": ")[1].split()[0]) for line in run(run_experiment.main, *call).stdout.splitlines()[1:3]]
    run(run_experiment.main, path, "--jobs=1")
    size = lambda *names: sum((tmp_path / "out" / f"{name}.zip").stat().st_size for name in names) / 1e9
    assert said == [pytest.approx(size("d"), rel=0.1), pytest.approx(size("e", "h"), rel=0.1)]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    shutil.rmtree(tmp_path / "out")
    assert (
        run(run_experiment.main, *call, code=2).stderr.splitlines()[-1].startswith("Error: the steps write 0.000686 GB")
    )


@pytest.mark.parametrize(
    "line, says",
    [
        ("train_edm2.py --outdir={out}/r --data={out}/d.zip --preset=digits8 --chanels=8", "step two: No such option"),
        ("train_edm2.py --outdir={out}/r --data={out}/d.zip --preset=digits9", "digits9"),
        ("train_edm2.py --outdir={out}/r --data=none.zip --preset=digits8", "step two: .*none.zip"),
        ("calculate_metrics.py reff --data={out}/d.zip", "step two: no such command: reff"),
        (
            "calculate_metrics.py ref --data={out}/d.zip --dest={out}/r.npz --metrics=fid",
            "step two: detector 'fid' .* needs",
        ),
        ("calculate_metrics.py ref --data={out}/d.zip --dest={out}/r.npz --metrics=fad", "step two: .*'fad'"),
        ("dataset_tool.py convert --source=nowhere --dest={out}/e.zip", "step two: .*nowhere"),
        ("nothing.py", "step two runs nothing.py"),
    ],
)
def test_an_experiment_that_would_fail_is_refused(tmp_path, line, says):
    path = tmp_path / "x.yaml"
    first = "dataset_tool.py convert --source=sklearn:digits --per-source=2 --dest={out}/d.zip"
    path.write_text(
        f"settings: {{out: {tmp_path}/out}}\nsteps:\n  - {{name: one, run: '{first}'}}\n"
        f"  - name: two\n    run: >-\n      {line}\n"
    )
    assert re.search(says, one_line(run_experiment.main, path, "--dry-run", "--seconds=0"))
    assert not (tmp_path / "out").exists()
