"""Readers of published archives, on small files written by hand from the formats' own descriptions."""

import gzip
import io
import json
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
from pyarrow import feather
from pyarrow import parquet as pq
from small_runs import one_line, run

import calculate_metrics
from training.dataset import ImageFolderDataset, archives, lmdb_file
from training.dataset.convert import convert
from training.dataset.format import png_bytes
from training.dataset.sources import open_source


def images_of(source):
    return np.stack([np.asarray(source.read(i)) for i in range(source.count)])


def refused(path, message):
    with pytest.raises(ValueError, match=message) as err:
        source = open_source(path)
        source.read(source.count - 1)
    assert "\n" not in str(err.value)


# --- CIFAR: Python 2 wrote these pickles, protocol 2 ------------------------------------------------------------------


def short_string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return (b"U" + bytes([len(data)]) if len(data) < 256 else b"T" + struct.pack("<i", len(data))) + data


def python2_batch(data, labels, label_key="labels"):
    """Opcode by opcode what Python 2's cPickle wrote for {'data': uint8 array, 'labels': list}."""
    number = lambda n: b"J" + struct.pack("<i", n)
    dtype = b"cnumpy\ndtype\n(" + short_string("u1") + number(0) + number(1) + b"tR"
    dtype += b"(" + number(3) + short_string("|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + number(0) + b"\x85" + short_string("b") + b"tR"
    )
    array += b"(" + number(1) + number(data.shape[0]) + number(data.shape[1]) + b"\x86" + dtype + b"\x89"
    array += short_string(data.tobytes()) + b"tb"
    values = b"](" + b"".join(number(k) for k in labels) + b"e"
    return b"\x80\x02}(" + short_string("data") + array + short_string(label_key) + values + b"u."


def tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.fixture
def cifar_rows():
    return np.random.RandomState(0).randint(0, 256, [5, 3072]).astype(np.uint8)


@pytest.mark.parametrize("writer", ["python 2", "python 3"])
def test_cifar10(tmp_path, cifar_rows, writer):
    names = [f"class {i}" for i in range(10)]
    if writer == "python 2":
        batch = python2_batch
    else:
        batch = lambda data, labels: pickle.dumps({b"data": data, b"labels": labels}, protocol=2)
    files = {
        "cifar-10-batches-py/data_batch_2": batch(cifar_rows[3:], [9, 0]),
        "cifar-10-batches-py/data_batch_1": batch(cifar_rows[:3], [3, 3, 5]),
        "cifar-10-batches-py/test_batch": batch(cifar_rows[:1], [1]),
        "cifar-10-batches-py/batches.meta": pickle.dumps({"label_names": names}, protocol=2),
        "cifar-10-batches-py/readme.html": b"",
    }
    source = open_source(tar(tmp_path / "cifar-10-python.tar.gz", files))
    assert source.labels == [3, 3, 5, 9, 0] and source.num_classes == 10 and source.class_names == names
    # Rows are red plane, green plane, blue plane (CIFAR's own description).
    planes = images_of(source).transpose(0, 3, 1, 2).reshape(5, -1)
    assert np.array_equal(planes, cifar_rows)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert np.array_equal(images_of(open_source(folder)), images_of(source))
    summary = convert(source, tmp_path / "c.zip", sources=[3], per_source=1, holdout=tmp_path / "h.zip")
    assert summary["count"] == summary["holdout"] == 1 and summary["num_classes"] == 10


def test_cifar100(tmp_path, cifar_rows):
    files = {"cifar-100-python/train": python2_batch(cifar_rows, [7, 0, 1, 99, 4], "fine_labels")}
    source = open_source(tar(tmp_path / "cifar-100-python.tar.gz", files))
    assert source.labels == [7, 0, 1, 99, 4] and source.num_classes == 100


class Evil:
    def __reduce__(self):
        return (open, ("owned", "w"))


class EvilState:
    def __reduce__(self):
        return (eval, ("open('owned', 'w')",))


@pytest.mark.parametrize("evil", [Evil(), EvilState(), {"labels": [Evil()]}, {"data": EvilState(), "labels": []}])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cifar_pickles_are_never_executed(tmp_path, monkeypatch, evil, protocol):
    monkeypatch.chdir(tmp_path)
    refused(tar(tmp_path / "x.tar.gz", {"data_batch_1": pickle.dumps(evil, protocol=protocol)}), "refuses to load")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data_batch_1: not read"),
        (pickle.dumps([1]), "no dictionary"),
        (pickle.dumps({"data": np.zeros([2, 3072], np.float32), "labels": [0, 0]}), "uint8"),
        (pickle.dumps({"data": np.zeros([2, 100], np.uint8), "labels": [0, 0]}, protocol=2), r"\[N,3072\]"),
        (pickle.dumps({"data": np.zeros([2, 3072], np.uint8), "labels": [0]}, protocol=2), "1 labels for 2 images"),
        (pickle.dumps({"data": np.zeros([1, 3072], np.uint8), "labels": [None]}, protocol=2), "no class index"),
    ],
)
def test_broken_cifar(tmp_path, content, message):
    refused(tar(tmp_path / "x.tar.gz", {"data_batch_1": content}), message)


def test_other_and_truncated_tars(tmp_path, cifar_rows):
    refused(tar(tmp_path / "notes.tar.gz", {"a.txt": b""}), "no CIFAR batches.* no images as in WebDataset")
    path = tar(tmp_path / "c.tar.gz", {"data_batch_1": python2_batch(cifar_rows, [0] * 5)})
    data = (tmp_path / "c.tar.gz").read_bytes()
    (tmp_path / "c.tar.gz").write_bytes(data[: len(data) // 2])
    refused(path, "truncated")


def cifar_binary(rows, *labels):
    return b"".join(bytes(k) + row.tobytes() for row, *k in zip(rows, *labels, strict=True))


@pytest.mark.parametrize("extracted", [False, True])
def test_cifar_binary_and_parts(tmp_path, cifar_rows, extracted):
    """Records of a label (CIFAR-100: a coarse and a fine one) and 3 x 1024 pixels, as on the data sets' page."""
    ten = {
        "data_batch_1.bin": cifar_binary(cifar_rows[:2], [3, 9]),
        "test_batch.bin": cifar_binary(cifar_rows[2:], [0, 1, 2]),
        "batches.meta.txt": "\n".join(f"class{i}" for i in range(10)).encode(),
        "readme.html": b"",
    }
    hundred = {"train.bin": cifar_binary(cifar_rows, [0] * 5, [7, 99, 0, 1, 2]), "fine_label_names.txt": b"a b"}
    paths = []
    for name, files in (("ten", ten), ("hundred", hundred), ("test", {"test_batch.bin": ten["test_batch.bin"]})):
        if extracted:
            (tmp_path / name).mkdir()
            for file, data in files.items():
                (tmp_path / name / file).write_bytes(data)
            paths.append(tmp_path / name)
        else:
            paths.append(tar(tmp_path / f"{name}.tar.gz", {f"cifar/{file}": data for file, data in files.items()}))
    pixels = lambda source: images_of(source).transpose(0, 3, 1, 2).reshape(source.count, -1)
    train, test = open_source(paths[0]), open_source(paths[0], "test")
    assert train.labels == [3, 9] and train.num_classes == 10 and train.class_names[9] == "class9"
    assert np.array_equal(pixels(train), cifar_rows[:2]) and "part train; left out: test" in train.about
    assert test.labels == [0, 1, 2] and np.array_equal(pixels(test), cifar_rows[2:])
    source = open_source(paths[1])
    assert source.labels == [7, 99, 0, 1, 2] and source.num_classes == 100
    alone = open_source(paths[2])
    assert alone.count == 3 and "part test" in alone.about
    with pytest.raises(ValueError, match="--split-folder=val: no such part.*train, test"):
        open_source(paths[0], "val")
    refused(tar(tmp_path / "short.tar", {"data_batch_1.bin": bytes(3072)}), "no records of 3073")
    refused(tar(tmp_path / "label.tar", {"data_batch_1.bin": bytes([10]) + bytes(3072)}), "label 10 is no class")


# --- WebDataset -------------------------------------------------------------------------------------------------------


def encoded(value, side=8, kind="png"):
    file = io.BytesIO()
    PIL.Image.new("RGB", (side, side), (value, 2 * value, 0)).save(file, format=kind)
    return file.getvalue()


def plain_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_webdataset(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    first = {"0.png": encoded(1), "0.cls": b"3\n", "0.txt": b"a caption", "._0.png": b"junk"}
    plain_tar(shards / "s-2.tar", first)
    second = {
        "a/1.jpg": encoded(9, kind="jpeg"),
        "a/1.json": b'{"label": 0}',
        "a/2.img.png": encoded(7),
        "a/2.cls": b"1",
    }
    with tarfile.open(shards / "s-10.tar.gz", "w:gz") as archive:
        for name, data in second.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    source = open_source(shards)
    assert source.labels == [3, 0, 1] and source.num_classes == 4 and "1 stray file" in source.about
    assert np.array_equal(images_of(source)[[0, 2], 0, 0], [[1, 2, 0], [7, 14, 0]])
    assert open_source(shards / "s-2.tar").labels == [3]
    assert convert(shards / "s-2.tar", tmp_path / "o.zip")["count"] == 1
    assert open_source(plain_tar(tmp_path / "bare.tar", {"0.png": encoded(1)})).labels is None
    refused(plain_tar(tmp_path / "x.tar", {"a/0.png": encoded(1), "b/0.png": encoded(1)}), "extract it")
    refused(plain_tar(tmp_path / "y.tar", {"0.png": encoded(1), "0.cls": b"cat"}), "y.tar: 0.cls: label .*cat")
    refused(plain_tar(tmp_path / "z.tar", {"0.a.png": encoded(1), "0.b.png": encoded(1)}), "several images")
    part = open_source(plain_tar(tmp_path / "p.tar", {"0.png": encoded(1), "1.png": encoded(1), "1.cls": b"1"}))
    assert part.labels == [None, 1] and "1 of 2 samples" in part.missing
    (tmp_path / "cut.tar").write_bytes((shards / "s-2.tar").read_bytes()[:700])
    refused(tmp_path / "cut.tar", "truncated")


def test_webdataset_as_its_library_reads_it(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    files = {f"{k}/{i}.{e}": d for k in "ab" for i in range(3) for e, d in (("png", encoded(i)), ("cls", b"%d" % i))}
    path = plain_tar(tmp_path / "x.tar", files)
    theirs = [(s["png"], int(s["cls"])) for s in webdataset.WebDataset(str(path), shardshuffle=False)]
    source = open_source(path)
    assert source.labels == [label for _, label in theirs]
    for i, (data, _) in enumerate(theirs):
        assert np.array_equal(source.read(i), PIL.Image.open(io.BytesIO(data)))


# --- MNIST idx --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist(tmp_path, suffix):
    images = np.random.RandomState(0).randint(0, 256, [4, 28, 28]).astype(np.uint8)
    opener = gzip.open if suffix else open
    with opener(tmp_path / f"train-images-idx3-ubyte{suffix}", "wb") as f:
        f.write(struct.pack(">4I", 2051, 4, 28, 28) + images.tobytes())  # Magic numbers of the MNIST page
    path = str(tmp_path / f"train-images-idx3-ubyte{suffix}")
    refused(path, "must lie beside")
    with opener(tmp_path / f"train-labels-idx1-ubyte{suffix}", "wb") as f:
        f.write(struct.pack(">2I", 2049, 4) + bytes([7, 2, 1, 0]))
    source = open_source(path)
    assert source.labels == [7, 2, 1, 0] and source.num_classes == 10 and source.grey
    assert np.array_equal(images_of(source), images)
    summary = convert(path, tmp_path / "m.zip", transform="pad", resolution=(32, 32))
    assert summary["channels"] == 1
    with opener(path, "wb") as f:
        f.write(struct.pack(">4I", 2051, 5, 28, 28) + images.tobytes())
    refused(path, "bytes of data")
    with opener(path, "wb") as f:
        f.write(b"nonsense")
    refused(path, "no idx file")


# --- npz shards -------------------------------------------------------------------------------------------------------


def test_npz_shards(tmp_path):
    rows = np.random.RandomState(0).randint(0, 256, [5, 3 * 4 * 4]).astype(np.uint8)
    folder = tmp_path / "Imagenet32_train_npz"
    folder.mkdir()
    np.savez(folder / "train_data_batch_2.npz", data=rows[2:4], labels=np.array([1000, 1]))
    np.savez(folder / "train_data_batch_10.npz", data=rows[4:], labels=np.array([2]))
    np.savez(folder / "train_data_batch_1.npz", data=rows[:2], labels=np.array([5, 6]), mean=np.zeros(48))
    source = open_source(folder)
    assert source.labels == [4, 5, 999, 0, 1] and source.num_classes == 1000  # Counted from 1 in the files.
    assert np.array_equal(images_of(source).transpose(0, 3, 1, 2).reshape(5, -1), rows)
    assert open_source(folder / "train_data_batch_10.npz").labels == [1]
    np.savez(folder / "train_data_batch_3.npz", data=rows[:, :12], labels=np.ones(5, int))
    refused(folder, "unlike")
    np.savez(tmp_path / "bad.npz", data=rows.astype(np.float32), labels=np.ones(5, int))
    refused(tmp_path / "bad.npz", "must be uint8")
    np.savez(tmp_path / "keys.npz", images=rows)
    refused(tmp_path / "keys.npz", r"images: shape \[5, 48\] is not")
    np.savez(tmp_path / "object.npz", data=np.array([Evil()], dtype=object), labels=np.ones(1, int))
    refused(tmp_path / "object.npz", "no readable npz")
    (tmp_path / "text.npz").write_text("no npz")
    refused(tmp_path / "text.npz", "no readable npz")


def test_sample_batches_and_medmnist(tmp_path):
    x = np.random.RandomState(0).randint(0, 256, [4, 16, 16, 3]).astype(np.uint8)
    np.savez(tmp_path / "adm.npz", x)
    np.savez(tmp_path / "adm_labels.npz", x, np.arange(4))
    parts = {"train_images": x, "train_labels": [[k] for k in (1, 0, 1, 1)], "test_images": x[:1], "test_labels": [[0]]}
    np.savez(tmp_path / "medmnist.npz", **parts)
    np.savez(tmp_path / "multi.npz", train_images=x[..., 0], train_labels=np.eye(4, 14, dtype=np.uint8))
    np.savez(tmp_path / "keras.npz", x_train=x[..., 0], y_train=np.arange(4, dtype=np.uint8), x_test=x[..., 0])
    for name, labels in (("adm", None), ("adm_labels", [0, 1, 2, 3]), ("medmnist", [1, 0, 1, 1])):
        source = open_source(tmp_path / f"{name}.npz")
        assert source.labels == labels and np.array_equal(images_of(source), x), name
    test = open_source(tmp_path / "medmnist.npz", "test")
    assert test.count == 1 and test.labels == [0] and "left out: train" in test.about
    assert open_source(tmp_path / "multi.npz").labels == np.eye(4, 14).tolist()
    grey = open_source(tmp_path / "keras.npz")
    assert np.array_equal(images_of(grey), x[..., 0]) and grey.grey and grey.labels == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="--split-folder=val: no such part.*train, test"):
        open_source(tmp_path / "medmnist.npz", "val")
    with pytest.raises(ValueError, match="--split-folder=test: is for collections with such parts"):
        open_source(tmp_path / "adm.npz", "test")
    np.savez(tmp_path / "short.npz", x, np.arange(3))
    refused(tmp_path / "short.npz", r"`arr_1` int64 \[3\] are no labels")
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.zeros([3, 3]))
    refused(tmp_path / "other.npz", r"no array of images called .*mu \[3\], sigma \[3, 3\]")


@pytest.mark.parametrize(
    "shape, dtype, expected",
    [
        ([5, 8, 8], "u1", [5, 1, 8, 8]),
        ([5, 8, 8, 3], "u1", [5, 3, 8, 8]),
        ([5, 3, 8, 8], "u1", [5, 3, 8, 8]),
        ([5, 4, 4, 3], "u1", [5, 3, 4, 4]),
        ([5, 4, 4, 4], "f4", [5, 4, 4, 4]),
        ([5, 6, 8, 3], "u1", [5, 3, 6, 8]),
        ([5, 8, 8, 16], "f2", [5, 16, 8, 8]),
        ([5, 8, 4, 4], "f8", [5, 8, 4, 4]),
        ([5, 8, 8], "?", [5, 1, 8, 8]),
        ([5, 16, 8, 8], "u1", "neither"),
        ([5, 8, 8], "i8", "save pixels as uint8"),
        ([5, 8], "u1", "is not"),
        ([2, 5, 3, 8, 8], "u1", "is not"),
    ],
)
def test_layouts_of_stacks(tmp_path, shape, dtype, expected):
    array = (np.random.RandomState(0).rand(*shape) * 200).astype(dtype)
    np.save(tmp_path / "x.npy", array)
    if isinstance(expected, str):
        refused(tmp_path / "x.npy", expected)
        return
    source = open_source(tmp_path / "x.npy")
    assert source.count == 5 and source.latents == (array.dtype.kind == "f") and source.labels is None
    last = expected[1] == shape[-1] and expected[1:] != shape[1:]
    plain = array[:, None] if len(shape) == 3 else np.moveaxis(array, -1, 1) if last else array
    read = np.stack([decode(source.read(i)) for i in range(5)])
    assert list(read.shape) == expected and np.array_equal(
        read, plain * 255 if dtype == "?" else plain.astype(read.dtype)
    )


def test_metrics_read_sample_batches(tmp_path):
    """calc --images=samples.npz (guided-diffusion) scores what a folder of the same images scores."""
    x = np.random.RandomState(0).randint(0, 256, [24, 8, 8, 3]).astype(np.uint8)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(x):
        PIL.Image.fromarray(image).save(tmp_path / "folder" / f"{i}.png")
    np.savez(tmp_path / "x.npz", x)
    common = [f"--data={tmp_path / 'folder'}", "--metrics=pixel", "--device=cpu", "--workers=0"]
    scores = [run(calculate_metrics.cmdline, "calc", f"--images={tmp_path / n}", *common) for n in ("x.npz", "folder")]
    scores = [json.loads(score.stdout) for score in scores]
    assert scores[0]["metrics"] == scores[1]["metrics"]
    np.savez(tmp_path / "mu.npz", mu=np.zeros(3))
    text = one_line(calculate_metrics.cmdline, "calc", f"--images={tmp_path / 'mu.npz'}", *common)
    assert "--images: " in text and "mu.npz: no array of images called" in text


def decode(item):
    """Item of a source -> [C,H,W]."""
    array = np.asarray(item)
    if not isinstance(item, PIL.Image.Image):
        return array
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def test_arrays_in_folders_are_pixels_by_dtype(tmp_path):
    """One item a file: uint8 are pixels also after convert; floats stay; stacks are many items."""
    x = np.random.RandomState(0).randint(0, 256, [4, 8, 8, 3]).astype(np.uint8)
    for k, label in enumerate("ab"):
        (tmp_path / "p" / label).mkdir(parents=True)
        np.save(tmp_path / "p" / label / "0.npy", x[k])
        np.save(tmp_path / "p" / label / "1.npy", x[2 + k].transpose(2, 0, 1))
    summary = convert(tmp_path / "p", tmp_path / "p.zip")
    dataset = ImageFolderDataset(tmp_path / "p.zip")
    assert summary["per_source"] == {0: 2, 1: 2} and dataset[0][0].dtype == np.uint8
    assert all(np.array_equal(dataset[i][0], x[k].transpose(2, 0, 1)) for i, k in enumerate([0, 2, 1, 3]))
    assert np.array_equal(ImageFolderDataset(tmp_path / "p")[0][0], x[0].transpose(2, 0, 1))
    np.save(tmp_path / "p" / "b" / "1.npy", x[0].astype(np.float32))
    refused(tmp_path / "p", "b/1.npy holds float32, unlike a/0.npy")
    (tmp_path / "s").mkdir()
    for i in (2, 10):
        np.save(tmp_path / "s" / f"{i}.npy", np.full([3, 4, 8, 8], i, np.float32))
    stacks = open_source(tmp_path / "s")
    assert stacks.count == 6 and stacks.read(3).shape == (4, 8, 8) and stacks.read(3)[0, 0, 0] == 10
    (tmp_path / "s" / "dataset.json").write_text('{"labels": null}')
    refused(tmp_path / "s", "holds 3 items")


# --- TFRecords --------------------------------------------------------------------------------------------------------


def varint(n):
    n &= (1 << 64) - 1
    out = b""
    while n >= 128:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(**features):
    """tf.train.Example by the published .proto: bytes, lists of ints (packed), lists of floats."""
    body = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = field(1, field(1, value))
        elif isinstance(value[0], float):
            feature = field(2, field(1, struct.pack(f"<{len(value)}f", *value)))
        else:
            feature = field(3, field(1, b"".join(varint(v) for v in value)))
        body += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, body)


def record(data):
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", archives.masked_crc32c(length)) + data + b"\0\0\0\0"


def test_checksum_equals_published_values():
    unmask = lambda crc: ((r := (crc - 0xA282EAD8) & 0xFFFFFFFF) << 15 | r >> 17) & 0xFFFFFFFF
    assert unmask(archives.masked_crc32c(b"123456789")) == 0xE3069283  # Castagnoli check value
    assert unmask(archives.masked_crc32c(bytes(32))) == 0x8A9136AA  # RFC 3720, B.4
    assert unmask(archives.masked_crc32c(bytes(range(32)))) == 0x46DD794E


def test_parse_example():
    parsed = archives.parse_example(example(a=b"xyz", shape=[3, 300, -1], f=[0.5, -2.0]))
    assert parsed == {"a": [b"xyz"], "shape": [3, 300, -1], "f": [0.5, -2.0]}
    unpacked = field(1, field(1, field(1, b"n") + field(2, field(3, b"\x08\x05\x08\x07"))))
    assert archives.parse_example(unpacked) == {"n": [5, 7]}
    for broken in [b"\x0a\xff", b"\x0a\x05ab", b"\x0b", example(a=b"xyz")[:-1], b"\x0a\x02\x08\x01"]:
        with pytest.raises(ValueError, match=r"no tf\.train\.Example"):
            archives.parse_example(broken)


def test_tfrecords(tmp_path):
    images = np.random.RandomState(0).randint(0, 256, [3, 3, 8, 8]).astype(np.uint8)
    records = [
        record(example(data=image.tobytes(), shape=[3, 8, 8], label=[k]))
        for image, k in zip(images, [1, 0, 1], strict=True)
    ]
    folder = tmp_path / "celeba-tfr"
    folder.mkdir()
    (folder / "train-r08-s-0000-of-0120.tfrecords").write_bytes(records[0] + records[1])
    (folder / "train-r08-s-0001-of-0120.tfrecords").write_bytes(records[2])
    source = open_source(folder)
    assert source.labels == [1, 0, 1] and source.num_classes == 2
    assert np.array_equal(images_of(source).transpose(0, 3, 1, 2), images)
    encoded = io.BytesIO()
    PIL.Image.fromarray(images[0].transpose(1, 2, 0)).save(encoded, format="png")
    path = tmp_path / "png.tfrecord"
    path.write_bytes(record(example(**{"image/encoded": encoded.getvalue()})))
    source = open_source(path)
    assert source.labels is None and np.array_equal(images_of(source)[0].transpose(2, 0, 1), images[0])
    path.write_bytes(records[0][:-20])
    refused(path, "record 0 is damaged or cut off")
    path.write_bytes(records[0] + b"\1" + records[1][1:])
    refused(path, "record 1 is damaged")
    path.write_bytes(record(example(data=bytes(10), shape=[3, 8, 8])))
    refused(path, "do not fit")
    path.write_bytes(record(example(other=b"x")))
    refused(path, "no feature `data`")
    path.write_bytes(b"")
    refused(path, "no records")


# --- Tiny ImageNet, LMDB ----------------------------------------------------------------------------------------------


def test_tiny_imagenet(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]
    for k, wnid in enumerate(wnids):
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for i in (0, 2, 10):
            PIL.Image.new("RGB", (8, 8), (k, i, 0)).save(folder / f"{wnid}_{i}.png")
        (folder.parent / f"{wnid}_boxes.txt").write_text("")
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    (root / "words.txt").write_text("n01\tgoldfish\nn02\tsalamander\nn99\tother\n")
    images = root / "val" / "images"
    images.mkdir(parents=True)
    for name in ["val_0.png", "val_1.png"]:
        PIL.Image.new("L", (8, 8), 5).save(images / name)
    (root / "val" / "val_annotations.txt").write_text("val_0.png\tn03\t0\t0\t9\t9\nval_1.png\tn01\t0\t0\t9\t9\n")
    source = open_source(root)
    assert source.labels == [0] * 3 + [1] * 3 + [2] * 3 and source.num_classes == 3
    assert source.class_names == ["n01 goldfish", "n02 salamander", "n03"]
    assert images_of(source)[:, 0, 0].tolist() == [[k, i, 0] for k in (1, 2, 0) for i in (0, 2, 10)]
    validation = open_source(root / "val")
    assert validation.labels == [2, 0] and validation.num_classes == 3
    summary = convert(validation, tmp_path / "v.zip")
    assert summary["channels"] == 3 and summary["per_source"] == {0: 1, 2: 1}
    (root / "val" / "val_annotations.txt").write_text("val_0.png\tn77\n")
    refused(root / "val", "no known class")
    (root / "wnids.txt").write_text("n01\nn55\n")
    refused(root, "n55")


def test_lmdb(tmp_path):
    """Any encoded image by its header; `length` and labels are no images; raw bytes are refused, whatever their number."""
    lmdb = pytest.importorskip("lmdb")
    kinds = ["png", "jpeg", "webp", "bmp", "gif", "tiff"]

    def fill(name, items):
        base = lmdb.open(str(tmp_path / name), subdir=False, map_size=2**22)
        with base.begin(write=True) as transaction:
            for key, value in items.items():
                transaction.put(key.encode(), value)
        base.close()
        return tmp_path / name

    odd = {kind: encoded(5, side=40, kind=kind) for kind in kinds}
    odd = {kind: data + bytes(3 * 64**2 - len(data)) for kind, data in odd.items()}  # as long as 64 x 64 raw pixels
    images = {f"image-{i:05d}": odd[kind] for i, kind in enumerate(kinds)}
    labels = {f"label-{i}": b"%d" % (i % 3) for i in range(6)}
    for path in (fill("data.mdb", {"length": b"006", **images, **labels}), tmp_path):
        source = open_source(path)
        assert source.count == 6 and source.labels == [0, 1, 2, 0, 1, 2] and source.num_classes == 3
        assert {image.shape[:2] for image in (np.asarray(source.read(i)) for i in range(6))} == {(40, 40)}
    assert open_source(fill("plain.lmdb", {"length": b"6", **images})).labels is None
    refused(fill("raw.mdb", {"0": bytes(range(48))}), "is corrupt or no image")
    refused(fill("few.mdb", {**images, "label-0": b"1"}), "1 labels for 6 images")
    refused(fill("bad.mdb", {"image-0": odd["png"], "label-0": b"cat"}), "label b'cat'")
    data = (tmp_path / "data.mdb").read_bytes()
    for size in (0, 10, 4096, 9000, len(data) // 2):
        (tmp_path / "data.mdb").write_bytes(data[:size])
        refused(tmp_path, "data.mdb")
    (tmp_path / "data.mdb").write_bytes(bytes(8192))
    refused(tmp_path, "no readable LMDB")


def test_lmdb_as_its_library_reads_it(tmp_path):
    """Several levels of pages, values in pages of their own, removed and replaced ones."""
    lmdb = pytest.importorskip("lmdb")
    path, rng = str(tmp_path / "data.mdb"), np.random.RandomState(0)
    base = lmdb.open(path, subdir=False, map_size=2**26)
    for step in range(3):
        with base.begin(write=True) as transaction:
            for key in map(str, rng.randint(5000, size=3000)):
                if step and rng.rand() < 0.3:
                    transaction.delete(key.encode())
                else:
                    transaction.put(key.encode(), rng.bytes(rng.choice([0, 1, 50, 2000, 5000])))
    with base.begin() as transaction:
        expected = [(bytes(key), bytes(value)) for key, value in transaction.cursor()]
    assert base.stat()["depth"] >= 3
    base.close()
    data = Path(path).read_bytes()
    assert [(key, data[start : start + length]) for key, start, length in lmdb_file.entries(path)] == expected


def hugging_face_table(images, labels, names=("cat", "dog")):
    """A table as datasets.Dataset writes it: files in a struct, the meaning of columns as JSON in the schema."""
    files = pa.array([{"bytes": png_bytes(image), "path": None} for image in images], pa.struct(
        [("bytes", pa.binary()), ("path", pa.string())]
    ))  # fmt: skip
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return pa.table({"image": files, "label": pa.array(labels, pa.int64())}).replace_schema_metadata(about)


@pytest.mark.parametrize("form", ["parquet", "arrow", "feather", "folder", "data"])
def test_tables(tmp_path, form):
    images = np.random.default_rng(0).integers(0, 256, [6, 3, 8, 8], dtype=np.uint8)
    labels, table = [0, 1, 1, 0, 1, 0], lambda rows: hugging_face_table(images[rows], [labels[i] for i in rows])
    path = tmp_path / "set"
    if form in ("folder", "data"):
        inside = path / "data" if form == "data" else path
        inside.mkdir(parents=True)
        for shard, rows in enumerate(([0, 1, 2], [3, 4, 5])):
            pq.write_table(table(rows), inside / f"train-{shard:05d}-of-00002.parquet")
        pq.write_table(table([1]), inside / "test-00000-of-00001.parquet")
    elif form == "parquet":
        pq.write_table(table(range(6)), path := tmp_path / "set.parquet")
    elif form == "arrow":  # the streams of the library's cache
        path = tmp_path / "set.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table([0]).schema) as writer:
            writer.write_table(table(range(6)))
    else:
        feather.write_feather(table(range(6)), path := tmp_path / "set.feather")
    source = open_source(path)
    assert [source.count, source.labels, source.num_classes, source.class_names] == [6, labels, 2, ["cat", "dog"]]
    for i, image in enumerate(images):
        assert np.array_equal(np.array(source.read(i)), image.transpose(1, 2, 0))
    if form == "folder":
        assert open_source(path, "test").labels == [1] and "train" in source.about


def test_tables_that_are_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "no column of encoded images; it has text, label")
    image = pa.array([{"bytes": None, "path": "x.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": image, "label": [0]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="row 0 of column image holds no encoded image"):
        open_source(tmp_path / "b.parquet").read(0)
    png = [{"bytes": png_bytes(np.zeros([1, 8, 8], np.uint8)), "path": None}]
    pq.write_table(pa.table({"image": png, "label": [-1]}), tmp_path / "c.parquet")
    refused(tmp_path / "c.parquet", "column label must hold class indices")


def test_unknown_files_are_refused(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    for path in (tmp_path / "hf", tmp_path / "hf" / "train-00000-of-00001.parquet"):
        refused(path, "no readable table")
    (tmp_path / "a.rar").write_bytes(b"")
    refused(tmp_path / "a.rar", "unknown kind")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "no images found")
