"""Jacobian: one flat row per loss over the parameters in scope, plain sums over all others."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from gradsplit import rows as algebra
from gradsplit.losses import join_losses

__all__ = ["Block", "Jacobian"]

Gradients = dict[Tensor, Tensor]
"""Parameter -> gradient, or what was made of gradients."""


class Block:
    """Rows over parameters on one device and of one dtype, all of which each row reaches.

    A row lists the parameters in the order given, each in the order of its memory, each from a
    multiple of 128 bytes on; in between lie zeros. Complex numbers are pairs of reals.
    """

    def __init__(self, parameters: Collection[Tensor], dtype: torch.dtype) -> None:
        self.parameters = list(parameters)
        self.rows: dict[int, Tensor] = {}  # number of the loss -> (columns,)
        self._dtype = dtype
        self._pieces: list[tuple[list[int], list[int], int]] = []  # shape, strides, first column
        gaps, start = [torch.empty(0, dtype=torch.long, device="cpu")], 0
        unit = 128 // dtype.itemsize
        for parameter in self.parameters:
            shape, strides = _in_memory(parameter)
            self._pieces.append((shape, strides, start))
            stop = start + parameter.numel() * (2 if parameter.is_complex() else 1)
            start = -(-stop // unit) * unit
            if start > stop:
                gaps.append(torch.arange(stop, start, device="cpu"))
        self._columns = start
        self._gaps = torch.cat(gaps)

    def add(self, loss: int, gradients: Mapping[Tensor, Tensor]) -> None:
        """Copy the gradients into the row of a loss, or add them to it where there is one."""
        sources = [_as_reals(gradients[parameter]) for parameter in self.parameters]
        if loss in self.rows:
            torch._foreach_add_(self._views(self.rows[loss]), sources)
        else:
            self.rows[loss] = self._row_of(sources)

    def parted(self, parameters: Collection[Tensor]) -> "tuple[Block, Block]":
        """Two blocks: of ``parameters``, and of all others. This one loses its rows."""
        within = Block([p for p in self.parameters if p in parameters], self._dtype)
        others = Block([p for p in self.parameters if p not in parameters], self._dtype)
        for loss in list(self.rows):  # one after the other, for the memory's sake
            views = dict(zip(self.parameters, self._views(self.rows.pop(loss)), strict=True))
            for block in (within, others):
                block.rows[loss] = block._row_of([views[p] for p in block.parameters])
        return within, others

    def gradients(self, row: Tensor) -> Gradients:
        """A vector (columns,) by parameter: views with the parameters' own strides."""
        views = self._views(row)
        for index, parameter in enumerate(self.parameters):
            if parameter.is_complex():
                views[index] = torch.view_as_complex(views[index])
        return dict(zip(self.parameters, views, strict=True))

    def in_order(self) -> tuple[list[int], list[Tensor]]:
        """The numbers of the losses that reach this block, and their rows."""
        losses = sorted(self.rows)
        return losses, [self.rows[loss] for loss in losses]

    def _row_of(self, sources: list[Tensor]) -> Tensor:
        device = self.parameters[0].device
        if device.type == "cpu":  # where zeros everywhere would take as long as the copy
            row = torch.empty(self._columns, dtype=self._dtype, device=device)
            row.index_fill_(0, self._gaps, 0.0)
        else:
            row = torch.zeros(self._columns, dtype=self._dtype, device=device)
        torch._foreach_copy_(self._views(row), sources)
        return row

    def _views(self, row: Tensor) -> list[Tensor]:
        return [row.as_strided(*piece) for piece in self._pieces]


class Jacobian:
    """What the backwards of one window of micro-batches leave behind.

    Args:
        shared: rows are kept of what every backward so far has reached; what a backward does not
            reach leaves the rows. False: rows are kept of all eligible parameters.
        single: there will be one call of backward per loss, so that what is in no row can be
            summed across losses at once; else it is summed per loss, which has a count of its own.
        row_dtype: what wider gradients are rounded to; None: nothing is.
    """

    def __init__(self, shared: bool, single: bool, row_dtype: torch.dtype | None) -> None:
        self.blocks: list[Block] = []
        self.names: dict[str, int] = {}
        self.backwards = 0
        self.shared, self._single, self._row_dtype = shared, single, row_dtype
        self._losses: list[Tensor] = []  # summed over micro-batches
        self._counts: list[int] = []  # backwards of each loss
        self._reached: Counter[Tensor] = Counter()  # backwards that reached each parameter
        self._sums: defaultdict[int, Gradients] = defaultdict(dict)  # of what is in no row

    def add(
        self, name: str, loss: Tensor, gradients: Gradients, eligible: Collection[Tensor]
    ) -> None:
        """Take the gradients of one backward.

        Args:
            name: of the loss.
            loss: its value.
            gradients: of every leaf that the backward reached. They are copied.
            eligible: the parameters that may be in rows.
        """
        number = self.names.setdefault(name, len(self.names))
        if number == len(self._losses):
            self._losses.append(torch.zeros_like(loss.detach()))
            self._counts.append(0)
        self._losses[number] = self._losses[number] + loss.detach()
        self._counts[number] += 1
        self.blocks = [part for block in self.blocks for part in self._parts(block, gradients)]
        within: set[Tensor] = set()
        for block in self.blocks:
            if block.parameters[0] in gradients:
                block.add(number, gradients)
                within.update(block.parameters)
        if not (self.shared and self.backwards):
            new = [leaf for leaf in gradients if leaf in eligible and leaf not in within]
            for block in self._blocks_of(new):
                block.add(number, gradients)
                self.blocks.append(block)
            within.update(new)
        self._sum(number, {leaf: g for leaf, g in gradients.items() if leaf not in within})
        self._reached.update(gradients.keys())
        self.backwards += 1

    def gramian(self, fused: bool | None) -> Tensor:
        """(m, m), float64: of the mean rows; zeros where the scope is reached by nobody."""
        m, device = len(self.names), self._losses[0].device
        total = torch.zeros(m, m, dtype=torch.float64, device=device)
        for block in self.blocks:
            losses, rows = block.in_order()
            part = algebra.gramian(rows, fused).to(device)
            if len(losses) == m:
                total += part
            else:
                # Rows that do not reach the block stay out of the product: 0 x inf would be NaN.
                index = _index(losses, device)
                total[index[:, None], index] += part
        if max(self._counts) > 1:
            counts = self._count_of_each(device)
            total = total / counts / counts[:, None]
        return total

    def losses(self) -> Tensor:
        """(m,): the mean of each loss over the micro-batches in which it was available."""
        means = [loss / count for loss, count in zip(self._losses, self._counts, strict=True)]
        return join_losses(means)

    def merged(self, weights: Tensor, reduction: str, fused: bool | None) -> Gradients:
        """w^T J in scope and plain sums elsewhere, by leaf, divided as ``reduction`` says.

        Args:
            weights: (m,), float64, for the mean rows.
            reduction: ``"mean"``, ``"sum"`` or ``"released"``.

        Uses the sums up.
        """
        m = len(self.names)
        if max(self._counts) > 1:
            weights = weights / self._count_of_each(weights.device)
        merged: Gradients = {}
        for block in self.blocks:
            losses, rows = block.in_order()
            factors = weights if len(losses) == m else weights[_index(losses, weights.device)]
            factors = factors.to(rows[0].device) / self._divisor(block.parameters[0], reduction)
            dtype = _real(block.parameters[0].dtype)
            merged |= block.gradients(algebra.merged(rows, factors, dtype, fused))
        totals: Gradients = {}
        for number, sums in self._sums.items():
            if sums and not self._single and self._counts[number] > 1:
                torch._foreach_div_(list(sums.values()), self._counts[number])
            for leaf, part in sums.items():
                totals[leaf] = totals[leaf].add_(part) if leaf in totals else part
        for leaf, total in totals.items():
            divisor = self._divisor(leaf, reduction)
            merged[leaf] = (total.div_(divisor) if divisor > 1 else total).to(leaf.dtype)
        return merged

    def _parts(self, block: Block, gradients: Mapping[Tensor, Tensor]) -> list[Block]:
        """What a backward has reached of a block, and, unless only that stays, the rest."""
        missed = {p for p in block.parameters if p not in gradients}
        if not missed or (len(missed) == len(block.parameters) and not self.shared):
            return [block]
        left, kept = block.parted(missed)
        if not self.shared:
            return [kept, left]
        for number in list(left.rows):
            self._sum(number, left.gradients(left.rows.pop(number)))
        return [kept] if kept.parameters else []

    def _sum(self, number: int, gradients: Mapping[Tensor, Tensor]) -> None:
        sums = self._sums[0 if self._single else number]
        old = [leaf for leaf in gradients if leaf in sums]
        if old:
            torch._foreach_add_([sums[leaf] for leaf in old], [gradients[leaf] for leaf in old])
        for leaf, gradient in gradients.items():
            if leaf not in sums:  # in a storage of its own: autograd may give two leaves one
                sums[leaf] = gradient.to(_at_least_float32(gradient.dtype), copy=True)

    def _blocks_of(self, parameters: Iterable[Tensor]) -> list[Block]:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in parameters:
            groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        blocks = []
        for (_, dtype), group in groups.items():
            dtype, rounded = _real(dtype), self._row_dtype
            narrower = rounded is not None and rounded.itemsize < dtype.itemsize
            blocks.append(Block(group, rounded if narrower and rounded else dtype))
        return blocks

    def _divisor(self, leaf: Tensor, reduction: str) -> int:
        by_all = self._reached[leaf] == self.backwards
        return len(self.names) if reduction == "mean" or (reduction == "released" and by_all) else 1

    def _count_of_each(self, device: torch.device) -> Tensor:
        """(m,), float64, made where it is used: nothing waits for the host."""
        each = [
            torch.full((1,), count, dtype=torch.float64, device=device) for count in self._counts
        ]
        return torch.cat(each)


def _index(numbers: list[int], device: torch.device) -> Tensor:
    """A LongTensor made on the device, where copying one there would wait for the host."""
    return torch.cat([torch.full((1,), number, device=device) for number in numbers])


def _in_memory(parameter: Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides of a dense tensor whose elements lie as the parameter's do, in reals."""
    strides = list(parameter.stride())
    if not parameter.is_contiguous():
        strides = list(torch.empty_like(parameter, device="meta").stride())
    if not parameter.is_complex():
        return list(parameter.shape), strides
    return [*parameter.shape, 2], [*(2 * stride for stride in strides), 1]


def _as_reals(gradient: Tensor) -> Tensor:
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
