"""Files made to harm: each is one line and exit code 2 within a second, starts nothing and takes no memory to speak of."""

import gzip
import io
import json
import os
import socket
import struct
import zipfile

import numpy as np
import PIL.Image
import pytest
from small_runs import assert_quick, one_line, small_command

import calculate_metrics
import dataset_tool
import generate_images
import run_experiment
import train_edm2
from dnnlib import reading
from training.dataset import format

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%touch MARK) (w) file\nshowpage\n"


def png(value=0, size=8):
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.full([size, size], value, dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def quick(command, *arguments, **says):
    """`one_line`, within seconds, on a busy machine, too: what unfolds takes minutes."""
    return assert_quick(lambda: one_line(command, *arguments, **says), seconds=5)


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    """A Ghostscript that leaves a mark when it is started."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("gs", "gswin64c"):
        (folder / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/MARK\nexit 1\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    yield
    assert not (tmp_path / "MARK").exists()


def test_a_page_description_is_no_image(tmp_path, interpreter):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.eps").write_bytes(EPS)
    quick(dataset_tool.main, "convert", f"--source={data}", f"--dest={tmp_path}/x.zip", says="no images")
    (data / "a.png").write_bytes(EPS)
    quick(dataset_tool.main, "convert", f"--source={data}", f"--dest={tmp_path}/x.zip", says="a.png")
    quick(dataset_tool.main, "inspect", data, says="a.png")


def test_formats_that_run_programs_are_not_read():
    assert {
        ".png",
        ".jpg",
        ".jpeg",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".webp",
        ".ppm",
        ".tga",
    } <= format.image_extensions()
    assert not format.image_extensions() & {
        ".eps",
        ".ps",
        ".wmf",
        ".emf",
        ".fpx",
        ".mpg",
        ".h5",
        ".grib",
        ".psd",
        ".txt",
    }


def test_an_image_that_unfolds_is_refused():
    """60 kB that stand for 400 megapixels."""
    side = 20_000
    chunk = lambda kind, data: (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", format.zlib.crc32(kind + data))
    )
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    data = chunk(b"IDAT", format.zlib.compress(bytes((side // 8 + 1) * side), 9))
    with pytest.raises(ValueError, match=r"a.png.*pixels"):
        format.open_image(b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b""), "a.png")


# --- what is no file --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["pipe", "socket", "device"])
def special(request, tmp_path):
    """Function: path -> the path, where now something is that would block a reader, or never end."""

    def make(path):
        if request.param == "pipe":
            os.mkfifo(path)
        elif request.param == "socket":
            with socket.socket(socket.AF_UNIX) as server:
                os.chdir(path.parent)  # names of sockets are short
                server.bind(path.name)
        else:
            path.symlink_to("/dev/zero")
        return path

    here = os.getcwd()
    yield make
    os.chdir(here)


def test_special_files_in_every_place(special, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    special(folder / "b.png")
    quick(dataset_tool.main, "inspect", folder, says="b.png")
    quick(dataset_tool.main, "convert", f"--source={folder}", f"--dest={tmp_path}/x.zip", says="b.png")
    quick(train_edm2.main, *small_command(folder, tmp_path / "run", "--cond=False"), says="b.png")
    (folder / "b.png").unlink()
    special(folder / "dataset.json")
    quick(dataset_tool.main, "inspect", folder, says="dataset.json")
    for name in ("a.zip", "a.npz", "a.tfrecord", "train-images-idx3-ubyte", "a.tar", "a.mdb"):
        path = special(tmp_path / name)
        quick(dataset_tool.main, "convert", f"--source={path}", f"--dest={tmp_path}/x.zip", says=name)
        path.unlink()
    path = special(tmp_path / "b.zip")
    quick(dataset_tool.main, "inspect", path, says="b.zip")
    quick(train_edm2.main, *small_command(path, tmp_path / "run"), says="b.zip")
    quick(calculate_metrics.cmdline, "calc", f"--images={path}", f"--ref={path}", says="b.zip")
    quick(calculate_metrics.cmdline, "calc", f"--images={folder}", f"--ref={path}", says="")
    path = special(tmp_path / "net.safetensors")
    quick(generate_images.main, f"--net={path}", f"--outdir={tmp_path}/out", says="net.safetensors")
    path = special(tmp_path / "scores.json")
    quick(calculate_metrics.cmdline, "report", f"--scores={path}", f"--dest={tmp_path}/report", says="scores.json")
    path = special(tmp_path / "e.yaml")
    quick(run_experiment.main, path, says="e.yaml")
    quick(train_edm2.main, f"--config={path}", f"--outdir={tmp_path}/out", says="e.yaml")


# --- texts ------------------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join(f'*a{i - 1}' for _ in range(10))}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join(f'*a{i - 1}' for _ in range(10))}]}}\n" for i in range(1, 12)
)
TEXTS = {
    "aliases": BOMB,
    "merges": MERGES,
    "itself": "a: &a [*a]\n",
    "deep": "a: " + "[" * 100_000,
    "deep and closed": "a: " + "[" * 900 + "]" * 900,
    "huge": "a: " + "x" * 2**20,
    "many": "[" + "1," * 100_000 + "1]",
    "digits": "a: " + "9" * 10_000,
    "hexadecimal": "lr: 0x" + "f" * 10_000,
    "object": "a: !!python/object/apply:os.system ['touch MARK']\n",
    "no date": "a: 2001-99-99\n",
    "no number": "a: !!int x\n",
    "no truth": "a: !!bool x\n",
    "tab": "a:\n\t- b\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_unfold(name, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(TEXTS[name])
    quick(train_edm2.main, f"--config={path}", f"--outdir={tmp_path}/out", "--data=x.zip", "-n", says="x.yaml")
    quick(run_experiment.main, path, says="x.yaml")
    quick(run_experiment.main, path.parent, says="")
    assert not (tmp_path / "MARK").exists()


def test_a_small_alias_is_what_it_stands_for():
    assert reading.parse_yaml("a: &x {b: [1, 2]}\nc: *x\nd: {<<: *x, e: 3}") == {
        "a": {"b": [1, 2]},
        "c": {"b": [1, 2]},
        "d": {"b": [1, 2], "e": 3},
    }
    assert reading.parse_yaml("") is None and reading.parse_yaml("7") == 7


LETTERS = "bcdefghijklmnopqrstu"
CHAIN = ", ".join(f"{a}: '{{{b}}}{{{b}}}'" for a, b in zip(LETTERS, LETTERS[1:] + "v", strict=True))
STEP = "steps: [{name: s, run: 'train_edm2.py {b}'}]"
CUBE = "steps: [{name: '{x}{y}{z}', run: train_edm2.py, foreach: {x: a, y: a, z: a}}]"


@pytest.mark.parametrize(
    "text, says",
    [
        (f"settings: {{{CHAIN}, v: ''}}\n{STEP}", "refer to each other"),
        (f"settings: {{a: {list(range(100))}}}\n{CUBE}", "more than 2000"),
        (f"settings: {{1: 2, a: 3}}\n{STEP}", "settings must map names"),
        ("budgets: {1: {}, a: {}}\nsteps: []", "budgets must map names"),
    ],
)
def test_experiments_that_unfold(text, says, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    quick(run_experiment.main, path, says=["x.yaml", says])


@pytest.mark.parametrize(
    "meta",
    [
        b"[" * 10**6,
        b'{"labels": ' + b"[" * 10**6,
        b'{"labels": [["a.png", 1' + b"0" * 10**6 + b"]]}",
        b'{"labels": [["a.png", 9223372036854775808]]}',
        b'{"labels": [["a.png", -9223372036854775809]]}',
        b'{"labels": [["a.png", 1e308]]}',
        b'{"labels": [["a.png", [1e308, 0]]]}',
        b'{"labels": [["a.png", [1e999, 0]]]}',
        b'{"labels": [["a.png", [NaN, 0]]]}',
        b'{"labels": [["a.png", 0]], "num_classes": 1000000000}',
        b'{"labels": [["a.png", 999999999]]}',
        json.dumps({"labels": [["a.png", [10**400]]]}).encode(),
    ],
    ids=lambda meta: meta[:40].decode(),
)
def test_labels_beyond_all_bounds(meta, tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", png())
        archive.writestr("dataset.json", meta)
    quick(dataset_tool.main, "inspect", path, says="dataset.json" if b"999999999]" not in meta else "999999999")
    quick(train_edm2.main, *small_command(path, tmp_path / "run"), says="x.zip")


# --- archives ---------------------------------------------------------------------------------------------------------


def test_archives_that_unfold(tmp_path):
    zeros = bytes(2**28)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", zeros)
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.zip").read_bytes())
    (tmp_path / "images-idx3-ubyte.gz").write_bytes(
        gzip.compress(bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]) + zeros, 1)
    )
    (tmp_path / "labels-idx1-ubyte.gz").write_bytes(b"")
    for name in ("x.zip", "x.npz", "images-idx3-ubyte.gz"):
        quick(dataset_tool.main, "convert", f"--source={tmp_path / name}", f"--dest={tmp_path}/y.zip", says=name)
    quick(dataset_tool.main, "inspect", tmp_path / "x.zip", says="x.zip")
    quick(
        calculate_metrics.cmdline, "calc", f"--images={tmp_path / 'x.zip'}", f"--ref={tmp_path / 'x.npz'}", says="x.zip"
    )


@pytest.mark.parametrize("value", [b"\xff" * 2**20 + b"\x01", b"\xff" * 10, b""])
def test_numbers_without_end_in_records(value, tmp_path):
    from test_dataset_archives import record

    (tmp_path / "x.tfrecord").write_bytes(record(b"\x08" + value) + record(b"\x0a" + value))
    quick(
        dataset_tool.main, "convert", f"--source={tmp_path}/x.tfrecord", f"--dest={tmp_path}/y.zip", says="x.tfrecord"
    )


@pytest.mark.parametrize("value", [1e308, np.inf, np.nan])
def test_arrays_of_numbers_that_float32_lacks(value, tmp_path):
    np.save(tmp_path / "a.npy", np.full([8, 8, 8], value))
    quick(dataset_tool.main, "inspect", tmp_path, says="a.npy")


def test_a_checkpoint_that_unfolds(tmp_path):
    from torch_utils import checkpoint

    path = tmp_path / "training-state-0000001.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/data/0", bytes(2**27))

    def load():
        with pytest.raises(ValueError, match="training-state-0000001.pt: .*unpacks"):
            checkpoint.load(path)

    assert_quick(load)
