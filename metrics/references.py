"""Reference files: our npz (several detectors, per source, provenance) and those of EDM (.npz) and EDM2 (.pkl)."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from dnnlib.util import atomic_write
from metrics.features import FeatureSet
from metrics.statistics import FeatureStatistics
from torch_utils import pickles

FORMAT = "feature-reference-1"
FILE_FEATURE_LIMIT = 2**28  # bytes of float32 features stored per detector


def save_references(
    path: str | os.PathLike, references: dict[str, FeatureSet], feature_limit: int = FILE_FEATURE_LIMIT
) -> None:
    """Write {identity: FeatureSet} to one npz file; atomic, no pickle inside.

    Features are stored up to `feature_limit` bytes per detector; without them a reader has Frechet distances only.
    Per detector i: `<i>/n [1 + K]`, `<i>/sum [1 + K, F]`, `<i>/outer [1 + K, F, F]` (row 0 overall), optional
    `<i>/features`, `<i>/labels`, and `<i>/mu`, `<i>/sigma` for other readers; `header` is JSON.
    """
    arrays, header = {}, {"format": FORMAT, "detectors": []}
    for i, (identity, reference) in enumerate(references.items()):
        statistics = reference.statistics
        mu, sigma = statistics.moments()
        entry = {"n": statistics.n, "sum": statistics.sum, "outer": statistics.outer, "mu": mu, "sigma": sigma}
        if reference.features is not None and reference.features.nbytes <= feature_limit:
            entry |= {"features": reference.features, "labels": reference.labels}
        arrays |= {f"{i}/{name}": np.asarray(value) for name, value in entry.items()}
        header["detectors"].append({"identity": identity, "provenance": reference.provenance})
    with atomic_write(path) as f:
        np.savez(f, header=np.array(json.dumps(header)), **arrays)


def load_references(path: str | os.PathLike) -> dict[str, FeatureSet]:
    """Read {identity: FeatureSet} from our npz, EDM's npz (mu, sigma: Inception) or EDM2's pkl; executes nothing.

    Raises ValueError with one line that names the file.
    """
    if not os.path.isfile(path):
        raise ValueError(f"reference file '{path}' does not exist; make it with `calculate_metrics.py ref`")
    data = Path(path).read_bytes()
    try:
        return _from_npz(data) if data[:2] == b"PK" else _from_dict(pickles.load(data))
    except (zipfile.BadZipFile, LookupError, EOFError, TypeError, ValueError, OverflowError, MemoryError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"'{path}' is no readable reference file ({reason})") from None


def require_detectors(
    references: dict[str, FeatureSet], identities: Iterable[str], path: str | os.PathLike
) -> dict[str, FeatureSet]:
    """`references` itself, if it holds statistics of every one of the detectors; ValueError names the first that lacks."""
    for identity in identities:
        if identity not in references:
            raise ValueError(
                f"--ref={path} holds statistics of {', '.join(references)}, not of {identity}; different detectors "
                f"cannot be compared: make it with `calculate_metrics.py ref --metrics=...`"
            )
    return references


def _from_npz(data):
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = dict(file)
    if "header" not in arrays:
        return _from_dict({"fid": {"mu": arrays["mu"], "sigma": arrays["sigma"]}})  # EDM
    header = json.loads(str(arrays["header"]))
    if header.get("format") != FORMAT:
        raise ValueError(f"format {header.get('format')!r}, expected {FORMAT!r}")
    result = {}
    for i, entry in enumerate(header["detectors"]):
        statistics = FeatureStatistics()
        for name in ("n", "sum", "outer"):
            setattr(statistics, name, torch.from_numpy(arrays[f"{i}/{name}"]))
        features, labels = arrays.get(f"{i}/features"), arrays.get(f"{i}/labels")
        identity = entry["identity"]
        result[identity] = FeatureSet(identity, statistics, features, labels, entry["provenance"])
    return result


class _MomentsOnly(FeatureStatistics):
    """Mean and covariance of a file that does not say how the sums came about."""

    def __init__(self, mu, sigma, n):
        super().__init__()
        self.mu, self.sigma, self._n = mu, sigma, n
        self.sum = self.sum.new_zeros(1, len(mu))  # for the width

    def count(self, source=None):
        return self._n

    def moments(self, source=None):
        if source is not None:
            raise ValueError("this reference file has no statistics per source")
        return self.mu, self.sigma


def _from_dict(data):
    if not isinstance(data, dict):
        raise ValueError(f"holds a {type(data).__name__}, expected a dict of statistics")
    n = int(data["num_images"]) if "num_images" in data else None  # EDM's npz does not say
    result = {}
    for name, entry in data.items():
        if isinstance(entry, dict):
            mu, sigma = (np.asarray(entry[key], np.float64) for key in ("mu", "sigma"))
            if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
                raise ValueError(f"'{name}': mu and sigma have shapes {mu.shape} and {sigma.shape}")
            result[str(name)] = FeatureSet(str(name), _MomentsOnly(mu, sigma, n))
    if not result:
        raise ValueError("holds no mu and sigma")
    return result
