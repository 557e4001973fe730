"""SentimentTransformer: text, audio and vision -> one sentiment score, from whatever is available.

Per modality: a linear projection and a norm affine wherever the backbone normalises. Shared by all
modalities: the transformer backbone, which sees each modality on its own. Shared by all
combinations: the mean over the available modalities, and the head.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsplit.sharing import ModalityNorm, fuse_available

__all__ = ["SentimentTransformer", "SentimentTransformerConfig"]


@dataclass(frozen=True)
class SentimentTransformerConfig:
    """Sizes of a :class:`SentimentTransformer`.

    Attributes:
        dims: modality -> feature width d_m; its order is the order of the modalities. The default
            is CMU-MOSI as the MMSA toolkit distributes it (MOSEI: audio 74, vision 35).
        width: D, of the backbone.
        depth: number of transformer blocks.
        heads: attention heads; must divide ``width``.
        dropout: after the projections, attentions and MLPs.
    """

    dims: Mapping[str, int] = field(default_factory=lambda: {"text": 768, "audio": 5, "vision": 20})
    width: int = 64
    depth: int = 2
    heads: int = 4
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if not self.dims or min(self.dims.values()) < 1:
            raise ValueError(f"dims must map modalities to widths of at least 1, got {self.dims}")
        if self.width % self.heads != 0 or self.width % 2 != 0:
            raise ValueError(
                f"width must be even and a multiple of heads={self.heads}, got {self.width}"
            )
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


Sequences = Tensor | tuple[Tensor, Tensor]  # (B, T, d), or with lengths (B,)
Scores = Tensor | tuple[Tensor, ...]  # (B,), or one such tensor per combination


class SentimentTransformer(nn.Module):
    """Sentiment in [-3, 3] from any combination of modalities, with Dynamic Sharing.

    The default configuration has 156,545 parameters: 103,681 shared and 52,864 private
    (50,944 of them the projections).

    >>> model = SentimentTransformer(SentimentTransformerConfig())
    >>> text, audio = torch.randn(2, 50, 768), torch.randn(2, 375, 5)
    >>> model({"text": text, "audio": (audio, torch.tensor([375, 120]))}).shape
    torch.Size([2])
    >>> combinations = [("text", "audio"), ("text",), ("audio",)]
    >>> both, *singles = model({"text": text, "audio": audio}, combinations=combinations)
    >>> both.shape, len(singles)
    (torch.Size([2]), 2)
    """

    def __init__(self, config: SentimentTransformerConfig | None = None) -> None:
        super().__init__()
        self.config = config = SentimentTransformerConfig() if config is None else config
        self.modalities = tuple(config.dims)
        # The first module made: it refuses names that no parameter can have.
        self.norm = ModalityNorm(self.modalities, config.width)
        self.project = nn.ModuleDict(
            {name: nn.Linear(dim, config.width) for name, dim in config.dims.items()}
        )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(self.modalities, config) for _ in range(config.depth))
        self.head = nn.Sequential(
            nn.Linear(config.width, config.width), nn.GELU(), nn.Linear(config.width, 1)
        )

    def forward(
        self,
        inputs: Mapping[str, Sequences],
        available: Tensor | None = None,
        combinations: Sequence[Iterable[str]] | None = None,
        return_valid: bool = False,
    ) -> Scores | tuple[Scores, Tensor]:
        """Scores, not clipped.

        Args:
            inputs: modality -> (B, T_m, d_m), or a pair of that and lengths (B,) of at least 1;
                frames beyond the length have no influence. A modality that is left out is
                unavailable.
            available: (B, M) bool in the order of the config, for samples that lack a modality.
                Only available pairs are computed. Keep it on the CPU: it decides what runs.
            combinations: tuples of names. All of them from one pass over the modalities.
            return_valid: also return which scores mean something, (B,) or (C, B) bool, instead of
                raising where a sample has nothing available.

        Returns:
            (B,); with combinations a tuple of C such tensors, each with the graph of its own
            combination alone: compute one loss per tensor. For torch.compile see
            :func:`gradsplit.sharing.fuse_available`.

        Raises:
            TypeError: ``available`` is not bool.
            ValueError: an unknown modality, shapes that do not fit, or a sample with nothing
                available for a combination.
        """
        batch = self._check(inputs, available)
        wanted = set(self.modalities)
        if combinations is not None:
            combinations = [tuple(combination) for combination in combinations]
            wanted = {name for combination in combinations for name in combination}
            if not wanted or not wanted <= set(self.modalities):
                raise ValueError(
                    f"combinations must be non-empty tuples of {self.modalities}, got "
                    f"{combinations}"
                )
        features: dict[str, Tensor | None] = {}
        for column, name in enumerate(self.modalities):
            features[name] = None
            if name in inputs and name in wanted:
                has = None if available is None else available[:, column]
                features[name] = self._encode(name, inputs[name], has, batch)
        if all(feature is None for feature in features.values()):
            return self._nothing(batch, combinations, return_valid)
        if not return_valid:
            return self._scores(fuse_available(features, available, combinations))
        fused, valid = fuse_available(features, available, combinations, return_valid=True)
        return self._scores(fused), valid

    def shared_parameters(self) -> list[nn.Parameter]:
        """What every modality uses, and so every loss reaches: backbone and head."""
        private = {id(parameter) for parameter in self.project.parameters()}
        for module in self.modules():
            if isinstance(module, ModalityNorm):
                private.update(id(parameter) for parameter in module.parameters())
        return [parameter for parameter in self.parameters() if id(parameter) not in private]

    def _scores(self, fused: Tensor | tuple[Tensor, ...]) -> Scores:
        """(B, D) -> (B,)."""
        if isinstance(fused, tuple):
            return tuple(self.head(one).squeeze(-1) for one in fused)
        scores: Tensor = self.head(fused).squeeze(-1)
        return scores

    def _nothing(
        self, batch: int, combinations: Sequence[Iterable[str]] | None, return_valid: bool
    ) -> tuple[Scores, Tensor]:
        """What forward gives when no sample has any of the modalities asked for."""
        if not return_valid:
            raise ValueError(
                f"inputs: no sample has anything available for {combinations or self.modalities}; "
                "skip this batch, or ask for return_valid=True"
            )
        zeros = self.norm.weight[self.modalities[0]].new_zeros(batch)
        if combinations is None:
            return zeros, zeros.bool()
        scores = (zeros,) * len(combinations)
        return scores, torch.stack(scores).bool()

    def _check(self, inputs: Mapping[str, Sequences], available: Tensor | None) -> int:
        """The batch size."""
        if not inputs:
            raise ValueError("inputs is empty: give at least one modality")
        sizes: dict[str, int] = {}
        for name, value in inputs.items():
            if name not in self.modalities:
                raise ValueError(f"inputs: unknown modality {name!r}, not one of {self.modalities}")
            sequence, lengths = (value, None) if isinstance(value, Tensor) else value
            if sequence.dim() != 3 or sequence.shape[2] != self.config.dims[name]:
                raise ValueError(
                    f"inputs[{name!r}] must be (B, T, {self.config.dims[name]}), got "
                    f"{tuple(sequence.shape)}"
                )
            if lengths is not None and lengths.shape != sequence.shape[:1]:
                raise ValueError(
                    f"inputs[{name!r}]: lengths must be ({sequence.shape[0]},), got "
                    f"{tuple(lengths.shape)}"
                )
            sizes[name] = sequence.shape[0]
        if len(set(sizes.values())) > 1:
            raise ValueError(f"inputs must have one batch size, got {sizes}")
        batch = next(iter(sizes.values()))
        expected = (batch, len(self.modalities))
        if available is not None and tuple(available.shape) != expected:
            raise ValueError(f"available must be (B, M) = {expected}, got {tuple(available.shape)}")
        if available is not None and available.dtype != torch.bool:
            raise TypeError(f"available must be bool (True = available), got {available.dtype}")
        return batch

    def _encode(self, name: str, value: Sequences, has: Tensor | None, batch: int) -> Tensor | None:
        """(B, D), computed for the samples that have the modality and zero for the others."""
        sequence, lengths = (value, None) if isinstance(value, Tensor) else value
        rows: Tensor | None = None
        if has is not None and not bool(has.all()):
            rows = has.nonzero().squeeze(1).to(sequence.device)  # (b,)
            if len(rows) == 0:
                return None
            sequence = sequence[rows]
            lengths = None if lengths is None else lengths.to(rows.device)[rows]
        mask: Tensor | None = None
        if lengths is not None:
            if not 1 <= int(lengths.min()) <= int(lengths.max()) <= sequence.shape[1]:
                raise ValueError(
                    f"inputs[{name!r}]: lengths must be between 1 and T={sequence.shape[1]}, got "
                    f"{int(lengths.min())} to {int(lengths.max())}"
                )
            frames = torch.arange(sequence.shape[1], device=sequence.device)
            mask = frames < lengths.to(sequence.device)[:, None]  # (b, T)
            # Not a product: what lies in the padding may be NaN.
            sequence = torch.where(mask[..., None], sequence, 0.0)
        x = self.project[name](sequence)  # (b, T, D)
        x = self.dropout(x + _positions(x))
        for block in self.blocks:
            x = block(x, name, mask)  # (b, T, D)
        pooled = _masked_mean(self.norm(x, name), mask)  # (b, D)
        if rows is None:
            return pooled
        return pooled.new_zeros(batch, pooled.shape[1]).index_copy(0, rows, pooled)


class Block(nn.Module):
    """Pre-norm transformer block; attention and MLP shared, norm affines per modality."""

    def __init__(self, modalities: tuple[str, ...], config: SentimentTransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_dropout = config.dropout
        self.attention_norm = ModalityNorm(modalities, width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = ModalityNorm(modalities, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, modality: str, mask: Tensor | None) -> Tensor:
        """x (b, T, D), mask (b, T) with True = a frame -> (b, T, D)."""
        b, t, d = x.shape
        qkv = self.attention_in(self.attention_norm(x, modality))  # (b, T, 3D)
        q, k, v = qkv.view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(  # (b, heads, T, D / heads)
            q,
            k,
            v,
            attn_mask=None if mask is None else mask[:, None, None, :],
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        x = x + self.dropout(self.attention_out(attended.transpose(1, 2).reshape(b, t, d)))
        mixed: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x, modality)))
        return mixed


def _positions(x: Tensor) -> Tensor:
    """(T, D): sinusoidal, so that any length will do."""
    _, t, d = x.shape
    scale = torch.arange(0, d, 2, device=x.device) * (-math.log(10_000.0) / d)
    angle = torch.arange(t, device=x.device)[:, None] * scale.exp()
    return torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(t, d).to(x.dtype)


def _masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """(b, T, D) -> (b, D)."""
    if mask is None:
        return x.mean(1)
    return torch.where(mask[..., None], x, 0.0).sum(1) / mask.sum(1, keepdim=True)
