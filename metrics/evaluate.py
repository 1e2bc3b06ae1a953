"""Samples against a reference: distances overall and per source, each beside what real images would score.

Every number stands beside the same number for reference images, because none of them means anything alone: the
half-against-half floor of a distance, the detector's own accuracy for agreement, held-out images for memorisation.
"""

import numpy as np

from metrics.classifier import source_agreement
from metrics.detectors import get_detector, identity_of
from metrics.distances import frechet_distance, kid, nearest_distance, prdc
from metrics.features import FeatureSet, collect_dataset, dataset_hash, require_same_detector

MEASURES = ("fd", "kid", "prdc")


def reference_statistics(dataset, detector, **options) -> FeatureSet:
    """Statistics and features of a data set as seen by one detector (spec, object or callable), with provenance.

    options: those of `metrics.features.collect_dataset` (num, seed, batch_size, per_source, device, ...).
    """
    detector = get_detector(detector, options.get("device", "cpu"))
    result = collect_dataset(dataset, {identity_of(detector): detector}, **options)[identity_of(detector)]
    result.provenance["content_hash"] = dataset_hash(dataset)
    return result


def evaluate(
    samples,                    # data set (image uint8 [C, H, W], label), or a FeatureSet of it
    reference,                  # data set, or a FeatureSet (reference_statistics, load_references)
    detector,                   # spec string, detector, or callable images -> features
    *,
    train=None,                 # training images (data set or FeatureSet): adds nearest-neighbour distances
    num=None,                   # seeded subset of the samples; None: all
    seed=0,                     # of that subset and of the floor's splits
    per_source=True,
    splits=4,                   # half-against-half splits of the reference
    k=5,                        # neighbours of precision and recall
    measures=MEASURES,
    batch_size=64,
    device="cpu",
    progress=None,
):  # fmt: skip
    """Compare samples with a reference through one detector; works in one or several processes.

    Returns the nested dict of `compare`, on every rank. Raises ValueError for different detectors or feature widths,
    for fewer images than `num`, and for data sets that hold no uint8 pixels.
    """
    detector = get_detector(detector, device)
    detectors = {identity_of(detector): detector}

    def collected(data, num=None):
        if data is None or isinstance(data, FeatureSet):
            return data
        options = {"num": num, "seed": seed, "batch_size": batch_size, "device": device, "progress": progress}
        return collect_dataset(data, detectors, **options)[identity_of(detector)]

    reference = collected(reference)
    if reference.detector not in detectors:
        raise ValueError(
            f"the reference was made with detector '{reference.detector}', asked for is '{identity_of(detector)}': "
            f"different detectors cannot be compared"
        )
    return compare(
        collected(samples, num),
        reference,
        detector=detector,
        train=collected(train),
        seed=seed,
        per_source=per_source,
        splits=splits,
        k=k,
        measures=measures,
    )


def compare(
    samples,                    # FeatureSet
    reference,                  # FeatureSet
    *,
    detector=None,              # with .classify(features): adds agreement
    train=None,                 # FeatureSet of training images
    seed=0,
    per_source=True,
    splits=4,
    k=5,
    measures=MEASURES,
):  # fmt: skip
    """Nested dict of plain numbers (None where there are too few images or the features were not kept):

        {"detector", "num_images", "num_reference", "feature_width", "overall": {...}, "sources": {"0": {...}, ...},
         "mean": {...}}                 mean over the sources that have samples, of every number that all of them have

    "overall" holds all samples against the whole reference, also where the samples are of some sources only.
    Each section holds `count`, `reference_count` and

        fd, fd_floor, fd_floor_sd       Frechet distance; floor: two disjoint random halves of the reference, cut to
                                        `floor_size` = min(count, half) images each, mean and sd over `splits`
        fd_at_floor_size, ..._sd        floor_size samples against the same halves: what to hold against the floor
                                        when the reference is too small for a floor at `count` images
        kid, kid_floor, kid_floor_sd    likewise (KID is unbiased: sizes need not match)
        precision, recall, density, coverage
        agreement, agreement_reference  share of samples whose predicted source is their label; of reference images
        nearest_train, nearest_train_reference
                                        mean distance to the nearest training image (of the same source), of samples
                                        and of reference images: samples much nearer than held-out images are copies

    With a judge, `predicted` beside "overall" counts the samples by predicted source.
    """  # fmt: skip
    check_measures(measures)
    require_same_detector(samples, reference)
    if train is not None:
        require_same_detector(samples, train, "the training images")
    if samples.statistics.width != reference.statistics.width:
        raise ValueError(
            f"samples have features of width {samples.statistics.width}, the reference {reference.statistics.width}: "
            f"images of different size or channels?"
        )
    verdicts = _verdicts(samples, reference, detector)
    options = {"seed": seed, "splits": splits, "k": k, "measures": measures, "verdicts": verdicts, "train": train}
    result = {
        "detector": samples.detector,
        "num_images": samples.count(),
        "num_reference": reference.count(),
        "feature_width": samples.statistics.width,
        "overall": _section(samples, reference, None, **options),
    }
    if verdicts:
        values, counts = np.unique(verdicts["samples"][0], return_counts=True)
        result["predicted"] = {str(v): int(c) for v, c in zip(values, counts, strict=True)}
    if per_source and samples.num_sources and (reference.num_sources or verdicts):
        known = [s for s in range(max(samples.num_sources, reference.num_sources)) if _count(samples, s)]
        known += [s for s in range(reference.num_sources) if _count(reference, s) and s not in known]
        result["sources"] = {str(s): _section(samples, reference, s, **options) for s in sorted(known)}
        result["mean"] = _mean([section for section in result["sources"].values() if section["count"]])
    return result


def check_measures(measures):
    """Raises ValueError for a name that is none of MEASURES; returns the names as a tuple."""
    for name in measures:
        if name not in MEASURES:
            raise ValueError(f"unknown distance '{name}'; known: {', '.join(MEASURES)}")
    return tuple(measures)


def _count(features, source):
    return features.count(source) if source is None or source < features.num_sources else 0


def _verdicts(samples, reference, detector):
    """{"samples": (predicted, labels), "reference": ...} where the detector classifies and features were kept."""
    if not hasattr(detector, "classify"):
        return {}
    sides = {"samples": samples, "reference": reference}
    return {
        name: (np.asarray(detector.classify(side.features)), side.labels)
        for name, side in sides.items()
        if side.features is not None and side.labels is not None
    }


def _section(samples, reference, source, *, seed, splits, k, measures, verdicts, train):
    m, n = _count(samples, source), _count(reference, source)
    section = {"count": m, "reference_count": n}
    x = samples.rows(source) if m else None
    y = reference.rows(source) if n else None
    kept = x is not None and y is not None
    if "fd" in measures:
        both = m >= 2 and (n is None or n >= 2)  # foreign references may not know how many images they saw
        moments = (*samples.statistics.moments(source), *reference.statistics.moments(source)) if both else None
        section["fd"] = frechet_distance(*moments) if both else None
    if "kid" in measures:
        section["kid"] = kid(x, y, seed=seed) if kept and min(m, n) >= 2 else None
    section |= _floor(x, y, m, seed, splits, [name for name in ("fd", "kid") if name in measures])
    if "prdc" in measures:
        nothing = dict.fromkeys(("precision", "recall", "density", "coverage"))
        section |= prdc(generated=x, reference=y, k=k) if kept and min(m, n) > k else nothing
    for name, (predicted, labels) in verdicts.items():
        key = "agreement" if name == "samples" else "agreement_reference"
        section[key] = source_agreement(predicted, labels).get("overall" if source is None else source)
    if train is not None:
        z = train.rows(source) if _count(train, source) else None
        near = lambda rows: None if rows is None or z is None else float(nearest_distance(rows, z).mean())
        section |= {"nearest_train": near(x), "nearest_train_reference": near(y)}
    return section


def _floor(x, y, compared, seed, splits, measures):
    """Distances between two disjoint random halves of the reference y, each cut to the compared number of images.

    Where half the reference is smaller than that, the Frechet distance of equally many samples to the same half is
    given too: its bias falls with the number of images, so the full distance would look better than it is.
    """
    n = 0 if y is None else len(y)
    size = min(compared, n // 2)
    values = {f"{name}_floor": [] for name in measures}
    if "fd" in measures and x is not None:
        values["fd_at_floor_size"] = []
    for split in range(splits if size >= 2 else 0):
        rng = np.random.default_rng([seed, split])
        order = rng.permutation(n)
        a, b = y[order[:size]], y[order[n // 2 : n // 2 + size]]
        if "fd" in measures:
            values["fd_floor"].append(frechet_distance(*_moments(a), *_moments(b)))
        if "fd_at_floor_size" in values:
            part = x[rng.permutation(len(x))[:size]]
            values["fd_at_floor_size"].append(frechet_distance(*_moments(part), *_moments(b)))
        if "kid" in measures:
            values["kid_floor"].append(kid(a, b, seed=seed))
    section = {"floor_size": size if size >= 2 else None}
    for name, found in values.items():
        section[name] = float(np.mean(found)) if found else None
        section[f"{name}_sd"] = float(np.std(found, ddof=1)) if len(found) > 1 else None
    return section


def _moments(features):
    f = np.asarray(features, np.float64)
    return f.mean(0), np.atleast_2d(np.cov(f, rowvar=False))


def _mean(sections):
    names = [
        name
        for name in (sections[0] if sections else {})
        if not name.endswith(("count", "_sd")) and name != "floor_size"
    ]
    values = {name: [section.get(name) for section in sections] for name in names}
    return {name: float(np.mean(v)) for name, v in values.items() if None not in v}
