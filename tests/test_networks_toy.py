"""Toy networks: published sizes, analytic and numerical gradients, and learning a known density."""

import math

import pytest
import torch

from torch_utils.persistence import load_snapshot, save_snapshot
from training.magnitude import normalize
from training.networks_toy import MLPDenoiser, ToyModel
from training.processes import get
from training.samplers import euler_maruyama, heun, start_state


def test_published_size_and_names():
    assert sum(p.numel() for p in ToyModel().parameters()) == 16_641
    assert sum(p.numel() for p in ToyModel(hidden_dim=32).parameters()) == 4_225
    names = ["gain"] + [f"layers.{i}.weight" for i in range(0, 9, 2)]
    assert list(ToyModel().state_dict()) == names


def with_gain(gain=0.7):
    torch.manual_seed(0)
    model = ToyModel(hidden_dim=16).eval()
    model.gain.data.fill_(gain)
    return model


def test_initial_density_is_the_gaussian_of_the_data():
    model, x = ToyModel(), torch.randn(5, 2)
    for sigma in (0.1, 2.0):
        torch.testing.assert_close(model.point_score(x, sigma), -x / (0.25 + sigma**2) / 1.0)
    denoised = model(x.reshape(5, 2, 1, 1), torch.tensor(2.0))
    torch.testing.assert_close(denoised, (x * 0.25 / 4.25).reshape(5, 2, 1, 1))


def test_density_formula_and_score():
    model = with_gain()
    x, sigma = torch.randn(7, 2), torch.rand(7) + 0.2
    scaled = x / (0.25 + sigma**2).sqrt()[:, None]
    h = torch.cat([scaled, sigma.log()[:, None] / 4, torch.ones(7, 1)], dim=1)
    weights = [normalize(p.data) for name, p in model.named_parameters() if "weight" in name]
    for i, w in enumerate(weights):
        h = (torch.nn.functional.silu(h) / 0.596 if i else h) @ w.T / math.sqrt(w.shape[1])
    logp = 0.7 * h.square().mean(1) / sigma - scaled.square().sum(1) / 2
    torch.testing.assert_close(model.logp(x, sigma), logp)

    score = model.point_score(x, sigma)
    for i, step in enumerate(torch.eye(2) * 2e-3):
        difference = (model.logp(x + step, sigma) - model.logp(x - step, sigma)) / 4e-3
        torch.testing.assert_close(score[:, i], difference, rtol=2e-2, atol=2e-2)
    denoised, logvar = model(x.reshape(7, 2, 1, 1), sigma, return_logvar=True)
    torch.testing.assert_close(denoised.flatten(1), x + sigma[:, None] ** 2 * score)
    assert logvar.shape == (7, 1, 1, 1) and not logvar.any()
    assert not score.requires_grad and model.point_score(torch.zeros(2, 3, 2), 1.0).shape == (2, 3, 2)


def test_score_can_be_trained():
    model = with_gain().train()
    model.point_score(torch.randn(4, 2), 0.5, graph=True).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with torch.no_grad():
        assert not model(torch.randn(4, 2, 1, 1), 0.5).requires_grad
    assert model(torch.randn(4, 2, 1, 1), 0.5).requires_grad


def test_solvers_take_the_model():
    """At gain 0 it is the denoiser of N(0, .25 I), by every solver."""
    model, process = with_gain(0.0), get("cld")
    noise, latents = torch.randn(4000, 2, 1, 1), start_state(model, process, (4000, 2, 1, 1))
    for images in (heun(model, noise, num_steps=48), euler_maruyama(model, process, latents, num_steps=200)):
        assert images.shape == (4000, 2, 1, 1) and float(images.std()) == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("label_dim", [0, 3])
@pytest.mark.parametrize("logvar_channels", [0, 8])
def test_mlp_keeps_the_denoiser_contract(label_dim, logvar_channels, tmp_path):
    torch.manual_seed(0)
    net = MLPDenoiser(label_dim, hidden_dim=16, num_layers=2, logvar_channels=logvar_channels)
    x, sigma = torch.randn(3, 2, 1, 1), torch.tensor([0.1, 1.0, 5.0])
    labels = torch.eye(3) if label_dim else None
    torch.testing.assert_close(net(x, sigma, labels), x * (0.25 / (0.25 + sigma**2)).reshape(-1, 1, 1, 1))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    denoised, logvar = net(x, sigma, labels, return_logvar=True)
    assert denoised.shape == x.shape and logvar.shape == (3, 1, 1, 1) and bool(logvar.any()) == bool(logvar_channels)
    torch.testing.assert_close(net(x, 1.0, labels)[1], denoised[1])
    assert torch.equal(net(x, sigma, labels), net(x, sigma, labels.flip(0) if label_dim else None)) == (not label_dim)
    (net(x, sigma, labels, return_logvar=True)[1].sum() + denoised.sum()).backward()
    assert all(p.grad is not None for p in net.parameters())
    save_snapshot(tmp_path / "net.safetensors", net)
    loaded = load_snapshot(tmp_path / "net.safetensors").net
    assert torch.equal(loaded(x, sigma, labels), denoised)
    assert loaded.label_dim == label_dim and loaded.img_channels == 2


def test_mlp_learns_two_labelled_points():
    """Data at +-1 by label: the best denoiser is the point itself, whatever the noise."""
    torch.manual_seed(0)
    net = MLPDenoiser(2, hidden_dim=32, num_layers=2)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        kind = torch.randint(2, [128])
        clean = (2.0 * kind - 1).reshape(-1, 1, 1, 1).expand(-1, 2, 1, 1)
        sigma = (torch.randn(128) * 1.2 - 0.4).exp()
        noisy = clean + sigma.reshape(-1, 1, 1, 1) * torch.randn(128, 2, 1, 1)
        denoised = net(noisy, sigma, torch.nn.functional.one_hot(kind, 2))
        weight = ((sigma**2 + 0.25) / (0.5 * sigma) ** 2).reshape(-1, 1, 1, 1)
        loss = (weight * (denoised - clean).square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images = heun(net, torch.randn(20, 2, 1, 1), torch.eye(2)[[0, 1] * 10], num_steps=8)
    target = torch.tensor([-1.0, 1.0] * 10).reshape(-1, 1, 1, 1)
    assert (images - target).abs().mean() < 0.25
    with pytest.raises(ValueError, match="hidden_dim=7"):
        MLPDenoiser(hidden_dim=7)
