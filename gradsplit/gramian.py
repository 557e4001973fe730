"""Rows -> Gramian, and (weights, rows) -> merged gradient. Knows neither losses nor optimizers.

A row is a mapping from parameter to gradient; a parameter that the loss does not reach is absent.
Both passes copy the rows into a small float64 block, a few columns of the Jacobian at a time, and
multiply there: products of float32 are exact, nothing underflows or overflows that the rows
themselves can hold, whatever their dtype, and no second copy of the rows ever exists.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

__all__ = ["gramian", "merge"]


def gramian(rows: Sequence[Mapping[Tensor, Tensor]], parameters: Iterable[Tensor]) -> Tensor:
    """K_jk = <g_j, g_k> over ``parameters``.

    Args:
        rows: m mappings parameter -> gradient, dense and real.
        parameters: where to measure; those that no row holds are skipped.

    Returns:
        (m, m), float64, on the device of the first row.
    """
    device = _device(rows)
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
    for present, group in _groups(rows, parameters):
        partial = torch.zeros(len(present), len(present), dtype=total.dtype, device=group[0].device)
        for block, _ in _blocks(rows, present, group):
            partial += block @ block.T
        if len(present) < len(rows):
            # Rows that do not reach the group stay out of the product: 0 x inf would be NaN.
            index = _index(present, device)
            total[index[:, None], index] += partial.to(device)
        else:
            total += partial.to(device)
    return total


def merge(
    rows: Sequence[MutableMapping[Tensor, Tensor]], parameters: Iterable[Tensor], weights: Tensor
) -> dict[Tensor, Tensor]:
    """sum_i w_i g_i for each parameter, over the rows that hold it. Consumes them as it goes.

    Args:
        rows: m mappings parameter -> gradient; what has been merged is removed from them, so that
            rows and merged gradients together never take more memory than the rows did, plus
            one parameter.
        parameters: what to merge; those that no row holds are absent from the result.
        weights: (m,), float64.

    Returns:
        parameter -> merged gradient, in the rows' dtype (cast last) and memory layout.
    """
    merged: dict[Tensor, Tensor] = {}
    for present, group in _groups(rows, parameters):
        chosen = weights.to(group[0].device)
        if len(present) < len(rows):
            chosen = chosen[_index(present, chosen.device)]
        for block, pieces in _blocks(rows, present, group):
            columns = torch.split(chosen @ block, [stop - start for _, start, stop in pieces])
            for (parameter, start, stop), values in zip(pieces, columns, strict=True):
                like = rows[present[0]][parameter]
                if start == 0:
                    flat = torch.empty(like.numel(), dtype=like.dtype, device=like.device)
                    merged[parameter] = _unflattened(flat, like)
                _flattened(merged[parameter], like)[start:stop] = values
                if stop == parameter.numel():
                    for index in present:
                        del rows[index][parameter]
        empty = [parameter for parameter in group if parameter.numel() == 0]
        merged.update((parameter, rows[present[0]][parameter]) for parameter in empty)
    return merged


Piece = tuple[Tensor, int, int]  # parameter, first and last + 1 of its flattened elements


def _groups(
    rows: Sequence[Mapping[Tensor, Tensor]], parameters: Iterable[Tensor]
) -> list[tuple[list[int], list[Tensor]]]:
    """Parameters on one device reached by the same rows, with the indices of these rows."""
    groups: dict[tuple[object, ...], tuple[list[int], list[Tensor]]] = {}
    for parameter in parameters:
        present = [index for index, row in enumerate(rows) if parameter in row]
        if present:
            key = (parameter.device, *present)
            groups.setdefault(key, (present, []))[1].append(parameter)
    return list(groups.values())


def _blocks(
    rows: Sequence[Mapping[Tensor, Tensor]], present: Sequence[int], parameters: Sequence[Tensor]
) -> Iterator[tuple[Tensor, list[Piece]]]:
    """The Jacobian of one group, some columns at a time: small parameters packed, big ones split.

    Yields (len(present), columns) float64 views of one buffer, overwritten by the next block.
    """
    device = parameters[0].device
    # A block of m x 4096 doubles stays in a core's cache; a GPU wants few, large launches.
    widest = 4096 if device.type == "cpu" else 2**18
    widest = min(widest, sum(parameter.numel() for parameter in parameters))
    buffer = torch.empty(len(present), widest, dtype=torch.float64, device=device)
    for pieces in _pieces(parameters, widest):
        used = sum(stop - start for _, start, stop in pieces)
        for line, index in zip(buffer, present, strict=True):
            row, first = rows[index], rows[present[0]]
            values = [_flattened(row[p], first[p])[start:stop] for p, start, stop in pieces]
            torch.cat(values, out=line[:used])
        yield buffer[:, :used], pieces


def _pieces(parameters: Iterable[Tensor], widest: int) -> Iterator[list[Piece]]:
    """Cut the parameters, laid end to end, every ``widest`` elements."""
    pieces: list[Piece] = []
    room = widest
    for parameter in parameters:
        start = 0
        while start < parameter.numel():
            stop = min(parameter.numel(), start + room)
            pieces.append((parameter, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield pieces
                pieces, room = [], widest
    if pieces:
        yield pieces


def _flattened(gradient: Tensor, like: Tensor) -> Tensor:
    """(numel,): a view wherever the gradient lies in memory as ``like`` does.

    ``like`` is the first row's gradient: all rows of a parameter list their elements in the same
    order, whatever their own strides.
    """
    if like.is_contiguous():
        return gradient.reshape(-1)
    return gradient.permute(_memory_order(like)).reshape(-1)


def _unflattened(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_flattened`: always a view of ``flat``."""
    if like.is_contiguous():
        return flat.view(like.shape)
    order = _memory_order(like)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([like.shape[dim] for dim in order]).permute(inverse)


def _memory_order(like: Tensor) -> list[int]:
    return sorted(range(like.dim()), key=like.stride, reverse=True)


def _index(present: Sequence[int], device: torch.device) -> Tensor:
    """A LongTensor made on the device, where copying one there would wait for the host."""
    everyone = torch.arange(max(present) + 1, device=device)
    return torch.stack([everyone[index] for index in present])


def _device(rows: Sequence[Mapping[Tensor, Tensor]]) -> torch.device:
    return next(gradient.device for row in rows for gradient in row.values())
