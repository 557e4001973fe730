"""The BraTS benchmark's configuration and its presets, training, and inference.

Nothing here knows result folders or the command line: see ``benchmarks.brats``.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch._functorch.config
import torch._inductor.config
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
)
from benchmarks.brats.metrics import case_scores, hard_dice, segmented
from benchmarks.brats.pictures import case_slices, shown_case
from benchmarks.brats.presets import OPTIMIZERS, Config
from benchmarks.brats.volumes import Prepared, training_batches
from benchmarks.runs import ranks
from benchmarks.runs.checkpoint import save_checkpoint
from benchmarks.runs.gradients import Merges
from benchmarks.runs.methods import METHODS, sampler_of
from benchmarks.runs.session import Diverged
from gradsplit import LossBalance, ModalityDecoupledOptimizer, modality_combinations
from reference_models.unet3d import DynamicSharingUNet3d

__all__ = [
    "Training",
    "loss_of",
    "loss_sums",
]

Combination = tuple[str, ...]
Sample = dict[str, Any]
T = TypeVar("T")

COMBINATIONS = modality_combinations(MODALITIES)
NAMES = ["+".join(combination) for combination in COMBINATIONS]
POLY_POWER = 0.9


# --- model and loss ------------------------------------------------------------------------------


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


# --- inference -----------------------------------------------------------------------------------


# --- training ------------------------------------------------------------------------------------


class Training:
    """One model in training: a method and a seed. All that changes is in ``state_dict``."""

    def __init__(self, config: Config, prepared: Prepared, method: str, seed: int) -> None:
        self.config = config
        self.prepared = prepared
        self.method = method
        self.seed = seed
        self.device = torch.device(config.device)
        self.epoch = 0
        self.seconds = 0.0
        self.skipped = 0  # steps that the GradScaler skipped
        self.history: list[dict[str, float | None]] = []
        self.merges = Merges(NAMES)
        self.tested: dict[str, Any] = {}  # case -> scores, filled by finish()
        torch.manual_seed(seed)  # the same initial weights for every method
        self.model = DynamicSharingUNet3d(model_config(config, list(prepared.data.regions)))
        self.model.to(self.device)
        if config.compile:
            _compile_blocks(self.model)
        self.optimizer = ModalityDecoupledOptimizer(
            OPTIMIZERS[config.optimizer](
                self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay
            ),
            rule=METHODS[method].rule,
            scope=METHODS[method].scope or config.scope,
            reduction=config.reduction,
            seed=seed,
            process_group=ranks.group(),
        )
        batches = math.ceil(len(prepared.split["train"]) / config.batch_size)
        self.steps_per_epoch = math.ceil(batches / config.accumulate)
        self.schedule = _schedule(
            self.optimizer, config.schedule, config.epochs * self.steps_per_epoch
        )
        self.scheduled = 0  # steps that the schedule has to have made
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.sampler = sampler_of(method, config.combinations, MODALITIES, seed)
        self.balance = LossBalance() if METHODS[method].balanced else None
        self.best_epoch = 0
        self.best_dice: float | None = None
        self.best_model: dict[str, Tensor] = {}

    def train_epoch(self, progress: Any) -> None:
        """One crop of every training case; then, when its turn has come, validation."""
        started = time.perf_counter()
        batches = training_batches(
            self.prepared.datasets["train"],
            crop=self.config.crop,
            batch_size=self.config.batch_size,
            seed=self.seed,
            epoch=self.epoch,
            workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
        )
        losses, left = [], len(self.prepared.split["train"])
        self.model.train()
        for window in _windows(iter(batches), self.config.accumulate):
            loss = self.step(window)
            if loss is not None:
                losses.append(loss)
            report = self.optimizer.last
            if losses and report is not None and not progress.disable:
                conflicts = f"{report.conflict_rate():.0%}"
                progress.set_postfix(loss=f"{losses[-1]:.3f}", conflicts=conflicts, refresh=False)
            crops = min(len(window) * self.config.batch_size, left)  # on all ranks
            progress.update(crops)
            left -= crops
        self.epoch += 1
        self.history.append(
            {
                "train_loss": math.fsum(losses) / len(losses) if losses else None,
                "lr": self.optimizer.param_groups[0]["lr"],
                "valid_dice": self._validate(),
            }
        )
        self.seconds += time.perf_counter() - started

    def step(self, window: Sequence[Sample]) -> float | None:
        """One optimizer step over some micro-batches; returns the mean loss.

        Micro-batches in which no case has all modalities of any combination drawn are passed over;
        None where that leaves nothing.
        """
        combinations = self.sampler()
        window = [batch for batch in window if _possible(batch, combinations)]
        loss = None
        if window:
            with convolutions(self.config):
                loss = self._step(window, combinations)
        self.scheduled += 1
        # Not before the optimizer's first step: torch warns of schedules that run ahead of it.
        while self.merges.weights and self.schedule.last_epoch < self.scheduled:
            self.schedule.step()
        return loss

    def _step(self, window: Sequence[Sample], combinations: Sequence[Combination]) -> float:
        self.optimizer.zero_grad()
        for batch in window[:-1]:
            self.optimizer.accumulate(self.losses(batch, combinations))
        report = self.optimizer.backward(self.losses(window[-1], combinations))
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        scale = self.scaler.get_scale()
        if self.balance is not None:
            self.balance.update(report, scale)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        mean = float(report.losses.mean()) / scale
        if not math.isfinite(mean):
            raise Diverged("the loss is not a finite number")
        if self.scaler.get_scale() < scale:  # a gradient overflowed: angles mean nothing
            self.skipped += 1
        else:
            self.merges.add(report, scale)
        return mean

    def losses(
        self, batch: Sample, combinations: Sequence[Combination]
    ) -> dict[str | Combination, Tensor | None]:
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
        losses: dict[str | Combination, Tensor | None] = dict.fromkeys(combinations)
        for combination, total in zip(sums, ranks.pooled(sums.values()), strict=True):
            losses[combination] = self.scaler.scale(loss_of(total))
        weighed: dict[str | Combination, Tensor | None]
        weighed = losses if self.balance is None else self.balance(losses)
        return weighed

    # -- validation and test -----------------------------------------------------------------------

    def _validate(self) -> float | None:
        """Mean hard Dice over validation cases, combinations and regions; keeps the best model."""
        last = self.epoch == self.config.epochs
        if not self.prepared.split["valid"]:
            if last:
                self._keep_best(None)
            return None
        if self.epoch % self.config.validate_every and not last:
            return None
        self.model.eval()
        cases = range(len(self.prepared.split["valid"]))
        values = [value for some in ranks.divided(self._case_dice, cases) for value in some]
        dice = math.fsum(values) / len(values)
        if self.best_dice is None or dice > self.best_dice:
            self._keep_best(dice)
        return dice

    def _case_dice(self, index: int) -> list[float]:
        """Of a validation case, for each combination and region."""
        sample = self.prepared.datasets["valid"][index]
        logits = case_logits(self.model, sample, self.config)
        regions = self.prepared.data.regions
        masks = [segmented(mean_of(logits, combination), regions) for combination in _of(logits)]
        return [value for mask in masks for value in hard_dice(mask, sample["label"] > 0)]

    def _keep_best(self, dice: float | None) -> None:
        self.best_epoch, self.best_dice = self.epoch, dice
        self.best_model = {
            name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()
        }

    def finish(self, save: Callable[[], None]) -> dict[str, Any]:
        """Test the best model on every case and combination.

        ``save`` is called after each case, or after as many as there are ranks.
        """
        started = time.perf_counter()
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
        for some in _windows(iter(range(len(cases))), ranks.count()):
            new = [index for index in some if cases[index].name not in self.tested]
            left = [index for index in some if index in new or cases[index].name == shown]
            for index, (scores, drawn) in zip(left, ranks.divided(test, left), strict=True):
                self.tested[cases[index].name] = scores
                slices = drawn or slices
            if new:
                self.seconds += time.perf_counter() - started
                started = time.perf_counter()
                save()
        result = {
            "method": self.method,
            "seed": self.seed,
            "best_epoch": self.best_epoch,
            "valid_dice": self.best_dice,
            "skipped_steps": self.skipped,
            "test": self.tested,
            "history": self.history,
            "seconds": round(self.seconds, 1),
        }
        return {"result": result, "records": self.merges.stacked(), "slices": slices}

    # -- what is kept ------------------------------------------------------------------------------

    def save_models(self, folder: Path) -> None:
        """Write the best and the last model, for whoever wants to use them."""
        last = {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}
        for kind, epoch, weights in (
            ("best", self.best_epoch, self.best_model),
            ("last", self.epoch, last),
        ):
            if weights:
                content = {
                    "model_config": asdict(self.model.config),
                    "model": weights,
                    "config": asdict(self.config),
                    "method": self.method,
                    "seed": self.seed,
                    "epoch": epoch,
                }
                save_checkpoint(model_file(folder, kind, self.method, self.seed), content)

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "method": self.method,
            "seed": self.seed,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "history": self.history,
            "records": self.merges.stacked(),
            "tested": self.tested,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sampler": self.sampler.state_dict(),
            "balance": None if self.balance is None else self.balance.state_dict(),
            "best": {"epoch": self.best_epoch, "dice": self.best_dice, "model": self.best_model},
            "random": ranks.each({"cpu": torch.get_rng_state(), "cuda": cuda}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.scheduled = self.epoch * self.steps_per_epoch
        self.seconds = state["seconds"]
        self.skipped = state["skipped"]
        self.history = state["history"]
        self.merges.load(state["records"])
        self.tested = state["tested"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.sampler.load_state_dict(state["sampler"])
        if self.balance is not None:
            self.balance.load_state_dict(state["balance"])
        best = state["best"]
        self.best_epoch, self.best_dice, self.best_model = (
            best["epoch"],
            best["dice"],
            best["model"],
        )
        random = ranks.own(state["random"])
        torch.set_rng_state(random["cpu"])
        if random["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.device)


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


def _windows(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Groups of ``size``; the last one may be smaller."""
    while window := list(itertools.islice(items, size)):
        yield window


def _schedule(
    optimizer: torch.optim.Optimizer, kind: str, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """One that reaches its end at the last of all steps, not at the end of an epoch."""
    if kind == "poly":
        return torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, POLY_POWER)
    if kind == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, _constant)


def _constant(step: int) -> float:
    return 1.0


def _compile_blocks(model: DynamicSharingUNet3d) -> None:
    """Block by block: one graph of the whole model would join the combinations."""
    # Each block is compiled once per modality, and one function serves all blocks.
    blocks = [*model.encoder, *model.decoder]
    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, 4 * len(MODALITIES) * len(blocks)
    )
    # Several losses go back through one graph: it must not hand its buffers away at the first.
    torch._functorch.config.donated_buffer = False
    # Graphs that were cached on disk without that setting are found again (torch 2.13), and the
    # second backward through them is silently wrong.
    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.fx_graph_cache = False
    for block in blocks:
        block.compile()
