"""What is not finite: losses and gradients are counted, kept from the weights, and fatal when they persist; images, features,
validation losses and scores are refused where they enter, so that nothing is measured of a network that has diverged.
"""

import functools
import json
import math

import numpy as np
import pytest
import torch
from small_runs import one_line, run, small_command

import calculate_metrics
import generate_images
import train_edm2
from torch_utils.persistence import save_snapshot
from training import selection, training_loop
from training.dataset import ArrayDataset
from training.dataset.convert import convert
from training.dataset.format import ImageSource
from training.encoders import IdentityEncoder, StandardRGBEncoder
from training.feed import Feed
from training.losses import Draws, Objective
from training.networks_edm2 import Precond
from training.setup import Run
from training.training_loop import Periods, TrainingFailed, TrainingLoop

BATCH = 8


class Scale(torch.nn.Module):
    label_dim = 0

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))


class Sometimes(torch.nn.Module):
    """Only the contract's two methods: w0 + w1 per example, but for positions in `bad`, whose loss multiplies w0 by `value`."""

    def __init__(self, bad, value=math.nan):
        super().__init__()
        self.bad, self.value, self.position = bad, value, 0

    def draw(self, images, labels=None, generator=None):
        where = torch.arange(self.position, self.position + len(images))
        self.position += len(images)
        return Draws(factor=torch.tensor([self.value if int(i) in self.bad else 1.0 for i in where]))

    def evaluate(self, net, draws):
        return net.w[0] * draws.factor + net.w[1]


def make(tmp_path, bad, value=math.nan, steps=4, status=1, **options):
    data = ArrayDataset(torch.zeros(16, 1, 1, 1).numpy())
    objective = Objective(Scale(), Sometimes(bad, value))
    optimizer = torch.optim.Adam(objective.param_groups(), lr=1)
    feed, periods = Feed(data, block=BATCH), Periods(steps * BATCH, 0, status * BATCH, 0, 0)
    selector = selection.IdentitySelector()
    run = Run(
        objective, feed, IdentityEncoder(), selector, optimizer, None, lambda nimg: 0.01, periods, BATCH, **options
    )
    return TrainingLoop(run, tmp_path)


def statistics(tmp_path):
    return [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_shares_are_logged_and_weights_stay_finite(tmp_path, value, capsys):
    loop = make(tmp_path, {9, 10}, value, steps=4)  # two of eight examples of the second step
    loop.run()
    lines = statistics(tmp_path)
    assert [line["Progress/nonfinite_loss_share"] for line in lines] == [0, 0, 0.25, 0, 0]
    assert [line.get("Progress/nonfinite_steps") for line in lines[1:]] == [0, 1, 0, 0]
    assert lines[2]["Loss/loss"] == pytest.approx(2 - 2 * 0.01, abs=1e-4)  # the mean of the finite ones
    assert "100.0% of the steps had non-finite gradients" in capsys.readouterr().out
    w = loop.objective.net.w.detach()
    assert bool(w.isfinite().all())
    assert float(w[1]) == pytest.approx(1 - 4 * 0.01, abs=1e-4)  # what was finite trains on, step by step
    assert all(bool(v.isfinite().all()) for s in loop.optimizer.state.values() for v in s.values())


def test_occasional_failures_do_not_stop_training(tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "MAX_BAD_STEPS", 5)
    loop = make(tmp_path, {i for i in range(BATCH * 30) if i // BATCH % 2}, steps=30, status=30)  # every other step
    loop.run()
    assert loop.state.cur_nimg == 30 * BATCH
    assert statistics(tmp_path)[-1]["Progress/nonfinite_steps"] == 0.5


def test_persistent_failures_stop_training_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "MAX_BAD_STEPS", 5)
    loop = make(tmp_path, set(range(12 * BATCH, 1000)), steps=100, status=100)
    with pytest.raises(TrainingFailed, match=r"non-finite gradients.*--lr or --ls.*--fp16=False") as error:
        loop.run()
    assert 12 + 5 <= loop.state.cur_nimg // BATCH <= 12 + 2 * 5
    assert "\n" not in str(error.value) and bool(loop.objective.net.w.isfinite().all())


def test_the_program_ends_with_one_line(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "MAX_BAD_STEPS", 2)
    of_precond(monkeypatch, lambda net, out: out * math.nan)
    result = run(train_edm2.main, *small_command(digits, tmp_path / "run", "--snapshot=0"), code=1)
    (line,) = [line for line in result.stderr.splitlines() if "Error" in line]
    assert line.startswith("Error: the last ") and "non-finite gradients" in line and "Traceback" not in result.output


def test_clipping_survives_them(tmp_path):
    loop = make(tmp_path, {0, 9}, steps=3, grad_clip=0.5)
    loop.run()
    assert bool(loop.objective.net.w.isfinite().all())


def test_selection_names_the_cause(tmp_path):
    """A selector that scores candidates says that a loss is not a number instead of training on anything."""
    loop = make(tmp_path, {3}, steps=2)
    loop.selector = selection.LossSelector(selection.FUNCTIONS["hard"], filter_ratio=0.5)
    with pytest.raises(ValueError, match="learner_loss of 1 of 16 candidates is not finite"):
        loop.run()


def test_infinite_losses_select_nothing_by_any_function(tmp_path):
    loop = make(tmp_path, {3}, math.inf, steps=2)
    mine = lambda learner_loss, *, size, generator: learner_loss.topk(size).indices
    loop.selector = selection.LossSelector(mine, filter_ratio=0.5)
    with pytest.raises(ValueError, match="learner_loss of 1 of 16 candidates is not finite"):
        loop.run()


@pytest.fixture
def diverged(tmp_path, tiny_net):
    """A snapshot whose weights are finite, but not what it makes of images."""
    net = tiny_net(10)
    with torch.no_grad():
        net.unet.out_gain.fill_(3e38)
    path = tmp_path / "network-snapshot-0000001-0.100.safetensors"
    save_snapshot(path, net, encoder=StandardRGBEncoder())
    return path


def test_a_network_that_diverged_never_scores(digits, diverged, tmp_path):
    """Its pixels would be black or white, and in some detectors nearer to the data than those of a trained network."""
    net, device = f"--net={diverged}", "--device=cpu"
    says = "the images of 4 of 4 seeds, the first 7, hold NaN or infinity"
    one_line(generate_images.main, net, device, "--seeds=7-10", "--steps=2", f"--outdir={tmp_path}/out", says=says)
    assert not list(tmp_path.glob("out/**/*.png"))
    measure = functools.partial(one_line, calculate_metrics.cmdline)
    files = (net, f"--data={digits}", device, f"--dest={tmp_path}/score.json")
    measure("gen", *files, "--num=4", "--seed=7", "--steps=2", says=says)
    measure("loss", *files, says=["48 of 48 held-out images is not finite", "sigma 0.05"])
    measure("likelihood", *files, "--samples=1", says="the likelihood of 48 of 48 images is not finite")
    assert not (tmp_path / "score.json").exists()


def of_precond(monkeypatch, change):
    """Networks whose output is `change(network, denoised)`."""
    original = Precond.forward

    def forward(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        return (change(self, out[0]), out[1]) if isinstance(out, tuple) else change(self, out)

    monkeypatch.setattr(Precond, "forward", forward)


def test_validation_that_is_not_finite_ends_training(digits, tmp_path, monkeypatch):
    of_precond(monkeypatch, lambda net, out: out if net.training else out / 0)
    command = small_command(digits, tmp_path / "run", f"--val-data={digits}", "--snapshot=0")
    result = run(train_edm2.main, *command, code=1)
    (line,) = [line for line in result.stderr.splitlines() if "Error" in line]
    assert line.startswith("Error: validation at 0 kimg: the denoising loss of 48 of 48 held-out images is not finite")
    assert not (tmp_path / "run" / "stats.jsonl").exists()


def test_a_run_that_never_learned_is_not_done(digits, tmp_path, monkeypatch):
    of_precond(monkeypatch, lambda net, out: out * math.nan)
    result = run(train_edm2.main, *small_command(digits, tmp_path / "run", "--snapshot=0"), code=1)
    assert "Error: all 16 steps had non-finite gradients: nothing was learned" in result.stderr
    assert "Done." not in result.output


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_and_latents_that_are_not_finite_are_named(tmp_path, value):
    images = np.zeros([3, 1, 2, 2])
    images[1, 0, 0, 1] = value
    with pytest.raises(ValueError, match="1 of 3 images hold NaN or infinity"):
        ArrayDataset(images)
    source = ImageSource(
        "latents", 3, images.astype(np.float32).__getitem__, latents=True, decode=lambda item, *_: item
    )
    with pytest.raises(ValueError, match="1: its latents hold NaN or infinity"):
        convert(source, tmp_path / "out.zip")
    assert not list(tmp_path.iterdir())
