"""How the speed benchmark measures time: side by side, in turns. Knows no method."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Clock", "Contender", "Row", "fit_exponent", "paired_ratio", "paired_ratios"]

Row = dict[str, Any]
"""What one way took in one cell, flat: what is timed (part, task, m, n, way, ...) and numbers."""


@dataclass(frozen=True)
class Contender:
    """What is timed: a forward, and a backward of what it returned; or one thing, if that is all.

    Attributes:
        prepare: runs before them; not timed.
        repeats: of all this in one run, whose time is the mean: for what takes little.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], object] | None = None
    prepare: Callable[[], object] = lambda: None
    repeats: int = 1

    def run(self, synchronise: Callable[[], object]) -> tuple[float, float]:
        """Seconds of the forward, and of all; ``synchronise`` waits for the device."""
        forward = both = 0.0
        for _ in range(self.repeats):
            self.prepare()
            synchronise()
            started = time.perf_counter()
            value = self.forward()
            synchronise()
            forward += time.perf_counter() - started
            if self.backward is not None:
                self.backward(value)
                synchronise()
            both += time.perf_counter() - started
        return forward / self.repeats, both / self.repeats


@dataclass(frozen=True)
class Clock:
    """Times contenders side by side: every round runs each once, the first to go changing.

    A first run of each warms up and does not count, but says who is slow.

    Attributes:
        rounds: how many.
        synchronise: waits for the device.
        tick: told after each run.
        slow, very_slow: seconds; who takes longer is in the first 3 rounds only, or in the first.
    """

    rounds: int
    synchronise: Callable[[], object] = lambda: None
    tick: Callable[[], object] = lambda: None
    slow: float = 4.0
    very_slow: float = 8.0

    def time(self, contenders: Mapping[str, Contender], **cell: Any) -> list[Row]:
        """A row per contender: ``cell``, way (its name), and of each round seconds and forward."""
        collecting = gc.isenabled()
        gc.disable()  # it would stop whoever happens to run
        gc.collect()
        gc.freeze()  # what exists now is not looked at again: collecting in between takes no time
        try:
            samples = self._samples(contenders)
        finally:
            gc.unfreeze()
            if collecting:
                gc.enable()
        rows = []
        for name, runs in samples.items():
            forward, both = map(list, zip(*runs, strict=True))
            rows.append({**cell, "way": name, "seconds": both, "forward": forward})
        return rows

    def _samples(self, contenders: Mapping[str, Contender]) -> dict[str, list[tuple[float, float]]]:
        names, left = list(contenders), dict[str, int]()
        for name in names:
            gc.collect(1)  # what a run leaves behind is young
            _, taken = contenders[name].run(self.synchronise)
            fewer = 1 if taken > self.very_slow else 3 if taken > self.slow else self.rounds
            left[name] = min(fewer, self.rounds)
            self.tick()
        samples = {name: list[tuple[float, float]]() for name in names}
        for number in range(self.rounds):
            gc.collect(1)
            first = number % len(names)
            for name in names[first:] + names[:first]:
                if number < left[name]:
                    samples[name].append(contenders[name].run(self.synchronise))
                    self.tick()
        return samples


def paired_ratios(seconds: Mapping[str, Sequence[float]], above: str, *below: str) -> list[float]:
    """Of ``above`` to the fastest of ``below``, in every round that has both.

    Within a round, so that what slows all of it cancels. Empty where one of them was not timed.
    """
    there = [name for name in below if name in seconds]
    if above not in seconds or not there:
        return []
    fastest = min(there, key=lambda name: statistics.median(seconds[name]))
    # Who is slow has fewer rounds, the first ones.
    return [a / b for a, b in zip(seconds[above], seconds[fastest], strict=False)]


def paired_ratio(seconds: Mapping[str, Sequence[float]], above: str, *below: str) -> float | None:
    """The median of :func:`paired_ratios`, if there are any."""
    ratios = paired_ratios(seconds, above, *below)
    return statistics.median(ratios) if ratios else None


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """p of seconds = c size^p, by least squares of the logarithms of two or more sizes."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
