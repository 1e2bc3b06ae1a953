"""Averages of the weights against published numbers (EDM2 sec. 3, app. C) and numerical integration."""

import numpy as np
import pytest
import scipy.integrate
import torch

from training import phema

STDS = [0.010, 0.050, 0.075, 0.100, 0.130, 0.150, 0.200, 0.250]
EXPONENTS = [96.994898, 16.972199, 10.289116, 6.937204, 4.603597, 3.557869, 1.826214, 0.719824]


@pytest.mark.parametrize("std, exp", zip(STDS, EXPONENTS, strict=True))
def test_exponents_of_the_stds(std, exp):
    assert phema.std_to_exp(std) == pytest.approx(exp, abs=1e-6)
    assert phema.exp_to_std(phema.std_to_exp(std)) == pytest.approx(std, rel=1e-9)


def test_std_is_that_of_the_profile():
    """Relative standard deviation of the density (gamma + 1) s^gamma on [0, 1]."""
    for exp in (0.7, 6.9):
        moments = [scipy.integrate.quad(lambda s, k=k, e=exp: (e + 1) * s ** (e + k), 0, 1)[0] for k in (1, 2)]
        assert phema.exp_to_std(exp) == pytest.approx(np.sqrt(moments[1] - moments[0] ** 2), rel=1e-8)


def test_arrays_keep_their_shape():
    grid = np.array(STDS).reshape(2, 4)
    assert phema.std_to_exp(grid).shape == (2, 4)
    np.testing.assert_allclose(phema.std_to_exp(grid).ravel(), EXPONENTS, atol=1e-6)


@pytest.mark.parametrize("std", [0, -0.1, 0.3, float("nan")])
def test_impossible_stds_are_refused(std):
    with pytest.raises(ValueError, match="EMA std"):
        phema.std_to_exp(std)


@pytest.mark.parametrize(
    "std, t, beta", [(0.05, 2, 3.888921e-6), (0.05, 8, 0.0907313), (0.1, 2, 4.080032e-3), (0.1, 8, 0.3465023)]
)
def test_decay_of_a_step(std, t, beta):
    assert phema.power_function_beta(std, t, 1) == pytest.approx(beta, rel=1e-6)
    assert phema.power_function_beta(std, t * 64, 64) == pytest.approx(beta, rel=1e-6)
    assert phema.power_function_beta(std, 1, 1) == 0


def test_correlations_are_inner_products():
    for a, sa, b, sb in [(1.0, 0.05, 2.0, 0.1), (2.0, 0.05, 1.0, 0.1), (3.0, 0.2, 3.0, 0.05)]:
        ga, gb = phema.std_to_exp(sa), phema.std_to_exp(sb)

        def product(t, ga=ga, gb=gb, a=a, b=b):
            return (ga + 1) / a * (t / a) ** ga * (gb + 1) / b * (t / b) ** gb

        expected = scipy.integrate.quad(product, 0, min(a, b))[0]
        assert phema.power_function_correlation(a, sa, b, sb) == pytest.approx(expected, rel=1e-8)


def test_posthoc_coefficients():
    t = 8 * 2**20
    x = phema.solve_posthoc_coefficients([t, t, 2 * t, 2 * t], [0.05, 0.1] * 2, 2 * t, [0.05, 0.075, 0.1])
    expected = [[0, 0, 1, 0], [1.357483e-4, -2.4266268e-3, 0.34296904, 0.65932184], [0, 0, 0, 1]]
    np.testing.assert_allclose(x.T, expected, atol=1e-8)
    np.testing.assert_allclose(x.sum(axis=0), 1, rtol=1e-12)
    broadcast = phema.solve_posthoc_coefficients([t, 2 * t], 0.05, 2 * t, 0.05)
    np.testing.assert_allclose(broadcast, [[0], [1]], atol=1e-10)


# --- averages of a module ---------------------------------------------------------------------------------------------


def trajectory(average, module, values, batch=10):
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            module.weight.fill_(value)
        average.update(step * batch, batch)


def module():
    net = torch.nn.Linear(1, 1, bias=False).double()
    net.register_buffer("seen", torch.zeros([]))
    return net


def test_power_average_weighs_the_past_by_its_profile():
    """With many steps the average of w(t) = t is that of the profile, (gamma + 1) / (gamma + 2) of the end."""
    net = module()
    average = phema.PowerFunctionEMA(net, [0.05, 0.2])
    trajectory(average, net, np.linspace(0.0005, 1, 2000))
    for (copy, name), std in zip(average.get(), (0.05, 0.2), strict=True):
        gamma = phema.std_to_exp(std)
        assert name == f"{std:.3f}"
        assert copy.weight.item() == pytest.approx((gamma + 1) / (gamma + 2), rel=2e-3)
    first = phema.PowerFunctionEMA(net, [0.05])
    trajectory(first, net, [3.0])
    assert first.get()[0][0].weight.item() == 3.0  # the first step makes it a copy


def test_halflife_average():
    net = module()
    with torch.no_grad():
        net.weight.fill_(1.0)
    average = phema.HalfLifeEMA(net, halflife_Mimg=40e-6, rampup_ratio=None)
    trajectory(average, net, [0.0] * 8)  # 80 images: two half-lives of 40
    assert average.get()[0][0].weight.item() == pytest.approx(0.25)
    ramped = phema.HalfLifeEMA(net, halflife_Mimg=1.0, rampup_ratio=0.05)
    assert ramped.betas(1000, 10) == [pytest.approx(0.5 ** (10 / 50))]
    assert ramped.betas(10**9, 10) == [pytest.approx(0.5 ** (10 / 1e6))]


def test_decay_average():
    average = phema.DecayEMA(module(), decay=0.9)
    assert average.betas(10, 10) == [pytest.approx(2 / 11)] and average.betas(10**6, 10) == [0.9]
    with pytest.raises(ValueError, match=r"decay=1"):
        phema.DecayEMA(module(), decay=1)


@pytest.mark.parametrize(
    "make", [phema.PowerFunctionEMA, lambda m: phema.HalfLifeEMA(m, 1e-4), lambda m: phema.DecayEMA(m, 0.9)]
)
def test_state_round_trip_and_buffers(make):
    net = module()
    average = make(net)
    trajectory(average, net, [1.0, 2.0, 5.0])
    other = make(module())
    other.load_state_dict(average.state_dict())
    with torch.no_grad():
        net.seen.fill_(7)
    for (a, name), (b, other_name) in zip(average.get(), other.get(), strict=True):
        assert name == other_name and torch.equal(a.weight, b.weight)
        assert a.seen == 7 and not a.training and not a.weight.requires_grad


def test_state_of_other_averages_is_refused():
    average = phema.PowerFunctionEMA(module(), [0.05, 0.1])
    with pytest.raises(ValueError, match="holds the averages"):
        phema.PowerFunctionEMA(module(), [0.05]).load_state_dict(average.state_dict())
