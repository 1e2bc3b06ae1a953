"""Processes against arithmetic of 300 digits, published numbers and the laws of their noise."""

import json
import math
from types import SimpleNamespace

import mpmath as mp
import numpy as np
import pytest
import torch
from scipy import stats

from simulations.studies.alignment import mean_tvd
from torch_utils.persistence import build, describe
from torch_utils.random import StackedRandomGenerator
from training import processes
from training.processes import CLD, EDM, LinearProcess, PFGMpp, aug_dim, pfgmpp
from training.processes.score import make_score
from training.processes.time_density import NoiseLevels, importance_time, weight

mp.mp.dps = 250


def chain(V, **options):
    """Noise on the last variable only, passed down a chain: the hardest case for small t."""
    Q = torch.diag(torch.full((V - 1,), -1.5), 1)
    return LinearProcess(Q - Q.mT, torch.diag(torch.tensor([0.0] * (V - 1) + [2.0])), **options)


def rough(V, seed):
    """Random Q and D, D of full rank, S not the identity."""
    generator = torch.Generator().manual_seed(seed)
    q, b = torch.randn(2, V, V, generator=generator, dtype=torch.float64) / V**0.5
    return LinearProcess(q - q.mT, b @ b.mT + 0.05 * torch.eye(V), S=torch.rand(V, generator=generator) + 0.5)


class Underdamped(LinearProcess):
    def __init__(self, friction=1.0, **options):
        super().__init__(Q=[[0, -1], [1, 0]], D=[[0, 0], [0, friction]], **options)


def learned(**options):
    torch.manual_seed(1)
    return processes.get("learned", **options)


MAKERS = {
    "vp": lambda: processes.get("vp"),
    "cld": lambda: processes.get("cld"),
    "cld-paper": lambda: CLD.published(),
    "alda": lambda: processes.get("alda"),
    "malda3": lambda: processes.get("malda", V=3),
    "malda8": lambda: processes.get("malda", V=8, M=0.25),
    "learned2": lambda: learned(V=2),
    "learned5-full": lambda: learned(V=5, full=True),
    "random8": lambda: rough(8, 0),
    "chain5": lambda: chain(5, init_aux_var=0.0),
    "chain8": lambda: chain(8),
    "underdamped": lambda: Underdamped(friction=0.5, beta=(4, 4)),
}


@pytest.fixture(params=MAKERS, scope="module")
def process(request):
    return MAKERS[request.param]()


def reference(process, t, Q=None, D=None):
    """(F, C, snr) in 300 digits by the textbook formula."""
    V = process.V
    Q, D = mp.matrix((process.Q if Q is None else Q).tolist()), mp.matrix((process.D if D is None else D).tolist())
    S = mp.diag(torch.diagonal(process.S).tolist())
    C0 = mp.diag([0] + [process.init_aux_var] * (V - 1))
    low, high = map(mp.mpf, process.beta_range)
    B = low * t + (high - low) * mp.mpf(t) ** 2 / 2
    F = mp.expm(-(Q + D) * S**-1 * B, method="taylor")
    C = S - F * (S - C0) * F.T
    return F, C, (F[:, 0].T * mp.lu_solve(C, F[:, 0]))[0]


def to_tensor(matrix):
    return torch.tensor([[float(entry) for entry in row] for row in matrix.tolist()], dtype=torch.float64)


def test_kernel_against_high_precision(process):
    times = torch.tensor([1e-6, 1e-5, 1e-3, 0.03, 0.3, 1.0], dtype=torch.float64)
    with torch.no_grad():
        mean, cov = process.kernel(times)
        F, cov_joint = process.kernel(times, hybrid=False)
        snr, L = process.snr(times), process.cholesky(times)
    for index, t in enumerate(times.tolist()):
        F_ref, C_ref, snr_ref = reference(process, t)
        assert abs(mp.mpf(float(snr[index])) / snr_ref - 1) < 1e-11
        scale = torch.diagonal(to_tensor(C_ref)).sqrt()
        assert ((cov[index] - to_tensor(C_ref)) / scale / scale[:, None]).abs().max() < 1e-11
        assert ((L @ L.mT - cov)[index] / scale / scale[:, None]).abs().max() < 1e-11
        torch.testing.assert_close(F[index], to_tensor(F_ref), rtol=1e-10, atol=1e-13)
        start = torch.diag(torch.tensor([0.0] + [process.init_aux_var] * (process.V - 1), dtype=torch.float64))
        torch.testing.assert_close(cov[index], cov_joint[index] + F[index] @ start @ F[index].mT, rtol=1e-9, atol=1e-15)
    assert torch.equal(mean, F[..., 0]) and torch.equal(process.transition(times), F)
    assert (L.triu(1) == 0).all()


def test_batched_times_equal_single_ones(process):
    times = torch.tensor([[0.5, 1e-4], [0.5, 0.9]], dtype=torch.float64)
    with torch.no_grad():
        for method in (process.snr, process.sigma, process.snr_rate, process.cholesky, process.transition):
            single = torch.stack([method(t) for t in times.flatten()])
            torch.testing.assert_close(method(times).flatten(0, 1), single, rtol=1e-12, atol=1e-300)


def test_time_inverts_sigma(process):
    times = torch.tensor([1e-6, 1e-4, 0.01, 0.2, 0.8, 1.0], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(process.time(process.sigma(times)), times, rtol=1e-10, atol=0)
        assert process.time(float(process.sigma(0.3))).shape == ()
        assert float(process.sigma(0.0)) == 0
        with pytest.raises(ValueError, match="reaches noise levels"):
            process.time(2 * float(process.sigma(1.0)))


def test_snr_rate_is_the_derivative(process):
    t, h = 0.2, 1e-5
    with torch.no_grad():
        slope = (process.snr(t - h) - process.snr(t + h)) / (2 * h)
        assert float(process.snr_rate(t)) == pytest.approx(float(slope), rel=1e-5)


def test_state_algebra_against_dense_gaussians(process):
    """y, score and Tweedie from an explicit inverse, at a time where that is harmless."""
    torch.manual_seed(0)
    with torch.no_grad():
        for t in (0.5, torch.tensor([0.4, 0.6, 0.9], dtype=torch.float64)):
            u = torch.randn(3, process.V, 2, 3, dtype=torch.float64)
            denoised = torch.randn(3, 2, 3, dtype=torch.float64)
            mean, cov = process.kernel(torch.as_tensor(t).expand(3))
            flat, inverse = u.flatten(2), torch.linalg.inv(cov)
            snr = (mean[:, None] @ inverse @ mean[..., None])[:, 0, 0]
            y = (mean[:, None] @ inverse @ flat)[:, 0] / snr[:, None]
            score = -inverse @ (flat - mean[..., None] * denoised.flatten(1)[:, None])
            ours_y, ours_sigma = process.project(u, t)
            ours = process.score(u, t, denoised)
            torch.testing.assert_close(ours_y.flatten(1), y, rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(ours_sigma.expand(3), snr.rsqrt(), rtol=1e-8, atol=0)
            size = score.abs().max()
            torch.testing.assert_close(ours.flatten(2) / size, score / size, rtol=1e-6, atol=1e-8)
            given = SimpleNamespace(score=lambda u, t, ours=ours: ours)
            torch.testing.assert_close(make_score(given, process).denoised(u, t), denoised, rtol=1e-6, atol=1e-6)


def test_splitting_is_the_reversed_ornstein_uhlenbeck_flow(process):
    with torch.no_grad():
        F, L = process.splitting(0.5, 0.3)
        generator = -(process.D - process.Q) @ torch.linalg.inv(process.S)
        expected = torch.linalg.matrix_exp(generator * process.beta_integral(0.5, 0.3))
        torch.testing.assert_close(F, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(L @ L.mT, process.S - expected @ process.S @ expected.mT, rtol=1e-9, atol=1e-12)
        G = process.diffusion(torch.tensor([0.5, 0.1], dtype=torch.float64))
        torch.testing.assert_close(G[0] @ G[0].mT, 2 * process.D * process.beta(0.5), rtol=1e-10, atol=1e-12)


def test_prior_samples_have_their_covariance(process):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for options in ({}, {"prior": "matched", "t": 0.4, "sigma_data": 0.7}):
            u = process.prior_sample((20000, process.V, 1), generator, **options)[..., 0]
            mean, cov = process.kernel(0.4)
            cov = cov + 0.49 * mean[:, None] * mean if options else process.S
            scale = torch.diagonal(cov).sqrt()
            assert ((u.mT @ u / len(u) - cov) / scale / scale[:, None]).abs().max() < 0.05
        with pytest.raises(ValueError, match="variables"):
            process.prior_sample((4, process.V + 1, 2))


def test_gradient_in_the_matrices():
    """d snr / d (Q, D) against differences in 300 digits, at tiny, middle and large times."""
    Q = torch.tensor([[0.0, -1.2], [1.2, 0.0]], dtype=torch.float64)
    D = torch.tensor([[0.1, 0.05], [0.05, 1.4]], dtype=torch.float64)
    for d0 in (0.1, 0.0):
        process = LinearProcess(Q, D + torch.tensor([[d0 - 0.1, -0.5 * (d0 == 0)], [-0.5 * (d0 == 0), 0]]) * 0.1)
        for t in (1e-4, 0.1, 1.0):
            q, d = process.Q.clone().requires_grad_(), process.D.clone().requires_grad_()
            process_grad = LinearProcess(q, d)
            process_grad.Q, process_grad.D = q, d
            process_grad.snr(torch.tensor(t, dtype=torch.float64)).log().backward()
            step = mp.mpf("1e-30")
            for leaf, direction in ((q, [[0, -1], [1, 0]]), (d, [[0, 0], [0, 1]]), (d, [[1, 0], [0, 0]])):
                shifted = mp.matrix(leaf.tolist()) + step * mp.matrix(direction)
                pair = {"Q": shifted} if leaf is q else {"D": shifted}
                slope = (mp.log(reference(process, t, **pair)[2]) - mp.log(reference(process, t)[2])) / step
                ours = (leaf.grad * torch.tensor(direction, dtype=torch.float64)).sum()
                assert float(ours) == pytest.approx(float(slope), rel=1e-6), (t, direction)


def test_published_cld_numbers():
    """CLD paper's CIFAR-10 process, t = 0.1 and 0.5 (its table has numerical_eps = 1e-9 on the diagonal)."""
    cld = CLD.published()
    assert describe(cld) == describe(processes.get("cld", M=0.25, beta=(4, 4), init_aux_var=0.01))
    expected = {
        0.1: (0.808792, -0.179732, 0.221810, 0.129860, 0.215758),
        0.5: (0.0915782, -0.0366313, 0.986461, 5.28689e-3, 0.247934),
    }
    for t, (mx, mv, xx, xv, vv) in expected.items():
        mean, cov = cld.kernel(t)
        torch.testing.assert_close(mean, torch.tensor([mx, mv], dtype=torch.float64), rtol=1e-5, atol=0)
        torch.testing.assert_close(cov, torch.tensor([[xx, xv], [xv, vv]], dtype=torch.float64), rtol=1e-5, atol=0)
    # The published noise multiplier l_t = 1 / L_vv.
    assert 1 / float(cld.cholesky(0.1)[1, 1]) == pytest.approx(2.67518, rel=1e-5)


def test_published_matrices_and_ranges():
    assert processes.get("cld", M=4).D.tolist() == [[0, 0], [0, 4]] and processes.get("cld").Q[0, 1] == -1
    alda = processes.get("alda", M=0.3, gamma=1.7, psi=0.7)  # numbers that float32 would round
    assert alda.Q.tolist() == [[0, -0.3, 0], [0.3, 0, -1.7], [0, 1.7, 0]]
    assert alda.D[2, 2] == 0.7 * 0.3 and alda.D.count_nonzero() == 1 and alda.S.diagonal().tolist() == [1, 0.3, 0.3]
    for S in ([1, 0.3], (1, 0.3), [[1, 0], [0, 0.3]]):
        assert LinearProcess([[0, -1], [1, 0]], [[0, 0], [0, 0.1]], S=S).S[1, 1] == 0.3
    malda = processes.get("malda", V=4)
    assert (malda.Q.triu(1) == -torch.ones(4, 4).triu(1)).all() and malda.D.diagonal().tolist() == [0, 2, 2, 2]
    two, cld = processes.get("malda", V=2), processes.get("cld")
    assert torch.equal(two.Q, cld.Q) and torch.equal(two.D, cld.D) and torch.equal(two.S, cld.S)
    for name, sigma in {"vp": 12.5, "cld": 19.8, "malda": 112, "alda": 3.5}.items():
        assert float(processes.get(name).sigma(1.0)) == pytest.approx(sigma, rel=0.02)
    assert float(CLD.published().sigma(1.0)) == pytest.approx(248, rel=0.01)
    # First column of F(T), MDM's defaults.
    torch.testing.assert_close(
        malda.transition(1.0)[:2, 0], torch.tensor([0.0063, -0.0063]).double(), atol=1e-4, rtol=0
    )


def test_vp_closed_form():
    vp, t = processes.get("vp"), torch.tensor([1e-6, 0.1, 1.0], dtype=torch.float64)
    B = 0.1 * t + 9.9 * t**2 / 2
    torch.testing.assert_close(vp.sigma(t), torch.expm1(B).sqrt(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("full", [False, True])
def test_learned_stays_a_process(full):
    process = learned(V=4, full=full)
    assert len(list(process.parameters())) == 2
    optimizer = torch.optim.SGD(process.parameters(), lr=3.0)
    for t in (1e-5, 0.01, 1.0):
        process.snr(torch.tensor(t, dtype=torch.float64)).log().backward()
        assert all(p.grad.isfinite().all() for p in process.parameters())
        optimizer.step()
        Q, D = process.Q.detach(), process.D.detach()
        assert torch.equal(Q, -Q.mT) and torch.linalg.eigvalsh(D)[0] > 0
        assert float((D.diagonal() / process.S.diagonal()).sum()) == pytest.approx(4)
    process.requires_grad_(False)
    before = float(process.sigma(0.5))
    process.q.mul_(2)
    assert float(process.sigma(0.5)) != before  # no stale cache
    copy = build(describe(process), state=process.state_dict()).requires_grad_(False)
    assert float(copy.sigma(0.5)) == float(process.sigma(0.5))
    half = copy.to(torch.float16)  # a network's type does not touch the arithmetic
    assert half.sigma(0.5).dtype == torch.float64


@pytest.mark.parametrize("name", sorted(processes.REGISTRY))
def test_specs_are_plain_and_round_trip(name):
    options = {"linear": {"Q": [[0, -1], [1, 0]], "D": [[0.2, 0], [0, 1]]}, "pfgmpp": {"D": "inf"}}.get(name, {})
    process = processes.get(name, **options)
    spec = json.loads(json.dumps(describe(process), allow_nan=False))
    again = build(spec)
    assert type(again) is type(process) and describe(again) == spec
    if name != "learned" and processes.is_linear(process):
        assert float(again.sigma(0.3)) == float(process.sigma(0.3))
    noise = process.unit_noise((4, 3), torch.Generator().manual_seed(0))
    assert torch.equal(noise, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: processes.get("vesde"), "unknown"),
        (lambda: processes.get("cld", mass=1), "mass"),
        (lambda: LinearProcess([[0, 1], [1, 0]], torch.eye(2)), "skew"),
        (lambda: LinearProcess([[0, 1], [-1, 0]], [[1, 0], [0, -1]]), "semi-definite"),
        (lambda: LinearProcess([[0, 1], [-1, 0]], [[1, 1], [0, 1]]), "symmetric"),
        (lambda: LinearProcess([[0, 0], [0, 0]], [[0, 0], [0, 1]]), "no noise reaches"),
        (lambda: LinearProcess([[0, 1], [-1, 0]], torch.eye(2), S=[1, 0]), "diagonal"),
        (lambda: processes.get("vp", beta=(0, 0)), "beta"),
        (lambda: processes.get("cld", M=-1), "M"),
        (lambda: processes.get("malda", V=1), "V"),
        (lambda: PFGMpp(0), "D"),
        (lambda: PFGMpp("many"), "D"),
        (lambda: EDM(sigma_max=-1), "sigma_max"),
        (lambda: processes.get("vp").kernel_parts(0.0), "times in"),
        (lambda: processes.get("cld").sigma(-0.1), "time runs from 0"),
        (lambda: processes.get("cld", M=[1, 2]), "M = "),
        (lambda: processes.get("cld", init_aux_var="low"), "init_aux_var = 'low'"),
        (lambda: processes.get("alda", gamma=[1, 2]), "gamma = "),
        (lambda: processes.get("alda", psi=0), "psi = 0"),
        (lambda: processes.get("malda", V=float("inf")), "V = inf"),
        (lambda: processes.CLD.published(beta1="steep"), "beta1 = 'steep'"),
        (lambda: LinearProcess([[0, 1], [-1]], torch.eye(2)), "Q = .*rows of equal length"),
        (lambda: LinearProcess([[0, 1], [-1, 0]], torch.zeros(2, 2)), "D is zero"),
        (lambda: LinearProcess([[0, 1], [-1, 0]], torch.eye(2), S="unit"), "S = 'unit'"),
        (lambda: EDM(sigma_max="high"), "sigma_max = 'high'"),
    ],
)
def test_errors_name_the_cause(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# PFGM++.


@pytest.mark.filterwarnings("ignore:D = ")
@pytest.mark.parametrize("N, D", [(3072, 3072000), (12288, 16), (48, 4.5), (3072, 128), (2, 3.7), (1, 300), (192, 1e8)])
def test_student_t_noise_law(N, D):
    count = max(1000, min(20000, 2_000_000 // N))
    noise = PFGMpp(D).unit_noise((count, N), torch.Generator().manual_seed(0), dtype=torch.float64)
    radius = (noise.square().sum(1) / D).numpy()
    assert stats.kstest(radius, stats.betaprime(N / 2, D / 2).cdf).pvalue > 1e-3
    assert stats.kstest(noise[:, 0].numpy(), stats.t(D).cdf).pvalue > 1e-3


def test_same_seed_shares_everything_but_the_radius():
    for make in (lambda: torch.Generator().manual_seed(4), lambda: StackedRandomGenerator("cpu", [4, 7])):
        generators = {D: make() for D in (16, 2048, math.inf, None)}
        kernels = {D: EDM() if D is None else PFGMpp(D) for D in generators}
        noise = {D: kernels[D].unit_noise((2, 3, 8, 8), generators[D]) for D in generators}
        assert torch.equal(noise[math.inf], noise[None])  # bit for bit
        later = {D: torch.stack([torch.as_tensor(0.0)]) for D in generators}
        for D, generator in generators.items():
            draw = generator.randn([2, 5]) if isinstance(generator, StackedRandomGenerator) else None
            later[D] = torch.randn(5, generator=generator) if draw is None else draw
            assert torch.equal(later[D], later[16])
        cosine = torch.cosine_similarity(noise[16].flatten(1), noise[None].flatten(1))
        assert (cosine > 1 - 1e-6).all()
        assert not torch.allclose(noise[16], noise[2048], rtol=1e-3)


def test_large_D_is_gaussian():
    make = lambda: torch.Generator().manual_seed(0)
    torch.testing.assert_close(
        PFGMpp(1e12).unit_noise((64, 3, 8, 8), make()), EDM().unit_noise((64, 3, 8, 8), make()), atol=1e-5, rtol=1e-5
    )
    data = torch.randn(20, 3, 4, 4, generator=make())
    x = data[:10] + 0.3 * torch.randn(10, 3, 4, 4, generator=make())
    for sigma in (0.1, 0.5, 5.0):
        finite, gauss = pfgmpp.PosteriorMean(data, 1e12)(x, sigma), pfgmpp.PosteriorMean(data)(x, sigma)
        torch.testing.assert_close(finite, gauss, atol=1e-6, rtol=0)


@pytest.mark.parametrize("D", [1.0, 5.0, 128.0, math.inf])
def test_posterior_mean_against_the_written_out_sum(D):
    torch.manual_seed(0)
    data, x, sigma = torch.randn(5, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64), 0.7
    density = (
        (lambda r: stats.multivariate_normal(np.zeros(2), sigma**2 * np.eye(2)).pdf(r))
        if math.isinf(D)
        else (lambda r: stats.multivariate_t(np.zeros(2), sigma**2 * np.eye(2), df=D).pdf(r))
    )
    weights = np.array([[density((x[i] - data[j]).numpy()) for j in range(5)] for i in range(3)])
    expected = weights / weights.sum(1, keepdims=True) @ data.numpy()
    np.testing.assert_allclose(pfgmpp.PosteriorMean(data, D)(x, sigma), expected, rtol=1e-10)
    log_kernel = pfgmpp.log_kernel(x.square().sum(1), sigma, 2, D)
    expected_log = np.log([density(row.numpy()) for row in x])
    np.testing.assert_allclose(log_kernel.diff(), np.diff(expected_log), rtol=1e-10)  # up to a constant


def test_radius_table():
    """Published quantiles of R / (sigma sqrt N) at N = 3072 and N = 12288."""
    rows = {
        (3072, 16): (0.637, 0.779, 1.021, 1.418, 2.016),
        (3072, 3072000): (0.961, 0.979, 1.000, 1.021, 1.040),
        (12288, 128): (0.835, 0.907, 1.003, 1.116, 1.234),
    }
    for (N, D), expected in rows.items():
        noise = PFGMpp(D).unit_noise((4000, N), torch.Generator().manual_seed(0))
        ours = torch.quantile(noise.norm(dim=1) / N**0.5, torch.tensor([0.001, 0.05, 0.5, 0.95, 0.999]))
        np.testing.assert_allclose(ours[1:4], expected[1:4], rtol=0.02)
        np.testing.assert_allclose(ours, expected, rtol=0.1)


def test_phase_alignment():
    """Mean TVD against sigma coincides for D >= 256 and deviates a little at D = 16 (PFGM++ Figure 3)."""
    data = torch.randn(100, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas, curves = [0.5, 3.0, 10.0, 40.0], {}
    for D in (16, 256, 2.0**20, math.inf):
        curves[D], error = mean_tvd(data, PFGMpp(D), sigmas, 400, torch.Generator().manual_seed(1))
    assert (curves[256] - curves[math.inf]).abs().max() < 4 * error.max() + 0.01
    assert (curves[2.0**20] - curves[math.inf]).abs().max() < 1e-3
    assert curves[math.inf][0] > 0.95 and curves[math.inf][-1] < 0.3 and (curves[math.inf].diff() < 0).all()


def test_small_D_warns():
    with pytest.warns(UserWarning, match="no finite mean"):
        assert aug_dim(PFGMpp(1.5)) == 1.5
    with pytest.warns(UserWarning, match="no finite variance"):
        PFGMpp(3)
    assert aug_dim(PFGMpp("inf")) == aug_dim(EDM()) == aug_dim(processes.get("cld")) == aug_dim(None) == math.inf


# Noise levels for training.


def test_importance_time_quantiles():
    """MDM's published quantiles at its defaults, t_min = 1e-3."""
    ours = importance_time([0.1, 0.25, 0.5, 0.75, 0.9], processes.get("cld"), 1e-3)
    np.testing.assert_allclose(ours, [0.0037, 0.0189, 0.146, 0.575, 0.849], atol=6e-4)
    ends = importance_time([0.0, 1.0], processes.get("vp", beta=(3, 3)), 1e-3)
    np.testing.assert_allclose(ends, [1e-3, 1], rtol=1e-9)


@pytest.mark.parametrize("name", ["vp", "cld", "malda"])
@pytest.mark.parametrize("weighting", ["likelihood", "reweightedv1", "reweightedv2"])
def test_objective_does_not_depend_on_the_time_law(name, weighting):
    """The integral of weight * sigma^2 / (1 + sigma^2), by quadrature in t and by each law."""
    process = processes.get(name)
    t = torch.linspace(math.log(1e-3), 0, 1001, dtype=torch.float64).exp()
    loss = lambda sigma: sigma**2 / (1 + sigma**2)
    truth = torch.trapezoid(weight(process, t, weighting) * loss(process.sigma(t)), t)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for sampling in ("uniform", "importance", "snr"):
        sigma, value = NoiseLevels(process, sampling, weighting, t_min=1e-3).draw(uniform)
        assert float((value * loss(sigma)).mean()) == pytest.approx(float(truth), rel=1e-2), sampling


def test_published_weights():
    vp, cld, t = processes.get("vp"), processes.get("cld"), 0.3
    assert float(weight(vp, t, "reweightedv2")) == pytest.approx(float(vp.snr(t)))
    # CLD §4.2: lambda(t) = l^-2 on the error of the v score, which is (C^-1 m)_v per unit of D - x0.
    mean, cov = cld.kernel(t)
    gain, l2 = torch.linalg.solve(cov, mean)[1], torch.linalg.inv(cov)[1, 1]
    assert float(weight(cld, t, "reweightedv2")) == pytest.approx(float(gain**2 / l2))
    assert float(weight(cld, t, "reweightedv1")) == pytest.approx(float(2 * cld.beta(t) * gain**2 / l2))
    assert float(weight(cld, t)) == pytest.approx(float(2 * cld.beta(t) * gain**2))
    with pytest.raises(ValueError, match="not defined"):
        NoiseLevels(EDM(), "importance", "likelihood", 0.002)
    edm, value = NoiseLevels(EDM(), "snr", "likelihood", 0.002).draw(torch.tensor([0.2, 0.7]))
    ratio = value * edm**2 * 0.25 / (edm**2 + 0.25)  # EDM's weight up to a constant
    assert float(ratio[0]) == pytest.approx(float(ratio[1]))
