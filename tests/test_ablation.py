"""EDM's sampler of ablations and its levels: orders of convergence, published numbers, its own sampler as one choice."""

import itertools
import math

import numpy as np
import PIL.Image
import pytest
import torch
from small_runs import one_line, run

import generate_images
from torch_utils.persistence import save_snapshot
from training import samplers
from training.ablation import DISCRETIZATIONS, SCALINGS, SCHEDULES, Ablation, ablation, ablation_states
from training.networks_edm import iDDPMPrecond

VAR = 0.5**2


class Exact:
    """Denoiser of N(0.4, 1/4) data, whose probability flow is known."""

    sigma_data, sigma_min, sigma_max, label_dim = 0.5, 0.0, math.inf, 0

    def __init__(self):
        self.asked = []

    def __call__(self, x, sigma, labels=None):
        self.asked.append(float(sigma))
        sigma = torch.as_tensor(sigma, dtype=x.dtype)
        return (VAR * x + sigma**2 * 0.4) / (VAR + sigma**2)


NOISE = torch.tensor([-1.5, -0.2, 0.7, 2.0], dtype=torch.float64).reshape(4, 1, 1, 1)


def error(steps, **options):
    """Distance from the exact flow at the last level but zero."""
    states = list(ablation_states(Exact(), NOISE, num_steps=steps, **options))
    top, low = states[0].time, states[-2].time
    flow = _flow(options, states)
    x = states[-2].state / flow
    start = NOISE * top
    exact = 0.4 + (start - 0.4) * math.sqrt((VAR + low**2) / (VAR + top**2))
    return float((x - exact).abs().max())


def _flow(options, states):
    """The scale of the image at that level."""
    return 1 / math.sqrt(1 + states[-2].time ** 2) if options["scaling"] == "vp" else 1.0


@pytest.mark.parametrize("disc, schedule, scaling", itertools.product(DISCRETIZATIONS, SCHEDULES, SCALINGS))
def test_orders_of_convergence(disc, schedule, scaling):
    choice = dict(disc=disc, schedule=schedule, scaling=scaling, sigma_min=0.1, sigma_max=20.0)
    if disc == "iddpm":
        assert error(200, method="heun", **choice) < error(200, method="euler", **choice) < 0.2
        return
    for method, order in (("euler", 1), ("heun", 2)):
        errors = [error(steps, method=method, **choice) for steps in (257, 513)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25), method
    assert error(257, method="heun", alpha=0.5, **choice) < 4 * error(257, method="heun", **choice)


def test_edm_is_one_choice():
    net = Exact()
    expected = samplers.heun(net, NOISE, num_steps=12, dtype=torch.float64)
    seen = list(net.asked)
    net.asked.clear()
    torch.testing.assert_close(ablation(net, NOISE, num_steps=12), expected, rtol=1e-12, atol=1e-12)
    assert net.asked == pytest.approx(seen, rel=1e-12) and len(seen) == 23


def test_published_levels():
    """EDM table 1: ends of VP, VE, iDDPM and EDM; VE's are geometric, those of iDDPM its own."""
    levels = {name: Ablation(num_steps=18, disc=name).levels(Exact())[0] for name in DISCRETIZATIONS}
    ends = {name: (float(v[0]), float(v[-1])) for name, v in levels.items()}
    assert ends["edm"] == pytest.approx((80, 0.002)) and ends["ve"] == pytest.approx((100, 0.02))
    assert ends["vp"] == pytest.approx((152.167, 0.010485), rel=1e-3)
    assert 78 < ends["iddpm"][0] <= 81 and 0.002 <= ends["iddpm"][1] < 0.0065
    ratios = (levels["ve"][1:] / levels["ve"][:-1]).numpy()
    np.testing.assert_allclose(ratios, ratios[0])
    t = np.linspace(1, 1e-3, 18)
    np.testing.assert_allclose(levels["vp"], np.sqrt(np.exp(19.9 * t**2 / 2 + 0.1 * t) - 1), rtol=1e-6)
    narrow = Exact()
    narrow.sigma_min, narrow.sigma_max = 0.5, 10.0
    with pytest.raises(ValueError, match="no VP schedule spans the noise levels from 0.5 to 10"):
        Ablation(disc="vp").levels(narrow)
    for name in ("edm", "ve", "iddpm"):
        found = Ablation(num_steps=5, disc=name).levels(narrow)[0]
        assert found.min() >= 0.5 * (1 - 1e-9) and found.max() <= 10 * (1 + 1e-9)


def test_noise_is_drawn_at_every_step_and_churn_adds_it():
    draws = []
    randn_like = lambda x: draws.append(1) or torch.full_like(x, 0.5)
    still = ablation(Exact(), NOISE, num_steps=6, randn_like=randn_like)
    assert len(draws) == 6 and torch.equal(still, ablation(Exact(), NOISE, num_steps=6))
    churned = ablation(
        Exact(), NOISE, num_steps=6, S_churn=3, S_min=0.05, S_max=50, S_noise=1.003, randn_like=randn_like
    )
    same = samplers.heun(
        Exact(), NOISE, num_steps=6, S_churn=3, S_min=0.05, S_max=50, S_noise=1.003, dtype=torch.float64,
        randn_like=randn_like,
    )  # fmt: skip
    torch.testing.assert_close(churned, same, rtol=1e-12, atol=1e-12)
    assert (churned - still).abs().max() > 1e-3


def iddpm():
    torch.manual_seed(0)
    small = dict(model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    net = iDDPMPrecond(8, 1, **small).eval().requires_grad_(False)
    asked, forward = [], net.forward
    net.forward = lambda x, sigma, *args, **kwargs: asked.append(float(sigma)) or forward(x, sigma, *args, **kwargs)
    return net, asked


@pytest.mark.parametrize("sampler", [samplers.heun, ablation])
@pytest.mark.parametrize("guide", [False, True])
def test_levels_of_an_iddpm_network_are_its_own(sampler, guide):
    """Without rounding they differ by up to 2.7 %: the network takes its nearest level for another one."""
    net, asked = iddpm()
    options = dict(gnet=iddpm()[0], guidance=1.5) if guide else {}
    options |= dict(sigma_min=float(net.sigma_min), sigma_max=80.0, S_churn=5)
    images = sampler(net, torch.randn(1, 1, 8, 8), num_steps=12, **options)
    assert images.isfinite().all() and len(asked) == 23
    levels = net.u.double()
    for sigma in asked:
        assert (levels - sigma).abs().min() < 1e-6 * sigma, sigma


def test_the_command_line(tmp_path, tiny_net):
    path = tmp_path / "net.safetensors"
    save_snapshot(path, tiny_net(0))
    command = [generate_images.main, f"--net={path}", "--seeds=0-1"]
    vp = ["--disc=vp", "--schedule=vp", "--scaling=vp", "--method=euler"]
    for name, more in (("edm", []), ("vp", vp), ("cld", ["--process=cld", "--disc=ve"])):
        run(*command, f"--outdir={tmp_path / name}", "--solver=ablation", "--steps=6", *more)
    run(*command, f"--outdir={tmp_path / 'heun'}", "--steps=6")
    made = {
        name: np.array(PIL.Image.open(tmp_path / name / "000000.png")).astype(int)
        for name in ("edm", "vp", "cld", "heun")
    }
    assert abs(made["edm"] - made["heun"]).max() <= 1  # float64 against float32
    assert all(abs(made["edm"] - made[name]).max() > 5 for name in ("vp", "cld"))
    bad = [*command, f"--outdir={tmp_path / 'bad'}"]
    one_line(*bad, "--solver=ablation", "--disc=ddpm", says=("--disc=ddpm", "iddpm"))
    one_line(*bad, "--solver=ablation", "--alpha=0", says="--alpha=0")
    one_line(*bad, "--solver=ablation", "--inject-noise=0.1", says="--inject-noise")
    with pytest.warns(UserWarning, match="--disc has no effect with --solver=heun"):
        run(*command, f"--outdir={tmp_path / 'w'}", "--steps=1", "--disc=vp")
