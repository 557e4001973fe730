"""The loop that each recipe must equal: plain torch and the oracle, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from tests.reference import Row, decouple_window, gmd_loop


def by_hand(
    model: nn.Module,
    data: list[dict[str, Tensor]],
    bases: Iterable[Optimizer],
    *,
    window: int = 1,
    joint: bool = False,
    clip: float | None = None,
    scheduler: Callable[[Optimizer], Any] | None = None,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    before: Callable[[nn.Module, int], object] = lambda model, step: None,
    after: Callable[[nn.Module], object] = lambda model: None,
    **options: Any,
) -> None:
    """Train ``model`` in place, eight samples a micro-batch.

    ``joint``: each micro-batch is decoupled on its own, and divided by their number. ``before`` and
    ``after`` see the model around each step; ``options`` are those of the oracle.
    """
    bases = list(bases)
    schedulers = [scheduler(base) for base in bases] if scheduler else []
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    batches: list[dict[str, Row | None]] = []
    for step, batch in enumerate(DataLoader(data, batch_size=8)):
        before(model, step)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            losses = model(**batch)
        batches.append(rows({name: x and scaler.scale(x) for name, x in losses.items()}, model))
        if len(batches) < window:
            continue
        windows = [[one] for one in batches] if joint else [batches]
        batches = []
        merged = [decouple_window(one, **{"merge": gmd_loop} | options) for one in windows]
        for p, parts in zip(model.parameters(), zip(*merged, strict=True), strict=True):
            there = [g for g in parts if g is not None]
            p.grad = (sum(there) / len(windows)).to(p) if there else None
        for base in bases:
            scaler.unscale_(base)
            if clip:
                owned = [p for group in base.param_groups for p in group["params"]]
                nn.utils.clip_grad_norm_(owned, clip)
            scaler.step(base)
        scaler.update()
        for one in schedulers:
            one.step()
        after(model)


def rows(losses: dict[str, Tensor | None], model: nn.Module) -> dict[str, Row | None]:
    """The gradients of all parameters by each loss; None where one is frozen or not reached."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found: dict[str, Row | None] = dict.fromkeys(losses)
    for name, loss in losses.items():
        if loss is not None:
            row = iter(torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True))
            found[name] = [next(row) if p.requires_grad else None for p in model.parameters()]
    return found
