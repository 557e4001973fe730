"""``conflict_parameters``: weights from a few parameters, then one backward, for all of them.

What it has in common with the exact step is tested there: ``test_backward`` (a single loss, NaN),
``test_window`` (means, errors), ``test_joint`` and ``test_memory``.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from torch import Tensor, nn

from gradsplit import CombinationSampler, ModalityDecoupledOptimizer
from tests.core.cases import (
    REDUCTIONS,
    assert_rows_equal,
    optimizer_of,
    parameters_like,
    vector,
)
from tests.reference import (
    MicroBatch,
    Row,
    Snapshot,
    TwoTowers,
    decouple,
    gmd_loop,
    grads,
    linear_losses,
    mean_rows,
    towers,
)
from tests.strategies import partial_rows

CLOSE = 1e-7  # the weights of this oracle are known to that


def trunk(model: TwoTowers) -> list[nn.Parameter]:
    return list(model.trunk[1].parameters())


def cheap(model: TwoTowers, **options: object) -> ModalityDecoupledOptimizer:
    return optimizer_of(model.parameters(), conflict_parameters=trunk(model), **options)


def measured_in(model: TwoTowers) -> list[int]:
    return [[p is c for p in model.parameters()].index(True) for c in trunk(model)]


def weights_of(rows: Sequence[Row], measured: Iterable[int]) -> Tensor:
    """(m,): how often each row is in the sum of the projected rows, from gradient space alone.

    A row is followed by a column of its own that nothing else has, as small as it may be.
    """
    parts = [[row[p].double().flatten() for p in measured] for row in rows]
    jacobian = torch.stack([torch.cat(part) for part in parts])
    tags = torch.eye(len(rows), dtype=torch.float64) * 1e-9 * jacobian.norm()
    return gmd_loop(torch.cat([jacobian, tags], dim=1))[-len(rows) :] / tags.diagonal()


def expected(window: Sequence[MicroBatch], measured: Iterable[int], reduction: str = "mean") -> Row:
    """What the merge adds to .grad: every parameter has the weights of the measured ones."""
    rows = list(mean_rows(window).values())
    backwards = [row for batch in window for row in batch.values() if row is not None]
    weights, merged = weights_of(rows, measured), []
    for place, column in enumerate(zip(*rows, strict=True)):
        some = [w * g for w, g in zip(weights, column, strict=True) if g is not None]
        shared = all(row[place] is not None for row in backwards)
        divide = reduction == "mean" or (reduction == "released" and shared)
        merged.append(sum(some) / (len(rows) if divide else 1) if some else None)
    return merged


def batch_of(model: TwoTowers, seed: int = 0, absent: str | None = None) -> MicroBatch:
    rows = dict(zip(("a", "b", "a+b"), model.rows(seed), strict=True))
    return {name: None if name == absent else row for name, row in rows.items()}


def losses_of(model: TwoTowers, seed: int, absent: str | None) -> dict[str, Tensor | None]:
    losses = model.losses(seed)
    return {name: None if name == absent else loss for name, loss in losses.items()}


# --- weights and merge ----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("window", [[None], ["a+b"], [None, None, None], [None, "b"], ["a", "b"]])
@pytest.mark.parametrize("seed", range(2))
def test_every_parameter_gets_the_weights_of_the_measured_ones(
    reduction: str, window: list[str | None], seed: int
) -> None:
    """Of means over the micro-batches, in each of which a loss may be unavailable."""
    model = towers(seed=seed)
    opt, batches = cheap(model, reduction=reduction), []
    for number, absent in enumerate(window):
        assert all(g is None for g in grads(model))
        batches.append(batch_of(model, seed + number, absent))
        losses = losses_of(model, seed + number, absent)
        (opt.backward if number == len(window) - 1 else opt.accumulate)(losses)
    rows, measured = list(mean_rows(batches).values()), measured_in(model)
    assert weights_of(rows, measured).max() > 1.001, "no conflict: the test would see nothing"
    torch.testing.assert_close(opt.last.weights, weights_of(rows, measured), rtol=CLOSE, atol=0)
    assert_rows_equal(grads(model), expected(batches, measured, reduction), rows, CLOSE)


def test_released_divides_what_every_backward_reaches() -> None:
    """As in the exact step: q is reached by both losses, but not in both micro-batches."""
    p, q = nn.Parameter(vector(0)), nn.Parameter(vector(0))
    opt = optimizer_of([p, q], conflict_parameters=[p], reduction="released")
    one = vector(1)
    opt.accumulate(linear_losses([p, q], [[one, one], [one, 4 * one]]))
    opt.backward(linear_losses([p, q], [[one, one], [one, None]]))
    assert p.grad.tolist() == [1.0] and q.grad.tolist() == [3.0]


def test_the_report_is_that_of_the_measured_parameters() -> None:
    model = towers()
    rows = [[row[p].flatten() for p in measured_in(model)] for row in model.rows()]
    jacobian, losses = torch.stack([torch.cat(row) for row in rows]), model.losses()
    report = cheap(model).backward({**losses, "c": None})
    assert report.names == ("a", "b", "a+b") and report.unavailable == ("c",)
    torch.testing.assert_close(report.gramian, jacobian @ jacobian.T)
    torch.testing.assert_close(report.losses, torch.stack([*losses.values()]).detach())


@given(rows=partial_rows())
def test_measuring_everywhere_where_everything_is_shared_is_the_exact_step(rows: list[Row]) -> None:
    everywhere = [p for p, column in enumerate(zip(*rows, strict=True)) if None not in column]
    assume(everywhere)
    rows = [[row[p] for p in everywhere] for row in rows]
    params = parameters_like(rows)
    optimizer_of(params, conflict_parameters=params).backward(linear_losses(params, rows))
    assert_rows_equal([p.grad for p in params], decouple(rows), rows)


@pytest.mark.parametrize("rule", ["pcgrad", "sum", lambda gramian: gramian.diagonal()])
def test_rules_see_the_gramian_of_the_measured_parameters(rule: object) -> None:
    """With nothing else to merge it is the exact step."""
    rows: list[Row] = [[vector(2.0, 0.5)], [vector(-1.0, 1.0)], [vector(-0.5, -3.0)]]
    (exact,), (ours,) = parameters_like(rows), parameters_like(rows)
    optimizer_of([exact], rule=rule, seed=4).backward(linear_losses([exact], rows))
    opt = optimizer_of([ours], rule=rule, seed=4, conflict_parameters=[ours])
    opt.backward(linear_losses([ours], rows))
    torch.testing.assert_close(ours.grad, exact.grad)


def test_without_conflict_it_is_the_gradient_of_the_mean_loss() -> None:
    p, q = nn.Parameter(vector(1.0, 1.0)), nn.Parameter(vector(1.0))
    losses = [(p * vector(1.0, 0.0)).sum() + 3 * q.sum(), (p * vector(1.0, 1.0)).sum()]
    optimizer_of([p, q], conflict_parameters=[p]).backward(losses)
    assert p.grad.tolist() == [1.0, 0.5] and q.grad.tolist() == [1.5]


def test_it_adds_to_grad_and_steps_as_ever() -> None:
    model = towers()
    before = [p.detach().clone() for p in model.parameters()]
    theirs, rows = expected([batch_of(model)], measured_in(model)), model.rows()
    opt = cheap(model)
    opt.backward(model.losses())
    opt.backward(model.losses())
    assert_rows_equal(grads(model), [2 * g for g in theirs], rows, CLOSE)
    assert list(opt.step(model.losses())) == ["a", "b", "a+b"]  # zero_grad, backward and step
    assert_rows_equal(grads(model), theirs, rows, CLOSE)
    moved = [old - 0.1 * g for old, g in zip(before, theirs, strict=True)]
    assert_rows_equal([p.detach() for p in model.parameters()], moved, rows, CLOSE)


def test_closures_run_once_each_in_their_order() -> None:
    model, calls = towers(), []

    def loss(name: str) -> Tensor:
        calls.append(name)
        return model.losses()[name]

    cheap(model).backward({"a": lambda: loss("a"), "b": lambda: loss("b"), "a+b": None})
    assert calls == ["a", "b"]
    batch = batch_of(model, absent="a+b")
    assert_rows_equal(grads(model), expected([batch], measured_in(model)), model.rows(), CLOSE)


def test_it_composes_with_sampled_combinations() -> None:
    model, sampler = towers(), CombinationSampler(("a", "b"), k=2, seed=1)
    opt, seen = cheap(model), set()
    for seed in range(6):
        names = ["+".join(combination) for combination in sampler()]
        seen.add(tuple(names))
        losses, rows = model.losses(seed), model.rows(seed, names)
        opt.zero_grad()
        assert opt.backward({name: losses[name] for name in names}).names == tuple(names)
        batch = dict(zip(names, rows, strict=True))
        assert_rows_equal(grads(model), expected([batch], measured_in(model)), rows, CLOSE)
    assert len(seen) > 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_complex_parameters_measured_or_not(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in range(2)]
    rows: list[Row] = [[torch.randn(3, dtype=dtype)] * 2 for _ in range(3)]
    optimizer_of(params, conflict_parameters=params[:1]).backward(linear_losses(params, rows))
    assert_rows_equal([params[0].grad], decouple([row[:1] for row in rows]), rows)
    assert torch.equal(params[0].grad, params[1].grad)


def test_grad_scaler_skips_the_step_where_any_loss_overflows() -> None:
    model = towers(torch.float32)
    opt, before = cheap(model), [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, moved in ((float("inf"), 0.0), (1.0, 0.1 * 1e-3)):
        losses = model.losses()
        losses["b"] = losses["b"] * factor
        opt.zero_grad()
        opt.backward({name: scaler.scale(loss) for name, loss in losses.items()})
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == 2.0
        pairs = zip(model.parameters(), before, strict=True)
        step = torch.cat([(p.detach() - old).flatten() for p, old in pairs])
        assert float(step.norm()) == pytest.approx(moved, rel=1e-3)


# --- hooks, other leaves, graphs ------------------------------------------------------------------


def test_hooks_fire_once_and_on_the_measured_parameters_once_per_loss_more() -> None:
    model, fired = towers(), []
    model.a.weight.register_hook(lambda g: fired.append("private"))
    trunk(model)[0].register_hook(lambda g: fired.append("measured"))
    trunk(model)[0].register_post_accumulate_grad_hook(lambda p: fired.append("accumulated"))
    cheap(model).backward(model.losses())
    assert sorted(fired) == ["accumulated", *["measured"] * 4, "private"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_leaves_outside_the_optimizer_get_the_weights_like_everybody(reduction: str) -> None:
    model = towers()
    model.a.weight.grad = torch.full_like(model.a.weight, 5.0)
    opt = optimizer_of(
        model.trunk.parameters(), conflict_parameters=trunk(model), reduction=reduction
    )
    opt.accumulate(model.losses())
    opt.backward(model.losses(1))
    theirs = expected([batch_of(model), batch_of(model, 1)], measured_in(model), reduction)
    theirs[0] = theirs[0] + 5.0
    assert_rows_equal(grads(model), theirs, model.rows(), CLOSE)


def test_losses_may_share_a_graph_or_have_their_own() -> None:
    model, x = towers(), torch.randn(4, 3, dtype=torch.float64)
    hidden = model.a(x)
    shared = [model.trunk(hidden).square().mean(), -model.trunk(hidden).sum()]
    own = [model.trunk(model.a(x)).square().mean(), -model.trunk(model.a(x)).sum()]
    results = []
    for losses in (shared, own):
        opt = cheap(model)
        opt.zero_grad()
        opt.backward(losses)
        results.append([g.clone() for g in grads(model) if g is not None])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


# --- what is refused ------------------------------------------------------------------------------


def test_a_loss_that_reaches_none_of_them_is_named() -> None:
    model = towers()
    opt = cheap(model)
    opt.step(model.losses())
    losses = model.losses()
    losses["b"] = model.b.weight.square().sum()
    snapshot = Snapshot(opt)
    with pytest.raises(ValueError, match=r"loss 2 of 3 \('b'\) reaches none of the conflict_param"):
        opt.backward(losses)
    snapshot.assert_unchanged()


@pytest.mark.filterwarnings("ignore:state_dict")
def test_an_error_in_the_one_backward_leaves_grad_as_it_was() -> None:
    """The rows were taken, and are dropped."""
    model = towers()
    opt = cheap(model)
    opt.step(model.losses())

    def fails(_: Tensor) -> None:
        raise RuntimeError("hook")

    handle = model.a.weight.register_hook(fails)
    opt.accumulate(model.losses(0))  # stops before that parameter
    snapshot = Snapshot(opt)
    with pytest.raises(RuntimeError, match="hook"):
        opt.backward(model.losses(1))
    snapshot.assert_unchanged()
    handle.remove()
    opt.step(model.losses())  # nothing is pending any more


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scope": "all"}, ValueError, "leave scope and row_dtype"),
        ({"row_dtype": torch.bfloat16}, ValueError, "leave scope and row_dtype"),
        ({"conflict_parameters": []}, ValueError, "got none"),
        ({"conflict_parameters": "trunk"}, TypeError, "conflict_parameters must be an iterable"),
        ({"conflict_parameters": torch.ones(2)}, TypeError, "put parameters in a list"),
        ({"conflict_parameters": [3]}, TypeError, "element 0 is a int"),
        ({"conflict_parameters": [torch.ones(2)]}, ValueError, "element 0, of shape"),
    ],
)
def test_options_that_do_not_fit(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    model = towers()
    with pytest.raises(error, match=message):
        optimizer_of(model.parameters(), **{"conflict_parameters": trunk(model), **options})


def test_parameters_that_were_frozen_since() -> None:
    model = towers()
    opt = cheap(model)
    trunk(model)[0].requires_grad_(False)
    opt.backward(model.losses())  # the other one is left
    trunk(model)[1].requires_grad_(False)
    snapshot = Snapshot(opt)
    with pytest.raises(ValueError, match="none of them requires grad"):
        opt.backward(model.losses())
    snapshot.assert_unchanged()


@pytest.mark.parametrize("measured", ["the other", "the table"])
def test_a_sparse_gradient_is_refused(measured: str) -> None:
    table, p = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(2))
    chosen = [p] if measured == "the other" else [table.weight]
    opt = optimizer_of([table.weight, p], conflict_parameters=chosen)
    losses = [(table(torch.tensor([i])) * p).sum() for i in range(2)]
    with pytest.raises(ValueError, match=r"sparse gradient for a parameter of shape \(4, 2\)"):
        opt.backward(losses)
    assert p.grad is None and table.weight.grad is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("option", ["conflict_parameters", "row_dtype"])
def test_copies_keep_the_option(copied: Callable[[Any], Any], option: str) -> None:
    model = towers(torch.float32)
    opt = cheap(model)
    if option == "row_dtype":
        opt = optimizer_of(model.parameters(), row_dtype=torch.bfloat16)
    other_model, other = copied((model, opt))
    assert repr(other) == repr(opt) and option in repr(other)
    opt.step(model.losses())
    other.step(other_model.losses())
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert opt.state_dict().keys() == other.state_dict().keys()


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def test_a_function_of_the_users_makes_nothing_shared() -> None:
    """``reduction="released"`` divides what every loss reaches, and not what one of them does."""
    s, a, b = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    opt = optimizer_of([s, a, b], reduction="released", conflict_parameters=[s])
    opt.backward({"a": _Identity.apply(s + a).sum(), "b": _Identity.apply(s + b).sum()})
    assert [p.grad[0].item() for p in (s, a, b)] == [1.0, 1.0, 1.0]
