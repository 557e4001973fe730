"""What the BraTS benchmark reports: tables and pictures.

Everything is computed from what it is handed: the scores of :mod:`benchmarks.brats.metrics`, the
records of the merges, a slice of one case. Nothing here trains, or knows the model.
"""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from benchmarks.brats.cases import MODALITIES, BratsData
from benchmarks.brats.metrics import METRICS
from benchmarks.brats.pictures import draw_cases
from benchmarks.runs import gradients, results
from benchmarks.runs.comparison import Comparison, compare_all
from benchmarks.runs.methods import ALL, MEASURES, definitions, measured_on
from benchmarks.runs.pictures import draw_combinations
from gradsplit import modality_combinations

__all__ = ["Report", "write_report"]

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

DISPLAYED = {"t1": "T1", "t1ce": "T1ce", "t2": "T2", "flair": "FLAIR"}
FILLED, EMPTY, NOTHING = "●", "○", "–"

_NOTES = """\
● available, ○ missing. {spread} Every score is of the whole volume of one case, which is one scan
of one patient, at its own resolution; then averaged over the {cases}. "mean": over
{averaged}. "worst": the combination with the worst mean, and which it is.
"""
_DICE_NOTES = """\
A voxel is predicted where the probability is above 0.5; then the regions are those of the labels
that --predict writes: a voxel of a smaller region is one of the larger ones that hold it, too, and
where regions overlap otherwise, of one of them. Dice is 100 where prediction and ground
truth are both empty, and 0 where only one of them is.
"""
_HD95_NOTES = """\
The larger of the two directed 95th percentiles of the distances between the surfaces (MONAI), in
mm. 0 where prediction and ground truth are both empty; where only one of them is, the diagonal of
the volume (373.13 mm in BraTS, as in the challenge).
"""
_SOFT_NOTES = """\
Not to be compared with the first table. This is what GMD's released code logs: (2 Σpt + 1) /
(Σp + Σt + 1) with probabilities p that are not thresholded and labels t. There it pools all cases
of a batch (one case in its script) and sees the central 192 x 192 x 128 voxels only; here it is
per case, over the whole volume.
"""


# --- tables --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """What the finished trainings found, ready to be written."""

    data: BratsData
    splits: Mapping[str, Sequence[str]]  # names of cases
    config: Mapping[str, Any]  # with methods, epochs and scope; written as it is
    command: str
    environment: Mapping[str, str]
    selection: str  # a sentence: which epoch was tested
    done: Sequence[Mapping[str, Any]]  # {"result": ..., "records": ..., "slices": ...} per training
    seen: dict[str, dict[str, Array]]  # method -> gradients.diagnose(), stacked over seeds

    @classmethod
    def of(
        cls,
        data: BratsData,
        *,
        splits: Mapping[str, Sequence[str]],
        config: Mapping[str, Any],
        command: str,
        environment: Mapping[str, str],
        selection: str,
        done: Sequence[Mapping[str, Any]],
    ) -> "Report":
        names = _names(config)
        seen = gradients.diagnose_all(done, names)
        return cls(data, splits, config, command, environment, selection, done, seen)

    @property
    def modalities(self) -> Sequence[str]:
        return _modalities(self.config)

    @property
    def names(self) -> list[str]:
        """Of the combinations, as the records number them: largest first."""
        return _names(self.config)

    @property
    def order(self) -> list[str]:
        """Names of the combinations as papers list them: single modalities first."""
        return sorted(self.names, key=lambda name: name.count("+"))

    @property
    def regions(self) -> list[str]:
        return list(self.data.regions)

    @property
    def methods(self) -> Sequence[str]:
        methods: Sequence[str] = self.config["methods"]
        return methods

    @property
    def label(self) -> str:
        """For titles: says phantom where it is."""
        if self.data.phantom:
            return "PHANTOM (generated) data"
        return f"{Path(self.data.source).name} (SHA-256 {self.data.digest[:12]})"

    @property
    def scope(self) -> str:
        """What the Gramians were measured on."""
        return {"shared": "the shared parameters", "all": ALL}[self.config["scope"]]

    @property
    def seeds(self) -> list[int]:
        return sorted({one["result"]["seed"] for one in self.done})

    def runs(self, method: str) -> list[dict[str, Any]]:
        """Results of a method, by seed."""
        return [one["result"] for one in self.done if one["result"]["method"] == method]

    def scores(self, method: str, metric: str, region: str) -> Array:
        """(seeds, cases, combinations) in :attr:`order`; NaN where a case lacks a modality."""
        return np.array(
            [
                [
                    [
                        run["test"][case].get(name, {}).get(region, {}).get(metric, math.nan)
                        for name in self.order
                    ]
                    for case in self.splits["test"]
                ]
                for run in self.runs(method)
            ]
        )

    def mean_scores(self, method: str, metric: str) -> Array:
        """As :meth:`scores`, mean over the regions."""
        by_region = [self.scores(method, metric, region) for region in self.regions]
        mean: Array = np.mean(by_region, axis=0)
        return mean

    def as_json(self) -> dict[str, Any]:
        """The result file; None stands for what has no number."""
        position: dict[str, int] = {}  # of the next training among those of its method
        runs = []
        for one in self.done:
            result = dict(one["result"])
            method = result["method"]
            number = position.setdefault(method, 0)
            position[method] += 1
            if method in self.seen:
                seen = {key: values[number] for key, values in self.seen[method].items()}
                result["gradients"] = gradients.summarise_gradients(
                    seen, self.names, self.config["epochs"]
                )
            runs.append(result)
        found: dict[str, Any] = _finite(
            {
                "benchmark": "brats",
                "command": self.command,
                "config": dict(self.config),
                "environment": dict(self.environment),
                "data": {
                    "source": self.data.source,
                    "phantom": self.data.phantom,
                    "sha256": self.data.digest,
                    "modalities": list(self.modalities),
                    "regions": {name: list(labels) for name, labels in self.data.regions.items()},
                },
                "splits": {name: list(cases) for name, cases in self.splits.items()},
                "selection": self.selection,
                "combinations": self.order,
                "summary": {method: self._summary(method) for method in self.methods},
                "comparisons": {
                    "against": "sum",
                    "metric": f"Dice, mean over {self._compared_over()} and over the regions",
                    "over": self.pairs,
                    **{method: asdict(found) for method, found in self.compare().items()},
                },
                "runs": runs,
            }
        )
        return found

    def _summary(self, method: str) -> dict[str, Any]:
        """By metric, then by region and over the regions."""
        return {
            metric: {
                **{
                    region: self._summary_of(self.scores(method, metric, region), metric)
                    for region in self.regions
                },
                "mean over regions": self._summary_of(self.mean_scores(method, metric), metric),
            }
            for metric in METRICS
        }

    def _summary_of(self, scores: Array, metric: str) -> dict[str, Any]:
        worst = _worst(scores, metric)
        by_combination = {
            name: _Statistics.of(scores[..., [number]]).as_json()
            for number, name in enumerate(self.order)
        }
        return {
            "mean over combinations": _Statistics.of(scores).as_json(),
            "worst combination": self.order[worst],
            "by combination": by_combination,
        }

    def as_markdown(self) -> str:
        note = " (PHANTOM, generated data)" if self.data.phantom else ""
        cases = len(self.splits["test"])
        about = _NOTES.format(
            spread=self._spread_sentence(),
            cases=f"{cases} test case{'s' if cases > 1 else ''}"
            + ("" if self._complete() else ", as far as they have the modalities"),
            averaged=self.averaged,
        )
        parts = [
            f"# Brain tumours with missing modalities{note}\n",
            *(_filled(self.sentence(*item)) for item in self.compare().items()),
            self._provenance(),
            f"## Test Dice in %, by available modalities{note}\n",
            self._combination_table("dice", _percent),
            _filled(about + _DICE_NOTES + self._missing_note()),
            f"## Test, per method{note}\n",
            self._method_table(),
            f"## Test HD95 in mm, by available modalities{note}\n",
            self._combination_table("hd95", _millimetres),
            _filled(_HD95_NOTES),
            f"## The released code's soft Dice in %{note}\n",
            self._combination_table("soft_dice_released", _percent_alone),
            _filled(_SOFT_NOTES),
        ]
        if self.seen:
            parts += [
                f"## Gradients on {measured_on(self.scope, self.seen)}, all training steps{note}\n",
                gradients.gradient_table(self.seen, self.names),
            ]
        words = [*self.methods, *(MEASURES if self.seen else ())]
        parts += [f"## Words{note}\n", definitions(words, self.scope)]
        return "\n".join(parts)

    def _provenance(self) -> str:
        data = self.data
        sizes = ", ".join(f"{name} {len(cases)}" for name, cases in self.splits.items())
        source = f"`{data.source}`" + (" (PHANTOM, generated)" if data.phantom else "")
        regions = "; ".join(
            f"{name} = label{'s' if len(labels) > 1 else ''} {', '.join(map(str, labels))}"
            for name, labels in data.regions.items()
        )
        versions = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        hyperparameters = ", ".join(
            f"{name} {value}"
            for name, value in self.config.items()
            if name not in ("data", "methods", "seeds", "first_seed", "regions")
        )
        seconds = sum(one["result"]["seconds"] for one in self.done)
        lines = [
            f"Data: {source}; SHA-256 `{data.digest}`; cases: {sizes}.",
            f"Regions: {regions}.",
            f"Command: `{self.command}`",
            f"Seeds: {', '.join(map(str, self.seeds))}. {self.selection}",
            f"Hyperparameters: {hyperparameters}.",
            f"Versions: {versions}.",
            f"Training took {seconds:.0f} s in all (information only: the machine may be shared).",
        ]
        return "\n".join(f"- {line}" for line in lines) + "\n"

    def _spread_sentence(self) -> str:
        if len(self.seeds) > 1:
            return f"Mean ± sample standard deviation over {len(self.seeds)} seeds."
        return (
            "Mean ± sample standard deviation over the test cases, of one seed: it says how cases "
            "differ, not how trainings do."
        )

    def _missing_note(self) -> str:
        if self._complete():
            return ""
        return (
            "n: the test cases that have all modalities of the combination; the rows are not over "
            "the same cases, and cannot be compared with each other."
        )

    @property
    def counts(self) -> list[int]:
        """Per combination, the test cases that have it: the same for every method."""
        scores = self.scores(self.methods[0], "dice", self.regions[0])
        return [int(count) for count in np.isfinite(scores[0]).sum(0)]

    def _complete(self) -> bool:
        return min(self.counts) == len(self.splits["test"])

    @property
    def averaged(self) -> str:
        """What a mean over combinations is over: without those that no test case has."""
        there, count = sum(n > 0 for n in self.counts), len(self.order)
        if there == count:
            return f"the {count} combinations"
        return f"the combinations that a test case has ({there} of {count})"

    def _combination_table(self, metric: str, cell: "_Format") -> str:
        """15 rows for four modalities, then mean and worst; columns by region, then by method."""
        columns = [
            self.scores(method, metric, region)
            for region in self.regions
            for method in self.methods
        ]
        many = len(self.seeds) > 1
        counted = not self._complete()
        counts = self.counts
        rows = []
        for number, name in enumerate(self.order):
            there = name.split("+")
            circles = [FILLED if modality in there else EMPTY for modality in self.modalities]
            n = [str(counts[number])] if counted else []
            values = [cell(_Statistics.of(scores[..., [number]]), many) for scores in columns]
            rows.append([*circles, *n, *values])
        blank = [""] * (len(self.modalities) - 1 + counted)
        rows.append(["mean", *blank, *(cell(_Statistics.of(scores), many) for scores in columns)])
        worst = []
        for scores in columns:
            number = _worst(scores, metric)
            value = cell(_Statistics.of(scores[..., [number]]), many)
            worst.append(f"{value} ({_displayed(self.order[number])})")
        rows.append(["worst", *blank, *worst])
        header = [_displayed(modality) for modality in self.modalities]
        header += ["n"] * counted
        header += [f"{region} {method}" for region in self.regions for method in self.methods]
        return results.markdown_table(header, rows)

    def _method_table(self) -> str:
        """Means over combinations and regions; both spreads, as far as there are."""
        rows = []
        for method in self.methods:
            row = [method]
            for metric, cell in (("dice", _percent), ("hd95", _millimetres)):
                scores = self.mean_scores(method, metric)
                statistics, worst = _Statistics.of(scores), _worst(scores, metric)
                if len(self.seeds) > 1:
                    row.append(cell(statistics, True))
                    row.append(cell(statistics, False).partition(" ± ")[2] or NOTHING)
                else:
                    mean, _, spread = cell(statistics, False).partition(" ± ")
                    row += [mean, spread or NOTHING]
                value = cell(_Statistics.of(scores[..., [worst]]), len(self.seeds) > 1)
                row.append(f"{value.partition(' ± ')[0]} ({_displayed(self.order[worst])})")
            rows.append(row)
        over = f", mean over {self.averaged}"
        over += f" and over {len(self.regions)} regions" if len(self.regions) > 1 else ""
        each = ["sd over cases", "worst combination"]
        header = ["method", f"Dice in %{over}", *each, "HD95 in mm, same mean", *each]
        return results.markdown_table(header, rows)

    def _compared(self) -> list[str]:
        return [method for method in self.methods if method != "sum" and "sum" in self.methods]

    @property
    def pairs(self) -> str:
        """What is paired: seeds; with one of them test cases, which say nothing about seeds."""
        return "seeds" if len(self.seeds) > 1 else "test cases"

    def _compared_over(self) -> str:
        by_case = self.pairs == "test cases" and not self._complete()
        return "the combinations that each case has" if by_case else self.averaged

    def compare(self) -> dict[str, Comparison]:
        """Mean Dice of each method less that of ``sum``, in pairs; positive: better."""
        differences = {}
        for method in self._compared():
            ours, theirs = self.mean_scores(method, "dice"), self.mean_scores("sum", "dice")
            if self.pairs == "seeds":
                differences[method] = (_by_seed(ours) - _by_seed(theirs)).tolist()
            else:
                differences[method] = _mean(ours - theirs, (0, 2)).tolist()
        return compare_all(differences)

    def sentence(self, method: str, found: Comparison) -> str:
        mean, over, n = 100 * found.mean, self.pairs, len(found.differences)
        start = f"{method} against sum, mean Dice over {self._compared_over()}: {mean:+.2f} points"
        if found.std is None or found.interval is None:
            return f"{start} on one test case with one seed; that says nothing about noise."
        low, high = (100 * end for end in found.interval)
        helps = method != "full"  # which is there to show what is lost without any remedy
        if not found.shown:
            verdict = f"within the noise between {over}, no difference is shown"
            verdict += f": this run gives no reason to prefer {method}" if helps else ""
        elif mean > 0:
            verdict = f"better beyond the noise between {over}"
        else:
            verdict = f"worse beyond the noise between {over}"
            verdict += f": {method} does not help here" if helps else ""
        if over == "seeds":
            cases = len(self.splits["test"])
            caveat = f"That the {cases} test cases are themselves a sample is not counted."
        else:
            caveat = "One seed says nothing about the noise between trainings: run more seeds."
        return (
            f"{start} ± {100 * found.std:.2f} (paired over {n} {over}, 95% t interval {low:+.2f} "
            f"to {high:+.2f}, p {found.p:.2g} after Holm's correction for {len(self.compare())} "
            f"methods): {verdict}. {caveat}"
        )


@dataclass(frozen=True)
class _Statistics:
    """Of scores (seeds, cases, combinations); None where there are too few numbers."""

    mean: float | None
    over_seeds: float | None  # sample standard deviation of the seeds' means
    over_cases: float | None  # of the cases' means
    cases: int

    @classmethod
    def of(cls, scores: Array) -> "_Statistics":
        by_seed, by_case = _by_seed(scores), _mean(scores, (0, 2))
        by_case = by_case[np.isfinite(by_case)]
        if not len(by_case):
            return cls(None, None, None, 0)
        return cls(
            float(by_seed.mean()),
            float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
            float(by_case.std(ddof=1)) if len(by_case) > 1 else None,
            len(by_case),
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "std over seeds": self.over_seeds,
            "std over cases": self.over_cases,
            "cases": self.cases,
        }


_Format = Callable[[_Statistics, bool], str]


def _percent(statistics: _Statistics, many_seeds: bool) -> str:
    return _spread(statistics, many_seeds, 100.0)


def _millimetres(statistics: _Statistics, many_seeds: bool) -> str:
    return _spread(statistics, many_seeds, 1.0)


def _percent_alone(statistics: _Statistics, many_seeds: bool) -> str:
    return _percent(statistics, many_seeds).partition(" ± ")[0]


def _spread(statistics: _Statistics, many_seeds: bool, factor: float) -> str:
    if statistics.mean is None:
        return NOTHING
    spread = statistics.over_seeds if many_seeds else statistics.over_cases
    mean = f"{factor * statistics.mean:.1f}"
    return mean if spread is None else f"{mean} ± {factor * spread:.1f}"


def _by_seed(scores: Array) -> Array:
    """(seeds,): over the cases first, so that every combination counts alike."""
    return _mean(_mean(scores, 1), 1)


def _worst(scores: Array, metric: str) -> int:
    means = _mean(scores, (0, 1))
    return int(np.nanargmax(means) if metric == "hd95" else np.nanargmin(means))


def _mean(values: Array, axis: int | tuple[int, ...]) -> Array:
    """Without the NaN; NaN where there is nothing else."""
    mean: Array = np.ma.masked_invalid(values).mean(axis).filled(np.nan)
    return mean


def _finite(content: Any) -> Any:
    """``content`` with None for NaN and infinities, which JSON has not."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _filled(text: str) -> str:
    return textwrap.fill(text, 100) + "\n"


def _modalities(config: Mapping[str, Any]) -> Sequence[str]:
    modalities: Sequence[str] = config.get("modalities", MODALITIES)
    return modalities


def _names(config: Mapping[str, Any]) -> list[str]:
    return ["+".join(combination) for combination in modality_combinations(_modalities(config))]


def _displayed(name: str) -> str:
    return "+".join(DISPLAYED.get(modality, modality) for modality in name.split("+"))


# --- pictures ------------------------------------------------------------------------------------


def write_report(report: Report, folder: Path) -> str:
    """Write everything, the result file last: a folder that has one is finished."""
    seeds, cases = len(report.seeds), f"{len(report.splits['test'])} test cases"
    if min(report.counts) < len(report.splits["test"]):
        cases = f"those of {cases} that have them"
    if seeds > 1:
        over = f"mean ± sample std over {seeds} seeds"
        bars = f"mean over {cases}; bars: sample std over {seeds} seeds"
    else:
        over = "1 seed"
        bars = f"mean over {cases}; bars: the middle half of the cases; 1 seed"
    _draw_case(report, folder / "cases.png")
    draw_combinations(
        folder / "dice.png",
        f"Test Dice by available modalities, {report.label}\n"
        f"({bars}; right: mean over {report.averaged})",
        [_displayed(modality) for modality in report.modalities],
        np.array([[m in name.split("+") for m in report.modalities] for name in report.order]),
        {
            f"{region}: Dice (%)": {
                method: 100 * report.scores(method, "dice", region) for method in report.methods
            }
            for region in report.regions
        },
        (0.0, 100.0),
    )
    if report.seen:
        gradients.draw_gradients(
            folder, report.seen, report.names, report.label, over, report.scope
        )
    table = report.as_markdown()
    results.write_text(folder / results.TABLE, table)
    results.write_json(folder / results.RESULTS, report.as_json())
    return table


def _draw_case(report: Report, path: Path) -> None:
    """The slice of each method's first training."""
    first = {one["result"]["method"]: one for one in reversed(report.done)}
    shown = first[report.methods[0]]["slices"]
    # A smaller region is painted over the larger ones that hold it.
    labels = report.data.regions
    painting = sorted(range(len(labels)), key=lambda i: -len(labels[report.regions[i]]))
    regions = [report.regions[i] for i in painting]
    singles = [name for name in report.order if "+" not in name]
    predictions: dict[str, list[tuple[Bools, str] | None]] = {}
    for method in report.methods:
        slices, result = first[method]["slices"], first[method]["result"]
        if any(slices[key] != shown[key] for key in ("case", "index")):
            raise ValueError(f"slices of {method!r} and {report.methods[0]!r} differ in place")
        cells: list[tuple[Bools, str] | None] = []
        most = max(slices["predictions"], key=lambda name: name.count("+"))
        for name in [most, *singles]:
            if name not in slices["predictions"]:
                cells.append(None)
                continue
            scores = result["test"][slices["case"]][name]
            caption = "   ".join(f"{r} {100 * scores[r]['dice']:.0f}" for r in regions)
            cells.append((_masks(slices["predictions"][name])[painting], caption))
        predictions[method] = cells
    draw_cases(
        path,
        f"{shown['case']}, slice {shown['index']}, {report.label}\n"
        f"Below each panel: Dice (%) of the whole volume, seed {report.seeds[0]}",
        [_displayed(modality) for modality in report.modalities],
        shown["volumes"].float().cpu().numpy(),
        regions,
        _masks(shown["truth"])[painting],
        predictions,
    )


def _masks(tensor: Tensor) -> Bools:
    masks: Bools = tensor.cpu().numpy() != 0
    return masks
