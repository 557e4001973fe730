"""What the core tests share: parameters for given rows, comparison, and watches on memory."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from gradsplit import ModalityDecoupledOptimizer
from tests.reference import Row, linear_losses, norms

SCOPES = ["shared", "all"]
REDUCTIONS = ["mean", "sum", "released"]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def parameters_like(rows: Sequence[Row], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """One per column of ``rows``; a parameter that nobody reaches has one element."""
    sizes = [
        next((row[p].shape for row in rows if row[p] is not None), torch.Size([1]))
        for p in range(len(rows[0]))
    ]
    return [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes]


def optimizer_of(params: Iterable[Tensor], **options: object) -> ModalityDecoupledOptimizer:
    return ModalityDecoupledOptimizer(torch.optim.SGD(list(params), lr=0.1), **options)


def merged(rows: Sequence[Row], **options: object) -> Row:
    """What one ``backward`` leaves in ``.grad``; a scope may be given by indices."""
    params = parameters_like(rows)
    scope = options.get("scope", "shared")
    if not isinstance(scope, str):
        options["scope"] = [params[p] for p in scope]
    optimizer_of(params, **options).backward(linear_losses(params, rows))
    return [p.grad for p in params]


def assert_rows_equal(
    ours: Sequence[Tensor | None], expected: Row, rows: Sequence[Row], within: float = 1e-12
) -> None:
    """Equal up to ``within`` times the largest row norm, and None in the same places."""
    tolerance = within * max(norms(rows))
    for p, (one, other) in enumerate(zip(ours, expected, strict=True)):
        assert (one is None) == (other is None), f"parameter {p}: {one} instead of {other}"
        if one is not None and other is not None:
            assert one.shape == other.shape
            torch.testing.assert_close(one.to(other), other, rtol=0, atol=tolerance)


class Held:
    """A tensor saved for backward; alive as long as the graph that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class GraphWatch:
    """Counts how many of the graphs made under ``recording`` are still alive."""

    def __init__(self) -> None:
        self._held: dict[str, list[weakref.ref[Held]]] = {}

    def recording(self, name: str) -> saved_tensors_hooks:
        held = self._held.setdefault(name, [])

        def pack(tensor: Tensor) -> Held:
            box = Held(tensor)
            held.append(weakref.ref(box))
            return box

        return saved_tensors_hooks(pack, lambda box: box.tensor)

    def alive(self) -> set[str]:
        gc.collect()
        return {name for name, held in self._held.items() if any(ref() is not None for ref in held)}


def peak_bytes(call: Callable[[], object], folder: Path) -> int:
    """The most that was alive at one moment of what ``call`` allocated, as the allocator saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak
