"""Memory of one way to a gradient, in a process of its own: python -m benchmarks.speed.memory.

The parent, benchmarks.speed, starts one per way and reads the line of JSON that it prints.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.speed.tasks import EncodersTask, MLPTask, Task, UNetTask
from benchmarks.speed.timing import Row
from benchmarks.speed.ways import EXACT, PLAIN, WAYS

__all__ = ["LiveBytes", "in_own_process", "live_bytes", "resident_growth"]


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
        self.now, self.peak = 0, 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # In place or a view: the result lies in a storage that an argument had.
        self._note((args, kwargs), made=False)
        result = func(*args, **(kwargs or {}))
        self._note(result, made=True)
        return result

    def _note(self, values: Any, made: bool) -> None:
        for value in tree_leaves(values):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key = id(storage)  # the same object for as long as the storage lives
            if key not in self._known:
                size = storage.nbytes() if made else 0
                self._known[key] = weakref.ref(storage, self._freeing(key, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def _freeing(self, key: int, size: int) -> Callable[[Any], None]:
        def freed(_: Any) -> None:
            del self._known[key]
            self.now -= size

        return freed


def live_bytes(run: Callable[[], object]) -> int:
    """At most alive at once of all tensors that ``run`` makes."""
    live = LiveBytes()
    with live:
        run()
    return live.peak


def resident_growth(run: Callable[[], object]) -> int | None:
    """By how much the process grows from before ``run`` to its peak; None where it is not Linux.

    From ``/proc``, where Linux counts for this process alone: ``ru_maxrss`` of a child starts at
    what its parent held. What has been freed is handed back to the system first, where the C
    library can do that.
    """
    try:
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return None
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(field))
    return 1024 * int(line.split()[1])


def _measure(task: Task, forward: Callable[[], Any], run: Callable[[Any], object]) -> Row:
    def step() -> None:
        task.clear()
        run(forward())
        task.clear()
        gc.collect()

    step()  # warms up
    resident = resident_growth(step)
    found = forward()
    live = live_bytes(lambda: run(found))
    return {"m": task.losses, "n": task.elements(), "live": live, "resident": resident}


def in_own_process(
    ways: Sequence[str], widths: tuple[int, int, int], layers: int, modalities: int
) -> list[Row]:
    """The memory of ``ways``, one after another in a process of their own.

    Args:
        ways: names, of WAYS.
        widths: of the MLP, the U-Net and the private encoders.
        layers: of the MLP.
        modalities: of the U-Net.

    Returns:
        Of each way, and each model that it fits: task, way, m, n; live: bytes, at most at once of
        all tensors that the backward made, and the forwards of closures; resident: growth of the
        process over a second step, None where the system does not tell.

    Raises:
        RuntimeError: the process failed; with what it wrote.
    """
    # Every block of 128 KiB or more is handed back as soon as it is freed, so that what is resident
    # is what is in use.
    limits = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
    wanted = json.dumps([list(ways), list(widths), layers, modalities, torch.get_num_threads()])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.memory", wanted],
        env={**os.environ, **limits}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {ways} failed:\n{done.stderr}")
    found: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(wanted: str) -> None:
    ways, (mlp, unet, encoders), layers, modalities, threads = json.loads(wanted)
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    tasks: dict[str, tuple[Sequence[str], Callable[[], Task]]] = {
        # Small batches and crops: what a forward keeps is little next to the rows.
        "MLP": (ways, lambda: MLPTask(layers, mlp, losses=8, batch=2, device=cpu)),
        "U-Net": (ways, lambda: UNetTask(modalities, unet, crop=16, batch=1, device=cpu)),
        "encoders": ((PLAIN, EXACT), lambda: EncodersTask(encoders, cpu)),  # who take closures
    }
    found = []
    for name, (fitting, make) in tasks.items():
        for way in [way for way in ways if way in fitting]:
            task = make()
            if forward := WAYS[way].forward(task, False):
                measured = _measure(task, forward, WAYS[way].backward(task))
                found.append({"task": name, "way": way, **measured})
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
