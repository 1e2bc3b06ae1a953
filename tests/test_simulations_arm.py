"""Autoregressive experiment: the network against a plain reimplementation, exact errors against brute force."""

import csv
import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from small_runs import one_line, run

from metrics.table import read_csv
from simulations import plot_arm, run_arm
from simulations.arm import ARM, ArmConfig, Prefixes, ground_truth, run_cell, sample, tv
from simulations.mle import MLP, Outcome, Rule, fit

TINY = Rule(steps=(60,), batches=(64,), eval_every=10)


def plain_conditional(model, source, known):
    """p(next token | known tokens, source) as the paper states it, in numpy."""
    p = {k: v.detach().double().numpy() for k, v in model.named_parameters()}
    rows = [p["labels"][source]] + [p["vocabulary"][t] for t in known]
    v = [1 / (1 + math.exp(-(p["encoder"][d] @ row + p["offset"][d]))) for d, row in enumerate(rows)]
    h = np.array(v + [0.0] * (model.D - len(v)))
    layers = len(model.mlp.layers)
    for i in range(layers):
        h = p[f"mlp.layers.{i}.weight"] @ h + p[f"mlp.layers.{i}.bias"]
        h = np.maximum(h, 0) if i < layers - 1 else h
    return np.exp(h) / np.exp(h).sum()


@pytest.mark.parametrize(("K", "D", "M", "L"), [(2, 4, 2, 3), (3, 3, 3, 1), (1, 1, 2, 2)])
def test_table_is_the_product_of_the_papers_conditionals(K, D, M, L):
    torch.manual_seed(0)
    model = ARM(K, D, M, de=5, W=7, L=L)
    for source in range(K):
        table = model.table(source, rows=4)
        assert abs(table.sum() - 1) < 1e-12
        for code, tokens in enumerate(itertools.product(range(M), repeat=D)):
            want = math.prod(plain_conditional(model, source, tokens[:d])[tokens[d]] for d in range(D))
            assert table[code] == pytest.approx(want, rel=1e-5)


def test_conditionals_sum_to_one():
    model = ARM(2, 6)
    tokens = torch.randint(0, 2, [50, 5])
    log_p = model(torch.randint(0, 2, [50]), tokens, torch.randint(0, 6, [50]))
    assert (log_p.double().exp().sum(1) - 1).abs().max() < 1e-6


def test_minibatch_objective_is_the_mean_over_samples():
    torch.manual_seed(1)
    model = ARM(2, 4, 3, de=4, W=6, L=2)
    rng = np.random.default_rng(0)
    codes, sources = rng.integers(0, 81, 40), rng.integers(0, 2, 40)
    data = Prefixes(codes, sources, 2, 4, 3)
    pick = torch.tensor([3, 3, 17, 39, 0])
    tables = [model.table(k) for k in range(2)]
    want = -np.mean([math.log(tables[sources[i]][codes[i]]) for i in pick.tolist()])
    assert data.nll(model, pick).item() == pytest.approx(want, rel=1e-5)


def test_dense_size_of_the_paper_network():
    assert MLP(10, 2, 64, 5).num_params == 13314


def test_projection_keeps_the_parameter_space():
    model = ARM(2, 4)
    for p in model.parameters():
        p.data.mul_(50).sub_(0.3)
    with torch.no_grad():
        model.project(0.8)
    assert all(p.abs().max() <= 0.8 for p in model.mlp.parameters())
    assert model.encoder.abs().max() <= 0.8
    for embedding in (model.labels, model.vocabulary):
        assert embedding.min() >= 0
        assert embedding.max() <= 1


@pytest.mark.parametrize("family", ["path", "independent"])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_ground_truth(family, order):
    config = ArmConfig(K=3, D=5, M=2, family=family, order=order, sim=0.5)
    tables = ground_truth(config, 0)
    assert tables.shape == (3, 32)
    np.testing.assert_allclose(tables.sum(axis=1), 1, atol=1e-12)
    assert tv(tables[0], tables[1]) > 0.05
    same = ground_truth(ArmConfig(K=3, D=5, family=family, order=order, sim=1.0), 0)
    np.testing.assert_allclose(same[1:], np.broadcast_to(same[:1], (2, 32)))
    flat = ground_truth(ArmConfig(K=2, D=5, family=family, order=order, scale=0.0), 0)
    np.testing.assert_allclose(flat, 1 / 32)


def test_similarity_knob_orders_the_sources():
    gaps = []
    for sim in (0.0, 0.5, 0.9, 1.0):
        tables = [ground_truth(ArmConfig(K=2, D=6, sim=sim), seed) for seed in range(5)]
        gaps.append(np.mean([tv(*t) for t in tables]))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] == 0


def test_field_of_order_one_is_independent_tokens():
    p = ground_truth(ArmConfig(K=1, D=3, order=1), 4)[0].reshape(2, 2, 2)
    marginals = [p.sum(axis=tuple(a for a in range(3) if a != d)) for d in range(3)]
    np.testing.assert_allclose(p, np.einsum("i,j,k->ijk", *marginals), atol=1e-12)


def test_samples_follow_the_tables_and_nest():
    tables = ground_truth(ArmConfig(K=2, D=3), 1)
    codes, sources = sample(tables, 20_000, 5)
    for k in range(2):
        own = np.bincount(codes[sources == k], minlength=8)
        assert scipy.stats.chisquare(own, tables[k] * own.sum()).pvalue > 1e-3
    fewer = sample(tables, 100, 5)
    np.testing.assert_array_equal(fewer[0], codes[:100])
    np.testing.assert_array_equal(fewer[1], sources[:100])


def test_cell_learns_and_is_reproducible():
    config = ArmConfig(K=2, n=2000, D=4, sim=0.9, de=8, W=16, L=2)
    rule = Rule(steps=(100,), batches=(500,), lrs=(2e-2,), eval_every=50)
    outcome = run_cell(config, rule, 0)
    assert outcome.multi < 0.5 * outcome.uniform
    assert outcome.single < 0.5 * outcome.uniform
    assert outcome.empty == 0
    torch.manual_seed(123)  # the state of the global generator does not matter
    assert run_cell(config, rule, 0) == outcome


def test_one_source_means_one_network():
    outcome = run_cell(ArmConfig(K=1, n=50, D=3, de=4, W=8, L=2), TINY, 0)
    assert outcome.single == outcome.multi


def test_sources_without_data_are_counted():
    config = ArmConfig(K=5, n=2, D=2, de=4, W=8, L=2)
    outcome = run_cell(config, TINY, 0)
    assert outcome.empty >= 3
    assert outcome.single >= outcome.empty / 5
    assert all(math.isfinite(v) for v in vars(outcome).values())


def test_selection_takes_the_better_network():
    """With a useless learning rate on offer, the choice falls on the other one; training selection sees all data."""
    tables = ground_truth(ArmConfig(K=1, D=3), 0)
    data = Prefixes(*sample(tables, 400, 0), 1, 3, 2)
    build = lambda: ARM(1, 3, de=4, W=8, L=2)
    found = fit(build, data.nll, 400, Rule(lrs=(1e-9, 1e-2), batches=(100,), steps=(100,)), 0)
    assert found.lr == 1e-2
    every = fit(build, data.nll, 400, Rule(batches=(100,), steps=(20,), select="train"), 0)
    assert every.nll == pytest.approx(data.nll(every.model, torch.arange(400)).item(), rel=1e-6)


@pytest.mark.parametrize(
    "bad", [{"K": 0}, {"n": 0}, {"sim": 2}, {"family": "x"}, {"D": 30}, {"scale": -1.0}, {"order": -1}]
)
def test_bad_configuration(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ArmConfig(**bad)


def test_command_resume_and_figure(tmp_path, monkeypatch):
    small = ["--budget=smoke", "--steps=4", "--seeds=0,1", "--W=5", f"--results-dir={tmp_path}"]
    files = json.loads(run(run_arm.main, *small).stdout)["files"]
    assert len(files) == 8
    with open(tmp_path / "K/results_K.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["K"] for r in rows] == ["1", "2"]
    assert rows[0]["seeds"] == "2"
    assert float(rows[0]["measured ratio"]) == float(rows[0]["predicted ratio"]) == 1
    assert [r["published TV of single"] for r in rows] == ["", ""]  # of 200 samples, where the paper has 30000
    run(plot_arm.main, f"--results-dir={tmp_path}", f"--figures-dir={tmp_path}/figures", "--dpi=60")
    assert (tmp_path / "figures/arm.png").stat().st_size > 5000

    before = (tmp_path / "n/results_n.csv").read_text()
    monkeypatch.setattr("simulations.arm.run_cell", lambda *_: pytest.fail("a finished cell ran again"))
    run(run_arm.main, *small, "--tag=n")
    assert (tmp_path / "n/results_n.csv").read_text() == before


@pytest.mark.parametrize(
    "given, shown", [((), 0.0763), (("--n=20000",), ""), (("--D=9",), ""), (("--sim=0.5",), 0.0763)]
)
def test_published_numbers_stand_beside_their_own_setting(given, shown, tmp_path, monkeypatch):
    outcome = Outcome(0.1, 0.1, 0, 0.1, 0.1, 0.1, 100, 1, 1)
    monkeypatch.setattr("simulations.arm.run_cell", lambda *_: outcome)
    run(run_arm.main, "--tag=K", "--K-values=1", "--seeds=0", *given, f"--results-dir={tmp_path}")
    (row,) = read_csv(tmp_path / "K" / "results_K.csv")
    assert row["published TV of single"] == shown


def test_published_tables_share_their_entries():
    assert run_arm.PUBLISHED["K"][3] == run_arm.PUBLISHED["n"][30000]
    assert run_arm.PUBLISHED["D"][10] == run_arm.PUBLISHED["n"][10000]
    ratio = [m / s for s, m in run_arm.PUBLISHED["K"].values()]
    np.testing.assert_allclose(ratio, [1, 0.945, 0.868, 0.763, 0.644], atol=5e-4)


@pytest.mark.parametrize("options", [["--tag=x"], ["--D=40"], ["--n-values=0"], ["--lrs=0"], ["--budget=huge"]])
def test_command_refuses(options, tmp_path):
    one_line(run_arm.main, "--budget=smoke", *options, f"--results-dir={tmp_path}")
    assert not list(tmp_path.iterdir())


def test_options_win_over_the_budget(monkeypatch):
    given = {}
    monkeypatch.setattr("simulations.sweeps.run", lambda name, budgets, options, *rest: given.update(options))
    run(run_arm.main)
    asked = {"budget": "small", "tag": "all", "threads": 1, "fresh": False, "delta": 0.05}
    assert {name: value for name, value in given.items() if value is not None} == asked
    run(run_arm.main, "--last", "--B=0.5", "--n-values=10,20-22")
    assert (given["early"], given["bound"], given["n_values"]) == (False, 0.5, [10, 20, 21, 22])


def test_sources_without_structure_are_uniform_on_the_simplex():
    """Dirichlet(1): single probabilities are Beta(1, N - 1); a share sim of every table is common."""
    tables = np.concatenate([ground_truth(ArmConfig(K=20, D=4, family="dirichlet", sim=0.0), s) for s in range(20)])
    assert scipy.stats.kstest(tables[:, 3], scipy.stats.beta(1, 15).cdf).pvalue > 1e-3
    same = ground_truth(ArmConfig(K=2, D=4, family="dirichlet", sim=1.0), 0)
    np.testing.assert_array_equal(*same)
    gap = lambda sim: tv(*ground_truth(ArmConfig(K=2, D=4, family="dirichlet", sim=sim), 0))
    assert gap(0.7) == pytest.approx(0.3 * gap(0.0))
    with pytest.raises(ValueError, match="--order, --scale"):
        ArmConfig(family="dirichlet", order=0)
