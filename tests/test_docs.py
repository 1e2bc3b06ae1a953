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
