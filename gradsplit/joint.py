"""One scalar whose backward decouples, for frameworks that call ``backward`` themselves."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradsplit.losses import Entry, join_losses

__all__ = ["joint_loss"]

Decouple = Callable[[Any], object]


def joint_loss(
    entries: list[Entry], reduction: str, decouple: Decouple, empty: Tensor | None = None
) -> Tensor:
    """The mean of the losses (``reduction="sum"``: their sum), in float32 or wider.

    Args:
        entries: tensors and None, one tensor at least.
        reduction: of the optimizer.
        decouple: called in backward with the losses by name, each times the gradient that arrives.
            Without grad mode nothing is called.
        empty: the value where all are unavailable, on a rank of many; None: that is an error.

    Raises:
        TypeError: a closure.
        ValueError: all are unavailable.
    """
    losses: dict[str, Tensor | None] = {}
    for entry in entries:
        if entry.loss is not None and not isinstance(entry.loss, Tensor):
            raise TypeError(
                f"{entry} is a closure; joint needs the value of each loss: give the loss "
                "itself, or use backward(losses), which takes closures"
            )
        losses[entry.name] = entry.loss
    present = [loss for loss in losses.values() if loss is not None]
    if not present and empty is not None:
        present = [empty]
    if not present:
        raise ValueError(
            f"losses: all are unavailable (None): {', '.join(map(repr, losses))}; skip this batch"
        )
    values = join_losses([loss.detach() for loss in present])
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    value = values.sum() if reduction == "sum" else values.mean()
    if not torch.is_grad_enabled():
        return value
    anchor = torch.zeros((), device=value.device, requires_grad=True)
    joined: Tensor = _Joint.apply(anchor, value, losses, decouple)  # type: ignore[no-untyped-call]
    return joined


class _Joint(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, value: Tensor, losses: dict[str, Tensor], decouple: Decouple
    ) -> Tensor:
        ctx.losses, ctx.decouple = losses, decouple
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        losses, ctx.losses = ctx.losses, None
        if losses is None:
            raise RuntimeError(
                "a second backward through one joint loss: its graphs are used up; call joint anew"
            )
        with torch.enable_grad():
            ctx.decouple(
                {
                    name: None if loss is None else loss.reshape(()) * gradient.to(loss.device)
                    for name, loss in losses.items()
                }
            )
        return None, None, None, None
