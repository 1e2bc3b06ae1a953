"""Likelihoods against closed forms for Gaussian data and mixtures."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from training import processes
from training.likelihood import discretised_log_prob, elbo, endpoint_kl, ode_log_likelihood
from training.processes import CLD, EDM, LinearProcess, PFGMpp

STDS = torch.tensor([0.7, 1.3, 0.25], dtype=torch.float64)
EXACT = {"net_dtype": torch.float64}


class Gaussian:
    """Optimal denoiser of independent Gaussians with standard deviations STDS."""

    sigma_data, sigma_min, sigma_max = 0.5, 0.0, math.inf

    def __call__(self, x, sigma, labels=None):
        sigma = torch.as_tensor(sigma).reshape(-1, 1)
        return x * (STDS**2).to(x.dtype) / ((STDS**2).to(x.dtype) + sigma**2)


def gaussian_data(count, seed=0):
    return STDS * torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_density(x):
    return torch.from_numpy(stats.norm.logpdf(x.numpy(), scale=STDS.numpy()).sum(1))


def rough():
    generator = torch.Generator().manual_seed(5)
    q, b = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    return LinearProcess(q - q.mT, b @ b.mT / 2 + 0.2 * torch.eye(3))


PROCESSES = {
    "edm": lambda: EDM(),
    "vp": lambda: processes.get("vp"),
    "cld": lambda: processes.get("cld"),
    "cld-paper": lambda: CLD.published(),
    "malda": lambda: processes.get("malda"),
    "alda": lambda: processes.get("alda"),
    "random": rough,
}


def expected_gap(process, t_min, t_max):
    """Exact expectation of ELBO - log p for the optimal denoiser: -KL(q(u_T) || N(0, S)), less what the decoder loses.

    The chain rule: the bound's gap is the KL of the end point's marginal plus the decoder's own mismatch.
    """
    var = STDS**2
    mean, cov = process.kernel(t_max)
    marginal = cov + var[:, None, None] * mean[:, None] * mean
    prior = process.prior_covariance("stationary", t_max)
    inverse = torch.linalg.inv(prior)
    kl = 0.5 * ((inverse @ marginal).diagonal(dim1=-2, dim2=-1).sum(-1) - process.V + torch.logdet(prior))
    kl = (kl - 0.5 * torch.logdet(marginal)).sum()
    sigma2 = float(process.sigma(t_min)) ** 2
    true, used = sigma2 * var / (sigma2 + var), sigma2 * 0.25 / (sigma2 + 0.25)
    decoder = 0.5 * (true / used - 1 - torch.log(true / used)).sum()
    return -float(kl + decoder)


def within(values, truth, errors=3.0, slack=1e-4):
    """Mean within `errors` standard errors of the truth."""
    error = float(values.std()) / math.sqrt(len(values))
    return abs(float(values.mean()) - truth) < errors * error + slack


@pytest.mark.parametrize("name", PROCESSES)
def test_elbo_equals_its_exact_expectation(name):
    process, x = PROCESSES[name](), gaussian_data(2000)
    generator = torch.Generator().manual_seed(1)
    t_min = float(process.time(0.05))
    bound, parts = elbo(
        Gaussian(), process, x, num_samples=8, t_min=t_min, t_max=process.T, terms=True, generator=generator, **EXACT
    )
    gap = bound - log_density(x)
    assert bound.shape == (2000,) and bound.dtype == torch.float64
    assert within(gap, expected_gap(process, t_min, process.T))
    assert float(gap.mean()) < 3 * float(gap.std()) / math.sqrt(2000)
    torch.testing.assert_close(parts["diffusion"] + parts["decoder"] - parts["kl"], bound)
    assert parts["sigma_min"] == pytest.approx(0.05) and parts["sigma_max"] == pytest.approx(
        float(process.sigma(process.T))
    )


class Uneven(Gaussian):
    """Not optimal, so the bound has a real gap."""

    def __call__(self, x, sigma, labels=None):
        return 0.9 * super().__call__(x, sigma) + 0.02


def test_path_freeness():
    """At matched ends the bound is the same for every process, and the seed's draws make it so to the last digits."""
    x = gaussian_data(500)
    options = {"sigma_min": 0.01, "sigma_max": 3.0, "prior": "matched", **EXACT}
    bounds, fresh = [], []
    for index, name in enumerate(PROCESSES):
        process = PROCESSES[name]()
        bounds.append(elbo(Uneven(), process, x, generator=torch.Generator().manual_seed(0), **options))
        fresh.append(elbo(Uneven(), process, x, generator=torch.Generator().manual_seed(index), **options))
    for bound in bounds[1:]:
        torch.testing.assert_close(bound, bounds[0], rtol=1e-5, atol=1e-5)
    for bound in fresh[1:]:
        assert within(bound - fresh[0], 0.0)


@pytest.mark.parametrize("prior", ["stationary", "matched"])
@pytest.mark.parametrize("name", PROCESSES)
def test_endpoint_kl_against_torch(name, prior):
    process, x, t = PROCESSES[name](), gaussian_data(4), 0.6
    mean, cov = process.kernel(t)
    target = torch.distributions.MultivariateNormal(
        torch.zeros(process.V, dtype=torch.float64), process.prior_covariance(prior, t, 0.5)
    )
    source = torch.distributions.MultivariateNormal(x[..., None] * mean, cov.expand(4, 3, -1, -1))
    expected = torch.distributions.kl_divergence(source, target.expand((4, 3))).sum(1)
    torch.testing.assert_close(endpoint_kl(process, x, t, prior), expected, rtol=1e-8, atol=1e-8)


def test_gradient_in_the_matrices_is_the_endpoints():
    """Mean gradient of the ELBO in Q and D against the derivative of its exact expectation."""
    Q = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    D = torch.tensor([[0.3, 0.1], [0.1, 1.2]], dtype=torch.float64)
    t_min, t_max, x = 0.02, 0.5, gaussian_data(3000)
    process = LinearProcess(Q, D)

    def with_grad():
        process.Q, process.D = Q.clone().requires_grad_(), D.clone().requires_grad_()
        return process.Q, process.D

    leaves = with_grad()
    # Exact expectation over x ~ N(0, v), differentiable: KL of the ends and the integral of the optimal error.
    var, snr = STDS**2, [process.snr(torch.tensor(t, dtype=torch.float64)) for t in (t_min, t_max)]
    mean, cov = process.kernel(t_max)
    kl = 0.5 * sum(cov.trace() + v * mean.square().sum() - 2 - torch.logdet(cov) for v in var)
    # Integral of 1/2 E|D - x|^2 = 1/2 v / (1 + v snr) over snr.
    diffusion = sum(0.5 * (torch.log1p(v * snr[0]) - torch.log1p(v * snr[1])) for v in var)
    sigma2 = 1 / snr[0]
    used = sigma2 * 0.25 / (sigma2 + 0.25)
    decoder = sum(-0.5 * torch.log(used) - 0.5 * (sigma2 * v / (sigma2 + v)) / used for v in var)
    expected = torch.autograd.grad(decoder - diffusion - kl, leaves)

    leaves, grads = with_grad(), []
    for index in range(20):
        part = x[index * 150 : (index + 1) * 150]
        generator = torch.Generator().manual_seed(index)
        bound = elbo(Gaussian(), process, part, t_min=t_min, t_max=t_max, num_samples=4, generator=generator, **EXACT)
        grad = torch.autograd.grad(bound.mean(), leaves)
        grads.append([grad[0][1, 0] - grad[0][0, 1], grad[1][0, 0], grad[1][1, 1], grad[1][0, 1] + grad[1][1, 0]])
    grads = torch.tensor(grads)
    truth = [expected[0][1, 0] - expected[0][0, 1], expected[1][0, 0], expected[1][1, 1]]
    truth.append(expected[1][0, 1] + expected[1][1, 0])
    for column, value in zip(grads.mT, truth, strict=True):
        assert within(column, float(value), errors=4.0)
        assert abs(float(value)) > 3 * float(column.std()) / math.sqrt(20)  # or the test would not notice a sign


def test_learned_parameters_receive_gradient():
    torch.manual_seed(0)
    process = processes.get("learned", V=3, full=True)
    elbo(Gaussian(), process, gaussian_data(4), **EXACT).mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in process.parameters())


@pytest.mark.parametrize("name", PROCESSES)
def test_ode_likelihood_of_gaussian_data(name):
    """Reduced and exact trace: the truth, but for the end points' KL, which is small except for ALDA."""
    process, x = PROCESSES[name](), gaussian_data(60)
    gap = ode_log_likelihood(Gaussian(), process, x, probe="exact", prior="matched", **EXACT) - log_density(x)
    assert float(gap.abs().max()) < {"alda": 0.5, "vp": 0.05, "cld": 0.03, "random": 0.05}.get(name, 2e-3)
    assert within(gap, 0.0, errors=4.0, slack=0.003)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_probes_are_unbiased(probe):
    process, x = EDM(), gaussian_data(150)
    net = Rotated()
    options = {"rtol": 1e-4, "atol": 1e-4, "sigma_min": 0.05, **EXACT}
    exact = ode_log_likelihood(net, process, x, probe="exact", **options)
    spread = []
    for count in (1, 4):
        generator = torch.Generator().manual_seed(0)
        gap = (
            ode_log_likelihood(net, process, x, probe=probe, hutch_probes=count, generator=generator, **options) - exact
        )
        assert within(gap, 0.0, errors=4.0, slack=1e-3)
        spread.append(float(gap.std()))
    assert spread[1] < 0.75 * spread[0]
    assert spread[0] > 0.05  # the probes matter here


class Rotated(Gaussian):
    """Gaussian denoiser with correlated coordinates: Rademacher probes are not exact."""

    basis = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q

    def __call__(self, x, sigma, labels=None):
        basis = self.basis.to(x.dtype)
        return super().__call__(x @ basis, sigma) @ basis.mT


@pytest.mark.parametrize("name", ["vp", "cld"])
def test_joint_flow_agrees_with_the_reduced_one(name):
    """The whole state's likelihood, less that of the auxiliaries: equal with a decoder, a lower bound without."""
    process, x = PROCESSES[name](), gaussian_data(40)
    options = {"probe": "exact", "rtol": 1e-5, "atol": 1e-5, **EXACT}
    generator = lambda: torch.Generator().manual_seed(0)
    truth = log_density(x)
    joint = ode_log_likelihood(
        Gaussian(), process, x, state="joint", decoder="gaussian", generator=generator(), sigma_min=0.01, **options
    )
    reduced = ode_log_likelihood(
        Gaussian(), process, x, decoder="gaussian", generator=generator(), sigma_min=0.01, **options
    )
    assert (joint - truth).abs().max() < 0.1 and (reduced - truth).abs().max() < 0.1
    assert within(joint - truth, 0.0, errors=4.0, slack=0.01)
    published = ode_log_likelihood(Gaussian(), process, x, state="joint", generator=generator(), **options) - truth
    assert float(published.mean()) < 3 * float(published.std()) / math.sqrt(40) + 0.01
    assert float(published.mean()) > -0.1

    class Joint:
        """Brings its own score, the closed form of the whole state."""

        def score(self, u, t):
            mean, cov = process.kernel(t)
            cov = cov + (STDS**2)[:, None, None] * mean[:, None] * mean  # [3, V, V]
            return -torch.einsum("dvw,nwd->nvd", torch.linalg.inv(cov), u)

    own = ode_log_likelihood(Joint(), process, x, generator=generator(), **options) - truth
    torch.testing.assert_close(own, published, rtol=0, atol=2e-2)


def test_ode_likelihood_of_a_mixture():
    """Two modes in one dimension: the true density, float32 network, default tolerances."""

    class Mixture:
        sigma_data, sigma_min, sigma_max = 0.6, 0.0, math.inf

        def __call__(self, x, sigma, labels=None):
            var = 0.2**2 + torch.as_tensor(sigma).reshape(-1, 1) ** 2
            pull = torch.tanh(0.5 * x / var)
            return 0.5 * pull + 0.2**2 / var * (x - 0.5 * pull)

    x = torch.linspace(-1.2, 1.2, 41)[:, None]
    truth = np.log(0.5 * stats.norm.pdf(x, 0.5, 0.2) + 0.5 * stats.norm.pdf(x, -0.5, 0.2))[:, 0]
    for name in ("edm", "vp", "cld-paper"):
        ours, facts = ode_log_likelihood(Mixture(), PROCESSES[name](), x, prior="matched", terms=True)
        np.testing.assert_allclose(ours, truth, atol=0.02)
        assert facts["nfe"] > 10 and facts["sigma_min"] == pytest.approx(0.002, rel=1e-6)
    # A proper bound on average, nats of x itself.
    bound = [elbo(Mixture(), EDM(), x, num_samples=16, generator=torch.Generator().manual_seed(s)) for s in range(12)]
    bound = torch.stack(bound).mean(1)
    assert float(bound.mean()) < truth.mean() + 3 * float(bound.std()) / math.sqrt(12)


def test_discretised_decoder_is_a_distribution():
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)[:, None]
    for mean, std in ((0.1, 0.3), (-1.3, 0.05), (0.5, 1e-3), (0.998, 0.01)):
        log_prob = discretised_log_prob(levels, torch.full_like(levels, mean), torch.tensor(std, dtype=torch.float64))
        assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-9)
        assert not log_prob.isnan().any()
    inner = discretised_log_prob(levels[100:101], torch.zeros(1, 1).double(), torch.tensor(0.2, dtype=torch.float64))
    edges = stats.norm.cdf((levels[100].item() + np.array([-1, 1]) / 255) / 0.2)
    assert float(inner) == pytest.approx(math.log(edges[1] - edges[0]), rel=1e-9)


def test_discretised_elbo_bounds_the_probability():
    """Data on two pixel levels, each certain given its noisy version: at best -log 2 per dimension."""
    low, high = -1 + 2 * 60 / 255, -1 + 2 * 190 / 255

    class TwoLevels:
        sigma_data, sigma_min, sigma_max = 0.5, 0.0, math.inf

        def __call__(self, x, sigma, labels=None):
            middle, half = (low + high) / 2, (high - low) / 2
            return middle + half * torch.tanh((x - middle) * half / torch.as_tensor(sigma).reshape(-1, 1) ** 2)

    x = torch.where(torch.rand(300, 2, generator=torch.Generator().manual_seed(0)) < 0.5, low, high)
    bound = elbo(
        TwoLevels(), EDM(), x, decoder="discretised", num_samples=8, generator=torch.Generator().manual_seed(1)
    )
    error = float(bound.std()) / math.sqrt(300)
    assert -2 * math.log(2) - 0.05 - 4 * error < float(bound.mean()) < -2 * math.log(2) + 3 * error


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: elbo(Gaussian(), PFGMpp(128), x), "linear-process view"),
        (lambda x: elbo(Gaussian(), EDM(), x, decoder="exact"), "decoder"),
        (lambda x: elbo(Gaussian(), EDM(), x, prior="flat"), "prior"),
        (lambda x: elbo(Gaussian(), EDM(), x, num_samples=0), "num_samples"),
        (lambda x: elbo(Gaussian(), processes.get("vp"), x, t_min=2), "t_min"),
        (lambda x: ode_log_likelihood(Gaussian(), EDM(), x, probe="uniform"), "probe"),
        (lambda x: ode_log_likelihood(Gaussian(), EDM(), x, hutch_probes=0), "hutch_probes"),
        (lambda x: ode_log_likelihood(Gaussian(), EDM(), x, state="half"), "state"),
        (
            lambda x: ode_log_likelihood(Gaussian(), processes.get("cld", init_aux_var=0), x, state="joint"),
            "init_aux_var",
        ),
    ],
)
def test_errors_name_the_cause(call, message):
    with pytest.raises(ValueError, match=message):
        call(gaussian_data(2))


def test_joint_likelihood_of_edm_starts_at_its_lowest_noise_level():
    """EDM's time is sigma: CLD's t_min of 1e-5 does not apply."""

    class Joint:
        def score(self, u, t):
            return -u / (1 + torch.as_tensor(t) ** 2)

    terms = ode_log_likelihood(Joint(), EDM(), torch.zeros(1, 1, dtype=torch.float64), terms=True)[1]
    assert terms["sigma_min"] == 0.002
