"""Hypothesis strategies: Jacobians, the orders in which rows meet, and which loss reaches what.

Elements are small multiples of 1/8 and row scales lie in [1e-6, 1e6]: a Gramian squares them, and
float64 must still resolve it.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

_elements = st.integers(-32, 32).map(lambda eighths: eighths / 8)
# 1024 elements fill a row of their own: nothing is put between or behind them.
_sizes = st.sampled_from([1, 2, 3, 1024])
_scales = st.one_of(st.just(1.0), st.integers(-6, 6).map(lambda e: 10.0**e))


@st.composite
def jacobians(
    draw: st.DrawFn, min_rows: int = 1, max_rows: int = 6, max_columns: int = 8
) -> Tensor:
    """(m, n) float64: ordinary, zero, nearly parallel and opposed rows, of very different norms."""
    m = draw(st.integers(min_rows, max_rows))
    n = draw(st.integers(1, max_columns))
    rows: list[Tensor] = []
    for i in range(m):
        kinds = ["ordinary", "ordinary", "ordinary", "zero"]
        if i:
            kinds += ["parallel", "opposed"]
        kind = draw(st.sampled_from(kinds))
        if kind == "zero":
            rows.append(torch.zeros(n, dtype=torch.float64))
            continue
        row = torch.tensor(draw(st.lists(_elements, min_size=n, max_size=n)), dtype=torch.float64)
        if kind in ("parallel", "opposed"):
            near = rows[draw(st.integers(0, i - 1))]
            row = near + 1e-4 * near.norm() * row if kind == "parallel" else row * 1e-4 - near
            rows.append(row)
        else:
            rows.append(row * draw(_scales))
    jacobian = torch.stack(rows)
    return jacobian


@st.composite
def orders(draw: st.DrawFn, m: int) -> Tensor:
    """(m, m) int64: row i is a permutation of 0..m-1."""
    return torch.tensor([draw(st.permutations(range(m))) for _ in range(m)], dtype=torch.int64)


@st.composite
def jacobians_with_orders(
    draw: st.DrawFn, min_rows: int = 1, max_rows: int = 5
) -> tuple[Tensor, Tensor]:
    jacobian = draw(jacobians(min_rows, max_rows))
    return jacobian, draw(orders(len(jacobian)))


@st.composite
def _gradients(draw: st.DrawFn, size: int) -> Tensor:
    few = min(size, 3)
    values = draw(st.lists(_elements, min_size=few, max_size=few))
    return torch.tensor(values, dtype=torch.float64).repeat(-(-size // few))[:size]


@st.composite
def partial_rows(
    draw: st.DrawFn, max_losses: int = 4, max_params: int = 4
) -> list[list[Tensor | None]]:
    """m rows over P parameters; each loss reaches one parameter at least."""
    m = draw(st.integers(1, max_losses))
    sizes = draw(st.lists(_sizes, min_size=1, max_size=max_params))
    rows: list[list[Tensor | None]] = []
    for _ in range(m):
        surely = draw(st.integers(0, len(sizes) - 1))
        scale = draw(st.sampled_from([1.0, 1.0, 1e-3, 1e3]))
        row: list[Tensor | None] = []
        for p, size in enumerate(sizes):
            if p != surely and draw(st.sampled_from([False, False, True])):
                row.append(None)
            else:
                row.append(scale * draw(_gradients(size)))
        rows.append(row)
    return rows


@st.composite
def windows(
    draw: st.DrawFn, max_batches: int = 3, max_params: int = 3
) -> tuple[list[int], list[dict[str, list[Tensor | None] | None]]]:
    """Sizes of parameters, and micro-batches: each has some of the losses, or None for them.

    The first micro-batch has one loss at least; each loss reaches one parameter at least.
    """
    sizes = draw(st.lists(_sizes, min_size=1, max_size=max_params))
    batches: list[dict[str, list[Tensor | None] | None]] = []
    for number in range(draw(st.integers(1, max_batches))):
        names = draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=3, unique=True))
        batch: dict[str, list[Tensor | None] | None] = {}
        for place, name in enumerate(names):
            there = (number == 0 and place == 0) or draw(st.integers(0, 3))
            batch[name] = draw(_reaching_rows(sizes)) if there else None
        batches.append(batch)
    return sizes, batches


@st.composite
def _reaching_rows(draw: st.DrawFn, sizes: list[int]) -> list[Tensor | None]:
    surely = draw(st.integers(0, len(sizes) - 1))
    return [
        draw(_gradients(size)) if p == surely or draw(st.integers(0, 2)) else None
        for p, size in enumerate(sizes)
    ]
