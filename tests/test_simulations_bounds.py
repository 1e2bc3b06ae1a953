"""Bounds against numbers and identities of the theory paper, quadrature, and simulation."""

import json
import math

import numpy as np
import pytest
import scipy.integrate
from small_runs import one_line, run

from simulations import bounds, gaussian
from simulations.bounds import arm_bound, ebm_bound, gaussian_bound, general_bound
from simulations.configs import GaussianConfig
from simulations.run_bounds import main


def test_paper_gaussian_defaults_are_vacuous():
    bound = gaussian_bound(K=5, n=500, d=10, d1=5, B=5, delta=0.05)
    assert bound.multi.published == pytest.approx(2.44, abs=0.005)
    assert bound.single.published == pytest.approx(3.14, abs=0.005)
    assert bound.multi.sharp == pytest.approx(1.15, abs=0.005)
    assert bound.multi.order == pytest.approx(math.sqrt(30 / 500))
    assert bound.multi.vacuous
    assert bound.single.vacuous_published
    assert bound["multi"]["sharp"] == bound.multi_sharp == bound.multi.sharp
    with pytest.raises(KeyError):
        bound["nothing"]


@pytest.mark.parametrize(("arm", "n"), [("multi", 3500), ("single", 6062)])
def test_first_n_that_is_not_vacuous(arm, n):
    value = lambda m: gaussian_bound(5, m, 10, 5, 5, 0.05)[arm].published
    assert bounds.solve_n(1.0, value) == n
    assert value(n) <= 1.0 < value(n - 1)


def test_general_bound_forms():
    bound = general_bound(log_n=7.0, n=1000, delta=0.1)
    q = 7.0 - math.log(0.1)
    assert bound.multi.published == pytest.approx(3 * math.sqrt(q / 1000))
    # At eps = 1/n, Eq. 12 behaves like sqrt(2 (1 + q) / n).
    assert bound.multi.sharp == pytest.approx(math.sqrt(2 * (1 + q) / 1000), rel=1e-3)
    assert bound.single == bound.multi
    assert bound.ratio == 1
    looser = general_bound(7.0, 1000, 0.1, log_n_single=14.0, eps=0.1)
    assert looser.single.sharp > looser.multi.sharp > bound.multi.sharp


def test_sharp_is_below_published():
    for n in (10, 10**3, 10**8):
        for bound in (gaussian_bound(3, n, 6, 2, 3, 0.01), ebm_bound(3, n, 4, 3, 16, 300, 1, 0.01)):
            assert bound.multi.sharp < bound.multi.published
            assert bound.single.sharp < bound.single.published


@pytest.mark.parametrize("K", [1, 2, 7, 1000])
def test_ratio_identity_of_all_families(K):
    arm = dict(D=10, M=2, de=64, L=5, W=64, S=13314, B=1)
    families = [
        gaussian_bound(K, 10**4, 10, 3, K, 0.05),
        arm_bound(K, 10**4, **arm, delta=0.05),
        ebm_bound(K, 10**4, 8, 3, 32, 1500, 1, 0.05),
    ]
    for bound in families:
        counted = math.sqrt(bound.multi.params / bound.single.params)
        assert bound.ratio == pytest.approx(counted, rel=1e-12)
        assert math.sqrt(1 - (K - 1) / K * bound.beta_sim) == pytest.approx(counted, rel=1e-12)
        assert bound.multi.sharp <= bound.single.sharp


def test_ratio_limits():
    assert gaussian_bound(9, 100, 4, 0, 9, 0.1).ratio == pytest.approx(1 / 3)
    assert gaussian_bound(9, 100, 4, 4, 9, 0.1).ratio == 1


@pytest.mark.parametrize(("K", "ratio"), [(3, 0.580), (5, 0.451), (7, 0.383), (10, 0.323)])
def test_arm_prediction_for_the_paper_network(K, ratio):
    bound = arm_bound(K, 30000, 10, 2, 64, 5, 64, 13314, 1, 0.05)
    assert bound.beta_sim == pytest.approx(0.9955, abs=5e-5)
    assert bound.ratio == pytest.approx(ratio, abs=5e-4)


def test_arm_and_ebm_logarithms():
    arm = arm_bound(2, 1000, D=4, M=3, de=5, L=2, W=6, S=70, B=2.0, delta=0.1)
    printed = math.log(24 * math.e * 4 * 1000 * 5 * 2.0**4 * 7**2)
    assert arm.ell_published == pytest.approx(printed)
    assert arm.ell == pytest.approx(printed + math.log(5))
    assert arm.multi.params == 70 + 4 + (4 + 3 + 2) * 5
    assert arm.single.params == 2 * (70 + 4 + (4 + 3 + 1) * 5)
    assert arm_bound(2, 1000, 4, 3, 5, 2, 6, 70, 2.0, 0.1, corrected=False).ell == pytest.approx(printed)
    ebm = ebm_bound(2, 1000, de=5, L=2, W=7, S=70, B=0.5, delta=0.1)
    assert ebm.ell == ebm.ell_published == pytest.approx(math.log(12 * math.e * 1000 * 3 * 8**2))
    assert (ebm.multi.params, ebm.single.params) == (80, 150)


def test_sparsity_patterns_are_counted_once_per_network():
    dense = ebm_bound(3, 1000, 2, 2, 8, 20, 1, 0.1)
    sparse = ebm_bound(3, 1000, 2, 2, 8, 20, 1, 0.1, positions=50)
    extra = math.log(math.comb(50, 20))
    assert sparse.multi.log_n == pytest.approx(dense.multi.log_n + extra)
    assert sparse.single.log_n == pytest.approx(dense.single.log_n + 3 * extra)
    assert sparse.multi.published == dense.multi.published


@pytest.mark.parametrize(("d", "threshold"), [(3, 0.887), (5, 0.477), (10, 0.218), (50, 0.0407), (100, 0.0202)])
def test_printed_gaussian_grid_is_repaired_where_it_fails(d, threshold):
    fine = gaussian_bound(2, 10, d, 1, 2, 0.1, eps=0.99 * threshold)
    coarse = gaussian_bound(2, 10, d, 1, 2, 0.1, eps=min(1.0, 1.02 * threshold))
    assert fine.ell == pytest.approx(math.log(2 * (1 + d) * 2 / fine.eps + 1))
    assert coarse.ell > math.log(2 * (1 + d) * 2 / coarse.eps + 1)
    assert gaussian_bound(2, 10, d, 1, 2, 0.1, eps=coarse.eps, corrected=False).ell < coarse.ell


@pytest.mark.parametrize("d", [1, 4, 30])
def test_repaired_gaussian_bracket_is_a_bracket(d):
    """Above every density of its cell, and at most eps more mass, by quadrature of one factor."""
    eps, B = 0.7, 2.0
    step = 2 * B / math.expm1(gaussian_bound(1, 5, d, d, B, 0.1, eps=eps).ell)
    upper = lambda x: math.exp(-(1 - step) / 2 * x**2 + (1 - step) * step / 2) / math.sqrt(2 * math.pi)
    x = np.linspace(-30, 30, 20001)
    for shift in (-step, 0.3 * step, step):
        density = np.exp(-((x - shift) ** 2) / 2) / math.sqrt(2 * math.pi)
        assert np.all(np.vectorize(upper)(x) >= density * (1 - 1e-12))
    mass = scipy.integrate.quad(upper, -40, 40)[0]
    assert mass**d - 1 <= eps * (1 + 1e-6)


def test_bounds_hold_in_simulation():
    """delta = 0.5 and a large n: no bound is vacuous, and failures are rarer than allowed."""
    config = GaussianConfig(K=3, n=2000, D=2, sim=0.5, test_size=1)
    bound = gaussian_bound(3, 2000, 2, config.d1, 3, 0.5)
    assert not bound.single.vacuous
    fits = [gaussian.simulate(config, seed) for seed in range(100)]
    assert np.mean([f.tv_multi <= bound.multi.sharp for f in fits]) >= 0.5
    assert np.mean([f.tv_single <= bound.single.sharp for f in fits]) >= 0.5


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: gaussian_bound(0, 10, 2, 1, 1, 0.1), "K"),
        (lambda: gaussian_bound(1, 0, 2, 1, 1, 0.1), "n"),
        (lambda: gaussian_bound(1, 10, 2, 3, 1, 0.1), "d1"),
        (lambda: gaussian_bound(1, 10, 2, 1, 0, 0.1), "B"),
        (lambda: gaussian_bound(1, 10, 2, 1, 1, 0.6), "delta"),
        (lambda: gaussian_bound(1, 10, 2, 1, 1, 0.1, eps=2), "eps"),
        (lambda: general_bound(-1, 10, 0.1), "log_n"),
        (lambda: general_bound(float("nan"), 10, 0.1), "log_n"),
        (lambda: arm_bound(1, 10, 10, 2, 4, 2, 9, 30, 1, 0.1), "W"),
        (lambda: ebm_bound(1, 10, 4, 2, 5, 30, 1, 0.1, D=2), "W"),
        (lambda: ebm_bound(1, 10, 4, 2, 5, 30, 1, 0.1, positions=3), "positions"),
        (lambda: bounds.solve_n(0, lambda n: 1 / n), "target"),
        (lambda: bounds.solve_n(0.1, lambda n: 1.0), "target"),
    ],
)
def test_bad_arguments_name_the_culprit(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_command_prints_bounds(tmp_path):
    report = json.loads(run(main, "--K=5", "--n=500", f"--out={tmp_path / 'b.json'}").stdout)
    assert report["multi"]["published"] == pytest.approx(2.44, abs=0.005)
    assert report["expected_tv"]["single"] == pytest.approx(0.122851, abs=1e-6)
    assert report["vacuous"]["multi"]["sharp"] is True
    assert json.loads((tmp_path / "b.json").read_text()) == report
    result = run(main, "--model=arm", "--K=10", "--n=30000", "--B=1", "--d=3")
    assert json.loads(result.stdout)["ratio"] == pytest.approx(0.323, abs=5e-4)
    assert "--d" in result.stderr


def test_command_solves_for_n():
    report = json.loads(run(main, "--target-tv=0.1", "--solve-for=n").stdout)
    for arm in ("multi", "single"):
        for form in ("sharp", "published"):
            n = report["n"][arm][form]
            at = lambda m, a=arm, f=form: gaussian_bound(5, m, 10, 5, 5, 0.05)[a][f]
            assert at(n) <= 0.1 < at(n - 1)
        assert report["n"][arm]["expected_tv"] < report["n"][arm]["sharp"]
    general = json.loads(run(main, "--model=general", "--log-n=10", "--target-tv=0.3", "--solve-for=n").stdout)
    assert general["n"]["multi"]["published"] == math.ceil((10 + math.log(20)) * 100)


@pytest.mark.parametrize(
    "options",
    [
        ["--target-tv=0.1"],
        ["--solve-for=n"],
        ["--solve-for=n", "--target-tv=0.1", "--n=5"],
        ["--model=general"],
        ["--model=x"],
        ["--d1=11"],
        ["--d1=1", "--beta=0.5"],
        ["--delta=0.7"],
        ["--model=arm", "--W=3"],
        ["--K=0"],
    ],
)
def test_command_refuses(options):
    one_line(main, *options)
