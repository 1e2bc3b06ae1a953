"""What commands write: never over what they read, never over another kind, never nothing over something; leftovers; locks."""

import json
import os
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import convert_digits
from small_runs import one_line, run, small_command

import calculate_metrics
import convert_snapshot
import dataset_tool
import generate_images
import reconstruct_phema
import run_experiment
import train_edm2
from dnnlib import outputs, util
from simulations import run_bounds, run_solvers, run_stable_targets, run_toy
from torch_utils.persistence import save_snapshot
from training.networks_edm2 import Precond

SCRIPTS = {
    "metrics": calculate_metrics.cmdline,
    "tool": dataset_tool.main,
    "generate": generate_images.main,
    "train": train_edm2.main,
    "snapshot": convert_snapshot.main,
    "averages": reconstruct_phema.main,
    "experiment": run_experiment.main,
    "bounds": run_bounds.main,
    "solvers": run_solvers.main,
    "targets": run_stable_targets.main,
    "toy": run_toy.main,
}


TINY = ["--channel-mult=1", "--attn-resolutions=1", "--duration=128", "--snapshot=0", "--checkpoint=0"]


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full([8, 8], value, dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def one_of_each(tmp_path_factory):
    """A folder with an output of every kind, and what is none: text, photos."""
    root = tmp_path_factory.mktemp("kinds")
    convert_digits(root / "data.zip", per_source=4)
    convert_digits(root / "data", per_source=4)
    torch.manual_seed(0)
    net = Precond(8, 1, 10, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8)
    save_snapshot(root / "net.safetensors", net)
    data, device = f"--data={root / 'data.zip'}", "--device=cpu"
    run(calculate_metrics.cmdline, "ref", data, f"--dest={root / 'ref.npz'}", device)
    run(calculate_metrics.cmdline, "detector", data, f"--dest={root / 'det.safetensors'}", "--epochs=1", device)
    scores = ["calc", f"--images={root / 'data'}", data, "--distances=fd", device]
    run(calculate_metrics.cmdline, *scores, f"--dest={root / 'scores.json'}", "--tag=arm=a", "--tag=seed=0")
    generate = [f"--net={root / 'net.safetensors'}", "--seeds=0-2", "--steps=1", device]
    run(generate_images.main, *generate, f"--outdir={root / 'images'}")
    run(train_edm2.main, *small_command(root / "data.zip", root / "run", *TINY))
    np.savez(root / "stats.npz", mu=np.zeros(3), sigma=np.eye(3))
    (root / "notes.txt").write_text("years of work")
    (root / "settings.json").write_text('{"a": 1}')
    picture(root / "photo.png")
    picture(root / "photos" / "cat" / "a.png")
    (root / "photos" / "cat" / "story.txt").write_text("of the cat")
    picture(root / "labelled" / "cat" / "a.png")
    (root / "labelled" / "story.txt").write_text("of the cat")
    (root / "labelled" / "dataset.json").write_text('{"labels": [["cat/a.png", 0]]}')
    (root / "e.yaml").write_text("steps: [{name: a, run: dataset_tool.py --help}]")
    return root


@pytest.fixture
def w(one_of_each, tmp_path):
    """A copy."""
    return shutil.copytree(one_of_each, tmp_path / "w")


def state(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(w, script, *words, says=()):
    before = state(w)
    line = one_line(SCRIPTS[script], *(word.replace("W/", f"{w}/") for word in words), says=says)
    assert state(w) == before, line
    return line


CPU = "--device=cpu"
GENERATE = ["generate", "--net=W/net.safetensors", "--seeds=0-2", "--steps=1", CPU]
CONVERT = ["tool", "convert", "--source=sklearn:digits"]
CALC = ["metrics", "calc", "--images=W/data", "--data=W/data.zip", "--distances=fd", CPU]
TRAIN = ["train", *small_command("W/data.zip", "OUT")[1:]]

# Every option that names an output, beside every option that names an input: (what is typed, the other option).
INPUTS = [
    (["metrics", "calc", "--images=W/data", "--data=W/data.zip", "--dest=W/data.zip"], "--data"),
    (["metrics", "calc", "--images=W/data.zip", "--ref=W/ref.npz", "--dest=W/data.zip"], "--images"),
    (["metrics", "calc", "--images=W/data", "--ref=W/ref.npz", "--dest=W/ref.npz"], "--ref"),
    (["metrics", "calc", "--images=W/data", "--ref=W/ref.npz", "--train=W/data.zip", "--dest=W/data.zip"], "--train"),
    ([*CALC, "--metrics=pixel,classifier:W/det.safetensors", "--dest=W/det.safetensors"], "--metrics"),
    ([*CALC, "--dest=W/data/dataset.json"], "--images"),
    ([*CALC, "--dest=W/data/deep/s.csv"], "--images"),
    (["metrics", "ref", "--data=W/data", "--dest=W/data/ref.npz"], "--data"),
    (["metrics", "ref", "--data=W/data.zip", "--metrics=classifier:W/ref.npz", "--dest=W/ref.npz"], "--metrics"),
    (["metrics", "detector", "--data=W/data.zip", "--dest=W/data.zip"], "--data"),
    (["metrics", "detector", "--data=W/data", "--holdout=W/data.zip", "--dest=W/data.zip"], "--holdout"),
    (["metrics", "gen", "--net=W/net.safetensors", "--data=W/data", "--dest=W/net.safetensors"], "--net"),
    (["metrics", "loss", "--net=W/net.safetensors", "--data=W/data", "--dest=W/net.safetensors"], "--net"),
    (["metrics", "likelihood", "--net=W/net.safetensors", "--data=W/data.zip", "--dest=W/data.zip"], "--data"),
    (["metrics", "report", "--scores=W/s*.json", "--real=W/data", "--dest=W/data"], "--real"),
    ([*CONVERT[:2], "--source=W/data.zip", "--dest=W/data.zip", "--overwrite"], "--source"),
    ([*CONVERT[:2], "--source=W/data", "--dest=W/data", "--overwrite"], "--source"),
    ([*CONVERT[:2], "--source=W/photos", "--dest=W/photos/small"], "--source"),
    ([*CONVERT[:2], "--source=W/photos", "--dest=W/photos/cat/small.zip"], "--source"),
    ([*CONVERT[:2], "--source=W/data/00000", "--dest=W/data", "--overwrite"], "--source"),
    ([*CONVERT, "--per-source=9", "--dest=W/new", "--holdout=W/new"], "--holdout"),
    ([*CONVERT, "--per-source=9", "--dest=W/new", "--holdout=W/new/held.zip"], "--holdout"),
    ([*CONVERT[:2], "--source=W/data.zip", "--per-source=2", "--dest=W/n.zip", "--holdout=W/data.zip"], "--source"),
    (["tool", "encode", "--source=W/data.zip", "--dest=W/data.zip", "--overwrite"], "--source"),
    (["tool", "decode", "--source=W/data", "--dest=W/data", "--overwrite"], "--source"),
    (["generate", "--net=W/net.safetensors", "--outdir=W/net.safetensors"], "--net"),
    (["train", "--data=W/data", "--outdir=W/data"], "--data"),
    (["train", "--data=W/data", "--outdir=W/data/run"], "--data"),
    (["train", "--data=W/data.zip", "--val-data=W/photos", "--outdir=W/photos/run"], "--val-data"),
    (["train", "--data=W/data.zip", "--init=W/net.safetensors", "--outdir=W/net.safetensors"], "--init"),
    (["snapshot", "--net=W/net.safetensors", "--dest=W/net.safetensors"], "--net"),
    (["snapshot", "--net=W/net.safetensors", "--folder", "--dest=W/net.safetensors"], "--net"),
    (["averages", "--indir=W/run", "--outstd=0.1", "--outdir=W/run"], "--indir"),
    (["experiment", "W/e.yaml", "--out=W/e.yaml"], "FILE"),
    (["targets", "--net=W/net.safetensors", "--data=W/data.zip", "--dest=W/net.safetensors"], "--net"),
    (["targets", "--net=x=W/run", "--data=W/photos", "--dest=W/photos/t.csv"], "--data"),
]  # fmt: skip


@pytest.mark.parametrize("words, option", INPUTS, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_an_input_is_never_an_output(w, words, option):
    refused(w, *words, says=["--holdout" if "--holdout=W/data.zip" in words and option == "--source" else "--", option])


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_input_under_another_name(w, link):
    link(w / "data.zip", w / "other.zip")
    refused(w, *CALC[:2], "--images=W/data", "--data=W/other.zip", "--dest=W/data.zip", says=["--dest=", "--data"])
    refused(w, *CONVERT[:2], "--source=W/data.zip", "--dest=W/other.zip", "--overwrite", says=["--dest=", "--source"])
    os.symlink(w / "photos", w / "linked")
    refused(w, *CONVERT[:2], "--source=W/photos", "--dest=W/linked/small", says=["--dest=", "--source"])
    refused(w, *CONVERT[:2], "--source=W/photos", "--dest=W/run/../photos/small", says=["--dest=", "--source"])


# command -> what it may replace
REPLACES = {
    "scores": ([*CALC, "--dest=X"], {"scores.json"}),
    "reference": (["metrics", "ref", "--data=W/data", CPU, "--dest=X"], {"ref.npz"}),
    "detector": (["metrics", "detector", "--data=W/data", "--epochs=1", CPU, "--dest=X"], {"det.safetensors"}),
    "data set": ([*CONVERT, "--max-images=3", "--overwrite", "--dest=X"], {"data.zip", "data"}),
    "hold-out": ([*CONVERT, "--per-source=9", "--overwrite", "--dest=W/n.zip", "--holdout=X"], {"data.zip", "data"}),
    "images": ([*GENERATE, "--outdir=X"], {"images"}),
    "run": ([*TRAIN, *TINY, "--outdir=X"], {"run"}),
    "snapshot": (["snapshot", "--net=W/net.safetensors", "--dest=X"], set()),
    "tensors": (["snapshot", "--net=W/net.safetensors", "--state-dict", "--dest=X"], set()),
    "folder": (["snapshot", "--net=W/net.safetensors", "--folder", "--dest=X"], set()),
    "averages": (["averages", "--indir=W/run", "--outstd=0.1", "--outdir=X"], set()),
    "bounds": (["bounds", "--dest=X"], set()),
    "table": (["solvers", "plot", "--dest=W/none", "--figure=W/none/f", "--tables=X"], set()),
    "points": (["toy", "sample", "--net=W/none", "--dest=X"], set()),
    "results": (["experiment", "W/e.yaml", "--outdir=X"], {"photos"}),
}  # fmt: skip
ALL = "data.zip data net.safetensors ref.npz stats.npz det.safetensors scores.json settings.json images run"
ALL += " notes.txt photo.png photos labelled"


@pytest.mark.parametrize("name", REPLACES)
def test_another_kind_is_never_replaced(one_of_each, tmp_path, name):
    """Of all that lies around, a command accepts its own kind at most, and changes nothing when it refuses."""
    words, own = REPLACES[name]
    before = state(one_of_each)
    for other in sorted(set(ALL.split()) - own):
        place = str(one_of_each / other)
        if name == "reference" and not place.endswith(".npz"):
            continue  # is written as OTHER.npz
        typed = [word.replace("W/", f"{one_of_each}/").replace("X", place) for word in words[1:]]
        option = next(word for word in words if word.endswith("=X"))[:-2]
        one_line(SCRIPTS[words[0]], *typed, says=[f"{option}={place}", ""])
        assert state(one_of_each) == before, other


@pytest.mark.parametrize("name", ["scores", "reference", "detector", "data set", "images", "run"])
def test_its_own_kind_is_replaced(w, name):
    words, own = REPLACES[name]
    for place in own:
        typed = words
        if place == "data":
            typed = [word for word in words if "W/data" not in word]
        run(SCRIPTS[typed[0]], *(word.replace("W/", f"{w}/").replace("X", str(w / place)) for word in typed[1:]))


@pytest.mark.parametrize("name", ["scores", "reference", "detector", "data set", "images"])
def test_a_new_or_empty_place_is_taken(w, name):
    words = REPLACES[name][0]
    new = w / "deep" / "place.zip" if name == "data set" else w / "deep" / "place.npz"
    for make in (lambda: None, new.mkdir if name == "images" else new.touch):
        if new.exists():
            shutil.rmtree(new) if new.is_dir() else new.unlink()
        make()
        run(SCRIPTS[words[0]], *(word.replace("W/", f"{w}/").replace("X", str(new)) for word in words[1:]))
        assert new.is_dir() if name == "images" else new.stat().st_size > 0


def test_what_is_no_file_is_not_replaced(w):
    os.mkfifo(w / "pipe")
    for place in (w / "pipe", "/dev/null"):
        line = one_line(SCRIPTS["metrics"], *(v.replace("W/", f"{w}/") for v in CALC[1:]), f"--dest={place}")
        assert f"--dest={place}" in line
        with pytest.raises(OSError, match="no regular file"):
            util.write_text(place, "x")
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")


# --- nothing over something -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dest", ["data.zip", "data"])
def test_an_empty_result_replaces_nothing(w, dest):
    (w / "tiny").mkdir()
    (w / "tiny" / "wnids.txt").touch()  # Tiny ImageNet without an image
    (w / "none").mkdir()
    for source in ("tiny", "none"):
        refused(
            w, *CONVERT[:2], f"--source=W/{source}", f"--dest=W/{dest}", "--overwrite", says=["--source", "no images"]
        )
        refused(w, *CONVERT[:2], f"--source=W/{source}", f"--dest=W/{dest}", "--overwrite", "-n", says="no images")
    wide = ["--transform=center-crop-wide", "--resolution=64x32"]  # all images are too small
    refused(w, *CONVERT, *wide, f"--dest=W/{dest}", "--overwrite", says=["--source", "no images"])
    per_source = ["--per-source=183", "--sources=3", f"--holdout=W/{dest}"]  # nothing is left to hold out
    refused(w, *CONVERT, *per_source, "--dest=W/n.zip", "--overwrite", says="no images are left")


def test_a_refused_command_makes_no_folder(w):
    for words in (
        [*CONVERT[:2], "--source=W/nothing"],
        [*CALC[:3], "--data=W/nothing"],
        ["metrics", "ref", "--data=W/nothing"],
    ):
        refused(w, *words, f"--dest=W/deep/er/place.{'zip' if words[0] == 'tool' else 'npz'}", says="nothing")
    refused(w, "generate", "--net=W/nothing", "--outdir=W/deep/er", says="--net=")
    refused(w, "train", *small_command("W/nothing", "W/deep/er"), says="--data=")


def test_leftovers_are_those_of_one_name(tmp_path):
    end = util.TEMPORARY
    mine = [f".a.zip.abcdef_0{end}", f".a.zip.abcdef_1{end}.old"]
    others = [
        ".a.zip.abcdef_0.tmp",
        f".b.zip.abcdef_0{end}",
        f".xa.zip.abcdef_0{end}",
        f".a.zip.abc{end}",
        ".a.zip",
        "a.zip",
    ]
    for name in mine + others:
        (tmp_path / name).write_text("x")
    util.remove_leftovers(tmp_path, "a.zip")
    assert {p.name for p in tmp_path.iterdir()} == set(others)


def test_every_output_passes_the_door():
    """Options that are called like outputs say what they write; dataset_tool asks by itself."""
    names = {"--dest", "--outdir", "--out", "--figure", "--tables", "--save", "--figures-dir", "--holdout"}
    for script, command in SCRIPTS.items():
        for one in getattr(command, "commands", {"": command}).values():
            for param in one.params:
                if names & set(param.opts) and script not in ("tool", "experiment"):
                    reads = one.name == "detector" and "--holdout" in param.opts
                    assert getattr(param, "writes", None) or reads, (script, one.name, param.opts)


def test_recognised_by_what_is_inside(w):
    """Not by the name."""
    (w / "fake.json").write_text(json.dumps(["metrics"]))
    (w / "deep.json").write_text("[" * 100000)
    for name in ("fake.json", "deep.json"):
        refused(w, *CALC, f"--dest=W/{name}", says=name)
    assert outputs.zip_with("dataset.json")(w / "data.zip") and not outputs._tried(
        outputs.zip_with("x"), w / "data.zip"
    )


def test_an_output_named_in_passing_is_not_to_blame(w):
    (w / "bad.yaml").write_text("steps: [{name: a, run: dataset_tool.py inspect nothing.zip}]")
    line = one_line(run_experiment.main, w / "bad.yaml", f"--out={w / 'out'}", "--jobs=1", says="nothing.zip")
    assert line.startswith("Error: step a: ") and str(w / "out" / "logs") in line
