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
import datetime
import io
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.runs import ranks, results
from benchmarks.runs.command import (
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
from benchmarks.runs.methods import METHODS
from benchmarks.runs.session import Diverged, Session, check_digest
from benchmarks.sentiment.data import (
    MODALITIES,
    SentimentData,
    load_file,
    synthetic,
)
from benchmarks.sentiment.report import (
    Report,
    write_report,
)
from benchmarks.sentiment.training import LOSSES, OPTIMIZERS, Config, Training

__all__ = ["main"]

Combination = tuple[str, ...]
Array = npt.NDArray[np.float64]


# --- evaluation ----------------------------------------------------------------------------------


# --- training ------------------------------------------------------------------------------------


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
        report = Report(
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
