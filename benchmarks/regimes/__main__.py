"""In which regime does removing gradient conflict, or balancing the losses, beat the plain sum?

    python -m benchmarks.regimes                        # a few minutes, no download
    python -m benchmarks.regimes --first-seed 5000      # the same with fresh seeds, tuning too
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

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tqdm import tqdm

from benchmarks.regimes.data import PARTS, Digits, settings
from benchmarks.regimes.pictures import draw_gain, draw_opposed, draw_valley
from benchmarks.regimes.report import comparisons, table
from benchmarks.regimes.training import study
from benchmarks.runs import command, results
from benchmarks.runs.command import Machine, Positive, Whole
from benchmarks.runs.session import Session, begin, finished, told

__all__ = ["main"]

PROG = "python -m benchmarks.regimes"
TUNING = 1000  # the tuning seeds begin so far above the reported ones


@dataclass(frozen=True, kw_only=True)
class Studied:
    """What is compared."""

    parts: Annotated[tuple[str, ...], command.list_of(list(PARTS), "part")] = tuple(PARTS)
    """comma-separated, of units, long, contradiction, missing"""
    seeds: Positive = 10
    """number of reported seeds"""
    first_seed: Whole = 0
    """the others follow it; tuning seeds begin 1000 above"""


@dataclass(frozen=True, kw_only=True)
class Config(Studied, Machine):
    """Everything that decides the numbers."""

    preset: Literal["study", "quick"] = "study"


STUDY = Config(threads=2)
PRESETS = {"study": STUDY, "quick": dataclasses.replace(STUDY, preset="quick", seeds=2)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return command.said(PROG, lambda: _main(arguments))


def _main(arguments: list[str]) -> int:
    command.alone()
    config, where, given = command.parse(arguments, PROG, __doc__ or "", PRESETS)
    if config.seeds > TUNING:
        command.refuse("--seeds", f"must be at most {TUNING}, where tuning seeds begin")
    if config.device != "cpu":
        command.refuse("--device", "its networks are too small for anything but a CPU")
    if finished(PROG, where.resume, given):
        return told(where.resume)
    packages = ["numpy", "scipy", "scikit-learn", "matplotlib"]
    session, config, digits = begin(PROG, arguments, config, given, where, _load, packages)
    return session.carry_out(lambda: _run(session, config, digits))


def _load(config: Config) -> Digits:
    return Digits.load()


def _run(session: Session, config: Config, digits: Digits) -> str:
    """Do the settings that are not done yet, keep each, and write the report."""
    quick = config.preset == "quick"
    first = config.first_seed + TUNING
    tuning = range(first, first + (2 if quick else 4))
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    plan = [setting for part in config.parts for setting in settings(part, quick)]
    done = session.done
    with tqdm(total=len(plan), initial=len(done), disable=not sys.stderr.isatty()) as progress:
        for setting in plan[len(done) :]:
            name = f"{setting.part}, {setting.name}"
            progress.set_description(name)
            if progress.disable:
                print(name, file=sys.stderr)
            rows, tuned = study(setting, tuning, seeds)
            done.append({"rows": rows, "tuning": tuned})
            session.save()
            progress.update()
    kept = session.kept
    content = {
        "benchmark": "regimes",
        **{name: kept[name] for name in ("command", "config", "environment")},
        "data": digits.provenance(),
        "rows": [row for one in done for row in one["rows"]],
        "tuning": [row for one in done for row in one["tuning"]],
    }
    return _report(session.folder, config, content)


def _report(folder: Path, config: Config, content: dict[str, Any]) -> str:
    rows = content["rows"]
    if "units" in config.parts:
        draw_gain(folder / "gain.png", rows)
    draw_opposed(folder / "opposed.png", rows)
    draw_valley(folder / "valley.png")
    text = table(content)
    results.write_text(folder / results.TABLE, text)
    results.write_json(folder / results.RESULTS, {**content, "comparisons": comparisons(rows)})
    return text


if __name__ == "__main__":
    sys.exit(main())
