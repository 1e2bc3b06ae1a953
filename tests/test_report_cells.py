"""The lead paper's table from scores: means, spreads, intervals against NumPy and SciPy, published cells beside them."""

import csv
import json

import numpy as np
import pytest
import scipy.stats
from small_runs import run

import calculate_metrics
from metrics import report_cells

NAMES = {"171": "Italian greyhound", "182": "Border terrier", "198": "standard schnauzer"}


def write(folder, arm, k, values, detectors=("fid",), seed="0", sim="sim3"):
    """values: {source: distances by block}."""
    folder.mkdir(exist_ok=True)
    for source, blocks in values.items():
        lines = []
        for block, value in enumerate(blocks):
            tags = dict(arm=arm, sim=sim, k=k, n="500", source=source, seed=seed, sampling=str(block * 5000))
            parts = {
                "overall": {"fd": value},
                "sources": {source: {"fd": value, "count": 5000, "reference_count": 1300}},
            }
            lines.append(json.dumps({"tags": tags, "class_names": NAMES, "metrics": dict.fromkeys(detectors, parts)}))
        (folder / f"{arm}-{sim}-{k}-{source}-{seed}.jsonl").write_text("\n".join(lines))


@pytest.fixture
def numbers():
    rng = np.random.RandomState(0)
    return {
        arm: {s: (30 + i + rng.rand(5) - (arm == "multi")).tolist() for i, s in enumerate(NAMES)}
        for arm in ("single", "multi")
    }


def table(folder, dest):
    command = ["report", "--cells", f"--scores={folder}/*.jsonl", f"--dest={dest}"]
    return run(calculate_metrics.cmdline, *command).stdout


def test_one_training_and_five_blocks(numbers, tmp_path):
    detectors = ("fid", "fd_dinov2")
    write(tmp_path / "s", "multi", "3", numbers["multi"], detectors)
    write(tmp_path / "s", "single", "1", numbers["single"], detectors)
    write(
        tmp_path / "s", "multi", "10", {**numbers["multi"], "208": [1.0] * 5}, detectors
    )  # no single model of one class
    text = table(tmp_path / "s", tmp_path / "out")
    single, multi = (np.array([*numbers[arm].values()]) for arm in ("single", "multi"))  # [class, block]
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    row, dino = lines[2], lines[3]
    assert lines[0][3:6] == ["metric", "single", "multi"] and (row[3], dino[3]) == ("FID", "FD-DINOv2")
    assert row[:3] == ["Sim 2 (dogs)", "3", "500"] and row[7:] == ["32.69", "30.69", "6.12%"] and dino[7:] == [""] * 3
    for cell, values in ((row[4], single), (row[5], multi)):
        assert cell == f"{values.mean():.2f} ± {values.mean(0).std(ddof=1):.4f}"
    advantage = ((single.mean(1) - multi.mean(1)) / single.mean(1)).mean()
    blocks = ((single - multi) / single.mean(1)[:, None]).mean(0)
    half = scipy.stats.t.ppf(0.975, 4) * blocks.std(ddof=1) / 5**0.5
    assert row[6] == f"{advantage:.1%} ({blocks.mean() - half:.1%} to {blocks.mean() + half:.1%})"
    assert "over sampling seeds alone, of one training per arm" in text
    classes = {line[0]: line[1:] for line in lines if line[0] in NAMES.values()}
    assert list(classes) == [*NAMES.values()]
    for name, source in zip(NAMES.values(), NAMES, strict=True):
        values = np.array(numbers["multi"][source])
        assert classes[name][1] == f"{values.mean():.2f} ± {values.std(ddof=1):.4f}"
    assert "K = 10, n = 500, fid: left out, arm 'single' has no 'fd' for source 208" in text
    assert "fid: 5000 generated images of a class and sampling seed, 1300 real ones." in text
    with open(tmp_path / "out" / "cells.csv") as file:
        rows = list(csv.DictReader(file))
    assert [r["detector"] for r in rows] == list(detectors) and float(rows[0]["single"]) == pytest.approx(single.mean())
    assert (tmp_path / "out" / "cells.png").stat().st_size > 1000


def test_several_trainings(numbers, tmp_path):
    """Intervals are over trainings then."""
    for seed in range(3):
        for arm, k in (("multi", "3"), ("single", "1")):
            shifted = {s: [v + seed * (1 + (arm == "multi")) for v in values] for s, values in numbers[arm].items()}
            write(tmp_path / "s", arm, k, shifted, seed=str(seed), sim="sim2")
    found, notes = report_cells.find(report_cells.of_sources(report_cells.read_scores(f"{tmp_path}/s/*.jsonl")))
    assert len(found) == 1 and not notes and found[0].verdict.over == "training"
    means = {
        arm: np.array([*numbers[arm].values()]).mean(1)[:, None] + np.arange(3) * (1 + (arm == "multi"))
        for arm in numbers
    }
    differences = ((means["single"] - means["multi"]) / means["single"].mean(1)[:, None]).mean(0)
    half = scipy.stats.t.ppf(0.975, 2) * differences.std(ddof=1) / 3**0.5
    assert found[0].verdict.interval == pytest.approx((differences.mean() - half, differences.mean() + half))
    assert "| mammals | 3 | 500 | FID |" in table(tmp_path / "s", tmp_path / "out")


def test_published_numbers_are_those_of_the_paper():
    """The last column of the digest of tables 1 and 3."""
    printed = {
        ("sim1", "3", "500"): 0.30,
        ("sim3", "10", "500"): 5.86,
        ("sim1", "10", "1000"): 6.00,
        ("sim3", "10", "1000"): 4.14,
    }
    for cell, advantage in printed.items():
        single, multi, *_ = report_cells.PUBLISHED[cell]
        assert 100 * (single - multi) / single == pytest.approx(advantage, abs=0.005)
    assert len(report_cells.PUBLISHED) == 8
