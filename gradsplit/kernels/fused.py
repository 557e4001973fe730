"""Gramian and merge over a table of pointers: one launch for all parameters of a dtype.

The rows stay where autograd left them. A table says, for every parameter, where each row holds its
gradient (0: it does not reach it), how many elements that are, and which columns each program
takes. It is made on the host, where all of this is known, and copied without waiting.

The Gramian's programs multiply in float32 (IEEE, no tf32), add up to 32 columns in float32 and from
there on in float64, and write their sums side by side; torch adds these, always in the same order.
Squares that do not fit float32 are found by the device itself: a second kernel looks at the result,
and either returns at once or computes all of it in float64. Nothing waits for the host.

A CUDA graph can capture a merge whose rows stay where they are, after one call to warm up. That,
like every speed on a GPU, is untried so far: the kernels have run in Triton's interpreter, and
have been compiled for sm_80 and sm_90.
"""

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsplit.kernels import programs
from gradsplit.layout import flattened, merged_dtype, unflattened

__all__ = ["gramian", "merge"]

_CHUNK = 4096  # columns of one program
_TILE = 4096  # elements that a program holds at once: rows x columns
_RESCUERS = 512  # programs of the float64 kernel

# Tables that a CUDA graph copies to the device again at every replay.
_captured: list[Tensor] = []

_TYPES = {
    torch.float64: tl.float64,  # of a merged gradient only
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def gramian(rows: Sequence[Mapping[Tensor, Tensor]], parameters: Iterable[Tensor]) -> Tensor:
    """K_jk = <g_j, g_k> over ``parameters``.

    Args:
        rows: m mappings parameter -> gradient, float32, bfloat16 or float16, on one device.
        parameters: where to measure; each is held by some row.

    Returns:
        (m, m), float64, on the device of the rows.
    """
    device = next(gradient.device for row in rows for gradient in row.values())
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
    for (_, dtype, _), group in _by_device_and_dtype(rows, parameters).items():
        table = _table([[row.get(parameter) for row in rows] for parameter in group])
        total += _gramian(table, len(rows), dtype).to(device)
    return total


def merge(
    rows: Sequence[MutableMapping[Tensor, Tensor]],
    parameters: Iterable[Tensor],
    weights: Tensor,
    rounded: torch.dtype | None = None,
) -> dict[Tensor, Tensor]:
    """sum_i w_i g_i for each parameter, over the rows that hold it. Consumes them.

    Args:
        rows: m mappings parameter -> gradient, float32, bfloat16 or float16, on one device; what
            has been merged is removed from them.
        parameters: what to merge; each is held by some row.
        weights: (m,), float64.
        rounded: where the rows have this dtype, the merged gradient has the parameter's instead.

    Returns:
        parameter -> merged gradient, in the rows' dtype (summed in float64 and cast last) and
        memory layout.
    """
    m = len(rows)
    merged: dict[Tensor, Tensor] = {}
    groups = _by_device_and_dtype(rows, parameters, rounded)
    for (device, dtype, wanted), group in groups.items():
        results = []
        for parameter in group:
            like = _first(rows, parameter)
            results.append(torch.empty(like.numel(), dtype=wanted, device=device))
            merged[parameter] = unflattened(results[-1], like)
        table = _table([[row.get(parameter) for row in rows] for parameter in group], results)
        if table.programs > 0:
            with torch.cuda.device_of(table.addresses):
                programs.merge_kernel[(table.programs,)](
                    table.addresses,
                    table.sizes,
                    table.chunks,
                    weights.to(device, torch.float64).contiguous(),
                    m,
                    TYPE=_TYPES[dtype],
                    RESULT=_TYPES[wanted],
                    ALIGNED=table.aligned,
                    M=_lines(m),
                    CHUNK=_CHUNK,
                    TILE=_TILE // _lines(m),
                )
        for parameter in group:
            for row in rows:
                row.pop(parameter, None)
    return merged


def _gramian(table: "_Table", m: int, dtype: torch.dtype) -> Tensor:
    lines, device = _lines(m), table.addresses.device
    if table.programs == 0:
        return torch.zeros(m, m, dtype=torch.float64, device=device)
    arguments = (table.addresses, table.sizes, table.chunks)
    shape = {"M": lines, "CHUNK": _CHUNK, "TILE": _TILE // lines}
    partial = torch.empty(table.programs, lines, lines, dtype=torch.float64, device=device)
    rescuers = min(_RESCUERS, table.programs)
    rescued = torch.empty(rescuers, lines, lines, dtype=torch.float64, device=device)
    with torch.cuda.device_of(partial):
        programs.gramian_kernel[(table.programs,)](
            *arguments, partial, m, TYPE=_TYPES[dtype], ALIGNED=table.aligned, **shape
        )
        narrow = partial.sum(0)[:m, :m]
        squares = narrow.diagonal()
        # A product that underflows loses 2^-126 at most; 2^-30 of K_jj is what may be lost.
        resolved = squares.isfinite() & (squares >= table.columns * 2.0**-96)
        resolved = (resolved | (table.reached == 0)).all()
        programs.rescue_kernel[(rescuers,)](
            *arguments, rescued, resolved, m, table.programs, TYPE=_TYPES[dtype], **shape
        )
    return torch.where(resolved, narrow, rescued.sum(0)[:m, :m])


def _lines(m: int) -> int:
    """Rows of a tile: a power of two, and at least the 16 that a dot product takes."""
    return max(16, int(triton.next_power_of_2(m)))


@dataclass
class _Table:
    """What the kernels read to find the gradients. All int64, pieces of one tensor."""

    addresses: Tensor  # (parameters, rows): of the first element; 0: the row is absent
    sizes: Tensor  # (parameters,): elements
    reached: Tensor  # (m,): whether the row is there at all
    chunks: Tensor  # (programs, 2): parameter, first element
    programs: int
    columns: int  # of all parameters together
    aligned: bool  # every address is a multiple of 16 bytes
    held: list[list[Tensor]]  # what the addresses point to: must outlive the launch


def _table(
    columns: Sequence[Sequence[Tensor | None]], results: Sequence[Tensor] | None = None
) -> _Table:
    """For each parameter its gradient in each row, or None; results become a last row."""
    held, addresses = [], []
    for index, column in enumerate(columns):
        like = next(gradient for gradient in column if gradient is not None)
        flats = [None if g is None else flattened(g, like).contiguous() for g in column]
        if results is not None:
            flats.append(results[index])
        held.append([flat for flat in flats if flat is not None])
        addresses.append([0 if flat is None else flat.data_ptr() for flat in flats])
    sizes = torch.tensor([column[0].numel() for column in held], device="cpu")
    reached = torch.tensor(addresses, device="cpu").ne(0).any(0).long()
    counts = (sizes + _CHUNK - 1) // _CHUNK
    which = torch.repeat_interleave(torch.arange(len(held), device="cpu"), counts)
    first = (counts.cumsum(0) - counts)[which]  # program that takes the start of the parameter
    starts = (torch.arange(len(which), device="cpu") - first) * _CHUNK
    parts = [torch.tensor(addresses, device="cpu"), sizes, reached, torch.stack([which, starts], 1)]
    everything = torch.cat([part.flatten() for part in parts])
    device = held[0][0].device
    if device.type == "cuda":
        pinned = everything.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            _captured.append(pinned)
        everything = pinned.to(device, non_blocking=True)
    pieces = everything.split([part.numel() for part in parts])
    views = [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
    return _Table(
        addresses=views[0],
        sizes=views[1],
        reached=views[2],
        chunks=views[3],
        programs=len(which),
        columns=int(sizes.sum()),
        aligned=all(address % 16 == 0 for line in addresses for address in line),
        held=held,
    )


def _by_device_and_dtype(
    rows: Sequence[Mapping[Tensor, Tensor]],
    parameters: Iterable[Tensor],
    rounded: torch.dtype | None = None,
) -> dict[tuple[torch.device, torch.dtype, torch.dtype], list[Tensor]]:
    """With the dtype of the merged gradient."""
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        like = _first(rows, parameter)
        key = (like.device, like.dtype, merged_dtype(parameter, like, rounded))
        groups.setdefault(key, []).append(parameter)
    return groups


def _first(rows: Sequence[Mapping[Tensor, Tensor]], parameter: Tensor) -> Tensor:
    return next(row[parameter] for row in rows if parameter in row)
