"""Points in the plane: the data sets against their densities, a run of seconds, the guide's example."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import ROOT, one_line, run

import run_experiment
from dnnlib import experiment
from dnnlib.util import read_stats
from metrics.table import read_csv
from simulations import run_toy, toy_data
from simulations.studies import cld_toy
from torch_utils.persistence import describe, load_snapshot
from training import processes
from training.config import make_config
from training.processes import LinearProcess

GENERATOR = torch.Generator().manual_seed


def test_swissroll_and_diamond_are_cld_s():
    """Mean (0.020, 0.002), variance 0.516 per axis; diamond 0.168 (CLD's own data, measured); radii by construction."""
    x = toy_data.get("multimodal_swissroll")(100000, GENERATOR(0))
    assert torch.allclose(x.var(dim=0), torch.tensor([0.516, 0.516]), atol=0.01)
    assert torch.allclose(x.mean(dim=0), torch.tensor([0.020, 0.002]), atol=0.01)
    centers = torch.tensor(toy_data.CENTERS)
    nearest = (x[:, None] - centers).norm(dim=2).min(dim=1).values
    assert nearest.quantile(0.001) > 0.035 and nearest.quantile(0.999) < 0.15
    y = toy_data.get("diamond")(100000, GENERATOR(0))
    assert torch.allclose(y.var(dim=0), torch.tensor([0.168, 0.168]), atol=0.004)
    assert set(toy_data.TOY_DATA) >= {"25gaussians", "rings", "mixture", "tree"}
    with pytest.raises(ValueError, match="--dataset"):
        toy_data.get("nothing")


@pytest.mark.parametrize("name", ["diamond", "25gaussians", "rings", "mixture"])
def test_densities_are_those_of_the_samples(name):
    """Importance check: the mean of box / p over samples from p is the area of the part of the box where p > 0."""
    logp = toy_data.logp(name)
    side = torch.linspace(-1.2, 1.2, 241, dtype=torch.float64)
    cells = torch.stack(torch.meshgrid(side, side, indexing="ij"), dim=-1).reshape(-1, 2)
    mass = logp(cells).exp().sum() * (side[1] - side[0]) ** 2
    assert abs(float(mass) - 1) < 0.02
    x = toy_data.get(name)(4000, GENERATOR(0))
    entropy = -(logp(cells).exp() * logp(cells).clamp_min(-700)).sum() * (side[1] - side[0]) ** 2
    values = -logp(x)
    assert abs(values.mean() - entropy) < 4 * values.std() / len(x) ** 0.5 + 0.02


def test_density_of_the_swiss_rolls():
    """It integrates to one over a roll, and its entropy is that of CLD's toy data, -3.336 +- .014 nats."""
    side = torch.linspace(-0.16, 0.16, 321, dtype=torch.float64)
    cells = torch.cartesian_prod(side, side)
    mass = toy_data.swissroll_logp(cells).exp().sum() * (side[1] - side[0]) ** 2
    assert float(mass) == pytest.approx(1 / 5, rel=1e-3)
    values = toy_data.logp("multimodal_swissroll")(toy_data.get("multimodal_swissroll")(8000, GENERATOR(0)))
    assert abs(float(values.mean()) - 3.336) < 2 * math.hypot(0.014, float(values.std()) / 8000**0.5)


def test_train_sample_plot(tmp_path):
    process = ["--process=malda", "--process-options=V=2"]
    few = ["--dataset=diamond", "--steps=8", "--batch=128", "--channels=16"]
    run(run_toy.main, "train", f"--outdir={tmp_path}/run", *few, *process)
    sampling = ["--solver=em", "--steps=5", "--num=32"]
    run(run_toy.main, "sample", f"--net={tmp_path}/run", *sampling, f"--dest={tmp_path}/p.npz")
    found = np.load(tmp_path / "p.npz")
    assert (
        found["points"].shape == (32, 2)
        and found["states"].shape == (6, 32, 2, 2)
        and (np.diff(found["times"]) < 0).all()
    )


def test_the_guides_process_runs():
    """The ten lines of docs/linear.md define a process that reduces to CLD."""
    text = (Path(__file__).parents[1] / "docs" / "linear.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    assert len(code.strip().splitlines()) <= 10
    scope = {}
    exec(code, scope)
    made = next(
        v for v in scope.values() if isinstance(v, type) and issubclass(v, LinearProcess) and v is not LinearProcess
    )
    cld = processes.get("cld", M=1.0)
    assert torch.allclose(made(friction=2.0).kernel(0.4)[1], cld.kernel(0.4)[1], rtol=1e-12)
    json.dumps(describe(made()))


# Mean loss of the first 1000 iterations of the official code at batch 512 (cld.md §17.4).
@pytest.mark.parametrize("options, loss", [
    (["--prediction=mixed"], 0.182), ([], 0.222), (["--transition=conditional"], 0.225), (["--weighting=likelihood"], 15.2),
])  # fmt: skip
@pytest.mark.slow
def test_published_networks_start_as_the_official_ones_do(options, loss, tmp_path):
    process = ["--process=cld", "--process-options=m_inv=4,gamma=0.04,beta0=4,beta1=0"]
    how = [
        "--dataset=multimodal_swissroll",
        "--arch=mlp",
        "--cov-eps=1e-6",
        "--t-min=1e-5",
        "--lr=1e-3",
        "--steps=1000",
    ]
    run(run_toy.main, "train", f"--outdir={tmp_path}", *how, *process, *options)
    losses = [line["Loss/loss"] for line in read_stats(tmp_path) if line["Progress/kimg"]]
    assert len(losses) == 10 and np.mean(losses) == pytest.approx(loss, rel=0.05)


def test_networks_of_the_whole_state_are_trained_sampled_and_scored(tmp_path):
    process = ["--process=learned", "--process-options=V=2", "--arch=resnet", "--objective=elbo"]
    run(run_toy.main, "train", f"--outdir={tmp_path}/run", "--dataset=diamond", "--steps=8", "--batch=128", *process)
    run(run_toy.main, "sample", f"--net={tmp_path}/run", "--steps=5", "--num=32", f"--dest={tmp_path}/p.npz")
    assert np.isfinite(np.load(tmp_path / "p.npz")["points"]).all()
    one_line(run_toy.main, "train", f"--outdir={tmp_path}/x", "--prediction=mixed", says="--arch=mlp")
    one_line(run_toy.main, "train", f"--outdir={tmp_path}/x", "--arch=mlp", says="--process=cld")


def test_cld_s_toy_configuration(tmp_path):
    """cld.md §15, and the experiment beside the official code's table, from training to the table."""
    config = make_config("cld-toy", data="x")
    wanted = dict(
        process_options=dict(m_inv=4, gamma=0.04, beta0=4, beta1=0), cov_eps=1e-6, lr=1e-3, batch_size=512, grad_clip=1.0,
        total_nimg=800_000 * 512, ema="decay", ema_decay=0.999, optimizer="adam", prediction="noise", transition="hybrid",
        weighting="reweightedv2", t_min=1e-5, lr_schedule="constant", rampup=0, decay=0, dropout=0,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in wanted} == wanted
    out = {"out": str(tmp_path), "steps": 2, "num": 20}
    settings, steps = experiment.load(ROOT / "experiments" / "cld-toy.yaml", "smoke", out)
    experiment.run(steps, tmp_path, run_experiment.load_scripts, progress=False)
    snapshot = load_snapshot(tmp_path / "runs" / "noise-seed0")
    assert snapshot.net.cov_eps == 1e-6 and (snapshot.net.variables, snapshot.net.first) == (2, 1)
    assert snapshot.header["ema"] == "ema" and snapshot.process.init_aux_var == pytest.approx(0.01)
    (row,) = read_csv(tmp_path / "cld-toy.csv")
    assert row["nfe"] > 20 and all(math.isfinite(row[name]) for name in cld_toy.COLUMNS)
    assert "official code" in (tmp_path / "cld-toy.md").read_text()
    one_line(
        run_toy.main, "train", "--preset=cld-toy", "--process=edm", f"--outdir={tmp_path}/x", says="--parameterization"
    )
