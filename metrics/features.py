"""Images -> features: one pass over the images for any number of detectors, in one or several processes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import tqdm

from metrics.detectors.base import about
from metrics.statistics import FeatureStatistics, gather_rows, require_memory
from torch_utils.distributed import get_rank, get_world_size, split_batches
from training.dataset import Dataset, hash_of_items
from training.fit import Side, of_images, title

FEATURE_LIMIT = 2**30  # bytes of float32 features kept in memory per detector; beyond it only the sums are kept


@dataclasses.dataclass
class FeatureSet:
    """What one detector saw in one set of images.

    `features` [N, F] float32 and `labels` [N] int64 (-1: none) are in the order of the data set, or None where only
    the sums are known. `detector` is the identity; statistics of two identities are never compared.
    """

    detector: str
    statistics: FeatureStatistics
    features: np.ndarray | None = None
    labels: np.ndarray | None = None
    provenance: dict = dataclasses.field(default_factory=dict)
    hashes: np.ndarray | None = None  # of the images, uint64 [N], in the same order

    @property
    def num_sources(self) -> int:
        """Sources that are kept apart; 0: overall statistics only."""
        return self.statistics.num_sources

    def count(self, source: int | None = None) -> int | None:
        """Images of one source or of all; None where a foreign file does not say."""
        return self.statistics.count(source) if source is None or source < self.num_sources else 0

    @property
    def sources(self) -> list[int] | None:
        """Sources that have images; None where some images are of no known source."""
        counts = [self.count(source) for source in range(self.num_sources)]
        return [k for k, n in enumerate(counts) if n] if counts and sum(counts) == self.count() else None

    def only(self, sources: Sequence[int]) -> FeatureSet:
        """The images of some of the sources, without a division into sources. They have to be known."""
        rows = None if self.labels is None else np.isin(self.labels, sources)
        part = {name: getattr(self, name) for name in ("features", "labels", "hashes")}
        part = {name: None if rows is None or value is None else value[rows] for name, value in part.items()}
        provenance = {name: value for name, value in self.provenance.items() if name != "content_hash"}
        return FeatureSet(self.detector, self.statistics.only(sources), **part, provenance=provenance)

    def side(self, name: str) -> Side:
        """What is known of the images themselves, for `fit.check`; files of others do not say."""
        shape, *about = (self.provenance.get(fact) for fact in ("image_shape", "num_classes", "class_names"))
        return of_images(name, shape, *about) if shape else Side(name)

    def rows(self, source: int | None = None) -> np.ndarray | None:
        """Features of one source or of all images, [n, F]; None where they were not kept."""
        if self.features is None or source is None:
            return self.features
        return self.features[self.labels == source]

    def content(self, source: int | None = None) -> str | None:
        """Hash of the images of one source or of all, in any order; None where a file does not say what they were."""
        if self.hashes is None or (source is not None and self.labels is None):
            return self.provenance.get("content_hash", "")[:16] or None
        return combined_hash(self.hashes if source is None else self.hashes[self.labels == source])

    def shared_with(self, other: FeatureSet) -> int | None:
        """How many of these images the other set has too, pixel by pixel; None where a file does not say."""
        return None if self.hashes is None or other.hashes is None else int(np.isin(self.hashes, other.hashes).sum())


def class_titles(sets: dict[str, FeatureSet], sides: Sequence[Side]) -> dict:
    """{"class_names": {source id: what it is called}} of the sources with images in `sets`, where one of `sides` knows."""
    names = next((side.class_names for side in sides if side.class_names), None)
    sources = next(iter(sets.values())).sources if names else None
    return {"class_names": {str(k): title(k, names) for k in sources}} if sources else {}


def keeps(num_images: int, width: int) -> bool:
    """Whether so many features are few enough to be kept."""
    return 4 * num_images * width <= FEATURE_LIMIT


def image_hashes(images: torch.Tensor) -> np.ndarray:
    """Images [N, C, H, W] -> uint64 [N]; equal pixels have equal hashes."""
    digests = [hashlib.blake2b(f"{image.shape}".encode() + image.tobytes(), digest_size=8) for image in images.numpy()]
    return np.frombuffer(b"".join(digest.digest() for digest in digests), np.uint64)


def combined_hash(hashes: np.ndarray) -> str:
    """16 hex digits for the images of these hashes, in any order."""
    return hashlib.sha256(np.sort(hashes).tobytes()).hexdigest()[:16]


def content_hashes(images: torch.Tensor, labels: torch.Tensor) -> dict[str, str]:
    """{"overall": hash, source: hash, ...} of images [N, C, H, W] with labels [N] (vectors [N, K]: no sources)."""
    hashes, ids = image_hashes(images), labels.numpy() if labels.ndim == 1 else np.zeros(0, dtype=np.int64)
    of_sources = {str(k): combined_hash(hashes[ids == k]) for k in np.unique(ids).tolist()}
    return {"overall": combined_hash(hashes), **of_sources}


def label_of(label: np.ndarray) -> int:
    """Source id of a one-hot label; -1 for any other vector, which is no source."""
    k = int(label.argmax()) if len(label) else -1
    return k if len(label) and label[k] == 1 and (label != 0).sum() == 1 else -1


Batch = tuple[torch.Tensor, np.ndarray, np.ndarray]  # images uint8 [n, C, H, W], labels [n], positions [n]


def _collate(items):
    images, labels = zip(*items, strict=True)
    if images[0].dtype != np.uint8:
        raise ValueError("metrics need uint8 pixels; this data set holds latents: use the RGB images they came from")
    return torch.from_numpy(np.stack(images)), np.array([label_of(label) for label in labels])


def generated_batches(generator: Iterable) -> Iterator[Batch]:
    """Batches from `generate_images`: items with .images (uint8 tensor or None), .labels (one-hot or None), .seeds."""
    for item in generator:
        if item.images is not None and len(item.images):
            labels = [-1] * len(item.images) if item.labels is None else [label_of(v) for v in item.labels.cpu()]
            yield item.images.cpu(), np.array(labels), np.array([int(s) for s in item.seeds])


def collect(
    batches: Iterable[Batch],
    detectors: dict[str, object],
    *,
    num_sources: int = 0,
    num_images: int | None = None,
    progress: Callable[[int], object] = lambda num_images: None,
) -> dict[str, FeatureSet]:
    """Run all detectors over batches: {identity: FeatureSet}, the same on every rank.

    detectors: {identity: detector} (get_detectors). positions give the order of the rows, whatever the batch size and
    the number of processes. progress: called with the number of images after every batch. Raises ValueError for features
    that are not finite, and before the work where the statistics of `num_images` images would not fit into memory.
    """
    statistics = {key: FeatureStatistics(num_sources) for key in detectors}
    features = {key: [] for key in detectors}
    fits = lambda key, width: require_memory(f"detector '{key}'", num_images or 0, width, num_sources)
    for key, detector in detectors.items():  # before images are made or read, where a detector says its width
        if isinstance(width := about(detector)["width"], int):
            fits(key, width)
    all_labels, all_positions, hashes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for images, labels, positions in batches:
        for key, detector in detectors.items():
            f = torch.as_tensor(detector.features(images)).detach().float().cpu()
            if f.ndim != 2 or len(f) != len(images):
                raise ValueError(f"detector '{key}': features of shape {tuple(f.shape)} for {len(images)} images")
            if not statistics[key].width:
                fits(key, f.shape[1])
            try:
                statistics[key].update(f, labels)
            except ValueError as error:
                raise ValueError(f"detector '{key}': {error}") from None
            if keeps(num_images or 0, f.shape[1]):
                features[key].append(f.numpy())
        all_labels.append(labels)
        all_positions.append(positions)
        hashes.append(image_hashes(images))
        progress(len(images))
    result = {}
    for key in detectors:
        arrays = {"labels": np.concatenate(all_labels), "hashes": np.concatenate(hashes)}
        if features[key]:
            arrays["features"] = np.concatenate(features[key])
        rows = gather_rows(arrays, np.concatenate(all_positions))
        result[key] = FeatureSet(key, statistics[key].all_reduce(), rows.get("features"), rows["labels"])
        result[key].hashes = rows["hashes"]
    return result


def collect_dataset(
    dataset: Dataset,  # uint8 images
    detectors: dict[str, object],
    *,
    num: int | None = None,  # seeded subset of this many images; None: all
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,  # processes that decode images ahead of the detectors
    per_source: bool = True,
    **options: object,  # progress, see `collect`
) -> dict[str, FeatureSet]:
    """`collect` over a data set, with its provenance (name, number of images, shape, content hash, what the detector says).

    Raises ValueError for fewer images than `num` (a distance depends on the number of images), and for latents.
    """
    indices = choose(dataset, num, seed)
    batches = [batch for batch in split_batches(indices, batch_size) if batch]
    workers = max(min(workers, len(batches) - 1), 0)  # which decode the next batches while a detector looks at one
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=_collate)
    items = {}

    def seen():
        for (images, labels), batch in zip(loader, batches, strict=True):
            items.update((i, dataset.item_hash(i, image)) for i, image in zip(batch, images.numpy(), strict=True))
            yield images, labels, np.array(batch)

    sets = collect(
        seen(),
        detectors,
        num_sources=dataset.num_classes if per_source else 0,
        num_images=len(indices),
        **options,
    )
    provenance = {"dataset": dataset.name, "num_images": len(indices), "image_shape": list(dataset[0][0].shape)}
    hashes = gather_rows({"items": np.array(list(items.values()))}, np.array(list(items)))["items"]
    provenance["content_hash"] = hash_of_items(hashes.tolist())
    if dataset.declared_classes:
        provenance["num_classes"] = dataset.declared_classes
    if dataset.class_names:
        provenance["class_names"] = dataset.class_names
    if len(indices) < len(dataset):
        provenance["subset_seed"] = seed
    for key, feature_set in sets.items():
        feature_set.provenance = provenance | {"detector": about(detectors[key])}
    return sets


def choose(dataset: Dataset, num: int | None, seed: int) -> list[int]:
    """Indices of a seeded random subset of exactly `num` images, sorted; all images where num is None."""
    if num is None or num == len(dataset):
        return list(range(len(dataset)))
    if num < 2 or num > len(dataset):
        raise ValueError(f"num={num}: give 2 to {len(dataset)} (the images that there are), or leave it out for all")
    return sorted(np.random.RandomState(seed % 2**31).permutation(len(dataset))[:num].tolist())


@contextlib.contextmanager
def progress_bar(num_images: int, what: str) -> Iterator[Callable[[int], object]]:
    """Progress of this process's share on stderr, on rank 0 only; gives the function to call with finished images."""
    hidden, share = get_rank() != 0, -(-num_images // get_world_size())
    with tqdm.tqdm(total=share, desc=what, unit="img", file=sys.stderr, disable=hidden) as bar:
        yield bar.update
