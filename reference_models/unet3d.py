"""DynamicSharingUNet3d: any set of MRI sequences -> segmentation logits.

One U-Net with one input channel. Its convolutions are shared by all modalities; every GroupNorm has
one affine per modality. Each available modality passes through it on its own; the logits are
averaged over those that are available. What is missing is not computed.

The GMD paper words it otherwise than its released code does: it draws separate encoders f_i and a
fusion of features. ``UNet3dConfig(private_encoder_levels=k)`` gives each modality its own first k
encoder levels; 0 is what the released code runs. Another difference: the released code zeroes the
features of absent modalities and computes them all the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradsplit.sharing import ModalityNorm, fuse_available

__all__ = ["DynamicSharingUNet3d", "UNet3dConfig"]

LEVELS = (1, 2, 4, 8, 8)  # channels of the encoder outputs, in widths
Logits = Tensor | tuple[Tensor, ...]  # (B, R, D, H, W), or one such tensor per combination


@dataclass(frozen=True)
class UNet3dConfig:
    """Sizes of a :class:`DynamicSharingUNet3d`.

    Attributes:
        modalities: names, in the order of the volume's channels.
        regions: names of the output channels.
        width: w, channels of the first level; a multiple of ``groups``.
        groups: of every GroupNorm.
        private_encoder_levels: each modality has its own first k encoder levels, 0 to 5.
        activation_checkpointing: recompute each block in the backward instead of keeping it: less
            memory, about a third more time, the same gradients.
    """

    modalities: tuple[str, ...] = ("t1", "t1ce", "t2", "flair")
    regions: tuple[str, ...] = ("WT", "TC", "ET")
    width: int = 16
    groups: int = 8
    private_encoder_levels: int = 0
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("modalities", "regions"):
            value = getattr(self, name)
            if isinstance(value, str) or not value or len(set(value)) < len(value):
                raise ValueError(f"{name} must be one or more distinct names, got {value!r}")
        if self.groups < 1 or self.width < 1 or self.width % self.groups != 0:
            raise ValueError(
                f"width must be a positive multiple of groups={self.groups}, got {self.width}"
            )
        if not 0 <= self.private_encoder_levels <= len(LEVELS):
            raise ValueError(
                f"private_encoder_levels must be 0 to {len(LEVELS)}, got "
                f"{self.private_encoder_levels}"
            )


class Block(nn.Module):
    """(Conv3d 3^3, GroupNorm with an affine per modality, ReLU) twice."""

    def __init__(self, channels: tuple[int, int, int], modalities: Sequence[str], groups: int):
        super().__init__()
        first, middle, last = channels
        self.conv1 = nn.Conv3d(first, middle, 3, padding=1)
        self.norm1 = ModalityNorm(modalities, middle, groups)
        self.conv2 = nn.Conv3d(middle, last, 3, padding=1)
        self.norm2 = ModalityNorm(modalities, last, groups)

    def forward(self, x: Tensor, modality: str | Sequence[str]) -> Tensor:
        """(b, first, D, H, W) -> (b, last, D, H, W); one modality, or one per sample."""
        x = F.relu(self.norm1(self.conv1(x), modality))
        return F.relu(self.norm2(self.conv2(x), modality))


class DynamicSharingUNet3d(nn.Module):
    """Logits of tumour regions from any combination of MRI sequences.

    The default configuration has 3,245,235 parameters, of which 8,832 are private: the norms.

    >>> model = DynamicSharingUNet3d(UNet3dConfig(width=8))
    >>> volume = torch.randn(1, 4, 20, 16, 18)
    >>> model(volume).shape
    torch.Size([1, 3, 20, 16, 18])
    >>> len(model(volume, combinations=[("t1", "flair"), ("t2",)]))
    2
    """

    def __init__(self, config: UNet3dConfig | None = None) -> None:
        super().__init__()
        self.config = config = UNet3dConfig() if config is None else config
        width, groups, modalities = config.width, config.groups, config.modalities
        outputs = [level * width for level in LEVELS]
        inputs = [1, *outputs[:-1]]
        self.private_encoders = nn.ModuleDict()
        private = config.private_encoder_levels
        if private > 0:
            for name in modalities:
                self.private_encoders[name] = nn.ModuleList(
                    Block((inputs[i], outputs[i], outputs[i]), (name,), groups)
                    for i in range(private)
                )
        self.encoder = nn.ModuleList(
            Block((inputs[i], outputs[i], outputs[i]), modalities, groups)
            for i in range(private, len(LEVELS))
        )
        # After concatenation with the skip: (16, 8, 4, 2) w in, half of it, then (4, 2, 1, 1) w.
        self.decoder = nn.ModuleList(
            Block((2 * half * width, half * width, last * width), modalities, groups)
            for half, last in ((8, 4), (4, 2), (2, 1), (1, 1))
        )
        self.head = nn.Conv3d(width, len(config.regions), 1)

    def forward(
        self,
        volume: Tensor | Mapping[str, Tensor],
        available: Tensor | Iterable[str] | None = None,
        combinations: Sequence[Iterable[str]] | None = None,
        *,
        return_valid: bool = False,
    ) -> Logits | tuple[Logits, Tensor]:
        """Logits, before the sigmoid of each region.

        Args:
            volume: (B, M, D, H, W) in the order of the config, or modality -> (B, 1, D, H, W), of
                any size; a modality that the mapping lacks is unavailable.
            available: (B, M) bool for samples that lack a modality, or the names that all samples
                have. Only available (sample, modality) pairs are computed. Keep a mask on the CPU:
                it decides what runs.
            combinations: tuples of names; all of them from one pass over the modalities they use.
            return_valid: also return which outputs mean something, (B,) or (C, B) bool, instead of
                raising where a sample has nothing available for a combination.

        Returns:
            (B, R, D, H, W); with combinations a tuple of C such tensors, each with the graph of its
            own combination alone: compute one loss per tensor. For torch.compile see
            :func:`gradsplit.sharing.fuse_available`.

        Raises:
            TypeError: a mask that is not bool.
            ValueError: an unknown modality, shapes that do not fit, or a sample with nothing
                available for a combination.
        """
        volumes = self._volumes(volume)
        mask, names = self._mask(available, volumes)
        wanted = names
        if combinations is not None:
            combinations = [tuple(combination) for combination in combinations]
            used = {name for combination in combinations for name in combination}
            unknown = used - set(self.config.modalities)
            if unknown or not used:
                raise ValueError(
                    f"combinations must be non-empty tuples of {self.config.modalities}, got "
                    f"{combinations}"
                )
            wanted = [name for name in names if name in used]
        logits: dict[str, Tensor | None] = dict.fromkeys(self.config.modalities)
        if self._in_one_batch(volumes, wanted):
            stacked = torch.cat([volumes[name] for name in wanted])
            logits.update(zip(wanted, self._branch(wanted, stacked).split(1), strict=True))
        else:
            for name in wanted:
                column = self.config.modalities.index(name)
                has = None if mask is None else mask[:, column]
                logits[name] = self._available_branch(name, volumes[name], has)
        if return_valid:
            return fuse_available(logits, mask, combinations, return_valid=True)
        return fuse_available(logits, mask, combinations)

    def shared_parameters(self) -> list[nn.Parameter]:
        """What every modality uses, and so every loss reaches: all but norms and private levels."""
        private = {id(parameter) for parameter in self.private_encoders.parameters()}
        for module in self.modules():
            if isinstance(module, ModalityNorm):
                private.update(id(parameter) for parameter in module.parameters())
        return [parameter for parameter in self.parameters() if id(parameter) not in private]

    def _volumes(self, volume: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """modality -> (B, 1, D, H, W)."""
        modalities = self.config.modalities
        if isinstance(volume, Tensor):
            if volume.dim() != 5 or volume.shape[1] != len(modalities):
                raise ValueError(
                    f"volume must be (B, {len(modalities)}, D, H, W) for {modalities}, got "
                    f"{tuple(volume.shape)}"
                )
            return dict(zip(modalities, volume.split(1, dim=1), strict=True))
        if not volume:
            raise ValueError("volume is empty: give at least one modality")
        first = next(iter(volume.values()))
        for name, one in volume.items():
            if name not in modalities:
                raise ValueError(f"volume: unknown modality {name!r}, not one of {modalities}")
            if one.dim() != 5 or one.shape[1] != 1 or one.shape != first.shape:
                raise ValueError(
                    f"volume[{name!r}] must be (B, 1, D, H, W), the same for all, got "
                    f"{tuple(one.shape)}"
                )
        return dict(volume)

    def _mask(
        self, available: Tensor | Iterable[str] | None, volumes: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, list[str]]:
        """The (B, M) mask, if samples differ, and the modalities to compute, in order."""
        modalities = self.config.modalities
        batch = next(iter(volumes.values())).shape[0]
        if isinstance(available, Tensor):
            if available.dtype != torch.bool:
                raise TypeError(f"available must be bool (True = available), got {available.dtype}")
            if available.shape != (batch, len(modalities)):
                raise ValueError(
                    f"available must be (B, M) = ({batch}, {len(modalities)}), got "
                    f"{tuple(available.shape)}"
                )
            anywhere = dict(zip(modalities, available.any(0).tolist(), strict=True))
            return available, [name for name in modalities if name in volumes and anywhere[name]]
        chosen = set(volumes) if available is None else set(available)
        if not chosen or not chosen <= set(volumes):
            raise ValueError(
                f"available must name modalities of the volume, {list(volumes)}, got {available!r}"
            )
        return None, [name for name in modalities if name in chosen]

    def _in_one_batch(self, volumes: Mapping[str, Tensor], wanted: Sequence[str]) -> bool:
        """Whether the modalities run as one batch instead of one after another.

        With gradients never: the graph would be that of all of them, and training is slower too.
        Without, for a single sample: there a CPU's convolutions are up to 4 times as fast on a
        batch of four as four times on a batch of one; from two samples on they are slower.
        """
        alone = all(volumes[name].shape[0] == 1 for name in wanted)
        apart = torch.is_grad_enabled() or self.config.private_encoder_levels > 0
        return alone and not apart and len(wanted) > 1

    def _available_branch(self, name: str, volume: Tensor, has: Tensor | None) -> Tensor:
        """(B, R, D, H, W), computed for the samples that have it and zero for the others."""
        if has is None or bool(has.all()):
            return self._branch(name, volume)
        rows = has.nonzero().squeeze(1).to(volume.device)
        logits = self._branch(name, volume[rows])
        return logits.new_zeros(len(has), *logits.shape[1:]).index_copy(0, rows, logits)

    def _branch(self, name: str | Sequence[str], x: Tensor) -> Tensor:
        """(b, 1, D, H, W) -> (b, R, D, H, W); of one modality, or of one per sample."""
        size = x.shape[2:]
        # Four poolings: pad to multiples of 16, the zeros of the background, and crop at the end.
        padding = [extra for length in reversed(size) for extra in (0, -length % 16)]
        x = F.pad(x, padding)
        levels = list(self.encoder)
        if isinstance(name, str) and name in self.private_encoders:
            private = self.private_encoders[name]
            assert isinstance(private, nn.ModuleList)
            levels = [*private, *levels]
        skips: list[Tensor] = []
        for level, block in enumerate(levels):
            x = self._run(block, F.max_pool3d(x, 2) if level > 0 else x, name)
            skips.append(x)
        skips.pop()  # the bottom
        for block in self.decoder:
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=True)
            x = self._run(block, torch.cat([skip, x], dim=1), name)
        logits: Tensor = self.head(x)
        return logits[..., : size[0], : size[1], : size[2]]

    def _run(self, block: nn.Module, x: Tensor, name: str | Sequence[str]) -> Tensor:
        if self.config.activation_checkpointing and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(block, x, name, use_reentrant=False)
            return recomputed
        output: Tensor = block(x, name)
        return output
