"""The sentiment benchmark's tables: missing rates, what lacks modalities, the flat scores."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose

from benchmarks.sentiment.data import MODALITIES, SentimentData, draw_available, synthetic
from benchmarks.sentiment.report import METRICS, NAMES, Report, chances, write_report


@pytest.fixture(scope="module")
def data() -> SentimentData:
    return replace(synthetic(5), source="/data/x.pkl")


def finished(method: str, seed: int) -> dict[str, Any]:
    """One in which the MAE of the k-th combination is 1 + k / 10, and more with each seed."""
    maes = {name: 1 + number / 10 + seed for number, name in enumerate(NAMES)}
    if method == "gmd":
        maes = {name: mae - 0.25 - seed / 100 for name, mae in maes.items()}
    nothing = torch.empty(0, 0)
    return {
        "result": {
            "method": method,
            "seed": seed,
            "seconds": 1.0,
            "test": {name: {**dict.fromkeys(METRICS, 0.5), "mae": mae}
                     for name, mae in maes.items()},
        },
        "records": {"gramians": nothing[..., None], "weights": nothing, "trained": nothing.long()},
    }  # fmt: skip


def report(data: SentimentData, missing: dict[str, float] | None = None) -> Report:
    return Report(
        data,
        config={"methods": ["sum", "gmd"], "epochs": 1, "missing": missing or {}},
        command="python -m benchmarks.sentiment",
        environment={},
        done=[finished(method, seed) for seed in (0, 1) for method in ("sum", "gmd")],
    )


def rows(markdown: str, title: str) -> dict[str, list[str]]:
    """The cells of the table under a heading, by the first."""
    part = markdown.split(f"## {title}")[1].split("\n## ")[0]
    lines = [line.strip("| ") for line in part.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


@pytest.mark.parametrize("rates", [{"text": 0.2, "audio": 0.5, "vision": 0.8}, {"text": 0.7}])
def test_chances_are_how_often_a_combination_is_drawn(rates: dict[str, float]) -> None:
    whole = torch.ones(100_000, 3, dtype=torch.bool)
    drawn = draw_available(whole, rates, torch.Generator().manual_seed(0))
    for name, chance in chances(rates).items():
        only = torch.tensor([modality in name.split("+") for modality in MODALITIES])
        assert_allclose((drawn == only).all(1).double().mean(), chance, atol=0.006)


def test_the_table_by_missing_rate_by_hand(data: SentimentData) -> None:
    found = rows(report(data, {"text": 0.5}).as_markdown(), "Test MAE by missing rate")
    assert list(found)[2:] == [f"{n}0%" if n else "0%" for n in range(8)] + [
        "text 50%", "(train mean)",
    ]  # fmt: skip
    # Nothing missing: all modalities, whose MAE is 1, and 2 with the other seed.
    assert found["0%"] == ["1.500 ± 0.707", "1.245 ± 0.700"]
    # Half of the time each: all of the seven equally often, 1.3 in the mean.
    assert found["50%"] == ["1.800 ± 0.707", "1.545 ± 0.700"]
    # Text or none of it beside audio and vision: the first combination and the fourth.
    assert found["text 50%"] == ["1.650 ± 0.707", "1.395 ± 0.700"]
    # 0.9^3, 3 * 0.9^2 * 0.1 and 3 * 0.9 * 0.1^2 of 1 - 0.1^3, MAEs of 1, 1.2 and 1.5 in the mean
    mean = (0.729 + 0.243 * 1.2 + 0.027 * 1.5) / 0.999 + 0.5
    assert found["10%"][0] == f"{mean:.3f} ± 0.707"


def test_where_test_utterances_lack_modalities_there_are_no_rates(data: SentimentData) -> None:
    test = data.splits["test"]
    text_lengths = torch.where(torch.arange(len(test)) < 3, 0, test.lengths["text"])
    lacking = replace(test, lengths={**test.lengths, "text": text_lengths})
    text = report(replace(data, splits={**data.splits, "test": lacking})).as_markdown()
    part = text.split("## Test MAE by missing rate")[1].split("\n## ")[0]
    assert "|" not in part and "some test utterances lack modalities" in part
    assert "mean MAE over the 157 to 160 of 160 test" in text
    found = rows(text, "Test MAE per combination")
    assert [found[name][0] for name in ("text", "audio", "(train mean)")] == [
        "157", "160", "160",
    ]  # fmt: skip


def test_what_is_written_is_what_the_table_says(data: SentimentData, tmp_path: Path) -> None:
    text = write_report(report(data), tmp_path)
    flat = pd.read_csv(tmp_path / "scores.csv")
    assert list(flat.columns) == ["method", "seed", "combination", "metric", "value"]
    mae = flat[flat["metric"] == "mae"].groupby(["method", "seed"])["value"]
    main = rows(text, "Test, mean over")
    for method, cells in main.items():
        if method in ("sum", "gmd"):
            mean, worst = mae.mean()[method], mae.max()[method]
            assert cells[0] == f"{mean.mean():.3f} ± {mean.std():.3f}"
            assert cells[-1] == f"{worst.mean():.3f} ± {worst.std():.3f}"
    train, test = (data.splits[name].labels for name in ("train", "test"))
    assert main["train mean"][0] == f"{(train.mean() - test).abs().mean():.3f}"
    content = json.loads((tmp_path / "results.json").read_text())
    assert_allclose(content["comparisons"]["gmd"]["differences"], [-0.25, -0.26])
