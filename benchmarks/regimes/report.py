"""What the rows of the study say: comparisons, verdicts in sentences, tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from benchmarks.regimes.data import COMBINATIONS, PARTS
from benchmarks.regimes.training import FIRST
from benchmarks.runs.comparison import LEVEL, compare_all
from benchmarks.runs.results import format_spread, markdown_table

__all__ = ["comparisons", "opposed_of", "table", "verdicts"]

Row = Mapping[str, Any]
SAME = "not told apart"
VERDICTS = {"beats": "better than the sum:", "loses to": "worse:", SAME: "not told apart:"}

QUICK = "**A quick run: it shows that the program works, and nothing of the methods.**\n"
WORDS = f"""\
- score: mean over combinations of accuracy and R² (clipped to [0, 1]), in points of 100; with
  one task, accuracy alone. A combination is left, right or left+right, each tested by itself.
- gain: score of a method minus that of the sum with the same seed, initial weights and batches.
- [a, b]: 95 % t interval of the mean gain over seeds, for this comparison alone.
- beats, loses to: p < {LEVEL} in a paired t test, after Holm's correction over all comparisons of
  the part. Not told apart: neither; that is no proof of equality.
- sum: the mean of the losses' gradients. gmd, pcgrad: conflicts removed by the library's rules on
  the parameters that every loss reaches, the plain mean elsewhere. gmd-all: on all parameters.
- balance: constant weights from the gradient norms of the first 20 steps, as LossBalance gives
  them (on the shared parameters; with gmd-all, on all); those 20 steps have weights of 1.
- balance-first: the same, measured on the first 20 batches before the first step.
- standardised target: the sum, with the ink divided by its standard deviation in train.
- unit: what the ink (grey levels, standard deviation about 34) is divided by: 1 is raw.
- weight: what the loss of right, whose labels are the digit + 1 modulo 10, is multiplied by.
- opposed: share of losses that a step along the sum raises to first order. Conflicts: share of
  pairs of losses with a negative inner product. Dominance: largest |cos| ||g_j|| / ||g_k|| of a
  step, geometric mean over steps. All three: on the shared parameters, in the runs of the sum.
"""

RULES = """\
Selection: the learning rate of each setting and method has the best validation score, mean over
tuning seeds that are not reported, on a grid of half decades that is extended until the best is
not at its end; of each training, the checkpoint with the best validation score is tested.
Contradiction: each combination is scored against the labels of its own loss, so a method must
serve the loss of right too; whom it ruins is in the table by combination.
Missing: each half of a training or validation image is missing at random (left 80 %, right 20 %),
drawn again where neither is left: in the end left is missing in 76 %, right in 5 %, and 19 % are
complete; a loss is over the images of the batch that have its combination, a batch has at least
one that is complete, test images all are.
"""

PROOF = """\
valley.png: L_A = s/2 (u - 1)², L_B = (u + v)²/2, steps along half the sum, from (0, 0); B is solved
and the best point for both is (1, -1).

1. Sum: u reaches 1 in a time of order 1/s while v hardly moves: B rises to 1/2. From there
   u + v returns to 0 at rate 1/2, s times slower.
2. gmd: where u + v > 0 and u < 1 the two conflict. A's row without its component along B's is
   s (u - 1) / 2 (1, -1), which leaves u + v as it is; B's without that along A's is (0, u + v).
3. So u + v only shrinks after the one step that leaves 0, while 1 - u shrinks at rate s/4: A is
   solved in a time of order 1/s, and B stays so.

On a line, L_A = s/2 (u - 1)², L_B = (u + 1)²/2: between -1 and 1 each row is all along the other,
both vanish, and gmd stays where it is; the sum goes to (s - 1) / (s + 1).
"""


# --- comparisons ---------------------------------------------------------------------------------


def by_setting(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """(part, setting) -> method -> rows, in the order of the rows."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        methods = found.setdefault((row["part"], row["setting"]), {})
        methods.setdefault(row["method"], []).append(row)
    return found


def comparisons(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every method against the sum, by setting; p values are corrected over a part."""
    found: list[dict[str, Any]] = []
    settings = by_setting(rows)
    for part in dict.fromkeys(part for part, _ in settings):
        differences = {}
        for setting, methods in ((name, m) for (of, name), m in settings.items() if of == part):
            sums = {row["seed"]: row["score"] for row in methods["sum"]}
            for method, own in methods.items():
                if method != "sum":
                    where = setting, method, own[0]["optimizer"]
                    differences[where] = [row["score"] - sums[row["seed"]] for row in own]
        for (setting, method, optimizer), one in compare_all(differences).items():
            better = "beats" if one.mean > 0 else "loses to"
            found.append(
                {
                    "part": part,
                    "setting": setting,
                    "method": method,
                    "optimizer": optimizer,
                    **asdict(one),
                    "verdict": better if one.shown else SAME,
                }
            )
    return found


def opposed_of(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """By (part, setting): the opposed rate of the sum's runs, over all steps and seeds."""
    return {
        where: math.fsum(row["opposed_all"] for row in methods["sum"]) / len(methods["sum"])
        for where, methods in by_setting(rows).items()
    }


# --- sentences -----------------------------------------------------------------------------------


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What the numbers say, a Markdown list item each."""
    found = comparisons(rows)
    lines = []
    for part in dict.fromkeys(one["part"] for one in found):
        some = [one for one in found if one["part"] == part]
        count = len({one["setting"] for one in some})
        lines.append(f"- **{part}** ({PARTS[part]}; {count} settings).")
        lines += [
            f"  - {setting}: {_sentence([one for one in some if one['setting'] == setting])}."
            for setting in dict.fromkeys(one["setting"] for one in some)
        ]
    return [*_tallies(found), *lines, *_speed(found), *_relation(found, opposed_of(rows))]


def _tallies(found: Sequence[Row]) -> list[str]:
    """One line per method: in how many settings it beats the sum, in how many it loses."""
    lines = []
    for method in dict.fromkeys(one["method"] for one in found):
        own = [one for one in found if one["method"] == method]
        wins, losses = (
            sum(one["verdict"] == verdict for one in own) for verdict in ("beats", "loses to")
        )
        mean = math.fsum(one["mean"] for one in own) / len(own)
        lines.append(
            f"- **{method}** beats the sum in {wins} of {len(own)} settings and loses to it in "
            f"{losses}; mean gain {mean:+.1f} points."
        )
    return lines


def _sentence(found: Sequence[Row]) -> str:
    said = []
    for verdict, word in VERDICTS.items():
        some = [one for one in found if one["verdict"] == verdict]
        if len(some) == len(found) > 1 and verdict == SAME:
            return "no method is told apart from the sum"
        told = (f"{one['method']} {_gain(one)}" for one in some)
        said += [f"{word} {', '.join(told)}"] if some else []
    return "; ".join(said)


def _gain(one: Row) -> str:
    if one["interval"] is None:
        return f"{one['mean']:+.1f}"
    low, high = one["interval"]
    return f"{one['mean']:+.1f} [{low:+.1f}, {high:+.1f}]"


def _speed(found: Sequence[Row]) -> list[str]:
    """Whether what is gained in the raw unit is still there after five times as many steps."""
    short = {(one["setting"], one["method"]): one for one in found if one["part"] == "units"}
    lines = []
    for late in (one for one in found if one["part"] == "long"):
        early = short.get((late["setting"], late["method"]))
        if early is not None and early["verdict"] == "beats":
            still = "still beats" if late["verdict"] == "beats" else late["verdict"]
            lines.append(
                f"- Only speed? {late['setting']}, {late['method']}: {_gain(early)}; with five "
                f"times as many steps {_gain(late)} ({still})."
            )
    return lines


def _relation(found: Sequence[Row], opposed: Mapping[tuple[str, str], float]) -> list[str]:
    """Rank correlation, over settings, of a method's gain with the opposed rate of the sum."""
    said = []
    for method in dict.fromkeys(one["method"] for one in found):
        own = [one for one in found if one["method"] == method]
        rates = [opposed[one["part"], one["setting"]] for one in own]
        gains = [one["mean"] for one in own]
        if len(own) > 3 and min(len(set(rates)), len(set(gains))) > 1:
            said.append(f"{method} {float(spearmanr(rates, gains).statistic):+.2f}")
    start = "- Rank correlation over settings of the gain with the opposed rate of the sum's runs"
    return [f"{start}: {', '.join(said)}."] if said else []


# --- tables --------------------------------------------------------------------------------------


def table(content: Mapping[str, Any]) -> str:
    """The whole of table.md, from what results.json holds."""
    rows, data = content["rows"], content["data"]
    seeds = sorted({row["seed"] for row in rows})
    return "\n".join(
        [
            "# Where does removing conflict, or balancing, beat the plain sum?\n",
            *([QUICK] if content["config"]["preset"] == "quick" else []),
            *verdicts(rows),
            "\n## Words\n",
            WORDS,
            "## Scores on test and gains over the sum\n",
            f"Mean ± sample standard deviation over {len(seeds)} seeds from {seeds[0]} on.\n",
            _gains(rows, comparisons(rows)),
            "## Accuracy by combination, in points\n",
            _combinations(rows),
            "## What the gradients did in the runs of the sum\n",
            f"First: mean over the first {FIRST} steps.\n",
            _diagnoses(rows),
            "## How it was done\n",
            RULES,
            "## The smallest example\n",
            PROOF,
            f"Data: {data['source']}, {data['images']} images, SHA-256 {data['sha256']}.",
            f"Command: `{content['command']}`. "
            + ", ".join(f"{name} {version}" for name, version in content["environment"].items())
            + ".\n",
        ]
    )


def _gains(rows: Sequence[Row], found: Sequence[Row]) -> str:
    against = {(one["part"], one["setting"], one["method"]): one for one in found}
    lines = []
    for (part, setting), methods in by_setting(rows).items():
        for method, own in methods.items():
            one = against.get((part, setting, method))
            r2 = [row["r2"] for row in own if "r2" in row]
            lines.append(
                [
                    part,
                    setting,
                    method,
                    f"{own[0]['lr']:g}",
                    format_spread([row["score"] for row in own], 1),
                    format_spread([100 * row["accuracy"] for row in own], 1),
                    format_spread(r2, 3) if r2 else "-",
                    "-" if one is None else _gain(one),
                    "-" if one is None or one["p"] is None else f"{one['p']:.2g}",
                    "-" if one is None else one["verdict"],
                ]
            )
    header = ["part", "setting", "method", "lr", "score", "accuracy", "R²", "gain", "p (Holm)"]
    return markdown_table([*header, "verdict"], lines)


def _combinations(rows: Sequence[Row]) -> str:
    lines = [
        [
            *(part, setting, method),
            *(
                format_spread([100 * row[f"accuracy_{some}"] for row in own], 1)
                for some in COMBINATIONS
            ),
        ]
        for (part, setting), methods in by_setting(rows).items()
        if part in ("contradiction", "missing")
        for method, own in methods.items()
    ]
    return markdown_table(["part", "setting", "method", *COMBINATIONS], lines)


def _diagnoses(rows: Sequence[Row]) -> str:
    lines = []
    for (part, setting), methods in by_setting(rows).items():
        cells = []
        for kind in ("opposed", "conflicts", "dominance"):
            for when in ("first", "all"):
                values = np.array([row[f"{kind}_{when}"] for row in methods["sum"]])
                mean = np.exp(np.log(values).mean()) if kind == "dominance" else values.mean()
                cells.append(f"{mean:.1f}" if kind == "dominance" else f"{mean:.1%}")
        lines.append([part, setting, *cells])
    header = ["part", "setting"]
    for kind in ("opposed", "conflicts", "dominance"):
        header += [f"{kind}, first", f"{kind}, all"]
    return markdown_table(header, lines)
