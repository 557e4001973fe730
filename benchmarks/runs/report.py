"""What the reports of the benchmarks share: one flat table of scores, and all that is read from it.

A row of ``scores`` is the ``value`` of one ``metric`` of the training of a ``method`` and ``seed``,
from a ``combination`` of modalities; where the benchmark has them, of one ``case`` and ``region``.
"""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.runs import gradients, results
from benchmarks.runs.comparison import Comparison, compare_all, verdict
from benchmarks.runs.methods import ALL, MEASURES, definitions, measured_on

__all__ = [
    "Report",
    "cell",
    "differences",
    "filled",
    "number",
    "seed_means",
    "worst",
    "write_report",
]

NOTHING = "–"
ELSEWHERE = ("data", "methods", "seeds", "first_seed", "regions")  # no hyperparameters


# --- reading scores ------------------------------------------------------------------------------


def seed_means(scores: pd.DataFrame) -> pd.Series:
    """By method and seed: over cases and regions first, so that every combination counts alike."""
    keys = ["method", "seed"]
    by_combination = scores.groupby([*keys, "combination"], sort=False)["value"].mean()
    return by_combination.groupby(level=keys, sort=False).mean()


def differences(values: pd.Series, other: str = "sum") -> dict[str, list[float]]:
    """Of values by method and seed: each method but full less ``other``, seed by seed."""
    table = values.unstack("method")
    return {
        method: (table[method] - table[other]).dropna().tolist()
        for method in values.index.unique("method")
        if other in table and method not in ("full", other)
    }


def worst(scores: pd.DataFrame, lower: bool) -> str:
    """The combination with the worst mean; ``lower`` is better, or higher."""
    means = scores.groupby("combination", sort=False)["value"].mean()
    return str(means.idxmax() if lower else means.idxmin())


def cell(scores: pd.DataFrame, digits: int) -> str:
    """Of one method: ``mean ± sample std`` over seeds; with one seed over the cases, if any."""
    if scores.empty:
        return NOTHING
    means = seed_means(scores)
    if len(means) == 1 and "case" in scores:
        spread = scores.groupby("case")["value"].mean().std()
        return number(means.mean(), digits) + (f" ± {spread:.{digits}f}" if spread >= 0 else "")
    return results.format_spread(means.tolist(), digits)


def number(value: float, digits: int) -> str:
    """NaN is what there is no number for."""
    return NOTHING if math.isnan(value) else f"{value:.{digits}f}"


# --- reports -------------------------------------------------------------------------------------


class Report:
    """What the finished trainings found, ready to be written. Each benchmark has its own."""

    benchmark: str
    title: str
    levels: Sequence[str]  # of the nested result["test"]: columns of the scores
    primary: str  # the metric that methods are compared by
    lower: bool  # whether lower is better
    digits: int  # of a difference
    compared: str  # the primary metric in words: what it is over, in which unit
    factors: Mapping[str, float] = {}  # metric -> what it is multiplied by to be shown
    names: list[str]  # of the combinations, as the records number them
    generated: str  # in every title; empty: the data are real
    unit: str  # of the splits
    sizes: Mapping[str, int]  # of the splits
    remarks: Sequence[str]  # more sentences about the data
    selection: str  # a sentence: which epoch was tested
    content: Mapping[str, Any]  # what else the result file holds

    def __init__(
        self,
        data: Any,  # with source and digest
        *,
        config: Mapping[str, Any],  # with methods and epochs; written as it is
        command: str,
        environment: Mapping[str, str],
        done: Sequence[Mapping[str, Any]],  # {"result": ..., "records": ...} per training
    ) -> None:
        self.data, self.config, self.done = data, config, done
        self.command, self.environment = command, environment
        self.methods: list[str] = list(config["methods"])
        found = [one["result"] for one in done]
        self.seeds = sorted({result["seed"] for result in found})
        rows = [
            (result["method"], result["seed"], *row)
            for result in found
            for row in _flat(result["test"])
        ]
        self.scores = pd.DataFrame(rows, columns=["method", "seed", *self.levels, "value"])
        self.seen = gradients.diagnose_all(done, self.names)
        # What the Gramians were measured on.
        self.scope = ALL if config.get("scope") == "all" else "the shared parameters"

    def sections(self) -> list[tuple[str, str]]:
        """Headings and bodies of the tables of scores."""
        raise NotImplementedError

    def draw(self, folder: Path) -> None:
        """The pictures of the scores."""
        raise NotImplementedError

    def of(self, metric: str, method: str | None = None) -> pd.DataFrame:
        """The scores of a metric, of one method or of all, in the unit in which it is shown."""
        some = self.scores[self.scores["metric"] == metric]
        some = some if method is None else some[some["method"] == method]
        return some.assign(value=some["value"] * self.factors.get(metric, 1.0))

    @property
    def label(self) -> str:
        """For titles of pictures."""
        return self.generated or f"{Path(self.data.source).name} (SHA-256 {self.data.digest[:12]})"

    @property
    def over(self) -> str:
        """What means are over, for those titles."""
        seeds = len(self.seeds)
        return f"mean ± sample std over {seeds} seeds" if seeds > 1 else "1 seed"

    def compare(self) -> dict[str, Comparison]:
        """Each method against sum, by the primary metric, paired by seed."""
        return compare_all(differences(seed_means(self.of(self.primary))))

    def verdicts(self) -> list[str]:
        """A paragraph for each method that was compared."""
        if "sum" not in self.methods:
            return [filled("Nothing is compared: the method sum, the baseline, was left out.")]
        found = self.compare()
        how: dict[str, Any] = {"what": self.compared, "digits": self.digits, "lower": self.lower}
        said = [verdict(name, one, methods=len(found), **how) for name, one in found.items()]
        if said and len(self.seeds) > 1:
            said.append(
                f"Noise is what differs between seeds; that the {self.sizes['test']} test "
                f"{self.unit} are themselves a sample is not counted."
            )
        return [filled(one) for one in said]

    def provenance(self) -> str:
        sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
        hyperparameters = ", ".join(
            f"{name} {value}" for name, value in self.config.items() if name not in ELSEWHERE
        )
        versions = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        seconds = sum(one["result"]["seconds"] for one in self.done)
        lines = [
            f"Data: `{self.data.source}`{self._note}; SHA-256 `{self.data.digest}`; "
            f"{self.unit}: {sizes}.",
            *self.remarks,
            f"Command: `{self.command}`",
            f"Seeds: {', '.join(map(str, self.seeds))}. {self.selection}",
            f"Hyperparameters: {hyperparameters}.",
            f"Versions: {versions}.",
            f"Training took {seconds:.0f} s in all (information only: the machine may be shared).",
        ]
        return "".join(f"- {line}\n" for line in lines)

    @property
    def _note(self) -> str:
        return f" ({self.generated})" if self.generated else ""

    def as_markdown(self) -> str:
        """The verdict first, the words last."""
        sections = self.sections()
        if self.seen:
            where = f"Gradients on {measured_on(self.scope, self.seen)}, all training steps"
            sections.append((where, gradients.gradient_table(self.seen, self.names)))
        words = [*self.methods, *(MEASURES if self.seen else ())]
        sections.append(("Words", definitions(words, self.scope)))
        parts = [f"# {self.title}{self._note}\n", *self.verdicts(), self.provenance()]
        parts += [f"## {heading}{self._note}\n\n{body}" for heading, body in sections]
        return "\n".join(parts)

    def as_json(self) -> dict[str, Any]:
        """The result file; None stands for what has no number."""
        runs = []
        for one in self.done:
            result = dict(one["result"])
            if result["method"] in self.seen:
                seed = self.seeds.index(result["seed"])
                seen = {key: rows[seed] for key, rows in self.seen[result["method"]].items()}
                result["gradients"] = gradients.summarise_gradients(
                    seen, self.names, self.config["epochs"]
                )
            runs.append(result)
        compared = {method: asdict(found) for method, found in self.compare().items()}
        content: dict[str, Any] = {
            "benchmark": self.benchmark,
            "command": self.command,
            "config": self.config,
            "environment": self.environment,
            "selection": self.selection,
            **self.content,
            "comparisons": {"against": "sum", "metric": self.compared, **compared},
            "runs": runs,
        }
        return {key: _finite(value) for key, value in content.items()}


def write_report(report: Report, folder: Path) -> str:
    """Write everything, the result file last: a folder that has one is finished."""
    report.draw(folder)
    if report.seen:
        gradients.draw_gradients(
            folder, report.seen, report.names, report.label, report.over, report.scope
        )
    table = report.as_markdown()
    results.write_text(folder / results.SCORES, report.scores.to_csv(index=False))
    results.write_text(folder / results.TABLE, table)
    results.write_json(folder / results.RESULTS, report.as_json())
    return table


def filled(text: str) -> str:
    """A paragraph in lines of 100."""
    return textwrap.fill(text, 100) + "\n"


def _flat(content: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """(key, key below it, ..., value) of the leaves of nested mappings."""
    for key, value in content.items():
        for rest in _flat(value) if isinstance(value, Mapping) else [(value,)]:
            yield (key, *rest)


def _finite(content: Any) -> Any:
    """``content`` with None for NaN and infinities, which JSON has not."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
