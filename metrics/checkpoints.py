"""The best of many checkpoints, as FIDs are reported: the minimum, and the mean of the best three.

Each checkpoint is scored on several blocks of images (other seeds) and counts with its lowest score (EDM: "each FID three
times, reporting the minimum"). A score file is the JSON of `calculate_metrics.py calc --dest=FILE --tag checkpoint=NAME`.
"""

import glob
import json
from collections import defaultdict


def read_checkpoint_scores(pattern, measure="fd", detector=None):
    """{checkpoint: [score of each block]} of the score files that match a glob pattern, in order of the checkpoints.

    detector: its identity; None: the only one of the files. Raises ValueError for no files, a file that is none, no tag
    `checkpoint`, several detectors to choose from, or a missing score.
    """
    paths, scores = sorted(glob.glob(str(pattern))), defaultdict(list)
    if not paths:
        raise ValueError(f"--scores={pattern}: no such files; score with `calculate_metrics.py calc --dest=...` first")
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            name, results = content["tags"]["checkpoint"], content["metrics"]
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise ValueError(
                f"{path}: not a score file with --tag checkpoint=NAME ({type(err).__name__}: {err})"
            ) from err
        if detector is None and len(results) > 1:
            raise ValueError(f"{path} holds {', '.join(results)}: choose one with --detector")
        chosen = next(iter(results)) if detector is None else detector
        value = results.get(chosen, {}).get("overall", {}).get(measure)
        if value is None:
            raise ValueError(f"{path}: no {measure} of detector {chosen}; it holds {', '.join(results)}")
        scores[name].append(float(value))
    return dict(sorted(scores.items(), key=lambda item: (len(item[0]), item[0])))


def best_of(scores, top=3):
    """Summary of {checkpoint: [scores]}: each checkpoint counts with its minimum over the blocks.

    Returns {"min", "min_checkpoint", "top": n, "top_mean" (of the `top` best, or of all if there are fewer),
    "top_checkpoints", "checkpoints": {name: {"min", "mean", "blocks"}}}. Differences of 0.05 FID are within the noise of
    checkpoints and seeds.
    """
    rows = {
        name: {"min": min(values), "mean": sum(values) / len(values), "blocks": len(values)}
        for name, values in scores.items()
    }
    order = sorted(rows, key=lambda name: rows[name]["min"])[:top]
    return {
        "min": rows[order[0]]["min"],
        "min_checkpoint": order[0],
        "top": len(order),
        "top_mean": sum(rows[name]["min"] for name in order) / len(order),
        "top_checkpoints": order,
        "checkpoints": rows,
    }
