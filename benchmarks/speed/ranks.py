"""What many ranks cost: what each sends and holds in one step, and the step's time beside DDP's.

Ranks are processes on this machine, one thread each, that talk through gloo.
"""

import datetime
import functools
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.speed.memory import live_bytes
from benchmarks.speed.tasks import MLPTask, Task
from benchmarks.speed.timing import Clock, Contender, Row
from gradsplit import ModalityDecoupledOptimizer

__all__ = ["CLOSURES", "DDP", "SHARED", "Traffic", "measure_ranks"]

CLOSURES, SHARED, DDP = "ours, closures", "ours, one forward", "m backwards of DDP"
# How often each rank sends (R - 1) / R of a tensor, in the best algorithms that are known.
_TRAVELS = {"allreduce_": 2, "_reduce_scatter_base_": 1, "_allgather_base_": 1}


class Traffic(TorchDispatchMode):
    """Inside ``with``: what all collectives of this rank send, also those that DDP starts in C++.

    Args:
        size: R, of the group.
        small: what has fewer elements is a message; all else is gradients.

    Attributes:
        sent: bytes of gradients that a rank sends: k (R - 1) / R in a reduce-scatter of k bytes,
            or an all-gather to k; twice as many in an all-reduce.
        messages: bytes of each message.
    """

    def __init__(self, size: int, small: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._size, self._small = size, small
        self.sent, self.messages = 0.0, list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            whole = max(tensors, key=Tensor.numel)  # of one that is scattered or gathered
            if whole.numel() < self._small:
                self.messages.append(whole.nbytes)
            else:
                times = _TRAVELS[func._schema.name.removeprefix("c10d::")]
                self.sent += times * whole.nbytes * (self._size - 1) / self._size
        return func(*args, **(kwargs or {}))


def measure_ranks(
    size: int, losses: Sequence[int], mlp: tuple[int, int], batch: int, rounds: int
) -> list[Row]:
    """One step of an MLP on ``size`` ranks, for each number of losses.

    Args:
        size: R.
        losses: every m.
        mlp: layers and width.
        batch: of each rank.
        rounds: how often each way is timed.

    Returns:
        For each m and way: ranks (R), m, n, way, and of the first rank, which sends and holds no
        less than any: sent and messages of :class:`Traffic`; live: bytes as in the memory part;
        seconds: of the slowest rank.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed, or one waited for ten minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_on_rank, (size, folder, losses, mlp, batch, rounds), nprocs=size)
        found: list[Row] = json.loads((Path(folder) / "found.json").read_text())
    return found


def _on_rank(
    rank: int, size: int, folder: str, losses: Sequence[int], mlp: tuple[int, int], *rest: int
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=(Path(folder) / "store").as_uri(), rank=rank, world_size=size,
        timeout=datetime.timedelta(minutes=10),
    )  # fmt: skip
    found = [row for m in losses for row in _measure(size, m, mlp, *rest)]
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _measure(size: int, m: int, mlp: tuple[int, int], batch: int, rounds: int) -> list[Row]:
    """On every rank, at the same time."""
    contenders = {}
    for name, make in _WAYS.items():
        task = MLPTask(*mlp, m, batch, torch.device("cpu"))
        task.model = DistributedDataParallel(task.model)
        contenders[name] = Contender(*make(task), task.clear)
    n = task.elements()
    # Nobody is slow: ranks would leave out different rounds.
    clock = Clock(rounds, synchronise=dist.barrier, slow=math.inf)
    rows = clock.time(contenders, ranks=size, m=m, n=n)
    for row in rows:
        contender = contenders[row["way"]]
        contender.prepare()
        losses = contender.forward()
        assert contender.backward is not None
        with Traffic(size, n / 100) as traffic:
            row["live"] = live_bytes(functools.partial(contender.backward, losses))
        row |= {"sent": traffic.sent, "messages": traffic.messages}
    return rows


_Step = tuple[Callable[[], Any], Callable[[Any], object]]
"""A forward, and a backward of what it returned."""


def _closures(task: Task) -> _Step:
    losses = {str(i): functools.partial(_loss, task, i) for i in range(task.losses)}
    return lambda: losses, _optimizer(task).backward


def _shared(task: Task) -> _Step:
    return lambda: task.together(range(task.losses)), _optimizer(task).backward


def _ddp(task: Task) -> _Step:
    """DDP averages one backward per forward: each loss has one of its own."""
    losses = range(task.losses)
    return lambda: losses, lambda losses: [_loss(task, i).backward() for i in losses]


def _loss(task: Task, index: int) -> Tensor:
    loss: Tensor = task.apart([index])[0]
    return loss


def _optimizer(task: Task) -> ModalityDecoupledOptimizer:
    return ModalityDecoupledOptimizer(torch.optim.SGD(task.parameters(), 0.0), module=task.model)


_WAYS = {CLOSURES: _closures, SHARED: _shared, DDP: _ddp}
