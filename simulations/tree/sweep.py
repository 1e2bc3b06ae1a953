"""The comparison of data selection on the tree: several arms and seeds, at equal steps, equal samples and equal time."""

import csv
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from dnnlib import atomic_write
from metrics import figures
from simulations.tree import metrics as tree_metrics
from simulations.tree import training as tree_training

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
COUNTS = ["iteration", "samples", "candidates", "cpu_sec"]
COLUMNS = ["loss", "L2_metric", "mandala_score", "classification_score"]
COLUMNS += [f"guided_{name}" for name in COLUMNS[1:]]


def train_reference(base, outdir, total_iter=512, batch_size=4096):
    """The guide: width 32, 512 steps of 4096 points, seed 0 (as published). Returns its snapshot."""
    run_dir = Path(outdir) / "reference"
    config = replace(base, dim=32, total_iter=total_iter, batch_size=batch_size, seed=0, snapshot_iter=0)
    if not list(run_dir.glob("learner-*.safetensors")):
        tree_training.train(config, run_dir)
    return str(sorted(run_dir.glob("network-snapshot-*.safetensors"))[-1])


def train_seed(base, seed, arms, outdir, reference, bar=None):
    """Train all arms of one seed; their points and exact scores are computed once, before. Finished runs are kept."""
    memory = {}
    for arm in arms:
        run_dir = Path(outdir) / f"{arm}-seed{seed}"
        if not list(run_dir.glob("learner-*.safetensors")):
            if not memory:
                tree_training.prepare(replace(base, seed=seed), memory)
            for old in [*run_dir.glob("network-snapshot-*"), *run_dir.glob("stats.jsonl")]:
                old.unlink()  # of an interrupted run
            options = {k: reference if v == "@guide" else v for k, v in ARMS[arm].items()}
            config = replace(base, seed=seed, **options)
            tree_training.train(config, run_dir, tree_metrics.validation_hook(base.cls, 4096, flow=False), memory)
        if bar is not None:
            bar.update()


def history(run_dir):
    """The status lines of a run that have a snapshot, oldest first: dicts of stats.jsonl with `path` added."""
    lines = []
    for text in (Path(run_dir) / "stats.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        found = list(Path(run_dir).glob(f"network-snapshot-{int(line['Progress/kimg']):07d}-*.safetensors"))
        if found and line["Progress/kimg"]:
            lines.append({**line, "path": found[0]})
    return lines


def measure(arms, seeds, outdir, reference, cls="A", num=2048, progress=True):
    """Rows {comparison, arm, seed, iteration, samples, candidates, cpu_sec, metrics ...} of all runs.

    Equal samples and equal time compare the snapshots nearest to what the shortest run of the same seed reached (as
    published, where it is the shortest of all runs): how busy the machine was while a seed ran then does not matter.
    Measured rows are kept in metrics.json beside each run.
    """
    runs = {(arm, seed): history(Path(outdir) / f"{arm}-seed{seed}") for arm in arms for seed in seeds}
    keys = {"steps": "Progress/iteration", "samples": "Progress/kimg", "time": "Timing/cpu_sec"}
    guide = tree_training.load_toy(reference)
    rows = []
    for (arm, seed), lines in tqdm(runs.items(), unit="run", disable=not progress):
        path = Path(outdir) / f"{arm}-seed{seed}" / "metrics.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        for kind, key in keys.items():
            least = min(runs[other, seed][-1][key] for other in arms)
            line = min(lines, key=lambda line: abs(line[key] - least))  # noqa: B023
            name = f"{line['path'].name} n={num}"
            if name not in known:
                net = tree_training.load_toy(line["path"])
                known[name] = tree_metrics.evaluate(net, guide, cls=cls, num=num, external=False)
            rows.append(
                {
                    "comparison": kind,
                    "arm": arm,
                    "seed": seed,
                    "iteration": line["Progress/iteration"],
                    "samples": round(line["Progress/kimg"] * 1e3),
                    "candidates": line["Progress/candidates"],
                    "cpu_sec": line["Timing/cpu_sec"],
                    **known[name],
                }
            )
        with atomic_write(path, "w") as file:
            json.dump(known, file)
    return rows


def write_table(rows, outdir):
    """table.csv (one row per run and comparison) and table.md. Returns their paths.

    table.md has, for each comparison, means ± standard deviations over seeds, and means ± standard errors of the differences
    to the baseline of the same seed, which starts from the same weights and sees the same points.
    """
    outdir = Path(outdir)
    with atomic_write(outdir / "table.csv", "w") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    seeds = len({row["seed"] for row in rows})
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    text = []
    for kind, title in COMPARISONS.items():
        chosen = {arm: [row for row in rows if row["comparison"] == kind and row["arm"] == arm] for arm in arms}
        text += [f"**{title.capitalize()}** (mean ± standard deviation of {seeds} seeds)\n"]
        text += _table(["steps", "trained", "drawn", "CPU s", *map(_heading, COLUMNS)], map(_level, chosen.items()))
        if "baseline" in arms and seeds > 1:
            title = f"{title.capitalize()}: difference to the baseline of the same seed"
            text += [f"**{title}** (mean ± standard error of {seeds} seeds)\n"]
            others = [
                (arm, _differences(mine, chosen["baseline"])) for arm, mine in chosen.items() if arm != "baseline"
            ]
            text += _table(map(_heading, COLUMNS), map(_paired, others))
        if seeds > 1:
            text += [f"**{kind.capitalize()}: guided minus unguided** (mean ± standard error of {seeds} seeds)\n"]
            names = ["mandala_score", "classification_score"]
            gains = [
                (arm, [{n: row[f"guided_{n}"] - row[n] for n in names} for row in mine]) for arm, mine in chosen.items()
            ]
            text += _table(map(_heading, names), map(_paired, gains))
    with atomic_write(outdir / "table.md", "w") as file:
        file.write("\n".join(text))
    return [outdir / "table.csv", outdir / "table.md"]


def _table(headings, lines):
    headings = ["arm", *headings]
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    return [f"| {' | '.join(headings)} |", "| --- " * len(headings) + "|", *rows, ""]


def _level(item):
    arm, rows = item
    stats = tree_metrics.summary([{k: row[k] for k in (*COUNTS, *COLUMNS)} for row in rows])
    counts = [f"{stats['iteration'][0]:.0f}", f"{stats['samples'][0] / 1e3:.0f}k"]
    counts += [f"{stats['candidates'][0] / 1e3:.0f}k", f"{stats['cpu_sec'][0]:.1f}"]
    return [arm, *counts, *(f"{stats[c][0]:.4f} ± {stats[c][1]:.4f}" for c in COLUMNS)]


def _differences(rows, baseline):
    base = {row["seed"]: row for row in baseline}
    return [{c: row[c] - base[row["seed"]][c] for c in COLUMNS} for row in rows]


def _paired(item):
    arm, rows = item
    stats = tree_metrics.summary(rows)
    return [arm, *(f"{m:+.4f} ± {s / math.sqrt(len(rows)):.4f}" for m, s in stats.values())]


def _heading(name):
    return name.replace("_metric", "").replace("_score", "").replace("_", " ")


def plot(rows, arms, seeds, outdir, stem):
    """One figure: loss against trained samples and CPU time, loss at equal samples, and mandala scores in all comparisons."""
    fig, axes = figures.figure(columns=3, rows=2, width=4.4, height=3.1)
    for arm in arms:
        runs = [history(Path(outdir) / f"{arm}-seed{seed}") for seed in seeds]
        steps = min(map(len, runs))
        for axis, key, scale in ((axes[0, 0], "Progress/kimg", 1), (axes[0, 1], "Timing/cpu_sec", 1)):
            x = [_mean([run[i][key] * scale for run in runs])[0] for i in range(steps)]
            y = [_mean([run[i]["Validation/ema_loss"] for run in runs]) for i in range(steps)]
            axis.plot(x, [m for m, _ in y], color=COLOURS[arm], label=arm)
            axis.fill_between(x, [m - s for m, s in y], [m + s for m, s in y], color=COLOURS[arm], alpha=0.15, lw=0)
    for axis, label in ((axes[0, 0], "trained samples (thousands)"), (axes[0, 1], "CPU seconds")):
        axis.set(xlabel=label, ylabel="loss of the averaged network", yscale="log", xscale="log")
    axes[0, 0].legend(fontsize=7)
    panels = [(axes[0, 2], "samples", "loss", "guided_L2_metric")]
    panels += [(axes[1, i], kind, "mandala_score", "guided_mandala_score") for i, kind in enumerate(COMPARISONS)]
    for axis, kind, plain, guided in panels:
        for i, arm in enumerate(arms):
            mine = [row for row in rows if row["comparison"] == kind and row["arm"] == arm]
            for name, shift, marker in ((plain, -0.12, "o"), (guided, 0.12, "^")):
                if name == "guided_L2_metric":
                    continue
                mean, deviation = _mean([row[name] for row in mine])
                face = COLOURS[arm] if name == plain else "white"
                axis.errorbar(
                    [i + (shift if plain != "loss" else 0)], [mean], yerr=[0 if math.isnan(deviation) else deviation],
                    color=COLOURS[arm], marker=marker, markerfacecolor=face, capsize=2, lw=1,
                )  # fmt: skip
        axis.set_xticks(range(len(arms)), arms, rotation=30, ha="right", fontsize=7)
        axis.set(title=COMPARISONS[kind], ylabel="loss" if plain == "loss" else "mandala score (△ guided)")
    low, high = zip(*(axis.get_ylim() for axis in axes[1]), strict=True)
    for axis in axes[1]:  # one scale, so that the comparisons compare
        axis.set_ylim(min(low), max(high))
    return figures.save(fig, stem, dpi=130)


def _mean(values):
    stats = tree_metrics.summary([{"v": v} for v in values])["v"]
    return stats[0], 0.0 if math.isnan(stats[1]) else stats[1]


def _train_in_process(arguments):
    import torch

    torch.set_num_threads(1)
    train_seed(*arguments)


def run(base, arms, seeds, outdir, num=2048, reference_iter=512, reference_batch=4096, figure=None, jobs=1):
    """Train what is missing, measure, write table and figure. Returns the written paths. Raises ValueError for unknown arms."""
    unknown = set(arms) - set(ARMS)
    if unknown:
        raise ValueError(f"--arms={sorted(unknown)[0]} is unknown; known: {', '.join(ARMS)}")
    outdir = Path(outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    reference = train_reference(base, outdir, reference_iter, reference_batch)
    if jobs > 1:
        tasks = [(base, seed, arms, outdir, reference) for seed in seeds]
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(tqdm(pool.map(_train_in_process, tasks), total=len(seeds), unit="seed"))
    else:
        with tqdm(total=len(arms) * len(seeds), unit="run") as bar:
            for seed in seeds:
                train_seed(base, seed, arms, outdir, reference, bar)
    rows = measure(arms, seeds, outdir, reference, base.cls, num)
    paths = write_table(rows, outdir)
    return paths + plot(rows, arms, seeds, outdir, figure or outdir / "selection-tree")
