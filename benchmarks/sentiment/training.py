"""The transformer in training on one split, and its scores on the others."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runs import ranks, training
from benchmarks.runs.command import (
    Compared,
    File,
    Fraction,
    Machine,
    Optimised,
    Positive,
    checked,
)
from benchmarks.runs.session import Diverged
from benchmarks.runs.training import Losses
from benchmarks.sentiment.data import MODALITIES, SentimentData, Split, draw_available
from benchmarks.sentiment.report import COMBINATIONS, NAMES, having, metrics, summarise
from reference_models.sentiment_transformer import SentimentTransformer, SentimentTransformerConfig

__all__ = ["PRESETS", "Config", "Training", "evaluate", "mean_error", "predict"]

Combination = tuple[str, ...]
Array = npt.NDArray[np.float64]

EVALUATION_BATCH = 64


# --- configuration -------------------------------------------------------------------------------


def _rates(text: str) -> dict[str, float]:
    rates: dict[str, float] = {}
    for part in text.split(","):
        name, _, rate = part.partition("=")
        if name not in MODALITIES or name in rates:
            known = ", ".join(MODALITIES)
            raise ValueError(f"{text!r}: expected NAME=RATE once for some of {known}")
        rates[name] = float(rate)
        if not 0 <= rates[name] < 1:
            raise ValueError(f"must be from 0 to below 1, got {rate!r}")
    return rates


def _shown(rates: dict[str, float]) -> str:
    return ",".join(f"{name}={rate}" for name, rate in rates.items()) or "none"


@dataclass(frozen=True, kw_only=True)
class Data:
    """What it is trained on."""

    data: File = None
    """pickle in MMSA's layout, aligned or not; without it, synthetic data"""
    max_frames: Positive = 50
    """longer sequences are averaged down to so many frames"""
    missing: Annotated[dict[str, float], checked(_rates, "NAME=RATE,...", "RATES", _shown)] = field(
        default_factory=dict
    )
    """missing rates in train and valid, per sample: text=0.2,audio=0.4,vision=0.6"""


@dataclass(frozen=True, kw_only=True)
class Network:
    """The transformer."""

    width: Positive = 32
    """of the backbone"""
    depth: Positive = 2
    """transformer blocks"""
    heads: Positive = 4
    """attention heads"""
    dropout: Fraction = 0.1
    """probability"""


@dataclass(frozen=True, kw_only=True)
class Config(Data, Compared, Optimised, Network, Machine):
    """Everything that decides the numbers."""

    preset: Literal["quick", "study"]


QUICK = Config(
    preset="quick",
    methods=("full", "sum", "gmd", "pcgrad"),
    combinations="all",
    seeds=3,
    epochs=20,
    batch_size=32,
    lr=1e-3,
    weight_decay=0.01,
    threads=1,  # more only help larger models
)
PRESETS = {
    "quick": QUICK,
    "study": dataclasses.replace(
        QUICK,
        preset="study",
        methods=("full", "sum", "gmd", "gmd-all", "pcgrad", "balance", "balance+gmd-all"),
        seeds=30,
        first_seed=100,
    ),
}


# --- evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: SentimentTransformer, split: Split) -> Array:
    """(7, N): the scores of every combination, in the order of COMBINATIONS.

    Where a sample lacks a modality of the combination, see :func:`having`, they mean nothing.
    """
    model.eval()
    device = next(model.parameters()).device

    def scores(index: Tensor) -> Tensor:
        inputs, _ = _on(device, split.batch(index))
        return torch.stack(model(inputs, combinations=COMBINATIONS)).cpu()  # (7, B)

    batches = torch.split(torch.arange(len(split)), EVALUATION_BATCH)
    joined = torch.cat(ranks.divided(scores, batches), dim=1).double()
    if not joined.isfinite().all():
        raise Diverged("a score is not a finite number")
    return joined.numpy()


def evaluate(model: SentimentTransformer, split: Split) -> dict[str, dict[str, float]]:
    """The metrics of every combination, by name, over the samples that have all of it."""
    labels, has = split.labels.double().numpy(), having(split.available).numpy()
    return {
        name: metrics(scores[rows], labels[rows])
        for name, scores, rows in zip(NAMES, predict(model, split), has, strict=True)
    }


def mean_error(model: SentimentTransformer, split: Split, has: Tensor) -> float:
    """MAE over the samples that have a combination, mean over those that some sample has.

    Args:
        has: (7, N), of :func:`having`.
    """
    errors = np.abs(predict(model, split) - split.labels.double().numpy())
    by_combination = [error[rows] for error, rows in zip(errors, has.numpy(), strict=True)]
    return float(np.mean([some.mean() for some in by_combination if len(some) > 0]))


def _on(device: torch.device, batch: Any) -> Any:
    """``batch``, tensors within mappings and tuples, on another device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, tuple):
        return tuple(_on(device, part) for part in batch)
    return {name: _on(device, part) for name, part in batch.items()}


# --- training ------------------------------------------------------------------------------------


class Training(training.Training[SentimentTransformer]):
    """A transformer, and the mean absolute error of each combination over its samples."""

    SCORE, SIGN = "valid_mae", -1

    def __init__(self, config: Config, data: SentimentData, method: str, seed: int) -> None:
        torch.manual_seed(seed)  # the weights first, then dropout: the same for every method
        sizes = {"width": config.width, "depth": config.depth, "heads": config.heads}
        model = SentimentTransformer(
            SentimentTransformerConfig(dims=data.dims, dropout=config.dropout, **sizes)
        ).to(config.device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        super().__init__(config, method, seed, model, optimizer, COMBINATIONS)
        self.splits = data.splits
        drawing = torch.Generator().manual_seed(seed)
        self.has = {
            name: having(draw_available(data.splits[name].available, config.missing, drawing))
            for name in ("train", "valid")
        }
        if ranks.rank() > 0:  # other samples, other dropout
            torch.manual_seed(seed + 1_000_003 * ranks.rank())

    def windows(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Indices into train, as many as a step takes."""
        # From seed and epoch alone, so that neither dropout nor the method changes the batches.
        order = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        shuffled = torch.randperm(len(self.splits["train"]), generator=order)
        for index in torch.split(shuffled, self.config.batch_size):
            yield len(index), [index]

    def _having(self, index: Tensor, combinations: Sequence[Combination]) -> Tensor:
        """(C, B) bool, of all ranks."""
        drawn = [NAMES.index("+".join(combination)) for combination in combinations]
        return self.has["train"][drawn][:, index]

    def possible(self, batch: Tensor, combinations: Sequence[Combination]) -> bool:
        return bool(self._having(batch, combinations).any())

    def losses(self, batch: Tensor, combinations: Sequence[Combination]) -> Losses:
        losses: Losses = dict.fromkeys(combinations)
        own = ranks.share(batch)
        if len(own) == 0:
            return losses
        inputs, labels = _on(self.device, self.splits["train"].batch(own))
        scores = self.model(inputs, combinations=combinations)  # C of (B,)
        having = self._having(batch, combinations)
        for combination, score, rows in zip(combinations, scores, having, strict=True):
            counts = [int(rows[rank :: ranks.count()].sum()) for rank in range(ranks.count())]
            if (count := counts[ranks.rank()]) > 0:
                mine = ranks.share(rows).to(self.device)
                # The mean over the ranks that have a sample is then that over all samples.
                weight = count * sum(n > 0 for n in counts) / sum(counts)
                losses[combination] = weight * F.l1_loss(score[mine], labels[mine])
        return losses

    def validate(self, epoch: int) -> float:
        return mean_error(self.model, self.splits["valid"], self.has["valid"])

    def test(self, save: Callable[[], None]) -> dict[str, Any]:
        self.model.load_state_dict(self.best_model)
        test = evaluate(self.model, self.splits["test"])
        return {"result": {"test": test, "summary": summarise(test)}}
