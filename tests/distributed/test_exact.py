"""R ranks train as one process does on all their samples, and stay equal bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.distributed.cases import Case, Outcome, assert_exact, fair, train

GIVEN = ["one forward", "several forwards", "closures", "joint"]

CASES = [
    *(Case(net=net, given=given) for net in ("towers", "one trunk") for given in GIVEN),
    *(
        Case(given=given, missing=missing)
        for given in GIVEN
        for missing in ("one rank", "all but one", "everywhere")
    ),
    *(Case(given=given, missing="all") for given in ("several forwards", "closures")),
    Case(net="one trunk", missing="all but one"),
    *(Case(given=given, micro=3) for given in GIVEN),
    *(Case(given=given, micro=3, missing="one rank") for given in GIVEN if given != "joint"),
    *(Case(given=given, micro=3, missing="all but one") for given in ("one forward", "closures")),
    Case(net="batch norm"),
    Case(net="batch norm", given="closures", missing="one rank"),
    *(Case(missing="one rank", options={"rule": rule}) for rule in ("pcgrad", "sum", fair)),
    Case(given="closures", missing="all but one", options={"rule": "pcgrad", "seed": 3}),
    *(
        Case(missing="one rank", options={"scope": scope, "reduction": reduction})
        for scope in ("shared", "all", "trunk")
        for reduction in ("mean", "sum", "released")
    ),
    Case(micro=3, missing="one rank", options={"scope": "all", "reduction": "released"}),
    *(Case(given=given, options={"conflict_parameters": "trunk"}) for given in GIVEN),
    Case(micro=3, options={"conflict_parameters": "trunk", "reduction": "released"}),
    Case(net="one trunk", missing="one rank", options={"conflict_parameters": "trunk"}),
    Case(missing="one rank", options={"conflict_parameters": "trunk"}),
    Case(given="closures", missing="all but one", options={"conflict_parameters": "trunk"}),
    Case(clip=0.3, missing="one rank"),
    # Rounding of 1e-7 and 2^-9, twenty times over.
    Case(dtype=torch.float32, missing="one rank", within=1e-5),
    Case(
        dtype=torch.float32,
        missing="one rank",
        options={"row_dtype": torch.bfloat16},
        within=1e-2,
    ),
]


FOUR = [  # of which four ranks are shown by default; all of them are among the slow tests
    Case(given="joint"),
    Case(net="one trunk"),
    Case(given="several forwards", missing="all but one"),
    Case(given="closures", missing="everywhere"),
    Case(given="closures", micro=3, missing="one rank"),
    Case(net="batch norm", given="closures", missing="one rank"),
    Case(given="closures", missing="all but one", options={"rule": "pcgrad", "seed": 3}),
    Case(missing="one rank", options={"scope": "all", "reduction": "released"}),
    Case(given="closures", missing="all but one", options={"conflict_parameters": "trunk"}),
]
RUNS = [
    pytest.param(case, world, marks=() if world == 2 or case in FOUR else pytest.mark.slow)
    for world in (2, 4)
    for case in CASES
]


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
    case = Case(how=how, given=given, missing="one rank")
    assert_exact(case, ranks(2).run(train, case), 2)


@pytest.mark.parametrize("given", ["one forward", "several forwards", "closures", "joint"])
@pytest.mark.parametrize("how", ["ddp", *HOW[:3]])
def test_plain_steps_in_between_are_those_of_ddp(ranks, how: str, given: str) -> None:
    """It has no part in plain steps; several of its forwards need them to be told apart."""
    if given == "several forwards":
        pytest.skip("DDP itself takes one forward for one backward")
    plain = Case(how=how, given="one forward" if given == "closures" else given, plain=True)
    assert_exact(plain, ranks(2).run(train, plain), 2)


@pytest.mark.parametrize("how", ["ddp halves", "group halves"])
def test_a_group_knows_nothing_of_other_ranks(ranks, how: str) -> None:
    case = Case(how=how, missing="one rank")
    outcomes: list[Outcome] = ranks(4).run(train, case)
    assert_exact(case, outcomes[:2], 2)
    assert_exact(replace(case, seed=2, data=1), outcomes[2:], 2)
