"""Memory of one way to a gradient, in a process of its own: python -m benchmarks.speed.memory.

The parent, benchmarks.speed, starts one per way and reads the line of JSON that it prints.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.speed.tasks import EncodersTask, MLPTask, Task, UNetTask
from benchmarks.speed.timing import LiveBytes, reset_peak_resident, resident_bytes
from benchmarks.speed.ways import METHODS, Method

__all__ = ["in_own_process", "measure"]

_CPU = torch.device("cpu")


def measure(method: Method, make: Callable[[], Task]) -> dict[str, Any]:
    """Bytes of one step after a first that warms up.

    Returns:
        losses (m), elements (n); live: at most alive at once of all tensors that the backward
        made, and the forwards of closures; resident: growth of the process from before the forward
        to the peak, None where the system does not tell.
    """
    gc.freeze()  # what exists now is not looked at again: collecting takes less time
    task = make()
    forward, run = method.forward_of(task, apart=False), method.backward(task)

    def step() -> None:
        task.clear()
        run(forward())
        task.clear()
        gc.collect()

    step()
    resident: int | None = None
    if reset_peak_resident():
        before, _ = resident_bytes()
        step()
        resident = resident_bytes()[1] - before
    found = forward()
    with LiveBytes() as live:
        run(found)
    elements = sum(parameter.numel() for parameter in task.parameters())
    m = len(found[0]) if method.forward == "features" else len(found)
    gc.unfreeze()
    return {"losses": m, "elements": elements, "live": live.peak, "resident": resident}


def in_own_process(
    methods: Sequence[str], widths: tuple[int, int, int], layers: int, modalities: int
) -> list[dict[str, Any]]:
    """What :func:`measure` says of ``methods``, one after another in a process of their own.

    Args:
        methods: names, of METHODS.
        widths: of the MLP, the U-Net and the private encoders.
        layers: of the MLP.
        modalities: of the U-Net.

    Returns:
        For each method, and each model that it fits, what was measured with "task" and "method".

    Raises:
        RuntimeError: the process failed; with what it wrote.
    """
    # Every block of 128 KiB or more is handed back as soon as it is freed, so that what is resident
    # is what is in use.
    limits = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
    wanted = json.dumps([list(methods), list(widths), layers, modalities, torch.get_num_threads()])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.memory", wanted],
        env={**os.environ, **limits},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {methods} failed:\n{done.stderr}")
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: Sequence[str]) -> int:
    names, (mlp, unet, encoders), layers, modalities, threads = json.loads(argv[0])
    torch.set_num_threads(threads)
    tasks: dict[str, Callable[[], Task]] = {
        # Small batches and crops: what a forward keeps is little next to the rows.
        "MLP": lambda: MLPTask(layers=layers, width=mlp, losses=8, batch=2, device=_CPU),
        "U-Net": lambda: UNetTask(modalities, width=unet, crop=16, batch=1, device=_CPU),
        "encoders": lambda: EncodersTask(encoders, _CPU),
    }
    found = [
        {"task": task, "method": method.name, **measure(method, make)}
        for method in METHODS
        for task, make in tasks.items()
        if method.name in names and method.fits(make(), apart=False)
    ]
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
