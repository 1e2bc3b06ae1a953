"""The tree against published numbers, SciPy densities, and counting by hand."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch

from simulations import tree
from simulations.tree import classification_score, ground_truth, mandala_score
from training.samplers import heun


def test_published_components():
    parts = tree.components()
    assert len(parts) == 2032 and sum(c.cls == "A" for c in parts) == 1016
    np.testing.assert_allclose(parts[0].mu, [0.02134411, 0.06333431], atol=5e-9)
    assert parts[0].phi == pytest.approx(0.26766134, abs=5e-9)
    assert sum(c.phi for c in parts if c.cls == "A") == pytest.approx(8.325512, abs=5e-7)
    assert sum(c.phi for c in parts) == pytest.approx(17.453498, abs=5e-7)
    assert [sum(c.cls == "A" and c.depth == d for c in parts) for d in range(7)] == [8, 16, 32, 64, 128, 256, 512]
    outer = ground_truth("A", min_depth=5)
    assert len(outer.phi) == 768 and float(ground_truth("A").phi[:].sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "classes, mean, cov",
    [
        ("A", [0.37185, 0.36461], [[0.11093, -0.01639], [-0.01639, 0.11661]]),
        ("AB", [-0.0001, 0.0006], [[0.24985, 0.08832], [0.08832, 0.24990]]),
    ],
)
def test_published_moments_and_samples(classes, mean, cov):
    mixture = ground_truth(classes)
    phi, mu, Sigma = (b.double().numpy() for b in (mixture.phi, mixture.mu, mixture.Sigma))
    exact_mean = phi @ mu / phi.sum()
    spread = Sigma + np.einsum("ki,kj->kij", mu - exact_mean, mu - exact_mean)
    exact_cov = np.einsum("k,kij->ij", phi / phi.sum(), spread)
    np.testing.assert_allclose(exact_mean, mean, atol=6e-5)
    np.testing.assert_allclose(exact_cov, cov, atol=6e-6)
    for sigma in (0.0, 0.7):
        x = mixture.sample((40000,), sigma, torch.Generator().manual_seed(0)).double().numpy()
        np.testing.assert_allclose(x.mean(0), mean, atol=4.5 * math.sqrt((0.25 + sigma**2) / 40000))
        np.testing.assert_allclose(np.cov(x.T), np.array(cov) + sigma**2 * np.eye(2), atol=0.02)


def test_densities_equal_scipy_and_scores_its_differences():
    mixture = ground_truth("AB", dtype=torch.float64)
    rng = np.random.RandomState(0)
    x = np.concatenate([rng.randn(6, 2) * 0.5, [[4.0, -3.0]]])
    parts = tree.components()
    weights = np.array([c.phi for c in parts]) / sum(c.phi for c in parts)

    def logp(x, sigma):
        each = []
        for part in parts:
            cov = part.Sigma + sigma**2 * np.eye(2)
            half = scipy.linalg.solve_triangular(np.linalg.cholesky(cov), (x - part.mu).T, lower=True)
            each.append(-0.5 * (half**2).sum(0) - 0.5 * np.linalg.slogdet(2 * np.pi * cov)[1])
        return scipy.special.logsumexp(np.array(each), axis=0, b=weights[:, None])

    for sigma in (0.05, 1.0):
        np.testing.assert_allclose(mixture.logp(x, sigma), logp(x, sigma), rtol=1e-6)
        np.testing.assert_allclose(mixture.pdf(x, sigma), np.exp(logp(x, sigma)), rtol=1e-5)
        h = 1e-5
        steps = [(logp(x + h * e, sigma) - logp(x - h * e, sigma)) / (2 * h) for e in np.eye(2)]
        np.testing.assert_allclose(mixture.score(x, sigma), np.stack(steps, 1), rtol=1e-4, atol=1e-4)
    levels = torch.tensor([0.05] * 3 + [1.0] * 4)
    mixed = mixture.logp(torch.tensor(x), levels)
    torch.testing.assert_close(mixed[:3], mixture.logp(x[:3], 0.05))
    torch.testing.assert_close(mixed[3:], mixture.logp(x[3:], 1.0))
    assert mixture.score(torch.zeros(3, 4, 2), 0.5).shape == (3, 4, 2) and mixture.logp(torch.zeros(0, 2)).shape == (0,)


def test_finite_far_from_the_tree():
    """float32 exponentials without log-sum-exp are NaN on three quarters of this grid."""
    grid = torch.cartesian_prod(*[torch.linspace(-1.5, 1.5, 31)] * 2)
    mixture = ground_truth("A")
    assert mixture.logp(grid).isfinite().all() and mixture.score(grid).isfinite().all()
    assert mixture.pdf(grid).lt(1e-30).sum() > 400
    assert mixture.logp(torch.tensor([[50.0, 50.0]]), 0.1).isfinite().all()


def test_exact_denoiser_samples_the_tree():
    mixture = ground_truth("A")
    start = mixture.sample((400,), 5.0, torch.Generator().manual_seed(1)).reshape(400, 2, 1, 1) / 5
    net = mixture.denoiser()
    images = heun(net, start, num_steps=32, sigma_min=0.002, sigma_max=5)
    assert classification_score(images) > 0.97
    x, sigma = start[:3], torch.tensor([0.1, 1.0, 3.0])
    points = x.flatten(1)
    expected = points + sigma[:, None] ** 2 * mixture.score(points, sigma)
    torch.testing.assert_close(net(x, sigma).flatten(1), expected)
    torch.testing.assert_close(net(x, 1.0)[1], net(x, sigma)[1])


@pytest.mark.parametrize("n, published", [(512, 0.993), (1024, 0.989), (4096, 0.980)])
def test_scores_of_the_truth_itself(n, published):
    mixture, g = ground_truth("A"), torch.Generator().manual_seed(0)
    samples = [mixture.sample((n,), generator=g) for _ in range(3)]
    assert np.mean([mandala_score(s) for s in samples]) == pytest.approx(published, abs=0.012)
    assert np.mean([classification_score(s) for s in samples]) == pytest.approx(0.993, abs=0.006)


def test_scores_count_cells_and_samples():
    on, off = torch.tensor([0.02134411, 0.06333431]), torch.tensor([-1.0, 1.0])  # a component's centre; empty land
    here = [on, on + 1e-4, off, off + 1e-4, off + 2e-4, off + 0.3]
    samples = torch.stack([*here, torch.tensor([3.0, 0.0]), torch.tensor([math.nan, 0.0])])
    assert mandala_score(samples) == pytest.approx(1 / 3)  # one cell hit, two missed; outside and NaN dropped
    assert classification_score(samples) == pytest.approx(2 / 8)  # of all samples
    assert mandala_score(samples.reshape(-1, 2, 1, 1).numpy()) == mandala_score(samples)
    assert mandala_score(torch.full((4, 2), 9.0)) == classification_score(torch.full((4, 2), 9.0)) == 0
    # A cell with hits and misses counts as hit: along a thin outer branch, the level line crosses cells.
    mixture = ground_truth("A", dtype=torch.float64)
    lower = np.array(tree.mixture.ORIGIN) - 0.03 * 101 / 2
    fine = lower + 0.03 * (np.floor((on.numpy() - lower) / 0.03) + np.random.RandomState(0).rand(2000, 2) * 0.999)
    hits = mixture.logp(fine) >= -2.12
    assert hits.any()
    assert mandala_score(fine) == 1 and classification_score(fine) == pytest.approx(float(hits.double().mean()))
    assert mandala_score(torch.tensor([[-1.5119, 0.0], [1.5179, 0.0], [-1.5121, 0.0]])) == 0


def test_user_errors():
    with pytest.raises(ValueError, match="classes='C'"):
        ground_truth("C")
    with pytest.raises(ValueError, match="min_depth=7"):
        ground_truth("A", min_depth=7)
    with pytest.raises(ValueError, match="points"):
        mandala_score(torch.zeros(5, 3))
