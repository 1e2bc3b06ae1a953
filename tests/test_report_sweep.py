"""A number against a swept option: optima of curves that are known, their interval, what is refused."""

import csv
import json
import math

import numpy as np
import pytest
import scipy.stats
from small_runs import one_line, run

import calculate_metrics
from metrics.report_sweep import vertex

LENGTHS = [0.02, 0.05, 0.08, 0.12, 0.2]
BEST = [0.06, 0.07, 0.1, 0.09]  # of four seeds


@pytest.fixture
def scores(tmp_path):
    """Losses that are parabolas of ln(length), one per seed."""
    for seed, best in enumerate(BEST):
        for length in LENGTHS:
            loss = 0.4 + 0.01 * seed + 0.05 * math.log(length / best) ** 2
            content = {"tags": {"ema": f"{length:.3f}", "seed": str(seed), "draw": str(seed)}}
            content["metrics"] = {"denoising": {"loss": loss, "num": 9, "sources": {}}}
            content["metrics"]["classifier:a"] = {
                "overall": {"agreement": 1 - loss, "fd": loss},
                "reference_hashes": {},
            }
            (tmp_path / f"{length}-{seed}.json").write_text(json.dumps(content))
    return tmp_path


def sweep(scores, *more):
    return calculate_metrics.cmdline, "sweep", f"--scores={scores}/*.json", f"--dest={scores}/out/ema", *more


@pytest.mark.parametrize("more", [[], ["--measure=agreement"], ["--measure=fd", "--metric=classifier"]])
def test_the_optimum_and_its_interval(scores, more):
    found = json.loads(run(*sweep(scores, *more)).stdout)["optimum"]["all"]
    np.testing.assert_allclose(found["each"], BEST, rtol=1e-6)
    assert found["mean"] == pytest.approx(scipy.stats.gmean(BEST), rel=1e-6)
    logs = np.log(BEST)
    ends = scipy.stats.t.interval(0.95, 3, logs.mean(), scipy.stats.sem(logs))
    np.testing.assert_allclose(found["interval"], np.exp(ends), rtol=1e-6)
    assert f"optimum at ema = {found['mean']:.3g} (95 % interval" in (scores / "out" / "ema.md").read_text()
    with open(scores / "out" / "ema.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 20 and {row["seed"] for row in rows} == {"0", "1", "2", "3"}
    assert all((scores / "out" / f"ema.{end}").stat().st_size > 5000 for end in ("png", "svg"))


def test_vertices():
    x = [1.0, 2.0, 4.0, 5.0]
    assert vertex(x, [(v - 2.7) ** 2 for v in x], log=False) == pytest.approx(2.7)
    assert vertex(x, [0, 1, 2, 3], log=False) is None and vertex(x, [3, 2, 1, 0], log=True) is None
    assert vertex(x, [1, 1, 1, 1], log=False) is None and vertex(x, [2, 1, 1, 1], log=False) == pytest.approx(3)


def test_an_optimum_outside_is_not_made_up(scores):
    for path in scores.glob("0.12*.json"), scores.glob("0.2*.json"):
        [file.unlink() for file in path]
    found = json.loads(run(*sweep(scores)).stdout)["optimum"]["all"]
    assert found["mean"] is None and found["interval"] is None and None in found["each"]
    assert "no optimum inside the range for 3 of 4 training seeds" in (scores / "out" / "ema.md").read_text()


def test_arms_were_measured_on_the_same_images(scores):
    for length in LENGTHS:
        content = json.loads((scores / f"{length}-0.json").read_text())
        content["tags"]["arm"], content["metrics"]["denoising"]["reference_hashes"] = "b", {"overall": "others"}
        (scores / f"b-{length}.json").write_text(json.dumps(content))
    one_line(*sweep(scores), says=["cannot be compared", "others"])
    assert not (scores / "out").exists()


def test_mistakes(scores):
    one_line(*sweep(scores, "--over=guidance"), says="no tag 'guidance'")
    one_line(*sweep(scores, "--measure=kid"), says="no kid in section 'overall'; there: agreement, denoising_loss, fd")
    one_line(*sweep(scores, "--section=mean"), says="section 'mean'")
    content = json.loads((scores / "0.05-1.json").read_text())
    (scores / "0.05-1.json").unlink()
    one_line(*sweep(scores), says="lacks scores of ema=0.05, seed 1")
    content["tags"]["ema"] = "long"
    (scores / "0.05-1.json").write_text(json.dumps(content))
    one_line(*sweep(scores), says="ema=long is no number")
    content["tags"]["ema"] = "0.05"
    (scores / "0.05-1.json").write_text(json.dumps(content))
    one_line(*sweep(scores), says="written in two ways")
    for length in LENGTHS[2:]:
        [path.unlink() for path in scores.glob(f"{length}-*.json")]
    content["tags"]["ema"] = "0.050"
    (scores / "0.05-1.json").write_text(json.dumps(content))
    one_line(*sweep(scores), says="three at least")
    assert not (scores / "out").exists()
