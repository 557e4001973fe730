"""What runs on the device: the two passes over the rows, and the rescue in float64.

A program takes one chunk of one parameter. The table that it reads is described in ``fused.py``.
"""

import triton
import triton.language as tl


@triton.jit
def _pointers(addresses, parameter, m, slots, TYPE: tl.constexpr, M: tl.constexpr):
    """(M,): where each row holds this parameter, and whether it does."""
    row = tl.arange(0, M)
    address = tl.load(addresses + parameter * slots + row, mask=row < m, other=0)
    return address.to(tl.pointer_type(TYPE)), address != 0


@triton.jit
def _tile(pointers, present, columns, stop, ALIGNED: tl.constexpr, WHOLE: tl.constexpr):
    """(M, TILE), float32: part of the Jacobian; 0 where a row is absent and beyond ``stop``."""
    pointers = pointers[:, None] + columns[None, :]
    if ALIGNED:
        pointers = tl.multiple_of(pointers, [16, 16])
    if WHOLE:  # without a mask along the columns the loads are wide
        tile = tl.load(pointers, mask=present[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=present[:, None] & (columns < stop)[None, :], other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _products(tile, M: tl.constexpr, TILE: tl.constexpr):
    """(M, M), float64: of all pairs of rows; summed in float32 over 32 columns at most."""
    runs = tl.permute(tl.reshape(tile, (M, TILE // 32, 32)), (1, 0, 2))
    product = tl.dot(runs, tl.permute(runs, (0, 2, 1)), input_precision="ieee")
    return tl.sum(product, axis=0).to(tl.float64)


@triton.jit
def gramian_kernel(
    addresses,  # (parameters, m)
    sizes,  # (parameters,)
    chunks,  # (programs, 2)
    partial,  # (programs, M, M): written
    m,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    parameter = tl.load(chunks + 2 * program)
    start = tl.load(chunks + 2 * program + 1)
    stop = tl.minimum(start + CHUNK, tl.load(sizes + parameter))
    pointers, present = _pointers(addresses, parameter, m, m, TYPE, M)
    product = tl.zeros((M, M), dtype=tl.float64)
    whole = start + (stop - start) // TILE * TILE
    for column in range(start, whole, TILE):
        tile = _tile(pointers, present, column + tl.arange(0, TILE), stop, ALIGNED, True)
        product += _products(tile, M, TILE)
    if whole < stop:
        tile = _tile(pointers, present, whole + tl.arange(0, TILE), stop, ALIGNED, False)
        product += _products(tile, M, TILE)
    # Where 0 x inf of an absent row made NaN, K_jj is infinite too: the rescue sees to both.
    row = tl.arange(0, M)
    tl.store(partial + program * M * M + row[:, None] * M + row[None, :], product)


@triton.jit
def rescue_kernel(
    addresses,
    sizes,
    chunks,
    rescued,  # (programs of this kernel, M, M): written, unless resolved
    resolved,  # (): float32 was enough
    m,
    total,  # programs of the table
    TYPE: tl.constexpr,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    if tl.load(resolved) == 0:
        program = tl.program_id(0).to(tl.int64)
        row = tl.arange(0, M)
        product = tl.zeros((M, M), dtype=tl.float64)
        for chunk in range(program, total, tl.num_programs(0)):
            parameter = tl.load(chunks + 2 * chunk)
            start = tl.load(chunks + 2 * chunk + 1)
            stop = tl.minimum(start + CHUNK, tl.load(sizes + parameter))
            pointers, present = _pointers(addresses, parameter, m, m, TYPE, M)
            for column in range(start, stop, TILE):
                columns = column + tl.arange(0, TILE)
                tile = _tile(pointers, present, columns, stop, False, False).to(tl.float64)
                for other in range(0, m):
                    address = tl.load(addresses + parameter * m + other)
                    if address != 0:
                        line = address.to(tl.pointer_type(TYPE)) + columns
                        line = tl.load(line, mask=columns < stop, other=0.0).to(tl.float64)
                        inner = tl.sum(tile * line[None, :], axis=1)
                        inner = tl.where(present, inner, 0.0)
                        product += tl.where(row[None, :] == other, inner[:, None], 0.0)
        tl.store(rescued + program * M * M + row[:, None] * M + row[None, :], product)


@triton.jit
def merge_kernel(
    addresses,  # (parameters, m + 1): the last one is the result
    sizes,
    chunks,
    weights,  # (m,)
    m,
    TYPE: tl.constexpr,
    RESULT: tl.constexpr,  # dtype of the result
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    parameter = tl.load(chunks + 2 * program)
    start = tl.load(chunks + 2 * program + 1)
    stop = tl.minimum(start + CHUNK, tl.load(sizes + parameter))
    pointers, present = _pointers(addresses, parameter, m, m + 1, TYPE, M)
    result = tl.load(addresses + parameter * (m + 1) + m).to(tl.pointer_type(RESULT))
    row = tl.arange(0, M)
    weight = tl.load(weights + row, mask=row < m, other=0.0)
    whole = start + (stop - start) // TILE * TILE
    for column in range(start, whole, TILE):
        columns = column + tl.arange(0, TILE)
        tile = _tile(pointers, present, columns, stop, ALIGNED, True)
        to = result + columns
        if ALIGNED:
            to = tl.multiple_of(to, 16)
        tl.store(to, _weighted(tile, weight, present).to(RESULT))
    if whole < stop:
        columns = whole + tl.arange(0, TILE)
        tile = _tile(pointers, present, columns, stop, ALIGNED, False)
        tl.store(result + columns, _weighted(tile, weight, present).to(RESULT), mask=columns < stop)


@triton.jit
def _weighted(tile, weight, present):
    """(TILE,): weights may be infinite, so rows that are absent are left out, not times zero."""
    terms = tile.to(tl.float64) * weight[:, None]
    return tl.sum(tl.where(present[:, None], terms, 0.0), axis=0).to(tl.float32)
