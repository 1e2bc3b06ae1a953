"""One table, its verdict and a figure from the score files of two arms on the same sources."""

import csv
import io

import numpy as np

from metrics.results import COLUMNS, collect, read_scores, sources_of, theory_ratio, verdict


def to_csv(cells, arms, sources):
    """The table as CSV text: one line per source and arm with mean and spreads, then the mean over sources."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [c for c in COLUMNS if any((a, s, c) in cells for a in arms for s in sources)]
    writer.writerow(
        ["source", "arm", *(f"{n}{suffix}" for n in names for suffix in ("", "_sd_training", "_sd_sampling"))]
    )
    for source in [*sources, "mean"]:
        for arm in arms:
            row = [source, arm]
            for name in names:
                if source == "mean":
                    found = [cells[arm, s, name] for s in sources if (arm, s, name) in cells]
                    spreads = (_mean([c.sd_training for c in found]), _mean([c.sd_sampling for c in found]))
                    values = (_mean([c.mean for c in found]), *spreads)
                else:
                    cell = cells.get((arm, source, name))
                    values = (None,) * 3 if cell is None else (cell.mean, cell.sd_training, cell.sd_sampling)
                row.extend("" if v is None else f"{v:.6g}" for v in values)
            writer.writerow(row)
    return out.getvalue()


def _mean(values):
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


def _pm(cell, digits=2, percent=False):
    if cell is None:
        return ""
    scale, unit = (100, " %") if percent else (1, "")
    text = f"{cell.mean * scale:.{digits}f}"
    if cell.sd_training is not None:
        text += f" +- {cell.sd_training * scale:.{digits}f}"
    return text + unit


def to_markdown(cells, arms, sources, verdicts, notes=()):
    """The table as Markdown: per source and mean, FD and agreement of both arms, floor, nearest neighbours, verdict."""
    a, b = arms[:2]
    lines = [
        f"| source | FD {a} | FD {b} | advantage | floor* | FD {a}* | FD {b}* | agreement {a} | agreement {b} | real |"
        f" nearest train {a} | {b} | held-out |",
        "|" + " --- |" * 13,
    ]
    main = verdicts[0]
    for s in sources:

        def get(arm, name, s=s):
            return cells.get((arm, s, name))

        lines.append(
            f"| {s} | {_pm(get(a, 'fd'))} | {_pm(get(b, 'fd'))} | {main.per_source[s]:.1%} "
            f"| {_number(get(a, 'fd_floor'))} | {_number(get(a, 'fd_at_floor_size'))} | {_number(get(b, 'fd_at_floor_size'))} "
            f"| {_pm(get(a, 'agreement'), 1, True)} | {_pm(get(b, 'agreement'), 1, True)} "
            f"| {_number(get(a, 'agreement_reference'), 1, True)} "
            f"| {_number(get(a, 'nearest_train'))} | {_number(get(b, 'nearest_train'))} "
            f"| {_number(get(a, 'nearest_train_reference'))} |"
        )
    means = {
        (arm, n): _mean([cells[arm, s, n].mean for s in sources if (arm, s, n) in cells])
        for arm in arms
        for n in COLUMNS
    }

    def mean(arm, name, digits=2, percent=False):
        value = means.get((arm, name))
        return "" if value is None else f"{value * (100 if percent else 1):.{digits}f}" + (" %" if percent else "")

    lines.append(
        f"| mean | {mean(a, 'fd')} | {mean(b, 'fd')} | {main.advantage:.1%} | {mean(a, 'fd_floor')} "
        f"| {mean(a, 'fd_at_floor_size')} | {mean(b, 'fd_at_floor_size')} | {mean(a, 'agreement', 1, True)} "
        f"| {mean(b, 'agreement', 1, True)} | {mean(a, 'agreement_reference', 1, True)} | {mean(a, 'nearest_train')} "
        f"| {mean(b, 'nearest_train')} | {mean(a, 'nearest_train_reference')} |"
    )
    lines += ["", *(f"**{v}**" for v in verdicts), ""]
    lines += [
        "FD: Frechet distance to held-out images in the detector's features; mean +- standard deviation over training seeds. "
        "*: at the size of half the held-out images, which is what the floor (half against half) can be compared with. "
        "Nearest train: mean distance of samples, and of held-out images, to the nearest training image of the source.",
        "",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines) + "\n"


def _number(cell, digits=2, percent=False):
    return "" if cell is None else f"{cell.mean * (100 if percent else 1):.{digits}f}" + (" %" if percent else "")


def load_strip(path, count):
    """The first `count` images (uint8 [C, H, W]) of a folder or zip of samples."""
    from training.dataset import ImageFolderDataset

    dataset = ImageFolderDataset(path)
    return [dataset[i][0] for i in range(min(count, len(dataset)))]


def figure(path, cells, arms, sources, strips, main):
    """comparison.png: a strip of images per source for real data and every arm, and the bars of FD with their spread.

    strips: {(row title, source): [uint8 images]}.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = list(dict.fromkeys(title for title, _ in strips))
    height = max(2.8, 0.4 * len(sources) * max(len(titles), 1) + 0.6)
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(9.5, height), gridspec_kw={"width_ratios": [1.5, 1]}, constrained_layout=True
    )
    rows, labels = [], []
    for source in sources:
        for title in titles:
            images = strips.get((title, source), [])
            if images:
                rows.append(np.concatenate([np.pad(i.transpose(1, 2, 0), ((1, 1), (1, 1), (0, 0)), constant_values=255)
                                            for i in images], axis=1))  # fmt: skip
                labels.append(f"{title}, source {source}")
    if rows:
        width = min(row.shape[1] for row in rows)
        canvas = np.concatenate([row[:, :width] for row in rows], axis=0)
        left.imshow(canvas.squeeze(), cmap="gray", interpolation="nearest", aspect="equal")
        step = canvas.shape[0] / len(rows)
        left.set_yticks([step * (i + 0.5) for i in range(len(rows))], labels, fontsize=8)
        left.set_xticks([])
        left.tick_params(length=0)
        for spine in left.spines.values():
            spine.set_visible(False)
    colours = ["#3b6fb6", "#e08a2c", "#6aa84f", "#a64d79"]
    x = np.arange(len(sources) + 1)
    for i, arm in enumerate(arms):
        means = [cells[arm, s, "fd"].mean for s in sources]
        errors = [cells[arm, s, "fd"].sd_training or 0 for s in sources]
        offset = (i - (len(arms) - 1) / 2) * 0.8 / len(arms)
        errors.append(_mean_spread(cells, arm, sources))
        name = f"{arm}-source" if arm in ("multi", "single") else arm
        style = {"capsize": 3, "color": colours[i % 4]}
        right.bar(x + offset, [*means, np.mean(means)], 0.8 / len(arms), yerr=errors, label=name, **style)
    floors = [cells[arms[0], s, "fd_floor"].mean for s in sources if (arms[0], s, "fd_floor") in cells]
    if len(floors) == len(sources):
        right.hlines([*floors, np.mean(floors)], x - 0.45, x + 0.45, colors="black", linestyles="dashed", linewidth=1,
                     label="floor: held-out, half vs half")  # fmt: skip
    right.set_xticks(x, [*sources, "mean"])
    right.set_xlabel("source")
    right.set_ylabel("Frechet distance to held-out images")
    right.set_ylim(top=right.get_ylim()[1] * 1.3)
    right.legend(fontsize=8, loc="upper left", ncols=2)
    fig.suptitle(_short(main), fontsize=10)
    for side in ("top", "right"):
        right.spines[side].set_visible(False)
    from dnnlib import atomic_write

    with atomic_write(path) as file:
        fig.savefig(file, format="png", dpi=150)
    plt.close(fig)


def _mean_spread(cells, arm, sources):
    """Standard deviation over training seeds of the mean FD over sources."""
    tables = [cells[arm, s, "fd"].by_seed() for s in sources]
    common = sorted(set.intersection(*(set(t) for t in tables)))
    return float(np.std([np.mean([t[seed] for t in tables]) for seed in common], ddof=1)) if len(common) > 1 else 0


def _short(v):
    error = "" if v.standard_error is None else f" +- {v.standard_error:.1%}"
    return f"{v.better} better in {v.wins} of {v.sources} sources, mean advantage {v.advantage:.1%}{error}"


def _same_data(train_multi, train_single):
    """A line that says whether the arms saw the same images, by content hash."""
    from training.dataset import ImageFolderDataset, content_hash

    shared = content_hash(ImageFolderDataset(train_multi))
    separate = content_hash(*(ImageFolderDataset(path) for path in train_single))
    if shared != separate:
        return f"WARNING: the arms saw different images (sha256 {shared[:16]} and {separate[:16]})."
    return f"Both arms saw the same images: sha256 {shared[:16]} of {len(ImageFolderDataset(train_multi))} images and labels."


def _strips(rows, arms, sources, real, count=12):
    """{(title, source): images} for the figure: real ones, then the first samples of every arm."""
    from training.dataset import ImageFolderDataset

    strips = {}
    if real is not None:
        dataset = ImageFolderDataset(real)
        for source in sources:
            index = dataset.indices_of(int(source))[:count]
            strips["real", source] = [dataset[i][0] for i in index]
    for arm in arms:
        for source in sources:
            row = next((r for r in rows if r["arm"] == arm and str(r["source"]) == source and r["images_path"]), None)
            if row is not None:
                strips[arm, source] = load_strip(row["images_path"], count)
    return strips


def write_report(
    scores,
    dest,
    arms=("multi", "single"),
    train_multi=None,
    train_single=None,
    real=None,
    net=None,
    detector=None,
    notes=(),
):
    """Write table.csv, table.md, scores.json and comparison.png into the folder `dest`; returns the text of table.md.

    scores: glob of score files. Raises ValueError for missing scores or tags.
    """
    import glob
    from pathlib import Path

    from dnnlib import atomic_write

    rows = read_scores(sorted(glob.glob(scores)))
    if any("cell" in row for row in rows):
        from metrics.report_grid import write_grid_report

        return write_grid_report(rows, dest, arms, net, notes)
    sources = sources_of(rows)
    cells = collect(rows)
    verdicts = [verdict(cells, sources, *arms)]
    notes = list(notes)
    if detector is not None:
        from metrics.classifier import load_classifier

        judge = load_classifier(detector)
        notes.append(
            f"Detector: {judge.accuracy:.1%} of {judge.header['num_holdout']} held-out images classified right."
        )
    budgets = sorted({(r["arm"], r["images_trained"]) for r in rows if "images_trained" in r})
    if budgets:
        notes.append("Training images per model: " + ", ".join(f"{n} ({arm})" for arm, n in budgets) + ".")
    seeds = {arm: len({r["seed"] for r in rows if r["arm"] == arm}) for arm in arms}
    samplings = len({r["sampling"] for r in rows})
    notes.append(f"Training seeds: {', '.join(f'{n} ({a})' for a, n in seeds.items())}; sampling seeds: {samplings}.")
    if train_multi and train_single:
        notes.append(_same_data(train_multi, [train_single.replace("%s", s) for s in sources]))
    if net is not None:
        from torch_utils.persistence import load_snapshot

        theory = theory_ratio(load_snapshot(net).net, len(sources))
        a, b = (_mean([cells[arm, s, "fd"].mean for s in sources]) for arm in arms)
        notes.append(
            f"Theory (order of the bounds): ratio {theory['ratio']:.3f} = sqrt(1 - (K-1)/K beta) with beta "
            f"{theory['beta_sim']:.4f} ({theory['shared']} shared parameters, {theory['per_source']} per source); "
            f"measured ratio of the mean FDs {a / b:.3f}."
        )
    dest = Path(dest)
    text = to_markdown(cells, list(arms), sources, verdicts, notes)
    with atomic_write(dest / "table.csv", "w") as file:
        file.write(to_csv(cells, list(arms), sources))
    with atomic_write(dest / "table.md", "w") as file:
        file.write(text)
    figure(dest / "comparison.png", cells, list(arms), sources, _strips(rows, arms, sources, real), verdicts[0])
    return text
