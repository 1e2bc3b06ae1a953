"""How good a network is: its samples against a reference, and bits per dimension of images; overall and per source.

Every number of samples stands beside the same number for reference images, because none of them means anything alone: the
half-against-half floor of a distance, the detector's own accuracy for agreement, held-out images for memorisation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from dnnlib.util import one_of
from metrics.classifier import source_agreement
from metrics.distances import (
    Gaussian,
    frechet,
    frechet_errors,
    frechet_infinity,
    gaussian_kernel,
    inception_score,
    kid,
    manifolds,
    median_distance,
    mmd,
    nearest_distance,
    polynomial_kernel,
)
from metrics.features import FeatureSet, content_hashes
from metrics.statistics import FeatureStatistics
from torch_utils.random import StackedRandomGenerator, hash_seed
from training import encoders, likelihood
from training.dataset import Dataset, label_rows, load_raw

MEASURES = ("fd", "kid", "mmd", "prdc", "is")
ERROR_ROWS = 8192  # images, evenly spaced, that the influence of an image on the Fréchet distance is evaluated of
LEFT_OUT = 10  # parts of the images that the errors of precision and recall leave out in turn
PUBLISHED = {"fid": ("fid", "kid"), "fd_dinov2": ("fd_dinov2", "kd_dinov2")}  # detector: names of its fd and kid
ENCODERS = {"center": encoders.CenterEncoder, "logit": encoders.LogitEncoder, "discrete": encoders.StandardRGBEncoder}
OFFSET_BITS = 8  # densities are of y in [0, 1], levels are 1/256 apart


def literature_name(detector: str, measure: str) -> str:
    """What a distance ("fd" or "kid") is called in the literature: fid, kid, fd_dinov2, kd_dinov2; fd_pixel, ... of others.

    Other weights than the published ones make another detector, whose identity says so.
    """
    names = PUBLISHED.get(detector)
    return names[measure == "kid"] if names else f"{measure}_{detector}"


def compare(
    samples: FeatureSet,
    reference: FeatureSet,
    *,
    detector: object = None,  # with .classify(features): adds agreement; with .logits(features): Inception Score
    train: FeatureSet | None = None,  # training images: adds nearest-neighbour distances
    seed: int = 0,  # of the floor's splits
    per_source: bool = True,
    splits: int = 4,  # half-against-half splits of the reference
    k: int = 5,  # neighbours of precision and recall
    measures: Sequence[str] = MEASURES,
    trained: Sequence[int] | None = None,  # sources in the training data of the samples' network; None: not known
) -> dict:
    """Nested dict of plain numbers (None where there are too few images or the features were not kept):

        {"detector", "num_images", "num_reference", "feature_width", "overall": {...}, "sources": {"0": {...}, ...},
         "mean": {...}}                 mean over the sources that have samples (and references, where these are by source),
                                        of every number that all of them have

    "overall" holds all samples against the whole reference, also where the samples are of some sources only. Given
    `trained`, sources which training or the reference lack are left out of both; `left_out` {source: number of samples}
    counts them, if any.
    "reference_hashes" {section: hash of its reference images}. Each section holds `count`, `reference_count` and

        fd, fd_se, fd_se_samples        Fréchet distance; what `_se` says of the draws of samples and reference, and of the
                                        samples' alone (the reference is what it is): see `distances.frechet_errors`
        fd_infinity                     of infinitely many samples, where these are many enough; fd_se_samples is its error
        fd_floor, fd_floor_sd           two disjoint random halves of the reference, cut to `floor_size` = min(count, half)
                                        images each, mean and sd over `splits`
        fd_at_floor_size, ..._sd        floor_size samples against the same halves: what to hold against the floor
                                        when the reference is too small for a floor at `count` images
        kid, kid_floor, kid_floor_sd    likewise (KID is unbiased: sizes need not match)
        mmd_gaussian, mmd_bandwidth     squared MMD of the Gaussian kernel with the reference's median distance as bandwidth
        precision, recall, density, coverage
        inception_score, ..._reference  overall, of 10 parts
        agreement, agreement_reference  share of samples whose predicted source is their label (top-1 accuracy); of
                                        reference images; agreement_top5: whose label is among the five likeliest
        nearest_train, nearest_train_reference
                                        mean distance to the nearest training image (of the same source), of samples
                                        and of reference images: samples much nearer than held-out images are copies

    and `<name>_se`, the standard error of a number (of "mean": of sources drawn on their own). "warnings" lists, in words,
    where a number does not mean what it seems to.
    With a judge, `predicted` beside "overall" counts the samples by predicted source. Raises ValueError for different
    detectors or feature widths.
    """
    for other, where in ((reference, "the reference"), (train, "the training images")):
        if other is not None and other.detector != samples.detector:
            raise ValueError(
                f"statistics made with different detectors cannot be compared: samples with '{samples.detector}', {where} "
                f"with '{other.detector}'; remake it with `calculate_metrics.py ref --metrics=...`"
            )
    if samples.statistics.width != reference.statistics.width:
        raise ValueError(
            f"samples have features of width {samples.statistics.width}, the reference {reference.statistics.width}: "
            f"images of different size or channels?"
        )
    width, wide = samples.statistics.width, {}
    left_out, *sides = _comparable(samples, reference, trained)
    verdicts = _verdicts(*sides, detector)
    of_sources = _verdicts(samples, reference, detector) if left_out else verdicts
    scores = _inception_scores(*sides, detector) if "is" in measures and hasattr(detector, "logits") else {}
    samples, reference, train = _in_span(samples, reference, train)
    _, *sides = _comparable(samples, reference, trained)
    options = {"seed": seed, "splits": splits, "k": k, "measures": measures}
    options |= {"train": train, "width": width, "wide": wide}
    result = {
        "detector": samples.detector,
        "num_images": samples.count(),
        "num_reference": reference.count(),
        "feature_width": width,
        "overall": _section(*sides, None, verdicts=verdicts, **options) | scores,
        "reference_hashes": {"overall": sides[1].content()},
    } | ({"left_out": left_out} if left_out else {})
    if verdicts:
        values, counts = np.unique(verdicts["agreement"][0], return_counts=True)
        result["predicted"] = {str(v): int(c) for v, c in zip(values, counts, strict=True)}
    if per_source and samples.num_sources and (reference.num_sources or of_sources):
        ids = range(max(samples.num_sources, reference.num_sources))
        known = [s for s in ids if samples.count(s) or reference.count(s)]
        found = {s: _section(samples, reference, s, verdicts=of_sources, **options) for s in known}
        result["sources"] = {str(s): section for s, section in found.items()}
        result["reference_hashes"] |= {str(s): reference.content(s) for s in known if reference.count(s)}
        both = [v for v in found.values() if v["count"] and (v["reference_count"] or not reference.num_sources)]
        result["mean"] = _mean(both)
    result["warnings"] = _warnings(*sides, width, wide)
    return result


def _in_span(*sets):
    """The sets in coordinates of the span of all their images where these are fewer than the features: a rotation.

    Distances and products stay what they are, and everything after costs what so few coordinates cost.
    """
    given = [one for one in sets if one is not None]
    if (
        any(one.features is None for one in given)
        or sum(map(len, (one.features for one in given))) >= given[0].statistics.width
    ):
        return sets
    rows = torch.cat([torch.as_tensor(one.features).double() for one in given])
    parts = iter(torch.linalg.qr(rows.T, mode="r").R.T.split([len(one.features) for one in given]))
    found = []
    for one in sets:
        part = None if one is None else next(parts)
        made = part is not None and FeatureStatistics(one.num_sources).update(
            part, one.labels if one.num_sources else None
        )
        found.append(part if part is None else dataclasses.replace(one, features=part.numpy(), statistics=made))
    return found


def _inception_scores(samples, reference, detector):
    found = {}
    for name, side in (("inception_score", samples), ("inception_score_reference", reference)):
        enough = side.features is not None and len(side.features) >= 20
        pair = inception_score(detector.logits(side.features)) if enough else (None, None)
        found |= dict(zip((name, f"{name}_se"), pair, strict=True))
    return found


def _warnings(samples, reference, width, wide):
    found, n = [], samples.count()
    for what, side in (("samples", samples), ("reference", reference)):
        if side.features is None:
            found.append(f"features of the {what} were not kept: no floor, and no measure but the Fréchet distance")
    if n <= width:
        found.append(f"{n} images, {width} features: covariances are singular, read distances beside their floor")
    if None in wide:
        found.append(wide.pop(None))
    if wide:
        found.append(f"source{'s' * (len(wide) > 1)} {', '.join(map(str, wide))}: {next(iter(wide.values()))}")
    return found


def _comparable(samples, reference, trained):
    """({source: samples of it that are left out}, samples, reference) of the sources that training and reference have."""
    ids, known = samples.sources, reference.sources
    if ids is None or trained is None:
        return {}, samples, reference
    both = [k for k in (ids if known is None else known) if k in trained]
    left_out = {str(k): samples.count(k) for k in ids if k not in both}
    if known is not None and both != known:
        reference = reference.only(both)
    return left_out, samples.only(both) if left_out else samples, reference


def _verdicts(samples, reference, detector):
    """{"agreement": (predicted, labels), "agreement_reference": ...} where the detector classifies, features were kept."""
    if not hasattr(detector, "classify"):
        return {}
    verdicts = {}
    for end, side in (("", samples), ("_reference", reference)):
        if side.features is None or side.labels is None:
            continue
        verdicts[f"agreement{end}"] = np.asarray(detector.classify(side.features)), side.labels
        logits = torch.as_tensor(detector.logits(side.features)) if hasattr(detector, "logits") else torch.empty(0, 0)
        if logits.shape[1] > 5:
            among = (logits.topk(5).indices.cpu().numpy() == side.labels[:, None]).any(1)
            verdicts[f"agreement_top5{end}"] = np.where(among, side.labels, -1), side.labels
    return verdicts


def _section(samples, reference, source, *, seed, splits, k, measures, verdicts, train, width, wide):
    m, n = samples.count(source), reference.count(source)
    section = {"count": m, "reference_count": n}
    x = samples.rows(source) if m else None
    y = reference.rows(source) if n else None
    kept = x is not None and y is not None and min(m, n) >= 2
    if "fd" in measures:
        both = m >= 2 and (n is None or n >= 2)  # foreign references may not know how many images they saw
        section |= (
            _frechet(*(side.statistics.gaussian(source) for side in (samples, reference)), x, y, seed)
            if both
            else NO_FD
        )
    if "kid" in measures:
        kernel = polynomial_kernel(gamma=1 / width)
        found = mmd(generated=x, reference=y, kernel=kernel, seed=seed) if kept else None
        section |= {"kid": found and found.value, "kid_se": found and found.error}
    if "mmd" in measures:
        bandwidth = median_distance(y) if kept else 0  # 0 too where most reference images are the same
        found = mmd(generated=x, reference=y, kernel=gaussian_kernel(bandwidth), seed=seed) if bandwidth else None
        section |= {"mmd_gaussian": found and found.value, "mmd_gaussian_se": found and found.error}
        section["mmd_bandwidth"] = bandwidth or None
    section |= _floor(x, y, m, seed, splits, width, [name for name in ("fd", "kid") if name in measures])
    if "prdc" in measures:
        found = manifolds(generated=x, reference=y, k=k, groups=LEFT_OUT, seed=seed) if kept and min(m, n) > k else None
        if found and found.wide:
            wide[source] = found.wide
        for name in ("precision", "recall", "density", "coverage"):
            section |= {name: found and found.values[name], f"{name}_se": found and found.errors[name]}
    for name, (predicted, labels) in verdicts.items():
        share = source_agreement(predicted, labels).get("overall" if source is None else source)
        number = int((labels >= 0).sum() if source is None else (labels == source).sum())
        section |= {name: share, f"{name}_se": (share * (1 - share) / (number - 1)) ** 0.5 if number > 1 else None}
    if train is not None:
        z = train.rows(source) if train.count(source) else None
        for name, rows in (("nearest_train", x), ("nearest_train_reference", y)):
            found = None if rows is None or z is None else nearest_distance(rows, z)
            error = None if found is None or len(found) < 2 else float(found.std(ddof=1) / len(found) ** 0.5)
            section |= {name: None if found is None else float(found.mean()), f"{name}_se": error}
    return section


NO_FD = dict.fromkeys(("fd", "fd_se", "fd_se_samples", "fd_infinity"))


def _frechet(a, b, x, y, seed):
    """The distance of two Gaussians with its errors, of the features x and y that they are of (None: not kept)."""
    spaced = (None if rows is None else rows[:: -(-len(rows) // ERROR_ROWS)] for rows in (x, y))
    of_samples, of_reference = frechet_errors(a, b, *spaced)
    error = None if None in (of_samples, of_reference) else math.hypot(of_samples, of_reference)
    limit = None if x is None else frechet_infinity(x, b, seed)
    return {"fd": frechet(a, b), "fd_se": error, "fd_se_samples": of_samples, "fd_infinity": limit}


def _floor(x, y, compared, seed, splits, width, measures):
    """Distances between two disjoint random halves of the reference y, each cut to the compared number of images.

    Where half the reference is smaller than that, the Fréchet distance of equally many samples to the same half is
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
            half = Gaussian.of_features(b)
            values["fd_floor"].append(frechet(Gaussian.of_features(a), half))
        if "fd_at_floor_size" in values:
            part = x[rng.permutation(len(x))[:size]]
            values["fd_at_floor_size"].append(frechet(Gaussian.of_features(part), half))
        if "kid" in measures:
            values["kid_floor"].append(kid(a, b, gamma=1 / width, seed=seed))
    section = {"floor_size": size if size >= 2 else None}
    for name, found in values.items():
        section[name] = float(np.mean(found)) if found else None
        section[f"{name}_sd"] = float(np.std(found, ddof=1)) if len(found) > 1 else None
    return section


def _mean(sections):
    """Means over sections, which are about different images: their standard errors add up as independent ones do."""
    names = [name for name in (sections[0] if sections else {}) if not name.endswith(("count", "_sd", "bandwidth"))]
    names = [name for name in names if name != "floor_size"]
    found = {name: [section.get(name) for section in sections] for name in names}
    mean = lambda name, v: math.hypot(*v) / len(v) if name.endswith(("_se", "_se_samples")) else float(np.mean(v))
    return {name: mean(name, v) for name, v in found.items() if None not in v}


def choose_encoder(name: str | None, trained: encoders.Encoder | None) -> encoders.Encoder:
    """The transform that likelihoods are computed in. trained: the snapshot's encoder.

    None: the snapshot's own if it dequantises, else "discrete", the probability of the 256 levels. Raises ValueError for
    VAE latents, and for a transform that is not the one that the network knows (center and discrete share a scale).
    """
    if isinstance(trained, encoders.StabilityVAEEncoder):
        raise ValueError("VAE latents have no bits/dim: decoding is not invertible; train on pixels for likelihoods")
    if name is None:
        if isinstance(trained, (encoders.UniformDequantizer, encoders.IdentityEncoder)):
            return trained
        return encoders.StandardRGBEncoder()
    if name not in ENCODERS:
        raise ValueError(f"--encoder={name} {one_of(name, ENCODERS)}")
    made = ENCODERS[name]()
    trained = trained or encoders.StandardRGBEncoder()
    scale = (encoders.StandardRGBEncoder, encoders.CenterEncoder)
    if made != trained and not (isinstance(made, scale) and isinstance(trained, scale)):
        raise ValueError(f"--encoder={name}: the network was trained behind {trained!r}, which has another scale")
    return trained if made == trained else made


def bits_per_dim(
    net: torch.nn.Module,  # denoiser
    dataset: Dataset,  # uint8 images, or float arrays (IdentityEncoder)
    process: object,  # EDM or a linear process
    encoder: encoders.Encoder,  # see choose_encoder
    method: str = "elbo",  # or "ode", the probability flow
    *,
    num: int | None = None,  # at most so many images, a seeded subset; None: all
    seed: int = 0,  # draws of image i depend on (seed, i) alone
    per_source: bool = True,
    batch: int = 256,
    progress: Callable[[int], object] = lambda num_images: None,  # called after every batch
    **options: object,  # of likelihood.elbo or ode_log_likelihood: prior, t_min, t_max, sigma_min, sigma_max, ...
) -> dict:
    """Bits per dimension of uint8 images (float arrays: of their density), as plain data.

    method: elbo, ism (MDM's bound by the divergence of the score) or ode.
    elbo with dequantising encoders: the bound of the density, -(elbo + log_abs_det) / (d ln 2) + 8; discrete: of the
    probability of the levels. ode: as published, x stands for the state at t_min; discrete: a bound, with a decoder.
    Returns {"bits_per_dim", "standard_error", "num", "nats", "endpoint_kl" (bits per dimension), "sigma_min",
    "sigma_max", "reference_hashes", "sources": {label: {...}}}; of a joint network's elbo also "no_offset_bits_per_dim", MDM's
    number without offset, which is no bound for x.
    """
    index = torch.arange(len(dataset))
    if num is not None and num < len(dataset):
        index = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:num].sort().values
    images, labels = load_raw(dataset.subset(index.numpy()))
    device = next((p.device for p in getattr(net, "parameters", tuple)()), torch.device("cpu"))
    dequantised = isinstance(encoder, encoders.UniformDequantizer)
    discrete = isinstance(encoder, encoders.StandardRGBEncoder)
    columns, info, plain = [], {}, []
    for start in range(0, len(images), batch):
        rows = slice(start, start + batch)
        generator = StackedRandomGenerator(device, [hash_seed(seed, int(i)) for i in index[rows]])
        x = encoder.encode_latents(images[rows].to(device), generator)
        given = dataset.label_dim and net.label_dim
        onehot = label_rows(labels[rows], dataset.label_dim).to(device) if given else None
        common = {"generator": generator, "terms": True, **options}
        if method != "ode":
            decoder = "discretised" if discrete else "gaussian"
            with torch.no_grad():
                integrand = {"elbo": "dsm"}.get(method, method)
                nats, parts = likelihood.elbo(net, process, x, onehot, decoder=decoder, integrand=integrand, **common)
            kl, info = parts["kl"], {name: parts[name] for name in ("sigma_min", "sigma_max")}
            plain += [parts["no_offset"] - nats] if "no_offset" in parts else []
        else:
            decoder = "discretised" if discrete else None
            nats, info = likelihood.ode_log_likelihood(net, process, x, onehot, decoder=decoder, **common)
            t_max = process.time(min(info["sigma_max"], float(process.sigma(process.T))))
            kl = likelihood.endpoint_kl(process, x, t_max, options.get("prior", "stationary"), float(net.sigma_data))
        if dequantised:
            nats = nats + encoder.log_abs_det(x).to(nats)
        columns.append(torch.stack([nats.detach().cpu(), kl.detach().double().cpu()]))
        progress(len(x))
    nats, kl = torch.cat(columns, dim=1)
    if len(bad := (~nats.isfinite()).nonzero().flatten()):
        raise ValueError(
            f"the likelihood of {len(bad)} of {len(images)} images is not finite, first that of image {int(index[bad[0]])}: "
            f"the network has diverged, or the noise levels are too extreme"
        )
    dims = x[0].numel()
    bits = -nats / (dims * math.log(2)) + (OFFSET_BITS if dequantised else 0)
    kl_bits = float(kl.mean()) / (dims * math.log(2))
    result = {**_bits(bits), "nats": float(nats.mean()), "endpoint_kl": kl_bits, **info}
    if plain:
        result["no_offset_bits_per_dim"] = float((bits - torch.cat(plain).cpu() / (dims * math.log(2))).mean())
    result["reference_hashes"] = content_hashes(images, labels)
    if per_source and labels.ndim == 1:
        result["sources"] = {str(int(k)): _bits(bits[labels == k]) for k in labels.unique()}
    return result


def _bits(bits):
    error = float(bits.std() / math.sqrt(len(bits))) if len(bits) > 1 else None
    return {"bits_per_dim": float(bits.mean()), "standard_error": error, "num": len(bits)}
