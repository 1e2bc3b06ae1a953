"""How alike sources are, by their images alone: no detector, no training."""

from __future__ import annotations

import math

import numpy as np

from dnnlib import EasyDict


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """sqrt(2 E|x - y| - E|x - x'| - E|y - y'|) of two samples [N, d] and [M, d] (Szekely and Rizzo 2013), pairs with
    themselves included. Zero for equal samples.
    """
    from scipy.spatial.distance import cdist

    square = 2 * cdist(a, b).mean() - cdist(a, a).mean() - cdist(b, b).mean()
    return math.sqrt(max(square, 0.0))


def energy(o: EasyDict) -> None:
    """calculate_metrics.py energy: the distance between the pixels, from 0 to 2, of every two sources of a data set."""
    from metrics.commands import finish, open_images
    from metrics.features import content_hashes
    from training.dataset import load_raw

    dataset = open_images(o.data, "--data")
    if len(dataset.sources or []) < 2:
        raise ValueError(f"--data={o.data}: give labelled images of two sources or more")
    images, labels = load_raw(dataset)
    parts = {k: images[labels == k].flatten(1).double().numpy() / 127.5 for k in dataset.sources}
    between = lambda a, b: energy_distance(parts[a], parts[b])
    sources = {str(a): {f"energy_{b}": between(a, b) for b in parts if b != a} for a in parts}
    found = {"sources": sources, "reference_hashes": content_hashes(images, labels)}
    finish({"data": o.data, "tags": o.tags, "metrics": {"energy": found}}, o.dest)
