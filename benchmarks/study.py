"""Writes the results of the study into benchmarks/STUDY.rst, below its plan.

    python -m benchmarks.study DIR [DIR ...]

DIR are result folders of the sentiment, BraTS and regimes benchmarks, in the order in which their
tables are to appear. Every difference to sum is paired by seed, and corrected by Holm over all
methods and measures of its folder. What stands between the two marks in STUDY.rst is replaced.
"""

import argparse
import csv
import io
import itertools
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import spearmanr

from benchmarks.runs.comparison import Comparison, compare_all
from benchmarks.runs.results import RESULTS, format_spread, write_text

__all__ = ["main"]

BINS = 0.02, 0.1  # of the opposed rate; chosen after the first run on digits
STUDY = Path(__file__).with_name("STUDY.rst")
MARKS = "\n.. results\n", "\n.. end of results\n"


class Measure(NamedTuple):
    """Of one setting, such as a unit; the values by method and seed, and how they are written."""

    setting: str
    name: str
    digits: int
    values: Mapping[str, Mapping[int, float]]  # method -> seed -> value


class Findings(NamedTuple):
    """What a result folder says."""

    title: str
    measures: list[Measure]
    remarks: list[str]
    opposed: dict[str, float]  # setting -> rate with sum, where each setting has one of its own


# --- reading -------------------------------------------------------------------------------------


def of_sentiment(content: Mapping[str, Any]) -> Findings:
    missing = content["config"]["missing"]
    rates = ", ".join(f"{name} {rate:.0%}" for name, rate in missing.items())
    title = f"Missing in training: {rates}" if rates else "All modalities in training"
    singles = [name for name in content["combinations"] if "+" not in name]

    def weakest(run: Mapping[str, Any]) -> float:
        return max(float(run["test"][name]["mae"]) for name in singles)

    measures = [
        _measure(content, "MAE, mean of 7", 4, lambda run: float(run["summary"]["mae"])),
        _measure(content, "MAE, worst of 7", 4, lambda run: float(run["summary"]["worst_mae"])),
        _measure(content, "MAE, weakest alone", 4, weakest),
    ]
    source = "synthetic data" if content["data"]["synthetic"] else "MOSI"
    return Findings(f"{source}. {title}", measures, [*_also(measures[:1]), _seen(content)], {})


def of_brats(content: Mapping[str, Any]) -> Findings:
    def dice(run: Mapping[str, Any]) -> float:
        cases = run["test"].values()
        found = [
            region["dice"] for case in cases for some in case.values() for region in some.values()
        ]
        return 100 * statistics.fmean(found)

    source = "Phantoms" if content["data"]["phantom"] else content["data"]["source"]
    return Findings(source, [_measure(content, "Dice, points", 2, dice)], [_seen(content)], {})


def of_regimes(content: Mapping[str, Any]) -> Findings:
    settings: dict[str, dict[str, dict[int, float]]] = {}
    opposed: dict[str, list[float]] = {}
    for row in content["rows"]:
        setting = f"{row['part']}: {row['setting']}"
        by_method = settings.setdefault(setting, {})
        by_method.setdefault(row["method"], {})[row["seed"]] = row["score"]
        if row["method"] == "sum":
            opposed.setdefault(setting, []).append(row["opposed_all"])
    measures = [Measure(setting, "score", 1, values) for setting, values in settings.items()]
    rates = {setting: statistics.fmean(values) for setting, values in opposed.items()}
    return Findings("Digits", measures, _also(measures), rates)


READERS = {"sentiment": of_sentiment, "brats": of_brats, "regimes": of_regimes}


def _measure(content: Mapping[str, Any], name: str, digits: int, value: Any) -> Measure:
    values: dict[str, dict[int, float]] = {}
    for run in content["runs"]:
        values.setdefault(run["method"], {})[run["seed"]] = value(run)
    return Measure("", name, digits, values)


def _seen(content: Mapping[str, Any]) -> str:
    """Conflicts, opposed and alignment of the trainings with sum and with gmd."""
    lines = []
    for method in ("sum", "gmd"):
        runs = [run["gradients"]["per_epoch"] for run in content["runs"] if run["method"] == method]
        if not runs:
            continue
        epochs = len(runs[0]["conflicts"])
        parts = []
        for key, name in (("conflicts", "pairs in conflict"), ("opposed", "losses opposed")):
            first, last = (
                statistics.fmean(value for run in runs if (value := run[key][epoch]) is not None)
                for epoch in (0, epochs - 1)
            )
            parts.append(f"{name} {first:.1%} in the first epoch, {last:.1%} in the last")
        aligned = [v for run in runs for v in run["alignment"] if v is not None]
        parts.append(f"alignment with the plain sum {statistics.fmean(aligned):.3f}")
        lines.append(f"In training with *{method}*: {'; '.join(parts)}.")
    return " ".join(lines)


def _also(measures: Sequence[Measure]) -> list[str]:
    """What else the plan asks: scopes, and both at once; corrected for all of ``measures``."""
    lines = []
    for method, other in (("gmd-all", "gmd"), ("balance+gmd-all", "balance")):
        differences = {}
        for measure in measures:
            ours, theirs = measure.values.get(method), measure.values.get(other)
            if ours is not None and theirs is not None:
                where = measure.setting or measure.name
                differences[where] = [ours[seed] - theirs[seed] for seed in ours]
        said = [
            f"{where} {_difference(found, measures[0].digits, bold=True)}"
            for where, found in compare_all(differences).items()
        ]
        lines += [f"*{method}* minus *{other}*: {'; '.join(said)}."] if said else []
    return lines


# --- writing -------------------------------------------------------------------------------------


def section(content: Mapping[str, Any]) -> str:
    """Provenance, table and remarks of one result folder."""
    found = READERS[content["benchmark"]](content)
    compared = compare_all(
        {
            (place, method): [values[seed] - measure.values["sum"][seed] for seed in values]
            for place, measure in enumerate(found.measures)
            for method, values in measure.values.items()
            if method not in ("full", "sum")
        }
    )
    methods = list(dict.fromkeys(method for _, method in compared))
    seeds = sorted({seed for m in found.measures for v in m.values.values() for seed in v})
    rows = [["", "sum", *methods]]
    for place, measure in enumerate(found.measures):
        name = measure.setting or measure.name
        row = [name, format_spread(list(measure.values["sum"].values()), measure.digits)]
        for method in methods:
            one = compared.get((place, method))
            row.append("" if one is None else _difference(one, measure.digits, bold=True))
        rows.append(row)
    versions = ", ".join(f"{name} {value}" for name, value in content["environment"].items())
    lines = [
        found.title,
        "~" * len(found.title),
        "",
        f"``{content['command']}``",
        "",
        f"Seeds {seeds[0]} to {seeds[-1]}; {versions}. "
        "*sum*: mean ± sample standard deviation; others: difference to it, [95 % interval]; "
        f"**bold**: shown, p below 0.05 after Holm's correction for {len(compared)} comparisons.",
        "",
        _csv_table(rows),
        *(remark + "\n" for remark in found.remarks),
        *_relation(found, compared),
    ]
    return "\n".join(lines)


def _difference(found: Comparison, digits: int, bold: bool = False) -> str:
    if found.interval is None:
        return f"{found.mean:+.{digits}f}"
    low, high = found.interval
    text = f"{found.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if bold and found.shown else text


def _relation(found: Findings, compared: Mapping[tuple[int, str], Comparison]) -> list[str]:
    """What the opposed rate of a setting says of what a method gains there."""
    if not found.opposed:
        return []
    ranked, counted = [], []
    for method in dict.fromkeys(method for _, method in compared):
        pairs = [
            (found.opposed[measure.setting], compared[place, method])
            for place, measure in enumerate(found.measures)
            if (place, method) in compared
        ]
        if len(pairs) > 3:
            rho = float(spearmanr([rate for rate, _ in pairs], [one.mean for _, one in pairs])[0])
            ranked += [] if math.isnan(rho) else [f"*{method}* {rho:+.2f}"]
        counts = []
        for low, high in itertools.pairwise((0.0, *BINS, math.inf)):
            inside = [one for rate, one in pairs if low <= rate < high]
            counts.append(f"{sum(one.shown and one.mean > 0 for one in inside)} of {len(inside)}")
        counted.append(f"*{method}* {', '.join(counts)}")
    rates = "; ".join(f"{setting} {rate:.1%}" for setting, rate in found.opposed.items())
    bins = f"below {BINS[0]:.0%}, from there to {BINS[1]:.0%}, and from there on"
    return [
        f"Share of losses that are opposed in training with *sum*: {rates}.\n",
        f"Settings in which a gain is shown, where that share is {bins}: {'; '.join(counted)}.\n",
        *([f"Spearman's correlation of gain and share: {', '.join(ranked)}.\n"] if ranked else []),
    ]


def _csv_table(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    body = "".join(f"   {line}\n" for line in text.getvalue().splitlines())
    return f".. csv-table::\n   :header-rows: 1\n\n{body}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the results; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument(
        "--into", type=Path, default=STUDY, metavar="FILE", help="(default: %(default)s)"
    )
    options = parser.parse_args(argv)
    sections = []
    for folder in options.folders:
        try:
            content = json.loads((folder / RESULTS).read_text("utf-8"))
        except OSError as error:
            parser.error(f"{folder}: {error.strerror}: no finished run ({RESULTS})")
        if content.get("benchmark") not in READERS:
            parser.error(f"{folder}: a result of none of {', '.join(READERS)}")
        sections.append(section(content))
    text = options.into.read_text("utf-8")
    before, start, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        parser.error(
            f"--into: {options.into} lacks the lines {' and '.join(map(str.strip, MARKS))}"
        )
    write_text(options.into, before + start + "\n" + "\n".join(sections) + end + after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
