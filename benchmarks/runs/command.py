"""Types for argparse: what they refuse is a message that says what was expected."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.runs.methods import METHODS

__all__ = [
    "absolute",
    "combinations_of",
    "fraction",
    "from_zero",
    "methods",
    "positive_float",
    "positive_int",
    "rates_of",
    "whole",
]


def absolute(text: str) -> str:
    """A path that still holds when --resume is called from elsewhere."""
    return str(Path(text).absolute())


def methods(text: str) -> tuple[str, ...]:
    """Comma-separated, of METHODS, each once."""
    names = tuple(text.split(","))
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(
                f"unknown method {name!r} (choose from {', '.join(METHODS)})"
            )
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} names a method twice")
    return names


def combinations_of(modalities: Sequence[str]) -> Callable[[str], str]:
    """What the training combinations can be said to be: all, singles, or k=N drawn per step."""
    count = 2 ** len(modalities) - 1

    def check(text: str) -> str:
        if text not in {"all", "singles"} | {f"k={k}" for k in range(1, count + 1)}:
            raise argparse.ArgumentTypeError(
                f"{text!r} (choose from all, singles, k=1 to k={count})"
            )
        return text

    return check


def rates_of(modalities: Sequence[str]) -> Callable[[str], dict[str, float]]:
    """How often each modality is missing: ``NAME=RATE,...``; 0 where it is not named."""

    def check(text: str) -> dict[str, float]:
        rates: dict[str, float] = {}
        for part in text.split(","):
            name, _, rate = part.partition("=")
            if name not in modalities or name in rates:
                raise argparse.ArgumentTypeError(
                    f"{text!r}: expected NAME=RATE once for some of {', '.join(modalities)}"
                )
            rates[name] = fraction(rate)
        return rates

    return check


def _checked(
    convert: Callable[[str], Any], holds: Callable[[Any], bool], what: str
) -> Callable[[str], Any]:
    def check(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return check


positive_int = _checked(int, lambda x: x >= 1, "a whole number of at least 1")
whole = _checked(int, lambda x: x >= 0, "a whole number of at least 0")
positive_float = _checked(float, lambda x: 0 < x < math.inf, "a positive number")
from_zero = _checked(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
fraction = _checked(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
