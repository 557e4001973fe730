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
import io
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks import results
from benchmarks.checkpoint import load_checkpoint, save_checkpoint
from benchmarks.sentiment_data import MODALITIES, SentimentData, Split, load_file, synthetic
from benchmarks.sentiment_report import (
    COMBINATIONS,
    NAMES,
    RESULTS,
    TABLE,
    Report,
    metrics,
    summarise,
    write_report,
)
from gradsplit import CombinationSampler, ModalityDecoupledOptimizer, modality_combinations
from reference_models.sentiment_transformer import SentimentTransformer, SentimentTransformerConfig

__all__ = ["Config", "Session", "Training", "main", "plain_sum"]

Combination = tuple[str, ...]
Array = npt.NDArray[np.float64]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
LOSSES = {"l1": F.l1_loss, "mse": F.mse_loss}
CHECKPOINT = "checkpoint.pt"
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


# --- evaluation ----------------------------------------------------------------------------------


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

    def report(self, data: SentimentData) -> Report:
        """To be called when every training is done."""
        return Report.of(
            data,
            config=asdict(self.config),
            command=self.command,
            environment=self.environment,
            done=self.done,
        )


def _line_of(result: Mapping[str, Any], number: int, total: int) -> str:
    return (
        f"[{number}/{total}] {result['method']}, seed {result['seed']}: best epoch "
        f"{result['best_epoch']}, valid MAE {result['valid_mae']:.3f}, "
        f"test MAE {result['summary']['mae']:.3f} ({result['seconds']:.0f} s)"
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
        table = write_report(session.report(data), session.folder)
    except KeyboardInterrupt:
        print(f"\ninterrupted; to continue:\n  {again}", file=sys.stderr)
        return 130
    except Diverged as error:
        print(f"benchmarks.sentiment: {error}", file=sys.stderr)
        return 1
    (session.folder / CHECKPOINT).unlink()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal has no plus-minus sign
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
        print(f"{folder} is already finished:\n\n{(folder / TABLE).read_text('utf-8')}")
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
