"""In which regime does removing gradient conflict, or balancing the losses, beat the plain sum?

    python -m benchmarks.regimes                        # a few minutes, no download
    python -m benchmarks.regimes --seed0 5000           # the same with fresh seeds, tuning too
    python -m benchmarks.regimes --parts units,missing --seeds 20
    python -m benchmarks.regimes --resume results/regimes-2026-01-31

A small network sees the left half of a digit, the right half, or both, and learns from all three
which digit it is and how much ink it holds. The parts differ in what makes the losses unequal:

units          the scale of one target, from raw to standardised
long           raw, with five times as many steps: is the gain only speed?
contradiction  one loss has labels that contradict the others', and a weight
missing        one half is rare in training

Results go to results/regimes-DATE: results.json, table.md, gain.png (with the part units),
opposed.png, valley.png. Ctrl-C keeps the settings that are finished, and --resume does the rest.
"""

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.regimes.data import PARTS, Digits, settings
from benchmarks.regimes.pictures import draw_gain, draw_opposed, draw_valley
from benchmarks.regimes.report import comparisons, table
from benchmarks.regimes.training import study
from benchmarks.runs import results
from benchmarks.runs.command import positive_int, whole

__all__ = ["main"]

UNFINISHED = "unfinished.json"
TUNING = 1000  # the tuning seeds begin so far above the reported ones


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers, with the defaults."""

    seeds: int = 10
    seed0: int = 0
    parts: tuple[str, ...] = tuple(PARTS)
    threads: int = 2
    quick: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    if "resume" in options:
        folder: Path = options.pop("resume")
        if (folder / results.RESULTS).exists():
            print(f"{folder} is already finished:\n\n{(folder / results.TABLE).read_text('utf-8')}")
            return 0
        if options:
            parser.error(f"argument --resume: takes everything from {folder}; leave out the rest")
        results.remove_stale(folder)  # of a run that was killed while it wrote
        try:
            content = json.loads((folder / UNFINISHED).read_text("utf-8"))
        except (OSError, ValueError) as error:
            parser.error(f"argument --resume: {folder} holds no interrupted run: {error}")
        _same_environment(content)
    else:
        wanted = options.pop("out", Path("results") / f"regimes-{datetime.date.today()}")
        folder = results.new_folder(wanted, (results.RESULTS, UNFINISHED))
        if folder != wanted:
            print(f"{wanted} holds another run; writing to {folder}", file=sys.stderr)
        if "quick" in options:
            options = {"seeds": 2, **options}
        content = _new(
            Config(**options), shlex.join(["python", "-m", "benchmarks.regimes", *arguments])
        )
    try:
        _run(folder, content)
    except KeyboardInterrupt:
        again = shlex.join([sys.executable, "-m", "benchmarks.regimes", "--resume", str(folder)])
        print(f"\ninterrupted; to continue:\n  {again}", file=sys.stderr)
        return 130
    print((folder / results.TABLE).read_text("utf-8"))
    print(f"written to {folder}")
    return 0


def _new(config: Config, command: str) -> dict[str, Any]:
    return {
        "benchmark": "regimes",
        "command": command,
        "config": asdict(config),
        "environment": _versions(),
        "data": Digits.load().provenance(),
        "rows": [],
        "tuning": [],
    }


def _run(folder: Path, content: dict[str, Any]) -> None:
    """Do the settings that are not in ``content`` yet, keep each, and write the report."""
    config = Config(**content["config"])
    torch.set_num_threads(config.threads)  # sums depend on how they are split
    first = config.seed0 + TUNING
    tuning = range(first, first + (2 if config.quick else 4))
    seeds = range(config.seed0, config.seed0 + config.seeds)
    done = {(row["part"], row["setting"]) for row in content["rows"]}
    plan = [setting for part in config.parts for setting in settings(part, config.quick)]
    results.write_json(folder / UNFINISHED, content)
    with tqdm(total=len(plan), initial=len(done), disable=not sys.stderr.isatty()) as progress:
        for setting in plan:
            if (setting.part, setting.name) in done:
                continue
            progress.set_description(f"{setting.part}, {setting.name}")
            if progress.disable:
                print(f"{setting.part}, {setting.name}", file=sys.stderr)
            rows, tuned = study(setting, tuning, seeds)
            content["rows"] += rows
            content["tuning"] += tuned
            results.write_json(folder / UNFINISHED, content)
            progress.update()
    rows = content["rows"]
    if "units" in config.parts:
        draw_gain(folder / "gain.png", rows)
    draw_opposed(folder / "opposed.png", rows)
    draw_valley(folder / "valley.png")
    results.write_text(folder / results.TABLE, table(content))
    results.write_json(folder / results.RESULTS, {**content, "comparisons": comparisons(rows)})
    (folder / UNFINISHED).unlink()


def _versions() -> dict[str, str]:
    return results.environment(["numpy", "scipy", "scikit-learn", "matplotlib"])


def _same_environment(content: dict[str, Any]) -> None:
    for name, version in _versions().items():
        if content["environment"].get(name) != version:
            print(
                f"warning: the run began with {name} {content['environment'].get(name)}, this is "
                f"{version}: the numbers may differ from those of an uninterrupted run",
                file=sys.stderr,
            )


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"unknown part {name!r} (of {', '.join(PARTS)})")
    return names


def _few(text: str) -> int:
    number: int = positive_int(text)
    if number > TUNING:
        raise argparse.ArgumentTypeError(f"must be at most {TUNING}, where tuning seeds begin")
    return number


def _parser() -> argparse.ArgumentParser:
    default = Config()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.regimes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # absent unless given: --resume must tell
    )

    def add(name: str, kind: Callable[[str], Any], text: str, metavar: str) -> None:
        value = getattr(default, name[2:])
        value = ",".join(value) if isinstance(value, tuple) else value
        parser.add_argument(name, type=kind, help=f"{text} (default: {value})", metavar=metavar)

    add("--seeds", _few, "number of reported seeds", "N")
    add("--seed0", whole, f"the first of them; tuning seeds begin {TUNING} above", "N")
    add("--parts", _parts, "comma-separated", "LIST")
    add("--threads", positive_int, "torch threads", "N")
    parser.add_argument("--quick", action="store_true", help="few steps, 2 seeds")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="result folder (default: results/regimes-DATE)"
    )
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="continue the interrupted run in DIR"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
