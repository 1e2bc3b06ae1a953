"""calculate_metrics.py as a user types it: JSON on stdout, progress on stderr, one line and exit code 2 on errors."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from small_runs import python, run

import calculate_metrics
import generate_images
from torch_utils.persistence import save_snapshot
from training.dataset import ImageFolderDataset
from training.networks_edm2 import Precond


def call(*args):
    """(what is printed, progress and notices) of a sub-command."""
    done = run(calculate_metrics.cmdline, *args)
    return json.loads(done.stdout), done.stderr


def write_zip(path, images, labels):
    names = [f"00000/img{i:08d}.png" for i in range(len(images))]
    with zipfile.ZipFile(path, "w") as z:
        for name, image in zip(names, images, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "png")
            z.writestr(name, buffer.getvalue())
        if labels is None:
            return
        pairs = [[name, int(label)] for name, label in zip(names, labels, strict=True)]
        z.writestr("dataset.json", json.dumps({"labels": pairs, "num_classes": 10}))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images, labels = np.round(data.images * 255 / 16).astype(np.uint8)[order], data.target[order]
    for name, part in {"train": slice(0, 300), "ref": slice(300, 700), "samples": slice(700, 900)}.items():
        write_zip(folder / f"{name}.zip", images[part], labels[part])
    return folder


def test_detector_ref_calc(files):
    detector = files / "sources=0,1-n=25, pixel:x" / "detector.safetensors"  # no path breaks a list
    options = (f"--holdout={files}/ref.zip", f"--dest={detector}", "--epochs=6")
    trained, progress = call("detector", f"--data={files}/train.zip", *options)
    assert trained["num_holdout"] == 400
    assert 0.8 < trained["accuracy"] <= 1
    assert "epoch" in progress

    metrics = f"--metrics=pixel,classifier:{detector}"
    written, notice = call("ref", f"--data={files}/ref.zip", f"--dest={files}/sub/ref.pkl", metrics)
    assert "npz" in notice  # another suffix is replaced with a notice
    assert written["detectors"] == ["pixel", trained["detector"]]
    assert sum(written["source_counts"]) == written["num_images"] == 400

    common = (f"--ref={files}/sub/ref.npz", metrics, f"--train={files}/train.zip", "--splits=2")
    scores, progress = call("calc", f"--images={files}/samples.zip", *common)
    assert "img/s" in progress
    judged = scores["metrics"][trained["detector"]]
    assert judged["overall"]["agreement"] > 0.8
    assert judged["overall"]["fd_floor"] > 0
    assert judged["num_images"] == 200
    assert judged["reference"]["content_hash"] == written["content_hash"]
    assert set(scores["metrics"]["pixel"]["sources"]) == {str(s) for s in range(10)}
    assert "agreement" not in scores["metrics"]["pixel"]["overall"]

    command = ["calculate_metrics.py", "calc", f"--images={files}/samples.zip", *common, "--batch=7", "--device=cpu"]
    done = python(*command, processes=2)
    assert "img/s" in done.stderr
    twice = json.loads(done.stdout)["metrics"]
    for name in ("fd", "kid", "precision", "nearest_train", "fd_floor"):
        for key, both in twice.items():
            assert both["overall"][name] == pytest.approx(scores["metrics"][key]["overall"][name], rel=1e-4), name


def test_reference_from_a_data_set_and_subset(files):
    common = (f"--images={files}/samples.zip", f"--data={files}/ref.zip", "--distances=fd", "--splits=0")
    scores, notice = call("calc", *common, "--num=50", "--seed=3", "--no-per-source")
    pixel = scores["metrics"]["pixel"]
    assert pixel["num_images"] == 50
    assert "sources" not in pixel
    assert "singular" in notice  # fewer images than features


def test_images_that_were_seen_before_are_named(files, tmp_path):
    """Equal pixels under other names, in another order, with other labels."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))  # of the fixture
    images = np.round(data.images * 255 / 16).astype(np.uint8)[order]
    write_zip(tmp_path / "mixed.zip", images[[5, 400, 650, 699, 720]][::-1], [0, 1, 2, 3, 4])
    scored = ("calc", f"--images={tmp_path}/mixed.zip", "--splits=0")
    run(calculate_metrics.cmdline, "ref", f"--data={files}/ref.zip", f"--dest={tmp_path}/ref.npz", "--no-features")
    for reference in (f"--data={files}/ref.zip", f"--ref={tmp_path}/ref.npz"):
        scores, said = call(*scored, reference, f"--train={files}/train.zip")
        assert scores["overlap"] == {"images_in_reference": 3, "images_in_training": 1, "reference_in_training": 0}
        warned = [line for line in said.splitlines() if line.startswith("Warning: ") and " are in " in line]
        assert len(warned) == 2 and "3 of 5 images of the samples are in the reference too" in warned[0]
        pixel = scores["metrics"]["pixel"]
        assert pixel["reference"]["content_hash"] == ImageFolderDataset(f"{files}/ref.zip").content_hash()
        found = pixel["reference_hashes"]
        assert len({*found.values()}) == 11 and (pixel["num_reference"], pixel["num_images"]) == (400, 5)
    kept = data.target[order][300:700] == 3  # the hash of a source is that of its images, whatever lies beside them
    write_zip(tmp_path / "threes.zip", images[300:700][kept], [3] * kept.sum())
    alone, said = call(*scored, f"--data={tmp_path}/threes.zip", f"--train={tmp_path}/threes.zip")
    assert alone["metrics"]["pixel"]["reference_hashes"] == {"overall": found["3"], "3": found["3"]}
    assert f"{kept.sum()} of {kept.sum()} images of the reference are in the training data too" in said


SAMPLERS = {
    "plain": [],
    "churn": ["--S_churn=10", "--S_noise=1.01", "--rho=5", "--sigma_max=20"],
    "interval": ["--gnet=null", "--guidance=2", "--guidance-interval=0.1,5"],
    "process": ["--process=cld", "--process-options=M=0.25,beta=4:4", "--solver=sscs", "--time-grid=quadratic"],
    "rounded": ["--quantize-bits=4", "--inject-noise=0.1", "--sources=3,4"],
}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_gen_scores_what_generate_images_writes(files, tmp_path, sampler):
    """Whatever the options: gen takes every one that says how to sample."""
    net = Precond(
        8, 1, 10, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[], channels_per_head=8
    )
    net.unet.out_gain.data.fill_(1)  # an untrained network starts at zero
    snapshot = tmp_path / "network-snapshot-0000000-0.100.safetensors"
    save_snapshot(snapshot, net.eval())
    options = [f"--net={snapshot}", "--class=balanced", "--steps=3", "--batch=16", *sampler]
    run(generate_images.main, *options, f"--outdir={tmp_path}/out", "--seeds=5+40")
    common = (f"--data={files}/ref.zip", "--seed=5", "--splits=0", "--batch=16")
    written = call("calc", f"--images={tmp_path}/out", *common)[0]["metrics"]["pixel"]
    scores, progress = call("gen", *options, "--num=40", *common[:-1])
    assert "gen" in progress
    generated = scores["metrics"]["pixel"]
    assert generated["num_images"] == 40
    assert generated["sources"]["3"]["count"] == (20 if "--sources=3,4" in sampler else 4)
    assert generated["overall"]["fd"] > 1
    assert generated == written


def test_gen_has_every_option_of_sampling():
    declared, gen = (
        {flag for param in command.params for flag in param.opts}
        for command in (generate_images.main, calculate_metrics.cmdline.commands["gen"])
    )
    assert declared - gen == {"--subdirs", "--seeds", "--grid"}


IMAGES = "--images={0}/samples.zip"
REF = "--data={0}/ref.zip"


@pytest.mark.parametrize(
    "message, args",
    [
        ("--num=201", ("calc", IMAGES, REF, "--num=201")),
        ("give either --ref", ("calc", IMAGES)),
        ("give either --ref", ("calc", IMAGES, REF, "--ref={0}/edm.npz")),
        ("statistics of fid, not of pixel", ("calc", IMAGES, "--ref={0}/edm.npz", "--metrics=pixel")),
        ("missing.npz", ("calc", IMAGES, "--ref={0}/missing.npz")),
        ("detector 'nope' is unknown; known:", ("calc", IMAGES, REF, "--metrics=nope")),
        ("'fid' is unknown (did you mean fd or kid?); known:", ("calc", IMAGES, REF, "--distances=fd,fid")),
        ("--device=nope", ("calc", IMAGES, REF, "--device=nope")),
        ("--images: ", ("calc", "--images={0}/missing.zip", REF)),
        ("--data: ", ("ref", "--data={0}/missing.zip", "--dest={0}/x.npz")),
        (
            "--holdout={0}/plain.zip: images have no labels",
            ("detector", "--data={0}/ref.zip", "--holdout={0}/plain.zip", "--dest={0}/x.npz"),
        ),
        ("--dest=", ("ref", REF, "--dest={0}/ref.zip/x.npz")),
        ("--net=x: no such file", ("gen", "--net=x", REF)),
        ("--guidance=2", ("gen", f"--net={__file__}", REF, "--guidance=2")),
        ("--class", ("gen", "--net=x", REF, "--class=some")),
        ("--sources=1 needs --class=balanced", ("gen", f"--net={__file__}", REF, "--sources=1")),
    ],
)
def test_errors_are_one_line(files, message, args):
    np.savez(files / "edm.npz", mu=np.zeros(4), sigma=np.eye(4))
    write_zip(files / "plain.zip", np.zeros((2, 8, 8), np.uint8), None)
    done = run(calculate_metrics.cmdline, *(arg.format(files) for arg in args), code=2)
    assert done.stdout == ""
    assert message.format(files) in done.stderr.splitlines()[-1]
    assert not (files / "x.npz").exists()


def test_error_from_the_shell(files):
    done = python("calculate_metrics.py", "calc", f"--images={files}/samples.zip", code=2)
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["Error: give either --ref=FILE or --data=ZIP as the reference"]


def test_help_shows_every_command():
    assert all(name in run(calculate_metrics.cmdline, "--help").stdout for name in ("ref", "calc", "gen", "detector"))
