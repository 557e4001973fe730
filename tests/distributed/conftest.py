"""The pools of ranks that all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """``ranks(2)``: a pool that is started when it is first used."""
    pools: dict[int, Ranks] = {}
    yield lambda world: pools.setdefault(world, Ranks(world))
    for pool in pools.values():
        pool.stop()
