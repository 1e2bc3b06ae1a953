"""ref -> calc -> gen end to end: for any batch and number of processes, from kept features; what does not fit is refused."""

import json
import multiprocessing
import socket
import time
import zipfile
from types import SimpleNamespace

import child_runs
import numpy as np
import pytest
from small_runs import one_line, python, run

import calculate_metrics
import generate_images
from metrics import commands
from metrics.detectors import DETECTORS
from metrics.features import collect_dataset
from metrics.references import load_references
from torch_utils.persistence import save_snapshot
from training.dataset import ArrayDataset, ImageFolderDataset

METRICS = calculate_metrics.cmdline
NAMES = ["zero", "one", "two", *"3456789"]
CPU = "--device=cpu"


@pytest.fixture(scope="module")
def chain(tmp_path_factory, digits):
    """A folder with data.zip (classes with names), det.safetensors, ref.npz of both detectors, net.safetensors, its images."""
    from training.networks_edm2 import Precond

    folder = tmp_path_factory.mktemp("chain")
    rename(digits, folder / "data.zip", NAMES)
    run(METRICS, "detector", f"--data={folder}/data.zip", "--epochs=2", f"--dest={folder}/det.safetensors", CPU)
    net = Precond(8, 1, 10, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[], channels_per_head=8)
    net.unet.out_gain.data.fill_(1)
    about = {"class_names": NAMES}
    save_snapshot(folder / "net.safetensors", net.eval(), dataset=about, sources=[0, 1, 2])
    run(generate_images.main, *sampling(folder), f"--outdir={folder}/out", "--seeds=0-23")
    run(METRICS, "ref", f"--data={folder}/data.zip", f"--dest={folder}/ref.npz", *detectors(folder))
    return folder


def rename(source, dest, names):
    """A copy of a data set with other class names."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(dest, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "dataset.json":
                content = json.dumps({**json.loads(content), "class_names": names}).encode()
            new.writestr(name, content)


def detectors(folder):
    return [f"--metrics=pixel,classifier:{folder}/det.safetensors", CPU]


def sampling(folder):
    return [f"--net={folder}/net.safetensors", "--class=balanced", "--steps=2", CPU]


def calc(folder, *more):
    words = ["calc", f"--images={folder}/out", f"--ref={folder}/ref.npz", *detectors(folder), *more]
    return json.loads(run(METRICS, *words).stdout)


def numbers(scores):
    """All numbers of a score file, by the way to them."""
    found = {}

    def walk(value, way):
        if isinstance(value, dict):
            for name, part in value.items():
                walk(part, f"{way}/{name}")
        elif isinstance(value, float):
            found[way] = value

    walk(scores["metrics"], "")
    return found


@pytest.fixture(scope="module")
def whole(chain):
    return calc(chain)


@pytest.mark.parametrize("batch", [1, 7, 256])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_scores_depend_on_neither_batch_nor_processes(chain, whole, tmp_path, batch, processes):
    """From files and generated on the fly: every number of every section to 1e-4 of it (or of the distance it is part of)."""
    common = [f"--ref={chain}/ref.npz", *detectors(chain), f"--batch={batch}"]
    commands_ = [["calc", f"--images={chain}/out", *common]]
    if batch == 7 or processes == 1:
        commands_.append(["gen", "--num-images=24", *sampling(chain)[:-1], *common])
    for i, words in enumerate(commands_):
        dest = tmp_path / f"{i}.json"
        words = [*words, f"--dest={dest}", "--workers=0"]
        if processes == 1:
            run(METRICS, *words)
        else:
            started = [
                child_runs.start("calculate_metrics", words, tmp_path / f"log{rank}", env=env)
                for rank, env in enumerate(child_runs.ranks(processes))
            ]
            assert [child_runs.wait(process) for process in started] == [0] * processes
        found, expected = numbers(json.loads(dest.read_text())), numbers(whole)
        assert found.keys() == expected.keys() and len(found) > 100
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_names_of_the_literature(whole):
    overall = whole["metrics"]["pixel"]["overall"]
    assert whole["scores"]["fd_pixel"] == overall["fd"] and whole["scores"]["kid_pixel"] == overall["kid"]


def test_class_names_are_compared(chain, tmp_path):
    """Of images, data, reference and snapshot; generated images carry those of their network."""
    assert json.loads((chain / "out" / "dataset.json").read_text())["class_names"] == NAMES
    swapped = [NAMES[1], NAMES[0], *NAMES[2:]]
    rename(chain / "data.zip", tmp_path / "swapped.zip", swapped)
    run(METRICS, "ref", f"--data={tmp_path}/swapped.zip", f"--dest={tmp_path}/swapped.npz", CPU)
    says = ["class_names", "'one', 'zero'", "swapped."]
    for reference in (f"--data={tmp_path}/swapped.zip", f"--ref={tmp_path}/swapped.npz"):
        one_line(METRICS, "calc", f"--images={chain}/out", reference, CPU, says=says)
        one_line(METRICS, "gen", f"--net={chain}/net.safetensors", reference, "--num=4", CPU, says=says)
    trained = ["calc", f"--images={chain}/out", f"--data={chain}/data.zip", f"--train={tmp_path}/swapped.zip", CPU]
    one_line(METRICS, *trained, says=says)
    one_line(METRICS, "loss", f"--net={chain}/net.safetensors", f"--data={tmp_path}/swapped.zip", CPU, says=says)


def test_features_are_kept(chain, whole, tmp_path, monkeypatch):
    kept = f"--features={tmp_path}/kept.npz"
    assert calc(chain, kept)["metrics"] == whole["metrics"]
    before = (tmp_path / "kept.npz").read_bytes()
    monkeypatch.setattr(commands, "look", None)  # nothing is looked at again
    assert calc(chain, kept)["metrics"] == whole["metrics"]
    pixel = ["calc", f"--images={chain}/out", f"--ref={chain}/ref.npz", "--metrics=pixel", CPU]
    assert json.loads(run(METRICS, *pixel, kept).stdout)["metrics"]["pixel"] == whole["metrics"]["pixel"]
    run(METRICS, "ref", f"--data={chain}/out", f"--dest={tmp_path}/ref.npz", kept, *detectors(chain))
    calc_data = ["calc", f"--images={chain}/data.zip", f"--ref={chain}/ref.npz", "--metrics=pixel", CPU]
    one_line(METRICS, *calc_data, kept, says=["--features=", "other images or labels"])
    one_line(METRICS, *pixel, kept, "--num=9", says=["--features=", "other images or labels"])
    one_line(METRICS, *pixel, f"--features={chain}/det.safetensors", says=["--features=", "not a file of features"])
    assert (tmp_path / "kept.npz").read_bytes() == before


def test_features_of_other_detectors_sizes_or_without(chain, tmp_path):
    pixel = ["calc", f"--images={chain}/out", f"--ref={chain}/ref.npz", CPU]
    run(METRICS, *pixel, "--metrics=pixel", f"--features={tmp_path}/pixel.npz")
    one_line(
        METRICS, *pixel, *detectors(chain), f"--features={tmp_path}/pixel.npz", says=["of pixel, not of classifier:"]
    )
    run(METRICS, "ref", f"--data={chain}/out", f"--dest={tmp_path}/sums.npz", "--no-features", CPU)
    one_line(METRICS, *pixel, "--metrics=pixel", f"--features={tmp_path}/sums.npz", says="sums without features")
    big = ImageFolderDataset(str(chain / "out"))
    images = np.stack([np.repeat(np.repeat(big[i][0], 2, 1), 2, 2) for i in range(len(big))])
    np.savez(tmp_path / "big.npz", arr_0=images.transpose(0, 2, 3, 1))
    words = ["calc", f"--images={tmp_path}/big.npz", f"--data={tmp_path}/big.npz", "--metrics=pixel", CPU]
    one_line(METRICS, *words, f"--features={tmp_path}/pixel.npz", says=["[1, 8, 8]", "[1, 16, 16]"])


def test_a_detector_that_became_another_is_refused(chain, tmp_path, monkeypatch):
    """Its name stays, its resize does not: neither reference nor kept features are taken for the same."""
    made = lambda resize: (
        lambda argument: SimpleNamespace(features=lambda x: x.flatten(1).float(), name="x", resize=resize)
    )
    calc_x = ["calc", f"--images={chain}/out", f"--ref={tmp_path}/ref.npz", "--metrics=x", CPU]
    kept = f"--features={tmp_path}/kept.npz"
    monkeypatch.setitem(DETECTORS, "x", made("bicubic"))
    run(METRICS, "ref", f"--data={chain}/data.zip", f"--dest={tmp_path}/ref.npz", "--metrics=x", CPU)
    assert load_references(tmp_path / "ref.npz")["x"].provenance["detector"]["resize"] == "bicubic"
    run(METRICS, *calc_x, kept)
    monkeypatch.setitem(DETECTORS, "x", made("bilinear"))
    one_line(METRICS, *calc_x, says=["--ref=", "resize=bicubic", "bilinear"])
    one_line(
        METRICS,
        "ref",
        f"--data={chain}/out",
        f"--dest={tmp_path}/b.npz",
        "--metrics=x",
        kept,
        CPU,
        says=["--features="],
    )


def test_the_network_is_cut():
    """For this process and its children: what the tests here and elsewhere show, they show without one."""
    with pytest.raises(OSError, match="is cut"):
        socket.create_connection(("192.0.2.1", 80))
    ask = "import urllib.request as u; u.urlopen('http://192.0.2.1', timeout=99)"
    assert "Connection refused" in python("-c", ask, code=1).stderr


def test_the_default_is_what_the_reference_holds(chain, tmp_path):
    run(METRICS, "ref", f"--data={chain}/data.zip", f"--dest={tmp_path}/det.npz", *detectors(chain)[:1], CPU)
    both = ["calc", f"--images={chain}/out", f"--ref={tmp_path}/det.npz", CPU]
    assert list(json.loads(run(METRICS, *both).stdout)["metrics"]) == ["pixel"]
    judge = detectors(chain)[0].replace("pixel,", "")
    run(METRICS, "ref", f"--data={chain}/data.zip", f"--dest={tmp_path}/one.npz", judge, CPU)
    one_line(
        METRICS, *both[:2], f"--ref={tmp_path}/one.npz", CPU, says=["holds statistics of classifier:", "--metrics="]
    )


def test_published_metrics_have_their_number_of_images(chain, monkeypatch):
    """50000 for fid unless said otherwise: fewer images are refused with the remedy, of more a seeded subset is scored."""
    bright = SimpleNamespace(features=lambda images: images.float().mean(dim=(2, 3)).repeat(1, 2), name="fid")
    monkeypatch.setitem(DETECTORS, "fid", lambda argument: bright)
    words = ["calc", f"--images={chain}/out", f"--data={chain}/data.zip", "--metrics=fid", "--splits=0", CPU]
    with monkeypatch.context() as patch:
        patch.setattr(commands, "look", None)  # before anything is looked at
        one_line(METRICS, *words, says=["--num=50000", "holds 24 images", "--num=24"])
    monkeypatch.setattr(commands, "PUBLISHED_NUM", 10)
    subset, all_, given = (json.loads(run(METRICS, *words, *more).stdout) for more in ([], ["--num=24"], ["--num=10"]))
    assert [s["metrics"]["fid"]["num_images"] for s in (subset, all_, given)] == [10, 24, 10]
    assert subset == given and subset["scores"].keys() == {"fid", "kid"}
    assert json.loads(run(METRICS, *words, "--seed=1").stdout)["scores"]["fid"] != subset["scores"]["fid"]


DECODED = multiprocessing.Value("i", 0)  # images, by all processes


class Counted(ArrayDataset):
    def __getitem__(self, idx):
        with DECODED.get_lock():
            DECODED.value += 1
        return super().__getitem__(idx)


@pytest.mark.parametrize("workers, most", [(0, 0.05), (2, 60)])
def test_decoding_overlaps_with_the_detector(workers, most):
    """While the detector looks at a batch, workers decode the next ones; without workers nobody does."""
    images = np.random.RandomState(0).randint(0, 256, [24, 1, 4, 4]).astype(np.uint8)
    seen, ahead, start = [], [], DECODED.value

    def features(batch):
        seen.extend(batch)
        end = time.time() + most * (len(seen) < len(images))
        while DECODED.value - start <= len(seen) and time.time() < end:
            time.sleep(0.005)
        ahead.append(DECODED.value - start > len(seen))
        return batch.flatten(1).float()

    found = collect_dataset(
        Counted(images), {"x": SimpleNamespace(features=features, name="x")}, batch_size=4, workers=workers
    )
    assert ahead == [workers > 0] * 5 + [False]
    assert np.array_equal(found["x"].features, images.reshape(24, -1))
