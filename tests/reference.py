"""The oracle: gradient decoupling written from its definition, in float64 and in gradient space.

Every function works on the gradients themselves, pair by pair, and knows nothing of Gramians or
weights. Slow on purpose. ``linear_losses`` makes losses whose gradients are chosen beforehand, and
``Snapshot`` records what a refused call must leave as it was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

Row = list[Tensor | None]
"""The gradient of one loss, parameter by parameter; ``None`` where the loss does not reach."""

MicroBatch = Mapping[str, Row | None]
"""The gradients of each loss in one micro-batch; ``None``: unavailable."""

Merge = Callable[[Tensor], Tensor]
"""Jacobian (m, n) -> merged gradient (n,), the sum of the projected rows."""


def gmd_loop(jacobian: Tensor) -> Tensor:
    """For every conflicting pair both originals lose their component along the other; then sum."""
    rows = [row.double() for row in jacobian]
    projected = [row.clone() for row in rows]
    for j in range(len(rows)):
        for k in range(len(rows)):
            if j != k and (dot := torch.dot(rows[j], rows[k])) < 0:
                projected[j] -= dot / torch.dot(rows[k], rows[k]) * rows[k]
    return torch.stack(projected).sum(0)


def pcgrad_rows(jacobian: Tensor, order: Tensor) -> Tensor:
    """Row i meets the other original rows in ``order[i]``, losing what conflicts. (m, n)."""
    rows = [row.double() for row in jacobian]
    projected = []
    for i, row in enumerate(rows):
        running = row.clone()
        for j in order[i].tolist():
            if j != i and (dot := torch.dot(running, rows[j])) < 0:
                running = running - dot / torch.dot(rows[j], rows[j]) * rows[j]
        projected.append(running)
    return torch.stack(projected)


def pcgrad_loop(jacobian: Tensor, order: Tensor) -> Tensor:
    """The sum of the projected rows of ``pcgrad_rows``."""
    return pcgrad_rows(jacobian, order).sum(0)


def decouple(
    rows: Sequence[Row],
    merge: Merge = gmd_loop,
    scope: str | Iterable[int] = "shared",
    reduction: str = "mean",
) -> Row:
    """What one ``backward`` adds to ``.grad``, per parameter, in float64; ``None``: untouched.

    ``scope`` is ``"shared"``, ``"all"`` or the indices of the parameters in it.
    """
    return decouple_window([{str(i): row for i, row in enumerate(rows)}], merge, scope, reduction)


def decouple_window(
    micro_batches: Sequence[MicroBatch],
    merge: Merge = gmd_loop,
    scope: str | Iterable[int] = "shared",
    reduction: str = "mean",
) -> Row:
    """As :func:`decouple`, of several micro-batches; shared is what every backward reaches."""
    rows = list(mean_rows(micro_batches).values())
    backwards = [row for batch in micro_batches for row in batch.values() if row is not None]
    m, places = len(rows), range(len(rows[0]))
    shared = {p for p in places if all(row[p] is not None for row in backwards)}
    words = {"shared": shared, "all": set(places)}
    chosen = words[scope] if isinstance(scope, str) else set(scope)
    reached = [[row[p] for row in rows if row[p] is not None] for p in places]
    merged: Row = [torch.stack(some).sum(0) if some else None for some in reached]
    if inside := [p for p in sorted(chosen) if reached[p]]:
        like = [reached[p][0] for p in inside]
        jacobian = [[_dense(row[p], reached[p][0]) for p in inside] for row in rows]
        whole = merge(torch.stack([torch.cat(parts) for parts in jacobian]))
        pieces = whole.split([_reals(one).numel() for one in like])
        for p, piece, one in zip(inside, pieces, like, strict=True):
            piece = piece.view_as(_reals(one)).clone()
            merged[p] = torch.view_as_complex(piece) if one.is_complex() else piece
    for p, total in enumerate(merged):
        divide = reduction == "mean" or (reduction == "released" and p in shared)
        if divide and total is not None:
            merged[p] = total / m
    return merged


def mean_rows(micro_batches: Sequence[MicroBatch]) -> dict[str, Row]:
    """The mean row of each loss over the micro-batches that have it, in the order they came up."""
    available: dict[str, list[Row]] = {}
    for batch in micro_batches:
        for name, row in batch.items():
            if row is not None:
                available.setdefault(name, []).append(row)
    return {
        name: [
            torch.stack(some).sum(0) / len(rows) if (some := _reaching(column)) else None
            for column in zip(*rows, strict=True)
        ]
        for name, rows in available.items()
    }


def _reaching(column: Iterable[Tensor | None]) -> list[Tensor]:
    """The gradients of one parameter that are there, in double precision."""
    wide = {True: torch.complex128, False: torch.float64}
    return [g.to(wide[g.is_complex()]) for g in column if g is not None]


def _dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    """One parameter's part of a row of the Jacobian: zeros where the loss does not reach."""
    return _reals(torch.zeros_like(like) if gradient is None else gradient).flatten()


def _reals(tensor: Tensor) -> Tensor:
    """A complex number is a pair of reals."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def norms(rows: Sequence[Row]) -> list[float]:
    """The length of every row."""
    return [
        math.hypot(*(float(_reaching([g])[0].norm()) for g in r if g is not None)) for r in rows
    ]


def linear_losses(params: Sequence[Tensor], rows: Sequence[Row]) -> list[Tensor]:
    """Scalar losses, graphs apart, whose gradients are exactly ``rows``."""
    losses = []
    for row in rows:
        pairs = [(p, g.to(p)) for p, g in zip(params, row, strict=True) if g is not None]
        terms = [(p * g.conj()).real.sum() for p, g in pairs]  # of a complex p too
        losses.append(torch.stack([term.to(terms[0]) for term in terms]).sum())
    return losses


class TwoTowers(nn.Module):
    """Two private encoders and a shared trunk, with dead units, norms and a non-linearity."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a = nn.Linear(3, width)
        self.b = nn.Linear(5, width)
        self.trunk = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1)
        )

    def losses(self, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        dtype = self.a.weight.dtype
        x, y = torch.randn(4, 3, generator=generator), torch.randn(4, 5, generator=generator)
        left, right = self.a(x.to(dtype)), self.b(y.to(dtype))
        return {
            "a": (self.trunk(left) - 1).square().mean(),
            "b": (self.trunk(right) + 1).square().mean(),
            "a+b": (self.trunk((left + right) / 2) - 0.3).square().mean(),
        }

    def rows(self, seed: int = 0, names: Sequence[str] = ("a", "b", "a+b")) -> list[Row]:
        losses = self.losses(seed)
        return [
            list(
                torch.autograd.grad(
                    losses[n], list(self.parameters()), retain_graph=True, allow_unused=True
                )
            )
            for n in names
        ]


def towers(dtype: torch.dtype = torch.float64, seed: int = 0) -> TwoTowers:
    torch.manual_seed(seed)
    return TwoTowers().to(dtype)


def grads(module: nn.Module) -> Row:
    return [p.grad for p in module.parameters()]


def same(left: object, right: object) -> bool:
    """Bit-for-bit equality of nested containers of tensors; NaN equals NaN."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and torch.equal(left.nan_to_num(nan=12345.0), right.nan_to_num(nan=12345.0))
            and torch.equal(left.isnan(), right.isnan())
        )
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


class Snapshot:
    """Parameters, ``.grad``, leaves outside, and optimizer state, to be compared bit for bit."""

    def __init__(self, optimizer: torch.optim.Optimizer, others: Iterable[Tensor] = ()) -> None:
        self._optimizer = optimizer
        self._leaves = [p for g in optimizer.param_groups for p in g["params"]] + list(others)
        self._values = [p.detach().clone() for p in self._leaves]
        self._grads = [None if p.grad is None else p.grad.clone() for p in self._leaves]
        self._state = copy.deepcopy(optimizer.state_dict())

    def assert_unchanged(self) -> None:
        for index, p in enumerate(self._leaves):
            assert same(p.detach(), self._values[index]), f"leaf {index} changed"
            if self._grads[index] is None:
                assert p.grad is None, f"leaf {index} gained a .grad"
            else:
                assert p.grad is not None, f"leaf {index} lost its .grad"
                assert same(p.grad, self._grads[index]), f"the .grad of leaf {index} changed"
        assert same(self._optimizer.state_dict(), self._state), "the optimizer state changed"
