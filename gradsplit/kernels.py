"""Triton twins of :func:`gradsplit.rows.gramian_ref` and ``merged_ref``, imported only when used.

One launch each: a table on the device says where the m rows begin, and each program takes a run of
columns. The Gramian's programs multiply in float32 (IEEE, no tf32), add up to 32 columns in float32
and from there on in float64, and write their sums side by side; torch adds these, always in the
same order. Every tile of a row is multiplied by a power of two, which keeps its squares in range
and is undone in float64: exact, and nothing waits for the host. The merge sums in float64.

They run in Triton's interpreter in every test and have been compiled for sm_90; on a GPU they have
not been timed.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["gramian", "merged"]

_COLUMNS = 4096  # of one program
_TILE = 4096  # elements that a program holds at once: rows x columns

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def gramian(rows: Sequence[Tensor]) -> Tensor:
    """(m, m), float64: of at most 64 contiguous rows, float32, bfloat16 or float16."""
    m, n, lines = len(rows), rows[0].numel(), _lines(rows)
    programs = triton.cdiv(n, _COLUMNS)
    shape = (programs, lines, lines)
    partial = torch.empty(shape, dtype=torch.float64, device=rows[0].device)
    if programs > 0:
        with torch.cuda.device_of(partial):
            _gramian_kernel[(programs,)](_addresses(rows), partial, m, n, **_constants(rows))
    return partial.sum(0)[:m, :m]


def merged(rows: Sequence[Tensor], weights: Tensor, dtype: torch.dtype) -> Tensor:
    """(n,), ``dtype``: sum_i w_i g_i of the same rows, ``weights`` (m,) on their device."""
    m, n, weights = len(rows), rows[0].numel(), weights.double().contiguous()
    result = torch.empty_like(rows[0], dtype=dtype)
    if n > 0:
        with torch.cuda.device_of(result):
            _merge_kernel[(triton.cdiv(n, _COLUMNS),)](
                _addresses(rows), weights, result, m, n, **_constants(rows)
            )
    return result


def _lines(rows: Sequence[Tensor]) -> int:
    """Rows of a tile: a power of two, and at least the 16 that a dot product takes."""
    return max(16, int(triton.next_power_of_2(len(rows))))


def _addresses(rows: Sequence[Tensor]) -> Tensor:
    """(m,), int64, on the device; the copy there is not waited for."""
    table = torch.tensor([row.data_ptr() for row in rows], device="cpu")
    if rows[0].device.type == "cuda":
        table = table.pin_memory().to(rows[0].device, non_blocking=True)
    return table


def _constants(rows: Sequence[Tensor]) -> dict[str, object]:
    """What a kernel is compiled for."""
    return {
        "TYPE": _TYPES[rows[0].dtype],
        "ALIGNED": all(row.data_ptr() % 16 == 0 for row in rows),
        "M": _lines(rows),
        "COLUMNS": _COLUMNS,
        "TILE": _TILE // _lines(rows),
    }


@triton.jit
def _tile(addresses, m, columns, n, TYPE: tl.constexpr, ALIGNED: tl.constexpr, M: tl.constexpr):
    """(M, TILE), float32: part of the Jacobian; 0 beyond row m and column n."""
    row = tl.arange(0, M)
    starts = tl.load(addresses + row, mask=row < m, other=0).to(tl.pointer_type(TYPE))
    pointers = starts[:, None] + columns[None, :]
    if ALIGNED:
        pointers = tl.multiple_of(pointers, [16, 16])
    there = (row < m)[:, None] & (columns < n)[None, :]
    return tl.load(pointers, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _gramian_kernel(
    addresses,  # (m,)
    partial,  # (programs, M, M): written
    m,
    n,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((M, M), dtype=tl.float64)
    for column in range(program * COLUMNS, (program + 1) * COLUMNS, TILE):
        tile = _tile(addresses, m, column + tl.arange(0, TILE), n, TYPE, ALIGNED, M)
        # 2^-e of each row's largest magnitude in [2^e, 2^(e+1)), within what float32 has.
        largest = tl.max(tl.abs(tile), axis=1)
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 0xFF
        scale = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
        runs = tl.reshape(tile * scale[:, None], (M, TILE // 32, 32))
        runs = tl.permute(runs, (1, 0, 2))
        products = tl.dot(runs, tl.permute(runs, (0, 2, 1)), input_precision="ieee")
        wide = scale.to(tl.float64)
        total += tl.sum(products.to(tl.float64), axis=0) / wide[:, None] / wide[None, :]
    row = tl.arange(0, M)
    tl.store(partial + program * M * M + row[:, None] * M + row[None, :], total)


@triton.jit
def _merge_kernel(
    addresses,  # (m,)
    weights,  # (m,), float64
    result,  # (n,): written
    m,
    n,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, M)
    weight = tl.load(weights + row, mask=row < m, other=0.0)
    for column in range(program * COLUMNS, (program + 1) * COLUMNS, TILE):
        columns = column + tl.arange(0, TILE)
        tile = _tile(addresses, m, columns, n, TYPE, ALIGNED, M).to(tl.float64)
        # By way of float32: the interpreter casts float64 to bfloat16 bit by bit.
        value = tl.sum(tile * weight[:, None], axis=0).to(tl.float32)
        tl.store(result + columns, value.to(result.dtype.element_ty), mask=columns < n)
