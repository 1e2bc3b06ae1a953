"""Tar archives: CIFAR, python or binary version, and WebDataset. Needs no torch.

Nothing inside a file is ever executed: CIFAR's pickles are read as data (torch_utils/pickles.py).
"""

from __future__ import annotations

import functools
import os
import re
import tarfile
from pathlib import Path

import numpy as np

from dnnlib.reading import parse_json, require_file
from dnnlib.util import natural_key, reason
from torch_utils import pickles
from training.dataset.format import (
    MOST_CLASSES,
    MOST_ITEM,
    ImageSource,
    base_name,
    extension,
    image_extensions,
)
from training.dataset.labels import path_of
from training.dataset.listing import choose_part, is_junk, said, shards

MOST_CIFAR = 2**29  # bytes of all files together; published: 186 MB
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_CIFAR_PART = re.compile(r"(?:(data_batch_\d+|train)|(test_batch|test))(\.bin)?")
_CIFAR_NAMES = ("batches.meta", "meta", "batches.meta.txt", "fine_label_names.txt")


def open_tars(path: str, part: str | None = None) -> ImageSource | None:
    """CIFAR's .tar.gz as published, or the folder inside it; WebDataset shards: a .tar, or a folder of them."""
    if os.path.isdir(path) and not (files := shards(path, lambda name: name.lower().endswith(_TAR))):
        names = [name for name in os.listdir(path) if os.path.isfile(os.path.join(path, name))]
        cifar = any("_batch" in name and _CIFAR_PART.fullmatch(name) for name in names)
        if not cifar and not ({"meta", "fine_label_names.txt"} & {*names} and any(map(_CIFAR_PART.fullmatch, names))):
            return None
        return _cifar(path, {n: require_file(Path(path, n), MOST_CIFAR).read_bytes() for n in _of_cifar(names)}, part)
    if not os.path.isdir(path):
        if not path.lower().endswith(_TAR):
            return None
        files = [path]
    members = [(shard, *member) for shard in files for member in _members(shard)]
    cifar = {os.path.basename(name): (shard, offset, size) for shard, name, offset, size in members}
    if any(map(_CIFAR_PART.fullmatch, cifar)):
        return _cifar(path, {name: _read_member(*cifar[name], path) for name in _of_cifar(cifar)}, part)
    return _webdataset(path, members)


def _members(path):
    """[(name, offset, size)] of the files in a tar archive, in its unpacked bytes."""
    require_file(path)
    plain, found, total = path.lower().endswith(".tar"), [], 0
    most = max(MOST_CIFAR, 4 * os.path.getsize(path))
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                total += member.size
                if member.size < 0 or (not plain and total > most):  # before it is unpacked to find the next one
                    raise ValueError(f"it unpacks to more than {most} bytes")
                if member.isfile() and not member.issparse():
                    found.append((path_of(member.name), member.offset_data, member.size))
            size = tar.fileobj.seek(0, os.SEEK_END) if plain else None
    except Exception as err:  # tar, gzip, bzip2 and xz fail in many ways
        raise ValueError(f"--source={path}: no readable tar archive, perhaps truncated ({reason(err)})") from err
    if size is not None and any(offset + length > size for _, offset, length in found):
        raise ValueError(f"--source={path}: no readable tar archive, perhaps truncated")
    return found


@functools.lru_cache(maxsize=8)
def _unpacked(path, process):
    """The bytes of a tar archive as an open file; a forked process opens its own."""
    return tarfile.open(path).fileobj


def _read_member(path, offset, size, name):
    if size > MOST_ITEM:
        raise ValueError(f"{name}: has {size} bytes, more than the {MOST_ITEM} that such a file may have")
    try:
        file = _unpacked(path, os.getpid())
        file.seek(offset)
        data = file.read(size)
    except Exception as err:  # as above
        raise ValueError(f"{name}: not readable, perhaps truncated ({reason(err)})") from err
    if len(data) != size:
        raise ValueError(f"{name}: truncated")
    return data


def _of_cifar(names):
    return [name for name in names if _CIFAR_PART.fullmatch(name) or name in _CIFAR_NAMES]


def _load_plain_pickle(data, name):
    try:
        content = pickles.load(data)
    except ValueError as err:
        raise ValueError(f"{name}: not read ({err})") from err
    if not isinstance(content, dict):
        raise ValueError(f"{name}: not read (no dictionary inside)")
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}


def _cifar(path, files, part):
    """10 or 100 classes; the training part, 50 000 images, unless the other one is chosen or alone there."""
    matches = {name: _CIFAR_PART.fullmatch(name) for name in sorted(files, key=natural_key)}
    by_part = {
        "train": [n for n, m in matches.items() if m and m[1]],
        "test": [n for n, m in matches.items() if m and m[2]],
    }
    parts = [name for name, batches in by_part.items() if batches]
    chosen = choose_part(parts, part, path)
    batches = by_part[chosen]
    num_classes = 10 if "_batch" in batches[0] else 100
    read = _cifar_binary if batches[0].endswith(".bin") else _cifar_python
    images, labels = zip(*(read(files[name], f"{path}: {name}", num_classes) for name in batches), strict=True)
    meta_name = next((name for name in _CIFAR_NAMES if name in files), None)
    if meta_name is None or meta_name.endswith(".txt"):
        class_names = files.get(meta_name, b"").decode("latin1").split()
    else:
        meta = _load_plain_pickle(files[meta_name], f"{path}: {meta_name}")
        class_names = meta.get("label_names", meta.get("fine_label_names"))
    if isinstance(class_names, list) and len(class_names) == num_classes:
        class_names = [name.decode("latin1") if isinstance(name, bytes) else str(name) for name in class_names]
    else:
        class_names = None
    about = f"CIFAR-{num_classes}, {sum(map(len, images))} images{said(chosen, parts)}"
    images, labels = np.concatenate(images), np.concatenate(labels)
    name = f"cifar{num_classes}"
    return ImageSource.of_arrays(name, images, labels, num_classes, class_names, about=about, parted=True)


def _cifar_python(data, name, num_classes):
    batch = _load_plain_pickle(data, name)
    data, values = batch.get("data"), batch.get("labels", batch.get("fine_labels"))
    fits = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    if not fits or not isinstance(values, list):
        raise ValueError(f"{name} has no uint8 data [N,3072] with labels")
    if len(values) != len(data):
        raise ValueError(f"{name}: {len(values)} labels for {len(data)} images")
    if not all(type(value) is int and 0 <= value < num_classes for value in values):
        raise ValueError(f"{name}: a label is no class index from 0 to {num_classes - 1}")
    return data.reshape(-1, 3, 32, 32), np.array(values, dtype=np.int64)


def _cifar_binary(data, name, num_classes):
    """Records of one label, or of a coarse and a fine one, and 3072 pixels."""
    before = 1 if num_classes == 10 else 2
    if not data or len(data) % (before + 3072):
        raise ValueError(f"{name}: {len(data)} bytes are no records of {before + 3072}; download it again")
    rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, before + 3072)
    labels = rows[:, before - 1].astype(np.int64)
    if labels.max() >= num_classes:
        raise ValueError(f"{name}: label {labels.max()} is no class index from 0 to {num_classes - 1}")
    return rows[:, before:].reshape(-1, 3, 32, 32), labels


def _webdataset(path, members):
    """Samples of files that share their name up to its first dot: an image, and its label in .cls or .json."""
    samples, left = {}, 0
    for shard, name, offset, size in members:
        folder, _, base = name.rpartition("/")
        key, _, ending = base.partition(".")
        if not key or is_junk(name):
            left += 1
            continue
        sample = samples.setdefault((shard, folder, key), {})
        if ending.lower() in sample:
            raise ValueError(f"{shard}: holds {name} twice; keep one")
        sample[ending.lower()] = shard, offset, size, f"{shard}: {name}"
    items, folders = [], set()
    for (_, folder, key), sample in samples.items():
        images = [ending for ending in sample if extension(f"x.{ending}") in image_extensions()]
        if len(images) > 1:
            raise ValueError(f"--source={path}: sample {key} has several images ({', '.join(images)}); keep one")
        if images:
            items.append((sample[images[0]], sample))
            folders.add(folder)
        else:
            left += len(sample)
    if not items:
        raise ValueError(
            f"--source={path}: holds no CIFAR batches (data_batch_1, test_batch ...), and no images as in WebDataset"
        )
    labels = [_webdataset_label(sample) for _, sample in items]
    without = sum(label is None for label in labels)
    if without == len(items) and len(folders) > 1:
        raise ValueError(f"--source={path}: images in {len(folders)} folders, no .cls: extract it, and give the folder")
    missing = f"{path}: {without} of {len(items)} samples have no .cls" if 0 < without < len(items) else None
    known = [label for label in labels if label is not None]
    describe = lambda i: items[i][0][-1]
    about = f"{len(items)} samples of WebDataset, {len(set(known)) or 'no'} labels"
    return ImageSource(
        name=base_name(path),
        count=len(items),
        fetch=lambda i: _read_member(*items[i][0]),
        labels=labels if known else None,
        num_classes=max(known) + 1 if known else None,
        describe=describe,
        about=about + (f" ({left} stray files ignored)" if left else ""),
        missing=missing,
    )


def _webdataset_label(sample):
    if "cls" in sample:
        name = sample["cls"][-1]
        value = _read_member(*sample["cls"]).strip()
        value = int(value) if re.fullmatch(rb"\d{1,9}", value) else value
    elif "json" in sample:
        name = sample["json"][-1]
        try:
            value = parse_json(_read_member(*sample["json"]))
        except ValueError as err:
            raise ValueError(f"{name}: {err}") from err
        value = value.get("label", value.get("cls")) if isinstance(value, dict) else None
        if value is None:
            return None
    else:
        return None
    if type(value) is not int or not 0 <= value < MOST_CLASSES:
        raise ValueError(f"{name}: label {str(value):.40} is no class index from 0 to {MOST_CLASSES - 1}")
    return value
