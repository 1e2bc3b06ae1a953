"""Distances against scipy, closed forms, and plain numpy written from the papers' formulas."""

import sys
import warnings
from pathlib import Path

import mpmath
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch

from metrics.distances import (
    Gaussian,
    frechet_distance,
    frechet_errors,
    frechet_infinity,
    gaussian_kernel,
    inception_score,
    kid,
    manifolds,
    median_distance,
    mmd,
    nearest_distance,
    prdc,
)
from metrics.distances import frechet as distance_of

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from measures import frechet  # noqa: E402


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("spread", [0, 1, 3])  # of log scales: condition 1e3 to 1e12
@pytest.mark.parametrize("shared", [True, False], ids=["same axes", "other axes"])
@pytest.mark.parametrize("n, m", [(300, 300), (300, 40), (40, 300), (50, 50)])
def test_frechet_of_badly_conditioned_statistics(spread, shared, n, m, monkeypatch):
    """Against the singular values of symmetric roots; the fast ways are enough, whatever the order of the features."""
    rng = np.random.default_rng(n + m)
    scales, axes = np.exp(spread * rng.normal(size=100)), [np.linalg.qr(rng.normal(size=(100, 100)))[0] for _ in "ab"]
    x = rng.normal(size=(n, 100)) * scales @ axes[0]
    y = (0.1 + rng.normal(size=(m, 100))) * scales @ axes[0 if shared else 1]
    (mu1, s1), (mu2, s2) = pair = moments(x), moments(y)
    monkeypatch.setattr(torch.linalg, "svdvals", lambda m: pytest.fail("not needed"))
    roots = []
    for sigma in (s1, s2):
        values, vectors = scipy.linalg.eigh(sigma)
        roots.append(vectors * np.sqrt(values.clip(values.max() * 1e-14)))
    nuclear = scipy.linalg.svdvals(roots[0].T @ roots[1]).sum()
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * nuclear
    assert frechet_distance(*pair[0], *pair[1]) == pytest.approx(expected, rel=1e-6)


def test_what_is_not_graded_is_left_to_singular_values(monkeypatch):
    """Rows in the order of the samples, the smallest first, and two that nearly repeat: against 50 digits."""
    rng = np.random.default_rng(0)
    x, y, asked, svdvals = rng.normal(size=(12, 30)), rng.normal(size=(14, 30)), [], torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda m: asked.append(m.shape) or svdvals(m))
    x *= np.logspace(-7, 0, 12)[:, None]
    x[7] = x[8] + 1e-9 * x[7]
    for z in (x, x[::-1].copy()):
        mine, theirs = Gaussian.of_features(z), Gaussian.of_features(y)
        with mpmath.workdps(50):
            a, b = (mpmath.matrix((v - v.mean(0)).tolist()) / mpmath.sqrt(len(v) - 1) for v in (z, y))
            product = a * b.T
            roots = mpmath.svd_r(product, compute_uv=False)
            nuclear = float(sum(roots))
        expected = ((z.mean(0) - y.mean(0)) ** 2).sum() + z.var(0, ddof=1).sum() + y.var(0, ddof=1).sum() - 2 * nuclear
        assert distance_of(mine, theirs) == pytest.approx(expected, rel=1e-9)
    assert asked


def test_the_benchmark_compares_equal_distances(capsys):
    """All forms at a small size: eigenvalues, singular values, matrix root; span of the samples and dense."""
    frechet.run(width=48, images=400, spread=0.5, few=20, repeats=1)
    table = capsys.readouterr().out
    values = [float(line.split("|")[-2]) for line in table.splitlines() if line[2:3].isdigit()]
    assert len(values) == 6 and values[:2] == pytest.approx([values[2]] * 2, rel=1e-8)
    assert values[3] == pytest.approx(values[5], rel=1e-9) and values[3] > 2 * values[0]
    assert values[4] == pytest.approx(values[5], rel=1e-6)


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
    with pytest.raises(ValueError, match="not symmetric"):
        frechet_distance(mu, np.tril(sigma), mu, sigma)


def spread_of(estimate, draws):
    """(values, standard errors) of an estimate of a generator, over draws."""
    found = np.array([estimate(np.random.default_rng(seed)) for seed in range(draws)])
    return found[:, 0], found[:, 1]


def covered(values, errors, truth=None, z=1.96):
    """Share of 95 % intervals that hold the truth (None: the mean over draws)."""
    return (np.abs(values - (values.mean() if truth is None else truth)) < z * errors).mean()


@pytest.mark.parametrize("width, n, m", [(6, 100, 150), (6, 400, 400), (40, 20, 30), (40, 30, 200), (40, 42, 42)])
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_frechet_errors_are_the_spread_over_repeated_draws(width, n, m, shift):
    """Also with fewer images than features; at equal distributions, where the distance is not linear, up to sqrt(2) more."""

    def estimate(rng):
        x, y = shift + rng.normal(size=(n, width)), rng.normal(size=(m, width))
        a, b = Gaussian.of_features(x), Gaussian.of_features(y)
        return distance_of(a, b), np.hypot(*frechet_errors(a, b, x, y))

    values, errors = spread_of(estimate, 150)
    assert 0.85 < errors.mean() / values.std() < 1.65
    assert covered(values, errors) > 0.9


def test_frechet_errors_are_derivatives_in_the_weight_of_an_image():
    """Numerically: images that count a little more; also of a rank-deficient side, and moments without features."""
    rng = np.random.default_rng(0)
    for n, m in ((30, 40), (6, 40), (6, 5), (30, 5)):
        x, y = 1 + 1.5 * rng.normal(size=(n, 8)), rng.normal(size=(m, 8))
        a, b = Gaussian.of_features(x), Gaussian.of_features(y)

        def weighted(w, z):
            mu = w @ z / w.sum()
            return mu, ((z - mu).T * w) @ (z - mu) / w.sum() * len(z) / (len(z) - 1)

        def of(w, v, x=x, y=y):
            (mu1, s1), (mu2, s2) = weighted(w, x), weighted(v, y)
            roots = [vectors * np.sqrt(values.clip(0)) for values, vectors in map(np.linalg.eigh, (s1, s2))]
            nuclear = scipy.linalg.svdvals(roots[0].T @ roots[1]).sum()
            return ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * nuclear

        influence = []
        for i in range(n + m):
            e = 1e-4 * np.eye(n + m)[i]
            ends = [of(1 + sign * e[:n], 1 + sign * e[n:]) for sign in (1, -1)]
            influence.append((ends[0] - ends[1]) / 2e-4)
        of_x, of_y = np.array(influence[:n]) * n, np.array(influence[n:]) * m
        expected = [of_x.std(ddof=1) / n**0.5, of_y.std(ddof=1) / m**0.5]
        assert frechet_errors(a, b, x, y) == pytest.approx(expected, rel=1e-3)
        assert frechet_errors(a, b, x) == [pytest.approx(frechet_errors(a, b, x, y)[0]), None]


def test_frechet_of_infinitely_many_images():
    """Gaussians: the true distance to the same reference, which that of 400 images is far above; few images: None."""
    rng = np.random.default_rng(0)
    y, scales = rng.normal(size=(3000, 20)), np.linspace(0.8, 1.2, 20)
    reference = Gaussian.of_features(y)
    truth = frechet_distance(np.full(20, 0.1), np.diag(scales**2), *moments(y))

    def estimate(rng):
        x = 0.1 + rng.normal(size=(400, 20)) * scales
        a = Gaussian.of_features(x)
        return frechet_infinity(x, reference), frechet_errors(a, reference, x)[0], distance_of(a, reference)

    found = np.array([estimate(np.random.default_rng(seed)) for seed in range(100)])
    assert covered(found[:, 0], found[:, 1], truth) > 0.88
    assert abs(found[:, 0].mean() - truth) < 0.05 * (found[:, 2].mean() - truth)
    assert frechet_infinity(y[:159], reference) is None


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


def jackknife(estimate, x, y):
    """Root of the sum of squares of what an estimate loses without one row of x or y."""
    whole = estimate(x, y)
    lost = [whole - estimate(np.delete(x, i, 0), y) for i in range(len(x))]
    lost += [whole - estimate(x, np.delete(y, i, 0)) for i in range(len(y))]
    return np.sqrt(np.sum(np.square(lost)))


def test_mmd_errors():
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(13, 3)), 0.5 + rng.normal(size=(17, 3))
    for kernel in (None, gaussian_kernel(1.7)):
        value = lambda x, y, kernel=kernel: mmd(generated=x, reference=y, kernel=kernel).value
        assert mmd(generated=x, reference=y, kernel=kernel).error == pytest.approx(jackknife(value, x, y), rel=1e-9)
    assert mmd(generated=x[:2], reference=y).error is None
    square = ((x[:, None] - y[None]) ** 2).sum(-1)
    within = [np.exp(-((z[:, None] - z[None]) ** 2).sum(-1) / 8) for z in (x, y)]
    expected = sum((k.sum() - len(k)) / (len(k) * (len(k) - 1)) for k in within) - 2 * np.exp(-square / 8).mean()
    assert mmd(generated=x, reference=y, kernel=gaussian_kernel(2)).value == pytest.approx(expected, rel=1e-10)
    assert median_distance(x) == pytest.approx(np.quantile(scipy.spatial.distance.pdist(x), 0.5), rel=0.05)


@pytest.mark.parametrize("shift, subset", [(0.0, None), (0.4, None), (0.4, 40)])
def test_kid_errors_are_the_spread_over_repeated_draws(shift, subset):
    def estimate(rng):
        x, y = shift + rng.normal(size=(80, 5)), rng.normal(size=(100, 5))
        found = mmd(generated=x, reference=y, subset_size=subset, num_subsets=8)
        return found.value, found.error

    values, errors = spread_of(estimate, 120)
    assert 0.9 < errors.mean() / values.std() < 1.7 and covered(values, errors) > 0.9


def test_inception_score():
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(600, 10))
    p = scipy.special.softmax(logits, axis=1)
    scores = []
    for part in np.split(p, 10):
        scores.append(np.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(0))), axis=1))))
    assert inception_score(logits)[0] == pytest.approx(np.mean(scores), rel=1e-10)
    assert inception_score(np.eye(10).repeat(50, 0) * 1e3, splits=1) == pytest.approx((10, 0), abs=1e-9)
    values, errors = spread_of(lambda rng: inception_score(3 * rng.normal(size=(300, 5)), splits=2), 150)
    assert 0.85 < errors.mean() / values.std() < 1.2 and covered(values, errors) > 0.88
    none = np.concatenate([logits, np.full((600, 2), -np.inf)], axis=1)
    assert inception_score(none) == inception_score(logits)
    with pytest.raises(ValueError, match="too few for 10 parts"):
        inception_score(logits[:19])


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


@pytest.mark.parametrize("n, m, scale", [(100, 100, 1), (80, 200, 1.3)])
def test_prdc_errors_are_no_smaller_than_the_spread_over_repeated_draws(n, m, scale):
    names = ("precision", "recall", "density", "coverage")

    def estimate(rng):
        x, y = scale * rng.normal(size=(n, 4)), rng.normal(size=(m, 4))
        found = manifolds(generated=x, reference=y, k=3, groups=10)
        return [[found.values[name] for name in names], [found.errors[name] for name in names]]

    for values, errors in zip(*(v.T for v in spread_of(estimate, 60)), strict=True):
        assert 0.85 < errors.mean() / values.std() < 2.8 and covered(values, errors) > 0.88


def test_prdc_errors_leave_out_parts():
    """By definition: everything anew without a part of either side."""
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(60, 3)), 0.5 + rng.normal(size=(70, 3))
    found, drawn = manifolds(generated=x, reference=y, k=3, groups=5, seed=1, chunk=13), np.random.default_rng(1)
    parts = [drawn.permutation(len(z)) % 5 for z in (x, y)]
    variances = 0
    for side in (0, 1):
        without = []
        for g in range(5):
            kept = [z[part != g] if i == side else z for i, (z, part) in enumerate(zip((x, y), parts, strict=True))]
            without.append(list(prdc_by_numpy(*kept, 3).values()))
        variances += 4 * np.var(without, axis=0)
    assert list(found.errors.values()) == pytest.approx(np.sqrt(variances), rel=1e-9)


def test_recall_of_noise_is_warned_of():
    """Far from everything, its neighbours are far too: their balls hold all reference images, and recall is 1."""
    rng = np.random.default_rng(6)
    reference, good = rng.normal(size=(400, 64)), rng.normal(size=(400, 64))
    with pytest.warns(UserWarning, match="recall means nothing: .* hold 9.*% of the reference images each, [67]"):
        assert prdc(generated=3 * rng.normal(size=(400, 64)), reference=reference)["recall"] > 0.99
    with pytest.warns(UserWarning, match=r"hold 30.* of the reference"):
        prdc(generated=reference[:20], reference=reference[:20])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prdc(generated=good, reference=reference)


def test_prdc_arguments():
    x = np.random.default_rng(5).normal(size=(20, 3))
    with pytest.raises(TypeError):
        prdc(x, x)
    with pytest.raises(ValueError, match="reference: 5 images"):
        prdc(generated=x, reference=x[:5], k=5)
    assert manifolds(generated=x, reference=x).values["coverage"] == 1


def test_mode_collapse_lowers_recall_and_noise_lowers_precision():
    rng = np.random.default_rng(6)
    reference = rng.normal(size=(400, 8))
    good = prdc(generated=rng.normal(size=(400, 8)), reference=reference)
    collapsed = prdc(generated=reference[:4].repeat(100, 0) + 0.05 * rng.normal(size=(400, 8)), reference=reference)
    noisy = manifolds(generated=rng.normal(size=(400, 8)) + 2 * rng.normal(size=(400, 8)), reference=reference).values
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
