"""The report of an experiment that declares its contrasts: what every kind of model gains, what is tested, one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import numpy as np

from dnnlib import EasyDict
from dnnlib.util import natural_key, read_stats, write_text
from metrics.contrasts import Contrast, Result, examine_all, gains, of_one_source, read_contrasts
from metrics.results import JOINED, Row, of_detector, read_scores
from metrics.table import grouped, markdown, mean_interval, write_csv

TAGS = ("group", "design", "set", "k", "n", "seed")
MEASURES = ("bits_per_dim", "denoising_loss", "kid", "fd", "agreement", "nearest_train")
LEVEL = "loss_sigma"  # and the noise level: the denoising loss there
READINGS = {
    "loss_equal_per_model": 1,
    "loss_equal_total": None,
}  # images of a model of K sources over a single one's; None: K
FLOORS = ("fd_at_floor_size", "fd_floor", "kid_floor", "agreement_reference", "nearest_train_reference")


def seed_rows(rows: Sequence[Row], reading: dict[str, int] | None) -> list[dict[str, object]]:
    """Lines of seeds.csv: a model and one of its sources each, with all its numbers and where its training stopped; of pairs
    also how far apart the data of the two are.
    """
    table = {}
    members = grouped((row.file, row.section) for row in rows if of_one_source(row))
    apart = {(row.tags["seed"], row.section): row.numbers for row in rows if row.detector == "energy"}
    for row in rows:
        if not of_one_source(row) or "k" not in row.tags:
            continue
        line = table.setdefault((*(row.tags.get(name, "") for name in TAGS), row.section), {})
        line |= {n: v for n, v in row.numbers.items() if n in (*MEASURES, *FLOORS) or n.startswith(LEVEL)}
        for other in set(members[row.file]) - {row.section} if row.tags["k"] == "2" else ():
            distance = apart.get((row.tags["seed"], row.section), {}).get(f"energy_{other}")
            line |= {} if distance is None or row.tags["group"] == "shuffled" else {"distance": distance}
        if row.detector == "denoising" and row.net is not None:
            due = reading.get(row.tags.get("n"), reading.get("")) if reading else None
            line |= _from_run(Path(row.net).parent, row.section, int(row.tags["k"]), due)
    names = list(dict.fromkeys(name for line in table.values() for name in line))
    keys = sorted(table, key=lambda key: [natural_key(part) for part in key])
    return [dict(zip((*TAGS, "source"), key, strict=True)) | {n: table[key].get(n, "") for n in names} for key in keys]


def _from_run(folder, source, k, reading):
    """What the validation curve of a run says: images at its lowest loss, and the loss of a source at fixed numbers of them,
    where it was looked at then (within 1 %): a run that had ended, or was not looked at yet, says nothing.
    """
    looks = [line for line in read_stats(folder) if "Loss/validation" in line]
    found = {"best_kimg": min(looks, key=lambda line: line["Loss/validation"])["Progress/kimg"]}
    for name, times in READINGS.items() if reading else ():
        due = reading * (k if times is None else times) / 1e3
        look = min(looks, key=lambda line: abs(line["Progress/kimg"] - due))
        if abs(look["Progress/kimg"] - due) <= 0.01 * due:
            found[name] = look.get(f"Loss/validation_source{source}", look["Loss/validation"])
    return found


def per_seed(lines: Sequence[dict], measure: str, relative: bool) -> dict[tuple, dict[str, float]]:
    """{(group, design, n, k): {seed: mean over sources of the gain over the single models of the same data}}.

    relative: as a share of the single models' number. A group without single models of its own is compared with `real`.
    """
    of = lambda line: (line["group"], line["n"], line["seed"], line["source"])
    alone = {of(line): line[measure] for line in lines if line["k"] == "1" and line.get(measure, "") != ""}
    own = {line["group"] for line in lines if line["k"] != "1"}
    found = []
    for line in lines:
        group, n, seed, source = of(line)
        base = alone.get((group if group in own else "real", n, seed, source))
        if line.get(measure, "") == "" or base is None or (line["k"] == "1" and group in own):
            continue
        gain = base - line[measure]
        found.append((((group, line["design"], n, line["k"]), seed), gain / base if relative else gain))
    cells = {}
    for (cell, seed), values in grouped(found).items():
        cells.setdefault(cell, {})[seed] = fmean(values)
    return cells


def cell_rows(lines: Sequence[dict]) -> list[dict[str, object]]:
    """Lines of table.csv: a kind of model each, with its gains, their 95 % intervals over seeds, levels and floors."""
    levels = [name for name in lines[0] if name.startswith(LEVEL)]
    gained = {"bits_per_dim": False, "denoising_loss": True, "kid": False, "fd": False}
    gained |= dict.fromkeys([*READINGS, *levels], True)
    tables = {name: per_seed(lines, name, relative) for name, relative in gained.items()}
    kinds = dict.fromkeys((line["group"], line["design"], line["n"], line["k"]) for line in lines)
    rows = []
    for kind in sorted(kinds, key=lambda kind: [natural_key(part) for part in kind]):
        mine = [line for line in lines if (line["group"], line["design"], line["n"], line["k"]) == kind]
        row = dict(zip(("group", "design", "n", "k"), kind, strict=True))
        row |= {"models": len({(line["set"], line["seed"]) for line in mine})}
        stops = [line["best_kimg"] for line in mine if line.get("best_kimg", "") != ""]
        row["best_kimg"] = median(stops) if stops else ""
        for name, table in tables.items():
            values = list(table.get(kind, {}).values())
            mean, _, low, high = mean_interval(values) if len(values) > 1 else [""] * 4
            row |= {
                f"gain_{name}": mean,
                f"gain_{name}_low": low,
                f"gain_{name}_high": high,
                f"seeds_{name}": len(values),
            }
        for name in (*MEASURES, *FLOORS):
            values = [line[name] for line in mine if line.get(name, "") != ""]
            row[name] = fmean(values) if values else ""
        rows.append(row)
    return rows


def _p(p, equal=""):
    return "< 0.0001" if p < 1e-4 else f"{equal}{p:.4f}"


def tested(results: Sequence[Result]) -> str:
    """The contrasts, a line each."""
    shown = [
        [r.contrast.name, f"{r.effect:+.4f} ({r.low:+.4f} to {r.high:+.4f})", _p(r.p), _p(r.holm),
         f"{r.detectable:.4f}"] for r in results
    ]  # fmt: skip
    return (
        f"{markdown(['contrast', 'effect', 'p', 'p (Holm)', 'detectable'], shown)}\n\n"
        "Detectable: the smallest true effect that so many seeds would have shown (p < 0.05) with probability 0.8."
    )


def to_markdown(cells: Sequence[dict], results: Sequence[Result]) -> str:
    """Gains of every kind of model, then the contrasts, then levels of what was generated."""

    def interval(row, name, scale=1.0, digits=3, unit=""):
        if row[f"gain_{name}"] == "":
            return ""
        mean, low, high = (scale * row[f"gain_{name}{end}"] for end in ("", "_low", "_high"))
        seeds = row[f"seeds_{name}"]
        few = f", {seeds} seeds" if seeds < max(other[f"seeds_{name}"] for other in cells) else ""
        return f"{mean:+.{digits}f}{unit} ({low:+.{digits}f} to {high:+.{digits}f}){few}"

    head = ["group", "design", "n", "K", "models", "best at kimg", "gain in bits/dim", "gain in loss", "equal images per model",
            "equal total images"]  # fmt: skip
    short = lambda value: "" if value == "" else f"{value:.1f}"
    shares = ("denoising_loss", "loss_equal_per_model", "loss_equal_total")
    rows = []
    for row in cells:
        about = [row[name] for name in ("group", "design", "n", "k", "models")]
        gained = [interval(row, "bits_per_dim"), *(interval(row, name, 100, 1, " %") for name in shares)]
        rows.append([*about, short(row["best_kimg"]), *gained])
    level = ("bits_per_dim", "denoising_loss", "kid", "kid_floor", "fd_at_floor_size", "fd_floor", "agreement",
             "agreement_reference", "nearest_train", "nearest_train_reference")  # fmt: skip
    shown = [name for name in level if any(row.get(name, "") != "" for row in cells)]
    noise = [name.removeprefix("gain_") for name in cells[0] if name.startswith(f"gain_{LEVEL}") and name[-1].isdigit()]
    by_noise = [
        [*(row[n] for n in ("group", "design", "n", "k")), *(interval(row, n, 100, 1, " %") for n in noise)]
        for row in cells
        if noise and row[f"gain_{noise[0]}"] != ""
    ]
    title = "Gain in denoising loss at each noise level, of the same models:"
    heads = ["group", "design", "n", "K", *(n.removeprefix(LEVEL) for n in noise)]
    by_noise = f"{title}\n\n{markdown(heads, by_noise)}\n\n" if by_noise else ""
    number = lambda value: "" if value == "" else f"{value:.3f}"
    levels = [[row["group"], row["n"], row["k"], *(number(row[name]) for name in shown)] for row in cells]
    return (
        f"{markdown(head, rows)}\n\n"
        "Gain: of a source from being trained with others, against its single model of the same images: mean over sources, "
        "95 % interval by Student's t over seeds. Every model at its lowest validation loss; test images of the ELBO and of "
        "the loss are seen by none. The last two columns: loss on validation images after fixed numbers of training images; "
        "models that had ended before are left out.\n\n"
        f"{tested(results)}\n\n{by_noise}{markdown(['group', 'n', 'K', *(name.replace('_', ' ') for name in shown)], levels)}\n"
    )


def figure(stem: Path, lines: Sequence[dict], pairs: tuple[list, list], results: Sequence[Result]) -> list[Path]:
    """Gain by K and n at the best validation loss; the same runs read in three ways; gain against nearness of the data.

    pairs: (energy distances, gains) of every target and partner, means over seeds.
    """
    from metrics import figures

    fig, (left, middle, right) = figures.figure(3, 3.6, 3.2)
    table = per_seed(lines, "bits_per_dim", False)
    sizes = sorted({n for group, design, n, _ in table if (group, design) == ("real", "partition")}, key=int)
    of = lambda table, n: {c: v for c, v in table.items() if c[:3] == ("real", "partition", n)}
    for n, style in zip(sizes, figures.ordered(sizes), strict=True):
        _curve(left, of(table, n), 1, label=f"$n$ = {n}", **style)
    made = {c: v for c, v in table.items() if c[0] == "shuffled"}
    _curve(left, made, 1, color=figures.NEUTRAL, marker="s", linestyle=":", label="labels shuffled")
    again = [fmean(v.values()) for c, v in table.items() if c[0] == "again"]
    if again:
        left.plot([1] * len(again), again, "x", color=figures.PALETTE[1], label="same arm again", zorder=4)
    left.set(ylabel="gain of a source (bits/dim)")
    ways = {"denoising_loss": "lowest validation loss", "loss_equal_total": "equal images in all",
            "loss_equal_per_model": "equal images per model"}  # fmt: skip
    for (name, label), style in zip(ways.items(), figures.look(list(ways)), strict=True):
        _curve(middle, of(per_seed(lines, name, True), sizes[0]) if sizes else {}, 100, label=label, **style)
    middle.set(ylabel="gain in denoising loss (%)" + (f", $n$ = {sizes[0]}" if sizes else ""))
    for axis in (left, middle):
        axis.axhline(0, color="black", linewidth=0.8)
        numbers = sorted({int(k) for group, design, _, k in table if (group, design) == ("real", "partition")})
        figures.x_ticks(axis, [1, *numbers], log=True)
        axis.set(xlabel=figures.PANEL_LABELS["K"])
        axis.margins(y=0.3)  # room for the legend
        figures.legend(axis, fontsize=7)
    if not pairs[0]:
        right.remove()
        return figures.save(fig, stem, dpi=150)
    right.axhline(0, color="black", linewidth=0.8)
    right.plot(*pairs, linestyle="none", color=figures.LINE["multi"], marker=figures.MARKER["multi"], markersize=3)
    right.set(xlabel="energy distance of the training images", ylabel="gain of a pair (bits/dim)")
    ranked = [r for r in results if r.contrast.rank]
    if ranked:
        said = f"rank correlation {ranked[0].effect:+.2f}, $p$ {_p(ranked[0].p, '= ')}"
        right.set_title(f"within target: {said}", fontsize=8)
    return figures.save(fig, stem, dpi=150)


def _curve(axis, table, scale, **style):
    """Means over seeds with their 95 % intervals, by K; a model of one source gains nothing by definition."""
    from metrics import figures

    points = sorted((int(k), list(values.values())) for (*_, k), values in table.items())
    if points:
        ends = [mean_interval(v) for _, v in points]
        y = np.array([0, *(mean for mean, *_ in ends)]) * scale
        half = np.array([np.nan, *(high - mean for mean, _, _, high in ends)]) * scale
        figures.intervals(axis, [1, *(k for k, _ in points)], y, half, markersize=4, **style)


def pair_points(rows: Sequence[Row], contrast: Contrast | None) -> tuple[list[float], list[float]]:
    """Energy distances and gains of every target and partner, means over seeds; empty without such a contrast."""
    if contrast is None:
        return [], []
    found = gains(rows, contrast)
    members = grouped((row.file, row.section) for row, _ in found)
    apart = {(row.tags["seed"], row.section): row.numbers for row in rows if row.detector == contrast.rank}
    points = []
    for row, gain in found:
        (other,) = (s for s in members[row.file] if s != row.section)
        points.append(((row.section, other), (apart[row.tags["seed"], row.section][f"{contrast.rank}_{other}"], gain)))
    means = [np.mean(values, axis=0).tolist() for values in grouped(points).values()]
    return [x for x, _ in means], [y for _, y in means]


def write_contrasts_report(
    rows: Sequence[Row], dest: Path, file: str, metric: str | None = None, reading: dict[str, int] | None = None
) -> str:
    """Write table.csv, seeds.csv, contrasts.csv, table.md and comparison.png into `dest`; returns the text of table.md.

    file: the experiment file that declares the contrasts; reading: images after which the validation loss is read, too, by
    tag n ("": any).
    Without scores that say their number of sources (tag k), the contrasts alone: contrasts.csv and table.md.
    """
    contrasts, sizes = read_contrasts(file), {row.tags.get("n") for row in rows}
    if reading and reading.keys().isdisjoint({"", *sizes}):
        raise ValueError(f"--reading: no scores have the tag n = {' or '.join(reading)}; give those that do")
    apart = {contrast.rank for contrast in contrasts}
    by_level = [
        replace(row, detector=LEVEL, numbers=levels)
        for row in rows
        if (levels := {name: v for name, v in row.numbers.items() if name.startswith(LEVEL)})
    ]
    asked = {contrast.measure for contrast in contrasts} - set(JOINED.values())  # more numbers of likelihoods, losses
    more = [
        replace(row, numbers=numbers)
        for row in rows
        if row.detector in JOINED and (numbers := {name: v for name, v in row.numbers.items() if name in asked})
    ]
    rows = [
        *of_detector([r for r in rows if r.detector not in apart], metric),
        *(r for r in rows if r.detector in apart),
    ]
    results = examine_all([*rows, *more], contrasts)
    write_csv(dest / "contrasts.csv", [result.row for result in results])
    lines = seed_rows([*rows, *by_level], reading)
    if not lines:
        write_text(dest / "table.md", f"{tested(results)}\n")
        return tested(results)
    cells = cell_rows(lines)
    text = to_markdown(cells, results)
    write_csv(dest / "seeds.csv", lines)
    write_csv(dest / "table.csv", cells)
    write_text(dest / "table.md", text)
    ranked = next((contrast for contrast in contrasts if contrast.rank), None)
    figure(dest / "comparison", lines, pair_points(rows, ranked), results)
    return text


def report_command(o: EasyDict) -> None:
    """calculate_metrics.py report --contrasts."""
    print(write_contrasts_report(read_scores(o.scores), Path(o.dest), o.contrasts, o.metric, o.reading))
