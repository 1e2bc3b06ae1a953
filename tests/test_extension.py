"""One of everything a user may add, each a few lines, run by the real loop and scripts; no project file is touched."""

import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from small_runs import ROOT, final_state, python, run, small_command, small_config

import calculate_metrics
import generate_images
import train_edm2
from metrics import detectors
from torch_utils.persistence import load_snapshot, persistent, read_header, save_snapshot
from training import choices, phema, presets, processes, samplers, selection, setup
from training.dataset import ArrayDataset
from training.encoders import IdentityEncoder, StandardRGBEncoder
from training.feed import Feed
from training.losses import Draws, EDM2Loss, Loss, Objective
from training.training_loop import Periods

SHORT = dict(total_nimg=256, status_nimg=0, snapshot_nimg=1024, checkpoint_nimg=0)


def train_points(data, net, loss, run_dir, steps=20, batch=128, lr=0.01):
    """The real loop on data in memory."""
    objective = Objective(net, loss)
    optimizer = torch.optim.Adam(objective.param_groups(), lr=1, betas=(0.9, 0.9))
    parts = (objective, Feed(data, block=32), IdentityEncoder(), selection.IdentitySelector(), optimizer)
    periods = Periods(steps * batch, snapshot_nimg=batch * 1024, status_nimg=0, checkpoint_nimg=0)
    ema = phema.PowerFunctionEMA(objective, [0.1])
    return setup.Run(*parts, ema, lambda nimg: lr, periods, batch_size=batch).start(run_dir)


class Exact:
    """The best denoiser of N(0, s^2) data, for solvers."""

    label_dim, sigma_min, sigma_max = 0, 0.0, math.inf

    def __init__(self, s=0.7):
        self.sigma_data = s

    def __call__(self, x, sigma, class_labels=None):
        sigma = torch.as_tensor(sigma).reshape(-1, *[1] * (x.ndim - 1))
        return x * self.sigma_data**2 / (self.sigma_data**2 + sigma**2)


# --- CONTRIBUTING.md as it stands ---------------------------------------------------------------------------------------

TABLES = [choices.ARCHS, choices.LOSSES, choices.OPTIMIZERS, choices.EMAS, choices.ENCODERS, choices.SCHEDULES]
TABLES += [processes.REGISTRY, selection.FUNCTIONS, presets.PRESETS, detectors.DETECTORS]


@pytest.fixture(scope="module")
def added():
    """The names that the code blocks of CONTRIBUTING.md define, registered while this file runs."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    before, names = [dict(table) for table in TABLES], {"__name__": "contributing"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    new = [table.keys() - old.keys() for table, old in zip(TABLES, before, strict=True)]
    assert all(new), "a registry without an example"
    yield names
    for table, keys in zip(TABLES, new, strict=True):
        for key in keys:
            del table[key]


@pytest.mark.parametrize(
    "options",
    [
        "--process=laplace --optimizer=rmsprop --lr-schedule=falling --ema=short --select=hardest --filter-ratio=0.5",
        "--process=ring --encoder=half-range",
        "--arch=pointwise --loss=tempered --preset=mine --channels=8",
    ],
)
def test_what_contributing_adds_trains_samples_and_scores(digits, tmp_path, added, options):
    short = ["--duration=256", "--status=0", "--checkpoint=0"]
    command = [*small_command(digits, tmp_path / "run"), *short, *options.split()]
    run(train_edm2.main, *command)
    snapshot = load_snapshot(tmp_path / "run")
    for word in options.split():
        name, value = word.lstrip("-").replace("-", "_").split("=")
        assert str(snapshot.options[name]) == value.replace("_", "-") or name == "channels"
    net, made = snapshot.net, snapshot.process
    assert isinstance(net, added["Pointwise"]) == ("pointwise" in options)
    assert isinstance(made, added["Laplace"]) == ("laplace" in options) and isinstance(made, added["Ring"]) == (
        "ring" in options
    )
    assert isinstance(snapshot.encoder, added["HalfRange"]) == ("half-range" in options)
    more = ["--process=ring", "--solver=em"] if "ring" in options else []
    out = [f"--outdir={tmp_path / 'out'}", "--seeds=0-7", "--steps=2", "--class=balanced"]
    run(generate_images.main, f"--net={tmp_path / 'run'}", *out, *more)
    score = ["calc", f"--images={tmp_path / 'out'}", f"--data={digits}", "--metrics=mean", "--distances=fd"]
    assert json.loads(run(calculate_metrics.cmdline, *score).stdout)["metrics"]["mean"]["overall"]["count"] == 8


def test_a_kernel_of_ones_own_is_the_prior(digits, tmp_path, added):
    setup.train(small_config(digits, process="laplace", **SHORT), tmp_path / "run")
    (batch,) = generate_images.generate_images(tmp_path / "run", seeds=range(8), num_steps=2, max_batch_size=8)
    expected = added["Laplace"]().unit_noise([1, 1, 8, 8], torch.Generator().manual_seed(3))
    assert torch.equal(batch.noise[3:4], expected)
    loss = EDM2Loss(kernel=added["Laplace"]())
    draws = loss.draw(torch.zeros(4000, 1, 1, 1), generator=torch.Generator().manual_seed(0))
    unit = (draws.noise / draws.sigma.reshape(-1, 1, 1, 1)).flatten()
    assert float(unit.var()) == pytest.approx(1, abs=0.1) and float(unit.pow(4).mean()) == pytest.approx(6, abs=1.5)


@pytest.mark.parametrize("solver, steps", [(samplers.sscs, 60), (samplers.euler_maruyama, 500)])
def test_process(solver, steps, added):
    net, ring = Exact(), added["Ring"]()
    generator = torch.Generator().manual_seed(0)
    latents = samplers.start_state(net, ring, [3000, 1, 1, 1], generator)
    assert latents.shape == (3000, 3, 1, 1, 1)
    points = solver(
        net,
        ring,
        latents,
        num_steps=steps,
        randn_like=lambda u: torch.randn(u.shape, generator=generator, dtype=u.dtype),
    )
    assert float(points.std()) == pytest.approx(0.7, rel=0.06) and abs(float(points.mean())) < 0.06


def test_solver(tiny_net, added):
    (batch,) = generate_images.generate_images(
        tiny_net(10), seeds=range(4), sampler=added["euler"], num_steps=3, max_batch_size=4
    )
    assert batch.images.shape == (4, 1, 8, 8) and batch.images.dtype == torch.uint8
    start = torch.randn(2000, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    assert float(added["euler"](Exact(), start, num_steps=100).std()) == pytest.approx(0.7, rel=0.05)


def test_what_is_added_shows_in_the_help(added):
    shown = run(train_edm2.main, "--help").output
    for name in ("rmsprop", "falling", "short", "half-range", "pointwise", "tempered"):
        assert re.search(rf"\|{name}\b", shown), name


def test_an_option_is_one_line(tmp_path, digits):
    """A line added to training/config.py is an option in --help, in --dry-run and in the header of the snapshot."""
    for name in ("training", "torch_utils", "dnnlib"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "train_edm2.py", tmp_path)
    config = tmp_path / "training" / "config.py"
    text = config.read_text(encoding="utf-8")
    anchor = "    seed: int = _run("
    line = '    colour: str = _run("red", "Of the shed", choices=("red", "blue"))\n'
    config.write_text(text.replace(anchor, line + anchor), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    shown = python("train_edm2.py", "--help", cwd=tmp_path, env=env)
    assert "--colour red|blue" in shown.stdout and "Of the shed" in shown.stdout
    command = small_command(digits, tmp_path / "run", "--colour=blue", "--duration=256", "--status=0", "--checkpoint=0")
    assert '"colour": "blue"' in python("train_edm2.py", *command, "--dry-run", cwd=tmp_path, env=env).stdout
    wrong = python("train_edm2.py", *command, "--colour=pink", code=2, cwd=tmp_path, env=env)
    assert "--colour=pink is unknown; known: blue, red" in wrong.stderr
    python("train_edm2.py", *command, cwd=tmp_path, env=env)
    assert read_header(tmp_path / "run")["options"]["colour"] == "blue"


class Undescribed:
    def unit_noise(self, shape, generator=None):
        return torch.zeros(shape)


def test_what_cannot_describe_itself_is_refused_at_the_start(digits, tmp_path, monkeypatch):
    """A kernel, process, encoder or network that a snapshot could not give back; nothing is written."""

    class OwnEncoder(StandardRGBEncoder):
        pass

    class OwnProcess(processes.EDM):
        pass

    class OwnNet(Augmented):
        pass

    monkeypatch.setitem(processes.REGISTRY, "laplace", Undescribed)
    monkeypatch.setitem(processes.REGISTRY, "own", OwnProcess)
    monkeypatch.setitem(setup.ENCODERS, "own", OwnEncoder)
    monkeypatch.setitem(setup.ARCHS, "own", lambda config, interface: OwnNet(**interface))
    for options, name in [
        (dict(process="laplace"), "Undescribed"),
        (dict(process="own"), "OwnProcess"),
        (dict(encoder="own"), "OwnEncoder"),
        (dict(arch="own"), "OwnNet"),
    ]:
        with pytest.raises(
            ValueError, match=f"{name} cannot be stored: decorate .*@torch_utils.persistence.persistent"
        ):
            setup.train(small_config(digits, **options, **SHORT), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- losses -----------------------------------------------------------------------------------------------------------


class Tempered(EDM2Loss):
    """A parameter of the loss, and a learned process: both are trained, averaged and saved."""

    lr_scale = 0.5

    def __init__(self, **options):
        super().__init__(**options)
        self.temperature = torch.nn.Parameter(torch.zeros([]))
        self.process = processes.get("learned", V=2)

    def evaluate(self, net, draws):
        loss = super().evaluate(net, draws) * (-self.temperature).exp() + self.temperature
        return loss + self.process.D.float().square().sum()


def test_loss_with_parameters_of_its_own(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(setup.LOSSES, "tempered", lambda config, common, references: Tempered(**common))
    setup.train(small_config(digits, loss="tempered", **SHORT), tmp_path / "run")
    state = final_state(tmp_path / "run", 0)
    assert float(state["objective"]["loss.temperature"]) != 0
    assert float(state["ema"]["emas"][0]["loss.temperature"]) != 0
    rates = [group["lr"] for group in state["optimizer"]["param_groups"]]
    assert rates[1] == pytest.approx(0.5 * rates[0]) and rates[0] > 0
    own = [name for name in state["objective"] if name.startswith("loss.process.")]
    saved = load_snapshot(tmp_path / "run").process.state_dict()
    assert own and all(torch.equal(saved[n[13:]], state["ema"]["emas"][0][n]) for n in own)
    assert any(not torch.equal(saved[n], v) for n, v in processes.get("learned", V=2).state_dict().items())


class Contrast(EDM2Loss):
    """Pulls towards the mean of some reference images; the loop knows nothing of them."""

    def __init__(self, references, **options):
        super().__init__(**options)
        self.references = references

    def draw(self, images, labels=None, generator=None):
        draws = super().draw(images, labels, generator)
        centre = self.references(5, generator)[0].mean(dim=0)
        draws["targets"] = 0.9 * draws.images + 0.1 * centre
        return draws


def test_loss_with_reference_images(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(setup.LOSSES, "contrast", lambda config, common, references: Contrast(references, **common))
    loop = setup.train(small_config(digits, loss="contrast", batch_gpu=20, **SHORT), tmp_path / "run")
    assert loop.state.cur_nimg == 256
    draws = loop.objective.loss.draw(torch.zeros(1, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    assert float(draws.targets.std()) > 0  # the images are flat, the references are not
    images, labels = loop.objective.loss.references(7, torch.Generator().manual_seed(0))
    assert images.shape == (7, 1, 8, 8) and labels.shape == (7, 10) and float(images.min()) == -1


# --- a selection with a reference network -----------------------------------------------------------------------------


def test_selection_with_a_reference_network(digits, tmp_path, tiny_net, monkeypatch):
    seen = []

    def largest_gap(learner_loss, reference_loss, labels, *, size, generator):
        seen.append((learner_loss, reference_loss, labels))
        return (learner_loss - reference_loss).topk(size).indices

    reference = tmp_path / "reference.safetensors"
    save_snapshot(reference, tiny_net(10, sigma_data=0.75))
    monkeypatch.setitem(selection.FUNCTIONS, "gap", largest_gap)  # --select=gap
    setup.train(
        small_config(digits, select="gap", reference=str(reference), filter_ratio=0.5, **SHORT), tmp_path / "run"
    )
    learner, other, labels = seen[0]
    assert learner.shape == other.shape == (256,) and labels.shape == (256, 10)
    assert not torch.equal(learner, other)


# --- networks ---------------------------------------------------------------------------------------------------------


@persistent
class Augmented(torch.nn.Module):
    """A denoiser that is told how its images were augmented."""

    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self, img_resolution, img_channels, label_dim, sigma_data=0.5):
        super().__init__()
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.label_dim, self.sigma_data = label_dim, sigma_data
        self.conv = torch.nn.Conv2d(img_channels, img_channels, 3, padding=1)
        self.mix = torch.nn.Linear(9, 1)
        self.logvar = torch.nn.Parameter(torch.zeros([]))

    def forward(self, x, sigma, class_labels=None, return_logvar=False, augment_labels=None):
        shift = 0 if augment_labels is None else self.mix(augment_labels).reshape(-1, 1, 1, 1)
        denoised = self.conv(x) + shift
        return (denoised, self.logvar.expand(len(x), 1, 1, 1)) if return_logvar else denoised


def test_network_with_augmentation_labels(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(setup.ARCHS, "augmented", lambda config, interface: Augmented(**interface))
    loop = setup.train(small_config(digits, arch="augmented", augment=0.9, **SHORT), tmp_path / "run")
    assert float(loop.objective.net.mix.weight.grad.norm()) > 0
    assert type(load_snapshot(tmp_path / "run").net) is Augmented
    batches = list(generate_images.generate_images(tmp_path / "run", seeds=range(3), num_steps=2))
    assert batches[0].images.shape == (3, 1, 8, 8)


class JointLoss(Loss):
    """Hybrid score matching: |L' score + L^-1 (u - m x0)|^2 for u ~ N(m x0, C), C = L L' (CLD sec. 3.2)."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def draw(self, images, labels=None, generator=None):
        t = 0.05 + 0.95 * torch.rand([len(images)], generator=generator, dtype=torch.float64)
        mean, _ = self.process.kernel(t)  # [N, V]
        L = self.process.cholesky(t)  # [N, V, V]
        noise = torch.randn([len(images), self.process.V, images[0].numel()], generator=generator).double()
        u = mean[..., None] * images.flatten(1)[:, None].double() + L @ noise  # [N, V, d]
        return Draws(u=u.reshape(len(u), -1, *images.shape[1:]), t=t, noise=noise, L=L)

    def evaluate(self, net, draws):
        score = net.score(draws.u, draws.t).reshape(draws.noise.shape)
        return (draws.L.mT @ score + draws.noise).square()


@persistent
class JointGaussian(torch.nn.Module):
    """score(u, t) of N(0, s^2) data under CLD, of the whole two-variable state; s is learned."""

    def __init__(self):
        super().__init__()
        self.log_s = torch.nn.Parameter(torch.zeros([]))
        self.process = processes.get("cld")

    def score(self, u, t):
        mean, cov = self.process.kernel(t)
        mean, cov = mean.expand(len(u), -1), cov.expand(len(u), -1, -1)
        total = cov + (2 * self.log_s.double()).exp() * mean[:, :, None] * mean[:, None, :]
        return -torch.linalg.solve(total, u.flatten(2).double()).reshape(u.shape)


def test_joint_network_of_two_variables_on_points(tmp_path):
    """Also 2-D data: [N, 2, 1, 1] in memory."""
    generator = torch.Generator().manual_seed(0)
    data = ArrayDataset(0.3 * np.random.RandomState(0).randn(2000, 2, 1, 1))
    net = JointGaussian()
    loop = train_points(data, net, JointLoss(net.process), tmp_path, steps=60, lr=0.05)
    learned = loop.ema.get()[0][0].net
    assert math.exp(float(learned.log_s)) == pytest.approx(0.3, rel=0.1)
    latents = net.process.prior_sample([1500, 2, 2, 1, 1], generator)
    points = samplers.euler_maruyama(
        learned, net.process, latents, num_steps=100, grid="quadratic", t_min=1e-3,
        randn_like=lambda u: torch.randn(u.shape, generator=generator, dtype=u.dtype),
    )  # fmt: skip
    assert points.shape == (1500, 2, 1, 1) and float(points.std()) == pytest.approx(0.3, rel=0.12)
    path = tmp_path / "joint.safetensors"
    save_snapshot(path, learned)
    assert load_snapshot(path, classes={"JointGaussian": JointGaussian}).net.log_s == learned.log_s


def test_points_from_files(tmp_path):
    """2-D points in .npy files train by the ordinary program, values unchanged."""
    folder = tmp_path / "points"
    folder.mkdir()
    points = 0.5 * np.random.RandomState(0).randn(64, 2, 1, 1).astype(np.float32)
    for i, point in enumerate(points):
        np.save(folder / f"{i:03d}.npy", point)
    setup_options = dict(arch="mlp", cond=False, loss="edm", **SHORT)
    from training.networks_toy import MLPDenoiser

    setup.ARCHS["mlp"] = lambda config, interface: MLPDenoiser(hidden_dim=8, in_dim=interface["img_channels"])
    try:
        loop = setup.train(small_config(folder, **setup_options), tmp_path / "run")
    finally:
        del setup.ARCHS["mlp"]
    _, images, _ = next(loop.feed.blocks(0, 32))
    assert {tuple(p) for p in loop.encoder.encode_latents(images)[:, :, 0, 0].tolist()} <= {
        tuple(p) for p in points[:, :, 0, 0].tolist()
    }
