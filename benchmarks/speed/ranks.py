"""What many ranks cost: what each sends and holds in one step, and the step's time beside DDP's.

Ranks are processes on this machine, one thread each, that talk through gloo.
"""

import datetime
import functools
import json
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

from benchmarks.speed.tasks import MLPTask, Task
from benchmarks.speed.timing import Contender, LiveBytes, round_robin
from gradsplit import ModalityDecoupledOptimizer

__all__ = ["DDP", "SHARED", "WAYS", "Traffic", "measure_ranks"]

WAYS = OURS, SHARED, DDP = "ours, closures", "ours, one forward", "m backwards of DDP"
# How often each rank sends (R - 1) / R of a tensor, in the best algorithms that are known.
_TRAVELS = {"allreduce_": 2, "_reduce_scatter_base_": 1, "_allgather_base_": 1}


class Traffic(TorchDispatchMode):
    """Inside ``with``: what all collectives of this rank send, also those that DDP starts in C++.

    Args:
        size: R, of the group.
        small: what has fewer elements is a message; all else is gradients.

    Attributes:
        sent: elements of gradients that a rank sends: k (R - 1) / R in a reduce-scatter of k
            elements, or an all-gather to k; twice as many in an all-reduce.
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
                self.sent += times * whole.numel() * (self._size - 1) / self._size
        return func(*args, **(kwargs or {}))


def measure_ranks(
    size: int, losses: Sequence[int], mlp: tuple[int, int], batch: int, rounds: int
) -> list[dict[str, Any]]:
    """One step of an MLP on ``size`` ranks, for each number of losses.

    Args:
        size: R.
        losses: every m.
        mlp: layers and width.
        batch: of each rank.
        rounds: how often each way is timed.

    Returns:
        For each m: ranks (R), losses (m), elements (n), and of the first rank, which sends and
        holds no less than any: sent and messages of :class:`Traffic`, sent_by_ddp in m backwards;
        live: bytes as in the memory part; seconds by way, of the slowest rank.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed, or one waited for ten minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = [(m, mlp, batch, rounds) for m in losses]
        spawn(_on_rank, (size, folder, wanted), nprocs=size)
        found: list[dict[str, Any]] = json.loads((Path(folder) / "found.json").read_text())
    return found


def _on_rank(rank: int, size: int, folder: str, wanted: Sequence[tuple[Any, ...]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=(Path(folder) / "store").as_uri(), rank=rank, world_size=size,
        timeout=datetime.timedelta(minutes=10),
    )  # fmt: skip
    found = [_measure(*one) for one in wanted]
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _measure(m: int, mlp: tuple[int, int], batch: int, rounds: int) -> dict[str, Any]:
    """On every rank, at the same time."""
    tasks = {name: _task(m, mlp, batch) for name in (OURS, SHARED, DDP)}
    task = tasks[SHARED]
    opts = {name: _optimizer(tasks[name]) for name in (OURS, SHARED)}
    steps: dict[str, Callable[[Any], Any]] = {
        OURS: lambda _: opts[OURS].backward(
            {str(i): functools.partial(_loss, tasks[OURS], i) for i in range(m)}
        ),
        SHARED: lambda _: opts[SHARED].backward(task.together(range(m))),
        DDP: lambda _: [_loss(tasks[DDP], i).backward() for i in range(m)],
    }
    ways = {name: Contender([step], tasks[name].clear) for name, step in steps.items()}
    # Nobody is slow: ranks would leave out different rounds.
    barrier: Callable[[], object] = dist.barrier
    taken = round_robin(ways, rounds, slow=float("inf"), synchronise=barrier)
    n, size = sum(p.numel() for p in task.parameters()), dist.get_world_size()
    task.clear()
    losses = task.together(range(m))
    with Traffic(size, n / 100) as traffic, LiveBytes() as live:
        opts[SHARED].backward(losses)
    with Traffic(size, n / 100) as plain:
        steps[DDP](None)
    return {
        "ranks": size,
        "losses": m,
        "elements": n,
        "sent": traffic.sent,
        "messages": traffic.messages,
        "sent_by_ddp": plain.sent,
        "live": live.peak,
        "seconds": {name: [run[0] for run in runs] for name, runs in taken.items()},
    }


def _task(m: int, mlp: tuple[int, int], batch: int) -> Task:
    task: Task = MLPTask(*mlp, m, batch, torch.device("cpu"))
    task.model = DistributedDataParallel(task.model)
    return task


def _optimizer(task: Task) -> ModalityDecoupledOptimizer:
    return ModalityDecoupledOptimizer(torch.optim.SGD(task.parameters(), 0.0), module=task.model)


def _loss(task: Task, index: int) -> Tensor:
    return task.apart([index])[0]
