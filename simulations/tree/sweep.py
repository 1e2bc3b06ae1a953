"""The comparison of data selection on the tree: several arms and seeds, at equal steps, equal samples and equal time."""

from __future__ import annotations

import functools
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dnnlib import cells
from dnnlib.util import one_of, read_stats, write_text
from metrics import figures
from metrics.table import markdown, mean_and_deviation, mean_interval, write_csv
from simulations.configs import TreeConfig
from simulations.tree import metrics as tree_metrics
from simulations.tree import training as tree_training
from torch_utils import persistence

# What differs between the arms (Pais et al. 2025; `diverse` is ours). "@guide" stands for the reference network.
ARMS = {
    "baseline": {},
    "random": {"select": "random"},
    "jest": {"select": "jest"},  # the reference is the learner's own average
    "ajest": {"select": "jest", "guide": "@guide"},
    "early-ajest": {"select": "jest", "guide": "@guide", "when": "early"},
    "late-ajest": {"select": "jest", "guide": "@guide", "when": "late"},
    "diverse": {"select": "diverse", "guide": "@guide"},
}
COLOURS = dict(zip(ARMS, ("#222222", "#888888", "#C4A000", "#D9730D", "#3C8F3A", "#2B6CB0", "#9B2F8F"), strict=True))
COMPARISONS = {"steps": "equal steps", "samples": "equal trained samples", "time": "equal CPU time"}
KEYS = {"steps": "Progress/iteration", "samples": "Progress/kimg", "time": "Timing/cpu_sec"}  # in stats.jsonl
COUNTS = ("iteration", "samples", "candidates", "cpu_sec")
SCORES = ["mandala_score", "classification_score"]
COLUMNS = ["loss", "L2_metric", *SCORES, "guided_L2_metric", *(f"guided_{name}" for name in SCORES)]


def _finished(run_dir: Path) -> bool:
    """Whether a run is complete; what an interrupted one left is removed."""
    if list(run_dir.glob("learner-*.safetensors")):
        return True
    for old in [*run_dir.glob("network-snapshot-*"), *run_dir.glob("stats.jsonl")]:
        old.unlink()
    return False


def train_reference(base: TreeConfig, outdir: Path, total_iter: int = 512, batch_size: int = 4096) -> str:
    """The guide: width 32, 512 steps of 4096 points, seed 0 (as published). Returns its snapshot."""
    run_dir = outdir / "reference"
    if not _finished(run_dir):
        size = dict(dim=32, total_iter=total_iter, batch_size=batch_size)
        tree_training.train(replace(base, **size, seed=0, snapshot_iter=0), run_dir)
    return str(sorted(run_dir.glob("network-snapshot-*.safetensors"))[-1])


def train_seed(base: TreeConfig, seed: int, arms: list[str], outdir: Path, reference: str, bar=None) -> None:
    """Train all arms of one seed; their points and exact scores are computed once, before. Finished runs are kept."""
    memory = {}
    for arm in arms:
        run_dir = outdir / f"{arm}-seed{seed}"
        if not _finished(run_dir):
            if not memory:
                tree_training.prepare(replace(base, seed=seed), memory)
            options = {k: reference if v == "@guide" else v for k, v in ARMS[arm].items()}
            hook = tree_metrics.validation_hook(tree_metrics.Points(base.cls, 4096), flow=False)
            tree_training.train(replace(base, seed=seed, **options), run_dir, hook, memory)
        if bar is not None:
            bar.update()


def history(run_dir: Path) -> list[dict]:
    """The status lines of a run that have a snapshot, oldest first: dicts of stats.jsonl with `path` added."""
    lines = []
    for line in read_stats(run_dir):
        found = list(run_dir.glob(f"network-snapshot-{int(line['Progress/kimg']):07d}-*.safetensors"))
        if found and line["Progress/kimg"]:
            lines.append({**line, "path": found[0]})
    return lines


def measure(
    arms: list[str], seeds: list[int], outdir: Path, reference: str, cls: str = "A", num: int = 2048, progress=iter
) -> list[dict]:
    """Rows {comparison, arm, seed, iteration, samples, candidates, cpu_sec, metrics ...} of all runs.

    Equal samples and equal time compare the snapshots nearest to what the shortest run of the same seed reached (as
    published, where it is the shortest of all runs): how busy the machine was while a seed ran then does not matter.
    """
    runs = {(arm, seed): history(outdir / f"{arm}-seed{seed}") for arm in arms for seed in seeds}
    rows, paths = [], []
    for (arm, seed), lines in runs.items():
        for kind, key in KEYS.items():
            least = min(runs[other, seed][-1][key] for other in arms)
            line = min(lines, key=lambda line: abs(line[key] - least))  # noqa: B023
            counts = {"iteration": line["Progress/iteration"], "samples": round(line["Progress/kimg"] * 1e3)}
            counts |= {"candidates": line["Progress/candidates"], "cpu_sec": line["Timing/cpu_sec"]}
            rows.append({"comparison": kind, "arm": arm, "seed": seed, **counts})
            paths.append((line["path"],))
    guide, digest = tree_training.load_toy(reference), cells.digest(persistence.resolve(reference))
    found = cells.run(
        paths,
        lambda path: tree_metrics.evaluate(tree_training.load_toy(path), tree_metrics.Points(cls, num), guide),
        outdir / "cells",
        identity=lambda path: [cells.digest(path), digest, cls, num],
        progress=progress,
    )
    return [row | scores for row, scores in zip(rows, found, strict=True)]


def write_table(rows: list[dict], outdir: Path) -> list[Path]:
    """table.csv (one row per run and comparison) and table.md. Returns their paths.

    table.md has, for each comparison, means ± standard deviations over seeds, and means with 95 % intervals (Student's t) of
    the differences to the baseline of the same seed, which starts from the same weights and sees the same points.
    """
    seeds = len({row["seed"] for row in rows})
    deviation, interval = (
        f"(mean ± standard deviation of {seeds} seeds)",
        f"(mean and 95 % interval over {seeds} seeds)",
    )
    text = []
    for kind, title in COMPARISONS.items():
        chosen = {row["arm"]: _of(rows, kind, row["arm"]) for row in rows}
        text += [f"**{title.capitalize()}** {deviation}", _levels(chosen)]
        if "baseline" in chosen and seeds > 1:
            base = {row["seed"]: row for row in chosen["baseline"]}
            others = {arm: mine for arm, mine in chosen.items() if arm != "baseline"}
            text += [f"**{title.capitalize()}: difference to the baseline of the same seed** {interval}"]
            text += [_paired(others, COLUMNS, lambda row, name: row[name] - base[row["seed"]][name])]  # noqa: B023
        if seeds > 1:
            text += [f"**{kind.capitalize()}: guided minus unguided** {interval}"]
            text += [_paired(chosen, SCORES, lambda row, name: row[f"guided_{name}"] - row[name])]
    files = [write_csv(outdir / "table.csv", rows)]
    return [*files, write_text(outdir / "table.md", "\n\n".join(text) + "\n")]


def _of(rows, kind, arm):
    return [row for row in rows if (row["comparison"], row["arm"]) == (kind, arm)]


def _levels(chosen):
    """A line per arm: what it took, and its scores with standard deviations."""
    lines = []
    for arm, rows in chosen.items():
        steps, trained, drawn, cpu = (_mean(row[name] for row in rows)[0] for name in COUNTS)
        counts = [f"{steps:.0f}", f"{trained / 1e3:.0f}k", f"{drawn / 1e3:.0f}k", f"{cpu:.1f}"]
        scores = [mean_and_deviation(row[name] for row in rows) for name in COLUMNS]
        lines.append([arm, *counts, *(f"{mean:.4f} ± {deviation:.4f}" for mean, deviation in scores)])
    return markdown(["arm", "steps", "trained", "drawn", "CPU s", *map(_heading, COLUMNS)], lines)


def _paired(chosen, names, difference):
    """A line per arm: means of difference(row, name) with their 95 % intervals."""
    lines = []
    for arm, rows in chosen.items():
        found = [mean_interval(difference(row, name) for row in rows) for name in names]
        lines.append([arm, *(f"{mean:+.4f} ({low:.4f} to {high:.4f})" for mean, _, low, high in found)])
    return markdown(["arm", *map(_heading, names)], lines)


def _heading(name):
    return name.replace("_metric", "").replace("_score", "").replace("_", " ")


def plot(rows: list[dict], arms: list[str], seeds: list[int], outdir: Path, stem: str | Path) -> list[Path]:
    """One figure: loss against trained samples and CPU time, loss at equal samples, and mandala scores in all comparisons."""
    fig, axes = figures.figure(columns=3, rows=2, width=4.4, height=3.1)
    for arm in arms:
        runs = [history(outdir / f"{arm}-seed{seed}") for seed in seeds]
        moments = list(zip(*runs, strict=False))  # as far as the shortest run
        y, spread = np.array([_mean(line["Validation/ema_loss"] for line in lines) for lines in moments]).T
        for axis, key in ((axes[0, 0], "Progress/kimg"), (axes[0, 1], "Timing/cpu_sec")):
            x = [_mean(line[key] for line in lines)[0] for lines in moments]
            axis.plot(x, y, color=COLOURS[arm], label=arm)
            axis.fill_between(x, y - spread, y + spread, color=COLOURS[arm], alpha=0.15, lw=0)
    for axis, label in ((axes[0, 0], "trained samples (thousands)"), (axes[0, 1], "CPU seconds")):
        axis.set(xlabel=label, ylabel="loss of the averaged network", yscale="log", xscale="log")
    axes[0, 0].legend(fontsize=7)
    scores = [("mandala_score", -0.12, "o"), ("guided_mandala_score", 0.12, "^")]
    panels = [(axes[0, 2], "samples", "loss", [("loss", 0, "o")])]
    panels += [(axes[1, i], kind, "mandala score (△ guided)", scores) for i, kind in enumerate(COMPARISONS)]
    for axis, kind, label, series in panels:
        for i, arm in enumerate(arms):
            for name, shift, marker in series:
                mean, deviation = _mean(row[name] for row in _of(rows, kind, arm))
                face = "white" if name.startswith("guided") else COLOURS[arm]
                style = dict(color=COLOURS[arm], marker=marker, markerfacecolor=face, capsize=2, lw=1)
                axis.errorbar([i + shift], [mean], yerr=[deviation], **style)
        axis.set_xticks(range(len(arms)), arms, rotation=30, ha="right", fontsize=7)
        axis.set(title=COMPARISONS[kind], ylabel=label)
    low, high = zip(*(axis.get_ylim() for axis in axes[1]), strict=True)
    for axis in axes[1]:  # one scale, so that the comparisons compare
        axis.set_ylim(min(low), max(high))
    return figures.save(fig, stem, dpi=130)


def _mean(values):
    """Mean and standard deviation, 0 for a single value."""
    mean, deviation = mean_and_deviation(values)
    return mean, 0.0 if math.isnan(deviation) else deviation


def run(
    base: TreeConfig,
    arms: list[str],
    seeds: list[int],
    outdir: str | Path,
    num: int = 2048,
    reference_iter: int = 512,
    reference_batch: int = 4096,
    figure: str | None = None,
    jobs: int = 1,
) -> list[Path]:
    """Train what is missing, measure, write table and figure. Returns the written paths. Raises ValueError for unknown arms."""
    unknown = set(arms) - set(ARMS)
    if unknown:
        raise ValueError(f"--arms={min(unknown)} {one_of(min(unknown), ARMS)}")
    outdir = Path(outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    reference = train_reference(base, outdir, reference_iter, reference_batch)
    train = functools.partial(train_seed, base, arms=arms, outdir=outdir, reference=reference)
    if jobs > 1:
        context, threads = multiprocessing.get_context("spawn"), dict(initializer=torch.set_num_threads, initargs=(1,))
        with ProcessPoolExecutor(jobs, context, **threads) as pool:
            list(tqdm(pool.map(train, seeds), total=len(seeds), unit="seed"))
    else:
        with tqdm(total=len(arms) * len(seeds), unit="run") as bar:
            for seed in seeds:
                train(seed, bar=bar)
    rows = measure(arms, seeds, outdir, reference, base.cls, num, lambda todo: tqdm(todo, unit="network"))
    paths = write_table(rows, outdir)
    return paths + plot(rows, arms, seeds, outdir, figure or outdir / "selection-tree")
