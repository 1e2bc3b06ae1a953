"""Data sets appear whole: images and arrays become files of a zip or folder that takes its name at the end. Needs no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import PIL.Image

from dnnlib import atomic_write, outputs
from dnnlib.util import REPLACED, TEMPORARY, Lock
from training.choices import given
from training.dataset.format import LABELS_FILE, ImageSource, extension

NO_IMAGES = "nothing is written, no images are left"
_NO_DESTINATION = (".tar", ".tgz", ".gz", ".7z", ".rar", ".npz", ".npy", ".png", ".jpg", ".json")


def _is_data_set(path):
    if not path.is_dir():
        return extension(path.name) == ".zip" and outputs.zip_with(LABELS_FILE)(path)
    names = {file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir()}
    ours = re.compile(r"\d{5}/img(\d{8}\.png|-mean-std-\d{8}\.npy)|" + re.escape(LABELS_FILE))
    return extension(path.name) != ".zip" and LABELS_FILE in names and all(map(ours.fullmatch, names))


DATA_SET = outputs.Kind(
    f"a data set as written here (with {LABELS_FILE}, and in a folder nothing else)", _is_data_set, folder=None
)


def check_dest(option: str, dest: str | os.PathLike, others: Iterable[outputs.Named], new: bool = False) -> None:
    """ValueError where `dest` is neither a folder name nor .zip, or `outputs.check` refuses it; new: or where it exists."""
    if extension(os.fspath(dest)) in _NO_DESTINATION:
        raise ValueError(f"{option}={dest}: the destination must be a folder or end in .zip")
    outputs.check(option, dest, DATA_SET, others)
    if new:
        outputs.refuse_existing(option, dest)


@contextlib.contextmanager
def _zip_writer(dest, lock):
    """Function (name, bytes) into a zip. Stored, with fixed time stamps: equal images give equal bytes on every system."""

    def write(name, data):
        info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
        info.create_system, info.external_attr = 3, 0o644 << 16
        archive.writestr(info, data)

    with atomic_write(dest) as file:
        with zipfile.ZipFile(file, "w", compression=zipfile.ZIP_STORED) as archive:
            yield write
        file.flush()
        lock.announce(os.fstat(file.fileno()))


@contextlib.contextmanager
def _folder_writer(dest, lock):
    """Function (name, bytes) into a folder that takes its name, and the place of an older one, when all is written."""
    parent, name = os.path.split(os.path.abspath(dest))
    folder = tempfile.mkdtemp(dir=parent, prefix=f".{name}.", suffix=TEMPORARY)

    def write(name, data):
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)

    try:
        yield write
        os.chmod(folder, 0o755)
        lock.announce(os.stat(folder))
        if os.path.isdir(dest):
            os.replace(dest, folder + REPLACED)
        os.replace(folder, dest)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder + REPLACED, ignore_errors=True)


@contextlib.contextmanager
def _nowhere(dest, lock):
    yield lambda name, data: None


@dataclasses.dataclass(frozen=True)
class Item:
    """One file of a data set; made by any thread, added by one."""

    name: str
    data: bytes
    shape: tuple[int, ...]  # [C,H,W]
    digest: bytes  # equal images are equal files

    @classmethod
    def of(cls, index: int, item: PIL.Image.Image | np.ndarray, described: str) -> Item:
        """PIL image (L, RGB or RGBA) -> `IIIII/imgIIIIIIII.png`, uncompressed; [C,H,W] -> `IIIII/img-mean-std-IIIIIIII.npy`.

        Raises ValueError, with the name `described`, for latents that are not finite.
        """
        file = io.BytesIO()
        if isinstance(item, np.ndarray):
            if not np.isfinite(item).all():
                raise ValueError(f"{described}: its latents hold NaN or infinity")
            np.save(file, np.asarray(item, dtype=np.float32))
            name, shape = f"img-mean-std-{index:08d}.npy", item.shape
        else:
            item.save(file, format="png", compress_level=0, optimize=False)
            name, shape = f"img{index:08d}.png", (len(item.getbands()), item.size[1], item.size[0])
        data = file.getvalue()
        return cls(f"{index:08d}"[:5] + f"/{name}", data, shape, hashlib.blake2b(data, digest_size=16).digest())


class DatasetWriter:
    """What goes into one data set: items that agree in shape, and their labels. See `dataset_writer`."""

    def __init__(self, write: Callable[[str, bytes], object]):
        self.write = write
        self.labels = []  # [name, label]
        self.hashes = []  # of the files
        self.shape, self.size = None, 0  # [C,H,W] of all items; their bytes

    def add(self, item: Item, label: int | list | None, described: str) -> None:
        """Write an item. ValueError, with the name `described`, where it does not go with those before."""
        shape = item.shape
        if shape[-1] != shape[-2]:
            raise ValueError(f"{described}: {shape[-1]}x{shape[-2]} is not square; use --transform and --resolution")
        self.shape = self.shape or shape
        if shape != self.shape:
            raise ValueError(
                f"{described}: shape {list(shape)} differs from {list(self.shape)} of the images before; "
                f"use --resolution=WxH so that all agree"
            )
        self.write(item.name, item.data)
        self.size += len(item.data)
        self.hashes.append(item.digest)
        self.labels.append([item.name, label])


@contextlib.contextmanager
def dataset_writer(dest: str | os.PathLike, lock: Lock | None, source: ImageSource) -> Iterator[DatasetWriter]:
    """Context that writes one data set of images of `source`; `dest` appears, whole, only when it ends without an error.

    lock: of `dest` (see outputs.claimed), None in a dry run, which writes nothing. Raises ValueError, and leaves what is
    there, where no image was added.
    """
    make = _nowhere if lock is None else _zip_writer if extension(os.fspath(dest)) == ".zip" else _folder_writer
    try:
        with make(dest, lock) as write:
            writer = DatasetWriter(write)
            yield writer
            if not writer.labels:
                raise ValueError(f"--source={source.name}: {NO_IMAGES} for {dest}")
            meta = {"labels": None}
            if all(label is not None for _, label in writer.labels):
                about = given(num_classes=source.num_classes, class_names=source.class_names)
                meta = {"labels": writer.labels, **about}
            write(LABELS_FILE, json.dumps(meta).encode())
    except OSError as err:
        if err.errno and not err.filename:  # a full disk does not say which file
            raise OSError(err.errno, err.strerror, os.fspath(dest)) from err
        raise
