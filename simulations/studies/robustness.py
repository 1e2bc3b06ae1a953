"""Robustness of trained models: Frechet distance under injected noise, fewer steps and rounded weights.

PFGM++ (arXiv 2302.04265, sec. 5.3) claims that models with fewer augmented dimensions D forgive more. A cell of the grid is
one snapshot, one sampling seed and one `Setting`; all cells share noise and labels of the same seeds.
"""

import glob
import hashlib
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from metrics.detectors import get_detector, identity_of
from metrics.evaluate import compare
from metrics.features import collect, collect_dataset, generated_batches
from metrics.references import load_references, require_detectors
from torch_utils import distributed as dist
from torch_utils import persistence
from training import quantize, samplers
from training.generation import generate_images

# The values of the paper; 0 and None are the undisturbed sampler.
ALPHAS = (0, 0.1, 0.2)
STEPS = (10, 12, 14, 16, 18, 20, 22, 24)
BITS = (9, 8, 7, 6, 5)
NUM_STEPS = 18


class Setting(NamedTuple):
    """How one cell samples: noise per step, steps of the Heun sampler, bits of the weights (None: as trained)."""

    alpha: float = 0.0
    steps: int = NUM_STEPS
    bits: int | None = None


def settings_of(experiment, alphas=ALPHAS, steps=STEPS, bits=BITS, num_steps=NUM_STEPS):
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
    def D(self):
        return getattr(self.kernel, "D", math.inf)


def open_model(text, device="cpu"):
    """A Model from "LABEL=SNAPSHOT" or "SNAPSHOT" (label D=<D of the snapshot>); a run folder means its newest one."""
    label, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        label, path = None, text
    snapshot = persistence.load_snapshot(path, device)
    kernel = snapshot.process if hasattr(snapshot.process, "unit_noise") else None
    digest = "sha256:" + hashlib.sha256(Path(persistence.resolve(path)).read_bytes()).hexdigest()[:12]
    model = Model(label, str(path), snapshot.net, snapshot.encoder, kernel, digest)
    model.label = label or f"D={model.D:g}"
    return model


def open_models(texts, device="cpu"):
    """Models of several texts as `open_model` takes them, whose path may be a pattern; those of one pattern by D."""
    models = []
    for text in texts:
        label, equals, path = text.partition("=")
        if not equals or Path(text).exists() or glob.glob(text):
            label, path = "", text
        paths = sorted(glob.glob(path)) or [path]
        found = [open_model(f"{label}={p}" if label else p, device) for p in paths]
        models += sorted(found, key=lambda model: model.D)
    return models


class Judge:
    """A detector and the reference features that all cells are compared with. Give either data or ref."""

    def __init__(self, detector, data=None, ref=None, device="cpu"):
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

    def score(self, batches, num_images):
        """{fd, fd_floor, fd_at_floor_size, agreement} of generated batches; agreement where the detector classifies."""
        found = collect(
            generated_batches(batches),
            {self.identity: self.detector},
            num_sources=self.reference.num_sources,
            num_images=num_images,
        )[self.identity]
        result = compare(found, self.reference, detector=self.detector, per_source=False, measures=("fd",))["overall"]
        return {name: result.get(name) for name in ("fd", "fd_floor", "fd_at_floor_size", "agreement")}


def measure(model, setting, judge, seeds, policy="role", class_idx="balanced", batch=256, device="cpu"):
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


KEY = ("label", "snapshot", "sampling", "num", "alpha", "steps", "bits", "policy", "detector", "reference")


def key_of(row):
    """What a row measured, in a form that survives a CSV file."""
    return tuple(str(row[name]) for name in KEY)


def describe(model, setting, judge, first, num, policy):
    """The columns of a row before its scores."""
    return {
        "label": model.label, "D": f"{model.D:g}", "net": model.path, "snapshot": model.digest, "sampling": first, "num": num,
        "alpha": setting.alpha, "steps": setting.steps, "nfe": 2 * setting.steps - 1,
        "bits": "none" if setting.bits is None else setting.bits,
        "policy": "none" if setting.bits is None else policy, "detector": judge.identity, "reference": judge.name,
    }  # fmt: skip


def run_grid(models, experiments, judge, samplings, num, known=(), on_row=None, policy="role", **options):
    """{experiment: rows}: every model x sampling seed x value; a setting that two experiments share is measured once.

    experiments: {name: [(value, Setting)]}; samplings: first seeds, `num` images each; known: rows of earlier runs, reused
    where they measured the same; on_row: called with {experiment: rows so far} after every new cell. options: of `measure`.
    """
    done = {key_of(row): row for row in known}
    rows = {name: [] for name in experiments}
    for model in models:
        for first in samplings:
            for name, settings in experiments.items():
                for value, setting in settings:
                    row = describe(model, setting, judge, first, num, policy)
                    fresh = key_of(row) not in done
                    if fresh:
                        seeds = range(first, first + num)
                        done[key_of(row)] = row | measure(model, setting, judge, seeds, policy, **options)
                    value = "none" if value is None else value
                    rows[name].append({**done[key_of(row)], **row, "experiment": name, "value": value})
                    if on_row is not None:
                        on_row(rows, fresh)
    return rows


def summarize(rows, column="fd"):
    """{label: {value: (mean, sd, number of training seeds)}}, labels and values in order of appearance.

    Sampling seeds are averaged first. sd: over training seeds, or over sampling seeds where there is one training.
    """
    table = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        table[row["label"]][row["value"]][row["net"]].append(row[column])
    result = {}
    for label, values in table.items():
        result[label] = {}
        for value, nets in values.items():
            found = [np.mean(v) for v in nets.values()] if len(nets) > 1 else next(iter(nets.values()))
            sd = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
            result[label][value] = (float(np.mean(found)), sd, len(nets))
    return result


X_LABELS = {
    "alpha": r"injected noise $\alpha$",
    "steps": "steps of the Heun sampler",
    "bits": "bits per weight",
}


def plot(rows, experiment, stem):
    """Frechet distance against the disturbance, one line per label with error bars; writes stem.png and stem.svg."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    from metrics import figures

    table = summarize(rows)
    fig, axis = figures.figure(width=4.6, height=3.2)
    values = list(next(iter(table.values())))
    numeric = experiment != "bits"
    shades = [figures.plt.get_cmap("viridis")(x) for x in np.linspace(0, 0.85, len(table))]
    for index, (label, line) in enumerate(table.items()):
        x = np.array(values, float) if numeric else np.arange(len(values), dtype=float)
        shift = (index - (len(table) - 1) / 2) * 0.012 * (x.max() - x.min() or 1)  # bars side by side
        mean, sd, _ = (np.array(part) for part in zip(*(line[v] for v in values), strict=True))
        axis.errorbar(x + shift, mean, sd, label=label, color=shades[index], marker="o", markersize=3.5, capsize=2)
    if not numeric:
        axis.set_xticks(range(len(values)), [str(v) for v in values])
    means = [mean for line in table.values() for mean, *_ in line.values()]
    if min(means) > 0 and max(means) > 5 * min(means):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    seeds = max(n for line in table.values() for *_, n in line.values())
    axis.set_xlabel(X_LABELS[experiment])
    axis.set_ylabel("Frechet distance")
    axis.legend(title=f"mean ± sd of {seeds} trainings" if seeds > 1 else None)
    return figures.save(fig, stem)


def markdown(rows, experiment):
    """A table: a line per label, a column per value, mean ± sd."""
    table = summarize(rows)
    values = list(next(iter(table.values())))
    lines = [f"| {experiment} | " + " | ".join(str(v) for v in values) + " |", "| --- " * (len(values) + 1) + "|"]
    for label, line in table.items():
        cells = [f"{mean:.2f} ± {sd:.2f}" if sd else f"{mean:.2f}" for mean, sd, _ in (line[v] for v in values)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    paired = forgiveness(rows, experiment)
    if paired and len(values) > 1:
        title = (
            f"Growth by the disturbance, minus that of {list(table)[-1]}: mean and 95 % interval over paired trainings"
        )
        lines += ["", title, "", f"| {experiment} | " + " | ".join(map(str, next(iter(paired.values())))) + " |"]
        lines += ["| --- " * len(values) + "|"]
        for label, line in paired.items():
            lines.append(f"| {label} | " + " | ".join(f"{m:+.2f} ± {h:.2f}" for m, h in line.values()) + " |")
    return "\n".join(lines)


def forgiveness(rows, experiment, column="fd"):
    """{label: {value: (mean, half-width)}}: how much more a label's distance grows by the disturbance than the last label's.

    Growth is against the undisturbed sampler (alpha 0, unrounded weights, the most steps). Paired by training seed, the i-th
    network of a label with the i-th of the last; half-width of the 95 % interval (Student's t). Empty unless all labels
    have equally many trainings, at least two.
    """
    from scipy import stats

    means = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        means[row["label"]][row["net"]][row["value"]].append(row[column])
    values = list(dict.fromkeys(row["value"] for row in rows))
    base = "none" if experiment == "bits" else (min if experiment == "alpha" else max)(values)
    growth = {
        label: np.array([[np.mean(net[v]) - np.mean(net[base]) for v in values] for net in nets.values()])
        for label, nets in means.items()
    }  # [trainings, values]
    last = list(growth)[-1]
    n = len(growth[last])
    if n < 2 or any(len(found) != n for found in growth.values()):
        return {}
    table = {}
    for label in list(growth)[:-1]:
        difference = growth[label] - growth[last]
        half = stats.t.ppf(0.975, n - 1) * difference.std(axis=0, ddof=1) / math.sqrt(n)
        pairs = zip(values, difference.mean(axis=0), half, strict=True)
        table[label] = {v: (float(m), float(h)) for v, m, h in pairs if v != base}
    return table


def is_writer():
    """Whether this process writes files."""
    return dist.get_rank() == 0
