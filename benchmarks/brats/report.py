"""What the BraTS benchmark reports: tables and pictures.

Nothing here trains, or knows the model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import Tensor

from benchmarks.brats.cases import MODALITIES, BratsData
from benchmarks.brats.metrics import METRICS
from benchmarks.brats.pictures import draw_cases
from benchmarks.runs import report as runs
from benchmarks.runs import results
from benchmarks.runs.pictures import draw_combinations
from benchmarks.runs.report import write_report
from gradsplit import modality_combinations

__all__ = ["Report", "write_report"]

Bools = npt.NDArray[np.bool_]

DISPLAYED = {"t1": "T1", "t1ce": "T1ce", "t2": "T2", "flair": "FLAIR"}
FILLED, EMPTY = "●", "○"

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
_LACKING = """\
n: the test cases that have all modalities of the combination; the rows are not over the same cases,
and cannot be compared with each other.
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
_SEEDS = "Mean ± sample standard deviation over {} seeds."
_ONE_SEED = """\
Mean ± sample standard deviation over the test cases, of one seed: it says how cases differ, not how
trainings do."""


class Report(runs.Report):
    """What the finished trainings of the BraTS benchmark found."""

    benchmark = "brats"
    title = "Brain tumours with missing modalities"
    levels = ("case", "combination", "region", "metric")
    primary, lower, digits = "dice", False, 2
    factors = {"dice": 100.0, "soft_dice_released": 100.0}
    unit = "cases"

    def __init__(
        self, data: BratsData, *, splits: Mapping[str, Sequence[str]], **more: Any
    ) -> None:
        self.modalities = list(more["config"].get("modalities", MODALITIES))
        self.names = ["+".join(some) for some in modality_combinations(self.modalities)]
        # As papers list them: single modalities first.
        self.order = sorted(self.names, key=lambda name: name.count("+"))
        super().__init__(data, **more)
        self.generated = "PHANTOM, generated data" if data.phantom else ""
        self.sizes = {name: len(cases) for name, cases in splits.items()}
        self.regions = list(data.regions)
        labels = (f"{name} = labels {list(some)}" for name, some in data.regions.items())
        self.remarks = [f"Regions: {'; '.join(labels)}."]
        self.selection = "Tested: the last epoch; this split has no validation cases."
        if splits["valid"]:
            self.selection = (
                "Tested: the epoch with the highest Dice on valid, mean over cases, the "
                "combinations each has and regions, of every "
                f"{self.config['validate_every']}th epoch and the last."
            )
        cases = self.scores.groupby("combination")["case"].nunique()
        # By combination: the test cases that have it; the same for every method.
        self.counts = {name: int(cases.get(name, 0)) for name in self.order}
        self.complete = min(self.counts.values()) == self.sizes["test"]
        there, count = sum(n > 0 for n in self.counts.values()), len(self.order)
        self.averaged = f"the {count} combinations"
        if there < count:
            self.averaged = f"the combinations that a test case has ({there} of {count})"
        self.compared = f"mean Dice in points over {self.averaged}"
        self.content = {
            "data": {
                "source": data.source,
                "phantom": data.phantom,
                "sha256": data.digest,
                "modalities": self.modalities,
                "regions": data.regions,
            },
            "splits": splits,
            "combinations": self.order,
        }

    # -- tables ------------------------------------------------------------------------------------

    def sections(self) -> list[tuple[str, str]]:
        seeds, cases = len(self.seeds), self.sizes["test"]
        about = _NOTES.format(
            spread=_SEEDS.format(seeds) if seeds > 1 else _ONE_SEED,
            cases=f"{cases} test case{'s' if cases > 1 else ''}"
            + ("" if self.complete else ", as far as they have the modalities"),
            averaged=self.averaged,
        )
        notes = runs.filled(about + _DICE_NOTES + ("" if self.complete else _LACKING))
        dice, hd95, soft = map(self._combination_table, METRICS)
        return [
            ("Test Dice in %, by available modalities", f"{dice}\n{notes}"),
            ("Test, per method", self._method_table()),
            ("Test HD95 in mm, by available modalities", f"{hd95}\n{_HD95_NOTES}"),
            ("The released code's soft Dice in %", f"{soft}\n{_SOFT_NOTES}"),
        ]

    def _combination_table(self, metric: str) -> str:
        """15 rows for four modalities, then mean and worst; columns by region, then by method."""
        scores = dict(list(self.of(metric).groupby(["region", "method"])))
        keys = [(region, method) for region in self.regions for method in self.methods]
        columns = [scores[key] for key in keys]
        n = [] if self.complete else ["n"]
        rows = []
        for name in self.order:
            circles = [FILLED if one in name.split("+") else EMPTY for one in self.modalities]
            values = [runs.cell(column[column["combination"] == name], 1) for column in columns]
            rows.append([*circles, *[str(self.counts[name])] * len(n), *values])
        blank = [""] * (len(self.modalities) - 1 + len(n))
        rows.append(["mean", *blank, *(runs.cell(column, 1) for column in columns)])
        rows.append(["worst", *blank, *(_worst(column, metric) for column in columns)])
        header = [*map(_displayed, self.modalities), *n, *map(" ".join, keys)]
        return results.markdown_table(header, rows)

    def _method_table(self) -> str:
        """Means over combinations and regions; both spreads, as far as there are."""
        rows = []
        for method in self.methods:
            rows.append([method])
            for metric in ("dice", "hd95"):
                scores = self.of(metric, method)
                mean = results.format_spread(runs.seed_means(scores).tolist(), 1)
                over_cases = scores.groupby("case")["value"].mean().std()
                rows[-1] += [mean, runs.number(over_cases, 1), _worst(scores, metric)]
        over = f", mean over {self.averaged}"
        over += f" and over {len(self.regions)} regions" if len(self.regions) > 1 else ""
        each = ["sd over cases", "worst combination"]
        header = ["method", f"Dice in %{over}", *each, "HD95 in mm, same mean", *each]
        return results.markdown_table(header, rows)

    # -- pictures ----------------------------------------------------------------------------------

    def draw(self, folder: Path) -> None:
        seeds, cases = len(self.seeds), f"{self.sizes['test']} test cases"
        cases = cases if self.complete else f"those of {cases} that have them"
        bars = "sample std over {} seeds" if seeds > 1 else "the middle half of the cases; 1 seed"
        _draw_case(self, folder / "cases.png")
        draw_combinations(
            folder / "dice.png",
            f"Test Dice by available modalities, {self.label}\n(mean over {cases}; bars: "
            f"{bars.format(seeds)}; right: mean over {self.averaged})",
            [_displayed(modality) for modality in self.modalities],
            np.array([[m in name.split("+") for m in self.modalities] for name in self.order]),
            {
                f"{region}: Dice (%)": {
                    method: self._array(region, method) for method in self.methods
                }
                for region in self.regions
            },
            (0.0, 100.0),
        )

    def _array(self, region: str, method: str) -> npt.NDArray[np.float64]:
        """(seeds, cases, combinations) of Dice; NaN where a case lacks a modality."""
        scores = self.of("dice", method)
        table = scores[scores["region"] == region].pivot(
            index=["seed", "case"], columns="combination", values="value"
        )
        array: npt.NDArray[np.float64] = table.reindex(columns=self.order).to_numpy()
        return array.reshape(len(self.seeds), -1, len(self.order))


def _worst(scores: pd.DataFrame, metric: str) -> str:
    """The mean of the worst combination, and which it is."""
    name = runs.worst(scores, lower=metric == "hd95")
    return f"{runs.cell(scores[scores['combination'] == name], 1)} ({_displayed(name)})"


def _displayed(name: str) -> str:
    return "+".join(DISPLAYED.get(modality, modality) for modality in name.split("+"))


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
