"""Paired comparisons: Holm's procedure by hand, what noise and power have to do with a verdict."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from benchmarks.runs.comparison import Comparison, compare_all, verdict


def test_mean_interval_and_p_by_hand() -> None:
    """Deviation 0.05 sqrt(10), three degrees of freedom, whose t quantile is 3.1824."""
    found = compare_all({"gmd": [-0.1, -0.25, -0.3, 0.05]})["gmd"]
    half = 3.18244631 * 0.05 * 10**0.5 / 2
    assert found.interval == pytest.approx((-0.15 - half, -0.15 + half))
    assert (found.mean, found.std) == pytest.approx((-0.15, 0.05 * 10**0.5))
    assert found.p == pytest.approx(ttest_1samp(found.differences, 0.0).pvalue)
    assert found.shown is False and compare_all({"gmd": [-0.2, -0.201, -0.202]})["gmd"].shown


def test_holm_by_hand() -> None:
    """The second smallest is multiplied by two only, but stays above the first; none exceeds 1."""
    groups = {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.5], "c": [1.0, -2.0, 1.5]}
    p = {name: float(ttest_1samp(values, 0.0).pvalue) for name, values in groups.items()}
    assert p["a"] < p["b"] < p["c"] and 3 * p["a"] > 2 * p["b"]
    found = {name: comparison.p for name, comparison in compare_all(groups).items()}
    assert found == pytest.approx({"a": 3 * p["a"], "b": 3 * p["a"], "c": min(1.0, p["c"])})


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(-9, 9), min_size=2, max_size=5), min_size=1, max_size=6))
def test_a_correction_never_lowers_p_nor_changes_the_order(groups: list[list[int]]) -> None:
    alone = [compare_all({0: values})[0].p for values in groups]
    together = [found.p for found in compare_all(dict(enumerate(groups))).values()]
    for p, corrected in zip(alone, together, strict=True):
        assert p is not None and corrected is not None
        assert p <= corrected <= min(1.0, len(groups) * p)
    assert [sorted(zip(alone, together, strict=True))] == [
        list(zip(sorted(alone), sorted(together), strict=True))  # type: ignore[type-var]
    ]


def test_one_pair_says_nothing_of_noise_and_is_not_counted() -> None:
    found = compare_all({"one": [-0.1], "more": [-0.1, -0.2, -0.3]})
    assert found["one"] == Comparison((-0.1,), -0.1, None, None, None) and not found["one"].shown
    assert found["more"].p == pytest.approx(ttest_1samp([-0.1, -0.2, -0.3], 0.0).pvalue)


@pytest.mark.parametrize(("value", "p"), [(0.0, 1.0), (0.5, 0.0)])
def test_differences_without_spread(value: float, p: float) -> None:
    assert compare_all({"same": [value] * 3})["same"].p == p


# --- in words ------------------------------------------------------------------------------------


def said(values: list[float], methods: int = 1, lower: bool = True) -> str:
    (found,) = compare_all({"gmd": values}).values()
    return verdict("gmd", found, what="MAE", digits=2, lower=lower, methods=methods)


def with_effect(size: float) -> list[float]:
    """Three differences whose mean is so many of their standard deviations."""
    return [size - 1, size, size + 1]


@pytest.mark.parametrize(
    ("size", "needed"),
    # two-sided, at 0.05, with power 0.8: as any table of the paired t test has it (34 and 199)
    [(0.5, "about 34"), (0.2, "about 200"), (0.01, "more than 1000"), (0.0, "more than 1000")],
)
def test_how_many_seeds_a_difference_needs(size: float, needed: str) -> None:
    assert f"no difference is shown; {needed} seeds would be needed" in said(with_effect(size))


def test_so_many_seeds_would_show_it_four_times_in_five() -> None:
    """Also at the level of several comparisons: by simulation."""
    text = said(with_effect(-0.9), methods=6)
    (needed,) = map(int, re.findall(r"about (\d+) seeds", text))
    assert needed > 15
    runs = np.random.default_rng(0).standard_normal((20_000, needed)) - 0.9
    shown = ttest_1samp(runs, 0.0, axis=1).pvalue < 0.05 / 6
    assert shown.mean() == pytest.approx(0.8, abs=0.05)


def test_a_verdict_says_which_way_and_with_one_seed_none() -> None:
    worse, better = [0.2, 0.21, 0.22], [-0.2, -0.21, -0.22]
    assert said(worse).endswith("after Holm's correction for 1 method): worse beyond the noise.")
    assert said(worse).startswith("gmd against sum, MAE: +0.21 [+0.19, +0.23] (paired over 3 seeds")
    for values, lower in ((better, True), (worse, False)):
        assert said(values, lower=lower).endswith(": better beyond the noise.")
    assert said([0.2]) == (
        "gmd against sum, MAE: +0.20 with one seed; that says nothing about noise: run more seeds."
    )
