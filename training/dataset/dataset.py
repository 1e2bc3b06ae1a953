"""Images and labels: a zip or folder in EDM2's format, or arrays in memory, views of some items, and the endless sampler.

A data set is a folder or a stored (uncompressed) zip of PNG or NPY files beside an optional `dataset.json` with
`{"labels": [[name, label], ...]}` (EDM2). Two optional keys are added, which EDM2's own reader ignores:
`"num_classes"`, the number of sources, so that an arm trained on one source keeps the global label ids and the
width of the network, and `"class_names"`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized

import numpy as np
import torch
from numpy.typing import ArrayLike

from dnnlib import EasyDict
from training.dataset.format import LABELS_FILE, base_name, decode_image, extension, to_array
from training.dataset.labels import check_labels
from training.dataset.listing import Container, understand
from training.dataset.order import order
from training.dataset.sources import open_source


class Dataset(torch.utils.data.Dataset):
    """Items `(image [C,H,W], label float32 [label_dim])`; subclasses bring the raw images and raw labels.

    Raises ValueError for `max_size < 1`, an empty data set, or labels that are no class indices and no vectors.
    """

    class_names: list[str] | None = None  # of the sources
    _given_classes: int | None = None  # number of sources
    declared_classes: int | None = None  # the same, where somebody says so and it is not read off the labels

    def __init__(
        self,
        name: str,
        raw_shape: Sequence[int],  # of all raw images, [N,C,H,W]
        use_labels: bool = True,  # False: labels are vectors of length 0 (unconditional training)
        max_size: int | None = None,  # keep this many images, drawn without replacement; None keeps all
        xflip: bool = False,  # append a copy mirrored left to right; applied after max_size
        random_seed: int = 0,  # of the max_size draw
        cache: bool = False,  # keep decoded images in memory
    ):
        self.name = name
        self._count, *self.image_shape = (int(s) for s in raw_shape)  # [C,H,W]
        self._use_labels = use_labels
        self._cache = {} if cache else None
        if self._count < 1:
            raise ValueError(f"{self.name}: the data set holds no images")
        self._raw_idx = np.arange(self._count, dtype=np.int64)
        if max_size is not None:
            if max_size < 1:
                raise ValueError(f"max_size={max_size}: the data set needs at least one image")
            if self._count > max_size:
                np.random.RandomState(random_seed % (1 << 31)).shuffle(self._raw_idx)
                self._raw_idx = np.sort(self._raw_idx[:max_size])
        self._xflip = np.zeros(self._raw_idx.size, dtype=bool)
        if xflip:
            self._raw_idx = np.tile(self._raw_idx, 2)
            self._xflip = np.concatenate([self._xflip, np.ones_like(self._xflip)])

    # Overridden by subclasses.

    def _load_raw_image(self, raw_idx):  # -> uint8 or float32 [C,H,W]
        raise NotImplementedError

    def _load_raw_labels(self):  # -> int64 [N], float32 [N,K], or None
        raise NotImplementedError

    # Labels.

    @functools.cached_property
    def _file_labels(self):
        """Labels of every raw image as stored: int64 [N], float32 [N,K]; [N,0] where there are none."""
        labels = self._load_raw_labels()
        if labels is None:
            labels = np.zeros([self._count, 0], dtype=np.float32)
        return check_labels(labels, self._count, self._given_classes, where=getattr(self, "path", self.name))

    @property
    def raw_labels(self) -> np.ndarray:
        """Labels of the items as stored: int64 [N] class indices, or float32 [N,K]; [N,0] without labels."""
        if not self._use_labels:
            return np.zeros([len(self), 0], dtype=np.float32)
        return self._file_labels[self._raw_idx]

    @functools.cached_property
    def num_classes(self) -> int:
        """Number of sources: `num_classes` of dataset.json, else the largest label + 1; 0 without class indices.

        It does not depend on `use_labels` or on the subset in view.
        """
        labels = self._file_labels
        return (self._given_classes or int(labels.max()) + 1) if labels.dtype == np.int64 else 0

    @property
    def label_dim(self) -> int:
        if not self._use_labels:
            return 0
        return self.num_classes if self.has_onehot_labels else self._file_labels.shape[1]

    @property
    def label_shape(self) -> list[int]:
        return [self.label_dim]

    @property
    def has_labels(self) -> bool:
        return self.label_dim > 0

    @property
    def has_onehot_labels(self) -> bool:
        return self._use_labels and self._file_labels.dtype == np.int64

    @property
    def sources(self) -> list[int] | None:
        """Class indices that have images, ascending; None without class indices."""
        return np.unique(self.raw_labels).tolist() if self.has_onehot_labels else None

    def get_label(self, idx: int) -> np.ndarray:
        """float32 [label_dim]: one-hot of a class index, or the stored vector; length 0 without labels."""
        label = self.details(idx).raw_label
        return np.eye(1, self.num_classes, label, dtype=np.float32)[0] if self.has_onehot_labels else label

    def indices_of(self, label: int) -> np.ndarray:
        """Item indices (int64) whose class index is `label`, also where `use_labels` is off."""
        labels = self._file_labels
        if labels.dtype != np.int64:
            raise ValueError(f"{self.name}: items have no class indices; write them into {LABELS_FILE}")
        if not 0 <= label < self.num_classes:
            raise ValueError(f"label {label} is no source of {self.name}: it has sources 0..{self.num_classes - 1}")
        return np.flatnonzero(labels[self._raw_idx] == label)

    # Items.

    def __len__(self):
        return self._raw_idx.size

    def __getitem__(self, idx):
        raw_idx = int(self._raw_idx[idx])
        image = None if self._cache is None else self._cache.get(raw_idx)
        if image is None:
            image = self._load_raw_image(raw_idx)
            if self._cache is not None:
                self._cache[raw_idx] = image
        if self._xflip[idx]:
            image = image[..., ::-1]
        return image.copy(), self.get_label(idx)

    def details(self, idx: int) -> EasyDict:
        """`raw_idx` (index in the file order), `xflip` (bool) and `raw_label` (as stored)."""
        raw_idx = int(self._raw_idx[idx])
        label = self._file_labels[raw_idx].copy() if self._use_labels else np.zeros([0], dtype=np.float32)
        return EasyDict(raw_idx=raw_idx, xflip=bool(self._xflip[idx]), raw_label=label)

    @property
    def num_channels(self) -> int:
        return self.image_shape[0]

    @property
    def resolution(self) -> int:
        _, h, w = self.image_shape
        if h != w:
            raise ValueError(f"{self.name}: images are {w}x{h}, not square; convert them with --transform=center-crop")
        return h

    # Views and identity.

    def subset(self, indices: ArrayLike) -> Dataset:
        """A view of the items `indices` (in that order): same label width, nothing copied but the index."""
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        if indices.size == 0:
            raise ValueError(f"{self.name}: the subset is empty")
        if indices.min() < 0 or indices.max() >= len(self):
            raise ValueError(f"{self.name}: subset index outside 0..{len(self) - 1}")
        view = type(self).__new__(type(self))
        vars(view).update(vars(self), _raw_idx=self._raw_idx[indices], _xflip=self._xflip[indices])
        return view

    def content_hash(self) -> str:
        """sha256 (hex) of the images: independent of order, file names, container and use_labels."""
        return content_hash(self)

    def fingerprint(self) -> str:
        """Short hash of files (or arrays), their order and labels, wherever they lie; quick: a zip's images are not read."""
        files = str([self.image_shape, self._raw_checksums()]).encode()
        return hashlib.sha256(files + self._file_labels.tobytes()).hexdigest()[:16]

    def item_hash(self, idx: int, image: np.ndarray | None = None) -> str:
        """sha256 (hex) of an item: type, shape, pixels, stored label. image: the item's, where it is read already."""
        image = self[idx][0] if image is None else image
        label = np.asarray(self._file_labels[self._raw_idx[idx]])
        form = f"{image.dtype.str} {image.shape} {label.dtype.str} {label.shape}".encode()
        return hashlib.sha256(form + image.tobytes() + label.tobytes()).hexdigest()

    def __getstate__(self):  # workers keep their own images
        return dict(vars(self), _cache=None if self._cache is None else {})


class ImageFolderDataset(Dataset):
    """Folder or zip of images (EDM2 format), understood by `listing`. Items are in natural order. Options: those of Dataset.

    Raises ValueError, in one line with file and remedy, for: a path that is no folder and no zip, a truncated zip, no
    images, `resolution` given and different, an unreadable `dataset.json`, an image without an entry, labels out of
    range, and, when the item is read, a corrupt image or a shape that differs from the first image.
    """

    def __init__(
        self,
        path: str | os.PathLike,  # folder or .zip
        resolution: int | None = None,  # refuse images of any other side; None takes what is there
        **options: object,
    ):
        self.path = os.fspath(path)
        if not os.path.isdir(self.path):
            if extension(self.path) != ".zip":
                raise ValueError(
                    f"{self.path}: must be an existing folder or a .zip; write one with `dataset_tool.py convert`"
                )
            if not os.path.exists(self.path):
                raise ValueError(f"{self.path}: no such file; write it with `dataset_tool.py convert`")
        self._files = Container(self.path, remedy="; write the data set again")
        layout = understand(self._files)
        if layout.missing is not None:
            raise ValueError(f"{layout.missing}; give every image one, or set labels to null")
        for text in [*layout.warnings, *([layout.sentence] if layout.other_parts else [])]:
            warnings.warn(f"{self.path}: {text}", stacklevel=2)
        self.about, self._image_names = layout.sentence, layout.names
        self._labels = None if layout.labels is None else np.array(layout.labels)
        self.class_names, self._given_classes = layout.class_names, layout.num_classes
        if layout.written_here or layout.class_names:
            self.declared_classes = layout.num_classes
        first = self._read_image(self._image_names[0])
        shape, self._dtype = first.shape, first.dtype
        if resolution is not None and shape[1:] != (resolution, resolution):
            raise ValueError(
                f"{self.path}: images are {shape[2]}x{shape[1]}, but resolution={resolution} was asked for; "
                f"convert with --resolution={resolution}x{resolution}"
            )
        super().__init__(base_name(self.path), [len(self._image_names), *shape], **options)

    def _raw_checksums(self):
        return [self._files.checksum(name) for name in self._image_names]

    def _read_image(self, name):
        data = self._files.read(name)
        try:
            return decode_image(data, name)
        except ValueError as err:
            raise ValueError(f"{self.path}: {err}") from err

    def _load_raw_image(self, raw_idx):
        name = self._image_names[raw_idx]
        image = self._read_image(name)
        if list(image.shape) != self.image_shape:
            raise ValueError(
                f"{self.path}: {name} has shape {list(image.shape)}, but the first image has {self.image_shape}; "
                f"convert with --resolution=WxH so that all images agree"
            )
        if image.dtype != self._dtype:
            raise ValueError(
                f"{self.path}: {name} holds {image.dtype}, but the first image {self._dtype}; keep one kind"
            )
        return image

    def _load_raw_labels(self):
        return self._labels


class ArrayDataset(Dataset):
    """Images in memory: arrays or CPU tensors `[N,C,H,W]` (2-D points: `[N,2,1,1]`), labels int [N] or float [N,K]."""

    def __init__(
        self,
        images: ArrayLike,
        labels: ArrayLike | None = None,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        name: str = "array",
        **options: object,
    ):
        self._images = np.asarray(images)
        if self._images.ndim != 4:
            raise ValueError(f"images must have shape [N,C,H,W], got {list(self._images.shape)}")
        if self._images.dtype != np.uint8:
            self._images = self._images.astype(np.float32)
            if bad := int((~np.isfinite(self._images)).any(axis=(1, 2, 3)).sum()):
                raise ValueError(f"{bad} of {len(self._images)} images hold NaN or infinity; leave them out")
        self._labels = None if labels is None else np.asarray(labels)
        self._given_classes = self.declared_classes = num_classes
        self.class_names = class_names
        super().__init__(name, self._images.shape, **options)
        _ = self._file_labels  # fail now, in the caller's line

    def _load_raw_image(self, raw_idx):
        return self._images[raw_idx]

    def _load_raw_labels(self):
        return self._labels

    def _raw_checksums(self):
        return hashlib.sha256(self._images.tobytes()).hexdigest()


def open_stack(path: str | os.PathLike, **options: object) -> ArrayDataset:
    """The images of a .npz or .npy file in memory, as `convert` reads them. options: those of ArrayDataset. ValueError."""
    source = open_source(path)
    images = np.stack([to_array(source.read(i)) for i in range(source.count)])
    return ArrayDataset(images, source.labels, source.num_classes, source.class_names, source.name, **options)


def content_hash(*datasets: Dataset) -> str:
    """sha256 (hex) of the images of one or several data sets together: single-source arms against the multi arm."""
    return hash_of_items(dataset.item_hash(i) for dataset in datasets for i in range(len(dataset)))


def hash_of_items(hashes: Iterable[str]) -> str:
    """The content hash of images whose `item_hash` is known, in any order."""
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


def load_raw(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Small data in memory: (images uint8 or float32 [N,C,H,W], labels as stored: int64 [N] or float32 [N,K]), CPU tensors."""
    return torch.from_numpy(np.stack([dataset[i][0] for i in range(len(dataset))])), torch.from_numpy(
        dataset.raw_labels
    )


def load_arrays(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """`load_raw` with labels float32 [N,label_dim]: where there are many sources, many numbers."""
    images, labels = load_raw(dataset)
    return images, label_rows(labels, dataset.label_dim)


def label_rows(labels: torch.Tensor, label_dim: int) -> torch.Tensor:
    """Labels as stored -> float32 [N,label_dim]: one-hot rows of class indices [N]; vectors stay."""
    if labels.ndim == 2:
        return labels
    return torch.zeros([len(labels), label_dim], device=labels.device).scatter_(1, labels[:, None], 1)


class InfiniteSampler(torch.utils.data.Sampler):
    """Endless indices: rank r takes positions start_idx + r, + num_replicas, ... of the shuffled epochs (EDM2)."""

    def __init__(
        self,
        dataset: Sized,
        rank: int = 0,  # this process
        num_replicas: int = 1,  # number of processes
        shuffle: bool = True,  # False: file order, over and over
        seed: int = 0,  # of the epoch permutations
        start_idx: int = 0,  # global position of rank 0's first item
    ):
        if len(dataset) < 1:
            raise ValueError("InfiniteSampler needs a data set with at least one item")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank={rank} must lie in 0..num_replicas-1 with num_replicas={num_replicas}")
        if start_idx < 0:
            raise ValueError(f"start_idx={start_idx} must not be negative")
        self.positions = start_idx + rank, num_replicas  # first, step
        self.order = dict(n=len(dataset), seed=seed, shuffle=shuffle)

    def __iter__(self) -> Iterator[int]:
        for position in itertools.count(*self.positions):
            yield int(order([position], **self.order)[0])
