"""A configuration of a small transformer, for 24 utterances."""

import dataclasses
from typing import Any

from benchmarks.sentiment.training import PRESETS, Config


def small(**changes: Any) -> Config:
    some = {"width": 8, "depth": 1, "heads": 2, "batch_size": 8, "epochs": 2}
    return dataclasses.replace(PRESETS["quick"], **{**some, **changes})
