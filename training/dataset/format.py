"""The container format of data sets, byte by byte: PNG and NPY items, `dataset.json`, labels (EDM2). Needs no torch."""

from __future__ import annotations

import dataclasses
import functools
import io
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dnnlib.reading import parse_json, require_file, require_honest

if TYPE_CHECKING:
    import PIL.Image
    from numpy.typing import ArrayLike

LABELS_FILE = "dataset.json"
MOST_ITEM = 2**30  # bytes of one file of a data set
MOST_CLASSES = 10**6

# What the standard library raises for a damaged zip, at opening or reading.
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    KeyError,
    ValueError,
    OverflowError,
    RuntimeError,  # also NotImplementedError: unknown version or compression
    lzma.LZMAError,
    MemoryError,  # a header may ask for any amount
)
_PIL_MODES = {"L": "L", "RGB": "RGB", "RGBA": "RGBA", "LA": "LA", "1": "L", "P": "RGB"}  # stored mode -> mode read


def base_name(path: str) -> str:
    """The last part of a path without its extension: what a data set is called."""
    return os.path.splitext(os.path.basename(os.path.normpath(path)))[0]


def extension(name: str) -> str:
    """The last extension, in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


# What is read as an image: decoders that run inside Pillow. Others start programs (EPS, WMF) or are not for pixels.
IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "WEBP",
    "AVIF",
    "JPEG2000",
    "BMP",
    "GIF",
    "TIFF",
    "PPM",
    "TGA",
    "PCX",
    "SGI",
    "QOI",
)
MOST_PIXELS = 2**27  # of one image: some bytes can stand for as many pixels as one likes


@functools.lru_cache
def _image_formats():
    """(formats, lower-case extensions) of IMAGE_FORMATS that this Pillow knows."""
    import PIL.Image

    PIL.Image.init()
    known = [name for name in IMAGE_FORMATS if name in PIL.Image.OPEN]
    return known, frozenset(ending for ending, name in PIL.Image.EXTENSION.items() if name in known)


def image_extensions() -> frozenset[str]:
    """Lower-case extensions of the images that are read."""
    return _image_formats()[1]


class Container:
    """The files of a folder or zip, by sorted name with forward slashes. Every process opens the zip itself.

    Raises ValueError with the path, the name, what is wrong and the `remedy`.
    """

    def __init__(self, path: str, remedy: str = ""):
        self.path, self.remedy = path, remedy
        self.is_folder = os.path.isdir(path)
        if self.is_folder:
            found = (os.path.join(root, name) for root, _, names in os.walk(path) for name in names)
            self.names = sorted(os.path.relpath(name, path).replace(os.sep, "/") for name in found)
        else:
            self.names = sorted({name for name in self._zip().namelist() if not name.endswith("/")})

    def _zip(self):
        opened_by, archive = self.__dict__.get("_opened", (None, None))
        if opened_by != os.getpid():  # a forked worker must not share a file position
            require_file(self.path)
            try:
                archive = zipfile.ZipFile(self.path)
                require_honest(archive)
            except ZIP_ERRORS as err:
                raise ValueError(f"{self.path}: no readable zip, perhaps truncated ({err}){self.remedy}") from err
            self._opened = os.getpid(), archive
        return archive

    def read(self, name: str) -> bytes:
        """The content of one file."""
        try:
            if not self.is_folder:
                return self._zip().read(name)
            return require_file(os.path.join(self.path, name), MOST_ITEM).read_bytes()
        except ZIP_ERRORS as err:
            raise ValueError(f"{self.path}: cannot read {name} ({err}){self.remedy}") from err

    def checksum(self, name: str) -> int:
        """CRC-32 of the content of one file; of a zip from its directory, without reading the file."""
        return zlib.crc32(self.read(name)) if self.is_folder else self._zip().getinfo(name).CRC

    def meta(self) -> dict:
        """The content of dataset.json as `parse_meta` gives it; empty where there is none."""
        where = f"{self.path}/{LABELS_FILE}"
        return parse_meta(self.read(LABELS_FILE), where) if LABELS_FILE in self.names else {}

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_opened"}


def decode_image(data: bytes, fname: str) -> np.ndarray:
    """Bytes of a PNG (or any Pillow format) or NPY file -> [C,H,W], uint8 or float32. ValueError names `fname`."""
    if extension(fname) == ".npy":
        return load_npy(data, fname)
    image = open_image(data, fname)
    if image.mode not in _PIL_MODES:
        raise ValueError(f"{fname} has pixel mode {image.mode}, not grey or RGB; run `dataset_tool.py convert`")
    pixels = np.array(image if _PIL_MODES[image.mode] == image.mode else image.convert(_PIL_MODES[image.mode]))
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def load_npy(data: bytes, name: str) -> np.ndarray:
    """Bytes of an NPY file -> uint8 or float32 [C,H,W]; leading axes are flattened into C. ValueError names it."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as err:  # A damaged header can also ask for more memory than there is.
        raise ValueError(f"{name} is no readable NPY array ({err})") from err
    if not isinstance(array, np.ndarray) or array.ndim < 2 or array.size == 0 or array.dtype.kind not in "uif":
        raise ValueError(f"{name} must hold numbers of shape [C,H,W]")
    array = array.reshape(-1, *array.shape[-2:])
    if array.dtype == np.uint8:
        return array
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN, infinity or numbers that float32 cannot hold; leave it out")
    return array


def parse_meta(data: bytes, where: str = LABELS_FILE) -> dict:
    """Bytes of dataset.json -> dict with `labels` ({name: label} or None), `num_classes`, `class_names` (or None)."""
    try:
        meta = parse_json(data)
    except ValueError as err:
        raise ValueError(f"{where}: {err}") from err
    if not isinstance(meta, dict):
        raise ValueError(f'{where}: must be an object like {{"labels": [[name, label], ...]}}')
    labels, num, names = meta.get("labels"), meta.get("num_classes"), meta.get("class_names")
    if labels is not None:
        pairs = isinstance(labels, list) and all(isinstance(e, list) and len(e) == 2 for e in labels)
        if not pairs or not all(isinstance(e[0], str) for e in labels):
            raise ValueError(f"{where}: labels must be null or a list of [name, label] pairs")
        wrong = [e for e in labels if not _is_label(e[1])]
        if wrong:
            known = "labels are class indices (integers) or lists of finite numbers"
            raise ValueError(f"{where}: the label of {wrong[0][0]} is none: {known}")
        labels = {name.replace("\\", "/"): label for name, label in labels}
    if num is not None and (type(num) is not int or not 1 <= num <= MOST_CLASSES):
        raise ValueError(f"{where}: num_classes={num!r:.40} must be an integer from 1 to {MOST_CLASSES}")
    if names is not None:
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"{where}: class_names must be a list of strings")
        num = len(names) if num is None else num
        if len(names) != num:
            raise ValueError(f"{where}: {len(names)} class_names, but num_classes={num}")
    return {"labels": labels, "num_classes": num, "class_names": names}


def _is_label(label):
    if isinstance(label, list):
        return all(type(v) in (int, float) and abs(v) < 1e38 for v in label)  # as float32 finite
    return type(label) is int and abs(label) < 2**31


def check_labels(labels: ArrayLike, count: int, num_classes: int | None = None, where: str = "labels") -> np.ndarray:
    """int64 [N] in 0..num_classes-1 or finite float32 [N,K]; ValueError otherwise."""
    labels = np.asarray(labels)
    if labels.shape[:1] != (count,) or labels.ndim not in (1, 2) or labels.dtype.kind not in "iuf":
        raise ValueError(f"{where}: labels must be class indices [N] or vectors [N,K], one for each of {count} images")
    if labels.ndim == 1:
        if labels.dtype.kind == "f":
            raise ValueError(f"{where}: class indices must be integers")
        labels = labels.astype(np.int64)
        top = num_classes if num_classes is not None else MOST_CLASSES
        bad = labels[(labels < 0) | (labels >= top)]
        if bad.size:
            hint = f"0..{top - 1}; raise num_classes or" if num_classes is not None else "counted from 0;"
            raise ValueError(f"{where}: label {bad[0]} out of range: labels are {hint} correct {LABELS_FILE}")
        return labels
    labels = labels.astype(np.float32)
    if not np.isfinite(labels).all():
        raise ValueError(f"{where}: label vectors must be finite")
    return labels


def open_image(data: bytes, name: str, header_only: bool = False) -> PIL.Image.Image:
    """Bytes -> PIL image with 8-bit channels. ValueError names the file where it is corrupt or deeper than 8 bits."""
    import PIL.Image

    try:
        image = PIL.Image.open(io.BytesIO(data), formats=_image_formats()[0])
        if image.size[0] * image.size[1] > MOST_PIXELS:
            raise ValueError(f"{image.size[0]} x {image.size[1]} pixels are more than {MOST_PIXELS}")
        if not header_only:
            image.load()
    except PIL.UnidentifiedImageError as err:  # its message names the buffer, which tells nobody anything
        raise ValueError(f"{name} is corrupt or no image (unknown format); replace or remove it") from err
    except Exception as err:  # Every plugin of Pillow fails in its own way.
        raise ValueError(f"{name} is corrupt or no image ({err}); replace or remove it") from err
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{name} has pixel mode {image.mode}; convert it to 8 bits per channel first")
    return image


@dataclasses.dataclass
class ImageSource:
    """A listed collection of images that is not yet a data set: what every reader returns."""

    name: str
    count: int
    read: Callable  # index -> PIL image, or float32 [C,H,W] where `latents`
    labels: list | None = None  # Per image: int, list of floats, or None where there is no entry.
    num_classes: int | None = None  # Number of sources in the whole collection.
    class_names: list | None = None
    grey: bool = False  # Grey by nature: stays one channel under --channels=auto.
    latents: bool = False  # Items are arrays to be copied, not images.
    describe: Callable = str  # index -> name for messages
    size: Callable | None = None  # index -> (width, height) without decoding

    @classmethod
    def of_arrays(
        cls,
        name: str,
        images: np.ndarray,  # uint8 [N,H,W] or [N,H,W,3]
        labels: Sequence[int],
        num_classes: int | None = None,  # at least the largest label + 1
        class_names: list[str] | None = None,
        grey: bool = False,
    ) -> ImageSource:
        """Images in memory."""
        import PIL.Image

        if len(labels) != len(images) or not all(isinstance(k, (int, np.integer)) and k >= 0 for k in labels):
            raise ValueError(f"{name}: {len(labels)} labels for {len(images)} images, or one that is no class index")
        labels = [int(label) for label in labels]
        return cls(
            name=name,
            count=len(images),
            read=lambda i: PIL.Image.fromarray(images[i]),
            labels=labels,
            num_classes=max(num_classes or 0, max(labels, default=-1) + 1),
            class_names=class_names,
            grey=grey,
            describe=lambda i: f"{name}[{i}]",
            size=lambda i: images[i].shape[1::-1],
        )
