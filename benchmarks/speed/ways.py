"""The ways to one gradient that are compared: whole steps, and rows that are already there.

A new way is one line in WAYS or in PROJECTIONS.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchjd.aggregation import PCGrad, PCGradWeighting, UPGrad
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad, mtl_backward

from benchmarks.speed.tasks import Rows, Task, UNetTask
from gradsplit import ModalityDecoupledOptimizer, rules
from gradsplit.jacobian import Block
from gradsplit.rows import gramian, merged

__all__ = ["FORWARDS", "KERNELS", "PROJECTIONS", "WAYS", "Way", "pairwise_pcgrad"]

SAMPLE = 5  # losses drawn per step, as in the GMD paper

# --- whole steps ---------------------------------------------------------------------------------


def _all(task: Task, apart: bool) -> Callable[[], Any]:
    run = task.apart if apart else task.together
    return lambda: run(range(task.losses))


def _sampled(task: Task, apart: bool) -> Callable[[], Any]:
    run, generator = task.apart if apart else task.together, torch.Generator().manual_seed(0)

    def sampled() -> list[Any]:  # drawn anew at each step
        drawn = torch.randperm(task.losses, generator=generator)[:SAMPLE]
        return run(sorted(drawn.tolist()))

    return sampled


def _batched(task: Task, apart: bool) -> Callable[[], Any] | None:
    return task.batched if isinstance(task, UNetTask) and not apart else None


def _with_features(task: Task, apart: bool) -> Callable[[], Any] | None:
    """The losses, and the outputs of the trunk that they are computed from."""

    def run() -> tuple[list[Any], list[Tensor]]:
        features: list[Tensor] = []
        handle = task.trunk.register_forward_hook(lambda module, args, out: features.append(out))
        try:
            return task.together(range(task.losses)), features
        finally:
            handle.remove()

    return None if apart else run


Backward = Callable[[Any], object]
"""Takes what the forward of a way returned; leaves the gradient in ``.grad``."""


def _joint(task: Task) -> Backward:
    return lambda losses: torch.stack(losses).sum().backward()


def _one_by_one(task: Task) -> Backward:
    def run(losses: Sequence[Any]) -> None:
        for number, loss in enumerate(losses, start=1):
            if callable(loss):  # a closure: its graph is its own
                loss().backward()
            else:
                loss.backward(retain_graph=number < len(losses))

    return run


def _ours(conflicts_of: str | None = None, **options: Any) -> Callable[[Task], Backward]:
    def make(task: Task) -> Backward:
        chosen = dict(options)
        if conflicts_of is not None:
            chosen["conflict_parameters"] = getattr(task, conflicts_of).parameters()
        base = torch.optim.SGD(task.parameters(), lr=0.0)
        return ModalityDecoupledOptimizer(base, **chosen).backward

    return make


def _autojac(chunk: int | None) -> Callable[[Task], Backward]:
    def make(task: Task) -> Backward:
        def run(losses: Sequence[Tensor]) -> None:
            backward(losses, inputs=task.parameters(), parallel_chunk_size=chunk)
            jac_to_grad(task.parameters(), PCGrad())

        return run

    return make


def _mtl(task: Task) -> Backward:
    def run(found: tuple[list[Tensor], list[Tensor]]) -> None:
        losses, features = found
        # Losses meet between their heads and the features: without this their graphs are freed.
        mtl_backward(losses, features=features, retain_graph=True, parallel_chunk_size=1)
        jac_to_grad([p for p in task.parameters() if hasattr(p, "jac")], PCGrad())

    return run


def _autogram(task: Task) -> Backward:
    engine, weighting = Engine(task.model, batch_dim=None), PCGradWeighting()

    def run(losses: list[Tensor]) -> None:
        joined = torch.stack(losses)
        joined.backward(weighting(engine.compute_gramian(joined)))

    return run


@dataclass(frozen=True)
class Way:
    """A forward and a backward, each made once per task.

    Attributes:
        backward: of the task.
        forward: of the task, and of whether each loss has a forward of its own; None where this
            way has no such forward.
    """

    backward: Callable[[Task], Backward]
    forward: Callable[[Task, bool], Callable[[], Any] | None] = _all


JOINT, PLAIN, BATCHED = "joint sum", "m backwards", "m backwards, batched"
EXACT, SAMPLED, HALF = "ours", "ours, k = 5", "ours, bfloat16 rows"
ON_HEAD, ON_BLOCK = "ours, conflicts of head", "ours, conflicts of last block"
AUTOJAC, VMAP, AUTOGRAM = (
    "TorchJD autojac, one by one", "TorchJD autojac, vmap", "TorchJD autogram",
)  # fmt: skip
GROWING = (JOINT, PLAIN, EXACT, AUTOJAC, VMAP)  # of which the growth is measured
WAYS: Mapping[str, Way] = {
    JOINT: Way(_joint),
    PLAIN: Way(_one_by_one),
    BATCHED: Way(_one_by_one, _batched),
    EXACT: Way(_ours()),
    SAMPLED: Way(_ours(), _sampled),
    ON_HEAD: Way(_ours("head")),
    ON_BLOCK: Way(_ours("block")),
    HALF: Way(_ours(row_dtype=torch.bfloat16)),
    AUTOJAC: Way(_autojac(1)),
    VMAP: Way(_autojac(None)),
    "TorchJD mtl_backward": Way(_mtl, _with_features),
    AUTOGRAM: Way(_autogram),
}


def _branches(task: UNetTask) -> list[Tensor]:
    return [task.model(task.volume, available=(name,)) for name in task.model.config.modalities]


ONE_FORWARD, BRANCHES = "all modalities", "a loop over modalities"
EVALUATION, PASSES = "all combinations, no gradients", "one pass per modality, no gradients"
FORWARDS: Mapping[str, Callable[[UNetTask], Any]] = {
    ONE_FORWARD: lambda task: task.model(task.volume),
    BRANCHES: lambda task: torch.stack(_branches(task)).mean(0),
    EVALUATION: torch.no_grad()(
        lambda task: task.model(task.volume, combinations=task.combinations)
    ),
    PASSES: torch.no_grad()(_branches),
}

# --- projection: the rows are there --------------------------------------------------------------


def pairwise_pcgrad(matrix: Tensor, orders: Sequence[Sequence[int]]) -> Tensor:
    """PCGrad as its paper defines it, pair by pair on flat vectors: (m, n) -> (n,).

    Row i meets the others in the order ``orders[i]`` and loses its component along each that it
    conflicts with; all are summed.
    """
    merged = torch.zeros_like(matrix[0])
    for i, order in enumerate(orders):
        running = matrix[i].clone()
        for j in order:
            if j != i and (dot := torch.dot(running, matrix[j])) < 0:
                running -= dot / torch.dot(matrix[j], matrix[j]) * matrix[j]
        merged += running
    return merged


def _copying(fused: bool | None) -> Callable[[Rows], dict[Tensor, Tensor]]:
    def project(rows: Rows) -> dict[Tensor, Tensor]:
        block = Block(rows.parameters, rows.matrix.dtype)
        for number, gradients in enumerate(rows.gradients):
            block.add(number, gradients)
        return block.gradients(_decoupled(block.in_order()[1], fused))

    return project


def _decoupled(rows: Sequence[Tensor], fused: bool | None = None) -> Tensor:
    return merged(rows, rules.gmd(gramian(rows, fused)), rows[0].dtype, fused)


def _merged(rows: Rows) -> Tensor:
    ones = rows.matrix.new_ones(len(rows.matrix), dtype=torch.float64)
    return merged(rows.matrix.unbind(), ones, rows.matrix.dtype)


READ, COPYING, FILLED, LOOP = "one read", "ours", "ours, rows filled", "pairwise loop"
JD_PCGRAD = "TorchJD PCGrad"
UNFUSED = "ours, without kernels"  # on a GPU only: elsewhere ours has none
PROJECTIONS: Mapping[str, Callable[[Rows], Any]] = {
    READ: lambda rows: rows.matrix.sum(),
    COPYING: _copying(None),
    UNFUSED: _copying(False),
    FILLED: lambda rows: _decoupled(rows.matrix.unbind()),
    LOOP: lambda rows: pairwise_pcgrad(rows.matrix, rows.orders),
    JD_PCGRAD: lambda rows: PCGrad()(rows.matrix),
    "TorchJD UPGrad": lambda rows: UPGrad()(rows.matrix),
}

COPY = "device copy"
KERNELS: Mapping[str, tuple[Callable[[int], int], Callable[[Rows], Any]]] = {
    # On a GPU: how many rows are read and written, of m, and what is timed.
    COPY: (lambda m: 2 * m, lambda rows: rows.matrix.clone()),
    "fused Gramian": (lambda m: m, lambda rows: gramian(rows.matrix.unbind())),
    "fused merge": (lambda m: m + 1, _merged),
}
