"""One model in training, and its scores: a method and a seed."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runs import ranks
from benchmarks.runs.gradients import Merges
from benchmarks.runs.methods import METHODS, sampler_of
from benchmarks.runs.session import Diverged
from benchmarks.sentiment.data import (
    MODALITIES,
    SentimentData,
    Split,
    draw_available,
)
from benchmarks.sentiment.report import (
    COMBINATIONS,
    NAMES,
    metrics,
    summarise,
)
from gradsplit import LossBalance, ModalityDecoupledOptimizer
from reference_models.sentiment_transformer import SentimentTransformer, SentimentTransformerConfig

Array = npt.NDArray[np.float64]
Combination = tuple[str, ...]

__all__ = [
    "Config",
    "EVALUATION_BATCH",
    "LOSSES",
    "OPTIMIZERS",
    "Training",
    "evaluate",
    "having",
    "mean_error",
    "predict",
]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


LOSSES = {"l1": F.l1_loss, "mse": F.mse_loss}


EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers, with the defaults."""

    data: str | None = None
    max_frames: int = 50
    missing: dict[str, float] = field(default_factory=dict)
    methods: tuple[str, ...] = ("full", "sum", "gmd", "pcgrad")
    combinations: str = "all"
    seeds: int = 3
    first_seed: int = 0
    epochs: int = 20
    batch_size: int = 32
    loss: str = "l1"
    optimizer: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    clip_norm: float | None = None
    width: int = 32
    depth: int = 2
    heads: int = 4
    dropout: float = 0.1
    threads: int = 1

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)


@torch.no_grad()
def predict(model: SentimentTransformer, split: Split) -> Array:
    """(7, N): the scores of every combination, in the order of COMBINATIONS.

    Where a sample lacks a modality of the combination, see :func:`having`, they mean nothing.
    """
    model.eval()

    def scores(index: Tensor) -> Tensor:
        inputs, _ = split.batch(index)
        return torch.stack(model(inputs, combinations=COMBINATIONS))  # (7, B)

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


def having(available: Tensor) -> Tensor:
    """(7, N): which samples have all modalities of a combination; of ``available`` (N, 3)."""
    places = [[MODALITIES.index(name) for name in combination] for combination in COMBINATIONS]
    return torch.stack([available[:, place].all(1) for place in places])


class Training:
    """One model in training: a method and a seed. All that changes is in ``state_dict``."""

    def __init__(self, config: Config, data: SentimentData, method: str, seed: int) -> None:
        self.config = config
        self.data = data
        self.method = method
        self.seed = seed
        self.epoch = 0
        self.seconds = 0.0
        self.history: list[dict[str, float | None]] = []
        self.merges = Merges(NAMES)
        torch.manual_seed(seed)  # the weights first, then dropout: the same for every method
        sizes = {"width": config.width, "depth": config.depth, "heads": config.heads}
        self.model = SentimentTransformer(
            SentimentTransformerConfig(dims=data.dims, dropout=config.dropout, **sizes)
        )
        self.optimizer = ModalityDecoupledOptimizer(
            OPTIMIZERS[config.optimizer](
                self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay
            ),
            rule=METHODS[method].rule,
            scope=METHODS[method].scope or "shared",
            seed=seed,
            process_group=ranks.group(),
        )
        self.balance = LossBalance() if METHODS[method].balanced else None
        drawing = torch.Generator().manual_seed(seed)
        self.has = {
            name: having(draw_available(data.splits[name].available, config.missing, drawing))
            for name in ("train", "valid")
        }
        if ranks.rank() > 0:  # other samples, other dropout
            torch.manual_seed(seed + 1_000_003 * ranks.rank())
        self.sampler = sampler_of(method, config.combinations, MODALITIES, seed)
        self.best_epoch = 0
        self.best_mae = math.inf
        self.best_model = copy.deepcopy(self.model.state_dict())

    def train_epoch(self, progress: Any) -> None:
        """One pass over train, then validation, which decides whether to keep the weights."""
        started = time.perf_counter()
        train = self.data.splits["train"]
        # From seed and epoch alone, so that neither dropout nor the method changes the batches.
        order = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        losses = []
        self.model.train()
        shuffled = torch.randperm(len(train), generator=order)
        for index in torch.split(shuffled, self.config.batch_size):
            loss = self._step(train, index)
            losses += [] if loss is None else [loss]
            report = self.optimizer.last
            if losses and report is not None and not progress.disable:
                conflicts = f"{report.conflict_rate():.0%}"
                progress.set_postfix(loss=f"{losses[-1]:.3f}", conflicts=conflicts, refresh=False)
            progress.update()
        valid_mae = mean_error(self.model, self.data.splits["valid"], self.has["valid"])
        self.epoch += 1
        if valid_mae < self.best_mae:
            self.best_mae, self.best_epoch = valid_mae, self.epoch
            self.best_model = copy.deepcopy(self.model.state_dict())
        train_loss = math.fsum(losses) / len(losses) if losses else None
        self.history.append({"train_loss": train_loss, "valid_mae": valid_mae})
        self.seconds += time.perf_counter() - started

    def _step(self, train: Split, index: Tensor) -> float | None:
        """One step over the utterances ``index`` of ``train``; the mean loss.

        None where none of them has any of the combinations drawn: there is nothing to learn.
        """
        combinations = self.sampler()
        losses: dict[str | Combination, Tensor | None] = dict.fromkeys(combinations)
        drawn = [NAMES.index("+".join(combination)) for combination in combinations]
        has = self.has["train"][drawn][:, index]  # (C, B), of all ranks
        if not has.any():
            return None
        own = ranks.share(index)
        if len(own) > 0:
            inputs, labels = train.batch(own)
            scores = self.model(inputs, combinations=combinations)  # C of (B,)
            loss = LOSSES[self.config.loss]
            for combination, score, rows in zip(combinations, scores, has, strict=True):
                counts = [int(rows[rank :: ranks.count()].sum()) for rank in range(ranks.count())]
                if (count := counts[ranks.rank()]) > 0:
                    mine = ranks.share(rows)
                    # The mean over the ranks that have a sample is then that over all samples.
                    weight = count * sum(n > 0 for n in counts) / sum(counts)
                    losses[combination] = weight * loss(score[mine], labels[mine])
        if self.balance is not None:
            losses = self.balance(losses)
        self.optimizer.zero_grad()
        report = self.optimizer.backward(losses)
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        if self.balance is not None:
            self.balance.update(report)
        self.merges.add(report)
        mean = float(report.losses.mean())
        if not math.isfinite(mean):
            raise Diverged("the loss is not a finite number")
        return mean

    def result(self) -> dict[str, Any]:
        """For the result file; loads the best epoch's weights."""
        self.model.load_state_dict(self.best_model)
        test = evaluate(self.model, self.data.splits["test"])
        return {
            "method": self.method,
            "seed": self.seed,
            "best_epoch": self.best_epoch,
            "valid_mae": self.best_mae,
            "test": test,
            "summary": summarise(test),
            "history": self.history,
            "seconds": round(self.seconds, 1),
        }

    def finish(self, save: Callable[[], None]) -> dict[str, Any]:
        return {"result": self.result(), "records": self.merges.stacked()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "seed": self.seed,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "history": self.history,
            "records": self.merges.stacked(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state_dict(),
            "balance": None if self.balance is None else self.balance.state_dict(),
            "best": {"epoch": self.best_epoch, "mae": self.best_mae, "model": self.best_model},
            "random": ranks.each(torch.get_rng_state()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.seconds = state["seconds"]
        self.history = state["history"]
        self.merges.load(state["records"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        if self.balance is not None:
            self.balance.load_state_dict(state["balance"])
        self.best_epoch = state["best"]["epoch"]
        self.best_mae = state["best"]["mae"]
        self.best_model = state["best"]["model"]
        torch.set_rng_state(ranks.own(state["random"]))
