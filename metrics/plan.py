"""Should sources be trained together, and how many images would it take to know? A plan from a pilot's scores.

The pilot measured a loss per source (test NLL, or anything whose excess falls as a power of n) for single models and for one
of all sources, at several n. Two curves H + a n^-b with one b are fitted; what is asked of them (the sample multiplier, the n
at which the sign turns) gets its 95 % interval from the seeds, by Student's t over what each seed contributes to it (delta
method), so that seeds may be paired, few, and of unlike difficulty.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import ArrayLike

from dnnlib.util import natural_key, write_text
from metrics.contrasts import Contrast, chosen, examine, gains
from metrics.results import Row
from metrics.table import grouped, markdown, mean_interval, write_csv

FARTHEST = 1000  # the largest multiplier that is looked at, and one over the smallest
RATES = (0.2, 1.5)  # of which b is the best: neural networks lie between, the parametric rate of KL is 1


@dataclass(frozen=True)
class Curves:
    """alone(n) = floor + scale n^-rate; together likewise, with a floor of its own: what sharing cannot learn."""

    floor: float
    scale: float
    floor_together: float
    scale_together: float
    rate: float

    def alone(self, n: ArrayLike) -> np.ndarray:
        return self.floor + self.scale * np.asarray(n, float) ** -self.rate

    def together(self, n: ArrayLike) -> np.ndarray:
        return self.floor_together + self.scale_together * np.asarray(n, float) ** -self.rate


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its 95 % interval; infinite where the data do not bound it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        short = lambda v: "no bound" if math.isinf(v) else f"{v:.3g}"
        return f"{short(self.value)} (95 % interval {short(self.low)} to {short(self.high)})"


def fit(sizes: ArrayLike, mean: ArrayLike, weights: ArrayLike | None = None) -> Curves:
    """Weighted least squares of both curves to means [2, N] at sizes [N]; weights [N]. With two sizes the rate is 1.

    Raises ValueError for fewer.
    """
    import scipy.optimize

    sizes, mean = np.asarray(sizes, float), np.asarray(mean, float)
    root = np.sqrt(np.ones(len(sizes)) if weights is None else np.asarray(weights, float))
    if len(sizes) < 2:
        raise ValueError("learning curves need scores at two numbers of images or more")

    def solved(rate):
        design = np.stack([np.ones(len(sizes)), sizes**-rate], axis=1) * root[:, None]
        parts, *_ = np.linalg.lstsq(design, mean.T * root[:, None], rcond=None)
        return parts, float(((design @ parts - mean.T * root[:, None]) ** 2).sum())

    rate = 1.0
    if len(sizes) > 2:
        rate = scipy.optimize.minimize_scalar(lambda b: solved(b)[1], bounds=RATES, method="bounded").x
    (floors, scales), _ = solved(rate)
    return Curves(floors[0], scales[0], floors[1], scales[1], rate)


class Plan:
    """Curves and what follows from them, for values [S, 2, N]: seeds, (alone, together), sizes [N]. ValueError."""

    def __init__(self, sizes: Sequence[float], values: ArrayLike) -> None:
        self.sizes, values = np.asarray(sizes, float), np.asarray(values, float)
        if values.ndim != 3 or values.shape[1:] != (2, len(self.sizes)) or len(values) < 2:
            raise ValueError(f"values {values.shape} must be [seeds (two or more), 2, {len(self.sizes)} sizes]")
        self.mean = values.mean(axis=0)
        self.values = (
            values - values.mean(axis=(1, 2), keepdims=True) + self.mean.mean()
        )  # a seed's own difficulty is no news
        spread = self.values.var(axis=0, ddof=1).mean(axis=0)
        self.weights = 1 / np.maximum(spread, spread.max() * 1e-4) if spread.max() > 0 else np.ones(len(self.sizes))
        self.curves = fit(self.sizes, self.mean, self.weights)

    def estimate(self, function: Callable[[Curves], float]) -> Estimate:
        """A smooth function of the curves with its interval: t over the seeds' linearised contributions."""
        import scipy.stats

        value, gradient = function(self.curves), np.zeros_like(self.mean)
        for index, step, up, down in self._moved:
            gradient[index] = (function(up) - function(down)) / (2 * step)
        parts = ((self.values - self.mean) * gradient).sum(axis=(1, 2))
        half = float(scipy.stats.t.ppf(0.975, len(parts) - 1)) * parts.std(ddof=1) / math.sqrt(len(parts))
        return Estimate(value, value - half, value + half)

    @functools.cached_property
    def _moved(self):
        """(index of a mean, how far it was moved, the curves of the higher one, of the lower one), for all means."""
        found = []
        for index in np.ndindex(self.mean.shape):
            step = np.zeros_like(self.mean)
            step[index] = max(self.values[(slice(None), *index)].std(ddof=1) / 10, 1e-9)
            found.append(
                (index, step[index], *(fit(self.sizes, self.mean + sign * step, self.weights) for sign in (1, -1)))
            )
        return found

    def gain(self, n: float) -> Estimate:
        """How much lower the loss is together, at n images of each source."""
        return self.estimate(lambda c: float(c.alone(n) - c.together(n)))

    def excess_ratio(self, n: float) -> Estimate:
        """Excess loss together over that alone, both over the floor of single models. Of NLL it is a ratio of KL divergences,
        for which the multi-source theory has the order 1 - (K - 1) / K beta.
        """
        return self.estimate(lambda c: float(c.together(n) - c.floor) / (c.scale * n**-c.rate))

    def multiplier(self, n: float) -> Estimate:
        """m(n): n images of each source, trained together, are worth m n of a source alone. Below 1: sharing hurts.

        The interval holds the m for which n together and m n alone are not told apart (a test inverted, after Fieller), so that
        it leaves out 1 where the gain's leaves out 0. Its ends may be infinite and zero: then no number of images alone is
        known to be as good, or as bad.
        """
        c = self.curves
        share = float(c.together(n) - c.floor) / (c.scale * n**-c.rate)
        apart = lambda log_m: self.estimate(lambda c: float(c.alone(math.exp(log_m) * n) - c.together(n)))
        too_few = lambda log_m: apart(log_m).low  # positive: so few alone are surely worse
        too_many = lambda log_m: -apart(log_m).high  # positive: so many alone are surely better
        up = np.linspace(0, math.log(FARTHEST), 60)
        if too_few(0) > 0:
            low = _first(too_few, up, False, up[-1])
            high = _first(too_many, [low, *up[up > low]], True, math.inf)
        elif too_many(0) > 0:
            high = _first(too_many, -up, False, -up[-1])
            low = _first(too_few, [high, *-up[-up < high]], True, -math.inf)
        else:
            low, high = _first(too_few, -up, True, -math.inf), _first(too_many, up, True, math.inf)
        return Estimate(share ** (-1 / c.rate) if share > 0 else math.inf, math.exp(low), math.exp(high))

    def turn(self) -> Estimate | None:
        """The n at which the sign of the gain turns, inside ten times the measured range; None where the curves do not meet."""
        c = self.curves
        above, ahead = c.floor_together - c.floor, c.scale - c.scale_together
        if above * ahead <= 0:
            return None
        log_n = lambda c: math.log(abs((c.scale - c.scale_together) / (c.floor_together - c.floor) or 1e-300)) / c.rate
        if not self.sizes[0] / 10 <= math.exp(log_n(c)) <= 10 * self.sizes[-1]:
            return None
        found = self.estimate(log_n)
        bounded = lambda v: math.exp(v) if v < 700 else math.inf
        return Estimate(*map(bounded, (found.value, found.low, found.high)))


def _first(function, at, positive, otherwise):
    """Where, along these points in their order, a function first is positive or (positive=False) is not; else `otherwise`."""
    import scipy.optimize

    before = None
    for x in at:
        if (function(x) > 0) == positive:
            return x if before is None else scipy.optimize.brentq(function, before, x)
        before = x
    return otherwise


def from_scores(rows: Sequence[Row], measure: str = "bits_per_dim") -> tuple[Plan, int, list[str]]:
    """(plan, K, sources) of the rows with the tags k, n, seed: models of one source, and of all (the largest k). ValueError."""
    found = [
        row
        for row in chosen(rows, {}, measure)
        if {"k", "n"} <= set(row.tags) and row.tags.get("group", "real") == "real"
    ]
    most = max((int(row.tags["k"]) for row in found), default=0)
    if most < 2:
        raise ValueError(f"no scores with {measure} of single and of shared models: give some with the tags k and n")
    kinds = {"1": 0, str(most): 1}
    cells = grouped(
        ((row.tags["seed"], kinds[row.tags["k"]], int(row.tags["n"])), row.numbers[measure])
        for row in found if row.tags["k"] in kinds
    )  # fmt: skip
    seeds, sizes = sorted({s for s, _, _ in cells}), sorted({n for _, _, n in cells})
    missing = [(s, k, n) for s in seeds for k in (0, 1) for n in sizes if (s, k, n) not in cells]
    if missing:
        s, k, n = missing[0]
        raise ValueError(f"no score of {'one of all sources' if k else 'single models'} at n = {n}, seed {s}")
    values = [[[fmean(cells[s, k, n]) for n in sizes] for k in (0, 1)] for s in seeds]
    return Plan(sizes, values), most, sorted({row.section for row in found}, key=natural_key)


@dataclass(frozen=True)
class Transfer:
    """What a target gains from one partner, beside how far apart the data themselves say they are."""

    target: str
    partner: str
    gain: Estimate
    distance: float | None

    @property
    def negative(self) -> bool:
        """Whether the partner does harm, beyond the noise of the seeds."""
        return self.gain.high < 0


def of_pairs(rows: Sequence[Row], measure: str = "bits_per_dim") -> Contrast | None:
    """Gains in models of two sources at the smallest n that has them, against nearness of the data; None without any."""
    two = chosen(rows, {"k": 2, "group": "real"}, measure)
    n = min((row.tags["n"] for row in two), key=int, default=None)
    tags = [{"k": k, "group": "real", "n": n} for k in (2, 1)]
    return Contrast("pairs", *tags, measure, rank="energy") if two else None


def transfers(rows: Sequence[Row], measure: str = "bits_per_dim") -> list[Transfer]:
    """Gains of all targets from all partners, `of_pairs`; empty without any."""
    contrast = of_pairs(rows, measure)
    if contrast is None:
        return []
    apart, found = contrast.rank, gains(rows, contrast)
    members = grouped((row.file, row.section) for row, _ in found)
    distances = grouped(
        ((row.section, name), v) for row in rows if row.detector == apart for name, v in row.numbers.items()
    )
    cells = grouped(
        ((row.section, next(s for s in members[row.file] if s != row.section)), gain) for row, gain in found
    )
    result = []
    for (target, partner), values in sorted(cells.items(), key=lambda item: [natural_key(part) for part in item[0]]):
        mean, _, low, high = mean_interval(values)
        known = distances.get((target, f"{apart}_{partner}"))
        interval = (low, high) if len(values) > 1 else (-math.inf, math.inf)
        result.append(Transfer(target, partner, Estimate(mean, *interval), fmean(known) if known else None))
    return result


def in_words(plan: Plan, sources: Sequence[str], pairs: Sequence[Transfer]) -> str:
    """The answer as a person would give it."""
    n, lines = int(plan.sizes[-1]), []
    for size in plan.sizes:
        gain, worth = plan.gain(size), plan.multiplier(size)
        images = Estimate(*(size * v for v in (worth.value, worth.low, worth.high)))
        if math.isinf(images.high) and images.low > 0:
            fitted = f", {images.value:.3g} by the curves" if math.isfinite(images.value) else ""
            images = f"at least {images.low:.3g} (95 % bound{fitted})"
        verdict = "better together" if gain.low > 0 else "better alone" if gain.high < 0 else "not decided"
        lines.append(
            f"- **{size:g} images of each: {verdict}.** Among {len(sources)} sources they are worth {images} images alone; "
            f"the loss is lower by {gain.value:.4f} ({gain.low:.4f} to {gain.high:.4f}) together."
        )
    if len(plan.sizes) > 2:
        rate = plan.estimate(lambda c: c.rate)
        loose = "; the sizes do not determine it" if rate.low <= RATES[0] and rate.high >= RATES[1] else ""
        lines.append(f"- The curves fall as n^-b, b = {rate}{loose}. Beyond {n} images alone they are a guess.")
    ratio, order = plan.excess_ratio(n), f"theory's order, where all is shared, {1 / len(sources):.3g}"
    said = "which determines nothing" if ratio.low <= 0 and ratio.high >= 1 else order
    lines.append(f"- Excess loss at {n}, together over alone: {ratio}; {said}.")
    turn = plan.turn()
    if turn is None:
        lines.append(
            "- The curves do not meet near the measured range: more images of each would not turn the answer soon."
        )
    else:
        lines.append(f"- The answer turns at about {turn} images of each.")
    if len(plan.sizes) < 3:
        lines.append(
            "- Two sizes only: the curves' rate is taken to be 1, not measured. Give a third for an honest interval."
        )
    bad = [pair for pair in pairs if pair.negative]
    if pairs:
        harm = ", ".join(f"{pair.target} from {pair.partner}" for pair in bad) or "none"
        chance = f" (if no partner had any effect, {0.025 * len(pairs):.2g} would be named by chance)" if bad else ""
        lines.append(f"- Of {len(pairs)} pairs, targets that a partner harms beyond the seeds' noise: {harm}{chance}.")
    return f"What {n} images or fewer of each source say:\n\n" + "\n".join(lines) + "\n"


def write_plan(rows: Sequence[Row], dest: Path, measure: str = "bits_per_dim", about: str = "") -> str:
    """Write plan.md, multiplier.csv, curves.png and, where pairs were trained, transfer.csv and .png; returns the text.

    about: a line on where the scores come from.
    """
    plan, most, sources = from_scores(rows, measure)
    pairs = transfers(rows, measure)
    table = []
    for n in plan.sizes:
        gain, worth = plan.gain(n), plan.multiplier(n)
        ends = [v if math.isfinite(v) else "" for v in (worth.value, worth.low, worth.high)]
        names = ("n", "k", "gain", "gain_low", "gain_high", "multiplier", "multiplier_low", "multiplier_high")
        table.append(dict(zip(names, (int(n), most, gain.value, gain.low, gain.high, *ends), strict=True)))
    text = in_words(plan, sources, pairs)
    write_csv(dest / "multiplier.csv", table)
    _draw_curves(dest / "curves", plan, most, measure)
    if pairs:
        names = ("target", "partner", "gain", "low", "high", "distance", "negative")
        lines = [
            (p.target, p.partner, p.gain.value, *(v if math.isfinite(v) else "" for v in (p.gain.low, p.gain.high)),
             "" if p.distance is None else p.distance, p.negative) for p in pairs
        ]  # fmt: skip
        write_csv(dest / "transfer.csv", [dict(zip(names, line, strict=True)) for line in lines])
        _draw_transfers(dest / "transfer", pairs, measure)
        if len({p.target for p in pairs}) > 3:
            text += f"\n{_nearness(rows, measure)}\n"
        worst = sorted(pairs, key=lambda p: p.gain.value)
        shown = [[p.target, p.partner, str(p.gain), "harm" if p.negative else ""] for p in (*worst[:3], *worst[-3:])]
        text += f"\nThe least and the most helpful partners:\n\n{markdown(['target', 'partner', 'gain', ''], shown)}\n"
    text += f"\n{about}\n" if about else ""
    write_text(dest / "plan.md", text)
    return text


def _nearness(rows, measure):
    """Whether the data alone would have told who helps whom."""
    try:
        near = examine(rows, of_pairs(rows, measure))
    except ValueError as err:
        return f"Whether nearer partners help more is not said: {err}."
    return (
        "Before any training: nearer partners (energy distance of the training images) help by rank correlation "
        f"{Estimate(near.effect, near.low, near.high)} within a target, p = {near.p:.4f}."
    )


def _draw_curves(stem, plan, most, measure):
    from metrics import figures

    fig, (left, right) = figures.figure(2, 4.2, 3.2)
    n = np.geomspace(plan.sizes[0] / 1.5, plan.sizes[-1] * 3, 60)
    arms = (("single", plan.curves.alone, 0), ("multi", plan.curves.together, 1))
    for name, curve, index in arms:
        points = [mean_interval(v) for v in plan.values[:, index].T]
        error = [high - mean for mean, _, _, high in points]
        label = f"{figures.LABEL[name]}, K = {most if index else 1}"
        style = {"linestyle": "none", "marker": figures.MARKER[name], "color": figures.LINE[name], "label": label}
        figures.intervals(left, plan.sizes, plan.mean[index], error, **style)
        left.plot(n, curve(n), color=figures.LINE[name], linestyle=figures.DASH[name], label=f"{label}: fit")
    left.set(xlabel="images of each source $n$", ylabel=figures.TITLES.get(measure, measure.replace("_", " ")))
    figures.legend(left)
    worth = np.array([(w.value, w.low, w.high) for w in map(plan.multiplier, plan.sizes)])
    top = 4 * worth[np.isfinite(worth)].max(initial=1)  # what is open above ends there, with an arrow
    middle, low, high = np.minimum(worth, top).T
    known, style = np.isfinite(worth[:, 0]), {"linestyle": "none", "color": figures.LINE["multi"]}
    bottom = min(0.15, 0.5 * worth[worth > 0].min())  # room for the legend
    low = np.maximum(low, bottom)
    right.errorbar(plan.sizes, low, [0 * low, high - low], **style, capsize=2, elinewidth=1.2)
    if known.any():
        right.plot(plan.sizes[known], middle[known], **style, marker=figures.MARKER["multi"], label=f"$K$ = {most}")
    if (open_above := worth[:, 2] > top).any():
        label = "no upper bound" + ("" if known.all() else " (no point: no estimate)")
        right.plot(plan.sizes[open_above], high[open_above], **style, marker="^", markersize=7, label=label)
    right.axhline(1, color=figures.NEUTRAL, linewidth=0.8, linestyle="--", label="as much as alone")
    right.set(xlabel="images of each source $n$", ylabel="images alone that one is worth")
    figures.log_y(right)
    right.set_ylim(bottom)
    figures.legend(right)
    for axis in (left, right):
        figures.x_ticks(axis, list(plan.sizes), log=True)
        axis.set_xlim(n[0], n[-1])
    return figures.save(fig, stem, dpi=150)


def _draw_transfers(stem, pairs, measure):
    from metrics import figures

    unit = figures.TITLES.get(measure, measure.replace("_", " "))
    names = sorted({p.target for p in pairs} | {p.partner for p in pairs}, key=natural_key)
    table, bound = np.full([len(names)] * 2, np.nan), max(abs(p.gain.value) for p in pairs)
    fig, (left, right) = figures.figure(2, 4.2, 3.4)
    for p in pairs:
        place = names.index(p.target), names.index(p.partner)
        table[place] = p.gain.value
        if p.gain.low > 0 or p.negative:
            left.text(place[1], place[0], "+" if p.gain.low > 0 else "−", ha="center", va="center", fontsize=8)
    shown = left.imshow(table, cmap="RdBu", vmin=-bound, vmax=bound)
    fig.colorbar(shown, ax=left, label=f"gain of the target ({unit})")
    left.set_title("+, −: the 95 % interval excludes 0", fontsize=8)
    crowded = max(map(len, names)) > 3
    left.set_xticks(
        range(len(names)), names, fontsize=7, rotation=45 if crowded else 0, ha="right" if crowded else "center"
    )
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.set(xlabel="partner", ylabel="target")
    left.grid(False)
    known = [p for p in pairs if p.distance is not None]
    style = {"linestyle": "none", "color": figures.LINE["multi"], "marker": figures.MARKER["multi"], "markersize": 3}
    half = np.transpose([[p.gain.value - p.gain.low, p.gain.high - p.gain.value] for p in known])
    x, y = [p.distance for p in known], [p.gain.value for p in known]
    figures.intervals(right, x, y, half, label="a pair", alpha=0.6, **style)
    right.axhline(0, color="black", linewidth=0.8)
    figures.legend(right)
    right.set(xlabel="energy distance of the training images", ylabel=f"gain of the target ({unit})")
    return figures.save(fig, stem, dpi=150)
