"""Sentiment from text, audio and vision, trained with and without gradient decoupling.

    python -m benchmarks.sentiment                             # synthetic data, about two minutes
    python -m benchmarks.sentiment --data unaligned_50.pkl     # an MMSA pickle, aligned or not
    python -m benchmarks.sentiment --data FILE --methods sum,gmd --combinations singles --seeds 5
    python -m benchmarks.sentiment --resume results/sentiment-2026-01-31

One model is trained per method and seed, from the same initial weights and with the same batches:

full             only the loss of the combination of all modalities
sum              the mean of the combinations' losses, no decoupling
gmd              the GMD paper's rule, on the parameters that all losses share
gmd-all          the same on all parameters
pcgrad           the rule in GMD's released code, on the shared parameters
balance          sum, weighted by the gradient norms of the first 20 steps (LossBalance)
balance+gmd-all  both

The epoch with the best validation split (MAE, mean over all combinations) is tested on every
combination of available modalities, over the utterances that have all of it. Results go to
results/sentiment-DATE: results.json, table.md, scores.png, angles.png, dominance.png. Ctrl-C leaves
a checkpoint that --resume continues from exactly. On several ranks:

    torchrun --nproc-per-node 2 -m benchmarks.sentiment ...

each step has the same batch, of which each rank takes its share.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import ranks, results
from benchmarks.arguments import (
    absolute,
    combinations_of,
    fraction,
    from_zero,
    methods,
    positive_float,
    positive_int,
    rates_of,
    whole,
)
from benchmarks.gradients import Merges
from benchmarks.methods import METHODS, sampler_of
from benchmarks.sentiment_data import (
    MODALITIES,
    SentimentData,
    Split,
    draw_available,
    load_file,
    synthetic,
)
from benchmarks.sentiment_report import (
    COMBINATIONS,
    NAMES,
    Report,
    metrics,
    summarise,
    write_report,
)
from benchmarks.session import Diverged, Session, check_digest
from gradsplit import LossBalance, ModalityDecoupledOptimizer
from reference_models.sentiment_transformer import SentimentTransformer, SentimentTransformerConfig

__all__ = ["Config", "Training", "main"]

Combination = tuple[str, ...]
Array = npt.NDArray[np.float64]

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


# --- evaluation ----------------------------------------------------------------------------------


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


def _line_of(result: Mapping[str, Any]) -> str:
    return (
        f"{result['method']}, seed {result['seed']}: best epoch "
        f"{result['best_epoch']}, valid MAE {result['valid_mae']:.3f}, "
        f"test MAE {result['summary']['mae']:.3f} ({result['seconds']:.0f} s)"
    )


# --- command line --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return ranks.run(lambda: _main(arguments))


def _main(arguments: list[str]) -> int:
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    if "resume" not in options:
        wanted = options.pop("out", Path("results") / f"sentiment-{datetime.date.today()}")
        config = _config(parser, options)
        data = _load_data(parser, config)
        started = ranks.command("python")
        command = shlex.join([*started, "-m", "benchmarks.sentiment", *arguments])
        environment, digest = _versions(), data.digest
        session = Session.start(parser, wanted, asdict(config), command, environment, digest)
        return _run(session, data)
    folder: Path = options.pop("resume")
    if not options and (folder / results.RESULTS).exists():
        table = (folder / results.TABLE).read_text("utf-8")
        print(f"{folder} is already finished:\n\n{table}")
        return 0
    session = Session.resume(parser, folder, options, _versions())
    data = _load_data(parser, Config(**session.config))
    check_digest(parser, data.source, data.digest, session.digest)
    return _run(session, data)


def _run(session: Session, data: SentimentData) -> int:
    config = Config(**session.config)
    torch.set_num_threads(config.threads)  # sums depend on how they are split
    for remark in data.remarks():
        print(remark, file=sys.stderr)
    try:
        session.save()  # from here on Ctrl-C loses at most an epoch
        session.train(
            # Every method for a seed, then the next seed: what is there early can be compared.
            [(method, seed) for seed in config.all_seeds for method in config.methods],
            lambda method, seed: Training(config, data, method, seed),
            epochs=config.epochs,
            epoch_length=math.ceil(len(data.splits["train"]) / config.batch_size),
            unit="step",
            line=_line_of,
        )
        report = Report.of(
            data,
            config=session.config,
            command=session.command,
            environment=session.environment,
            done=session.done,
        )
        table = ranks.first(lambda: write_report(report, session.folder))
    except KeyboardInterrupt:
        again = session.how_to_continue()
        print(f"\ninterrupted; to continue:\n  {again}", file=sys.stderr)
        return 130
    except Diverged as error:
        print(f"benchmarks.sentiment: {error}", file=sys.stderr)
        return 1
    session.close()
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


def _versions() -> dict[str, str]:
    return results.environment(["numpy", "scipy", "scikit-learn", "matplotlib"])


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
        value = ",".join(value) if isinstance(value, tuple) else "none" if value == {} else value
        parser.add_argument(name, type=kind, help=f"{text} (default: {value})", **more)

    add("--data", absolute, "pickle in MMSA's layout; without it, synthetic data", metavar="FILE")
    add("--max-frames", positive_int, "longer sequences are averaged down to", metavar="N")
    add(
        "--missing",
        rates_of(MODALITIES),
        "missing rates in train and valid, per sample: text=0.2,audio=0.4,vision=0.6",
        metavar="RATES",
    )
    add("--methods", methods, f"comma-separated, of {', '.join(METHODS)}", metavar="LIST")
    add(
        "--combinations",
        combinations_of(MODALITIES),
        "trained on: all, singles, or k=N drawn per step",
    )
    add("--seeds", positive_int, "number of seeds", metavar="N")
    add("--first-seed", whole, "the others follow it", metavar="N")
    add("--epochs", positive_int, "passes over train", metavar="N")
    add("--batch-size", positive_int, "utterances per step", metavar="N")
    add("--loss", str, "of the score", choices=list(LOSSES))
    add("--optimizer", str, "what the decoupling wraps", choices=list(OPTIMIZERS))
    add("--lr", positive_float, "learning rate", metavar="X")
    add("--weight-decay", from_zero, "of the optimizer", metavar="X")
    add("--clip-norm", positive_float, "clip the merged gradient to this norm", metavar="X")
    add("--width", positive_int, "of the backbone", metavar="N")
    add("--depth", positive_int, "transformer blocks", metavar="N")
    add("--heads", positive_int, "attention heads", metavar="N")
    add("--dropout", fraction, "dropout probability", metavar="X")
    add("--threads", positive_int, "torch threads; more only help larger models", metavar="N")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="result folder (default: results/sentiment-DATE)"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="continue the interrupted run in DIR"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
