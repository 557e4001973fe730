"""Every benchmark's training: the same for all methods, apart from what a method is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.brats.training import Training as BratsTraining
from benchmarks.brats.volumes import Prepared
from benchmarks.runs.training import Training
from benchmarks.sentiment.data import SentimentData
from benchmarks.sentiment.training import Training as SentimentTraining
from tests.benchmarks.brats.tiny import small as brats
from tests.benchmarks.running import Silent
from tests.benchmarks.sentiment.tiny import small as sentiment

Begin = Callable[..., Training[Any]]


@pytest.fixture(params=["sentiment", "brats"])
def begin(request: pytest.FixtureRequest, sentiment_data: SentimentData) -> Begin:
    """``begin(method, seed, **options)``."""
    if request.param == "sentiment":
        return lambda method, seed, **options: SentimentTraining(
            sentiment(**options), sentiment_data, method, seed
        )
    prepared: Prepared = request.getfixturevalue("prepared")
    some = {"epochs": 3, "validate_every": 9}  # of three, two are trained, and never validated
    return lambda method, seed, **options: BratsTraining(
        brats(**some, **options), prepared, method, seed
    )


def seen(training: Training[Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The weights it starts with; the samples of two epochs."""
    weights = [parameter.clone() for parameter in training.model.parameters()]
    batches: list[Any] = []
    step = training.step

    def spy(window: Any) -> float | None:
        batches.extend(window)
        return step(window)

    training.step = spy  # type: ignore[method-assign]
    epochs = []
    for _ in range(2):
        batches.clear()
        training.train_epoch(Silent())
        parts = [[one] if isinstance(one, Tensor) else [one["volume"], one["label"]]
                 for one in batches]  # fmt: skip
        epochs.append([tensor for part in parts for tensor in part])
    return weights, *epochs


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_methods_start_alike_and_see_the_same_batches(begin: Begin) -> None:
    weights, first, second = seen(begin("full", 1))
    assert not same(first, second), "each epoch has its own"
    for method in ("sum", "gmd-all", "pcgrad", "balance+gmd-all"):
        other = seen(begin(method, 1))
        assert all(map(same, (weights, first, second), other)), method
    other = seen(begin("full", 2))
    assert not any(map(same, (weights, first, second), other)), "each seed has its own"


@pytest.mark.parametrize(
    ("method", "combinations"),
    [("gmd", "all"), ("gmd", "singles"), ("gmd", "k=4"), ("pcgrad", "k=4"), ("full", "all")],
)
def test_what_is_trained_on(begin: Begin, method: str, combinations: str) -> None:
    training = begin(method, 0, combinations=combinations)
    training.train_epoch(Silent())
    records = training.merges.state_dict()
    trained, names = records["trained"].tolist(), training.merges.names
    steps, modalities = len(trained), names[0].split("+")
    assert steps > 1
    expected = [range(len(names))] * steps
    if method == "full":
        expected = [range(1)] * steps
    elif combinations == "singles":
        expected = [[names.index(name) for name in modalities]] * steps
    elif combinations == "k=4":
        sampler = begin("sum", 0, combinations=combinations).sampler
        expected = [[names.index("+".join(one)) for one in sampler()] for _ in range(steps)]
        assert len(set(map(tuple, expected))) > 1
    assert trained == list(map(list, expected))
    rows = len(trained[0])
    assert records["gramians"].shape == (steps, rows, rows)
    assert records["weights"].shape == (steps, rows)
