"""Readers of published archives, on small files written by hand from the formats' own descriptions."""

import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from training.dataset import archives, lmdb_file
from training.dataset.convert import convert
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
    refused(tar(tmp_path / "photos.tar.gz", {"a.png": b""}), "no CIFAR batches")
    path = tar(tmp_path / "c.tar.gz", {"data_batch_1": python2_batch(cifar_rows, [0] * 5)})
    data = (tmp_path / "c.tar.gz").read_bytes()
    (tmp_path / "c.tar.gz").write_bytes(data[: len(data) // 2])
    refused(path, "truncated")


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
    refused(tmp_path / "keys.npz", "`data` and `labels`")
    np.savez(tmp_path / "object.npz", data=np.array([Evil()], dtype=object), labels=np.ones(1, int))
    refused(tmp_path / "object.npz", "no readable npz")
    (tmp_path / "text.npz").write_text("no npz")
    refused(tmp_path / "text.npz", "no readable npz")


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
    lmdb = pytest.importorskip("lmdb")
    base = lmdb.open(str(tmp_path / "data.mdb"), subdir=False, map_size=2**20)
    with base.begin(write=True) as transaction:
        for i in range(12):
            transaction.put(str(i).encode(), bytes([i] * 48))
        transaction.put(b"12", bytes([5] * 3 * 40 * 40))
    base.close()
    data = (tmp_path / "data.mdb").read_bytes()
    (tmp_path / "celeba.lmdb").write_bytes(data)
    for path in (tmp_path, tmp_path / "celeba.lmdb"):
        source = open_source(path)
        images = [np.asarray(source.read(i)) for i in range(source.count)]
        assert [image.shape for image in images] == [(4, 4, 3)] * 12 + [(40, 40, 3)]
        assert [set(image.ravel().tolist()) for image in images] == [{value} for value in [*range(12), 5]]
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


def test_unknown_files_are_refused(tmp_path):
    (tmp_path / "a.rar").write_bytes(b"")
    refused(tmp_path / "a.rar", "unknown kind")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "no images found")
