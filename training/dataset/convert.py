"""From any image source to one data set in EDM2's container: choose, crop, write. Needs no torch.

The same image has the same name in every subset: its index in the source's listing. Subsets are drawn per source,
without replacement, from one seeded order, so smaller ones are contained in larger ones and a hold-out is the rest.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import zipfile

import numpy as np

from dnnlib import atomic_write
from training.dataset.format import LABELS_FILE, ImageSource
from training.dataset.sources import open_source

TRANSFORMS = ("center-crop", "center-crop-wide", "center-crop-dhariwal", "pad")
_NO_DESTINATION = (".tar", ".tgz", ".gz", ".7z", ".rar", ".npz", ".npy", ".png", ".jpg", ".json")

# ----------------------------------------------------------------------------
# Crops (EDM2 dataset tool). Each takes and returns a PIL image; center-crop-wide may return None: skipped.


def make_transform(transform=None, resolution=None):
    """(name, (W, H) or None) -> function PIL image -> PIL image or None. ValueError for impossible combinations."""
    if transform is None:
        return (lambda image: image) if resolution is None else (lambda image: _lanczos(image, resolution))
    if transform not in TRANSFORMS:
        raise ValueError(f"--transform={transform}: known are {', '.join(TRANSFORMS)}")
    if resolution is None:
        raise ValueError(f"--transform={transform} needs --resolution=WxH")
    width, height = resolution
    if transform == "center-crop-dhariwal" and width != height:
        raise ValueError(f"--transform=center-crop-dhariwal needs a square --resolution, got {width}x{height}")
    if transform == "center-crop-wide" and width < height:
        raise ValueError(f"--transform=center-crop-wide needs --resolution=WxH with W >= H, got {width}x{height}")
    function = dict(zip(TRANSFORMS, (_center_crop, _center_crop_wide, _center_crop_dhariwal, _pad), strict=True))
    return lambda image: function[transform](image, width, height)


def _lanczos(image, size):
    import PIL.Image

    return image if image.size == tuple(size) else image.resize(tuple(size), PIL.Image.Resampling.LANCZOS)


def _center_crop(image, width, height):
    w, h = image.size
    crop = min(w, h)
    left, top = (w - crop) // 2, (h - crop) // 2
    return _lanczos(image.crop((left, top, left + crop, top + crop)), (width, height))


def wide_rows(size, width, height):
    """Rows that center-crop-wide keeps of an image of `size` (w, h), or None where the image is too small."""
    w, h = size
    rows = int(np.round(width * h / w))
    return None if w < width or rows < height else rows


def _center_crop_wide(image, width, height):
    import PIL.Image

    w, h = image.size
    rows = wide_rows((w, h), width, height)
    if rows is None:
        return None
    image = _lanczos(image.crop((0, (h - rows) // 2, w, (h + rows) // 2)), (width, height))
    canvas = PIL.Image.new(image.mode, (width, width))
    canvas.paste(image, (0, (width - height) // 2))
    return canvas


def _center_crop_dhariwal(image, size, _height):
    import PIL.Image

    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(s // 2 for s in image.size), PIL.Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(s * scale) for s in image.size), PIL.Image.Resampling.BICUBIC)
    left, top = ((s - size) // 2 for s in image.size)
    return image.crop((left, top, left + size, top + size))


def _pad(image, width, height):
    import PIL.Image

    w, h = image.size
    if w > width or h > height:
        raise ValueError(f"--transform=pad: an image of {w}x{h} does not fit into {width}x{height}; use center-crop")
    canvas = PIL.Image.new(image.mode, (width, height))
    canvas.paste(image, ((width - w) // 2, (height - h) // 2))
    return canvas


# ----------------------------------------------------------------------------
# Choosing images.


def select_images(labels, count, sources=None, per_source=None, max_images=None, seed=0, accept=None):
    """Indices (chosen, rest), both int64 and sorted.

    `sources`: keep these class indices only; `max_images`: then the first so many; `per_source`: then so many per source,
    the first ones of an order drawn from (seed, source), so that the choice is nested in `per_source` and the same for
    every set of sources. `rest` is what `per_source` leaves over. `accept(index)` may veto images before they count.
    """
    indices = np.arange(count, dtype=np.int64)
    if sources is None and per_source is None:
        return indices[:max_images], indices[:0]
    if labels is None or not all(isinstance(label, (int, np.integer)) for label in labels):
        raise ValueError("--sources and --per-source need a class index for every image: sub-folders or dataset.json")
    labels = np.array(labels, dtype=np.int64)  # a copy
    present = np.unique(labels)
    if sources is not None:
        missing = sorted(set(sources) - set(present.tolist()))
        if missing:
            known = f"{present.min()}..{present.max()}"
            raise ValueError(f"--sources: no images of source {missing[0]}; the collection has {known}")
        indices = indices[np.isin(labels, list(sources))]
    indices = indices[:max_images]
    if per_source is None:
        return indices, indices[:0]
    if per_source < 1:
        raise ValueError(f"--per-source={per_source} must be at least 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--subset-seed={seed} must lie in 0..2^32-1")
    chosen, rest = [], []
    for label in np.unique(labels[indices]):
        drawn = indices[labels[indices] == label]
        np.random.RandomState([seed, int(label)]).shuffle(drawn)
        if accept is not None:
            drawn = np.array([i for i in drawn if accept(int(i))], dtype=np.int64)
        if drawn.size < per_source:
            raise ValueError(f"--per-source={per_source}: source {label} has only {drawn.size} usable images")
        chosen.append(drawn[:per_source])
        rest.append(drawn[per_source:])
    return np.sort(np.concatenate(chosen)), np.sort(np.concatenate(rest))


def permute_labels(labels, sources, seed):
    """Labels with those of the images of `sources` (None: all) permuted among them, by a generator of the seed.

    Every source keeps its number of images and becomes a sample of the same mixture.
    """
    if labels is None or not all(isinstance(label, (int, np.integer)) for label in labels):
        raise ValueError("--shuffle-labels needs a class index for every image: sub-folders or dataset.json")
    labels = np.asarray(labels, dtype=np.int64)
    index = np.arange(len(labels)) if sources is None else np.flatnonzero(np.isin(labels, list(sources)))
    labels[index] = np.random.RandomState(seed).permutation(labels[index])
    return labels.tolist()


# ----------------------------------------------------------------------------
# Writing.


def check_dest(dest, overwrite=False):
    """ValueError where `dest` exists already (an empty folder is fine) or is neither a folder name nor .zip."""
    dest = os.fspath(dest)
    extension = os.path.splitext(dest)[1].lower()
    if extension in _NO_DESTINATION:
        raise ValueError(f"{dest}: the destination must be a folder or end in .zip")
    if os.path.isdir(dest):
        if extension == ".zip":
            raise ValueError(f"{dest}: is a folder; choose another name for the zip")
        if not os.listdir(dest):
            return
        if overwrite and not os.path.isfile(os.path.join(dest, LABELS_FILE)):
            raise ValueError(f"{dest}: not replaced: the folder holds no {LABELS_FILE}, so it is no data set")
    if os.path.exists(dest) and not overwrite:
        raise ValueError(f"{dest}: exists already; choose another name or pass --overwrite")


class DatasetWriter:
    """Context manager that writes one data set; `dest` appears, whole, only when the block ends without an error.

    Zip entries are stored, with fixed time stamps: equal images give equal bytes.
    """

    def __init__(self, dest, overwrite=False, num_classes=None, class_names=None):
        check_dest(dest, overwrite)
        self.dest = os.fspath(dest)
        self.is_zip = self.dest.lower().endswith(".zip")
        self.num_classes, self.class_names = num_classes, class_names
        self._labels = []
        self._shape = None

    def __enter__(self):
        parent = os.path.dirname(os.path.abspath(self.dest))
        os.makedirs(parent, exist_ok=True)
        self._stack = contextlib.ExitStack()
        if self.is_zip:
            file = self._stack.enter_context(atomic_write(self.dest))
            self._zip = self._stack.enter_context(zipfile.ZipFile(file, "w", compression=zipfile.ZIP_STORED))
        else:
            self._folder = tempfile.mkdtemp(dir=parent, prefix=f".{os.path.basename(self.dest)}.", suffix=".tmp")
        return self

    def __exit__(self, kind, value, traceback):
        if kind is None:
            try:
                self._write(LABELS_FILE, json.dumps(self._meta()).encode())
                self._finish()
            except BaseException as err:
                self._abandon(type(err), err, err.__traceback__)
                raise
            return False
        self._abandon(kind, value, traceback)
        return False

    def _finish(self):
        if self.is_zip:
            self._stack.close()
            return
        os.chmod(self._folder, 0o755)
        old = None
        if os.path.isdir(self.dest):
            old = self._folder + ".old"
            os.replace(self.dest, old)
        os.replace(self._folder, self.dest)
        if old is not None:
            shutil.rmtree(old)

    def _abandon(self, *exception):
        if self.is_zip:
            with contextlib.suppress(exception[0]):
                self._stack.__exit__(*exception)
        else:
            shutil.rmtree(self._folder, ignore_errors=True)
        error = exception[1]
        if isinstance(error, OSError) and error.errno and not error.filename:  # a full disk does not say which file
            raise OSError(error.errno, error.strerror, self.dest) from error

    def _meta(self):
        complete = self._labels and all(label is not None for _, label in self._labels)
        meta = {"labels": self._labels if complete else None}
        if complete and self.num_classes is not None:
            meta["num_classes"] = int(self.num_classes)
            if self.class_names is not None:
                meta["class_names"] = list(self.class_names)
        return meta

    def _write(self, name, data):
        if self.is_zip:
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16  # The same bytes on every system.
            self._zip.writestr(info, data)
        else:
            path = os.path.join(self._folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as f:
                f.write(data)

    def _add(self, name, data, shape, label, described):
        if shape[-1] != shape[-2]:
            raise ValueError(f"{described}: {shape[-1]}x{shape[-2]} is not square; use --transform and --resolution")
        if self._shape is None:
            self._shape = shape
        if shape != self._shape:
            raise ValueError(
                f"{described}: shape {list(shape)} differs from {list(self._shape)} of the images before; "
                f"use --resolution=WxH so that all agree"
            )
        self._write(name, data)
        self._labels.append([name, label])

    def add_image(self, index, image, label=None, described=None):
        """PIL image (L or RGB) -> `IIIII/imgIIIIIIII.png`, uncompressed."""
        data = io.BytesIO()
        image.save(data, format="png", compress_level=0, optimize=False)
        name = f"{index:08d}"
        shape = (len(image.getbands()), image.size[1], image.size[0])
        self._add(f"{name[:5]}/img{name}.png", data.getvalue(), shape, label, described or name)

    def add_latents(self, index, array, label=None, described=None):
        """float32 [C,H,W] -> `IIIII/img-mean-std-IIIIIIII.npy`."""
        data = io.BytesIO()
        np.save(data, np.asarray(array, dtype=np.float32))
        name = f"{index:08d}"
        self._add(f"{name[:5]}/img-mean-std-{name}.npy", data.getvalue(), tuple(array.shape), label, described or name)


# ----------------------------------------------------------------------------
# Commands.


def convert(
    source,            # Path, `package:name`, or an ImageSource.
    dest,              # Folder or .zip to write.
    *,
    sources=None,      # Class indices to keep; None keeps all.
    per_source=None,   # Images per source; None keeps all.
    subset_seed=0,     # Seed of the per-source order.
    holdout=None,      # Second destination: what per_source leaves over.
    max_images=None,   # Use only the first so many images (of the chosen sources).
    shuffle_labels=None,  # Seed: permute the labels among the chosen sources' images (a control: sources made alike).
    resolution=None,   # (W, H); None leaves sizes as they are.
    transform=None,    # One of TRANSFORMS; None resizes.
    channels="auto",   # "auto", 1 or 3. auto: RGB (EDM2), but grey where the source is grey by nature.
    overwrite=False,
    dry_run=False,
    progress=lambda items, text: items,
):  # fmt: skip
    """Write the data set(s); returns a summary dict (`count`, `holdout`, `skipped`, `per_source`, ...). ValueError."""
    apply = make_transform(transform, resolution)
    if holdout is not None and per_source is None:
        raise ValueError("--holdout takes what --per-source leaves over: give --per-source=N too")
    if max_images is not None and max_images < 1:
        raise ValueError(f"--max-images={max_images} must be at least 1")
    if holdout is not None and os.path.abspath(holdout) == os.path.abspath(dest):
        raise ValueError("--holdout and --dest must be two files")
    for path in filter(None, (dest, holdout)):
        check_dest(path, overwrite)
    source = source if isinstance(source, ImageSource) else open_source(source)
    if source.latents and (transform is not None or resolution is not None or channels != "auto"):
        raise ValueError("latents are copied as they are: drop --transform, --resolution and --channels")
    mode = "L" if str(channels) == "1" or (channels == "auto" and source.grey) else "RGB"
    accept = None
    if transform == "center-crop-wide":
        size = source.size or (lambda i: source.read(i).size)
        accept = lambda i: wide_rows(size(i), *resolution) is not None
    labels = source.labels
    if shuffle_labels is not None:
        labels = permute_labels(labels, sources, shuffle_labels)
    chosen, rest = select_images(labels, source.count, sources, per_source, max_images, subset_seed, accept)
    labels = labels if labels is not None else [None] * source.count
    unlabelled = sum(labels[i] is None for i in chosen) if source.labels is not None else 0
    summary = {
        "source": source.name,
        "dest": os.fspath(dest),
        "count": len(chosen),
        "holdout": len(rest) if holdout is not None else 0,
        "skipped": 0,
        "channels": None if source.latents else len(mode),
        "num_classes": source.num_classes,
        "per_source": _count(labels, chosen),
        "unlabelled": unlabelled,
    }
    if holdout is not None and not len(rest):
        raise ValueError(f"--holdout={holdout}: no images are left for it; lower --per-source={per_source}")
    if dry_run:
        return summary
    for path, indices in [(dest, chosen)] + ([(holdout, rest)] if holdout is not None else []):
        with DatasetWriter(path, overwrite, source.num_classes, source.class_names) as writer:
            for index in progress(indices.tolist(), os.path.basename(path)):
                if source.latents:
                    writer.add_latents(index, source.read(index), labels[index], source.describe(index))
                    continue
                image = apply(source.read(index).convert(mode))
                if image is None:
                    summary["skipped"] += 1
                else:
                    writer.add_image(index, image, labels[index], source.describe(index))
    return summary


def _count(labels, indices):
    """{label: count} of the class indices among `indices`."""
    found = [labels[i] for i in indices if isinstance(labels[i], int)]
    return {int(k): int(v) for k, v in zip(*np.unique(found, return_counts=True), strict=True)} if found else {}
