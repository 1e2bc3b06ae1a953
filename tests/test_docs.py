"""The numbers that the documents print, from the numbers of every seed beside them."""

import itertools
import math
import re

import numpy as np
import pytest
import scipy.stats
import torch
from small_runs import ROOT
from test_simulations_gaussian import PUBLISHED as PUBLISHED_GAUSSIAN

from metrics.contrasts import detectable, holm
from metrics.plan import Plan, in_words
from metrics.table import read_csv
from simulations import gaussian, run_arm, toy_data
from simulations.arm import ground_truth, sample
from simulations.bounds import arm_bound, ebm_bound
from simulations.configs import ArmConfig
from simulations.studies import solvers
from training.presets import PRESETS

POINTS = {
    "loss": 0.0006,
    "difference": 0.0002,
}  # standard errors of losses on the 16384 points of the tree, over eight such sets


def data(name):
    return read_csv(ROOT / "docs" / "data" / f"{name}.csv")


def document(name):
    """Its text in one line."""
    return " ".join((ROOT / name).read_text(encoding="utf-8").split())


def student(mean, error, df, null=0.0):
    """(mean, low, high, p, smallest effect seen four times in five): as the documents print them."""
    half = scipy.stats.t.ppf(0.975, df) * error
    p = 2 * scipy.stats.t.sf(abs(mean - null) / error, df)
    return mean, mean - half, mean + half, p, detectable(error, df + 1)


def seeds_of(experiment, arm, measure):
    """{seed: number} of docs/data/<experiment>.csv."""
    return {r["seed"]: r[measure] for r in data(experiment) if r["arm"] == arm and r[measure] != ""}


def mean_of(values, null=0.0):
    values = np.array(list(values))
    return student(values.mean(), scipy.stats.sem(values), len(values) - 1, null)


def less(experiment, measure, one, other, against=None, noise=0.0):
    """Of arm `one` less arm `other` (of another measure: `against`), paired by seed; noise: an error that all seeds share."""
    a, b = seeds_of(experiment, one, measure), seeds_of(experiment, other, against or measure)
    assert a.keys() == b.keys()
    values = np.array([a[seed] - b[seed] for seed in a])
    return student(values.mean(), math.hypot(scipy.stats.sem(values), noise), len(values) - 1)


def ratio(experiment, arm, null=0.0):
    """Mean error of the shared model over that of single ones, by the delta method."""
    single, multi = (np.array(list(seeds_of(experiment, arm, side).values())) for side in ("single", "multi"))
    value = multi.mean() / single.mean()
    return student(value, scipy.stats.sem(multi - value * single) / single.mean(), len(single) - 1, null)


def advantage(tag, *values):
    """Slope of single less shared error over a swept value (similarity) or its doublings (K, n), per seed."""
    x = np.array(values) if tag == "sim" else np.log2(values)
    sides = [[seeds_of("arm-path", f"{tag}={v}", side) for v in values] for side in ("single", "multi")]
    gains = [[a[seed] - b[seed] for a, b in zip(*sides, strict=True)] for seed in sides[0][0]]
    return mean_of(scipy.stats.linregress(x, gain).slope for gain in gains)


def independent(one, other):
    return less("arm-independent", one, "n=3000", "n=3000", against=other)


def tree(arm, when="steps", than="baseline"):
    """Difference of losses; the points on which they were taken are the same for all seeds."""
    return less("selection-tree", f"{when} loss", arm, than, noise=POINTS["difference"])


def guided(arm):
    return less("selection-tree", "steps guided", arm, arm, against="steps mandala")


def guidance(arm, measure):
    return less("guidance-digits", measure, arm, "no guidance")


def aug_dims(one, other="D=inf", measure="fd"):
    return less("pfgmpp-digits", measure, one, other)


def growth(arm, measure):
    """Of FD by a disturbance, less that of D = inf; of fewer steps from 18 on, the other cells have 12."""
    base = "fd" if measure.startswith(("alpha", "bits")) else "steps=18"
    grown = [
        {seed: value - seeds_of("pfgmpp-digits", a, base)[seed] for seed, value in found.items()}
        for a, found in ((a, seeds_of("pfgmpp-digits", a, measure)) for a in (arm, "D=inf"))
    ]
    return mean_of(grown[0][seed] - grown[1][seed] for seed in grown[0])


def at(nfe, one, other, source=None):
    """Of CLD by the splitting solver and others, at so many evaluations: on the mixture, or on a source of the digits."""
    which = ("linear-mixture", f"nfe {nfe}") if source is None else ("linear-digits", f"source {source}, nfe {nfe}")
    return less(*which, one, other)


LONGER = "K=3, 8000 steps"
unstructured = lambda side: less("arm-dirichlet", side, "K=3", LONGER)
HEUN, EM, SSCS = "EDM Heun, sigma", "CLD EM, {}", "CLD SSCS, {}"
HEUN_MIXTURE = at(20, HEUN, SSCS.format("quadratic"))
HEUN_DIGITS = at(20, HEUN, SSCS.format("quadratic"), 1)
faster = lambda grid, source, nfe=20: at(nfe, SSCS.format(grid), EM.format(grid), source)
PREDICTED = {
    "arm": arm_bound(10, 30000, 10, 2, 64, 5, 64, 13314, 1.0, 0.05).ratio,
    "ebm 4": ebm_bound(4, 1000, 4, 3, 64, 4609, 1.0, 0.05).ratio,
    "ebm 8": ebm_bound(8, 1000, 4, 3, 64, 4609, 1.0, 0.05).ratio,
}
SCORES = ("loss", "mandala", "guided")
short = lambda text: re.sub(r"(?<!\d)0\.", ".", text)
SAID = [  # document; sentence with 0: mean, 1 and 2: interval, 3: p, 4: smallest effect that would have been seen; these
    ("theory", "with K (by {0:.3f} from 1 to 10; {1:.3f} to {2:.3f})", less("arm-path", "single", "K=10", "K=1")),
    ("theory", "and D (by {0:.3f} from 10 to 18; {1:.3f} to {2:.3f})", less("arm-path", "single", "D=18", "D=10")),
    ("theory", "(by {0:.3f} from 1000 to 30000; {1:.3f} to {2:.3f})", less("arm-path", "single", "n=1000", "n=30000")),
    ("theory", "by {0:.4f} for every doubling of K ({1:.4f} to {2:.4f}; p = {3:.3f},", advantage("K", 1, 3, 5, 7, 10)),
    ("theory", "is {0:.2f} of theirs ({1:.2f} to {2:.2f}) at K = 3", ratio("arm-path", "K=3")),
    ("theory", "and {0:.2f} ({1:.2f} to {2:.2f}; p = {3:.3f}) at K = 10", ratio("arm-path", "K=10", null=1)),
    ("theory", "is seen ({0:.4f}; {1:.4f} to {2:.4f})", advantage("K", 1, 3, 5, 7)),
    ("theory", "by {0:.3f} more at sim = 1 than at 0 ({1:.3f} to {2:.3f}; p = {3:.3f})", advantage("sim", 0.0, 1.0)),
    ("theory", "no slope is seen (p = {3:.2f})", advantage("sim", 0.0, 0.5, 0.8, 0.9)),
    ("theory", "to {0:.2f} of their error ({1:.2f} to {2:.2f};", ratio("arm-path", "sim=1.0")),
    ("theory", "{0:.3f} for every doubling of n ({1:.3f} to {2:.3f}; p = {3:.2f}), where {4:.3f}",
     advantage("n", 1000, 3000, 5000, 10000, 30000)),
    ("theory", "by Holm one (n = 5000: {1:.2f} to {2:.2f})", ratio("arm-path", "n=5000")),
    ("theory", "ends at {0:.3f} where", mean_of(seeds_of("arm-independent", "n=3000", "single").values())),
    ("theory", "has {0:.3f}: less", mean_of(seeds_of("arm-independent", "n=3000", "counting").values())),
    ("theory", "less by {0:.4f} (95 % interval {1:.4f} to {2:.4f})", independent("single", "counting")),
    ("theory", "ends at {0:.3f}, 0.018", mean_of(seeds_of("arm-independent", "n=3000", "multi").values())),
    ("theory", "{0:.3f} less than the single ones ({1:.3f} to {2:.3f}; p = {3:.3f})", independent("multi", "single")),
    ("theory", "is {0:.2f} of the single ones' ({1:.2f} to {2:.2f}; p = {3:.3f}) at K = 3",
     ratio("arm-dirichlet", "K=3", null=1)),
    ("theory", "{0:.2f} ({1:.2f} to {2:.2f}; p < .0001) at K = 10,", ratio("arm-dirichlet", "K=10", null=1)),
    ("theory", "at K = 10, {0:.3f} against", mean_of(seeds_of("arm-dirichlet", "K=10", "multi").values())),
    ("theory", "against {0:.3f}, where", mean_of(seeds_of("arm-dirichlet", "K=10", "single").values())),
    ("theory", "shared network's error falls by {0:.3f} ({1:.3f} to {2:.3f}; p = {3:.4f})", unstructured("multi")),
    ("theory", "the single ones' by {0:.3f} ({1:.3f} to {2:.3f}), and", unstructured("single")),
    ("theory", "told apart ({0:.3f}; {1:.3f} to {2:.3f}; {4:.3f} would",
     less("arm-dirichlet", "multi", LONGER, LONGER, against="single")),
    ("theory", "at {0:.3f} and", mean_of(seeds_of("arm-dirichlet", LONGER, "multi").values())),
    ("theory", "and {0:.3f} they are", mean_of(seeds_of("arm-dirichlet", LONGER, "single").values())),
    ("theory", "single ones by {0:.3f} ({1:.3f} to {2:.3f}; p = {3:.4f})",
     less("arm-dirichlet", "single", LONGER, LONGER, against="counting")),
    ("theory", "of the shared ones by {0:.3f} ({1:.3f} to {2:.3f}; p = {3:.3f})",
     less("arm-dirichlet", "multi", LONGER, LONGER, against="counting")),
    ("theory", "{0:.2f} ({1:.2f} to {2:.2f}; p = {3:.3f}) at K = 4", ratio("ebm", "K=4", null=1)),
    ("theory", "{0:.2f} ({1:.2f} to {2:.2f}) at K = 8, where {4:.2f} less", ratio("ebm", "K=8", null=1)),
    ("theory", "{0:.2f} ({1:.2f} to {2:.2f}; p = {3:.3f}) at n = 3000", ratio("ebm", "n=3000", null=1)),
    ("theory", "at K = 4 (p = {3:.3f})", ratio("ebm", "K=4", null=PREDICTED["ebm 4"])),
    ("theory", "at K = 8 (p = {3:.4f})", ratio("ebm", "K=8", null=PREDICTED["ebm 8"])),
    ("pfgmpp", "of D = 16 by {0:.1f} (95 % interval {1:.1f} to {2:.1f})", aug_dims("D=16")),
    ("pfgmpp", "of D = 128 by {0:.1f} ({1:.1f} to {2:.1f}; p = {3:.3f})", aug_dims("D=128")),
    ("pfgmpp", "of D = 2048 by {0:.1f} ({1:.1f} to {2:.1f}; p = {3:.4f})", aug_dims("D=2048")),
    ("pfgmpp", "D = 16 at 8 steps ({0:.1f}; {1:.1f} to {2:.1f})", growth("D=16", "steps=8")),
    ("pfgmpp", "and at 12 ({0:.1f}; {1:.1f} to {2:.1f})", growth("D=16", "fd")),
    ("pfgmpp", "D = 128 at 8 ({0:.1f}; {1:.1f} to {2:.1f})", growth("D=128", "steps=8")),
    ("pfgmpp", "at 18 (D = 16 by {0:.1f}; {1:.1f} to {2:.1f})", aug_dims("D=16", measure="steps=18")),
    ("pfgmpp", "D = 16 grows less by {0:.1f} ({1:.1f} to {2:.1f}; p = {3:.3f}, .40 by", growth("D=16", "steps=4")),
    ("pfgmpp", "growth differs by {0:.1f} ({1:.1f} to {2:.1f}; {4:.1f} would have been seen)", growth("D=16", "steps=6")),
    ("pfgmpp", "itself by {0:.1f} ({1:.1f} to {2:.1f}; p = {3:.3f})", aug_dims("D=16", measure="steps=4")),
    ("pfgmpp", "p is {3:.3f} (D = 128 at alpha = 0.2, {0:.2f})", growth("D=128", "alpha=0.2")),
    ("pfgmpp", "differs by {0:.1f} ({1:.1f} to {2:.1f}), where {4:.1f} would", growth("D=16", "bits=4")),
    ("pfgmpp", "FD is lower by {0:.1f} ({1:.1f} to {2:.1f}; p = {3:.3f}, .010 by Holm)",
     aug_dims("on, fixed weights", "off, fixed weights")),
    ("pfgmpp", "higher by {0:.1f} ({1:.1f} to {2:.1f}; p = {3:.3f})", aug_dims("on", "off")),
    ("selection", "of the baseline by {0:.3f} ({1:.3f} to {2:.3f}; p < .0001)", guided("baseline")),
    ("selection", "of AJEST by {0:.3f} ({1:.3f} to {2:.3f})", guided("ajest")),
    ("selection", "it does least, by {0:.3f} ({1:.3f} to {2:.3f})", guided("random")),
    ("selection", "is seen ({0:.4f}; {1:.4f} to {2:.4f}; {4:.4f} would", tree("early-ajest")),
    ("selection", "do not differ ({0:+.3f}; {1:.3f} to {2:.3f})",
     less("selection-tree", "samples mandala", "early-ajest", "baseline")),
    ("selection", "is not seen ({0:+.3f}; {1:.3f} to {2:.3f})",
     less("selection-tree", "time mandala", "random", "baseline")),
    ("selection", "lower by {0:.4f} ({1:.4f} to {2:.4f}; p = {3:.3f})", tree("early-ajest", "samples")),
    ("selection", "(loss {0:.4f}, {1:.4f} to {2:.4f}; {4:.4f} would have shown)", tree("ajest", than="random")),
    ("selection", "(loss {0:+.4f}; {1:.4f} to {2:.4f}; p = {3:.4f})", tree("ajest")),
    ("selection", "mandala score by {0:.3f} ({1:.3f} to {2:.3f}; p = {3:.3f}), as",
     less("selection-tree", "steps mandala", "iajest", "ajest")),
    ("selection", "is seen ({0:.4f}; {1:.4f} to {2:.4f}; {4:.4f} would have shown). Its", tree("iajest", than="ajest")),
    ("selection", "behind the baseline by {0:.4f} ({1:.4f} to {2:.4f}; p = {3:.3f})", tree("ajest", "time")),
    ("selection", "ahead of it by {0:.4f} ({1:.4f} to {2:.4f}; p = {3:.3f})", tree("random", "time")),
    ("selection", "weight (at 2 by {0:.3f}; {1:.3f} to {2:.3f})", guidance("classifier-free, 2", "agreement")),
    ("selection", "weight 3 (at 2 by {0:.1f}; {1:.1f} to {2:.1f})", guidance("classifier-free, 2", "fd")),
    ("selection", "at 5 no longer ({0:+.1f}; {1:.1f} to {2:.1f})", guidance("classifier-free, 5", "fd")),
    ("selection", "is seen ({0:+.3f}; {1:.3f} to {2:.3f}; {4:.3f} would", guidance("classifier-free, 1.5", "recall")),
    ("selection", "falls by {0:.3f} ({1:.3f} to {2:.3f}) at weight 2", guidance("classifier-free, 2", "recall")),
    ("selection", "by {0:.3f} ({1:.3f} to {2:.3f}) at 3", guidance("classifier-free, 3", "recall")),
    ("selection", "by {0:.3f} ({1:.3f} to {2:.3f}) at 5", guidance("classifier-free, 5", "recall")),
    ("selection", "improves agreement (by {0:.3f}; {1:.3f} to {2:.3f})", guidance("autoguidance, 1.5", "agreement")),
    ("selection", "precision (by {0:.3f}; {1:.3f} to {2:.3f})", guidance("autoguidance, 1.5", "precision")),
    ("selection", "and distance (by {0:.1f}; {1:.1f} to {2:.1f})", guidance("autoguidance, 1.5", "fd")),
    ("selection", "recall as well (by {0:.3f}; {1:.3f} to {2:.3f})", guidance("autoguidance, 1.5", "recall")),
    ("selection", "`random` (FD {0:+.1f}; {1:.1f} to {2:.1f}; p = {3:.3f})", less("ajest-digits", "fd", "ajest", "random")),
    ("selection", "baseline by {4:.1f}. Networks", less("ajest-digits", "fd", "early-ajest", "baseline")),
    ("selection", "`diverse` is behind it (p = {3:.3f}, .041 by Holm", less("ajest-digits", "fd", "diverse", "baseline")),
    ("selection", "before Holm's adjustment (p = {3:.3f}; .13)", less("ajest-digits", "fd", "ajest", "baseline")),
    ("linear", "by {0:.3f} ({1:.3f} to {2:.3f}) on the uniform grid; on", faster("uniform", None)),
    ("linear", "one {0:.3f} ({1:.3f} to {2:.3f}) is no difference", faster("quadratic", None)),
    ("linear", "(by {0:.3f}; {1:.3f} to {2:.3f}) and ahead", HEUN_MIXTURE),
    ("linear", "(by {0:.3f}; {1:.3f} to {2:.3f}): the grid", at(20, HEUN, SSCS.format("uniform"))),
    ("linear", "in source 1 (by {0:.1f}; {1:.1f} to {2:.1f}) and not seen", HEUN_DIGITS),
    ("linear", "in sources 0 (by {0:.1f}; {1:.1f} to {2:.1f})", faster("quadratic", 0)),
    ("linear", "and 1 (by {0:.1f}; {1:.1f} to {2:.1f}), and on", faster("quadratic", 1)),
    ("linear", "1 and 2 (by {0:.0f}; {1:.0f} to {2:.0f}, and", faster("uniform", 1)),
    ("linear", "{0:.0f}; {1:.0f} to {2:.0f}), and in all", faster("uniform", 2)),
    ("linear", "on VP by {0:.2f} ({1:.2f} to {2:.2f})", at(100, "VP EM, quadratic", HEUN, 1)),
    ("linear", "on CLD by {0:.2f} ({1:.2f} to {2:.2f}), both", at(100, EM.format("quadratic"), HEUN, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("where", "sentence", "found"), SAID)
def test_what_a_document_says_of_an_effect(where, sentence, found):
    """An effect with its 95 % interval, p or smallest visible size: by scipy from means and errors; decreases as magnitudes."""
    down = sorted(-v for v in found[1:3])
    magnitudes = (-found[0], *down, *found[3:])
    said = {sentence.format(*values) for values in (found, magnitudes)}
    text = document(f"docs/{where}.md")
    assert any(short(s) in short(text) for s in said), said


def test_tables_and_counts_of_intervals():
    """The tree's losses carry the error of its points; which of the intervals exclude zero or one."""
    text, z = document("docs/selection.md"), scipy.stats.norm.ppf(0.975)
    for arm in ("baseline", "random", "ajest", "early-ajest", "late-ajest", "iajest"):
        cells = []
        for when, name in itertools.product(("steps", "samples", "time"), SCORES):
            if not (found := seeds_of("selection-tree", arm, f"{when} {name}").values()):
                cells.append("")
                continue
            mean, low, *_ = mean_of(found)
            digits, more = (4, z * POINTS["loss"]) if name == "loss" else (3, 0)
            cells.append(f"{mean:.{digits}f} ± {math.hypot(mean - low, more):.{digits}f}")
        assert " ".join(short(f"| {arm} | {' | '.join(cells)} |").split()) in text
    assert min(guided(arm)[0] for arm in ("baseline", "ajest", "early-ajest", "late-ajest")) > guided("random")[0]
    assert max(guided(arm)[3] for arm in ("baseline", "random", "ajest", "early-ajest", "late-ajest", "iajest")) < 0.001
    steps = [
        np.mean(list(seeds_of("selection-tree", a, "samples steps").values())) for a in ("early-ajest", "baseline")
    ]
    assert f"with {steps[0]:.0f} optimizer steps where the baseline has taken {steps[1]:.0f}" in text
    arms = {r["arm"] for r in data("guidance-digits")}
    for arm in arms:
        cells = []
        for name, digits in (("agreement", 3), ("fd", 1), ("precision", 3), ("recall", 3)):
            mean, low, *_ = mean_of(seeds_of("guidance-digits", arm, name).values())
            cells.append(f"{mean:.{digits}f} ± {mean - low:.{digits}f}")
        assert short(f"| {arm} | {' | '.join(cells)} |") in short(text) and len(arms) == 8
    others = ("random", "ajest", "early-ajest", "diverse")
    found = {arm: less("ajest-digits", "fd", arm, "baseline") for arm in others}
    adjusted = dict(zip(others, holm([f[3] for f in found.values()]), strict=True))
    assert (round(adjusted["diverse"], 3), round(adjusted["ajest"], 2)) == (0.041, 0.13)
    for arm in ("baseline", *others):
        cells = ["" if arm not in found else "{:+.1f} ({:.1f} to {:.1f})".format(*found[arm][:3])]
        for name, digits in (("agreement", 3), ("recall", 3), ("validation loss", 3), ("fd", 1)):
            mean, low, *_ = mean_of(seeds_of("ajest-digits", arm, name).values())
            cells.append(f"{mean:.{digits}f} ± {mean - low:.{digits}f}")
        assert short(" ".join(f"| {arm} | {cells.pop()} | {' | '.join(cells)} |".split())) in short(text)
    disturbed = (
        "alpha=0.1",
        "alpha=0.2",
        "steps=4",
        "steps=6",
        "steps=8",
        "fd",
        "bits=6",
        "bits=5",
        "bits=4",
        "bits=3",
    )
    found = {(arm, m): growth(arm, m) for arm in ("D=16", "D=128", "D=2048") for m in disturbed}
    clear = {cell for cell, f in found.items() if f[3] < 0.05}
    assert (len(found), len(clear), sum(m.startswith(("steps", "fd")) for _, m in clear)) == (30, 10, 9)
    assert max(found[cell][0] for cell in clear) < 0 and min(found[c][3] for c in found if "alpha" in c[1]) > 0.02
    adjusted = dict(zip(found, holm([f[3] for f in found.values()]), strict=True))
    left = {cell for cell, p in adjusted.items() if p < 0.05}
    assert round(adjusted["D=16", "steps=4"], 2) == 0.40
    assert left == {("D=16", "steps=8"), ("D=16", "fd"), ("D=128", "steps=8")}
    assert round(max(holm([aug_dims(f"D={D}")[3] for D in (16, 128, 2048)])), 4) == 0.0495
    text = document("docs/pfgmpp.md")
    for arm in ("D=16", "D=128", "D=2048", "D=inf"):
        levels = {m: mean_of(seeds_of("pfgmpp-digits", arm, m).values()) for m in (*disturbed, "steps=18")}
        shown = (levels[m] for m in ("fd", "alpha=0.2", "steps=4", "steps=8", "bits=4"))
        assert f"| {arm[2:]} | {' | '.join(f'{f[0]:.1f} ± {f[0] - f[1]:.1f}' for f in shown)} |" in text
        assert levels["steps=8"][0] < levels["steps=18"][0] < levels["steps=4"][0] / 2
        assert {f"{v:.1f}" for v in seeds_of("pfgmpp-digits", arm, "floor").values()} == {"7.6"}
    assert "for all seeds, have 7.6 between them" in text
    cells = [f"K={K}" for K in (3, 5, 7, 10)] + [f"n={n}" for n in (1000, 3000, 5000, 10000)]
    cells += [f"D={D}" for D in (12, 14, 16, 18)]
    found = {c: ratio("arm-path", c, null=1) for c in cells}
    clear = [c for c in cells if found[c][3] < 0.05]
    assert clear == ["K=10", "n=5000", "D=14", "D=18"] and all(found[c][0] < 1 for c in clear)
    adjusted = holm([f[3] for f in found.values()])
    assert [c for c, p in zip(cells, adjusted, strict=True) if p < 0.05] == ["n=5000"]
    assert ratio("arm-path", "K=10", null=PREDICTED["arm"])[3] < 0.05
    trends = [
        advantage("K", 1, 3, 5, 7, 10),
        advantage("sim", 0.0, 1.0),
        advantage("n", 1000, 3000, 5000, 10000, 30000),
    ]
    assert round(holm([trend[3] for trend in trends])[0], 3) == 0.039
    cells = [f"K={K}" for K in (2, 4, 8)] + [f"n={n}" for n in (100, 300, 3000)]
    found = {c: ratio("ebm", c, null=1)[3] for c in cells}
    assert [c for c in cells if found[c] < 0.05] == ["K=4", "n=3000"] and round(
        min(holm(list(found.values()))), 3
    ) == 0.067
    angles = {K: np.pi * (np.arange(K) + 0.5) / K for K in (3, 10)}
    cosines = {K: np.cos(a[:, None] - a)[~np.eye(K, dtype=bool)].mean() for K, a in angles.items()}
    assert f"{cosines[3]:.2f} at K = 3 and {cosines[10]:.2f} at K = 10" in document("docs/theory.md")


def test_solvers_at_many_evaluations_and_on_an_exact_gaussian():
    """docs/linear.md: which combinations differ from the floor or from Heun, and what needs no Monte Carlo."""
    last = lambda found, *names: next(name for name in names if found.get(name, "") != "")
    mixture = {(r["arm"], r["seed"]): r for r in data("linear-mixture")}
    arms = {arm for arm, _ in mixture} - {"data"}
    tests = []
    for arm in arms:
        most = last(mixture[arm, 0], "nfe 200", "tolerance 0.001")
        tests.append(less("linear-mixture", most, arm, "data", against="fresh"))
    assert (len(arms), round(min(holm([t[3] for t in tests])), 2)) == (19, 0.25)
    above, seen = ([f"{f(t[i] for t in tests):.3f}" for f in (min, max)] for i in (0, 4))
    text = document("docs/linear.md")
    assert "lie above those, by {} to {}, where {} to {} would".format(*above, *seen) in text
    rows = {r["arm"]: r for r in data("linear-digits")}
    cells = [(arm, source) for arm in rows if arm != HEUN for source in range(3)]
    most = lambda arm, source: last(rows[arm], f"source {source}, nfe 100", f"source {source}, tolerance 0.001")
    found = [less("linear-digits", most(a, s), a, HEUN, against=f"source {s}, nfe 100") for a, s in cells]
    clear = {cell: round(p, 3) for cell, p in zip(cells, holm([f[3] for f in found]), strict=True) if p < 0.05}
    seen = [f[4] for f, (arm, _) in zip(found, cells, strict=True) if not arm.startswith("learned EM")]
    assert f"{min(seen):.1f} to {max(seen):.1f} would have shown, unadjusted" in text
    nine = [at(20, HEUN, SSCS.format("quadratic"), s)[3] for s in range(3)]
    nine = holm([*nine, *(faster(grid, s)[3] for grid in ("quadratic", "uniform") for s in range(3))])
    assert (round(nine[1], 2), round(nine[7], 2)) == (0.18, 0.09) and all(nine[i] < 0.05 for i in (3, 4, 8))
    assert len(cells) == 33 and clear == {("VP EM, quadratic", 1): 0.012, (EM.format("quadratic"), 1): 0.013}
    stuck = [seeds_of("linear-digits", f"learned {way}, quadratic", "source 1, nfe 100")[0] for way in ("EM", "SSCS")]
    assert [round(stuck[0]), round(stuck[1], 1)] == [191, 2.8]
    unseen = [at(20, HEUN, SSCS.format("quadratic"), source)[3] for source in (0, 2)]
    assert min(unseen) > 0.05 > max(faster("uniform", source, 50)[3] for source in range(3))
    assert all(faster("uniform", source, 50)[0] > 0 for source in range(3))
    exact = {(r["arm"], name): r[name] for r in data("linear-gaussian") for name in r}
    gain = {(g, n): exact[EM.format(g), f"nfe {n}"] / exact[SSCS.format(g), f"nfe {n}"]
            for g in ("uniform", "quadratic") for n in (20, 50, 100)}  # fmt: skip
    assert [round(v, 1) for v in gain.values()] == [2.4, 1.2, 1.0, 2.2, 1.7, 1.6]
    late = lambda way: sorted(exact[f"learned {way}, {g}", "nfe 200"] for g in ("sigma", "uniform", "quadratic"))
    assert "(errors at 200: {2:.2f}, {0:.3f} and {1:.3f} on the sigma".format(*late("EM")) in text
    assert "turns exactly, has {0:.3f} to {2:.3f}".format(*late("SSCS")) in text
    for arm, grid, nfe in (("CLD SSCS", "quadratic", 20), ("CLD EM", "uniform", 50), ("EDM Heun", "sigma", 10)):
        assert exact[f"{arm}, {grid}", f"nfe {nfe}"] == pytest.approx(solvers.exact_error((arm, grid, nfe)), rel=5e-3)


def test_networks_on_sources_without_structure():
    text = document("docs/theory.md")
    for K, (single, multi) in list(run_arm.PUBLISHED["K"].items())[1:]:
        ours = [
            mean_of(seeds_of("arm-dirichlet", f"K={K}", side).values())[0] for side in ("single", "multi", "counting")
        ]
        cells = [f"{single:.4f}", f"{multi:.4f}", *(f"{v:.3f}" for v in ours)]
        interval = "{:.2f} ({:.2f} to {:.2f})".format(*ratio("arm-dirichlet", f"K={K}")[:3])
        assert f"| {K} | {' | '.join(cells)} | {interval} |" in text, K


def test_counting_beside_the_published_errors():
    """docs/theory.md's table; and the numbers behind it are what the command counts."""
    rows, text = data("arm-counting"), document("docs/theory.md")
    for tag, table in run_arm.PUBLISHED.items():
        for value, (single, multi) in table.items():
            cell = {"K": 3, "n": 30_000 if tag == "K" else 10_000, "D": 10} | {tag: value}
            counted = [r["counting"] for r in rows if all(r[k] == v for k, v in cell.items())]
            mean, low, high, *_ = student(np.mean(counted), scipy.stats.sem(counted), len(counted) - 1)
            line = f"| {cell['K']} | {cell['n']} | {cell['D']} | {single:.4f} | {multi:.4f} |"
            assert f"{line} {mean:.4f} ± {(high - low) / 2:.4f} |" in text
            if cell["D"] > 12:
                assert mean > 1.1 * single
            else:
                assert abs(mean / single - 1) < (0.08 if cell["K"] > 1 else 0.165)
    config = ArmConfig(K=3, n=3000, D=10, family="dirichlet", sim=0.0)
    tables = ground_truth(config, 0)
    codes, sources = sample(tables, config.n, 0)
    counts = [np.bincount(codes[sources == k], minlength=1024) for k in range(3)]
    error = np.mean([abs(c / c.sum() - p).sum() / 2 for c, p in zip(counts, tables, strict=True)])
    assert error == pytest.approx(
        next(r["counting"] for r in rows if (r["K"], r["n"], r["D"], r["seed"]) == (3, 3000, 10, 0))
    )


def test_the_quickstarts_answer():
    """README's table, interval and p, by scipy from docs/data/quickstart.csv."""
    rows = data("quickstart")
    sources, seeds = sorted({r["source"] for r in rows}), sorted({r["seed"] for r in rows})
    loss = {(r["arm"], r["source"], r["seed"]): r["denoising_loss"] for r in rows}
    multi, single = (np.array([[loss[a, s, t] for t in seeds] for s in sources]) for a in ("multi", "single"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = " ".join(text[text.index("## What the quickstart shows") : text.index("## More sources")].split())
    half = lambda v: scipy.stats.t.ppf(0.975, len(v) - 1) * scipy.stats.sem(v)
    for source, a, b in zip(sources, multi, single, strict=True):
        shown = " | ".join(f"{v.mean():.3f} +- {half(v):.3f}" for v in (a, b))
        assert f"| {source} | {shown} | {1 - a.mean() / b.mean():.1%}".replace("%", " %") in text
    units = single.mean(axis=1, keepdims=True)
    test = scipy.stats.ttest_rel((single / units).mean(axis=0), (multi / units).mean(axis=0))
    low, high = test.confidence_interval(0.95)
    advantage = 1 - (multi.mean(axis=1) / units[:, 0]).mean()
    said = re.search(r"lower by ([\d.]+) % \(95 % interval ([\d.]+) % to ([\d.]+) %, .* p = (\.\d+)\)", text)
    assert [float(v) for v in said.groups()[:3]] == [round(100 * v, 1) for v in (advantage, low, high)]
    assert float(said[4]) == round(test.pvalue, 3)
    longer = data("quickstart-longer")
    assert len(longer) == 15 and all(r["lowest_loss"] == r["loss"] for r in longer) and "none of the 15 found" in text
    assert min(r["trained_kimg"] - r["best_kimg"] for r in longer) > 25
    stops = [f"{f(r['best_kimg'] for r in longer):.0f}" for f in (min, max)]
    assert f"the others at {stops[0]} to {stops[1]} thousand" in text


def test_the_ema_lengths_of_digits():
    """docs/ema.md's optimum and differences, by numpy and scipy from docs/data/ema-digits.csv."""
    rows = data("ema-digits")
    lengths, seeds = sorted({r["ema"] for r in rows}), sorted({r["seed"] for r in rows})
    found = {(r["ema"], r["seed"]): r["denoising_loss"] for r in rows}
    loss = np.array([[found[length, seed] for length in lengths] for seed in seeds])
    text = document("docs/ema.md")
    vertices = []
    for curve in loss:
        near = slice(curve.argmin() - 1, curve.argmin() + 2)
        a, b, _ = np.polyfit(np.log(lengths[near]), curve[near], 2)
        vertices.append(-b / (2 * a))
    test = scipy.stats.ttest_1samp(vertices, 0)
    low, high = np.exp(test.confidence_interval(0.95))
    assert f"at {np.exp(np.mean(vertices)):.4f} (95 % interval {low:.4f} to {high:.4f})" in text
    for length, says in (
        (0.05, "loss of 0.050 is higher by {:.4f} ({:.4f} to {:.4f})"),
        (0.1, "preset, by {:.4f} ({:.4f} to {:.4f})"),
        (0.015, "0.015 against 0.020 {:+.4f} ({:.4f} to {:.4f}; one of {:.4f} would"),
        (0.03, "0.030 against it {:+.4f} ({:.4f} to {:.4f}; {:.4f})"),
    ):
        difference = loss[:, lengths.index(length)] - loss[:, lengths.index(0.02)]
        interval = scipy.stats.ttest_1samp(difference, 0).confidence_interval(0.95)
        t = scipy.stats.t(len(seeds) - 1)
        seen = scipy.stats.sem(difference) * (t.ppf(0.975) + t.ppf(0.8))  # four times in five
        assert says.format(difference.mean(), *interval, seen) in text


def test_the_reproduction_table():
    """What stands beside the published numbers is what the simulations give, and what is not run has its preset."""
    text = document("docs/reproduction.md")
    for tag, table in PUBLISHED_GAUSSIAN.items():
        for row, line in zip(gaussian.summary_rows(gaussian.sweep(tag)), table.splitlines(), strict=True):
            value, *_, single, multi = line.split()
            ours = [f"{row[f'empirical TV of {side}']:.6f}" for side in ("single", "multi")]
            assert f"| {tag} = {float(value):g} | {single} | {ours[0]} | {multi} | {ours[1]} |" in text
            assert ours == [single, multi]
    for tag in ("K", "n", "D"):
        for value, published in run_arm.PUBLISHED[tag].items():
            found = [mean_of(seeds_of("arm-path", f"{tag}={value}", side).values()) for side in ("single", "multi")]
            cells = (f"{p:.4f} | {f[0]:.4f} ± {f[0] - f[1]:.3f}" for p, f in zip(published, found, strict=True))
            assert f"| {tag} = {value} | {' | '.join(cells)} |" in text
    arms = {"no selection": "baseline", "early AJEST": "early-ajest", "AJEST": "ajest"}
    arms |= {"late AJEST": "late-ajest", "inverted AJEST": "iajest", "random": "random"}
    for when, names in (("steps", list(arms)[:5]), ("samples", (*list(arms)[:3], "random"))):
        for name in names:
            found = [list(seeds_of("selection-tree", arms[name], f"{when} {m}").values()) for m in SCORES]
            shown = short(" | ".join(f"{np.mean(v):.4f} +- {np.std(v, ddof=1):.4f}" for v in found))
            assert re.search(rf"\| {name} \|[^|]*\|[^|]*\|[^|]*\| {re.escape(shown)} \|", text), (when, name)
    named = set(re.findall(r"(?:edm2|mdm|cld|pfgmpp)-[a-z0-9-]*(?:1c|vp|cifar10)\b", text))
    assert named and named <= set(PRESETS)


def test_the_spread_of_stable_targets():
    rows, text = data("pfgmpp-spread"), document("docs/pfgmpp.md")
    spread = lambda levels, target: np.array(
        [r["target_variance"] for r in rows if (r["levels"], r["target"]) == (levels, target)]
    )
    for levels, shown in (
        ("all", "by a factor of {:.1f} ({:.1f} to {:.1f}),"),
        ("2 to inf", "= 2 of {:.1f} ({:.1f} to {:.1f}) (means"),
    ):
        ratio = spread(levels, "image") / spread(levels, "stable")
        interval = scipy.stats.ttest_1samp(ratio, 0).confidence_interval(0.95)
        assert shown.format(ratio.mean(), *interval) in text
    for levels in dict.fromkeys(r["levels"] for r in rows):
        means = " | ".join(f"{spread(levels, target).mean():.4f}" for target in ("image", "stable"))
        assert f"| {levels.replace('2 to inf', 'above 2')} | {means} |" in text


def test_the_posterior_is_aligned_in_sigma():
    """docs/pfgmpp.md: how far the curves of other D are from that of D = inf."""
    rows = {(str(r["D"]), r["sigma"]): r for r in data("pfgmpp-alignment")}
    pairs = {key: (row, rows["inf", key[1]]) for key, row in rows.items() if key[0] != "inf"}
    gap = {key: (b["tvd"] - a["tvd"], 1.96 * math.hypot(a["error"], b["error"])) for key, (a, b) in pairs.items()}
    assert all(abs(mean) < min(half, 0.002) for (D, _), (mean, half) in gap.items() if D != "16")
    (_, sigma), (mean, half) = max(((k, v) for k, v in gap.items() if k[0] == "16"), key=lambda item: item[1][0])
    said = f"at most {mean:.3f} (95 % interval {mean - half:.3f} to {mean + half:.3f}, at sigma = {sigma:g})"
    assert said in document("docs/pfgmpp.md")


def test_the_toy_notebook_of_pfgmpp():
    rows, text = data("pfgmpp-toy"), document("docs/pfgmpp.md")
    column = lambda D, name: np.array([r[name] for r in rows if str(r["D"]) == D])
    mean, low, high, *_ = student(np.mean(column("100", "mmd")), scipy.stats.sem(column("100", "mmd")), 4)
    said = f"{mean:.3f} ({low:.3f} to {high:.3f})"
    assert f"{mean:.3f} (95 % interval {low:.3f} to {high:.3f}) at D = 100" in text
    assert f"| 0.0586 | {said}:" in document("docs/reproduction.md")
    more = column("inf", "mmd") - column("100", "mmd")
    mean, low, high, _, seen = student(more.mean(), scipy.stats.sem(more), 4)
    assert f"less that is {mean:.3f} ({low:.3f} to {high:.3f}): one of {seen:.3f} would have been seen" in text
    assert f"Fresh points have {column('100', 'floor').mean():.4f}:" in text
    assert f"here {(column('100', 'loss_first') / column('100', 'loss_last')).mean():.1f})" in text


def test_the_toy_problem_of_cld():
    """docs/linear.md's table, from docs/data/cld-toy.csv; the official code's numbers are those of its digest."""
    text = (ROOT / "docs" / "linear.md").read_text(encoding="utf-8")
    rows = data("cld-toy")
    names = [
        f"{way}-{steps}"
        for way in ("em-uniform", "em-quadratic", "sscs-uniform", "sscs-quadratic")
        for steps in (20, 50)
    ]
    official = {
        "noise": ["-0.31", "0.26", "0.098", "0.077", "0.055", "0.15", "0.064", "0.082", "0.044", "", "219"],
        "mixed": ["-0.96", "0.26", "0.092", "0.054", "0.045", "0.18", "0.047", "0.067", "0.044", "", "225"],
    }
    for prediction, theirs in official.items():
        for row in (r for r in rows if r["prediction"] == prediction):
            ours = " | ".join(f"{row[name]:.3g}" for name in ("nll", *names, "ode", "nfe"))
            assert f"| {prediction}, seed {row['seed']} | {ours} |" in text
        assert f"| {prediction}, official code | {' | '.join(theirs)} |" in text
    points = toy_data.get("multimodal_swissroll")(20000, torch.Generator().manual_seed(1))
    entropy = -float(toy_data.logp("multimodal_swissroll")(points).mean())
    assert float(re.search(r"\| the data \(entropy\) \| (\S+) \|", text)[1]) == pytest.approx(entropy, abs=0.03)
    floors = sorted({f"{r['floor']:.3f}" for r in rows})
    assert f"points: {' and '.join(floors)};" in " ".join(text.split())
    errors = sorted(f"{r['nll_error']:.2f}" for r in rows)
    assert f"standard error {errors[0]} to {errors[-1]};" in text


def test_latents_in_small():
    """docs/latents.md's table and its two differences, by scipy from docs/data/latents.csv."""
    rows, text = data("latents"), document("docs/latents.md")
    seeds = sorted({r["seed"] for r in rows})
    values = {
        (arm, name): np.array([r[name] for s in seeds for r in rows if (r["arm"], r["seed"]) == (arm, s)])
        for arm in ("real", "through", "latents")
        for name in ("fd", "kid", "agreement")
    }

    def said(found, digits):
        low, high = scipy.stats.ttest_1samp(found, 0).confidence_interval(0.95)
        return f"{found.mean():.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

    for arm, title in (
        ("real", "held-out real ones"),
        ("through", "the same, encoded and decoded"),
        ("latents", "generated"),
    ):
        cells = [said(values[arm, name], digits) for name, digits in (("fd", 1), ("kid", 2), ("agreement", 3))]
        assert f"| {title} | {' | '.join(cells)} |" in text, cells
    lost, far = (values[a, "fd"] - values[b, "fd"] for a, b in (("through", "real"), ("latents", "through")))
    assert f"costs {said(lost, 1)} of distance" in text, said(lost, 1)
    assert f"model {said(far, 1)} more" in text, said(far, 1)
    assert len(seeds) >= 3 and f"over {len(seeds)} seeds" in text


def test_what_a_companion_is_worth():
    """Gains and contrasts that docs/multi-vs-single.md and README print, by scipy from docs/data/multi-vs-single.csv."""
    rows = read_csv(ROOT / "docs" / "data" / "multi-vs-single.csv")
    text = (ROOT / "docs" / "multi-vs-single.md").read_text(encoding="utf-8")
    readme = document("README.md")
    seeds, tests = sorted({r["seed"] for r in rows}), [(0.0146, "0.0292")]  # of the rank correlation, tested below

    def gains(group, k, n, measure="bits_per_dim"):
        """Mean over sources of the gain over the single models of the same data, per seed."""
        alone = "real" if group == "again" else group
        of = lambda g, s, k: {
            r["source"]: r[measure]
            for r in rows
            if (r["group"], r["design"], r["seed"], r["k"], r["n"]) == (g, "partition", s, k, n)
        }
        pairs = [(of(alone, s, 1), of(group, s, k)) for s in seeds]
        assert all(len(a) == len(b) == 10 for a, b in pairs)
        return np.array([np.mean([a[t] - b[t] for t in a]) for a, b in pairs])

    def printed(line, values):
        mean, low, high, p, seen = mean_of(values)
        shown = f"{p:.4f}" if p >= 1e-4 else "< 0.0001"
        (found,) = re.findall(rf"\| {re.escape(line)}[^|]*\| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|", text)
        assert (*found[:2], found[3]) == (f"{mean:+.4f} ({low:+.4f} to {high:+.4f})", shown, f"{seen:.4f}")
        tests.append((p, found[2]))
        return p

    def slope(x, tables):
        x = np.log2(x) - np.mean(np.log2(x))
        return x @ np.array(tables) / (x @ x)

    by_k = [gains("real", k, 25) for k in (1, 2, 5, 10)]
    assert printed("more sources", slope([1, 2, 5, 10], by_k)) < 1e-4
    again = {(r["k"], r["seed"], r["source"]): r["bits_per_dim"] for r in data("multi-vs-single-rerun")}
    bits = {k: np.array([np.mean([again[k, s, t] for t in range(10)]) for s in seeds]) for k in (1, 2, 5, 10)}
    found = mean_of(slope([1, 2, 5, 10], [bits[1] - bits[k] for k in bits]))[:3]
    assert len(again) == 200 and "rounds otherwise: {:.3f} ({:.3f} to {:.3f};".format(*found) in " ".join(text.split())
    headline = "{:.3f} bits/dim for every doubling of the number of sources (95 % interval {:.3f} to {:.3f}"
    assert headline.format(*mean_of(slope([1, 2, 5, 10], by_k))[:3]) in readme
    printed("more images", slope([25, 100], [by_k[3], gains("real", 10, 100)]))
    printed("sources made alike", gains("shuffled", 10, 25))
    printed("the same arm again", gains("again", 1, 25))
    for (_, shown), p in zip(tests, holm([p for p, _ in tests]), strict=True):
        assert shown == (f"{p:.4f}" if p >= 1e-4 else "< 0.0001")
    before = slope([1, 2, 5, 10], [gains("real", k, 25, "bits_per_dim_from_0.002") for k in (1, 2, 5, 10)])
    test = scipy.stats.ttest_1samp(before, 0)
    low, high = test.confidence_interval(0.95)
    assert f"{before.mean():+.3f} ({low:+.3f} to {high:+.3f}, p = {f'{test.pvalue:.3f}'[1:]})" in text

    def of(k, n, name="bits_per_dim", group="real"):
        """Mean over sources, per seed."""
        want = (group, "partition", k, n)
        mine = [r for r in rows if (r["group"], r["design"], r["k"], r["n"]) == want]
        return np.array([np.mean([r[name] for r in mine if r["seed"] == s]) for s in seeds])

    flat = " ".join(text.split())
    longer = data("multi-vs-single-longer")
    singles = np.array([np.mean([r["bits_per_dim"] for r in longer if r["seed"] == s]) for s in seeds])
    over_k = mean_of(slope([1, 2, 5, 10], [singles - other for other in (singles, of(2, 25), of(5, 25), of(10, 25))]))
    over_n = mean_of(slope([25, 100], [singles - of(10, 25), of(1, 100) - of(10, 100)]))
    said = "{:.3f} ({:.3f} to {:.3f}) over K and {:.3f} ({:.3f} to {:.3f}) over n"
    assert len(longer) == 50 and said.format(*over_k[:3], *over_n[:3]) in flat
    found = mean_of(of(1, 100) - of(10, 25))
    said = "not told apart: by {:.3f} bits/dim ({:.3f} to {:.3f}, p = {:.2f}; {:.3f} would"
    assert short(said.format(*found)) in short(flat)
    found = mean_of(of(1, 100) - of(10, 50))
    assert "beat 100 alone by {:.3f} ({:.3f} to {:.3f}, p < .0001)".format(*found[:3]) in flat and found[3] < 1e-4
    for name, digits in (("fd_at_floor_size", 1), ("agreement", 3)):
        found = mean_of(of(1, 25, name) - of(10, 25, name))
        said = f"{found[0]:.{digits}f} ({found[1]:.{digits}f} to {found[2]:.{digits}f}; p = {found[3]:.3f}"
        assert short(said) in short(flat), said
    assert mean_of(of(1, 25, "kid") - of(10, 25, "kid"))[3] > 0.1
    found = mean_of(of(1, 25, group="shuffled") - of(10, 25, group="shuffled") - of(1, 25) + of(10, 25))
    assert short("{:.2f} more than the digits do ({:.2f} to {:.2f}; p = {:.3f}".format(*found[:4])) in short(flat)
    assert f"the gain among ten is {np.mean(of(1, 100) - of(10, 100)):.2f}:" in flat
    assert f"in between, {np.mean(of(1, 50) - of(10, 50)):.2f}." in flat
    best = [r["best_kimg"] for r in rows if (r["group"], r["design"], r["k"], r["n"]) == ("real", "partition", 1, 100)]
    assert f"{sum(b > 98.304 - 0.1 for b in best)} of 50 were best within the last look" in flat
    made_alike = np.mean(of(1, 25, group="shuffled") - of(10, 25, group="shuffled"))
    over_n = mean_of(slope([25, 100], [of(1, n) - of(10, n) for n in (25, 100)]))
    for said in (
        f"{np.mean(of(1, 25) - of(10, 25)):.2f} among ten, of {np.mean(of(1, 25)):.2f} alone",
        f"{np.mean(of(1, 100) - of(10, 100)):.2f} among ten at 100 ({over_n[0]:.3f} per doubling of n; p = {over_n[3]:.3f})",
        f"ten gain {made_alike:.2f}.",
    ):
        assert short(said) in short(readme), said
    sizes = (25, 50, 100)
    learnt = Plan(sizes, np.moveaxis([[of(k, n) for n in sizes] for k in (1, 10)], 2, 0))
    answer = in_words(learnt, list(range(10)), [])
    assert all(line in flat for line in answer.splitlines() if line.startswith("- **"))
    assert f"b = {learnt.curves.rate:.2f}" in flat and learnt.turn() is None
    worth = [25 * getattr(learnt.multiplier(25), end) for end in ("value", "low", "high")]
    assert (
        "worth {:.0f} alone** (`plan.py`, learning curves at 25, 50 and 100 images; {:.0f} to {:.0f})".format(*worth)
        in readme
    )
    levels = np.array([[of(k, n).mean() for n in sizes] for k in (1, 10)])  # the curves pass where the models are
    assert np.abs([learnt.curves.alone(sizes), learnt.curves.together(sizes)] - levels).max() < 0.01
    for size in sizes:  # at the bound, and at no less, single models are told apart from the shared one
        low = learnt.multiplier(size).low
        apart = [learnt.estimate(lambda c: float(c.alone(m * low * size) - c.together(size))).low for m in (0.99, 1.01)]  # noqa: B023
        assert apart[0] > 0 > apart[1]


def test_tables_of_gains():
    """Both tables of docs/multi-vs-single.md, every cell; and what other stopping rules say."""
    rows = data("multi-vs-single")
    text = (ROOT / "docs" / "multi-vs-single.md").read_text(encoding="utf-8")
    alone = {(r["group"], r["n"], r["seed"], r["source"]): r for r in rows if (r["k"], r["group"]) != (1, "again")}
    alone |= {
        (r["group"], r["n"], r["seed"], r["source"]): r
        for r in rows
        if (r["k"], r["group"]) in ((1, "real"), (1, "shuffled"))
    }
    kinds = dict.fromkeys((r["group"], r["design"], r["n"], r["k"]) for r in rows)

    def gain(kind, measure, share=True):
        """Gains of the targets over their single models, by seed."""
        found = {}
        for r in rows:
            base = alone["shuffled" if r["group"] == "shuffled" else "real", r["n"], r["seed"], r["source"]]
            if (r["group"], r["design"], r["n"], r["k"]) == kind and "" not in (r[measure], base[measure]):
                value = base[measure] - r[measure]
                found.setdefault(r["seed"], []).append(value / base[measure] * 100 if share else value)
        return dict(sorted(found.items()))

    def cell(kind, measure, share=True):
        mean, low, high, *_ = mean_of([np.mean(v) for v in gain(kind, measure, share).values()])
        few = f", {len(gain(kind, measure))} seeds" * (len(gain(kind, measure)) < 5)
        return (
            f"{mean:+.1f} % ({low:+.1f} to {high:+.1f}){few}" if share else f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
        )

    levels = [name for name in rows[0] if name.startswith("loss_sigma")]
    readings = ("denoising_loss", "loss_equal_per_model", "loss_equal_total")
    for kind in kinds:
        if kind[3] == 1 and kind[0] != "again":
            continue
        head = " | ".join(map(str, kind))
        cells = [cell(kind, "bits_per_dim", False), *(cell(kind, name) for name in readings)]
        assert re.search(rf"\| {re.escape(head)} \| \d+ \| [\d.]+ \| {re.escape(' | '.join(cells))} \|", text), kind
        assert f"| {head} | {' | '.join(cell(kind, name) for name in levels)} |" in text, kind
    flat = " ".join(text.split())
    ten = {
        n: [mean_of([np.mean(v) for v in gain(("real", "partition", n, 10), m).values()]) for m in readings[1:]]
        for n in (25, 50, 100)
    }
    three = lambda index: [v for n in (25, 50, 100) for v in ten[n][index][:3]]
    said = "{:.0f} % in loss ({:.0f} to {:.0f}), {:.0f} % ({:.0f} to {:.0f}) and {:.0f} % ({:.0f} to {:.0f}); at equal images"
    assert said.format(*three(0)) in flat
    said = "for every source) {:.0f} % ({:.0f} to {:.0f}), {:.0f} % ({:.0f} to {:.0f}) and {:.0f} % ({:.0f} to {:.0f}). More"
    assert said.format(*three(1)) in flat
    mean = lambda n, k, m: np.array([np.mean(v) for v in gain(("real", "partition", n, k), m).values()])
    x = np.log2([2, 5, 10]) - np.log2([2, 5, 10]).mean()
    slopes = [mean_of(x @ [mean(25, k, m) for k in (2, 5, 10)] / (x @ x)) for m in readings[1:]]
    assert "model ({:.1f} % per doubling from two to ten; {:.1f} to {:.1f})".format(*slopes[0]) in flat
    assert "and do at equal images in all ({:.1f} %; {:.1f} to {:.1f})".format(*slopes[1]) in flat
    fewer = [mean_of(mean(25, 10, m) - mean(100, 10, m)) for m in readings[1:]]
    said = "{:.0f} %, {:.0f} to {:.0f}, and {:.0f} %, {:.0f} to {:.0f})."
    assert said.format(*fewer[0][:3], *fewer[1][:3]) in flat and min(f[3] for f in fewer) > 0.05
    ended = lambda group, design, k: len(
        {(r["set"], r["seed"]) for r in rows if (r["group"], r["design"], r["k"], r["n"]) == (group, design, k, 25)
         and r["loss_equal_total"] == ""}
    )  # fmt: skip
    pairs, twos, halves = (ended("real", *kind) for kind in (("pairs", 2), ("partition", 2), ("partition", 5)))
    assert f"all {pairs} of 200 pairs, {twos} of 25 twos, {halves} of 10 halves and" in flat
    assert f"shuffled, {ended('shuffled', 'partition', 10)} of 5." in flat
    singles = [r["loss_equal_per_model"] for r in rows if (r["group"], r["k"], r["n"]) == ("real", 1, 25)]
    spikes = sum(v > 1 for v in singles if v != "")
    assert f"{singles.count('')} of the 50 single" in flat
    assert f"Of the {50 - singles.count('')} single ones left, {spikes} stood in a spike" in flat
    medians = [np.median(np.concatenate(list(gain(("real", "partition", 25, 10), m).values()))) for m in readings[1:]]
    assert "the median target gains {:.0f} and {:.0f} %.".format(*medians) in flat
    again = [np.mean(v) for v in gain(("again", "partition", 25, 1), "bits_per_dim", False).values()]
    assert ", ".join(f"{v:+.3f}" for v in again) in flat
    rise = [
        np.mean([r["loss_sigma0.05"] for r in rows if (r["group"], r["k"], r["n"], r["seed"]) == (group, 1, 25, 3)])
        for group in ("again", "real")
    ]
    assert f"loss at 0.05 by {100 * (rise[0] / rise[1] - 1):.0f} %" in flat
    measures = ("fd_at_floor_size", "agreement", "kid")
    found = [
        scipy.stats.ttest_rel(*([np.mean([r[m] for r in rows if (r["group"], r["k"], r["n"], r["seed"]) == ("real", k, 25, s)
                                         and r["design"] == "partition"]) for s in range(5)] for k in (1, 10))).pvalue
        for m in measures
    ]  # fmt: skip
    adjusted = holm(found)
    assert short(f", {adjusted[0]:.3f} by Holm over the three") in short(flat)
    assert short(f", {adjusted[1]:.3f} by Holm), and KID is not seen to differ (p = {found[2]:.2f})") in short(flat)


def test_stops_of_single_models():
    """How many had ended before the spike of their loss under the first rule, and found a lower one when trained on."""
    text, last = document("docs/multi-vs-single.md"), {(r["n"], r["seed"], r["source"]): r for r in data("multi-vs-single")
                                                      if (r["group"], r["k"]) == ("real", 1)}  # fmt: skip
    early = {
        n: [r for r in data("multi-vs-single-stops") if r["n"] == n and r["first_best_kimg"] < 12.3] for n in (50, 100)
    }
    lower = {n: sum(r["loss"] < r["first_loss"] for r in rows) for n, rows in early.items()}
    assert f"With four looks {len(early[50])} and {len(early[100])} of these 50" in text
    assert f"trained on, {lower[50]} and {lower[100]} of them found a lower one" in text
    for row in data("multi-vs-single-stops"):
        assert row["best_kimg"] == pytest.approx(last[row["n"], row["seed"], row["source"]]["best_kimg"])


def test_what_a_near_partner_is_worth():
    """Gains of targets in pairs: how many exclude zero, and their rank correlation with nearness, p by permuting sources."""
    rows, text = data("multi-vs-single"), document("docs/multi-vs-single.md")
    real = [r for r in rows if (r["group"], r["n"]) == ("real", 25)]
    alone = {(r["seed"], r["source"]): r["bits_per_dim"] for r in real if r["k"] == 1}
    gain, near = np.full([5, 10, 10], np.nan), np.full([5, 10, 10], np.nan)
    for r in real:
        if r["k"] == 2:
            (partner,) = {int(m) for m in r["set"].split("-")} - {r["source"]}
            gain[r["seed"], r["source"], partner] = alone[r["seed"], r["source"]] - r["bits_per_dim"]
            near[r["seed"], r["source"], partner] = -r["energy_distance"]
    low, high = scipy.stats.ttest_1samp(gain, 0).confidence_interval(0.95)
    assert (gain.mean(0) > 0).sum() == 90
    smallest = np.nanmin(gain.mean(0))
    assert f"below zero (smallest {smallest:.3f}), and {(low > 0).sum()} of their intervals lie above it, " in text
    p = scipy.stats.ttest_1samp(gain, 0).pvalue[~np.eye(10, dtype=bool)]
    assert f"{sum(adjusted < 0.05 for adjusted in holm(p))} by Holm; harm of up to {-np.nanmin(low):.2f} is" in text
    others = [[b for b in range(10) if b != a] for a in range(10)]

    def correlations(order):
        moved = near[:, order][:, :, order]
        ranks = lambda x: scipy.stats.rankdata(np.stack([x[:, a, o] for a, o in enumerate(others)], 1), axis=-1) - 5
        a, b = ranks(gain), ranks(moved)
        return ((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))).mean(1)

    found = correlations(np.arange(10))
    spearman = [scipy.stats.spearmanr(gain[0, a, o], near[0, a, o]).statistic for a, o in enumerate(others)]
    assert found[0] == pytest.approx(np.mean(spearman))
    low, high = scipy.stats.ttest_1samp(found, 0).confidence_interval(0.95)
    assert f"{found.mean():+.4f} ({low:+.4f} to {high:+.4f}) | 0.0146 |" in text
    assert f"rank correlation {found.mean():.2f} within target ({low:.2f} to {high:.2f};" in text
    rng = np.random.default_rng(1)
    chance = [abs(correlations(rng.permutation(10)).mean()) >= found.mean() for _ in range(2000)]
    assert abs(np.mean(chance) - 0.0146) < 0.009  # three standard errors of the two counts


def test_what_the_whole_state_is_worth():
    """docs/linear.md's table and contrasts of joint-mnist, by scipy from docs/data/joint-mnist.csv."""
    rows, text = data("joint-mnist"), (ROOT / "docs" / "linear.md").read_text(encoding="utf-8")
    values = lambda form, kinds, name: np.mean(
        [[r[name] for r in rows if (r["form"], r["process"]) == (form, kind)] for kind in kinds], axis=0
    )
    forms = {"reduced": "reduced", "joint-denoiser": "joint denoiser", "joint": "joint, as MDM"}
    kinds = {"vp": "VP", "cld": "CLD", "malda": "MALDA", "learned2": "learned, V = 2", "learned3": "learned, V = 3"}
    for (form, shown), (kind, named) in itertools.product(forms.items(), kinds.items()):
        cells = []
        for name, digits in (("own_bits_per_dim", 3), ("common_bits_per_dim", 3), ("fd", 2)):
            v = values(form, [kind], name)
            assert len(v) == 5
            half = scipy.stats.t.ppf(0.975, 4) * scipy.stats.sem(v)
            cells.append(f"{v.mean():.{digits}f} ± {half:.{digits}f}")
        assert f"| {shown} | {named} | {' | '.join(cells)} |" in text
    fixed, learned, tests = ["vp", "cld", "malda"], ["learned2", "learned3"], []
    own, common, fd = (
        ("own_bits_per_dim", "bits/dim, own bound"),
        ("common_bits_per_dim", "bits/dim, common bound"),
        ("fd", "FD"),
    )
    reduced, joint, denoiser = ("reduced", kinds), ("joint", kinds), ("joint-denoiser", kinds)
    for of, against, (name, unit), said in (
        (joint, reduced, own, "joint, as MDM, against reduced ({})"),
        (joint, reduced, common, "joint, as MDM, against reduced ({})"),
        (joint, reduced, fd, "joint, as MDM, against reduced ({})"),
        (denoiser, reduced, common, "joint denoiser against reduced ({})"),
        (denoiser, reduced, fd, "joint denoiser against reduced ({})"),
        (("joint", learned), ("joint", fixed), own, "learned against fixed matrices, joint ({})"),
        (("reduced", learned), ("reduced", fixed), own, "learned against fixed matrices, reduced ({})"),
        (("joint", learned), ("joint", fixed), fd, "learned against fixed matrices, joint ({})"),
    ):
        gain = values(*against, name) - values(*of, name)
        test = scipy.stats.ttest_1samp(gain, 0)
        tests.append((said.format(unit), gain, test))
    adjusted = holm([test.pvalue for *_, test in tests])
    small = lambda p: "< 0.0001" if p < 1e-4 else f"{p:.4f}"
    for (said, gain, test), p in zip(tests, adjusted, strict=True):
        low, high = test.confidence_interval(0.95)
        interval = f"{gain.mean():+.4f} ({low:+.4f} to {high:+.4f})"
        seen = f"{detectable(scipy.stats.sem(gain), 5):.4f}"
        assert f"| {said} | {interval} | {small(test.pvalue)} | {small(p)} | {seen} |" in text, (said, interval)
    worse = lambda kinds: mean_of(values("joint", kinds, common[0]) - values("reduced", kinds, common[0]))[:3]
    said = "worse by {:.2f} ({:.2f} to {:.2f}), on VP alone not seen to be ({:.2f}; {:.2f} to {:.2f})"
    assert said.format(*worse(("vp", *learned)), *worse(("vp",))) in " ".join(text.split())
