"""Dynamic Sharing: the blocks of a model that takes any combination of modalities.

A modality-specific encoder or norm, then a backbone that all modalities share and that sees each
of them on its own, then a fusion that does not depend on how many there are. Absent modalities are
not computed and not imputed. Branches stay apart until the fusion, so that the autograd graph tells
the truth: a loss reaches only the parameters that its available modalities use. (Stacking all
branches and masking would hand zero gradients to private encoders; then every loss seems to reach
everything, no parameter is private, and every backward runs through all branches.)
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ModalityNorm", "fuse_available"]


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
Combinations = Sequence[Iterable[str]]


@overload
def fuse_available(
    features: Features, available: Tensor | None = None, combinations: None = None
) -> Tensor: ...
@overload
def fuse_available(
    features: Features, available: Tensor | None = None, combinations: Combinations = ...
) -> tuple[Tensor, ...]: ...
@overload
def fuse_available(
    features: Features,
    available: Tensor | None = None,
    combinations: None = None,
    *,
    return_valid: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def fuse_available(
    features: Features,
    available: Tensor | None = None,
    combinations: Combinations = ...,
    *,
    return_valid: Literal[True],
) -> tuple[tuple[Tensor, ...], Tensor]: ...
def fuse_available(
    features: Features,
    available: Tensor | None = None,
    combinations: Combinations | None = None,
    *,
    return_valid: bool = False,
) -> Tensor | tuple[Tensor | tuple[Tensor, ...], ...]:
    """Mean over the available modalities: for one combination, or for many from one pass.

    What lies in an unavailable (sample, modality) pair, NaN included, has no influence.

    Args:
        features: modality -> (B, ...), or None where unavailable. A sequence of M such tensors
            or (M, B, ...) stands for modalities "0", "1", ...; in training prefer tensors of their
            own, as the parts of one tensor share its graph.
        available: (B, M) bool, True = available: which modalities each sample has, in the order
            of ``features``. None: everything is available.
        combinations: C tuples of names. Sample b of output c is the mean over the modalities of
            combination c that b has.
        return_valid: return the pair (fused, valid) instead of raising where a sample has nothing
            available for a combination. ``valid`` is bool, (B,) or (C, B); fused is zero where it
            is False: leave these pairs out of the loss.

    Returns:
        (B, ...); with combinations a tuple of C such tensors, each with the graph of its own
        modalities alone. A loss on a part of their ``torch.stack`` would send zero gradients to
        all the others. So does ``torch.compile`` of a whole model that returns them: call such a
        model once per combination.

    Raises:
        TypeError: ``available`` is not a bool tensor.
        ValueError: shapes that do not fit, an unknown name, an empty combination, or a sample with
            nothing available.

    >>> features = {"text": torch.ones(1, 3), "audio": torch.zeros(1, 3)}
    >>> fuse_available(features, combinations=[("text", "audio"), ("audio",)])
    (tensor([[0.5000, 0.5000, 0.5000]]), tensor([[0., 0., 0.]]))
    """
    if not isinstance(features, Mapping):
        features = {str(index): branch for index, branch in enumerate(features)}
    branches = _branches(features)
    has = _has(features, available, len(next(iter(branches.values()))))
    chosen = [tuple(features)] if combinations is None else _chosen(combinations, list(features))
    outputs, counts = zip(*(_mean(branches, has, names) for names in chosen), strict=True)
    fused = outputs[0] if combinations is None else outputs
    if return_valid:
        valid = torch.tensor(counts, device=outputs[0].device) > 0  # (C, B)
        return fused, valid[0] if combinations is None else valid
    for names, row in zip(chosen, counts, strict=True):
        if 0 in row:
            raise ValueError(
                f"sample {row.index(0)} has nothing available for combination {names}; give it a "
                "modality, leave it out, or ask for return_valid=True"
            )
    return fused


def _branches(features: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Those that are there: one at least, all of one shape."""
    branches = {name: branch for name, branch in features.items() if branch is not None}
    if not branches:
        raise ValueError("features: no modality is available")
    shapes = {name: tuple(branch.shape) for name, branch in branches.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"features must have one shape (B, ...), got {shapes}")
    return branches


def _has(
    features: Mapping[str, Tensor | None], available: Tensor | None, batch: int
) -> dict[str, list[bool]]:
    """Which of the B samples have each modality."""
    if available is None:
        return {name: [branch is not None] * batch for name, branch in features.items()}
    kind = getattr(available, "dtype", type(available))
    if kind is not torch.bool:
        raise TypeError(f"available must be a bool tensor (True = available), got {kind}")
    if available.shape != (batch, len(features)):
        raise ValueError(
            f"available must be (B, M) = ({batch}, {len(features)}), got {tuple(available.shape)}; "
            "what to fuse for all samples goes into combinations="
        )
    columns = zip(features.items(), available.T.tolist(), strict=True)  # one transfer
    return {name: [branch is not None and it for it in has] for (name, branch), has in columns}


def _chosen(combinations: Combinations, names: list[str]) -> list[tuple[str, ...]]:
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
    branches: Mapping[str, Tensor], has: Mapping[str, list[bool]], combination: tuple[str, ...]
) -> tuple[Tensor, list[int]]:
    """The mean over those of the combination that each sample has, and how many these are."""
    counts = [sum(sample) for sample in zip(*(has[name] for name in combination), strict=True)]
    terms = []
    for name in combination:
        if any(has[name]):  # what nobody has stays out of the graph
            branch = branches[name]
            if not all(has[name]):
                branch = torch.where(_per_sample(has[name], branch), branch, 0.0)
            terms.append(branch)
    if not terms:
        return torch.zeros_like(next(iter(branches.values()))), counts
    total = sum(terms[1:], terms[0])
    if len(set(counts)) == 1:
        return total / counts[0], counts
    return total / _per_sample([max(count, 1) for count in counts], total), counts


def _per_sample(values: Sequence[float], like: Tensor) -> Tensor:
    """B numbers -> (B, 1, ...), to meet ``like`` of shape (B, ...)."""
    return torch.tensor(values, device=like.device).view(-1, *[1] * (like.dim() - 1))
