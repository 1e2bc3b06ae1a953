"""Solvers against closed forms: Gaussian and mixture denoisers, hand-written steps of the published samplers."""

import math

import numpy as np
import pytest
import torch

from torch_utils.random import StackedRandomGenerator
from training import processes, samplers
from training.processes import CLD, EDM, PFGMpp, pfgmpp
from training.processes.score import make_score

GAUSS_VAR = 0.3


class Gaussian:
    """Optimal denoiser of N(mean, var), computed in the input's type."""

    sigma_data, sigma_min, sigma_max = 0.5, 0.0, math.inf

    def __init__(self, mean=0.0, var=GAUSS_VAR):
        self.mean, self.var, self.calls = mean, var, 0

    def __call__(self, x, sigma, labels=None):
        self.calls += 1
        sigma = torch.as_tensor(sigma, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        assert sigma.dtype == x.dtype
        skip = self.var / (self.var + sigma**2)
        mean = self.mean if labels is None else (labels @ torch.tensor([-1.0, 1.0], dtype=x.dtype)).reshape(sigma.shape)
        return mean + skip * (x - mean)


class Preconditioned(Gaussian):
    """The same denoiser as an EDM network computes it: c_skip x + c_out F, in the input's type."""

    def __call__(self, x, sigma, labels=None):
        sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
        data, total = self.sigma_data**2, sigma**2 + self.sigma_data**2
        share = sigma**2 / (self.var + sigma**2)
        out = share * self.mean + (self.var - data) * share / total * x
        return data / total * x + out


class Mixture:
    """Optimal denoiser of three narrow 2-D Gaussians, points as [N, 2, 1, 1]."""

    sigma_data, sigma_min, sigma_max = 0.5, 0.0, math.inf
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    means = torch.tensor([[0.6, 0.0], [-0.4, 0.5], [-0.4, -0.5]], dtype=torch.float64)
    var = 0.06**2

    def __call__(self, x, sigma, labels=None):
        flat = x.to(torch.float64).flatten(1)
        noise = torch.as_tensor(sigma).to(torch.float64).reshape(-1, 1) ** 2
        distance = (flat[:, None] - self.means).square().sum(-1)
        share = torch.softmax(self.weights.log() - distance / (2 * (self.var + noise)), dim=1)
        mean = share @ self.means
        return (mean + self.var / (self.var + noise) * (flat - mean)).reshape(x.shape).to(x.dtype)


CONTRACT = {"transition", "kernel", "snr", "sigma", "time", "project", "score", "drift", "diffusion", "prior_sample"}
LINEAR = {
    "vp": lambda: processes.get("vp"),
    "cld": lambda: processes.get("cld"),
    "cld-paper": lambda: CLD.published(),
    "malda": lambda: processes.get("malda"),
    "edm": lambda: EDM(),
    "learned": lambda: processes.get("learned", V=2),
}
SOLVERS = {
    "em": samplers.euler_maruyama,
    "sscs": samplers.sscs,
    "flow": samplers.probability_flow,
}


# Heun.


def heun_errors(num_steps, **options):
    """Error at sigma_min against the exact flow of a Gaussian, for one unit of noise."""
    states = samplers.heun_states(
        Gaussian(), torch.ones(1, 1, 1, 1), num_steps=num_steps, sigma_min=0.05, dtype=torch.float64, **options
    )
    last = list(states)[-2]
    exact = 80 * math.sqrt((GAUSS_VAR + last.time**2) / (GAUSS_VAR + 80**2))
    return abs(float(last.state) / exact - 1)


def test_heun_is_of_second_order():
    errors = np.array([heun_errors(n) for n in (65, 129, 257)])
    rates = np.log2(errors[:-1] / errors[1:])
    assert (abs(rates - 2) < 0.1).all(), rates


def test_heun_moments_of_the_mixture():
    noise = torch.randn(8000, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    check_mixture(samplers.heun(Mixture(), noise, num_steps=40))


def check_mixture(images, tolerance=0.1):
    """Share and mean of each mode within 5 standard errors, its variance within `tolerance`."""
    points = images.flatten(1).to(torch.float64)
    mode = (points[:, None] - Mixture.means).square().sum(-1).argmin(1)
    for index, (weight, mean) in enumerate(zip(Mixture.weights, Mixture.means, strict=True)):
        own = points[mode == index]
        assert abs(len(own) / len(points) - weight) < 5 * math.sqrt(weight * (1 - weight) / len(points))
        assert (own.mean(0) - mean).norm() < 5 * math.sqrt(2 * Mixture.var / len(own))
        assert float(own.var(0).mean()) == pytest.approx(Mixture.var, rel=tolerance)


def test_heun_step_by_step():
    """Churn and guidance as EDM2 writes them, with noise drawn only where it churns."""
    net, guide, draws = Gaussian(0.2), Gaussian(-0.3, 0.8), []
    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def randn_like(x):
        draws.append(torch.randn(x.shape, generator=torch.Generator().manual_seed(len(draws)), dtype=x.dtype))
        return draws[-1]

    options = {"num_steps": 5, "S_churn": 2, "S_min": 0.05, "S_max": 50, "S_noise": 1.01, "guidance": 1.7}
    ours = samplers.heun(net, noise, None, guide, dtype=torch.float64, randn_like=randn_like, **options)
    t = [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(5)] + [0.0]
    x, count = noise * t[0], 0
    denoise = lambda x, s: (
        guide(x, torch.tensor(s, dtype=torch.float64))
        + 1.7 * (net(x, torch.tensor(s, dtype=torch.float64)) - guide(x, torch.tensor(s, dtype=torch.float64)))
    )
    for i in range(5):
        hat = t[i]
        if 0.05 <= t[i] <= 50:
            hat = t[i] * (1 + min(2 / 5, math.sqrt(2) - 1))
            x = x + math.sqrt(hat**2 - t[i] ** 2) * 1.01 * draws[count]
            count += 1
        slope = (x - denoise(x, hat)) / hat
        new = x + (t[i + 1] - hat) * slope
        if i < 4:
            new = x + (t[i + 1] - hat) * (slope + (new - denoise(new, t[i + 1])) / t[i + 1]) / 2
        x = new
    assert count == len(draws) == 3
    torch.testing.assert_close(ours, x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [dict(sigma_min=0), dict(sigma_min=90), dict(num_steps=2.5), dict(num_steps=0)])
def test_heun_refuses_impossible_grids(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        samplers.heun(Gaussian(), torch.zeros(1, 1, 2, 2), **options)


def test_heun_calls_and_edges():
    def forbidden(x):
        raise AssertionError("drew without churn")

    net, noise = Gaussian(), torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    images = samplers.heun(net, noise, num_steps=32, randn_like=forbidden)
    assert net.calls == 63 and images.dtype == torch.float32 and images.isfinite().all()
    one = samplers.heun(net, noise, num_steps=1)
    torch.testing.assert_close(one, net(noise * 80, torch.tensor(80.0)), rtol=0, atol=1e-4)  # of numbers near 80
    with pytest.raises(ValueError, match="num_steps"):
        samplers.heun(net, noise, num_steps=0)
    with pytest.raises(ValueError, match="guiding"):
        samplers.heun(net, noise, guidance=2)


def test_samples_do_not_depend_on_the_batch():
    options = {"num_steps": 6, "S_churn": 3}

    def run(seeds):
        generator = StackedRandomGenerator("cpu", seeds)
        noise = generator.randn([len(seeds), 2, 1, 1])
        return samplers.heun(Mixture(), noise, randn_like=generator.randn_like, **options)

    torch.testing.assert_close(run([5, 6, 7])[1:], run([6, 7]), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:D = ")
@pytest.mark.parametrize("D", [1, 16, 128, 2048, math.inf])
def test_finite_data_denoiser_lands_on_the_data(D):
    data = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    noise = PFGMpp(D).unit_noise((64, 3, 4, 4), torch.Generator().manual_seed(0))
    images = samplers.heun(pfgmpp.PosteriorMean(data, D), noise, num_steps=18)
    distance = (images[:, None] - data).flatten(2).norm(dim=2).min(1).values
    assert (distance < 1e-3).all()
    if math.isinf(D):
        gauss = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        assert torch.equal(images, samplers.heun(pfgmpp.PosteriorMean(data), gauss, num_steps=18))


@pytest.mark.filterwarnings("ignore:D = ")
def test_heavy_tails_land_on_the_data_too():
    """At D = 1 some samples are still far away at the default end; a lower one is low enough."""
    data = torch.randn(8, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise = PFGMpp(1.0).unit_noise([1000, 2, 1, 1], torch.Generator().manual_seed(1)).double()
    points = samplers.heun(pfgmpp.PosteriorMean(data, 1.0), noise, num_steps=64, sigma_min=1e-5, dtype=torch.float64)
    assert float(torch.cdist(points.flatten(1), data.flatten(1)).min(dim=1).values.max()) < 1e-3


# Linear processes: exact laws by linearity.


def gaussian_error(solver, process, var=0.25, mean=0.3, **options):
    """Wasserstein-2 distance of the solver's output law to N(mean, var), without sampling.

    A Gaussian denoiser makes every step affine in (latents, noises): each row of the batch has one unit of one of them.
    """
    net, V = Gaussian(mean, var), process.V
    options = {"net_dtype": torch.float64, **options}
    draws = 0

    def count(u):
        nonlocal draws
        draws += 1
        return torch.zeros_like(u)

    solver(net, process, torch.zeros(1, V, 1, dtype=torch.float64), randn_like=count, **options)
    rows = 1 + V + draws * V  # offset, latents, noises
    latents = torch.zeros(rows, V, 1, dtype=torch.float64)
    t_start, _ = samplers.endpoints(net, process, **{k: v for k, v in options.items() if k in ("grid", "t_min")})
    start_mean, cov = process.kernel(t_start)
    root = torch.linalg.cholesky(cov + var * start_mean[:, None] * start_mean)  # the true law of the data at the start
    latents[:, :, 0] = start_mean * mean
    latents[1 : 1 + V, :, 0] += root.mT
    drawn = 0

    def unit(u):
        nonlocal drawn
        noise = torch.zeros_like(u)
        for v in range(V):
            noise[1 + V + drawn * V + v, v] = 1
        drawn += 1
        return noise

    out = solver(net, process, latents, randn_like=unit, **options).flatten()
    std = (out[1:] - out[0]).norm()
    return math.hypot(float(out[0]) - mean, float(std) - math.sqrt(var))


@pytest.mark.parametrize("grid", ["uniform", "quadratic"])
@pytest.mark.parametrize("name", ["cld-paper", "cld", "malda"])
@pytest.mark.parametrize("steps", [20, 50])
def test_sscs_beats_euler_maruyama(name, grid, steps):
    errors = {
        key: gaussian_error(SOLVERS[key], LINEAR[name](), num_steps=steps, grid=grid, t_min=1e-3)
        for key in ("em", "sscs")
    }
    assert errors["sscs"] < (0.6 if steps == 20 else 0.8) * errors["em"], errors


@pytest.mark.filterwarnings("ignore:.*reaches only")
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("key", SOLVERS)
def test_solvers_converge_to_the_gaussian(name, key):
    torch.manual_seed(0)
    process = LINEAR[name]().requires_grad_(False) if name == "learned" else LINEAR[name]()
    coarse, fine = (gaussian_error(SOLVERS[key], process, num_steps=n) for n in (25, 100))
    assert fine < 0.03 and fine < 0.5 * coarse + 2e-4, (coarse, fine)


def test_flow_is_of_second_order_and_meets_rk45():
    cld, net = LINEAR["cld"](), Gaussian()
    latents = samplers.start_state(net, cld, (4, 1), torch.Generator().manual_seed(0))
    options = {"net_dtype": torch.float64, "sigma_min": 0.02}
    runs = [samplers.probability_flow(net, cld, latents, num_steps=n, **options) for n in (40, 80, 160, 320)]
    gaps = [float((after - before).norm()) for before, after in zip(runs[:-1], runs[1:], strict=True)]
    rates = np.log2(np.array(gaps[:-1]) / gaps[1:])
    assert abs(rates[-1] - 2) < 0.25, (gaps, rates)
    adaptive = samplers.probability_flow(net, cld, latents, method="rk45", rtol=1e-6, atol=1e-7, **options)
    assert (runs[-1] - adaptive).norm() < 2 * gaps[-1] + 1e-5


def test_a_process_needs_no_more_than_the_contract():
    """A process of somebody else's, with the contract's methods only, through the general solvers."""
    vp = processes.get("vp")

    class Foreign:
        V = 1

        def __getattr__(self, name):
            if name not in CONTRACT:
                raise AttributeError(name)
            return getattr(vp, name)

    net, latents = Gaussian(), torch.randn(50, 1, 2, dtype=torch.float64)
    for solver, rtol in ((samplers.euler_maruyama, 1e-9), (samplers.probability_flow, 2e-2)):
        ours, own = (solver(net, process, latents, num_steps=60, randn_like=Recorded()) for process in (Foreign(), vp))
        torch.testing.assert_close(ours, own, rtol=rtol, atol=rtol)


def test_flow_under_edm_is_heun():
    net, noise = Gaussian(), torch.randn(3, 2, dtype=torch.float64)
    grid = [state.time for state in samplers.heun_states(net, noise, num_steps=18, dtype=torch.float64)]
    heun = samplers.heun(net, noise, num_steps=18, dtype=torch.float64)
    ours = samplers.probability_flow(net, EDM(), 80 * noise[:, None], times=grid[:-1], net_dtype=torch.float64)
    torch.testing.assert_close(ours, heun, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name, key, steps",
    [("vp", "em", 150), ("cld", "sscs", 100), ("malda", "em", 150), ("edm", "flow", 30), ("learned", "sscs", 100)],
)
def test_mixture_through_every_solver(name, key, steps):
    torch.manual_seed(0)
    process, net = LINEAR[name](), Mixture()
    latents = samplers.start_state(net, process, (6000, 2, 1, 1), torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    randn_like = lambda u: torch.randn(u.shape, generator=generator, dtype=u.dtype)
    check_mixture(SOLVERS[key](net, process, latents, num_steps=steps, randn_like=randn_like), tolerance=0.2)


# The published samplers, written out for CLD with x and v apart.


class Nonlinear:
    """A score for all components, with no denoiser behind it."""

    def score(self, u, t):
        return -torch.tanh(u) * (1 + t)


class Recorded:
    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.noises = []

    def __call__(self, u):
        self.noises.append(torch.randn(u.shape, generator=self.generator, dtype=torch.float64))
        return self.noises[-1]


BETA0, SLOPE, M_INV = 0.1, 6.9, 4.0
GAMMA = 2 / math.sqrt(M_INV)


def beta(t):
    return BETA0 + SLOPE * t


def integral(t):
    return BETA0 * t + SLOPE * t**2 / 2


def published_drift(x, v, t):
    """Reverse drift; only the v score enters."""
    s = -torch.tanh(v) * (1 + t)
    return -M_INV * beta(t) * v, beta(t) * x + GAMMA * M_INV * beta(t) * v + 2 * GAMMA * beta(t) * s


def published_half(x, v, t, t_next, noise):
    b, g = integral(t) - integral(t_next), 1 / GAMMA
    decay, e4 = math.exp(-2 * g * b), math.exp(-4 * g * b)
    x, v = decay * ((1 + 2 * g * b) * x - 4 * g**2 * b * v), decay * (b * x + (1 - 2 * g * b) * v)
    xx = e4 * (math.expm1(4 * g * b) - 4 * g * b - 8 * g**2 * b**2)
    xv = -4 * g * b**2 * e4
    vv = e4 * (GAMMA**2 / 4 * math.expm1(4 * g * b) + GAMMA * b - 2 * b**2)
    l11 = math.sqrt(xx)
    l21 = xv / l11
    return x + l11 * noise[:, 0], v + l21 * noise[:, 0] + math.sqrt(vv - l21**2) * noise[:, 1]


@pytest.mark.parametrize("grid", ["uniform", "quadratic"])
@pytest.mark.parametrize("key", ["em", "sscs-published", "sscs-exact"])
@pytest.mark.parametrize("denoise", [False, "euler"])
def test_published_cld_trajectories(grid, key, denoise):
    steps, eps, randn_like = 12, 1e-3, Recorded()
    cld = CLD.published(m_inv=M_INV, beta0=BETA0, beta1=SLOPE)
    latents = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    options = {"num_steps": steps, "grid": grid, "t_min": eps, "denoise": denoise, "randn_like": randn_like}
    if key == "em":
        ours = samplers.euler_maruyama(Nonlinear(), cld, latents, **options)
    else:
        ours = samplers.sscs(Nonlinear(), cld, latents, half_step=key.removeprefix("sscs-"), **options)

    K = steps - (denoise == "euler")
    reverse = [(1 - eps) * (i / K if grid == "uniform" else 1 - ((K - i) / K) ** 2) for i in range(K + 1)]
    x, v, noises = latents[:, 0], latents[:, 1], iter(randn_like.noises)
    for now, then in zip(reverse[:-1], reverse[1:], strict=True):
        t, delta = 1 - now, then - now
        if key == "em":
            dx, dv = published_drift(x, v, t)
            noise = next(noises)
            x, v = x + dx * delta, v + dv * delta + math.sqrt(2 * GAMMA * beta(t) * delta) * noise[:, 1]
        else:
            x, v = published_half(x, v, t, t - delta / 2, next(noises))
            power = beta(t) * delta if key.endswith("published") else integral(t) - integral(t - delta)
            v = v + 2 * GAMMA * power * (-torch.tanh(v) * (1 + t) + M_INV * v)
            second = (t, t - delta / 2) if key.endswith("published") else (t - delta / 2, t - delta)
            x, v = published_half(x, v, *second, next(noises))
    if denoise == "euler":
        x = x + published_drift(x, v, eps)[0] * eps
        next(noises)
    assert next(noises, None) is None
    torch.testing.assert_close(ours, x, rtol=1e-8, atol=1e-9)


def test_explicit_times_and_states():
    cld, net = LINEAR["cld"](), Gaussian()
    latents = torch.randn(2, 2, 3, dtype=torch.float64)
    times = torch.tensor([0.9, 0.5, 0.2, 0.01])
    for solver, watch in (
        (samplers.euler_maruyama, samplers.euler_maruyama_states),
        (samplers.sscs, samplers.sscs_states),
        (samplers.probability_flow, samplers.probability_flow_states),
    ):
        images = solver(net, cld, latents, num_steps=3, times=times, denoise=False, randn_like=Recorded())
        states = list(watch(net, cld, latents, times=times, denoise=False, randn_like=Recorded()))
        assert [state.step for state in states] == [0, 1, 2, 3]
        np.testing.assert_allclose([state.time for state in states], times, rtol=1e-6)
        assert torch.equal(states[-1].state[:, 0], images) and torch.equal(states[0].state, latents)
    # MDM returns the last step without its noise.
    vp, latents = processes.get("vp"), torch.randn(2, 1, 3, dtype=torch.float64)
    randn_like = Recorded()
    noisy = samplers.euler_maruyama(net, vp, latents, times=times, denoise=False, randn_like=randn_like)
    clean = samplers.euler_maruyama(net, vp, latents, times=times, denoise="mean", randn_like=Recorded())
    step = math.sqrt(float(vp.beta(times[2])) * float(times[2] - times[3]))
    torch.testing.assert_close(noisy - clean, step * randn_like.noises[-1][:, 0], rtol=1e-5, atol=1e-6)


def test_time_grids():
    cld, net = CLD.published(), Gaussian()
    net.sigma_min, net.sigma_max = 0.01, 50.0
    sigma = cld.sigma(samplers.time_grid(net, cld, 8))
    np.testing.assert_allclose(sigma ** (1 / 7), np.linspace(50 ** (1 / 7), 0.01 ** (1 / 7), 9), rtol=1e-8)
    published = samplers.time_grid(net, cld, 4, grid="quadratic", t_min=1e-3)
    np.testing.assert_allclose(published, 1e-3 + 0.999 * np.array([1, 9 / 16, 4 / 16, 1 / 16, 0]), rtol=1e-12)
    uniform = samplers.time_grid(net, cld, 4, grid="uniform", t_min=1e-3, t_max=0.5)
    np.testing.assert_allclose(uniform, np.linspace(0.5, 1e-3, 5), rtol=1e-12)
    with pytest.warns(UserWarning, match="reaches only"):
        assert samplers.time_grid(net, processes.get("alda"), 4)[0] == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 4, "grid": "cubic"}, "grid"),
        ({"num_steps": 4, "t_min": 2.0}, "t_min"),
        ({"times": [0.1, 0.5]}, "times"),
        ({"times": [0.5, 0.0]}, "times"),
        ({"num_steps": 3, "times": [0.5, 0.1]}, "num_steps = 3"),
        ({"num_steps": 3, "denoise": "maybe"}, "denoise"),
    ],
)
def test_errors_name_the_cause(options, message):
    with pytest.raises(ValueError, match=message):
        samplers.euler_maruyama(Gaussian(), processes.get("cld"), torch.zeros(1, 2, 2), **options)


def test_impossible_combinations_say_why():
    with pytest.raises(ValueError, match="without a linear-process view"):
        samplers.sscs(Gaussian(), PFGMpp(128), torch.zeros(1, 1, 2), num_steps=2)
    with pytest.raises(ValueError, match="2 variables"):
        samplers.sscs(Gaussian(), processes.get("cld"), torch.zeros(1, 3, 2), num_steps=2)
    with pytest.raises(ValueError, match="half_step"):
        samplers.sscs(Gaussian(), processes.get("cld"), torch.zeros(1, 2, 2), num_steps=2, half_step="both")


# The score seam.


def test_joint_networks_bring_their_own_score():
    cld, net = processes.get("cld"), Gaussian()
    labels = torch.eye(2, dtype=torch.float64)[[0, 1]]
    u, t = torch.randn(2, 2, 3, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
    reduced = make_score(net, cld, labels, net_dtype=torch.float64)

    class Joint:
        def score(self, u, t, labels):
            return make_score(net, cld, labels, net_dtype=torch.float64)(u, t)

    joint = make_score(Joint(), cld, labels)
    torch.testing.assert_close(joint(u, t), reduced(u, t))
    torch.testing.assert_close(joint.denoised(u, t), reduced.denoised(u, t))
    # The score of Gaussian data, from the dense covariance of the state.
    mean, cov = cld.kernel(t)
    cov = cov + GAUSS_VAR * mean[:, None] * mean
    centre = mean[None, :, None] * torch.tensor([-1.0, 1.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(reduced(u, t), -torch.linalg.solve(cov, u - centre), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["vp", "cld", "malda"])
def test_float32_network_is_as_good_as_float64(name):
    """Scores at t = 1e-5 agree where it counts, and samples down to t = 1e-5 have no bias."""
    process, net, t = processes.get(name), Preconditioned(0.5), torch.tensor(1e-5, dtype=torch.float64)
    assert float(process.sigma(t)) < 1.1e-3
    x0 = 0.5 + math.sqrt(GAUSS_VAR) * torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)).double()
    mean, L = process.kernel(t)[0], process.cholesky(t)
    noise = torch.randn(2000, process.V, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u = mean[:, None] * x0[:, None] + L @ noise
    single, double = (make_score(net, process, None, dtype)(u, t) for dtype in (torch.float32, torch.float64))
    error = (single - double) / double.square().mean((0, 2), keepdim=True).sqrt()
    assert (error.square().mean((0, 2)).sqrt() < 0.05).all()  # rounding of D, over sigma^2
    # The same noise through the whole sampler, with any denoiser: neither bias nor spread.
    latents = samplers.start_state(net, process, (4000, 1), torch.Generator().manual_seed(2))
    for denoiser in (net, Gaussian(0.5)):
        options = {"num_steps": 30, "t_min": 1e-5, "denoise": False}
        images = [
            samplers.euler_maruyama(denoiser, process, latents, net_dtype=dtype, randn_like=Recorded(3), **options)
            for dtype in (torch.float32, torch.float64)
        ]
        assert (images[0] - images[1]).abs().max() < 1e-5
