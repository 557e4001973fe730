"""Rows -> Gramian, and (rows, weights) -> merged row: dense linear algebra on m flat vectors.

On a GPU both are Triton kernels (:mod:`gradsplit.kernels`); the plain functions here serve
everything else, and are what the kernels are tested against.
"""

import functools
import importlib.util
import math
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["RUN", "gramian", "gramian_ref", "has_triton", "merged", "merged_ref"]

RUN = 1024  # columns whose products are summed in float32 before the sum becomes float64
_TOGETHER = 2**20  # elements of all rows that are multiplied at once: 4 MiB stay in the cache
_WIDEST = 2**17  # elements of one row that are added at once
_MOST_FUSED = 64  # rows that the kernels take
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gramian(rows: Sequence[Tensor], fused: bool | None = None) -> Tensor:
    """K_jk = <g_j, g_k>.

    Args:
        rows: m vectors (n,) of one real dtype on one device.
        fused: whether Triton kernels compute it; None: on a GPU, where they can.

    Returns:
        (m, m), float64. Products of rows narrower than float64 are summed in float32 over 1024
        columns at most: the error of K_jk is of the order of 1e-8 ||g_j|| ||g_k||, up to 2e-6 where
        all roundings go one way.

    Raises:
        ValueError: ``fused=True`` and the kernels cannot take the rows.
    """
    if _takes_kernels(rows, fused):
        from gradsplit import kernels

        return kernels.gramian(rows)
    return gramian_ref(rows)


def merged(
    rows: Sequence[Tensor], weights: Tensor, dtype: torch.dtype, fused: bool | None = None
) -> Tensor:
    """sum_i w_i g_i, (n,).

    Args:
        rows: as in :func:`gramian`.
        weights: (m,), float64, on their device.
        dtype: of the result; rounded last.
        fused: as in :func:`gramian`.
    """
    if _takes_kernels(rows, fused):
        from gradsplit import kernels

        return kernels.merged(rows, weights, dtype)
    return merged_ref(rows, weights, dtype)


def gramian_ref(rows: Sequence[Tensor]) -> Tensor:
    """The plain path of :func:`gramian`."""
    if _narrow(rows):
        found = _products(rows, torch.float32)
        # A float32 product can lose 2^-126; what is lost may be 2^-30 of K_jj. Rows of zeros, and
        # rows with inf or NaN, are computed twice too. The largest elements would tell beforehand,
        # but finding them costs more than one read of the rows, in every step.
        least = rows[0].numel() * 2.0**-96
        if all(least <= square < math.inf for square in found.diagonal().tolist()):
            return found
    return _products(rows, torch.float64)


def merged_ref(rows: Sequence[Tensor], weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The plain path of :func:`merged`."""
    wide = torch.float32 if _narrow(rows) and _fits(weights) else torch.float64
    factors = weights.to(wide).unbind()
    result = torch.empty_like(rows[0], dtype=dtype)
    whole = len(result) <= _WIDEST
    for start in range(0, len(result), _WIDEST):
        span = slice(start, start + _WIDEST)
        parts = rows if whole else [row[span] for row in rows]
        part = result if whole else result[span]
        total = part if dtype == wide else torch.empty_like(part, dtype=wide)
        # No BLAS: where a weight is zero, some would skip the row, NaN and all.
        torch.mul(parts[0].to(wide), factors[0], out=total)
        for more, factor in zip(parts[1:], factors[1:], strict=True):
            total.addcmul_(more.to(wide), factor)
        if total is not part:
            part.copy_(total)
    return result


def _products(rows: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(m, m), float64: J J^T, multiplied in ``dtype``."""
    m, device = len(rows), rows[0].device
    # BLAS stumbles over odd numbers of rows: sixteen take two thirds of the time of fifteen.
    lines = m if m <= 12 else -(-m // 8) * 8
    total: Tensor | None = None
    for columns in _columns(rows, lines, dtype):
        runs = columns.view(lines, -1, RUN).transpose(0, 1)
        products = torch.empty(len(runs), lines, lines, dtype=dtype, device=device)
        torch.bmm(runs, runs.transpose(1, 2), out=products)  # autocast leaves out= alone
        part = products.sum(0, dtype=torch.float64)
        total = part if total is None else total.add_(part)
    if total is None:
        return torch.zeros(m, m, dtype=torch.float64, device=device)
    total = total[:m, :m]
    return (total + total.T).mul_(0.5)  # symmetric to the last bit, which a BLAS does not promise


def _columns(rows: Sequence[Tensor], lines: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """(lines, a multiple of RUN): copies of a few columns at a time, zeros after the last one."""
    m, n = len(rows), rows[0].numel()
    width = max(1, _TOGETHER // lines // RUN) * RUN
    if m == lines and n % RUN == 0 and 0 < n <= width and dtype == rows[0].dtype:
        yield torch.stack(list(rows))
        return
    width = min(width, -(-n // RUN) * RUN)
    buffer = torch.empty(lines, width, dtype=dtype, device=rows[0].device)
    buffer[m:] = 0.0  # nobody reads their products, but NaN and the like take time
    for start in range(0, n, max(1, width)):
        parts = [row[start : start + width] for row in rows]
        filled = len(parts[0])
        if filled < width:
            buffer[:, filled:] = 0.0
        torch._foreach_copy_(buffer[:m, :filled].unbind(), parts)
        yield buffer[:, : -(-filled // RUN) * RUN]


def _narrow(rows: Sequence[Tensor]) -> bool:
    """Whether float32 may serve: on the CPU, where looking at the result costs nothing."""
    if rows[0].device.type != "cpu" or rows[0].dtype == torch.float64:
        return False
    # Not so after torch.set_float32_matmul_precision("medium"), which is bfloat16 here too.
    if hasattr(torch.backends.mkldnn, "matmul"):  # torch 2.9
        return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "highest"


def _fits(weights: Tensor) -> bool:
    """Whether float32 holds the weights, with room for products."""
    return all(w == 0 or 2.0**-100 <= abs(w) <= 2.0**100 for w in weights.tolist())


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; importing it may still fail."""
    return importlib.util.find_spec("triton") is not None


def _takes_kernels(rows: Sequence[Tensor], fused: bool | None) -> bool:
    # Triton's interpreter is for tests: it has to be asked for.
    if fused is False or (fused is None and rows[0].device.type != "cuda"):
        return False
    reason = _obstacle(rows)
    if fused and reason:
        raise ValueError(f"fused=True, but {reason}; fused=None lets gradsplit choose")
    return reason is None


def _obstacle(rows: Sequence[Tensor]) -> str | None:
    """Why the kernels cannot take ``rows``; None if they can."""
    device, dtype = rows[0].device, rows[0].dtype
    if len(rows) > _MOST_FUSED:
        return f"the kernels take at most {_MOST_FUSED} rows, got {len(rows)}"
    if not has_triton():
        return "Triton is not installed (pip install triton)"
    if dtype not in _FUSED_DTYPES:
        return f"a gradient is {dtype}; the kernels take float32, bfloat16, float16"
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"a gradient is on {device}; the kernels need a CUDA device"
    return None
