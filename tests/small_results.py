"""The folder of a small experiment whose every number and picture is known, made without training anything."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from metrics.plan import write_plan
from metrics.results import read_scores
from torch_utils.persistence import save_snapshot
from training.images import save_grid

NAMES = ["<i>cats</i>", 'dogs "2"']  # what a page must not take for its own words
SEEDS = ("0", "1")
GRIDS = {"multi": (4, 8, 16), "single": (1, 3)}  # kimg
SIZES, RATIO = (25, 50, 100), 0.55  # bits/dim: 1 + 10 / n alone, 1 + 5.5 / n together
TABLE = """| source | loss multi | loss single |
| --- | --- | --- |
| 0 | 1.054 +- 0.114 | 1.056 |
| mean | **0.9** | a < b & c |

**loss: multi better than single in 1 of 2 sources**

Text of <script>alert(1)</script>.

- Both arms saw the same images: `sha256 ab`.
"""


def grey(arm, seed, kimg=None):
    """Brightness of all images of an arm at some time; None: of what was scored."""
    return 40 + 100 * (arm == "single") + 50 * int(seed) + (25 if kimg is None else 2 * kimg)


def image(value):
    return torch.full([1, 8, 8], value, dtype=torch.uint8)


def data_set(folder, values):
    """A folder of one image per (source, value)."""
    folder.mkdir(parents=True)
    labels = {f"{i:06d}.png": source for i, (source, _) in enumerate(values)}
    for i, (_, value) in enumerate(values):
        PIL.Image.fromarray(np.full([8, 8], value, np.uint8)).save(folder / f"{i:06d}.png")
    (folder / "dataset.json").write_text(json.dumps({"labels": [*labels.items()], "class_names": NAMES}))


def score(folder, name, tags, metrics, **more):
    (folder / "scores").mkdir(exist_ok=True)
    content = {"tags": {k: str(v) for k, v in tags.items()}, "metrics": metrics, **more}
    (folder / "scores" / f"{name}.json").write_text(json.dumps(content))


def make_run(folder, sources, seed, kimgs, value, net, lr):
    folder.mkdir(parents=True)
    options = {"data": "elsewhere/x/data/train", "seed": int(seed), "lr": lr, "batch_size": 128}
    (folder / "training_options.json").write_text(json.dumps(options))
    levels = {f"Loss/validation_sigma{s}": 0.5 + s for s in (0.1, 0.4, 1.6)}
    lines = [
        {"Progress/kimg": k, "Timing/total_sec": 10.0 * k, "Timing/sec_per_kimg": 2.0, "Loss/learning_rate": lr,
         "Loss/loss": 1 + 1 / (k + 1), "Loss/validation": 1 + abs(k - 3) / 10, **levels,
         **{f"Loss/validation_source{s}": 1.0 + s for s in sources}} for k in range(5)
    ]  # fmt: skip
    (folder / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kimg in kimgs:
        save_grid(
            folder / f"samples-{kimg:07d}.png", [[image(value(kimg))] * 3] * len(sources), [NAMES[s] for s in sources]
        )
    header = {"sources": sources, "dataset": {"class_names": NAMES}}
    save_snapshot(folder / "network-snapshot-best.safetensors", net, **header)


def make_results(folder: Path, net):
    """`folder` as an experiment of two sources, arms multi and single, two seeds leaves it; net: what all runs trained."""
    data_set(folder / "data" / "train", [(0, 250), (1, 251)])
    for seed in SEEDS:
        for arm, name, sources in (
            ("multi", "multi", [0, 1]),
            ("single", "single-0", [0]),
            ("single", "single-1", [1]),
        ):
            run = f"{name}-seed{seed}"
            value = lambda kimg, arm=arm, seed=seed: grey(arm, seed, kimg)
            make_run(folder / "runs" / run, sources, seed, GRIDS[arm], value, net, 0.01 * len(sources))
            numbers = {"sources": {str(s): {"denoising_loss": 1.0} for s in sources}}
            where = f"elsewhere/x/runs/{run}/network-snapshot-best.safetensors"
            score(folder, f"loss-{run}", {"arm": arm, "seed": seed}, {"denoising": numbers}, net=where)
            for n in SIZES:
                tags = {"arm": arm, "seed": seed, "k": len(sources), "n": n, "group": "real"}
                loss = 1 + 10 * (RATIO if arm == "multi" else 1) / n
                numbers = {"sources": {str(s): {"bits_per_dim": loss} for s in sources}}
                score(folder, f"nll-{run}-n{n}", tags, {"likelihood": numbers})
    for arm in GRIDS:
        for s in (0, 1):
            data_set(folder / "samples" / f"{arm}-{s}", [(s, grey(arm, 0))])
            fd = {"pixel": {"sources": {str(s): {"fd": 1.0}}}}
            tags = {"arm": arm, "source": s, "seed": 0}
            score(folder, f"samples-{arm}-{s}", tags, fd, images=f"elsewhere/x/samples/{arm}-{s}")
    (folder / "table.md").write_text(TABLE)
    rows = [row for row in read_scores(folder / "scores" / "*.json") if "k" in row.tags]
    write_plan(rows, folder)
    return folder
