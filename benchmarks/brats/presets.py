"""What decides the numbers: a configuration, and presets with the source of every value."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch._inductor.config

__all__ = [
    "AMP",
    "Config",
    "LOSSES",
    "OPTIMIZERS",
    "PRESETS",
    "SCHEDULES",
    "paper",
    "quick",
    "released",
]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


SCHEDULES = ("poly", "cosine", "constant")


LOSSES = ("dice+bce", "dice")


AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


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
