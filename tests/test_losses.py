"""Losses against formulas written out in NumPy, laws of the noise levels, and closed forms of the expectation."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from torch_utils.random import StackedRandomGenerator
from training import losses, processes
from training.losses import Draws, EDM2Loss, EDMLoss, Objective, StableTargets, VELoss, VPLoss, stf_targets
from training.losses.process import ProcessLoss


class Linear(torch.nn.Module):
    """D(x) = c x with a log-variance that depends on sigma; enough of a network for a loss."""

    label_dim, sigma_data = 3, 0.5

    def __init__(self, c=0.6):
        super().__init__()
        self.c = torch.nn.Parameter(torch.tensor(float(c)))
        self.seen = None

    def forward(self, x, sigma, class_labels=None, return_logvar=False, **kwargs):
        self.seen = dict(x=x, sigma=sigma, labels=class_labels, **kwargs)
        logvar = 0.3 * torch.log(sigma).reshape(-1, 1, 1, 1)
        return (self.c * x, logvar) if return_logvar else self.c * x


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.randn(6, 1, 4, 4, generator=generator(9)) * 0.5


def test_edm2_value_for_recorded_draws(images):
    draws = EDM2Loss(P_mean=-0.8, P_std=1.6, sigma_data=0.7).draw(images, generator=generator(1))
    again = generator(1)
    r = torch.randn([6, 1, 1, 1], generator=again).double().numpy()  # the noise level first ...
    n = torch.randn([6, 1, 4, 4], generator=again).double().numpy()  # ... then the noise
    sigma, y = np.exp(-0.8 + 1.6 * r), images.double().numpy()
    np.testing.assert_allclose(draws.sigma.numpy(), sigma.flatten(), rtol=1e-5)
    np.testing.assert_allclose(draws.noise.numpy(), sigma * n, rtol=1e-5, atol=1e-7)
    u = 0.3 * np.log(sigma)
    weight = (sigma**2 + 0.49) / (sigma * 0.7) ** 2
    expected = weight / np.exp(u) * (0.6 * (y + sigma * n) - y) ** 2 + u
    result = EDM2Loss(P_mean=-0.8, P_std=1.6, sigma_data=0.7).evaluate(Linear(), draws)
    assert result.shape == images.shape
    np.testing.assert_allclose(result.detach().numpy(), expected, rtol=2e-4, atol=1e-5)


def test_one_call_is_the_two_phases_with_the_global_generator(images):
    loss, net = EDM2Loss(), Linear()
    torch.manual_seed(4)
    whole = loss(net, images)
    torch.manual_seed(4)
    r, n = torch.randn(6, 1, 1, 1), torch.randn(6, 1, 4, 4)
    sigma = (r * 1.0 - 0.4).exp()
    draws = dict(images=images, sigma=sigma.flatten(), weight=loss.weight(sigma.flatten()), noise=sigma * n)
    parts = loss.evaluate(net, Draws(draws, labels=None, augment_labels=None, targets=None))
    torch.testing.assert_close(whole, parts)


def test_draw_order_is_level_augmentation_noise(images):
    def augment(x, generator):
        return x + torch.rand([len(x), 1, 1, 1], generator=generator), torch.ones(len(x), 9)

    draws = EDMLoss(augment=augment).draw(images, generator=generator(2))
    again = generator(2)
    r = torch.randn([6], generator=again)
    shift = torch.rand([6, 1, 1, 1], generator=again)
    n = torch.randn([6, 1, 4, 4], generator=again)
    torch.testing.assert_close(draws.sigma, (r * 1.2 - 1.2).exp())
    torch.testing.assert_close(draws.images, images + shift)
    sigma = draws.sigma.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(draws.noise, n * sigma)
    net = Linear()
    loss = EDMLoss(augment=augment)
    result = loss.evaluate(net, draws)
    assert torch.equal(net.seen["augment_labels"], torch.ones(6, 9))
    residual = 0.6 * (draws.images + draws.noise) - draws.images
    torch.testing.assert_close(result, (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * residual**2)


def test_a_single_index_keeps_the_example_axis(images):
    draws = EDM2Loss().draw(images, torch.eye(6), generator(3))
    for index in (4, -2, np.int64(4)):
        assert len(draws[index]) == 1
        assert torch.equal(draws[index].images, draws.images[4:5]) and torch.equal(draws[index].sigma, draws.sigma[4:5])


@pytest.mark.parametrize("index", [torch.tensor([4, 0, 4]), slice(1, 5, 2), [3], torch.arange(6) > 3])
def test_indexing_selects_examples(images, index):
    labels = torch.eye(6)
    loss, net = EDM2Loss(), Linear()
    draws = loss.draw(images, labels, generator(3))
    part = draws[index]
    assert len(part) == len(labels[index]) and part.augment_labels is None
    assert torch.equal(part.labels, labels[index]) and torch.equal(part["noise"], draws.noise[index])
    torch.testing.assert_close(loss.evaluate(net, part), loss.evaluate(net, draws)[index])
    joined = Draws.cat([draws[:2], draws[2:]])
    assert all(torch.equal(joined[k], draws[k]) for k in ("images", "sigma", "weight", "noise", "labels"))
    assert joined.targets is None


def test_label_dropout_zeroes_whole_labels_at_its_rate():
    labels = torch.eye(3)[torch.arange(3000) % 3]
    draws = EDM2Loss(label_dropout=0.2).draw(torch.zeros(3000, 1, 1, 1), labels, generator(0))
    kept = draws.labels.sum(dim=1)
    assert set(kept.tolist()) == {0.0, 1.0}
    assert torch.equal(draws.labels[kept == 1], labels[kept == 1])
    assert scipy.stats.binomtest(int((kept == 0).sum()), 3000, 0.2).pvalue > 1e-4
    assert EDM2Loss(label_dropout=1).draw(torch.zeros(4, 1, 1, 1), labels[:4], generator(0)).labels.sum() == 0
    with pytest.raises(ValueError, match="label_dropout=1.5"):
        EDM2Loss(label_dropout=1.5)


def sigmas(loss, n=4000):
    return loss.draw(torch.zeros(n, 1, 1, 1), generator=generator(5)).sigma.double().numpy()


@pytest.mark.parametrize(
    "loss, mean, std", [(EDM2Loss(), -0.4, 1.0), (EDM2Loss(-0.8, 1.6), -0.8, 1.6), (EDMLoss(), -1.2, 1.2)]
)
def test_log_normal_noise_levels(loss, mean, std):
    assert scipy.stats.kstest(np.log(sigmas(loss)), "norm", (mean, std)).pvalue > 1e-4


def test_ve_noise_levels_and_weight():
    assert scipy.stats.kstest(np.log(sigmas(VELoss())), "uniform", (math.log(0.02), math.log(5000))).pvalue > 1e-4
    torch.testing.assert_close(VELoss().weight(torch.tensor(0.5)), torch.tensor(4.0))


def test_vp_noise_levels():
    """sigma(t)^2 + 1 = exp(beta_d t^2 / 2 + beta_min t) at uniform t in [epsilon, 1]: invert it and test uniformity."""
    log = np.log1p(sigmas(VPLoss()) ** 2)
    t = (np.sqrt(0.1**2 + 2 * 19.9 * log) - 0.1) / 19.9
    assert scipy.stats.kstest(t, "uniform", (1e-5, 1 - 1e-5)).pvalue > 1e-4
    torch.testing.assert_close(VPLoss().weight(torch.tensor(0.5)), torch.tensor(4.0))


@pytest.mark.parametrize("D", [8.0, 64.0, math.inf])
def test_expected_loss_of_a_linear_denoiser(D):
    """lambda (c^2 sigma^2 D / (D - 2) + (1 - c)^2 mean y^2) for D(x) = c x (Student-t variance; D = inf: Gaussian)."""
    c, n = 0.6, 20000
    images = torch.randn(n, 1, 2, 2, generator=generator(7)) * 0.5
    loss = EDMLoss(kernel=processes.get("pfgmpp", D=D))
    draws = loss.draw(images, generator=generator(8))
    draws["noise"] = draws.noise / draws.sigma.reshape(-1, 1, 1, 1) * 0.3
    draws["sigma"] = torch.full_like(draws.sigma, 0.3)
    draws["weight"] = loss.weight(draws.sigma)
    values = loss.evaluate(Linear(c), draws).detach().double().mean(dim=(1, 2, 3)).numpy()
    inflation = 1 if math.isinf(D) else D / (D - 2)
    power = images.double().square().mean().item()
    expected = (0.09 + 0.25) / (0.3 * 0.5) ** 2 * (c**2 * 0.09 * inflation + (1 - c) ** 2 * power)
    assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(n)
    assert values.std() / math.sqrt(n) < 0.02 * expected  # sharp enough to see the inflation, 33 % at D = 8


# --- stable targets ---------------------------------------------------------------------------------------------------


def plain_posterior(x, references, sigma, D):
    """Posterior means in NumPy, one example at a time, from densities in the linear domain."""
    targets = []
    for xi, s in zip(x.reshape(len(x), -1), sigma, strict=True):
        d2 = ((xi[None] - references.reshape(len(references), -1)) ** 2).sum(axis=1)
        density = np.exp(-d2 / (2 * s**2)) if math.isinf(D) else (d2 + s**2 * D) ** (-(xi.size + D) / 2)
        w = density / density.sum()
        targets.append((w[:, None] * references.reshape(len(references), -1)).sum(axis=0))
    return np.stack(targets).reshape(x.shape)


@pytest.mark.parametrize("D", [1.0, 16.0, 128.0, math.inf])
def test_stf_targets(D):
    rng = np.random.RandomState(0)
    x, references, sigma = rng.randn(5, 1, 2, 2), rng.randn(9, 1, 2, 2), np.array([0.3, 0.5, 1, 3, 10.0])
    targets, weights = stf_targets(torch.tensor(x), torch.tensor(references), torch.tensor(sigma), D)
    np.testing.assert_allclose(targets.numpy(), plain_posterior(x, references, sigma, D), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(weights.sum(dim=1).numpy(), 1, rtol=1e-12)
    assert weights.shape == (5, 9) and weights.dtype == torch.float64


def test_stf_targets_survive_extreme_noise_levels():
    x = torch.randn(3, 4, generator=generator(0)).double()
    references = torch.cat([x, torch.randn(4, 4, generator=generator(1)).double()])
    near, _ = stf_targets(x, references, torch.full([3], 1e-6), math.inf)
    far, weights = stf_targets(x, references, torch.full([3], 1e6), 64.0)
    torch.testing.assert_close(near, x)
    torch.testing.assert_close(far, references.mean(dim=0).expand(3, 4), atol=1e-5, rtol=0)
    shifted, _ = stf_targets(x + 1e4, references + 1e4, torch.full([3], 0.7), 64.0)  # far from the origin
    torch.testing.assert_close(
        shifted - 1e4, stf_targets(x, references, torch.full([3], 0.7), 64.0)[0], atol=1e-6, rtol=0
    )


def test_stable_targets_stay_within_the_source():
    pool = torch.cat([torch.zeros(50, 1, 1, 1), torch.ones(50, 1, 1, 1)])
    labels = torch.eye(2)[[0] * 50 + [1] * 50]

    def references(n, generator):
        index = torch.randint(100, [n], generator=generator)
        return pool[index], labels[index]

    loss = EDM2Loss(P_mean=3.0, P_std=0.1, stable_targets=StableTargets(references, 40), label_dropout=0.3)
    images, own = pool[[0, 1, 98, 99] * 10], labels[[0, 1, 98, 99] * 10]
    draws = loss.draw(images, own, generator(0))
    kept = draws.labels.sum(dim=1) == 1
    torch.testing.assert_close(draws.targets[kept], draws.images[kept])  # a source's images are all alike
    mixed = draws.targets[~kept].flatten()
    assert len(mixed) and bool(((mixed > 0.2) & (mixed < 0.8)).all())  # a dropped label belongs to every source
    net = Linear()
    residual = 0.6 * (draws.images + draws.noise) - draws.targets
    sigma = draws.sigma.reshape(-1, 1, 1, 1)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    u = 0.3 * sigma.log()
    torch.testing.assert_close(loss.evaluate(net, draws), weight / u.exp() * residual**2 + u)
    with pytest.raises(ValueError, match="stf-refs"):
        stf_targets(images[:1], pool, torch.ones(1), mask=torch.zeros(1, 100, dtype=torch.bool))


# --- objective --------------------------------------------------------------------------------------------------------


def test_objective_trains_the_parameters_of_the_loss():
    class Scaled(EDM2Loss):
        lr_scale = 0.1

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones([]))

        def evaluate(self, net, draws):
            return super().evaluate(net, draws) * self.scale

    net = Linear()
    groups = Objective(net, Scaled()).param_groups()
    assert [g["lr_scale"] for g in groups] == [1.0, 0.1] and [len(g["params"]) for g in groups] == [1, 1]
    assert len(Objective(net, EDM2Loss()).param_groups()) == 1
    objective = Objective(net, Scaled())
    draws = objective.loss.draw(torch.randn(3, 1, 2, 2))
    torch.testing.assert_close(objective(draws), objective.loss.evaluate(net, draws))
    assert set(objective.state_dict()) == {"net.c", "loss.scale"}


class ByTheContract(torch.nn.Module):
    """D(x) = c(sigma) x, with sigma used as the contract has it: a vector [N]."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones([]))

    def forward(self, x, sigma, class_labels=None):
        return self.scale * x * 0.25 / (0.25 + sigma[:, None, None, None] ** 2)


@pytest.mark.parametrize("loss", [EDMLoss(), VPLoss(), VELoss(), ProcessLoss(processes.get("cld"))])
def test_sigma_reaches_the_network_as_a_vector(loss, images):
    draws = loss.draw(images, generator=generator(1))
    assert draws.sigma.shape == draws.weight.shape == (6,)
    net = ByTheContract()
    losses = Objective(net, loss)(draws)
    assert losses.shape == images.shape
    sigma = draws.sigma.reshape(-1, 1, 1, 1)
    residual = (images + draws.noise) * 0.25 / (0.25 + sigma**2) - images
    torch.testing.assert_close(losses, draws.weight.reshape(-1, 1, 1, 1) * residual**2, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [[6, 1], [6, 4, 4], [6, 6, 1, 4, 4], [1], [], [6, 1, 4, 2]])
def test_a_loss_of_another_shape_is_refused(images, shape):
    class Odd(EDMLoss):
        def evaluate(self, net, draws):
            return torch.zeros(shape)

    draws = EDMLoss().draw(images)
    with pytest.raises(ValueError, match=r"it must be \[6\] or \[6, 1, 4, 4\]") as error:
        Objective(Linear(), Odd())(draws)
    assert "\n" not in str(error.value)


def test_a_network_that_broadcasts_sigma_is_refused():
    """Five and seven axes broadcast against images, and training would seem to work."""
    draws = EDMLoss().draw(torch.randn(4, 1, 4, 4))
    draws["sigma"] = draws.sigma[:, None]
    with pytest.raises(ValueError, match="sigma as"):
        Objective(ByTheContract(), EDMLoss())(draws)


@pytest.mark.parametrize("n", [1, 6, 33])
def test_a_vector_of_draws_is_a_column_of_draws(n):
    """Why noise levels are the same numbers whatever their shape."""
    for draw in (torch.randn, torch.rand):
        assert torch.equal(draw([n], generator=generator(n)), draw([n, 1, 1, 1], generator=generator(n)).flatten())
    one, other = (StackedRandomGenerator("cpu", range(n)) for _ in range(2))
    assert torch.equal(one.randn([n]), other.randn([n, 1, 1, 1]).flatten())


def test_learning_rate_schedule_is_offered_beside_the_losses():
    assert losses.learning_rate_schedule(10**6, 2048) == pytest.approx(1e-3)
