"""Bits per dimension: the Gaussian in closed form through every transform, per source, and the command line."""

import json
import math

import numpy as np
import pytest
import torch
from small_runs import python

from metrics.evaluate import bits_per_dim, choose_encoder
from torch_utils.persistence import save_snapshot
from training import encoders, processes
from training.dataset import ArrayDataset
from training.encoders import CenterEncoder, IdentityEncoder, LogitEncoder, StandardRGBEncoder


class Exact:
    """The best denoiser of N(0, s^2)."""

    label_dim, sigma_min, sigma_max = 0, 0.0, math.inf

    def __init__(self, s):
        self.sigma_data = s

    def __call__(self, x, sigma, class_labels=None):
        return x * self.sigma_data**2 / (self.sigma_data**2 + torch.as_tensor(sigma).reshape(-1, 1, 1, 1) ** 2)


def pixels(n=64, float_arrays=False):
    rng = np.random.default_rng(0)
    images = (
        rng.normal(size=(n, 1, 2, 2)).astype("float32") if float_arrays else rng.integers(0, 256, (n, 1, 2, 2), "uint8")
    )
    return ArrayDataset(images, labels=np.arange(n) % 2, num_classes=2)


@pytest.mark.parametrize("name", ["edm", "cld"])
@pytest.mark.parametrize("encoder", [IdentityEncoder(), CenterEncoder(), LogitEncoder()], ids=repr)
def test_gaussian_bits_in_closed_form(encoder, name):
    """Identity: log N(x; 0, s^2) itself, both for the flow and, in the mean, for the bound (which is tight here)."""
    identity, s = isinstance(encoder, IdentityEncoder), 0.8
    data = pixels(64, identity)
    options = dict(per_source=True, seed=3, prior="matched", sigma_min=1e-3)
    flow = bits_per_dim(
        Exact(s), data, processes.get(name), encoder, "ode", probe="exact", rtol=1e-5, atol=1e-6, **options
    )
    bound = bits_per_dim(Exact(s), data, processes.get(name), encoder, "elbo", num_samples=16, **options)
    assert bound["sigma_min"] == pytest.approx(1e-3) and flow["num"] == 64 and set(flow["sources"]) == {"0", "1"}
    assert flow["bits_per_dim"] == pytest.approx(np.mean([v["bits_per_dim"] for v in flow["sources"].values()]))
    gap, spread = bound["bits_per_dim"] - flow["bits_per_dim"], bound["standard_error"]
    assert -3 * spread - 0.02 < gap < 3 * spread + 0.02
    if identity:
        x = torch.as_tensor(data._images).double()
        exact = (0.5 * x**2 / s**2 + 0.5 * math.log(2 * math.pi * s**2)).mean() / math.log(2)
        assert flow["bits_per_dim"] == pytest.approx(float(exact), abs=2e-3)
    else:  # uniform levels cost 8 bits under the uniform density; a Gaussian costs more: cross-entropy by quadrature
        y = torch.linspace(0, 1, 200001, dtype=torch.float64)[1:-1]
        z = encoder._forward(y)
        density = torch.distributions.Normal(0.0, s).log_prob(z).exp() * torch.gradient(z, spacing=(y,))[0]
        cross, every = float(-density.log().mean() / math.log(2)) + 8, flow["standard_error"]
        assert abs(flow["bits_per_dim"] - cross) < 4 * every


def test_discrete_bits_of_a_known_law():
    """A denoiser that knows the answer: all levels cost next to nothing beyond the endpoint's KL."""

    class Knows(Exact):
        def __call__(self, x, sigma, class_labels=None):
            return torch.full_like(x, 2 * 100 / 255 - 1)

    data = ArrayDataset(np.full((8, 1, 2, 2), 100, "uint8"))
    result = bits_per_dim(
        Knows(0.5), data, processes.EDM(), StandardRGBEncoder(), prior="matched", sigma_max=20.0, num_samples=8
    )
    assert result["bits_per_dim"] == pytest.approx(result["endpoint_kl"], abs=0.1) and "sources" not in result


def test_draws_of_an_image_do_not_depend_on_the_batch():
    one, other = (bits_per_dim(Exact(1), pixels(), processes.EDM(), CenterEncoder(), batch=b) for b in (64, 7))
    assert one["bits_per_dim"] == pytest.approx(other["bits_per_dim"], rel=1e-6)


def test_encoders_that_do_not_fit():
    assert choose_encoder(None, LogitEncoder(0.1)) == LogitEncoder(0.1)
    assert choose_encoder("center", StandardRGBEncoder()) == CenterEncoder()
    assert choose_encoder("discrete", CenterEncoder()) == StandardRGBEncoder() == choose_encoder(None, None)
    for name, trained in [("logit", StandardRGBEncoder()), ("center", LogitEncoder()), ("x", None)]:
        with pytest.raises(ValueError, match="--encoder"):
            choose_encoder(name, trained)
    with pytest.raises(ValueError, match="VAE"):
        choose_encoder(None, encoders.StabilityVAEEncoder())


def test_command(tiny_net, digits, tmp_path):
    save_snapshot(tmp_path / "net.safetensors", tiny_net(), encoder=StandardRGBEncoder(), process=None)
    arguments = [f"--net={tmp_path}/net.safetensors", f"--data={digits}", "--num=6", "--samples=1", "--device=cpu"]
    done = python("calculate_metrics.py", "likelihood", *arguments, "--process=malda", "--process-options=V=2")
    result = json.loads(done.stdout)
    assert result["process"]["name"] == "malda" and result["metrics"]["likelihood"]["num"] == 6, done.stderr
    assert {"endpoint_kl", "sigma_min", "sigma_max", "standard_error"} <= set(result["metrics"]["likelihood"])
