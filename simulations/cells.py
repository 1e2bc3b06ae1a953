"""Sweeps of expensive cells: every finished (configuration, rule, seed) is kept, so that a run can be interrupted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dnnlib.util import write_json
from metrics.table import mean_and_error
from simulations.bounds import Bound


def run_cells(
    configs: Sequence,
    seeds: Sequence[int],
    rule,
    run_cell: Callable,
    outcome_type: type,
    folder: Path,
    fresh: bool = False,
    progress: Callable[[list], Iterable] = iter,
) -> list[list]:
    """Outcomes [configs][seeds]; finished cells are read back from `folder` unless `fresh`.

    Args:
        configs, rule: dataclasses; together with the seed they name a cell.
        run_cell:      (config, rule, seed) -> outcome, a dataclass of numbers.
        outcome_type:  class of the outcome.
        folder:        one JSON file per finished cell.
        progress:      wraps the list of cells, e.g. tqdm.
    """
    table = [[None] * len(seeds) for _ in configs]
    for c, s in progress([(c, s) for c in range(len(configs)) for s in range(len(seeds))]):
        inputs = {"config": dataclasses.asdict(configs[c]), "rule": dataclasses.asdict(rule), "seed": seeds[s]}
        kind = type(configs[c]).__name__
        text = json.dumps([kind, inputs], sort_keys=True)
        path = Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        outcome = None if fresh else _read(path, outcome_type)
        if outcome is None:
            outcome = run_cell(configs[c], rule, seeds[s])
            write_json(path, inputs | {"outcome": dataclasses.asdict(outcome)})
        table[c][s] = outcome
    return table


def _read(path: Path, outcome_type: type):
    try:
        return outcome_type(**json.loads(path.read_text(encoding="utf-8"))["outcome"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or of an older form: run it again


def seed_rows(tag: str, configs: Sequence, seeds: Sequence[int], table: list[list]) -> list[dict[str, object]]:
    """One row per configuration and seed: the swept value, the seed, the configuration, the outcome."""
    rows = []
    for config, outcomes in zip(configs, table, strict=True):
        for seed, outcome in zip(seeds, outcomes, strict=True):
            rows.append({tag: getattr(config, tag), "seed": seed} | _rest(config, tag) | dataclasses.asdict(outcome))
    return rows


def summary_row(tag: str, config, outcomes: Sequence, bound: Bound, published=None) -> dict[str, object]:
    """Means and standard errors over seeds of one cell, beside the prediction and the published pair (if any)."""
    single, multi = (mean_and_error(getattr(o, arm) for o in outcomes) for arm in ("single", "multi"))
    gain = mean_and_error(o.single - o.multi for o in outcomes)
    row = {tag: getattr(config, tag)} | _rest(config, tag)
    row |= {
        "seeds": len(outcomes),
        "TV of single": single[0],
        "TV of multi": multi[0],
        "advantage (abs)": gain[0],
        "standard error of single": single[1],
        "standard error of multi": multi[1],
        "standard error of advantage": gain[1],
        "measured ratio": multi[0] / single[0] if single[0] else 1.0,
        "predicted ratio": bound.ratio,
        "beta_sim": bound.beta_sim,
        "sharp bound of single": bound.single.sharp,
        "sharp bound of multi": bound.multi.sharp,
        "sharp bound of multi vacuous": int(bound.multi.vacuous),
        "sources without data": sum(o.empty for o in outcomes),
    }
    for name in ("histogram", "pooled", "uniform"):
        row[f"TV of {name}"] = mean_and_error(getattr(o, name) for o in outcomes)[0]
    if published is not None:
        keys = ("published TV of single", "published TV of multi", "published ratio")
        pair = published.get(getattr(config, tag))
        values = ("", "", "") if pair is None else (*pair, pair[1] / pair[0])
        row |= dict(zip(keys, values, strict=True))
    return row


def _rest(config, tag: str) -> dict[str, object]:
    return {k: v for k, v in dataclasses.asdict(config).items() if k != tag}
