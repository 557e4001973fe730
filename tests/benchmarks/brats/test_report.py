"""Scores of the BraTS benchmark by hand, and what lies in its result folder."""

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.ndimage import binary_erosion, gaussian_filter
from torch import Tensor

from benchmarks.brats.cases import BratsData
from benchmarks.brats.metrics import case_scores, hard_dice, hd95, soft_dice_released
from benchmarks.brats.report import Report, write_report

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


# --- scores --------------------------------------------------------------------------------------


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


# --- reports -------------------------------------------------------------------------------------

REGIONS = {"ET": (4,), "WT": (1, 2, 4)}  # not in the order of painting


def scored(dice: float) -> dict[str, float]:
    return {"dice": dice, "hd95": 10 * (1 - dice), "soft_dice_released": dice / 2}


def by_case(cases: dict[str, dict[str, float]]) -> dict[str, Any]:
    """From the Dice of WT by case and combination; that of ET is half of it."""
    return {
        case: {name: {"WT": scored(d), "ET": scored(d / 2)} for name, d in by_name.items()}
        for case, by_name in cases.items()
    }


def finished(
    method: str, seed: int, cases: dict[str, dict[str, float]], steps: int = 6
) -> dict[str, Any]:
    rows = 1 if method == "full" else 3
    jacobian = torch.randn(steps, rows, 5, dtype=torch.float64, generator=torch.manual_seed(seed))
    plane = torch.arange(12.0).reshape(3, 4)
    masks = torch.ones(2, 3, 4, dtype=torch.uint8)
    return {
        "result": {
            "method": method,
            "seed": seed,
            "best_epoch": 2,
            "valid_dice": None,
            "seconds": 1.5,
            "history": [{"train_loss": math.nan, "lr": 0.1, "valid_dice": None}] * 2,
            "test": by_case(cases),
        },
        "records": {
            "gramians": jacobian @ jacobian.mT,
            "weights": torch.ones(steps, rows, dtype=torch.float64),
            "trained": torch.arange(rows).expand(steps, rows),
        },
        "slices": {
            "case": "a",
            "index": 7,
            "volumes": torch.stack([plane, -plane]),
            "truth": masks,
            "predictions": dict.fromkeys(("t1+t2", "t1", "t2"), masks),
        },
    }


COMPLETE = {
    "a": {"t1+t2": 0.9, "t1": 0.3, "t2": 0.6},
    "b": {"t1+t2": 0.7, "t1": 0.5, "t2": 0.6},
}
BETTER = {case: {name: d + 0.04 for name, d in row.items()} for case, row in COMPLETE.items()}
WORSE = {case: {name: d - 0.2 for name, d in row.items()} for case, row in COMPLETE.items()}


def report(done: list[dict[str, Any]], *, phantom: bool = False, scope: str = "shared") -> Report:
    methods = list(dict.fromkeys(one["result"]["method"] for one in done))
    config = {"methods": methods, "epochs": 2, "modalities": ("t1", "t2"), "scope": scope}
    return Report.of(
        BratsData("/data/cases", (), REGIONS, "0123456789abcdef", phantom),
        splits={"train": ["c", "d", "e"], "valid": [], "test": ["a", "b"]},
        config={**config, "lr": 0.1},
        command="python -m benchmarks.brats --methods sum",
        environment={"torch": "2.0"},
        selection="Tested: the last epoch.",
        done=done,
    )


def table(markdown: str, title: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    part = markdown.split(f"## {title}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:1] + lines[2:]]


def test_the_table_of_one_seed_by_hand() -> None:
    found = table(report([finished("sum", 0, COMPLETE)]).as_markdown(), "Test Dice")
    spread = 100 * 0.2 / math.sqrt(2)  # of two cases that are 20 points apart
    assert found == [
        ["T1", "T2", "ET sum", "WT sum"],
        ["●", "○", f"20.0 ± {spread / 2:.1f}", f"40.0 ± {spread:.1f}"],
        ["○", "●", "30.0 ± 0.0", "60.0 ± 0.0"],
        ["●", "●", f"40.0 ± {spread / 2:.1f}", f"80.0 ± {spread:.1f}"],
        ["mean", "", "30.0 ± 0.0", "60.0 ± 0.0"],  # both cases have the same mean
        ["worst", "", f"20.0 ± {spread / 2:.1f} (T1)", f"40.0 ± {spread:.1f} (T1)"],
    ]


def test_the_tables_of_two_seeds_by_hand() -> None:
    text = report([finished("sum", 0, COMPLETE), finished("sum", 1, BETTER)]).as_markdown()
    assert "over 2 seeds" in text
    spread = 4 / math.sqrt(2)
    dice = table(text, "Test Dice")
    assert [row[3] for row in dice[1:]] == [
        f"{mean}.0 ± {spread:.1f}" for mean in (42, 62, 82, 62)
    ] + [f"42.0 ± {spread:.1f} (T1)"]
    distance = table(text, "Test HD95")
    assert [row[3] for row in distance[1:]] == [
        f"{mean} ± 0.3" for mean in (5.8, 3.8, 1.8, 3.8)
    ] + ["5.8 ± 0.3 (T1)"]
    assert [row[3] for row in table(text, "The released")[1:]] == [
        "21.0", "31.0", "41.0", "31.0", "21.0 (T1)",
    ]  # fmt: skip
    # Over regions: three quarters of WT's; over cases, the seeds' mean of both is the same.
    assert table(text, "Test, per method")[1][:4] == ["sum", "46.5 ± 2.1", "0.0", "31.5 (T1)"]


def test_averages_are_over_the_cases_that_have_the_modalities() -> None:
    incomplete = {"a": {"t1": 0.3}, "b": COMPLETE["b"]}
    run = finished("sum", 0, incomplete)
    del run["slices"]["predictions"]["t2"], run["slices"]["predictions"]["t1+t2"]
    found = report([run])
    assert table(found.as_markdown(), "Test Dice")[:4] == [
        ["T1", "T2", "n", "ET sum", "WT sum"],
        ["●", "○", "2", "20.0 ± 7.1", "40.0 ± 14.1"],
        ["○", "●", "1", "30.0", "60.0"],
        ["●", "●", "1", "35.0", "70.0"],
    ]
    summary = found.as_json()["summary"]["sum"]["dice"]["WT"]
    assert_allclose(summary["mean over combinations"]["mean"], (0.4 + 0.6 + 0.7) / 3)
    assert summary["by combination"]["t2"]["cases"] == 1
    assert summary["by combination"]["t2"]["std over cases"] is None


def test_a_combination_that_no_case_has_is_no_number(tmp_path: Path) -> None:
    run = finished("full", 0, {"a": {"t1": 0.3}, "b": {"t1": 0.5}})
    for name in ("t2", "t1+t2"):
        del run["slices"]["predictions"][name]
    run["slices"]["volumes"][1] = 0
    found = report([run])
    rows = table(found.as_markdown(), "Test Dice")
    assert rows[2] == ["○", "●", "0", "–", "–"]
    text = " ".join(found.as_markdown().split())
    averaged = "the combinations that a test case has (1 of 3)"
    assert f'"mean": over {averaged}.' in text
    assert f"Dice in %, mean over {averaged} and over 2 regions" in text
    assert "the 3 combinations" not in text
    assert "the combinations that each case has" in found.as_json()["comparisons"]["metric"]
    write_report(found, tmp_path)


def test_methods_are_compared_with_sum_seed_by_seed() -> None:
    done = [finished("sum", seed, COMPLETE) for seed in (0, 1)]
    done += [finished("gmd", 0, BETTER), finished("gmd", 1, COMPLETE)]
    found = report(done)
    comparison = found.compare()["gmd"]
    assert_allclose(comparison.differences, [0.75 * 0.04, 0], atol=1e-12)
    sentence = found.sentence("gmd", comparison)
    assert sentence.startswith(
        "gmd against sum, mean Dice over the 3 combinations: +1.50 points ± 2.12 (paired over 2"
    )
    assert "no reason to prefer gmd" in sentence
    _, verdict, *_, words = found.as_markdown().split("\n\n")
    assert " ".join(verdict.split()) == sentence, "the table opens with it"
    defined = ["sum", "gmd", "conflict", "opposed", "merged", "dominance", "alignment", "share"]
    assert re.findall(r"^- [*]{2}(.+)[*]{2}: ", words, re.M) == defined


def test_with_one_seed_the_pairs_are_cases_and_it_says_so() -> None:
    done = [finished(m, 0, d) for m, d in (("sum", COMPLETE), ("gmd", BETTER), ("full", WORSE))]
    found = report(done)
    better, worse = found.compare()["gmd"], found.compare()["full"]
    assert len(better.differences) == 2
    assert_allclose(better.mean, 0.75 * 0.04)
    assert_allclose(worse.mean, -0.75 * 0.2)
    assert "better beyond the noise between test cases. One seed says nothing" in found.sentence(
        "gmd", replace(better, p=0.01)
    )
    assert "worse beyond the noise between test cases. One" in found.sentence(
        "full", replace(worse, p=0.01)
    )


def test_a_method_that_does_not_help_is_said_not_to_help() -> None:
    found = report([finished("sum", 0, COMPLETE), finished("pcgrad", 0, WORSE)])
    comparison = replace(found.compare()["pcgrad"], p=0.01)
    assert "pcgrad does not help here" in found.sentence("pcgrad", comparison)


def test_the_result_folder(tmp_path: Path) -> None:
    done = [finished(m, s, COMPLETE) for s in (0, 1) for m in ("full", "sum", "gmd")]
    text = write_report(report(done), tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "before_after.png", "cases.png", "dice.png", "gradients.png", "results.json", "table.md",
    ]  # fmt: skip
    for picture in tmp_path.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == text
    for stated in (
        "`/data/cases`", "SHA-256 `0123456789abcdef`", "train 3, valid 0, test 2", "lr 0.1",
        "Seeds: 0, 1. Tested: the last epoch.", "WT = labels 1, 2, 4", "torch 2.0", "9 s in all",
        "`python -m benchmarks.brats --methods sum`",
    ):  # fmt: skip
        assert stated in text, stated
    assert "phantom" not in text.lower()
    content = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert content["data"]["regions"] == {"ET": [4], "WT": [1, 2, 4]}
    assert content["splits"]["test"] == ["a", "b"]
    assert content["combinations"] == ["t1", "t2", "t1+t2"]
    assert [(run["seed"], run["method"]) for run in content["runs"]] == [
        (seed, method) for seed in (0, 1) for method in ("full", "sum", "gmd")
    ]
    for run in content["runs"]:
        assert run["history"][0]["train_loss"] is None, "NaN"
        assert run["test"] == done[0]["result"]["test"]
        assert ("gradients" in run) == (run["method"] != "full")
    first, second = (run["gradients"] for run in content["runs"] if run["method"] == "sum")
    assert first != second, "each run has its own"


def test_full_alone_has_no_gradients_to_show(tmp_path: Path) -> None:
    text = write_report(report([finished("full", 0, COMPLETE)]), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["cases.png", "dice.png", "results.json", "table.md"]
    assert "Gradients" not in text
    assert "against sum" not in text


def test_generated_data_are_said_to_be_generated_everywhere() -> None:
    found = report([finished("sum", 0, COMPLETE)], phantom=True)
    titles = [line for line in found.as_markdown().splitlines() if line.startswith("#")]
    assert len(titles) == 7
    assert all("PHANTOM" in title for title in titles)
    assert "PHANTOM" in found.label
    assert found.as_json()["data"]["phantom"] is True


def test_titles_say_where_gradients_were_measured() -> None:
    text = report([finished("sum", 0, COMPLETE)], scope="all").as_markdown()
    assert "## Gradients on all parameters" in text


def test_slices_of_two_places_are_not_compared(tmp_path: Path) -> None:
    done = [finished("sum", 0, COMPLETE), finished("gmd", 0, COMPLETE)]
    done[1]["slices"]["index"] = 8
    with pytest.raises(ValueError, match="'gmd' and 'sum' differ"):
        write_report(report(done), tmp_path)
    assert not (tmp_path / "results.json").exists()
