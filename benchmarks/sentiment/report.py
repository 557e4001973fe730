"""What the sentiment benchmark reports: metrics, tables, pictures.

Everything is computed from what it is handed: scores and labels, the records of the merges, the
results of finished trainings. Nothing here trains, or knows the model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error

from benchmarks.runs import gradients, results
from benchmarks.runs.comparison import Comparison, compare_all
from benchmarks.runs.methods import MEASURES, definitions, measured_on
from benchmarks.runs.pictures import draw_combinations
from benchmarks.sentiment.data import MODALITIES, SentimentData
from gradsplit import modality_combinations

__all__ = [
    "COMBINATIONS",
    "METRICS",
    "NAMES",
    "Report",
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
SELECTION = (
    "Tested: the epoch with the lowest MAE on the validation split, mean over all combinations."
)
_NOTES = """\
Mean ± sample standard deviation over {seeds}. MMSA's definitions: MAE and Corr on the
unclipped score, Acc-7 on the score clipped to ±3 and rounded; "has 0": negative against
non-negative; "non 0": negative against positive, zero labels left out; F1 weighted by class.
Corr of a constant prediction is 0. Worst MAE: the combination with the highest. "train mean"
predicts the mean label of train, whatever it is given.
"""
_LACKING = """\
n: the test utterances that have all modalities of the combination; the rows are not over the same
utterances, and cannot be compared with each other. The train mean is over all {all}.
"""


# --- metrics -------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Report:
    """What the finished trainings found, ready to be written."""

    data: SentimentData
    config: Mapping[str, Any]  # with methods, seeds and epochs; written as it is
    command: str
    environment: Mapping[str, str]
    done: Sequence[Mapping[str, Any]]  # {"result": ..., "records": ...} per training
    constant: dict[str, float]
    seen: dict[str, dict[str, Array]]  # method -> gradients.diagnose(), stacked over seeds

    @classmethod
    def of(
        cls,
        data: SentimentData,
        *,
        config: Mapping[str, Any],
        command: str,
        environment: Mapping[str, str],
        done: Sequence[Mapping[str, Any]],
    ) -> "Report":
        train, test = data.splits["train"].labels, data.splits["test"].labels
        guess = np.full(len(test), float(train.double().mean()))
        constant = metrics(guess, test.double().numpy())
        seen = gradients.diagnose_all(done, NAMES)
        return cls(data, config, command, environment, done, constant, seen)

    @property
    def methods(self) -> Sequence[str]:
        methods: Sequence[str] = self.config["methods"]
        return methods

    @property
    def seeds(self) -> list[int]:
        return sorted({one["result"]["seed"] for one in self.done})

    @property
    def label(self) -> str:
        """For titles: says synthetic where it is."""
        if self.data.synthetic:
            return "SYNTHETIC data"
        return f"{Path(self.data.source).name} (SHA-256 {self.data.digest[:12]})"

    def runs(self, method: str) -> list[dict[str, Any]]:
        """Results of a method, by seed."""
        return [one["result"] for one in self.done if one["result"]["method"] == method]

    def scores(self, method: str, metric: str) -> Array:
        """(seeds, 7)."""
        return np.array(
            [[run["test"][name][metric] for name in NAMES] for run in self.runs(method)]
        )

    def as_json(self) -> dict[str, Any]:
        epochs = self.config["epochs"]
        runs = []
        for one in self.done:
            result = dict(one["result"])
            if result["method"] in self.seen:
                seed = self.seeds.index(result["seed"])
                seen = {key: rows[seed] for key, rows in self.seen[result["method"]].items()}
                result["gradients"] = gradients.summarise_gradients(seen, NAMES, epochs)
            runs.append(result)
        return {
            "benchmark": "sentiment",
            "command": self.command,
            "config": dict(self.config),
            "environment": dict(self.environment),
            "data": {
                "source": self.data.source,
                "synthetic": self.data.synthetic,
                "sha256": self.data.digest,
                "shapes": self.data.shapes(),
                "cleaning": self.data.cleaning,
                "remarks": self.data.remarks(),
            },
            "selection": SELECTION,
            "combinations": NAMES,
            "test_utterances": self.counts(),
            "constant_predictor": self.constant,
            "runs": runs,
            "comparisons": {
                "against": "sum",
                "metric": "MAE, mean over combinations",
                **{method: asdict(found) for method, found in self.compare().items()},
            },
        }

    def as_markdown(self) -> str:
        seeds = self.config["seeds"]
        note = " (SYNTHETIC data)" if self.data.synthetic else ""
        over = f"{seeds} seed{'s' if seeds > 1 else ''}"
        parts = [
            f"# Sentiment with missing modalities{note}\n",
            *(self.sentence(method, found) + "\n" for method, found in self.compare().items()),
            self._provenance(),
            f"## Test, mean over the {len(NAMES)} combinations of available modalities{note}\n",
            self._main_table(),
            _NOTES.format(seeds=over),
            f"## Test MAE per combination{note}\n",
            self._combination_table("mae"),
            *([] if self._complete() else [_LACKING.format(all=len(self.data.splits["test"]))]),
            f"## Test Acc-2 without zero labels, per combination{note}\n",
            self._combination_table("acc2_non0"),
        ]
        if self.seen:
            parts += [
                f"## Gradients on {measured_on('the shared parameters', self.seen)}, all training "
                f"steps{note}\n",
                gradients.gradient_table(self.seen, NAMES),
            ]
        words = [*self.methods, *(MEASURES if self.seen else ())]
        parts += [f"## Words{note}\n", definitions(words, "the shared parameters")]
        return "\n".join(parts)

    def _provenance(self) -> str:
        config, data = self.config, self.data
        sizes = ", ".join(f"{name} {len(split)}" for name, split in data.splits.items())
        source = "SYNTHETIC, generated" if data.synthetic else f"`{data.source}`"
        versions = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        hyperparameters = ", ".join(
            f"{name} {value}"
            for name, value in config.items()
            if name not in ("data", "methods", "seeds", "first_seed")
        )
        seconds = sum(one["result"]["seconds"] for one in self.done)
        lines = [
            f"Data: {source}; SHA-256 `{data.digest}`; utterances: {sizes}.",
            *data.remarks(),
            f"Command: `{self.command}`",
            f"Seeds: {', '.join(map(str, self.seeds))}. {SELECTION}",
            f"Hyperparameters: {hyperparameters}.",
            f"Versions: {versions}.",
            f"Training took {seconds:.0f} s in all (information only: the machine may be shared).",
        ]
        return "\n".join(f"- {line}" for line in lines) + "\n"

    def _main_table(self) -> str:
        columns = {**METRICS, "worst_mae": "Worst MAE"}
        rows = [["train mean", *(f"{self._constant(name):.3f}" for name in columns)]]
        for method in self.methods:
            summaries = [run["summary"] for run in self.runs(method)]
            cells = [results.format_spread([s[name] for s in summaries]) for name in columns]
            rows.append([method, *cells])
        return results.markdown_table(["method", *columns.values()], rows)

    def _constant(self, name: str) -> float:
        return self.constant["mae" if name == "worst_mae" else name]

    def _combination_table(self, metric: str) -> str:
        counted = not self._complete()
        rows = []
        for number, (name, count) in enumerate(self.counts().items()):
            columns = [self.scores(method, metric)[:, number] for method in self.methods]
            cells = [results.format_spread(column.tolist()) for column in columns]
            rows.append([name, *[str(count)] * counted, *cells])
        constant = [f"{self.constant[metric]:.3f}"] * len(self.methods)
        rows.append(["(train mean)", *[str(len(self.data.splits["test"]))] * counted, *constant])
        return results.markdown_table(["available", *["n"] * counted, *self.methods], rows)

    def counts(self) -> dict[str, int]:
        """By combination: the test utterances that have all of its modalities."""
        available = self.data.splits["test"].available
        return {
            name: int(available[:, [MODALITIES.index(one) for one in name.split("+")]].all(1).sum())
            for name in NAMES
        }

    def constants(self) -> dict[str, dict[str, float]]:
        """By combination: the scores of the train mean, over the same utterances as the models'."""
        test, guess = self.data.splits["test"], self.data.splits["train"].labels.double().mean()
        found = {}
        for name in NAMES:
            having = test.available[:, [MODALITIES.index(one) for one in name.split("+")]].all(1)
            labels = test.labels[having].double().numpy()
            found[name] = metrics(np.full(len(labels), float(guess)), labels)
        return found

    def _complete(self) -> bool:
        return min(self.counts().values()) == len(self.data.splits["test"])

    def _over(self) -> str:
        """What the scores are over, for sentences, where that is not the whole test split."""
        if self._complete():
            return ""
        least, most = min(self.counts().values()), max(self.counts().values())
        return (
            f" over the {least} to {most} of {len(self.data.splits['test'])} test utterances that "
            "have all modalities of a combination"
        )

    def compare(self) -> dict[str, Comparison]:
        """Mean MAE of each method but full, less that of sum, seed by seed; negative: better."""
        if "sum" not in self.methods:
            return {}
        maes = {
            method: [run["summary"]["mae"] for run in self.runs(method)] for method in self.methods
        }
        return compare_all(
            {
                method: [mae - of_sum for mae, of_sum in zip(values, maes["sum"], strict=True)]
                for method, values in maes.items()
                if method not in ("full", "sum")
            }
        )

    def sentence(self, method: str, found: Comparison) -> str:
        n = len(found.differences)
        start = f"{method} against sum, mean MAE{self._over()}: {found.mean:+.4f}"
        if found.interval is None:
            return f"{start} with one seed; that says nothing about noise: run more seeds."
        low, high = found.interval
        if found.shown:
            verdict = (
                f"{'better' if found.mean < 0 else 'worse'} beyond the noise between seeds; that "
                f"the {len(self.data.splits['test'])} test utterances are themselves a sample is "
                "not counted"
            )
        else:
            verdict = "within the noise between seeds, no difference is shown"
        return (
            f"{start} ± {found.std:.4f} (paired over {n} seeds, 95% t interval {low:+.4f} to "
            f"{high:+.4f}, p {found.p:.2g} after Holm's correction for {len(self.compare())} "
            f"methods): {verdict}."
        )


# --- pictures ------------------------------------------------------------------------------------


def write_report(report: Report, folder: Path) -> str:
    """Write everything, the result file last: a folder that has one is finished."""
    seeds = report.config["seeds"]
    over = f"mean ± sample std over {seeds} seeds" if seeds > 1 else "1 seed"
    panels = {"mae": "MAE (lower is better)", "acc2_non0": "Acc-2, non 0 (higher is better)"}
    draw_combinations(
        folder / "scores.png",
        f"Test scores by available modalities, {report.label}\n"
        f"({over}; right: mean over the combinations)",
        MODALITIES,
        np.array([[one in name.split("+") for one in MODALITIES] for name in NAMES]),
        {
            label: {method: report.scores(method, metric)[:, None] for method in report.methods}
            for metric, label in panels.items()
        },
        constant={
            label: np.array([one[metric] for one in report.constants().values()])
            for metric, label in panels.items()
        },
    )
    if report.seen:
        gradients.draw_gradients(folder, report.seen, NAMES, report.label, over)
    table = report.as_markdown()
    results.write_text(folder / results.TABLE, table)
    results.write_json(folder / results.RESULTS, report.as_json())
    return table
