"""Distances against scipy, closed forms, and plain numpy written from the papers' formulas."""

import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from small_runs import run

from metrics.distances import frechet_distance, kid, nearest_distance, prdc

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import frechet  # noqa: E402


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


def frechet_by_root(mu1, sigma1, mu2, sigma2):
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)


@pytest.mark.parametrize("width, n, m", [(3, 50, 60), (32, 400, 300), (64, 1000, 70), (24, 10, 12), (40, 15, 500)])
def test_frechet_equals_the_matrix_square_root(width, n, m):  # the last two: fewer images than features
    rng = np.random.default_rng(width)
    scales = np.logspace(0, -2, width)
    x, y = rng.normal(size=(n, width)) * scales, 0.3 + 0.8 * rng.normal(size=(m, width))
    x, y = x @ rng.normal(size=(width, width)), y @ rng.normal(size=(width, width))
    expected = frechet_by_root(*moments(x), *moments(y))
    assert frechet_distance(*moments(x), *moments(y)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(*moments(y), *moments(x)) == pytest.approx(expected, rel=1e-6)


def test_the_benchmark_compares_equal_distances():
    """All forms at a small size: eigenvalues, singular values, matrix root; span of the samples and dense."""
    table = run(frechet.main, "--width=48", "--images=400", "--few=20", "--repeats=1").stdout
    values = [float(line.split("|")[-2]) for line in table.splitlines() if line[2:3].isdigit()]
    assert len(values) == 5 and values[:2] == pytest.approx([values[2]] * 2, rel=1e-8)
    assert values[3] == pytest.approx(values[4], rel=1e-9) and values[3] > 2 * values[0]


def test_frechet_of_commuting_covariances_is_closed_form():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    a, b = rng.uniform(0, 3, 12), rng.uniform(0, 3, 12)
    a[:5], b[4:7] = 0, 0  # singular, with different null spaces
    mu1, mu2 = rng.normal(size=12), rng.normal(size=12)
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(mu1, basis * a @ basis.T, mu2, basis * b @ basis.T)
    assert found == pytest.approx(expected, rel=1e-10)


def test_frechet_edge_cases():
    rng = np.random.default_rng(1)
    mu, sigma = moments(rng.normal(size=(100, 6)))
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(mu, sigma, mu + 2, sigma) == pytest.approx(24, rel=1e-10)
    zero = np.zeros((6, 6))
    assert frechet_distance(mu, zero, mu, sigma) == pytest.approx(np.trace(sigma), rel=1e-12)
    tensors = [torch.tensor(v) for v in (mu, sigma, mu + 1, 4 * sigma)]
    assert frechet_distance(*tensors) == pytest.approx(6 + np.trace(sigma), rel=1e-10)
    with pytest.raises(ValueError, match="widths"):
        frechet_distance(mu, sigma, mu[:5], sigma[:5, :5])
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(mu * np.nan, sigma, mu, sigma)


def kid_by_loops(x, y, gamma):
    kernel = lambda a, b: (gamma * (a @ b) + 1) ** 3
    m, n = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return xx + yy - 2 * sum(kernel(a, b) for a in x for b in y) / (m * n)


def test_kid_is_the_unbiased_estimate():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(23, 7)), 0.5 + rng.normal(size=(31, 7))
    assert kid(x, y) == pytest.approx(kid_by_loops(x, y, 1 / 7), rel=1e-10)
    assert kid(x, y, gamma=0.3) == pytest.approx(kid_by_loops(x, y, 0.3), rel=1e-10)
    assert kid(y, x) == pytest.approx(kid(x, y), rel=1e-12)


def test_kid_subsets():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(400, 5)), 0.4 + rng.normal(size=(400, 5))
    mean, sd = kid(x, y, subset_size=100, num_subsets=60, return_std=True)
    assert abs(mean - kid(x, y)) < 4 * sd / np.sqrt(60) + 0.02 * kid(x, y)
    assert sd > 0
    assert mean == kid(x, y, subset_size=100, num_subsets=60)  # seeded
    assert mean != kid(x, y, subset_size=100, num_subsets=60, seed=1)
    same = [kid(rng.normal(size=(40, 5)), rng.normal(size=(40, 5))) for _ in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(200)  # unbiased: zero mean for equal distributions


def prdc_by_numpy(generated, reference, k):
    """Kynkaanniemi et al. 2019, eqs. 1-2; Naeem et al. 2020, eqs. 3 and 6."""
    distance = lambda a, b: np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    radius = lambda a: np.sort(distance(a, a), axis=1)[:, k]  # column 0 is the point itself
    d = distance(generated, reference)
    inside_reference = d <= radius(reference)[None]
    return {
        "precision": inside_reference.any(1).mean(),
        "recall": (d <= radius(generated)[:, None]).any(0).mean(),
        "density": inside_reference.sum(1).mean() / k,
        "coverage": inside_reference.any(0).mean(),
    }


@pytest.mark.parametrize("k, chunk", [(1, 2048), (3, 7), (5, 2048)])
def test_prdc_equals_the_definition(k, chunk):
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(83, 3)), 0.5 + 1.5 * rng.normal(size=(120, 3))
    expected = prdc_by_numpy(x, y, k)
    assert prdc(generated=x, reference=y, k=k, chunk=chunk) == pytest.approx(expected, rel=1e-12)
    assert 0.1 < expected["recall"] < expected["precision"] <= 1  # the narrow set is generated: sides are not swapped


def test_prdc_arguments():
    x = np.random.default_rng(5).normal(size=(20, 3))
    with pytest.raises(TypeError):
        prdc(x, x)
    with pytest.raises(ValueError, match="reference: 5 images"):
        prdc(generated=x, reference=x[:5], k=5)
    assert prdc(generated=x, reference=x)["coverage"] == 1


def test_mode_collapse_lowers_recall_and_noise_lowers_precision():
    rng = np.random.default_rng(6)
    reference = rng.normal(size=(400, 8))
    good = prdc(generated=rng.normal(size=(400, 8)), reference=reference)
    collapsed = prdc(generated=reference[:4].repeat(100, 0) + 0.05 * rng.normal(size=(400, 8)), reference=reference)
    noisy = prdc(generated=rng.normal(size=(400, 8)) + 2 * rng.normal(size=(400, 8)), reference=reference)
    assert collapsed["recall"] < 0.1 < 0.7 < good["recall"]
    assert collapsed["precision"] > 0.9
    assert noisy["precision"] < 0.4 < 0.7 < good["precision"]


def test_nearest_distance():
    rng = np.random.default_rng(7)
    x, y = 100 + rng.normal(size=(50, 4)), 100 + rng.normal(size=(70, 4))
    x[3] = y[11]
    expected = np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1)).min(1)
    np.testing.assert_allclose(nearest_distance(x, y, chunk=16), expected, rtol=1e-12)
    assert nearest_distance(x, y)[3] == 0
