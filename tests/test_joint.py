"""Networks that see the whole state: published parameterisations and losses, against Gaussian data in closed form."""

import json
import math
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import torch
from small_runs import final_state, one_line, run, small_command

import train_edm2
from dnnlib.util import read_stats
from metrics.evaluate import bits_per_dim
from simulations import plot_run
from torch_utils.persistence import load_snapshot
from training import processes
from training.choices import ARCHS
from training.config import make_config
from training.dataset import ArrayDataset
from training.encoders import IdentityEncoder
from training.guidance import NullLabels, guided
from training.joint_likelihood import joint_elbo
from training.likelihood import elbo
from training.losses.denoising import Draws
from training.losses.joint import JointLoss
from training.networks_joint import JointPrecond
from training.processes.score import make_score
from training.processes.states import apply_matrix

STD = torch.tensor([0.7, 1.3, 0.25], dtype=torch.float64)  # of the data of mdm.md §8
MEAN = torch.tensor(
    [1.0, -0.5, 0.2], dtype=torch.float64
)  # not told; only |MEAN|^2 enters, and its KL(q_T, prior) needs 1.29
LINEAR = {"vp": {}, "cld": {}, "alda": {}, "malda": {}, "learned": {"V": 3, "full": True}}


def process_of(name, **options):
    torch.manual_seed(0)
    return processes.get(name, **LINEAR[name] | options)


class ExactScore:
    """Score, and noise prediction, of Gaussian data N(MEAN, STD^2) per channel; [N, V, 3, 1, 1]."""

    def __init__(self, process, hybrid=True):
        self.process, self.hybrid, self.first = process, hybrid, 0

    def score(self, u, t, labels=None):
        mean, cov = self.process.kernel(torch.as_tensor(t).expand(len(u)))
        total = (
            cov[:, None] + STD[:, None, None] ** 2 * (mean[..., :, None] * mean[..., None, :])[:, None]
        )  # [N, 3, V, V]
        away = u[..., 0, 0].mT - MEAN[:, None] * mean[:, None]
        found = torch.linalg.solve(total, away[..., None])[..., 0]
        return -found.mT[..., None, None]

    def noise(self, u, t, labels=None, root=None):
        return -apply_matrix(root.mT, self.score(u, t))


def sigma_points(n):
    """Points [2 n, n] of equal weight with the mean of every quadratic function of standard normals."""
    return math.sqrt(n) * torch.cat([torch.eye(n), -torch.eye(n)]).double()


@torch.no_grad()
def expected_bound(process, t_min, hybrid=True, nodes=40):
    """(no offset, with offset) of the exact score in exact expectation, nats per 3 dimensions."""
    V, net = process.V, ExactScore(process, hybrid)
    loss = JointLoss(process, "elbo", t_min=t_min, hybrid=hybrid, elbo_samples=nodes)
    points = sigma_points(2 * V)  # x, V noises, V - 1 auxiliaries
    x = (MEAN + points[:, :1] * STD)[..., None, None]
    x_noise, rest = points[:, 1 : V + 1], points[:, V + 1 :]

    def shaped(z):
        return z[..., None, None, None].expand(*z.shape, 3, 1, 1)

    node, weight = np.polynomial.legendre.leggauss(nodes)
    t, inverse = loss.levels(torch.from_numpy(node / 2 + 0.5), "elbo")
    draws = Draws(images=x, labels=None, noise=shaped(x_noise[:, None].expand(-1, nodes, -1)))
    draws["t"] = t.expand(len(x), -1)
    draws["weight"] = (inverse * torch.from_numpy(weight / 2) * nodes).expand(len(x), -1)
    draws["elbo"] = torch.ones(len(x), dtype=torch.bool)
    if not hybrid:
        draws["start"] = shaped(rest)
    plain = -loss.evaluate(net, draws).double().mean()
    offset = loss.offset(net, Draws(draws, start=shaped(rest)), shaped(x_noise)).mean()
    return (plain, plain + offset) if torch.is_grad_enabled() else (float(plain), float(plain + offset))


# mdm.md §8: exact arithmetic, 40 digits, of the published code's bound.
@pytest.mark.parametrize(
    "name, t_min, plain, offset",
    [
        ("vp", 1e-3, -2.7812, -2.7804),
        ("vp", 1e-2, -2.7919, -2.7805),
        ("cld", 1e-3, -2.8389, -2.7791),
        ("cld", 1e-2, -3.4737, -2.9203),
        ("malda", 1e-3, -2.8984, -2.7788),
        ("malda", 1e-2, -4.1679, -3.0611),
        ("alda", 1e-3, -2.8850, -2.8545),
        ("alda", 1e-2, -3.2426, -2.9014),
    ],
)
def test_bound_of_gaussian_data_is_the_digests(name, t_min, plain, offset):
    assert expected_bound(process_of(name), t_min) == pytest.approx((plain, offset), abs=1.1e-4)


@pytest.mark.parametrize("name", LINEAR)
def test_bound_does_not_depend_on_the_conditioning(name):
    process = process_of(name)
    assert expected_bound(process, 1e-2) == pytest.approx(expected_bound(process, 1e-2, hybrid=False), abs=5e-6)


def test_learned_matrices_get_the_gradient_of_the_whole_bound():
    """Against differences of the exact expectation, whose score moves with the matrices, too."""
    process = process_of("learned").double()
    value = expected_bound.__wrapped__
    found = torch.autograd.grad(value(process, 1e-2)[0], [process.q, process.d])
    for p, gradient in zip([process.q, process.d], found, strict=True):
        for index in [(0, 1), (2, 0)]:
            around = []
            for step in (1e-4, -1e-4):
                with torch.no_grad():
                    p[index] += step
                    around.append(float(value(process, 1e-2)[0]))
                    p[index] -= step
            assert float(gradient[index]) == pytest.approx((around[0] - around[1]) / 2e-4, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    "name, plain_std, controlled_std", [("vp", 15.0, 5.2), ("cld", 45.6, 23.3), ("malda", 46.4, 24.0)]
)
def test_drawn_bounds_have_the_mean_and_the_spread_of_the_digest(name, plain_std, controlled_std):
    """mdm.md §20.5, a table of the standard deviation per draw."""
    process, x = process_of(name), (MEAN + STD * torch.randn(10000, 3, dtype=torch.float64))[..., None, None]
    net, exact = ExactScore(process), expected_bound(process, 1e-3)
    for controls, std in ((False, plain_std), (True, controlled_std)):
        torch.manual_seed(1)
        bound, parts = joint_elbo(net, process, x, controls=controls, terms=True)
        for drawn, mean in zip((parts["no_offset"], bound), exact, strict=True):
            assert float(drawn.mean()) == pytest.approx(mean, abs=4 * float(drawn.std()) / 100)
        assert float(parts["no_offset"].std()) == pytest.approx(std, rel=0.15)


def test_bits_name_the_bound_and_the_number_without_offset():
    """Their difference is mdm.md §8's, -2.7791 and -2.8389 nats of 3 dimensions."""
    process, generator = process_of("cld"), torch.Generator().manual_seed(0)
    x = MEAN + STD * torch.randn(3000, 3, dtype=torch.float64, generator=generator)
    data = ArrayDataset(x[..., None, None].float().numpy())
    found = bits_per_dim(ExactScore(process), data, process, IdentityEncoder(), num_samples=1)
    bound, plain = (found[name] * -3 * math.log(2) for name in ("bits_per_dim", "no_offset_bits_per_dim"))
    assert bound == pytest.approx(-2.7791, abs=4 * found["standard_error"] * 3 * math.log(2))
    assert bound - plain == pytest.approx(0.0598, abs=0.02)


@pytest.mark.parametrize("name", ["cld", "learned"])
def test_implicit_score_matching_is_the_same_bound(name):
    process, x = process_of(name), (MEAN + STD * torch.randn(4000, 3, dtype=torch.float64))[..., None, None]
    exact = expected_bound(process, 1e-2)
    for probes in (0, 2):
        bound, parts = joint_elbo(
            ExactScore(process), process, x, t_min=1e-2, integrand="ism", probes=probes, terms=True
        )
        for drawn, mean in zip((parts["no_offset"], bound), exact, strict=True):
            assert float(drawn.mean()) == pytest.approx(mean, abs=4 * float(drawn.std()) / 4000**0.5)


@pytest.mark.parametrize("integrand", ["dsm", "ism"])
def test_what_has_a_score_only_has_the_bound(integrand):
    process, x = process_of("cld"), (MEAN + STD * torch.randn(4000, 3, dtype=torch.float64))[..., None, None]
    net = SimpleNamespace(score=ExactScore(process).score)
    bound, parts = elbo(net, process, x, t_min=1e-2, integrand=integrand, terms=True)
    for drawn, mean in zip((parts["no_offset"], bound), expected_bound(process, 1e-2), strict=True):
        assert float(drawn.mean()) == pytest.approx(mean, abs=4 * float(drawn.std()) / 4000**0.5)


class Exact(JointPrecond):
    """What a perfectly trained network returns for Gaussian data, in each parameterisation."""

    def raw(self, u, t, labels):
        if self.parameterization == "denoiser":
            u = u * (1 + self.sigma_data**2 * self.process.kernel_parts(t).a ** 2).sqrt()[..., None, None, None]
            parts = self.process.kernel_parts(t)
            y = (parts.a.abs()[..., None, None, None] * u).sum(1) / parts.snr[:, None, None, None]
            s2, sd2 = (1 / parts.snr)[:, None, None, None], self.sigma_data**2
            mean, var = MEAN[:, None, None], (STD**2)[:, None, None]
            exact = (var * y + s2 * mean) / (var + s2)
            return ((exact - sd2 / (s2 + sd2) * y) / (s2 * sd2 / (s2 + sd2)).sqrt())[:, None]
        score = ExactScore(self.process).score(u, t)[:, self.first :]
        L = self.process.perturbation(t, self.hybrid, self.cov_eps)[1][:, self.first :, self.first :]
        if self.parameterization == "score":
            return score
        if self.parameterization == "mixed":
            mean, cov = self.process.kernel(t)
            base = torch.diagonal(cov, dim1=-2, dim2=-1) + self.cov_eps
            if not self.process.first_noised():
                base[:, 0] += mean[:, 0] ** 2
            score = score + u[:, self.first :] / base[:, self.first :, None, None, None]
        return -apply_matrix(L.mT, score)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("form, hybrid, cov_eps", [
    ("noise", True, 0), ("noise", False, 0), ("noise", True, 1e-6), ("score", True, 0), ("mixed", True, 1e-9),
    ("mixed", False, 0), ("denoiser", True, 0),
])  # fmt: skip
def test_every_parameterisation_gives_the_score_of_all_variables(name, form, hybrid, cov_eps):
    process = process_of(name)
    first = 0 if form == "denoiser" else process.first_noised()
    net = Exact(1, 3, 0, 0.5, process.V, first, form, hybrid, cov_eps, model_type="JointMLP").bind(process)
    t = torch.tensor([0.03, 0.3, 0.9, 0.3], dtype=torch.float64)
    u = torch.randn(4, process.V, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        score, exact = make_score(net, process), ExactScore(process).score(u, t)
        error = (score(u, t) - exact).abs() / exact.abs().amax((0, 2), keepdim=True)
        assert float(error.max()) < (1e-5 if name == "alda" else 1e-6)
        y, sigma = process.project(u, t)
        posterior = (STD[:, None, None] ** 2 * y + sigma[:, None, None, None] ** 2 * MEAN[:, None, None]) / (
            STD[:, None, None] ** 2 + sigma[:, None, None, None] ** 2
        )
        torch.testing.assert_close(net.denoised(u, t), posterior, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            net(y, sigma), posterior.float(), rtol=1e-5, atol=1e-5
        )  # whatever stands for the rest
        rest = torch.randn(4, process.V, 3, 1, 1)
        torch.testing.assert_close(net(y, sigma, aux_noise=rest), posterior.float(), rtol=1e-5, atol=1e-5)


class Raw(JointPrecond):
    """The raw output that is exact for Gaussian data, as a formula in which nothing cancels."""

    def raw(self, u, t, labels):
        u = u * (1 + self.sigma_data**2 * self.process.kernel_parts(t).a ** 2).sqrt()[..., None, None, None]
        a, snr = self.process.kernel_parts(t)[4:]
        y, s2 = (a.abs()[..., None, None, None] * u).sum(1) / snr[:, None, None, None], 1 / snr[:, None, None, None]
        mean, var, sd2 = MEAN[:, None, None], (STD**2)[:, None, None], self.sigma_data**2
        moved = y * (var - sd2) / ((var + s2) * (sd2 + s2)) + mean / (var + s2)  # (D - c_skip y) / sigma^2
        return (moved * (s2 * (s2 + sd2) / sd2).sqrt())[:, None]


@pytest.mark.parametrize(
    "name, t, off", [("alda", 1e-3, 1e3), ("alda", 1e-2, 1e-3), ("cld", 1e-4, 1e-3), ("malda", 1e-3, 1e-3)]
)
def test_raw_outputs_keep_the_digits_of_all_scores(name, t, off):
    """Against 50 digits; by the posterior mean (in float32, as networks return it) the variables without noise lose them."""
    process, V = process_of(name), len(process_of(name).Q)
    net = Raw(1, 3, 0, 0.5, V, parameterization="denoiser", model_type="JointMLP").bind(process)
    generator = torch.Generator().manual_seed(2)
    mean, cov = process.kernel(t)
    u = mean[:, None] * (MEAN + STD * torch.randn(3, generator=generator))
    u = (u + process.cholesky(t) @ torch.randn(V, 3, generator=generator).double())[None, ..., None, None]
    with mpmath.workdps(50):
        matrix = lambda values: mpmath.matrix(values.tolist())
        B = mpmath.mpf("0.1") * t + mpmath.mpf("9.9") * mpmath.mpf(t) ** 2 / 2
        F = mpmath.expm(matrix(process.A) * B, method="taylor")
        start = mpmath.diag([0] + [mpmath.mpf(0.01)] * (V - 1))
        C = matrix(process.S) - F * (matrix(process.S) - start) * F.T
        m, exact = F[:, 0], []
        for channel, (mu, std) in enumerate(zip(MEAN.tolist(), STD.tolist(), strict=True)):
            away = matrix(u[0, :, channel, 0, 0]) - m * mpmath.mpf(mu)
            exact.append([float(-v) for v in mpmath.lu_solve(C + mpmath.mpf(std) ** 2 * m * m.T, away)])
    exact = torch.tensor(exact, dtype=torch.float64).mT[None, ..., None, None]
    with torch.no_grad():
        error = lambda score: float(((score - exact).abs() / exact.abs().amax(2, keepdim=True)).max())
        denoised = net.denoised(u, torch.tensor([t], dtype=torch.float64)).float()
        assert error(net.score(u, t)) < 1e-7 < off < error(process.score(u, torch.tensor(t), denoised))


def test_covariances_and_noise_multiplier_of_the_cld_paper():
    """cld.md §3.4: values of the official code for CIFAR-10 with numerical_eps 1e-9."""
    t = torch.tensor([1e-5, 1e-3, 0.01, 0.1, 0.5, 1.0], dtype=torch.float64)
    _, L = processes.CLD.published().perturbation(t, cov_eps=1e-9)
    C = L @ L.mT
    found = torch.stack([C[:, 0, 0], C[:, 0, 1], C[:, 1, 1], 1 / L[:, 1, 1]], dim=1)
    expected = torch.tensor([
        [1.25664e-9, 1.60602e-6, 0.010077, 11.1634], [3.19489e-6, 2.19185e-4, 0.017558, 19.9185],
        [8.23914e-4, 6.70808e-3, 0.075535, 6.91380], [0.221810, 0.129860, 0.215758, 2.67518],
        [0.986461, 5.28689e-3, 0.247934, 2.00843], [0.999984, 7.07621e-6, 0.249997, 2.00001],
    ]).double()  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=5e-5, atol=0)


@pytest.mark.parametrize("model, images, variables, options, size", [
    ("JointMLP", (1, 2), (2, 1), "cld-toy", 50562), ("JointResNet", (1, 2), (2, 1), {}, 84996),  # cld.md §9
    ("SongUNet", (32, 3), (2, 1), "cld-cifar10", 107593859),
    ("SongUNet", (256, 3), (2, 1), "cld-celebahq256-paper", 65466371),
    ("SongUNet", (256, 3), (2, 1), "cld-celebahq256-postpaper", 103073795),
    ("HoUNet", (32, 3), (1, 0), "mdm-cifar10-vp", 35746307), ("HoUNet", (32, 3), (2, 0), "mdm-cifar10-cld", 35753222),
    ("HoUNet", (32, 3), (3, 0), "mdm-cifar10-malda", 35760137), ("HoUNet", (28, 1), (1, 0), "mdm-mnist-vp", 1539329),
    ("HoUNet", (28, 1), (2, 0), "mdm-mnist-learned2", 1539906), ("HoUNet", (28, 1), (3, 0), "mdm-mnist-alda", 1540483),
])  # fmt: skip
def test_published_sizes(model, images, variables, options, size):
    """mdm.md §13, cld.md §9.1; the presets' own networks."""
    if options:
        config = make_config(options, data="x")
        with torch.device("meta"):
            net = ARCHS[config.arch](
                config, dict(zip(("img_resolution", "img_channels"), images, strict=True), label_dim=0)
            )
    else:
        net = JointPrecond(*images, variables=variables[0], first=variables[1], model_type=model)
    assert net.model.__class__.__name__ == model and (net.variables, net.first) == variables
    assert sum(p.numel() for p in net.parameters()) == size


def test_groups_of_the_ddpm_network():
    with pytest.raises(ValueError, match="--channels=8: .* multiple of 32"):
        JointPrecond(8, 1, model_type="HoUNet", model_channels=8)


def test_the_objective_switches_at_so_many_images():
    loss, phases = JointLoss(process_of("malda"), switch_at=128), []
    for nimg in (0, 127, 128, 500):
        loss.at(nimg)
        draws = loss.draw(torch.zeros(400, 1, 1, 1), generator=torch.Generator().manual_seed(0))
        phases.append((loss.phase, bool(draws.elbo.all())))
        # Uniform times before, then the published density: its median is 0.146 (mdm.md §9).
        assert float(draws.t.median()) == pytest.approx(0.5 if nimg < 128 else 0.146, abs=0.06)
    assert phases == [("noise", False), ("noise", False), ("elbo", True), ("elbo", True)]


class Silent(JointPrecond):
    """Predicts nothing."""

    def raw(self, u, t, labels):
        return u.new_zeros(len(u), self.outputs, *u.shape[2:])


@pytest.mark.parametrize("weighting", ["reweightedv2", "reweightedv1", "likelihood"])
@pytest.mark.parametrize("hybrid", [True, False])
def test_noise_losses_of_a_silent_network(weighting, hybrid):
    """cld.md §4.2: the weights are 1, Gamma beta and Gamma beta l^2 on eps^2, whose mean is one per dimension."""
    process = processes.CLD.published(beta0=0.1, beta1=6.9)
    loss = JointLoss(process, weighting=weighting, t_min=0.01, hybrid=hybrid)
    net = Silent(1, 3, variables=2, first=1, hybrid=hybrid, model_type="JointMLP").bind(process)
    draws = loss.draw(torch.randn(2000, 3, 1, 1), generator=torch.Generator().manual_seed(0))
    t = draws.t[:, 0]
    assert float(t.min()) >= 0.01 and float(t.max()) <= 1 and float(t.mean()) == pytest.approx(0.505, abs=0.02)
    ell = 1 / process.perturbation(t, hybrid)[1][:, 1, 1]
    weight = {"reweightedv2": 1.0, "reweightedv1": 1 * (0.1 + 6.9 * t), "likelihood": (0.1 + 6.9 * t) * ell**2}[
        weighting
    ]
    expected = weight * draws.noise[:, 0, 1].double().square().flatten(1).sum(1)
    torch.testing.assert_close(loss.evaluate(net, draws).double(), expected, rtol=1e-5, atol=0)
    if weighting == "reweightedv2":
        assert float(expected.mean()) == pytest.approx(3, abs=0.15)


def test_guidance_without_labels_mixes_the_scores_of_joint_networks():
    torch.manual_seed(0)
    process = process_of("cld")
    net = JointPrecond(
        8, 1, 3, variables=2, first=1, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[]
    )
    torch.nn.init.normal_(net.bind(process).eval().requires_grad_(False).model.map_label.weight)
    for p in net.parameters():
        p.add_(0.1 * torch.randn_like(p))  # the last layers start at zero
    u, t, labels = torch.randn(2, 2, 1, 8, 8).double(), torch.tensor(0.4), torch.eye(3)[:2]
    main, null = net.score(u, t, labels), net.score(u, t)
    assert float((main - null).abs().max()) > 1e-3
    both = guided(net, NullLabels(net), 3.0, process=process)
    torch.testing.assert_close(make_score(both, process, labels)(u, t), null + 3 * (main - null))
    x, sigma = u[:, 0].float(), torch.tensor(0.7)
    main, null = net(x, sigma, labels), net(x, sigma)
    torch.testing.assert_close(
        guided(net, NullLabels(net), 3.0)(x, sigma, labels), null + 3 * (main - null), rtol=1e-4, atol=1e-4
    )


LEARNED = (
    "--process=learned",
    "--process-options=V=2",
    "--parameterization=joint",
    "--switch-at=1Ki",
    "--process-lr-scale=1",
)


def test_a_joint_run_learns_resumes_and_is_loaded(digits, tmp_path):
    run(train_edm2.main, *small_command(digits, tmp_path / "whole", *LEARNED))
    run(train_edm2.main, *small_command(digits, tmp_path / "parts", *LEARNED, "--slice=1Ki"))
    run(train_edm2.main, *small_command(digits, tmp_path / "parts", *LEARNED))
    whole, parts = (final_state(tmp_path / name) for name in ("whole", "parts"))
    assert json.dumps(whole["state"]) == json.dumps(parts["state"])
    for name, value in whole["objective"].items():
        assert torch.equal(value, parts["objective"][name]), name
    start, middle, last = (
        load_snapshot(tmp_path / "whole" / f"network-snapshot-000000{k}-0.100.safetensors") for k in (0, 1, 2)
    )
    assert torch.equal(start.process.q, middle.process.q) and not torch.equal(middle.process.q, last.process.q)
    assert last.net.process is last.process and last.net(torch.zeros(2, 1, 8, 8), 0.5).isfinite().all()
    lines = read_stats(tmp_path / "whole")
    for line, process in zip(lines, (start.process, middle.process), strict=False):  # the lines are of what is trained
        assert 0 < line["Process/min_eigenvalue"] <= min(line["Process/D00"], line["Process/D11"])
        assert line["Process/Q01"] == pytest.approx(
            float(process.Q[0, 1]), abs=1e-6
        )  # nothing is learned before the switch
        assert line["Process/D00"] + line["Process/D11"] == pytest.approx(2)  # the fixed speed
    assert lines[-1]["Process/Q01"] != lines[0]["Process/Q01"]
    run(plot_run.main, tmp_path / "whole", "--keys=Process/Q01,Process/min_eigenvalue", f"--save={tmp_path / 'curve'}")


@pytest.mark.parametrize("options, says", [
    (["--parameterization=joint"], "linear diffusion"),
    (["--parameterization=joint", "--process=cld", "--objective=elbo", "--cov-eps=1e-9"], "cov_eps"),
    (["--process=cld", "--objective=elbo"], "--objective=elbo"),
    (["--parameterization=joint", "--process=learned"], "elbo"),
    (["--parameterization=joint", "--process=cld", "--loss=edm2"], "--loss=edm2"),
    (["--parameterization=joint", "--process=cld", "--process-options=init_aux_var=0", "--switch-at=1Ki"], "init_aux_var"),
    (["--parameterization=joint", "--process=cld", "--t-min=2"], "t_min"),
])  # fmt: skip
def test_mistakes_are_one_line(options, says, digits, tmp_path):
    one_line(train_edm2.main, *small_command(digits, tmp_path / "r", *options), says=says)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("options", [["--uncertainty=True"], ["--objective=elbo", "--weighting=reweightedv1"]])
def test_options_without_effect_are_named(options, digits, tmp_path):
    words = ["--dry-run", "--process=cld", "--parameterization=joint", *options]
    with pytest.warns(UserWarning, match=f"{options[-1].split('=')[0]}.* has no effect"):
        run(train_edm2.main, *small_command(digits, tmp_path / "r", *words))


@pytest.mark.parametrize("name", ["cld", "malda", "alda"])
def test_what_a_joint_denoiser_sees_has_the_sign_of_the_data(name, monkeypatch):
    """At every time: the sign of a whitening's row is free, and a network that knows the time alone cannot learn its jumps."""
    process, seen = process_of(name), []
    net = JointPrecond(1, 3, 0, 0.5, process.V, parameterization="denoiser", model_type="JointMLP").bind(process)
    monkeypatch.setattr(net, "raw", lambda u, t, labels: seen.append(u) or torch.zeros(len(u), 1, 3, 1, 1))
    x = torch.ones(40, 3, 1, 1, dtype=torch.float64)
    t = process.time(torch.logspace(-2.7, 0, 40, dtype=torch.float64))
    m = process.kernel(t)[0]
    net.denoised(m[:, :, None, None, None] * x[:, None], t)  # states without noise
    assert float(seen[0].min()) > -1e-9 and float(seen[0].sum(1).min()) > 0.5
