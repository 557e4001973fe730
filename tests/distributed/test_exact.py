"""R ranks train as one process does on all their samples, and stay equal bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.distributed.cases import Case, Outcome, assert_exact, fair, train

GIVEN = ["one forward", "several forwards", "closures", "joint"]
SHORT = {"steps": 8}
PARTIAL = {"conflict_parameters": "trunk"}
CASES = [
    *(Case(net=net, given=given) for net in ("towers", "one trunk") for given in GIVEN),
    *(Case(given=given, missing="one rank") for given in GIVEN),
    *(
        Case(given=given, missing=missing, **SHORT)
        for given in GIVEN
        for missing in ("all but one", "everywhere")
    ),
    *(Case(given=given, missing="all", **SHORT) for given in ("joint", "closures")),
    Case(net="one trunk", missing="all but one", **SHORT),
    Case(net="assorted", missing="one rank"),
    *(Case(net="routed", given=given, missing="one rank") for given in ("joint", "closures")),
    *(Case(given=given, micro=3, **SHORT) for given in GIVEN),
    *(
        Case(given=given, micro=3, missing=missing, **SHORT)
        for given in ("one forward", "closures")
        for missing in ("one rank", "all but one")
    ),
    Case(net="batch norm"),
    Case(net="batch norm", given="closures", missing="one rank"),
    *(Case(missing="one rank", options={"rule": rule}, **SHORT) for rule in ("pcgrad", "sum")),
    Case(given="closures", missing="all but one", options={"rule": "pcgrad", "seed": 3}),
    Case(given="closures", missing="one rank", options={"rule": fair}),
    *(
        Case(missing="one rank", options={"scope": scope, "reduction": reduction}, **SHORT)
        for scope in ("shared", "all", "trunk")
        for reduction in ("mean", "sum", "released")
    ),
    Case(micro=3, missing="one rank", options={"scope": "all", "reduction": "released"}),
    *(Case(given=given, options=PARTIAL, **SHORT) for given in GIVEN),
    Case(micro=3, options={**PARTIAL, "reduction": "released"}, **SHORT),
    Case(net="one trunk", missing="one rank", options=PARTIAL, **SHORT),
    Case(net="one trunk", missing="all", options=PARTIAL, **SHORT),
    Case(net="routed", options={**PARTIAL, "reduction": "released"}, **SHORT),
    Case(given="closures", missing="all but one", options=PARTIAL),
    Case(clip=0.3, missing="one rank", **SHORT),
    # Rounding of 1e-7 and 2^-9, twenty times over.
    Case(dtype=torch.float32, missing="one rank", within=1e-5),
    Case(dtype=torch.float32, options={"row_dtype": torch.bfloat16}, within=1e-2),
]
FOUR = [  # of which four ranks are shown by default; all others are among the slow tests
    Case(given="joint"),
    Case(net="assorted", missing="one rank"),
    Case(given="closures", micro=3, missing="one rank", **SHORT),
    Case(net="batch norm", given="closures", missing="one rank"),
    Case(given="closures", missing="all but one", options={"rule": "pcgrad", "seed": 3}),
    Case(given="closures", missing="all but one", options=PARTIAL),
]
OLD = pytest.mark.skipif(
    torch.__version__.startswith("2.4."), reason="there gloo knows no complex numbers"
)


def marks(case: Case, world: int) -> list[pytest.MarkDecorator]:
    slow = [] if world == 2 or case in FOUR else [pytest.mark.slow]
    return [*slow, *([OLD] if case.net == "assorted" else [])]


RUNS = [pytest.param(c, world, marks=marks(c, world)) for world in (2, 4) for c in CASES]


@pytest.mark.parametrize(("case", "world"), RUNS, ids=str)
def test_ranks_equal_one_process(ranks, case: Case, world: int) -> None:
    assert_exact(case, ranks(world).run(train, case), world)


HOW = [
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "find_unused_parameters, gradient_as_bucket_view",
    "group",
    "group, module",
    "late",
    "wrapped",
    pytest.param("compiled", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("given", ["one forward", "closures"])
@pytest.mark.parametrize("how", HOW)
def test_whatever_tells_of_the_ranks(ranks, how: str, given: str) -> None:
    """The options of DDP, DDP inside of something, DDP told of later, and no DDP at all."""
    case = Case(how=how, given=given, missing="one rank", **SHORT)
    assert_exact(case, ranks(2).run(train, case), 2)


@pytest.mark.parametrize("given", ["one forward", "joint"])
@pytest.mark.parametrize("how", ["ddp", *HOW[:3]])
def test_plain_steps_in_between_are_those_of_ddp(ranks, how: str, given: str) -> None:
    """It averages them itself."""
    case = Case(how=how, given=given, plain=True, **SHORT)
    assert_exact(case, ranks(2).run(train, case), 2)


@pytest.mark.parametrize("how", ["ddp halves", "group halves"])
def test_a_group_knows_nothing_of_other_ranks(ranks, how: str) -> None:
    case = Case(how=how, missing="one rank")
    outcomes: list[Outcome] = ranks(4).run(train, case)
    assert_exact(case, outcomes[:2], 2)
    assert_exact(replace(case, seed=2, data=1), outcomes[2:], 2)
