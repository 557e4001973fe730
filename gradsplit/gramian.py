"""Rows -> Gramian, and (weights, rows) -> merged gradient. Knows neither losses nor optimizers.

A row is a mapping from parameter to gradient; a parameter that the loss does not reach is absent.
No second copy of the rows ever exists: both passes go through them a few columns of the Jacobian at
a time. On a GPU they are Triton kernels (:mod:`gradsplit.kernels`); the plain path here serves
everything else, and is what the kernels are tested against.

Products of float32 rows are summed in float32 over 1024 columns and from there on in float64: the
error of K_jk is of the order of 1e-8 ||g_j|| ||g_k||. Whatever does not fit float32 (squares that
underflow or overflow, weights beyond 2^100) is computed once more in float64, where nothing
underflows or overflows that the rows themselves can hold.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsplit import kernels
from gradsplit.layout import flattened, merged_dtype, unflattened

__all__ = ["check_fused", "gramian", "gramian_ref", "merge", "merge_ref"]

Rows = Sequence[Mapping[Tensor, Tensor]]
MutableRows = Sequence[MutableMapping[Tensor, Tensor]]

_RUN = 1024  # columns whose products are summed before the sum becomes float64
_BAND = 16  # rows whose products with all following rows are taken at once


@dataclass
class _Piece:
    """Consecutive elements of a parameter, and what each row that reaches it holds there."""

    parameter: Tensor
    start: int
    stop: int
    values: list[Tensor]


def gramian(rows: Rows, parameters: Iterable[Tensor], fused: bool | None = None) -> Tensor:
    """K_jk = <g_j, g_k> over ``parameters``.

    Args:
        rows: m mappings parameter -> gradient, dense and real.
        parameters: where to measure; those that no row holds are skipped.
        fused: None: Triton kernels for the parameters that they can take; True: for all
            (:func:`check_fused` says whether that is possible); False: plain torch operations.

    Returns:
        (m, m), float64, on the device of the first row.
    """
    device = _device(rows)
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
    with_kernels, plain = _paths(rows, parameters, fused)
    if with_kernels:
        total += kernels.gramian(rows, with_kernels).to(device)
    if plain:
        total += gramian_ref(rows, plain).to(device)
    return total


def merge(
    rows: MutableRows,
    parameters: Iterable[Tensor],
    weights: Tensor,
    fused: bool | None = None,
    rounded: torch.dtype | None = None,
) -> dict[Tensor, Tensor]:
    """sum_i w_i g_i for each parameter, over the rows that hold it. Consumes them as it goes.

    Args:
        rows: m mappings parameter -> gradient; what has been merged is removed from them.
        parameters: what to merge; those that no row holds are absent from the result.
        weights: (m,), float64.
        fused: as in :func:`gramian`.
        rounded: the dtype that rows were rounded to to save memory. Where they have it, the merged
            gradient has the parameter's dtype instead.

    Returns:
        parameter -> merged gradient, in the rows' dtype (cast last) and memory layout. Rows and
        merged gradients together take no more memory than the rows did, plus one parameter; with
        kernels, or rows that were rounded, plus the merged gradient.
    """
    with_kernels, plain = _paths(rows, parameters, fused)
    merged = kernels.merge(rows, with_kernels, weights, rounded) if with_kernels else {}
    return merged | merge_ref(rows, plain, weights, rounded)


def check_fused(rows: Rows) -> None:
    """Raise ValueError, with the reason, if the kernels cannot take all of ``rows``."""
    for parameter in dict.fromkeys(parameter for row in rows for parameter in row):
        reason = kernels.obstacle(_gradients(rows, parameter), len(rows))
        if reason:
            raise ValueError(f"fused=True, but {reason}; fused=None lets gradsplit choose")


def gramian_ref(rows: Rows, parameters: Iterable[Tensor]) -> Tensor:
    """The plain path of :func:`gramian`: the same arguments and result."""
    device = _device(rows)
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
    for present, group in _groups(rows, parameters):
        narrow = _may_be_narrow(rows, present, group)
        partial = _product(rows, present, group, torch.float32 if narrow else torch.float64)
        if narrow and not _resolved(partial, sum(parameter.numel() for parameter in group)):
            partial = _product(rows, present, group, torch.float64)
        partial = partial.to(device)
        if len(present) < len(rows):
            # Rows that do not reach the group stay out of the product: 0 x inf would be NaN.
            index = _index(present, device)
            total[index[:, None], index] += partial
        else:
            total += partial
    return total


def merge_ref(
    rows: MutableRows,
    parameters: Iterable[Tensor],
    weights: Tensor,
    rounded: torch.dtype | None = None,
) -> dict[Tensor, Tensor]:
    """The plain path of :func:`merge`: the same arguments and result."""
    merged: dict[Tensor, Tensor] = {}
    for present, group in _groups(rows, parameters):
        factors = weights.to(group[0].device)
        narrow = _may_be_narrow(rows, present, group) and _fits(factors)
        factors = torch.stack([factors[index] for index in present])
        for pieces in _pieces(rows, present, group, _widest(group[0].device)):
            values = _combined(pieces, factors, torch.float32 if narrow else torch.float64)
            if narrow and not bool(values.sum().isfinite()):  # an intermediate sum too large?
                values = _combined(pieces, factors, torch.float64)
            columns = values.split([piece.stop - piece.start for piece in pieces])
            for piece, part in zip(pieces, columns, strict=True):
                like = rows[present[0]][piece.parameter]
                if piece.start == 0:
                    dtype = merged_dtype(piece.parameter, like, rounded)
                    flat = torch.empty(like.numel(), dtype=dtype, device=like.device)
                    merged[piece.parameter] = unflattened(flat, like)
                flattened(merged[piece.parameter], like)[piece.start : piece.stop] = part
                if piece.stop == like.numel():
                    for index in present:
                        del rows[index][piece.parameter]
        for parameter in group:  # those without elements are in no block
            for row in rows:
                if parameter in row:
                    gradient = row.pop(parameter)
                    merged[parameter] = gradient.to(merged_dtype(parameter, gradient, rounded))
    return merged


def _product(
    rows: Rows, present: Sequence[int], parameters: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """(len(present), len(present)): J J^T of one group, its rows copied to ``dtype`` in pieces."""
    device, m = parameters[0].device, len(present)
    # BLAS stumbles over odd numbers of rows: sixteen take a third of the time of fifteen.
    lines = m if m <= 12 else -(-m // 8) * 8
    widest = min(_widest(device, lines), sum(parameter.numel() for parameter in parameters))
    widest = -(-widest // _RUN) * _RUN
    buffer = torch.zeros(lines, widest, dtype=dtype, device=device)
    upper = torch.zeros(lines, lines, dtype=torch.float64, device=device)
    for pieces in _pieces(rows, present, parameters, widest):
        sizes = [piece.stop - piece.start for piece in pieces]
        for index, line in enumerate(buffer[:m, : sum(sizes)].unbind()):
            torch.cat([piece.values[index] for piece in pieces], out=line)
        runs = -(-sum(sizes) // _RUN)
        buffer[:, sum(sizes) : runs * _RUN] = 0.0  # left over from the block before
        block = buffer[:, : runs * _RUN].unflatten(1, (runs, _RUN)).transpose(0, 1)
        for first in range(0, lines, _BAND):
            some = block[:, first : first + _BAND]
            with torch.autocast("cpu", enabled=False):
                partial = torch.bmm(some, block[:, first:].transpose(1, 2))
            upper[first : first + _BAND, first:] += partial.sum(0, dtype=upper.dtype)
    upper = upper[:m, :m].triu()
    return upper + upper.triu(1).T


def _combined(pieces: Sequence[_Piece], factors: Tensor, dtype: torch.dtype) -> Tensor:
    """(columns,): sum_i w_i g_i over a block."""
    sizes = [piece.stop - piece.start for piece in pieces]
    values = torch.zeros(sum(sizes), dtype=dtype, device=factors.device)
    # Weights stay tensors: reading one would wait for the device.
    for index, factor in enumerate(factors.to(dtype).unbind()):
        row = [piece.values[index] for piece in pieces]
        # Many small tensors cost more to visit than to copy.
        values.addcmul_(row[0] if len(row) == 1 else torch.cat(row), factor)
    return values


def _pieces(
    rows: Rows, present: Sequence[int], parameters: Iterable[Tensor], widest: int
) -> Iterator[list[_Piece]]:
    """Cut the parameters, laid end to end, every ``widest`` elements: views of the rows."""
    pieces: list[_Piece] = []
    room = widest
    for parameter in parameters:
        like = rows[present[0]][parameter]
        flats = [flattened(rows[index][parameter], like) for index in present]
        start = 0
        while start < like.numel():
            stop = min(like.numel(), start + room)
            whole = stop - start == like.numel()
            values = flats if whole else [flat[start:stop] for flat in flats]
            pieces.append(_Piece(parameter, start, stop, values))
            room -= stop - start
            start = stop
            if room == 0:
                yield pieces
                pieces, room = [], widest
    if pieces:
        yield pieces


def _groups(rows: Rows, parameters: Iterable[Tensor]) -> list[tuple[list[int], list[Tensor]]]:
    """Parameters on one device reached by the same rows, with the indices of these rows."""
    groups: dict[tuple[object, ...], tuple[list[int], list[Tensor]]] = {}
    for parameter in parameters:
        present = [index for index, row in enumerate(rows) if parameter in row]
        if present:
            key = (parameter.device, *present)
            groups.setdefault(key, (present, []))[1].append(parameter)
    return list(groups.values())


def _paths(
    rows: Rows, parameters: Iterable[Tensor], fused: bool | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters for the kernels, and those for the plain path."""
    if fused is False:
        return [], list(parameters)
    with_kernels: list[Tensor] = []
    plain: list[Tensor] = []
    for parameter in parameters:
        gradients = _gradients(rows, parameter)
        # Triton's interpreter is for tests: it has to be asked for.
        wanted = fused or any(gradient.device.type == "cuda" for gradient in gradients)
        fits = wanted and gradients and kernels.obstacle(gradients, len(rows)) is None
        (with_kernels if fits else plain).append(parameter)
    return with_kernels, plain


def _gradients(rows: Rows, parameter: Tensor) -> list[Tensor]:
    return [row[parameter] for row in rows if parameter in row]


def _may_be_narrow(rows: Rows, present: Sequence[int], parameters: Sequence[Tensor]) -> bool:
    """Whether float32 may serve: on the CPU, where looking at the result costs nothing."""
    if parameters[0].device.type != "cpu" or not _multiplies_in_float32():
        return False
    gradients = (rows[index][parameter] for index in present for parameter in parameters)
    return all(gradient.dtype != torch.float64 for gradient in gradients)


def _multiplies_in_float32() -> bool:
    """Not so after ``torch.set_float32_matmul_precision("medium")``, which is bfloat16 here too."""
    if hasattr(torch.backends.mkldnn, "matmul"):  # torch 2.9
        return torch.backends.mkldnn.matmul.fp32_precision in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "highest"


def _resolved(gramian: Tensor, columns: int) -> bool:
    """Whether float32 products resolved it: each can lose 2^-126; 2^-30 of K_jj is what may be."""
    squares = gramian.diagonal()
    return bool((squares.isfinite() & (squares >= columns * 2.0**-96)).all())


def _fits(weights: Tensor) -> bool:
    """Whether float32 holds the weights, with room for products."""
    size = weights.abs()
    return bool(((size == 0) | ((size >= 2.0**-100) & (size <= 2.0**100))).all())


def _widest(device: torch.device, lines: int = 1) -> int:
    """Columns of a block: 4 MiB stay in the cache; a GPU wants few, large launches."""
    return min(2**16, 2**20 // lines) if device.type == "cpu" else 2**18


def _index(present: Sequence[int], device: torch.device) -> Tensor:
    """A LongTensor made on the device, where copying one there would wait for the host."""
    everyone = torch.arange(max(present) + 1, device=device)
    return torch.stack([everyone[index] for index in present])


def _device(rows: Rows) -> torch.device:
    return next(gradient.device for row in rows for gradient in row.values())
