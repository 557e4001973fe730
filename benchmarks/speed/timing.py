"""How the speed benchmark measures: interleaved timings, live memory, growth. Knows no method."""

import ctypes
import gc
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "Contender",
    "LiveBytes",
    "Samples",
    "fit_exponent",
    "paired_ratio",
    "reset_peak_resident",
    "resident_bytes",
    "round_robin",
]

Samples = list[tuple[float, ...]]
"""Seconds of each stage, by round."""


@dataclass(frozen=True)
class Contender:
    """What is timed: stages that hand their result on.

    Attributes:
        stages: each takes what the one before returned, and is timed.
        prepare: makes what the first stage takes; not timed.
        repeats: of all stages in one run, whose time is the mean: for what takes little.
    """

    stages: Sequence[Callable[[Any], Any]]
    prepare: Callable[[], Any]
    repeats: int = 1

    def run(self, synchronise: Callable[[], object]) -> tuple[float, ...]:
        """Seconds of each stage; ``synchronise`` waits for the device."""
        seconds = [0.0] * len(self.stages)
        for _ in range(self.repeats):
            value = self.prepare()
            for number, stage in enumerate(self.stages):
                synchronise()
                started = time.perf_counter()
                value = stage(value)
                synchronise()
                seconds[number] += time.perf_counter() - started
        return tuple(total / self.repeats for total in seconds)


def round_robin(
    contenders: Mapping[str, Contender],
    rounds: int,
    *,
    slow: float = 4.0,
    very_slow: float = 8.0,
    synchronise: Callable[[], object] = lambda: None,
    done: Callable[[str, int], object] = lambda name, runs: None,
) -> dict[str, Samples]:
    """Time all side by side: every round runs each contender once, the first to go changing.

    A first run of each warms up and does not count, but says who is slow.

    Args:
        contenders: by name.
        rounds: how many.
        slow, very_slow: seconds; who takes longer is in the first 3 rounds only, or in the first.
        synchronise: waits for the device.
        done: told, after each run, the name and for how many of the ``rounds + 1`` runs it stands.
    """
    names = list(contenders)
    samples: dict[str, Samples] = {name: [] for name in names}
    left = dict.fromkeys(names, rounds)
    collecting = gc.isenabled()
    gc.disable()  # it would stop whoever happens to run
    gc.collect()
    gc.freeze()  # what exists now is not looked at again: collecting between runs takes no time
    try:
        for name in names:
            gc.collect()
            taken = sum(contenders[name].run(synchronise))
            if taken > slow:
                left[name] = 1 if taken > very_slow else min(3, rounds)
            done(name, 1 + rounds - left[name])
        for number in range(rounds):
            gc.collect()
            first = number % len(names)
            for name in names[first:] + names[:first]:
                if number < left[name]:
                    samples[name].append(contenders[name].run(synchronise))
                    done(name, 1)
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return samples


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios of runs of the same round: what slows a whole round cancels."""
    return statistics.median(a / b for a, b in zip(above, below, strict=False))


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """p of seconds = c size^p, by least squares of the logarithms. Needs two different sizes."""
    if len(set(sizes)) < 2 or len(sizes) != len(seconds):
        raise ValueError(f"needs one time for each of two or more sizes, got {sizes}, {seconds}")
    slope, _ = np.polyfit(np.log(sizes), np.log(seconds), 1)
    return float(slope)


class LiveBytes(TorchDispatchMode):
    """Inside ``with``: bytes of all tensors that were made inside and are still alive.

    What existed before does not count, nor does what a kernel allocates and frees by itself.
    Backwards that run inside are seen too, on a CPU.

    >>> import torch
    >>> with LiveBytes() as live:
    ...     kept = torch.ones(100)
    ...     kept.add_(torch.ones(100) + torch.ones(100)).sum().item()
    ...     view = kept[:50]
    300.0
    >>> live.now, live.peak  # while adding, two ones and their sum
    (400, 1600)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._before: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In place or a view: the result lies in a storage that an argument had.
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, Tensor):
                self._note(value, made=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value, made=True)
        return result

    def _note(self, value: Tensor, made: bool) -> None:
        storage = value.untyped_storage()
        key = id(storage)  # the same object for as long as the storage lives
        if key in self._storages or key in self._before:
            return
        if not made:
            self._before[key] = weakref.ref(storage, lambda _: self._before.pop(key, None))
            return
        size = storage.nbytes()
        self._storages[key] = weakref.ref(storage, lambda _: self._freed(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        del self._storages[key]
        self.now -= size


def reset_peak_resident() -> bool:
    """Start :func:`resident_bytes`'s peak anew; False where that is not possible (not Linux).

    What has been freed is handed back to the system first, where the C library can do that.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_bytes() -> tuple[int, int]:
    """What this process holds in memory: now, and at most since :func:`reset_peak_resident`.

    From ``/proc``, where Linux counts the two for this process alone: ``ru_maxrss`` of a child
    starts at what its parent held.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    now, peak = (1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return now, peak
