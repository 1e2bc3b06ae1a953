"""The table of many arms: means, paired differences, order of arms, refusals."""

import json

import numpy as np
import pytest
import scipy.stats
from small_runs import one_line, run

import calculate_metrics

VALUES = {
    "cfg-1": [0.8, 0.84, 0.79],
    "cfg-1.5": [0.9, 0.91, 0.85],
    "cfg-10": [0.99, 0.97, 0.95],
    "auto-2": [0.7, 0.9, 0.8],
}


@pytest.fixture
def scores(tmp_path):
    for arm, values in VALUES.items():
        for seed, value in enumerate(values):
            numbers = {"agreement": value, "fd": 3 - value, "recall": 1 - value, "precision": None}
            content = {"tags": {"arm": arm, "seed": str(seed)}, "metrics": {"pixels": {"overall": numbers, "mean": {}}}}
            (tmp_path / f"{arm}-{seed}.json").write_text(json.dumps(content))
    return tmp_path


def report(scores, *more):
    """The command line; for small_runs."""
    return calculate_metrics.cmdline, "report", f"--scores={scores}/*.json", f"--dest={scores}/out/arms", *more


def test_means_and_paired_differences(scores):
    done = run(*report(scores, "--against=cfg-1"))
    assert [path.rsplit(".")[-1] for path in json.loads(done.output)["files"]] == ["md", "csv", "png", "svg"]
    text = (scores / "out" / "arms.md").read_text()
    level, change = text.split("Difference")
    rows = [line for line in level.splitlines() if line.startswith("| ") and " ± " in line]
    assert [row.split(" | ")[0] for row in rows] == ["| cfg-1", "| auto-2", "| cfg-1.5", "| cfg-10"]
    x, base = np.array(VALUES["cfg-1.5"]), np.array(VALUES["cfg-1"])
    half = lambda v: v.mean() - scipy.stats.ttest_1samp(v, 0).confidence_interval(0.95).low
    assert f"| cfg-1.5 | {x.mean():.4f} ± {half(x):.4f} |" in level and "95 % interval, Student's t over 3" in level
    d = x - base
    assert f"| cfg-1.5 | {d.mean():+.4f} ± {half(d):.4f} | {-d.mean():+.4f}" in change
    assert "precision" not in text and "| cfg-1 |" not in change
    run(*report(scores, "--against=cfg-1", "--arms=cfg-10,cfg-1"))
    assert "auto" not in (scores / "out" / "arms.csv").read_text()


def test_one_training_seed_shows_the_error_over_images(tmp_path):
    for arm, value in {"a": 0.8, "b": 0.7}.items():
        numbers = {"agreement": value, "agreement_se": 0.01, "fd": 2.0}
        content = {"tags": {"arm": arm, "seed": "0"}, "metrics": {"pixels": {"overall": numbers, "mean": {}}}}
        (tmp_path / f"{arm}.json").write_text(json.dumps(content))
    run(*report(tmp_path, "--against=a"))
    text = (tmp_path / "out" / "arms.md").read_text()
    assert (
        "| b | 0.7000 ± 0.0196 | 2.0000 |" in text
        and "over images alone" in text
        and "| b | -0.1000 | +0.0000 |" in text
    )


def test_user_errors(scores):
    one_line(*report(scores, "--against=cfg-7"), says="'cfg-7'")
    one_line(*report(scores, "--against=cfg-1", "--section=mean"))  # holds no numbers
    (scores / "cfg-1-2.json").unlink()
    one_line(*report(scores, "--against=cfg-1"), says="arm cfg-1 lacks the seeds 2")
    (scores / "zz.json").write_text("{}")
    one_line(*report(scores, "--against=cfg-1"), says="zz.json")
    one_line(*report(scores / "nowhere", "--against=cfg-1"), says="no score files")
    assert not (scores / "out").exists()


def test_a_column_that_one_seed_lacks_is_not_compared(scores):
    path = scores / "cfg-10-1.json"
    content = json.loads(path.read_text())
    content["metrics"]["pixels"]["overall"]["recall"] = None
    path.write_text(json.dumps(content))
    run(*report(scores, "--against=cfg-1"))
    text = (scores / "out" / "arms.md").read_text()
    assert "agreement" in text and "recall" not in text


def test_two_detectors_need_a_choice(scores):
    for path in scores.glob("*.json"):
        content = json.loads(path.read_text())
        content["metrics"]["classifier:abc"] = {"overall": {"fd": 7}}
        path.write_text(json.dumps(content))
    one_line(*report(scores, "--against=cfg-1"), says="pixels, classifier:abc")
    run(*report(scores, "--against=cfg-1", "--metric=classifier"))
    assert "| cfg-1.5 | 7.0000 ± 0.0000 |" in (scores / "out" / "arms.md").read_text()
