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
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import PIL.Image

from dnnlib import atomic_write, outputs
from dnnlib.util import INTERRUPTIONS, REPLACED, TEMPORARY, Lock, json_sum, partial, traits
from training.choices import given
from training.dataset.format import LABELS_FILE, ImageSource, extension, png_bytes, to_array

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


_LOCAL = struct.Struct("<4s5H3I2H")  # the header before a file in a zip


def _stored(file):
    """{name: (its header, its bytes, their end, CRC-32)} of the files one after the other at the beginning of a zip."""
    found, end, size = {}, 0, os.fstat(file.fileno()).st_size
    while len(head := file.read(_LOCAL.size)) == _LOCAL.size:
        magic, *_, crc, _, length, name, extra = _LOCAL.unpack(head)
        header, begin = end, end + _LOCAL.size + name + extra
        end = begin + length
        if magic != b"PK\3\4" or end > size:
            break
        found[file.read(name).decode(errors="replace")] = header, begin, end, crc
        file.seek(end)
    return found


class _WrittenOver:
    """A file in which, up to `end`, the bytes that are written are there already."""

    def __init__(self, file, end):
        self.file, self.end = file, end

    def write(self, data):
        if self.file.tell() + len(data) > self.end:
            return self.file.write(data)
        self.file.seek(len(data), os.SEEK_CUR)
        return len(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@contextlib.contextmanager
def _zip_writer(dest, lock, key):
    """Function (name, bytes) into a zip; (name) -> bytes that an interrupted command has written, or None.

    Stored, with fixed time stamps: equal images give equal bytes on every system, and one that is continued the same again.
    """

    def kept(name):
        if name not in there:
            return None
        header, begin, end, crc = there[name]
        before.seek(begin)
        if zlib.crc32(data := before.read(end - begin)) == crc:
            return data
        over.end = min(over.end, header)  # killed in the middle of it
        return None

    def write(name, data):
        info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
        info.create_system, info.external_attr = 3, 0o644 << 16
        archive.writestr(info, data)

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(atomic_write(dest, key=key))
        before = stack.enter_context(open(partial(dest, key), "rb")) if key else None
        there = _stored(before) if before else {}
        over = _WrittenOver(file, max((end for _, _, end, _ in there.values()), default=0))
        with zipfile.ZipFile(over, "w", compression=zipfile.ZIP_STORED) as archive:
            yield write, kept
        file.truncate()
        file.flush()
        lock.announce(os.fstat(file.fileno()))


@contextlib.contextmanager
def _folder_writer(dest, lock, key):
    """The same into a folder that takes its name, and the place of an older one, when all is written."""
    parent, name = os.path.split(os.path.abspath(dest))
    there = {}  # what was read, until it would be written
    if key:
        folder = str(partial(os.path.abspath(dest), key))
        os.makedirs(folder, mode=0o700, exist_ok=True)
    else:
        folder = tempfile.mkdtemp(dir=parent, prefix=f".{name}.", suffix=TEMPORARY)

    def kept(name):
        with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, name), "rb") as file:
            there[name] = file.read()
        return there.get(name)

    def write(name, data):
        if there.pop(name, None) is data:
            return
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(os.path.join(folder, "half"), "wb") as file:
            file.write(data)
        os.replace(file.name, path)  # a file is whole, or not there

    try:
        yield write, kept
        os.chmod(folder, 0o755)
        lock.announce(os.stat(folder))
        if os.path.isdir(dest):
            os.replace(dest, folder + REPLACED)
        os.replace(folder, dest)
    except BaseException as err:
        if key is None or not isinstance(err, INTERRUPTIONS):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder + REPLACED, ignore_errors=True)


@contextlib.contextmanager
def _nowhere(dest, lock, key):
    yield (lambda name, data: None), (lambda name: None)


_END_OF_PNG = b"IEND\xaeB`\x82"


def work_key(
    source: ImageSource, paths: Iterable[str | os.PathLike], indices: Iterable[int], *options: object
) -> str | None:
    """For `dataset_writer`: names the work on these images of these paths, with these options (all that the bytes depend on).

    Other files, and files that have changed since, are other work. None where the images do not lie in files.
    """
    paths = [os.path.realpath(path) if os.path.exists(path) else os.fspath(path) for path in paths]
    if not paths:
        return None
    files = [[i, source.describe(i), source.stamp(i) if source.stamp else None] for i in map(int, indices)]
    whole = [None if source.stamp or not os.path.exists(path) else traits(path) for path in paths]
    return json_sum([paths, whole, files, PIL.__version__, np.__version__, *options])[:16]


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
        if not isinstance(item, np.ndarray):
            shape = (len(item.getbands()), item.size[1], item.size[0])
            return cls._named(cls.place(index, False), png_bytes(to_array(item)), shape)
        if not np.isfinite(item).all():
            raise ValueError(f"{described}: its latents hold NaN or infinity")
        file = io.BytesIO()
        np.save(file, np.asarray(item, dtype=np.float32))
        return cls._named(cls.place(index, True), file.getvalue(), item.shape)

    @staticmethod
    def place(index: int, latents: bool) -> str:
        """The name of the file of an index."""
        name = f"img-mean-std-{index:08d}.npy" if latents else f"img{index:08d}.png"
        return f"{index:08d}"[:5] + f"/{name}"

    @classmethod
    def of_file(cls, name: str, data: bytes) -> Item | None:
        """What `of` made once, of its file; None where it is cut short."""
        try:
            if name.endswith(".npy"):
                return cls._named(name, data, np.load(io.BytesIO(data), allow_pickle=False).shape)
            with PIL.Image.open(io.BytesIO(data), formats=["PNG"]) as image:
                shape = (len(image.getbands()), image.size[1], image.size[0])
            return cls._named(name, data, shape) if data.endswith(_END_OF_PNG) else None
        except (OSError, ValueError, EOFError):
            return None

    @classmethod
    def _named(cls, name, data, shape):
        return cls(name, data, shape, hashlib.blake2b(data, digest_size=16).digest())


class DatasetWriter:
    """What goes into one data set: items that agree in shape, and their labels. See `dataset_writer`."""

    def __init__(self, write: Callable[[str, bytes], object], kept: Callable[[str], bytes | None]):
        self.write, self._kept = write, kept
        self.resumed = 0  # items that were there already
        self.labels = []  # [name, label]
        self.hashes = []  # of the files
        self.shape, self.bytes = None, 0  # [C,H,W] of all items; their bytes

    def kept(self, index: int, latents: bool) -> Item | None:
        """The item of that index where the same command, interrupted, has written it."""
        name = Item.place(index, latents)
        data = self._kept(name)
        item = None if data is None else Item.of_file(name, data)
        self.resumed += item is not None
        return item

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
        self.bytes += len(item.data)
        self.hashes.append(item.digest)
        self.labels.append([item.name, label])


@contextlib.contextmanager
def dataset_writer(
    dest: str | os.PathLike, lock: Lock | None, source: ImageSource, key: str | None = None
) -> Iterator[DatasetWriter]:
    """Context that writes one data set of images of `source`; `dest` appears, whole, only when it ends without an error.

    lock: of `dest` (see outputs.claimed), None in a dry run, which writes nothing. Raises ValueError, and leaves what is
    there, where no image was added. key: as of `work_key`; with it, what was written until an interruption is kept.
    """
    make = _nowhere if lock is None else _zip_writer if extension(os.fspath(dest)) == ".zip" else _folder_writer
    try:
        with make(dest, lock, key) as (write, kept):
            writer = DatasetWriter(write, kept)
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
