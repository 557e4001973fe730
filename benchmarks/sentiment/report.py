"""What the sentiment benchmark reports: metrics, tables, pictures.

Nothing here trains, or knows the model.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error
from torch import Tensor

from benchmarks.runs import report as runs
from benchmarks.runs import results
from benchmarks.runs.pictures import draw_combinations
from benchmarks.runs.report import write_report
from benchmarks.sentiment.data import MODALITIES, SentimentData
from gradsplit import modality_combinations

__all__ = [
    "COMBINATIONS",
    "METRICS",
    "NAMES",
    "Report",
    "chances",
    "having",
    "metrics",
    "summarise",
    "write_report",
]

Array = npt.NDArray[np.float64]

COMBINATIONS = modality_combinations(MODALITIES)
NAMES = ["+".join(combination) for combination in COMBINATIONS]
METRICS = {
    "mae": "MAE",
    "corr": "Corr",
    "acc2_has0": "Acc-2 (has 0)",
    "f1_has0": "F1 (has 0)",
    "acc2_non0": "Acc-2 (non 0)",
    "f1_non0": "F1 (non 0)",
    "acc7": "Acc-7",
}
_NOTES = """\
Mean ± sample standard deviation over {seeds}. MMSA's definitions: MAE and Corr on the
unclipped score, Acc-7 on the score clipped to ±3 and rounded; "has 0": negative against
non-negative; "non 0": negative against positive, zero labels left out; F1 weighted by class.
Corr of a constant prediction is 0. Worst MAE: the combination with the highest. "train mean"
predicts the mean label of train, whatever it is given.
"""
RATES = tuple(n / 10 for n in range(8))
_RATES = """\
Each modality of a test utterance is missing with this rate, whatever the others are; an utterance
that would have none is drawn again, as in --missing. Nothing is drawn here: this is the expected
MAE, from the MAE per combination and how often each combination is what is left.
"""
_NO_RATES = """\
Not given: some test utterances lack modalities, so that the scores per combination are over
different utterances, and no mean of them says what these rates would do.
"""
_LACKING = """\
n: the test utterances that have all modalities of the combination; the rows are not over the same
utterances, and cannot be compared with each other. The train mean is over all {all}.
"""


# --- metrics -------------------------------------------------------------------------------------


def having(available: Tensor) -> Tensor:
    """(7, N): which samples have all modalities of a combination; of ``available`` (N, 3)."""
    places = [[MODALITIES.index(name) for name in combination] for combination in COMBINATIONS]
    return torch.stack([available[:, place].all(1) for place in places])


def metrics(predictions: Array, labels: Array) -> dict[str, float]:
    """MMSA's measures for scores in [-3, 3], both (N,); clipped for Acc-7 only, as there."""
    nonzero = labels != 0
    negative = {
        "has0": (labels >= 0, predictions >= 0),
        "non0": (labels[nonzero] > 0, predictions[nonzero] > 0),
    }
    found = {
        "mae": mean_absolute_error(labels, predictions),
        "corr": _pearson(predictions, labels),
        "acc7": accuracy_score(_seven(labels), _seven(predictions)),
    }
    for flavour, (truth, guess) in negative.items():
        found[f"acc2_{flavour}"] = accuracy_score(truth, guess)
        found[f"f1_{flavour}"] = f1_score(truth, guess, average="weighted", zero_division=0)
    return {name: float(found[name]) for name in METRICS}


def _seven(scores: Array) -> npt.NDArray[np.int64]:
    return np.round(scores.clip(-3, 3)).astype(np.int64)


def _pearson(predictions: Array, labels: Array) -> float:
    """0.0 where one of the two is constant: it follows nothing."""
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(predictions, labels)[0, 1])


def summarise(by_combination: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over the combinations, and the MAE of the worst one."""
    rows = list(by_combination.values())
    means = {name: math.fsum(row[name] for row in rows) / len(rows) for name in METRICS}
    return {**means, "worst_mae": max(row["mae"] for row in rows)}


# --- tables --------------------------------------------------------------------------------------


class Report(runs.Report):
    """What the finished trainings of the sentiment benchmark found."""

    benchmark = "sentiment"
    title = "Sentiment with missing modalities"
    levels = ("combination", "metric")
    primary, lower, digits, compared = "mae", True, 4, "mean MAE"
    names = NAMES
    unit = "utterances"
    selection = "Tested: the epoch with the lowest MAE on valid, mean over all combinations."

    def __init__(self, data: SentimentData, **more: Any) -> None:
        super().__init__(data, **more)
        self.generated = "SYNTHETIC data" if data.synthetic else ""
        self.sizes = {name: len(split) for name, split in data.splits.items()}
        self.remarks = data.remarks()
        test, mean = data.splits["test"], float(data.splits["train"].labels.double().mean())
        labels = test.labels.double().numpy()
        has = dict(zip(NAMES, having(test.available).numpy(), strict=True))
        self.counts = {name: int(rows.sum()) for name, rows in has.items()}
        # Of the mean label of train: of all, and over the same utterances as the models' scores.
        self.constant = metrics(np.full(len(test), mean), labels)
        self.constants = {
            name: metrics(np.full(rows.sum(), mean), labels[rows]) for name, rows in has.items()
        }
        least, most = min(self.counts.values()), max(self.counts.values())
        self.complete = least == len(test)
        if not self.complete:
            self.compared += (
                f" over the {least} to {most} of {len(test)} test utterances that have all "
                "modalities of a combination"
            )
        self.content = {
            "data": {
                "source": data.source,
                "synthetic": data.synthetic,
                "sha256": data.digest,
                "shapes": data.shapes(),
                "cleaning": data.cleaning,
                "remarks": self.remarks,
            },
            "combinations": NAMES,
            "test_utterances": self.counts,
            "constant_predictor": self.constant,
        }

    def by_combination(self, metric: str) -> pd.DataFrame:
        """A row per method and seed, a column per combination."""
        keys = ["method", "seed"]
        return self.of(metric).pivot(index=keys, columns="combination", values="value")[NAMES]

    def sections(self) -> list[tuple[str, str]]:
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        lacking = "" if self.complete else "\n" + _LACKING.format(all=self.sizes["test"])
        means = f"Test, mean over the {len(NAMES)} combinations of available modalities"
        mae, acc2 = map(self._combination_table, ("mae", "acc2_non0"))
        return [
            (means, self._main_table() + "\n" + _NOTES.format(seeds=seeds)),
            ("Test MAE per combination", mae + lacking),
            ("Test MAE by missing rate", self._rate_table()),
            ("Test Acc-2 without zero labels, per combination", acc2),
        ]

    def _main_table(self) -> str:
        rows = [["train mean", *(f"{self.constant[name]:.3f}" for name in (*METRICS, "mae"))]]
        columns = [self.by_combination(metric).mean(axis=1) for metric in METRICS]
        columns.append(self.by_combination("mae").max(axis=1))
        for method in self.methods:
            cells = [results.format_spread(column[method].tolist()) for column in columns]
            rows.append([method, *cells])
        return results.markdown_table(["method", *METRICS.values(), "Worst MAE"], rows)

    def _combination_table(self, metric: str) -> str:
        table = self.by_combination(metric)
        return self._by_method("available", metric, {name: table[name] for name in NAMES})

    def _by_method(self, what: str, metric: str, values: Mapping[str, pd.Series]) -> str:
        """A row for each of ``values`` (by method and seed), and one for the train mean."""
        n = 0 if self.complete else 1  # columns
        rows = []
        for name, found in values.items():
            cells = [results.format_spread(found[method].tolist()) for method in self.methods]
            rows.append([name, *[str(self.counts.get(name))] * n, *cells])
        constant = [f"{self.constant[metric]:.3f}"] * len(self.methods)
        rows.append(["(train mean)", *[str(self.sizes["test"])] * n, *constant])
        return results.markdown_table([what, *["n"] * n, *self.methods], rows)

    def _rate_table(self) -> str:
        if not self.complete:
            return _NO_RATES
        rates = {f"{rate:.0%}": dict.fromkeys(MODALITIES, rate) for rate in RATES}
        if given := self.config.get("missing"):
            rates[", ".join(f"{name} {rate:.0%}" for name, rate in given.items())] = given
        table = self.by_combination("mae")
        values = {name: table @ pd.Series(chances(some)) for name, some in rates.items()}
        return self._by_method("missing", "mae", values) + "\n" + _RATES

    def draw(self, folder: Path) -> None:
        panels = {"mae": "MAE (lower is better)", "acc2_non0": "Acc-2, non 0 (higher is better)"}
        draw_combinations(
            folder / "scores.png",
            f"Test scores by available modalities, {self.label}\n"
            f"({self.over}; right: mean over the combinations)",
            MODALITIES,
            np.array([[one in some for one in MODALITIES] for some in COMBINATIONS]),
            {
                label: {
                    method: self.by_combination(metric).loc[method].to_numpy()[:, None]
                    for method in self.methods
                }
                for metric, label in panels.items()
            },
            constant={
                label: np.array([one[metric] for one in self.constants.values()])
                for metric, label in panels.items()
            },
        )


def chances(rates: Mapping[str, float]) -> dict[str, float]:
    """How often each combination is what is left where each modality is missing with its rate.

    Independently of the others; what would have none is drawn again.
    """
    left = {
        name: math.prod(
            1 - rates.get(one, 0.0) if one in some else rates.get(one, 0.0) for one in MODALITIES
        )
        for name, some in zip(NAMES, COMBINATIONS, strict=True)
    }
    return {name: chance / math.fsum(left.values()) for name, chance in left.items()}
