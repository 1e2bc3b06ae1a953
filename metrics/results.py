"""Score files and what they say of one arm against another: means, spreads over seeds, the verdict, the theory's ratio.

A score file is the JSON that `calculate_metrics.py calc --dest=FILE --tag ...` writes: the numbers of one set of samples with
tags arm, source, seed (training) and sampling. Nothing is read from paths.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import scipy.stats

NEEDED_TAGS = ("arm", "seed")
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
)


def read_scores(paths):
    """Rows {tag or column: value} of score files. Raises ValueError for a file that is none, or for none at all."""
    rows = []
    for path in paths:
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            tags = content["tags"]
            missing = [name for name in NEEDED_TAGS if name not in tags]
            if missing:
                raise ValueError(f"{path}: no tag {missing[0]!r}: score with --tag {missing[0]}=...")
            for detector, result in content["metrics"].items():
                chosen = [str(tags["source"])] if "source" in tags else list(result["sources"])
                for source in chosen:
                    values = {name: result["sources"][source].get(name) for name in COLUMNS}
                    more = {"source": source, "detector": detector, "images_path": content.get("images")}
                    rows.append({"sampling": "0", **tags, **more, **values})
        except (OSError, KeyError, TypeError, json.JSONDecodeError) as err:
            raise ValueError(f"{path}: not a score file with tags ({type(err).__name__}: {err})") from err
    if not rows:
        raise ValueError("no score files: run calculate_metrics.py calc with --dest and --tag first")
    return rows


@dataclass
class Cell:
    """One number of one arm on one source: its values by (training seed, sampling seed)."""

    values: dict = field(default_factory=dict)

    def by_seed(self):
        """Means over sampling seeds, one per training seed, in order of the seeds."""
        seeds = defaultdict(list)
        for (seed, _), value in self.values.items():
            seeds[str(seed)].append(value)
        return {seed: float(np.mean(v)) for seed, v in sorted(seeds.items())}

    @property
    def mean(self):
        return float(np.mean(list(self.by_seed().values())))

    @property
    def sd_training(self):
        """Spread over training seeds; None for one seed."""
        means = list(self.by_seed().values())
        return float(np.std(means, ddof=1)) if len(means) > 1 else None

    @property
    def sd_sampling(self):
        """Spread over sampling seeds within training seeds (pooled); None for one sampling seed."""
        groups = defaultdict(list)
        for (seed, _), value in self.values.items():
            groups[seed].append(value)
        spread = [np.var(v, ddof=1) for v in groups.values() if len(v) > 1]
        return float(np.sqrt(np.mean(spread))) if spread else None


def collect(rows):
    """{(arm, source, column): Cell}, arms and sources in order of appearance / number."""
    cells = defaultdict(Cell)
    for row in rows:
        for name in COLUMNS:
            if row.get(name) is not None:
                cells[row["arm"], str(row["source"]), name].values[str(row["seed"]), str(row["sampling"])] = row[name]
    return cells


@dataclass
class Verdict:
    """Relative advantage of arm `better` over arm `other` in one column that should be small."""

    better: str
    other: str
    wins: int  # sources in which `better` has the smaller mean
    sources: int
    advantage: float  # mean over sources of (other - better) / other
    standard_error: float | None  # from the spread over training seeds; None with a single one
    interval: tuple | None  # 95 %, Welch-Satterthwaite
    per_source: dict = field(default_factory=dict)

    def __str__(self):
        line = f"{self.better} better than {self.other} in {self.wins} of {self.sources} sources, mean advantage "
        if self.standard_error is None:
            return line + f"{self.advantage:.1%} (one training seed per arm: no uncertainty known)"
        low, high = self.interval
        clear = "clear of zero" if low > 0 or high < 0 else "zero is inside"
        return (
            line + f"{self.advantage:.1%} +- {self.standard_error:.1%} (95 % interval {low:.1%} to {high:.1%}: {clear})"
        )


def verdict(cells, sources, better="multi", other="single", column="fd"):
    """Compare two arms over the sources, with the uncertainty that the training seeds show.

    One model of the shared arm serves all sources, so its seeds are averaged over sources first; the models of the other
    arm are treated likewise, seed by seed, which is right for shared and for separate models: separate ones only vary
    independently within a seed. Raises ValueError where an arm has no scores.
    """
    for arm in (better, other):
        if any((arm, s, column) not in cells for s in sources):
            raise ValueError(f"arm {arm!r} has no {column!r} for every one of the sources {', '.join(sources)}")
    base = {s: cells[other, s, column].mean for s in sources}
    per_source = {s: (base[s] - cells[better, s, column].mean) / base[s] for s in sources}
    parts = []
    for arm in (better, other):
        tables = [cells[arm, s, column].by_seed() for s in sources]
        common = set.intersection(*(set(t) for t in tables))
        relative = [
            np.mean([t[seed] / base[s] for t, s in zip(tables, sources, strict=True)]) for seed in sorted(common)
        ]
        parts.append(relative)
    wins = sum(value > 0 for value in per_source.values())
    mean = float(np.mean(list(per_source.values())))
    if min(map(len, parts)) < 2:
        return Verdict(better, other, wins, len(sources), mean, None, None, per_source)
    variances = [np.var(p, ddof=1) / len(p) for p in parts]
    error = math.sqrt(sum(variances))
    freedom = sum(variances) ** 2 / max(sum(v**2 / (len(p) - 1) for v, p in zip(variances, parts, strict=True)), 1e-300)
    half = float(scipy.stats.t.ppf(0.975, max(freedom, 1))) * error
    return Verdict(better, other, wins, len(sources), mean, error, (mean - half, mean + half), per_source)


def theory_ratio(net, num_sources):
    """The theory's prediction for multi over single: sqrt(1 - (K-1)/K beta), beta = share of shared parameters.

    Wang et al. (ICML 2025, arXiv 2502.14583), section 4: what belongs to a source is its column of the label embedding.
    Returns {"beta_sim", "ratio", "shared", "per_source"} from the parameters of `net`.
    """
    total = sum(p.numel() for p in net.parameters())
    label_dim = net.label_dim
    own = sum(
        p.numel() for name, p in net.named_parameters() if "label" in name and p.ndim == 2 and p.shape[1] == label_dim
    )
    per_source = own // max(label_dim, 1)
    shared = total - own
    beta = shared / (shared + per_source)
    ratio = math.sqrt(1 - (num_sources - 1) / num_sources * beta)
    return {"beta_sim": beta, "ratio": ratio, "shared": shared, "per_source": per_source}


def sources_of(rows):
    """The sources of score rows, as strings in numerical order."""
    return sorted(
        {str(row["source"]) for row in rows}, key=lambda s: (not s.isdigit(), int(s) if s.isdigit() else 0, s)
    )
