"""Phantoms of 20 x 20 x 16 voxels made ready for training, and a configuration for them."""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.brats.cases import REGIONS, load_folder
from benchmarks.brats.presets import PRESETS, Config
from benchmarks.brats.splits import read_split
from benchmarks.brats.volumes import Prepared, make_dataset


def small(**changes: Any) -> Config:
    """A step on one combination; deterministic and quick."""
    some = {"crop": 16, "epochs": 1, "combinations": "k=1", "validate_every": 1, "threads": 1}
    return dataclasses.replace(PRESETS["quick"], **{**some, **changes})


def prepare(folder: Path, split: Path, *, allow_missing: bool = False) -> Prepared:
    data = load_folder(folder, REGIONS, allow_missing=allow_missing)
    parts = read_split(data, split)
    datasets = {
        name: make_dataset(cases, REGIONS, normalisation="zscore", cache="memory")
        for name, cases in parts.items()
    }
    return Prepared(data, parts, datasets)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
