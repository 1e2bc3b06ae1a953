"""Models side by side against the same models one after another: same weights, same stopping, same files."""

import itertools
import json
import signal

import pytest
import torch
from conftest import convert_digits
from small_runs import assert_identical, final_state, one_line, run, small_command, small_config

import train_edm2
from dnnlib import experiment
from torch_utils.persistence import load_snapshot
from training import setup, side_by_side
from training.hooks import Validation, standard_hooks
from training.validation import HeldOut

SOURCES = (0, 1, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Per source: a training zip and a validation zip."""
    folder = tmp_path_factory.mktemp("each")
    for k in SOURCES:
        convert_digits(folder / f"{k}.zip", k, val=folder / f"val-{k}.zip", **{"val-per-source": 8})
    return folder


def configs(data, **options):
    """Three models with data, seed and learning rate of their own."""
    options = dict(batch_size=64, total_nimg=1024, status_nimg=256, rampup=0.0005, decay=8, **options)
    own = lambda k: dict(data=data / f"{k}.zip", val_data=str(data / f"val-{k}.zip"), seed=k, lr=0.005 * (k + 1))
    return [small_config(**own(k), **options) for k in SOURCES]


def losses(folder):
    lines = (folder / "stats.jsonl").read_text().splitlines()
    return [(s["Progress/kimg"], s.get("Loss/loss", -1), s["Loss/validation"]) for s in map(json.loads, lines)]


def closest(a, b):
    """Largest difference between the tensors of two nested containers, relative to what is above one."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((closest(a[key], b[key]) for key in a), default=0)
    if isinstance(a, (list, tuple)):
        return max((closest(x, y) for x, y in zip(a, b, strict=True)), default=0)
    return float((a - b).abs().max() / (1 + a.abs().max())) if torch.is_tensor(a) and a.numel() else 0


def test_equal_to_one_after_another(data, tmp_path):
    side_by_side.train(configs(data), [tmp_path / f"both-{k}" for k in SOURCES])
    for k, config in zip(SOURCES, configs(data), strict=True):
        run_ = setup.build(config)
        run_.start(tmp_path / f"one-{k}", standard_hooks(run_))
        one, both = (final_state(tmp_path / f"{name}-{k}", 1) for name in ("one", "both"))
        start = dict(setup.build(config).objective.named_parameters())
        moved = max(float((start[n] - v).detach().abs().max()) for n, v in one["objective"].items() if n in start)
        assert moved > 0.01, "nothing was learned"
        for part in ("objective", "ema"):
            assert closest(one[part], both[part]) < 1e-5
        assert closest(one["optimizer"]["state"], both["optimizer"]["state"]) < 1e-5
        assert one["state"] == both["state"] and one["optimizer"]["state"].keys() == both["optimizer"]["state"].keys()
        for a, b in zip(losses(tmp_path / f"one-{k}"), losses(tmp_path / f"both-{k}"), strict=True):
            assert a == pytest.approx(b, rel=1e-5)
        best = [load_snapshot(tmp_path / f"{name}-{k}" / Validation.BEST) for name in ("one", "both")]
        assert best[0].header["nimg"] == best[1].header["nimg"] and best[1].sources == [k]
        with torch.no_grad():
            x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            denoised = [s.net(x, torch.tensor(0.5), torch.eye(10)[[k] * 4]) for s in best]
        assert torch.allclose(*denoised, atol=1e-5)


def test_each_stops_and_resumes_by_itself(data, tmp_path, monkeypatch):
    """One ends early by its own validation loss; what a signal interrupted goes on as if nothing had been."""
    whole = side_by_side.train(configs(data), [tmp_path / f"whole-{k}" for k in SOURCES])
    assert [loop.state.cur_nimg for loop in whole] == [1024] * 3
    honest, seen = HeldOut.denoising_loss, []

    def killed(self, *arguments):
        seen.append(0)
        if len(seen) == 8:  # the third look, in the middle of the models
            signal.raise_signal(signal.SIGTERM)
        return honest(self, *arguments)

    monkeypatch.setattr(HeldOut, "denoising_loss", killed)
    for expected in (576, 1024):
        runs = side_by_side.train(configs(data), [tmp_path / f"killed-{k}" for k in SOURCES])
        assert [(loop.state.cur_nimg, loop.interrupted) for loop in runs] == [(expected, expected < 1024)] * 3
    for k in SOURCES:
        assert_identical(*(final_state(tmp_path / f"{name}-{k}", 1) for name in ("whole", "killed")))
        best = [load_snapshot(tmp_path / f"{n}-{k}" / Validation.BEST).header["nimg"] for n in ("whole", "killed")]
        assert best[0] == best[1]

    def hopeless(self, *arguments):  # model 0 sees no progress after its second look
        found = honest(self, *arguments)
        if self.labels[0] == 0:
            seen.append(0)
            found["loss"] = 2.0 if len(seen) == 2 else 3.0
        return found

    seen.clear()
    monkeypatch.setattr(HeldOut, "denoising_loss", hopeless)
    stopped = side_by_side.train(configs(data, patience=2), [tmp_path / f"stop-{k}" for k in SOURCES])
    assert [loop.state.cur_nimg for loop in stopped] == [768, 1024, 1024]
    assert "has not fallen for 2 looks" in (tmp_path / "stop-0" / "log.txt").read_text()
    for k in (1, 2):  # the others do not notice
        states = (final_state(tmp_path / f"{n}-{k}", 1) for n in ("whole", "stop"))
        assert closest(*(s["objective"] for s in states)) < 1e-5


def test_command_line(data, tmp_path):
    command = small_command(
        data / "%s.zip", tmp_path / "%s", "--each=0,1", "--seed=%s", "--batch=128", "--rampup=0.001"
    )
    run(train_edm2.main, *command)
    for k in (0, 1):
        options = json.loads((tmp_path / str(k) / "training_options.json").read_text())
        assert options["seed"] == k and options["data"].endswith(f"{k}.zip")
        assert load_snapshot(tmp_path / str(k) / "network-snapshot-0000002-0.100.safetensors").sources == [k]
    step = experiment.Step("a", ["train_edm2.py", "--each=0,1", "--outdir=runs/%s", "--data=d/%s.zip"], 0)
    assert step.writes == {"runs/0", "runs/1"} and {"d/0.zip", "d/1.zip"} <= step.reads
    pairs = experiment.Step("b", ["train_edm2.py", "--each=0,%2/7,8", "--outdir=runs/%1-%2", "--data=d/%1.zip"], 0)
    assert pairs.writes == {
        "runs/0-7",
        "runs/0-8",
        "runs/%2-7",
        "runs/%2-8",
    }  # no entry is taken for a place of another


def test_all_combinations_of_two_lists(data, tmp_path):
    command = small_command(
        data / "%1.zip", tmp_path / "%1-%2", "--each=0,1/3,4", "--seed=%2", "--batch=128", "--rampup=0.001"
    )
    run(train_edm2.main, *command)
    for k, seed in itertools.product((0, 1), (3, 4)):
        options = json.loads((tmp_path / f"{k}-{seed}" / "training_options.json").read_text())
        assert options["seed"] == seed and options["data"].endswith(f"{k}.zip")


@pytest.mark.parametrize(
    "more, says",
    [
        (["--outdir={tmp}/x"], "every entry of --each needs a place of its own: put %s (or %1, %2, ...) into it"),
        (["--dropout=0.1"], "--dropout=0.1: not for models side by side"),
        (["--select=random"], "--select=random: not for models side by side"),
        (["--batch=%s"], "--batch=128: models side by side share it"),
        (["--resume=x.pt"], "--resume is not for models side by side"),
    ],
)
def test_mistakes(data, tmp_path, more, says):
    each = "--each=64,128" if "%s" in more[0] else "--each=0,1"
    command = small_command(data / "0.zip", tmp_path / "%s", each, *(m.format(tmp=tmp_path) for m in more))
    one_line(train_edm2.main, *command, says=says)
    assert not list(tmp_path.iterdir())


def test_each_needs_different_entries(data, tmp_path):
    one_line(
        train_edm2.main,
        *small_command(data / "0.zip", tmp_path / "%s", "--each=0,0"),
        says="--each=0,0: give different",
    )
