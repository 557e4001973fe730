"""What the benchmarks say of gradients: measures against the vectors themselves, and pictures."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.testing import assert_allclose
from torch import Tensor, nn

from benchmarks.runs.gradients import (
    Merges,
    diagnose,
    diagnose_all,
    gradient_table,
    merged_angles,
    projected,
    summarise_gradients,
)
from benchmarks.runs.methods import plain_sum
from benchmarks.runs.pictures import draw_band, draw_before_after, draw_training, smooth
from gradsplit import Decoupling, ModalityDecoupledOptimizer
from gradsplit.rules import gmd

NAMES = ["a+b", "a", "b"]


def rows(m: int, n: int = 9, seed: int = 0) -> Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.manual_seed(seed))


def angles_of(vectors: Tensor, others: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(vectors, others, dim=-1).acos().rad2deg()


def record(*steps: Tensor, rule: Callable[[Tensor], Tensor] = plain_sum) -> dict[str, Tensor]:
    gramians = torch.stack([jacobian @ jacobian.T for jacobian in steps])
    trained = torch.arange(gramians.shape[-1]).expand(gramians.shape[:2])
    return {"gramians": gramians, "weights": rule(gramians), "trained": trained}


# --- measures ------------------------------------------------------------------------------------


def test_angles_are_those_of_the_vectors() -> None:
    jacobian, weights = rows(4), torch.rand(4, dtype=torch.float64) + 1
    expected = angles_of(jacobian, weights @ jacobian)
    torch.testing.assert_close(merged_angles(jacobian @ jacobian.T, weights), expected)
    with_zero = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert merged_angles(with_zero, torch.ones(2)).tolist() == [0.0, 90.0]


@pytest.mark.parametrize("m", [2, 5])
def test_projected_rows_are_those_of_the_paper(m: int) -> None:
    """Eq. 5-9: of every conflicting pair each original row loses its component along the other."""
    jacobian = rows(m, 3)
    jacobian[1] -= 2 * jacobian[0]  # a conflict for sure
    left = jacobian.clone()
    for i, row in enumerate(jacobian):
        for other in jacobian:
            if (inner := row @ other) < 0:
                left[i] -= inner / (other @ other) * other
    torch.testing.assert_close(projected(jacobian @ jacobian.T), left @ left.T)
    torch.testing.assert_close(left.sum(0), gmd(jacobian @ jacobian.T) @ jacobian)


def test_before_and_after_are_of_the_same_rows() -> None:
    jacobian = torch.tensor([[2.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)  # 135 degrees
    done = [{"result": {"method": method}, "records": record(jacobian, rule=rule)}
            for method, rule in (("sum", plain_sum), ("gmd", gmd))]  # fmt: skip
    seen = diagnose_all(done, ["a", "b"])
    assert_allclose(seen["gmd"]["pairs"], [[[135.0]]])
    assert_allclose(seen["gmd"]["projected"], [[[45.0]]])  # two rows: what is left of 180
    merged = gmd(jacobian @ jacobian.T) @ jacobian
    assert_allclose(seen["gmd"]["summed"][0, 0], angles_of(jacobian, jacobian.sum(0)))
    assert_allclose(seen["gmd"]["merged"][0, 0], angles_of(jacobian, merged))
    assert_allclose(seen["sum"]["merged"], seen["sum"]["summed"])
    assert "projected" not in seen["sum"]


def test_diagnosis_is_what_the_optimizer_reports() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    optimizer = ModalityDecoupledOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1))
    merges, reports = Merges(NAMES), []
    for names in (["a+b", "a", "b"], ["b", "a"], ["a"]):
        losses = {name: layer(torch.randn(2, 4)).square().mean() for name in names}
        reports.append(optimizer.backward(losses))
        merges.add(reports[-1])
        optimizer.step()
    seen = diagnose(merges.state_dict(), NAMES)
    for number, report in enumerate(reports[:2]):
        assert isinstance(report, Decoupling)
        found = report.angles()
        assert_allclose(seen["pairs"][number, : len(found)], found)
        assert_allclose(seen["conflicts"][number], report.conflict_rate())
        assert_allclose(seen["alignment"][number], report.alignment())
        assert_allclose(seen["opposed"][number], len(report.opposed()) / len(report.names))
        assert_allclose(seen["dominance"][number], report.dominance().fill_diagonal_(0).max())
        shares = dict(zip(report.names, report.shares().tolist(), strict=True))
        assert_allclose(seen["shares"][number], [shares.get(name, np.nan) for name in NAMES])
    assert_allclose(seen["conflicts"][2], np.nan, err_msg="one row has no pair")
    assert_allclose(seen["shares"][2], [np.nan, 1.0, np.nan])


def test_missing_rows_change_nothing_but_their_own_places() -> None:
    """Three rows where the step has two, in the form that stacked records have."""
    short = record(rows(2, 4))
    short["trained"] = torch.tensor([[0, 2]])
    long = {
        "gramians": nn.functional.pad(short["gramians"], (0, 1, 0, 1), value=math.nan),
        "weights": nn.functional.pad(short["weights"], (0, 1), value=math.nan),
        "trained": torch.tensor([[0, 2, -1]]),
    }
    padded, whole = diagnose(long, NAMES), diagnose(short, NAMES)
    for key, values in whole.items():
        there = tuple(map(slice, values.shape))
        assert_allclose(padded[key][there], values)
        assert np.isfinite(padded[key]).sum() == np.isfinite(values).sum()
    summary = summarise_gradients(padded, NAMES, 1)
    assert summary == summarise_gradients(whole, NAMES, 1)
    json.dumps(summary, allow_nan=False)


def test_steps_with_one_row_have_no_pairs_and_no_table() -> None:
    jacobian = torch.tensor([[2.0, 0.0], [-1.0, 1.0]])
    records = record(jacobian, jacobian, rule=gmd)
    records["trained"] = torch.tensor([[0, 1], [1, -1]])
    done = [{"result": {"method": "gmd"}, "records": records}]
    seen = diagnose_all(done, ["a", "b"])
    assert_allclose(seen["gmd"]["conflicts"], [[1.0, np.nan]])
    assert "100.0%" in gradient_table(seen, ["a", "b"])
    records["trained"] = torch.tensor([[0, -1], [1, -1]])
    assert diagnose_all(done, ["a", "b"]) == {}, "nothing to compare"


# --- pictures ------------------------------------------------------------------------------------


def test_smoothing_skips_what_is_missing_and_keeps_the_length() -> None:
    values = np.array([[1.0, np.nan, 3.0, 5.0], [np.nan, np.nan, np.nan, 2.0]])
    assert_allclose(smooth(values, 3), [[1.0, 2.0, 4.0, 4.0], [np.nan, np.nan, 2.0, 2.0]])
    assert_allclose(smooth(values, 1), values)
    assert smooth(values, 4).shape == values.shape


def band(values: list[list[float]], **options: Any) -> tuple[float, float] | None:
    """Lowest and highest point of what is drawn."""
    axis = Figure().subplots()
    draw_band(axis, np.array(values), (0.0, 1.0), color="red", **options)
    if not axis.collections:
        return None
    heights = axis.collections[0].get_paths()[0].vertices[:, 1]
    return float(heights.min()), float(heights.max())


def test_a_band_is_of_several_seeds_and_ends_where_the_quantity_does() -> None:
    assert band([[1.0, 1.0], [0.8, 0.9]]) == pytest.approx((0.9 - 0.1 * math.sqrt(2), 1.0))
    assert band([[0.5, 0.5]]) is None
    assert band([[0.1, 0.1], [0.4, 0.4]], log=True) == pytest.approx((0.075, 0.533), abs=1e-3)


def test_pictures_show_the_share_that_conflicts_and_a_method_that_was_trained(
    tmp_path: Path,
) -> None:
    """An SVG names its texts in comments."""
    steps = [rows(3, 3, seed) for seed in range(36)]
    done = [{"result": {"method": "gmd"}, "records": record(*steps, rule=gmd)}]
    seen = diagnose_all(done, NAMES)
    draw_before_after(tmp_path / "x.svg", "", seen)
    text = (tmp_path / "x.svg").read_text()
    for name, key in (("before", "pairs"), ("after", "projected"), ("after", "merged")):
        assert f"<!-- {name} {(seen['gmd'][key] > 90).mean():.1%} -->" in text
    draw_training(tmp_path / "y.svg", "", seen, NAMES)
    assert "<!-- gmd: share of the gradient norms -->" in (tmp_path / "y.svg").read_text()
