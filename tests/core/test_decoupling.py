"""``Decoupling``: what one step saw, against numbers computed from the gradients themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradsplit import Decoupling, ModalityDecoupledOptimizer
from gradsplit.rules import gmd
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


def test_angles_and_dominance_by_hand() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]], dtype=torch.float64)
    assert report_of_jacobian(jacobian).angles().tolist() == pytest.approx([90.0, 135.0, 135.0])
    jacobian = torch.tensor([[-100.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    dominance = report_of_jacobian(jacobian).dominance()
    assert dominance.tolist() == [pytest.approx([1.0, 100.0]), pytest.approx([0.01, 1.0])]


@given(jacobians())
def test_opposed_are_those_that_a_step_along_the_plain_sum_raises(jacobian: Tensor) -> None:
    """The losses <g_k, p>, linear, before and after a step of the plain sum."""
    report = report_of_jacobian(jacobian)
    p = torch.zeros(jacobian.shape[1], dtype=torch.float64)
    rises = jacobian @ (p - jacobian.sum(0))
    noise = 1e-13 * jacobian.norm(dim=1) * jacobian.norm(dim=1).sum()
    for name, rise, zero in zip(NAMES, rises.tolist(), noise.tolist(), strict=False):
        if abs(rise) > zero or zero == 0:
            assert (name in report.opposed()) == (rise > 0)


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
    assert report.names == ("text",)
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


def report_of_one(losses: Callable[[Tensor], Any], *earlier: Callable[[Tensor], Any]) -> Decoupling:
    """Of losses of one parameter, after those of earlier micro-batches."""
    p = nn.Parameter(torch.ones(1))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=1.0))
    for micro_batch in earlier:
        opt.accumulate(micro_batch(p))
    return opt.backward(losses(p))


def test_names_follow_the_order_given_and_none_is_unavailable() -> None:
    report = report_of_one(
        lambda p: {
            ("vision", "text"): (p * 3).sum(),
            "audio": None,
            ("text",): lambda: (p * 5).sum(),
            ("audio", "text"): lambda: None,
            "vision": (p * 7).sum(),
        }
    )
    assert report.names == ("vision+text", "text", "vision")
    assert report.unavailable == ("audio", "audio+text")
    assert report.norms().tolist() == [3.0, 5.0, 7.0]
    report = report_of_one(lambda p: [(p * 3).sum(), None, lambda: (p * 5).sum()])
    assert (report.names, report.unavailable) == (("0", "2"), ("1",))


def test_a_window_is_reported_by_means() -> None:
    """Over the micro-batches that had the loss: "b" never came, "c" came once, "d" last."""
    report = report_of_one(
        lambda p: {"a": (p * 6).sum(), "c": None, "d": lambda: p * 3},
        lambda p: {"a": (p * 2).sum(), "b": None, "c": p.sum()},
    )
    assert report.names == ("a", "c", "d") and report.unavailable == ("b",)
    assert report.losses.tolist() == [4.0, 1.0, 3.0]
    assert report.norms().tolist() == [4.0, 1.0, 3.0]


def test_losses_are_detached_values_in_the_order_of_names() -> None:
    """And nothing else in a report holds a graph."""
    report = report_of_one(lambda p: {"a": (p * 6).sum(), "b": None, "c": lambda: p * 5})
    assert report.losses.tolist() == [6.0, 5.0]
    for tensor in (report.losses, report.gramian, report.weights, report.norms()):
        assert not tensor.requires_grad and tensor.grad_fn is None


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
    assert all(type(value) is float for value in scalars.values())
    cosine, per_row = cosines(FOUR), zip(NAMES, FOUR.norm(dim=1).tolist(), strict=False)
    total = float(FOUR.norm(dim=1).sum())
    expected = {
        "conflict_rate": report.conflict_rate(),
        "opposed_rate": len(report.opposed()) / 4,
        "alignment": report.alignment(),
        "cosine_min": float(cosine.min()),
        "dominance_max": max(float(report.dominance()[j, k]) for j in range(4) for k in range(4)),
        **{f"loss/{name}": 0.0 for name in NAMES[:4]},
        **{f"weight/{n}": w for n, w in zip(NAMES, report.weights.tolist(), strict=False)},
    }
    for name, norm in per_row:
        expected |= {f"norm/{name}": norm, f"share/{name}": norm / total}
    assert scalars == pytest.approx({prefix + key: value for key, value in expected.items()})


@given(st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=4, unique=True))
def test_loggers_take_the_names_of_scalars_or_two_have_become_one(names: list[str]) -> None:
    """MLflow's rule for names, as its ``validation.py`` has it."""
    m = len(names)
    report = Decoupling(tuple(names), (), torch.ones(m), torch.eye(m), torch.ones(m))
    try:
        scalars = report.as_scalars()
    except ValueError as error:
        assert "for a logger" in str(error)
        replaced = [re.sub(r"[^\w .-]", "-", name) for name in names]
        assert len(set(replaced)) < m
        return
    assert all(re.fullmatch(r"[/\w.\- :]+", key) for key in scalars)
    assert len([key for key in scalars if "/norm/" in key]) == m


def test_names_of_combinations_in_scalars() -> None:
    ones, eye = torch.ones(2), torch.eye(2)
    scalars = Decoupling(("a+b", "c d.e_f-g"), (), ones, eye, ones).as_scalars()
    assert {"gradsplit/norm/a-b", "gradsplit/norm/c d.e_f-g"} <= scalars.keys()
    twins = Decoupling(("a+b", "a-b"), (), ones, eye, ones).as_scalars()
    assert {"gradsplit/norm/a-b-0", "gradsplit/norm/a-b-1"} <= twins.keys()


# --- print(report) --------------------------------------------------------------------------------


def printed(
    gramian: Sequence[Sequence[float]],
    losses: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    unavailable: tuple[str, ...] = (),
) -> list[str]:
    """The lines for people, of gmd unless weights are given."""
    matrix = torch.tensor(gramian, dtype=torch.float64)
    m = len(matrix)
    values = torch.tensor(losses or [1.0] * m)
    chosen = gmd(matrix) if weights is None else torch.tensor(weights, dtype=torch.float64)
    return str(Decoupling(tuple(NAMES[:m]), unavailable, values, matrix, chosen)).splitlines()


def test_a_printed_table() -> None:
    """||text|| = 4, ||audio|| = 1, at 120 degrees; vision is orthogonal to both."""
    lines = printed(
        [[16, -2, 0], [-2, 1, 0], [0, 0, 25]], [0.5, 12345.678, 2e-7], unavailable=("depth",)
    )
    table = [line.split() for line in lines[:4]]
    assert table[0] == ["loss", "value", "norm", "share", "weight"]
    assert [row[0] for row in table[1:]] == ["text", "audio", "vision"]
    numbers = [[float(cell) for cell in row[1:]] for row in table[1:]]
    assert numbers[0] == pytest.approx([0.5, 4, 0.4, 1.125], abs=0.01)
    assert numbers[1] == pytest.approx([12345.678, 1, 0.1, 3], rel=1e-3)
    assert numbers[2] == pytest.approx([2e-7, 5, 0.5, 1], rel=1e-3)
    assert len({len(line) for line in lines[:4]}) == 1, "columns are aligned"
    assert lines[4] == "unavailable: depth"
    assert lines[5] == "text and audio conflict (120 degrees); text dominates audio (2.0 times)"
    assert len(lines) == 7


@pytest.mark.parametrize(
    ("gramian", "weights", "verdict"),
    [
        ([[4, 1], [1, 4]], None, "no pair conflicts: decoupling changes nothing in this step"),
        ([[4, 0], [0, 0]], None, "no pair conflicts: decoupling changes nothing in this step"),
        ([[4.0]], None, "one loss alone: there is nothing to decouple"),
        ([[4, -2], [-2, 4]], None, "the plain sum lowers every loss all the same: alignment 1.00"),
        ([[4, -2], [-2, 4]], [1, 1], "the plain sum lowers every loss all the same: the weights"),
        (
            [[100, -9], [-9, 1]],
            None,
            r"the plain sum raises audio \(opposed\): alignment 0.44",
        ),
        ([[1, -9], [-9, 100]], None, r"the plain sum raises text \(opposed\): alignment"),
        (
            [[100, -9], [-9, 1]],
            [1, 1],
            r"the plain sum raises audio \(opposed\): the weights leave it so",
        ),
        # who dominates without a conflict opposes nobody
        ([[100, 9, -1], [9, 1, 0], [-1, 0, 1]], None, "the plain sum lowers every loss all the"),
        # two that are no match for the third one, but for their sum
        (
            [[1, -0.6, -0.6], [-0.6, 1, 0.28], [-0.6, 0.28, 1]],
            None,
            r"the plain sum raises text \(opposed\): alignment",
        ),
        # b dominates a, whom c helps: it is b that the sum moves against
        (
            [[1, -5, 20], [-5, 25, -100], [20, -100, 400]],
            None,
            r"the plain sum raises audio \(opposed\): alignment",
        ),
        ([[100, 9, -2], [9, 1, 0], [-2, 0, 1]], None, r"the plain sum raises vision \(opposed\)"),
        ([[math.inf, 1], [1, 1]], [1, 1], "the gradient of text is not finite"),
        ([[1, math.nan], [math.nan, math.nan]], [1, 1], "the gradient of audio is not finite"),
    ],
)
def test_a_printed_verdict(
    gramian: list[list[float]], weights: list[float] | None, verdict: str
) -> None:
    assert re.match(verdict, printed(gramian, weights=weights)[-1])


def test_a_printed_verdict_of_nan() -> None:
    verdict = printed([[1, math.nan], [math.nan, math.nan]], [1.0, math.nan], [1, 1])[-1]
    assert verdict == "audio is NaN: where a loss has no sample to average, give None for it"


def test_printed_conflicts_come_widest_first_and_ten_at_most() -> None:
    """The corners of a simplex are opposed to one another, here by about 101 degrees."""
    noise = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    jacobian = torch.eye(6, dtype=torch.float64) - 1 / 6 + 0.05 * noise
    lines = printed((jacobian @ jacobian.T).tolist())
    found = [re.match(r"(\w+) and (\w+) conflict \((\d+) degrees\)", line) for line in lines]
    shown = [(NAMES.index(m[1]), NAMES.index(m[2]), int(m[3])) for m in found if m]
    angles = {(j, k): math.degrees(math.acos(float(cosines(jacobian)[j, k]))) for j, k in pairs(6)}
    assert min(angles.values()) > 90
    widest = sorted(angles, key=angles.__getitem__, reverse=True)
    assert shown == [(j, k, round(angles[j, k])) for j, k in widest[:10]]
    assert lines[-2] == "and 5 more of 15 pairs conflict"


def test_the_rule_sum_diagnoses_plain_training() -> None:
    """Dominance by scale together with opposition: what decoupling would be for."""
    jacobian = torch.tensor([[10.0, 0.0], [-0.9, 0.5]], dtype=torch.float64)
    report = report_of_jacobian(jacobian, rule="sum")
    assert report.weights.tolist() == [1.0, 1.0] and report.alignment() == 1.0
    assert report.conflicts() == [("text", "audio")]
    assert re.fullmatch(
        r"the plain sum raises audio \(opposed\): the weights leave it so",
        str(report).splitlines()[-1],
    )


def test_last_is_the_latest_report() -> None:
    p = nn.Parameter(torch.zeros(1))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=1.0))
    assert opt.last is None
    first = opt.backward([(p * 3).sum()])
    assert opt.last is first
    opt.step([(p * 5).sum(), (p * 7).sum()])
    assert opt.last is not None and opt.last.norms().tolist() == [5.0, 7.0]
    assert first.norms().tolist() == [3.0], "an old report keeps its numbers"


@pytest.mark.parametrize("rule", ["gmd", "pcgrad", "sum"])
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
    assert math.isnan(seen.as_scalars()["gradsplit/opposed_rate"]) and seen.opposed() == []
