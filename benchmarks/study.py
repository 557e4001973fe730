"""Writes the results of the study into benchmarks/STUDY.rst, below its plan.

    python -m benchmarks.study DIR [DIR ...]

DIR are result folders of the sentiment, BraTS and regimes benchmarks, in the order in which their
tables are to appear. Every difference to sum is paired by seed, and corrected by Holm over all
methods and measures of its folder. What stands between the two marks in STUDY.rst is replaced.
"""

import argparse
import csv
import json
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.runs.comparison import Comparison, compare_all
from benchmarks.runs.report import differences, seed_means
from benchmarks.runs.results import RESULTS, SCORES, format_spread, write_text

__all__ = ["main"]

BINS = 0.02, 0.1  # of the opposed rate; chosen after the first run on digits
STUDY = Path(__file__).with_name("STUDY.rst")
MARKS = "\n.. results\n", "\n.. end of results\n"


class Findings(NamedTuple):
    """What a result folder says."""

    title: str
    measures: dict[str, pd.Series]  # by method and seed
    digits: int  # of their values
    remarks: list[str]
    opposed: dict[str, float]  # by measure: the rate with sum, where each has one of its own


# --- reading -------------------------------------------------------------------------------------


def of_sentiment(content: Mapping[str, Any], scores: pd.DataFrame) -> Findings:
    rates = ", ".join(f"{name} {rate:.0%}" for name, rate in content["config"]["missing"].items())
    source = (
        "synthetic data" if content["data"]["synthetic"] else Path(content["data"]["source"]).name
    )
    title = f"Missing in training: {rates}" if rates else "All modalities in training"
    mae = scores[scores["metric"] == "mae"]
    alone = mae[~mae["combination"].str.contains("+", regex=False)]
    means = {"MAE, mean of 7": seed_means(mae)}
    measures = {
        **means,
        "MAE, worst of 7": _by_training(mae)["value"].max(),
        "MAE, weakest alone": _by_training(alone)["value"].max(),
    }
    remarks = [*_also(means, 4), *_seen(content)]
    return Findings(f"{source}. {title}", measures, 4, remarks, {})


def of_brats(content: Mapping[str, Any], scores: pd.DataFrame) -> Findings:
    source = "Phantoms" if content["data"]["phantom"] else content["data"]["source"]
    dice = 100 * seed_means(scores[scores["metric"] == "dice"])
    return Findings(source, {"Dice, points": dice}, 2, _seen(content), {})


def of_regimes(content: Mapping[str, Any], scores: pd.DataFrame) -> Findings:
    settings = scores.groupby(scores["part"] + ": " + scores["setting"], sort=False)
    measures = {name: _by_training(some)["score"].mean() for name, some in settings}
    opposed = {
        name: some.loc[some["method"] == "sum", "opposed_all"].mean() for name, some in settings
    }
    return Findings("Digits", measures, 1, _also(measures, 1), opposed)


READERS = {"sentiment": of_sentiment, "brats": of_brats, "regimes": of_regimes}


def _by_training(scores: pd.DataFrame) -> Any:
    return scores.groupby(["method", "seed"], sort=False)


def _seen(content: Mapping[str, Any]) -> list[str]:
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
        conflicts, opposed, aligned = (  # by epoch; None, an epoch without a number, is left out
            pd.DataFrame([run[key] for run in runs], dtype=float).mean().tolist()
            for key in ("conflicts", "opposed", "alignment")
        )
        lines.append(
            f"In training with *{method}*: pairs in conflict {conflicts[0]:.1%} in the first "
            f"epoch, {conflicts[-1]:.1%} in the last; losses opposed {opposed[0]:.1%} in the first "
            f"epoch, {opposed[-1]:.1%} in the last; alignment with the plain sum "
            f"{pd.Series(aligned).mean():.3f}."
        )
    return [" ".join(lines)]


def _also(measures: Mapping[str, pd.Series], digits: int) -> list[str]:
    """What else the plan asks: scopes, and both at once; corrected for all of ``measures``."""
    lines = []
    for method, other in (("gmd-all", "gmd"), ("balance+gmd-all", "balance")):
        found = {name: differences(values, other) for name, values in measures.items()}
        compared = compare_all({name: d[method] for name, d in found.items() if method in d})
        said = [f"{name} {_difference(one, digits)}" for name, one in compared.items()]
        lines += [f"*{method}* minus *{other}*: {'; '.join(said)}."] if said else []
    return lines


# --- writing -------------------------------------------------------------------------------------


def section(content: Mapping[str, Any], scores: pd.DataFrame) -> str:
    """Provenance, table and remarks of one result folder."""
    found = READERS[content["benchmark"]](content, scores)
    compared = compare_all(
        {
            (name, method): of_seeds
            for name, values in found.measures.items()
            for method, of_seeds in differences(values).items()
        }
    )
    methods = list(dict.fromkeys(method for _, method in compared))
    rows = [["", "sum", *methods]]
    for name, values in found.measures.items():
        of_sum = format_spread(values["sum"].tolist(), found.digits)
        others = (compared.get((name, method)) for method in methods)
        cells = ("" if one is None else _difference(one, found.digits) for one in others)
        rows.append([name, of_sum, *cells])
    versions = ", ".join(f"{name} {value}" for name, value in content["environment"].items())
    lines = [
        found.title,
        "~" * len(found.title),
        "",
        f"``{content['command']}``",
        "",
        f"Seeds {scores['seed'].min()} to {scores['seed'].max()}; {versions}. "
        "*sum*: mean ± sample standard deviation; others: difference to it, [95 % interval]; "
        f"**bold**: shown, p below 0.05 after Holm's correction for {len(compared)} comparisons.",
        "",
        _csv_table(rows),
        *(remark + "\n" for remark in found.remarks),
        *(_relation(found.opposed, compared) if found.opposed else ()),
    ]
    return "\n".join(lines)


def _difference(found: Comparison, digits: int) -> str:
    """In bold where it is shown."""
    if found.interval is None:
        return f"{found.mean:+.{digits}f}"
    low, high = found.interval
    text = f"{found.mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"**{text}**" if found.shown else text


def _relation(
    opposed: Mapping[str, float], compared: Mapping[tuple[str, str], Comparison]
) -> list[str]:
    """What the opposed rate of a setting says of what a method gains there."""
    table = pd.DataFrame(
        [(m, opposed[name], one.mean, one.shown and one.mean > 0)
         for (name, m), one in compared.items()],
        columns=["method", "rate", "gain", "shown"],
    )  # fmt: skip
    table["bin"] = pd.cut(table["rate"], [0.0, *BINS, math.inf], right=False)
    ranked, counted = [], []
    for method, own in table.groupby("method", sort=False):
        rho = own["rate"].corr(own["gain"], method="spearman", min_periods=4)
        ranked += [] if math.isnan(rho) else [f"*{method}* {rho:+.2f}"]
        shown = own.groupby("bin", observed=False)["shown"]
        counts = (f"{won.sum()} of {len(won)}" for _, won in shown)
        counted.append(f"*{method}* {', '.join(counts)}")
    rates = "; ".join(f"{setting} {rate:.1%}" for setting, rate in opposed.items())
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
