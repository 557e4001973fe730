"""Paired comparisons: against scipy, and Holm's procedure by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from benchmarks.runs.comparison import Comparison, compare_all


def test_mean_interval_and_p_are_those_of_scipy() -> None:
    values = [-0.1, -0.25, -0.3, 0.05]
    found = compare_all({"gmd": values})["gmd"]
    theirs = ttest_1samp(values, 0.0)
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert (found.mean, found.p) == pytest.approx((-0.15, theirs.pvalue))
    assert found.std == pytest.approx(0.1581139)
    assert found.shown is False and compare_all({"gmd": [-0.2, -0.201, -0.202]})["gmd"].shown


def test_holm_by_hand() -> None:
    """The second smallest is multiplied by two only, but stays above the first; none exceeds 1."""
    groups = {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, 3.5], "c": [1.0, -2.0, 1.5]}
    p = {name: float(ttest_1samp(values, 0.0).pvalue) for name, values in groups.items()}
    assert p["a"] < p["b"] < p["c"] and 3 * p["a"] > 2 * p["b"]
    found = {name: comparison.p for name, comparison in compare_all(groups).items()}
    assert found == pytest.approx({"a": 3 * p["a"], "b": 3 * p["a"], "c": min(1.0, p["c"])})


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
