"""The training loop: what it learns, what it writes, and that resuming changes nothing."""

import json
import re

import pytest
import safetensors.torch
import torch
from small_runs import assert_identical, final_state, small_config

from dnnlib.options import declared
from torch_utils import checkpoint
from torch_utils.persistence import load_snapshot, read_header
from training import config as training_config
from training import hooks, phema, selection, setup
from training.dataset import ArrayDataset
from training.encoders import IdentityEncoder
from training.feed import Candidates, Feed
from training.losses import EDM2Loss, Objective
from training.networks_toy import MLPDenoiser
from training.training_loop import Periods, TrainingLoop


def tensors(path):
    return safetensors.torch.load_file(path)


# --- Gaussian truth ---------------------------------------------------------------------------------------------------


def test_a_small_network_learns_the_denoiser_of_a_gaussian(tmp_path):
    """For x ~ N(mu, s^2 I) the best denoiser is (s^2 y + sigma^2 mu) / (s^2 + sigma^2), and the loss is known."""
    mu, s = torch.tensor([0.4, -0.3]).reshape(1, 2, 1, 1), 0.25
    generator = torch.Generator().manual_seed(0)
    data = ArrayDataset((mu + s * torch.randn(4096, 2, 1, 1, generator=generator)).numpy())
    mu, s = data._images.mean(axis=0, keepdims=True), float(data._images.std(axis=0).mean())  # of the sample itself
    mu = torch.as_tensor(mu)
    torch.manual_seed(0)
    net = MLPDenoiser(hidden_dim=32, num_layers=2, logvar_channels=16)
    objective = Objective(net, EDM2Loss(P_mean=-0.8, P_std=1.0))

    def excess(net):
        """Mean weighted squared distance to the closed form, over noise levels and typical noisy points."""
        g = torch.Generator().manual_seed(1)
        total = 0
        for sigma in (0.1, 0.3, 1.0, 3.0):
            y = mu + s * torch.randn(500, 2, 1, 1, generator=g) + sigma * torch.randn(500, 2, 1, 1, generator=g)
            truth = (s**2 * y + sigma**2 * mu) / (s**2 + sigma**2)
            with torch.no_grad():
                total += float(
                    ((net(y, torch.tensor(sigma)) - truth) ** 2).mean() / (s**2 * sigma**2) * (s**2 + sigma**2)
                )
        return total / 4

    before = excess(net.eval())
    loop = setup.Run(
        objective,
        Feed(data, seed=3, block=256),
        IdentityEncoder(),
        selection.IdentitySelector(),
        torch.optim.Adam(objective.param_groups(), lr=1, betas=(0.9, 0.99)),
        phema.PowerFunctionEMA(objective, [0.1]),
        lambda nimg: 3e-3,
        Periods(total_nimg=200 * 256, status_nimg=0, snapshot_nimg=0, checkpoint_nimg=0),
        batch_size=256,
    ).start(tmp_path)
    after = excess(loop.ema.get()[0][0].net)
    assert before > 0.3 and after < 0.02


# --- what a run writes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    """A run of 2048 images, never interrupted."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    setup.train(small_config(digits), run_dir)
    return run_dir


def test_files_and_periods(finished, digits):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "training_options.json",
        "stats.jsonl",
        *(f"network-snapshot-{k:07d}-0.100.safetensors" for k in (0, 1, 2)),
        *(f"training-state-{k:07d}.pt{end}" for k in (1, 2) for end in ("", ".sha256")),
    }
    lines = [json.loads(line) for line in (finished / "stats.jsonl").read_text().splitlines()]
    assert [line["Progress/kimg"] for line in lines] == [0, 1.024, 2.048]
    for key in ("Timing/sec_per_kimg", "Resources/cpu_mem_gb", "Loss/loss", "Loss/learning_rate", "timestamp"):
        assert key in lines[-1]
    assert lines[-1]["Loss/learning_rate"] == pytest.approx(sum(0.01 * 128 * i / 1e4 for i in range(8, 16)) / 8)
    header = read_header(finished / "network-snapshot-0000002-0.100.safetensors")
    assert header["nimg"] == 2048 and header["ema"] == "0.100" and header["options"]["data"] == str(digits)
    assert header["process"] == {"class": "EDM", "kwargs": {"sigma_max": 80.0}} and header["dataset"]["label_dim"] == 10
    assert json.loads((finished / "training_options.json").read_text()) == header["options"]


def test_snapshots_hold_the_average(finished):
    state = final_state(finished)
    saved = load_snapshot(finished / "network-snapshot-0000002-0.100.safetensors").net.state_dict()
    average = state["ema"]["emas"][0]
    for name, value in saved.items():
        if "freqs" not in name and "phases" not in name:
            assert torch.equal(value, average[f"net.{name}"]), name
    assert any(not torch.equal(average[name], state["objective"][name]) for name in average)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(status_nimg=1000), "--status=1000 must be a multiple of --batch=128, such as 896"),
        (dict(total_nimg=2047), "--duration=2047 must be a multiple of --batch=128, such as 1920"),
        (
            dict(batch_size=64, snapshot_nimg=64),
            "--snapshot=64 must be a multiple of --batch=64 and of 1Ki (1024), such",
        ),
        (dict(batch_size=64, checkpoint_nimg=192), "--checkpoint=192 must be a multiple of --batch=64 and of 1Ki"),
        (dict(batch_size=100), "must be a multiple of --batch=100"),
    ],
)
def test_periods_that_do_not_fit_are_refused(digits, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small_config(digits, **options)


def test_off_periods_write_nothing_but_the_end(digits, tmp_path):
    setup.train(small_config(digits, total_nimg=256, status_nimg=0, snapshot_nimg=0, checkpoint_nimg=0), tmp_path / "r")
    assert {p.name for p in (tmp_path / "r").iterdir()} == {
        "training_options.json",
        "training-state-0000000.pt",
        "training-state-0000000.pt.sha256",
    }


# --- resuming ---------------------------------------------------------------------------------------------------------

VARIANTS = {
    "plain": {},
    "accumulation": dict(batch_gpu=48, dropout=0.1, label_dropout=0.2, grad_clip=1.0),
    "pfgmpp-stf": dict(process="pfgmpp", aug_dim=64.0, stf=True, stf_refs=64, optimizer="adamax"),
    "selection": dict(select="hard", filter_ratio=0.5, ema="halflife", optimizer="adamw", weight_decay=0.01),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_changes_no_bit(variant, digits, tmp_path):
    options = dict(VARIANTS[variant], total_nimg=1024, checkpoint_nimg=0)
    whole, part = tmp_path / "whole", tmp_path / "part"
    setup.train(small_config(digits, **options), whole)
    first = setup.train(small_config(digits, slice_nimg=512, snapshot_nimg=0, **options), part)
    assert first.state.cur_nimg == 512 and not (part / "training-state-0000001.pt").exists()
    second = setup.train(small_config(digits, **options), part)
    assert second.state.cur_nimg == 1024
    assert_identical(final_state(whole, 1), final_state(part, 1))
    (snapshot,) = whole.glob("network-snapshot-0000001-*.safetensors")
    assert_identical(tensors(snapshot), tensors(part / snapshot.name))


def test_runs_differ_where_the_seed_does(finished, digits, tmp_path):
    setup.train(small_config(digits, seed=1, total_nimg=1024, snapshot_nimg=0), tmp_path / "other")
    with pytest.raises(AssertionError):
        assert_identical(final_state(finished, 1), final_state(tmp_path / "other", 1))


def test_a_finished_run_has_nothing_to_do(finished, digits, capsys):
    before = {path: path.read_bytes() for path in finished.iterdir()}
    setup.train(small_config(digits), finished)
    assert "Nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in finished.iterdir()} == before


def test_changed_options_refuse_to_resume(finished, digits):
    changed = small_config(digits, lr=0.5, batch_size=64, rampup=0.02, channels=16, P_mean=0.1)
    with pytest.raises(ValueError, match="another --outdir") as error:
        setup.train(changed, finished)
    for line in (
        "--lr: 0.01 -> 0.5",
        "--batch: 128 -> 64",
        "--channels: 8 -> 16",
        f"--P_mean: {small_config(digits).P_mean} -> 0.1",
    ):
        assert line in str(error.value)
    assert "\n" not in str(error.value) and "--seed" not in str(error.value)


def test_free_options_may_change(finished, digits, tmp_path):
    """Lengths, periods and how the work is split are nobody's business but the user's."""
    free = small_config(
        digits, total_nimg=4096, status_nimg=512, snapshot_nimg=2048, batch_gpu=16, workers=1, bench=False
    )
    assert training_config.differences(small_config(digits).to_dict(), free.to_dict()) == []
    assert set(small_config(digits).to_dict()) >= {
        name for name, own in declared(training_config.TrainingConfig).items() if own.free
    }


def test_resume_from_a_named_file(finished, digits, tmp_path):
    other = tmp_path / "continued"
    loop = setup.train(small_config(digits), other, resume=finished / "training-state-0000001.pt")
    assert loop.state.cur_nimg == 2048
    assert_identical(final_state(finished), final_state(other))
    with pytest.raises(ValueError, match="no such checkpoint"):
        setup.train(small_config(digits), tmp_path / "x", resume=tmp_path / "training-state-0000009.pt")


def test_checkpoints_of_another_network_do_not_fit(finished, digits, tmp_path):
    with pytest.raises(ValueError, match="training-state-0000001.pt: does not fit"):
        setup.train(small_config(digits, channels=16), tmp_path / "x", resume=finished / "training-state-0000001.pt")


def test_init_starts_from_the_weights_alone(finished, digits, tmp_path):
    snapshot = finished / "network-snapshot-0000002-0.100.safetensors"
    loop = setup.train(small_config(digits, init=str(snapshot), total_nimg=1024, seed=5), tmp_path / "new")
    start = tensors(tmp_path / "new" / "network-snapshot-0000000-0.100.safetensors")
    assert_identical(start, tensors(snapshot))
    assert loop.state.cur_nimg == 1024
    with pytest.raises(ValueError, match="--init=.* does not fit the network"):
        setup.train(small_config(digits, init=str(snapshot), channels=16), tmp_path / "wide")


def test_dropout_and_accumulation_change_no_draw(digits):
    """The draws of a position are the same whatever the micro-batch."""
    data = setup.open_dataset(small_config(digits))
    encoder = setup.choose_encoder(data)
    seen = []
    for max_batch in (128, 48, 7):
        loss = EDM2Loss(label_dropout=0.3)
        parts = list(Candidates(Feed(data, block=32), encoder, loss, 256, 128, 128, 256, max_batch))
        assert all(len(p) <= max_batch for p in parts) and sum(map(len, parts)) == 128
        seen.append({k: torch.cat([p[k] for p in parts]) for k in ("images", "sigma", "noise", "labels")})
    assert_identical(seen[0], seen[1])
    assert_identical(seen[0], seen[2])


def test_loader_and_memory_give_the_same_images(digits):
    data = setup.open_dataset(small_config(digits))
    feeds = [Feed(data, block=32, cache=True), Feed(data, block=32, cache=False, workers=1)]
    for position in (0, 64, 128):
        blocks = [list(feed.blocks(position, 64)) for feed in feeds]
        for a, b in zip(*blocks, strict=True):
            assert a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch):
    """Validation losses by thousands of images, in place of real ones."""
    losses = {0: 6.0, 1: 5.0, 2: 3.0, 3: 4.0, 4: 3.5, 5: 2.0, 6: 1.0}

    class Scripted:
        def __init__(self, dataset):
            assert len(dataset) == 48
            self.looks = iter(())

        def denoising_loss(self, net, *more):
            return {"loss": losses[self.kimg], "levels": {}}

    monkeypatch.setattr(hooks, "HeldOut", Scripted)
    original = hooks.Validation.on_status

    def on_status(self, loop):
        self.held_out.kimg = loop.state.cur_nimg // 1024
        return original(self, loop)

    monkeypatch.setattr(hooks.Validation, "on_status", on_status)


def validated(digits, outdir, **options):
    """A run with --val-data as train_edm2.py makes it."""
    config = small_config(digits, total_nimg=6144, val_data=str(digits), **options)
    run = setup.build(config)
    return run.start(outdir, hooks.standard_hooks(run))


def test_the_best_snapshot_is_kept_and_patience_ends_training(digits, tmp_path, scripted, capsys):
    whole = validated(digits, tmp_path / "whole", patience=2)
    assert whole.state.cur_nimg == 4096 and not whole.interrupted  # 3 looks at most after the one at 2048
    assert "has not fallen for 2 looks (lowest: 3.0000)" in capsys.readouterr().out
    best = read_header(tmp_path / "whole" / "network-snapshot-best.safetensors")
    assert best["nimg"] == 2048 and best["validation_loss"] == 3.0
    at_2048 = next((tmp_path / "whole").glob("network-snapshot-0000002-*.safetensors"))
    assert_identical(tensors(tmp_path / "whole/network-snapshot-best.safetensors"), tensors(at_2048))
    for _ in range(6):  # stopped and resumed again and again; slices end between looks, too
        part = validated(digits, tmp_path / "part", patience=2, slice_nimg=1024, status_nimg=1024)
    assert part.state.cur_nimg == 4096 and "Nothing to do: the validation loss" in capsys.readouterr().out
    assert_identical(final_state(tmp_path / "whole", 4), final_state(tmp_path / "part", 4))
    a, b = (tmp_path / name / "network-snapshot-best.safetensors" for name in ("whole", "part"))
    assert_identical(tensors(a), tensors(b))
    more = validated(digits, tmp_path / "part", patience=3)  # free: who waits longer goes on from there
    assert more.state.cur_nimg == 6144
    assert read_header(tmp_path / "part" / "network-snapshot-best.safetensors")["nimg"] == 6144


def test_without_patience_only_the_best_is_kept(digits, tmp_path, scripted):
    assert validated(digits, tmp_path).state.cur_nimg == 6144
    assert read_header(tmp_path / "network-snapshot-best.safetensors")["nimg"] == 6144


def test_looks_are_at_multiples_of_the_interval(digits, tmp_path, scripted):
    """The status line at the end of a slice is none: an unbroken run has none there."""
    validated(digits, tmp_path, status_nimg=2048, slice_nimg=1024)
    assert read_header(tmp_path / "network-snapshot-best.safetensors")["nimg"] == 0


def test_patience_needs_looks(digits):
    with pytest.raises(ValueError, match="--patience=2 needs the status lines of --val-data"):
        small_config(digits, patience=2)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save_three(folder):
    for kimg in (1, 2, 3):
        checkpoint.save(
            folder / f"training-state-{kimg:07d}.pt", {"state": {"cur_nimg": kimg}, "w": torch.ones(99) * kimg}
        )
    return [folder / f"training-state-{kimg:07d}.pt" for kimg in (1, 2, 3)]


def test_any_flipped_byte_is_found(tmp_path, capsys):
    first, second, third = save_three(tmp_path)
    assert checkpoint.newest_sound(tmp_path) == third
    data = bytearray(third.read_bytes())
    for place in (0, len(data) // 2, len(data) - 1):
        data[place] ^= 1
        third.write_bytes(data)
        data[place] ^= 1
        assert checkpoint.newest_sound(tmp_path) == second
        assert "training-state-0000003.pt is damaged" in capsys.readouterr().err
        with pytest.raises(ValueError, match="training-state-0000003.pt"):
            checkpoint.load(third)
    third.write_bytes(data)
    assert checkpoint.newest_sound(tmp_path) == third
    (tmp_path / "training-state-0000003.pt.sha256").unlink()
    assert checkpoint.newest_sound(tmp_path) == second


def test_keep(tmp_path):
    paths = save_three(tmp_path)
    checkpoint.remove_old(tmp_path, 0)
    assert checkpoint.list_checkpoints(tmp_path) == paths
    checkpoint.remove_old(tmp_path, 2)
    assert checkpoint.list_checkpoints(tmp_path) == paths[1:]
    assert {p.name for p in tmp_path.iterdir()} == {p.name + end for p in paths[1:] for end in ("", ".sha256")}
    paths[2].write_bytes(b"damaged")
    with pytest.raises(OSError, match="older checkpoints were kept"):
        checkpoint.remove_old(tmp_path, 1)
    assert checkpoint.list_checkpoints(tmp_path) == paths[1:]


def test_state_holds_plain_types_only(finished):
    def walk(value):
        if isinstance(value, dict):
            return all(isinstance(k, (str, int)) and walk(v) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return all(map(walk, value))
        return value is None or isinstance(value, (int, float, str, bool)) or type(value) is torch.Tensor

    assert walk(dict(torch.load(finished / "training-state-0000002.pt", weights_only=True)))


# --- gradients --------------------------------------------------------------------------------------------------------


class Points(torch.nn.Module):
    """D(x) = w x for the loop's own arithmetic."""

    label_dim, sigma_data = 0, 0.5

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.5))
        self.idle = torch.nn.Parameter(torch.tensor(1.0))  # never used by the loss

    def forward(self, x, sigma, class_labels=None, return_logvar=False):
        return (self.w * x, torch.zeros(len(x), 1, 1, 1)) if return_logvar else self.w * x


def points_loop(tmp_path, loss=None, **options):
    data = ArrayDataset(torch.randn(64, 2, 1, 1, generator=torch.Generator().manual_seed(0)).numpy())
    objective = Objective(Points(), loss or EDM2Loss())
    given = dict(
        batch_size=32, periods=Periods(total_nimg=32 * 1024, status_nimg=32 * 64, snapshot_nimg=0, checkpoint_nimg=0)
    )
    optimizer = torch.optim.SGD(objective.param_groups(), lr=1)
    parts = (objective, Feed(data, block=8), IdentityEncoder(), selection.IdentitySelector(), optimizer, None)
    return TrainingLoop(setup.Run(*parts, lambda nimg: 0.01, **{**given, **options}), tmp_path)


def test_gradient_is_a_sum_over_values_and_a_mean_over_the_batch(tmp_path):
    loop = points_loop(tmp_path, batch_gpu=5, loss_scaling=3.0)
    candidates = Candidates(loop.feed, loop.encoder, loop.objective.loss, 0, 32, 32, 0)
    (draws,) = list(candidates)
    y, n, sigma = (draws[k].double().numpy() for k in ("images", "noise", "sigma"))
    weight = ((sigma**2 + 0.25) / (sigma * 0.5) ** 2).reshape(-1, 1, 1, 1)
    expected = 3.0 * (weight * 2 * (0.5 * (y + n) - y) * (y + n)).sum() / 32
    loop.step()
    assert float(loop.objective.net.w.grad) == pytest.approx(expected, rel=1e-4)
    assert float(loop.objective.net.w.detach()) == pytest.approx(0.5 - 0.01 * expected, rel=1e-4)
    assert float(loop.objective.net.idle.detach()) == 1  # a parameter the loss leaves unused is no error


def test_clipping_bounds_the_global_norm(tmp_path):
    loop = points_loop(tmp_path, grad_clip=0.125)
    loop.step()
    assert float(loop.objective.net.w.detach()) == pytest.approx(0.5 - 0.01 * 0.125, abs=1e-6) or float(
        loop.objective.net.w.detach()
    ) == pytest.approx(0.5 + 0.01 * 0.125, abs=1e-6)
