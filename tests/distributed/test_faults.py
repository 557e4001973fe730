"""What goes wrong on one rank is an error on every rank, within seconds, and spoils nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed.cases import Case, Outcome, alone, error_of, report_of, start, whole
from tests.reference import Snapshot, grads, same

Losses = dict[str, Any]


class Mishap(Exception):
    """Of the user's."""


def mishap() -> Tensor:
    raise Mishap("no data")


BROKEN: list[bool] = []


def fragile(gramian: Tensor) -> Tensor:
    """A rule that fails on one rank."""
    return mishap() if BROKEN else torch.ones_like(gramian[0])


def other(gramian: Tensor) -> Tensor:
    return torch.ones_like(gramian[0])


def rename(losses: Losses) -> Losses:
    return {name.replace("b", "c"): loss for name, loss in losses.items()}


@dataclass(frozen=True)
class Fault:
    """What the odd rank does otherwise than all others, and the words that tell of it."""

    words: tuple[str, ...] = ()
    change: Callable[[Losses], Any] = lambda losses: losses
    options: Mapping[str, Any] = field(default_factory=dict)  # of the odd rank; "only": parameters
    common: Mapping[str, Any] = field(default_factory=dict)  # of all
    spoil: Callable[[nn.Module], Callable[[], object]] | None = None  # returns how to undo it
    call: str = "backward"
    own: str = "RuntimeError"  # the odd rank's own error; of a mismatch: as everywhere
    given: tuple[str, ...] = ("one forward", "closures")


def freeze(net: nn.Module) -> Callable[[], object]:
    net.a.requires_grad_(False)
    return lambda: net.a.requires_grad_(True)


def break_rule(net: nn.Module) -> Callable[[], object]:
    BROKEN.append(True)
    return BROKEN.clear


def break_second_backward(net: nn.Module) -> Callable[[], object]:
    calls: list[Tensor] = []

    def hook(gradient: Tensor) -> None:
        calls.append(gradient)
        if len(calls) == 2:
            mishap()

    return net.trunk[1].weight.register_hook(hook).remove


NOT_SCALAR = torch.ones(3, requires_grad=True)
MISMATCHES = {
    "order": Fault(("a+b",), lambda losses: dict(reversed(losses.items()))),
    "names": Fault(("'b'", "'c'"), rename),
    "fewer": Fault(("a+b",), lambda losses: {name: losses[name] for name in ("a", "b")}),
    "sequence": Fault(("a+b",), lambda losses: list(losses.values())),
    "call": Fault(("accumulate", "backward"), call="accumulate"),
    "reduction": Fault(("sum", "mean"), options={"reduction": "sum"}),
    "rule": Fault(("pcgrad", "gmd"), options={"rule": "pcgrad"}),
    "a rule of the user's": Fault(("other", "gmd"), options={"rule": other}),
    "scope": Fault(("all", "shared"), options={"scope": "all"}),
    "parameters in scope": Fault(("scope",), options={"scope": "trunk"}),
    "seed": Fault(("seed",), options={"seed": 1}, common={"rule": "pcgrad"}),
    "row_dtype": Fault(("bfloat16",), options={"row_dtype": torch.bfloat16}),
    "conflict_parameters": Fault(
        ("conflict_parameters",), options={"conflict_parameters": "trunk"}
    ),
    "parameters": Fault(options={"only": "trunk"}),
    "frozen": Fault(spoil=freeze),
    "frozen outside the optimizer": Fault(spoil=freeze, common={"only": "trunk"}),
}
ERRORS = {
    "a loss": Fault(("scalar",), lambda losses: losses | {"b": NOT_SCALAR}, own="ValueError"),
    "a loss in joint": Fault(
        ("scalar",), lambda losses: losses | {"b": NOT_SCALAR}, own="ValueError", call="joint"
    ),
    "no losses": Fault(("empty",), lambda losses: {}, own="ValueError"),
    "no mapping": Fault(("mapping",), lambda losses: 3, own="TypeError"),
    "a leaf elsewhere": Fault(
        ("'b'",), lambda losses: losses | {"b": NOT_SCALAR.sum()}, own="ValueError"
    ),
    "a first closure": Fault(
        ("no data",), lambda losses: losses | {"a": mishap}, own="Mishap", given=("closures",)
    ),
    "a last closure": Fault(
        ("no data",), lambda losses: losses | {"a+b": mishap}, own="Mishap", given=("closures",)
    ),
    "what a closure returns": Fault(
        ("scalar",),
        lambda losses: losses | {"b": lambda: NOT_SCALAR},
        own="ValueError",
        given=("closures",),
    ),
    "a rule": Fault(
        ("no data",),
        spoil=break_rule,
        common={"rule": fragile},
        own="Mishap",
        given=("closures",),
    ),
    "a hook": Fault(("no data",), spoil=break_second_backward, own="Mishap"),
}
FAULTS = MISMATCHES | ERRORS


@dataclass
class Suffered:
    error: str
    seconds: float
    gradients: list[Tensor | None]  # of a backward at once after the error
    parameters: list[Tensor]  # after one good step


def suffer(name: str, given: str, how: str, pending: bool) -> Suffered:
    """The last rank does something else in the second step."""
    net, good, case, rank, world = start(Case(how=how, given=given))
    good.step(case.losses(net, 0, 0, rank, world))
    fault, odd, inner = FAULTS[name], rank == world - 1, getattr(net, "module", net)
    options = {**fault.common, **(fault.options if odd else {})}
    only = options.pop("only", None)
    told = {"module": net} if how == "ddp" else {"process_group": dist.group.WORLD}
    faulty = replace(case, options=options).optimizer(inner.trunk if only else inner, **told)
    if pending:
        faulty.accumulate(case.losses(net, 0, 1, rank, world))
    losses = case.losses(net, 0, 2, rank, world)
    undo = fault.spoil(inner) if fault.spoil and odd else lambda: None
    before, began = Snapshot(good), time.monotonic()
    call = getattr(faulty, fault.call if odd else "backward")
    error = error_of(lambda: call(fault.change(losses) if odd else losses))
    seconds = time.monotonic() - began
    before.assert_unchanged()
    undo()
    if name in ERRORS:
        faulty.backward(case.losses(net, 0, 3, rank, world))
    gradients = grads(inner)
    good.step(case.losses(net, 1, 0, rank, world))
    return Suffered(error, seconds, gradients, [whole(p) for p in net.parameters()])


SITUATIONS = [
    *((name, given, "ddp", False) for name, fault in FAULTS.items() for given in fault.given),
    *(
        (name, fault.given[0], "ddp", True)
        for name, fault in FAULTS.items()
        if not fault.options and not fault.common and name != "sequence"  # an error on one rank
    ),
    *((name, "closures", "group", False) for name in ("names", "a last closure", "a hook")),
]


@pytest.mark.parametrize(("name", "given", "how", "pending"), SITUATIONS)
def test_a_fault_on_one_rank_is_told_on_all(
    ranks, name: str, given: str, how: str, pending: bool
) -> None:
    """``.grad`` and the parameters are as before, and training goes on; equal on all ranks.

    Rows that were pending are kept everywhere or dropped everywhere.
    """
    fault, world = FAULTS[name], 4 if name in ("fewer", "a last closure") else 2
    outcomes: list[Suffered] = ranks(world).run(suffer, name, given, how, pending)
    *others, odd = outcomes
    assert fault.own in odd.error.partition(":")[0]
    for outcome in outcomes:
        assert outcome.seconds < 10
        assert all(word in outcome.error for word in fault.words), outcome.error
        assert same(outcome.gradients, odd.gradients)
        assert same(outcome.parameters, odd.parameters)
    for outcome in others if name in ERRORS else outcomes:
        assert "RuntimeError" in outcome.error.partition(":")[0]
        assert re.search(rf"ranks? [\d, and]*{world - 1}", outcome.error), outcome.error
    expected: Outcome = alone(Case(steps=2), world)
    for ours, theirs in zip(odd.parameters, expected.parameters, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-12)


def nothing_available(given: str, call: str) -> tuple[str, str]:
    net, opt, case, rank, world = start(Case(given=given))
    nothing = (lambda: None) if given == "closures" else None
    before = Snapshot(opt)
    error = error_of(lambda: getattr(opt, call)({"a": nothing, "b": nothing}))
    before.assert_unchanged()
    return error, error_of(lambda: opt.step(case.losses(net, 0, 0, rank, world)))


@pytest.mark.parametrize("call", ["backward", "accumulate", "step"])
@pytest.mark.parametrize("given", ["one forward", "closures"])
def test_what_no_rank_has_is_an_error(ranks, given: str, call: str) -> None:
    for error, afterwards in ranks(2).run(nothing_available, given, call):
        assert "ValueError" in error and "unavailable" in error
        assert not afterwards


def nothing_in_this_micro_batch() -> Any:
    """Though there are rows pending, which is no error."""
    net, opt, case, rank, world = start(Case())
    opt.accumulate(case.losses(net, 0, 0, rank, world))
    opt.backward(dict.fromkeys(("a", "b", "a+b")))
    return report_of(opt)


def test_an_empty_micro_batch_is_no_error(ranks) -> None:
    outcomes = ranks(2).run(nothing_in_this_micro_batch)
    expected = alone(Case(steps=1), 2).reports[0]
    for ours in outcomes:
        assert same(ours, outcomes[0])
        torch.testing.assert_close(ours[3], expected[3])


def dropped_by_one() -> str:
    net, opt, case, rank, world = start(Case())
    opt.accumulate(case.losses(net, 0, 0, rank, world))
    if rank == 1:
        opt.zero_grad()
    return error_of(lambda: opt.step(case.losses(net, 1, 0, rank, world)))


def test_rows_that_one_rank_has_dropped_are_told_on_all(ranks) -> None:
    """Those that others still have are refused by ``step(losses)``."""
    first, second = ranks(2).run(dropped_by_one)
    assert "pending" in first and "rank 0" in second and "pending" in second


def closures_and_tensors(mixed: str) -> tuple[str, list[Tensor | None]]:
    """One rank gives a closure where the others give a tensor."""
    net, opt, case, rank, world = start(Case())
    losses = case.losses(net, 0, 0, rank, world)
    if rank == 1:
        loss = losses[mixed]
        losses[mixed] = lambda: loss
    error = error_of(lambda: opt.backward(losses))
    return error, grads(getattr(net, "module", net))


@pytest.mark.parametrize("mixed", ["a", "a+b"])
def test_a_closure_on_one_rank_alone(ranks, mixed: str) -> None:
    """Right, or an error on all; no rank waits for another."""
    first, second = ranks(2).run(closures_and_tensors, mixed)
    assert bool(first[0]) == bool(second[0])
    assert same(first[1], second[1])
