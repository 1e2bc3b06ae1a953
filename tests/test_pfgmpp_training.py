"""Training of every combination of network, preconditioning, loss and kernel; stable targets."""

import json
import math

import numpy as np
import pytest
import torch
from small_runs import python, run, small_command
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_edm2
from torch_utils import persistence
from training import losses, processes, samplers, setup
from training.config import TrainingConfig, make_config
from training.dataset import ImageFolderDataset
from training.encoders import StandardRGBEncoder
from training.feed import Candidates, Feed
from training.processes.pfgmpp import PosteriorMean

TINY = dict(
    channels=32, channel_mult=[1, 1], num_blocks=1, attn_resolutions=[4], batch_size=8, total_nimg=16, status_nimg=8,
    snapshot_nimg=0, checkpoint_nimg=0, block=4, rampup=0.0, fp16=False,
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:D = ", "ignore:attention is left out")


def seeded(*values):
    return torch.Generator().manual_seed(hash(values) % 2**31)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])
@pytest.mark.parametrize("precond", ["edm", "vp", "ve"])
def test_a_preconditioning_brings_its_loss(arch, precond):
    assert make_config("digits8", arch=arch, precond=precond).loss == precond
    assert make_config("digits8", arch=arch, precond=precond, loss="edm2").loss == "edm2"


def test_rows_keep_their_loss():
    assert make_config("digits8").loss == "edm2"
    assert make_config("digits8", precond="vp").loss == "edm2"  # EDM2's network has its own preconditioning
    assert make_config("pfgmpp-cifar10-ncsnpp").loss == "edm"
    assert make_config("digits8", arch="ddpmpp").loss == "edm"


def test_infinite_D_is_plain_data():
    config = make_config("digits8", process="pfgmpp", aug_dim=math.inf)
    stored = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert TrainingConfig(**stored).check() == config
    assert math.inf == setup.build_process(config).D
    with pytest.raises(ValueError, match="--aug-dim=-1"):
        make_config("digits8", process="pfgmpp", aug_dim=-1)
    with pytest.raises(ValueError, match="--process=pfgmpp"):
        make_config("digits8", aug_dim=128)


@pytest.mark.parametrize("D, warning, head", [(1.0, "no finite mean", False), (2.0, "no finite mean", False),
                                              (3.0, "no finite variance", True), (4.5, None, True)])  # fmt: skip
def test_small_D_warns_and_decides_on_the_uncertainty_head(D, warning, head, recwarn):
    config = make_config("digits8", process="pfgmpp", aug_dim=D)
    loss = setup.build_loss(config, None)
    messages = [str(w.message) for w in recwarn]
    assert loss.uncertainty is head
    assert any(warning in m for m in messages) if warning else not messages
    asked = make_config("digits8", process="pfgmpp", aug_dim=D, uncertainty=True)
    assert setup.build_loss(asked, None).uncertainty is True


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arch, precond, loss, D",
    [("ddpmpp", "edm", None, 128), ("ncsnpp", "edm", "edm2", 2048), ("adm", "edm", None, math.inf),
     ("ddpmpp", "vp", None, 16), ("ncsnpp", "ve", None, 128), ("adm", "vp", "edm", 3.5), ("adm", "ve", None, 1.5),
     ("edm2", None, None, 2), ("edm2", None, "ve", 128)],
)  # fmt: skip
def test_every_combination_trains(arch, precond, loss, D, digits, tmp_path):
    config = make_config(
        "digits8", data=str(digits), arch=arch, precond=precond, loss=loss, process="pfgmpp", aug_dim=D,
        augment=0.0 if arch == "edm2" else 0.12, stf=True, stf_refs=8, batch_gpu=3, **TINY,
    )  # fmt: skip
    loop = setup.train(config, tmp_path / "run")
    start = setup.build_network(config, dict(img_resolution=8, img_channels=1, label_dim=10), "cpu").state_dict()
    end = loop.objective.net.state_dict()
    assert loop.state.cur_nimg == 16
    assert all(value.isfinite().all() for value in end.values())
    assert any(not torch.equal(start[name], value) for name, value in end.items())
    stats = [json.loads(line) for line in (tmp_path / "run/stats.jsonl").read_text().splitlines()]
    assert all(math.isfinite(s["Loss/loss"]) for s in stats if "Loss/loss" in s) and "Loss/loss" in stats[-1]
    assert loop.objective.description()["process"] == {
        "class": "PFGMpp",
        "kwargs": {"D": "inf" if math.isinf(D) else D},
    }
    if arch != "edm2":
        assert end["model.map_augment.weight"].shape[1] == setup.augment_pipe(config).label_dim == 9


def test_the_snapshot_knows_D(digits, tmp_path):
    more = ["--cres=1", "--duration=1Ki", "--status=0", "--process=pfgmpp", "--aug-dim=24.5"]
    run(train_edm2.main, *small_command(digits, tmp_path / "run", *more))
    snapshot = persistence.load_snapshot(tmp_path / "run/network-snapshot-0000001-0.100.safetensors")
    assert snapshot.process.D == 24.5 and snapshot.options["aug_dim"] == 24.5
    with pytest.raises(ValueError, match="--aug-dim: 24.5 -> 25.0"):
        config = TrainingConfig(**{**snapshot.options, "aug_dim": 25.0}).check()
        setup.build(config).check(tmp_path / "run")


def test_stable_targets_with_accumulation_in_two_processes(digits, tmp_path):
    """The same losses as one process without accumulation: draws belong to blocks, not to processes."""
    options = [
        f"--data={digits}", "--preset=digits8", "--channels=8", "--channels-per-head=8", "--batch=16", "--block=4",
        "--duration=48", "--status=16", "--snapshot=0", "--checkpoint=0", "--process=pfgmpp", "--aug-dim=16", "--stf=True",
        "--stf-refs=32", "--grid=False", "--rampup=0",
    ]  # fmt: skip
    run(train_edm2.main, f"--outdir={tmp_path}/one", *options)
    python("train_edm2.py", f"--outdir={tmp_path}/two", "--batch-gpu=3", *options, processes=2)
    one, two = (
        [json.loads(line)["Loss/loss"] for line in (tmp_path / name / "stats.jsonl").read_text().splitlines()[1:]]
        for name in ("one", "two")
    )
    assert len(one) == 3
    np.testing.assert_allclose(two, one, rtol=2e-4)  # sums in another order, through three Adam steps


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [16.0, 64.0, 128.0, 2048.0, 3072000.0, math.inf])
def test_expected_loss_of_a_linear_denoiser(D):
    """lambda (c^2 sigma^2 D/(D-2) + (1-c)^2 mean y^2) per pixel, for D(x) = c x."""
    c, count = 0.7, 20000
    loss = losses.EDMLoss(kernel=processes.PFGMpp(D))
    images = 0.5 * torch.randn([1, 3, 4, 4], generator=seeded(1)).expand(count, -1, -1, -1)
    draws = loss.draw(images, None, seeded(2))
    measured = loss.evaluate(lambda x, sigma, labels: c * x, draws).double().flatten(1).mean(1)
    sigma = draws.sigma.double()
    inflation = 1.0 if math.isinf(D) else D / (D - 2)
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    expected = weight * (c**2 * sigma**2 * inflation + (1 - c) ** 2 * images[0].double().square().mean())
    ratio = measured / expected
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / count**0.5
    assert ratio.std() / count**0.5 < 0.01  # sharp enough to see D/(D-2) at D = 64 and the clip at 3 072 000


def test_infinite_D_is_edm_bit_for_bit(tiny_net):
    net, labels = tiny_net(), torch.eye(10)[:4]
    images = torch.randn([4, 1, 8, 8], generator=seeded(3))
    gauss, limit = (losses.EDM2Loss(kernel=kernel) for kernel in (None, processes.get("pfgmpp", D="inf")))
    a, b = (loss.evaluate(net, loss.draw(images, labels, seeded(4))) for loss in (gauss, limit))
    assert torch.equal(a, b)
    noise = [kernel.unit_noise([4, 1, 8, 8], seeded(5)) for kernel in (gauss.kernel, limit.kernel)]
    x, y = (samplers.heun(net, n, labels, num_steps=4) for n in noise)
    assert torch.equal(x, y)
    finite = losses.EDM2Loss(kernel=processes.PFGMpp(64))
    assert not torch.equal(a, finite.evaluate(net, finite.draw(images, labels, seeded(4))))


@pytest.mark.parametrize("D", [1, 4, 128, 3072000, math.inf])
def test_the_sampler_lands_on_data(D):
    data = torch.randn([5, 3, 4, 4], generator=seeded(6))
    noise = processes.PFGMpp(D).unit_noise([40, 3, 4, 4], seeded(7), dtype=torch.float64)
    images = samplers.heun(PosteriorMean(data, D), noise, num_steps=18, dtype=torch.float64)
    distance = torch.cdist(images.flatten(1), data.double().flatten(1))
    assert distance.min(1).values.max() < 1e-3
    assert len(distance.argmin(1).unique()) > 1  # not one of them for all


# --- stable targets ---------------------------------------------------------------------------------------------------


def plain_targets(x, y, sigma, D):
    """One by one in float64, by ratios of augmented distances; digits enough for N + D up to 1e7."""
    targets, weights = [], []
    for noisy, s in zip(x.flatten(1).double().numpy(), sigma.double().numpy(), strict=True):
        squared = np.array([((noisy - clean) ** 2).sum() for clean in y.flatten(1).double().numpy()])
        if math.isinf(D):
            w = np.exp(-(squared - squared.min()) / (2 * s**2))
        else:
            distance = np.sqrt(squared + s**2 * D)
            w = (distance.min() / distance) ** (noisy.size + D)
        weights.append(w / w.sum())
        targets.append(weights[-1] @ y.flatten(1).double().numpy())
    return np.array(targets).reshape(x.shape), np.array(weights)


@pytest.mark.parametrize("D", [1.0, 16.0, 2048.0, 3072000.0, math.inf])
def test_stable_targets_equal_a_plain_loop(D):
    y = torch.randn([50, 3, 4, 4], generator=seeded(8)) * 0.5 + 0.3
    sigma = torch.tensor([0.05, 0.5, 1.0, 3.0, 80.0])
    x = y[:5] + sigma.reshape(-1, 1, 1, 1) * torch.randn([5, 3, 4, 4], generator=seeded(9))
    targets, weights = losses.stf_targets(x, y, sigma, D)
    expected, expected_weights = plain_targets(x, y, sigma, D)
    np.testing.assert_allclose(targets, expected, atol=1e-6)
    np.testing.assert_allclose(weights, expected_weights, atol=1e-8)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)
    assert weights[0].max() > 0.999  # at little noise one reference dominates
    np.testing.assert_allclose(targets[0], y[weights[0].argmax()], atol=1e-5)


def test_targets_stay_within_the_label():
    """Per-source posteriors; an example whose label was dropped looks at all sources."""
    y, source = torch.randn([60, 1, 2, 2], generator=seeded(10)), torch.arange(60) % 3
    onehot = torch.eye(3)[source]
    stable = losses.StableTargets(lambda n, generator: (y[:n], onehot[:n]), 60, D=16.0)
    images, labels = torch.randn([4, 1, 2, 2], generator=seeded(11)), torch.eye(3)[[0, 1, 2, 0]]
    labels[3] = 0
    sigma = torch.full([4], 2.0)
    noise = 2.0 * torch.randn(images.shape, generator=seeded(12))
    draws = losses.Draws(images=images, sigma=sigma, noise=noise, labels=labels, augment_labels=None, targets=None)
    targets = stable(draws, None)
    for i in range(4):
        own = y if i == 3 else y[source == i]
        # Images of the batch with the same label are references too, first of all the example's own.
        batch = images if i == 3 else images[i : i + 1]
        expected, _ = plain_targets((images + noise)[i : i + 1], torch.cat([batch, own]), sigma[i : i + 1], 16.0)
        np.testing.assert_allclose(targets[i : i + 1], expected, atol=1e-6)


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("D", [128.0, math.inf])
def test_memory_is_linear_in_the_references(D):
    B, N = 16, 48
    for R in (64, 1024):
        x, y = torch.randn([B, N], generator=seeded(13)), torch.randn([R, N], generator=seeded(14))
        with Largest() as peak:
            losses.stf_targets(x, y, torch.ones(B), D)
        assert peak.elements <= R * max(B, N)  # never [B, R, N]


def test_draws_with_stable_targets_do_not_depend_on_the_split(digits):
    """Reference batches belong to blocks of the data order: any process count and micro-batch gives the same targets."""
    config = make_config("digits8", data=str(digits), process="pfgmpp", aug_dim=16, stf=True, stf_refs=20)
    dataset, encoder = ImageFolderDataset(str(digits), use_labels=True), StandardRGBEncoder()
    loss = setup.build_loss(config, setup._references(Feed(dataset), encoder))

    def draws(world_size, max_batch):
        parts = []
        for rank in range(world_size):
            feed = Feed(dataset, seed=5, block=4, rank=rank, world_size=world_size)
            parts += list(
                Candidates(feed, encoder, loss, position=8, count=16, batch=16, cur_nimg=8, max_batch=max_batch)
            )
        return losses.Draws.cat(parts)

    whole = draws(1, None)
    assert not torch.equal(whole.targets, whole.images)
    for other in (draws(2, 3), draws(3, 5), draws(1, 1)):
        assert torch.equal(whole.targets, other.targets) and torch.equal(whole.noise, other.noise)


@pytest.mark.parametrize("process", ["edm", "vp", "cld"])
def test_stable_targets_of_gaussian_noise_are_gaussian(digits, process):
    """A linear process has a matrix D, which is no number of augmented dimensions."""
    config = make_config("digits8", data=str(digits), process=process, stf=True)
    assert math.isinf(setup.build_loss(config, None).stable_targets.D)


def test_references_are_augmented_as_the_images_are(digits):
    config = make_config("digits8", data=str(digits), arch="ddpmpp", augment=1.0, stf=True)
    dataset, encoder = ImageFolderDataset(str(digits), use_labels=True), StandardRGBEncoder()
    plain = setup._references(Feed(dataset), encoder)
    loss = setup.build_loss(config, plain)
    clean, labels = plain(12, seeded(15))
    moved, same_labels = loss.stable_targets.references(12, seeded(15))
    assert torch.equal(labels, same_labels) and clean.shape == moved.shape
    assert (clean - moved).abs().flatten(1).amax(1).min() > 0.05  # every one of them


def test_a_label_without_references_is_an_error():
    y = torch.zeros([3, 4])
    with pytest.raises(ValueError, match="--stf-refs"):
        losses.stf_targets(y[:1], y, torch.ones(1), mask=torch.zeros([1, 3], dtype=torch.bool))
