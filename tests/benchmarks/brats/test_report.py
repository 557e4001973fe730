"""What lies in the result folder of the BraTS benchmark, and what both reports share."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from numpy.testing import assert_allclose

from benchmarks.brats.cases import BratsData
from benchmarks.brats.report import Report, write_report

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


def report(done: list[dict[str, Any]], *, phantom: bool = False, scope: str = "shared") -> Report:
    methods = list(dict.fromkeys(one["result"]["method"] for one in done))
    config = {"methods": methods, "epochs": 2, "modalities": ("t1", "t2"), "scope": scope}
    return Report(
        BratsData("/data/cases", (), REGIONS, "0123456789abcdef", phantom),
        splits={"train": ["c", "d", "e"], "valid": [], "test": ["a", "b"]},
        config={**config, "lr": 0.1},
        command="python -m benchmarks.brats --methods sum",
        environment={"torch": "2.0"},
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
        f"{mean}.0 ± 1.4" for mean in (21, 31, 41, 31)
    ] + ["21.0 ± 1.4 (T1)"]
    # Over regions: three quarters of WT's; over cases, the seeds' mean of both is the same.
    assert table(text, "Test, per method")[1][:4] == ["sum", "46.5 ± 2.1", "0.0", "31.5 ± 2.1 (T1)"]


def test_averages_are_over_the_cases_that_have_the_modalities() -> None:
    incomplete = {"a": {"t1": 0.3}, "b": COMPLETE["b"]}
    run = finished("sum", 0, incomplete)
    del run["slices"]["predictions"]["t2"], run["slices"]["predictions"]["t1+t2"]
    found = table(report([run]).as_markdown(), "Test Dice")
    assert found[:5] == [
        ["T1", "T2", "n", "ET sum", "WT sum"],
        ["●", "○", "2", "20.0 ± 7.1", "40.0 ± 14.1"],
        ["○", "●", "1", "30.0", "60.0"],
        ["●", "●", "1", "35.0", "70.0"],
        # of 40, 60 and 70; and over cases, of 30 and 60
        ["mean", "", "", "28.3 ± 10.6", "56.7 ± 21.2"],
    ]


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but not drawn, which would take longer than all the rest."""
    monkeypatch.setattr(Figure, "savefig", lambda _, path: Path(path).touch())


@pytest.mark.usefixtures("no_pictures")
def test_a_combination_that_no_case_has_is_no_number(tmp_path: Path) -> None:
    run = finished("full", 0, {"a": {"t1": 0.3}, "b": {"t1": 0.5}})
    for name in ("t2", "t1+t2"):
        del run["slices"]["predictions"][name]
    run["slices"]["volumes"][1] = 0
    text = write_report(report([run]), tmp_path)
    assert table(text, "Test Dice")[2] == ["○", "●", "0", "–", "–"]
    text = " ".join(text.split())
    averaged = "the combinations that a test case has (1 of 3)"
    assert f'"mean": over {averaged}.' in text
    assert f"Dice in %, mean over {averaged} and over 2 regions" in text
    assert "the 3 combinations" not in text


def test_methods_are_compared_with_sum_seed_by_seed() -> None:
    done = [finished(m, seed, COMPLETE) for m in ("full", "sum", "pcgrad") for seed in (0, 1)]
    done += [finished("gmd", 0, BETTER), finished("gmd", 1, COMPLETE)]
    found = report(done)
    assert list(found.compare()) == ["pcgrad", "gmd"], "full is shown, not compared"
    assert_allclose(found.compare()["gmd"].differences, [75 * 0.04, 0], atol=1e-12)
    title, pcgrad, gmd, caveat, *_, words = found.as_markdown().split("\n\n")
    gmd, caveat = (" ".join(part.split()) for part in (gmd, caveat))
    assert gmd.startswith(
        "gmd against sum, mean Dice in points over the 3 combinations: +1.50 [-17.56, +20.56] "
        "(paired over 2 seeds"
    )
    assert "for 2 methods): no difference is shown; about " in gmd
    assert "the 2 test cases are themselves a sample" in caveat
    assert pcgrad.startswith("pcgrad against sum"), "the table opens with the verdict"
    measures = ["conflict", "opposed", "merged", "dominance", "alignment", "share"]
    defined = ["full", "sum", "pcgrad", "gmd", *measures]
    assert re.findall(r"^- [*]{2}(.+)[*]{2}: ", words, re.M) == defined, "every word once"


def test_one_seed_says_nothing() -> None:
    found = report([finished("sum", 0, COMPLETE), finished("gmd", 0, BETTER)])
    _, verdict, *_ = found.as_markdown().split("\n\n")
    assert ": +3.00 with one seed; that says nothing about noise" in " ".join(verdict.split())


def test_the_result_folder(tmp_path: Path) -> None:
    done = [finished(m, s, COMPLETE) for s in (0, 1) for m in ("full", "sum", "gmd")]
    done[-1]["result"]["test"] = by_case(BETTER)
    text = write_report(report(done), tmp_path)
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures >= {"cases.png", "dice.png"}
    assert set(os.listdir(tmp_path)) == {*pictures, "results.json", "scores.csv", "table.md"}
    for picture in tmp_path.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == text
    for stated in (
        "`/data/cases`", "SHA-256 `0123456789abcdef`", "train 3, valid 0, test 2", "lr 0.1",
        "Seeds: 0, 1. Tested: the last epoch;", "WT = labels [1, 2, 4]", "torch 2.0", "9 s in all",
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
        assert ("gradients" in run) == (run["method"] != "full")
    first, second = (run["gradients"] for run in content["runs"] if run["method"] == "sum")
    assert first != second, "each run has its own"
    flat = pd.read_csv(tmp_path / "scores.csv")
    assert len(flat) == 6 * 2 * 3 * 2 * 3  # trainings, cases, combinations, regions, metrics
    for row in flat.itertuples():
        (run,) = (r for r in content["runs"] if (r["method"], r["seed"]) == (row.method, row.seed))
        assert run["test"][row.case][row.combination][row.region][row.metric] == row.value


@pytest.mark.usefixtures("no_pictures")
def test_full_alone_has_nothing_to_compare(tmp_path: Path) -> None:
    text = write_report(report([finished("full", 0, COMPLETE)]), tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"cases.png", "dice.png"}
    assert "Gradients" not in text
    assert "against sum" not in text


def test_titles_say_what_is_generated_and_where_gradients_were_measured() -> None:
    found = report([finished("sum", 0, COMPLETE)], phantom=True, scope="all")
    titles = [line for line in found.as_markdown().splitlines() if line.startswith("#")]
    assert len(titles) == 7
    assert all("PHANTOM" in title for title in titles)
    assert "PHANTOM" in found.label
    assert found.as_json()["data"]["phantom"] is True
    assert any(title.startswith("## Gradients on all parameters") for title in titles)
    assert report([]).label == "cases (SHA-256 0123456789ab)"
