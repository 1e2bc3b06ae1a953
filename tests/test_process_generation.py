"""Images through any process and solver: seeds, guidance, priors, and what cannot be combined."""

import itertools
import math

import pytest
import torch

from torch_utils.persistence import save_snapshot
from training import generation, processes, samplers, time_grids
from training.generation import generate_images
from training.guidance import GuidedDenoiser
from training.samplers import SOLVERS
from training.sampling import Sampling, take

MADE = {
    "edm": lambda: processes.EDM(), "vp": lambda: processes.get("vp"), "cld": lambda: processes.get("cld", M=0.25, beta=(4, 4)),
    "malda": lambda: processes.get("malda", V=3),
}  # fmt: skip


def images(net, size, **options):
    batches = list(
        generate_images(net, range(4), class_idx="balanced", max_batch_size=size, **{"num_steps": 3, **options})
    )
    return torch.cat([b.images for b in batches]), torch.cat([b.noise for b in batches])


@pytest.mark.parametrize("solver", ["heun", "em", "sscs", "flow"])
@pytest.mark.parametrize("name", ["vp", "malda"])
def test_seed_decides_whatever_the_batch(tiny_net, name, solver):
    net, process = tiny_net(), MADE[name]()
    options = dict(process=process, sampler=SOLVERS[solver])
    (one, noise), (other, again) = (images(net, size, **options) for size in (4, 3))
    assert noise.shape == (4, process.V, 1, 8, 8) and torch.equal(noise, again)
    assert (one.int() - other.int()).abs().max() <= 1
    if name == "vp":
        guided = images(net, 4, **options, guidance=1.5, gnet=tiny_net(seed=1))[0]
        assert not torch.equal(one, guided)
        assert torch.equal(guided, images(GuidedDenoiser(net, tiny_net(seed=1), 1.5), 4, **options)[0])


def test_edm_process_is_edms_sampler(tiny_net):
    """Same noise, no process: bit for bit what EDM2's sampler makes."""
    net = tiny_net()
    (batch,) = generate_images(net, range(3), class_idx=0, process=processes.EDM(), prior="stationary", num_steps=4)
    expected = samplers.heun(net, (batch.noise[:, 0] / 80).float(), batch.labels, num_steps=4)
    assert torch.equal(batch.images, (expected * 127.5 + 128).clip(0, 255).to(torch.uint8))


class Gauss:
    """The best denoiser of N(0, 0.5^2) images."""

    sigma_data, sigma_min, sigma_max, label_dim, img_channels, img_resolution = 0.5, 0.0, 80.0, 0, 1, 16

    def __call__(self, x, sigma, class_labels=None):
        return x / (1 + 4 * torch.as_tensor(sigma).reshape(-1, 1, 1, 1) ** 2)


class Float:
    def init(self, device):
        pass

    def decode(self, z):
        return z


@pytest.mark.parametrize("solver, steps", [("heun", 40), ("em", 60), ("sscs", 40), ("flow", 24), ("ode", 1)])
@pytest.mark.parametrize("name", MADE)
def test_every_solver_reaches_the_data(name, solver, steps):
    """The variance of 4096 pixels; priors are matched, so that also VP and CLD, which stop early, agree."""
    options = dict(rtol=1e-3, atol=1e-3) if solver == "ode" else dict(num_steps=steps)
    made = generate_images(
        Gauss(), range(16), encoder=Float(), process=MADE[name](), sampler=SOLVERS[solver], max_batch_size=16, **options
    )
    pixels = next(made).images.double()
    assert abs(pixels.std() - 0.5) < 0.5 * (4 * (2 * 4096) ** -0.5 + 0.03)
    assert abs(pixels.mean()) < 4 * 0.5 / 64


def test_own_solver_and_what_cannot_be(tiny_net):
    def still(net, process, latents, labels=None, *, randn_like=None, **options):
        return latents[:, 0].float() * 0

    assert images(tiny_net(), 4, process=MADE["cld"](), sampler=still)[0].unique().tolist() == [128]
    with pytest.raises(ValueError, match="PFGM"):
        images(tiny_net(), 4, process=MADE["cld"](), kernel=processes.get("pfgmpp", D=128))
    images(tiny_net(), 4, process=MADE["cld"](), kernel=processes.get("pfgmpp", D="inf"))
    with pytest.raises(ValueError, match="grid"):
        images(tiny_net(), 4, process=MADE["cld"](), grid="uniform")


def test_options_of_a_command_line(tiny_net, tmp_path):
    """What sampling options mean, and what they refuse."""
    path = tmp_path / "net.safetensors"
    save_snapshot(path, tiny_net(3))

    def made(**given):
        return next(generation.batches(take({"net": str(path), "num_steps": 2, **given}), range(3))).images

    given = {"net": "x", "solver": "em", "sigma_min": None, "other": 1}
    assert take(given) == Sampling(net="x", solver="em") and given == {"other": 1}  # the rest is the command's own
    assert take({"net": "x"}).plain and take({"net": "x", "process": "edm", "solver": "heun"}).plain
    assert not take({"net": "x", "process_options": "sigma_max=50"}).plain
    em = dict(process="cld", solver="em", t_min=1e-3)
    assert torch.equal(made(**em, sigma_min=0.1), made(**em))  # t_min stands in for sigma_min
    assert not torch.equal(made(gnet="null", guidance=2.0), made())
    for options in (
        dict(process="nothing"),
        dict(solver="nothing"),
        dict(t_min=0.1),
        dict(time_grid="uniform"),
        dict(time_grid="cubic", solver="em"),
        dict(class_idx="first"),
        dict(guidance=math.nan),
        dict(inject_noise=0.1, process="cld"),
        dict(quantize_bits=25),
        dict(preset="nothing"),
    ):
        with pytest.raises(ValueError, match="--"):
            made(**options)
    with pytest.warns(UserWarning, match="--half-step"):
        take({"net": "x", "process": "cld", "solver": "em", "half_step": "published"})


class Joint(Gauss):
    """The same by a score of its own."""

    def __init__(self, process):
        self.process = process

    def score(self, u, t):
        y, sigma = self.process.project(u, t)
        return self.process.score(u, t, Gauss()(y, sigma))


def test_joint_networks_and_guides():
    """Networks with different inputs guide each other: a guide that says the same changes nothing."""
    process, options = MADE["cld"](), dict(encoder=Float(), sampler=SOLVERS["sscs"], num_steps=8)
    nets = [Gauss(), Joint(process)]
    plain = images(nets[0], 4, process=process, **options)[0]
    for net, gnet in itertools.product(nets, nets):
        more = dict(gnet=gnet, guidance=2.0, guidance_interval=(0.1, 5.0))
        torch.testing.assert_close(images(net, 4, process=process, **options, **more)[0], plain, rtol=1e-3, atol=1e-3)


def test_what_does_not_depend_on_the_batch_is_found_once(tiny_net, monkeypatch):
    calls = []
    found = samplers.endpoints
    for module in (samplers, time_grids):
        monkeypatch.setattr(module, "endpoints", lambda *args, **kwargs: calls.append(1) or found(*args, **kwargs))
    for solver in SOLVERS.values():
        options = dict(rtol=0.1, atol=0.1) if solver is SOLVERS["ode"] else {}
        images(tiny_net(), 1, process=MADE["cld"](), sampler=solver, **options)
    assert len(calls) == len(SOLVERS)
