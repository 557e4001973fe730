"""What the benchmarks compare: methods, and the combinations that each step trains on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradsplit import CombinationSampler, modality_combinations

__all__ = ["METHODS", "FixedCombinations", "Method", "plain_sum", "sampler_of"]

Combination = tuple[str, ...]


def plain_sum(gramian: Tensor) -> Tensor:
    """The rule that decouples nothing: (..., m, m) -> ones (..., m)."""
    return gramian.new_ones(gramian.shape[:-1])


@dataclass(frozen=True)
class Method:
    """How the losses of a step become one gradient.

    Attributes:
        rule: of the ModalityDecoupledOptimizer.
        scope: of it; None: what the benchmark is told, or the default.
        balanced: whether a LossBalance weighs the losses first.
    """

    rule: str | Callable[[Tensor], Tensor] = plain_sum
    scope: str | None = None
    balanced: bool = False


# `full` has one loss, so that no rule changes anything.
METHODS: dict[str, Method] = {
    "full": Method(),
    "sum": Method(),
    "gmd": Method("gmd"),
    "gmd-all": Method("gmd", scope="all"),
    "pcgrad": Method("pcgrad"),
    "balance": Method(balanced=True),
    "balance+gmd-all": Method("gmd", scope="all", balanced=True),
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
