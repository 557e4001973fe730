"""The pools of ranks that all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.cases import Case, error_of, start
from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """``ranks(2)``: a pool that is started when it is first used."""
    pools: dict[int, Ranks] = {}
    yield lambda world: pools.setdefault(world, Ranks(world))
    for pool in pools.values():
        pool.stop()


def sharded_backward() -> str:
    def use() -> None:
        net, _, case, rank, world = start(Case(how="flat"))
        case.losses(net, 0, 0, rank, world)["a"].backward()

    return error_of(use)


@pytest.fixture(scope="session")
def sharding(ranks: Callable[[int], Ranks]) -> None:
    """Skips where torch cannot: 2.4 without CUDA. Found out by trying."""
    for error in ranks(2).run(sharded_backward):
        if error:
            pytest.skip(f"fully_shard on this device: {error}")
