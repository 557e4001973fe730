"""Rows, reach, scope, reduction, accumulation, graphs, memory and precision of ``backward``."""

from __future__ import annotations

import functools
import gc
import itertools
import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from gradsplit import ModalityDecoupledOptimizer
from gradsplit.rules import pcgrad
from tests.reference import (
    Row,
    decouple,
    grads,
    linear_losses,
    norms,
    pcgrad_loop,
    same,
    sum_rows,
    towers,
)
from tests.strategies import orders, partial_rows

SCOPES = ["shared", "all"]
REDUCTIONS = ["mean", "sum", "released"]


def parameters_like(rows: Sequence[Row], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """One per column of ``rows``; a parameter that nobody reaches has one element."""
    sizes = [
        next((row[p].shape for row in rows if row[p] is not None), torch.Size([1]))
        for p in range(len(rows[0]))
    ]
    return [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes]


def optimizer_of(params: Sequence[Tensor], **options: object) -> ModalityDecoupledOptimizer:
    return ModalityDecoupledOptimizer(torch.optim.SGD(params, lr=0.1), **options)


def merged(rows: Sequence[Row], **options: object) -> Row:
    """What one ``backward`` leaves in ``.grad``."""
    params = parameters_like(rows)
    scope = options.get("scope", "shared")
    if not isinstance(scope, str):
        options["scope"] = [params[p] for p in scope]
    optimizer_of(params, **options).backward(linear_losses(params, rows))
    return [p.grad for p in params]


def assert_rows_equal(ours: Sequence[Tensor | None], expected: Row, rows: Sequence[Row]) -> None:
    """Equal up to 1e-12 of the largest row norm, and None in the same places."""
    for p, (one, other) in enumerate(zip(ours, expected, strict=True)):
        assert (one is None) == (other is None), f"parameter {p}: {one} instead of {other}"
        if one is not None and other is not None:
            assert one.shape == other.shape
            tolerance = 1e-12 * max(norms(rows))
            torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- scope, reduction, rule -----------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(rows=partial_rows())
def test_gmd_equals_the_oracle(rows: list[Row], scope: str, reduction: str) -> None:
    expected = decouple(rows, scope=scope, reduction=reduction)
    assert_rows_equal(merged(rows, scope=scope, reduction=reduction), expected, rows)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(rows=partial_rows(), data=st.data())
def test_a_scope_of_parameters_equals_the_oracle(
    rows: list[Row], data: st.DataObject, reduction: str
) -> None:
    count = len(rows[0])
    scope = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True))
    expected = decouple(rows, scope=scope, reduction=reduction)
    assert_rows_equal(merged(rows, scope=scope, reduction=reduction), expected, rows)


@pytest.mark.parametrize("scope", SCOPES)
@given(rows=partial_rows(), data=st.data())
def test_pcgrad_in_a_known_order_equals_the_oracle(
    rows: list[Row], data: st.DataObject, scope: str
) -> None:
    order = data.draw(orders(len(rows)))
    rule = functools.partial(pcgrad, order=order)
    loop = functools.partial(pcgrad_loop, order=order)
    assert_rows_equal(merged(rows, rule=rule, scope=scope), decouple(rows, loop, scope), rows)


@given(rows=partial_rows())
def test_any_callable_is_a_rule(rows: list[Row]) -> None:
    """Weights 1, 2, 3, ... inside the scope; the plain sum outside."""

    def counting(gramian: Tensor) -> Tensor:
        return torch.arange(1, gramian.shape[-1] + 1, dtype=gramian.dtype, device=gramian.device)

    expected = decouple(rows, lambda j: counting(j @ j.T) @ j, reduction="sum")
    assert_rows_equal(merged(rows, rule=counting, reduction="sum"), expected, rows)


def test_the_defaults_are_gmd_shared_mean() -> None:
    rows: list[Row] = [
        [vector(1, 0), vector(9), None],
        [vector(-3, 4), None, vector(8)],
        [vector(0, -1), None, None],
    ]
    ours = merged(rows)
    assert_rows_equal(ours, decouple(rows, scope="shared", reduction="mean"), rows)
    assert_rows_equal(ours, merged(rows, rule="gmd", scope="shared", reduction="mean"), rows)


def test_a_private_encoder_is_not_rescaled_by_somebody_elses_conflict() -> None:
    rows: list[Row] = [[vector(1), vector(5), None], [vector(-1), None, vector(7)]]
    sums = merged(rows, reduction="sum")
    assert [float(g) for g in sums[1:] if g is not None] == [5.0, 7.0]
    means = merged(rows, reduction="mean")
    assert [float(g) for g in means[1:] if g is not None] == [2.5, 3.5]
    released = merged(rows, reduction="released")
    assert [float(g) for g in released[1:] if g is not None] == [5.0, 7.0]


def test_released_divides_what_every_loss_reaches_whatever_the_scope() -> None:
    rows: list[Row] = [[vector(2), vector(5)], [vector(4), None]]
    for scope in ("all", "shared", [1]):
        grads = merged(rows, scope=scope, reduction="released")
        assert [float(g) for g in grads if g is not None] == [3.0, 5.0]


def test_without_conflict_the_mean_is_the_gradient_of_the_mean_loss() -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 3, dtype=torch.float64)) for _ in range(2)]
    optimizer_of(params).backward([(params[0] ** 2).sum(), (params[0] ** 4).sum()])
    ours, value = params[0].grad, params[0].detach()
    torch.testing.assert_close(ours, (2 * value + 4 * value**3) / 2, rtol=1e-14, atol=0)
    assert params[1].grad is None


def test_the_scope_is_that_of_this_step() -> None:
    """What is shared by the losses of one step need not be shared by those of the next."""
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    opt = optimizer_of([a, b], reduction="sum")
    plus, minus = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    for rows in ([[plus, plus], [minus, minus]], [[plus, plus], [minus, None]]):
        opt.zero_grad()
        opt.backward(linear_losses([a, b], rows))
        expected = decouple(rows, reduction="sum")
        assert_rows_equal([a.grad, b.grad], expected, rows)


# --- a single loss, and what plain torch does -----------------------------------------------------


@pytest.mark.parametrize("rule", ["gmd", "pcgrad"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_single_loss_equals_plain_backward_exactly(
    rule: str, scope: str, reduction: str, dtype: torch.dtype
) -> None:
    ours, plain = towers(dtype), towers(dtype)
    opt = optimizer_of(list(ours.parameters()), rule=rule, scope=scope, reduction=reduction)
    for seed in (0, 1):  # the second adds to the first
        opt.backward({"a": ours.losses(seed)["a"]})
        plain.losses(seed)["a"].backward()
    assert same(grads(ours), grads(plain))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_losses_of_shape_nothing_and_one(shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer_of([p], reduction="sum").backward([(p * 3).view(shape), (p * 4).view(shape)])
    assert p.grad is not None and p.grad.tolist() == [7.0]


def test_a_model_equals_the_oracle() -> None:
    model = towers()
    expected, rows = decouple(model.rows()), model.rows()
    optimizer_of(list(model.parameters())).backward(model.losses())
    assert_rows_equal(grads(model), expected, rows)


def test_it_adds_to_grad_in_place_as_torch_does() -> None:
    model = towers()
    before = decouple(model.rows())
    opt = optimizer_of(list(model.parameters()))
    opt.backward(model.losses(0))
    held = grads(model)
    opt.backward(model.losses(1))
    second = decouple(model.rows(1))
    both: Row = [one + other for one, other in zip(before, second, strict=True)]
    assert_rows_equal(grads(model), both, model.rows())
    assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))


def test_the_same_loss_twice() -> None:
    model = towers()
    rows = model.rows(names=("a", "a"))
    loss = model.losses()["a"]
    optimizer_of(list(model.parameters())).backward({"one": loss, "two": loss})
    assert_rows_equal(grads(model), decouple(rows), rows)


def test_merged_gradients_carry_no_graph() -> None:
    model = towers()
    optimizer_of(list(model.parameters())).backward(model.losses())
    assert all(g is None or not g.requires_grad for g in grads(model))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_is_that_of_torch(set_to_none: bool) -> None:
    p = nn.Parameter(torch.ones(2))
    opt = optimizer_of([p])
    opt.backward([p.sum(), p.sum()])
    opt.zero_grad(set_to_none=set_to_none)
    assert (p.grad is None) if set_to_none else torch.equal(p.grad, torch.zeros(2))


# --- reach ----------------------------------------------------------------------------------------


def test_a_gradient_of_zeros_is_reached() -> None:
    """Autograd hands out a tensor of zeros: so the parameter is shared, and gets a .grad."""
    a, b = nn.Parameter(vector(1.0)), nn.Parameter(vector(1.0))
    optimizer_of([a, b]).backward([(a * 3 + b * 0).sum(), (a * 5 + b * 2).sum()])
    assert b.grad is not None and b.grad.tolist() == [1.0]


class _NoGradientForTheSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, a: Tensor, b: Tensor) -> Tensor:
        return a.sum() + b.sum()

    @staticmethod
    def backward(ctx: object, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream.expand(2).clone(), None


def test_a_gradient_of_none_is_not_reached() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer_of([a, b]).backward([_NoGradientForTheSecond.apply(a, b), a.sum()])
    assert a.grad is not None
    assert b.grad is None


@pytest.mark.parametrize("scope", SCOPES)
def test_unreached_parameters_keep_their_grad(scope: str) -> None:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    b.grad = held = torch.tensor([3.0, -4.0])
    optimizer_of([a, b, c], scope=scope).backward([a.sum(), -a.sum() * 2])
    assert b.grad is held and held.tolist() == [3.0, -4.0]
    assert c.grad is None


def test_frozen_parameters_are_ignored() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    b.grad = held = torch.tensor([3.0, -4.0])
    opt = optimizer_of([a, b], scope="all")
    opt.backward([(a * b).sum(), (a * -2 * b).sum()])
    assert b.grad is held and held.tolist() == [3.0, -4.0]
    b.requires_grad_(True)
    opt.zero_grad()
    report = opt.backward([(a * b).sum(), (a * 2 * b).sum()])
    assert b.grad is not None
    assert report.gramian[0, 0] == 4.0


def test_leaves_outside_the_optimizer_get_the_plain_sum() -> None:
    """As torch would have done: not averaged, not decoupled, added to what is there."""
    inside, outside, new = (nn.Parameter(vector(0, 0)) for _ in range(3))
    outside.grad = vector(100, 100)
    rows: list[Row] = [
        [vector(1, 0), vector(1, 2), vector(1, 1)],
        [vector(-3, 4), vector(-3, 5), None],
    ]
    leaves = [inside, outside, new]
    optimizer_of([inside]).backward(linear_losses(leaves, rows))
    assert outside.grad.tolist() == [98.0, 107.0]
    assert new.grad is not None and new.grad.tolist() == [1.0, 1.0]
    assert_rows_equal([inside.grad], decouple([row[:1] for row in rows]), rows)


def test_leaves_outside_get_the_plain_sum_over_micro_batches() -> None:
    inside, outside = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    opt = optimizer_of([inside])
    opt.accumulate([(inside + outside).sum(), (outside * 10 - inside).sum()])
    opt.backward([(inside + outside * 100).sum(), (outside * 1000 + inside).sum()])
    assert outside.grad is not None and outside.grad.tolist() == [1111.0]


# --- what may be handed over ----------------------------------------------------------------------


def test_closures_equal_losses() -> None:
    model = towers()
    rows = model.rows()
    opt = optimizer_of(list(model.parameters()))
    opt.backward({name: lambda n=name: model.losses()[n] for name in ("a", "b", "a+b")})
    assert_rows_equal(grads(model), decouple(rows), rows)


def test_losses_and_closures_may_be_mixed() -> None:
    model = towers()
    rows = model.rows()
    losses = model.losses()
    mixed = [losses["a"], lambda: model.losses()["b"], losses["a+b"]]
    optimizer_of(list(model.parameters())).backward(mixed)
    assert_rows_equal(grads(model), decouple(rows), rows)


@pytest.mark.parametrize("absent", [None, lambda: None])
def test_none_leaves_the_row_out(absent: object) -> None:
    """The mean is over the rows that are there."""
    model = towers()
    rows = model.rows(names=("a", "a+b"))
    losses = model.losses()
    entries = {"a": losses["a"], "b": absent, "a+b": losses["a+b"]}
    optimizer_of(list(model.parameters())).backward(entries)
    assert_rows_equal(grads(model), decouple(rows), rows)


def test_step_with_a_mapping_is_zero_grad_backward_step() -> None:
    ours, plain = towers(), towers()
    for p in ours.parameters():
        p.grad = torch.full_like(p, 1e3)
    opt = optimizer_of(list(ours.parameters()))
    opt_plain = torch.optim.SGD(plain.parameters(), lr=0.1)
    values = plain.losses()
    for p, g in zip(plain.parameters(), decouple(plain.rows()), strict=True):
        p.grad = g
    opt_plain.step()
    losses = opt.step({**ours.losses(), "c": None})
    assert list(losses) == ["a", "b", "a+b", "c"]
    assert losses["c"] is None
    for name, value in values.items():
        assert torch.equal(losses[name], value.detach()) and not losses[name].requires_grad
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_step_with_a_sequence_returns_a_list() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    losses = optimizer_of([p]).step([lambda: (p * 3).sum(), None, (p * 5).sum()])
    assert isinstance(losses, list)
    assert losses[1] is None
    assert [float(losses[0]), float(losses[2])] == [6.0, 10.0]


def test_step_keeps_tuple_keys() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    losses = optimizer_of([p]).step({("a", "b"): (p * 3).sum(), ("a",): (p * 5).sum()})
    assert list(losses) == [("a", "b"), ("a",)]


def test_a_tuple_of_losses_is_a_sequence() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer_of([p], reduction="sum").backward(((p * 3).sum(), (p * 5).sum()))
    assert p.grad is not None and p.grad.tolist() == [8.0]


def test_a_parameter_may_be_the_loss() -> None:
    p = nn.Parameter(torch.tensor(2.0))
    optimizer_of([p], reduction="sum").backward([p, p * 3])
    assert p.grad is not None and float(p.grad) == 4.0


def test_gradients_that_share_memory_are_kept_apart() -> None:
    """A function may hand the same tensor to two parameters; rows are added to in place."""

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            return a + b

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
            return upstream, upstream

    a, b = nn.Parameter(vector(0, 0)), nn.Parameter(vector(0, 0))
    opt = optimizer_of([a, b], reduction="sum")
    for _ in range(2):
        opt.accumulate([(Same.apply(a, b) * vector(1, 2)).sum(), a.sum()])
    opt.backward([(a * vector(10, 10)).sum(), b.sum()])
    assert a.grad is not None and a.grad.tolist() == [14.0, 16.0]
    assert b.grad is not None and b.grad.tolist() == [3.0, 5.0]


@pytest.mark.parametrize("n", [8, 5000])
@pytest.mark.parametrize("weighted", ["shared", "all", "measured on a"])
@pytest.mark.parametrize("more", [0, 1])
def test_parameters_whose_gradients_autograd_puts_into_one_storage(
    n: int, weighted: str, more: int
) -> None:
    """As for ``a[None] + b[None]``; ``more``: losses that reach ``a`` alone."""
    generator = torch.Generator().manual_seed(n)
    factors = torch.randn(2 + more, n, generator=generator, dtype=torch.float64)
    a, b = (nn.Parameter(torch.zeros(n, dtype=torch.float64)) for _ in range(2))
    options = {"conflict_parameters": [a]} if weighted == "measured on a" else {"scope": weighted}
    opt = optimizer_of([a, b], reduction="sum", **options)

    def losses() -> list[Tensor]:
        both = [((a[None] + b[None]) * factor).sum() for factor in factors[:2]]
        return both + [(a * factor).sum() for factor in factors[2:]]

    opt.accumulate(losses())
    weights = opt.backward(losses()).weights
    of_b = torch.ones_like(weights) if weighted == "shared" and more else weights
    assert a.grad is not None and b.grad is not None
    expected_a, expected_b = weights @ (2 * factors), of_b[:2] @ (2 * factors[:2])
    torch.testing.assert_close(a.grad, expected_a, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b.grad, expected_b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("measured", [False, True])
def test_every_grad_has_a_storage_of_its_own(measured: bool) -> None:
    """In one storage, clipping would scale it twice."""
    a, b = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(5))
    opt = optimizer_of([a, b], **({"conflict_parameters": [a]} if measured else {}))
    opt.backward([((a[None] + b[None]) * torch.arange(5.0)).sum()])
    assert a.grad is not None and b.grad is not None
    a.grad.zero_()
    assert b.grad.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


# --- accumulation ---------------------------------------------------------------------------------


@given(first=partial_rows(max_params=3), data=st.data())
def test_accumulated_rows_equal_the_oracle_on_their_sum(
    first: list[Row], data: st.DataObject
) -> None:
    params = parameters_like(first)
    again: list[Row] = [
        [
            None if data.draw(st.booleans()) else torch.full_like(p.detach(), data.draw(_values))
            for p in params
        ]
        for _ in first
    ]
    for row in again:
        if all(g is None for g in row):
            row[0] = torch.ones_like(params[0])
    opt = optimizer_of(params)
    opt.accumulate(linear_losses(params, first))
    assert all(p.grad is None for p in params)
    opt.backward(linear_losses(params, again))
    rows = sum_rows(first, again)
    assert_rows_equal([p.grad for p in params], decouple(rows), rows)


_values = st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0])


def test_accumulation_over_three_micro_batches_of_a_model() -> None:
    model = towers()
    rows = sum_rows(*(model.rows(seed) for seed in range(3)))
    rows = [[None if g is None else g / 3 for g in row] for row in rows]
    held = [torch.ones_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), held, strict=True):
        p.grad = g
    opt = optimizer_of(list(model.parameters()))
    for seed in range(2):
        opt.accumulate({name: loss / 3 for name, loss in model.losses(seed).items()})
        assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))
        assert all((g == 1).all() for g in held)
    opt.backward({name: loss / 3 for name, loss in model.losses(2).items()})
    expected: Row = [None if g is None else g + 1 for g in decouple(rows)]
    assert_rows_equal(grads(model), expected, rows)


def test_a_combination_may_be_absent_from_a_micro_batch_or_new() -> None:
    p, q = nn.Parameter(vector(0, 0)), nn.Parameter(vector(0))
    gradient = {"a": vector(1, 0), "b": vector(-3, 4), "c": vector(0, -1)}
    opt = optimizer_of([p, q])
    opt.accumulate({"a": (p * gradient["a"]).sum(), "b": None})
    opt.accumulate({"b": (p * gradient["b"]).sum()})
    last = {"c": (p * gradient["c"]).sum() + q.sum(), "a": (p * gradient["a"]).sum()}
    report = opt.backward(last)
    rows: list[Row] = [[2 * gradient["a"], None], [gradient["b"], None], [gradient["c"], vector(1)]]
    assert sorted(report.names) == ["a", "b", "c"]
    assert list(report.unavailable) == []
    assert_rows_equal([p.grad, q.grad], decouple(rows), rows)


def test_reach_is_the_union_over_micro_batches() -> None:
    """Neither micro-batch shares q between the losses; both together do."""
    p, q = nn.Parameter(vector(0)), nn.Parameter(vector(0))
    opt = optimizer_of([p, q])
    one, minus = vector(1), vector(-1)
    opt.accumulate(linear_losses([p, q], [[one, one], [minus, None]]))
    opt.backward(linear_losses([p, q], [[one, None], [minus, 3 * minus]]))
    rows: list[Row] = [[2 * one, one], [2 * minus, 3 * minus]]
    assert_rows_equal([p.grad, q.grad], decouple(rows), rows)


def test_losses_of_the_report_are_summed_over_micro_batches() -> None:
    """Divided as with torch, their sum is the loss of the whole batch."""
    p = nn.Parameter(torch.tensor([2.0]))
    opt = optimizer_of([p])
    opt.accumulate({"a": (p * 3).sum() / 2, "b": (p * 1).sum() / 2})
    report = opt.backward({"a": (p * 5).sum() / 2, "b": (p * 7).sum() / 2})
    assert report.losses.tolist() == [8.0, 8.0]


def test_zero_grad_drops_pending_rows() -> None:
    p = nn.Parameter(torch.zeros(1))
    opt = optimizer_of([p], reduction="sum")
    opt.accumulate([(p * 100).sum(), (p * 100).sum()])
    opt.zero_grad()
    opt.backward([(p * 3).sum(), (p * 5).sum()])
    assert p.grad is not None and p.grad.tolist() == [8.0]
    opt.step()


def test_rows_are_merged_once() -> None:
    p = nn.Parameter(torch.zeros(1))
    opt = optimizer_of([p], reduction="sum")
    opt.accumulate([(p * 100).sum()])
    opt.backward([(p * 3).sum()])
    opt.zero_grad()
    opt.backward([(p * 3).sum()])
    assert p.grad is not None and p.grad.tolist() == [3.0]


def test_only_merges_count() -> None:
    p = nn.Parameter(torch.zeros(1))
    opt = optimizer_of([p], rule="pcgrad", seed=7)
    group = opt.param_groups[0]
    assert (group["gradsplit_seed"], group["gradsplit_merges"]) == (7, 0)
    opt.step()
    opt.accumulate([p.sum()])
    assert opt.param_groups[0]["gradsplit_merges"] == 0
    opt.backward([p.sum()])
    opt.step()
    assert opt.param_groups[0]["gradsplit_merges"] == 1
    opt.step([p.sum()])
    assert opt.param_groups[0]["gradsplit_merges"] == 2


# --- the order that pcgrad draws ------------------------------------------------------------------

THREE = [vector(1.0, 0.0), vector(-1.0, 0.1), vector(-1.0, -2.0)]


def pcgrad_results(count: int, seed: int) -> list[tuple[float, ...]]:
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = optimizer_of([p], rule="pcgrad", reduction="sum", seed=seed)
    results = []
    for _ in range(count):
        opt.zero_grad()
        opt.backward(linear_losses([p], [[row] for row in THREE]))
        assert p.grad is not None
        results.append(tuple(round(x, 9) for x in p.grad.tolist()))
    return results


def test_pcgrad_draws_every_order_about_equally_often() -> None:
    """Three rows, two orders each: eight sums, told apart by the oracle."""
    ways = [[(0, 1, 2), (0, 2, 1)], [(1, 0, 2), (1, 2, 0)], [(2, 0, 1), (2, 1, 0)]]
    possible: dict[tuple[float, ...], float] = {}
    for order in itertools.product(*ways):
        result = pcgrad_loop(torch.stack(THREE), torch.tensor(order)).tolist()
        key = tuple(round(x, 9) for x in result)
        possible[key] = possible.get(key, 0) + 1 / 8
    assert len(possible) > 3, "the example lost its point"
    draws = pcgrad_results(600, seed=0)
    statistic = sum(
        (draws.count(key) - 600 * share) ** 2 / (600 * share) for key, share in possible.items()
    )
    assert set(draws) == set(possible)
    assert statistic < 28  # p < 0.001 with at most 7 degrees of freedom


def test_pcgrad_order_comes_from_seed_and_merge_counter_alone() -> None:
    torch.manual_seed(0)
    first = pcgrad_results(12, seed=3)
    torch.manual_seed(1)
    assert pcgrad_results(12, seed=3) == first
    assert pcgrad_results(12, seed=4) != first


@pytest.mark.parametrize("rule", ["gmd", "pcgrad"])
def test_torchs_default_device_and_dtype_do_not_matter(rule: str) -> None:
    """The parameters say where and in what precision; pcgrad draws the same order."""
    results = []
    for device, dtype in ((None, torch.float32), ("meta", torch.float16)):
        p = nn.Parameter(vector(0, 0))
        losses = linear_losses([p], [[row] for row in THREE])
        opt = optimizer_of([p], rule=rule, seed=1)
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)
        try:
            opt.backward(losses)
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        results.append(p.grad)
    assert same(results[0], results[1])


def test_pcgrad_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    pcgrad_results(2, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- hooks, checkpointing -------------------------------------------------------------------------


def test_tensor_hooks_fire_once_per_loss() -> None:
    p = nn.Parameter(torch.zeros(2))
    fired: list[str] = []
    p.register_hook(lambda g: fired.append("gradient"))
    p.register_post_accumulate_grad_hook(lambda p: fired.append("accumulated"))
    opt = optimizer_of([p])
    opt.backward([p.sum(), (p * 2).sum(), lambda: (p * 3).sum()])
    assert fired.count("gradient") == 3
    assert fired.count("accumulated") == 3


def test_a_hook_that_changes_the_gradient_changes_the_row() -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    p.register_hook(lambda g: g * torch.tensor([1.0, -2.0]))
    seen: list[Row] = [[vector(1, 1)], [vector(-3, -5)]]
    optimizer_of([p]).backward(linear_losses([p], [[vector(1, -0.5)], [vector(-3, 2.5)]]))
    assert_rows_equal([p.grad], decouple(seen), seen)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["losses", "closures"])
def test_activation_checkpointing(use_reentrant: bool, kind: str) -> None:
    """The trunk, shared by all losses, and one private encoder are recomputed in backward."""
    model = towers()
    rows = model.rows()
    trunk, encoder = model.trunk, model.a

    class Recomputed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            # the reentrant kind wants an input that requires a gradient
            return checkpoint(self.inner, x.requires_grad_(), use_reentrant=use_reentrant)

    parameters = list(model.parameters())
    model.trunk, model.a = Recomputed(trunk), Recomputed(encoder)
    model.a.weight = encoder.weight
    entries: dict[str, Tensor] | dict[str, Callable[[], Tensor]] = (
        model.losses()
        if kind == "losses"
        else {name: lambda n=name: model.losses()[n] for name in ("a", "b", "a+b")}
    )
    optimizer_of(parameters).backward(entries)
    assert_rows_equal([p.grad for p in parameters], decouple(rows), rows)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_one_forward_shared_by_all_losses(use_reentrant: bool) -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    heads = nn.ModuleList(nn.Linear(4, 1).double() for _ in range(3))
    parameters = [*trunk.parameters(), *heads.parameters()]
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def losses(hidden: Tensor) -> list[Tensor]:
        return [(head(hidden) - i).square().mean() for i, head in enumerate(heads)]

    rows: list[Row] = [
        list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
        for loss in losses(trunk(x))
    ]
    recomputed = checkpoint(trunk, x, use_reentrant=use_reentrant)
    optimizer_of(parameters).backward(losses(recomputed))
    assert_rows_equal([p.grad for p in parameters], decouple(rows), rows)


# --- graphs ---------------------------------------------------------------------------------------


class Held:
    """A tensor saved for backward; alive as long as the graph that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class GraphWatch:
    """Counts how many of the graphs made under ``recording`` are still alive."""

    def __init__(self) -> None:
        self._held: dict[str, list[weakref.ref[Held]]] = {}

    def recording(self, name: str) -> saved_tensors_hooks:
        held = self._held.setdefault(name, [])

        def pack(tensor: Tensor) -> Held:
            box = Held(tensor)
            held.append(weakref.ref(box))
            return box

        return saved_tensors_hooks(pack, lambda box: box.tensor)

    def alive(self) -> set[str]:
        gc.collect()
        return {name for name, held in self._held.items() if any(ref() is not None for ref in held)}


def test_shared_graphs_need_no_retain_graph_and_are_freed() -> None:
    model, watch = towers(), GraphWatch()
    with watch.recording("all"):
        losses = model.losses()
    assert watch.alive() == {"all"}
    optimizer_of(list(model.parameters())).backward(losses)
    for loss in losses.values():
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_the_last_backward_frees_the_graph() -> None:
    """One trunk, three losses that save nothing of their own."""
    watch = GraphWatch()
    p = nn.Parameter(torch.ones(3))
    with watch.recording("trunk"):
        hidden = p.exp().tanh()
    losses = [hidden.sum(), -hidden.sum(), hidden.mean()]
    assert watch.alive() == {"trunk"}
    optimizer_of([p]).backward(losses)
    assert watch.alive() == set()


def test_graphs_that_are_not_shared_are_freed_one_by_one() -> None:
    """While the last loss runs backward, only its own graph is left."""
    watch = GraphWatch()
    p = nn.Parameter(torch.ones(3))
    alive: list[set[str]] = []
    losses = {}
    for name in "abcd":
        with watch.recording(name):
            losses[name] = (p.exp().tanh() * (ord(name) - 98)).sum()
    p.register_hook(lambda g: alive.append(watch.alive()))
    optimizer_of([p]).backward(losses)
    assert len(alive) == 4
    assert all(len(names) <= left for names, left in zip(alive, (4, 3, 2, 1), strict=True)), alive


def test_only_graphs_that_are_really_shared_are_retained() -> None:
    """Two trunks, two losses each, interleaved: the first trunk goes when its last loss is done."""
    watch = GraphWatch()
    p = nn.Parameter(torch.ones(3))
    trunks = {}
    for name in "ab":
        with watch.recording(name):
            trunks[name] = p.exp().tanh()
    losses = [trunks["a"].sum(), trunks["b"].sum(), -trunks["a"].mean(), -trunks["b"].mean()]
    trunks.clear()
    alive: list[set[str]] = []
    p.register_hook(lambda g: alive.append(watch.alive()))
    optimizer_of([p]).backward(losses)
    assert len(alive) == 4
    assert len(alive[-1]) <= 1
    assert watch.alive() == set()


def test_a_graph_that_branches_and_joins_is_not_shared_by_that() -> None:
    model, losses = towers(), []
    for _ in range(2):
        hidden = model.a(torch.randn(4, 3, dtype=torch.float64))
        losses.append((hidden + hidden.tanh()).square().mean())
    optimizer_of(list(model.parameters())).backward(losses)
    for loss in losses:
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


@pytest.mark.parametrize("method", ["backward", "accumulate", "step"])
def test_closures_keep_one_graph_alive_at_a_time(method: str) -> None:
    model, watch = towers(), GraphWatch()
    before: list[set[str]] = []

    def closure(name: str) -> Tensor:
        before.append(watch.alive())
        with watch.recording(name):
            return model.losses()[name]

    opt = optimizer_of(list(model.parameters()))
    getattr(opt, method)({name: functools.partial(closure, name) for name in ("a", "b", "a+b")})
    assert before == [set(), set(), set()]
    assert watch.alive() == set()


def test_accumulated_rows_keep_no_graph() -> None:
    model, watch = towers(), GraphWatch()
    with watch.recording("all"):
        losses = model.losses()
    opt = optimizer_of(list(model.parameters()))
    opt.accumulate(losses)
    losses.clear()
    assert watch.alive() == set()


# --- memory ---------------------------------------------------------------------------------------


def peak_bytes(call: Callable[[], object], folder: Path) -> int:
    """The most that was alive at one moment of what ``call`` allocated, as the allocator saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


MEBI = 1 << 20
SMALL = 3 * MEBI  # "plus a small constant", where one row takes 16 MiB
BUFFER = 8 * MEBI  # what is multiplied at once


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pieces", [1, 32])
@pytest.mark.parametrize("rule", ["gmd", "pcgrad"])
@pytest.mark.parametrize("had_grad", [False, True])
def test_memory_peaks_at_m_plus_one_rows(
    pieces: int, rule: str, had_grad: bool, tmp_path: Path
) -> None:
    """m = 4 rows of 16 MiB in one parameter or in 32, and the merged gradient."""
    m, n = 4, 4 * MEBI
    params = [nn.Parameter(torch.zeros(n // pieces)) for _ in range(pieces)]
    if had_grad:
        for p in params:
            p.grad = torch.zeros_like(p)
    direction = torch.randn(n // pieces)
    opt = optimizer_of(params, rule=rule)

    def closure(i: int) -> Tensor:
        return torch.stack([torch.dot(p, direction) * (-1) ** i for p in params]).sum()

    closures = [functools.partial(closure, i) for i in range(m)]
    peak = peak_bytes(lambda: opt.backward(closures), tmp_path)
    assert m * n * 4 <= peak, "the probe sees nothing"
    # A .grad that was there before the call is not counted in the peak.
    merged = n // pieces * 4 if had_grad else n * 4
    assert peak <= m * n * 4 + max(merged, BUFFER) + SMALL


@pytest.mark.filterwarnings("ignore")
def test_memory_of_accumulation_peaks_at_m_plus_one_rows(tmp_path: Path) -> None:
    m, n = 3, 4 * MEBI
    p = nn.Parameter(torch.zeros(n))
    direction = torch.randn(n)
    opt = optimizer_of([p])
    closures = [lambda i=i: torch.dot(p, direction) * (-1) ** i for i in range(m)]

    def window() -> None:
        opt.accumulate(closures)
        opt.accumulate(closures)
        opt.backward(closures)

    peak = peak_bytes(window, tmp_path)
    assert m * n * 4 <= peak <= (m + 1) * n * 4 + SMALL


@pytest.mark.filterwarnings("ignore")
def test_rows_are_stored_only_where_a_loss_reaches(tmp_path: Path) -> None:
    """Six losses with an encoder each: six encoders' worth of rows, not thirty-six."""
    m, size = 6, 2 * MEBI
    shared = nn.Parameter(torch.zeros(8))
    private = [nn.Parameter(torch.zeros(size)) for _ in range(m)]
    direction = torch.randn(size)
    for scope in SCOPES:
        opt = optimizer_of([shared, *private], scope=scope)
        closures = [
            lambda i=i: torch.dot(private[i], direction) + shared.sum() * (-1) ** i
            for i in range(m)
        ]
        peak = peak_bytes(functools.partial(opt.backward, closures), tmp_path)
        assert m * size * 4 <= peak <= 2 * m * size * 4 + SMALL
        opt.zero_grad()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_memory_of_half_precision_rows_stays_half(dtype: torch.dtype, tmp_path: Path) -> None:
    """Dot products and the merge are wider, but no whole row is ever copied wider."""
    m, n = 3, 8 * MEBI
    p = nn.Parameter(torch.zeros(n, dtype=dtype))
    direction = torch.randn(n).to(dtype)
    opt = optimizer_of([p])
    closures = [lambda i=i: (p * direction).sum() * (-1) ** i for i in range(m)]
    peak = peak_bytes(lambda: opt.backward(closures), tmp_path)
    # each forward of these closures holds one product of n elements, before there are m rows
    assert m * n * 2 <= peak <= (m + 1) * n * 2 + SMALL


# --- precision ------------------------------------------------------------------------------------

HALF = [torch.float16, torch.bfloat16]


def merged_in(dtype: torch.dtype, jacobian: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """The merged gradient of rows in ``dtype`` and the oracle's on the very same rows."""
    rows: list[Row] = [[row.to(dtype)] for row in jacobian]
    p = nn.Parameter(torch.zeros(jacobian.shape[1], dtype=dtype))
    optimizer_of([p], **options).backward(linear_losses([p], rows))
    assert p.grad is not None and p.grad.dtype == dtype
    expected = decouple(rows, reduction=str(options.get("reduction", "mean")))[0]
    assert expected is not None
    return p.grad, expected


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("seed", range(3))
def test_the_merged_gradient_is_rounded_once(dtype: torch.dtype, seed: int) -> None:
    """Against the oracle on the same rows: half a unit in the last place for the half types."""
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(5, 200, generator=generator) - 0.3 * torch.randn(1, 200)
    ours, expected = merged_in(dtype, jacobian)
    unit = torch.finfo(dtype).eps
    relative = 0.51 * unit if dtype in HALF else 4 * unit
    largest = float(jacobian.norm(dim=1).max())
    tiny = 8 * torch.finfo(torch.float32).eps * largest
    torch.testing.assert_close(ours.double(), expected, rtol=relative, atol=tiny)


def test_float64_rows_stay_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, expected = merged_in(
        torch.float64, torch.randn(4, 50, generator=generator, dtype=torch.float64)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", HALF)
def test_dot_products_of_half_precision_rows_do_not_overflow(dtype: torch.dtype) -> None:
    """100 000 ones: their dot product is 1e5, beyond float16, and beyond bfloat16's counting."""
    p = nn.Parameter(torch.zeros(100_000, dtype=dtype))
    ones = torch.ones(100_000, dtype=dtype)
    report = optimizer_of([p]).backward(linear_losses([p], [[ones], [-ones]]))
    assert report.gramian.tolist() == [[1e5, -1e5], [-1e5, 1e5]]


@pytest.mark.parametrize("dtype", HALF)
def test_weights_are_not_cast_to_the_row_dtype(dtype: torch.dtype) -> None:
    """A norm ratio of 2e5 makes a weight of 2e5, which float16 does not have."""
    jacobian = torch.tensor([[-1024.0, 0.25], [2.0**-8, 2.0**-9]])
    ours, expected = merged_in(dtype, jacobian, reduction="sum")
    assert ours.isfinite().all()
    relative = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), expected, rtol=relative, atol=1e-4)


def test_the_mean_does_not_overflow_where_the_sum_would() -> None:
    """Cast last: (60000 + 60000) / 2 is a float16, 60000 + 60000 is not."""
    ours, expected = merged_in(torch.float16, torch.tensor([[60000.0], [60000.0]]))
    assert ours.double().tolist() == expected.tolist()


@pytest.mark.parametrize("scale", [1e-18, 1e-22, 1e-30, 1e15, 1e25])
@pytest.mark.parametrize("rule", ["gmd", "pcgrad"])
def test_tiny_and_huge_float32_rows_are_decoupled_like_any(scale: float, rule: str) -> None:
    """Their squares do not fit float32: the Gramian must not underflow to zero, nor overflow."""
    jacobian = torch.tensor([[1.0, 0.0], [-3.0, 4.0]])
    expected = decouple([[row * scale] for row in jacobian], reduction="sum")[0]
    p = nn.Parameter(torch.zeros(2))
    report = optimizer_of([p], rule=rule, reduction="sum").backward(
        linear_losses([p], [[row * scale] for row in jacobian])
    )
    assert report.weights.tolist() == pytest.approx([4.0, 1.12], rel=1e-6)
    assert p.grad is not None and expected is not None
    torch.testing.assert_close(p.grad.double() / scale, expected / scale, rtol=1e-6, atol=1e-6)


def test_parameters_of_several_dtypes() -> None:
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    params = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in dtypes]
    rows: list[Row] = [
        [torch.tensor([1.0, 0.5], dtype=d) for d in dtypes],
        [torch.tensor([-2.0, 0.25], dtype=d) for d in dtypes],
    ]
    optimizer_of(params).backward(linear_losses(params, rows))
    for p, expected in zip(params, decouple(rows), strict=True):
        assert p.grad is not None and expected is not None and p.grad.dtype == p.dtype
        relative = 4 * torch.finfo(p.dtype).eps
        torch.testing.assert_close(p.grad.double(), expected, rtol=relative, atol=relative / 8)


def test_parameters_of_any_layout() -> None:
    """Transposed, channels-last and scalar parameters."""
    torch.manual_seed(0)
    image = torch.zeros(2, 3, 2, 2, dtype=torch.float64)
    params = [
        nn.Parameter(torch.zeros(3, 4, dtype=torch.float64).T),
        nn.Parameter(image.to(memory_format=torch.channels_last)),
        nn.Parameter(torch.zeros((), dtype=torch.float64)),
    ]
    rows: list[Row] = [[torch.randn_like(p) for p in params] for _ in range(3)]
    optimizer_of(params).backward(linear_losses(params, rows))
    assert_rows_equal([p.grad for p in params], decouple(rows), rows)
    assert all(p.grad.stride() == p.stride() for p in params), "torch keeps the parameter's strides"


def test_a_parameter_without_elements_gets_a_grad_as_torch_has_it() -> None:
    p, empty = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(0, 3))
    optimizer_of([p, empty]).backward([p.sum() + empty.sum(), empty.sum() - p.sum()])
    assert empty.grad is not None and empty.grad.shape == (0, 3)


# --- NaN and inf ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rule", ["gmd", "pcgrad"])
@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_gradient_that_is_not_finite_reaches_grad(
    bad: float, rule: str, row: int, dtype: torch.dtype
) -> None:
    """In whichever row, conflicting or not: where it is, ``.grad`` is not finite."""
    jacobian = torch.stack(THREE).to(dtype)
    jacobian[row, 1] = bad
    p = nn.Parameter(torch.zeros(2, dtype=dtype))
    optimizer_of([p], rule=rule).backward(linear_losses([p], [[g] for g in jacobian]))
    assert p.grad is not None and not p.grad[1].isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_private_gradient_that_is_not_finite_stays_private(bad: float) -> None:
    """It is outside the scope, so the Gramian does not see it; its own ``.grad`` does."""
    rows: list[Row] = [[vector(1, 0), vector(bad)], [vector(-3, 4), None]]
    shared, private = merged(rows)
    assert private is not None and not private.isfinite().any()
    clean: list[Row] = [[vector(1, 0)], [vector(-3, 4)]]
    assert_rows_equal([shared], decouple(clean), clean)


def test_zero_weights_hide_nothing() -> None:
    """A rule may give a row weight 0; its NaN still shows."""
    p = nn.Parameter(torch.zeros(2))
    opt = optimizer_of([p], rule=lambda gramian: torch.zeros(gramian.shape[-1]))
    opt.backward(linear_losses([p], [[torch.tensor([float("nan"), 1.0])], [torch.ones(2)]]))
    assert p.grad is not None and not p.grad[0].isfinite()


# --- no gradient mode, order of entries -----------------------------------------------------------


@given(rows=partial_rows())
def test_gmd_does_not_depend_on_the_order_of_the_losses(rows: list[Row]) -> None:
    params = parameters_like(rows)
    opt = optimizer_of(params)
    opt.backward(dict(zip("abcd", linear_losses(params, rows), strict=False)))
    there = [p.grad for p in params]
    opt.zero_grad()
    backwards = list(zip("abcd", linear_losses(params, rows), strict=False))[::-1]
    opt.backward(dict(backwards))
    assert_rows_equal([p.grad for p in params], [None if g is None else g for g in there], rows)


def test_closures_run_with_gradients_on_even_under_no_grad() -> None:
    """As torch's own closures do."""
    p = nn.Parameter(torch.zeros(1))
    opt = optimizer_of([p], reduction="sum")
    with torch.no_grad():
        opt.step([lambda: (p * 3).sum(), lambda: (p * 5).sum()])
    assert p.tolist() == pytest.approx([-0.8])


@pytest.mark.parametrize("gradient", [None, 7.0])
@pytest.mark.parametrize("how", ["frozen", "removed"])
def test_a_parameter_that_left_during_accumulation_is_left_alone(
    how: str, gradient: float | None
) -> None:
    """Its earlier rows are dropped; its ``.grad`` and values are the user's again."""
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = ModalityDecoupledOptimizer(
        torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0), reduction="sum"
    )
    opt.accumulate({"x": (a * b).sum(), "y": (2 * a * b).sum()})
    if how == "frozen":
        b.requires_grad_(False)
    else:
        opt.param_groups.pop()
    b.grad = None if gradient is None else torch.full((2,), gradient)
    frozen = b.detach()
    opt.accumulate({"x": (a * frozen).sum()})
    opt.backward({"y": (2 * a * frozen).sum()})
    if gradient is None:
        assert b.grad is None
    else:
        assert b.grad is not None and b.grad.tolist() == [gradient] * 2
    assert a.grad is not None and a.grad.tolist() == [6.0, 6.0]


def test_one_loss_with_nan_equals_plain_backward_exactly() -> None:
    """NaN stays where it is: nothing is projected, so no weight spreads it."""
    p = nn.Parameter(torch.ones(3))
    factors = torch.tensor([1.0, float("nan"), 3.0])
    for rule in ("gmd", "pcgrad", lambda gramian: torch.full((1,), 0.5)):
        p.grad = None
        ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=0.1), rule=rule).backward(
            [(p * factors).sum()]
        )
        assert p.grad is not None
        torch.testing.assert_close(p.grad, factors, equal_nan=True, rtol=0, atol=0)


def test_a_rule_that_changes_its_argument_does_not_change_the_report() -> None:
    def clamping(gramian: Tensor) -> Tensor:
        return gramian.clamp_(min=0.0).new_ones(len(gramian))

    p = nn.Parameter(torch.ones(2))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=0.1), rule=clamping)
    assert opt.backward([p.sum(), -p.sum()]).conflict_rate() == 1.0


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("before, after", [(1, 1), (0, 0)], ids=["piece", "whole"])
def test_rows_do_not_alias_a_storage_that_the_next_backward_overwrites(
    before: int, after: int, detached: bool
) -> None:
    """As DDP's buckets with ``gradient_as_bucket_view=True``, played here by a hook.

    A large parameter has a bucket for itself, whose view is known by its base.
    """
    if detached and not before:
        pytest.skip("cannot be told from a gradient of its own")
    p = nn.Parameter(torch.ones(2))
    bucket = torch.zeros(before + 2 + after)

    def into_bucket(parameter: Tensor) -> None:
        assert parameter.grad is not None
        bucket[before : before + 2] = parameter.grad
        view = bucket[before : before + 2]
        parameter.grad = view.detach() if detached else view

    p.register_post_accumulate_grad_hook(into_bucket)
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=0.1), reduction="sum")
    report = opt.backward([p[0] * 1.0, p[1] * 2.0])
    assert report.gramian.tolist() == [[1.0, 0.0], [0.0, 4.0]]
    assert p.grad is not None and p.grad.tolist() == [1.0, 2.0]
