"""Guidance against closed-form Gaussian denoisers and scores."""

import math

import pytest
import torch

from training.guidance import (
    GuidedDenoiser,
    GuidedScore,
    NullLabels,
    guided,
)
from training.networks_edm import EDMPrecond
from training.processes import get
from training.samplers import euler_maruyama, heun


class GaussianDenoiser(torch.nn.Module):
    """Exact denoiser of N(mean, sd^2): D = (sd^2 y + sigma^2 mean) / (sd^2 + sigma^2); counts its calls."""

    sigma_min, sigma_max, img_channels, img_resolution = 0.0, math.inf, 1, 2

    def __init__(self, mean=0.0, sd=0.5, label_dim=0):
        super().__init__()
        self.mean, self.sigma_data, self.label_dim, self.calls = mean, sd, label_dim, 0

    def forward(self, x, sigma, class_labels=None, return_logvar=False):
        self.calls += 1
        s2 = torch.as_tensor(sigma).to(x).reshape(-1, 1, 1, 1) ** 2
        mean = self.mean
        if self.label_dim and class_labels is not None:  # class k is centred on k + 1, the null label on 0
            mean = mean + (class_labels * torch.arange(1, self.label_dim + 1)).sum(1).reshape(-1, 1, 1, 1)
        denoised = (self.sigma_data**2 * x + s2 * mean) / (self.sigma_data**2 + s2)
        return (denoised, torch.full([len(x), 1, 1, 1], 0.25)) if return_logvar else denoised


def points(n=6):
    torch.manual_seed(0)
    return torch.randn(n, 1, 2, 2)


def test_weight_one_is_the_network_itself():
    net, gnet = GaussianDenoiser(1.0), GaussianDenoiser(math.nan)
    x, sigma = points(), torch.rand(6) + 0.1
    for same in (
        GuidedDenoiser(net),
        GuidedDenoiser(net, gnet, 1),
        GuidedDenoiser(net, gnet, 1, (0.1, 2)),
    ):
        assert torch.equal(same(x, sigma), net(x, sigma))
    assert gnet.calls == 0
    outside = GuidedDenoiser(net, gnet, 3, interval=(5, 9))
    assert torch.equal(outside(x, sigma), net(x, sigma)) and gnet.calls == 0
    assert torch.equal(heun(GuidedDenoiser(net, gnet, 1), x, num_steps=4), heun(net, x, num_steps=4))


def test_guided_gaussian_equals_its_closed_form():
    """Equal variances: guiding shifts the mean to m_G + w (m_D - m_G)."""
    x, sigma = points(), torch.rand(6) + 0.1
    pair = GuidedDenoiser(GaussianDenoiser(1.0), GaussianDenoiser(0.25), 3.0)
    torch.testing.assert_close(pair(x, sigma), GaussianDenoiser(0.25 + 3 * 0.75)(x, sigma))
    below = GuidedDenoiser(GaussianDenoiser(1.0), GaussianDenoiser(0.25), 0.0)
    torch.testing.assert_close(below(x, sigma), GaussianDenoiser(0.25)(x, sigma))
    # The sampler with a guide of its own is the sampler of the guided denoiser.
    wrapped = heun(pair, x, num_steps=8)
    assert torch.equal(wrapped, heun(pair.net, x, gnet=pair.gnet, guidance=3.0, num_steps=8))
    assert float(heun(pair, torch.randn(4000, 1, 2, 2), num_steps=16).mean()) == pytest.approx(2.5, abs=0.05)


def test_interval_is_open_below_and_closed_above_per_sample():
    net, gnet = GaussianDenoiser(1.0), GaussianDenoiser(0.0)
    guided = GuidedDenoiser(net, gnet, 2.0, interval=(0.5, 2.0))
    x, sigma = points(), torch.tensor([0.1, 0.5, 0.6, 2.0, 2.1, 80])
    expected = torch.where(
        torch.tensor([False, False, True, True, False, False]).reshape(-1, 1, 1, 1),
        GaussianDenoiser(2.0)(x, sigma),
        net(x, sigma),
    )
    actual = guided(x, sigma)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(actual[[0, 1, 4, 5]], net(x, sigma)[[0, 1, 4, 5]])
    calls = gnet.calls
    guided(x, torch.tensor(3.0)), guided(x, 0.5)
    assert gnet.calls == calls
    guided(x, 2.0)
    assert gnet.calls == calls + 1


@pytest.mark.parametrize("null, shift", [("zero", 0), ("last", 3)])
def test_classifier_free_guidance_uses_the_null_label(null, shift):
    net = GaussianDenoiser(0.0, label_dim=3)
    labels = torch.eye(3)[[0, 1, 2, 0, 1, 2]]
    x, sigma = points(), torch.rand(6) + 0.1
    guided = GuidedDenoiser(net, NullLabels(net, null), 2.0)
    mean = (torch.tensor([1.0, 2, 3, 1, 2, 3]) * 2 - shift).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(guided(x, sigma, labels), GaussianDenoiser(mean)(x, sigma))
    assert len(list(guided.parameters())) == len(list(net.parameters()))


def test_a_guided_denoiser_is_a_denoiser():
    torch.manual_seed(0)
    small = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "logvar_channels": 8}
    net, gnet = (EDMPrecond(8, 3, label_dim=4, sigma_data=0.4, augment_dim=2, **small).eval() for _ in range(2))
    guided = GuidedDenoiser(net, gnet, 1.7)
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 3.0]), torch.eye(4)[:2]
    names = ("label_dim", "sigma_data", "sigma_min", "sigma_max", "img_channels", "img_resolution")
    assert [getattr(guided, n) for n in names] == [4, 0.4, 0, math.inf, 3, 8]
    assert not hasattr(guided, "score") and not hasattr(guided, "nonsense")
    kwargs = {"force_fp32": True, "augment_labels": torch.ones(2, 2)}
    denoised, logvar = guided(x, sigma, labels, return_logvar=True, **kwargs)
    d, g = net(x, sigma, labels, **kwargs), gnet(x, sigma, labels, **kwargs)
    torch.testing.assert_close(denoised, g + 1.7 * (d - g))
    assert torch.equal(logvar, net(x, sigma, return_logvar=True)[1])
    unconditional = EDMPrecond(8, 3, **small).eval()
    assert GuidedDenoiser(net, unconditional, 2.0)(x, sigma, labels).shape == x.shape
    twice = GuidedDenoiser(guided, GuidedDenoiser(net, NullLabels(net), 2.0), 1.5)
    assert twice.label_dim == 4 and twice(x, sigma, labels).shape == x.shape


class OwnScore:
    """A joint network's interface: the exact score of a Gaussian under a process."""

    label_dim, sigma_data, sigma_min, sigma_max = 0, 0.5, 0.0, math.inf

    def __init__(self, process, mean):
        self.process, self.denoiser = process, GaussianDenoiser(mean)

    def score(self, u, t):
        y, sigma = self.process.project(u, t)
        return self.process.score(u, t, self.denoiser(y, sigma))


def own():
    return OwnScore(get("edm"), 0.0)


@pytest.mark.parametrize("name", ["edm", "vp", "cld"])
def test_scores_mix_like_denoisers(name):
    process = get(name)
    torch.manual_seed(0)
    t = process.time(torch.tensor(0.8))
    u = torch.randn(5, 2 if name == "cld" else 1, 1, 2, 2, dtype=torch.float64)
    expected = OwnScore(process, 2.5).score(u, t)
    main_own, guide = OwnScore(process, 1.0), OwnScore(process, 0.25)
    for main in (main_own, main_own.denoiser):
        for weak in (guide, guide.denoiser):
            actual = GuidedScore(main, weak, process, 3.0).score(u, t)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    outside = GuidedScore(main_own, guide, process, 3.0, interval=(1.0, 9.0))
    assert torch.equal(outside.score(u, t), main_own.score(u, t)) and outside.sigma_data == 0.5
    inside = GuidedScore(main_own, guide, process, 3.0, interval=(0.5, 9.0))
    torch.testing.assert_close(inside.score(u, t), expected)
    assert guided(main_own, guide, 1.0) is main_own and isinstance(
        guided(main_own, guide, 2.0, None, process), GuidedScore
    )


def test_solvers_take_guided_scores_and_denoisers():
    process = get("cld")
    pair = GuidedDenoiser(GaussianDenoiser(1.0), GaussianDenoiser(0.25), 2.0)
    mixed = GuidedScore(pair.net, pair.gnet, process, 2.0)
    results = []
    for net in (pair, mixed):
        torch.manual_seed(1)
        results.append(euler_maruyama(net, process, process.prior_sample((300, 2, 1, 2, 2)), num_steps=50))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    assert float(results[0].mean()) == pytest.approx(1.75, abs=0.1)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda n: GuidedDenoiser(n, None, 2.0), "guidance=2.0 needs a guiding network"),
        (lambda n: GuidedDenoiser(n, n, math.nan), "guidance=nan"),
        (lambda n: GuidedDenoiser(n, n, 2.0, interval=(3, 1)), r"interval \(3, 1\)"),
        (lambda n: GuidedDenoiser(n, GaussianDenoiser(label_dim=7), 2.0), "label_dim=7"),
        (lambda n: NullLabels(n), "label_dim=0"),
        (lambda n: NullLabels(GaussianDenoiser(label_dim=2), "mean"), "'mean' is none of zero, last"),
        (lambda n: GuidedDenoiser(own(), n, 2.0), "GuidedScore"),
        (lambda n: GuidedDenoiser(own(), own(), 2.0), "process"),
    ],
)  # fmt: skip
def test_user_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(GaussianDenoiser())
    gnet = GaussianDenoiser()
    gnet.img_resolution = 9
    with pytest.raises(ValueError, match="img_resolution=9"):
        GuidedDenoiser(GaussianDenoiser(), gnet, 2.0)


def test_every_wrapper_has_the_attributes_of_its_network():
    net = GaussianDenoiser(sd=0.8, label_dim=3)
    for wrapper in (
        NullLabels(net),
        GuidedDenoiser(net, NullLabels(net), 2.0),
        GuidedScore(net, NullLabels(net), get("cld"), 2.0),
    ):
        for name in ("label_dim", "sigma_data", "sigma_min", "sigma_max", "img_channels", "img_resolution"):
            assert getattr(wrapper, name) == getattr(net, name)
        assert not hasattr(wrapper, "no_such_attribute")
