"""Paired differences between methods: intervals, corrected p values, and a verdict in words."""

import math
import statistics
from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from scipy.stats import nct, ttest_1samp
from scipy.stats import t as student_t

__all__ = ["LEVEL", "Comparison", "compare_all", "verdict"]

Key = TypeVar("Key", bound=Hashable)

LEVEL = 0.05
POWER = 0.8  # of the number of pairs that is said to be needed
MOST = 1000  # pairs; nobody trains more


@dataclass(frozen=True)
class Comparison:
    """Of the differences of pairs, such as two trainings with one seed.

    Attributes:
        differences: one per pair.
        mean: of them.
        std: their sample standard deviation.
        interval: 95 % t interval of the mean, not corrected.
        p: of the two-sided t test, corrected by Holm for all that was compared with it.

    One pair has no noise: the last three are None then.
    """

    differences: tuple[float, ...]
    mean: float
    std: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None

    @property
    def shown(self) -> bool:
        """Whether there is a difference beyond the noise between pairs."""
        return self.p is not None and self.p < LEVEL


def compare_all(differences: Mapping[Key, Sequence[float]]) -> dict[Key, Comparison]:
    """Everything that is looked at together, and therefore corrected together."""
    tested = {key: _test(values) for key, values in differences.items() if len(values) > 1}
    corrected = _holm({key: p for key, (p, _) in tested.items()})
    return {
        key: Comparison(
            differences=tuple(values),
            mean=statistics.fmean(values),
            std=statistics.stdev(values) if len(values) > 1 else None,
            interval=tested[key][1] if key in tested else None,
            p=corrected.get(key),
        )
        for key, values in differences.items()
    }


def verdict(
    name: str, found: Comparison, *, what: str, digits: int, lower: bool, methods: int
) -> str:
    """A sentence.

    Args:
        name: of the method that was compared with sum.
        found: of the differences to sum, a pair per seed.
        what: the measure.
        digits: after the point.
        lower: whether lower is better.
        methods: how many were compared with sum: what the smallest p has to be multiplied by.
    """
    said = f"{name} against sum, {what}: {found.mean:+.{digits}f}"
    if found.interval is None or found.std is None:
        return f"{said} with one seed; that says nothing about noise: run more seeds."
    low, high = found.interval
    if found.shown:
        result = f"{'better' if (found.mean < 0) == lower else 'worse'} beyond the noise"
    else:
        needed = _needed(abs(found.mean), found.std, LEVEL / methods)
        count = f"more than {MOST}" if needed is None else f"about {float(f'{needed:.2g}'):.0f}"
        result = f"no difference is shown; {count} seeds would be needed to tell one of this size"
    return (
        f"{said} [{low:+.{digits}f}, {high:+.{digits}f}] (paired over {len(found.differences)} "
        f"seeds, 95% t interval, p {found.p:.2g} after Holm's correction for {methods} "
        f"method{'s' if methods > 1 else ''}): {result}."
    )


def _test(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """p and the 95 % interval of the mean."""
    mean = statistics.fmean(values)
    if statistics.stdev(values) == 0.0:
        return float(mean == 0.0), (mean, mean)
    found = ttest_1samp(values, 0.0)
    low, high = found.confidence_interval(1 - LEVEL)
    return float(found.pvalue), (float(low), float(high))


def _holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """The smallest times how many there are, the next times one less, ...; never decreasing."""
    corrected, largest = {}, 0.0
    for rank, key in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[key]))
        corrected[key] = largest
    return corrected


def _needed(mean: float, std: float, level: float) -> int | None:
    """How many pairs show such a mean at this level with a probability of POWER; None: > MOST."""

    def power(n: int) -> float:  # without the tail on the other side, which is nothing by then
        size = mean / std * math.sqrt(n)
        return float(nct.sf(student_t.ppf(1 - level / 2, n - 1), n - 1, size))

    if std == 0.0:
        return None
    numbers = range(2, MOST + 1)
    place = bisect_left(numbers, POWER, key=power)
    return numbers[place] if place < len(numbers) else None
