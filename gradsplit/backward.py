"""One backward per loss: the only file that calls backward or touches ``.grad``.

Gradients come from ``.backward()`` and not from ``autograd.grad``, because reentrant checkpointing
and the hooks of DDP and FSDP work only there. (Only the partial rows of ``conflict_parameters``,
which are there to tell the weights, come from ``autograd.grad``.)
"""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradsplit.graphs import Graphs, survey
from gradsplit.jacobian import Gradients, Jacobian
from gradsplit.losses import Entry, add_note, checked_loss, noted

if TYPE_CHECKING:
    from gradsplit.distributed import ShardedJacobian

__all__ = ["add_gradients", "take_partial_rows", "take_rows", "weighted_backward"]

Taken = dict[str, Tensor | None]
"""The detached losses by name; None: unavailable."""


def take_rows(
    entries: Sequence[Entry],
    parameters: Sequence[Tensor],
    jacobian: "Jacobian | ShardedJacobian",
    eligible: Collection[Tensor],
) -> Taken:
    """Run every closure, and one backward per loss; what they leave goes into ``jacobian``.

    Every ``.grad`` is as before afterwards, whatever happens. What the graph does not show is not
    restored: leaves outside ``parameters`` that only a reentrant checkpoint knows of.

    Args:
        entries: the losses.
        parameters: of the optimizer, those that require grad.
        jacobian: it is added to as the backwards come.
        eligible: the parameters that may be in its rows.

    Raises:
        ValueError: a loss reaches none of the parameters, or has a sparse gradient; a closure
            called backward.
        TypeError, ValueError: what a closure returned is not a loss.
    """
    taken: Taken = {}
    with _set_aside([*parameters, *jacobian.leaves]) as held:
        given = [entry for entry in entries if isinstance(entry.loss, Tensor)]
        together = survey([e.loss for e in given if isinstance(e.loss, Tensor)])
        if not jacobian.graphs_tell:
            together.hidden = (1 << len(given)) - 1
        _refuse_unreached(given, together, parameters)
        _set_aside_more(together.leaves, held)
        if jacobian.shared:  # rows start at their final size, as far as the graphs tell
            eligible = {p for p in eligible if together.reached_by_all(p)}
        places = iter(range(len(given)))
        for entry, loss in _losses(entries, held):
            if loss is None:
                taken[entry.name] = None
                jacobian.add(entry.name, None, {}, eligible)
                continue
            if isinstance(entry.loss, Tensor):
                graphs, place = together, next(places)
            else:
                graphs, place = survey([loss]), 0
                graphs.hidden |= not jacobian.graphs_tell
                _refuse_unreached([entry], graphs, parameters)
                _set_aside_more(graphs.leaves, held)
            jacobian.ready(entry.name, loss)
            _backward([loss], None, graphs.retained[place], held, entry)
            gradients = {leaf: leaf.grad for leaf in held if leaf.grad is not None}
            _refuse_sparse(gradients, entry)
            if gradients.keys().isdisjoint(parameters):
                raise _reaches_nothing(entry)
            taken[entry.name] = value = loss.detach()
            jacobian.add(entry.name, value, gradients, eligible)
            del loss, gradients  # and with it the graph of a closure, before the next one runs
            for leaf in held:
                leaf.grad = None
    return taken


def take_partial_rows(
    entries: Sequence[Entry],
    parameters: Sequence[Tensor],
    measured: Sequence[Tensor],
    jacobian: "Jacobian | ShardedJacobian",
    graphs: defaultdict[str, list[Tensor]],
) -> Taken:
    """Rows on ``measured`` alone, by backwards that stop there; the graphs are kept.

    Args:
        entries, parameters, jacobian: as for :func:`take_rows`.
        measured: the parameters that rows are taken on.
        graphs: the losses themselves are added to it, by name, for :func:`weighted_backward`.

    Raises:
        ValueError: as :func:`take_rows`; a loss reaches none of the ``measured``.
    """
    taken: Taken = {}
    with _set_aside([*parameters, *jacobian.leaves]) as held:
        for entry, loss in _losses(entries, held):
            if loss is None:
                taken[entry.name] = None
                jacobian.add(entry.name, None, {}, set(measured))
                continue
            jacobian.ready(entry.name, loss)
            gradients = _partial_row(loss, measured, jacobian.stops, held, entry)
            if not gradients:
                raise ValueError(
                    f"{entry} reaches none of the conflict_parameters, so that its conflicts "
                    "cannot be measured; choose parameters that every loss uses"
                )
            _refuse_sparse(gradients, entry)
            taken[entry.name] = value = loss.detach()
            jacobian.add(entry.name, value, gradients, set(measured))
            graphs[entry.name].append(loss)
    return taken


def weighted_backward(
    graphs: Mapping[str, Sequence[Tensor]],
    weights: Tensor,
    parameters: Sequence[Tensor],
    jacobian: "Jacobian | ShardedJacobian",
    reduction: str,
) -> dict[Tensor, Tensor]:
    """The gradient of sum_i w_i loss_i, by leaf: one ordinary backward through all graphs.

    Args:
        graphs: by name, the loss of every micro-batch that had it; their mean is weighed.
        weights: (m,), for the ``jacobian``'s names.
        parameters: of the optimizer, those that require grad.
        jacobian: of the partial rows.
        reduction: ``"mean"``, ``"sum"`` or ``"released"``.
    """
    losses: list[Tensor] = []
    factors: list[Tensor] = []
    m = len(jacobian.names)
    for name, weight in zip(jacobian.names, weights.unbind(), strict=True):
        some = graphs.get(name, ())
        losses += some
        weight = weight * (jacobian.share(name) / (m if reduction == "mean" else 1))
        factors += [weight.to(loss).reshape(loss.shape) for loss in some]
    found = survey(losses)
    with _set_aside([*parameters, *jacobian.leaves]) as held:
        _set_aside_more(found.leaves, held)
        if losses:
            _backward(losses, factors, False, held)
        gradients = {leaf: leaf.grad for leaf in held if leaf.grad is not None}
    _refuse_sparse(gradients, "a loss")
    if reduction != "released":
        return jacobian.averaged(gradients)
    reached: list[set[Tensor]] = []  # by all micro-batches of each loss
    stop = 0
    for name in jacobian.names:
        start, stop = stop, stop + len(graphs.get(name, ()))
        bits = (1 << stop) - (1 << start)
        reached.append({p for p, some in found.leaves.items() if bits and some & bits == bits})
    everywhere = jacobian.everywhere(reached)
    return {
        leaf: gradient / m if leaf in everywhere else gradient
        for leaf, gradient in jacobian.averaged(gradients).items()
    }


@torch.no_grad()
def add_gradients(gradients: Gradients) -> None:
    """Add to ``.grad`` as a backward would: in place where there is one already."""
    for leaf in gradients:  # before anything is written
        if leaf.grad is not None and leaf.grad.layout is not torch.strided:
            raise ValueError(
                f"the .grad of a parameter of shape {tuple(leaf.shape)} is sparse: set it to None"
            )
    for leaf, gradient in gradients.items():
        if leaf.grad is None:
            leaf.grad = gradient
        else:
            leaf.grad += gradient


def _partial_row(
    loss: Tensor,
    measured: Sequence[Tensor],
    stops: bool,
    held: Mapping[Tensor, Tensor | None],
    entry: Entry,
) -> dict[Tensor, Tensor]:
    """The gradients of ``measured``, by a backward that goes no further where it can stop."""
    found: Sequence[Tensor | None]
    if stops:
        with noted(_in_backward(entry)):
            found = torch.autograd.grad(loss, measured, retain_graph=True, allow_unused=True)
    else:
        _backward([loss], None, True, held, entry)
        found = [leaf.grad for leaf in measured]
        for leaf in held:
            leaf.grad = None
    pairs = zip(measured, found, strict=True)
    return {leaf: gradient for leaf, gradient in pairs if gradient is not None}


def _backward(
    losses: Sequence[Tensor],
    factors: Sequence[Tensor] | None,
    retain_graph: bool,
    held: Iterable[Tensor],
    entry: Entry | None = None,
) -> None:
    """torch's, of one ``entry`` or of all weighted losses, and no hook takes a gradient away."""
    hooked = [leaf for leaf in held if leaf._post_accumulate_grad_hooks]
    arrived: set[Tensor] = set()

    def note(leaf: Tensor, gradient: Tensor | None) -> None:
        if gradient is not None:
            arrived.add(leaf)

    handles = [leaf.register_hook(functools.partial(note, leaf)) for leaf in hooked]
    try:
        torch.autograd.backward(losses, factors, retain_graph=retain_graph)
    except Exception as error:
        add_note(error, _in_backward(entry))
        raise
    finally:
        for handle in handles:
            handle.remove()
    for leaf in hooked:
        if leaf in arrived and leaf.grad is None:
            raise ValueError(
                f"{entry or 'a loss'}: a post-accumulate hook has consumed the gradient of a "
                f"parameter of shape {tuple(leaf.shape)}; optimizers that step inside backward "
                "cannot be decoupled, remove the hook"
            )


@contextlib.contextmanager
def _set_aside(leaves: Iterable[Tensor]) -> Iterator[dict[Tensor, Tensor | None]]:
    """Inside ``with``, ``.grad`` of the leaves is None, and of those that are added."""
    held: dict[Tensor, Tensor | None] = {}
    try:
        _set_aside_more(leaves, held)
        yield held
    finally:
        for leaf, gradient in held.items():
            leaf.grad = gradient


def _set_aside_more(leaves: Iterable[Tensor], held: dict[Tensor, Tensor | None]) -> None:
    for leaf in leaves:
        if leaf not in held:
            held[leaf] = leaf.grad
            leaf.grad = None


def _losses(
    entries: Iterable[Entry], held: Iterable[Tensor]
) -> Iterator[tuple[Entry, Tensor | None]]:
    """The loss of each entry; a closure is called when its turn comes."""
    device: torch.device | None = None
    for entry in entries:
        if entry.loss is None or isinstance(entry.loss, Tensor):
            loss = entry.loss
        else:
            with torch.enable_grad(), noted(f"in the closure of {entry}"):
                loss = entry.loss()
            if any(leaf.grad is not None for leaf in held):
                raise ValueError(
                    f"the closure of {entry} called backward; it must only compute and "
                    "return its loss, the optimizer calls backward on it"
                )
            if loss is not None:
                checked_loss(loss, entry, device)
        if loss is not None:
            device = loss.device
        yield entry, loss
        del loss  # or the graph of a closure would live while the next one runs


def _refuse_unreached(
    entries: Sequence[Entry], graphs: Graphs, parameters: Iterable[Tensor]
) -> None:
    """Before any graph is freed: each loss must reach one of the ``parameters``, or may."""
    reaching = graphs.hidden
    for parameter in parameters:
        reaching |= graphs.leaves.get(parameter, 0)
    for place, entry in enumerate(entries):
        if not reaching >> place & 1:
            raise _reaches_nothing(entry)


def _refuse_sparse(gradients: Gradients, where: Entry | str) -> None:
    for leaf, gradient in gradients.items():
        if gradient.layout is not torch.strided:
            raise ValueError(
                f"{where} has a sparse gradient for a parameter of "
                f"shape {tuple(leaf.shape)}; use dense gradients (for nn.Embedding: sparse=False) "
                "or give that parameter to an optimizer of its own"
            )


def _in_backward(entry: Entry | None) -> str:
    if entry is None:
        return (
            "in the one backward of all losses; with conflict_parameters their graphs are needed "
            "until then: do not call backward yourself"
        )
    return (
        f"in the backward of {entry}; if its graph was freed: do not call backward yourself, give "
        "a loss once, and let a closure run its own forward (losses that share one are given as "
        "tensors)"
    )


def _reaches_nothing(entry: Entry) -> ValueError:
    return ValueError(
        f"{entry} does not depend on any parameter of this optimizer that requires grad"
    )
