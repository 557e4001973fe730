"""Jacobian: one flat row per loss over the parameters in scope, plain sums over all others."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from gradsplit import rows as algebra
from gradsplit.losses import join_losses

__all__ = ["Block", "Gradients", "Jacobian", "in_memory"]

Gradients = Mapping[Tensor, Tensor]
"""Leaf -> gradient, or what was made of gradients."""


class Block:
    """Rows over parameters on one device and of one dtype, all of which each row reaches.

    A row lists the parameters in the order given, each in the order of its memory, each from a
    multiple of 128 bytes on, and ends at a multiple of 1024 elements; in between lie zeros. Complex
    numbers are pairs of reals.

    Args:
        parameters: one or more.
        dtype: of the rows.
    """

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.parameters = parameters
        self.dtype = dtype
        self.rows: dict[int, Tensor] = {}  # number of the loss -> (columns,)
        self._pieces: list[tuple[Sequence[int], Sequence[int], int]] = []  # shape, strides, start
        self._sources: list[Tensor | None] = []  # what a row is put together from; None: a gradient
        start = 0
        for index, parameter in enumerate(parameters, start=1):
            shape, strides = in_memory(parameter)
            self._pieces.append((shape, strides, start))
            self._sources.append(None)
            stop = start + parameter.numel() * (2 if parameter.is_complex() else 1)
            unit = 128 // dtype.itemsize if index < len(parameters) else algebra.RUN
            start = -(-stop // unit) * unit
            zeros = torch.zeros(start - stop, dtype=dtype, device=parameter.device)
            if len(zeros) > 0 or len(parameters) == 1:  # one source alone would not be copied
                self._sources.append(zeros)
        self._columns = start
        self._complex = any(parameter.is_complex() for parameter in parameters)
        self._plain = all(p.dtype == dtype and p.is_contiguous() for p in parameters)

    def add(self, loss: int, gradients: list[Tensor], factor: float = 1.0) -> None:
        """Add ``factor`` times copies of gradients, one per parameter, to the row of a loss."""
        if self._complex:
            gradients = [
                torch.view_as_real(g.resolve_conj()) if g.is_complex() else g for g in gradients
            ]
        if loss in self.rows:
            for view, gradient in zip(self._views(self.rows[loss]), gradients, strict=True):
                view.add_(gradient, alpha=factor)
        else:
            self.rows[loss] = self._row_of(gradients)
            if factor != 1.0:
                self.rows[loss] *= factor

    def emptied(self) -> Iterator[tuple[int, dict[Tensor, Tensor]]]:
        """Each loss with its row by parameter; this block loses them, one after the other."""
        for loss in list(self.rows):
            yield loss, self.gradients(self.rows.pop(loss))

    def gradients(self, row: Tensor) -> dict[Tensor, Tensor]:
        """A vector (columns,) by parameter: views with the parameters' own strides."""
        views = self._views(row)
        if self._complex:
            pairs = zip(self.parameters, views, strict=True)
            views = [torch.view_as_complex(v) if p.is_complex() else v for p, v in pairs]
        return dict(zip(self.parameters, views, strict=True))

    def in_order(self) -> tuple[list[int], list[Tensor]]:
        """The numbers of the losses that reach this block, and their rows."""
        losses = sorted(self.rows)
        return losses, [self.rows[loss] for loss in losses]

    def _row_of(self, gradients: list[Tensor]) -> Tensor:
        if self._plain:  # in one call, a third of the time
            found = iter(gradients)
            sources = [next(found) if some is None else some for some in self._sources]
            row: Tensor = _flatten_dense_tensors(sources)
            return row
        row = torch.zeros(self._columns, dtype=self.dtype, device=self.parameters[0].device)
        torch._foreach_copy_(self._views(row), gradients)
        return row

    def _views(self, row: Tensor) -> list[Tensor]:
        return [row.as_strided(*piece) for piece in self._pieces]


class Jacobian:
    """What the backwards of one window of micro-batches leave behind.

    Args:
        shared: rows are kept of what every backward so far has reached; what a backward does not
            reach leaves the rows. False: rows are kept of all eligible parameters.
        single: each loss has one backward only, so that what is in no row can be summed across
            losses at once. Else it is kept per loss, for each loss has its own mean.
        reduction: how :meth:`merged` divides: ``"mean"``, ``"sum"`` or ``"released"``.
        row_dtype: what wider gradients are rounded to; None: nothing is.
    """

    graphs_tell = True  # which leaves a backward will reach
    stops = True  # a backward can stop at some leaves
    leaves: Sequence[Tensor] = ()  # others that backwards may reach beside the graph

    def __init__(
        self, shared: bool, single: bool, reduction: str, row_dtype: torch.dtype | None
    ) -> None:
        self.shared = shared
        self.uncounted: Collection[Tensor] = ()  # left to the Gramian of another rank
        self.names: dict[str, int] = {}
        self.blocks: list[Block] = []
        self.backwards = 0
        self._single, self._reduction, self._row_dtype = single, reduction, row_dtype
        self._losses: list[Tensor] = []  # means, as rows and sums are
        self._counts: list[int] = []  # backwards of each loss
        self._common: set[Tensor] = set()  # reached by every backward
        self._sums: defaultdict[int, dict[Tensor, Tensor]] = defaultdict(dict)  # of all in no row

    def ready(self, name: str, loss: Tensor) -> None:
        """Called before each backward."""

    def add(
        self, name: str, loss: Tensor | None, gradients: Gradients, eligible: Collection[Tensor]
    ) -> None:
        """Take the gradients of one backward.

        Args:
            name: of the loss.
            loss: its value, detached; None: it is unavailable.
            gradients: of every leaf that the backward reached. They are copied.
            eligible: the parameters that may be in rows.
        """
        if loss is None:
            return
        first, self.backwards = self.backwards == 0, self.backwards + 1
        number = self.names.setdefault(name, len(self.names))
        factor = 1.0
        if number == len(self._losses):
            self._losses.append(loss)
            self._counts.append(1)
        else:
            self._counts[number] += 1
            factor = 1.0 / self._counts[number]
            self._losses[number] = self._losses[number] * (1.0 - factor) + loss * factor
            self._shrink(number, 1.0 - factor)
        outside = dict(gradients)
        for block in list(self.blocks):
            found = [outside.pop(parameter, None) for parameter in block.parameters]
            reached = [gradient for gradient in found if gradient is not None]
            if len(reached) < len(found) and (reached or self.shared):
                block = self._part(block, gradients)
            if reached:
                block.add(number, reached, factor)
        if first or not self.shared:
            for block in self._new_blocks([leaf for leaf in outside if leaf in eligible]):
                block.add(number, [outside.pop(p) for p in block.parameters], factor)
                self.blocks.append(block)
        self._sum(number, outside, factor)
        if self._reduction == "released":
            self._common = set(gradients) if first else self._common & gradients.keys()

    def gramian(self, fused: bool | None) -> Tensor:
        """(m, m), float64: of the mean rows; zeros where the scope is reached by nobody."""
        m, device = len(self.names), self._losses[0].device
        total: Tensor | None = None
        for block in self.blocks:
            if block.parameters[0] in self.uncounted:
                continue
            losses, rows = block.in_order()
            part = algebra.gramian(rows, fused).to(device)
            if len(losses) < m:
                # Rows that do not reach the block stay out of the product: 0 x inf would be NaN.
                index = _index(losses, device)
                some, part = part, torch.zeros(m, m, dtype=part.dtype, device=device)
                part[index[:, None], index] = some
            total = part if total is None else total + part
        if total is None:
            return torch.zeros(m, m, dtype=torch.float64, device=device)
        return total

    def losses(self) -> Tensor:
        """(m,): the mean of each loss over the micro-batches in which it was available."""
        return join_losses(self._losses)

    def merged(self, weights: Tensor, fused: bool | None) -> dict[Tensor, Tensor]:
        """w^T J in scope and plain sums elsewhere, by leaf; both of means, divided at last.

        Args:
            weights: (m,), float64, for the mean rows.
            fused: as in :func:`gradsplit.rows.merged`.

        Uses the sums up.
        """
        merged: dict[Tensor, Tensor] = {}
        for block in self.blocks:
            losses, rows = block.in_order()
            some = len(losses) < len(self.names)
            factors = weights[_index(losses, weights.device)] if some else weights
            factors = factors.to(rows[0].device) / self._divisor(block.parameters[0])
            dtype = _real(block.parameters[0].dtype)
            merged |= block.gradients(algebra.merged(rows, factors, dtype, fused))
        totals: dict[Tensor, Tensor] = {}
        while self._sums:
            for leaf, part in self._sums.popitem()[1].items():
                totals[leaf] = totals[leaf].add_(part) if leaf in totals else part
        for leaf, total in totals.items():
            divisor = self._divisor(leaf)
            total = (total.div_(divisor) if divisor > 1 else total).to(leaf.dtype)
            # Both where it came into scope within the window.
            merged[leaf] = merged[leaf] + total if leaf in merged else total
        return merged

    def fail(self, error: Exception) -> None:
        """Nobody waits for this process."""

    def share(self, name: str) -> float:
        """Of one backward in the mean of a loss."""
        return 1.0 / self._counts[self.names[name]]

    def weights(self, rule: Callable[[Tensor], Tensor], gramian: Tensor) -> Tensor:
        """(m,): the rule's."""
        return rule(gramian)

    def everywhere(self, reached: Sequence[set[Tensor]]) -> set[Tensor]:
        """The leaves that every loss has ``reached``."""
        return set.intersection(*reached)

    def averaged(self, gradients: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """As they are: there is one process."""
        return gradients

    def _shrink(self, number: int, factor: float) -> None:
        """Multiply all that a loss has left: another micro-batch will be added to its mean."""
        for block in self.blocks:
            if number in block.rows:
                block.rows[number] *= factor
        for part in self._sums[number].values():
            part *= factor

    def _part(self, block: Block, gradients: Gradients) -> Block:
        """Part a block from what a backward has not reached of it; what it has comes first."""
        reached = [p for p in block.parameters if p in gradients]
        missed = [p for p in block.parameters if p not in gradients]
        kept = [some for some in ([reached] if self.shared else [reached, missed]) if some]
        parts = [Block(some, block.dtype) for some in kept]
        for number, row in block.emptied():
            for part in parts:
                part.add(number, [row[p] for p in part.parameters])
            if self.shared:
                self._sum(number, {p: row[p] for p in missed})
        place = self.blocks.index(block)
        self.blocks[place : place + 1] = parts
        return parts[0] if parts else block

    def _sum(self, number: int, gradients: Gradients, factor: float = 1.0) -> None:
        sums = self._sums[0 if self._single else number]
        for leaf, gradient in gradients.items():
            if leaf in sums:
                sums[leaf].add_(gradient, alpha=factor)
            else:  # a storage of its own, for autograd may give one to two leaves
                wide = torch.promote_types(gradient.dtype, torch.float32)
                sums[leaf] = gradient.to(wide, copy=True)
                if factor != 1.0:
                    sums[leaf] *= factor

    def _new_blocks(self, parameters: Sequence[Tensor]) -> list[Block]:
        """One for each device and dtype, and for what is counted and what is not."""
        groups: defaultdict[tuple[torch.device, torch.dtype, bool], list[Tensor]]
        groups = defaultdict(list)
        for parameter in parameters:
            key = parameter.device, parameter.dtype, parameter in self.uncounted
            groups[key].append(parameter)
        return [Block(some, self._dtype_of_rows(key[1])) for key, some in groups.items()]

    def _dtype_of_rows(self, dtype: torch.dtype) -> torch.dtype:
        dtype, rounded = _real(dtype), self._row_dtype
        return rounded if rounded is not None and rounded.itemsize < dtype.itemsize else dtype

    def _divisor(self, leaf: Tensor) -> int:
        divides = self._reduction == "mean" or leaf in self._common  # of "released" alone
        return len(self.names) if divides else 1


def _index(numbers: Sequence[int], device: torch.device) -> Tensor:
    """A LongTensor made on the device, where copying one there would wait for the host."""
    return torch.cat([torch.full((1,), n, dtype=torch.long, device=device) for n in numbers])


def in_memory(parameter: Tensor) -> tuple[Sequence[int], Sequence[int]]:
    """Shape and strides of a dense tensor whose elements lie as the parameter's do, in reals."""
    dense = parameter.is_contiguous()
    strides = parameter.stride() if dense else torch.empty_like(parameter, device="meta").stride()
    if not parameter.is_complex():
        return parameter.shape, strides
    return (*parameter.shape, 2), (*(2 * stride for stride in strides), 1)


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype
