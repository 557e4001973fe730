"""What the benchmarks compare: methods, and the combinations that each step trains on.

And what the words of their tables mean.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradsplit import CombinationSampler, modality_combinations

__all__ = [
    "ALL",
    "MEASURES",
    "METHODS",
    "FixedCombinations",
    "Method",
    "definitions",
    "measured_on",
    "plain_sum",
    "sampler_of",
]

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


MEANINGS = {
    "full": "trained on the combination of all modalities alone",
    "sum": "trained on many combinations, their gradients added up as they are: the baseline",
    "gmd": "the GMD paper's rule: of two gradients in conflict each loses its component along the "
    "other, then all are added up; on {scope}",
    "gmd-all": "gmd on all parameters, where its gradients are measured, too",
    "pcgrad": "the rule in GMD's released code: each gradient loses its components along those in "
    "conflict with it, one after another, then all are added up; on {scope}",
    "balance": "sum, each loss weighted by one over its gradient's norm in the first 20 steps",
    "balance+gmd-all": "gmd-all with the losses weighted as in balance",
    "conflict": "two gradients that point against each other: their inner product is negative",
    "opposed": "a loss that a small step along the sum of all gradients raises",
    "merged": "what a method makes of the gradients of all losses, and the optimizer steps along",
    "dominance": "of gradient j over k, |cos(j, k)| times the norm of j over that of k; the "
    "largest of each step, in conflict or not",
    "alignment": "the cosine between the merged gradient and the plain sum: 1 if only its length "
    "changed",
    "share": "the norm of one combination's gradient over the sum of the norms of all",
}
MEASURES = ("conflict", "opposed", "merged", "dominance", "alignment", "share")


ALL = "all parameters"


def definitions(words: Iterable[str], scope: str) -> str:
    """A Markdown list: what these methods and measures are, on the parameters of ``scope``."""
    return "".join(f"- **{word}**: {MEANINGS[word].format(scope=scope)}.\n" for word in words)


def measured_on(scope: str, methods: Iterable[str]) -> str:
    """``scope``, and which of ``methods`` have another one."""
    others = [method for method in methods if METHODS[method].scope == "all"]
    return f"{scope} ({', '.join(others)}: all)" if others and scope != ALL else scope


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
