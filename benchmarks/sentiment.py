"""Sentiment from text, audio and vision, trained with and without gradient decoupling.

    python -m benchmarks.sentiment                             # synthetic data, about two minutes
    python -m benchmarks.sentiment --data unaligned_50.pkl     # an MMSA pickle, aligned or not
    python -m benchmarks.sentiment --data FILE --methods sum,gmd --combinations singles --seeds 5
    python -m benchmarks.sentiment --resume results/sentiment-2026-01-31

One model is trained per method and seed, from the same initial weights and with the same batches:

full      only the loss of the combination of all modalities
sum       the mean of the combinations' losses, no decoupling
gmd       the GMD paper's rule
pcgrad    the rule in GMD's released code

The epoch with the best validation split (MAE, mean over all combinations) is tested on every
combination of available modalities. Results go to results/sentiment-DATE: results.json, table.md,
scores.png, angles.png, dominance.png. Ctrl-C leaves a checkpoint that --resume continues from
exactly.
"""

import argparse
import copy
import datetime
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import t as student_t
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks import results
from benchmarks.checkpoint import load_checkpoint, save_checkpoint
from benchmarks.pictures import draw_angles, draw_curves, draw_scores
from benchmarks.sentiment_data import MODALITIES, SentimentData, Split, load_file, synthetic
from gradsplit import (
    CombinationSampler,
    Decoupling,
    ModalityDecoupledOptimizer,
    modality_combinations,
)
from reference_models.sentiment_transformer import SentimentTransformer, SentimentTransformerConfig

__all__ = ["Config", "diagnose", "main", "metrics", "plain_sum"]

Combination = tuple[str, ...]
Array = npt.NDArray[np.float64]

COMBINATIONS = modality_combinations(MODALITIES)
NAMES = ["+".join(combination) for combination in COMBINATIONS]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
LOSSES = {"l1": F.l1_loss, "mse": F.mse_loss}
METRICS = {
    "mae": "MAE",
    "corr": "Corr",
    "acc2_has0": "Acc-2 (has 0)",
    "f1_has0": "F1 (has 0)",
    "acc2_non0": "Acc-2 (non 0)",
    "f1_non0": "F1 (non 0)",
    "acc7": "Acc-7",
}
CHECKPOINT = "checkpoint.pt"
RESULTS = "results.json"
EVALUATION_BATCH = 64


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


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers, with the defaults."""

    data: str | None = None
    max_frames: int = 50
    methods: tuple[str, ...] = tuple(RULES)
    combinations: str = "all"
    seeds: int = 3
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


# --- metrics -------------------------------------------------------------------------------------


def metrics(predictions: Array, labels: Array) -> dict[str, float]:
    """MMSA's measures for scores in [-3, 3], both (N,); clipped for Acc-7 only, as there."""
    nonzero = labels != 0
    negative = {
        "has0": (labels >= 0, predictions >= 0),
        "non0": (labels[nonzero] > 0, predictions[nonzero] > 0),
    }
    found = {
        "mae": mean_absolute_error(labels, predictions),
        "corr": _pearson(predictions, labels),
        "acc7": accuracy_score(_seven(labels), _seven(predictions)),
    }
    for flavour, (truth, guess) in negative.items():
        found[f"acc2_{flavour}"] = accuracy_score(truth, guess)
        found[f"f1_{flavour}"] = f1_score(truth, guess, average="weighted", zero_division=0)
    return {name: float(found[name]) for name in METRICS}


def _seven(scores: Array) -> npt.NDArray[np.int64]:
    return np.round(scores.clip(-3, 3)).astype(np.int64)


def _pearson(predictions: Array, labels: Array) -> float:
    """0.0 where one of the two is constant: it follows nothing."""
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(predictions, labels)[0, 1])


def summarise(by_combination: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over the combinations, and the MAE of the worst one."""
    rows = list(by_combination.values())
    means = {name: math.fsum(row[name] for row in rows) / len(rows) for name in METRICS}
    return {**means, "worst_mae": max(row["mae"] for row in rows)}


class Diverged(RuntimeError):
    """A loss or a score is no longer a number."""


@torch.no_grad()
def predict(model: SentimentTransformer, split: Split) -> Array:
    """(7, N): the scores of every combination, in the order of COMBINATIONS."""
    model.eval()
    scores = []
    for index in torch.split(torch.arange(len(split)), EVALUATION_BATCH):
        inputs, _ = split.batch(index)
        scores.append(model(inputs, combinations=COMBINATIONS))  # (7, B)
    joined = torch.cat(scores, dim=1).double()
    if not joined.isfinite().all():
        raise Diverged("a score is not a finite number")
    return joined.numpy()


def evaluate(model: SentimentTransformer, split: Split) -> dict[str, dict[str, float]]:
    """The metrics of every combination, by name."""
    labels = split.labels.double().numpy()
    return {
        name: metrics(scores, labels)
        for name, scores in zip(NAMES, predict(model, split), strict=True)
    }


# --- training ------------------------------------------------------------------------------------


class Training:
    """One model in training: a method and a seed. All that changes is in ``state_dict``."""

    def __init__(self, config: Config, data: SentimentData, method: str, seed: int) -> None:
        self.config = config
        self.data = data
        self.method = method
        self.seed = seed
        self.epoch = 0
        self.seconds = 0.0
        self.history: list[dict[str, float]] = []
        self.gramians: list[Tensor] = []  # (m, m) per step
        self.weights: list[Tensor] = []  # (m,) per step
        self.trained: list[Tensor] = []  # (m,) per step: which of COMBINATIONS the rows belong to
        torch.manual_seed(seed)  # the weights first, then dropout: the same for every method
        sizes = {"width": config.width, "depth": config.depth, "heads": config.heads}
        self.model = SentimentTransformer(
            SentimentTransformerConfig(dims=data.dims, dropout=config.dropout, **sizes)
        )
        self.optimizer = ModalityDecoupledOptimizer(
            OPTIMIZERS[config.optimizer](
                self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay
            ),
            rule=RULES[method],
            seed=seed,
        )
        self.sampler = _sampler(config.combinations, seed)
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
            losses.append(self._step(*train.batch(index)))
            if not progress.disable:
                report = self.optimizer.last
                assert report is not None
                conflicts = f"{report.conflict_rate():.0%}"
                progress.set_postfix(loss=f"{losses[-1]:.3f}", conflicts=conflicts, refresh=False)
            progress.update()
        valid_mae = summarise(evaluate(self.model, self.data.splits["valid"]))["mae"]
        self.epoch += 1
        if valid_mae < self.best_mae:
            self.best_mae, self.best_epoch = valid_mae, self.epoch
            self.best_model = copy.deepcopy(self.model.state_dict())
        self.history.append({"train_loss": math.fsum(losses) / len(losses), "valid_mae": valid_mae})
        self.seconds += time.perf_counter() - started

    def _step(self, inputs: dict[str, tuple[Tensor, Tensor]], labels: Tensor) -> float:
        combinations = self._combinations()
        scores = self.model(inputs, combinations=combinations)  # (C, B)
        loss = LOSSES[self.config.loss]
        losses: dict[str | Combination, Tensor] = {
            combination: loss(scores[number], labels)
            for number, combination in enumerate(combinations)
        }
        self.optimizer.zero_grad()
        report = self.optimizer.backward(losses)
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        self.gramians.append(report.gramian)
        self.weights.append(report.weights)
        self.trained.append(torch.tensor([NAMES.index(name) for name in report.names]))
        mean = float(report.losses.mean())
        if not math.isfinite(mean):
            raise Diverged("the loss is not a finite number")
        return mean

    def _combinations(self) -> list[Combination]:
        if self.method == "full":
            return COMBINATIONS[:1]
        return self.sampler()

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

    def records(self) -> dict[str, Tensor]:
        """What every merge saw: Gramians (S, m, m), weights (S, m), combinations (S, m)."""
        return {
            "gramians": torch.stack(self.gramians),
            "weights": torch.stack(self.weights),
            "trained": torch.stack(self.trained),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "seed": self.seed,
            "epoch": self.epoch,
            "seconds": self.seconds,
            "history": self.history,
            "records": self.records(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sampler": self.sampler.state_dict(),
            "best": {"epoch": self.best_epoch, "mae": self.best_mae, "model": self.best_model},
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.seconds = state["seconds"]
        self.history = state["history"]
        self.gramians = list(state["records"]["gramians"])
        self.weights = list(state["records"]["weights"])
        self.trained = list(state["records"]["trained"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sampler.load_state_dict(state["sampler"])
        self.best_epoch = state["best"]["epoch"]
        self.best_mae = state["best"]["mae"]
        self.best_model = state["best"]["model"]
        torch.set_rng_state(state["random"])


class _Fixed:
    """The same combinations at every step; stands where a CombinationSampler stands."""

    def __init__(self, combinations: list[Combination]) -> None:
        self.combinations = combinations

    def __call__(self) -> list[Combination]:
        return self.combinations

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """There is nothing to restore."""


def _sampler(combinations: str, seed: int) -> CombinationSampler | _Fixed:
    if combinations.startswith("k="):
        return CombinationSampler(MODALITIES, k=int(combinations[2:]), seed=seed)
    largest = 1 if combinations == "singles" else None
    return _Fixed(modality_combinations(MODALITIES, max_size=largest))


class Session:
    """All trainings of one result folder, in order, with a checkpoint after every epoch."""

    def __init__(
        self,
        folder: Path,
        config: Config,
        command: str,
        environment: dict[str, str],
        digest: str,
    ) -> None:
        self.folder = folder
        self.config = config
        self.command = command
        self.environment = environment
        self.digest = digest  # of the data
        self.done: list[dict[str, Any]] = []  # {"result": ..., "records": ...} per training
        self.current: dict[str, Any] | None = None  # state of the training that was cut off

    @classmethod
    def load(cls, folder: Path) -> "Session":
        content = load_checkpoint(folder / CHECKPOINT)
        config = Config(**{**content["config"], "methods": tuple(content["config"]["methods"])})
        session = cls(folder, config, content["command"], content["environment"], content["digest"])
        session.done, session.current = content["done"], content["current"]
        return session

    def save(self) -> None:
        content = {
            "config": {**asdict(self.config), "methods": list(self.config.methods)},
            "command": self.command,
            "environment": self.environment,
            "digest": self.digest,
            "done": self.done,
            "current": self.current,
        }
        save_checkpoint(self.folder / CHECKPOINT, content)

    def train(self, data: SentimentData) -> None:
        """Every method for a seed, then the next seed: what is there early can be compared."""
        config = self.config
        plan = [(seed, method) for seed in range(config.seeds) for method in config.methods]
        steps = math.ceil(len(data.splits["train"]) / config.batch_size)
        with tqdm(
            total=len(plan) * config.epochs * steps,
            initial=len(self.done) * config.epochs * steps,
            disable=not sys.stderr.isatty(),
            unit="step",
        ) as progress:
            for number, (seed, method) in enumerate(plan[len(self.done) :], len(self.done) + 1):
                progress.set_description(f"{method}, seed {seed}")
                training = Training(config, data, method, seed)
                if self.current is not None:
                    training.load_state_dict(self.current)
                    progress.update(training.epoch * steps)
                while training.epoch < config.epochs:
                    try:
                        training.train_epoch(progress)
                    except Diverged as error:
                        where = f"{method}, seed {seed}, epoch {training.epoch + 1}"
                        raise Diverged(f"{where}: {error}; try a lower --lr") from None
                    self.current = training.state_dict()
                    self.save()
                result = training.result()
                self.done.append({"result": result, "records": training.records()})
                self.current = None
                self.save()
                progress.write(_line_of(result, number, len(plan)), file=sys.stderr)


def _line_of(result: Mapping[str, Any], number: int, total: int) -> str:
    return (
        f"[{number}/{total}] {result['method']}, seed {result['seed']}: best epoch "
        f"{result['best_epoch']}, valid MAE {result['valid_mae']:.3f}, "
        f"test MAE {result['summary']['mae']:.3f} ({result['seconds']:.0f} s)"
    )


# --- what the gradients did ----------------------------------------------------------------------


def diagnose(records: Mapping[str, Tensor]) -> dict[str, Array]:
    """Per step: angles between rows and to the merged gradient, shares, dominance, conflicts.

    ``shares`` is (steps, 7), NaN for combinations that were not drawn.
    """
    rows: dict[str, list[Any]] = {
        key: [] for key in ("pairs", "merged", "shares", "dominance", "conflicts", "alignment")
    }
    for gramian, weights, trained in zip(*(records[key] for key in RECORDS), strict=True):
        names = tuple(NAMES[i] for i in trained.tolist())
        seen = Decoupling(names, (), gramian.new_zeros(len(names)), gramian, weights)
        scalars = seen.as_scalars(prefix="")
        shares = np.full(len(NAMES), np.nan)
        shares[trained.numpy()] = seen.shares().numpy()
        rows["pairs"].append(seen.angles().numpy())
        rows["merged"].append(merged_angles(gramian, weights).numpy())
        rows["shares"].append(shares)
        rows["dominance"].append(scalars["dominance_max"])
        rows["conflicts"].append(scalars["conflict_rate"])
        rows["alignment"].append(scalars["alignment"])
    return {key: np.array(values, dtype=np.float64) for key, values in rows.items()}


RECORDS = ("gramians", "weights", "trained")


def merged_angles(gramian: Tensor, weights: Tensor) -> Tensor:
    """(m,): angle in degrees between each row and w^T J; 90 where one of the two is zero.

    <g_i, w^T J> = (K w)_i and ||w^T J||^2 = w^T K w: the rows themselves are not needed.
    """
    inner = gramian @ weights
    scale = (gramian.diagonal() * (weights @ inner).clamp(min=0.0)).sqrt()
    cosine = torch.where(scale > 0, inner / scale, 0.0).clamp(-1.0, 1.0)
    return cosine.acos().rad2deg()


def _summary_of(seen: Mapping[str, Array], epochs: int) -> dict[str, Any]:
    """The part of :func:`diagnose` that goes into the result file: per epoch, and histograms."""
    bins = np.arange(0, 181, 5)
    per_epoch = {
        key: [float(part.mean()) for part in np.array_split(seen[key], epochs)]
        for key in ("dominance", "conflicts", "alignment")
    }
    shares = {
        name: [_mean_or_none(part) for part in np.array_split(seen["shares"][:, number], epochs)]
        for number, name in enumerate(NAMES)
    }
    histograms = {
        key: np.histogram(seen[key], bins=bins)[0].tolist() for key in ("pairs", "merged")
    }
    return {
        "per_epoch": {**per_epoch, "shares": shares},
        "angle_bins": bins.tolist(),
        "angle_counts": histograms,
        "above_90": {key: float((seen[key] > 90).mean()) for key in ("pairs", "merged")},
    }


def _mean_or_none(values: Array) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


# --- tables --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What a finished session found, ready to be written."""

    session: Session
    data: SentimentData
    constant: dict[str, float]
    seen: dict[str, dict[str, Array]]  # method -> diagnose(), stacked over seeds

    @classmethod
    def of(cls, session: Session, data: SentimentData) -> "Report":
        train, test = data.splits["train"].labels, data.splits["test"].labels
        guess = np.full(len(test), float(train.double().mean()))
        constant = metrics(guess, test.double().numpy())
        by_method: dict[str, list[dict[str, Array]]] = {}
        for one in session.done:
            if one["records"]["weights"].shape[1] > 1:
                by_method.setdefault(one["result"]["method"], []).append(diagnose(one["records"]))
        seen = {
            method: {key: np.stack([run[key] for run in runs]) for key in runs[0]}
            for method, runs in by_method.items()
        }
        return cls(session, data, constant, seen)

    @property
    def methods(self) -> tuple[str, ...]:
        return self.session.config.methods

    @property
    def label(self) -> str:
        """For titles: says synthetic where it is."""
        if self.data.synthetic:
            return "SYNTHETIC data"
        return f"{Path(self.data.source).name} (SHA-256 {self.data.digest[:12]})"

    def runs(self, method: str) -> list[dict[str, Any]]:
        """Results of a method, by seed."""
        return [one["result"] for one in self.session.done if one["result"]["method"] == method]

    def scores(self, method: str, metric: str) -> Array:
        """(seeds, 7)."""
        return np.array(
            [[run["test"][name][metric] for name in NAMES] for run in self.runs(method)]
        )

    def as_json(self) -> dict[str, Any]:
        epochs = self.session.config.epochs
        runs = []
        for one in self.session.done:
            result = dict(one["result"])
            if result["method"] in self.seen:
                seed = result["seed"]
                seen = {key: rows[seed] for key, rows in self.seen[result["method"]].items()}
                result["gradients"] = _summary_of(seen, epochs)
            runs.append(result)
        return {
            "benchmark": "sentiment",
            "command": self.session.command,
            "config": asdict(self.session.config),
            "environment": self.session.environment,
            "data": {
                "source": self.data.source,
                "synthetic": self.data.synthetic,
                "sha256": self.data.digest,
                "shapes": self.data.shapes(),
                "cleaning": self.data.cleaning,
            },
            "selection": SELECTION,
            "combinations": NAMES,
            "constant_predictor": self.constant,
            "runs": runs,
            "comparisons": [self.compare(method) for method in self._compared()],
        }

    def as_markdown(self) -> str:
        config = self.session.config
        note = " (SYNTHETIC data)" if self.data.synthetic else ""
        seeds = f"{config.seeds} seed{'s' if config.seeds > 1 else ''}"
        parts = [
            f"# Sentiment with missing modalities{note}\n",
            self._provenance(),
            f"## Test, mean over the {len(NAMES)} combinations of available modalities{note}\n",
            self._main_table(),
            _NOTES.format(seeds=seeds),
            *(self.sentence(self.compare(method)) + "\n" for method in self._compared()),
            f"## Test MAE per combination{note}\n",
            self._combination_table("mae"),
            f"## Test Acc-2 without zero labels, per combination{note}\n",
            self._combination_table("acc2_non0"),
        ]
        if self.seen:
            parts += [
                f"## Gradients on the shared parameters, all training steps{note}\n",
                self._gradient_table(),
            ]
        return "\n".join(parts)

    def _provenance(self) -> str:
        config, data = self.session.config, self.data
        sizes = ", ".join(f"{name} {len(split)}" for name, split in data.splits.items())
        source = "SYNTHETIC, generated" if data.synthetic else f"`{data.source}`"
        versions = ", ".join(f"{name} {value}" for name, value in self.session.environment.items())
        hyperparameters = ", ".join(
            f"{field.name} {getattr(config, field.name)}"
            for field in fields(config)
            if field.name not in ("data", "methods", "seeds")
        )
        seconds = sum(one["result"]["seconds"] for one in self.session.done)
        lines = [
            f"Data: {source}; SHA-256 `{data.digest}`; utterances: {sizes}.",
            f"Command: `{self.session.command}`",
            f"Seeds: {', '.join(map(str, range(config.seeds)))}. {SELECTION}",
            f"Hyperparameters: {hyperparameters}.",
            f"Versions: {versions}.",
            f"Training took {seconds:.0f} s in all (information only: the machine may be shared).",
        ]
        return "\n".join(f"- {line}" for line in lines) + "\n"

    def _main_table(self) -> str:
        columns = {**METRICS, "worst_mae": "Worst MAE"}
        rows = [["train mean", *(f"{self._constant(name):.3f}" for name in columns)]]
        for method in self.methods:
            summaries = [run["summary"] for run in self.runs(method)]
            cells = [results.format_spread([s[name] for s in summaries]) for name in columns]
            rows.append([method, *cells])
        return results.markdown_table(["method", *columns.values()], rows)

    def _constant(self, name: str) -> float:
        return self.constant["mae" if name == "worst_mae" else name]

    def _combination_table(self, metric: str) -> str:
        rows = []
        for number, name in enumerate(NAMES):
            columns = [self.scores(method, metric)[:, number] for method in self.methods]
            rows.append([name, *(results.format_spread(column.tolist()) for column in columns)])
        rows.append(["(train mean)", *([f"{self.constant[metric]:.3f}"] * len(self.methods))])
        return results.markdown_table(["available", *self.methods], rows)

    def _gradient_table(self) -> str:
        rows = []
        for method, seen in self.seen.items():
            shares = np.nanmean(seen["shares"].reshape(-1, len(NAMES)), axis=0, where=True)
            rows.append(
                [
                    method,
                    f"{seen['conflicts'].mean():.1%}",
                    f"{(seen['merged'] > 90).mean():.1%}",
                    f"{np.median(seen['dominance']):.2f}",
                    f"{seen['alignment'].mean():.4f}",
                    f"{NAMES[int(np.nanargmax(shares))]} ({np.nanmax(shares):.0%})",
                ]
            )
        header = [
            "method",
            "pairs in conflict",
            "rows opposed by the merged update",
            "largest dominance (median)",
            "alignment with the plain sum",
            "largest share",
        ]
        return results.markdown_table(header, rows)

    def _compared(self) -> list[str]:
        return [m for m in self.methods if m not in ("full", "sum") and "sum" in self.methods]

    def compare(self, method: str) -> dict[str, Any]:
        """Mean MAE of ``method`` less that of ``sum``, seed by seed; negative: better."""
        pairs = zip(self.runs(method), self.runs("sum"), strict=True)
        return compare(method, [a["summary"]["mae"] - b["summary"]["mae"] for a, b in pairs])

    def sentence(self, comparison: Mapping[str, Any]) -> str:
        mean, n = comparison["mean"], len(comparison["differences"])
        start = f"{comparison['method']} against sum, mean MAE: {mean:+.4f}"
        if comparison["interval"] is None:
            return f"{start} with one seed; that says nothing about noise: run more seeds."
        low, high = comparison["interval"]
        if comparison["within_noise"]:
            verdict = "within the noise between seeds, no difference is shown"
        else:
            verdict = (
                f"{'better' if mean < 0 else 'worse'} beyond the noise between seeds; that the "
                f"{len(self.data.splits['test'])} test utterances are themselves a sample is not "
                "counted"
            )
        return (
            f"{start} ± {comparison['std']:.4f} (paired over {n} seeds, 95% t interval "
            f"{low:+.4f} to {high:+.4f}): {verdict}."
        )


def compare(method: str, differences: Sequence[float]) -> dict[str, Any]:
    """Mean, sample std and 95% t interval of paired differences; None where one pair has none."""
    mean, std = results.mean_and_std(differences)
    interval, within = None, None
    if std is not None:
        quantile = float(student_t.ppf(0.975, len(differences) - 1))
        half = quantile * std / math.sqrt(len(differences))
        interval, within = [mean - half, mean + half], abs(mean) <= half
    return {
        "method": method,
        "against": "sum",
        "metric": "MAE, mean over combinations",
        "differences": list(differences),
        "mean": mean,
        "std": std,
        "interval": interval,
        "within_noise": within,
    }


SELECTION = (
    "Tested: the epoch with the lowest MAE on the validation split, mean over all combinations."
)
_NOTES = """\
Mean ± sample standard deviation over {seeds}. MMSA's definitions: MAE and Corr on the
unclipped score, Acc-7 on the score clipped to ±3 and rounded; "has 0": negative against
non-negative; "non 0": negative against positive, zero labels left out; F1 weighted by class.
Corr of a constant prediction is 0. Worst MAE: the combination with the highest. "train mean"
predicts the mean label of train, whatever it is given.
"""


# --- pictures ------------------------------------------------------------------------------------


def write_report(report: Report, folder: Path) -> str:
    """Write everything, the result file last: a folder that has one is finished."""
    seeds = report.session.config.seeds
    over = f"mean ± sample std over {seeds} seeds" if seeds > 1 else "1 seed"
    panels = {"mae": "MAE (lower is better)", "acc2_non0": "Acc-2, non 0 (higher is better)"}
    draw_scores(
        folder / "scores.png",
        f"Test scores by available modalities, {report.label}\n({over})",
        NAMES,
        {
            label: {method: report.scores(method, metric) for method in report.methods}
            for metric, label in panels.items()
        },
        {label: ("train mean", report.constant[metric]) for metric, label in panels.items()},
    )
    if report.seen:
        _draw_gradients(report, folder, over)
    table = report.as_markdown()
    results.write_text(folder / "table.md", table)
    results.write_json(folder / RESULTS, report.as_json())
    return table


def _draw_gradients(report: Report, folder: Path, over: str) -> None:
    def each(key: str) -> dict[str, Array]:
        return {method: seen[key] for method, seen in report.seen.items()}

    draw_angles(
        folder / "angles.png",
        f"Gradient angles on the shared parameters, {report.label}, all steps and seeds\n"
        "A row is one combination's gradient. Top: as Fig. 3 of the GMD paper. "
        "Bottom: above 90° the step goes against that row.",
        each("pairs"),
        each("merged"),
    )
    draw_curves(
        folder / "dominance.png",
        f"Gradients on the shared parameters over training, {report.label}\n(moving mean; {over})",
        each("shares"),
        NAMES,
        {
            "largest dominance of a pair": each("dominance"),
            "share of pairs in conflict": each("conflicts"),
            "alignment with the plain sum": each("alignment"),
        },
    )


# --- command line --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    if "resume" not in options:
        wanted = options.pop("out", Path("results") / f"sentiment-{datetime.date.today()}")
        config = _config(parser, options)
        data = _load_data(parser, config)
        command = shlex.join(["python", "-m", "benchmarks.sentiment", *arguments])
        return _run(_start(parser, wanted, config, command, data.digest), data)
    session = _resume(parser, options)
    if session is None:
        return 0
    data = _load_data(parser, session.config)
    if session.digest != data.digest:
        parser.error(
            f"argument --resume: the data has changed since the run began: {data.source} has "
            f"SHA-256 {data.digest}, the checkpoint says {session.digest}; put the old file back"
        )
    return _run(session, data)


def _run(session: Session, data: SentimentData) -> int:
    torch.set_num_threads(session.config.threads)  # sums depend on how they are split
    again = shlex.join([sys.executable, "-m", "benchmarks.sentiment", "--resume",
                        str(session.folder)])  # fmt: skip
    try:
        session.save()  # from here on Ctrl-C loses at most an epoch
        session.train(data)
        table = write_report(Report.of(session, data), session.folder)
    except KeyboardInterrupt:
        print(f"\ninterrupted; to continue:\n  {again}", file=sys.stderr)
        return 130
    except Diverged as error:
        print(f"benchmarks.sentiment: {error}", file=sys.stderr)
        return 1
    (session.folder / CHECKPOINT).unlink()
    print(table)
    print(f"written to {session.folder}")
    return 0


def _config(parser: argparse.ArgumentParser, options: dict[str, Any]) -> Config:
    config = Config(**options)
    if config.width % config.heads or config.width % 2:
        parser.error(
            f"argument --width: must be even and a multiple of --heads, got {config.width} "
            f"with {config.heads} heads"
        )
    return config


def _start(
    parser: argparse.ArgumentParser, wanted: Path, config: Config, command: str, digest: str
) -> Session:
    try:
        folder = results.new_folder(wanted, (RESULTS, CHECKPOINT))
    except OSError as error:
        parser.error(f"argument --out: cannot create {wanted}: {error.strerror}")
    if folder != wanted:
        print(f"{wanted} holds another run; writing to {folder}", file=sys.stderr)
    return Session(folder, config, command, _versions(), digest)


def _versions() -> dict[str, str]:
    return results.environment(["numpy", "scipy", "scikit-learn", "matplotlib"])


def _resume(parser: argparse.ArgumentParser, options: dict[str, Any]) -> Session | None:
    folder: Path = options.pop("resume")
    if options:
        given = ", ".join("--" + name.replace("_", "-") for name in options)
        parser.error(
            f"argument --resume: takes everything from {folder}; leave out {given}, "
            "or start a new run"
        )
    if (folder / RESULTS).exists():
        print(f"{folder} is already finished:\n\n{(folder / 'table.md').read_text('utf-8')}")
        return None
    try:
        session = Session.load(folder)
    except OSError:
        parser.error(f"argument --resume: {folder} holds no {CHECKPOINT} of an interrupted run")
    except ValueError as error:
        parser.error(f"argument --resume: {error}")
    for name, version in _versions().items():
        if session.environment.get(name) != version:
            print(
                f"warning: the run began with {name} {session.environment.get(name)}, this is "
                f"{version}: the numbers may differ from those of an uninterrupted run",
                file=sys.stderr,
            )
    return session


def _load_data(parser: argparse.ArgumentParser, config: Config) -> SentimentData:
    if config.data is None:
        return synthetic(config.max_frames)
    try:
        return load_file(Path(config.data), config.max_frames)
    except OSError as error:
        parser.error(f"argument --data: cannot read {config.data}: {error.strerror}")
    except ValueError as error:
        parser.error(f"argument --data: {error}")


def _parser() -> argparse.ArgumentParser:
    default = Config()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sentiment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # absent unless given: --resume must tell
    )

    def add(name: str, kind: Callable[[str], Any], text: str, **more: Any) -> None:
        value = getattr(default, name[2:].replace("-", "_"))
        value = ",".join(value) if isinstance(value, tuple) else value
        parser.add_argument(name, type=kind, help=f"{text} (default: {value})", **more)

    add("--data", _absolute, "pickle in MMSA's layout; without it, synthetic data", metavar="FILE")
    add("--max-frames", _positive_int, "longer sequences are averaged down to", metavar="N")
    add("--methods", _methods, f"comma-separated, of {', '.join(RULES)}", metavar="LIST")
    add("--combinations", _combinations, "trained on: all, singles, or k=N drawn per step")
    add("--seeds", _positive_int, "number of seeds, from 0 on", metavar="N")
    add("--epochs", _positive_int, "passes over train", metavar="N")
    add("--batch-size", _positive_int, "utterances per step", metavar="N")
    add("--loss", str, "of the score", choices=list(LOSSES))
    add("--optimizer", str, "what the decoupling wraps", choices=list(OPTIMIZERS))
    add("--lr", _positive_float, "learning rate", metavar="X")
    add("--weight-decay", _from_zero, "of the optimizer", metavar="X")
    add("--clip-norm", _positive_float, "clip the merged gradient to this norm", metavar="X")
    add("--width", _positive_int, "of the backbone", metavar="N")
    add("--depth", _positive_int, "transformer blocks", metavar="N")
    add("--heads", _positive_int, "attention heads", metavar="N")
    add("--dropout", _fraction, "dropout probability", metavar="X")
    add("--threads", _positive_int, "torch threads; more only help larger models", metavar="N")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="result folder (default: results/sentiment-DATE)"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="continue the interrupted run in DIR"
    )
    return parser


def _absolute(text: str) -> str:
    return str(Path(text).absolute())  # --resume may be called from elsewhere


def _methods(text: str) -> tuple[str, ...]:
    methods = tuple(text.split(","))
    for method in methods:
        if method not in RULES:
            raise argparse.ArgumentTypeError(
                f"unknown method {method!r} (choose from {', '.join(RULES)})"
            )
    if len(set(methods)) < len(methods):
        raise argparse.ArgumentTypeError(f"{text!r} names a method twice")
    return methods


def _combinations(text: str) -> str:
    draws = {f"k={k}" for k in range(1, len(COMBINATIONS) + 1)}
    if text not in {"all", "singles"} | draws:
        raise argparse.ArgumentTypeError(
            f"{text!r} (choose from all, singles, k=1 to k={len(COMBINATIONS)})"
        )
    return text


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


_positive_int = _checked(int, lambda x: x >= 1, "a whole number of at least 1")
_positive_float = _checked(float, lambda x: 0 < x < math.inf, "a positive number")
_from_zero = _checked(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
_fraction = _checked(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")


if __name__ == "__main__":
    sys.exit(main())
