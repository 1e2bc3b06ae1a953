"""Readers of archives: MNIST idx, TFRecords, LMDB, Tiny ImageNet; those of `tars` and `stacks`.

Nothing inside a file is ever executed: protocol buffers are taken apart here. Needs no torch.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import zlib

import numpy as np

from dnnlib.reading import require_file
from dnnlib.util import natural_key, reason
from training.dataset import lmdb_file
from training.dataset.format import MOST_CLASSES, MOST_ITEM, ImageSource, base_name, open_image
from training.dataset.imagenet import read_words
from training.dataset.listing import Container, choose_part, said, shards
from training.dataset.stacks import open_stacks
from training.dataset.tables import open_tables
from training.dataset.tars import open_tars


def open_archive(path: str, part: str | None = None) -> ImageSource | None:
    """Path -> ImageSource, or None where it is none of the known archives. ValueError where it is one but broken.

    part: of those with parts, which one.
    """
    plain = (lambda path, _, reader=reader: reader(path) for reader in (_mnist, _tfrecords, _lmdb))
    sources = (reader(path, part) for reader in (*plain, open_tars, open_stacks, open_tables))
    return next((source for source in sources if source is not None), None)


# --- MNIST and its relatives: idx files -------------------------------------------------------------------------------


def _mnist(path):
    """`...-images-idx3-ubyte[.gz]`; labels from the `...-labels-idx1-ubyte[.gz]` beside it."""
    base = os.path.basename(path)
    match = re.fullmatch(r"(.*)images([-.])idx3-ubyte(\.gz)?", base)
    if match is None or not os.path.isfile(path):
        return None
    labels_base = f"{match[1]}labels{match[2]}idx1-ubyte{match[3] or ''}"
    labels_path = os.path.join(os.path.dirname(path), labels_base)
    if not os.path.isfile(labels_path):
        raise ValueError(f"--source={path}: the labels file {labels_base} must lie beside it")
    images, labels = read_idx(path, dimensions=3), read_idx(labels_path, dimensions=1)
    return ImageSource.of_arrays("mnist", images, labels, 10, grey=True)


def read_idx(path: str, dimensions: int) -> np.ndarray:
    """idx file of unsigned bytes, gzipped or not -> uint8 array with so many dimensions."""
    header = 4 + 4 * dimensions
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as f:
            start = f.read(header)
            if len(start) < header or start[:4] != bytes([0, 0, 8, dimensions]):
                raise ValueError(f"{path}: no idx file of {dimensions}-dimensional unsigned bytes")
            shape = struct.unpack(f">{dimensions}I", start[4:])
            data = f.read(min(math.prod(shape), MOST_ITEM) + 1)
    except (OSError, EOFError, MemoryError, zlib.error) as err:
        raise ValueError(f"{path}: not readable, perhaps truncated ({reason(err)})") from err
    if len(data) != math.prod(shape):
        raise ValueError(f"{path}: other than the {list(shape)} bytes of data that it announces; download it again")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


# --- TFRecords, without TensorFlow ------------------------------------------------------------------------------------


def _tfrecords(path):
    """One .tfrecord(s) file or a folder of them. Examples hold `data` (raw [C,H,W]) with `shape`, or an encoded image."""
    files = shards(path, lambda name: re.search(r"\.tfrecords?(-\d+-of-\d+)?$", name.lower()))
    if not files:
        return None
    places = [(file, start, length) for file in files for start, length in index_tfrecord(file)]
    if not places:
        raise ValueError(f"--source={path}: no records inside")
    describe = lambda i: f"{places[i][0]}@{places[i][1]}"

    def features(i):
        file, start, length = places[i]
        with open(file, "rb") as f:
            f.seek(start)
            return parse_example(f.read(length), describe(i))

    first = features(0)
    label_key = next((key for key in ("label", "image/class/label") if key in first), None)
    labels = None
    if label_key is not None:
        labels = [(features(i).get(label_key) or [None])[0] for i in range(len(places))]
        if not all(type(label) is int and 0 <= label < MOST_CLASSES for label in labels):
            raise ValueError(f"--source={path}: the label of some records is no integer from 0 to {MOST_CLASSES - 1}")
    num_classes = None if labels is None else max(labels) + 1
    about = dict(describe=describe, decode=_image_of_example)
    return ImageSource(base_name(path), len(places), features, labels, num_classes, **about)


def index_tfrecord(path: str) -> list[tuple[int, int]]:
    """[(offset, length)] of the records of one file; the checksum of every length is verified."""
    places, size = [], os.path.getsize(require_file(path))
    with open(path, "rb") as f:
        while True:
            header = f.read(12)
            if not header:
                return places
            length, checksum = struct.unpack("<QI", header) if len(header) == 12 else (size, 0)
            if length > MOST_ITEM or f.tell() + length + 4 > size or masked_crc32c(header[:8]) != checksum:
                raise ValueError(f"{path}: record {len(places)} is damaged or cut off; download the file again")
            places.append((f.tell(), length))
            f.seek(length + 4, os.SEEK_CUR)


def masked_crc32c(data: bytes) -> int:
    """TFRecord's checksum: CRC-32C (Castagnoli), rotated and offset."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


MOST_NUMBERS = 2**20  # of one feature that are read


def _varint(data, at):
    """(value, where it ends) of the number of 64 bits, seven a byte, at `at`."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value & (2**64 - 1), at
    raise ValueError("a number of more than 64 bits")


def _fields(data):
    """Protocol buffer -> (field number, int or bytes) pairs."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        length = {1: 8, 2: None, 5: 4}[key & 7]
        if length is None:
            length, at = _varint(data, at)
        if at + length > len(data):
            raise IndexError("field runs over the end")
        yield key >> 3, data[at : at + length]
        at += length


def parse_example(data: bytes, name: str = "record") -> dict[str, list]:
    """tf.train.Example -> {feature: list of bytes, of floats, or of ints}. ValueError where it is none."""
    try:
        features = {}
        for _, group in (f for f in _fields(data) if f[0] == 1):  # Example.features
            for _, entry in (f for f in _fields(group) if f[0] == 1):  # one key and value of the map
                pair = dict(_fields(entry))
                features[pair[1].decode()] = _feature_values(pair.get(2, b""))
        return features
    except (IndexError, KeyError, AttributeError, TypeError, ValueError, struct.error) as err:
        raise ValueError(f"{name}: no tf.train.Example inside ({type(err).__name__})") from err


def _feature_values(data):
    signed = lambda value: value - (1 << 64) if value >> 63 else value
    values = []
    for kind, content in _fields(data):  # 1: bytes, 2: float, 3: int64
        for _, value in _fields(content):
            if kind == 1:
                values.append(value)
            elif kind == 2:
                values += struct.unpack(f"<{len(value) // 4}f", value)
            elif isinstance(value, int):
                values.append(signed(value))
            else:  # a row of numbers without keys
                at = 0
                while at < len(value) and len(values) < MOST_NUMBERS:
                    number, at = _varint(value, at)
                    values.append(signed(number))
    return values


def _image_of_example(features, name, header_only):
    import PIL.Image

    key = next((key for key in ("image/encoded", "image", "encoded", "data") if key in features), None)
    content = features[key][:1] if key else []
    if not content or not isinstance(content[0], bytes):
        known = ", ".join(sorted(features))
        raise ValueError(f"{name}: no feature `data`, `image` or `image/encoded` with bytes; it has {known:.200}")
    if key != "data":
        return open_image(content[0], name, header_only)
    raw, shape = np.frombuffer(content[0], dtype=np.uint8), features.get("shape", [])[:4]
    sound = len(shape) == 3 and all(type(n) is int and n > 0 for n in shape) and shape[0] in (1, 3)
    if not sound or math.prod(shape) != raw.size:
        raise ValueError(f"{name}: {raw.size} bytes do not fit the shape {shape} (channels, rows, columns)")
    raw = raw.reshape(shape)
    return PIL.Image.fromarray(raw[0] if shape[0] == 1 else np.ascontiguousarray(raw.transpose(1, 2, 0)))


# --- LMDB ------------------------------------------------------------------------------------------------------------


_COUNTS = re.compile(rb"length|len|__len__|__keys__|keys|num[-_]samples|metadata|meta", re.IGNORECASE)
_LABEL = re.compile(rb"label|cls|class|target", re.IGNORECASE)


def _lmdb(path):
    """Folder with data.mdb, or a file .lmdb or .mdb: encoded images; labels under keys like label-0001 of image-0001."""
    file = os.path.join(path, "data.mdb") if os.path.isdir(path) else path
    if not os.path.exists(file) or not file.lower().endswith((".mdb", ".lmdb")):
        return None

    def content(place):
        with open(file, "rb") as opened:
            opened.seek(place[1])
            return opened.read(place[2])

    number = lambda key: b"".join(re.findall(rb"\d+", key)).lstrip(b"0")
    found = sorted(lmdb_file.entries(file), key=lambda place: natural_key(place[0].decode("latin1")))
    places = [place for place in found if not _COUNTS.fullmatch(place[0]) and not _LABEL.search(place[0])]
    table = {number(place[0]): place for place in found if _LABEL.search(place[0])}
    if not places:
        raise ValueError(f"--source={path}: no images found")
    describe, labels, num_classes = lambda i: f"{path}[{places[i][0]!r}]", None, None
    if table:
        labels = [_lmdb_label(content(table[n]), path, table[n][0]) for p in places if (n := number(p[0])) in table]
        if len(labels) != len(places) or len(table) != len(places):
            raise ValueError(
                f"--source={path}: {len(table)} labels for {len(places)} images, by the numbers in their keys"
            )
        num_classes = max(labels) + 1
    return ImageSource(
        base_name(path),
        len(places),
        lambda i: content(places[i]),
        labels,
        num_classes,
        describe=describe,
    )


def _lmdb_label(data, path, key):
    if not re.fullmatch(rb"\s*\d{1,9}\s*", data) or int(data) >= MOST_CLASSES:
        raise ValueError(
            f"--source={path}: label {data[:20]!r} of {key!r} is no class index from 0 to {MOST_CLASSES - 1}"
        )
    return int(data)


# --- Tiny ImageNet ----------------------------------------------------------------------------------------------------


def open_tiny(files: Container, part: str | None = None) -> ImageSource | None:
    """tiny-imagenet-200 as folder or zip, or its folder `val`: by default the training part. None where it is neither.

    Labels: rank of the WordNet id; those of the validation images come from val_annotations.txt, test has none.
    """
    names, read = set(files.names), files.read
    root = next((n[:-9] for n in files.names if re.fullmatch(r"([^/]+/)?wnids\.txt", n)), None)
    if root is None:
        above = Container(os.path.dirname(os.path.abspath(files.path))) if "val_annotations.txt" in names else None
        return open_tiny(above, part or "val") if above and "wnids.txt" in above.names else None
    wnids = sorted(read(f"{root}wnids.txt").decode().split())
    words = read_words(read(f"{root}words.txt")) if f"{root}words.txt" in names else {}
    index = {wnid: i for i, wnid in enumerate(wnids)}
    parts = [p for p in ("train", "val", "test") if any(name.startswith(f"{root}{p}/") for name in files.names)]
    chosen = choose_part(parts or ["train"], part, files.path)
    inside = [
        n for n in files.names if n.startswith(f"{root}{chosen}/") and n.lower().endswith((".jpeg", ".jpg", ".png"))
    ]
    labels = None
    if chosen == "train":
        found = {n: n[len(root) :].split("/")[1] for n in inside}
        lacking = sorted({*wnids} - {*found.values()})
        if lacking:
            raise ValueError(f"--source={files.path}: no images of {lacking[0]}; download Tiny ImageNet again")
        inside = sorted(
            (n for n in inside if found[n] in index), key=lambda n: index[found[n]]
        )  # as listed within a class
        labels = [index[found[n]] for n in inside]
    elif chosen == "val":
        rows = dict(line.split("\t")[:2] for line in read(f"{root}val/val_annotations.txt").decode().splitlines())
        unknown = next((n for n in inside if rows.get(n.rpartition("/")[2]) not in index), None)
        if unknown is not None:
            raise ValueError(f"{files.path}: no known class of {unknown} in val_annotations.txt")
        labels = [index[rows[n.rpartition("/")[2]]] for n in inside]
    return ImageSource(
        name="tiny-imagenet",
        count=len(inside),
        fetch=lambda i: read(inside[i]),
        labels=labels,
        num_classes=len(wnids) if labels else None,
        class_names=[f"{wnid} {words[wnid]}" if wnid in words else wnid for wnid in wnids] if labels else None,
        describe=lambda i: inside[i],
        decode=open_image,
        about=f"Tiny ImageNet: {len(inside)} images, {len(wnids)} classes{said(chosen, parts)}",
        parted=True,
    )
