"""Writes the results of the study into benchmarks/STUDY.rst, below its plan.

    python -m benchmarks.study DIR [DIR ...]

DIR are result folders of the sentiment, BraTS and regimes benchmarks, in the order in which their
tables are to appear. Every difference to sum is paired by seed, and corrected by Holm over all
methods and measures of its folder. What stands between the two marks in STUDY.rst is replaced.
"""

import argparse
import csv
import itertools
import json
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from scipy.stats import spearmanr

from benchmarks.runs.comparison import Comparison, compare_all
from benchmarks.runs.report import differences, seed_means
from benchmarks.runs.results import RESULTS, SCORES, format_spread, write_text

__all__ = ["main"]

BINS = 0.02, 0.1  # of the opposed rate; chosen after the first run on digits
STUDY = Path(__file__).with_name("STUDY.rst")
MARKS = "\n.. results\n", "\n.. end of results\n"


class Measure(NamedTuple):
    """Of one setting, such as a unit; the values by method and seed, and how they are written."""

    setting: str
    name: str
    digits: int
    values: pd.Series  # by method and seed


class Findings(NamedTuple):
    """What a result folder says."""

    title: str
    measures: list[Measure]
    remarks: list[str]
    opposed: dict[str, float]  # setting -> rate with sum, where each setting has one of its own


# --- reading -------------------------------------------------------------------------------------


def of_sentiment(content: Mapping[str, Any], scores: pd.DataFrame) -> Findings:
    rates = ", ".join(f"{name} {rate:.0%}" for name, rate in content["config"]["missing"].items())
    source = "synthetic data" if content["data"]["synthetic"] else "MOSI"
    title = f"Missing in training: {rates}" if rates else "All modalities in training"
    mae = scores[scores["metric"] == "mae"]
    alone = mae[~mae["combination"].str.contains("+", regex=False)]
    measures = [
        Measure("", "MAE, mean of 7", 4, seed_means(mae)),
        Measure("", "MAE, worst of 7", 4, _by_training(mae).max()),
        Measure("", "MAE, weakest alone", 4, _by_training(alone).max()),
    ]
    return Findings(f"{source}. {title}", measures, [*_also(measures[:1]), _seen(content)], {})


def of_brats(content: Mapping[str, Any], scores: pd.DataFrame) -> Findings:
    source = "Phantoms" if content["data"]["phantom"] else content["data"]["source"]
    dice = 100 * seed_means(scores[scores["metric"] == "dice"])
    return Findings(source, [Measure("", "Dice, points", 2, dice)], [_seen(content)], {})


def of_regimes(content: Mapping[str, Any], scores: pd.DataFrame) -> Findings:
    rows = scores.assign(setting=scores["part"] + ": " + scores["setting"])
    settings = rows.groupby("setting", sort=False)
    measures = [
        Measure(str(name), "score", 1, _by_training(some.rename(columns={"score": "value"})).mean())
        for name, some in settings
    ]
    opposed = rows[rows["method"] == "sum"].groupby("setting", sort=False)["opposed_all"].mean()
    return Findings("Digits", measures, _also(measures), opposed.to_dict())


READERS = {"sentiment": of_sentiment, "brats": of_brats, "regimes": of_regimes}


def _by_training(scores: pd.DataFrame) -> Any:
    return scores.groupby(["method", "seed"], sort=False)["value"]


def _seen(content: Mapping[str, Any]) -> str:
    """Conflicts, opposed and alignment of the trainings with sum and with gmd."""
    lines = []
    for method in ("sum", "gmd"):
        runs = [
            run["gradients"]["per_epoch"]
            for run in content["runs"]
            if run["method"] == method and "gradients" in run
        ]
        if not runs:
            continue
        mean = {  # by epoch; None, an epoch without a number, is left out
            key: pd.DataFrame([run[key] for run in runs], dtype=float).mean()
            for key in ("conflicts", "opposed", "alignment")
        }
        parts = [
            f"{name} {mean[key].iloc[0]:.1%} in the first epoch, {mean[key].iloc[-1]:.1%} in the "
            "last"
            for key, name in (("conflicts", "pairs in conflict"), ("opposed", "losses opposed"))
        ]
        parts.append(f"alignment with the plain sum {mean['alignment'].mean():.3f}")
        lines.append(f"In training with *{method}*: {'; '.join(parts)}.")
    return " ".join(lines)


def _also(measures: Sequence[Measure]) -> list[str]:
    """What else the plan asks: scopes, and both at once; corrected for all of ``measures``."""
    lines = []
    for method, other in (("gmd-all", "gmd"), ("balance+gmd-all", "balance")):
        compared = compare_all(
            {
                measure.setting or measure.name: found[method]
                for measure in measures
                if method in (found := differences(measure.values, other))
            }
        )
        said = [
            f"{where} {_difference(one, measures[0].digits)}" for where, one in compared.items()
        ]
        lines += [f"*{method}* minus *{other}*: {'; '.join(said)}."] if said else []
    return lines


# --- writing -------------------------------------------------------------------------------------


def section(content: Mapping[str, Any], scores: pd.DataFrame) -> str:
    """Provenance, table and remarks of one result folder."""
    found = READERS[content["benchmark"]](content, scores)
    compared = compare_all(
        {
            (place, method): values
            for place, measure in enumerate(found.measures)
            for method, values in differences(measure.values).items()
        }
    )
    methods = list(dict.fromkeys(method for _, method in compared))
    rows = [["", "sum", *methods]]
    for place, measure in enumerate(found.measures):
        of_sum = format_spread(measure.values["sum"].tolist(), measure.digits)
        others = [
            _difference(compared[place, method], measure.digits)
            if (place, method) in compared
            else ""
            for method in methods
        ]
        rows.append([measure.setting or measure.name, of_sum, *others])
    versions = ", ".join(f"{name} {value}" for name, value in content["environment"].items())
    seeds = scores["seed"]
    lines = [
        found.title,
        "~" * len(found.title),
        "",
        f"``{content['command']}``",
        "",
        f"Seeds {seeds.min()} to {seeds.max()}; {versions}. "
        "*sum*: mean ± sample standard deviation; others: difference to it, [95 % interval]; "
        f"**bold**: shown, p below 0.05 after Holm's correction for {len(compared)} comparisons.",
        "",
        _csv_table(rows),
        *(remark + "\n" for remark in found.remarks),
        *_relation(found, compared),
    ]
    return "\n".join(lines)


def _difference(found: Comparison, digits: int) -> str:
    """In bold where it is shown."""
    if found.interval is None:
        return f"{found.mean:+.{digits}f}"
    low, high = found.interval
    text = f"{found.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if found.shown else text


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
    text: str = pd.DataFrame(rows).to_csv(index=False, header=False, quoting=csv.QUOTE_ALL)
    return ".. csv-table::\n   :header-rows: 1\n\n" + textwrap.indent(text, "   ")


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
            if content.get("benchmark") not in READERS:
                parser.error(f"{folder}: a result of none of {', '.join(READERS)}")
            rows = content.get("rows")  # of regimes
            scores = pd.read_csv(folder / SCORES) if rows is None else pd.DataFrame(rows)
        except OSError as error:
            parser.error(f"{error.filename}: {error.strerror}: no finished run")
        sections.append(section(content, scores))
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
