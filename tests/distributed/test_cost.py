"""What a step sends, and what it keeps: counted where the collectives are carried out."""

from __future__ import annotations

import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradsplit import ModalityDecoupledOptimizer
from tests.core.cases import peak_bytes
from tests.distributed.cases import place

SMALL = 4096  # elements that a step may send besides: messages, counts, m x m


class Sent(TorchDispatchMode):
    """Counts the elements that this rank sends in collectives, by kind, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name, world = func._schema.name.split("::")[1], dist.get_world_size()
            most = max((t.numel() for t in tree_leaves(args) if isinstance(t, Tensor)), default=0)
            # The largest tensor is the whole: gathered, or to be scattered.
            times = 2 if "allreduce" in name else 1
            self.elements[name] += times * most * (world - 1) // world
        return func(*args, **(kwargs or {}))


def model(m: int) -> tuple[nn.Module, Any]:
    """110 000 parameters that all of m losses reach."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 64))
    target = torch.randn(m, 64)
    x = torch.randn(4, 300) + place()[0]

    def losses(module: nn.Module, given: str) -> list[Any]:
        def loss(i: int, output: Tensor | None = None) -> Tensor:
            return ((module(x) if output is None else output) - target[i]).square().mean()

        if given == "closures":
            return [partial(loss, i) for i in range(m)]
        output = module(x)
        return [loss(i, output) for i in range(m)]

    return net, losses


def sent_per_step(m: int, given: str, how: str) -> tuple[int, dict[str, int]]:
    net, losses = model(m)
    module = DistributedDataParallel(net) if how == "ddp" else net
    told = {"module": module} if how == "ddp" else {"process_group": dist.group.WORLD}
    opt = ModalityDecoupledOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), **told)
    opt.step(losses(module, given))
    sent = Sent()
    with sent:
        opt.step(losses(module, given))
    return sum(p.numel() for p in net.parameters()), dict(sent.elements)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("m", [4, 7])
@pytest.mark.parametrize(
    ("given", "how"), [("one forward", "ddp"), ("closures", "ddp"), ("closures", "group")]
)
def test_a_step_sends_each_row_and_the_merged_gradient_once(
    ranks, m: int, world: int, given: str, how: str
) -> None:
    """(m + 1) n (R - 1) / R elements per rank, and at most 2 % more."""
    for n, sent in ranks(world).run(sent_per_step, m, given, how):
        share = n * (world - 1) / world
        total = sum(sent.values())
        assert 0.98 * m * share < total, f"these have not been counted: {sent}"
        assert total <= 1.02 * (m + 1) * share + SMALL, sent


def peak(m: int) -> tuple[int, int]:
    net, losses = model(m)
    ddp = DistributedDataParallel(net)
    opt = ModalityDecoupledOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), module=ddp)
    opt.step(losses(ddp, "one forward"))
    opt.zero_grad()
    given = losses(ddp, "one forward")
    with tempfile.TemporaryDirectory() as folder:
        most = peak_bytes(lambda: opt.backward(given), Path(folder))
    return most, 4 * sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("world", [2, 4])
def test_rows_are_kept_in_shards(ranks, world: int) -> None:
    """Each costs 1 / R of a row; besides them live a gradient, two rows, and the merged one."""
    few, many = (dict(enumerate(ranks(world).run(peak, m))) for m in (7, 15))
    for rank in range(world):
        (least, n), (most, _) = few[rank], many[rank]
        assert most - least < 1.1 * 8 * n / world
        assert most < 1.1 * (15 / world + 4) * n
