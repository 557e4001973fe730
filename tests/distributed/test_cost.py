"""What a step sends and keeps, seen where torch carries its operations out."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, is_tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradsplit import ModalityDecoupledOptimizer
from tests.distributed.cases import place

SMALL = 4096  # elements that a step may send besides: messages, counts, m x m


class Watch(TorchDispatchMode):
    """Sees every operation: what collectives send, whoever calls them, and what is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()  # elements, by this rank
        self.peak = 0  # bytes
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name, world = func.__name__, dist.get_world_size()
            # The largest tensor is the whole, gathered or yet to be scattered.
            most = max((t.numel() for t in tree_leaves(args) if is_tensor(t)), default=0)
            self.sent[name] += (1 + ("allreduce" in name)) * most * (world - 1) // world
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in filter(is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:  # no view, of a parameter for example
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def model(m: int) -> tuple[nn.Module, Any]:
    """A million parameters that all of m losses reach."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1000, 1000), nn.Tanh(), nn.Linear(1000, 64))
    target = torch.randn(m, 64)
    x = torch.randn(4, 1000) + place()[0]

    def losses(module: nn.Module, given: str) -> list[Any]:
        def loss(i: int, output: Tensor | None = None) -> Tensor:
            return ((module(x) if output is None else output) - target[i]).square().mean()

        if given == "closures":
            return [partial(loss, i) for i in range(m)]
        output = module(x)
        return [loss(i, output) for i in range(m)]

    return net, losses


def measure(m: int, given: str, how: str) -> tuple[int, dict[str, int], float]:
    """Of a second step: n, the elements sent, and the most that lived, in rows."""
    net, losses = model(m)
    module = DistributedDataParallel(net) if how == "ddp" else net
    told = {"module": module} if how == "ddp" else {"process_group": dist.group.WORLD}
    opt = ModalityDecoupledOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), **told)
    opt.step(losses(module, given))
    opt.zero_grad()
    handed_over = losses(module, given)
    watch = Watch()
    with watch:
        opt.backward(handed_over)
    n = sum(p.numel() for p in net.parameters())
    return n, dict(watch.sent), watch.peak / (4 * n)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("m", "given", "how"),
    [(4, "one forward", "ddp"), (7, "closures", "ddp"), (15, "closures", "group")],
)
def test_rows_are_sent_once_and_kept_in_shards(
    ranks, m: int, given: str, how: str, world: int
) -> None:
    """Sent are (m + 1) n (R - 1) / R elements per rank, and at most 2 % more.

    Alive are m / R rows, one that is on its way and the gradient that autograd is leaving.
    """
    for n, sent, peak in ranks(world).run(measure, m, given, how):
        share = n * (world - 1) / world
        total = sum(sent.values())
        assert 0.98 * m * share < total, f"not all has been counted: {sent}"
        assert total <= 1.02 * (m + 1) * share + SMALL, sent
        assert peak < m / world + 2.1
