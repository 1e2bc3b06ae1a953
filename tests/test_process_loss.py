"""Training for a process: the loss against integrals in closed form, learned matrices against the exact gradient."""

import math

import pytest
import scipy.integrate
import torch
from small_runs import run, small_config

import generate_images
from torch_utils.persistence import load_snapshot
from training import generation, likelihood, processes, setup
from training.config import make_config
from training.losses.process import ProcessLoss
from training.processes.options import make_process, named, parse_options
from training.sampling import Sampling

S = 0.6  # standard deviation of the data


class Exact(torch.nn.Module):
    """The best denoiser of N(0, S^2)."""

    sigma_data = S

    def forward(self, x, sigma, class_labels=None):
        return x * S**2 / (S**2 + sigma.reshape(-1, 1, 1, 1) ** 2)


def data(n=4096):
    return S * torch.randn(n, 2, 1, 1, generator=torch.Generator().manual_seed(1))


def mean_and_error(loss, n=4096):
    draws = loss.draw(data(n), None, torch.Generator().manual_seed(0))
    with torch.no_grad():
        values = loss.evaluate(Exact(), draws).double().flatten(1).mean(1)
    return float(values.mean()), float(values.std() / math.sqrt(n))


MADE = [
    ("vp", {}),
    ("cld", dict(M=0.25, beta=(4, 4))),
    ("malda", dict(V=3)),
    ("alda", {}),
    ("learned", dict(V=2, full=True)),
]


@pytest.mark.parametrize("name, options", MADE, ids=[name for name, _ in MADE])
@pytest.mark.parametrize("sampling", ["snr", "uniform", "importance"])
def test_likelihood_weighting_is_the_integral_of_the_bound(name, options, sampling):
    """1/2 int E|D - x|^2 d snr = 1/2 log((1 + S^2 snr_max) / (1 + S^2 snr_min)) per dimension for Gaussian data."""
    process = make_process(name, options)
    loss = ProcessLoss(process, sigma_data=S, time_sampling=sampling, t_min=0.05)
    snr = [float(process.snr(t)) for t in (0.05, 1.0)]
    exact = 0.5 * (math.log1p(S**2 * snr[0]) - math.log1p(S**2 * snr[1]))
    mean, error = mean_and_error(loss)
    assert abs(mean - exact) < 4 * error and error < 0.15 * exact


@pytest.mark.parametrize("weighting", ["reweightedv1", "reweightedv2"])
def test_published_weights_of_vp(weighting):
    """VP: sigma^2 = e^B - 1; v2 is the error of the noise prediction, |D - x|^2 / sigma^2, v1 that times beta / 2."""

    def integrand(t):
        B, beta = 0.1 * t + 9.9 * t**2 / 2, 0.1 + 9.9 * t
        return S**2 / (S**2 + math.expm1(B)) * (beta / 2 if weighting == "reweightedv1" else 1)

    exact = scipy.integrate.quad(integrand, 1e-3, 1)[0]
    for sampling in ("uniform", "snr"):
        loss = ProcessLoss(processes.get("vp"), S, sampling, weighting, t_min=1e-3)
        mean, error = mean_and_error(loss)
        assert abs(mean - exact) < 4 * error and error < 0.1 * exact


def test_gradient_in_Q_and_D_is_that_of_the_endpoints():
    """Exact negative bound: KL + 1/2 log(1 + S^2 snr_max) - 1/2 log(1 + S^2 snr(T)), of which the first two ends move."""
    process = make_process("learned", dict(V=2, full=True, beta=(0.5, 0.5), init_aux_var=0.3), seed=3, learn=True)
    loss, x = ProcessLoss(process, sigma_data=S), data(20000)
    loss.evaluate(Exact(), loss.draw(x, None, torch.Generator().manual_seed(0))).sum().div(len(x)).backward()
    measured = [p.grad.clone() for p in loss.parameters()]
    process.zero_grad()
    snr = process.snr(1.0)
    exact = likelihood.endpoint_kl(process, x, 1.0).mean() - 2 * 0.5 * torch.log1p(S**2 * snr)  # two dimensions
    exact.backward()
    for one, other in zip(measured, loss.parameters(), strict=True):
        assert other.grad.abs().max() > 1e-2
        assert torch.allclose(one, other.grad, rtol=0.02, atol=2e-3)


def test_float32_keeps_the_noise_prediction_at_low_noise():
    """At sigma = 1e-7 the sum x + n rounds the noise away; the loss still sees |D - x|^2 / sigma^2 ~ sigma^2 / S^2."""
    loss = ProcessLoss(processes.get("cld"), S, "uniform", "reweightedv2", t_min=1e-5)
    draws = loss.draw(1 + data(256), None, torch.Generator().manual_seed(0))
    sigma = torch.full_like(draws.sigma, 1e-7)
    noise = draws.noise / draws.sigma.reshape(-1, 1, 1, 1) * 1e-7
    draws.update(sigma=sigma, noise=noise, weight=sigma**-2)

    class Given(torch.nn.Module):  # y itself: with the exact y the error is the noise
        def forward(self, x, sigma, class_labels=None):
            return x

    ratio = loss.evaluate(Given(), draws).mean() / (draws.noise / 1e-7).square().mean()
    assert abs(ratio - 1) < 1e-3


def test_learned_process_travels_with_the_snapshot(digits, tmp_path):
    config = small_config(digits, process="learned", process_options="V=2", total_nimg=512, status_nimg=512)
    assert config.loss == "process"
    loop = setup.train(config, tmp_path / "run")
    trained, snapshot = loop.objective.loss.process, load_snapshot(tmp_path / "run")
    start = make_process("learned", "V=2", seed=config.seed)
    assert not torch.equal(trained.Q, start.Q) and not torch.equal(trained.D, start.D)
    average = loop.ema.get()[0][0].loss.process
    assert torch.equal(snapshot.process.Q, average.Q) and torch.equal(snapshot.process.D, average.D)
    assert torch.linalg.eigvalsh(snapshot.process.D)[0] > 0
    assert torch.equal(make_process("learned", trained=snapshot.process).D, average.D)
    assert torch.equal(make_process(str(tmp_path / "run")).D, average.D)
    arguments = [
        f"--net={tmp_path}/run",
        f"--outdir={tmp_path}/out",
        "--seeds=0-2",
        "--process=learned",
        "--solver=sscs",
    ]
    run(generate_images.main, *arguments, "--steps=2", "--device=cpu")
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_options_are_read_and_refused(digits):
    assert parse_options("M=0.25,beta=4:4,full=true,Q=0:-1;1:0") == dict(
        M=0.25, beta=[4, 4], full=True, Q=[[0, -1], [1, 0]]
    )
    cld = make_process("cld", "m_inv=4,gamma=0.04,beta0=4,beta1=0")
    assert named(cld) == dict(name="cld", M=0.25, beta=[4.0, 4.0], init_aux_var=0.01)
    linear = make_process("linear", "Q=0:-1;1:0,D=0:0;0:2")
    assert torch.equal(linear.kernel(0.3)[1], processes.get("cld").kernel(0.3)[1])
    for name, text in [
        ("cld", "mass=1"),
        ("cld", "M"),
        ("cld", "M=x"),
        ("nothing", ""),
        ("linear", "Q=0:1;1:0,D=0:0;0:2"),
    ]:
        with pytest.raises(ValueError, match="--process"):
            make_process(name, text)
    with pytest.raises(ValueError, match="time-sampling"):
        make_config("digits8", time_sampling="uniform")
    with pytest.raises(ValueError, match="linear process"):
        setup.build_loss(small_config(digits, process="pfgmpp", loss="process"), None)
    with pytest.raises(ValueError, match="learned"):
        setup.build_loss(small_config(digits, process="learned", loss="edm2"), None)


def test_the_matrix_D_of_a_process_is_no_number_of_dimensions(digits, tmp_path):
    """Stable targets and churn ask for PFGM++'s D; a process has Gaussian noise."""
    config = small_config(digits, process="cld", stf=True, stf_refs=8, total_nimg=128, status_nimg=0, checkpoint_nimg=0)
    assert setup.train(config, tmp_path / "run").state.cur_nimg == 128
    (batch,) = generation.generate_images(tmp_path / "run", seeds=[0], num_steps=2, S_churn=5)
    assert batch.images.shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="--aug-dim=128 contradicts the snapshot, trained with D=inf"):
        next(generation.batches(Sampling(net=str(tmp_path / "run"), aug_dim=128.0), [0], "cpu"))
