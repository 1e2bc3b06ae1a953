"""The scripts of the published workflows that score, run for real at tiny size: bash_files/pfgmpp, ajest, convert."""

import json
import re

import pytest
from script_runs import bash
from small_runs import run

import calculate_metrics
from torch_utils.persistence import save_snapshot


def test_fid_of_pfgmpp(digits, tmp_path):
    """Reference, training, every late snapshot on three blocks, the best; again, nothing is done twice."""
    small = "--channels=8 --channel-mult=1 --num-blocks=1 --attn-resolutions=4"
    train = f"--duration=2Ki --batch=1Ki --snapshot=1Ki --workers=0 {small}"
    given = dict(
        RUNS=tmp_path / "runs", DATA=digits, METRICS="pixel", NUM=4, FROM=1, GPUS=1, TRAIN=train, SCORE="--steps=2"
    )
    printed = bash("pfgmpp/fid.sh", "cifar10-cond", "128", **given)
    assert re.findall(r"^\+ python \w+.py(?: [a-z]+)?", printed, re.M)[::2] == [
        "+ python calculate_metrics.py ref",
        "+ python calculate_metrics.py gen",
    ]
    scores = tmp_path / "runs" / "pfgmpp-cifar10-ncsnpp-cond-D128" / "metrics"
    rows = [json.loads(line) for line in (scores / "metrics.jsonl").read_text().splitlines()]
    found = [(row["kimg"], row["tags"]["sampling"], row["metrics"]["pixel"]["num_images"]) for row in rows]
    assert found == [(kimg, first, 4) for kimg in (1, 2) for first in ("0", "4", "8")]
    best = json.loads(printed[printed.rindex("\n{") :])["metrics"]["pixel"]["best"]["fd_pixel"]
    lowest = {k: min(row["scores"]["fd_pixel"] for row in rows if row["kimg"] == k) for k in (1, 2)}
    assert best["min"] == min(lowest.values()) and best["top_mean"] == pytest.approx(sum(lowest.values()) / 2)
    before = [(p, p.stat().st_mtime_ns) for p in sorted((scores / "cells").iterdir())]
    assert bash("pfgmpp/fid.sh", "cifar10-cond", "128", "score", **given).count("\n+ ") == 0
    assert [(p, p.stat().st_mtime_ns) for p in sorted((scores / "cells").iterdir())] == before and len(before) == 6


def test_evaluation_of_ajest(digits, tmp_path, tiny_net):
    for seed, name in enumerate(("net", "guide")):
        save_snapshot(tmp_path / f"{name}.safetensors", tiny_net(seed=seed))
    run(calculate_metrics.cmdline, "ref", f"--data={digits}", f"--dest={tmp_path}/ref.npz", "--device=cpu")
    given = dict(GUIDE=tmp_path / "guide.safetensors", REF=tmp_path / "ref.npz", NUM=20, SCORE="--steps=2 --device=cpu")
    bash("ajest/evaluate.sh", tmp_path / "net.safetensors", tmp_path / "out", "3", GPUS=2, **given)
    plain, guided = (json.loads((tmp_path / "out" / f"w{weight}.json").read_text()) for weight in (1, 3))
    assert plain["tags"] == {"guidance": "1"} and guided["tags"] == {"guidance": "3"}
    assert {plain["metrics"]["pixel"]["num_images"], guided["metrics"]["pixel"]["num_images"]} == {20}
    assert plain["scores"]["fd_pixel"] != pytest.approx(guided["scores"]["fd_pixel"], rel=0.01)
