"""A grid of cells (how many sources, how many images, how similar): the verdict of each, one table, one figure.

Rows of the shared arm carry a tag `cell` (and k, n, group, images_trained); rows of the separate arm carry `n` and are shared
between all cells of that n (and `group`, where a group has data of its own, such as shuffled labels).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dnnlib.util import parse_nimg, write_text
from metrics.results import Row, sources_of, theory_ratio
from metrics.table import Verdict, collect, markdown, numbers, verdict, write_csv

MEASURES = {"fd": "FD", "denoising_loss": "held-out denoising loss"}


@dataclass
class CellResult:
    """Verdicts of one cell by measure, with what the cell is."""

    cell: str
    k: int
    n: int
    group: str
    verdicts: dict[str, Verdict]  # by measure
    floor: float | None
    images: dict[str, int | None]  # arm -> images trained on by all its models of one seed together
    data: dict[str, list[str]]  # arm -> training data of its models, sorted paths


def _own_data(rows, other, first):
    """Rows of the separate arm for the cell of the tags `first`: of its n and, where its group has data of its own, of that."""
    matching = [r for r in rows if r.tags["arm"] == other and r.tags.get("n") == first.get("n")]
    of_group = lambda group: [r for r in matching if r.tags.get("group", "") == group]
    return of_group(first.get("group", "")) or of_group("")


def results(rows: Sequence[Row], arms: Sequence[str] = ("multi", "single")) -> list[CellResult]:
    """CellResults of all cells, in order of group, n, k. Raises ValueError for a cell without its counterpart."""
    better, other = arms
    found = []
    for name in dict.fromkeys(r.tags["cell"] for r in rows if "cell" in r.tags):
        mine = [r for r in rows if r.tags.get("cell") == name]
        sources, first = sources_of(mine), mine[0].tags
        theirs = [r for r in _own_data(rows, other, first) if r.section in sources]
        cells = collect([*mine, *theirs])
        measured = [m for m in MEASURES if any(m in r.numbers for r in mine)]
        try:
            verdicts = {m: verdict(cells, sources, better, other, m) for m in measured}
        except ValueError as err:
            raise ValueError(f"cell {name}: {err}") from err
        k, n, group = int(first.get("k", len(sources))), int(first["n"]), first.get("group", "")
        floor = numbers(cells, better, "mean", "fd_floor", sources)[0]
        images = {better: _images(mine, max), other: _images(theirs, sum)}
        data = {better: _training_data(mine), other: _training_data(theirs)}
        found.append(CellResult(name, k, n, group, verdicts, floor, images, data))
    return sorted(found, key=lambda r: (r.group, r.n, r.k))


def _images(rows, together):
    """Training images of an arm in one seed: of its one model (max over sources), or of its models together (sum)."""
    per_source = {r.section: parse_nimg(r.tags["images_trained"]) for r in rows if "images_trained" in r.tags}
    return together(per_source.values()) if per_source else None


def _training_data(rows):
    """What the models behind score rows were trained on, read from the options in their run folders."""
    files = {Path(r.images) / "training_options.json" for r in rows if r.images}
    return sorted({json.loads(f.read_text(encoding="utf-8"))["data"] for f in files if f.is_file()})


def same_data(found: Sequence[CellResult], arms: Sequence[str]) -> Iterator[str]:
    """Lines that say, by content hash, whether both arms of each cell were trained on the same images."""
    from training.dataset import ImageFolderDataset, content_hash

    for r in found:
        if all(r.data.values()) and all(Path(p).exists() for paths in r.data.values() for p in paths):
            hashes = list(dict.fromkeys(content_hash(*map(ImageFolderDataset, r.data[arm]))[:16] for arm in arms))
            if len(hashes) == 1:
                yield f"{r.cell}: both arms saw the same images, sha256 {hashes[0]}."
            else:
                yield f"WARNING: {r.cell}: the arms saw different images (sha256 {' and '.join(hashes)})."


def table_rows(found: Sequence[CellResult]) -> list[dict[str, object]]:
    """Lines of the CSV file: one per cell and measure."""
    rows = []
    for r in found:
        for measure, v in r.verdicts.items():
            low, high = v.interval or (None, None)
            row = {"cell": r.cell, "group": r.group, "k": r.k, "n": r.n, "measure": measure, **v.levels}
            row |= {"advantage": v.advantage, "standard_error": v.standard_error, "low95": low, "high95": high}
            row |= {"wins": v.wins, "sources": len(v.per_source), "floor": r.floor if measure == "fd" else None}
            row |= {f"images_{arm}": images for arm, images in r.images.items()}
            rows.append({k: "" if x is None else f"{x:.6g}" if isinstance(x, float) else x for k, x in row.items()})
    return rows


def to_markdown(found: Sequence[CellResult], arms: Sequence[str], notes: Sequence[str] = ()) -> str:
    """The grid as Markdown: FD of both arms, floor, advantage with its interval, and the same for the denoising loss."""
    a, b = arms
    header = f"sources|K|n|FD {a}|FD {b}|floor|advantage in FD|wins|advantage in loss|wins|images {a}|{b}".split("|")
    rows = []
    for r in found:
        fd, loss = r.verdicts.get("fd"), r.verdicts.get("denoising_loss")
        levels = [f"{level:.2f}" for level in map(fd.levels.get, arms)] if fd else ["", ""]
        floor = "" if r.floor is None else f"{r.floor:.2f}"
        images = [r.images[arm] or "" for arm in arms]
        rows.append([r.group or "all", r.k, r.n, *levels, floor, *_advantage(fd), *_advantage(loss), *images])
    return (
        f"{markdown(header, rows)}\n\n"
        "Advantage: mean over sources of (single - multi) / single, +- its standard error from the training seeds, and the "
        "95 % interval. Floor: half the held-out images against the other half. Images: seen by the models of the arm."
        "\n\n" + "".join(f"- {note}\n" for note in notes)
    )


def _advantage(v):
    """Advantage with its interval, and wins, as text."""
    if v is None:
        return "", ""
    error = f" +- {v.standard_error:.1%} ({v.interval[0]:.1%} to {v.interval[1]:.1%})" if v.interval else ""
    return f"{v.advantage:.1%}{error}", f"{v.wins}/{len(v.per_source)}"


def figure(stem: Path, found: Sequence[CellResult]) -> list[Path]:
    """Advantage with its 95 % interval by cell: a panel per measure, a colour per n, groups along the axis."""
    from metrics import figures

    measures = [m for m in MEASURES if any(m in r.verdicts for r in found)]
    labels = list(dict.fromkeys((r.group, r.k) for r in sorted(found, key=lambda r: (r.k, r.group))))
    sizes = sorted({r.n for r in found})
    fig, axes = figures.figure(len(measures), 4.6, 3.6, squeeze=False)
    for axis, measure in zip(axes[0], measures, strict=True):
        axis.axhline(0, color="black", linewidth=0.8)
        for i, (n, colour) in enumerate(zip(sizes, figures.colours(sizes), strict=True)):
            cells = [r for r in found if r.n == n and measure in r.verdicts]
            x = [labels.index((r.group, r.k)) + (i - (len(sizes) - 1) / 2) * 0.22 for r in cells]
            y = np.array([100 * r.verdicts[measure].advantage for r in cells])
            ends = [r.verdicts[measure].interval or (r.verdicts[measure].advantage,) * 2 for r in cells]
            error = np.abs(100 * np.transpose(ends) - y)
            style = {"fmt": "o", "capsize": 3, "color": colour, "label": f"n = {n}", "markersize": 5}
            axis.errorbar(x, y, yerr=error, **style)
        axis.set_xticks(range(len(labels)), [f"{g or 'all'}\nK={k}" for g, k in labels], fontsize=7)
        axis.set_ylabel(f"advantage of multi, {MEASURES[measure]} (%)", fontsize=9)
        axis.legend(fontsize=8)
    return figures.save(fig, stem, dpi=150)


def _predictions(found, arms, net):
    """Lines with sqrt(1 - (K-1)/K beta) from the network's parameter counts beside the measured ratios, by K and n."""
    from torch_utils.persistence import load_snapshot

    network = load_snapshot(net).net
    for r in found:
        if "fd" in r.verdicts:
            theory, (a, b) = theory_ratio(network, r.k), (r.verdicts["fd"].levels[arm] for arm in arms)
            predicted = f"theory's order ratio {theory['ratio']:.3f} (beta {theory['beta_sim']:.4f})"
            yield f"{r.cell}: {predicted}, measured ratio of the mean FDs {a / b:.3f}."


def write_grid_report(
    rows: Sequence[Row], dest: Path, arms: Sequence[str], net: str | None, notes: Sequence[str]
) -> str:
    """Write table.csv, table.md and comparison.png into `dest`; returns the text of table.md.

    net: snapshot of a shared model, for the theory's prediction beside the measured ratio of the mean FDs.
    """
    found = results(rows, arms)
    notes = [*notes, *same_data(found, arms), *(_predictions(found, arms, net) if net is not None else [])]
    text = to_markdown(found, arms, notes)
    write_csv(dest / "table.csv", table_rows(found))
    write_text(dest / "table.md", text)
    figure(dest / "comparison", found)
    return text
