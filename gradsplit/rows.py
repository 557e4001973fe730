"""Per-loss gradient rows: the only file that calls backward or touches ``.grad``.

Rows come from ``.backward()`` and not from ``autograd.grad``, because reentrant checkpointing and
the hooks of DDP and FSDP work only there. While rows are taken, the parameters' own ``.grad`` are
set aside; whatever happens, they are put back. Only the rows of :class:`PartialRowTaker`, which are
there to tell the weights, come from ``autograd.grad``.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge

__all__ = [
    "Entry",
    "Losses",
    "PartialRowTaker",
    "Row",
    "RowTaker",
    "add_gradients",
    "check_parameters",
    "read_losses",
]

Closure = Callable[[], Tensor | None]
Losses = Mapping[str | tuple[str, ...], Tensor | Closure | None] | Sequence[Tensor | Closure | None]


@dataclass(frozen=True)
class Entry:
    """One loss as the user gave it."""

    name: str
    where: str  # for messages: "loss 2 of 4 ('text+audio')"
    loss: Tensor | Closure | None


@dataclass
class Row:
    """The gradient of one loss, by parameter, for the parameters that it reaches."""

    gradients: dict[Tensor, Tensor]
    loss: Tensor  # detached
    graphs: list[Tensor] = field(default_factory=list)  # of partial rows: the losses themselves


def read_losses(losses: Losses) -> list[Entry]:
    """Name the losses and check all that can be checked before any closure or backward runs.

    Raises:
        TypeError: not a mapping or sequence; a key that is no name; a loss that is neither tensor,
            closure nor None.
        ValueError: no losses, two keys with one name; a loss that is not a real scalar, requires
            no grad, or lies on another device than the first.
    """
    if isinstance(losses, Mapping):
        names, values = [_name(key) for key in losses], list(losses.values())
    elif isinstance(losses, Sequence) and not isinstance(losses, str | bytes):
        names, values = [str(index) for index in range(len(losses))], list(losses)
    else:
        raise TypeError(
            "losses must be a mapping from modality or combination to loss, or a sequence of "
            f"losses; got {_describe(losses)}"
        )
    if not values:
        raise ValueError("losses is empty: give one loss per modality or combination")
    seen: dict[frozenset[str], str] = {}
    for name in names:
        parts = frozenset(name.split("+"))  # the order in a combination means nothing
        if parts in seen:
            raise ValueError(
                f"losses has two entries for one combination, {seen[parts]!r} and {name!r}; give "
                "each combination once"
            )
        seen[parts] = name
    wheres = [f"loss {i} of {len(names)} ({name!r})" for i, name in enumerate(names, start=1)]
    entries = [Entry(*entry) for entry in zip(names, wheres, values, strict=True)]
    device: torch.device | None = None
    for entry in entries:
        if isinstance(entry.loss, Tensor):
            device = _checked_loss(entry.loss, entry.where, device).device
        elif entry.loss is not None and not callable(entry.loss):
            raise TypeError(
                f"{entry.where} must be a scalar loss tensor, a closure or None; "
                f"got {_describe(entry.loss)}"
            )
    return entries


def check_parameters(parameters: Iterable[Tensor]) -> None:
    """Raise ValueError if one of the parameters that require grad is complex."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.is_complex():
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is complex ({parameter.dtype}); "
                "conflicts are defined for real gradients: store it as torch.view_as_real(...) "
                "or give it to an optimizer of its own"
            )


def add_gradients(gradients: Mapping[Tensor, Tensor]) -> None:
    """Add to ``.grad`` as a backward would: in place where there is one already."""
    for parameter, gradient in gradients.items():
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            with torch.no_grad():
                parameter.grad += gradient


class RowTaker:
    """Takes one row per loss, inside ``with``: all or nothing.

    Args:
        parameters: those of the optimizer. Frozen ones are ignored.
        rows: rows of earlier micro-batches by name; new gradients are added to them in place, as
            ``.grad`` would, so that accumulation takes no second copy.
        dtype: what wider gradients are rounded to when a backward has ended, one parameter after
            the other; None: nothing is. Sums over micro-batches are taken before rounding.

    On leaving without an error, leaves outside ``parameters`` that the losses reach hold the plain
    sum in ``.grad``. On an error every ``.grad`` is as before; ``rows`` are too, unless rows of
    earlier micro-batches had already been added to: then they are dropped, and a note on the
    exception says so. Two things the graph cannot tell, and they are not restored: leaves outside
    ``parameters`` that only a reentrant checkpoint knows of, and such leaves after a closure has
    called backward itself.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        rows: dict[str, Row],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.rows = rows
        self._dtype = dtype
        self._earlier = dict(rows)
        self._earlier_changed = False
        self._own: dict[Tensor, Tensor | None] = {}
        self._outside: dict[Tensor, Tensor | None] = {}

    def __enter__(self) -> "RowTaker":
        check_parameters(self.parameters)
        for parameter in self.parameters:
            self._own[parameter] = parameter.grad
            parameter.grad = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for parameter, gradient in self._own.items():
            parameter.grad = gradient
        sums = {leaf: leaf.grad for leaf in self._outside if leaf.grad is not None}
        for leaf, gradient in self._outside.items():
            leaf.grad = gradient
        if error is None:
            add_gradients(sums)
        elif self._earlier_changed:
            self.rows.clear()
            _add_note(
                error,
                "rows accumulated from earlier micro-batches had already been added to and were "
                "dropped; start the accumulation again",
            )
        else:
            self.rows.clear()
            self.rows.update(self._earlier)

    def take(self, entries: Sequence[Entry]) -> dict[str, Tensor | None]:
        """Run every closure and backward; returns the detached losses by name.

        Raises:
            ValueError: all entries are unavailable and there are no earlier rows; a loss reaches
                none of the parameters.
            TypeError, ValueError: what a closure returned is not a loss.
        """
        tensors = [(e.loss, e.where) for e in entries if isinstance(e.loss, Tensor)]
        retained = iter(self._survey(tensors))
        device = tensors[0][0].device if tensors else None
        taken: dict[str, Tensor | None] = {}
        for entry in entries:
            if isinstance(entry.loss, Tensor):
                loss, retain = entry.loss, next(retained)
            else:
                called = self._call(entry, device)
                if called is None:
                    taken[entry.name] = None
                    continue
                loss, retain, device = called, False, called.device
                del called
            self._backward(loss, retain, entry)
            taken[entry.name] = loss.detach()
            del loss  # and with it the graph of a closure, before the next one runs
        if not self.rows:
            names = ", ".join(repr(entry.name) for entry in entries)
            raise ValueError(f"losses: all are unavailable (None): {names}; skip this batch")
        return taken

    def consume(self) -> None:
        """The rows are about to be merged, which empties them: an error from here on drops them."""
        self._earlier_changed = bool(self._earlier)

    def _call(self, entry: Entry, device: torch.device | None) -> Tensor | None:
        if entry.loss is None:
            return None
        assert not isinstance(entry.loss, Tensor)
        with torch.enable_grad(), _noted(f"in the closure of {entry.where}"):
            loss = entry.loss()
        if any(parameter.grad is not None for parameter in self.parameters):
            raise ValueError(
                f"the closure of {entry.where} called backward; it must only compute and return "
                "its loss, the optimizer calls backward on it"
            )
        if loss is None:
            return None
        where = f"the closure of {entry.where}: its result"
        if not isinstance(loss, Tensor):
            raise TypeError(f"{where} must be a scalar loss or None, got {_describe(loss)}")
        _checked_loss(loss, where, device)
        self._survey([(loss, entry.where)])
        return loss

    def _backward(self, loss: Tensor, retain_graph: bool, entry: Entry) -> None:
        row = self.rows.get(entry.name)
        earlier: dict[Tensor, Tensor] = {}
        if row is not None:
            self._earlier_changed = self._earlier_changed or entry.name in self._earlier
            for parameter, gradient in row.gradients.items():
                if parameter not in self._own:  # frozen or removed since
                    continue
                if gradient.dtype == self._dtype:
                    earlier[parameter] = gradient
                else:
                    parameter.grad = gradient
            row.gradients.clear()
        with _noted(_in_backward(entry)):
            torch.autograd.backward(loss, retain_graph=retain_graph)
        gradients = earlier
        taken: set[int] = set()
        for parameter in self.parameters:
            if parameter.grad is not None:
                _refuse_sparse(parameter.grad, parameter, entry.where)
                gradients[parameter] = self._kept(parameter.grad, earlier.get(parameter), taken)
                parameter.grad = None
        if not gradients:
            raise _reaches_nothing(entry.where)
        total = loss.detach() if row is None else row.loss + loss.detach()
        self.rows[entry.name] = Row(gradients, total)

    def _kept(self, gradient: Tensor, earlier: Tensor | None, taken: set[int]) -> Tensor:
        """What a row keeps of a gradient, added to that of earlier micro-batches."""
        if self._dtype is None or gradient.element_size() <= self._dtype.itemsize:
            return _owned(gradient, taken) if earlier is None else gradient + earlier
        if earlier is not None:
            gradient = gradient + earlier  # in the wider dtype
        return gradient.to(self._dtype)

    def _survey(self, losses: Sequence[tuple[Tensor, str]]) -> list[bool]:
        """Look through the graphs: whether each is retained, because a later loss needs some of it.

        Leaves outside the optimizer are set aside. Raises before any graph is freed if the graph
        shows that a loss reaches nothing.
        """
        owner: dict[Node, int] = {}  # the last loss whose graph a node is in
        leaves: dict[Node, bool] = {}  # whether the leaf is a parameter
        retained = [False] * len(losses)
        nowhere: list[int] = []
        for index in reversed(range(len(losses))):
            reaches = False
            stack: list[Node | None] = [get_gradient_edge(losses[index][0]).node]
            while stack:
                node = stack.pop()
                if node is None:
                    continue
                if node in leaves:  # always shared, with nothing that a backward frees
                    reaches = reaches or leaves[node]
                    continue
                if node in owner:
                    retained[index] = retained[index] or owner[node] != index
                    continue
                owner[node] = index
                following = node.next_functions
                if following:
                    stack.extend([other for other, _ in following])
                    # Behind a Python function (a reentrant checkpoint) there may be parameters
                    # that the graph does not show: its backward will tell.
                    reaches = reaches or isinstance(node, BackwardCFunction)
                elif (leaf := _leaf(node)) is not None:
                    leaves[node] = leaf in self._own
                    reaches = reaches or leaves[node]
                    if not leaves[node] and leaf not in self._outside:
                        self._outside[leaf] = leaf.grad
                        leaf.grad = None
            if not reaches and not (retained[index] and self._reaches(losses[index][0])):
                nowhere.append(index)
        if nowhere:
            raise _reaches_nothing(losses[nowhere[-1]][1])
        return retained

    def _reaches(self, loss: Tensor) -> bool:
        """Whether the graph shows that the loss reaches some parameter, or may."""
        return any(
            isinstance(node, BackwardCFunction) or _leaf(node) in self._own for node in _walk(loss)
        )


class PartialRowTaker(RowTaker):
    """Rows on some parameters only; the graphs stay, for one backward of all weighted losses.

    Args:
        parameters: those of the optimizer. Frozen ones are ignored.
        rows: partial rows of earlier micro-batches by name, with their graphs.
        measured: the parameters that rows are taken on. Backwards stop there.

    Otherwise as :class:`RowTaker`. Rows of earlier micro-batches are added to in copies: until
    :meth:`merge`, an error leaves them as they were.
    """

    def __init__(
        self, parameters: Iterable[Tensor], rows: dict[str, Row], measured: Iterable[Tensor]
    ) -> None:
        super().__init__(parameters, rows)
        self.measured = [parameter for parameter in measured if parameter.requires_grad]

    def __enter__(self) -> "PartialRowTaker":
        if not self.measured:
            raise ValueError(
                "conflict_parameters: none of them requires grad any more, so that conflicts "
                "cannot be measured"
            )
        super().__enter__()
        return self

    def merge(self, weights: Tensor) -> dict[Tensor, Tensor]:
        """The gradient of sum_i w_i loss_i, for each parameter that a loss reaches.

        Args:
            weights: (m,), in the order of ``rows``. Leaves outside ``parameters`` have weight one,
                at the price of a second backward where there are any.
        """
        losses, factors = [], []
        for row, weight in zip(self.rows.values(), weights.detach().unbind(), strict=True):
            losses += row.graphs
            factors += [weight.to(loss).reshape(loss.shape) for loss in row.graphs]
        super()._survey([(loss, "a loss") for loss in losses])
        with _noted(
            "in the one backward of all losses; with conflict_parameters the graphs of all losses "
            "are needed until then"
        ):
            torch.autograd.backward(
                losses,
                factors,
                retain_graph=bool(self._outside),
                inputs=self.parameters if self._outside else None,
            )
            if self._outside:
                ones = [torch.ones_like(loss) for loss in losses]
                torch.autograd.backward(losses, ones, inputs=list(self._outside))
        merged = {}
        taken: set[int] = set()
        for parameter in self.parameters:
            if parameter.grad is not None:
                _refuse_sparse(parameter.grad, parameter, "a loss")
                merged[parameter] = _owned(parameter.grad, taken)
                parameter.grad = None
        return merged

    def reached_by_all(self) -> set[Tensor]:
        """The parameters that every loss reaches, as far as the graphs show."""
        common = set(self.parameters)
        for row in self.rows.values():
            nodes = itertools.chain.from_iterable(map(_walk, row.graphs))
            common.intersection_update([leaf for leaf in map(_leaf, nodes) if leaf is not None])
        return common

    def _survey(self, losses: Sequence[tuple[Tensor, str]]) -> list[bool]:
        return [True] * len(losses)  # the rest is seen to when the graphs are used up

    def _backward(self, loss: Tensor, retain_graph: bool, entry: Entry) -> None:
        with _noted(_in_backward(entry)):
            found = torch.autograd.grad(loss, self.measured, retain_graph=True, allow_unused=True)
        gradients: dict[Tensor, Tensor] = {}
        for parameter, gradient in zip(self.measured, found, strict=True):
            if gradient is not None:
                _refuse_sparse(gradient, parameter, entry.where)
                gradients[parameter] = gradient  # of autograd.grad: no bucket, and only read
        if not gradients:
            raise ValueError(
                f"{entry.where} reaches none of the conflict_parameters, so that its conflicts "
                "cannot be measured; choose parameters that every loss uses"
            )
        row = self.rows.get(entry.name, Row({}, torch.zeros_like(loss)))
        for parameter, gradient in row.gradients.items():
            more = gradients.get(parameter)
            gradients[parameter] = gradient if more is None else gradient + more
        total = row.loss + loss.detach()
        self.rows[entry.name] = Row(gradients, total, [*row.graphs, loss])


def _in_backward(entry: Entry) -> str:
    return (
        f"in the backward of {entry.where}; if its graph was freed: a loss can be used once, and a "
        "closure must run its own forward (losses that share one are given as tensors)"
    )


def _refuse_sparse(gradient: Tensor, parameter: Tensor, where: str) -> None:
    if gradient.layout is not torch.strided:
        raise ValueError(
            f"{where} has a sparse gradient for a parameter of shape {tuple(parameter.shape)}; use "
            "dense gradients (for nn.Embedding: sparse=False) or give that parameter to an "
            "optimizer of its own"
        )


def _owned(gradient: Tensor, taken: set[int]) -> Tensor:
    """A gradient in a storage of its own; ``taken``: the storages of other parameters' gradients.

    Views are copied: DDP's next backward overwrites its buckets, and a bucket may be as large as
    the one gradient in it. So is what lies where another gradient does: for ``a[None] + b[None]``
    autograd gives ``a`` and ``b`` one tensor, and adding to the one would change the other.
    """
    size = gradient.numel() * gradient.element_size()
    storage = gradient.untyped_storage()
    if gradient._base is not None or storage.nbytes() > size or storage.data_ptr() in taken:
        gradient = gradient.clone()
        storage = gradient.untyped_storage()
    taken.add(storage.data_ptr())
    return gradient


def _walk(loss: Tensor) -> Iterator[Node]:
    """Every node of the graph of ``loss``."""
    seen: set[Node] = set()
    stack: list[Node | None] = [get_gradient_edge(loss).node]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(following for following, _ in node.next_functions)


def _leaf(node: Node) -> Tensor | None:
    """The leaf tensor whose ``.grad`` the node accumulates into, if it is such a node."""
    if not node.next_functions and node.name() == "torch::autograd::AccumulateGrad":
        leaf: Tensor = node.variable  # type: ignore[attr-defined]
        return leaf
    return None


@contextlib.contextmanager
def _noted(where: str) -> Iterator[None]:
    """An exception of the user's or of torch's passes through, saying where it came from."""
    try:
        yield
    except Exception as error:
        _add_note(error, where)
        raise


def _add_note(error: BaseException, note: str) -> None:
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note(f"gradsplit: {note}")


def _name(key: Any) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, tuple) and key and all(isinstance(part, str) for part in key):
        return "+".join(key)
    raise TypeError(
        f"losses has the key {key!r}; keys are names, or non-empty tuples of modality names"
    )


def _checked_loss(loss: Tensor, where: str, device: torch.device | None) -> Tensor:
    if loss.shape not in (torch.Size([]), torch.Size([1])):
        raise ValueError(
            f"{where} must be a scalar of shape () or (1,), got shape {tuple(loss.shape)}; "
            "reduce it, e.g. with .mean()"
        )
    if loss.is_complex():
        raise ValueError(f"{where} must be real, got {loss.dtype}")
    if not loss.requires_grad:
        raise ValueError(
            f"{where} requires no grad: it was computed from detached tensors, under no_grad, or "
            "with every parameter frozen"
        )
    if device is not None and loss.device != device:
        raise ValueError(
            f"{where} is on {loss.device}, the losses before it on {device}; move them to one "
            "device"
        )
    return loss


def _reaches_nothing(where: str) -> ValueError:
    return ValueError(
        f"{where} does not depend on any parameter of this optimizer that requires grad"
    )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:80]
