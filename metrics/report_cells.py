"""The lead paper's table: one model of K classes against a model of each, by similarity, K, n and detector, the published
numbers beside ours, and every class by its name (Wang et al., ICML 2025, arXiv 2502.14583, tables 1 and 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from dnnlib.util import natural_key, write_text
from metrics.results import JOINED, Row, of_sources, read_scores, sources_of, titles_of
from metrics.table import Cell, Cells, Verdict, collect, markdown, mean_and_deviation, seeds_mean, verdict, write_csv

ARMS = ("single", "multi")
NAMES = {"fid": "FID", "fd_dinov2": "FD-DINOv2"}  # with the published weights
OVER = {"training": "here", "sampling": "here, interval over sampling seeds alone"}
SIMILARITY = {
    "sim1": "Sim 1 (categories)",
    "sim2": "mammals",
    "sim3": "Sim 2 (dogs)",
}  # theirs: sim1 is Sim 1, sim3 Sim 2
# FID of 5000 images per class, mean over classes: single, multi, their standard deviations over five samplings.
PUBLISHED = {
    ("sim1", "3", "500"): (30.03, 29.94, 0.0086, 0.0057),
    ("sim1", "10", "500"): (30.18, 29.28, 0.0018, 0.0336),
    ("sim3", "3", "500"): (32.69, 30.69, 0.0160, 0.0158),
    ("sim3", "10", "500"): (30.54, 28.75, 0.0056, 0.0035),
    ("sim1", "3", "1000"): (28.01, 26.41, 0.0034, 0.0064),
    ("sim1", "10", "1000"): (27.49, 25.84, 0.0028, 0.0250),
    ("sim3", "3", "1000"): (30.58, 29.35, 0.0047, 0.0051),
    ("sim3", "10", "1000"): (29.01, 27.81, 0.0013, 0.0084),
}


class Found(NamedTuple):
    """What one detector found in one cell."""

    key: tuple[str, str, str]  # similarity, K, n
    detector: str
    sources: list[str]
    titles: dict[str, str]
    cells: Cells
    verdict: Verdict
    rows: list[Row]

    def level(self, arm: str) -> tuple[float, float | None]:
        """Mean over classes, and its standard deviation over the sampling seeds of a training (mean over trainings)."""
        parts = [self.cells[arm, s, "fd"] for s in self.sources]
        sds = []
        for seed in parts[0].by_seed():
            own = [Cell({pair: v for pair, v in part.values.items() if pair[0] == seed}) for part in parts]
            means = seeds_mean(own, [1] * len(own), Cell.by_sampling).values()
            sds += [mean_and_deviation(means)[1]] if len(means) > 1 else []
        return fmean(part.mean for part in parts), fmean(sds) if sds else None


def find(rows: Sequence[Row]) -> tuple[list[Found], list[str]]:
    """Every cell that the rows of the shared models name, with the single models of its classes, once per detector; notes on
    cells that are left out, since scores are missing.

    Raises ValueError where none is complete.
    """
    found, notes = [], []
    shared = [row for row in rows if row.tags["arm"] == "multi"]
    where = lambda row: (row.tags["sim"], row.tags["k"], row.tags["n"])
    for key in sorted({where(row) for row in shared}, key=lambda key: [natural_key(part) for part in key]):
        mine = [row for row in shared if where(row) == key]
        sources = sources_of(mine)
        sim, _, n = key
        single = [r for r in rows if r.tags["arm"] == "single" and (r.tags["sim"], r.tags["n"]) == (sim, n)]
        chosen = mine + [row for row in single if row.section in sources]
        for detector in dict.fromkeys(row.detector for row in mine if row.detector not in JOINED):
            part = [row for row in chosen if row.detector == detector]
            try:
                cells = collect(part)
                judged = verdict(cells, sources, *ARMS[::-1])
            except ValueError as err:
                notes.append(f"{SIMILARITY.get(sim, sim)}, K = {key[1]}, n = {n}, {detector}: left out, {err}")
                continue
            found.append(Found(key, detector, sources, titles_of(part), cells, judged, part))
    if not found:
        raise ValueError(
            "; ".join(notes[:3]) or "there are no scores with the tag arm=multi: score the shared model too"
        )
    return found, notes


def _plus_minus(mean, deviation):
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.4f}"


def _advantage(found):
    low_high = found.verdict.interval
    return f"{found.verdict.advantage:.1%}" + (f" ({low_high[0]:.1%} to {low_high[1]:.1%})" if low_high else "")


def _published(found):
    """Of the cell, where the detector is the FID's network with any weights; the advantage is of the means, as theirs."""
    return PUBLISHED.get(found.key) if found.detector.partition(":")[0] == "fid" else None


def _cell_lines(found):
    for one in found:
        theirs = _published(one)
        paper = (
            ["", "", ""] if theirs is None else [*map("{:.2f}".format, theirs[:2]), f"{1 - theirs[1] / theirs[0]:.2%}"]
        )
        levels = [_plus_minus(*one.level(arm)) for arm in ARMS]
        sim, k, n = one.key
        yield [
            SIMILARITY.get(sim, sim),
            k,
            n,
            NAMES.get(one.detector, f"FD in {one.detector[:24]}"),
            *levels,
            _advantage(one),
            *paper,
        ]


def _csv_rows(found):
    cells, classes = [], []
    for one in found:
        about = dict(zip(("sim", "k", "n"), one.key, strict=True)) | {"detector": one.detector}
        theirs, interval = _published(one) or ("", "", "", ""), one.verdict.interval or ("", "")
        numbers = {}
        for arm in ARMS:
            mean, sd = one.level(arm)
            numbers |= {arm: mean, f"{arm}_sd_sampling": "" if sd is None else sd}
        numbers |= {"advantage": one.verdict.advantage, "low95": interval[0], "high95": interval[1]}
        numbers |= {"interval_over": one.verdict.over if one.verdict.interval else ""}
        cells.append(about | numbers | {"paper_single": theirs[0], "paper_multi": theirs[1]})
        for row in one.rows:
            tags = {name: row.tags[name] for name in ("arm", "seed", "sampling")}
            classes.append(about | {"class": one.titles[row.section], **tags, "fd": row.numbers["fd"]})
    return cells, classes


def figure(stem: Path, found: Sequence[Found]) -> list[Path]:
    """stem.png and stem.svg: relative advantage of every cell and detector with its interval, the paper's beside it."""
    from metrics import figures

    fig, axis = figures.figure(1, 6.0, 1.2 + 0.35 * len(found))
    for y, one in enumerate(found):
        mean, (low, high) = one.verdict.advantage, one.verdict.interval or (math.nan, math.nan)
        style = {"color": figures.LINE["multi"], "marker": "o", "linestyle": "none", "label": OVER[one.verdict.over]}
        figures.intervals(axis, [100 * mean], [y], [[100 * (mean - low)], [100 * (high - mean)]], across=True, **style)
        if theirs := _published(one):
            style = {"color": figures.NEUTRAL, "marker": "D", "linestyle": "none", "fillstyle": "none"}
            axis.plot([100 * (1 - theirs[1] / theirs[0])], [y], **style, label="paper")
    names = [", ".join([line[0], f"K = {line[1]}", f"n = {line[2]}", line[3]]) for line in _cell_lines(found)]
    axis.set_yticks(range(len(found)), names)
    axis.axvline(0, color="black", linewidth=0.7)
    axis.set(ylim=(len(found) - 0.5, -0.5), xlabel="Relative advantage of the shared model (%)")
    figures.legend(fig, loc="outside lower center", ncols=2)
    return figures.save(fig, stem, dpi=150)


def to_markdown(found: Sequence[Found], notes: Sequence[str]) -> str:
    """The table of all cells, then one per cell with a line per class, then the notes."""
    head = ["similarity", "K", "n", "metric", "single", "multi", "advantage (95 %)"]
    text = markdown([*head, "paper: single", "paper: multi", "paper: advantage"], _cell_lines(found)) + "\n\n"
    for one, line in zip(found, _cell_lines(found), strict=True):
        rows = []
        for source in one.sources:
            cells = [one.cells[arm, source, "fd"] for arm in ARMS]
            shown = [_plus_minus(cell.mean, cell.sd_sampling) for cell in cells]
            rows.append([one.titles[source], *shown, f"{one.verdict.per_source[source]:.1%}"])
        text += f"**{line[0]}, K = {line[1]}, n = {line[2]}, {line[3]}**: {one.verdict}\n\n"
        text += markdown(["class", *ARMS, "advantage"], rows) + "\n\n"
    return (
        text
        + (
            "Single, multi: mean over classes of the distance of a class's images to all its real ones ± standard deviation "
            "over sampling seeds. Advantage: mean over classes of (single - multi) / single; the paper's is of the means.\n\n"
        )
        + "".join(f"- {note}\n" for note in notes)
    )


def write_cells(
    scores: str, dest: str | Path, train_multi: str | None, train_single: str | None, notes: Sequence[str] = ()
) -> str:
    """Write table.md, cells.csv, classes.csv, cells.png and cells.svg into the folder `dest`; returns the text of table.md.

    scores: glob of score files with the tags arm, seed, source, sim, k, n. train_multi, train_single: the training data of
    the arms, %sim, %k, %n and %class standing for these: of every cell the hashes are compared. Raises ValueError as
    `find` does.
    """
    from metrics.report import same_data

    rows = of_sources(read_scores(scores, ["arm", "seed", "source", "sim", "k", "n"]))
    found, left_out = find(rows)
    notes, dest = [*notes, *left_out], Path(dest)
    for one in {one.key: one for one in found}.values() if train_multi and train_single else ():
        sim, k, n = one.key
        path = lambda text, source="", sim=sim, k=k, n=n: (
            text.replace("%sim", sim).replace("%k", k).replace("%n", n).replace("%class", source)
        )
        line = same_data(path(train_multi), [path(train_single, source) for source in one.sources])
        notes.append(f"{SIMILARITY.get(sim, sim)}, K = {k}, n = {n}: {line}")
    for detector in dict.fromkeys(one.detector for one in found):
        part = [row.compared for one in found if one.detector == detector for row in one.rows]
        counts = [sorted({about[i] for about in part if about[i]}) for i in (2, 1)]
        made, real = (f"{c[0]} to {c[-1]}" if len(c) > 1 else str(*c) for c in counts)
        notes.append(f"{detector}: {made} generated images of a class and sampling seed, {real} real ones.")
    cells, classes = _csv_rows(found)
    write_csv(dest / "cells.csv", cells)
    write_csv(dest / "classes.csv", classes)
    text = to_markdown(found, notes)
    write_text(dest / "table.md", text)
    figure(dest / "cells", found)
    return text
