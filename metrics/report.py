"""One table, its verdict and a figure from the score files of two arms on the same sources."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dnnlib.util import write_text
from metrics.results import Row, of_detector, of_sources, read_scores, sources_of, theory_ratio, titles_of
from metrics.table import Cells, Verdict, collect, half_width_of, markdown, numbers, verdict, write_csv

COLUMNS = (
    "fd",
    "denoising_loss",
    "agreement",
    "fd_at_floor_size",
    "fd_floor",
    "agreement_reference",
    "nearest_train",
    "nearest_train_reference",
    "precision",
    "recall",
    "bits_per_dim",
)
MEASURES = {"fd": "FD", "denoising_loss": "held-out denoising loss"}
SHORT = {"fd": "FD", "denoising_loss": "loss"}
SURE = ("fd", "denoising_loss", "agreement")  # stand in the Markdown table with their 95 % interval
STRIP = 12  # images of each arm and source in the figure


def table_rows(
    cells: Cells, arms: Sequence[str], sources: Sequence[str], titles: Mapping[str, str]
) -> list[dict[str, str]]:
    """Lines of the CSV file: one per source and arm with means, spreads, half of the 95 % interval; then means over sources.

    titles: what the sources are called.
    """
    names = [c for c in COLUMNS if any((a, s, c) in cells for a in arms for s in sources)]
    rows = []
    for source in [*sources, "mean"]:
        for arm in arms:
            row = {"source": titles[source], "arm": arm}
            for name in names:
                values = [*numbers(cells, arm, source, name, sources), half_width_of(cells, arm, source, name, sources)]
                for suffix, value in zip(("", "_sd_training", "_sd_sampling", "_half95"), values, strict=True):
                    row[name + suffix] = "" if value is None else f"{value:.6g}"
            rows.append(row)
    return rows


def seed_rows(
    cells: Cells, arms: Sequence[str], sources: Sequence[str], titles: Mapping[str, str]
) -> list[dict[str, object]]:
    """Lines of seeds.csv: the numbers behind every mean and interval, one line per arm, source and training seed."""
    names = [c for c in COLUMNS if any((a, s, c) in cells for a in arms for s in sources)]
    rows = []
    for arm, source in itertools.product(arms, sources):
        values = {name: cells[arm, source, name].by_seed() for name in names if (arm, source, name) in cells}
        for seed in dict.fromkeys(itertools.chain(*values.values())):
            found = {name: values.get(name, {}).get(seed, "") for name in names}
            rows.append({"arm": arm, "source": titles[source], "seed": seed, **found})
    return rows


def to_markdown(
    cells: Cells,
    arms: Sequence[str],
    sources: Sequence[str],
    verdicts: dict[str, Verdict],  # by measure, the one that decides first
    notes: Sequence[str],
    titles: Mapping[str, str],
) -> str:
    """The table as Markdown: per source and mean, what the arms are judged by, agreement, floor, neighbours, verdicts."""
    a, b = arms
    main = next(iter(verdicts.values()))
    measured = [(f"{SHORT[measure]} {arm}", (measure, arm)) for measure in verdicts for arm in arms]
    columns = {
        **dict(measured[:2]),
        "advantage": None,
        **dict(measured[2:]),
        "floor*": ("fd_floor", a),
        f"FD {a}*": ("fd_at_floor_size", a),
        f"FD {b}*": ("fd_at_floor_size", b),
        f"agreement {a}": ("agreement", a),
        f"agreement {b}": ("agreement", b),
        "real": ("agreement_reference", a),
        f"nearest train {a}": ("nearest_train", a),
        b: ("nearest_train", b),
        "held-out": ("nearest_train_reference", a),
    }

    def text(source, column):
        if column is None:
            return f"{main.advantage if source == 'mean' else main.per_source[source]:.1%}"
        name, arm = column
        value = numbers(cells, arm, source, name, sources)[0]
        if value is None:
            return ""
        half = half_width_of(cells, arm, source, name, sources) if name in SURE else None
        scale, digits, unit = (100, 1, " %") if name.startswith("agreement") else (1, 3 if "loss" in name else 2, "")
        shown = [value, half] if half else [value]  # that all of few images agree is no interval of width 0
        return " +- ".join(f"{v * scale:.{digits}f}" for v in shown) + unit

    columns = {name: c for name, c in columns.items() if c is None or any((c[1], s, c[0]) in cells for s in sources)}
    rows = [[titles[source], *(text(source, column) for column in columns.values())] for source in [*sources, "mean"]]
    lines = "\n\n".join(f"**{MEASURES[measure]}: {found}**" for measure, found in verdicts.items())
    return (
        f"{markdown(['source', *columns], rows)}\n\n{lines}\n\n"
        "Intervals: 95 %, Student's t over the differences of equal training seeds. Loss: denoising loss on held-out images, "
        "mean over noise levels. FD: Fréchet distance to held-out images in the detector's features. Numbers +- half of their "
        "95 % interval: Student's t over training seeds; with one seed, over images alone. "
        "*: at the size of half the held-out images, which is what the floor (half against half) can be compared with. "
        "Nearest train: mean distance of samples, and of held-out images, to the nearest training image of the source."
        "\n\n" + "".join(f"- {note}\n" for note in notes)
    )


def figure(
    stem: Path,
    cells: Cells,
    arms: Sequence[str],
    titles: Mapping[str, str],  # of the sources, in order
    strips: dict,
    judged: tuple[str, Verdict],
) -> list[Path]:
    """stem.png and stem.svg: a strip of images per source for real data and every arm; the measure with 95 % intervals over
    training seeds, a distance at the floor's size beside the floor, where that is known.

    strips: {(row title, source): [uint8 images]}.
    """
    from metrics import figures

    (measure, main), sources = judged, [s for s in titles if s not in ("mean", "overall")]
    height = max(2.8, 0.4 * len(sources) * max(len({title for title, _ in strips}), 1) + 0.6)
    fig, (left, right) = figures.figure(2, 4.75, height, gridspec_kw={"width_ratios": [1.5, 1]})
    _draw_strips(
        left, [(f"{title}, {titles[s]}", strips[title, s]) for s in sources for title, at in strips if at == s]
    )
    x, places = np.arange(len(sources) + 1), [*sources, "mean"]
    floors = [cells[arms[0], s, "fd_floor"].mean for s in sources if (arms[0], s, "fd_floor") in cells]
    fair = measure == "fd" and len(floors) == len(sources)
    fair &= all((arm, s, "fd_at_floor_size") in cells for arm in arms for s in sources)
    shown = "fd_at_floor_size" if fair else measure
    for i, (arm, style) in enumerate(zip(arms, figures.look(arms), strict=True)):
        means = [numbers(cells, arm, s, shown, sources)[0] for s in places]
        halves = [half_width_of(cells, arm, s, shown, sources, images=False) for s in places]
        style |= {"linestyle": "none", "label": figures.LABEL.get(arm, arm)}
        figures.intervals(right, x + (i - (len(arms) - 1) / 2) * 0.3, means, halves, **style)
    if fair:
        style = {"colors": "black", "linestyles": "dashed", "linewidth": 1, "label": "floor: held-out, half vs half"}
        right.hlines([*floors, np.mean(floors)], x - 0.4, x + 0.4, **style)
    right.set_xticks(x, [*map(titles.get, sources), "mean"], **figures.slanted([*map(titles.get, sources)], 5))
    right.set(xlim=(-0.6, len(sources) + 0.6), ylabel=figures.TITLES.get(shown, MEASURES.get(shown, shown)))
    figures.legend(fig, loc="outside lower right", ncols=3)
    over = ", over sampling seeds alone" if main.over == "sampling" else ""
    error = "" if main.interval is None else f" (95 %: {main.interval[0]:.1%} to {main.interval[1]:.1%}{over})"
    wins = f"{main.better} better in {main.wins} of {len(main.per_source)} sources, mean advantage {main.advantage:.1%}"
    fig.suptitle(f"{wins}{error}", fontsize=10)
    return figures.save(fig, stem, dpi=150)


def _draw_strips(axis, strips):
    """A row of images for each of the (label, images)."""
    strips = [(label, images) for label, images in strips if images]
    axis.grid(False)
    if not strips:
        axis.axis("off")
        return
    pad = lambda image: np.pad(image.transpose(1, 2, 0), ((1, 1), (1, 1), (0, 0)), constant_values=255)
    rows = [np.concatenate([pad(image) for image in images], axis=1) for _, images in strips]
    width = min(row.shape[1] for row in rows)
    canvas = np.concatenate([row[:, :width] for row in rows], axis=0)
    axis.imshow(canvas.squeeze(), cmap="gray", interpolation="nearest", aspect="equal")
    step = canvas.shape[0] / len(rows)
    axis.set_yticks([step * (i + 0.5) for i in range(len(rows))], [label for label, _ in strips], fontsize=8)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _strips(
    rows: Sequence[Row], arms: Sequence[str], sources: Sequence[str], real: str | None, notes: list[str]
) -> dict:
    """{(title, source): images} for the figure: real ones, then the first samples of every arm; a note where none are kept."""
    from training.dataset import ImageFolderDataset

    strips = {}
    if real is not None:
        dataset = ImageFolderDataset(real)
        strips = {("real", s): [dataset[i][0] for i in dataset.indices_of(int(s))[:STRIP]] for s in sources}
    folders = {(r.tags["arm"], r.section): r.images for r in reversed(rows) if r.images}  # of several, the first
    for arm, source in itertools.product(arms, sources):
        if (arm, source) in folders:
            try:
                dataset = ImageFolderDataset(folders[arm, source])
            except (ValueError, OSError):  # a network, of which nothing was written, or a folder that is gone
                note = f"No images to show of {arm}: {folders[arm, source]} is no data set."
                notes += [note] * (note not in notes)
                continue
            strips[arm, source] = [dataset[i][0] for i in range(min(STRIP, len(dataset)))]
    return strips


def same_data(train_multi: str, train_single: Sequence[str]) -> str:
    """A line that says whether the arms saw the same images, by content hash."""
    from training.dataset import ImageFolderDataset, content_hash

    multi = ImageFolderDataset(train_multi)
    shared, separate = content_hash(multi)[:16], content_hash(*map(ImageFolderDataset, train_single))[:16]
    if shared != separate:
        return f"WARNING: the arms saw different images (sha256 {shared} and {separate})."
    return f"Both arms saw the same images: sha256 {shared} of {len(multi)} images and labels."


def write_report(
    scores: str,
    dest: str | Path,
    arms: Sequence[str] = ("multi", "single"),
    *,
    metric: str | None = None,
    measure: str = "fd",
    train_multi: str | None = None,
    train_single: str | None = None,
    real: str | None = None,
    net: str | None = None,
    detector: str | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Write table.csv, seeds.csv, table.md and comparison.png into the folder `dest`; returns the text of table.md.

    scores: glob of score files; metric: of which detector, None: the only one; measure: what decides; the others are
    options of `calculate_metrics.py report`. Raises ValueError for missing scores or tags, and for two detectors without
    a choice.
    """
    rows = of_sources(of_detector(read_scores(scores), metric))
    notes, dest = list(notes), Path(dest)
    sources, cells, titles = sources_of(rows), collect(rows), titles_of(rows)
    judged = [m for m in (measure, *MEASURES) if m == measure or any(m in row.numbers for row in rows)]
    verdicts = {m: verdict(cells, sources, *arms, m) for m in judged}
    if detector is not None:
        from metrics.classifier import load_classifier

        judge = load_classifier(detector)
        num = judge.header["num_holdout"]
        notes.append(f"Detector: {judge.header['accuracy']:.1%} of {num} held-out images classified right.")
    budgets = sorted({(r.tags["arm"], r.tags["images_trained"]) for r in rows if "images_trained" in r.tags})
    if budgets:
        notes.append("Training images per model: " + ", ".join(f"{n} ({arm})" for arm, n in budgets) + ".")
    seeds = {arm: len({r.tags["seed"] for r in rows if r.tags["arm"] == arm}) for arm in arms}
    samplings = len({r.tags["sampling"] for r in rows})
    notes.append(f"Training seeds: {', '.join(f'{n} ({a})' for a, n in seeds.items())}; sampling seeds: {samplings}.")
    if train_multi and train_single:
        notes.append(same_data(train_multi, [train_single.replace("%s", s) for s in sources]))
    if net is not None:
        from torch_utils.persistence import load_snapshot

        theory = theory_ratio(load_snapshot(net).net, len(sources))
        notes.append(
            f"Theory (order of the bounds): the shared model's excess over the best possible loss is "
            f"{theory['ratio'] ** 2:.3f} of the single ones' = 1 - (K-1)/K beta with beta {theory['beta_sim']:.4f} "
            f"({theory['shared']} shared parameters, {theory['per_source']} per source); the best one is not known here."
        )
    strips = _strips(rows, arms, sources, real, notes)
    text = to_markdown(cells, arms, sources, verdicts, notes, titles)
    write_csv(dest / "table.csv", table_rows(cells, arms, sources, titles))
    write_csv(dest / "seeds.csv", seed_rows(cells, arms, sources, titles))
    write_text(dest / "table.md", text)
    figure(dest / "comparison", cells, arms, titles, strips, (measure, verdicts[measure]))
    return text
