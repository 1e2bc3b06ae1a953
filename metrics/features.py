"""Images -> features: one pass over the images for any number of detectors, in one or several processes."""

import contextlib
import dataclasses
import sys

import numpy as np
import torch
import tqdm

from metrics.detectors import get_detectors
from metrics.statistics import FeatureStatistics, gather_rows
from torch_utils.distributed import broadcast_object, get_rank, get_world_size, split_batches

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

    @property
    def num_sources(self):
        return self.statistics.num_sources

    def count(self, source=None):
        return self.statistics.count(source)

    def rows(self, source=None):
        """Features of one source or of all images, [n, F]; None where they were not kept."""
        if self.features is None or source is None:
            return self.features
        return self.features[self.labels == source]


def label_of(label):
    """Source id of one item: an integer, the maximum of a one-hot or soft vector, -1 for a vector of length 0."""
    label = np.asarray(label)
    if label.ndim == 0:
        return int(label)
    return int(label.argmax()) if label.size else -1


def count_sources(dataset):
    """Number of sources of a data set; 0 without labels. Global ids: sources without images here count too."""
    for name in ("num_classes", "label_dim"):
        if getattr(dataset, name, None):
            return int(getattr(dataset, name))
    label = np.asarray(dataset[0][1])
    return label.size if label.ndim else max(label_of(dataset[i][1]) for i in range(len(dataset))) + 1


def choose(dataset, num=None, seed=0):
    """Indices of a seeded random subset of exactly `num` images, sorted; all images where num is None.

    Raises ValueError when there are fewer: a distance depends on the number of images.
    """
    if num is None or num == len(dataset):
        return list(range(len(dataset)))
    if num < 2 or num > len(dataset):
        raise ValueError(f"num={num}: give 2 to {len(dataset)} (the images that there are), or leave it out for all")
    return sorted(np.random.RandomState(seed % 2**31).permutation(len(dataset))[:num].tolist())


def dataset_batches(dataset, indices=None, batch_size=64, workers=0):
    """This process's batches (images uint8 [n, C, H, W], labels [n], positions [n]), some possibly empty."""
    if batch_size < 1:
        raise ValueError(f"batch={batch_size}: must be at least 1")
    indices = list(range(len(dataset))) if indices is None else list(indices)
    batches = split_batches(range(len(indices)), batch_size)
    view = _View(dataset, indices)
    loader = torch.utils.data.DataLoader(view, batch_sampler=batches, num_workers=workers, collate_fn=_collate)
    yield from loader


class _View(torch.utils.data.Dataset):
    def __init__(self, dataset, indices):
        self.dataset, self.indices = dataset, indices

    def __getitem__(self, position):
        image, label = self.dataset[self.indices[position]]
        return np.asarray(image), label_of(label), position


def _collate(items):
    if not items:
        return None, np.zeros(0, np.int64), np.zeros(0, np.int64)
    images, labels, positions = zip(*items, strict=True)
    if images[0].dtype != np.uint8:
        raise ValueError("metrics need uint8 pixels; this data set holds latents: use the RGB images they came from")
    return torch.from_numpy(np.stack(images)), np.array(labels), np.array(positions)


def generated_batches(generator):
    """Batches from `generate_images`: items with .images (uint8 tensor or None), .labels (one-hot or None), .seeds."""
    for item in generator:
        if item.images is None or len(item.images) == 0:
            continue
        labels = [-1] * len(item.images) if item.labels is None else [label_of(v) for v in item.labels.cpu()]
        yield item.images.cpu(), np.array(labels), np.array([int(s) for s in item.seeds])


def collect(batches, detectors, *, num_sources=0, num_images=None, feature_limit=FEATURE_LIMIT, progress=None):
    """Run all detectors over batches (images, labels, positions): {identity: FeatureSet}, the same on every rank.

    detectors: {identity: detector} (get_detectors). positions give the order of the rows, whatever the batch size and
    the number of processes. progress: called with the number of images after every batch.
    """
    statistics = {key: FeatureStatistics(num_sources) for key in detectors}
    features = {key: [] for key in detectors}
    all_labels, all_positions = [], []
    for images, labels, positions in batches:
        if images is None or len(images) == 0:
            continue
        for key, detector in detectors.items():
            f = torch.as_tensor(detector.features(images)).detach().float().cpu()
            if f.ndim != 2 or len(f) != len(images):
                raise ValueError(f"detector '{key}': features of shape {tuple(f.shape)} for {len(images)} images")
            statistics[key].update(f, labels)
            if (num_images or 0) * f.shape[1] * 4 > feature_limit:
                features[key] = None
            else:
                features[key].append(f.numpy())
        all_labels.append(labels)
        all_positions.append(positions)
        if progress is not None:
            progress(len(images))
    order = np.concatenate(all_positions) if all_positions else np.zeros(0, np.int64)
    result = {}
    for key in detectors:
        arrays = {"labels": np.concatenate(all_labels)} if all_labels else None
        if arrays and features[key] is not None:
            arrays["features"] = np.concatenate(features[key])
        rows = gather_rows(arrays, order)
        result[key] = FeatureSet(key, statistics[key].all_reduce(), rows.get("features"), rows["labels"])
    return result


def collect_dataset(
    dataset,                    # sequence of (image uint8 [C, H, W], label)
    detectors,                  # {identity: detector}, or what get_detectors takes
    *,
    num=None,                   # seeded subset of this many images; None: all
    seed=0,
    batch_size=64,
    workers=0,                  # processes that decode images
    per_source=True,
    feature_limit=FEATURE_LIMIT,
    device="cpu",
    progress=None,
):  # fmt: skip
    """`collect` over a data set, with its provenance (name, content hash where it has one, number of images, shape)."""
    if not isinstance(detectors, dict):
        detectors = get_detectors(detectors, device)
    indices = choose(dataset, num, seed)
    sets = collect(
        dataset_batches(dataset, indices, batch_size, workers),
        detectors,
        num_sources=count_sources(dataset) if per_source else 0,
        num_images=len(indices),
        feature_limit=feature_limit,
        progress=progress,
    )
    provenance = {
        "dataset": getattr(dataset, "name", type(dataset).__name__),
        "num_images": len(indices),
        "image_shape": list(np.asarray(dataset[0][0]).shape),
    }
    if len(indices) < len(dataset):
        provenance["subset_seed"] = seed
    for feature_set in sets.values():
        feature_set.provenance = provenance
    return sets


def dataset_hash(dataset):
    """content_hash() of a data set that has one, read by rank 0 only; else None."""
    value = dataset.content_hash() if get_rank() == 0 and hasattr(dataset, "content_hash") else None
    return broadcast_object(value)


def require_same_detector(samples, reference, where="the reference"):
    if samples.detector != reference.detector:
        raise ValueError(
            f"statistics made with different detectors cannot be compared: samples with '{samples.detector}', "
            f"{where} with '{reference.detector}'; remake it with `calculate_metrics.py ref --metrics=...`"
        )


def load_labelled(dataset):
    """(images uint8 [N, C, H, W], labels int64 [N], number of sources) of a labelled data set that fits in memory."""
    items = [dataset[i] for i in range(len(dataset))]
    images, labels, _ = _collate([(np.asarray(image), label_of(label), i) for i, (image, label) in enumerate(items)])
    if labels.min() < 0:
        raise ValueError(f"{getattr(dataset, 'name', 'the data set')}: images have no labels; a classifier needs them")
    return images, labels, count_sources(dataset)


@contextlib.contextmanager
def progress_bar(num_images, what):
    """Progress of this process's share on stderr, on rank 0 only; gives the function to call with finished images."""
    hidden, share = get_rank() != 0, -(-num_images // get_world_size())
    with tqdm.tqdm(total=share, desc=what, unit="img", file=sys.stderr, disable=hidden) as bar:
        yield bar.update
