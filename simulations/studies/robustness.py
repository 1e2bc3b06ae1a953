"""Robustness of trained models: Frechet distance under injected noise, fewer steps and rounded weights.

PFGM++ (arXiv 2302.04265, sec. 5.3) claims that models with fewer augmented dimensions D forgive more. A cell of the grid is
one snapshot, one sampling seed and one `Setting`; all cells share noise and labels of the same seeds.
"""

from __future__ import annotations

import glob
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dnnlib import cells
from metrics.detectors import get_detector, identity_of
from metrics.evaluate import compare
from metrics.features import collect, collect_dataset, generated_batches
from metrics.references import load_references, require_detectors
from metrics.table import markdown as markdown_table
from metrics.table import mean_and_deviation, paired_difference
from torch_utils import distributed as dist
from torch_utils import persistence
from training import processes, quantize, samplers
from training.generation import generate_images


class Setting(NamedTuple):
    """How one cell samples: noise per step, steps of the Heun sampler, bits of the weights (None: as trained)."""

    alpha: float = 0.0
    steps: int = 18
    bits: int | None = None


def settings_of(
    experiment: str, alphas: Sequence[float], steps: Sequence[int], bits: Sequence[int], num_steps: int
) -> list[tuple[float | None, Setting]]:
    """[(value on the x axis, Setting)] of an experiment: "alpha", "steps" or "bits" (the last with None, unrounded)."""
    made = {
        "alpha": [(float(value), Setting(float(value), num_steps)) for value in alphas],
        "steps": [(value, Setting(0.0, value)) for value in steps],
        "bits": [(value, Setting(0.0, num_steps, value)) for value in (None, *bits)],
    }
    if experiment not in made:
        raise ValueError(f"experiment {experiment!r} is unknown; known: {', '.join(made)}")
    return made[experiment]


@dataclass
class Model:
    """One trained network of the grid; models with the same label differ in their training seed."""

    label: str
    path: str
    net: torch.nn.Module
    encoder: object
    kernel: object
    digest: str  # of the file: results of another file of this name are not reused

    @property
    def D(self) -> float:
        return processes.aug_dim(self.kernel)


def open_model(path: str, label: str = "", device: str = "cpu") -> Model:
    """A Model of a snapshot file or run folder, which means its newest one. Default label: D=<D of the snapshot>."""
    snapshot = persistence.load_snapshot(path, device)
    kernel = snapshot.process if hasattr(snapshot.process, "unit_noise") else None
    label = label or f"D={processes.aug_dim(kernel):g}"
    return Model(label, path, snapshot.net, snapshot.encoder, kernel, cells.digest(persistence.resolve(path)))


def open_models(texts: Sequence[str], device: str = "cpu") -> list[Model]:
    """Models of "LABEL=PATTERN" or "PATTERN" (of snapshots or run folders); those of one pattern by D."""
    models = []
    for text in texts:
        label, equals, pattern = text.partition("=")
        if not equals or Path(text).exists() or glob.glob(text):
            label, pattern = "", text
        found = [open_model(path, label, device) for path in sorted(glob.glob(pattern)) or [pattern]]
        models += sorted(found, key=lambda model: model.D)
    return models


class Judge:
    """A detector and the reference features that all cells are compared with. Give either data or ref."""

    def __init__(self, detector: str, data: str | None = None, ref: str | None = None, device: str = "cpu"):
        self.detector = get_detector(detector, device)
        self.identity = identity_of(self.detector)
        if (data is None) == (ref is None):
            raise ValueError("give either --data or --ref as the reference")
        if ref is not None:
            self.reference = require_detectors(load_references(ref), [self.identity], ref)[self.identity]
        else:
            from training.dataset import ImageFolderDataset

            self.reference = collect_dataset(ImageFolderDataset(data), {self.identity: self.detector})[self.identity]
        self.name = f"{Path(data or ref).name}:{self.reference.count()}"

    def score(self, batches, num_images: int) -> dict:
        """{fd, fd_floor, fd_at_floor_size, agreement} of generated batches; agreement where the detector classifies."""
        found = collect(
            generated_batches(batches),
            {self.identity: self.detector},
            num_sources=self.reference.num_sources,
            num_images=num_images,
        )[self.identity]
        result = compare(found, self.reference, detector=self.detector, per_source=False, measures=("fd",))["overall"]
        return {name: result.get(name) for name in ("fd", "fd_floor", "fd_at_floor_size", "agreement")}


def measure(
    model: Model, setting: Setting, judge: Judge, seeds: Sequence[int], policy: str = "role", class_idx="balanced",
    batch: int = 256, device: str = "cpu",
) -> dict:  # fmt: skip
    """Scores of one cell (see `Judge.score`); the images exist in memory only."""
    batches = generate_images(
        quantize.quantize_weights(model.net, setting.bits, policy),
        seeds,
        encoder=model.encoder,
        kernel=model.kernel,
        class_idx=class_idx if model.net.label_dim else None,
        max_batch_size=batch,
        sampler=samplers.noisy_heun(setting.alpha),
        num_steps=setting.steps,
        device=device,
    )
    return judge.score(batches, len(seeds))


def describe(model: Model, setting: Setting, judge: Judge, first: int, num: int, policy: str) -> dict:
    """The columns of a row before its scores."""
    rounded = setting.bits is not None
    return {
        "label": model.label, "D": f"{model.D:g}", "net": model.path, "snapshot": model.digest, "sampling": first, "num": num,
        "alpha": setting.alpha, "steps": setting.steps, "nfe": 2 * setting.steps - 1,
        "bits": setting.bits if rounded else "none", "policy": policy if rounded else "none",
        "detector": judge.identity, "reference": judge.name,
    }  # fmt: skip


def run_grid(
    models: Sequence[Model],
    experiments: dict[str, list],  # {name: [(value, Setting)]}; a setting that two share is measured once
    judge: Judge,
    samplings: Sequence[int],  # first seeds
    num: int,  # images of each
    folder: str | Path,  # finished cells are kept there
    policy: str = "role",
    progress: Callable = iter,
    **options,  # of `measure`
) -> dict[str, list[dict]]:
    """{experiment: rows}: every model x sampling seed x value."""
    grid = [(model, first) for model in models for first in samplings]
    wanted = [(m, s, first) for m, first in grid for settings in experiments.values() for _, s in settings]

    def identity(model, setting, first):
        columns = describe(model, setting, judge, first, num, policy)
        return {k: v for k, v in columns.items() if k not in ("label", "net")} | {"class": options.get("class_idx")}

    def work(model, setting, first):
        return measure(model, setting, judge, range(first, first + num), policy, **options)

    found = cells.run(wanted, work, folder, identity=identity, keep=is_writer(), progress=progress)
    scores, rows = iter(found), {name: [] for name in experiments}
    for model, first in grid:
        for name, settings in experiments.items():
            for value, setting in settings:
                row = describe(model, setting, judge, first, num, policy) | next(scores)
                rows[name].append(row | {"experiment": name, "value": "none" if value is None else value})
    return rows


def summarize(rows: Sequence[dict]) -> dict[str, dict]:
    """{label: {value: (mean, sd, number of training seeds)}}, labels and values in order of appearance.

    Sampling seeds are averaged first. sd: over training seeds, or over sampling seeds where there is one training.
    """
    result = defaultdict(dict)
    for label, nets in _by_training(rows).items():
        first, *others = nets.values()
        for value in first:
            found = [np.mean(net[value]) for net in nets.values()] if others else first[value]
            mean, sd = mean_and_deviation(found)
            result[label][value] = (mean, 0.0 if math.isnan(sd) else sd, len(nets))
    return result


def _by_training(rows: Sequence[dict]) -> dict:
    """{label: {net: {value: distances of the sampling seeds}}}"""
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        found[row["label"]][row["net"]][row["value"]].append(row["fd"])
    return found


X_LABELS = {"alpha": r"injected noise $\alpha$", "steps": "steps of the Heun sampler", "bits": "bits per weight"}


def plot(rows: Sequence[dict], experiment: str, stem: str | Path) -> list[Path]:
    """Frechet distance against the disturbance, one line per label with error bars; writes stem.png and stem.svg."""
    from metrics import figures

    table = summarize(rows)
    fig, axis = figures.figure(width=4.6, height=3.2)
    values = list(next(iter(table.values())))
    numeric = experiment != "bits"
    shades = figures.colours([None] * len(table))
    for index, (label, line) in enumerate(table.items()):
        x = np.array(values, float) if numeric else np.arange(len(values), dtype=float)
        shift = (index - (len(table) - 1) / 2) * 0.012 * (x.max() - x.min() or 1)  # bars side by side
        mean, sd, _ = (np.array(part) for part in zip(*(line[v] for v in values), strict=True))
        axis.errorbar(x + shift, mean, sd, label=label, color=shades[index], marker="o", markersize=3.5, capsize=2)
    if not numeric:
        axis.set_xticks(range(len(values)), [str(v) for v in values])
    means = [mean for line in table.values() for mean, *_ in line.values()]
    if min(means) > 0 and max(means) > 5 * min(means):
        figures.log_y(axis)
    seeds = max(n for line in table.values() for *_, n in line.values())
    axis.set_xlabel(X_LABELS[experiment])
    axis.set_ylabel("Frechet distance")
    axis.legend(title=f"mean ± sd of {seeds} trainings" if seeds > 1 else None)
    return figures.save(fig, stem)


def markdown(rows: Sequence[dict], experiment: str) -> str:
    """A table: a line per label, a column per value, mean ± sd; and the paired comparison where there is one."""
    table = summarize(rows)
    values = list(next(iter(table.values())))
    lines = []
    for label, line in table.items():
        lines.append([label, *(f"{mean:.2f} ± {sd:.2f}" if sd else f"{mean:.2f}" for mean, sd, _ in line.values())])
    text = markdown_table([experiment, *values], lines)
    paired = forgiveness(rows, experiment)
    if paired and len(values) > 1:
        lines = [[label, *(f"{m:+.2f} ± {h:.2f}" for m, h in line.values())] for label, line in paired.items()]
        title = f"Growth by the disturbance, minus that of {list(table)[-1]}"
        text += f"\n\n{title}: mean and 95 % interval over paired trainings\n\n"
        text += markdown_table([experiment, *next(iter(paired.values()))], lines)
    return text


def forgiveness(rows: Sequence[dict], experiment: str) -> dict[str, dict]:
    """{label: {value: (mean, half-width)}}: how much more a label's distance grows by the disturbance than the last label's.

    Growth is against the undisturbed sampler (alpha 0, unrounded weights, the most steps). Paired by training seed, the i-th
    network of a label with the i-th of the last; half-width of the 95 % interval (Student's t). Empty unless all labels
    have equally many trainings, at least two.
    """
    trainings = _by_training(rows)
    counts = {len(nets) for nets in trainings.values()}
    if len(counts) > 1 or counts == {1}:
        return {}
    values = list(dict.fromkeys(row["value"] for row in rows))
    base = "none" if experiment == "bits" else (min if experiment == "alpha" else max)(values)
    growth = {
        label: {v: [np.mean(net[v]) - np.mean(net[base]) for net in nets.values()] for v in values if v != base}
        for label, nets in trainings.items()
    }
    *others, last = growth
    table = {}
    for label in others:
        table[label] = {}
        for value, found in growth[label].items():
            mean, _, low, high = paired_difference(found, growth[last][value])
            table[label][value] = (mean, (high - low) / 2)
    return table


def is_writer() -> bool:
    """Whether this process writes files."""
    return dist.get_rank() == 0
