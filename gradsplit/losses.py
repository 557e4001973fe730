"""What the user hands over: names, closures, None; every check that needs no backward."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Entry", "Losses", "add_note", "checked_loss", "join_losses", "noted", "read_losses"]

Closure = Callable[[], Tensor | None]
Losses = Mapping[str | tuple[str, ...], Tensor | Closure | None] | Sequence[Tensor | Closure | None]


class Entry(NamedTuple):
    """One loss as the user gave it."""

    name: str
    loss: Tensor | Closure | None
    place: int  # 1 ... m
    of: int  # m

    def __str__(self) -> str:
        """For messages: "loss 2 of 4 ('text+audio')"."""
        return f"loss {self.place} of {self.of} ({self.name!r})"


def read_losses(
    losses: Losses, needs_grad: bool = True, earlier: Iterable[str] = ()
) -> list[Entry]:
    """Name the losses and check all that can be checked before any closure or backward runs.

    Args:
        losses: as in :meth:`gradsplit.ModalityDecoupledOptimizer.backward`.
        needs_grad: whether a loss that requires no grad is an error.
        earlier: names from earlier micro-batches: no combination may come in another order.

    Raises:
        TypeError: not a mapping or sequence; a key that is no name; a loss that is neither tensor,
            closure nor None.
        ValueError: no losses; two keys with one name, a modality twice in a combination, or one
            tensor under two names; a loss that is not a real scalar, requires no grad, or lies on
            another device than the first.
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
    _refuse_double_names(names, earlier)
    pairs = enumerate(zip(names, values, strict=True), start=1)
    entries = [Entry(name, value, place, len(names)) for place, (name, value) in pairs]
    seen: dict[Tensor, Entry] = {}
    device: torch.device | None = None
    for entry in entries:
        if isinstance(entry.loss, Tensor):
            if entry.loss in seen:
                raise ValueError(
                    f"{entry} is the same tensor as {seen[entry.loss]}; give each loss "
                    "once, under one name"
                )
            seen[entry.loss] = entry
            device = checked_loss(entry.loss, entry, device, needs_grad).device
        elif entry.loss is not None and not callable(entry.loss):
            raise TypeError(
                f"{entry} must be a scalar loss tensor, a closure or None; "
                f"got {_describe(entry.loss)}"
            )
    return entries


def checked_loss(
    loss: Any, entry: Entry, device: torch.device | None, needs_grad: bool = True
) -> Tensor:
    """``loss``, if it is a real scalar on ``device`` (None: anywhere) that requires grad.

    It is that of ``entry``, or what its closure has returned.
    """
    where = entry if loss is entry.loss else f"the closure of {entry}: its result"
    if not isinstance(loss, Tensor):
        raise TypeError(f"{where} must be a scalar loss or None, got {_describe(loss)}")
    if loss.dim() > 1 or loss.numel() != 1:
        raise ValueError(
            f"{where} must be a scalar of shape () or (1,), got shape {tuple(loss.shape)}; "
            "reduce it, e.g. with .mean()"
        )
    if loss.is_complex():
        raise ValueError(f"{where} must be real, got {loss.dtype}")
    if needs_grad and not loss.requires_grad:
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


def join_losses(losses: Sequence[Tensor]) -> Tensor:
    """(m,): losses of shape () or (1,) in their widest dtype."""
    dtype = losses[0].dtype
    for loss in losses[1:]:
        dtype = torch.promote_types(dtype, loss.dtype)
    same = all(loss.dim() == 0 and loss.dtype == dtype for loss in losses)
    return torch.stack(list(losses) if same else [loss.reshape(()).to(dtype) for loss in losses])


@contextlib.contextmanager
def noted(note: str) -> Iterator[None]:
    """An exception of the user's or of torch's passes through, saying where it came from."""
    try:
        yield
    except Exception as error:
        add_note(error, note)
        raise


def add_note(error: BaseException, note: str) -> None:
    """Say more of an exception that passes through, where Python can (3.11)."""
    if hasattr(error, "add_note"):
        error.add_note(f"gradsplit: {note}")


def _name(key: Any) -> str:
    if isinstance(key, str) and key:
        return key
    if isinstance(key, tuple) and key and all(isinstance(part, str) for part in key):
        return "+".join(key)
    raise TypeError(
        f"losses has the key {key!r}; keys are names, or tuples of names, and not empty"
    )


def _refuse_double_names(names: Sequence[str], earlier: Iterable[str]) -> None:
    # The order in a combination means nothing.
    known = {frozenset(name.split("+")): name for name in earlier}
    seen: set[frozenset[str]] = set()
    for name in names:
        parts = name.split("+")
        combination = frozenset(parts)
        if len(combination) < len(parts) and all(parts):
            raise ValueError(f"losses: the combination {name!r} names a modality twice")
        if combination in seen or known.get(combination, name) != name:
            raise ValueError(
                f"losses has two entries for one combination, {known[combination]!r} and {name!r}; "
                "give each combination once, and in one order"
            )
        seen.add(combination)
        known[combination] = name


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:80]
