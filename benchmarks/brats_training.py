"""The BraTS benchmark's configuration and its presets, training, and inference.

Nothing here knows result folders or the command line: see ``benchmarks.brats``.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch._functorch.config
import torch._inductor.config
from monai.inferers.utils import sliding_window_inference
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from benchmarks import ranks
from benchmarks.brats_data import MODALITIES, BratsData, Case, Regions
from benchmarks.brats_metrics import case_scores, hard_dice, segmented
from benchmarks.brats_volumes import training_batches
from benchmarks.checkpoint import load_checkpoint, save_checkpoint
from benchmarks.gradients import Merges
from benchmarks.methods import METHODS, sampler_of
from benchmarks.session import Diverged
from gradsplit import LossBalance, ModalityDecoupledOptimizer, modality_combinations
from reference_models.unet3d import DynamicSharingUNet3d, UNet3dConfig

__all__ = [
    "AMP",
    "LOSSES",
    "OPTIMIZERS",
    "PRESETS",
    "SCHEDULES",
    "Config",
    "Prepared",
    "Training",
    "case_logits",
    "load_config",
    "load_model",
    "mean_of",
    "model_config",
    "model_file",
    "paper",
    "quick",
    "released",
    "loss_of",
    "loss_sums",
]

Combination = tuple[str, ...]
Sample = dict[str, Any]
T = TypeVar("T")

COMBINATIONS = modality_combinations(MODALITIES)
NAMES = ["+".join(combination) for combination in COMBINATIONS]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
SCHEDULES = ("poly", "cosine", "constant")
LOSSES = ("dice+bce", "dice")
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
POLY_POWER = 0.9
OVERLAP = 0.25  # of neighbouring windows in inference


def _user_cache() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(home) / "gradsplit")


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers. The defaults are the preset :func:`quick`."""

    preset: str = "quick"
    data: str | None = None
    regions: str = "WT=1,2,4 TC=1,4 ET=4"
    allow_missing: bool = False
    phantoms: int = 24
    normalisation: str = "zscore"
    split: str = "folds"
    folds: int | None = None  # 5, or the number of patients where that is smaller
    fold: int = 0
    cache: str = "memory"
    cache_folder: str = field(default_factory=_user_cache)
    methods: tuple[str, ...] = ("sum", "gmd")
    combinations: str = "k=5"
    scope: str = "shared"
    reduction: str = "mean"
    seeds: int = 1
    first_seed: int = 0
    epochs: int = 36
    batch_size: int = 2
    accumulate: int = 1
    crop: int = 32
    loss: str = "dice+bce"
    optimizer: str = "adamw"
    lr: float = 6e-3
    weight_decay: float = 0.01
    schedule: str = "poly"
    clip_norm: float | None = None
    validate_every: int = 12
    width: int = 8
    private_encoder_levels: int = 0
    checkpointing: bool = False
    amp: str = "off"
    compile: bool = False
    device: str = "cpu"
    workers: int = 0
    threads: int = field(default_factory=torch.get_num_threads)

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)


def quick() -> Config:
    """Minutes on two CPU cores: to see that everything works, not to publish.

    ===================  =====================  =================================================
    hyperparameter       value                  source
    ===================  =====================  =================================================
    combinations         k = 5 sampled          GMD paper
    scope                shared                 GMD paper
    reduction            mean                   ours: the step does not grow with k
    loss                 soft Dice + BCE        ours: learns faster than Dice alone
    optimizer            AdamW, lr 6e-3,        ours
                         weight decay 0.01
    schedule             poly 0.9               GMD's released code, but over all iterations
    batch, crop          2 crops of 32^3        ours: what a CPU can do
    width                8                      ours: a quarter of the published multiplications
    epochs               36, validated every    ours
                         12 epochs
    normalisation        z-score, 1-99 %        ours
    split                fold 0 of 5            ours: a validation split chooses the epoch
    ===================  =====================  =================================================
    """
    return Config()


def paper() -> Config:
    """The GMD paper's method (arXiv 2402.16318); what it leaves open as in its released code.

    ===================  =====================  =================================================
    hyperparameter       value                  source
    ===================  =====================  =================================================
    rule                 gmd (and sum)          paper, Eq. 5-9; sum is the baseline
    combinations         k = 5 sampled          paper
    scope                shared                 paper
    reduction            sum                    paper
    loss                 soft Dice, smooth 1    released code
    optimizer            Adam, lr 8e-4,         released code
                         weight decay 1e-5
    schedule             poly 0.9               released code, but over all iterations: it resets
                                                its learning rate every epoch
    batch, crop          4 crops of 128^3       released code
    width                16                     released code
    epochs               600                    released code
    normalisation        z-score, 1-99 %        ours; the released loader's min-max depends on one
                                                voxel
    split                fold 0 of 5            ours: a validation split, on which the epoch is
                                                chosen every 10 epochs
    seeds                3                      ours
    ===================  =====================  =================================================
    """
    return Config(
        preset="paper",
        methods=("sum", "gmd"),
        combinations="k=5",
        scope="shared",
        reduction="sum",
        seeds=3,
        **_LONG,
    )


def released() -> Config:
    """What GMD's released code runs, as far as it can run, without its slips.

    ===================  =====================  =================================================
    hyperparameter       value                  source
    ===================  =====================  =================================================
    rule                 pcgrad (and sum)       released code; there a row also meets itself
    combinations         all 15                 released code
    scope                all                    released code
    reduction            released               released code: divides by m only what every loss
                                                reaches
    loss                 soft Dice, smooth 1    released code
    optimizer            Adam, lr 8e-4,         released code
                         weight decay 1e-5
    schedule             poly 0.9               released code, but over all iterations: it resets
                                                its learning rate every epoch
    batch, crop          4 crops of 128^3       released code
    width                16                     released code
    epochs               600                    released code
    normalisation        min-max                released code
    split                ACN fold 0, 228/57     released code: no validation split, so the last
                                                epoch is tested
    seeds                1                      released code
    ===================  =====================  =================================================

    The shell script published beside that code overrides two of them, with one crop per batch and
    fewer combinations; ``--batch-size`` and ``--combinations`` follow whichever you compare with.
    """
    return Config(
        preset="released",
        methods=("sum", "pcgrad"),
        combinations="all",
        scope="all",
        reduction="released",
        normalisation="minmax",
        split="acn",
        **_LONG,
    )


_LONG: dict[str, Any] = {
    "epochs": 600,
    "batch_size": 4,
    "crop": 128,
    "loss": "dice",
    "optimizer": "adam",
    "lr": 8e-4,
    "weight_decay": 1e-5,
    "validate_every": 10,
    "width": 16,
}
PRESETS = {"quick": quick, "paper": paper, "released": released}


@dataclass(frozen=True)
class Prepared:
    """Checked data, divided, and ready to be read."""

    data: BratsData
    split: Mapping[str, Sequence[Case]]  # train, valid, test
    datasets: Mapping[str, "Dataset[Sample]"]  # the same keys


# --- model and loss ------------------------------------------------------------------------------


def model_config(config: Config, regions: Sequence[str]) -> UNet3dConfig:
    """The benchmark's network for these regions."""
    return UNet3dConfig(
        modalities=MODALITIES,
        regions=tuple(regions),
        width=config.width,
        private_encoder_levels=config.private_encoder_levels,
        activation_checkpointing=config.checkpointing,
    )


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


def autocast(config: Config) -> torch.autocast:
    device = torch.device(config.device).type
    return torch.autocast(device, AMP[config.amp] or torch.bfloat16, config.amp != "off")


def convolutions(config: Config) -> AbstractContextManager[None]:
    """Within this block convolutions can be trusted.

    On CPUs that know bfloat16, oneDNN's gradient of a conv3d's weight reads memory that nobody has
    written where the volume is 2 voxels deep (torch 2.13). With crops of up to 32 the network has
    such a level: there torch's own convolutions run, which are slower.
    """
    if config.amp == "bf16" and torch.device(config.device).type == "cpu" and config.crop <= 32:
        unknown: AbstractContextManager[None] = torch.backends.mkldnn.flags(enabled=False)
        return unknown
    return nullcontext()


# --- inference -----------------------------------------------------------------------------------


@torch.no_grad()
def case_logits(model: DynamicSharingUNet3d, sample: Sample, config: Config) -> dict[str, Tensor]:
    """Logits of a whole case from each modality it has, at its own resolution.

    Windows of the training crop's size slide over the box that holds all nonzero voxels of the
    available modalities (the brain); outside of it nothing is predicted: the logit there is -inf.
    The network fuses modalities by the mean of their logits, and windows are blended linearly: the
    mean of what is returned here over a combination is the network's output for it. So one pass
    over the available modalities serves all combinations.

    Args:
        model: on the device of ``config``, in whatever mode.
        sample: of a dataset: ``volume`` (M, D, H, W), ``available`` (M,).
        config: the crop, the device, and amp.

    Returns:
        modality -> (R, D, H, W) float32 on the CPU, available modalities only.

    Raises:
        Diverged: there is NaN among them.
    """
    volume, available = sample["volume"], sample["available"].tolist()
    names = list(itertools.compress(MODALITIES, available))
    there = volume[torch.tensor(available)]
    box = _foreground(there)
    inside = there[(slice(None), *box)].contiguous()[None]  # (1, A, d, h, w)

    def branches(windows: Tensor) -> Tensor:  # (b, A, c, c, c) -> (b, A * R, c, c, c)
        parts = dict(zip(names, windows.split(1, dim=1), strict=True))
        with autocast(config):
            logits = model(parts, combinations=[(name,) for name in names])
        return torch.cat(logits, dim=1).float()

    stitched = sliding_window_inference(
        inside,
        roi_size=config.crop,
        sw_batch_size=1,
        predictor=branches,
        overlap=OVERLAP,
        mode="gaussian",
        sw_device=config.device,
        device="cpu",
    )
    assert isinstance(stitched, Tensor)
    if bool(stitched.isnan().any()):
        raise Diverged("a score is not a finite number")
    parts = stitched[0].unflatten(0, (len(names), -1))  # (A, R, d, h, w)
    logits = {}
    for name, part in zip(names, parts, strict=True):
        whole = part.new_full((part.shape[0], *volume.shape[1:]), -math.inf)
        whole[(slice(None), *box)] = part
        logits[name] = whole
    return logits


def mean_of(logits: Mapping[str, Tensor], combination: Sequence[str]) -> Tensor:
    """(R, D, H, W): the output for a combination, from :func:`case_logits`."""
    return torch.stack([logits[name] for name in combination]).mean(0)


def _foreground(volume: Tensor) -> tuple[slice, slice, slice]:
    """The smallest box that holds every nonzero voxel of (M, D, H, W); all of it where none is."""
    inside = (volume != 0).any(0)
    slices = []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        occupied = inside.any(others[1]).any(others[0]).nonzero().flatten().tolist()
        slices.append(slice(occupied[0], occupied[-1] + 1) if occupied else slice(None))
    return slices[0], slices[1], slices[2]


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


def model_file(folder: Path, kind: str, method: str, seed: int) -> Path:
    """Where the ``kind`` ("best" or "last") model of a training lies."""
    return folder / f"{kind}-{method}-seed{seed}.pt"


def load_config(path: Path) -> Config:
    """What a model was trained with. Raises OSError, ValueError."""
    content = load_checkpoint(path)
    try:
        content["model_config"]  # which a checkpoint of a run has not
        return Config(**content["config"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a model that this version saved, such as best-gmd-seed0.pt"
        ) from error


def load_model(path: Path) -> DynamicSharingUNet3d:
    """A model that :meth:`Training.save_models` wrote. Raises OSError, ValueError."""
    content = load_checkpoint(path)
    model = DynamicSharingUNet3d(UNet3dConfig(**content["model_config"]))
    model.load_state_dict(content["model"])
    return model.eval()


def shown_case(prepared: Prepared) -> str:
    """The test case in the picture: the first that has all modalities, or else the first."""
    cases = prepared.split["test"]
    complete = [case for case in cases if len(case.files) == len(MODALITIES)]
    return (complete or list(cases))[0].name


def case_slices(
    case: Case, sample: Sample, logits: Mapping[str, Tensor], regions: Regions
) -> dict[str, Any]:
    """The axial slice in which the first region is largest, for the picture.

    Turned as it is looked at: the front up, the patient's right on the left.
    """
    label = sample["label"]
    index = int(label[0].sum((0, 1)).argmax())
    combinations = [tuple(logits), *((name,) for name in logits)]
    return {
        "case": case.name,
        "index": index,
        "volumes": sample["volume"][..., index].mT.contiguous(),  # not the whole of it
        "truth": label[..., index].mT.contiguous(),
        "predictions": {
            "+".join(combination): segmented(
                mean_of(logits, combination)[..., index].mT, regions
            ).byte()
            for combination in combinations
        },
    }


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
