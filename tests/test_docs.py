"""The numbers that the documents print, from the numbers of every seed beside them."""

import re

import numpy as np
import scipy.stats
from small_runs import ROOT

from metrics.table import read_csv


def test_the_quickstarts_answer():
    """README's table, interval and p, by scipy from docs/data/quickstart.csv."""
    rows = read_csv(ROOT / "docs" / "data" / "quickstart.csv")
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


def test_the_ema_lengths_of_digits():
    """docs/ema.md's optimum and differences, by numpy and scipy from docs/data/ema-digits.csv."""
    rows = read_csv(ROOT / "docs" / "data" / "ema-digits.csv")
    lengths, seeds = sorted({r["ema"] for r in rows}), sorted({r["seed"] for r in rows})
    found = {(r["ema"], r["seed"]): r["denoising_loss"] for r in rows}
    loss = np.array([[found[length, seed] for length in lengths] for seed in seeds])
    text = " ".join((ROOT / "docs" / "ema.md").read_text(encoding="utf-8").split())
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
