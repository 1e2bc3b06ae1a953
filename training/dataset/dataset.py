"""Images and labels: a zip or folder in EDM2's format, per-source subsets, and the endless shuffled order.

A data set is a folder or a stored (uncompressed) zip of PNG or NPY files beside an optional `dataset.json` with
`{"labels": [[name, label], ...]}` (EDM2). Two optional keys are added, which EDM2's own reader ignores:
`"num_classes"`, the number of sources, so that an arm trained on one source keeps the global label ids and the
width of the network, and `"class_names"`.
"""

from __future__ import annotations

import copy
import hashlib
import os
import zipfile

import numpy as np
import torch

from dnnlib import EasyDict
from training.dataset.format import LABELS_FILE, ZIP_ERRORS, check_labels, decode_image, image_extensions, parse_meta

# ----------------------------------------------------------------------------
# Data sets.


class Dataset(torch.utils.data.Dataset):
    """Items `(image [C,H,W], label float32 [label_dim])`; subclasses bring the raw images and raw labels.

    Raises ValueError for `max_size < 1`, an empty data set, or labels that are no class indices and no vectors.
    """

    def __init__(
        self,
        name,             # Name of the data set.
        raw_shape,        # Shape of the raw images, [N,C,H,W].
        use_labels=True,  # False: labels are vectors of length 0 (unconditional training).
        max_size=None,    # Keep this many images, drawn without replacement; None keeps all.
        xflip=False,      # Append a copy mirrored left to right; applied after max_size.
        random_seed=0,    # Seed of the max_size draw.
        cache=False,      # Keep decoded images in memory.
    ):  # fmt: skip
        self._name = str(name)
        self._raw_shape = [int(s) for s in raw_shape]
        self._use_labels = bool(use_labels)
        self._cache = bool(cache)
        self._cached_images = {}
        self._raw_labels = None  # File labels, read on first use.
        if self._raw_shape[0] < 1:
            raise ValueError(f"{self.name}: the data set holds no images")
        self._raw_idx = np.arange(self._raw_shape[0], dtype=np.int64)
        if max_size is not None:
            if int(max_size) < 1:
                raise ValueError(f"max_size={max_size}: the data set needs at least one image")
            if self._raw_idx.size > int(max_size):
                np.random.RandomState(random_seed % (1 << 31)).shuffle(self._raw_idx)
                self._raw_idx = np.sort(self._raw_idx[: int(max_size)])
        self._xflip = np.zeros(self._raw_idx.size, dtype=bool)
        if xflip:
            self._raw_idx = np.tile(self._raw_idx, 2)
            self._xflip = np.concatenate([self._xflip, np.ones_like(self._xflip)])

    # Overridden by subclasses.

    def _load_raw_image(self, raw_idx):  # -> uint8 or float32 [C,H,W]
        raise NotImplementedError

    def _load_raw_labels(self):  # -> int64 [N], float32 [N,K], or None
        raise NotImplementedError

    def _explicit_classes(self):  # -> number of sources where it is known apart from the labels
        return None

    class_names = None  # Names of the sources, or None.

    def close(self):
        """Release open files; they are opened again when needed."""

    # Labels.

    def _file_labels(self):
        """Labels of every raw image as stored: int64 [N], float32 [N,K]; [N,0] where there are none."""
        if self._raw_labels is None:
            labels = self._load_raw_labels()
            if labels is None:
                labels = np.zeros([self._raw_shape[0], 0], dtype=np.float32)
            self._raw_labels = check_labels(
                labels, self._raw_shape[0], self._explicit_classes(), where=getattr(self, "_path", self.name)
            )
        return self._raw_labels

    @property
    def raw_labels(self):
        """Labels of the items as stored: int64 [N] class indices, or float32 [N,K]; [N,0] without labels."""
        if not self._use_labels:
            return np.zeros([len(self), 0], dtype=np.float32)
        return self._file_labels()[self._raw_idx]

    @property
    def num_classes(self):
        """Number of sources: `num_classes` of dataset.json, else the largest label + 1; 0 without class indices.

        It does not depend on `use_labels` or on the subset in view.
        """
        labels = self._file_labels()
        return (self._explicit_classes() or int(labels.max()) + 1) if labels.dtype == np.int64 else 0

    @property
    def label_shape(self):
        if not self._use_labels:
            return [0]
        labels = self._file_labels()
        return [self.num_classes] if labels.dtype == np.int64 else list(labels.shape[1:])

    @property
    def label_dim(self):
        return self.label_shape[0]

    @property
    def has_labels(self):
        return self.label_dim > 0

    @property
    def has_onehot_labels(self):
        return self._use_labels and self._file_labels().dtype == np.int64

    def get_label(self, idx):
        """float32 [label_dim]: one-hot of a class index, or the stored vector; length 0 without labels."""
        if not self._use_labels:
            return np.zeros([0], dtype=np.float32)
        label = self._file_labels()[self._raw_idx[idx]]
        if self.has_onehot_labels:
            onehot = np.zeros(self.label_shape, dtype=np.float32)
            onehot[label] = 1
            return onehot
        return label.copy()

    def indices_of(self, label):
        """Item indices (int64) whose class index is `label`, also where `use_labels` is off."""
        labels = self._file_labels()
        if labels.dtype != np.int64:
            raise ValueError(f"{self.name}: items have no class indices; write them into {LABELS_FILE}")
        if not 0 <= int(label) < self.num_classes:
            raise ValueError(f"label {label} is no source of {self.name}: it has sources 0..{self.num_classes - 1}")
        return np.flatnonzero(labels[self._raw_idx] == int(label))

    # Items.

    def __len__(self):
        return self._raw_idx.size

    def __getitem__(self, idx):
        raw_idx = int(self._raw_idx[idx])
        image = self._cached_images.get(raw_idx)
        if image is None:
            image = self._load_raw_image(raw_idx)
            if self._cache:
                self._cached_images[raw_idx] = image
        if self._xflip[idx]:
            image = image[..., ::-1]
        return image.copy(), self.get_label(idx)

    def details(self, idx):
        """EasyDict with `raw_idx` (index in the file order), `xflip` (bool) and `raw_label` (as stored)."""
        raw_idx = int(self._raw_idx[idx])
        label = self._file_labels()[raw_idx] if self._use_labels else np.zeros([0], dtype=np.float32)
        return EasyDict(raw_idx=raw_idx, xflip=bool(self._xflip[idx]), raw_label=label.copy())

    @property
    def name(self):
        return self._name

    @property
    def image_shape(self):  # [C,H,W]
        return list(self._raw_shape[1:])

    @property
    def num_channels(self):
        return self.image_shape[0]

    @property
    def resolution(self):
        c, h, w = self.image_shape
        if h != w:
            raise ValueError(f"{self.name}: images are {w}x{h}, not square; convert them with --transform=center-crop")
        return h

    # Views and identity.

    def subset(self, indices):
        """A view of the items `indices` (in that order): same label width, nothing copied but the index."""
        indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        if indices.size == 0:
            raise ValueError(f"{self.name}: the subset is empty")
        if indices.min() < 0 or indices.max() >= len(self):
            raise ValueError(f"{self.name}: subset index outside 0..{len(self) - 1}")
        view = copy.copy(self)
        view._raw_idx, view._xflip = self._raw_idx[indices], self._xflip[indices]
        return view

    def source(self, label):
        """The view of one source; labels keep their global ids and length."""
        indices = self.indices_of(label)
        if indices.size == 0:
            raise ValueError(f"{self.name}: source {label} has no images")
        return self.subset(indices)

    def image_hashes(self):
        """Sorted sha256 of every item (type, shape, pixels, stored label): equal lists mean equal images."""
        return sorted(self._item_hash(i) for i in range(len(self)))

    def _item_hash(self, idx):
        image, _ = self[idx]
        label = np.asarray(self._file_labels()[self._raw_idx[idx]])
        digest = hashlib.sha256(f"{image.dtype.str} {image.shape} {label.dtype.str} {label.shape}".encode())
        digest.update(np.ascontiguousarray(image).tobytes())
        digest.update(np.ascontiguousarray(label).tobytes())
        return digest.hexdigest()

    def content_hash(self):
        """sha256 (hex) over the sorted `image_hashes`: independent of order, file names, container and use_labels."""
        return content_hash(self)

    def __getstate__(self):  # Workers open their own files and read their own labels.
        return dict(self.__dict__, _raw_labels=None, _cached_images={})


class ImageFolderDataset(Dataset):
    """Folder or zip of images (EDM2 format). Items are the sorted names.

    Raises ValueError, in one line with file and remedy, for: a path that is no folder and no zip, a truncated zip, no
    images, `resolution` given and different, an unreadable `dataset.json`, an image without an entry, labels out of
    range, and, when the item is read, a corrupt image or a shape that differs from the first image.
    """

    def __init__(
        self,
        path,             # Folder or .zip.
        resolution=None,  # Refuse images of any other side; None takes what is there.
        use_labels=True,
        max_size=None,
        xflip=False,
        random_seed=0,
        cache=False,
    ):  # fmt: skip
        self._path = os.fspath(path)
        self._zipfile = None
        self._zip_pid = None
        self._meta = None
        if os.path.isdir(self._path):
            self._type = "dir"
            self._all_fnames = {
                os.path.relpath(os.path.join(root, fname), start=self._path).replace(os.sep, "/")
                for root, _dirs, files in os.walk(self._path)
                for fname in files
            }
        elif os.path.splitext(self._path)[1].lower() == ".zip":
            self._type = "zip"
            if not os.path.isfile(self._path):
                raise ValueError(f"{self._path}: no such file; write it with `dataset_tool.py convert`")
            self._all_fnames = {name for name in self._get_zipfile().namelist() if not name.endswith("/")}
        else:
            raise ValueError(
                f"{self._path}: must be an existing folder or a .zip; write one with `dataset_tool.py convert`"
            )

        supported = image_extensions() | {".npy"}
        self._image_fnames = sorted(f for f in self._all_fnames if os.path.splitext(f)[1].lower() in supported)
        if not self._image_fnames:
            raise ValueError(f"{self._path}: no images found; write a data set with `dataset_tool.py convert`")
        shape = self._read_image(self._image_fnames[0]).shape
        if resolution is not None and list(shape[1:]) != [resolution, resolution]:
            raise ValueError(
                f"{self._path}: images are {shape[2]}x{shape[1]}, but resolution={resolution} was asked for; "
                f"convert with --resolution={resolution}x{resolution}"
            )
        super().__init__(
            name=os.path.splitext(os.path.basename(os.path.normpath(self._path)))[0],
            raw_shape=[len(self._image_fnames), *shape],
            use_labels=use_labels,
            max_size=max_size,
            xflip=xflip,
            random_seed=random_seed,
            cache=cache,
        )

    @property
    def path(self):
        return self._path

    @property
    def image_names(self):
        """Names of the raw images, sorted; item i is `image_names[details(i).raw_idx]`."""
        return list(self._image_fnames)

    # Files.

    def _get_zipfile(self):
        if self._zipfile is None or self._zip_pid != os.getpid():  # A forked worker must not share a file position.
            try:
                self._zipfile = zipfile.ZipFile(self._path)
            except ZIP_ERRORS as err:
                raise ValueError(f"{self._path}: no readable zip, perhaps truncated ({err}); write it again") from err
            self._zip_pid = os.getpid()
        return self._zipfile

    def _read_bytes(self, fname):
        try:
            if self._type == "dir":
                with open(os.path.join(self._path, fname), "rb") as f:
                    return f.read()
            return self._get_zipfile().read(fname)
        except ZIP_ERRORS as err:
            raise ValueError(f"{self._path}: cannot read {fname} ({err}); write the data set again") from err

    def _read_image(self, fname):
        data = self._read_bytes(fname)
        try:
            return decode_image(data, fname)
        except ValueError as err:
            raise ValueError(f"{self._path}: {err}") from err

    def _load_raw_image(self, raw_idx):
        fname = self._image_fnames[raw_idx]
        image = self._read_image(fname)
        if list(image.shape) != self._raw_shape[1:]:
            raise ValueError(
                f"{self._path}: {fname} has shape {list(image.shape)}, but the first image has {self._raw_shape[1:]}; "
                f"convert with --resolution=WxH so that all images agree"
            )
        return image

    def close(self):
        if self._zipfile is not None and self._zip_pid == os.getpid():
            self._zipfile.close()
        self._zipfile = None

    # Labels.

    def _get_meta(self):
        if self._meta is None:
            self._meta = {}
            if LABELS_FILE in self._all_fnames:
                self._meta = parse_meta(self._read_bytes(LABELS_FILE), where=f"{self._path}/{LABELS_FILE}")
        return self._meta

    def _explicit_classes(self):
        return self._get_meta().get("num_classes")

    @property
    def class_names(self):
        return self._get_meta().get("class_names")

    def _load_raw_labels(self):
        labels = self._get_meta().get("labels")
        if labels is None:
            return None
        missing = [f for f in self._image_fnames if f not in labels]
        if missing:
            raise ValueError(
                f"{self._path}/{LABELS_FILE}: no label for {missing[0]} ({len(missing)} of {len(self._image_fnames)} "
                f"images have none); give every image one, or set labels to null"
            )
        try:
            return np.array([labels[f] for f in self._image_fnames])
        except ValueError as err:
            raise ValueError(f"{self._path}/{LABELS_FILE}: label vectors must all have the same length") from err

    def __getstate__(self):
        return dict(super().__getstate__(), _zipfile=None, _zip_pid=None, _meta=None)

    def subset(self, indices):
        view = super().subset(indices)
        view._zipfile = None  # Closing one view must not close another.
        return view


class ArrayDataset(Dataset):
    """Images in memory: arrays or CPU tensors `[N,C,H,W]` (2-D points: `[N,2,1,1]`), labels int [N] or float [N,K]."""

    def __init__(self, images, labels=None, num_classes=None, class_names=None, name="array", **kwargs):
        self._images = np.asarray(images)
        if self._images.ndim != 4:
            raise ValueError(f"images must have shape [N,C,H,W], got {list(self._images.shape)}")
        if self._images.dtype != np.uint8:
            self._images = self._images.astype(np.float32)
        self._labels = None if labels is None else np.asarray(labels)
        self._num_classes = None if num_classes is None else int(num_classes)
        self.class_names = class_names
        super().__init__(name=name, raw_shape=self._images.shape, **kwargs)
        self._file_labels()  # Fail now, in the caller's line.

    def _load_raw_image(self, raw_idx):
        return self._images[raw_idx]

    def _load_raw_labels(self):
        return self._labels

    def _explicit_classes(self):
        return self._num_classes


# ----------------------------------------------------------------------------
# Orders and loading.


def content_hash(*datasets):
    """sha256 (hex) of the images of one or several data sets together: single-source arms against the multi arm."""
    hashes = sorted(h for dataset in datasets for h in dataset.image_hashes())
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def load_arrays(dataset):
    """Small data in memory: (images uint8 or float32 [N,C,H,W], labels float32 [N,label_dim]), CPU tensors."""
    images = torch.from_numpy(np.stack([dataset[i][0] for i in range(len(dataset))]))
    labels = np.stack([dataset.get_label(i) for i in range(len(dataset))]) if dataset.label_dim else None
    return images, torch.zeros(len(dataset), 0) if labels is None else torch.from_numpy(labels)
