"""Which combinations of modalities to train on and to evaluate.

A combination is a non-empty tuple of the names of *available* modalities.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch

__all__ = ["CombinationSampler", "modality_combinations"]

Combination = tuple[str, ...]


def modality_combinations(
    modalities: Iterable[str], min_size: int = 1, max_size: int | None = None
) -> list[Combination]:
    """Every non-empty combination, largest first, then in the order of ``modalities``.

    Args:
        modalities: distinct names, e.g. ``("text", "audio", "vision")``.
        min_size: smallest number of available modalities, at least 1.
        max_size: largest number of available modalities; None: all of them.

    Raises:
        TypeError: ``modalities`` is one string, or holds something that is not a string.
        ValueError: no modality, a name twice, or sizes that do not fit.

    >>> modality_combinations(("t1", "t2"))
    [('t1', 't2'), ('t1',), ('t2',)]
    """
    names = _names(modalities)
    largest = len(names) if max_size is None else max_size
    if not 1 <= min_size <= largest <= len(names):
        raise ValueError(
            f"need 1 <= min_size <= max_size <= {len(names)} (the number of modalities), "
            f"got min_size={min_size}, max_size={max_size}"
        )
    sizes = range(largest, min_size - 1, -1)
    return [chosen for size in sizes for chosen in itertools.combinations(names, size)]


class CombinationSampler:
    """Draws k distinct combinations per call, without replacement, each with equal chance.

    The paper trains on k = 5 sampled combinations a step; the released code uses all 2^M - 1.
    The draws depend on ``seed`` and the number of calls alone, so every rank draws the same.

    Args:
        modalities: distinct names.
        k: combinations per call. The default 5 is clamped to the number there are.
        include_full: the combination of all modalities is always among them (and comes first).
        seed: for torch's generator.

    Raises:
        TypeError: as :func:`modality_combinations`; ``k`` is not an int.
        ValueError: ``k`` is below 1 or above the number of combinations.

    >>> sampler = CombinationSampler(("text", "audio", "vision"), k=2, include_full=True)
    >>> len(sampler()), sampler()[0]
    (2, ('text', 'audio', 'vision'))
    """

    def __init__(
        self,
        modalities: Iterable[str],
        k: int | None = None,
        include_full: bool = False,
        seed: int = 0,
    ) -> None:
        self.combinations = modality_combinations(modalities)
        total = len(self.combinations)
        if k is not None and not isinstance(k, int):
            raise TypeError(f"k must be an int, got {type(k).__name__} {k!r}")
        if k is not None and not 1 <= k <= total:
            raise ValueError(
                f"k must be between 1 and {total}, the number of combinations of "
                f"{len(self.combinations[0])} modalities; got {k}"
            )
        self.k = min(5, total) if k is None else k
        self.include_full = include_full
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> list[Combination]:
        """k combinations in the order of :func:`modality_combinations`."""
        count = len(self.combinations)
        shuffled = torch.randperm(count, generator=self._generator, device="cpu").tolist()
        if self.include_full:  # combination 0: draw the other k - 1 among the rest
            shuffled = [0] + [index for index in shuffled if index != 0]
        return [self.combinations[index] for index in sorted(shuffled[: self.k])]

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to continue with the same draws."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where the sampler, made with the same arguments, wrote ``state_dict``."""
        self._generator.set_state(state_dict["generator"])


def _names(modalities: Iterable[str]) -> Combination:
    if isinstance(modalities, str):
        raise TypeError(f"modalities must be several names, got the string {modalities!r}")
    names = tuple(modalities)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"modalities must be strings, got {name!r}")
    if not names:
        raise ValueError("modalities is empty; name at least one")
    if len(set(names)) != len(names):
        raise ValueError(f"modalities must be distinct, got {names}")
    return names
