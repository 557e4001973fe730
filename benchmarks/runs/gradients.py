"""What every benchmark reports beside its scores: what the gradients did.

Everything is computed from the records of the merges. A record is a
mapping of ``gramians`` (S, m, m), ``weights`` (S, m) and ``trained`` (S, m): for every training
step, the Gramian, the weights of the rule, and which combination each row belongs to (an index
into the benchmark's list of names; -1 where a step had fewer than m rows).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.runs import results
from benchmarks.runs.methods import measured_on
from benchmarks.runs.pictures import draw_angles, draw_curves
from gradsplit import Decoupling

__all__ = [
    "Merges",
    "diagnose",
    "diagnose_all",
    "draw_gradients",
    "gradient_table",
    "merged_angles",
    "summarise_gradients",
]

Array = npt.NDArray[np.float64]

RECORDS = ("gramians", "weights", "trained")
SCALARS = {"conflicts": "conflict_rate", "opposed": "opposed_rate", "alignment": "alignment"}


# --- records -------------------------------------------------------------------------------------


class Merges:
    """What every merge of one training saw; ``names`` are the combinations of the benchmark."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.gramians: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.trained: list[Tensor] = []

    def add(self, report: Decoupling, scale: float = 1.0) -> None:
        """Of losses that were multiplied by ``scale``."""
        self.gramians.append(report.gramian.cpu() / scale**2)
        self.weights.append(report.weights.cpu())
        self.trained.append(torch.tensor([self.names.index(name) for name in report.names]))

    def state_dict(self) -> dict[str, Tensor]:
        """The record. Where a combination had no sample, its row is NaN and its number -1."""
        if not self.weights:
            nothing = torch.empty(0, 0)
            return {"gramians": nothing[..., None], "weights": nothing, "trained": nothing.long()}
        m = max(map(len, self.weights))
        kept = {"gramians": math.nan, "weights": math.nan, "trained": -1}
        return {
            key: torch.stack([_filled(one, m, value) for one in getattr(self, key)])
            for key, value in kept.items()
        }

    def load_state_dict(self, record: Mapping[str, Tensor]) -> None:
        """Continue from there."""
        for key in RECORDS:
            setattr(self, key, list(record[key]))


def _filled(tensor: Tensor, m: int, value: float) -> Tensor:
    return pad(tensor, [0, m - tensor.shape[0]] * tensor.dim(), value=value)


# --- measures ------------------------------------------------------------------------------------


def diagnose(records: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Array]:
    """Per step: angles between rows and to the merged gradient, shares, dominance, conflicts.

    Args:
        records: of one training, see the top of this file.
        names: of the combinations that ``trained`` points to.

    Returns:
        ``pairs`` (S, m(m-1)/2) and ``merged`` (S, m) in degrees, ``shares`` (S, len(names)), and
        ``dominance``, ``conflicts``, ``opposed`` and ``alignment`` (S,). NaN stands for what a step
        had not: combinations that were not drawn, and all of these four where there was one row.
    """
    size = records["weights"].shape[1]
    rows: dict[str, list[Any]] = {
        key: [] for key in ("pairs", "merged", "shares", "dominance", *SCALARS)
    }
    for gramian, weights, trained in zip(*(records[key] for key in RECORDS), strict=True):
        there = trained >= 0
        gramian, weights, trained = gramian[there][:, there], weights[there], trained[there]
        present = tuple(names[i] for i in trained.tolist())
        seen = Decoupling(present, (), gramian.new_zeros(len(present)), gramian, weights)
        scalars = seen.as_scalars(prefix="")
        shares = np.full(len(names), np.nan)
        shares[trained.numpy()] = seen.shares().numpy()
        rows["pairs"].append(_padded(seen.angles(), size * (size - 1) // 2))
        rows["merged"].append(_padded(merged_angles(gramian, weights), size))
        rows["shares"].append(shares)
        rows["dominance"].append(scalars.get("dominance_max", math.nan))
        for key, name in SCALARS.items():
            rows[key].append(scalars[name] if len(present) > 1 else math.nan)
    return {key: np.array(values, dtype=np.float64) for key, values in rows.items()}


def _padded(values: Tensor, size: int) -> Array:
    return np.pad(values.double().numpy(), (0, size - len(values)), constant_values=np.nan)


def merged_angles(gramian: Tensor, weights: Tensor) -> Tensor:
    """(m,): angle in degrees between each row and w^T J; 90 where one of the two is zero.

    <g_i, w^T J> = (K w)_i and ||w^T J||^2 = w^T K w: the rows themselves are not needed.
    """
    inner = gramian @ weights
    scale = (gramian.diagonal() * (weights @ inner).clamp(min=0.0)).sqrt()
    cosine = torch.where(scale > 0, inner / scale, 0.0).clamp(-1.0, 1.0)
    return cosine.acos().rad2deg()


def diagnose_all(
    done: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> dict[str, dict[str, Array]]:
    """By method: :func:`diagnose` of its trainings, stacked: each array gains a first axis, seeds.

    Args:
        done: one ``{"result": {"method": ..., ...}, "records": ...}`` per training, by seed.
        names: as in :func:`diagnose`. Methods whose steps all had a single row are left out.
    """
    by_method: dict[str, list[dict[str, Array]]] = {}
    for one in done:
        if bool(((one["records"]["trained"] >= 0).sum(1) > 1).any()):
            seen = diagnose(one["records"], names)
            by_method.setdefault(one["result"]["method"], []).append(seen)
    return {
        method: {key: _stack([run[key] for run in runs]) for key in runs[0]}
        for method, runs in by_method.items()
    }


def _stack(arrays: Sequence[Array]) -> Array:
    """With NaN where one is shorter: a step was skipped, or a combination never had a sample."""
    shape = np.max([array.shape for array in arrays], axis=0)
    stacked = np.full((len(arrays), *shape), np.nan)
    for one, array in zip(stacked, arrays, strict=True):
        one[tuple(map(slice, array.shape))] = array
    return stacked


def summarise_gradients(
    seen: Mapping[str, Array], names: Sequence[str], epochs: int
) -> dict[str, Any]:
    """The part of :func:`diagnose` that goes into a result file: per epoch, and histograms."""
    bins = np.arange(0, 181, 5)
    per_epoch = {
        key: [_mean_or_none(part) for part in np.array_split(seen[key], epochs)]
        for key in ("dominance", *SCALARS)
    }
    shares = {
        name: [_mean_or_none(part) for part in np.array_split(seen["shares"][:, number], epochs)]
        for number, name in enumerate(names)
    }
    angles = {key: seen[key][np.isfinite(seen[key])] for key in ("pairs", "merged")}
    return {
        "per_epoch": {**per_epoch, "shares": shares},
        "angle_bins": bins.tolist(),
        "angle_counts": {
            key: np.histogram(values, bins=bins)[0].tolist() for key, values in angles.items()
        },
        "above_90": {key: _mean_or_none(values > 90) for key, values in angles.items()},
    }


def _mean_or_none(values: npt.NDArray[Any]) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


# --- tables and pictures -------------------------------------------------------------------------


def gradient_table(seen: Mapping[str, Mapping[str, Array]], names: Sequence[str]) -> str:
    """A Markdown table with a row per method of :func:`diagnose_all`, over all steps and seeds."""
    rows = []
    for method, arrays in seen.items():
        shares = [
            _mean_or_none(column) or 0.0 for column in arrays["shares"].reshape(-1, len(names)).T
        ]
        largest = int(np.argmax(shares))
        merged = arrays["merged"][np.isfinite(arrays["merged"])]
        rows.append(
            [
                method,
                f"{np.nanmean(arrays['conflicts']):.1%}",
                f"{np.nanmean(arrays['opposed']):.1%}",
                f"{(merged > 90).mean():.1%}",
                f"{np.nanmedian(arrays['dominance']):.2f}",
                f"{np.nanmean(arrays['alignment']):.4f}",
                f"{names[largest]} ({shares[largest]:.0%})",
            ]
        )
    header = [
        "method",
        "pairs in conflict",
        "losses the plain sum raises (opposed)",
        "losses the merged update raises",
        "largest dominance (median)",
        "alignment with the plain sum",
        "largest share",
    ]
    return results.markdown_table(header, rows)


def draw_gradients(
    folder: Path,
    seen: Mapping[str, Mapping[str, Array]],
    names: Sequence[str],
    label: str,
    over: str,
    scope: str = "the shared parameters",
) -> None:
    """Write angles.png and dominance.png.

    Args:
        folder: where to.
        seen: from :func:`diagnose_all`, not empty.
        names: of the combinations.
        label: what the data are, for the titles.
        over: what the means are over, for the titles.
        scope: what the Gramians were measured on, for the titles.
    """

    where = measured_on(scope, seen)

    def each(key: str) -> dict[str, Array]:
        return {method: arrays[key] for method, arrays in seen.items()}

    draw_angles(
        folder / "angles.png",
        f"Gradient angles on {where}, {label}, all steps and seeds\n"
        "A row is one combination's gradient. Top: as Fig. 3 of the GMD paper. "
        "Bottom: above 90° the step goes against that row.",
        each("pairs"),
        each("merged"),
    )
    draw_curves(
        folder / "dominance.png",
        f"Gradients on {where} over training, {label}\n(moving mean; {over})",
        each("shares"),
        names,
        {
            "largest dominance of a pair": each("dominance"),
            "share of pairs in conflict": each("conflicts"),
            "alignment with the plain sum": each("alignment"),
        },
        highest={"alignment with the plain sum": 1.0},  # a cosine
    )
