"""Micro-batches: what ``accumulate`` keeps, what ``backward`` makes of it, and what drops it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradsplit import ModalityDecoupledOptimizer
from tests.core.cases import REDUCTIONS, assert_rows_equal, optimizer_of, vector
from tests.reference import (
    MicroBatch,
    Row,
    Snapshot,
    decouple,
    decouple_window,
    grads,
    linear_losses,
    mean_rows,
    towers,
)
from tests.strategies import windows


def losses_of(params: list[nn.Parameter], batch: MicroBatch) -> dict[str, Tensor | None]:
    return {
        name: None if row is None else linear_losses(params, [row])[0]
        for name, row in batch.items()
    }


def run(opt: ModalityDecoupledOptimizer, params: list[nn.Parameter], window: list[MicroBatch]):
    for batch in window[:-1]:
        opt.accumulate(losses_of(params, batch))
    return opt.backward(losses_of(params, window[-1]))


@pytest.mark.parametrize("scope", ["shared", "all", "chosen"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(window=windows(), data=st.data())
def test_a_window_equals_the_oracle(
    window: tuple[list[int], list[MicroBatch]], data: st.DataObject, scope: str, reduction: str
) -> None:
    """Losses come, go and reach other parameters; some leaves are not the optimizer's."""
    sizes, batches = window
    params = [nn.Parameter(torch.zeros(size, dtype=torch.float64)) for size in sizes]
    inside = data.draw(st.integers(1, len(params)))
    places = set(range(inside))
    if any({p for p, g in enumerate(row) if g is not None}.isdisjoint(places)
           for batch in batches for row in batch.values() if row is not None):  # fmt: skip
        inside, places = len(params), set(range(len(params)))
    rows = [row for batch in batches for row in batch.values() if row is not None]
    where: Any = scope
    if scope == "chosen":
        places = set(data.draw(st.lists(st.integers(0, inside - 1), min_size=1, unique=True)))
        where = [params[p] for p in places]
    elif scope == "shared":
        places = {p for p in places if all(row[p] is not None for row in rows)}
    opt = optimizer_of(params[:inside], scope=where, reduction=reduction)
    report = run(opt, params, batches)
    expected = decouple_window(batches, scope=places, reduction=reduction)
    assert_rows_equal([p.grad for p in params], expected, rows)
    assert list(report.names) == list(mean_rows(batches))
    unavailable = {name for batch in batches for name in batch} - set(report.names)
    assert set(report.unavailable) == unavailable


def test_three_micro_batches_are_one_batch_of_three_times_the_size() -> None:
    """Nobody divides; and ``.grad`` is added to at the end, not before."""
    model, whole = towers(), towers()
    opt = optimizer_of(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for seed in range(3):
        assert all((g == 1).all() for g in grads(model))
        (opt.backward if seed == 2 else opt.accumulate)(model.losses(seed))
    parts = [whole.losses(seed) for seed in range(3)]
    optimizer_of(whole.parameters()).backward(
        {name: sum(part[name] for part in parts) / 3 for name in parts[0]}
    )
    assert_rows_equal(grads(model), [g + 1 for g in grads(whole)], model.rows())


def test_a_loss_missing_in_one_of_two_micro_batches_gets_its_own_mean() -> None:
    """Not half of it: in the shared part, in its private part, and in the report."""
    shared, audio = nn.Parameter(vector(0, 0)), nn.Parameter(vector(0))
    opt = optimizer_of([shared, audio], reduction="sum")
    opt.accumulate({"text": shared[0] + 1, "audio": None})
    report = opt.backward({"text": 3 * shared[0] + 5, "audio": shared[1] + 8 * audio.sum() + 2})
    assert shared.grad.tolist() == [2.0, 1.0] and audio.grad.tolist() == [8.0]
    assert report.losses.tolist() == [3.0, 2.0]
    assert report.gramian.tolist() == [[4.0, 0.0], [0.0, 1.0]] and report.unavailable == ()


def test_what_one_backward_misses_is_private_in_that_window() -> None:
    """Though every loss reaches q somewhere: the conflict of their q's is left alone."""
    p, q = nn.Parameter(vector(0)), nn.Parameter(vector(0))
    opt = optimizer_of([p, q], reduction="released")
    one, minus = vector(1), vector(-1)
    opt.accumulate(linear_losses([p, q], [[one, one], [one, 2 * minus]]))
    report = opt.backward(linear_losses([p, q], [[one, 4 * one], [one, None]]))
    assert report.conflicts() == []
    assert p.grad.tolist() == [1.0] and q.grad.tolist() == [1.5]  # (1 + 4) / 2 - 2 / 2


@pytest.mark.parametrize("scope", ["shared", "all"])
def test_a_parameter_that_joins_within_a_window(scope: str) -> None:
    """Before it joins it is a leaf outside; none of its gradients is lost."""
    p, q = nn.Parameter(vector(0)), nn.Parameter(vector(0))
    opt = optimizer_of([p], scope=scope, reduction="sum")
    rows: list[Row] = [[vector(1), vector(2)], [vector(1), vector(3)]]
    opt.accumulate(linear_losses([p, q], rows))
    opt.add_param_group({"params": [q]})
    opt.backward(linear_losses([p, q], rows))
    assert p.grad.tolist() == [2.0] and q.grad.tolist() == [5.0]


@pytest.mark.parametrize("gradient", [None, 7.0])
@pytest.mark.parametrize("scope", ["shared", "all"])
def test_a_parameter_frozen_within_a_window_is_left_alone(
    gradient: float | None, scope: str
) -> None:
    """Its ``.grad`` is the user's again, whatever earlier rows held."""
    a, b = (nn.Parameter(vector(1, 1)) for _ in range(2))
    opt = optimizer_of([a, b], reduction="sum", scope=scope)
    opt.accumulate({"x": (a * b).sum(), "y": (2 * a * b).sum()})
    b.requires_grad_(False)
    b.grad = None if gradient is None else torch.full_like(b, gradient)
    opt.backward({"x": (3 * a * b).sum(), "y": None})
    assert a.grad.tolist() == [4.0, 4.0]  # (1 + 3) / 2 and 2
    assert (b.grad is None) if gradient is None else (b.grad.tolist() == [7.0, 7.0])


# --- what belongs to a window, and what ends it ---------------------------------------------------


def test_zero_grad_drops_pending_rows_and_a_merge_uses_them_up() -> None:
    p = nn.Parameter(torch.zeros(1))
    opt = optimizer_of([p], reduction="sum")
    opt.accumulate([(p * 100).sum()])
    opt.zero_grad()
    opt.step()  # nothing is pending
    opt.accumulate([(p * 1).sum()])
    opt.backward([(p * 3).sum()])
    assert p.grad.tolist() == [2.0]
    opt.backward([(p * 3).sum()])
    assert p.grad.tolist() == [5.0]


def test_only_merges_count() -> None:
    """The counter that pcgrad's order is drawn from."""
    p = nn.Parameter(torch.zeros(1))
    opt = optimizer_of([p], rule="pcgrad", seed=7)
    counted: list[int] = []
    for call in (opt.step, lambda: opt.accumulate([p.sum()]), lambda: opt.backward([p.sum()]),
                 lambda: opt.joint([p.sum()]).backward(), lambda: opt.step([p.sum()])):  # fmt: skip
        call()
        group = opt.param_groups[0]
        assert group["gradsplit_seed"] == 7
        counted.append(group["gradsplit_merges"])
    assert counted == [0, 0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:state_dict")
@pytest.mark.parametrize("call", ["accumulate", "backward"])
@pytest.mark.parametrize("keyed", [False, True])
def test_a_window_is_named_or_numbered(call: str, keyed: bool) -> None:
    """A sequence after a mapping is refused, and a mapping after a sequence; rows stay."""
    p = nn.Parameter(vector(0))
    opt = optimizer_of([p], reduction="sum")
    kinds = [lambda x: [x], lambda x: {"0": x}]
    opt.accumulate(kinds[keyed]((p * 2).sum()))
    snapshot = Snapshot(opt)
    with pytest.raises(ValueError, match="a sequence.*a mapping" if keyed else "a mapping.*a seq"):
        getattr(opt, call)(kinds[not keyed](p.sum()))
    snapshot.assert_unchanged()
    opt.backward(kinds[keyed]((p * 4).sum()))
    assert p.grad.tolist() == [3.0]
    opt.backward(kinds[not keyed](p.sum()))  # a new window


@pytest.mark.parametrize("call", ["accumulate", "backward"])
@pytest.mark.parametrize("absent", [None, lambda: None])
def test_a_micro_batch_with_everything_unavailable(call: str, absent: object) -> None:
    """An error while nothing is pending, and nothing to be added to what is pending."""
    p = nn.Parameter(vector(0))
    opt = optimizer_of([p])
    with pytest.raises(ValueError, match=r"all are unavailable \(None\): 'x', 'y'"):
        getattr(opt, call)({"x": absent, "y": absent})
    opt.step()  # and nothing is
    opt.accumulate({"x": (p * 4).sum(), "z": None})
    getattr(opt, call)({"x": absent, "y": absent})
    report = opt.backward({"x": None}) if call == "accumulate" else opt.last
    assert p.grad.tolist() == [4.0]
    assert report.names == ("x",) and sorted(report.unavailable) == ["y", "z"]


def failing() -> Tensor:
    raise RuntimeError("no data")


MODES = ["exact", "rounded", "measured"]


def in_mode(mode: str, params: list[nn.Parameter]) -> dict[str, object]:
    """All is shared and measured: all modes agree, up to rounding."""
    options: dict[str, dict[str, object]] = {
        "exact": {},
        "rounded": {"row_dtype": torch.bfloat16},
        "measured": {"conflict_parameters": params},
    }
    return options[mode]


@pytest.mark.filterwarnings("ignore:state_dict")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", ["accumulate", "backward"])
@pytest.mark.parametrize("fault", ["first closure", "later closure", "hook", "rule", "loss"])
@pytest.mark.parametrize("pending", [False, True])
def test_an_error_keeps_or_drops_pending_rows(
    mode: str, call: str, fault: str, pending: bool
) -> None:
    """Before the first backward they stay; later they go, and a note says so. ``.grad`` stays."""
    p = nn.Parameter(vector(1, 1))
    broken: list[str] = []

    def rule(gramian: Tensor) -> Tensor:
        return gramian.new_ones(len(gramian) + len(broken))

    def hook(_: Tensor) -> None:
        if broken == ["hook"]:
            raise RuntimeError("no data")

    p.register_hook(hook)
    opt = optimizer_of([p], rule=rule, reduction="sum", **in_mode(mode, [p]))
    opt.step([p.sum()])
    p.grad = held = vector(5, 5)
    if pending:
        opt.accumulate({"x": 4 * p[0], "y": p[1]})
    before: Any = {"x": p.sum()}
    losses: dict[str, Callable[[], Any]] = {
        "first closure": lambda: {"x": failing, **before},
        "later closure": lambda: {**before, "y": failing},
        "hook": lambda: before,
        "rule": lambda: before,
        "loss": lambda: {**before, "y": p},
    }
    snapshot = Snapshot(opt)
    given = {"x": failing, "y": p.sum()} if fault == "first closure" else losses[fault]()
    if fault in ("hook", "rule"):
        broken.append(fault)
    if fault == "rule" and (call == "accumulate" or not pending):
        return  # no rule is asked
    with pytest.raises((RuntimeError, ValueError)) as raised:
        getattr(opt, call)(given)
    snapshot.assert_unchanged()
    broken.clear()
    kept = pending and fault in ("first closure", "loss", "hook")
    if sys.version_info >= (3, 11):
        notes = " ".join(getattr(raised.value, "__notes__", []))
        assert ("dropped" in notes) == (pending and not kept)
    opt.backward({"x": 2 * p[0], "y": p[1]})
    assert p.grad is held and held.tolist() == [8.0 if kept else 7.0, 6.0]


@pytest.mark.filterwarnings("ignore:state_dict")
def test_step_refuses_pending_rows_before_anything_changes() -> None:
    """Also step(closure), once the closure has run: it may merge them itself."""
    p = nn.Parameter(vector(1.0))
    opt = optimizer_of([p])
    opt.accumulate([p.sum()])
    snapshot = Snapshot(opt)
    for argument in ((), (lambda: None,), ([p.sum()],)):
        with pytest.raises(RuntimeError, match="pending rows"):
            opt.step(*argument)
    snapshot.assert_unchanged()
    opt.step(lambda: opt.backward([p.sum()]) and None)
    assert p.tolist() == pytest.approx([0.9])


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_takes_the_mean_where_all_is_shared(mode: str) -> None:
    model, rows = towers(), towers().rows()
    params = list(model.trunk.parameters())
    for module in (model.a, model.b):
        module.requires_grad_(False)
    opt = optimizer_of(params, **in_mode(mode, params))
    batches: list[MicroBatch] = []
    for seed in range(3):
        losses = model.losses(seed)
        batch = dict(zip(losses, [row[4:] for row in model_rows(model, seed)], strict=True))
        if seed == 1:
            losses["b"] = batch["b"] = None
        batches.append(batch)
        (opt.backward if seed == 2 else opt.accumulate)(losses)
    expected = decouple_window(batches)
    within = 2.0**-7 if mode == "rounded" else 1e-12
    assert_rows_equal([p.grad for p in params], expected, rows, within)
    assert opt.last.losses.tolist() == pytest.approx(mean_losses(model), rel=1e-12)


def model_rows(model: nn.Module, seed: int) -> list[Row]:
    free = towers()
    free.load_state_dict(model.state_dict())
    return free.rows(seed)


def mean_losses(model: nn.Module) -> list[float]:
    """Of three micro-batches, the second without b."""
    seen = [
        {name: float(loss.detach()) for name, loss in model.losses(s).items()} for s in range(3)
    ]
    return [
        sum(batch[name] for batch in chosen) / len(chosen)
        for name, chosen in (("a", seen), ("b", seen[::2]), ("a+b", seen))
    ]


def test_a_window_after_another_starts_afresh() -> None:
    """What the first window's losses reached says nothing about the second's."""
    p, q = nn.Parameter(vector(0, 0)), nn.Parameter(vector(0, 0))
    opt = optimizer_of([p, q])
    first: list[Row] = [[vector(1, 0), None], [vector(0, 1), vector(1, 1)]]
    rows: list[Row] = [[vector(1, 0), vector(-1, 2)], [vector(-1, 1), vector(3, 3)]]
    for window in (first, rows):
        opt.zero_grad()
        opt.accumulate(linear_losses([p, q], window))
        opt.backward(linear_losses([p, q], window))
    assert_rows_equal([p.grad, q.grad], decouple(rows), rows)


class _Lent(torch.autograd.Function):
    """Hands its gradient out from a tensor of somebody else."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, lent: Tensor) -> Tensor:
        ctx.lent = lent
        return p.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.lent, None


@pytest.mark.parametrize("size", [3, 1024])
def test_gradients_are_copied_whatever_they_are_part_of(size: int) -> None:
    """A parameter whose gradient fills a row, or does not, in a block of its own."""
    p = nn.Parameter(torch.zeros(size))
    lent = torch.ones(2, size)
    opt = optimizer_of([p])
    for _ in range(2):
        opt.accumulate({"a": _Lent.apply(p, lent[1])})
    opt.backward({"a": _Lent.apply(p, lent[1])})
    torch.testing.assert_close(p.grad, torch.ones(size))
    assert (lent == 1).all()


def test_the_mean_of_half_precision_rows_does_not_overflow() -> None:
    """Nobody may divide: four times 30000 is not a float16, their mean is."""
    p, q = (nn.Parameter(torch.zeros(2, dtype=torch.float16)) for _ in range(2))
    opt = optimizer_of([p, q])
    for _ in range(3):
        opt.accumulate({"a": (p * 30000).sum(), "b": ((p + q) * 30000).sum()})
    report = opt.backward({"a": (p * 30000 + 20000).sum(), "b": ((p + q) * 30000 + 20000).sum()})
    assert report.losses.isfinite().all()
    assert p.grad.tolist() == [30000.0] * 2 and q.grad.tolist() == [15000.0] * 2


def test_a_combination_keeps_its_order_over_a_window() -> None:
    p = nn.Parameter(torch.zeros(1))
    opt = optimizer_of([p])
    opt.accumulate({("t", "a"): p.sum()})
    with pytest.raises(ValueError, match=r"'t\+a' and 'a\+t'"):
        opt.backward({("a", "t"): p.sum()})
    assert opt.backward({("t", "a"): p.sum()}).names == ("t+a",)


def test_names_of_a_call_that_failed_are_forgotten() -> None:
    p = nn.Parameter(torch.zeros(1))
    opt = optimizer_of([p])
    opt.accumulate({"a": p.sum()})
    with pytest.raises(ValueError, match="requires no grad"):
        opt.backward({"c": None, "a": torch.ones(())})
    opt.zero_grad()
    opt.accumulate({"a": p.sum()})
    assert opt.backward({"a": p.sum()}).unavailable == ()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take no notes")
def test_a_weighted_backward_that_fails_drops_the_window_and_says_so() -> None:
    """Its graphs are used up, even where the last micro-batch had nothing to add."""
    p = nn.Parameter(torch.ones(2))
    opt = optimizer_of([p], conflict_parameters=[p])
    loss = (p * p).sum()
    opt.accumulate({"a": loss})
    loss.backward()  # the user's own, which frees the graph
    p.grad = None
    with pytest.raises(RuntimeError, match="second time") as caught:
        opt.backward({"a": None})
    assert any("dropped" in note for note in caught.value.__notes__)
    assert p.grad is None
    opt.backward({"a": (3 * p).sum()})
    assert p.grad.tolist() == [3.0, 3.0]


def test_what_is_no_losses_at_all_is_not_taken_for_a_sequence() -> None:
    p = nn.Parameter(torch.zeros(2))
    opt = optimizer_of([p])
    opt.accumulate({"a": p.sum()})
    with pytest.raises(TypeError, match="losses must be a mapping"):
        opt.backward(p.sum())
