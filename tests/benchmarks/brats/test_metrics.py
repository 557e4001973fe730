"""Scores of a segmentation by hand: Dice, Hausdorff distance, the released code's Dice."""

import math

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.ndimage import binary_erosion, gaussian_filter
from torch import Tensor

from benchmarks.brats.metrics import case_scores, hard_dice, hd95, soft_dice_released

EMPTY = torch.zeros(1, 6, 6, 6, dtype=torch.bool)
NESTED = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
LN3 = math.log(3)  # sigmoid(ln 3) = 3/4


def voxels(*places: tuple[int, int, int], shape: tuple[int, int, int] = (6, 6, 6)) -> Tensor:
    """(1, D, H, W): a region of these voxels."""
    mask = torch.zeros(1, *shape, dtype=torch.bool)
    for x, y, z in places:
        mask[0, x, y, z] = True
    return mask


def box(start: int, stop: int) -> Tensor:
    mask = EMPTY.clone()
    mask[0, start:stop, 1:3, 1:3] = True
    return mask


def test_dice_by_hand() -> None:
    # 2 x 2 x 2 against the same one step further: 4 of 8 and 8 voxels are shared.
    assert hard_dice(box(1, 3), box(2, 4)) == [0.5]
    # 8 against 4 of them: 2 * 4 / 12
    assert_allclose(hard_dice(box(1, 3), box(1, 2)), [2 / 3])
    assert hard_dice(box(1, 3), box(1, 3)) == [1.0]
    assert hard_dice(box(1, 2), box(3, 4)) == [0.0]


def test_distances_by_hand() -> None:
    # One voxel against one voxel: 1, 2 and 2 steps of 1, 2 and 3 mm.
    one, other = voxels((1, 1, 1)), voxels((2, 3, 3))
    assert_allclose(hd95(one, other, (1, 2, 3)), [math.sqrt(1 + 16 + 36)])
    # From five voxels in a row to their first: 0, 1, 2, 3, 4 mm, of which the 95th percentile is
    # 0.8 of the way from 3 to 4. Back again: 0.
    row = voxels(*((x, 2, 2) for x in range(5)))
    assert_allclose(hd95(row, voxels((0, 2, 2)), (1, 1, 1)), [3.8])
    assert_allclose(hd95(voxels((0, 2, 2)), row, (1, 1, 1)), [3.8])
    assert hd95(row, row, (1, 1, 1)) == [0.0]


@pytest.mark.parametrize("seed", range(4))
def test_distances_are_those_of_all_pairs_of_surface_voxels(seed: int) -> None:
    generator = np.random.default_rng(seed)
    fields = [gaussian_filter(generator.standard_normal((14, 12, 10)), 1.5) for _ in range(2)]
    masks = [field > 0.05 for field in fields]  # they touch the volume's faces
    spacing = np.array([1.0, 0.5, 2.5])
    surfaces = [np.argwhere(mask & ~binary_erosion(mask)) * spacing for mask in masks]
    between = np.linalg.norm(surfaces[0][:, None] - surfaces[1], axis=-1)
    expected = max(np.percentile(between.min(axis), 95) for axis in (0, 1))
    assert expected > 1
    found = hd95(*(torch.tensor(mask)[None] for mask in masks), tuple(spacing))
    assert_allclose(found, [expected], rtol=1e-6)


def test_released_dice_by_hand() -> None:
    logits = torch.full((1, 1, 1, 4), -math.inf)  # p = 0
    logits[0, 0, 0, 0] = LN3
    logits[0, 0, 0, 1] = -LN3
    truth = torch.tensor([True, False, True, False]).reshape(1, 1, 1, 4)
    # p t sums to 3/4, p to 3/4 + 1/4, t to 2
    assert_allclose(soft_dice_released(logits, truth), [(2 * 0.75 + 1) / (1 + 2 + 1)])
    # Nothing to find: 1 / (sum of p + 1)
    assert_allclose(soft_dice_released(logits, truth & ~truth), [1 / 2])
    # Regions are not pooled.
    both = soft_dice_released(logits.repeat(2, 1, 1, 1), torch.cat([truth, truth & ~truth]))
    assert_allclose(both, [2.5 / 4, 1 / 2])


def test_empty_regions() -> None:
    diagonal = math.sqrt(6**2 + 12**2 + 18**2)
    some, spacing = voxels((1, 2, 3)), (1, 2, 3)
    for prediction, truth, dice, distance in (
        (EMPTY, EMPTY, 1.0, 0.0),
        (some, EMPTY, 0.0, diagonal),
        (EMPTY, some, 0.0, diagonal),
    ):
        assert hard_dice(prediction, truth) == [dice]
        assert_allclose(hd95(prediction, truth, spacing), [distance])


def test_a_missed_region_costs_what_the_challenge_says() -> None:
    shape = (240, 240, 155)
    found = hd95(
        voxels((0, 0, 0), shape=shape), torch.zeros(1, *shape, dtype=torch.bool), (1, 1, 1)
    )
    assert round(found[0], 2) == 373.13


def test_all_scores_of_a_case() -> None:
    prediction = torch.cat([box(1, 3), EMPTY, EMPTY])
    label = torch.cat([box(2, 4), EMPTY, box(1, 2)]).to(torch.uint8)
    logits = torch.where(prediction, LN3, -math.inf)
    found = case_scores(logits, label, (1, 1, 1), NESTED)
    assert list(found) == ["WT", "TC", "ET"]
    assert [row["dice"] for row in found.values()] == [0.5, 1.0, 0.0]
    # Each of the four outer voxels is one step from the other box.
    assert_allclose([row["hd95"] for row in found.values()], [1, 0, math.sqrt(3 * 36)])
    # WT: 4 voxels shared at 3/4, 6 + 8 in all
    expected = [(2 * 3 + 1) / (6 + 8 + 1), 1.0, 1 / (4 + 1)]
    assert_allclose([row["soft_dice_released"] for row in found.values()], expected)


def test_half_is_not_above_a_half() -> None:
    logits = torch.zeros(1, 2, 2, 2)
    label = torch.ones(1, 2, 2, 2, dtype=torch.uint8)
    assert case_scores(logits, label, (1, 1, 1), {"WT": (1,)})["WT"]["dice"] == 0.0
    assert case_scores(logits + 1e-3, label, (1, 1, 1), {"WT": (1,)})["WT"]["dice"] == 1.0


def test_half_precision_is_summed_in_single() -> None:
    logits = torch.zeros(1, 50, 50, 50, dtype=torch.float16)  # p sums to 62500; fp16 ends at 65504
    truth = torch.ones(1, 50, 50, 50, dtype=torch.bool)
    assert_allclose(soft_dice_released(logits, truth), [125_001 / 187_501])


def test_scores_that_cannot_be_given_are_refused() -> None:
    logits, label = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    with pytest.raises(ValueError, match=r"R = 2 regions \('WT', 'TC'\)"):
        case_scores(logits, label, (1, 1, 1), {"WT": (1, 2), "TC": (1,)})
    with pytest.raises(ValueError, match=r"logits \(1, 2, 2, 2\) and label \(1, 2, 2, 3\)"):
        case_scores(logits, torch.zeros(1, 2, 2, 3), (1, 1, 1), {"WT": (1,)})
    with pytest.raises(ValueError, match="hold NaN"):
        case_scores(logits / 0, label, (1, 1, 1), {"WT": (1,)})
