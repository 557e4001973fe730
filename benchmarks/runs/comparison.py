"""Paired differences between methods: intervals, and p values corrected for how many there are."""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from scipy.stats import t as student_t

__all__ = ["LEVEL", "Comparison", "compare_all"]

Key = TypeVar("Key", bound=Hashable)

LEVEL = 0.05


@dataclass(frozen=True)
class Comparison:
    """Of the differences of pairs, such as two trainings with one seed.

    Attributes:
        differences: one per pair.
        mean: of them.
        std: their sample standard deviation; None: one pair has none.
        interval: 95 % t interval of the mean, not corrected; None: one pair has none.
        p: of the two-sided t test, corrected by Holm for all that was compared with it; None: one
            pair has none.
    """

    differences: tuple[float, ...]
    mean: float
    std: float | None
    interval: tuple[float, float] | None
    p: float | None

    @property
    def shown(self) -> bool:
        """Whether there is a difference beyond the noise between pairs."""
        return self.p is not None and self.p < LEVEL


def compare_all(differences: Mapping[Key, Sequence[float]]) -> dict[Key, Comparison]:
    """Everything that is looked at together, and therefore corrected together."""
    raw = {key: _p_value(values) for key, values in differences.items()}
    corrected = _holm({key: p for key, p in raw.items() if p is not None})
    return {
        key: Comparison(
            differences=tuple(values),
            mean=statistics.fmean(values),
            std=statistics.stdev(values) if len(values) > 1 else None,
            interval=_interval(values),
            p=corrected.get(key),
        )
        for key, values in differences.items()
    }


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    mean, n = statistics.fmean(values), len(values)
    quantile = float(student_t.ppf(1 - LEVEL / 2, n - 1))
    half = quantile * statistics.stdev(values) / math.sqrt(n)
    return mean - half, mean + half


def _p_value(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    if error == 0.0:
        return 1.0 if mean == 0.0 else 0.0
    return 2.0 * float(student_t.sf(abs(mean) / error, len(values) - 1))


def _holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """The smallest times how many there are, the next times one less, ...; never decreasing."""
    corrected, largest = {}, 0.0
    for rank, key in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[key]))
        corrected[key] = largest
    return corrected
