"""Robustness of trained models: Fréchet distance under injected noise, fewer steps and rounded weights.

PFGM++ (arXiv 2302.04265, sec. 5.3) claims that models with fewer augmented dimensions D forgive more. A cell of the grid is
one snapshot, one sampling seed and one `Setting`; all cells share noise and labels of the same seeds.
"""

import functools
import glob
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dnnlib import cells
from dnnlib.util import one_of
from metrics import figures
from metrics.detectors import get_detector, identity_of
from metrics.evaluate import compare
from metrics.features import collect, collect_dataset, generated_batches
from metrics.references import load_references, require_detectors
from metrics.table import Cell, half_width, paired_difference
from metrics.table import markdown as markdown_table
from torch_utils import distributed as dist
from torch_utils import persistence
from training import fit, processes, quantize, samplers
from training.dataset import ImageFolderDataset
from training.generation import generate_images

X_LABELS = {"alpha": r"injected noise $\alpha$", "steps": "steps of the Heun sampler", "bits": "bits per weight"}


class Setting(NamedTuple):
    """How one cell samples: noise per step, steps of the Heun sampler, bits of the weights (None: as trained)."""

    alpha: float = 0.0
    steps: int = 18
    bits: int | None = None


def settings_of(grid) -> dict[str, list[tuple[float | None, Setting]]]:
    """{experiment: [(value on the x axis, Setting)]} of a run_robustness.Grid; those of "bits" begin with unrounded ones."""
    made = {
        "alpha": [(value, Setting(value, grid.num_steps)) for value in grid.alpha],
        "steps": [(value, Setting(steps=value)) for value in grid.steps],
        "bits": [(value, Setting(0.0, grid.num_steps, value)) for value in (None, *grid.bits)],
    }
    if unknown := [name for name in grid.experiments if name not in made]:
        raise ValueError(f"experiment {unknown[0]!r} {one_of(unknown[0], made)}")
    return {name: made[name] for name in grid.experiments}


@dataclass
class Model:
    """One trained network of the grid; models with the same label differ in their training seed."""

    label: str
    path: str
    snapshot: persistence.Snapshot
    D: float  # of its kernel
    digest: str  # of the file: results of another file of this name are not reused


def open_model(path: str, label: str = "", device: str = "cpu") -> Model:
    """A Model of a snapshot file or run folder, which means its newest one. Default label: D=<D of the snapshot>."""
    snapshot = persistence.load_snapshot(path, device)
    D = processes.aug_dim(snapshot.kernel)
    return Model(label or f"D={D:g}", path, snapshot, D, cells.digest(snapshot.path))


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
        if (data is None) == (ref is None):
            raise ValueError("give either --data or --ref as the reference")
        self.detector = get_detector(detector, device)
        self.identity = identity_of(self.detector)
        self.detectors = {self.identity: self.detector}
        if ref is None:
            self.reference = collect_dataset(ImageFolderDataset(data), self.detectors)[self.identity]
        else:
            self.reference = require_detectors(load_references(ref), self.detectors, ref)[self.identity]
        self.name = f"{Path(data or ref).name}:{self.reference.count()}"
        self.side = self.reference.side(f"--ref={ref}" if data is None else f"--data={data}")


def measure(model: Model, setting: Setting, judge: Judge, first: int, grid, device: str = "cpu") -> dict:
    """Scores of the images of one cell, which exist in memory only: {fd, fd_floor, fd_at_floor_size, agreement}.

    first: seed of the first image. agreement: None where the detector does not classify.
    """
    net, trained = model.snapshot.net, model.snapshot.sources
    batches = generate_images(
        replace(model.snapshot, net=quantize.quantize_weights(net, setting.bits, grid.policy)),
        range(first, first + grid.num), class_idx=grid.class_idx if net.label_dim else None,
        max_batch_size=grid.batch, sampler=samplers.noisy_heun(setting.alpha), num_steps=setting.steps, device=device,
    )  # fmt: skip
    sizes = {"num_sources": judge.reference.num_sources, "num_images": grid.num}
    found = collect(generated_batches(batches), judge.detectors, **sizes)[judge.identity]
    options = dict(detector=judge.detector, per_source=False, measures=("fd",), trained=trained)
    result = compare(found, judge.reference, **options)["overall"]
    return {name: result.get(name) for name in ("fd", "fd_floor", "fd_at_floor_size", "agreement")}


def run_grid(
    models: Sequence[Model], grid, judge: Judge, folder: str | Path, device: str = "cpu"
) -> dict[str, list[dict]]:
    """{experiment: rows}: every model x sampling seed x value. A setting that two experiments share is measured once.

    grid: run_robustness.Grid. Finished cells are kept in `folder`. Raises ValueError for a reference that no model fits.
    """

    for model in models:
        fit.check(judge.side, fit.of_samples("--net", model.snapshot))

    def columns(model, setting, first):
        """Of a row before its scores."""
        rounded = setting.bits is not None
        return {
            "label": model.label, "D": f"{model.D:g}", "net": model.path, "snapshot": model.digest, "sampling": first,
            "num": grid.num, "alpha": setting.alpha, "steps": setting.steps, "nfe": 2 * setting.steps - 1,
            "bits": setting.bits if rounded else "none", "policy": grid.policy if rounded else "none",
            "detector": judge.identity, "reference": judge.name,
        }  # fmt: skip

    wanted = [
        ((model, setting, first), name, value)
        for model in models
        for first in grid.samplings
        for name, settings in settings_of(grid).items()
        for value, setting in settings
    ]

    def identity(*cell):
        return {k: v for k, v in columns(*cell).items() if k not in ("label", "net")} | {"class": grid.class_idx}

    work = lambda model, setting, first: measure(model, setting, judge, first, grid, device)
    todo, writes = [cell for cell, *_ in wanted], dist.get_rank() == 0
    progress = functools.partial(tqdm, unit="cell", disable=not writes)
    how = dict(identity=identity, keep=writes, progress=progress, looked=dist.barrier)
    found = cells.run(todo, work, folder, **how)
    rows = defaultdict(list)
    for (cell, name, value), scores in zip(wanted, found, strict=True):
        row = columns(*cell) | scores | {"experiment": name, "value": value}
        rows[name].append({k: "none" if v is None else v for k, v in row.items()})
    return rows


def _cells(rows: Sequence[dict]) -> dict[str, dict[object, Cell]]:
    """{label: {value: its Fréchet distances}} in order of appearance; the networks of a label are its training seeds."""
    nets, table = list(dict.fromkeys(row["net"] for row in rows)), defaultdict(lambda: defaultdict(Cell))
    for row in rows:
        table[row["label"]][row["value"]].values[nets.index(row["net"]), row["sampling"]] = row["fd"]
    return table


def summarize(rows: Sequence[dict]) -> dict[str, dict]:
    """{label: {value: (mean, sd, number of training seeds)}} of the Fréchet distance.

    Sampling seeds are averaged first. sd: over training seeds, or over sampling seeds where there is one training.
    """

    def numbers(cell):
        sd = cell.sd_sampling if cell.sd_training is None else cell.sd_training
        return cell.mean, sd or 0.0, len(cell.by_seed())

    return {label: {value: numbers(cell) for value, cell in line.items()} for label, line in _cells(rows).items()}


def plot(rows: Sequence[dict], experiment: str, stem: str | Path) -> list[Path]:
    """Fréchet distance against the disturbance, one line per label with error bars; writes stem.png and stem.svg.

    Beside it, where trainings are paired, how much more each label's distance grows than the last label's (`forgiveness`).
    """
    table, paired = _cells(rows), forgiveness(rows, experiment)
    fig, axes = figures.figure(columns=1 + bool(paired), width=4.6, height=3.2, squeeze=False)
    axis = axes[0, 0]
    point = lambda cell: (cell.mean, half_width(cell.by_seed().values()))
    _lines(axis, {label: [*map(point, line.values())] for label, line in table.items()}, table, experiment)
    means = [cell.mean for line in table.values() for cell in line.values()]
    if min(means) > 0 and max(means) > 5 * min(means):
        figures.log_y(axis)
    axis.set(ylabel=figures.TITLES["fd"])
    figures.legend(axis)
    if paired:
        plot_growth(axes[0, 1], paired, list(table)[-1], experiment)
    return figures.save(fig, stem)


def plot_growths(found: dict[str, Sequence[dict]], stem: str | Path) -> list[Path]:
    """`plot_growth` of all experiments {name: rows} whose trainings are paired, side by side; no file without any."""
    paired = {name: line for name, rows in found.items() if (line := forgiveness(rows, name))}
    if not paired:
        return []
    fig, axes = figures.figure(columns=len(paired), width=3.6, height=3.2, squeeze=False)
    for axis, (name, line) in zip(axes[0], paired.items(), strict=True):
        plot_growth(axis, line, list(_cells(found[name]))[-1], name)
    return figures.save(fig, stem)


def plot_growth(axis, paired: dict[str, dict], last: str, experiment: str) -> None:
    """Draw what `forgiveness` finds, with its 95 % intervals; below zero a label takes less damage than `last`."""
    _lines(axis, {label: list(line.values()) for label, line in paired.items()}, paired, experiment)
    axis.axhline(0, color=figures.NEUTRAL, linewidth=0.7)
    axis.set(ylabel=f"growth of {figures.TITLES['fd']}\nminus that of {last}")
    figures.legend(axis, title=f"paired mean, {figures.INTERVAL}")


def _lines(axis, lines, table, experiment):
    """Means with bars [(mean, half)] of every label over the disturbances of a table, side by side."""
    values = list(next(iter(table.values())))
    x = np.arange(len(values), dtype=float) if experiment == "bits" else np.array(values, float)
    for index, (look, (label, points)) in enumerate(zip(figures.ordered(list(lines)), lines.items(), strict=True)):
        shift = (index - (len(lines) - 1) / 2) * 0.012 * (x.max() - x.min() or 1)
        means, halves = zip(*points, strict=True)
        figures.intervals(axis, x + shift, means, halves, label=label, markersize=4, **look)
    if experiment == "bits":
        axis.set_xticks(x, [str(value) for value in values])
    else:
        figures.x_ticks(axis, sorted(values))
    axis.set(xlabel=X_LABELS[experiment])


def markdown(rows: Sequence[dict], experiment: str) -> str:
    """A table: a line per label, a column per value, mean ± sd; and the paired comparison where there is one."""
    table = summarize(rows)
    lines = [
        [label, *(f"{mean:.2f} ± {sd:.2f}" if sd else f"{mean:.2f}" for mean, sd, _ in line.values())]
        for label, line in table.items()
    ]
    text = markdown_table([experiment, *next(iter(table.values()))], lines)
    if paired := forgiveness(rows, experiment):
        lines = [[label, *(f"{m:+.2f} ± {h:.2f}" for m, h in line.values())] for label, line in paired.items()]
        title = f"Growth by the disturbance, minus that of {list(table)[-1]}"
        text += f"\n\n{title}: mean and 95 % interval over paired trainings\n\n"
        text += markdown_table([experiment, *next(iter(paired.values()))], lines)
    return text


def forgiveness(rows: Sequence[dict], experiment: str) -> dict[str, dict]:
    """{label: {value: (mean, half-width)}}: how much more a label's distance grows by the disturbance than the last label's.

    Growth is against the undisturbed sampler (alpha 0, unrounded weights, the most steps). Paired by training seed, the i-th
    network of a label with the i-th of the last; half-width of the 95 % interval (Student's t). Empty unless all labels
    have equally many trainings, at least two, and there are several values.
    """
    table = _cells(rows)
    *others, last = table
    counts, values = {len(cell.by_seed()) for line in table.values() for cell in line.values()}, list(table[last])
    if len(counts) > 1 or counts == {1} or len(values) == 1:
        return {}
    base = "none" if experiment == "bits" else (min if experiment == "alpha" else max)(values)

    def growth(label, value):
        pairs = zip(table[label][value].by_seed().values(), table[label][base].by_seed().values(), strict=True)
        return [disturbed - undisturbed for disturbed, undisturbed in pairs]

    def compared(label, value):
        mean, _, low, high = paired_difference(growth(label, value), growth(last, value))
        return mean, (high - low) / 2

    return {label: {value: compared(label, value) for value in values if value != base} for label in others}
