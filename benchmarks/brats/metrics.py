"""How a segmentation of one case is scored: Dice, Hausdorff distance, the released code's Dice."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.meandice import compute_dice
from scipy.ndimage import find_objects
from torch import Tensor

from benchmarks.brats.cases import Regions, labels_of, masks_of

__all__ = ["METRICS", "case_scores", "hard_dice", "hd95", "segmented", "soft_dice_released"]

METRICS = ("dice", "hd95", "soft_dice_released")
SMOOTH = 1.0  # of the released code's Dice


@torch.no_grad()
def case_scores(
    logits: Tensor, label: Tensor, spacing: Sequence[float], regions: Regions
) -> dict[str, dict[str, float]]:
    """All METRICS of one case, by region.

    Args:
        logits: (R, D, H, W), floating point.
        label: (R, D, H, W), bool or {0, 1}, on the same device.
        spacing: mm between voxels along D, H and W.
        regions: name -> labels, R of them.

    Raises:
        ValueError: shapes or names that do not fit, or NaN among the logits.
    """
    if logits.shape != label.shape or logits.ndim != 4 or len(logits) != len(regions):
        raise ValueError(
            f"logits {tuple(logits.shape)} and label {tuple(label.shape)} must both be "
            f"(R, D, H, W) with R = {len(regions)} regions {tuple(regions)}"
        )
    if bool(logits.isnan().any()):
        raise ValueError("the logits hold NaN: no score can be given")
    prediction, truth = segmented(logits, regions), label != 0
    columns = zip(
        hard_dice(prediction, truth),
        hd95(prediction, truth, spacing),
        soft_dice_released(logits, truth),
        strict=True,
    )
    return {
        region: dict(zip(METRICS, values, strict=True))
        for region, values in zip(regions, columns, strict=True)
    }


def segmented(logits: Tensor, regions: Regions) -> Tensor:
    """(R, ...) bool: the regions of the labels that are written for logits (R, ...).

    Not simply where sigmoid(logit) > 0.5: what is scored is what whoever reads the file gets.
    """
    labels = labels_of((logits > 0).cpu().numpy(), regions)
    return torch.from_numpy(masks_of(labels, regions)).to(logits.device)


def hard_dice(prediction: Tensor, truth: Tensor) -> list[float]:
    """Dice of each of R regions, both (R, D, H, W) bool: 1 where both are empty."""
    return [
        float(compute_dice(mask, target, ignore_empty=False))
        for mask, target in map(_cropped, prediction, truth)
    ]


def hd95(prediction: Tensor, truth: Tensor, spacing: Sequence[float]) -> list[float]:
    """95th percentile Hausdorff distance of each of R regions in mm, both (R, D, H, W) bool.

    Where both are empty it is 0, where one of them is it is the diagonal of the volume, which no
    distance exceeds: left out or infinite, a missed region would improve or spoil the mean.
    """
    extents = [size * step for size, step in zip(truth.shape[1:], spacing, strict=True)]
    found = []
    for mask, target in map(_cropped, prediction, truth):
        if bool(mask.any()) != bool(target.any()):
            found.append(math.hypot(*extents))
        elif not mask.any():
            found.append(0.0)
        else:
            with warnings.catch_warnings():  # MONAI calls itself in a way that it deprecates
                warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
                distance = compute_hausdorff_distance(
                    mask, target, include_background=True, percentile=95, spacing=tuple(spacing)
                )
            found.append(float(distance))
    return found


def soft_dice_released(logits: Tensor, truth: Tensor) -> list[float]:
    """The Dice that GMD's released code logs, of each of R regions.

    (2 sum(p t) + 1) / (sum(p) + sum(t) + 1) with p = sigmoid(logits), which is not thresholded,
    and without squares; an empty region is scored by how little probability lies anywhere. The
    released code sums over a whole batch at once, which its script sets to one case, over the
    central 192 x 192 x 128 voxels; this is over one case and the whole volume.

    Args:
        logits: (R, D, H, W).
        truth: (R, D, H, W) bool.
    """
    found = []
    for logit, target in zip(logits, truth, strict=True):
        probability = logit.float().sigmoid()
        inside = float(probability[target].sum())
        both = float(probability.sum()) + int(target.count_nonzero())
        found.append((2 * inside + SMOOTH) / (both + SMOOTH))
    return found


def _cropped(mask: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, d, h, w), on the CPU: the smallest box that holds both; nothing else counts."""
    mask, target = mask.cpu(), target.cpu()
    boxes = find_objects((mask | target).numpy().view(np.uint8))
    # Where both are empty there is no box; one voxel will do.
    x, y, z = boxes[0] if boxes else (slice(1),) * 3
    return mask[None, None, x, y, z], target[None, None, x, y, z]
