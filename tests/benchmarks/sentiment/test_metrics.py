"""The metrics of the sentiment benchmark, by hand."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from benchmarks.sentiment.report import METRICS, metrics, summarise


def test_metrics_by_hand() -> None:
    labels = np.array([-2.4, -0.6, 0.0, 0.4, 1.6, 3.0])
    predictions = np.array([-2.0, 0.2, 0.1, -0.2, 1.4, 4.0])
    found = metrics(predictions, labels)
    assert_allclose(found["mae"], (0.4 + 0.8 + 0.1 + 0.6 + 0.2 + 1.0) / 6)
    # x = labels, y = predictions: sums 2.0 and 3.5, squares 17.84 and 22.05, products 18.84
    correlation = (18.84 - 2.0 * 3.5 / 6) / np.sqrt((17.84 - 2.0**2 / 6) * (22.05 - 3.5**2 / 6))
    assert_allclose(found["corr"], correlation)
    # >= 0: truth 0 0 1 1 1 1, guess 0 1 1 0 1 1: four of six
    assert_allclose(found["acc2_has0"], 4 / 6)
    # class 0: precision 1/2, recall 1/2; class 1: 3/4 and 3/4; weights 2/6 and 4/6
    assert_allclose(found["f1_has0"], 2 / 6 * 0.5 + 4 / 6 * 0.75)
    # > 0 without the third: truth 0 0 1 1 1, guess 0 1 0 1 1: three of five
    assert_allclose(found["acc2_non0"], 3 / 5)
    assert_allclose(found["f1_non0"], 2 / 5 * 0.5 + 3 / 5 * (2 / 3))
    # rounded: truth -2 -1 0 0 2 3, guess -2 0 0 0 1 3 (4.0 is clipped)
    assert_allclose(found["acc7"], 4 / 6)


@pytest.mark.parametrize(
    ("predictions", "labels", "expected"),
    [
        # zero is non-negative, but not positive
        ([0.0, 0.0, 0.0], [0.0, 1.0, -1.0], {"acc2_has0": 2 / 3, "acc2_non0": 1 / 2}),
        # half to even, as numpy rounds
        ([0.5, 1.5, -2.5, 2.6], [0.0, 2.0, -2.0, 2.5], {"acc7": 3 / 4}),
        # a constant prediction
        ([0.3] * 4, [1.0, -1.0, 2.0, 0.0], {"corr": 0.0}),
        # a perfect one
        ([-3.0, -1.2, 0.0, 2.2], [-3.0, -1.2, 0.0, 2.2], {**dict.fromkeys(METRICS, 1.0), "mae": 0}),
    ],
)
def test_corners(predictions: list[float], labels: list[float], expected: dict[str, float]) -> None:
    found = metrics(np.array(predictions), np.array(labels))
    assert np.isfinite(list(found.values())).all()
    for name, value in expected.items():
        assert_allclose(found[name], value, err_msg=name)


def test_summary_means_over_combinations_and_finds_the_worst() -> None:
    one = dict.fromkeys(METRICS, 1.0)
    found = summarise({"text": one, "audio": {**one, "mae": 3.0, "corr": 0.0}})
    assert (found["mae"], found["corr"], found["acc7"], found["worst_mae"]) == (2.0, 0.5, 1.0, 3.0)
