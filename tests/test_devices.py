"""Everything that runs per step, on a pretended accelerator: no tensor of one device meets one of another, and how often the
host waits is a stated number. The EDM2 step and Heun's sampler wait never.
"""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pretend_device import DEVICE, Accelerator, Generator, Pretended
from small_runs import small_config

from metrics.detectors.dinov2 import Dino, DinoV2
from metrics.detectors.inception import Inception, InceptionV3
from metrics.features import collect
from torch_utils.random import StackedRandomGenerator
from training import choices, guidance, likelihood, processes, samplers, selection, setup
from training.dataset import label_rows
from training.encoders import StabilityVAEEncoder
from training.generation import generate_images
from training.networks_edm2 import Precond
from training.selection.scores import CHEAP
from training.validation import HeldOut

ROOT = Path(__file__).parents[1]

# --- the accelerator itself -------------------------------------------------------------------------------------------


def test_what_a_gpu_refuses_is_refused():
    with Accelerator() as seen:
        x = torch.ones(3, device=DEVICE)
        for wrong in (
            lambda: x + torch.ones(3),
            lambda: torch.cat([x, torch.ones(1)]),
            lambda: x.numpy(),
            lambda: torch.randn([2], generator=torch.Generator(DEVICE)),
        ):
            with pytest.raises(RuntimeError, match="device"):
                wrong()
        assert isinstance(x + torch.ones([]), Pretended) and not seen.syncs and not seen.uploads


def test_waits_are_counted_with_their_line():
    with Accelerator() as seen:
        x = torch.arange(4.0, device=DEVICE)
        for wait in (lambda: bool(x.any()), x.tolist, x.cpu, lambda: float(x[1]), lambda: x[x > 1], x.unique):
            seen.forget()
            wait()
            assert sum(seen.syncs.values()) == 1 and next(iter(seen.syncs)).startswith("tests/test_devices.py:")
        seen.forget()
        torch.ones(3).to(DEVICE, non_blocking=True)
        assert not seen.syncs and not seen.uploads
        torch.ones(3).to(DEVICE), torch.tensor([1.0], device=DEVICE), x[torch.tensor([1])]
        assert not seen.syncs and sum(seen.uploads.values()) == 3


def test_values_and_gradients_are_those_of_the_cpu():
    def loss(net, device):
        g = torch.Generator(device).manual_seed(1)
        return net(torch.randn([5, 3], generator=g, device=device)).square().sum()

    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    loss(net, "cpu").backward()
    wanted = net.weight.grad.clone()
    with Accelerator():
        net.to(DEVICE)
        loss(net, DEVICE).backward()
        assert torch.equal(net.weight.grad.inner, wanted)


# --- training ---------------------------------------------------------------------------------------------------------

STEPS = {  # options -> waits per step (of one micro-batch of 64, two blocks)
    "edm2": ({}, 0),
    "dropout of labels": (dict(label_dropout=0.1), 0),
    "ddpmpp": (dict(arch="ddpmpp", loss="edm"), 0),
    "adm": (dict(arch="adm", loss="edm"), 0),
    "vp": (dict(arch="ddpmpp", loss="vp", precond="vp"), 0),
    "ve": (dict(arch="ncsnpp", loss="ve", precond="ve"), 0),
    "augmented": (dict(arch="ncsnpp", loss="edm", augment=0.5), 2),  # per block: how far to pad
    "pfgm++": (dict(process="pfgmpp", aug_dim=128.0), 0),
    "stable targets": (dict(stf=True, stf_refs=16), 0),
    "stable pfgm++": (dict(process="pfgmpp", aug_dim=128.0, stf=True, stf_refs=16), 0),
    "cld": (dict(process="cld"), 0),
    "malda": (dict(process="malda"), 0),
    "cld, importance": (dict(process="cld", time_sampling="importance"), 2),  # per block: matrices are the CPU's
    "cld, uniform": (dict(process="cld", time_sampling="uniform", weighting="reweightedv2"), 2),
    "learned": (dict(process="learned"), 5),  # matrices are the CPU's, their gradients the device's
    "random": (dict(select="random"), 1),
    **{
        name: (dict(select=name, reference="ema"), 3)  # losses are finite, no NaN, indices are distinct
        for name in ("jest", "hard", "easy", "proportional")
    },
    "diverse": (dict(select="diverse", reference="ema"), 4),
    "early": (dict(select="jest", reference="ema", select_when="early"), 4),
    "lowres": (dict(select="jest", reference="ema", select_cheap="lowres"), 3),
    "levels": (dict(select="jest", reference="ema", select_cheap="levels"), 9),
    "half": (dict(select="jest", reference="ema", select_cheap="half"), 3),
    "vp, reduced": (dict(process="vp", loss="process"), 0),
    "alda": (dict(process="alda", encoder="dequantize"), 0),
    "two matrices": (dict(process="linear", process_options={"Q": [[0, -1], [1, 0]], "D": [[0, 0], [0, 1]]}), 0),
    "joint": (dict(process="cld", parameterization="joint", loss="joint"), 2),  # times and matrices are the CPU's
    "hounet": (dict(process="cld", parameterization="joint", arch="hounet", channels=32, channels_per_head=None), 2),
    "adamw": (dict(optimizer="adamw", ema="decay", encoder="center"), 0),
    "adamax": (dict(optimizer="adamax", ema="halflife", encoder="logit"), 0),
    "no average": (dict(ema="none", encoder="rgb", grad_clip=1.0), 0),
}


def test_every_choice_takes_a_step():
    """But for the networks of points, whose data are of 1x1."""
    usual = small_config("")
    tables = dict(arch=choices.ARCHS, loss=choices.LOSSES, optimizer=choices.OPTIMIZERS, ema=choices.EMAS)
    tables |= dict(encoder=choices.ENCODERS, process=processes.REGISTRY, select=selection.FUNCTIONS, select_cheap=CHEAP)
    for option, table in tables.items():
        taken = {options.get(option, getattr(usual, option)) for options, _ in STEPS.values()}
        assert {name for name in table if not name.startswith("points-")} <= taken, option


@pytest.mark.parametrize("name", STEPS)
def test_waits_of_a_training_step(digits, tmp_path, name):
    options, waits = STEPS[name]
    periods = dict(total_nimg=2048, status_nimg=1024, snapshot_nimg=1024, checkpoint_nimg=1024)
    with Accelerator() as seen:
        run = setup.build(small_config(digits, **{**periods, "batch_size": 64, **options}), DEVICE)
        loop = setup.TrainingLoop(run, tmp_path)
        loop.step()
        seen.forget()
        loop.step()
        assert sum(seen.syncs.values()) <= waits, seen.syncs
        assert not seen.uploads or name == "learned", seen.uploads
        assert all(isinstance(p, Pretended) and p.grad.inner.isfinite().all() for p in loop.parameters)
        assert np.isfinite(loop.stats.means()["Loss/loss"])


def test_the_step_is_the_cpu_s(digits, tmp_path):
    """Two steps give the weights and statistics of the CPU in every bit: nothing is lost on the way."""

    def after(device):
        loop = setup.TrainingLoop(setup.build(small_config(digits), device), tmp_path)
        loop.step(), loop.step()
        inner = lambda p: p.detach().inner if device == DEVICE else p.detach()
        return [inner(p) for p in loop.parameters], loop.stats.means()

    weights, means = after(torch.device("cpu"))
    with Accelerator():
        found, others = after(DEVICE)
    assert means == others and all(torch.equal(a, b) for a, b in zip(weights, found, strict=True))


# --- sampling ---------------------------------------------------------------------------------------------------------


def small_net():
    sizes = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, channels_per_head=8)
    return Precond(8, 1, 10, **sizes).eval().requires_grad_(False).to(DEVICE)


def labels(n=4):
    return label_rows(torch.arange(n, device=DEVICE), 10)


def sampled(name, process=None, net=None, **options):
    """Images of a solver, per-sample generators and all."""
    net, g = net or small_net(), random_of(4)
    if process is None:
        return samplers.heun(net, g.randn([4, 1, 8, 8], device=DEVICE), labels(), randn_like=g.randn_like, **options)
    process = processes.get(process)
    u = samplers.start_state(net, process, [4, 1, 8, 8], g, device=DEVICE)
    return samplers.SOLVERS[name](net, process, u, labels(), randn_like=g.randn_like, **options)


def random_of(n):
    return StackedRandomGenerator(DEVICE, range(n))


@pytest.mark.parametrize(
    "options", [{}, {"S_churn": 5.0}, {"guided": None}, {"guided": (0.1, 5.0)}, {"unlabelled": 2.0}]
)
def test_heun_never_waits(options):
    """But for guidance in an interval, which asks at every evaluation whether the guide is needed."""
    options = dict(options)
    with Accelerator() as seen:
        net = small_net()
        if "guided" in options:
            net = guidance.guided(net, small_net(), 2.0, options.pop("guided"))
        if "unlabelled" in options:
            net = guidance.guided(net, guidance.NullLabels(net), options.pop("unlabelled"))
        waits = 2 * 3 - 1 if getattr(net, "interval", None) else 0
        seen.forget()
        images = sampled("heun", net=net, num_steps=3, **options)
        assert isinstance(images, Pretended) and sum(seen.syncs.values()) == waits and not seen.uploads, seen.syncs


@pytest.mark.parametrize("process", ["edm", "vp", "cld", "alda", "malda", "learned"])
@pytest.mark.parametrize("name", ["heun", "em", "sscs", "flow", "ablation"])
@pytest.mark.filterwarnings("ignore:.*reaches only sigma")
def test_solvers_never_wait(name, process):
    with Accelerator() as seen:
        images = sampled(name, process, num_steps=3)
        assert isinstance(images, Pretended) and not seen.syncs and not seen.uploads, (seen.syncs, seen.uploads)


def test_the_adaptive_solver_waits_twice_per_evaluation():
    """SciPy integrates on the host."""
    with Accelerator() as seen:
        assert isinstance(sampled("ode", "cld", rtol=1e-1, atol=1e-1), Pretended)
        assert {line.split(":")[0] for line in seen.syncs} == {"training/samplers.py"}


def test_generating_waits_three_times_per_batch(tmp_path):
    """Whether images are finite, their classes, and the images themselves."""
    with Accelerator() as seen:
        net = small_net()
        made = generate_images(
            net, range(8), str(tmp_path / "g"), class_idx="balanced", max_batch_size=4, device=DEVICE, num_steps=2
        )
        seen.forget()
        for batch in made:
            assert batch.images.device.type == "cpu" or isinstance(batch.images, Pretended)
        assert sum(seen.syncs.values()) <= 2 * 3, seen.syncs
    assert len(list((tmp_path / "g").glob("*.png"))) == 8


# --- the rest ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", selection.FUNCTIONS)
def test_selection_functions_stay_on_the_device(name):
    with Accelerator():
        given = dict(features=torch.rand(64, 16, device=DEVICE), labels=torch.rand(64, 10, device=DEVICE))
        given |= {key: torch.rand(64, device=DEVICE) for key in ("learner_loss", "reference_loss", "sigma")}
        function = selection.FUNCTIONS[name]
        given = {key: value for key, value in given.items() if key in inspect.signature(function).parameters}
        assert isinstance(function(**given, size=16, generator=Generator().manual_seed(0)), Pretended)


@pytest.mark.parametrize("process", ["edm", "cld"])
def test_likelihoods(process):
    with Accelerator() as seen:
        x = torch.rand(4, 1, 8, 8, device=DEVICE)
        seen.forget()
        assert isinstance(likelihood.elbo(small_net(), processes.get(process), x, labels()), Pretended)
        assert not seen.syncs and not seen.uploads, (seen.syncs, seen.uploads)
        options = dict(probe="gaussian", rtol=1e-1, atol=1e-1)
        assert isinstance(
            likelihood.ode_log_likelihood(small_net(), processes.get(process), x, labels(), **options), Pretended
        )


def test_latents_of_a_vae_never_wait():
    with Accelerator() as seen:
        encoder, x = StabilityVAEEncoder(), torch.rand(4, 8, 4, 4, device=DEVICE)
        assert isinstance(encoder.encode_latents(x, torch.Generator(DEVICE)), Pretended) and not seen.uploads
        assert not seen.syncs


def test_validation_waits_once_per_batch(digits):
    data = setup.open_dataset(small_config(digits))
    held, encoder = HeldOut(data), setup.choose_encoder(data)
    with Accelerator() as seen:
        net = small_net()
        seen.forget()
        result = held.denoising_loss(net, encoder)
        assert sum(seen.syncs.values()) == 1 and np.isfinite(result["loss"]), seen.syncs


def test_detectors_wait_once_per_batch():
    """For the features; images go up without waiting, and a network meets no constant of the CPU."""
    images = torch.randint(256, [4, 3, 16, 16], dtype=torch.uint8)
    inception, dino = object.__new__(Inception), object.__new__(Dino)
    inception.net, dino.net = InceptionV3().eval(), DinoV2(embed=16, depth=1, heads=2).eval()
    inception.name, dino.name = "fid", "dino"
    with Accelerator() as seen:
        found = {detector.name: detector.to(DEVICE) for detector in (inception, dino)}
        seen.forget()
        made = collect([(images, np.zeros(4, np.int64), np.arange(4))], found)
        assert sum(seen.syncs.values()) == 2 and not seen.uploads, (seen.syncs, seen.uploads)
    assert all(part.count() == 4 for part in made.values())


def test_freed_memory_stays_for_the_next_step():
    code = (
        "import resource, torch, torch_utils.distributed as dist; dist.init('cpu')\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for turn in range(4):\n"
        "    before = faults(); held = [torch.ones(2**20) for _ in range(20)]; del held\n"
        "print(faults() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500, "of 20480 pages"
