"""The sentiment transformer in training: the same for all methods, right where data are missing."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from benchmarks.runs.methods import plain_sum
from benchmarks.sentiment.data import MODALITIES, SentimentData, Split, draw_available
from benchmarks.sentiment.report import COMBINATIONS, NAMES
from benchmarks.sentiment.training import Training, evaluate, mean_error, predict
from tests.benchmarks.running import Silent
from tests.benchmarks.sentiment.tiny import small

# --- missing modalities --------------------------------------------------------------------------


def everything(count: int) -> torch.Tensor:
    return torch.ones(count, len(MODALITIES), dtype=torch.bool)


def test_missing_modalities_are_drawn_at_their_rates() -> None:
    rates = {"text": 0.2, "vision": 0.8}
    drawn = draw_available(everything(20_000), rates, torch.Generator().manual_seed(0))
    assert drawn[:, 1].all(), "audio is never missing"
    assert_allclose(1 - drawn.double().mean(0).numpy(), [0.2, 0, 0.8], atol=0.01)
    both = (~drawn[:, 0] & ~drawn[:, 2]).double().mean()
    assert_allclose(both, 0.2 * 0.8, atol=0.01)
    present = everything(2_000)
    present[:500, 0] = present[250:750, 1] = False
    present[0] = False
    high = dict.fromkeys(MODALITIES, 0.9)
    rare = draw_available(present, high, torch.Generator().manual_seed(0))
    assert rare[1:].any(1).all() and not (rare & ~present).any()
    assert torch.equal(rare, draw_available(present, high, torch.Generator().manual_seed(0)))


def test_a_loss_is_over_the_samples_that_have_all_of_its_modalities(
    sentiment_data: SentimentData,
) -> None:
    """And so is the score that validation selects by; what no sample has is unavailable."""
    rates = {"text": 0.97, "audio": 0.3}
    training = Training(small(dropout=0.0, missing=rates), sentiment_data, "sum", 3)
    generator = torch.Generator().manual_seed(3)
    expected: dict[str, dict[str, float]] = {}
    for split in ("train", "valid"):
        part = sentiment_data.splits[split]
        available = draw_available(part.available, rates, generator).tolist()
        scores = predict(training.model, part)
        expected[split] = {}
        for number, combination in enumerate(COMBINATIONS):
            some = [
                row for row, here in enumerate(available)
                if all(here[MODALITIES.index(modality)] for modality in combination)
            ]  # fmt: skip
            if some:
                wrong = abs(scores[number][some] - part.labels.numpy()[some])
                expected[split]["+".join(combination)] = float(wrong.mean())
    found = mean_error(training.model, sentiment_data.splits["valid"], training.has["valid"])
    assert_allclose(found, np.mean(list(expected["valid"].values())), rtol=1e-6)

    training.model.train()
    training.step([torch.arange(24)])
    report = training.optimizer.last
    assert report is not None and set(report.names) == set(expected["train"]) != set(NAMES)
    for name, loss in zip(report.names, report.losses.tolist(), strict=True):
        assert_allclose(loss, expected["train"][name], rtol=1e-5)


def test_a_batch_in_which_no_combination_has_a_sample_is_passed_over(
    sentiment_data: SentimentData,
) -> None:
    training = Training(small(missing={"text": 0.9}, combinations="k=1"), sentiment_data, "sum", 0)
    steps = [training.step([torch.tensor([n])]) for n in range(24)]
    assert None in steps and len(training.merges.weights) == 24 - steps.count(None)


# --- methods -------------------------------------------------------------------------------------


def test_balance_weighs_by_the_norms_of_the_first_steps(sentiment_data: SentimentData) -> None:
    training = Training(small(combinations="singles", epochs=8), sentiment_data, "balance", 0)
    for _ in range(8):
        training.train_epoch(Silent())
    gramians = training.merges.state_dict()["gramians"][:20]
    inverse = 1 / gramians.diagonal(dim1=1, dim2=2).mean(0).sqrt()
    assert training.balance is not None
    weights = [training.balance.weights[name] for name in MODALITIES]
    assert_allclose(weights, inverse / inverse.mean(), rtol=1e-9)


def test_sum_takes_the_gradient_of_the_mean_loss(sentiment_data: SentimentData) -> None:
    assert torch.equal(plain_sum(torch.zeros(5, 3, 3)), torch.ones(5, 3)), "it is batched"
    training = Training(small(dropout=0.0), sentiment_data, "sum", 0)
    inputs, labels = sentiment_data.splits["train"].batch(torch.arange(8))
    scores = training.model(inputs, combinations=COMBINATIONS)
    losses = [torch.nn.functional.l1_loss(scores[i], labels) for i in range(7)]
    (sum(losses, torch.zeros(())) / 7).backward()
    expected = [parameter.grad for parameter in training.model.parameters()]
    training.step([torch.arange(8)])
    for parameter, gradient in zip(training.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


# --- scores --------------------------------------------------------------------------------------


def test_the_epoch_with_the_best_validation_is_tested(sentiment_data: SentimentData) -> None:
    training = Training(small(lr=0.05, epochs=6), sentiment_data, "sum", 0)
    weights = []
    for _ in range(6):
        training.train_epoch(Silent())
        weights.append({k: v.clone() for k, v in training.model.state_dict().items()})
    found = training.finish(lambda: None)["result"]
    by_epoch = [entry["valid_mae"] for entry in found["history"]]
    assert found["best_epoch"] == int(np.argmin(by_epoch)) + 1 < 6, "else this shows nothing"
    assert found["valid_mae"] == min(by_epoch)
    training.model.load_state_dict(weights[found["best_epoch"] - 1])
    assert found["test"] == evaluate(training.model, sentiment_data.splits["test"])


@pytest.mark.parametrize("count", [1, 65])
def test_a_remainder_of_one_utterance_is_evaluated(
    sentiment_data: SentimentData, count: int
) -> None:
    model = Training(small(), sentiment_data, "sum", 0).model
    part = sentiment_data.splits["test"]
    index = torch.arange(count) % len(part)
    split = Split(
        {name: x[index] for name, x in part.features.items()},
        {name: x[index] for name, x in part.lengths.items()},
        part.labels[index],
    )
    found = predict(model, split)
    assert_allclose(found, predict(model, part)[:, index.numpy()], rtol=1e-4, atol=1e-6)
    scores = evaluate(model, split).values()
    assert all(np.isfinite(list(row.values())).all() for row in scores)
