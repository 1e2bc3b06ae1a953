"""Tables of results: means and errors against scipy, what single values give, and the Markdown writer."""

import math

import numpy as np
import pytest
import scipy.stats

from metrics import table


def test_means_and_paired_differences_against_scipy():
    a, b = np.random.default_rng(0).normal(size=(2, 7))
    assert table.mean_and_deviation(a) == pytest.approx((a.mean(), a.std(ddof=1)), rel=1e-12)
    assert table.mean_and_error(a) == pytest.approx((a.mean(), scipy.stats.sem(a)), rel=1e-12)
    mean, error, low, high = table.paired_difference(a, b)
    assert (mean, error) == pytest.approx(((a - b).mean(), scipy.stats.sem(a - b)), rel=1e-12)
    interval = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (low, high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    with pytest.raises(ValueError):
        table.paired_difference(a, b[:-1])


def test_a_single_value_has_no_spread():
    assert table.mean_and_error([3]) == (3, 0)
    assert table.mean_and_deviation([3])[0] == 3 and math.isnan(table.mean_and_deviation([3])[1])
    mean, *rest = table.paired_difference([3], [1])
    assert mean == 2 and all(map(math.isnan, rest))


def test_markdown():
    assert table.markdown(["a", "b"], [[1, ""], ["x", "y"]]) == "| a | b |\n| --- | --- |\n| 1 |  |\n| x | y |"
