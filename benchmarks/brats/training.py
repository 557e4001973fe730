"""The U-Net in training on crops: its loss, its validation by hard Dice, and its test."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.brats.cases import MODALITIES
from benchmarks.brats.inference import (
    autocast,
    case_logits,
    convolutions,
    mean_of,
    model_config,
    model_file,
    save_model,
)
from benchmarks.brats.metrics import case_scores, hard_dice, segmented
from benchmarks.brats.pictures import case_slices, shown_case
from benchmarks.brats.presets import OPTIMIZERS, Config
from benchmarks.brats.volumes import Prepared, training_batches
from benchmarks.runs import ranks, training
from benchmarks.runs.training import Losses, in_windows
from gradsplit import modality_combinations
from reference_models.unet3d import DynamicSharingUNet3d

__all__ = ["Training", "loss_of", "loss_sums"]

Combination = tuple[str, ...]
Sample = dict[str, Any]

COMBINATIONS = modality_combinations(MODALITIES)
POLY_POWER = 0.9


# --- loss ----------------------------------------------------------------------------------------


def loss_sums(kind: str, logits: Tensor, label: Tensor) -> Tensor:
    """What the loss is made of, (2 + 2 R,), float32: sums over samples and voxels.

    Cross entropy and the number of voxels; the overlap of each region; its two volumes.

    Args:
        kind: ``"dice"``, or ``"dice+bce"``, without which the cross entropy is zero.
        logits: (B, R, D, H, W).
        label: the same, of 0 and 1.
    """
    logits, target = logits.float(), label.float()
    probability, axes = logits.sigmoid(), (0, 2, 3, 4)
    entropy = logits.new_zeros(())
    if kind == "dice+bce":
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    voxels = entropy.new_full((), target.numel())
    overlap = (probability * target).sum(axes)
    volumes = probability.sum(axes) + target.sum(axes)
    return torch.cat([torch.stack([entropy, voxels]), overlap, volumes])


def loss_of(sums: Tensor) -> Tensor:
    """The loss, from :func:`loss_sums` of a batch or from those of its parts, added up.

    Soft Dice with smooth 1, voxels of the whole batch pooled per region, the mean over regions;
    plus the mean cross entropy of all voxels.
    """
    entropy, voxels = sums[:2]
    overlap, volumes = sums[2:].chunk(2)
    dice: Tensor = 1 - (2 * overlap + 1) / (volumes + 1)  # (R,)
    loss: Tensor = dice.mean() + entropy / voxels
    return loss


# --- training ------------------------------------------------------------------------------------


class Training(training.Training[DynamicSharingUNet3d]):
    """A U-Net, and the loss of each combination over the cases that have it."""

    SCORE = "valid_dice"
    MEMBERS = (*training.Training.MEMBERS, "schedule", "scheduled", "tested")

    def __init__(self, config: Config, prepared: Prepared, method: str, seed: int) -> None:
        torch.manual_seed(seed)  # the same initial weights for every method
        model = DynamicSharingUNet3d(model_config(config, list(prepared.data.regions)))
        model.to(config.device)
        optimizer = OPTIMIZERS[config.optimizer](
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        super().__init__(
            config,
            method,
            seed,
            model,
            optimizer,
            COMBINATIONS,
            scope=config.scope,
            reduction=config.reduction,
            scaled=config.amp == "fp16",
        )
        self.prepared = prepared
        batches = math.ceil(len(prepared.split["train"]) / config.batch_size)
        self.steps_per_epoch = math.ceil(batches / config.accumulate)
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(
            self.optimizer, config.epochs * self.steps_per_epoch, POLY_POWER
        )
        self.scheduled = 0  # steps that the schedule has to have made
        self.tested: dict[str, Any] = {}  # case -> scores, filled by test()

    def windows(self) -> Iterator[tuple[int, Sequence[Sample]]]:
        """One crop of every training case, in micro-batches."""
        batches = training_batches(
            self.prepared.datasets["train"],
            crop=self.config.crop,
            batch_size=self.config.batch_size,
            seed=self.seed,
            epoch=self.epoch,
            workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
        )
        left = len(self.prepared.split["train"])
        for window in in_windows(iter(batches), self.config.accumulate):
            crops = min(len(window) * self.config.batch_size, left)  # on all ranks
            left -= crops
            yield crops, window

    def step(self, window: Sequence[Sample]) -> float | None:
        """As in every training; then the learning rate's."""
        with convolutions(self.config):
            loss = super().step(window)
        self.scheduled += 1
        # Not before the optimizer's first step: torch warns of schedules that run ahead of it.
        while self.merges.weights and self.schedule.last_epoch < self.scheduled:
            self.schedule.step()
        return loss

    def possible(self, batch: Sample, combinations: Sequence[Combination]) -> bool:
        return bool(_possible(batch, combinations))

    def losses(self, batch: Sample, combinations: Sequence[Combination]) -> Losses:
        """One loss per combination, over the samples that have all of its modalities.

        Over those of all ranks: a rank that has none takes part with a loss that it adds nothing
        to, through the last layer, which every loss reaches.
        """
        volume = batch["volume"].to(self.device, non_blocking=True)
        label = batch["label"].to(self.device, non_blocking=True)
        available: Tensor = batch["available"]  # on the CPU: it decides what runs
        has = {combination: _having(batch, combination) for combination in combinations}
        here = [combination for combination in combinations if has[combination].any()]
        logits: Sequence[Tensor] = ()
        if here:
            with autocast(self.config):
                logits, _ = self.model(
                    volume, None if available.all() else available, here, return_valid=True
                )  # C of (B, R, D, H, W)
        bias = self.model.head.bias
        assert bias is not None
        nothing = bias.sum() * torch.zeros(2 + 2 * len(bias), device=self.device)
        sums = dict.fromkeys(_possible(batch, combinations), nothing)
        for one, combination in zip(logits, here, strict=True):
            target = label
            if not has[combination].all():
                rows = has[combination].to(label.device)
                one, target = one[rows], label[rows]
            sums[combination] = loss_sums(self.config.loss, one, target)
        losses: Losses = dict.fromkeys(combinations)
        for combination, total in zip(sums, ranks.pooled(sums.values()), strict=True):
            losses[combination] = loss_of(total)
        return losses

    def validate(self, epoch: int) -> float | None:
        """Mean hard Dice over validation cases, combinations and regions, of some epochs."""
        last = epoch == self.config.epochs
        if not self.prepared.split["valid"]:
            if last:
                self.keep(epoch, None)
            return None
        if epoch % self.config.validate_every and not last:
            return None
        cases = range(len(self.prepared.split["valid"]))
        values = [value for some in ranks.divided(self._case_dice, cases) for value in some]
        return math.fsum(values) / len(values)

    def _case_dice(self, index: int) -> list[float]:
        """Of a validation case, for each combination and region."""
        sample = self.prepared.datasets["valid"][index]
        logits = case_logits(self.model, sample, self.config)
        regions = self.prepared.data.regions
        masks = [segmented(mean_of(logits, combination), regions) for combination in _of(logits)]
        return [value for mask in masks for value in hard_dice(mask, sample["label"] > 0)]

    def test(self, save: Callable[[], None]) -> dict[str, Any]:
        """Every case from each combination it has.

        ``save`` is called after each case, or after as many as there are ranks.
        """
        best = DynamicSharingUNet3d(self.model.config)  # the last one stays in the checkpoint
        best.load_state_dict(self.best_model)
        best.to(self.device).eval()
        cases = self.prepared.split["test"]
        shown = shown_case(self.prepared)
        regions = self.prepared.data.regions

        def test(index: int) -> tuple[dict[str, Any], dict[str, Any]]:
            case, sample = cases[index], self.prepared.datasets["test"][index]
            logits = case_logits(best, sample, self.config)
            slices = case_slices(case, sample, logits, regions) if case.name == shown else {}
            scores = self.tested.get(case.name) or {
                "+".join(combination): case_scores(
                    mean_of(logits, combination), sample["label"], case.spacing, regions
                )
                for combination in _of(logits)
            }
            return scores, slices

        slices: dict[str, Any] = {}
        for some in in_windows(iter(range(len(cases))), ranks.count()):
            new = [index for index in some if cases[index].name not in self.tested]
            left = [index for index in some if index in new or cases[index].name == shown]
            for index, (scores, drawn) in zip(left, ranks.divided(test, left), strict=True):
                self.tested[cases[index].name] = scores
                slices = drawn or slices
            if new:
                save()
        return {"result": {"test": self.tested}, "slices": slices}

    def save_models(self, folder: Path) -> None:
        """The best and the last model, for whoever wants to use them."""
        for kind, epoch, weights in (
            ("best", self.best_epoch, self.best_model),
            ("last", self.epoch, self.model.state_dict()),
        ):
            if weights:
                content = {
                    "model_config": asdict(self.model.config),
                    "config": asdict(self.config),
                    "method": self.method,
                    "seed": self.seed,
                    "epoch": epoch,
                }
                save_model(model_file(folder, kind, self.method, self.seed), weights, content)


def _of(logits: Mapping[str, Tensor]) -> list[Combination]:
    """The combinations that a case with these modalities has."""
    return [combination for combination in COMBINATIONS if set(combination) <= set(logits)]


def _having(batch: Sample, combination: Combination) -> Tensor:
    """(B,) bool: the samples that have all modalities of the combination."""
    columns = [MODALITIES.index(name) for name in combination]
    having: Tensor = batch["available"][:, columns].all(1)
    return having


def _possible(batch: Sample, combinations: Sequence[Combination]) -> list[Combination]:
    """Those that a sample of the batch has, on whichever rank."""
    here = torch.tensor([int(_having(batch, combination).sum()) for combination in combinations])
    return list(itertools.compress(combinations, ranks.summed(here).tolist()))
