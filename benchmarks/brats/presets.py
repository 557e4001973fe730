"""What decides the numbers: a configuration, and presets with the source of every value."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from benchmarks.runs.command import (
    Compared,
    Folder,
    Machine,
    Optimised,
    Positive,
    Whole,
    checked,
)

__all__ = ["AMP", "OPTIMIZERS", "PRESETS", "Config"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
}
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def _user_cache() -> str:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return str(Path(home) / "gradsplit")


def _split(text: str) -> str:
    return text if text in ("folds", "acn") else str(Path(text).absolute())


@dataclass(frozen=True, kw_only=True)
class Data:
    """What it is trained on."""

    data: Folder = None
    """folder of cases; without it, phantoms"""
    regions: str = "WT=1,2,4 TC=1,4 ET=4"
    """region to labels; of BraTS 2023: "WT=1,2,3 TC=1,3 ET=3", of 2024 (GLI): RC=4, too"""
    allow_missing: bool = False
    """train and test on cases that lack modality files, too"""
    phantoms: Positive = 24
    """cases to generate without --data"""
    normalisation: Literal["zscore", "minmax"] = "zscore"
    """of each volume"""
    split: Annotated[str, checked(_split, "a split", "{folds,acn,FILE}")] = "folds"
    """folds, acn (the released protocol), or a JSON file of names"""
    folds: Whole = 0
    """of --split folds; 0: 5, or one per patient where there are fewer"""
    fold: Whole = 0
    """the one that is tested; the next one validates"""
    cache: Literal["memory", "disk", "none"] = "memory"
    """where normalised volumes are kept"""
    cache_folder: Annotated[str, checked(lambda x: str(Path(x).absolute()), "a path", "FOLDER")] = (
        field(default_factory=_user_cache)
    )
    """for phantoms and --cache disk"""
    workers: Whole = 0
    """processes that read and crop"""


@dataclass(frozen=True, kw_only=True)
class Decoupled:
    """How losses become one gradient."""

    scope: Literal["shared", "all"]
    """where conflicts are measured and removed"""
    reduction: Literal["mean", "sum", "released"]
    """of the losses"""
    loss: Literal["dice+bce", "dice"]
    """of each combination"""


@dataclass(frozen=True, kw_only=True)
class Network:
    """The U-Net and its training."""

    width: Positive
    """channels of the first level, a multiple of 8"""
    crop: Positive
    """voxels along each side, in training and inference"""
    accumulate: Positive = 1
    """micro-batches per step"""
    optimizer: Literal["adamw", "adam"]
    """what the decoupling wraps"""
    validate_every: Positive
    """epochs between validations"""
    checkpointing: bool = False
    """recompute activations in the backward: less memory, more time"""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """autocast to"""


@dataclass(frozen=True, kw_only=True)
class Config(Data, Compared, Decoupled, Optimised, Network, Machine):
    """Everything that decides the numbers."""

    preset: Literal["quick", "paper", "released"]


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
    return Config(
        preset="quick",
        methods=("sum", "gmd"),
        combinations="k=5",
        scope="shared",
        reduction="mean",
        loss="dice+bce",
        optimizer="adamw",
        lr=6e-3,
        weight_decay=0.01,
        batch_size=2,
        crop=32,
        width=8,
        epochs=36,
        validate_every=12,
        seeds=1,
    )


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
        seeds=1,
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


PRESETS = {"quick": quick(), "paper": paper(), "released": released()}
