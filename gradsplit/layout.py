"""Gradients as flat vectors: the elements of a parameter in one order, whatever the strides."""

import torch
from torch import Tensor

__all__ = ["flattened", "merged_dtype", "unflattened"]


def flattened(gradient: Tensor, like: Tensor) -> Tensor:
    """(numel,): a view wherever the gradient lies in memory as ``like`` does.

    ``like`` is the first row's gradient: all rows of a parameter list their elements in the same
    order, whatever their own strides.
    """
    if like.dim() == 1 or like.is_contiguous():
        # Many small tensors are mostly overhead: no view where none is needed.
        return gradient if gradient.dim() == 1 else gradient.reshape(-1)
    return gradient.permute(_memory_order(like)).reshape(-1)


def unflattened(flat: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`flattened`: always a view of ``flat``."""
    if like.is_contiguous():
        return flat.view(like.shape)
    order = _memory_order(like)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([like.shape[dim] for dim in order]).permute(inverse)


def merged_dtype(parameter: Tensor, like: Tensor, rounded: torch.dtype | None) -> torch.dtype:
    """The row's own, or the parameter's if the row was rounded to save memory."""
    return parameter.dtype if like.dtype == rounded else like.dtype


def _memory_order(like: Tensor) -> list[int]:
    return sorted(range(like.dim()), key=like.stride, reverse=True)
