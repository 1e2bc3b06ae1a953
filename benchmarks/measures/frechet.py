"""What a Fréchet distance costs: ours, the matrix square root of scipy, and the span of few samples, turn by turn."""

import statistics
import time

import numpy as np
import scipy.linalg
import torch

from metrics import distances
from metrics.distances import Gaussian, frechet, frechet_distance
from metrics.table import markdown


def by_root(mu1, sigma1, mu2, sigma2):
    """Heusel et al. 2017, eq. 6, as it reads."""
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root))


def by_singular_values(mu1, sigma1, mu2, sigma2):
    """The factors' product by its singular values."""
    a, b = distances._factor(torch.as_tensor(sigma1)), distances._factor(torch.as_tensor(sigma2))
    root = torch.linalg.svdvals(a.T @ b).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * root)


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


def take_turns(arms, repeats):
    """{name: (median seconds, value)} of functions without arguments, one after the other in every round."""
    times, values = {name: [] for name in arms}, {}
    for _ in range(repeats):
        for name, function in arms.items():
            begin = time.process_time()
            values[name] = function()
            times[name].append(time.process_time() - begin)
    return {name: (statistics.median(times[name]), values[name]) for name in arms}


def run(width, images, spread, few, repeats):
    rng = np.random.default_rng(0)
    scales = np.exp(spread * rng.normal(size=width))
    axes = np.linalg.qr(rng.normal(size=(width, width)))[0]
    draw = lambda count, shift: shift + rng.normal(size=(count, width)) * scales @ axes
    x, y = draw(images, 0.0), draw(images, 0.1)
    full = (*moments(x), *moments(y))
    arms = {
        "ours": lambda: frechet_distance(*full),
        "singular values": lambda: by_singular_values(*full),
        "matrix square root": lambda: by_root(*full),
    }
    rows = _rows(f"{images} images", take_turns(arms, repeats))
    x, y = x[:few], y[:few]
    dense = (*moments(x), *moments(y))
    arms = {
        "ours": lambda: frechet_distance(*dense),
        "matrix square root": lambda: by_root(*dense),
        "ours, in the span of the samples": lambda: frechet(Gaussian.of_features(x), Gaussian.of_features(y)),
    }
    rows += _rows(f"{few} images", take_turns(arms, repeats))
    print(f"{width} features of spread {spread:g}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)\n")
    print(markdown(["images", "form", "seconds", "ratio to ours", "distance"], rows))


def _rows(what, found):
    first = next(iter(found.values()))[0]
    return [[what, name, f"{t:.4g}", f"{t / first:.3g}", f"{value:.12g}"] for name, (t, value) in found.items()]
