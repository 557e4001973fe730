"""Sentiment from text, audio and vision, trained with and without gradient decoupling.

    python -m benchmarks.sentiment                             # synthetic data, about two minutes
    python -m benchmarks.sentiment --data unaligned_50.pkl     # an MMSA pickle, aligned or not
    python -m benchmarks.sentiment --data FILE --preset study  # seven methods, 30 seeds
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
results/sentiment-DATE: results.json, scores.csv, table.md and pictures. Ctrl-C, or a killed
process, leaves a checkpoint that --resume continues from exactly. On several ranks:

    torchrun --nproc-per-node 2 -m benchmarks.sentiment ...

each step has the same batch, of which each rank takes its share.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.runs import command, ranks
from benchmarks.runs.methods import sampler_of
from benchmarks.runs.session import begin, finished, told
from benchmarks.runs.training import train_all
from benchmarks.sentiment.data import MODALITIES, SentimentData, load_file, synthetic
from benchmarks.sentiment.report import Report, write_report
from benchmarks.sentiment.training import PRESETS, Config, Training

__all__ = ["main"]

PROG = "python -m benchmarks.sentiment"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return ranks.run(lambda: command.said(PROG, lambda: _main(arguments)))


def _main(arguments: list[str]) -> int:
    config, where, given = command.parse(arguments, PROG, __doc__ or "", PRESETS)
    if config.width % config.heads or config.width % 2:
        command.refuse(
            "--width",
            f"must be even and a multiple of --heads, got {config.width} with {config.heads} heads",
        )
    with command.blaming("--combinations"):
        sampler_of("sum", config.combinations, MODALITIES, 0)
    if finished(PROG, where.resume, given):
        return told(where.resume)
    packages = ["numpy", "scipy", "scikit-learn", "matplotlib"]
    session, config, data = begin(PROG, arguments, config, given, where, _load, packages)

    def work() -> str:
        train_all(
            session,
            config,
            lambda method, seed: Training(config, data, method, seed),
            samples=len(data.splits["train"]),
            unit="utterance",
            line=_line_of,
        )
        report = Report(data, **session.facts)
        return ranks.first(lambda: write_report(report, session.folder))

    return session.carry_out(work)


def _load(config: Config) -> SentimentData:
    if config.data is None:
        data = synthetic(config.max_frames)
    else:
        with command.blaming("--data"):
            data = load_file(Path(config.data), config.max_frames)
    for remark in data.remarks():
        print(remark, file=sys.stderr)
    return data


def _line_of(result: Mapping[str, Any]) -> str:
    return (
        f"{result['method']}, seed {result['seed']}: best epoch "
        f"{result['best_epoch']}, valid MAE {result['valid_mae']:.3f}, "
        f"test MAE {result['summary']['mae']:.3f} ({result['seconds']:.0f} s)"
    )


if __name__ == "__main__":
    sys.exit(main())
