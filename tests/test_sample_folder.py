"""A generation folder holds the images of one network and one set of options, each seed once."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from small_runs import one_line, python, run

import calculate_metrics
import generate_images
from torch_utils.persistence import load_snapshot, save_snapshot
from training import processes, samplers
from training.dataset import ImageFolderDataset
from training.encoders import CenterEncoder
from training.generation import generate_images as generate
from training.sample_folder import distinct, plain

MAIN = (generate_images.main, "--device=cpu", "--steps=2")


@pytest.fixture
def nets(tmp_path, tiny_net):
    """Two networks with other weights; the second is the first one's header over again."""
    paths = [tmp_path / f"net{seed}.safetensors" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        save_snapshot(path, tiny_net(3, seed=seed))
    return paths


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(nets, tmp_path):
    out = tmp_path / "out"
    run(*MAIN, f"--net={nets[0]}", f"--outdir={out}", "--seeds=0-3")
    return out


def test_the_same_again_and_further_seeds(nets, folder, tmp_path):
    before = content(folder)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(nets[0].read_bytes())
    run(*MAIN, f"--net={copy}", f"--outdir={folder}", "--seeds=2,0-3", "--batch=1")  # the same content by another name
    assert content(folder) == before
    run(*MAIN, f"--net={nets[0]}", f"--outdir={folder}", "--seeds=4-5", "--class=1")
    after = content(folder)
    assert {name: after[name] for name in before if name.endswith("png")} == {
        name: data for name, data in before.items() if name.endswith("png")
    }
    assert len(ImageFolderDataset(folder)) == 6


@pytest.mark.parametrize(
    "options, words",
    [
        (["--net=1"], ["--net: sha256:", "->"]),
        (["--steps=3"], ["--steps: 2 -> 3"]),
        (["--seeds=9", "--steps=3"], ["--steps: 2 -> 3"]),  # further seeds must be of the same kind, too
        (["--S_churn=5"], ["--S_churn: 0.0 -> 5.0"]),
        (["--inject-noise=0.1"], ["--solver"]),
        (["--sigma_max=40"], ["--sigma_max: 80.0 -> 40.0"]),
        (["--rho=5"], ["--rho"]),
        (["--gnet=1", "--guidance=2"], ["--gnet", "--guidance"]),
        (["--process=cld", "--solver=em"], ["--process", "--solver"]),
        (["--quantize-bits=4"], ["--net"]),
        (["--class=1"], ["seed 0", "--class"]),
        (["--class=balanced"], ["seed 0", "--class"]),
        (["--subdirs"], ["seed 0 as 000000.png", "--subdirs"]),
        ([f"--seeds=9,{2**32 + 1}"], ["modulo 2^32", "1 and 4294967297"]),
    ],
    ids=str,
)
def test_other_networks_and_options_are_refused(nets, folder, options, words):
    before = content(folder)
    options = [text.replace("net=1", f"net={nets[1]}") for text in options]
    given = {text.partition("=")[0]: text for text in [f"--net={nets[0]}", "--seeds=0-3", "--steps=2", *options]}
    one_line(generate_images.main, "--device=cpu", f"--outdir={folder}", *given.values(), says=[*words, "out", "Error"])
    assert content(folder) == before


def test_images_of_others_are_not_joined(nets, tmp_path):
    for name in ("cat.png", "000007.png", "x/000001.png", "0001.jpg"):
        out = tmp_path / name.replace("/", "_")
        (out / name).parent.mkdir(parents=True)
        PIL.Image.fromarray(np.zeros([8, 8], np.uint8)).save(out / name)
        before = content(out)
        one_line(*MAIN, f"--net={nets[0]}", f"--outdir={out}", "--seeds=0-3", says=["--outdir", "another "])
        assert content(out) == before


def test_a_run_that_was_cut_short_is_continued(nets, tmp_path):
    """Images tell their own labels, so those of a killed run join the table of the next."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    batches = generate(nets[0], range(6), outdir=out, max_batch_size=2, num_steps=2)
    next(batches), next(batches)
    assert len(content(out)) == 4  # and no dataset.json
    for _ in generate(nets[0], range(3, 6), outdir=out, num_steps=2):
        pass
    for _ in generate(nets[0], range(6), outdir=whole, num_steps=2):
        pass
    assert content(out) == content(whole)


def test_both_layouts_never_hold_a_seed_twice(nets, tmp_path):
    out = tmp_path / "out"
    run(*MAIN, f"--net={nets[0]}", f"--outdir={out}", "--seeds=0-2", "--subdirs")
    one_line(*MAIN, f"--net={nets[0]}", f"--outdir={out}", "--seeds=2-4", says="give --subdirs")
    run(*MAIN, f"--net={nets[0]}", f"--outdir={out}", "--seeds=3-4")  # other seeds: no image twice
    result = run(calculate_metrics.cmdline, "calc", f"--images={out}", f"--data={out}", "--splits=0", "--device=cpu")
    assert json.loads(result.stdout)["metrics"]["pixel"]["num_images"] == 5


def test_seeds_that_are_one_image(nets, tmp_path):
    for seeds in (f"5,{2**32 + 5}", f"0-3,{2**33 + 2}"):
        one_line(*MAIN, f"--net={nets[0]}", f"--outdir={tmp_path / 'out'}", f"--seeds={seeds}", says="2^32")
    with pytest.warns(UserWarning, match="seed 1 3 times"):
        result = run(*MAIN, f"--net={nets[0]}", f"--outdir={tmp_path / 'out'}", "--seeds=1,1,1,2")
    assert "Generating 2 images" in result.output and len(list((tmp_path / "out").glob("*.png"))) == 2
    assert distinct(range(3, 10)) == range(3, 10) and distinct([7, 2**32 - 1]) == [7, 2**32 - 1]
    done = python("generate_images.py", f"--net={nets[0]}", f"--outdir={tmp_path / 'o'}", "--seeds=1,1", "--steps=1")
    assert [line for line in done.stderr.splitlines() if "Warning" in line] == [
        "Warning: --seeds names seed 1 2 times: every seed is one image, 1 in all"
    ]


def test_two_processes_write_one_folder(nets, tmp_path):
    options = ["generate_images.py", f"--net={nets[0]}", "--steps=2", "--batch=2", "--device=cpu", "--class=balanced"]
    for seeds in ("0-6", "5-9"):
        python(*options, f"--outdir={tmp_path / 'two'}", f"--seeds={seeds}", processes=2)
    run(*MAIN, f"--net={nets[0]}", "--class=balanced", f"--outdir={tmp_path / 'one'}", "--seeds=0-9", "--batch=2")
    assert content(tmp_path / "one").keys() == content(tmp_path / "two").keys()
    assert content(tmp_path / "one")["dataset.json"] == content(tmp_path / "two")["dataset.json"]


def test_images_know_what_made_them(nets, folder, tiny_net):
    """Decoders see pixels alone; the text tells network and options, and another device of another width would not lie."""
    (batch,) = generate(nets[0], range(4), num_steps=2)
    for i in range(4):
        with PIL.Image.open(folder / f"{i:06d}.png") as image:
            assert torch.equal(torch.as_tensor(np.array(image)), batch.images[i][0])
            text = json.loads(image.text["generated"])
        assert text["label"] == int(batch.class_ids[i]) and text["made"]["num_steps"] == 2
    assert plain(samplers.noisy_heun(0.5)) != plain(samplers.heun) and plain(samplers.noisy_heun(0)) == "heun"
    assert plain(samplers.SOLVERS["em"]) != plain(samplers.SOLVERS["sscs"])
    assert plain(CenterEncoder())["class"] == "CenterEncoder" and plain(float("inf")) == "inf"
    assert plain(processes.get("cld", M=2)) != plain(processes.get("cld", M=1))
    json.dumps([plain(solver) for solver in samplers.SOLVERS.values()])
    one, two = (load_snapshot(path).net for path in nets)
    from torch_utils.persistence import content_digest

    assert content_digest(one) == content_digest(tiny_net(3, seed=0)) != content_digest(two)
