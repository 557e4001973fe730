"""Any calls in any order, against plain torch that is given the oracle's gradients.

The model is a window of micro-batches and a plain ``torch.optim.SGD``, which is given what
``tests.reference`` says a merge adds to ``.grad``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

from gradsplit import Decoupling, ModalityDecoupledOptimizer
from tests.core.cases import REDUCTIONS
from tests.reference import MicroBatch, Row, decouple_window, gmd_loop, linear_losses, mean_rows

SIZES = (2, 1, 3, 2, 1, 2)
MEMBERS, OUTSIDE = 3, 3  # parameters of the optimizer at the start; the leaf that never is one
BATCHES = ["abc", "ab", "ba", "a", "b", "c"]  # which losses a micro-batch has
GRADIENTS = [
    (0.0, 0.0, 0.0),
    (1.0, -2.0, 0.5),
    (-1.0, 2.0, 3.0),
    (-2.0, 0.0, -1.0),
    (3.0, 1.0, 1.0),
]
MERGES = {"gmd": gmd_loop, "sum": lambda jacobian: jacobian.sum(0)}


class Failed(Exception):
    """What a failing closure raises."""


def failing() -> Tensor:
    raise Failed


class Training(RuleBasedStateMachine):
    """One optimizer, its parameters, one leaf outside, and what should have become of them."""

    @initialize(
        scope=st.sampled_from(["shared", "all", [0], [1, 2]]),
        reduction=st.sampled_from(REDUCTIONS),
        method=st.sampled_from(sorted(MERGES)),
    )
    def start(self, scope: str | list[int], reduction: str, method: str) -> None:
        self.scope, self.reduction, self.method = scope, reduction, method
        self.leaves, self.plain = (
            [nn.Parameter(torch.ones(size, dtype=torch.float64)) for size in SIZES] for _ in "12"
        )
        self.groups: list[list[int]] = [list(range(MEMBERS))]
        self.opt = ModalityDecoupledOptimizer(self.base_of(self.leaves), **self.options())
        self.expected = self.base_of(self.plain)
        self.forget()

    def base_of(self, leaves: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": [leaves[p] for p in group]} for group in self.groups]
        return torch.optim.SGD(groups, lr=0.125, momentum=0.5)

    def members(self) -> list[int]:
        return [p for group in self.groups for p in group]

    def options(self) -> dict[str, Any]:
        scope: Any = self.scope
        if not isinstance(scope, str):
            scope = [self.leaves[p] for p in scope]
        return {"scope": scope, "reduction": self.reduction, "rule": self.method}

    def forget(self) -> None:
        """Nothing is pending."""
        self.window: list[MicroBatch] = []
        self.values: dict[str, list[float]] = {}

    # -- losses --------------------------------------------------------------------------------

    def draw_row(self, data: st.DataObject) -> Row | None:
        """Gradients of one loss, which reaches some trainable parameter of the optimizer."""
        inside = [p for p in self.members() if self.leaves[p].requires_grad]
        if not inside:
            return None
        surely = data.draw(st.sampled_from(inside))
        row: Row = [None] * len(SIZES)
        for p in [*inside, OUTSIDE]:
            choices = GRADIENTS if p == surely else [None, *GRADIENTS]
            values = data.draw(st.sampled_from(choices))
            if values is not None:
                row[p] = torch.tensor(values[: SIZES[p]], dtype=torch.float64)
        return row

    def draw_batch(self, data: st.DataObject) -> dict[str, Row | None]:
        names = data.draw(st.sampled_from(BATCHES))
        unavailable = [data.draw(st.integers(0, 4)) == 0 for _ in names]
        pairs = zip(names, unavailable, strict=True)
        return {name: None if gone else self.draw_row(data) for name, gone in pairs}

    def values_of(self, batch: MicroBatch) -> dict[str, float]:
        """Of the losses that are available."""
        return {
            name: sum(
                float((p.detach() * g).sum())
                for p, g in zip(self.leaves, row, strict=True)
                if g is not None
            )
            for name, row in batch.items()
            if row is not None
        }

    def tensors_of(self, batch: MicroBatch) -> dict[str, Tensor | None]:
        return {
            name: None if row is None else linear_losses(self.leaves, [row])[0]
            for name, row in batch.items()
        }

    def entries_of(self, batch: MicroBatch, data: st.DataObject) -> dict[str, Any]:
        """Tensors or closures."""
        if data.draw(st.booleans()):
            return self.tensors_of(batch)
        return {
            name: functools.partial(lambda n, row: self.tensors_of({n: row})[n], name, row)
            for name, row in batch.items()
        }

    # -- what merges and what accumulates ------------------------------------------------------

    def take(self, batch: MicroBatch, values: dict[str, float]) -> None:
        self.window.append(batch)
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def merge(self, batch: MicroBatch, values: dict[str, float]) -> None:
        """The window and this batch go into the plain ``.grad``, and the report says so."""
        self.take(batch, values)
        rows = [row for seen in self.window for row in seen.values() if row is not None]
        scope = self.members()
        if self.scope == "shared":
            scope = [p for p in scope if all(row[p] is not None for row in rows)]
        elif self.scope != "all":
            scope = list(self.scope)
        merged = decouple_window(self.window, MERGES[self.method], scope, self.reduction)
        for leaf, plain, gradient in zip(self.leaves, self.plain, merged, strict=True):
            if gradient is not None and leaf.requires_grad:
                plain.grad = gradient if plain.grad is None else plain.grad + gradient
        self.check_report(self.opt.last)
        self.forget()

    def check_report(self, report: Decoupling) -> None:
        names = list(mean_rows(self.window))
        assert list(report.names) == names
        absent = {name for batch in self.window for name in batch} - set(names)
        assert set(report.unavailable) == absent
        means = [sum(self.values[name]) / len(self.values[name]) for name in names]
        assert report.losses.tolist() == pytest.approx(means, rel=1e-9, abs=1e-9)

    @rule(data=st.data())
    def another_micro_batch(self, data: st.DataObject) -> None:
        self.accumulate(data)

    def accumulate(self, data: st.DataObject) -> None:
        batch = self.draw_batch(data)
        values = self.values_of(batch)
        with self.an_error_if_there_is_nothing(batch):
            self.opt.accumulate(self.entries_of(batch, data))
            self.take(batch, values)

    @rule(data=st.data(), earlier=st.integers(0, 2))
    def backward(self, data: st.DataObject, earlier: int) -> None:
        for _ in range(earlier):
            self.accumulate(data)
        batch = self.draw_batch(data)
        values = self.values_of(batch)
        with self.an_error_if_there_is_nothing(batch):
            assert self.opt.backward(self.entries_of(batch, data)) is self.opt.last
            self.merge(batch, values)

    def an_error_if_there_is_nothing(
        self, batch: MicroBatch
    ) -> contextlib.AbstractContextManager[object]:
        if not self.window and all(row is None for row in batch.values()):
            return pytest.raises(ValueError, match="unavailable")
        return contextlib.nullcontext()

    @rule(data=st.data(), factor=st.sampled_from([0.25, 1.0, 64.0]))
    def joint(self, data: st.DataObject, factor: float) -> None:
        batch = self.draw_batch(data)
        values = self.values_of(batch)
        if not values:
            return
        loss = self.opt.joint(self.tensors_of(batch))
        total = sum(values.values()) / (1 if self.reduction == "sum" else len(values))
        assert float(loss.detach()) == pytest.approx(total, rel=1e-9, abs=1e-9)
        (loss * factor).backward()
        scaled = {
            name: row if row is None else [g if g is None else g * factor for g in row]
            for name, row in batch.items()
        }
        self.merge(scaled, {name: value * factor for name, value in values.items()})

    @rule(data=st.data(), with_losses=st.booleans())
    def step(self, data: st.DataObject, with_losses: bool) -> None:
        batch = self.draw_batch(data) if with_losses else {}
        entries, values = self.entries_of(batch, data), self.values_of(batch)
        if self.window:
            with pytest.raises(RuntimeError, match="pending"):
                self.opt.step(entries if with_losses else None)
        elif not with_losses:
            self.opt.step()
            self.expected.step()
        else:
            with self.an_error_if_there_is_nothing(batch):
                losses = self.opt.step(entries)
                assert list(losses) == list(batch)
                there = {name: float(loss) for name, loss in losses.items() if loss is not None}
                assert there == pytest.approx(values, rel=1e-9, abs=1e-9)
                self.expected.zero_grad()
                self.merge(batch, values)
                self.expected.step()

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        self.opt.zero_grad(set_to_none)
        self.expected.zero_grad(set_to_none)
        self.forget()

    # -- what goes wrong -----------------------------------------------------------------------

    @rule(
        data=st.data(),
        pending=st.booleans(),
        call=st.sampled_from(["accumulate", "backward", "step"]),
    )
    def a_closure_fails(self, data: st.DataObject, pending: bool, call: str) -> None:
        """Before the first backward of the call pending rows stay, later they are dropped."""
        if pending:
            self.accumulate(data)
        batch = self.draw_batch(data)
        entries = {**self.entries_of(batch, data), "failing": failing}
        if self.window and call == "step":
            with pytest.raises(RuntimeError, match="pending"):
                self.opt.step(entries)
            return
        with pytest.raises(Failed) as raised:
            getattr(self.opt, call)(entries)
        drops = bool(self.window) and any(row is not None for row in batch.values())
        if sys.version_info >= (3, 11):
            assert any("dropped" in note for note in raised.value.__notes__) == drops
        if drops:
            self.forget()

    @rule(data=st.data(), call=st.sampled_from(["accumulate", "backward", "joint"]))
    def losses_are_refused(self, data: st.DataObject, call: str) -> None:
        """Found before any backward: nothing happens."""
        row = self.draw_row(data)
        if row is None:
            return
        good, bad = linear_losses(self.leaves, [row])[0], torch.ones(2, requires_grad=True)
        with pytest.raises(ValueError, match="scalar"):
            getattr(self.opt, call)({"a": good, "b": bad})
        if self.window and call != "joint":
            with pytest.raises(ValueError, match="a sequence"):
                getattr(self.opt, call)([good])

    # -- parameters come and go ----------------------------------------------------------------

    @rule(place=st.integers(0, MEMBERS - 1))
    def freeze_or_unfreeze(self, place: int) -> None:
        self.leaves[place].requires_grad_(not self.leaves[place].requires_grad)

    @precondition(lambda self: len(self.groups) < 3)
    @rule()
    def add_param_group(self) -> None:
        """Of a parameter that no loss has reached before."""
        new = OUTSIDE + len(self.groups)
        self.groups.append([new])
        self.opt.add_param_group({"params": [self.leaves[new]], "lr": 0.25})
        self.expected.add_param_group({"params": [self.plain[new]], "lr": 0.25})

    # -- copies and checkpoints ----------------------------------------------------------------

    def a_warning_if_rows_are_pending(self) -> contextlib.AbstractContextManager[object]:
        if self.window:
            return pytest.warns(UserWarning, match="pending rows")
        return contextlib.nullcontext()

    @rule(
        data=st.data(),
        pending=st.booleans(),
        copied=st.sampled_from([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]),
    )
    def go_on_with_a_copy(
        self, data: st.DataObject, pending: bool, copied: Callable[[Any], Any]
    ) -> None:
        """It has everything but the pending rows (and ``.grad``, which torch does not copy)."""
        if pending:
            self.accumulate(data)
        kept = [None if p.grad is None else p.grad.clone() for p in self.leaves]
        with self.a_warning_if_rows_are_pending():
            self.opt, self.leaves = copied((self.opt, self.leaves))
        for p, gradient in zip(self.leaves, kept, strict=True):
            p.grad = gradient
        self.forget()

    @rule(data=st.data(), pending=st.booleans(), fresh=st.booleans())
    def resume_from_a_checkpoint(self, data: st.DataObject, pending: bool, fresh: bool) -> None:
        """Into this optimizer or a new one; pending rows are not part of it, and loading drops."""
        if pending:
            self.accumulate(data)
        buffer = io.BytesIO()
        with self.a_warning_if_rows_are_pending():
            torch.save(self.opt.state_dict(), buffer)
        buffer.seek(0)
        if fresh:
            self.opt = ModalityDecoupledOptimizer(self.base_of(self.leaves), **self.options())
        self.opt.load_state_dict(torch.load(buffer))
        self.forget()

    # -- what holds at all times ---------------------------------------------------------------

    @invariant()
    def parameters_and_grads_are_those_of_plain_torch(self) -> None:
        for place, (ours, plain) in enumerate(zip(self.leaves, self.plain, strict=True)):
            torch.testing.assert_close(ours.detach(), plain.detach(), rtol=1e-9, atol=1e-9)
            assert (ours.grad is None) == (plain.grad is None), f"leaf {place}: {ours.grad}"
            if ours.grad is not None:
                torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:two steps and nothing")
def test_any_history_is_that_of_plain_torch_on_the_oracle() -> None:
    run_state_machine_as_test(
        Training, settings=settings(stateful_step_count=30, report_multiple_bugs=False)
    )
