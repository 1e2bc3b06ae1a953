"""The container format of data sets, byte by byte: PNG and NPY items, `dataset.json`, labels (EDM2). Needs no torch."""

from __future__ import annotations

import dataclasses
import functools
import io
import lzma
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from training.dataset.pixels import note_depth, orientation, see_through

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
_MOST_TEXT = 2**26  # bytes of one text or profile of a PNG, unpacked; four times as many of all texts


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
MOST_PIXELS = 2**28  # of one image: some bytes can stand for as many pixels as one likes


@functools.lru_cache
def _image_formats():
    """(formats, lower-case extensions) of IMAGE_FORMATS that this Pillow knows."""
    import PIL.Image
    import PIL.PngImagePlugin

    PIL.Image.init()
    PIL.Image.MAX_IMAGE_PIXELS = MOST_PIXELS  # open_image checks: Pillow warns here, and refuses twice as many
    warnings.filterwarnings("ignore", category=PIL.Image.DecompressionBombWarning)
    PIL.PngImagePlugin.MAX_TEXT_CHUNK, PIL.PngImagePlugin.MAX_TEXT_MEMORY = _MOST_TEXT, 4 * _MOST_TEXT
    known = [name for name in IMAGE_FORMATS if name in PIL.Image.OPEN]
    return known, frozenset(ending for ending, name in PIL.Image.EXTENSION.items() if name in known)


def image_extensions() -> frozenset[str]:
    """Lower-case extensions of the images that are read."""
    return _image_formats()[1]


def item_extensions() -> frozenset[str]:
    """Lower-case extensions of what a data set may hold: images and arrays."""
    return image_extensions() | {".npy"}


def decode_image(data: bytes, fname: str) -> np.ndarray:
    """Bytes of a PNG (or any Pillow format) or NPY file -> [C,H,W], uint8 or float32, as stored. ValueError names `fname`.

    Alpha is a channel (as `convert --channels=4` writes it). Refused is what `convert` would scale, turn or composite.
    """
    if extension(fname) == ".npy":
        return load_npy(data, fname)
    image = open_image(data, fname)
    if image.info.get("deep"):
        raise ValueError(
            f"{fname} has more than 8 bits per channel (pixel mode {image.mode}); run `dataset_tool.py convert --depth=...`"
        )
    if image.mode not in _PIL_MODES:
        raise ValueError(f"{fname} has pixel mode {image.mode}, not grey or RGB; run `dataset_tool.py convert`")
    if image.info.get("turned") or orientation(image) != 1:
        raise ValueError(
            f"{fname} has an orientation tag, so it is not as viewers show it; run `dataset_tool.py convert`"
        )
    if image.mode not in ("LA", "RGBA") and see_through(image):
        raise ValueError(f"{fname} has a transparent colour; run `dataset_tool.py convert --background=white`")
    pixels = np.array(image if _PIL_MODES[image.mode] == image.mode else image.convert(_PIL_MODES[image.mode]))
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def load_npy(data: bytes, name: str) -> np.ndarray:
    """Bytes of an NPY file with one item -> uint8 or float32 [C,H,W]. ValueError names it.

    [H,W] has one channel; leading axes of length 1 are dropped; [H,W,C] as in `as_items`.
    """
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as err:  # A damaged header can also ask for more memory than there is.
        raise ValueError(f"{name} is no readable NPY array ({err})") from err
    if not isinstance(array, np.ndarray) or array.ndim < 2 or array.size == 0:
        raise ValueError(f"{name} must hold numbers of shape [C,H,W]")
    while array.ndim > 3 and len(array) == 1:
        array = array[0]
    if array.ndim > 3:
        raise ValueError(f"{name} holds {len(array)} items {list(array.shape)}: give the file itself to convert")
    return as_items(array[None], name)[0]


def as_items(array: np.ndarray, name: str) -> np.ndarray:
    """[N,H,W], [N,C,H,W] or [N,H,W,C] -> [N,C,H,W], uint8 pixels or finite float32. ValueError names what does not fit.

    By dtype: uint8 are pixels, of 1 to 4 channels; bool are pixels, 0 and 255; floats are arrays; other integers are
    refused. By shape: channels are the axis that leaves squares, else that of length 1 to 4; the first where both do.
    """
    shape = list(array.shape)
    if array.ndim not in (3, 4) or array.size == 0:
        raise ValueError(f"{name}: shape {shape} is not [N,H,W], [N,C,H,W] or [N,H,W,C]")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    pixels = array.dtype == np.uint8
    if not pixels and array.dtype.kind != "f":
        raise ValueError(f"{name} holds {array.dtype}: save pixels as uint8, other data as float32")
    if array.ndim == 3:
        array = array[:, None]
    else:
        _, first, h, last = shape
        small, square = [c in range(1, 5) for c in (first, last)], [h == last, first == h]
        ranks = [(small[i] or not pixels, square[i], small[i]) for i in range(2)]
        best = max(ranks)
        if not best[0] or not any(best[1:]):
            what = "pixels of 1 to 4 channels" if pixels else "channels beside squares"
            raise ValueError(f"{name}: shape {shape} is neither [N,C,H,W] nor [N,H,W,C] with {what}")
        array = array if ranks.index(best) == 0 else array.transpose(0, 3, 1, 2)
    if pixels:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=(1, 2, 3)))
    if bad.size:
        which = f"[{bad[0]}]" if len(array) > 1 else ""
        raise ValueError(f"{name}{which} holds NaN, infinity or numbers that float32 cannot hold; leave it out")
    return array


def pixels_to_pil(pixels: np.ndarray) -> PIL.Image.Image:
    """uint8 [C,H,W] with 1 to 4 channels -> PIL image: L, LA, RGB or RGBA."""
    import PIL.Image

    return PIL.Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def png_bytes(image: ArrayLike, texts: dict[str, str] | None = None) -> bytes:
    """uint8 [C,H,W], 1 to 4 channels, as an uncompressed PNG (as EDM2's tools write them). texts: {keyword: text} beside it."""
    from PIL.PngImagePlugin import PngInfo

    buffer, info = io.BytesIO(), PngInfo()
    for keyword, text in (texts or {}).items():
        info.add_text(keyword, text)
    pixels_to_pil(np.asarray(image)).save(buffer, format="png", compress_level=0, optimize=False, pnginfo=info)
    return buffer.getvalue()


def to_array(item: PIL.Image.Image | np.ndarray) -> np.ndarray:
    """PIL image, or array [C,H,W] -> [C,H,W]."""
    if isinstance(item, np.ndarray):
        return item
    pixels = np.asarray(item)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def open_image(data: bytes, name: str, header_only: bool = False) -> PIL.Image.Image:
    """Bytes -> PIL image as stored, see `pixels`. ValueError names a file that is corrupt or too large.

    `info` tells what loading hides: `deep` (more than 8 bits per channel), `turned` (by Pillow), `frames` (several).
    """
    import PIL.Image

    try:
        image = PIL.Image.open(io.BytesIO(data), formats=_image_formats()[0])
        too_many = image.size[0] * image.size[1] > MOST_PIXELS
        if not too_many:
            note_depth(image, data)
            turn = orientation(image)
            if not header_only:
                image.load()
                image.info["turned"] = turn != orientation(image)
                image.info["frames"] = getattr(image, "is_animated", False)
    except PIL.UnidentifiedImageError as err:  # its message names the buffer, which tells nobody anything
        raise ValueError(f"{name} is corrupt or no image (unknown format); replace or remove it") from err
    except PIL.Image.DecompressionBombError:
        too_many = True
    except Exception as err:  # Every plugin of Pillow fails in its own way.
        if "MAX_TEXT" in str(err):
            most = f"more than {_MOST_TEXT >> 20} MiB of text or profile"
            raise ValueError(f"{name} is a PNG with {most}; save it without metadata") from err
        raise ValueError(f"{name} is corrupt or no image ({err}); replace or remove it") from err
    if too_many:
        raise ValueError(f"{name} has more than {MOST_PIXELS >> 20} x 2**20 pixels; make it smaller or remove it")
    return image


@dataclasses.dataclass
class ImageSource:
    """A listed collection of images that is not yet a data set: what every reader returns."""

    name: str
    count: int
    fetch: Callable  # index -> what is stored, such as the bytes of an image file
    labels: list | None = None  # Per image: int, list of floats, or None where there is no entry.
    num_classes: int | None = None  # Number of sources in the whole collection.
    class_names: list | None = None
    grey: bool | None = False  # Grey by nature: stays one channel under --channels=auto. None: where all images are.
    latents: bool = False  # Items are arrays to be copied, not images.
    describe: Callable = str  # index -> name for messages
    decode: Callable = open_image  # (what is stored, name, header_only) -> item; needs nothing that threads would share
    stamp: Callable | None = None  # index -> what changes with its file, plain data: without reading the file
    about: str = ""  # what was understood of a folder or zip, in one line
    warnings: Sequence[str] = ()
    missing: str | None = None  # a sentence about images without a label
    parted: bool = False  # has parts, such as train and test, of which one was chosen
    foldered: bool = False  # labels may be those of its folders

    def read(self, index: int, header_only: bool = False) -> PIL.Image.Image | np.ndarray:
        """PIL image, with header_only not decoded where that can be; float32 [C,H,W] where `latents`. ValueError names it."""
        return self.decode(self.fetch(index), self.describe(index), header_only)

    @classmethod
    def of_arrays(
        cls,
        name: str,
        images: np.ndarray,  # as `as_items` takes them: uint8 pixels, or float arrays
        labels: ArrayLike | None = None,  # integers [N], or floats [N,K]
        num_classes: int | None = None,  # at least the largest label + 1
        class_names: list[str] | None = None,
        grey: bool = False,
        **more: object,  # other fields
    ) -> ImageSource:
        """Items in memory. ValueError names what does not fit."""
        images = as_items(images, name)
        latents = images.dtype != np.uint8
        if labels is not None:
            labels = np.asarray(labels)
            sound = labels.dtype.kind in "iuf" and labels.shape[:1] == (len(images),) and labels.ndim in (1, 2)
            if sound and labels.ndim == 1:
                sound = labels.dtype.kind in "iu" and 0 <= labels.min() <= labels.max() < MOST_CLASSES
            if not sound or not np.isfinite(labels).all():
                found = f"{labels.dtype} {list(labels.shape)} for {len(images)} images"
                raise ValueError(
                    f"{name}: labels {found} must be a class index from 0 to {MOST_CLASSES - 1}, or a vector, for each"
                )
            if labels.ndim == 1:
                num_classes = max(num_classes or 0, int(labels.max()) + 1)
            labels = labels.tolist()
        return cls(
            name=name,
            count=len(images),
            fetch=lambda i: images[i],
            decode=lambda item, *_: item if latents else pixels_to_pil(item),
            labels=labels,
            num_classes=num_classes,
            class_names=class_names,
            grey=grey,
            latents=latents,
            describe=lambda i: f"{name}[{i}]",
            **more,
        )
