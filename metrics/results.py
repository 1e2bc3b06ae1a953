"""The one language of results: score files are read as rows, and rows are what every report is made of.

A score file is the JSON that `calculate_metrics.py calc|gen|loss|likelihood --dest=FILE --tag ...` writes, or a file of such
lines (.jsonl): what was measured, with tags such as arm, source, seed (training) and sampling. Nothing is read from paths.
"""

from __future__ import annotations

import glob
import json
import math
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from dnnlib.reading import MOST_BYTES, require_file

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
JOINED = {"denoising": "denoising_loss", "likelihood": "bits_per_dim"}  # measured without a detector: the number shown


class Compared(NamedTuple):
    """What the numbers of a section are about: only those of the same stand side by side. None where a file does not say."""

    reference_images: str | None  # their hash
    number_of_reference_images: int | None
    number_of_images: int | None


@dataclass(frozen=True)
class Row:
    """The numbers of one section of one score file, as one detector saw it."""

    tags: dict[str, str]
    detector: str  # its identity, or one of JOINED
    section: str  # "overall", "mean" (over the sources), or a source id
    numbers: dict[str, float]
    images: str | None  # folder, data set or run that was scored
    file: str
    compared: Compared = Compared(None, None, None)
    net: str | None = None  # network that was measured without images of its own
    title: str | None = None  # what the source is called


def read_scores(pattern: str | Path, needed: Sequence[str] = ("arm", "seed")) -> list[Row]:
    """Rows of all score files that match a glob pattern; numbers that are None are left out.

    Raises ValueError for no file, a file that holds no scores, a number that is not finite, or a file that lacks a
    needed tag.
    """
    rows = []
    literal = os.path.join(glob.escape(os.path.dirname(pattern)), os.path.basename(pattern))  # a folder such as out[1]
    for path in sorted(glob.glob(str(pattern)) or glob.glob(literal)):
        try:
            text = require_file(path, MOST_BYTES).read_bytes()
            lines = text.splitlines() if path.endswith(".jsonl") else [text]  # of gen: a score in every line
            contents = {path if len(lines) == 1 else f"{path}:{i}": json.loads(line) for i, line in enumerate(lines, 1)}
            rows += [row for file, content in contents.items() for row in rows_of(content, file)]
            lacking = [(f, n) for f, content in contents.items() for n in needed if n not in content["tags"]]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as err:
            raise ValueError(f"{path}: not a score file with tags ({type(err).__name__}: {err})") from err
        if lacking:
            file, missing = lacking[0]
            raise ValueError(f"{file}: no tag {missing!r}: score with --tag {missing}=...")
    for row in rows:
        finite(row.numbers, f"{row.file}: {row.detector}, {row.section}")
    if not rows:
        remedy = "run calculate_metrics.py calc with --dest and --tag first"
        raise ValueError(f"--scores={pattern}: no score files; {remedy}")
    return rows


def rows_of(content: dict, file: str) -> list[Row]:
    """The rows of the content of one score file. Raises what a content of another form leads to."""
    rows, tags, images = [], {"sampling": "0", **content["tags"]}, content.get("images")
    net, names = content.get("net"), content.get("class_names", {})
    for detector, result in content["metrics"].items():
        sections = {"overall": result.get("overall", result), "mean": result.get("mean", {})}
        for section, values in (sections | result.get("sources", {})).items():
            numbers = {name: float(v) for name, v in values.items() if type(v) in (int, float)}
            about = _compared(result, section, values)
            rows.append(Row(tags, detector, section, numbers, images, file, about, net, names.get(section)))
    return rows


def finite(numbers: T, where: str) -> T:
    """`numbers` themselves: nested dicts and lists of plain values. Raises ValueError that names one not finite."""
    parts = numbers.items() if isinstance(numbers, dict) else enumerate(numbers) if isinstance(numbers, list) else ()
    for name, value in parts:
        finite(value, f"{where}, {name}")
    if isinstance(numbers, float) and not math.isfinite(numbers):
        raise ValueError(f"{where} is {numbers}: no number to compare")
    return numbers


def _compared(result, section, values):
    """What the numbers `values` of a section are about; means over sources are about all images."""
    about = values if section != "mean" else result.get("overall", result)
    hashes, whole = result.get("reference_hashes", {}), result.get("reference", {}).get("content_hash")
    content = hashes.get("overall" if section == "mean" else section, whole)
    return Compared(content, about.get("reference_count"), about.get("count", about.get("num")))


def require_comparable(rows: Iterable[Row]) -> None:
    """Raises ValueError, naming two files, where a section was compared with other images, or has other numbers of them.

    Rows with a tag `draw` are of an experiment that draws its data anew: they agree within a draw.
    """
    first = {}
    for row in rows:
        other = first.setdefault((row.detector, row.section, row.tags.get("draw")), row)
        for field, a, b in zip(Compared._fields, other.compared, row.compared, strict=True):
            if a != b:
                what = "source " + row.section if row.section.isdigit() else row.section
                raise ValueError(
                    f"{other.file} and {row.file} cannot be compared: {field.replace('_', ' ')} of {what} is "
                    f"{a or 'unknown'} in one and {b or 'unknown'} in the other; score both against the same images"
                )


def of_detector(rows: Sequence[Row], name: str | None = None, option: str = "--metric") -> list[Row]:
    """The rows of one feature detector, and those that need none (JOINED) with the one number that is shown of them.

    name: its identity, or what stands before the colon of it; None: the only one. Raises ValueError for a choice that
    is not there, or not unique: numbers of two detectors never stand in one table.
    """
    detectors = list(dict.fromkeys(row.detector for row in rows if row.detector not in JOINED))
    chosen = [d for d in detectors if name in (None, d, d.partition(":")[0])]
    if len(chosen) > 1 or (name is not None and not chosen):
        given, held = "" if name is None else f"{option}={name}: ", ", ".join(detectors) or "no detector"
        raise ValueError(f"{given}the score files hold {held}: choose one with {option}=NAME")
    shown = [row for row in rows if row.detector in chosen]
    for row in rows:
        number = JOINED.get(row.detector)
        if number in row.numbers:
            shown.append(replace(row, numbers={number: row.numbers[number]}))
    return shown


def of_sources(rows: Iterable[Row]) -> list[Row]:
    """The rows of single sources; of samples with the tag source, only of that one. Raises ValueError for none at all."""
    chosen = [r for r in rows if r.section not in ("overall", "mean") and r.tags.get("source", r.section) == r.section]
    if not chosen:
        raise ValueError("the score files hold no numbers per source: score labelled images, without --no-per-source")
    return chosen


def sources_of(rows: Iterable[Row]) -> list[str]:
    """The sources of rows, in numerical order."""
    return sorted({row.section for row in rows}, key=lambda s: (not s.isdigit(), int(s) if s.isdigit() else 0, s))


def titles_of(rows: Iterable[Row]) -> dict[str, str]:
    """{source: what it is called} in tables and figures: its class name, where score files know it and no other has it."""
    rows = list(rows)
    named = {row.section: row.title for row in rows if row.title}
    often = Counter(named.values())
    titles = {
        s: named[s] if s in named and often[named[s]] == 1 else f"{named.get(s, '')} {s}".strip()
        for s in sources_of(rows)
    }
    return titles | {"mean": "mean", "overall": "overall"}


def best_of(rows: Sequence[Row], measure: str = "fd", detector: str | None = None, top: int = 3) -> dict:
    """The best of many checkpoints, as FIDs are reported: the minimum, and the mean of the best `top` (or of all if fewer).

    Each checkpoint (tag) is scored on several blocks of images (other seeds) and counts with its lowest score (EDM: "each
    FID three times, reporting the minimum"). Differences of 0.05 FID are within the noise of checkpoints and seeds.
    Raises ValueError for several detectors to choose from, and for a file without the number.
    """
    scores = {}
    require_comparable(row for row in of_detector(rows, detector, "--detector") if row.section == "overall")
    chosen = {(row.file, row.section): row for row in of_detector(rows, detector, "--detector")}
    for file in dict.fromkeys(row.file for row in rows):
        row = chosen.get((file, "overall"))
        if row is None or measure not in row.numbers:
            held = ", ".join(dict.fromkeys(row.detector for row in rows if row.file == file))
            raise ValueError(f"{file}: no {measure} of detector {detector or held}; it holds {held}")
        scores.setdefault(row.tags["checkpoint"], []).append(float(row.numbers[measure]))
    found = {}
    for name in sorted(scores, key=lambda name: (len(name), name)):
        values = scores[name]
        found[name] = {"min": min(values), "mean": statistics.fmean(values), "blocks": len(values)}
        if len(values) > 1:
            found[name]["sd"] = statistics.stdev(values)
    order = sorted(found, key=lambda name: found[name]["min"])[:top]
    return {
        "min": found[order[0]]["min"],
        "min_checkpoint": order[0],
        "top": len(order),
        "top_mean": statistics.fmean(found[name]["min"] for name in order),
        "top_checkpoints": order,
        "checkpoints": found,
    }


def theory_ratio(net: torch.nn.Module, num_sources: int) -> dict[str, float]:
    """The theory's prediction for multi over single: sqrt(1 - (K-1)/K beta), beta = share of shared parameters.

    Wang et al. (ICML 2025, arXiv 2502.14583), section 4: what belongs to a source is its column of the label embedding.
    Returns {"beta_sim", "ratio", "shared", "per_source"} from the parameters of the denoiser `net`.
    """
    named = [(name, p) for name, p in net.named_parameters() if "label" in name and p.ndim == 2]
    own = sum(p.numel() for _, p in named if p.shape[1] == net.label_dim)
    per_source, shared = own // max(net.label_dim, 1), sum(p.numel() for p in net.parameters()) - own
    beta = shared / (shared + per_source)
    ratio = math.sqrt(1 - (num_sources - 1) / num_sources * beta)
    return {"beta_sim": beta, "ratio": ratio, "shared": shared, "per_source": per_source}
