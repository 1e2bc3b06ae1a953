"""Reference files: our npz (several detectors, per source, provenance) and those of EDM (.npz) and EDM2 (.pkl)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping

import numpy as np
import torch

from dnnlib.reading import parse_json, read_npz, require_file
from dnnlib.util import atomic_write, reason
from metrics.detectors.base import about
from metrics.distances import Gaussian
from metrics.features import FeatureSet, keeps
from metrics.statistics import FeatureStatistics, Group
from torch_utils import pickles
from training.dataset import Dataset

FORMAT = "feature-reference-2"
FIRST_FORMAT = "feature-reference-1"  # sums of all sources in two arrays, `sum` [1 + K, F] and `outer` [1 + K, F, F]
DENSE_WIDTH = 4096  # up to this width files hold mean and covariance for other readers


def save_references(path: str | os.PathLike, references: dict[str, FeatureSet], keep_features: bool = True) -> None:
    """Write {identity: FeatureSet} to one npz file; atomic, no pickle inside.

    Without features (not wanted, or too many to be kept) a reader has Fréchet distances only.
    Per detector i: `<i>/n [1 + K]` (row 0 overall), `<i>/labels`, `<i>/hashes` of the images, optional `<i>/features`; of
    row r with more images than features `<i>/<r>/sum`, `<i>/<r>/outer`, of another `<i>/<r>/rows` where features are
    not stored; `<i>/mu`, `<i>/sigma` for other readers where they are not too wide; `header` is JSON.
    """
    arrays, header = {}, {"format": FORMAT, "detectors": []}
    for i, (identity, reference) in enumerate(references.items()):
        statistics, entry = reference.statistics, {"n": reference.statistics.n}
        entry |= {name: getattr(reference, name) for name in ("labels", "hashes")}
        kept = keep_features and reference.features is not None
        entry["features"] = reference.features if kept else None
        for row, group in statistics.groups.items():
            if group.outer is not None:
                entry |= {f"{row}/sum": group.sum, f"{row}/outer": group.outer}
            elif not kept:
                entry[f"{row}/rows"] = group.rows
        if statistics.width <= DENSE_WIDTH:
            entry["mu"], entry["sigma"] = statistics.moments()
        arrays |= {f"{i}/{name}": np.asarray(value) for name, value in entry.items() if value is not None}
        header["detectors"].append({"identity": identity, "provenance": reference.provenance})
    with atomic_write(path) as f:
        np.savez(f, header=np.array(json.dumps(header)), **arrays)


def load_references(path: str | os.PathLike) -> dict[str, FeatureSet]:
    """Read {identity: FeatureSet} from our npz, EDM's npz (mu, sigma: Inception) or EDM2's pkl; executes nothing.

    Raises ValueError with one line that names the file.
    """
    if not os.path.isfile(path):
        raise ValueError(f"reference file '{path}' does not exist; make it with `calculate_metrics.py ref`")
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"
        return _from_npz(read_npz(path)) if zipped else _from_dict(pickles.load(require_file(path, 2**30).read_bytes()))
    except OSError:
        raise
    except Exception as error:  # arrays of any shape and kind
        why = f"no entry {error}" if isinstance(error, KeyError) else reason(error)
        raise ValueError(f"'{path}' is no readable reference file ({why:.300})") from None


def require_detectors(
    references: dict[str, FeatureSet], detectors: Mapping[str, object], path: str | os.PathLike
) -> dict[str, FeatureSet]:
    """`references` itself, if it holds statistics of every one of the detectors {identity: detector} as they are today.

    Raises ValueError that names the first that lacks, or was made with another resize, weights or channels.
    """
    for identity, detector in detectors.items():
        if identity not in references:
            raise ValueError(
                f"--ref={path} holds statistics of {', '.join(references)}, not of {identity}; different detectors "
                f"cannot be compared: make it with `calculate_metrics.py ref --metrics=...`"
            )
        _require_same(references[identity], identity, detector, f"--ref={path}")
    return references


def _require_same(found, identity, detector, where):
    """What the file says of the detector is what it says of itself; files of others say nothing."""
    made, today = found.provenance.get("detector"), about(detector)
    for fact, value in today.items() if isinstance(made, dict) else ():
        if fact != "name" and fact in made and made[fact] != value:
            raise ValueError(
                f"{where} was made with {fact}={made[fact]} of {identity}, here it is {value}: make it again"
            )


def require_same_features(
    found: dict[str, FeatureSet], detectors: Mapping[str, object], dataset: Dataset, where: str
) -> dict[str, FeatureSet]:
    """The sets of exactly these detectors, if they are of the images and labels of `dataset`; else ValueError.

    where: the option and file that they come from.
    """
    if lacking := [identity for identity in detectors if identity not in found]:
        raise ValueError(f"{where} holds features of {', '.join(found)}, not of {lacking[0]}: give another file")
    for identity in detectors:
        made = found[identity].provenance
        _require_same(found[identity], identity, detectors[identity], where)
        if found[identity].features is None and keeps(len(dataset), found[identity].statistics.width):
            raise ValueError(f"{where} holds sums without features of {identity}: give another file")
        if made.get("image_shape") != list(dataset.image_shape):
            sizes = f"{made.get('image_shape')} [C, H, W], not {list(dataset.image_shape)}"
            raise ValueError(f"{where} holds features of images {sizes}: give another file")
    if {found[identity].provenance.get("content_hash") for identity in detectors} != {dataset.content_hash()}:
        raise ValueError(f"{where} holds features of other images or labels than {dataset.name}: give another file")
    return {identity: found[identity] for identity in detectors}


def _from_npz(arrays):
    if "header" not in arrays:
        return _from_dict({"fid": {"mu": arrays["mu"], "sigma": arrays["sigma"]}})  # EDM
    header = parse_json(str(arrays["header"]))
    if header.get("format") not in (FORMAT, FIRST_FORMAT):
        raise ValueError(f"format {header.get('format')!r}, expected {FORMAT!r}")
    result = {}
    for i, entry in enumerate(header["detectors"]):
        own = {name.removeprefix(f"{i}/"): a for name, a in arrays.items() if name.startswith(f"{i}/")}
        if header["format"] == FIRST_FORMAT:
            own |= {f"{row}/{name}": part for name in ("sum", "outer") for row, part in enumerate(own[name])}
        identity, features, labels = entry["identity"], own.get("features"), own.get("labels")
        if not isinstance(identity, str) or not isinstance(entry["provenance"], dict):
            raise ValueError("a detector without a name or provenance")
        statistics = _statistics(own, features, labels)
        result[identity] = FeatureSet(identity, statistics, features, labels, entry["provenance"], own.get("hashes"))
    return result


def _statistics(arrays, features, labels):
    """FeatureStatistics of the arrays of one detector; ValueError where they contradict each other or are not finite."""
    n = arrays["n"]
    if n.ndim != 1 or n.dtype.kind not in "iu" or not n[:1].all() or (n < 0).any():
        raise ValueError("counts of images must be integers, at least one of them overall")
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"'{name}' holds NaN or infinity; make it again")
    for name in ("features", "labels", "hashes"):
        if name in arrays and len(arrays[name]) != n[0]:
            raise ValueError(f"{len(arrays[name])} {name} for {n[0]} images")
    statistics = FeatureStatistics(len(n) - 1)
    for row in np.flatnonzero(n).tolist():
        if f"{row}/outer" in arrays:
            total, outer = (torch.as_tensor(arrays[f"{row}/{name}"]).double() for name in ("sum", "outer"))
            group, held = Group(len(total)), n[row]
            group.n, group.sum, group.outer = int(held), total, outer
            fits = outer.shape == (len(total), len(total))
        else:
            rows = arrays.get(f"{row}/rows", features if row == 0 or features is None else features[labels == row - 1])
            if rows is None or rows.ndim != 2:
                raise ValueError(f"no statistics of row {row}")
            group, held, fits = Group(rows.shape[1]), len(rows), True
            group.update(torch.as_tensor(rows).double())
        statistics.width = statistics.width or len(group.sum)
        if held != n[row] or not fits or len(group.sum) != statistics.width:
            raise ValueError(f"statistics of row {row} do not fit: {held} of {n[row]} images, width {len(group.sum)}")
        if f"{row}/outer" in arrays:
            _require_moments(outer.numpy(), f"'{row}/outer'")
        statistics.groups[row] = group
    return statistics


def _require_moments(products, what):
    """Sums of products, or a covariance [F, F], as features of float32 can have them: symmetric, by Cauchy-Schwarz."""
    diagonal = products.diagonal()
    largest, possible = diagonal.max(), diagonal.min() >= 0 and abs(products).max() < 1e80
    if possible:
        root, slack = np.sqrt(diagonal), 1e-6 * largest
        possible = (abs(products) <= np.outer(root, root) + slack).all() and (abs(products - products.T) <= slack).all()
    if not possible:
        raise ValueError(f"{what} is no matrix of second moments; make the file again")


class _MomentsOnly(FeatureStatistics):
    """Mean and covariance of a file that does not say how the sums came about."""

    def __init__(self, mu, sigma, n):
        super().__init__()
        self.mu, self.sigma, self._n = mu, sigma, n
        self.width = len(mu)

    def count(self, source=None):
        return self._n

    def moments(self, source=None):
        if source is not None:
            raise ValueError("this reference file has no statistics per source")
        return self.mu, self.sigma

    def gaussian(self, source=None):
        return Gaussian.of_moments(*self.moments(source))


def _from_dict(data):
    if not isinstance(data, dict):
        raise ValueError(f"holds a {type(data).__name__}, expected a dict of statistics")
    n = int(data["num_images"]) if "num_images" in data else None  # EDM's npz does not say
    if n is not None and not 2 <= n < 2**53:
        raise ValueError(f"num_images={n}")
    result = {}
    for name, entry in data.items():
        if isinstance(entry, dict):
            mu, sigma = (np.asarray(entry[key], np.float64) for key in ("mu", "sigma"))
            if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
                raise ValueError(f"'{name}': mu and sigma have shapes {mu.shape} and {sigma.shape}")
            if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
                raise ValueError(f"'{name}': mu or sigma holds NaN or infinity")
            _require_moments(sigma, f"sigma of '{name}'")
            content = {"content_hash": hashlib.sha256(mu.tobytes() + sigma.tobytes()).hexdigest()}
            result[str(name)] = FeatureSet(str(name), _MomentsOnly(mu, sigma, n), provenance=content)
    if not result:
        raise ValueError("holds no mu and sigma")
    return result
