"""What the speed benchmark compares: models with several losses, and ways to one gradient.

A new way is one line in METHODS (whole steps) or in PROJECTIONS (rows that are already there).
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchjd.aggregation import PCGrad, PCGradWeighting, UPGrad
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad, mtl_backward

from benchmarks.speed.tasks import EncodersTask, Losses, Task
from gradsplit import ModalityDecoupledOptimizer, rules
from gradsplit.jacobian import Block
from gradsplit.rows import gramian, merged
from reference_models.unet3d import DynamicSharingUNet3d

__all__ = [
    "KERNELS",
    "METHODS",
    "PROJECTIONS",
    "Jacobian",
    "Method",
    "pairwise_pcgrad",
    "unet_sizes",
]

SAMPLE = 5  # losses drawn per step, as in the GMD paper


# --- projection: the rows are there --------------------------------------------------------------


@dataclass(frozen=True)
class Jacobian:
    """Random rows, in [-1, 1]: about half of the pairs conflict.

    Attributes:
        parameters: the keys of the rows; their content is never touched.
        rows: m mappings parameter -> gradient, each gradient a tensor of its own, as autograd
            leaves them.
        matrix: (m, n), a copy of the same numbers.
        orders: (m, m), row i a permutation: whom row i meets, one after another.
        weights: (m,), of a merge that is timed alone.
    """

    parameters: list[Tensor]
    rows: list[dict[Tensor, Tensor]]
    matrix: Tensor
    orders: Tensor
    weights: Tensor

    @classmethod
    def random(cls, rows: int, sizes: Sequence[int], device: torch.device) -> "Jacobian":
        """Of ``rows`` rows, for parameters of ``sizes`` elements."""
        parameters = [torch.empty(size, device=device) for size in sizes]
        matrix = torch.empty(rows, sum(sizes), device=device).uniform_(-1, 1)
        mappings = [
            {p: part.clone() for p, part in zip(parameters, line.split(list(sizes)), strict=True)}
            for line in matrix
        ]
        orders = torch.stack([torch.randperm(rows) for _ in range(rows)])
        weights = torch.ones(rows, dtype=torch.float64, device=device)
        return cls(parameters, mappings, matrix, orders, weights)


def unet_sizes(columns: int) -> list[int]:
    """The sizes of the U-Net's tensors, scaled to ``columns`` elements in all."""
    with torch.device("meta"):
        sizes = [parameter.numel() for parameter in DynamicSharingUNet3d().parameters()]
    scaled = [max(1, size * columns // sum(sizes)) for size in sizes]
    scaled[scaled.index(max(scaled))] += columns - sum(scaled)
    return scaled


def pairwise_pcgrad(matrix: Tensor, orders: Tensor) -> Tensor:
    """PCGrad as its paper defines it, pair by pair on flat vectors: (m, n), (m, m) -> (n,).

    Row i meets the others in the order ``orders[i]`` and loses its component along each that it
    conflicts with; all are summed.
    """
    merged = torch.zeros_like(matrix[0])
    for i, order in enumerate(orders.tolist()):
        running = matrix[i].clone()
        for j in order:
            if j != i and (dot := torch.dot(running, matrix[j])) < 0:
                running -= dot / torch.dot(matrix[j], matrix[j]) * matrix[j]
        merged += running
    return merged


def _ours(fused: bool) -> Callable[[Jacobian], Any]:
    def project(jacobian: Jacobian) -> dict[Tensor, Tensor]:
        block = Block(jacobian.parameters, jacobian.matrix.dtype)
        for number, gradients in enumerate(jacobian.rows):
            block.add(number, list(gradients.values()))
        return block.gradients(_decoupled_row(block.in_order()[1], fused))

    return project


def _decoupled_row(rows: Sequence[Tensor], fused: bool | None) -> Tensor:
    return merged(rows, rules.gmd(gramian(rows, fused)), rows[0].dtype, fused)


READ, OURS, FILLED, LOOP = "one read", "ours", "ours, rows filled", "pairwise loop"
JD_PCGRAD = "TorchJD PCGrad"
FUSED = "ours, fused"  # on a GPU only: Triton's interpreter is not made for speed
PROJECTIONS: Mapping[str, Callable[[Jacobian], Any]] = {
    READ: lambda jacobian: jacobian.matrix.sum(),
    OURS: _ours(fused=False),
    FUSED: _ours(fused=True),
    FILLED: lambda jacobian: _decoupled_row(jacobian.matrix.unbind(), None),
    LOOP: lambda jacobian: pairwise_pcgrad(jacobian.matrix, jacobian.orders),
    JD_PCGRAD: lambda jacobian: PCGrad()(jacobian.matrix),
    "TorchJD UPGrad": lambda jacobian: UPGrad()(jacobian.matrix),
}

COPY = "device copy"
KERNELS: Mapping[str, tuple[Callable[[int], int], Callable[[Jacobian], Any]]] = {
    # On a GPU: how many rows are read and written, of m, and what is timed.
    COPY: (lambda m: 2 * m, lambda jacobian: jacobian.matrix.clone()),
    "fused Gramian": (lambda m: m, lambda jacobian: gramian(jacobian.matrix.unbind())),
    "fused merge": (
        lambda m: m + 1,
        lambda jacobian: merged(jacobian.matrix.unbind(), jacobian.weights, jacobian.matrix.dtype),
    ),
}


# --- whole steps: models with several losses -----------------------------------------------------


# --- whole steps: ways to one gradient -----------------------------------------------------------

Backward = Callable[[Any], object]
"""Takes what the forward of a method returned; leaves the gradient in ``.grad``."""


@dataclass(frozen=True)
class Method:
    """One way.

    Attributes:
        name: in tables and pictures.
        backward: made once per task; of the task.
        forward: "losses" (all of them); "sampled": five, drawn anew at each step; "batched": all
            modalities in one batch, where the task has that; "features": the losses and what
            they are computed from (forwards that are shared only).
        option: an argument of ModalityDecoupledOptimizer without which there is no such method.
    """

    name: str
    backward: Callable[[Task], Backward]
    forward: str = "losses"
    option: str | None = None

    def exists(self) -> bool:
        """Whether this gradsplit has the option it needs."""
        known = inspect.signature(ModalityDecoupledOptimizer).parameters
        return self.option is None or self.option in known

    def fits(self, task: Task, apart: bool) -> bool:
        """Whether it exists for that task, with forwards that are shared or ``apart``."""
        if not self.exists():
            return False
        if isinstance(task, EncodersTask):
            return self.name in (PLAIN, EXACT)  # which take closures
        if self.forward == "batched":
            return not apart and type(task).batched is not Task.batched
        return not (apart and self.forward == "features")

    def forward_of(self, task: Task, apart: bool, seed: int = 0) -> Callable[[], Any]:
        """The forward: call it once per step."""
        run = task.apart if apart else task.together
        everyone = list(range(task.losses))
        if self.forward == "sampled":
            generator = torch.Generator().manual_seed(seed)

            def sampled() -> Losses:
                drawn = torch.randperm(task.losses, generator=generator)[:SAMPLE]
                return run(sorted(drawn.tolist()))

            return sampled
        if self.forward == "batched":
            return task.batched
        if self.forward == "features":
            return lambda: _with_features(task)
        return lambda: run(everyone)


def _with_features(task: Task) -> tuple[Losses, list[Tensor]]:
    """The losses, and the outputs of the trunk that they are computed from."""
    features: list[Tensor] = []
    handle = task.trunk.register_forward_hook(lambda module, args, out: features.append(out))
    try:
        return task.together(range(task.losses)), features
    finally:
        handle.remove()


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


def _decoupled(
    conflicts_of: Callable[[Task], nn.Module] | None = None, **options: Any
) -> Callable[[Task], Backward]:
    def make(task: Task) -> Backward:
        chosen = dict(options)
        if conflicts_of is not None:
            chosen["conflict_parameters"] = conflicts_of(task).parameters()
        base = torch.optim.SGD(task.parameters(), lr=0.0)
        return ModalityDecoupledOptimizer(base, **chosen).backward

    return make


def _autojac(chunk: int | None) -> Callable[[Task], Backward]:
    def make(task: Task) -> Backward:
        def run(losses: Losses) -> None:
            backward(losses, inputs=task.parameters(), parallel_chunk_size=chunk)
            jac_to_grad(task.parameters(), PCGrad())

        return run

    return make


def _mtl(task: Task) -> Backward:
    def run(found: tuple[Losses, list[Tensor]]) -> None:
        losses, features = found
        # Losses meet between their heads and the features: without this their graphs are freed.
        mtl_backward(losses, features=features, retain_graph=True, parallel_chunk_size=1)
        jac_to_grad([p for p in task.parameters() if hasattr(p, "jac")], PCGrad())

    return run


def _autogram(task: Task) -> Backward:
    engine, weighting = Engine(task.model, batch_dim=None), PCGradWeighting()

    def run(losses: Losses) -> None:
        joined = torch.stack(losses)
        joined.backward(weighting(engine.compute_gramian(joined)))

    return run


JOINT, PLAIN, BATCHED = "joint sum", "m backwards", "m backwards, batched"
EXACT, SAMPLED, HALF = "ours", "ours, k = 5", "ours, bfloat16 rows"
ON_HEAD, ON_BLOCK = "ours, conflicts of head", "ours, conflicts of last block"
AUTOJAC, VMAP, AUTOGRAM = (
    "TorchJD autojac, one by one", "TorchJD autojac, vmap", "TorchJD autogram",
)  # fmt: skip
GROWING = (JOINT, PLAIN, EXACT, AUTOJAC, VMAP)  # of which the growth is measured
METHODS = (
    Method(JOINT, _joint),
    Method(PLAIN, _one_by_one),
    Method(BATCHED, _one_by_one, forward="batched"),
    Method(EXACT, _decoupled()),
    Method(SAMPLED, _decoupled(), forward="sampled"),
    Method(ON_HEAD, _decoupled(lambda task: task.head), option="conflict_parameters"),
    Method(ON_BLOCK, _decoupled(lambda task: task.block), option="conflict_parameters"),
    Method(HALF, _decoupled(row_dtype=torch.bfloat16), option="row_dtype"),
    Method(AUTOJAC, _autojac(1)),
    Method(VMAP, _autojac(None)),
    Method("TorchJD mtl_backward", _mtl, forward="features"),
    Method(AUTOGRAM, _autogram),
)
