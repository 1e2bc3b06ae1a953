"""From any image source to one data set in EDM2's container: choose, crop, write. Needs no torch.

The same image has the same name in every subset: its index in the source's listing. Subsets are drawn per source,
without replacement, from one seeded order, so smaller ones are contained in larger ones and a hold-out is the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import click
import numpy as np
import PIL.Image

from dnnlib import cli, outputs
from dnnlib.options import opt
from dnnlib.util import usable_cores
from training.dataset.format import ImageSource
from training.dataset.imagenet import resolve
from training.dataset.pixels import GREY, Pixels, upright_size
from training.dataset.sources import join, open_source
from training.dataset.writing import DATA_SET, NO_IMAGES, Item, check_dest, dataset_writer, work_key

# --- Crops (EDM2 dataset tool). Each takes and returns a PIL image; center-crop-wide may return None: skipped ---------


def _lanczos(image, size):
    return image if image.size == size else image.resize(size, PIL.Image.Resampling.LANCZOS)


def _center_crop(image, width, height):
    w, h = image.size
    crop = min(w, h)
    left, top = (w - crop) // 2, (h - crop) // 2
    return _lanczos(image.crop((left, top, left + crop, top + crop)), (width, height))


def wide_rows(size: tuple[int, int], width: int, height: int) -> int | None:
    """Rows that center-crop-wide keeps of an image of `size` (w, h), or None where the image is too small."""
    w, h = size
    rows = int(np.round(width * h / w))
    return None if w < width or rows < height else rows


def _center_crop_wide(image, width, height):
    w, h = image.size
    rows = wide_rows((w, h), width, height)
    if rows is None:
        return None
    image = _lanczos(image.crop((0, (h - rows) // 2, w, (h + rows) // 2)), (width, height))
    return _pad(image, width, width)


def _center_crop_dhariwal(image, size, _height):
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(s // 2 for s in image.size), PIL.Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(s * scale) for s in image.size), PIL.Image.Resampling.BICUBIC)
    left, top = ((s - size) // 2 for s in image.size)
    return image.crop((left, top, left + size, top + size))


def _pad(image, width, height):
    w, h = image.size
    if w > width or h > height:
        raise ValueError(f"--transform=pad: an image of {w}x{h} does not fit into {width}x{height}; use center-crop")
    canvas = PIL.Image.new(image.mode, (width, height))
    canvas.paste(image, ((width - w) // 2, (height - h) // 2))
    return canvas


TRANSFORMS = {
    "center-crop": _center_crop,
    "center-crop-wide": _center_crop_wide,
    "center-crop-dhariwal": _center_crop_dhariwal,
    "pad": _pad,
}


def make_transform(transform: str | None, resolution: tuple[int, int] | None) -> Callable:
    """(name, (W, H)) -> function PIL image -> PIL image or None. ValueError for impossible combinations."""
    if transform is None:
        return (lambda image: image) if resolution is None else (lambda image: _lanczos(image, resolution))
    if resolution is None:
        raise ValueError(f"--transform={transform} needs --resolution=WxH")
    width, height = resolution
    if transform == "center-crop-dhariwal" and width != height:
        raise ValueError(f"--transform=center-crop-dhariwal needs a square --resolution, got {width}x{height}")
    if transform == "center-crop-wide" and width < height:
        raise ValueError(f"--transform=center-crop-wide needs --resolution=WxH with W >= H, got {width}x{height}")
    return lambda image: TRANSFORMS[transform](image, width, height)


# --- Choosing images --------------------------------------------------------------------------------------------------


def _class_indices(labels, options):
    """int64 [N], a copy. ValueError where an image has none."""
    if labels is None or not all(isinstance(label, (int, np.integer)) for label in labels):
        raise ValueError(f"{options} a class index for every image: sub-folders or dataset.json")
    return np.array(labels, dtype=np.int64)


def class_ids(source: str) -> tuple[list[int], str]:
    """Ids of the classes that have images in a folder, archive or package, ascending, and a sentence on what was understood.

    Raises ValueError where an image has no class.
    """
    opened = open_source(source)
    labels = _class_indices(opened.labels, f"--source={source}: sources need")
    return np.unique(labels).tolist(), opened.about


def select_images(
    labels: Sequence | None,
    count: int,
    sources: Sequence[int] | None = None,
    per_source: int | None = None,
    max_images: int | None = None,
    seed: int = 0,
    accept: Callable[[int], bool] | None = None,
    reserved: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (chosen, rest), both int64 and sorted.

    `sources`: keep these class indices only; `max_images`: then the first so many; `per_source`: then so many per source,
    the first ones of an order drawn from (seed, source), so that the choice is nested in `per_source` and the same for
    every set of sources. `rest` is what `per_source` leaves over, without the last `reserved` of each order. `accept(index)`
    may veto images before they count.
    """
    indices = np.arange(count, dtype=np.int64)
    if sources is not None or per_source is not None:
        labels = _class_indices(labels, "--sources and --per-source need")
    if sources is not None:
        missing = sorted(set(sources) - set(labels.tolist()))
        if missing:
            known = f"{labels.min()}..{labels.max()}"
            raise ValueError(f"--sources: no images of source {missing[0]}; the collection has {known}")
        indices = indices[np.isin(labels, sources)]
    indices = indices[:max_images]
    if per_source is None:
        return indices, indices[:0]
    chosen, rest = [], []
    for label in np.unique(labels[indices]):
        drawn = indices[labels[indices] == label]
        np.random.RandomState([seed, int(label)]).shuffle(drawn)
        if accept is not None:
            drawn = np.array([i for i in drawn if accept(int(i))], dtype=np.int64)
        end = drawn.size - reserved
        if end < per_source:
            kept = f", {reserved} of them for validation" if reserved else ""
            raise ValueError(f"--per-source={per_source}: source {label} has only {drawn.size} usable images{kept}")
        chosen.append(drawn[:per_source])
        rest.append(drawn[per_source:end])
    return np.sort(np.concatenate(chosen)), np.sort(np.concatenate(rest))


def permute_labels(labels: Sequence | None, sources: Sequence[int] | None, seed: int) -> list[int]:
    """Labels with those of the images of `sources` (None: all) permuted among them, by a generator of the seed.

    Every source keeps its number of images and becomes a sample of the same mixture.
    """
    labels = _class_indices(labels, "--shuffle-labels needs")
    index = np.arange(len(labels)) if sources is None else np.flatnonzero(np.isin(labels, sources))
    labels[index] = np.random.RandomState(seed).permutation(labels[index])
    return labels.tolist()


# --- Commands ---------------------------------------------------------------------------------------------------------


_count, _seed = functools.partial(opt, type=cli.COUNT), functools.partial(opt, type=click.IntRange(0, 2**32 - 1))


@dataclasses.dataclass(frozen=True)
class _Writing:
    """What all that write a data set share."""

    overwrite: bool = False
    dry_run: bool = False
    progress: Callable[[Iterable, str], Iterable] = lambda items, text: items


@dataclasses.dataclass(frozen=True)
class Conversion(_Writing):
    """Which images `convert` takes, and what it makes of them."""

    split_folder: str | None = opt(
        None, "Folder to take of train, val, test, ... [default: train where there is one]", metavar="NAME"
    )
    skip_bad: bool = False  # leave out corrupt images, and list them
    labels: str | None = opt(
        None,
        "Of folders: none, the folders at the top, or those that images lie in [default: label files, else top]",
        type=click.Choice(["none", "top", "leaf"]),
    )
    sources: Sequence[int | str] | None = opt(
        None,
        "Keep these classes only: indices (0,3,5-7), names, WordNet ids, sim1, sim2, sim3 (:3, :5); ids stay as they are",
        type=cli.STRINGS,
        metavar="LIST",
    )
    per_source: int | None = _count(None, "Images per source, without replacement [default: all]", metavar="INT")
    subset_seed: int = _seed(0, "Seed of the order that --per-source takes images from", metavar="INT")
    holdout: str | os.PathLike | None = opt(None, "Second data set: what --per-source leaves over", metavar="DIR|ZIP")
    val: str | os.PathLike | None = opt(None, "Third data set, apart from both: for --val-data", metavar="DIR|ZIP")
    val_per_source: int | None = _count(None, "Its images per source, the same for every --per-source", metavar="INT")
    max_images: int | None = _count(None, "Only the first so many images (of the chosen sources)", metavar="INT")
    shuffle_labels: int | None = _seed(
        None, "Permute labels among the chosen sources with this seed (a control: sources made alike)", metavar="SEED"
    )
    resolution: tuple[int, int] | None = opt(
        None, "Size of the images written [default: as they are]", type=cli.SIZE, metavar="WxH"
    )
    transform: str | None = opt(None, "Crop mode [default: resize]", type=cli.Choice(list(TRANSFORMS)))
    channels: str = opt(
        "auto",
        "auto: RGB, but digits and grey data sets stay grey; 4 keeps alpha",
        type=cli.Choice(["auto", "1", "3", "4"]),
    )
    background: str = opt("white", "Colour behind transparent images", metavar="COLOUR")
    workers: int | None = opt(
        None, "Images decoded at a time [default: a core each]", metavar="INT", type=click.IntRange(1, 256)
    )
    depth: str | None = opt(
        None,
        "How more than 8 bits become 8: scale16 (0..65535), unit (0..1), minmax (of each image), LOW:HIGH "
        "[default: refuse]",
        metavar="RULE",
    )


@dataclasses.dataclass(frozen=True)
class LatentOptions(_Writing):
    """What encoding and decoding share (training/dataset/latents.py)."""

    model_url: str = opt(
        "stabilityai/sd-vae-ft-mse", "VAE: local folder or hub name", "--vae", "--model-url", metavar="PATH|NAME"
    )
    max_images: int | None = _count(None, "Only the first so many images", metavar="INT")
    batch: int = _count(8, "Images per call of the VAE", metavar="INT")
    sample_seed: int | None = opt(
        None, "Draw from the posterior with this seed [default: its mean]", metavar="INT", type=click.IntRange(min=0)
    )
    device: str | None = opt(None, "Where the VAE runs [default: a GPU where there is one]", metavar="DEVICE")


def _examine(source, indices, o):
    """{index: why it cannot be read, or ""; None where center-crop-wide leaves it out}, by threads, in order."""

    def fetch(index):
        try:
            return source.fetch(index)
        except ValueError as err:
            return err

    def look(index, stored):
        try:
            if isinstance(stored, ValueError):
                raise stored
            item = source.decode(stored, source.describe(index), not o.skip_bad)
        except ValueError as err:
            if not o.skip_bad:
                raise
            return str(err)
        wide = o.transform == "center-crop-wide"
        return None if wide and wide_rows(upright_size(item), *o.resolution) is None else ""

    indices = indices.tolist()
    found = in_order(look, fetch, indices, o.workers or usable_cores())
    return dict(zip(o.progress(indices, "checking"), found, strict=True))


def _all_grey(count, header):
    """Whether all images that can be opened are grey."""
    for i in range(count):
        with contextlib.suppress(ValueError):
            if header(i).mode not in GREY:
                return False
    return True


def in_order(function: Callable, fetch: Callable, indices: Iterable[int], workers: int) -> Iterator:
    """function(index, fetch(index)) by threads; results, and errors, in the order of the indices.

    Archives are read here, forwards, by one thread, and few items ahead of what was taken.
    """
    jobs, pool = deque(), ThreadPoolExecutor(workers)
    try:
        for index in indices:
            try:
                job = pool.submit(function, index, fetch(index))
            except ValueError as err:  # those before it come first
                job = Future()
                job.set_exception(err)
            jobs.append(job)
            if len(jobs) > 2 * workers:
                yield jobs.popleft().result()
        while jobs:
            yield jobs.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def convert(
    source: str | os.PathLike | Sequence[str] | ImageSource, dest: str | os.PathLike, **options: object
) -> dict:
    """Write the data set(s); returns a summary (`count`, `holdout`, `skipped`, `per_source`, `bytes`, ...). ValueError.

    `shared` in it: images of the hold-out that are, pixel by pixel, in the data set too. A dry run reads and makes all, and
    writes nothing. Nothing appears before it is whole: a conversion that was killed goes on when it is called again, with what
    it had written (`resumed` images of the summary), as long as images and options are the same.

    source: path, `package:name`, several of them, or what is open already; dest: folder or .zip; options: of Conversion.
    """
    o = Conversion(**options)
    apply = make_transform(o.transform, o.resolution)
    Pixels(3, o.background, o.depth)  # known colour and rule
    for option, path in (("--holdout", o.holdout), ("--val", o.val)):
        if path is not None and o.per_source is None:
            raise ValueError(f"{option} takes what --per-source leaves over: give --per-source=N too")
    if (o.val is None) != (o.val_per_source is None):
        raise ValueError("--val=ZIP and --val-per-source=N belong together: give both, or none")
    places = {"--dest": dest, "--holdout": o.holdout, "--val": o.val}
    places = {option: path for option, path in places.items() if path is not None}
    paths = [] if isinstance(source, ImageSource) else [source] if isinstance(source, (str, os.PathLike)) else [*source]
    named = [outputs.Named("--source", os.fspath(path), True) for path in paths]
    named += [outputs.Named(option, os.fspath(path), written=True) for option, path in places.items()]
    others = {option: [other for other in named if other.option != option] for option in places}
    for option, path in places.items():
        check_dest(option, path, others[option], new=o.dry_run and not o.overwrite)
    where = "+".join(map(os.fspath, paths)) or source.name
    source = join([open_source(path, o.split_folder, o.labels) for path in paths]) if paths else source
    if source.latents and (o.transform or o.resolution or o.depth or o.channels != "auto"):
        raise ValueError("latents are copied as they are: drop --transform, --resolution, --channels and --depth")
    labels, wanted = source.labels, None if o.sources is None else resolve(o.sources, source)
    if o.shuffle_labels is not None:
        labels = permute_labels(labels, wanted, o.shuffle_labels)
    drawn = (labels, source.count, wanted, o.per_source, o.max_images, o.subset_seed)
    looked = {}
    if o.skip_bad or (o.transform == "center-crop-wide" and o.per_source is not None):
        candidates, _ = select_images(labels, source.count, wanted, None, o.max_images)
        looked = _examine(source, candidates, o)
        drawn += (lambda i: looked[i] == "",)
    chosen, rest = select_images(*drawn, reserved=o.val_per_source or 0)
    validation = np.setdiff1d(select_images(*drawn)[1], rest) if o.val else rest[:0]
    bad = {index: why for index, why in looked.items() if why}
    chosen = np.array([i for i in chosen if i not in bad], np.int64)
    if bad and not len(chosen):
        raise ValueError(f"--skip-bad: none of the chosen images can be read, such as {next(iter(bad.values()))}")
    if o.holdout is not None and not len(rest):
        raise ValueError(f"--holdout={o.holdout}: no images are left for it; lower --per-source={o.per_source}")
    if not len(chosen):
        raise ValueError(f"--source={where}: {NO_IMAGES}")
    header = functools.partial(source.read, header_only=True)
    grey = _all_grey(source.count, header) if source.grey is None else source.grey
    channels = (1 if grey else 3) if o.channels == "auto" else int(o.channels)
    pixels = Pixels(channels, o.background, o.depth)
    labels = labels if labels is not None else [None] * source.count
    unlabelled = sum(labels[i] is None for i in chosen) if source.labels is not None else 0
    summary = {
        "source": source.name,
        "dest": os.fspath(dest),
        "count": len(chosen),
        "holdout": len(rest) if o.holdout is not None else 0,
        "val": len(validation),
        "skipped": 0,
        "bad": [source.describe(i) for i in sorted(bad)],
        "channels": None if source.latents else channels,
        "num_classes": source.num_classes,
        "per_source": dict(sorted(Counter(labels[i] for i in chosen if isinstance(labels[i], int)).items())),
        "unlabelled": unlabelled,
        "understood": source.about,
        "warnings": [*source.warnings, *([f"{source.missing}, so labels are null"] if unlabelled else [])],
    }

    def made(index, stored):
        if isinstance(stored, Item):
            return stored
        name = source.describe(index)
        item = source.decode(stored, name, False)
        if not source.latents:
            item = apply(pixels(item, name))
        return None if item is None else Item.of(index, item, name)

    with contextlib.ExitStack() as stack:  # all take their names at the end, and only then are let go
        parts = {"--dest": chosen, "--holdout": rest, "--val": validation}
        keys, locks = dict.fromkeys(places), dict.fromkeys(places)  # a dry run holds nothing, and reads all the same
        if not o.dry_run:
            made_so = (o.transform, o.resolution, channels, o.background, o.depth)
            keys = {option: work_key(source, paths, parts[option], *made_so) for option in places}
            claim = functools.partial(outputs.claimed, kind=DATA_SET, new=not o.overwrite)
            for option, path in places.items():
                locks[option] = stack.enter_context(claim(option, path, others=others[option], key=keys[option]))
        new_writer = lambda option: dataset_writer(places[option], locks[option], source, keys[option])
        writers = [stack.enter_context(new_writer(option)) for option in places]
        for (option, path), writer in zip(places.items(), writers, strict=True):
            indices = parts[option].tolist()

            def fetch(index, kept=writer.kept):
                return kept(index, source.latents) or source.fetch(index)

            made_items = in_order(made, fetch, indices, o.workers or usable_cores())
            items = stack.enter_context(contextlib.closing(made_items))
            for index, item in zip(o.progress(indices, os.path.basename(path)), items, strict=True):
                if item is None:
                    summary["skipped"] += 1
                else:
                    writer.add(item, labels[index], source.describe(index))
    summary |= {name: sum(getattr(writer, name) for writer in writers) for name in ("resumed", "bytes")}
    summary["warnings"] += pixels.notes(automatic=o.channels == "auto")
    contents = [writer.hashes for writer in writers]
    if len(contents) > 1:
        held = [image for part in contents[1:] for image in part]
        if shared := sum(map(set(contents[0]).__contains__, held)):
            where = " and ".join(str(path) for path in [*places.values()][1:])
            where = f"{shared} of {len(held)} images of {where} are in {dest} too: the source has duplicates"
            summary["warnings"].append(f"{where}, so that scores on them say nothing about new images")
        summary["shared"] = shared
    return summary
