"""Dynamic Sharing: the blocks of a model that takes any combination of modalities.

A modality-specific encoder or norm, then a backbone that all modalities share and that sees each
of them on its own, then a fusion that does not depend on how many there are. Absent modalities are
not computed and not imputed. Branches stay apart until the fusion, so that the autograd graph tells
the truth: a loss reaches only the parameters that its available modalities use. (Stacking all
branches and masking would hand zero gradients to private encoders; then every loss seems to reach
everything, no parameter is private, and every backward runs through all branches.)
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ModalityNorm", "fuse_available", "stack_combinations"]


class ModalityNorm(nn.Module):
    """Normalisation shared by all modalities, with one affine per modality.

    Each modality's weight and bias is a Parameter of its own: one (M, channels) tensor would be
    reached by every loss.

    Args:
        modalities: names.
        channels: C.
        groups: None: LayerNorm over the last dimension, (..., C). A number: GroupNorm with that
            many groups over dimension 1, (B, C, ...).
        eps: added to the variance.

    Raises:
        ValueError: no modality, a name that no parameter can have, or ``groups`` does not divide
            ``channels``.

    >>> norm = ModalityNorm(("text", "audio"), channels=8)
    >>> norm(torch.randn(2, 5, 8), "audio").shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        modalities: Iterable[str],
        channels: int,
        groups: int | None = None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if isinstance(modalities, str) or not isinstance(modalities, Iterable):
            raise ValueError(
                f"modalities must be one or more names, got {modalities!r}; the order is "
                "ModalityNorm(modalities, channels)"
            )
        names = tuple(modalities)
        if not names:
            raise ValueError("modalities is empty; name at least one")
        for name in names:
            if "." in name or not name or hasattr(nn.ParameterDict, name):
                raise ValueError(f"modalities: {name!r} cannot be the name of a parameter")
        if groups is not None and (groups < 1 or channels % groups != 0):
            raise ValueError(f"groups must divide channels={channels}, got {groups}")
        self.channels, self.groups, self.eps = channels, groups, eps
        self.weight = nn.ParameterDict({name: nn.Parameter(torch.ones(channels)) for name in names})
        self.bias = nn.ParameterDict({name: nn.Parameter(torch.zeros(channels)) for name in names})

    def forward(self, features: Tensor, modality: str | Sequence[str]) -> Tensor:
        """Normalise the features of one modality, or of one modality per sample.

        Args:
            features: (..., C) for LayerNorm, (B, C, ...) for GroupNorm.
            modality: whose affine. B names: one per sample of dimension 0. That joins the graphs
                of these modalities; it is for inference, where one batch of several modalities may
                be faster than one batch of each.

        Returns:
            The same shape.

        Raises:
            ValueError: an unknown ``modality``, or not one for each sample.
        """
        names = (modality,) if isinstance(modality, str) else modality
        for name in names:
            if name not in self.weight:
                raise ValueError(f"modality must be one of {list(self.weight)}, got {name!r}")
        if isinstance(modality, str):
            return self._normalised(features, self.weight[modality], self.bias[modality])
        if len(names) != features.shape[0]:
            raise ValueError(
                f"modality must be one name, or one for each of the {features.shape[0]} samples, "
                f"got {len(names)} names"
            )
        dim = -1 if self.groups is None else 1
        shape = [1] * features.dim()
        shape[0], shape[dim] = len(names), self.channels
        weight = torch.stack([self.weight[name] for name in names]).view(shape)
        bias = torch.stack([self.bias[name] for name in names]).view(shape)
        return torch.addcmul(bias, self._normalised(features, None, None), weight)

    def _normalised(self, features: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if self.groups is None:
            return F.layer_norm(features, (self.channels,), weight, bias, self.eps)
        return F.group_norm(features, self.groups, weight, bias, self.eps)

    def extra_repr(self) -> str:
        kind = "LayerNorm" if self.groups is None else f"GroupNorm({self.groups})"
        return f"{kind}, channels={self.channels}, modalities={list(self.weight)}"


Features = Mapping[str, Tensor | None] | Sequence[Tensor] | Tensor
Combinations = Tensor | Sequence[Iterable[str]]


@overload
def fuse_available(
    features: Features,
    available: Tensor | None = None,
    combinations: Combinations | None = None,
    *,
    return_valid: Literal[False] = False,
) -> Tensor: ...
@overload
def fuse_available(
    features: Features,
    available: Tensor | None = None,
    combinations: Combinations | None = None,
    *,
    return_valid: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def fuse_available(
    features: Features,
    available: Tensor | None = None,
    combinations: Combinations | None = None,
    *,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean over the available modalities: for one combination, or for many from one pass.

    What lies in an unavailable (sample, modality) pair, NaN included, has no influence.

    Args:
        features: a mapping modality -> (B, ...) or None where unavailable, a sequence of M such
            tensors, or (M, B, ...). In training prefer a mapping or a sequence: the parts of one
            (M, B, ...) tensor share its graph.
        available: bool, True = available. (B, M): which modalities each sample has, in the order
            of ``features`` (for a mapping: of its keys). None: everything is available. As a
            shorthand, a mask (C, M) whose C is not B is understood as ``combinations``; where C
            may happen to equal B, as in the last batch of an epoch, say ``combinations=``.
        combinations: (C, M) bool, or for a mapping C tuples of names. Sample b of combination c is
            the mean over the modalities of c that b has.
        return_valid: return the pair (fused, valid) instead of raising where a sample has nothing
            available for a combination. ``valid`` is bool, (B,) or (C, B); fused is zero there:
            leave these pairs out of the loss.

    Returns:
        (B, ...), or with combinations (C, B, ...), stacked by :func:`stack_combinations`: the
        graph of ``fused[c]`` holds the modalities of combination c alone.

    Raises:
        TypeError: a mask that is not bool.
        ValueError: shapes that do not fit, an unknown name, an empty combination, or a sample with
            nothing available.

    >>> features = {"text": torch.ones(2, 3), "audio": torch.zeros(2, 3)}
    >>> fuse_available(features, torch.tensor([[True, True], [True, False]]))
    tensor([[0.5000, 0.5000, 0.5000],
            [1.0000, 1.0000, 1.0000]])
    >>> fuse_available(features, combinations=[("text", "audio"), ("audio",)]).shape
    torch.Size([2, 2, 3])
    """
    names, branches = _branches(features)
    pairs = zip(names, branches, strict=True)
    present = {name: branch for name, branch in pairs if branch is not None}
    if not present:
        raise ValueError("features: no modality is available")
    example = next(iter(present.values()))
    batch = example.shape[0]
    for name, branch in present.items():
        if branch.shape != example.shape:
            raise ValueError(
                f"features must have one shape (B, ...), got {tuple(example.shape)} for "
                f"{next(iter(present))!r} and {tuple(branch.shape)} for {name!r}"
            )
    if available is not None:
        _check_mask("available", available, len(names))
        if available.shape[0] != batch and combinations is None:
            available, combinations = None, available
        elif available.shape[0] != batch:
            raise ValueError(
                f"available must be (B, M) = ({batch}, {len(names)}), got {tuple(available.shape)}"
            )
    chosen = _chosen(combinations, names)
    columns = None if available is None else available.T.tolist()  # one transfer
    has = {
        name: [True] * batch if columns is None else columns[names.index(name)] for name in present
    }
    fused, valid = [], []
    for combination in chosen:
        mean, any_available = _mean(
            {name: present[name] for name in combination if name in present}, has, example
        )
        if not return_valid and not all(any_available):
            sample = any_available.index(False)
            raise ValueError(
                f"sample {sample} has nothing available for combination {combination}; give it a "
                "modality, leave it out, or ask for return_valid=True"
            )
        fused.append(mean)
        valid.append(any_available)
    mask = torch.tensor(valid, dtype=torch.bool, device=example.device)
    if combinations is None:
        return (fused[0], mask[0]) if return_valid else fused[0]
    stacked = stack_combinations(fused)
    return (stacked, mask) if return_valid else stacked


def stack_combinations(outputs: Sequence[Tensor]) -> Tensor:
    """C outputs (B, ...) of one combination each -> (C, B, ...), with truthful graphs.

    ``stacked[c]``, ``stacked[c, ...]``, iteration and ``unbind`` give back the outputs themselves,
    so that a loss on ``stacked[c]`` reaches only what combination c uses. (Indexing a plain
    ``torch.stack`` sends zero gradients to all the others.) Changes of dtype or device keep that.
    Everything else sees an ordinary tensor, and gives one, whose graph is that of all combinations:
    compute the losses one combination at a time. Hooks on the stack do not see such losses.

    ``torch.compile`` of the whole model and ``DDP(find_unused_parameters=True)`` make one graph of
    all outputs, whatever is returned: there, call the model once per combination.

    Args:
        outputs: C tensors of one shape.

    Raises:
        RuntimeError: there are none, or their shapes differ.

    >>> a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    >>> stack_combinations([a, b])[1].sum().backward()
    >>> a.grad is None, b.grad
    (True, tensor([1., 1.]))
    """
    stacked = torch.stack(list(outputs))
    if not stacked.requires_grad:
        return stacked
    parted = stacked.as_subclass(_CombinationStack)
    parted.parts = tuple(outputs)
    return parted


class _CombinationStack(Tensor):
    parts: tuple[Tensor, ...]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():  # results are plain, as for nn.Parameter
            # After an in-place change the stack says something else than its parts.
            if args and isinstance(args[0], cls) and args[0]._version == 0:
                stack, *rest = args
                if func in _CONVERSIONS:
                    return stack_combinations([func(part, *rest, **kwargs) for part in stack.parts])
                dim = rest[0] if rest else kwargs.get("dim", 0)
                if func in (Tensor.unbind, torch.unbind) and dim == 0:
                    return stack.parts
                if func is Tensor.__iter__:
                    return iter(stack.parts)
                if func is Tensor.__getitem__:
                    first, *within = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
                    if isinstance(first, int | np.integer) and not isinstance(first, bool):
                        part = stack.parts[first]
                        return part[tuple(within)] if within else part
            return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


_CONVERSIONS = {
    Tensor.to,
    Tensor.float,
    Tensor.double,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.cpu,
    Tensor.cuda,
}


def _branches(features: Features) -> tuple[list[str], list[Tensor | None]]:
    if isinstance(features, Mapping):
        return list(features), list(features.values())
    branches: list[Tensor | None] = list(features)
    return [str(index) for index in range(len(branches))], branches


def _check_mask(argument: str, mask: Tensor, modalities: int) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{argument} must be a bool tensor (True = available), got {got}")
    if mask.dim() != 2 or mask.shape[1] != modalities:
        raise ValueError(
            f"{argument} must have one column for each of the {modalities} modalities, got shape "
            f"{tuple(mask.shape)}"
        )


def _chosen(combinations: Combinations | None, names: list[str]) -> list[tuple[str, ...]]:
    if combinations is None:
        return [tuple(names)]
    if isinstance(combinations, Tensor):
        _check_mask("combinations", combinations, len(names))
        chosen = [tuple(itertools.compress(names, mask)) for mask in combinations.tolist()]
    else:
        chosen = [tuple(combination) for combination in combinations]
    if not chosen or not all(chosen):
        raise ValueError("combinations must be non-empty, and so must each of them")
    for combination in chosen:
        for name in combination:
            if name not in names:
                raise ValueError(f"combinations: unknown modality {name!r}, not one of {names}")
        if len(set(combination)) < len(combination):
            raise ValueError(f"combinations: {combination} names a modality twice")
    return chosen


def _mean(
    members: Mapping[str, Tensor], has: Mapping[str, list[bool]], example: Tensor
) -> tuple[Tensor, list[bool]]:
    """The mean of one combination's members over those that each sample has."""
    batch = example.shape[0]
    counts = [sum(has[name][sample] for name in members) for sample in range(batch)]
    valid = [count > 0 for count in counts]
    total: Tensor | None = None
    for name, branch in members.items():
        if not any(has[name]):
            continue  # nothing of it is used: keep it out of the graph
        if not all(has[name]):
            mask = torch.tensor(has[name], device=branch.device)
            branch = torch.where(mask.view(-1, *[1] * (branch.dim() - 1)), branch, 0.0)
        total = branch if total is None else total + branch
    if total is None:
        return torch.zeros_like(example), valid
    if len(set(counts)) == 1:
        return total / counts[0], valid
    divisor = torch.tensor(counts, dtype=total.dtype, device=total.device).clamp(min=1)
    return total / divisor.view(-1, *[1] * (total.dim() - 1)), valid
