"""The weights of ``LossBalance`` on ranks are those of one process on all samples."""

from __future__ import annotations

import pytest

from gradsplit import LossBalance
from tests.distributed.cases import NAMES, Case, start


def balanced(case: Case, world: int | None = None) -> dict[str, float]:
    """On one rank of many; or, as the oracle, on the samples of ``world`` ranks at once."""
    if world is None:
        net, opt, case, rank, ranks = start(case)
    else:
        net = case.model(case.seed)
        opt = case.optimizer(net)
    balance = LossBalance(steps=3)
    for step in range(case.steps):
        opt.zero_grad()
        if world is None:
            losses = case.losses(net, step, 0, rank, ranks)
        else:
            losses = case.all_losses(net, step, [0], world)
        balance.update(opt.backward(balance(losses)))
        opt.step()
    assert balance.frozen
    return dict(balance.weights)


@pytest.mark.parametrize("given", ["one forward", "closures"])
def test_ranks_equal_one_process(ranks, given: str) -> None:
    """Though one rank has None for a loss."""
    case = Case(given=given, missing="one rank", steps=6)
    first, second = ranks(2).run(balanced, case)
    assert first == second and max(first.values()) > 1.2 and set(first) == set(NAMES)
    assert first == pytest.approx(balanced(case, world=2), rel=1e-9)
