"""Energy-based experiment: normalisation, sampling and errors against scipy and independent quadrature."""

import json
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from small_runs import one_line, run

from simulations import plot_ebm, run_ebm
from simulations.ebm import EBM, EbmConfig, Truth, quadrature, run_cell
from simulations.mle import Rule

TINY = Rule(steps=(40,), batches=(64,), eval_every=10)


def wild_model(K, D, W):
    """Weights of a trained size: kinks and a few units of energy."""
    torch.manual_seed(0)
    model = EBM(K, D, de=2, W=W, L=3)
    for layer in model.mlp.layers:
        layer.weight.data.mul_(1.6)
        layer.bias.data.uniform_(-0.5, 0.5)
    return model


def test_density_of_a_network_integrates_to_one_1d():
    model = wild_model(2, 1, 16)
    for source in range(2):
        density = lambda x, k=source: math.exp(model.log_density(np.array([[x]]), k, panels=512)[0])
        x = np.linspace(0, 1, 400_001)
        values = np.exp(model.log_density(x[:, None], source, panels=2048))
        assert values.max() / values.min() > 1.5
        assert abs(scipy.integrate.trapezoid(values, x) - 1) < 1e-6
        assert density(0.3) == pytest.approx(values[120_000], rel=1e-5)


def test_density_of_a_network_integrates_to_one_2d():
    model = wild_model(1, 2, 8)
    points, weights = quadrature(2, 700, 3)  # another rule, finer than the one that normalised
    assert abs(np.exp(model.log_density(points, 0, panels=512)) @ weights - 1) < 1e-6


def test_objective_is_minus_the_mean_log_density():
    model = wild_model(3, 2, 8)
    rng = np.random.default_rng(0)
    x, source = rng.random([50, 2]).astype(np.float32), rng.integers(0, 3, 50)
    want = -np.mean([model.log_density(x[i : i + 1].astype(float), source[i], panels=100)[0] for i in range(50)])
    assert model.nll(torch.from_numpy(x), torch.from_numpy(source)).item() == pytest.approx(want, abs=2e-3)


def test_quadrature_is_exact_for_polynomials():
    points, weights = quadrature(2, 3, 2)
    assert weights.sum() == pytest.approx(1)
    assert (points[:, 0] ** 3 * points[:, 1] ** 2) @ weights == pytest.approx(1 / 12)


@pytest.mark.parametrize("family", ["path", "independent"])
def test_truth_is_a_density(family):
    truth = Truth(EbmConfig(K=2, D=1, family=family, sim=0.3), 0)
    for k in range(2):
        mass = scipy.integrate.quad(lambda x, k=k: math.exp(truth.log_density(np.array([[x]]), k)[0]), 0, 1)[0]
        assert mass == pytest.approx(1, abs=1e-8)
    plane = Truth(EbmConfig(K=2, D=2, family=family), 1)
    x = (np.arange(800) + 0.5) / 800
    grid = np.stack(np.meshgrid(x, x), axis=-1).reshape(-1, 2)
    assert np.exp(plane.log_density(grid, 1)).mean() == pytest.approx(1, abs=1e-4)


def test_similarity_one_makes_sources_equal():
    truth = Truth(EbmConfig(K=3, D=2, sim=1.0), 0)
    x = np.random.default_rng(0).random([20, 2])
    np.testing.assert_allclose(truth.log_density(x, 0), truth.log_density(x, 2), atol=1e-12)


def test_samples_follow_the_density_and_nest():
    truth = Truth(EbmConfig(K=2, D=1, sim=0.0), 3)
    x, sources = truth.sample(6000, 3)
    grid = np.linspace(0, 1, 20_001)
    for k in range(2):
        cdf = scipy.integrate.cumulative_trapezoid(np.exp(truth.log_density(grid[:, None], k)), grid, initial=0)
        assert scipy.stats.kstest(x[sources == k, 0], lambda v, c=cdf: np.interp(v, grid, c)).pvalue > 1e-3
    np.testing.assert_array_equal(truth.sample(50, 3)[0], x[:50])


def test_cell_learns_and_is_reproducible():
    config = EbmConfig(K=2, n=1000, D=1, W=16)
    rule = Rule(steps=(100,), batches=(200,))
    outcome = run_cell(config, rule, 0)
    assert outcome.multi < 0.6 * outcome.uniform
    assert outcome.single < 0.6 * outcome.uniform
    assert run_cell(config, rule, 0) == outcome


@pytest.mark.parametrize("D", [1, 2])
def test_first_layer_bends_inside_the_data(D):
    """Every unit switches within the cube of data and label embedding."""
    first = EBM(3, D, de=2, W=50, L=3).mlp.layers[0]
    low, high = first.weight.clamp(max=0).sum(1) + first.bias, first.weight.clamp(min=0).sum(1) + first.bias
    assert torch.all((low < 0) & (high > 0))


def test_no_bad_local_optimum():
    """With all kinks at the origin, this cell ends at 0.42, worse than a histogram."""
    outcome = run_cell(EbmConfig(K=1, n=1000), Rule(steps=(300,), batches=(300,)), 2)
    assert outcome.single < 0.08 < outcome.histogram


def test_sources_without_data_are_counted():
    outcome = run_cell(EbmConfig(K=4, n=1, D=1, W=8, L=2), TINY, 0)
    assert outcome.empty == 3
    assert outcome.single >= 0.75
    assert all(math.isfinite(v) for v in vars(outcome).values())
    alone = run_cell(EbmConfig(K=1, n=9, D=1, W=8, L=2), TINY, 0)
    assert alone.single == alone.multi


@pytest.mark.parametrize("bad", [{"K": 0}, {"D": 3}, {"sim": -1}, {"family": "x"}, {"scale": -1.0}, {"modes": 0}])
def test_bad_configuration(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        EbmConfig(**bad)


def test_command_and_figure(tmp_path):
    done = run(run_ebm.main, "--budget=smoke", "--steps=4", "--seeds=0,1", "--W=6", f"--results-dir={tmp_path}")
    assert len(json.loads(done.stdout)["files"]) == 6
    run(plot_ebm.main, f"--results-dir={tmp_path}", f"--figures-dir={tmp_path}", "--dpi=60")
    assert (tmp_path / "ebm.png").stat().st_size > 5000


@pytest.mark.parametrize("options", [["--D=3"], ["--sim-values=2"], ["--tag=D"], ["--batches=0"]])
def test_command_refuses(options, tmp_path):
    one_line(run_ebm.main, "--budget=smoke", *options, f"--results-dir={tmp_path}")
    assert not list(tmp_path.iterdir())
