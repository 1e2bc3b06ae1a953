"""The comparison of data selection on the tree: several arms and seeds, at equal steps, equal samples and equal time."""

from __future__ import annotations

import functools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import fmean

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
    "iajest": {"select": "jest", "inverted": True, "guide": "@guide"},  # inverted: the least learnable points
}
NAMES = {
    "baseline": "all points",
    "jest": "JEST",
    "ajest": "AJEST",
    "early-ajest": "early AJEST",
    "late-ajest": "late AJEST",
    "iajest": "iAJEST",
}
LOOKS = dict(zip(ARMS, figures.look(list(ARMS)), strict=True))
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
        steps, trained, drawn, cpu = (fmean(row[name] for row in rows) for name in COUNTS)
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
    """Small multiples: the loss of every arm against trained samples and against CPU time, the baseline's in grey behind;
    below, loss and mandala score at the end of every comparison. Means over seeds with 95 % intervals.
    """
    curves = {arm: list(zip(*(history(outdir / f"{arm}-seed{seed}") for seed in seeds), strict=False)) for arm in arms}
    panels, counts = [arm for arm in arms if arm != "baseline"] or arms, len(COMPARISONS)
    rows_of_panels = [(len(panels), 2.2), (len(panels), 2.1), (counts, 2.3), (counts, 2.3)]
    fig, (by_samples, by_time, losses, mandalas) = figures.stacked(rows_of_panels, max(7.5, 1.9 * len(panels)))
    for line, key, unit in ((by_samples, "Progress/kimg", 1000), (by_time, "Timing/cpu_sec", 1)):
        for axis, arm in zip(line, panels, strict=True):
            shown = {name: curves[name] for name in ("baseline", arm) if name in curves}
            for name, moments in shown.items():  # as far as the shortest run
                look = {"color": figures.NEUTRAL, "linestyle": "--"} if name != arm else LOOKS[arm] | {"marker": ""}
                x = [fmean(found[key] / unit for found in moment) for moment in moments]
                y, _, low, high = np.transpose([mean_interval(m["Validation/ema_loss"] for m in ms) for ms in moments])
                axis.plot(x, y, **look, label=None if name == arm else NAMES[name])
                figures.band(axis, x, low, high, color=look["color"])
            figures.log_x(
                axis, [found[key] / unit for moments in shown.values() for moment in moments for found in moment]
            )
        line[0].set(ylabel="loss of the average")
        figures.log_y(line[0])
    for axis, arm in zip(by_samples, panels, strict=True):
        axis.set_title(NAMES.get(arm, arm))
    by_samples[len(panels) // 2].set_xlabel("trained samples (millions)")
    by_time[len(panels) // 2].set_xlabel("CPU time (s)")
    low, high = by_samples[0].get_ylim()
    by_samples[0].set_ylim(low * (low / high) ** 0.5, high)  # room for the legend
    figures.legend(by_samples[-1], loc="lower left")
    _ends(losses, rows, arms, ("loss",))
    _ends(mandalas, rows, arms, ("mandala_score", "guided_mandala_score"))
    losses[0].set_ylabel("loss")
    mandalas[0].set_ylabel("mandala score")
    low, high = mandalas[0].get_ylim()
    mandalas[0].set_ylim(low - 0.5 * (high - low), high)  # room for the legend
    figures.legend(mandalas[0], loc="lower left")
    return figures.save(fig, stem, dpi=150)


def _ends(line, rows, arms, columns):
    """Scores of every arm in every comparison, side by side where there are several."""
    for axis, kind in zip(line, COMPARISONS, strict=True):
        for i, name in enumerate(columns):
            found = [mean_interval(row[name] for row in _of(rows, kind, arm)) for arm in arms]
            y, half = [mean for mean, *_ in found], [mean - low for mean, _, low, _ in found]
            x = np.arange(len(arms)) + 0.24 * (i - (len(columns) - 1) / 2)
            style = {"color": figures.PALETTE[i], "marker": figures.MARKERS[i], "linestyle": "none"}
            label = ("guided" if name.startswith("guided") else "not guided") if len(columns) > 1 else None
            figures.intervals(axis, x, y, half, markersize=4, label=label, **style)
        names = [NAMES.get(arm, arm) for arm in arms]
        axis.set_xticks(range(len(arms)), names, **figures.slanted(names, 3), fontsize=8)
        axis.set(title=COMPARISONS[kind], xlim=(-0.5, len(arms) - 0.5))


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
