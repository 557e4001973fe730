"""The study's results: what stands in STUDY.rst comes from the folders, and from nothing else."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.figure import Figure

from benchmarks.sentiment import __main__ as sentiment
from benchmarks.study import STUDY, main

FRAME = "Plan\n----\n\n.. results\n\nbefore this run\n\n.. end of results\n\nWhat follows.\n"


def phantoms(dice: dict[str, list[float]]) -> dict[str, Any]:
    """A BraTS result: of each method, the Dice of two regions by seed (their mean is given)."""
    per_epoch = {"conflicts": [0.5, 0.25], "opposed": [0.125, 0.0], "alignment": [0.5, None]}
    rows = [
        {"method": method, "seed": seed, "case": "one", "combination": "t1", "region": region,
         "metric": "dice", "value": value + more}
        for method, values in dice.items()
        for seed, value in enumerate(values)
        for region, more in (("WT", -0.1), ("ET", 0.1))
    ]  # fmt: skip
    return {
        "benchmark": "brats",
        "command": "python -m benchmarks.brats",
        "environment": {"torch": "2"},
        "data": {"phantom": True},
        "runs": [{"method": method, "gradients": {"per_epoch": per_epoch}} for method in dice],
        "scores": rows,
    }


def digits(rows: list[tuple[str, str, list[float], float]]) -> dict[str, Any]:
    """A regimes result: (setting, method, score by seed, opposed)."""
    return {
        "benchmark": "regimes",
        "command": "python -m benchmarks.regimes",
        "environment": {"torch": "2"},
        "rows": [
            {"part": "units", "setting": setting, "method": method, "seed": seed, "score": score,
             "opposed_all": opposed}
            for setting, method, scores, opposed in rows
            for seed, score in enumerate(scores)
        ],
    }  # fmt: skip


def written(tmp_path: Path, *contents: dict[str, Any]) -> str:
    folders = []
    for number, content in enumerate(contents):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        (folders[-1] / "results.json").write_text(json.dumps(content))
        pd.DataFrame(content.get("scores", [])).to_csv(folders[-1] / "scores.csv", index=False)
    return said(tmp_path, *folders)


def said(tmp_path: Path, *folders: Path) -> str:
    into = tmp_path / "STUDY.rst"
    into.write_text(FRAME)
    assert main([*map(str, folders), "--into", str(into)]) == 0
    text = into.read_text()
    assert text.startswith("Plan\n----\n\n.. results\n") and "before this run" not in text
    assert text.endswith("\n.. end of results\n\nWhat follows.\n")
    return text


def test_a_difference_is_bold_only_where_it_is_shown(tmp_path: Path) -> None:
    """In pairs: 5 points in each seed stand out of a noise of 20 between seeds."""
    base = [0.5, 0.7, 0.6]
    gained = [value + 0.05 + noise for value, noise in zip(base, (0.001, -0.001, 0.0), strict=True)]
    noise = [0.6, 0.6, 0.65]
    text = written(tmp_path, phantoms({"sum": base, "gmd": gained, "balance": noise}))
    row = next(line for line in text.splitlines() if '"Dice, points"' in line)
    name, of_sum, gmd, balance = row.strip().strip('"').split('","')
    assert (name, of_sum) == ("Dice, points", "60.00 ± 10.00")
    assert gmd == "**+5.00 [+4.75, +5.25]**"
    assert balance.startswith("+1.67 [") and "for 2 comparisons" in text
    assert "pairs in conflict 50.0% in the first epoch, 25.0% in the last" in text
    assert "losses opposed 12.5% in the first epoch, 0.0% in the last" in text


def test_folders_come_in_their_order_and_are_corrected_apart(tmp_path: Path) -> None:
    one = phantoms({"sum": [0.5, 0.6], "gmd": [0.6, 0.7]})
    settings = [(str(k), m, [50.0 + k * (m != "sum"), 52.0 + k * (m != "sum") + 0.5], k / 10)
                for k in range(4) for m in ("sum", "balance")]  # fmt: skip
    text = written(tmp_path, digits(settings), one)
    assert text.index("Digits\n~~~~~~\n") < text.index("Phantoms\n~~~~~~~~\n")
    assert "for 4 comparisons" in text and "for 1 comparisons" in text
    assert "gain and share: *balance* +1.00" in text and "units: 3 30.0%" in text
    assert "to 10%, and from there on: *balance* 0 of 1, 0 of 0, 3 of 3." in text


def test_a_real_run_of_the_sentiment_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda _, path: Path(path).touch())  # takes long
    out = tmp_path / "run"
    small = ["--width", "8", "--depth", "1", "--heads", "2", "--epochs", "1", "--seeds", "2",
             "--batch-size", "320"]  # fmt: skip
    methods = ["--methods", "full,sum,gmd,gmd-all", "--first-seed", "7"]
    missing = ["--missing", "text=0.5"]
    assert sentiment.main([*small, *methods, *missing, "--out", str(out)]) == 0
    runs = json.loads((out / "results.json").read_text())["runs"]
    mae = {(run["method"], run["seed"]): run["summary"]["mae"] for run in runs}
    text = said(tmp_path, out)
    expected = sum(mae["gmd", seed] - mae["sum", seed] for seed in (7, 8)) / 2
    row = next(line for line in text.splitlines() if '"MAE, mean of 7"' in line)
    assert f'"{expected:+.4f} [' in row and "full" not in row
    expected = sum(mae["gmd-all", seed] - mae["gmd", seed] for seed in (7, 8)) / 2
    assert f"*gmd-all* minus *gmd*: MAE, mean of 7 {expected:+.4f} [" in text
    assert "Missing in training: text 50%" in text and "Seeds 7 to 8" in text


def test_what_is_no_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in (
        (None, "results.json: No such file"),
        ({"benchmark": "speed"}, "of none of"),
        ({"benchmark": "brats"}, "scores.csv: No such file"),
    ):
        if content is not None:
            (tmp_path / "results.json").write_text(json.dumps(content))
        with pytest.raises(SystemExit):
            main([str(tmp_path), "--into", str(STUDY)])
        assert message in capsys.readouterr().err
    written(tmp_path, phantoms({"sum": [0.5], "gmd": [0.5]}))
    (tmp_path / "other.rst").write_text("no marks")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "0"), "--into", str(tmp_path / "other.rst")])
    assert "lacks the lines .. results and .. end of results" in capsys.readouterr().err
    assert (tmp_path / "other.rst").read_text() == "no marks"
