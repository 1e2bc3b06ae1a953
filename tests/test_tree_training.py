"""Training on the tree through the real loop, its metrics, and the command lines, against exact truths."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from small_runs import one_line, run

from metrics import curves
from simulations import plot_run, run_tree, run_tree_sweep, tree
from simulations.tree import metrics as tree_metrics
from simulations.tree import plots as tree_plots
from simulations.tree import sweep as tree_sweep
from simulations.tree import training as tree_training
from simulations.tree.metrics import Points
from simulations.tree.training import TreeConfig, TreeFeed, TreeLoss, load_toy, train
from training.networks_toy import ToyModel

SMALL = TreeConfig(dim=16, layers=2, total_iter=8, batch_size=256, chunks=4, snapshot_iter=4)


def stats(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "stats.jsonl").read_text().splitlines()]


def test_feed_is_a_function_of_seed_and_position():
    mixture = tree.ground_truth("A")
    whole = list(TreeFeed(mixture, seed=3, block=16).blocks(32, 64))
    assert [first for first, *_ in whole] == [32, 48, 64, 80] and whole[0][1].shape == (16, 2, 1, 1)
    halves = [list(TreeFeed(mixture, 3, 16, rank=r, world_size=2).blocks(32, 64)) for r in range(2)]
    for (a, points, _), (b, again, _) in zip(whole, halves[0] + halves[1], strict=True):
        assert a == b and torch.equal(points, again)
    other = next(iter(TreeFeed(mixture, 4, 16).blocks(32, 64)))[1]
    assert not torch.equal(other, whole[0][1])


def test_loss_is_the_published_score_matching_loss():
    mixture = tree.ground_truth("A")
    torch.manual_seed(0)
    net = ToyModel(hidden_dim=16).eval()
    net.gain.data.fill_(0.5)
    loss = TreeLoss(mixture)
    (_, points, _), *_ = TreeFeed(mixture, block=512).blocks(0, 512)
    draws = loss.draw(points, generator=torch.Generator().manual_seed(0))
    x, sigma = (draws.images + draws.noise).flatten(1), draws.sigma
    exact = tree.ground_truth("A", dtype=torch.float64).score(x.double(), sigma.double())
    expected = sigma.double() ** 2 * (exact - net.point_score(x, sigma).double()).square().mean(dim=1)
    torch.testing.assert_close(loss.evaluate(net, draws).double(), expected, rtol=1e-2, atol=1e-5)
    logs = sigma.log().numpy()  # ln sigma ~ N(-2.3, 1.5^2)
    assert abs(logs.mean() + 2.3) < 4 * 1.5 / math.sqrt(512) and abs(logs.std() / 1.5 - 1) < 4 / math.sqrt(2 * 512)
    assert float(loss.evaluate(mixture.denoiser(), draws).max()) < 1e-6  # nothing is left to learn


def test_training_learns(tmp_path):
    config = replace(SMALL, dim=64, layers=4, total_iter=150, snapshot_iter=150, batch_size=512)
    train(config, tmp_path, tree_metrics.validation_hook(Points(num=512), flow=False))
    lines = stats(tmp_path)
    assert lines[-1]["Validation/ema_loss"] < 0.5 * lines[0]["Validation/ema_loss"]


def test_training_selects_and_counts(tmp_path):
    memory = {}
    config = replace(SMALL, total_iter=30)
    train(config, tmp_path / "baseline", tree_metrics.validation_hook(Points(num=128), flow=False), memory)
    lines = stats(tmp_path / "baseline")
    assert lines[-1]["Progress/kimg"] == 30 * 0.256 and lines[-1]["Progress/iteration"] == 30
    reference = str(tmp_path / "baseline")
    assert set(load_toy(reference).state_dict()) == {"gain", "layers.0.weight", "layers.2.weight", "layers.4.weight"}
    for select, guide in (("random", None), ("jest", None), ("jest", reference), ("diverse", reference)):
        out = tmp_path / f"{select}-{guide is None}"
        train(replace(SMALL, select=select, guide=guide), out, memory=memory)
        last = stats(out)[-1]
        # 4 chunks of floor(256 / 5 / 4) = 12 of 256 candidates.
        assert last["Progress/kimg"] == pytest.approx(8 * 0.048) and last["Selection/candidates_kimg"] == 8 * 0.256
        assert ("Selection/reference_loss" in last) == (select != "random")
    assert len(memory) == 30  # every arm saw the same blocks of 256 points


def test_draws_in_memory_change_nothing(tmp_path):
    plain = train(SMALL, tmp_path / "a")
    memory = {}
    tree_training.prepare(SMALL, memory)
    again = train(SMALL, tmp_path / "b", memory=memory)
    assert len(memory) == SMALL.total_iter
    for p, q in zip(plain.objective.parameters(), again.objective.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("when, sizes", [("early", (48, 256)), ("late", (256, 48))])
def test_batches_of_early_and_late_runs(tmp_path, when, sizes):
    """The reference has learned nothing, so the learner beats it soon; the switch waits for a common multiple of both sizes."""
    torch.manual_seed(0)
    config = replace(SMALL, total_iter=40)
    weak = train(replace(config, total_iter=1), tmp_path / "weak")
    assert weak.state.cur_nimg == 256
    loop = train(replace(config, select="jest", when=when, guide=str(tmp_path / "weak")), tmp_path / "run")
    lines = stats(tmp_path / "run")
    assert lines[-1]["Progress/iteration"] == 40
    first = next(line for line in lines if line["Progress/iteration"])
    assert first["Progress/kimg"] * 1e3 / first["Progress/iteration"] == sizes[0]
    steps = (loop.state.cur_nimg - sizes[1] * 40) / (sizes[0] - sizes[1])  # of the first batch size
    assert 0 < steps < 40 and steps == int(steps) and steps * sizes[0] % math.lcm(*sizes) == 0
    if when == "early":  # all 256 points of every step were read, before and after
        assert loop.state.position == 40 * 256


def test_metrics_of_the_truth_itself():
    """The exact mixture scores 0 in loss and distance; on the outer branches .187 and .479 are its floors (AJEST)."""
    exact = tree.ground_truth("A").denoiser()
    found = tree_metrics.evaluate(exact, Points(num=1024), external=True)
    assert found["loss"] < 1e-6 and found["L2_metric"] == 0
    assert found["out_loss"] == pytest.approx(0.187, abs=0.03) and found["out_L2_metric"] == pytest.approx(
        0.479, abs=0.06
    )
    assert found["mandala_score"] > 0.97 and found["classification_score"] > 0.98
    same = tree_metrics.evaluate(exact, Points(num=64), exact, guidance=3.0)
    assert same["guided_L2_metric"] == pytest.approx(same["L2_metric"], abs=1e-4)  # guided by itself


def test_metrics_of_an_untrained_network():
    """gain 0: the score is that of N(0, s^2 + sigma^2), a closed form in float64."""
    net = ToyModel(hidden_dim=8).eval()
    mixture = tree.ground_truth("A", dtype=torch.float64)
    _, draws = tree_metrics._draws(Points(num=256), 0.3)
    x = (draws.images + draws.noise).flatten(1).double()
    assert bool((draws.sigma == 0.3).all())
    expected = 0.09 * (mixture.score(x, 0.3) + x / 0.34).square().mean()
    assert tree_metrics.average_loss(net, Points(num=256), level=0.3) == pytest.approx(float(expected), rel=1e-4)
    start = torch.tensor([[1.0, -2.0], [0.5, 0.1]])
    path = tree_metrics.trajectories(net, start, sigma_max=1.0, num_steps=64)
    assert path.shape == (65, 2, 2)
    torch.testing.assert_close(path[0], start)
    # The flow to N(0, .25 I) shrinks by sd / sqrt(sd^2 + sigma_max^2).
    torch.testing.assert_close(path[-1], start * 0.5 / math.sqrt(1.25), rtol=3e-3, atol=1e-3)


def test_interpolation_trains_the_guided_network():
    torch.manual_seed(0)
    mixture, learner, guide = tree.ground_truth("A"), ToyModel(hidden_dim=8).eval(), ToyModel(hidden_dim=8).eval()
    learner.gain.data.fill_(0.3)
    (_, points, _), *_ = TreeFeed(mixture, block=64).blocks(0, 64)
    plain, guided = TreeLoss(mixture), TreeLoss(mixture, guide=guide, guidance=3.0)
    draws = plain.draw(points, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.evaluate(guide, draws), guided.evaluate(guide, draws))
    noisy, sigma = draws.images + draws.noise, draws.sigma
    mixed = guide(noisy, sigma) + 3 * (learner(noisy, sigma) - guide(noisy, sigma))
    expected = (mixed - draws.targets).flatten(1).square().mean(1) / sigma**2
    torch.testing.assert_close(guided.evaluate(learner, draws), expected, rtol=2e-2, atol=1e-4)


def test_thinning_keeps_points_apart():
    points = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    kept = tree_plots.thin(points, 0.2)
    distances = torch.cdist(points[kept], points[kept]) + 9 * torch.eye(len(kept))
    assert kept[0] == 0 and distances.min() >= 0.2
    assert all(torch.cdist(points[i : i + 1], points[kept]).min() < 0.2 for i in range(200) if i not in kept)


def test_sweep_compares_at_equal_steps_samples_and_time(tmp_path):
    base = replace(SMALL, total_iter=32)
    arms = ["baseline", "early-ajest"]
    paths = tree_sweep.run(base, arms, [0, 1], tmp_path, num=64, reference_iter=2, reference_batch=64)
    assert [p.name for p in paths] == ["table.csv", "table.md", "selection-tree.png", "selection-tree.svg"]
    rows = tree_sweep.measure(arms, [0, 1], tmp_path, str(tmp_path / "reference"), num=64)
    assert len(rows) == 3 * 2 * 2
    for kind, column in (("steps", "iteration"), ("samples", "samples")):
        chosen = [row for row in rows if row["comparison"] == kind]
        shortest = min(
            max(r[column] for r in rows if (r["arm"], r["seed"]) == k) for k in {(r["arm"], r["seed"]) for r in rows}
        )
        assert all(row[column] <= 2.5 * shortest for row in chosen)
    losses = [row["loss"] for row in rows if row["comparison"] == "steps" and row["arm"] == "baseline"]
    text = (tmp_path / "table.md").read_text()
    assert f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}" in text
    loss = {(r["arm"], r["seed"]): r["loss"] for r in rows if r["comparison"] == "samples"}
    change = [loss["early-ajest", seed] - loss["baseline", seed] for seed in (0, 1)]
    shown = lambda values: "{:+.4f} ({:.4f} to {:.4f})".format(
        np.mean(values), *scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    )
    assert f"| early-ajest | {shown(change)} |" in text
    gain = [
        r["guided_mandala_score"] - r["mandala_score"]
        for r in rows
        if (r["comparison"], r["arm"]) == ("time", "baseline")
    ]
    assert f"| baseline | {shown(gain)} |" in text.split("Time: guided")[1]
    stem = tmp_path / "reference"
    (learner,) = stem.glob("learner-*")
    learner.unlink()  # as if interrupted
    tree_sweep.train_reference(base, tmp_path, 2, 64)
    assert list(stem.glob("learner-*"))
    with pytest.raises(ValueError, match="nothing"):
        tree_sweep.run(base, ["nothing"], [0], tmp_path)


def test_commands(tmp_path):
    out = tmp_path / "run"
    small = ["--dim=8", "--layers=1", "--total-iter=4", "--batch-size=128", "--n=4", "--no-test"]
    run(run_tree.main, "train", f"--outdir={out}", *small, "--acid", "--viz")
    assert (out / "samples.png").is_file() and list(out.glob("learner-*.safetensors"))
    done = run(run_tree.main, "test", f"--net={out}", f"--guide={out}", "--n-samples=32", "--mandala", "--levels")
    found = json.loads(done.output)
    assert {"learner_loss", "learner_guided_mandala_score", "guide_loss", "floor_L2_metric"} <= set(found)
    assert found["floor_L2_metric"] == 0 and set(found["learner_loss_per_level"]) == {
        str(s) for s in tree_metrics.LEVELS
    }
    run(plot_run.main, out, f"--save={tmp_path / 'curves.png'}", "--x=images,cpu")
    assert (tmp_path / "curves.png").is_file()
    done = run(run_tree_sweep.main, "--dry-run")
    assert json.loads(done.output.split("Dry run")[0])["seeds"] == [0, 73, 172, 231, 357]
    for bad, message in (
        (["train", "--early", "--late"], "--early"),
        (["train", "--early"], "--select"),
        (["train", "--device=abacus"], "--device=abacus"),
        (["train", "--guidance"], "--guide"),
        (["train", "--select=best"], "best"),
        (["train", "--select=random", "--invert"], "--select=jest"),
        (["train", "--batch-size=8", "--select=jest"], "candidates"),
        (["test", "--net=nowhere.safetensors"], "nowhere"),
    ):
        one_line(run_tree.main, *bad, *(["--dry-run"] if bad[0] == "train" else []), says=message)
    before = (out / "stats.jsonl").read_bytes()
    one_line(run_tree.main, "train", f"--outdir={out}", *small, says="holds a run already")
    assert (out / "stats.jsonl").read_bytes() == before


def test_a_run_keeps_its_colour_where_others_have_no_curve():
    runs = {"a": [{"Progress/kimg": 1, "x": 2.0}], "b": [{"Progress/kimg": 1, "x": 3.0, "y": 4.0}]}
    figure = curves.draw(runs, ["x", "y"])
    colours = [{line.get_label(): line.get_color() for line in axis.get_lines()} for axis in figure.axes]
    assert list(colours[0]) == ["a", "b"] and colours[1] == {"b": colours[0]["b"]} != {"b": colours[0]["a"]}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_autoguidance_figure_has_eight_panels():
    torch.manual_seed(0)
    net, gnet = ToyModel(hidden_dim=8, num_layers=1).eval(), ToyModel(hidden_dim=8, num_layers=1).eval()
    fig = tree_plots.autoguidance_figure(net, gnet, size=16, num_wide=32, num_zoom=32)
    titles = [axis.get_title() for axis in fig.axes if axis.get_title()]
    assert len(titles) == 8 and len(fig.axes) == 9 and titles[0] == "Ground truth" and "3" in titles[2]
