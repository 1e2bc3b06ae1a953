"""One self-contained page about runs and experiments: tables, samples over training, curves, plan, options, theory.

Everything is read from the folders as they are; the page (page.html) holds its pictures and needs no network.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dnnlib import outputs
from dnnlib.reading import read_json
from dnnlib.util import format_time, natural_key, reason, write_text
from metrics.results import Row, read_scores, theory_ratio
from metrics.table import grouped, read_csv

if TYPE_CHECKING:
    from PIL.Image import Image

SIGN = "multi-source diffusion report"  # what a page is recognised by
PAGE = outputs.Kind("a report of this project", lambda path: SIGN.encode() in path.open("rb").read(2**10))
MOST_FRAMES = 16  # sample grids of a run
MOST_GRIDS = 200  # of an experiment
MOST_LABELS = 12  # kinds of models that are told apart in curves and options
MOST_WIDTH = 1200  # pixels of a picture
MOST_BYTES = 300_000  # of a picture without losses
COLUMNS = 8  # images of a source
PLAN = ("plan.md", "multiplier.csv", "transfer.csv", "curves.png", "transfer.png")  # what plan.py writes
REAL = "real images"


@dataclass
class Run:
    """A run folder, and what the experiment around it says of it."""

    name: str
    folder: Path
    lines: list[dict]
    options: dict
    header: dict  # of one of its snapshots
    arm: str
    seed: str

    @property
    def sources(self) -> list[int]:
        return self.header.get("sources") or []

    @property
    def per_source(self) -> int:
        """What turns training images into those of each source."""
        return len(self.sources) or 1


@dataclass
class Part:
    """What the page says of one experiment, or of a run alone."""

    title: str
    answers: list[str] = field(default_factory=list)
    blocks: list[tuple] = field(default_factory=list)  # of table.md, see `blocks_of`
    figures: list[dict] = field(default_factory=list)
    runs: list[dict] = field(default_factory=list)  # lines of a table
    samples: dict | None = None
    curves: list[dict] = field(default_factory=list)
    plan: dict | None = None
    options: dict | None = None
    theory: dict | None = None


def uri(data: bytes, kind: str) -> str:
    """`data` as the address of an image."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture(image: Image | Path) -> dict[str, object]:
    """{"src", "width", "height"} of an image in the page: PNG, or WebP where that would be large."""
    import PIL.Image

    image = PIL.Image.open(image) if isinstance(image, Path) else image
    image = image.convert("RGB")
    if image.width > MOST_WIDTH:
        image = image.resize((MOST_WIDTH, round(image.height * MOST_WIDTH / image.width)), PIL.Image.LANCZOS)
    for kind, more in (("png", {"optimize": True}), ("webp", {"quality": 85})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **more)
        if buffer.tell() < MOST_BYTES:
            break
    return {"src": uri(buffer.getvalue(), kind), "width": image.width, "height": image.height}


def blocks_of(text: str) -> list[tuple]:
    """The Markdown of reports as ("table", header, rows), ("list", lines) and ("text", line); a heading is a text."""
    found = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = block.strip().splitlines()
        if all(line.startswith("|") for line in lines) and len(lines) > 1:
            cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
            found.append(("table", cells[0], cells[2:]))
        elif all(line.startswith("- ") for line in lines):
            found.append(("list", [line[2:] for line in lines]))
        elif block.strip():
            found.append(("text", " ".join(lines).lstrip("# ")))
    return found


def inline(text: str) -> str:
    """Bold, code and ± of one line of Markdown as HTML, everything else escaped."""
    import markupsafe

    safe = str(markupsafe.escape(str(text).replace(" +- ", " ± ")))
    safe = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", safe)
    return markupsafe.Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", safe))


def _local(path, folder):
    """A path that a score file names, where it is now: the experiment's folder may have been moved."""
    parts = Path(path).parts
    return next((p for p in (folder.joinpath(*parts[i:]) for i in range(1, len(parts))) if p.exists()), Path(path))


# --- Reading ----------------------------------------------------------------------------------------------------------


def is_run(folder: str | Path) -> bool:
    return (Path(folder) / "training_options.json").is_file()


def read_runs(folder: Path, rows: Sequence[Row] = ()) -> list[Run]:
    """The runs in a folder (or the folder itself), with the arm and seed that the scores of their networks name."""
    from metrics.curves import read_run
    from torch_utils.persistence import read_header

    if not folder.is_dir():
        raise ValueError(f"{folder}: no folder of results or of a run")
    tags = {Path(row.net).parent.name: row.tags for row in rows if row.net}
    found = []
    for place in sorted(
        {path.parent for path in folder.rglob("training_options.json")}, key=lambda p: natural_key(str(p))
    ):
        if "replaced" in place.parts or not (place / "stats.jsonl").is_file():
            continue
        own, saved = tags.get(place.name, {}), sorted(place.glob("network-snapshot-*.safetensors"))
        name = place.name if place == folder else str(place.relative_to(folder)).removeprefix("runs/")
        options = read_json(place / "training_options.json")
        header = read_header(saved[-1]) if saved else {}
        arm, seed = own.get("arm", name), own.get("seed", str(options.get("seed", "")))
        found.append(Run(name, place, read_run(place), options, header, arm, seed))
    return found


def read_part(folder: str | Path) -> Part:
    """Everything that the page says of a folder. Raises ValueError for one that holds neither results nor runs."""
    folder = Path(folder)
    scored = any((folder / "scores").glob("*.json"))
    rows = read_scores(folder / "scores" / "*.json", needed=()) if scored else []
    runs, part = read_runs(folder, rows), Part(folder.resolve().name)
    plan = _plan(folder)
    if not (rows or runs or plan or (folder / "table.md").is_file()):
        raise ValueError(f"{folder}: neither results (scores, table.md, plan.md) nor a run (training_options.json)")
    for path in sorted(folder.glob("*.md")):
        if path.name not in PLAN:
            part.blocks += blocks_of(path.read_text(encoding="utf-8"))
    bold = lambda block: block[0] == "text" and re.fullmatch(r"\*\*[^*]+\*\*", block[1])
    part.answers = [text[:1].upper() + text[1:] for text in (b[1].strip("*") for b in part.blocks if bold(b))]
    part.blocks = [block for block in part.blocks if not bold(block)]
    for path in sorted(folder.glob("*.png")):
        if path.name not in PLAN and not path.name.startswith("samples-"):
            alt = f"{path.stem}: {part.answers[0]}" if part.answers else f"Figure {path.stem} of {part.title}"
            part.figures.append(picture(path) | {"alt": alt, "caption": path.name})
    part.plan = plan
    return _with_runs(part, folder, rows, runs)


def read_alone(folders: Sequence[Path]) -> Part:
    """What the page says of runs that are no part of an experiment."""
    runs = [run for folder in folders for run in read_runs(folder)]
    if not runs:
        raise ValueError(f"{folders[0]}: no stats.jsonl yet, nothing to show")
    names = [run.name for run in runs]
    for run in runs if len(set(names)) < len(names) else ():
        run.name = run.arm = str(run.folder)
    return _with_runs(Part(", ".join(run.name for run in runs)), folders[0], (), runs)


def _with_runs(part, folder, rows, runs):
    part.runs = [_run_line(run) for run in runs]
    part.samples, part.curves = _samples(folder, rows, runs), _curves(runs)
    part.options, part.theory = _options(runs), _theory(rows, runs)
    return part


def _run_line(run):
    from metrics.curves import SPEED, best_line

    last = run.lines[-1] if run.lines else {}
    best = best_line(run.lines) or {}
    whole = [line for line in run.lines if line.get("Loss/loss") is not None]
    short = lambda value, form: "" if value is None else format(value, form)
    speeds = sorted(line[SPEED] for line in run.lines if line.get(SPEED))
    times = [line["Timing/total_sec"] for line in run.lines if "Timing/total_sec" in line]
    names = run.header.get("dataset", {}).get("class_names")
    return {
        "run": run.name,
        "model": run.arm,
        "seed": run.seed,
        "sources": ", ".join(names[k] if names else str(k) for k in run.sources),
        "thousand images": short(last.get("Progress/kimg"), ".4g"),
        "training loss": short(whole[-1]["Loss/loss"] if whole else None, ".4f"),
        "lowest validation loss": short(best.get("Loss/validation"), ".4f"),
        "at thousand images": short(best.get("Progress/kimg"), ".4g"),
        "images/s": short(speeds[len(speeds) // 2] if speeds else None, ".0f"),
        "time": format_time(times[-1]) if times else "",
    }


# --- Samples ----------------------------------------------------------------------------------------------------------


def _samples(folder, rows, runs):
    """{"arms", "seeds", "at", "labels", "strips"}: sample grids of every run over training, then what was scored, real ones."""
    strips = [strip for run in runs if (strip := _grids(run, max(2, min(MOST_FRAMES, MOST_GRIDS // len(runs)))))]
    strips += _scored(folder, rows)
    if not strips:
        return None
    strips += [strip for strip in [_real(folder, runs)] if strip]
    at = sorted({frame["at"] for strip in strips for frame in strip["frames"] if frame["at"] is not None})
    last = any(strip["last"] for strip in strips)
    labels = [f"after {x:.3g} thousand training images of each source" for x in at]
    arms = sorted({strip["arm"] for strip in strips if strip["arm"] != REAL}, key=natural_key)
    return {
        "arms": [*arms, *(REAL for strip in strips[-1:] if strip["arm"] == REAL)],
        "seeds": sorted({strip["seed"] for strip in strips if strip["seed"]}, key=natural_key),
        "at": [*at, *([None] if last else [])],
        "labels": [*labels, *(["the networks that were scored"] if last else [])],
        "strips": strips,
    }


def _grids(run, most):
    """The samples-<kimg>.png of a run, so many of them at most, evenly spread."""
    paths = sorted(run.folder.glob("samples-*.png"), key=lambda path: natural_key(path.name))
    known = [(int(match[1]), path) for path in paths if (match := re.fullmatch(r"samples-(\d+)", path.stem))]
    if not known:
        return None
    count = min(most, len(known))
    kept = [known[round(i * (len(known) - 1) / max(count - 1, 1))] for i in range(count)]
    who = f"{run.name}, rows are sources" if run.per_source > 1 else run.name
    frames = [
        picture(path) | {"at": kimg / run.per_source, "alt": f"Samples of {who}, after {kimg} thousand training images"}
        for kimg, path in kept
    ]
    return {"arm": run.arm, "seed": run.seed, "caption": run.name, "last": False, "frames": frames}


def _scored(folder, rows):
    """A strip per arm and seed of the sample folders that were scored, a row per source."""
    found = grouped(
        ((row.tags["arm"], row.tags.get("seed", "")), row) for row in rows
         if row.images and "arm" in row.tags and row.section.isdigit()
         and row.tags.get("source", row.section) == row.section
    )  # fmt: skip
    strips = []
    for (arm, seed), own in found.items():
        places = {row.section: _local(row.images, folder) for row in own}
        shown = _rows_of(places)
        if shown:
            alt = f"Samples of {arm}, seed {seed}, that were scored; rows are sources {', '.join(shown)}"
            frame = _frame(shown, alt)
            strips.append({"arm": arm, "seed": seed, "caption": f"{arm}, scored", "last": True, "frames": [frame]})
    return strips


def _real(folder, runs):
    """A strip of training images of the run of most sources."""
    if not runs:
        return None
    run = max(runs, key=lambda run: run.per_source)
    data = _local(run.options.get("data", ""), folder)
    shown = _rows_of({str(k): data for k in run.sources})
    if not shown:
        return None
    frame = _frame(shown, f"Training images; rows are sources {', '.join(shown)}")
    return {"arm": REAL, "seed": "", "caption": f"training images, {data.name}", "last": False, "frames": [frame]}


def _rows_of(places):
    """{title: images} of the first images of each source in {source: data set}; without those that cannot be opened."""
    import torch

    from training.dataset import ImageFolderDataset

    opened, shown = {}, {}
    for source, place in sorted(places.items(), key=lambda item: natural_key(item[0])):
        try:
            if place not in opened:
                opened[place] = ImageFolderDataset(str(place))
            dataset = opened[place]
            own = dataset.indices_of(int(source)) if dataset.has_onehot_labels else range(len(dataset))
            images = [torch.as_tensor(dataset[i][0]) for i in own[:COLUMNS]]
        except (ValueError, OSError):  # a network, of which nothing was written, or a folder that is gone
            continue
        if images:
            shown[dataset.class_names[int(source)] if dataset.class_names else source] = images
    return shown


def _frame(shown, alt):
    from training.images import grid

    return picture(grid(list(shown.values()), list(shown))) | {"at": None, "alt": alt}


# --- Curves -----------------------------------------------------------------------------------------------------------

DARK = {
    "figure.facecolor": "#1d2126", "axes.facecolor": "#1d2126", "text.color": "#e8eaed", "axes.labelcolor": "#e8eaed",
    "axes.edgecolor": "#a8b0b9", "xtick.color": "#c8ced5", "ytick.color": "#c8ced5", "grid.color": "#a8b0b9",
}  # fmt: skip


def _curves(runs):
    """A picture per quantity, for light and dark pages; runs of an arm look alike."""
    from metrics import curves

    lines = {run.name: run.lines for run in runs if run.lines}
    arms = {run.name: run.arm for run in runs}
    if len(set(arms.values())) > MOST_LABELS:
        arms = dict.fromkeys(arms, f"{len(arms)} runs")
    found = []
    for panel in curves.panels(lines):
        shown = [_drawn(lambda axis, p=panel: curves.draw_panel(axis, p, lines, labels=arms), dark) for dark in (0, 1)]
        found.append({"light": shown[0], "dark": shown[1], "alt": curves.describe(lines, panel, arms)})
    return found


def _drawn(draw: Callable, dark: bool) -> str:
    from metrics import figures

    plt = figures.plt
    with plt.rc_context(DARK if dark else {}):
        fig, axis = figures.figure(1, 4.4, 2.9)
        draw(axis)
        labels = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        if axis.get_legend() is not None:
            axis.get_legend().remove()
        if 0 < len(labels) <= MOST_LABELS:
            across = max(1, min(len(labels), 50 // max(6 + len(label) for label in labels)))
            fig.legend(labels.values(), labels, fontsize=8, ncols=across, loc="outside lower center")  # hides no point
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=140)
        plt.close(fig)
    return uri(buffer.getvalue(), "png")


# --- Plan, options, theory --------------------------------------------------------------------------------------------


def _plan(folder):
    """What plan.py found, where it wrote into this folder: its words, the multiplier by n, the map of transfers."""
    if not (folder / "plan.md").is_file():
        return None
    blocks = blocks_of((folder / "plan.md").read_text(encoding="utf-8"))
    number = lambda value: "" if value == "" else f"{value:.3g}"
    interval = lambda row, name: (
        f"{number(row[name])} ({number(row[name + '_low'])} to {number(row[name + '_high']) or 'no bound'})"
    )
    worth = [[row["n"], interval(row, "gain"), interval(row, "multiplier")] for row in _csv(folder / "multiplier.csv")]
    pairs = _csv(folder / "transfer.csv")
    names = sorted({str(row[side]) for row in pairs for side in ("target", "partner")}, key=natural_key)
    most = max((abs(row["gain"]) for row in pairs), default=0) or 1
    cells = {}
    for row in pairs:
        sure = "helps" if row["low"] != "" and row["low"] > 0 else "harms" if row["negative"] else ""
        kind = "plus" if row["gain"] > 0 else "minus"
        cells[str(row["target"]), str(row["partner"])] = {
            "text": f"{row['gain']:+.3f}", "sure": sure, "kind": kind, "share": round(abs(row["gain"]) / most, 2),
        }  # fmt: skip
    figure = folder / "curves.png"
    return {
        "blocks": blocks,
        "worth": worth,
        "names": names,
        "cells": cells,
        "figure": picture(figure) if figure.is_file() else None,
    }


def _csv(path):
    return read_csv(path) if path.is_file() else []


def _options(runs):
    """{"arms", "differ": [(option, a text per arm)], "same": [(option, text)]} of the configurations."""
    if not runs:
        return None
    arms = grouped((run.arm, run.options) for run in runs)
    if len(arms) > MOST_LABELS:  # no table has so many columns
        arms = {"all runs": [run.options for run in runs]}
    names = list(dict.fromkeys(name for run in runs for name in run.options))
    texts = lambda options, name: sorted({_text(own.get(name)) for own in options}, key=natural_key)
    short = lambda values: ", ".join(values) if len(values) < 4 else f"{len(values)} different ones"
    differ, same = [], []
    for name in names:
        if len(texts([run.options for run in runs], name)) > 1:
            differ.append((name, [short(texts(options, name)) for options in arms.values()]))
        else:
            same.append((name, _text(runs[0].options.get(name))))
    return {"arms": list(arms), "differ": differ, "same": same, "count": len(runs)}


def _text(value):
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _theory(rows, runs):
    """Predicted excess NLL together over alone, 1 - (K-1)/K beta, and the measured ratio at every n where scores have both."""
    from metrics import plan
    from torch_utils.persistence import load_snapshot

    saved = lambda run: sorted(run.folder.glob("network-snapshot-*.safetensors"))
    shared = max((run for run in runs if run.per_source > 1 and saved(run)), key=lambda r: r.per_source, default=None)
    if shared is None:
        return None
    K = shared.per_source
    beta = theory_ratio(load_snapshot(saved(shared)[-1]).net, K)["beta_sim"]
    found = {
        "k": K,
        "beta": f"{beta:.4f}",
        "predicted": f"{1 - (K - 1) / K * beta:.3g}",
        "run": shared.name,
        "measured": [],
    }
    try:
        measured, most, _ = plan.from_scores(rows)
    except ValueError as err:
        return found | {"why": reason(err)}
    if most != K:
        return found | {"why": f"the largest models that were scored have {most} sources"}
    return found | {"measured": [(f"{n:g}", str(measured.excess_ratio(n))) for n in measured.sizes]}


# --- Writing ----------------------------------------------------------------------------------------------------------


def write_page(folders: Sequence[str | Path], dest: str | Path) -> Path:
    """Write the page about these folders of results and runs; returns its path. ValueError where one holds neither."""
    import jinja2

    alone = [Path(folder) for folder in folders if is_run(folder)]
    parts = [read_part(folder) for folder in folders if not is_run(folder)]
    parts += [read_alone(alone)] if alone else []
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["inline"] = inline
    text = environment.get_template("page.html").render(parts=parts, sign=SIGN, real=REAL)
    return write_text(dest, text)
