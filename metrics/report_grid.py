"""A grid of cells (how many sources, how many images, how similar): the verdict of each, one table, one figure.

Rows of the shared arm carry a tag `cell` (and k, n, group, images_trained); rows of the separate arm carry `n` and are shared
between all cells of that n (and `group`, where a group has data of its own, such as shuffled labels).
"""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from metrics.results import collect, sources_of, theory_ratio, verdict

MEASURES = {"fd": "FD", "denoising_loss": "held-out denoising loss"}


@dataclass
class CellResult:
    """Verdicts of one cell by measure, with what the cell is."""

    cell: str
    k: int
    n: int
    group: str
    verdicts: dict  # measure -> Verdict
    levels: dict  # (arm, measure) -> mean over sources
    floor: float | None
    images: dict  # arm -> images trained on by all its models of one seed together
    data: dict  # arm -> training data of its models, sorted paths


def _matches(row, cell_rows):
    """Whether a row of the separate arm belongs to a cell: same n, same data group where it names one."""
    first = cell_rows[0]
    return str(row.get("n")) == str(first.get("n")) and row.get("group", "") in ("", first.get("group", ""))


def _own_data(rows, other, cell_rows):
    """Rows of the separate arm for a cell; where its group has rows of its own, only those count."""
    matching = [r for r in rows if r["arm"] == other and _matches(r, cell_rows)]
    own = [r for r in matching if r.get("group", "") and r["group"] == cell_rows[0].get("group", "")]
    return own or [r for r in matching if not r.get("group")]


def results(rows, arms=("multi", "single")):
    """CellResults of all cells, in order of group, n, k. Raises ValueError for a cell without its counterpart."""
    better, other = arms
    found = []
    for name in dict.fromkeys(r["cell"] for r in rows if "cell" in r):
        mine = [r for r in rows if r.get("cell") == name]
        sources = sources_of(mine)
        theirs = [r for r in _own_data(rows, other, mine) if str(r["source"]) in sources]
        cells = collect([*mine, *theirs])
        verdicts, levels = {}, {}
        for measure in MEASURES:
            if any(r.get(measure) is not None for r in mine):
                try:
                    verdicts[measure] = verdict(cells, sources, better, other, measure)
                except ValueError as err:
                    raise ValueError(f"cell {name}: {err}") from err
                for arm in arms:
                    levels[arm, measure] = float(np.mean([cells[arm, s, measure].mean for s in sources]))
        floors = [cells[better, s, "fd_floor"].mean for s in sources if (better, s, "fd_floor") in cells]
        first = mine[0]
        found.append(
            CellResult(
                cell=name,
                k=int(first.get("k", len(sources))),
                n=int(first["n"]),
                group=first.get("group", ""),
                verdicts=verdicts,
                levels=levels,
                floor=float(np.mean(floors)) if floors else None,
                images={arm: _images(theirs if arm == other else mine, arm == other) for arm in arms},
                data={arm: _training_data(theirs if arm == other else mine) for arm in arms},
            )
        )
    return sorted(found, key=lambda r: (r.group, r.n, r.k))


def _images(rows, separate):
    """Training images of an arm in one seed: of its one model, or of its models together."""
    from dnnlib import parse_nimg

    per_source = {r["source"]: parse_nimg(r["images_trained"]) for r in rows if "images_trained" in r}
    if not per_source:
        return None
    return sum(per_source.values()) if separate else max(per_source.values())


def _training_data(rows):
    """What the models behind score rows were trained on, read from the options in their run folders."""
    found = set()
    for path in {r["images_path"] for r in rows if r.get("images_path")}:
        options = Path(path) / "training_options.json"
        if options.is_file():
            found.add(json.loads(options.read_text(encoding="utf-8"))["data"])
    return sorted(found)


def same_data(found, arms):
    """Lines that say, by content hash, whether both arms of each cell were trained on the same images."""
    from training.dataset import ImageFolderDataset, content_hash

    for r in found:
        if all(r.data.values()) and all(Path(p).exists() for paths in r.data.values() for p in paths):
            hashes = [content_hash(*(ImageFolderDataset(p) for p in r.data[arm])) for arm in arms]
            if hashes[0] == hashes[1]:
                yield f"{r.cell}: both arms saw the same images, sha256 {hashes[0][:16]}."
            else:
                yield f"WARNING: {r.cell}: the arms saw different images (sha256 {hashes[0][:16]} and {hashes[1][:16]})."


def to_csv(found, arms):
    """One line per cell and measure."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["cell", "group", "k", "n", "measure", arms[0], arms[1], "advantage", "standard_error", "low95", "high95", "wins",
         "sources", "floor", f"images_{arms[0]}", f"images_{arms[1]}"]
    )  # fmt: skip
    for r in found:
        for measure, v in r.verdicts.items():
            low, high = v.interval or (None, None)
            row = [r.cell, r.group, r.k, r.n, measure, r.levels[arms[0], measure], r.levels[arms[1], measure], v.advantage,
                   v.standard_error, low, high, v.wins, v.sources, r.floor if measure == "fd" else None,
                   r.images[arms[0]], r.images[arms[1]]]  # fmt: skip
            writer.writerow(["" if x is None else f"{x:.6g}" if isinstance(x, float) else x for x in row])
    return out.getvalue()


def to_markdown(found, arms, notes=()):
    """The grid as Markdown: FD of both arms, floor, advantage with its interval, and the same for the denoising loss."""
    a, b = arms
    lines = [
        f"| sources | K | n | FD {a} | FD {b} | floor | advantage in FD | wins | advantage in loss | wins | images {a} | {b} |",
        "|" + " --- |" * 12,
    ]
    for r in found:
        fd, loss = r.verdicts.get("fd"), r.verdicts.get("denoising_loss")
        lines.append(
            f"| {r.group or 'all'} | {r.k} | {r.n} "
            + (f"| {r.levels[a, 'fd']:.2f} | {r.levels[b, 'fd']:.2f} " if fd else "| | ")
            + (f"| {r.floor:.2f} " if r.floor is not None else "| ")
            + f"| {_span(fd)} | {_wins(fd)} | {_span(loss)} | {_wins(loss)} | {r.images[a] or ''} | {r.images[b] or ''} |"
        )
    lines += [
        "",
        "Advantage: mean over sources of (single - multi) / single, +- its standard error from the training seeds, and the "
        "95 % interval. Floor: half the held-out images against the other half. Images: seen by the models of the arm.",
        "",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines) + "\n"


def _span(v):
    if v is None:
        return ""
    if v.standard_error is None:
        return f"{v.advantage:.1%}"
    return f"{v.advantage:.1%} +- {v.standard_error:.1%} ({v.interval[0]:.1%} to {v.interval[1]:.1%})"


def _wins(v):
    return "" if v is None else f"{v.wins}/{v.sources}"


def _error_bar(v):
    """(down, up) in percent."""
    if v.interval is None:
        return 0.0, 0.0
    return 100 * (v.advantage - v.interval[0]), 100 * (v.interval[1] - v.advantage)


def figure(path, found):
    """Advantage with its 95 % interval by cell: a panel per measure, a colour per n, groups along the axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from dnnlib import atomic_write

    measures = [m for m in MEASURES if any(m in r.verdicts for r in found)]
    labels = list(dict.fromkeys((r.group, r.k) for r in sorted(found, key=lambda r: (r.k, r.group))))
    sizes = sorted({r.n for r in found})
    colours = ["#3b6fb6", "#e08a2c", "#6aa84f", "#a64d79"]
    fig, axes = plt.subplots(
        1, len(measures), figsize=(4.6 * len(measures), 3.6), constrained_layout=True, squeeze=False
    )
    for axis, measure in zip(axes[0], measures, strict=True):
        axis.axhline(0, color="black", linewidth=0.8)
        for i, n in enumerate(sizes):
            points = [
                (labels.index((r.group, r.k)), r.verdicts[measure]) for r in found if r.n == n and measure in r.verdicts
            ]
            x = [p + (i - (len(sizes) - 1) / 2) * 0.22 for p, _ in points]
            y = [100 * v.advantage for _, v in points]
            error = [_error_bar(v) for _, v in points]
            axis.errorbar(
                x, y, yerr=np.transpose(error), fmt="o", capsize=3, color=colours[i % 4], label=f"n = {n}", markersize=5
            )
        axis.set_xticks(range(len(labels)), [f"{g or 'all'}\nK={k}" for g, k in labels], fontsize=7)
        axis.set_ylabel(f"advantage of multi, {MEASURES[measure]} (%)", fontsize=9)
        axis.legend(fontsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    with atomic_write(path) as file:
        fig.savefig(file, format="png", dpi=150)
    plt.close(fig)


def _predictions(found, arms, net):
    """Lines with sqrt(1 - (K-1)/K beta) from the network's parameter counts beside the measured ratios, by K and n."""
    from torch_utils.persistence import load_snapshot

    network = load_snapshot(net).net
    for r in found:
        if "fd" in r.verdicts:
            theory = theory_ratio(network, r.k)
            measured = r.levels[arms[0], "fd"] / r.levels[arms[1], "fd"]
            yield (
                f"{r.cell}: theory's order ratio {theory['ratio']:.3f} (beta {theory['beta_sim']:.4f}), "
                f"measured ratio of the mean FDs {measured:.3f}."
            )


def write_grid_report(rows, dest, arms, net=None, notes=()):
    """Write table.csv, table.md and comparison.png into `dest`; returns the text of table.md.

    net: snapshot of a shared model, for the theory's prediction beside the measured ratio of the mean FDs.
    """
    from dnnlib import atomic_write

    found = results(rows, tuple(arms))
    notes = [*notes, *same_data(found, arms), *(_predictions(found, arms, net) if net is not None else [])]
    text = to_markdown(found, arms, notes)
    dest = Path(dest)
    for name, content in (("table.csv", to_csv(found, arms)), ("table.md", text)):
        with atomic_write(dest / name, "w") as file:
            file.write(content)
    figure(dest / "comparison.png", found)
    return text
