"""What the benchmarks compare: rules, and the combinations that each step trains on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from gradsplit import CombinationSampler, modality_combinations

__all__ = ["RULES", "FixedCombinations", "plain_sum", "sampler_of"]

Combination = tuple[str, ...]


def plain_sum(gramian: Tensor) -> Tensor:
    """The rule that decouples nothing: (..., m, m) -> ones (..., m)."""
    return gramian.new_ones(gramian.shape[:-1])


# `full` has one loss, so that no rule changes anything.
RULES: dict[str, str | Callable[[Tensor], Tensor]] = {
    "full": plain_sum,
    "sum": plain_sum,
    "gmd": "gmd",
    "pcgrad": "pcgrad",
}


class FixedCombinations:
    """The same combinations at every step; stands where a CombinationSampler stands."""

    def __init__(self, combinations: list[Combination]) -> None:
        self.combinations = combinations

    def __call__(self) -> list[Combination]:
        return self.combinations

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """There is nothing to restore."""


def sampler_of(
    method: str, combinations: str, modalities: Sequence[str], seed: int
) -> CombinationSampler | FixedCombinations:
    """Who says what a step trains on: ``combinations`` is "all", "singles" or "k=N".

    The method "full" trains on the combination of all modalities alone.
    """
    if method == "full":
        return FixedCombinations([tuple(modalities)])
    if combinations.startswith("k="):
        return CombinationSampler(modalities, k=int(combinations[2:]), seed=seed)
    largest = 1 if combinations == "singles" else None
    return FixedCombinations(modality_combinations(modalities, max_size=largest))
