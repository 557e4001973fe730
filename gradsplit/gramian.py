"""Rows -> Gramian, and (weights, rows) -> merged gradient. Knows neither losses nor optimizers.

A row is a mapping from parameter to gradient; a parameter that the loss does not reach is absent.
No second copy of the rows ever exists: both passes go through them a few columns of the Jacobian at
a time, large parameters one by one, small ones side by side. On a GPU the passes are Triton kernels
(:mod:`gradsplit.kernels`); the plain path here serves everything else, and is what the kernels are
tested against.

Products of float32 rows are summed in float32 over 1024 columns and from there on in float64: the
error of K_jk is of the order of 1e-8 ||g_j|| ||g_k||, up to 2e-6 where all roundings go one way.
Whatever does not fit float32 (squares that underflow or overflow, weights beyond 2^100) is computed
once more in float64, where nothing underflows or overflows that the rows themselves can hold.
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
_BAND = 32  # rows whose products with all following rows are taken at once
_BUFFER = 2**23  # bytes of all rows that are multiplied at once: enough for several threads
_WIDEST = 2**18  # elements of one row that are added at once: 1 MiB, which stays in the cache
_SMALL = 2**12  # elements below which visiting a tensor costs more than copying it
_PACK = 2**15  # elements that torch.cat copies in one go; beyond, it visits tensor by tensor


@dataclass
class _Group:
    """Parameters on one device that the same rows reach."""

    present: list[int]  # these rows
    parameters: list[Tensor]
    gradients: list[list[Tensor]]  # of each parameter, one per row of ``present``

    @property
    def columns(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)


@dataclass
class _Pack:
    """Columns that are visited at once: small parameters side by side, or a run of a large one."""

    offset: int  # of its first column in the block
    pieces: list[tuple[int, int, int]]  # parameter of the group, first element, end
    values: list[list[Tensor]]  # of each piece, one per row

    @property
    def sizes(self) -> list[int]:
        return [stop - start for _, start, stop in self.pieces]


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
    for group in _groups(rows, parameters):
        narrow = _may_be_narrow(group)
        partial = _product(group, torch.float32 if narrow else torch.float64)
        if narrow and not _resolved(partial, group.columns):
            partial = _product(group, torch.float64)
        partial = partial.to(device)
        if len(group.present) < len(rows):
            # Rows that do not reach the group stay out of the product: 0 x inf would be NaN.
            index = _index(group.present, device)
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
    for group in _groups(rows, parameters):
        factors = weights.to(group.parameters[0].device)
        narrow = _may_be_narrow(group) and _fits(factors)
        factors = torch.stack([factors[index] for index in group.present])
        widest = min(_WIDEST, group.columns)
        dtype = torch.float32 if narrow else torch.float64
        scratch = torch.empty(widest, dtype=dtype, device=factors.device)
        flats: dict[int, Tensor] = {}  # where the parameters that are being merged go
        for pack in _packs(group, widest):
            values = _combined(pack, factors, scratch)
            if narrow and not bool(values.sum().isfinite()):  # an intermediate sum too large?
                values = _combined(pack, factors, torch.empty_like(scratch, dtype=torch.float64))
            for (index, start, stop), part in zip(
                pack.pieces, values.split(pack.sizes), strict=True
            ):
                parameter = group.parameters[index]
                if start == 0:
                    like = group.gradients[index][0]
                    dtype = merged_dtype(parameter, like, rounded)
                    flats[index] = torch.empty(like.numel(), dtype=dtype, device=like.device)
                    merged[parameter] = unflattened(flats[index], like)
                flats[index][start:stop] = part
                if stop == parameter.numel():
                    del flats[index]
                    _forget(rows, group, index)
        for index, parameter in enumerate(group.parameters):  # those without elements: in no pack
            if group.gradients[index]:
                like = group.gradients[index][0]
                merged[parameter] = like.to(merged_dtype(parameter, like, rounded))
                _forget(rows, group, index)
    return merged


def _product(group: _Group, dtype: torch.dtype) -> Tensor:
    """(len(present), len(present)): J J^T of one group, its rows copied to ``dtype`` in pieces."""
    device, m = group.parameters[0].device, len(group.present)
    # BLAS stumbles over odd numbers of rows: sixteen take a third of the time of fifteen.
    lines = m if m <= 12 else -(-m // 8) * 8
    widest = _WIDEST
    if device.type == "cpu":  # all rows together at most like one row, unless that is small
        widest = min(_BUFFER // dtype.itemsize, max(group.columns, _WIDEST)) // lines
    widest = -(-min(widest, group.columns) // _RUN) * _RUN
    buffer = torch.empty(lines, widest, dtype=dtype, device=device)
    buffer[m:] = 0.0  # nobody reads their products, but NaN and the like take time
    upper = torch.zeros(lines, lines, dtype=torch.float64, device=device)

    def multiply(columns: int) -> None:
        runs = -(-columns // _RUN)
        if columns < runs * _RUN:
            buffer[:m, columns : runs * _RUN] = 0.0
        block = buffer[:, : runs * _RUN].unflatten(1, (runs, _RUN)).transpose(0, 1)
        for first in range(0, lines, _BAND):
            some = block[:, first : first + _BAND]
            with torch.autocast("cpu", enabled=False):
                partial = torch.bmm(some, block[:, first:].transpose(1, 2))
            upper[first : first + _BAND, first:] += partial.sum(0, dtype=upper.dtype)

    filled = 0
    for pack in _packs(group, widest):
        if pack.offset < filled:  # a new block begins
            multiply(filled)
        filled = pack.offset + sum(pack.sizes)
        lines_of = buffer[:m, pack.offset : filled].unbind()
        for line, row in zip(lines_of, zip(*pack.values, strict=True), strict=True):
            if len(row) == 1:
                line.copy_(row[0])
            else:
                torch.cat(row, out=line)
    if filled:
        multiply(filled)
    upper = upper[:m, :m].triu()
    return upper + upper.triu(1).T


def _combined(pack: _Pack, factors: Tensor, scratch: Tensor) -> Tensor:
    """(columns,): sum_i w_i g_i over a pack, in ``scratch``."""
    values = scratch[: sum(pack.sizes)].zero_()
    # Weights stay tensors: reading one would wait for the device.
    weights = factors.to(scratch.dtype).unbind()
    for row, factor in zip(zip(*pack.values, strict=True), weights, strict=True):
        values.addcmul_(row[0] if len(row) == 1 else torch.cat(row), factor)
    return values


def _forget(rows: MutableRows, group: _Group, index: int) -> None:
    """What has been merged is of no use any more."""
    for present in group.present:
        del rows[present][group.parameters[index]]
    group.gradients[index] = []


def _packs(group: _Group, widest: int) -> Iterator[_Pack]:
    """Visit the parameters, laid end to end and cut every ``widest`` columns; small ones first."""
    pack, filled = _Pack(0, [], []), 0  # filled: columns of the block, up to the pack's end
    sizes = [parameter.numel() for parameter in group.parameters]
    on_cpu = group.parameters[0].device.type == "cpu"
    small, most = (_SMALL, _PACK) if on_cpu else (widest, widest)  # a GPU wants few launches
    for index in sorted(range(len(sizes)), key=lambda index: sizes[index] >= small):
        gradients, start = group.gradients[index], 0
        flats = [flattened(gradient, gradients[0]) for gradient in gradients]
        while start < sizes[index]:
            stop = min(sizes[index], start + widest - filled)
            columns = stop - start
            alone = columns >= small
            if pack.pieces and (alone or filled - pack.offset + columns > most):
                yield pack
                pack = _Pack(filled, [], [])
            pack.pieces.append((index, start, stop))
            whole = columns == sizes[index]
            pack.values.append(flats if whole else [flat[start:stop] for flat in flats])
            filled, start = filled + columns, stop
            if alone or filled == widest:
                yield pack
                filled %= widest
                pack = _Pack(filled, [], [])
    if pack.pieces:
        yield pack


def _groups(rows: Rows, parameters: Iterable[Tensor]) -> list[_Group]:
    groups: dict[tuple[object, ...], _Group] = {}
    for parameter in parameters:
        found = [row.get(parameter) for row in rows]
        gradients = [gradient for gradient in found if gradient is not None]
        if gradients:
            present = [index for index, gradient in enumerate(found) if gradient is not None]
            key = (parameter.device, *present)
            group = groups.setdefault(key, _Group(present, [], []))
            group.parameters.append(parameter)
            group.gradients.append(gradients)
    return list(groups.values())


def _paths(
    rows: Rows, parameters: Iterable[Tensor], fused: bool | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters for the kernels, and those for the plain path."""
    with_kernels: list[Tensor] = []
    plain: list[Tensor] = []
    for parameter in parameters:
        # Triton's interpreter is for tests: it has to be asked for.
        fits = fused or (fused is None and parameter.device.type == "cuda")
        if fits:
            gradients = _gradients(rows, parameter)
            fits = bool(gradients) and kernels.obstacle(gradients, len(rows)) is None
        (with_kernels if fits else plain).append(parameter)
    return with_kernels, plain


def _gradients(rows: Rows, parameter: Tensor) -> list[Tensor]:
    return [row[parameter] for row in rows if parameter in row]


def _may_be_narrow(group: _Group) -> bool:
    """Whether float32 may serve: on the CPU, where looking at the result costs nothing."""
    if group.parameters[0].device.type != "cpu" or not _multiplies_in_float32():
        return False
    dtypes = {gradient.dtype for gradients in group.gradients for gradient in gradients}
    return torch.float64 not in dtypes


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


def _index(present: Sequence[int], device: torch.device) -> Tensor:
    """A LongTensor made on the device, where copying one there would wait for the host."""
    everyone = torch.arange(max(present) + 1, device=device)
    return torch.stack([everyone[index] for index in present])


def _device(rows: Rows) -> torch.device:
    return next(gradient.device for row in rows for gradient in row.values())
