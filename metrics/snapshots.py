"""Scores of generated images: of one snapshot, or of all snapshots of a run on several blocks of seeds, kept and resumed.

`gen` is the body of calculate_metrics.py gen, `while_training` the same work as a hook of train_edm2.py. Heavy imports
happen inside, as in metrics/commands.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dnnlib import cells, outputs
from dnnlib.util import EasyDict, natural_key, write_text
from metrics import commands

if TYPE_CHECKING:
    import torch

    from torch_utils.persistence import Snapshot
    from training.sampling import Sampling

FOLDER = outputs.Kind("a folder of scores", outputs.folder_with(r"metrics\.jsonl", "cells"), folder=True)
LINES, CURVE = "metrics.jsonl", "metrics"
EVAL_FOLDER = "metrics"  # in a run folder: of the hook, and of `gen` with a pattern


class Found(NamedTuple):
    """A snapshot file and what its header says of the time."""

    path: str
    nimg: int | None
    ema: str

    @classmethod
    def of(cls, path: str, header: Mapping) -> Found:
        """The file of such a header."""
        return cls(path, header.get("nimg"), str(header.get("ema") or "ema"))

    @property
    def kimg(self) -> int | None:
        """Thousands of images."""
        return None if self.nimg is None else self.nimg // 1000

    @property
    def checkpoint(self) -> str:
        """What its scores are called by."""
        return Path(self.path).stem if self.kimg is None else f"{self.kimg:07d}-{self.ema}"


def find(pattern: str, min_kimg: int | None = None, max_kimg: int | None = None) -> list[Found]:
    """The snapshots that a pattern matches, by time; of several files of one average and time (best) the first.

    Raises ValueError for none, and for snapshots of several folders, or that do not say how long they were trained.
    """
    from torch_utils.persistence import read_header

    found = {}
    for path in sorted(glob.glob(pattern), key=natural_key):
        one = Found.of(path, read_header(path))
        found.setdefault((os.path.dirname(path), one.checkpoint), one)
    if not found:
        raise ValueError(f"--net={pattern}: no snapshot matches; train first, or mend the pattern")
    if len({os.path.dirname(one.path) for one in found.values()}) > 1:
        raise ValueError(f"--net={pattern}: matches snapshots of several folders; score one run at a time")
    if None in (times := [one.kimg for one in found.values()]):
        path = next(one.path for one in found.values() if one.kimg is None)
        raise ValueError(f"--net={pattern}: {path} does not say how long it was trained; give it alone")
    low, high = min_kimg or 0, max(times) if max_kimg is None else max_kimg
    chosen = [one for one in found.values() if low <= one.kimg <= high]
    if not chosen:
        given = " ".join(f"--{n}-kimg={v}" for n, v in (("min", min_kimg), ("max", max_kimg)) if v is not None)
        raise ValueError(f"{given}: none of {len(found)} snapshots, which are of {min(times)} to {max(times)} kimg")
    return sorted(chosen, key=lambda one: (one.kimg, one.ema))


def generated(
    snapshot: Snapshot, first: int, chosen: Sampling, prepared: commands.Prepared, o: EasyDict, device: torch.device
) -> dict | None:
    """Scores of the images of the seeds first to first + --num - 1 of one snapshot; None but on rank 0."""
    from metrics.features import collect, generated_batches, progress_bar
    from training import fit, generation

    prepared.require(fit.of_samples("--net", snapshot))
    batches = generated_batches(generation.batches(chosen, range(first, first + o.num), device, net=snapshot))
    num_sources = max(reference.num_sources for reference in prepared.references.values())
    with progress_bar(o.num, "gen") as progress:
        samples = collect(batches, prepared.detectors, num_sources=num_sources, num_images=o.num, progress=progress)
    return commands.scores(snapshot.path, samples, prepared, EasyDict({**o, "seed": first}), snapshot.sources)


def gen(o: EasyDict) -> None:
    """Generate images from one snapshot, or from all that a pattern matches, and score them."""
    from torch_utils import persistence
    from training import fit, generation, sampling
    from training.encoders import use_vae

    chosen = sampling.take(o)
    chosen.max_batch_size = o.batch
    many = not os.path.exists(chosen.net) and glob.escape(chosen.net) != chosen.net
    for option, path in (("--net", None if many else chosen.net), ("--gnet", chosen.gnet)):
        if not (path is None or path in generation.NULL_GUIDES or "://" in path or os.path.exists(path)):
            raise ValueError(f"{option}={path}: no such file; give a snapshot")
    if not many and (o.min_kimg, o.max_kimg) != (None, None):
        raise ValueError("--min-kimg and --max-kimg choose among snapshots: give a pattern, --net='RUN/*.safetensors'")
    device = commands.start(o.device)
    found = find(chosen.net, o.min_kimg, o.max_kimg) if many else [Found(chosen.net, None, "ema")]
    snapshot = persistence.load_snapshot(found[0].path, device)
    use_vae(snapshot.encoder, chosen.vae)
    if not many:
        found = [Found.of(snapshot.path, snapshot.header)]
    prepared = commands.prepare(o, device, fit.of_samples("--net", snapshot))
    if not many and o.blocks == 1 and o.outdir is None:
        commands.finish(generated(snapshot, o.seed, chosen, prepared, o, device), o.dest)
        return
    folder = o.outdir or (os.path.join(os.path.dirname(found[0].path), EVAL_FOLDER) if many else None)
    held = outputs.claimed("--outdir", folder, FOLDER) if many and o.outdir is None else contextlib.nullcontext()
    with held:
        commands.finish(score_all(found, chosen, prepared, o, device, folder), o.dest)


def score_all(
    found: Sequence[Found],
    chosen: Sampling,
    prepared: commands.Prepared,
    o: EasyDict,
    device: torch.device,
    folder: str | Path | None,
) -> dict | None:
    """Scores of every snapshot on every block of seeds, the summary of `summary`; None but on rank 0.

    folder: finished scores are kept in and read from its `cells`; their rows are written to metrics.jsonl, score files a
    line, and the numbers over time to metrics.png and .svg. None: nothing is written.
    """
    import tqdm

    from torch_utils import distributed as dist
    from torch_utils import persistence
    from training.encoders import use_vae

    leads = dist.get_rank() == 0

    @functools.lru_cache(maxsize=1)
    def load(path):
        snapshot = persistence.load_snapshot(path, device)
        use_vae(snapshot.encoder, chosen.vae)
        return snapshot

    firsts = [o.seed + block * o.num for block in range(o.blocks)]
    todo, rows, fresh = [(one, first) for one in found for first in firsts], [], []

    def work(one, first):
        fresh.append(one)
        row = generated(load(one.path), first, chosen, prepared, o, device)
        return row and {**row, "kimg": one.kimg, "ema": one.ema}

    how = _identity(chosen, prepared, o)
    identity = lambda one, first: {"snapshot": _digest(one.path, os.stat(one.path).st_mtime_ns), "first": first, **how}
    for one, first in tqdm.tqdm(todo, desc="snapshots", unit="score", file=sys.stderr, disable=not leads):
        if folder is None:
            row = work(one, first)
        else:
            place = Path(folder) / "cells"
            (row,) = cells.run([(one, first)], work, place, identity=identity, keep=leads, looked=dist.barrier)
        if leads:
            tags = {"checkpoint": one.checkpoint, "sampling": str(first), **o.tags}
            rows.append(row | {"images": one.path, "tags": tags})
            if folder is not None and (fresh or len(rows) == len(todo)):
                write_text(Path(folder) / LINES, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    if not leads:
        return None
    files = [] if folder is None else [str(Path(folder) / LINES), *curve(rows, Path(folder) / CURVE)]
    about = {"net": chosen.net, "num": o.num, "seeds": firsts, "tags": o.tags, "files": files}
    return about | {"metrics": summary(rows)}


@functools.lru_cache(maxsize=4096)
def _digest(path, changed):
    return cells.digest(path)


def _identity(chosen, prepared, o):
    """What scores depend on besides snapshot and seeds, as plain data."""
    from metrics.detectors import about
    from training.generation import NULL_GUIDES

    aside = ("net", "preset", "models", "max_batch_size")
    same = {name: value for name, value in dataclasses.asdict(chosen).items() if name not in aside}
    for name in ("gnet", "process", "labels"):
        if same[name] is not None and same[name] not in NULL_GUIDES and os.path.isfile(same[name]):
            same[name] = cells.digest(same[name])
    sets = {"reference": prepared.references, "training": prepared.training or {}}
    seen = {name: {k: [v.content(), v.count(), v.num_sources] for k, v in part.items()} for name, part in sets.items()}
    options = {name: o[name] for name in ("num", "distances", "splits", "per_source")}
    detectors = {key: about(detector) for key, detector in prepared.detectors.items()}
    return {"sampling": same, "detectors": detectors, **seen, **options}


def _measured(rows):
    """{detector: distances that all rows have}."""
    shown = {}
    for detector in rows[0]["metrics"]:
        overall = [row["metrics"][detector]["overall"] for row in rows]
        shown[detector] = [name for name in ("fd", "kid") if all(part.get(name) is not None for part in overall)]
    return shown


def summary(rows: Sequence[dict]) -> dict:
    """{detector: {"best": {name of the distance in the literature: `results.best_of`}}}: minimum, mean, spread of blocks."""
    from metrics.evaluate import literature_name
    from metrics.results import best_of, rows_of

    numbers = [r for i, row in enumerate(rows) for r in rows_of(row, f"row {i}")]
    best = lambda detector, names: {literature_name(detector, n): best_of(numbers, n, detector) for n in names}
    return {detector: {"best": best(detector, names)} for detector, names in _measured(rows).items()}


def curve(rows: Sequence[dict], stem: Path) -> list[str]:
    """Figure: every distance over training time, a line per average: lowest of the blocks, a band over all of them."""
    from metrics import figures
    from metrics.evaluate import literature_name

    rows = [row for row in rows if row["kimg"] is not None]
    panels = [(detector, name) for detector, names in _measured(rows).items() for name in names] if rows else []
    if not panels:
        return []
    emas = sorted({row["ema"] for row in rows}, key=natural_key)
    fig, axes = figures.figure(len(panels), squeeze=False)
    for axis, (detector, name) in zip(axes[0], panels, strict=True):
        for ema, style in zip(emas, figures.ordered(emas), strict=True):
            blocks = {row["kimg"]: [] for row in rows if row["ema"] == ema}
            for row in (row for row in rows if row["ema"] == ema):
                blocks[row["kimg"]].append(row["metrics"][detector]["overall"][name])
            times, ends = sorted(blocks), [[end(blocks[time]) for time in sorted(blocks)] for end in (min, max)]
            axis.plot(times, ends[0], markersize=3, label=ema if ema == "ema" else f"EMA {ema}", **style)
            if ends[0] != ends[1]:  # several blocks
                figures.band(axis, times, *ends, color=style["color"], label=figures.RANGE)
        axis.set(xlabel="training images (thousands)", ylabel=literature_name(detector, name))
        axis.locator_params(axis="x", nbins=6)
    figures.legend(fig, loc="outside upper center", ncols=4)
    return [str(path) for path in figures.save(fig, stem)]


def while_training(config: object) -> Callable | None:
    """Hooks for training.setup.train_command: Run -> {"on_snapshot": scores the snapshots at every --eval-every}.

    config: the options eval_nimg, eval_metrics, eval_ref, eval_num of a TrainingConfig. None without --eval-every. What
    does not fit is a ValueError before training starts. The scores are those of `gen` on the same files, and lie where
    `gen --net='RUN/*.safetensors'` looks for them.
    """
    if not config.eval_nimg:
        return None

    def hooks(run):
        from torch_utils import distributed as dist
        from torch_utils.persistence import Snapshot
        from training import fit
        from training.sampling import Sampling

        options = commands.compared(ref=config.eval_ref, metrics=config.eval_metrics, num=config.eval_num)
        device = run.feed.device
        run.encoder.init(device)
        made = Snapshot(run.objective.net, run.encoder, header=run.header, path=str(config.data))
        prepared = commands.prepare(options, device, fit.of_samples("--data", made))

        def on_snapshot(loop):
            due = lambda nimg: nimg and (nimg % config.eval_nimg == 0 or nimg == loop.periods.total_nimg)
            if not due(loop.state.cur_nimg):
                return
            dist.barrier()  # the first process has written the snapshots
            found = find(os.path.join(glob.escape(str(loop.run_dir)), "network-snapshot-[0-9]*.safetensors"))
            upto = [one for one in found if one.kimg <= loop.kimg and due(one.nimg)]
            chosen = Sampling(net=str(loop.run_dir), vae=config.vae, max_batch_size=options.batch)
            score_all(upto, chosen, prepared, options, device, loop.run_dir / EVAL_FOLDER)

        return {"on_snapshot": on_snapshot}

    return hooks
