"""Gaussian experiment against the published numbers, plain torch.distributions, scipy and Monte Carlo."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from small_runs import ROOT, one_line, python

from metrics import table
from simulations import gaussian
from simulations.configs import GaussianConfig
from simulations.gaussian_exact import expected_tv, expected_tv_given_counts, expected_tv_student, tv_unit_gaussians
from simulations.run_gaussian import main

SCRIPTS = Path(gaussian.__file__).parent

# The paper's released result files: bound and empirical TV of single and multi, means over its five seeds.
PUBLISHED = {
    "K": """1 0.141421 0.141421 0.052748 0.052748
            3 0.244949 0.200000 0.092600 0.072008
            5 0.316228 0.244949 0.123970 0.096245
            10 0.447214 0.331662 0.174992 0.128716
            15 0.547723 0.400000 0.209824 0.154412""",
    "n": """100 0.707107 0.547723 0.278745 0.203748
            300 0.408248 0.316228 0.170272 0.128545
            500 0.316228 0.244949 0.123970 0.096245
            1000 0.223607 0.173205 0.091473 0.071754
            5000 0.100000 0.077460 0.038494 0.029033""",
    "sim": """0 0.316228 0.316228 0.123970 0.123970
              0.3 0.316228 0.275681 0.123970 0.106757
              0.5 0.316228 0.244949 0.123970 0.096245
              0.7 0.316228 0.209762 0.123970 0.081307
              1.0 0.316228 0.141421 0.123970 0.048970""",
}
# Expected TV of single and multi for the same cells, from 40000 simulated fits and quadrature.
EXPECTED = {
    (1, 500, 0.5): (0.054978, 0.054978),
    (15, 500, 0.5): (0.212407, 0.153210),
    (5, 100, 0.5): (0.272893, 0.210782),
    (5, 5000, 0.5): (0.038905, 0.029844),
    (5, 500, 0.3): (0.122851, 0.106616),
    (5, 500, 1.0): (0.122851, 0.054978),
}


def plain(K, n, D, d_sim, seed, test_size):
    """The experiment as the paper's text states it, one MultivariateNormal per test point; all sources non-empty."""
    torch.manual_seed(seed)
    means = torch.zeros(K, D)
    means[:, : D - d_sim] = torch.arange(1.0, K + 1)[:, None]

    def draw(size):
        labels = torch.multinomial(torch.ones(K) / K, size, replacement=True)
        x = torch.zeros(size, D)
        for k in range(K):
            at = labels == k
            if at.any():
                x[at] = torch.randn(int(at.sum()), D) + means[k]
        return x, labels

    x, y = draw(n)
    single = torch.stack([x[y == k].mean(0) for k in range(K)])
    multi = single.clone()
    if d_sim:
        multi[:, D - d_sim :] = x[:, D - d_sim :].mean(0)
    x, y = draw(test_size)
    density = lambda mean, point: torch.distributions.MultivariateNormal(mean, torch.eye(D)).log_prob(point).exp()
    result = []
    for fit in (single, multi):
        ratio = [density(fit[k], p) / density(means[k], p) for p, k in zip(x, y, strict=True)]
        result.append(0.5 * (torch.stack(ratio) - 1).abs().mean().item())
    return result


@pytest.mark.parametrize("tag", PUBLISHED)
def test_published_tables(tag):
    rows = gaussian.summary_rows(gaussian.sweep(tag))
    for row, line in zip(rows, PUBLISHED[tag].splitlines(), strict=True):
        value, *numbers = map(float, line.split())
        assert row[tag] == value
        names = [f"{what} of {arm}" for what in ("theoretical TV bound", "empirical TV") for arm in ("single", "multi")]
        np.testing.assert_allclose([row[name] for name in names], numbers, rtol=0, atol=5.1e-7)
        assert row["advantage (abs)"] == pytest.approx(numbers[2] - numbers[3], abs=1.1e-6)
        assert row["seed"] == 5662.4


@pytest.mark.parametrize(
    ("K", "n", "D", "sim", "d_sim", "seed"),
    [
        (3, 60, 4, 0.5, 2, 7),
        (2, 33, 1, 0.4, 0, 1),
        (4, 90, 7, 0.5, 3, 11),
        (1, 5, 3, 1.0, 3, 2),
        (5, 47, 10, 0.0, 0, 3),
    ],
)
def test_equals_plain_distributions_loop(K, n, D, sim, d_sim, seed):
    outcome = gaussian.simulate(GaussianConfig(K, n, D, sim, test_size=41), seed)
    want = plain(K, n, D, d_sim, seed, 41)
    np.testing.assert_allclose([outcome.empirical_single, outcome.empirical_multi], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("D", [1, 3, 16, 50])
def test_streaming_in_small_blocks_changes_nothing(D):
    config = GaussianConfig(K=3, n=1201, D=D, sim=0.5, test_size=333)
    whole = gaussian.simulate(config, 5)
    for block in (1, 16 * D, 100 * D, 700 * D):
        pieces = gaussian.simulate(config, 5, block_elements=block)
        np.testing.assert_allclose(list(vars(pieces).values()), list(vars(whole).values()), rtol=1e-9)


def test_high_dimension_is_finite():
    outcome = gaussian.simulate(GaussianConfig(K=4, n=40, D=1000, sim=0.5, test_size=50), 0)
    assert all(0 <= v <= 1.5 for v in vars(outcome).values())
    assert outcome.tv_single > 0.99  # |delta| is about 10


def test_seed_leaves_global_generator_alone():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    gaussian.simulate(GaussianConfig(), 3)
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("distance", [0.0, 1e-3, 0.7, 4.0])
def test_tv_closed_form(distance):
    pdf = scipy.stats.norm.pdf
    gap = lambda x: 0.5 * abs(pdf(x) - pdf(x - distance))
    want = 2 * scipy.integrate.quad(gap, -15, distance / 2, epsabs=1e-13, limit=200)[0]  # symmetric about the middle
    assert tv_unit_gaussians(distance) == pytest.approx(want, abs=1e-10)


@pytest.mark.parametrize("d", [1, 2, 10, 200])
@pytest.mark.parametrize("count", [1, 20, 10**6])
def test_expected_tv_equals_student_t(d, count):
    want = 2 * scipy.stats.t.cdf(math.sqrt(d / (4 * count)), d) - 1
    assert expected_tv_student(count, d) == pytest.approx(want, rel=1e-9)
    # The quadrature must meet it at both ends.
    assert float(expected_tv_given_counts(count, 10**7, d, d)) == pytest.approx(want, rel=1e-9)
    assert float(expected_tv_given_counts(3, count, d, 0)) == pytest.approx(want, rel=1e-9)


def test_expected_tv_quadrature_against_scipy():
    d, d1, count, n = 7, 3, 9, 40
    f = lambda t: (
        (1 + 1 / (4 * count * math.sin(t) ** 2)) ** (-d1 / 2) * (1 + 1 / (4 * n * math.sin(t) ** 2)) ** (-(d - d1) / 2)
    )
    want = 1 - 2 / math.pi * scipy.integrate.quad(f, 1e-12, math.pi / 2, epsabs=1e-12)[0]
    assert float(expected_tv_given_counts(count, n, d, d1)) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("cell", EXPECTED)
def test_expected_tv_table(cell):
    K, n, sim = cell
    np.testing.assert_allclose(expected_tv(K, n, 10, 10 - round(sim * 10)), EXPECTED[cell], rtol=0, atol=1.1e-6)


@pytest.mark.parametrize(("K", "n"), [(2, 60_000), (40, 10**6)])
def test_expected_tv_wide_window(K, n):
    """Many possible counts: the interpolated average against the sum over all of them."""
    counts = np.arange(1, n + 1)
    pmf = scipy.stats.binom.pmf(counts, n, 1 / K)
    want = np.sum(pmf * (2 * scipy.stats.t.cdf(np.sqrt(5 / (4 * counts)), 5) - 1))
    assert expected_tv(K, n, 5, 2)[0] == pytest.approx(want, rel=1e-7)


@pytest.mark.parametrize("cell", [(3, 2, 30, 0.5), (5, 10, 60, 0.3), (4, 1, 3, 0.0), (6, 3, 4, 0.4), (3, 4, 2, 1.0)])
def test_expected_tv_against_simulated_fits(cell):
    """2000 fits, including K > n with sources that have no data."""
    K, D, n, sim = cell
    config = GaussianConfig(K, n, D, sim, test_size=1)
    fits = [gaussian.simulate(config, seed) for seed in range(2000)]
    for index, name in enumerate(("tv_single", "tv_multi")):
        mean, error = table.mean_and_error(getattr(f, name) for f in fits)
        assert abs(mean - expected_tv(K, n, D, config.d1)[index]) < 3 * error + 1e-12, name


@pytest.mark.parametrize("cell", [(1, 1, 20, 0.0), (3, 5, 40, 0.5), (5, 10, 300, 0.7), (2, 60, 500, 1.0)])
def test_exact_tv_against_monte_carlo(cell):
    """The exact error of a fit is the mean of the 0.5 |ratio - 1| that the published estimate averages."""
    K, D, n, sim = cell
    size = 20_000
    outcome = gaussian.simulate(GaussianConfig(K, n, D, sim, test_size=size), 4)
    for arm in ("single", "multi"):
        exact, estimate = getattr(outcome, f"tv_{arm}"), getattr(outcome, f"empirical_{arm}")
        square = 8 * scipy.special.erfinv(exact) ** 2  # |delta|^2 of one source with this TV
        error = math.sqrt((math.expm1(1.5 * square) / 4 - exact**2) / size)  # 1.5: sources differ
        assert abs(exact - estimate) < 3 * error, arm


def test_invariants():
    result = gaussian.sweep("sim", seeds=(1, 2))
    single = result.array("tv_single")
    np.testing.assert_allclose(single, np.broadcast_to(single[:1], single.shape), atol=1e-6)  # noise is common
    np.testing.assert_array_equal(result.array("tv_multi")[0], single[0])  # sim = 0
    one = gaussian.simulate(GaussianConfig(K=1, sim=0.3), 9)
    assert one.tv_single == pytest.approx(one.tv_multi, abs=1e-12)


def test_sources_without_data_are_counted():
    empty = gaussian.simulate(GaussianConfig(K=10, n=2, D=3, sim=0.4), 0)
    assert empty.empty_single == empty.empty_multi == 8 + (empty.empty_single == 9)
    assert empty.tv_single >= 0.8  # each of them counts as TV = 1
    shared = gaussian.simulate(GaussianConfig(K=10, n=2, D=3, sim=1.0), 0)
    assert shared.empty_multi == 0  # the pooled mean serves every source
    assert shared.tv_multi < 1


@pytest.mark.parametrize(
    ("sim", "D", "want"), [(0.29, 100, 29), (0.57, 100, 57), (0.58, 50, 29), (0.55, 10, 5), (1, 1, 1)]
)
def test_shared_dimensions_are_exact_decimals(sim, D, want):
    assert GaussianConfig(D=D, sim=sim).d1 == D - want


@pytest.mark.parametrize("bad", [{"K": 0}, {"n": 0}, {"D": 0}, {"sim": 1.1}, {"sim": -0.1}, {"test_size": 0}])
def test_bad_configuration(bad):
    with pytest.raises(ValueError, match="--" + next(iter(bad)).replace("_", "-")):
        GaussianConfig(**bad)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_command_writes_both_files(tmp_path):
    """As a user types it, from another folder, with a source that has no data."""
    options = ["--tag=n", "--n-values=4,50", "--K=6", "--D=3", "--num-seeds=3", "--results-dir=r"]
    done = python(ROOT / "simulations/run_gaussian.py", *options, cwd=tmp_path)
    assert "TV = 1" in done.stderr
    files = json.loads(done.stdout)["files"]
    assert [Path(f).name for f in files] == ["results_n.csv", "results_n_seeds.csv"]
    rows, seeds = read(tmp_path / "r/n/results_n.csv"), read(tmp_path / "r/n/results_n_seeds.csv")
    head = "n,seed,K,D,sim,theoretical TV bound of single,theoretical TV bound of multi,theoretical advantage (abs)"
    head += ",empirical TV of single,empirical TV of multi,advantage (abs)"
    assert list(rows[0])[:11] == head.split(",")
    assert len(rows) == 2
    assert len(seeds) == 6
    assert all(math.isfinite(float(v)) for row in rows + seeds for v in row.values())
    assert int(rows[0]["sources without estimate (single)"]) >= 6
    mean = np.mean([float(r["exact TV of multi"]) for r in seeds[3:]])
    assert float(rows[1]["exact TV of multi"]) == pytest.approx(mean)


@pytest.mark.parametrize(
    "options",
    [
        ["--tag=x"],
        ["--tag=K", "--K-values=0"],
        ["--tag=K", "--seeds=1", "--num-seeds=2"],
        ["--tag=all", "--values=1"],
        ["--tag=K", "--values=1.5"],
        ["--tag=K", "--B=3"],
        ["--tag=sim", "--sim-values=2"],
        ["--tag=n", "--seeds=a"],
        ["--tag=n", "--seeds=-1"],
    ],
)
def test_command_refuses(options, tmp_path):
    one_line(main, *options, f"--results-dir={tmp_path}")
    assert not list(tmp_path.iterdir())


def test_non_finite_values_are_never_written(tmp_path):
    with pytest.raises(ValueError, match="refusing"):
        table.write_csv(tmp_path / "a.csv", [{"x": float("nan")}])
    assert not list(tmp_path.iterdir())
