"""A benchmark on the ranks that torchrun started; in one process everything here does nothing."""

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "command",
    "count",
    "divided",
    "each",
    "first",
    "group",
    "has_own_gpu",
    "launched",
    "own",
    "pooled",
    "rank",
    "run",
    "share",
    "summed",
]

PATIENCE = 10.0  # seconds: what stops all ranks stops them so soon after each other

T = TypeVar("T")
U = TypeVar("U")


def launched() -> bool:
    """Whether torchrun has started several of this program."""
    started = dist.is_available() and dist.is_torchelastic_launched()
    return started and os.environ["WORLD_SIZE"] != "1"


def run(program: Callable[[], int]) -> int:
    """The exit code of ``program``, which every rank runs; what rank 0 says is printed.

    Each rank takes the GPU of its LOCAL_RANK, where there are enough. SIGTERM is Ctrl-C, for that
    is how torchrun ends the ranks.
    """
    if not launched():
        return program()
    from torch.distributed.rendezvous import rendezvous  # not every build of torch has it

    place = int(os.environ["LOCAL_RANK"])
    if place < torch.cuda.device_count():
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, number, world = next(rendezvous("env://"))
    dist.init_process_group(backend, store=store, rank=number, world_size=world)
    before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
    said = io.StringIO()
    with contextlib.ExitStack() as silence:
        if rank() > 0:
            silence.enter_context(contextlib.redirect_stdout(said))
            silence.enter_context(contextlib.redirect_stderr(said))
        try:
            code = program()
        except SystemExit:
            if not _all_leave(store) and rank() > 0:  # a mistake that rank 0 does not see
                silence.close()
                print(f"rank {rank()}: {said.getvalue()}", file=sys.stderr)
            raise
    if code != 130:
        _all_leave(store)
    dist.destroy_process_group()
    for number, handler in before.items():
        signal.signal(number, handler)
    return code


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _all_leave(store: Any) -> bool:
    """Whether every rank comes here soon. Then rank 0 has said why, and nobody waits for data."""
    for number in _SIGNALS:  # as soon as one has left, torchrun ends the others
        signal.signal(number, signal.SIG_IGN)
    store.add("leaving", 1)
    deadline = time.monotonic() + PATIENCE
    while store.add("leaving", 0) < count():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _interrupt(number: int, frame: FrameType | None) -> None:
    for other in _SIGNALS:  # there may be more of them, and rank 0 has something to say
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def rank() -> int:
    """Of this process; 0 is the one that writes."""
    return dist.get_rank() if _many() else 0


def count() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if _many() else 1


def group() -> Any:
    """All ranks, for a ModalityDecoupledOptimizer; None: one process."""
    return dist.group.WORLD if _many() else None


def has_own_gpu() -> bool:
    """Whether no other rank uses what ``"cuda"`` means here."""
    return not _many() or int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count()


def command(python: str) -> list[str]:
    """How ``python`` is started on so many ranks, up to ``-m MODULE``."""
    if count() == 1:
        return [python]
    here = os.environ["LOCAL_WORLD_SIZE"]
    return [python, "-m", "torch.distributed.run", "--nproc-per-node", here]


def share(items: Any) -> Any:
    """What this rank takes of a sequence or tensor."""
    return items[rank() :: count()]


def first(make: Callable[[], T]) -> T:
    """What ``make`` gives on rank 0, on every rank; what it raises there, every rank raises."""
    if not _many():
        return make()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    made: T = outcome[0]
    return made


def divided(work: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """``work`` on each item, in order; each rank does its share. What one raises, all raise."""
    done: list[U] = []
    failed: Exception | None = None
    try:
        done.extend(map(work, share(items)))
    except Exception as error:
        failed = error
    results: list[Any] = [None] * len(items)
    for number, (part, reason) in enumerate(_everyone((done, failed))):
        if reason is not None:
            raise failed or reason
        results[number :: count()] = part
    return results


def each(value: Any) -> Any:
    """The value of every rank in a list, for a checkpoint; in one process the value."""
    return _everyone(value) if _many() else value


def own(value: Any) -> Any:
    """This rank's, of what :func:`each` gave."""
    return value[rank()] if _many() else value


def summed(tensor: Tensor) -> Tensor:
    """The sum over ranks, without gradient."""
    if not _many():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def pooled(parts: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor's sum over ranks, of a loss that is not a mean over samples.

    A rank knows the gradient of its own part only. It counts as many times as there are ranks, so
    that the mean over ranks of the gradients of a function of these sums is that function's.
    """
    parts = list(parts)
    if not _many() or not parts:
        return parts
    sums = []
    for part, total in zip(parts, summed(torch.stack(parts).double()), strict=True):
        mine = part * count()
        sums.append(mine + (total.to(part) - mine).detach())
    return sums


def _everyone(value: T) -> list[T]:
    values: list[Any] = [value] * count()
    if _many():
        dist.all_gather_object(values, value)
    return values


def _many() -> bool:
    return dist.is_available() and dist.is_initialized()
