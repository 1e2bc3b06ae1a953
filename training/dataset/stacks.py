"""Many images in one array: .npz and .npy files. Needs no torch."""

from __future__ import annotations

import os
import re

import numpy as np

from dnnlib.reading import read_npz, require_file
from dnnlib.util import reason
from training.dataset.format import ImageSource, as_items, base_name
from training.dataset.listing import choose_part, said, shards

# Names of images and labels in an npz: downsampled ImageNet, samples of guided-diffusion (ADM), others.
_STACKS = {"data": "labels", "arr_0": "arr_1", "images": "labels", "image": "label", "x": "y", "X": "y"}
# The same with the name of a part: MedMNIST, Keras.
_PARTED = (re.compile(r"(?P<part>[a-z]+)_images"), "{}_labels"), (re.compile(r"x_(?P<part>[a-z]+)"), "y_{}")


def open_stacks(path: str, part: str | None = None) -> ImageSource | None:
    """A .npz or .npy of images, or a folder of them. The layout of an array is found as in `as_items`."""
    files = shards(path, lambda name: name.lower().endswith(".npz"))
    if not files:
        files = shards(path, lambda name: name.lower().endswith(".npy"))
        if os.path.isdir(path) and not (
            files and all(_open_npy(file).ndim == 4 and len(_open_npy(file)) > 1 for file in files)
        ):
            return None  # one item a file
    if not files:
        return None
    found = [_stack_of(file, part) for file in files]
    where, parts = found[0][2:]
    for file, (images, _, *same) in zip(files, found, strict=True):
        if images.shape[1:] != found[0][0].shape[1:] or images.dtype != found[0][0].dtype or same != [where, parts]:
            raise ValueError(f"{file}: {images.dtype} {list(images.shape)} in {same[0]}, unlike {files[0]}")
    images = np.concatenate([f[0] for f in found]) if len(found) > 1 else found[0][0]
    labels = None if found[0][1] is None else np.concatenate([f[1] for f in found])
    count = None
    if labels is not None and where.startswith("data,") and labels.ndim == 1 and labels.size and labels.min() >= 1:
        labels, count = labels - 1, 1000 if labels.max() <= 1000 else None  # downsampled ImageNet counts from 1
    _, c, h, w = images.shape
    kind = "images" if images.dtype == np.uint8 else "arrays"
    about = f"{len(images)} {kind} {w}x{h}, {c} channel{'s' * (c > 1)}, of {where}"
    chosen = choose_part(parts, part, path) if parts else None
    return ImageSource.of_arrays(
        base_name(path), images, labels, count, grey=c == 1, about=about + said(chosen, parts), parted=bool(parts)
    )


def _open_npy(file):
    try:
        array = np.load(require_file(file), mmap_mode="r", allow_pickle=False)
    except Exception as err:  # headers fail in many ways
        raise ValueError(f"{file} is no readable NPY array ({reason(err)})") from err
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{file} is no readable NPY array")
    return array


def _stack_of(file, part):
    """(images [N,C,H,W], labels or None, what they are called, parts that the file has)."""
    if file.lower().endswith(".npy"):
        return as_items(_open_npy(file), file), None, "one array", []
    try:
        arrays = read_npz(file)
    except ValueError as err:
        raise ValueError(f"{file}: {err}") from err
    key, label_key, parts = _stack_keys(arrays, file, part)
    images, labels = arrays[key], arrays.get(label_key)
    if key == "data" and images.ndim == 2:
        side = int(round((images.shape[1] / 3) ** 0.5))
        if images.dtype != np.uint8 or side < 1 or 3 * side * side != images.shape[1]:
            raise ValueError(f"{file}: `data` must be uint8 [N,3*S*S] with `labels` [N]")
        images = images.reshape(-1, 3, side, side)
    if labels is not None:
        labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
        if labels.ndim == 2:
            labels = labels.astype(np.float32) if labels.dtype.kind in "iuf" else labels
        if labels.shape[:1] != images.shape[:1] or (labels.ndim == 1 and labels.dtype.kind not in "iu"):
            raise ValueError(
                f"{file}: `{label_key}` {labels.dtype} {list(labels.shape)} are no labels of {list(images.shape)}"
            )
        labels = labels.astype(np.int64) if labels.ndim == 1 else labels
    return (
        as_items(images, f"{file}: {key}"),
        labels,
        f"{key}, {'no labels' if labels is None else f'labels of {label_key}'}",
        parts,
    )


def _stack_keys(arrays, file, part):
    """(name of the images, of their labels, parts of which this is one)."""
    for pattern, label in _PARTED:
        if parts := [m["part"] for m in map(pattern.fullmatch, arrays) if m]:
            chosen = choose_part(parts, part, file)
            key = next(k for k in arrays if (m := pattern.fullmatch(k)) and m["part"] == chosen)
            return key, label.format(chosen), parts
    known = next((key for key in _STACKS if key in arrays), None)
    large = [key for key, array in arrays.items() if array.ndim >= 3]
    if known is None and len(large) != 1:
        some = ", ".join(f"{key} {list(array.shape)}" for key, array in [*arrays.items()][:8])
        names = ", ".join(_STACKS)
        raise ValueError(f"{file}: no array of images called {names} or train_images; it has {some:.200}")
    key = known or large[0]
    return key, _STACKS.get(key, "labels"), []
