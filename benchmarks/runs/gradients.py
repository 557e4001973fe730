"""What the gradients did in trainings, from the records of their merges: a table and pictures.

A record is a mapping of ``gramians`` (S, m, m), ``weights`` (S, m) and ``trained`` (S, m): for
every training step, the Gramian, the weights of the rule, and which combination each row belongs to
(an index into the benchmark's list of names; -1 where a step had fewer than m rows).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.runs import results
from benchmarks.runs.methods import METHODS, measured_on, plain_sum
from benchmarks.runs.pictures import draw_before_after, draw_training, window_of
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
ANGLES = ("pairs", "projected", "summed", "merged")
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


def _filled(tensor: Tensor, m: int, value: float = math.nan) -> Tensor:
    return pad(tensor, [0, m - tensor.shape[0]] * tensor.dim(), value=value)


# --- measures ------------------------------------------------------------------------------------


def diagnose(records: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Array]:
    """Per step: angles, shares, dominance, conflicts; before the rule and after it.

    Args:
        records: of one training, see the top of this file.
        names: of the combinations that ``trained`` points to.

    Returns:
        In degrees, ``pairs`` and ``projected`` (S, m(m-1)/2), between two rows and between two
        that gmd has projected; ``summed`` and ``merged`` (S, m), of a row to the plain sum and to
        the merged gradient. ``shares`` (S, len(names)), and ``dominance``, ``conflicts``,
        ``opposed`` and ``alignment`` (S,). NaN stands for what a step had not: combinations that
        were not drawn, and all of these four where there was one row.
    """
    size = records["weights"].shape[1]
    rows: dict[str, list[Any]] = {key: [] for key in (*ANGLES, "shares", "dominance", *SCALARS)}
    for gramian, weights, trained in zip(*(records[key] for key in RECORDS), strict=True):
        there = trained >= 0
        gramian, weights, trained = gramian[there][:, there], weights[there], trained[there]
        present = tuple(names[i] for i in trained.tolist())
        seen = Decoupling(present, (), gramian.new_zeros(len(present)), gramian, weights)
        scalars = seen.as_scalars(prefix="")
        shares = np.full(len(names), np.nan)
        shares[trained.numpy()] = seen.shares().numpy()
        pairs = size * (size - 1) // 2
        for key, most, angles in (
            ("pairs", pairs, seen.angles()),
            ("projected", pairs, replace(seen, gramian=projected(gramian)).angles()),
            ("summed", size, merged_angles(gramian, plain_sum(gramian))),
            ("merged", size, merged_angles(gramian, weights)),
        ):
            rows[key].append(_filled(angles, most).numpy())
        rows["shares"].append(shares)
        rows["dominance"].append(scalars.get("dominance_max", math.nan))
        for key, name in SCALARS.items():
            rows[key].append(scalars[name] if len(present) > 1 else math.nan)
    return {key: np.array(values, dtype=np.float64) for key, values in rows.items()}


def projected(gramian: Tensor) -> Tensor:
    """(m, m): the Gramian of C J, the rows as gmd leaves them (its weights are C's column sums)."""
    norms = gramian.diagonal().clamp(min=torch.finfo(gramian.dtype).tiny)
    left = torch.eye(len(gramian), dtype=gramian.dtype) - gramian.clamp(max=0.0) / norms
    return left @ gramian @ left.T


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
        names: as in :func:`diagnose`. Methods whose steps all had a single row are left out, and
            ``projected`` where the method does not project as gmd does.
    """
    by_method: dict[str, list[dict[str, Array]]] = {}
    several = set()
    for one in done:
        method, seen = one["result"]["method"], diagnose(one["records"], names)
        if METHODS[method].rule != "gmd":
            del seen["projected"]
        by_method.setdefault(method, []).append(seen)
        if bool(((one["records"]["trained"] >= 0).sum(1) > 1).any()):
            several.add(method)
    return {
        method: {key: _stack([run[key] for run in runs]) for key in runs[0]}
        for method, runs in by_method.items()
        if method in several
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
    angles = {key: seen[key][np.isfinite(seen[key])] for key in ANGLES if key in seen}
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
    """Write gradients.png and before_after.png.

    Args:
        folder: where to.
        seen: from :func:`diagnose_all`, not empty.
        names: of the combinations.
        label: what the data are, for the titles.
        over: what the means are over, for the titles.
        scope: what the Gramians were measured on, for the titles.
    """
    where = measured_on(scope, seen)
    window = window_of(max(arrays["conflicts"].shape[1] for arrays in seen.values()))
    draw_training(
        folder / "gradients.png",
        f"Gradients on {where} over training, {label}\n"
        f"(moving mean over {window} step{'s' * (window > 1)}, geometric of dominance; {over})",
        seen,
        names,
    )
    # What decouples nothing is the same before and after.
    rules = [method for method in seen if METHODS[method].rule is not plain_sum]
    draw_before_after(
        folder / "before_after.png",
        f"Gradient angles on {where}, {label}\n"
        "(all steps and seeds; above 90° two rows conflict, the step opposes a row)",
        {method: seen[method] for method in rules or seen},
    )
