"""``Decoupling``: what one step saw, against numbers computed from the gradients themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradsplit import Decoupling, ModalityDecoupledOptimizer
from tests.reference import Row, gmd_loop, linear_losses
from tests.strategies import jacobians

NAMES = ["text", "audio", "vision", "depth", "touch", "smell"]


def report_of(rows: Sequence[Row], names: Sequence[str] = NAMES, **options: object) -> Decoupling:
    columns = zip(*rows, strict=True)
    sizes = [next(g.numel() for g in column if g is not None) for column in columns]
    params = [nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in sizes]
    opt = ModalityDecoupledOptimizer(torch.optim.SGD(params, lr=1.0), **options)
    report = opt.backward(dict(zip(names, linear_losses(params, rows), strict=False)))
    assert opt.last is report
    return report


def report_of_jacobian(jacobian: Tensor, **options: object) -> Decoupling:
    return report_of([[row] for row in jacobian], **options)


def cosines(jacobian: Tensor) -> Tensor:
    """Pair by pair; 0 with a zero row."""
    m = len(jacobian)
    result = torch.zeros(m, m, dtype=torch.float64)
    for j in range(m):
        for k in range(m):
            lengths = float(jacobian[j].norm()) * float(jacobian[k].norm())
            if lengths:
                result[j, k] = float(jacobian[j] @ jacobian[k]) / lengths
    return result


def pairs(m: int) -> list[tuple[int, int]]:
    return [(j, k) for j in range(m) for k in range(j + 1, m)]


FOUR = torch.tensor(
    [[3.0, 4.0, 0.0], [-1.0, 0.5, 0.0], [0.0, -2.0, 1.0], [0.0, 0.0, 5.0]], dtype=torch.float64
)


@given(jacobians())
def test_gramian_and_weights(jacobian: Tensor) -> None:
    report = report_of_jacobian(jacobian)
    largest = float(jacobian.norm(dim=1).max())
    expected = jacobian @ jacobian.T
    assert report.gramian.dtype == report.weights.dtype == torch.float64
    torch.testing.assert_close(report.gramian, expected, rtol=1e-12, atol=1e-14 * largest**2)
    merged = report.weights @ jacobian
    torch.testing.assert_close(merged, gmd_loop(jacobian), rtol=0, atol=1e-12 * largest)


@pytest.mark.parametrize("reduction", ["mean", "sum", "released"])
def test_weights_are_those_before_the_reduction(reduction: str) -> None:
    expected = report_of_jacobian(FOUR, reduction="sum").weights
    assert torch.equal(report_of_jacobian(FOUR, reduction=reduction).weights, expected)
    torch.testing.assert_close(expected @ FOUR, gmd_loop(FOUR), rtol=1e-13, atol=0)


@given(jacobians())
def test_norms_and_shares(jacobian: Tensor) -> None:
    report = report_of_jacobian(jacobian)
    norms = jacobian.norm(dim=1)
    torch.testing.assert_close(report.norms(), norms, rtol=1e-12, atol=0)
    assume(float(norms.sum()) > 0)
    torch.testing.assert_close(report.shares(), norms / norms.sum(), rtol=1e-12, atol=0)
    assert float(report.shares().sum()) == pytest.approx(1.0)


@given(jacobians())
def test_cosine(jacobian: Tensor) -> None:
    cosine = report_of_jacobian(jacobian).cosine()
    torch.testing.assert_close(cosine, cosines(jacobian), rtol=0, atol=1e-12)
    assert float(cosine.abs().max()) <= 1.0


@given(jacobians())
def test_angles_are_in_degrees_pair_by_pair(jacobian: Tensor) -> None:
    angles = report_of_jacobian(jacobian).angles()
    cosine = cosines(jacobian)
    expected = [
        math.degrees(math.acos(max(-1.0, min(1.0, float(cosine[j, k])))))
        for j, k in pairs(len(jacobian))
    ]
    assert angles.shape == (len(expected),)
    assert angles.isfinite().all()
    # acos is steep at its ends: 1e-12 there is a ten thousandth of a degree
    torch.testing.assert_close(
        angles, torch.tensor(expected, dtype=angles.dtype), rtol=0, atol=2e-4
    )


def test_angles_by_hand() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]], dtype=torch.float64)
    assert report_of_jacobian(jacobian).angles().tolist() == pytest.approx([90.0, 135.0, 135.0])


@given(jacobians())
def test_dominance(jacobian: Tensor) -> None:
    """dominance[j, k] = |cos_jk| ||g_j|| / ||g_k|| for all pairs, in conflict or not."""
    dominance = report_of_jacobian(jacobian).dominance()
    norms, cosine = jacobian.norm(dim=1), cosines(jacobian).abs()
    assert dominance.diagonal().tolist() == [1.0] * len(jacobian)
    assert dominance.isfinite().all()
    for j, k in pairs(len(jacobian)):
        if norms[j] > 0 and norms[k] > 0:
            for a, b in ((j, k), (k, j)):
                ratio = float(norms[a] / norms[b])
                assert float(dominance[a, b]) == pytest.approx(
                    float(cosine[a, b]) * ratio, rel=1e-9, abs=1e-12 * ratio
                )


def test_dominance_says_who_dominates_whom() -> None:
    jacobian = torch.tensor([[-100.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert report_of_jacobian(jacobian).dominance()[0, 1] == pytest.approx(100.0)
    assert report_of_jacobian(jacobian).dominance()[1, 0] == pytest.approx(0.01)


@given(jacobians())
def test_conflicts_and_their_rate(jacobian: Tensor) -> None:
    report = report_of_jacobian(jacobian)
    m = len(jacobian)
    conflicts = {tuple(pair) for pair in report.conflicts()}
    assert len(conflicts) == len(report.conflicts())
    for j, k in pairs(m):
        dot = float(jacobian[j] @ jacobian[k])
        noise = 1e-14 * float(jacobian[j].norm() * jacobian[k].norm())
        if abs(dot) > noise or dot == 0 == noise:
            assert ((NAMES[j], NAMES[k]) in conflicts) == (dot < 0)
    assert isinstance(report.conflict_rate(), float)
    expected = len(conflicts) / len(pairs(m)) if m > 1 else 0.0
    assert report.conflict_rate() == pytest.approx(expected)


@given(jacobians())
def test_alignment(jacobian: Tensor) -> None:
    """The cosine between the merged gradient and the plain sum, where rounding leaves one."""
    alignment = report_of_jacobian(jacobian).alignment()
    assert isinstance(alignment, float)
    assert math.isfinite(alignment)
    total, merged = jacobian.sum(0), gmd_loop(jacobian)
    largest = float(jacobian.norm(dim=1).max())
    # K squares the rows, so a sum that cancels to 1e-4 of them keeps 8 digits of its norm
    assume(min(float(total.norm()), float(merged.norm())) > 1e-4 * largest)
    expected = float(total @ merged) / float(total.norm()) / float(merged.norm())
    assert alignment == pytest.approx(expected, abs=1e-6)


def test_alignment_is_one_where_decoupling_changed_nothing() -> None:
    assert report_of_jacobian(FOUR.abs()).alignment() == pytest.approx(1.0, abs=1e-12)
    assert report_of_jacobian(FOUR).alignment() < 0.999


def test_one_row() -> None:
    report = report_of_jacobian(FOUR[:1])
    assert report.names == ["text"] or report.names == ("text",)
    assert report.conflict_rate() == 0.0
    assert list(report.conflicts()) == []
    assert report.angles().shape == (0,)
    assert report.cosine().tolist() == [[1.0]]
    assert report.dominance().tolist() == [[1.0]]
    assert report.alignment() == pytest.approx(1.0)
    assert report.weights.tolist() == [1.0]


def test_every_number_is_finite_when_all_rows_are_zero() -> None:
    report = report_of_jacobian(torch.zeros(3, 2, dtype=torch.float64))
    assert report.weights.tolist() == [1.0, 1.0, 1.0]
    assert all(math.isfinite(value) for value in report.as_scalars().values())


def test_names_follow_the_order_given_and_none_is_unavailable() -> None:
    p = nn.Parameter(torch.zeros(1))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=1.0))
    report = opt.backward(
        {
            ("vision", "text"): (p * 3).sum(),
            "audio": None,
            ("text",): lambda: (p * 5).sum(),
            ("audio", "text"): lambda: None,
            "vision": (p * 7).sum(),
        }
    )
    assert list(report.names) == ["vision+text", "text", "vision"]
    assert list(report.unavailable) == ["audio", "audio+text"]
    assert report.norms().tolist() == [3.0, 5.0, 7.0]


def test_unavailable_names_those_without_a_row_in_the_whole_window() -> None:
    """Over micro-batches: "b" never came, "c" came once."""
    p = nn.Parameter(torch.zeros(1))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=1.0))
    opt.accumulate({"a": p.sum(), "b": None, "c": None})
    report = opt.backward({"a": p.sum(), "c": (p * 2).sum()})
    assert list(report.names) == ["a", "c"]
    assert list(report.unavailable) == ["b"]


def test_a_sequence_names_its_rows_by_position() -> None:
    p = nn.Parameter(torch.zeros(1))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=1.0))
    report = opt.backward([(p * 3).sum(), None, lambda: (p * 5).sum()])
    assert list(report.names) == ["0", "2"]
    assert list(report.unavailable) == ["1"]


def test_losses_are_detached_values_in_the_order_of_names() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=1.0))
    report = opt.backward({"a": (p * 3).sum(), "b": None, "c": lambda: p * 5})
    assert report.losses.tolist() == [6.0, 10.0]
    assert not report.losses.requires_grad


def test_gramian_is_measured_on_the_shared_scope() -> None:
    """The private parts, here a hundred times larger, do not count."""
    shared = [torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])]
    private = torch.tensor([100.0])
    rows: list[Row] = [[shared[0], private, None], [shared[1], None, private]]
    expected = torch.tensor([[1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
    assert torch.equal(report_of(rows).gramian, expected)
    everything = expected + torch.diag(torch.tensor([1e4, 1e4], dtype=torch.float64))
    assert torch.equal(report_of(rows, scope="all").gramian, everything)


def test_an_empty_shared_set_gives_weights_of_one() -> None:
    rows: list[Row] = [[torch.tensor([1.0]), None], [None, torch.tensor([-1.0])]]
    report = report_of(rows)
    assert report.weights.tolist() == [1.0, 1.0]
    assert all(math.isfinite(value) for value in report.as_scalars().values())


@pytest.mark.parametrize("prefix", ["gradsplit/", "train/gmd/", ""])
def test_scalars_are_flat_floats_under_the_prefix(prefix: str) -> None:
    report = report_of_jacobian(FOUR)
    scalars = report.as_scalars() if prefix == "gradsplit/" else report.as_scalars(prefix=prefix)
    assert scalars
    assert all(type(key) is str and key.startswith(prefix) for key in scalars)
    assert all(type(value) is float and math.isfinite(value) for value in scalars.values())
    values = list(scalars.values())
    for wanted in (report.conflict_rate(), report.alignment(), *report.shares().tolist()):
        assert any(value == pytest.approx(wanted) for value in values)


def test_last_is_the_latest_report() -> None:
    p = nn.Parameter(torch.zeros(1))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=1.0))
    assert opt.last is None
    first = opt.backward([(p * 3).sum()])
    assert opt.last is first
    opt.step([(p * 5).sum(), (p * 7).sum()])
    assert opt.last is not None and opt.last.norms().tolist() == [5.0, 7.0]
    assert first.norms().tolist() == [3.0], "an old report keeps its numbers"


def test_a_report_holds_no_graph() -> None:
    p = nn.Parameter(torch.zeros(1))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=1.0))
    report = opt.backward([(p * 3).sum(), (p * 5).sum()])
    for tensor in (report.losses, report.gramian, report.weights, report.norms()):
        assert not tensor.requires_grad and tensor.grad_fn is None


@pytest.mark.parametrize("rule", ["gmd", "pcgrad"])
@pytest.mark.parametrize("scope", ["shared", "all"])
def test_nothing_is_read_back_until_it_is_asked_for(rule: str, scope: str) -> None:
    """On the meta device values do not exist, so whoever reads one raises."""
    params = [nn.Parameter(torch.zeros(size, device="meta")) for size in (3, 2)]
    sgd = torch.optim.SGD(params, lr=1.0)
    opt = ModalityDecoupledOptimizer(sgd, rule=rule, scope=scope)
    rows: list[Row] = [[row.float(), None] for row in FOUR]
    rows[0][1] = torch.ones(2)
    report = opt.backward(linear_losses(params, rows))
    assert params[0].grad is not None
    with pytest.raises((RuntimeError, NotImplementedError)):
        report.as_scalars()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("rule", ["gmd", "pcgrad"])
@pytest.mark.parametrize("scope", ["shared", "all"])
def test_backward_does_not_wait_for_an_accelerator(rule: str, scope: str) -> None:
    """Copies to the device that wait for it count too."""
    params = [nn.Parameter(torch.zeros(size, device="cuda")) for size in (3, 2)]
    sgd = torch.optim.SGD(params, lr=1.0)
    opt = ModalityDecoupledOptimizer(sgd, rule=rule, scope=scope)
    rows: list[Row] = [[row.float(), None] for row in FOUR]
    rows[0][1] = torch.ones(2)
    for losses in (linear_losses(params, rows), linear_losses(params, rows)):  # first: warm up
        try:
            torch.cuda.set_sync_debug_mode("error" if opt.last else "default")
            opt.backward(losses)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@given(st.sampled_from([1e-22, 1e-15, 1e15, 1e18]), st.booleans())
def test_cosines_of_tiny_and_huge_float32_rows(scale: float, conflicting: bool) -> None:
    rows = torch.tensor([[1.0, 2.0], [-1.0 if conflicting else 1.0, 0.1]]) * scale
    p = nn.Parameter(torch.zeros(2))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=1.0))
    report = opt.backward(linear_losses([p], [[row] for row in rows]))
    torch.testing.assert_close(report.cosine(), cosines(rows.double()), rtol=1e-6, atol=1e-6)


def test_nan_in_a_row_is_not_reported_as_no_conflict() -> None:
    gramian = torch.tensor([[1.0, float("nan")], [float("nan"), float("nan")]])
    seen = Decoupling(("a", "b"), (), torch.ones(2), gramian, torch.ones(2))
    assert math.isnan(seen.conflict_rate())
    assert math.isnan(seen.as_scalars()["gradsplit/conflict_rate"])
