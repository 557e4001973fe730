"""What is timed: models with a batch and one loss per combination, and random rows."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradsplit import modality_combinations
from gradsplit.sharing import fuse_available
from reference_models.sentiment_transformer import SentimentTransformer, SentimentTransformerConfig
from reference_models.unet3d import DynamicSharingUNet3d, UNet3dConfig

__all__ = ["EncodersTask", "MLPTask", "Rows", "SentimentTask", "Task", "UNetTask"]


class Task:
    """A model, a batch and m losses.

    Attributes:
        model: its parameters are all that is trained.
        losses: m.
        trunk: the module whose outputs all losses are computed from.
        head: the module whose outputs the losses are computed from.
        block: the last one before it with parameters that every loss reaches.
        shape: the batch, in words.
    """

    model: nn.Module
    losses: int
    trunk: nn.Module
    head: nn.Module
    block: nn.Module
    shape: str

    def together(self, chosen: Sequence[int]) -> list[Any]:
        """The losses ``chosen``, of 0 ... m - 1, from one forward that they share."""
        raise NotImplementedError

    def apart(self, chosen: Sequence[int]) -> list[Any]:
        """The same, each from a forward of its own."""
        return [self.together([index])[0] for index in chosen]

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def elements(self) -> int:
        """n."""
        return sum(parameter.numel() for parameter in self.parameters())

    def clear(self) -> None:
        """Forget all gradients and Jacobians."""
        for parameter in self.parameters():
            parameter.grad = None
            if hasattr(parameter, "jac"):
                del parameter.jac


class UNetTask(Task):
    """The BraTS U-Net, one loss per combination of its first ``modalities``, of four."""

    def __init__(
        self, modalities: int, width: int, crop: int, batch: int, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        config = UNet3dConfig(UNet3dConfig.modalities[:modalities], width=width)
        self.model: DynamicSharingUNet3d = DynamicSharingUNet3d(config).to(device)
        self.combinations = modality_combinations(config.modalities)
        self.losses = len(self.combinations)
        self.trunk = self.head = self.model.head
        self.block = self.model.decoder[-1].get_submodule("conv2")
        self.volume = torch.randn(batch, modalities, crop, crop, crop, device=device)
        shape = (batch, len(config.regions), crop, crop, crop)
        self.target = (torch.rand(shape, device=device) > 0.7).float()
        self.shape = f"crop {crop}^3, batch {batch}, width {width}"

    def together(self, chosen: Sequence[int]) -> list[Tensor]:
        combinations = [self.combinations[index] for index in chosen]
        return self._losses(self.model(self.volume, combinations=combinations))

    def batched(self) -> list[Tensor]:
        """All of them, from one forward of all modalities in one batch."""
        modalities, batch = self.model.config.modalities, len(self.volume)
        stacked = torch.cat(self.volume.split(1, dim=1))  # (M B, 1, D, H, W)
        # The model itself never does this with gradients: it would join the modalities' graphs.
        logits = self.model._branch([name for name in modalities for _ in range(batch)], stacked)
        features = dict(zip(modalities, logits.split(batch), strict=True))
        return self._losses(fuse_available(features, combinations=self.combinations))

    def _losses(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        return [F.binary_cross_entropy_with_logits(one, self.target) for one in outputs]


class SentimentTask(Task):
    """The sentiment transformer, one loss per combination of three modalities."""

    def __init__(self, frames: int, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        config = SentimentTransformerConfig(dropout=0.0)  # with it, autogram is not possible
        self.model: SentimentTransformer = SentimentTransformer(config).to(device)
        self.combinations = modality_combinations(config.dims)
        self.losses = len(self.combinations)
        self.trunk, self.head = self.model.norm, self.model.head
        self.block = self.model.blocks[-1].get_submodule("mlp.2")
        self.inputs = {
            name: torch.randn(batch, frames, size, device=device)
            for name, size in config.dims.items()
        }
        self.target = torch.randn(batch, device=device)
        self.shape = f"{frames} frames, batch {batch}, no dropout"

    def together(self, chosen: Sequence[int]) -> list[Tensor]:
        combinations = [self.combinations[index] for index in chosen]
        scores = self.model(self.inputs, combinations=combinations)
        return [F.l1_loss(one, self.target) for one in scores]


class MLPTask(Task):
    """A deep MLP of small tensors, one loss per output."""

    def __init__(
        self, layers: int, width: int, losses: int, batch: int, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        hidden: list[nn.Module] = []
        for _ in range(layers - 1):
            hidden += [nn.Linear(width, width), nn.ReLU()]
        self.trunk, self.head, self.block = (
            nn.Sequential(*hidden), nn.Linear(width, losses), hidden[-2],
        )  # fmt: skip
        self.model = nn.Sequential(self.trunk, self.head).to(device)
        self.losses = losses
        self.input = torch.randn(batch, width, device=device)
        self.target = torch.randn(batch, losses, device=device)
        self.shape = f"width {width}, batch {batch}"

    def together(self, chosen: Sequence[int]) -> list[Tensor]:
        output = self.model(self.input)
        return [F.mse_loss(output[:, index], self.target[:, index]) for index in chosen]


class EncodersTask(Task):
    """Three private encoders and a head of 0.1 %; one closure per combination, not one loss."""

    def __init__(self, width: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model: nn.ModuleDict = nn.ModuleDict()
        for name in ("text", "audio", "vision"):
            linear = [nn.Linear(width, width) for _ in range(8)]
            self.model[name] = nn.Sequential(*(part for one in linear for part in (one, nn.ReLU())))
        self.combinations = modality_combinations(self.model)
        self.losses = len(self.combinations)
        self.model["head"] = nn.Linear(width, max(1, width * 24 // 1000))
        self.model.to(device)
        self.input = torch.randn(2, width, device=device)

    def together(self, chosen: Sequence[int]) -> list[Any]:
        return [functools.partial(self._loss, self.combinations[index]) for index in chosen]

    def _loss(self, available: Sequence[str]) -> Tensor:
        features = torch.stack([self.model[name](self.input) for name in available]).mean(0)
        loss: Tensor = self.model["head"](features).square().mean()
        return loss


class Rows:
    """m random rows, in [-1, 1]: about half of the pairs conflict.

    Attributes:
        parameters: 182, of the sizes of the U-Net's tensors scaled to n elements in all.
        gradients: m lists, one tensor for each parameter, as autograd leaves them.
        matrix: (m, n), a copy of the same numbers.
        orders: m permutations: whom row i meets, one after another.
    """

    def __init__(self, m: int, n: int, device: torch.device) -> None:
        with torch.device("meta"):
            sizes = [parameter.numel() for parameter in DynamicSharingUNet3d().parameters()]
        scaled = [max(1, size * n // sum(sizes)) for size in sizes]
        scaled[scaled.index(max(scaled))] += n - sum(scaled)
        self.parameters = [torch.empty(size, device=device) for size in scaled]
        self.matrix = torch.empty(m, n, device=device).uniform_(-1, 1)
        self.gradients = [[part.clone() for part in row.split(scaled)] for row in self.matrix]
        self.orders = [torch.randperm(m).tolist() for _ in range(m)]
