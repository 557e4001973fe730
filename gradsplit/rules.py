"""Rules: Gramian -> weights. Pure, batched, no model and no optimizer in sight.

Every projected row stays in the span of the original rows g_1 ... g_m, so the merged gradient is
always sum_i w_i g_i, and w depends on the rows through the Gramian K_jk = <g_j, g_k> alone.

A rule is any callable that maps a Gramian (..., m, m) to weights (..., m).
"""

import torch
from torch import Tensor

__all__ = ["draw_order", "gmd", "pcgrad"]


def gmd(gramian: Tensor) -> Tensor:
    r"""Weights of Gradient-guided Modality Decoupling (GMD).

    Of every conflicting pair (K_jk < 0), each of the two original rows loses its component along
    the other one; all are summed:

    .. math:: w_k = 1 - \sum_{j \ne k} \min(0, K_{jk}) / K_{kk}

    This is Eq. 5-9 of the paper (AAAI 2024, arXiv 2402.16318). The code released with the paper
    runs :func:`pcgrad` instead, and lets a row meet itself.

    Args:
        gramian: (..., m, m), symmetric, floating point.

    Returns:
        Weights (..., m), at least 1, in the Gramian's dtype (float32 for half precision). A zero
        row has weight 1. NaN and inf propagate.

    Raises:
        TypeError: ``gramian`` is not a floating-point tensor.
        ValueError: ``gramian`` is not (..., m, m).

    >>> gmd(torch.tensor([[4.0, -2.0], [-2.0, 1.0]]))
    tensor([1.5000, 3.0000])
    """
    gramian = _checked(gramian)
    # The diagonal is a sum of squares, so clamping zeroes it: j = k needs no case of its own.
    # clamp keeps NaN; where(K < 0, K, 0) would lose it.
    conflict = gramian.clamp(max=0.0)
    return 1.0 - conflict.sum(-2) / _squared_norms(gramian)


def pcgrad(gramian: Tensor, order: Tensor) -> Tensor:
    """Weights of PCGrad (Yu et al. 2020, arXiv 2001.06782).

    Row i meets the other original rows one after another, in the order ``order[i]``; where the
    running row conflicts with the row it meets, its component along that row is removed. In
    weight space the running rows are C J, with C = I at the start and, for each j in order(i),
    s = (C K)_ij; if s < 0: C_ij -= s / K_jj. The weights are the column sums of C.

    The self-pair j = i is skipped, as in the PCGrad paper. The code released with the GMD paper
    does not skip it: there a row that other projections have turned against itself is projected
    onto its own complement.

    Args:
        gramian: (..., m, m), symmetric, floating point.
        order: LongTensor (..., m, m); row i is a permutation of 0 ... m-1, the order in which row
            i meets the others (:func:`draw_order`). The position of i itself does not matter.

    Returns:
        Weights (..., m), at least 1, in the Gramian's dtype (float32 for half precision). A zero
        row has weight 1. NaN and inf propagate.

    Raises:
        TypeError: ``gramian`` is not floating point, or ``order`` is not a LongTensor.
        ValueError: ``gramian`` is not (..., m, m), or ``order`` has another shape.

    >>> order = torch.tensor([[0, 1], [0, 1]])
    >>> pcgrad(torch.tensor([[4.0, -2.0], [-2.0, 1.0]]), order)
    tensor([1.5000, 3.0000])
    """
    gramian = _checked(gramian)
    if not isinstance(order, Tensor) or order.dtype != torch.long:
        got = order.dtype if isinstance(order, Tensor) else type(order).__name__
        raise TypeError(f"pcgrad: order must be a LongTensor, got {got}; use order.long()")
    m = gramian.shape[-1]
    try:
        shape = torch.broadcast_shapes(gramian.shape, order.shape)
    except RuntimeError:
        shape = torch.Size()
    if order.shape[-2:] != (m, m) or shape == torch.Size():
        raise ValueError(
            f"pcgrad: order must hold one permutation per row of the Gramian, shape (..., {m}, "
            f"{m}) for {tuple(gramian.shape)}; got {tuple(order.shape)}"
        )
    gramian, order = gramian.expand(shape), order.expand(shape)
    squared_norms = _squared_norms(gramian)
    coefficients = torch.eye(m, dtype=gramian.dtype, device=gramian.device)
    coefficients = coefficients.expand(gramian.shape).clone()
    itself = torch.arange(m, device=gramian.device)
    for met in order.unbind(-1):  # (..., m): the row that each row meets at this position
        # K is symmetric: row K[met] holds what (C K)[i, met[i]] needs.
        met_gramian = gramian.gather(-2, met.unsqueeze(-1).expand(gramian.shape))
        inner = (coefficients * met_gramian).sum(-1)
        removed = inner.clamp(max=0.0) / squared_norms.gather(-1, met)
        removed = torch.where(met == itself, 0.0, removed)
        coefficients.scatter_add_(-1, met.unsqueeze(-1), -removed.unsqueeze(-1))
    return coefficients.sum(-2)


def draw_order(m: int, seed: int, step: int, device: torch.device | None = None) -> Tensor:
    """A random permutation for each of m rows, from ``seed`` and ``step`` alone: (m, m).

    Drawn where it is used and with integers alone, so that it is the same on every device, rank and
    resume; torch's own generators differ between devices.

    >>> order = draw_order(3, seed=0, step=7)
    >>> order.sort(dim=-1).values.tolist()
    [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    """
    # An odd multiplier keeps (seed, step) and (seed + 1, step - 1) apart.
    counter = _signed(seed * 0x9E3779B97F4A7C15 + step)
    stream = _scrambled(torch.full((m, m), counter, dtype=torch.long, device=device))
    place = torch.arange(m * m, dtype=torch.long, device=device).view(m, m)
    return _scrambled(stream + place * _signed(0x9E3779B97F4A7C15)).argsort(dim=-1, stable=True)


def _scrambled(keys: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele et al. 2014): 64 bits in, 64 well-mixed bits out."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        # The shift of a signed integer repeats its sign: the mask makes it a logical one.
        keys = (keys ^ ((keys >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return keys


def _signed(value: int) -> int:
    """The signed 64-bit integer with the low bits of ``value``."""
    return (value + 2**63) % 2**64 - 2**63


def _squared_norms(gramian: Tensor) -> Tensor:
    """(..., m): the diagonal, positive: the conflicts of a zero row are zero too, 0 / tiny = 0."""
    return gramian.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(gramian.dtype).tiny)


def _checked(gramian: Tensor) -> Tensor:
    if not isinstance(gramian, Tensor) or not gramian.is_floating_point():
        got = gramian.dtype if isinstance(gramian, Tensor) else type(gramian).__name__
        raise TypeError(f"gramian must be a floating-point tensor, got {got}")
    if gramian.dim() < 2 or gramian.shape[-1] != gramian.shape[-2]:
        raise ValueError(f"gramian must have shape (..., m, m), got {tuple(gramian.shape)}")
    return gramian.to(torch.promote_types(gramian.dtype, torch.float32))
