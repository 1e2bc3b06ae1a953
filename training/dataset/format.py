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

if TYPE_CHECKING:
    import PIL.Image

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


def item_extensions() -> frozenset[str]:
    """Lower-case extensions of what a data set may hold: images and arrays."""
    return image_extensions() | {".npy"}


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
    about: str = ""  # what was understood of a folder or zip, in one line
    warnings: Sequence[str] = ()
    missing: str | None = None  # a sentence about images without a label

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
