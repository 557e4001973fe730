"""Fused Triton kernels. Triton itself is imported when one is launched, not before."""

import functools
import importlib.util
import os
from collections.abc import Iterable, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

__all__ = ["gramian", "has_triton", "merge", "obstacle"]

MOST_ROWS = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; importing it may still fail."""
    return importlib.util.find_spec("triton") is not None


def obstacle(gradients: Sequence[Tensor], m: int) -> str | None:
    """Why the kernels cannot take one parameter's ``gradients``, of m rows; None if they can."""
    if m > MOST_ROWS:
        return f"the kernels take at most {MOST_ROWS} rows, got {m}"
    if not has_triton():
        return "Triton is not installed (pip install triton)"
    dtype, device = gradients[0].dtype, gradients[0].device
    for gradient in gradients:  # many in a step: nothing but what differs from one to the next
        if gradient.dtype != dtype or gradient.device != device:
            return "one parameter has gradients of several dtypes or devices"
    if dtype not in _DTYPES:
        return f"a gradient is {dtype}; the kernels take float32, bfloat16, float16"
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return f"a gradient is on {device}; the kernels need a CUDA device"
    return None


def gramian(rows: Sequence[Mapping[Tensor, Tensor]], parameters: Iterable[Tensor]) -> Tensor:
    """:func:`gradsplit.gramian.gramian_ref` by kernels: the same arguments and result."""
    from gradsplit.kernels import fused

    return fused.gramian(rows, parameters)


def merge(
    rows: Sequence[MutableMapping[Tensor, Tensor]],
    parameters: Iterable[Tensor],
    weights: Tensor,
    rounded: torch.dtype | None = None,
) -> dict[Tensor, Tensor]:
    """:func:`gradsplit.gramian.merge_ref` by kernels: the same arguments and result."""
    from gradsplit.kernels import fused

    return fused.merge(rows, parameters, weights, rounded)
