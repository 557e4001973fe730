"""The sentiment benchmark from the command line: what it says, and what lies in the folder."""

import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.runs import results
from benchmarks.runs.methods import METHODS
from benchmarks.sentiment.__main__ import main
from benchmarks.sentiment.report import NAMES
from tests.benchmarks.running import (
    OF_GRADIENTS,
    ROOT,
    SMALL,
    WRITTEN,
    Capsys,
    outcome,
    refused,
    run,
)

REAL = ROOT.parent / "shared/data/mosi_heldout/unaligned_50.pkl"


def test_bad_data_is_named(tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "broken.pkl").write_bytes(b"no pickle")
    said = refused(main, capsys, "--data", tmp_path / "broken.pkl", "--out", tmp_path / "out")
    assert f"argument --data: {tmp_path}/broken.pkl: not a readable pickle" in said
    assert not (tmp_path / "out").exists()


def test_a_run_writes_all_files(sentiment_run: Path, utterances: Path) -> None:
    assert sorted(os.listdir(sentiment_run)) == sorted([*WRITTEN, *OF_GRADIENTS, "scores.png"])
    for picture in sentiment_run.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    table, found = (sentiment_run / "table.md").read_text(), outcome(sentiment_run)
    assert "synthetic" not in table.lower()
    assert found["data"]["sha256"] == results.file_sha256(utterances)
    assert found["data"]["sha256"] in table
    assert f"python -m benchmarks.sentiment --data {utterances} --methods full,sum" in table
    methods = ["full", "sum", "gmd", "pcgrad", "balance"]
    assert found["config"]["methods"] == methods
    ran = [(one["seed"], one["method"]) for one in found["runs"]]
    assert ran == [(seed, method) for seed in (0, 1) for method in methods]
    assert "gmd against sum, mean MAE: " in table
    assert "paired over 2 seeds" in table


def test_the_table_opens_with_the_verdict_and_says_what_its_words_mean(
    tmp_path: Path, no_pictures: None, capsys: Capsys
) -> None:
    """Of synthetic data; without a progress bar, what is going on is said in lines."""
    out = tmp_path / "out"
    run(main, "--methods", ",".join(METHODS), "--combinations", "k=2", "--seeds", "1", "--epochs",
        "1", *SMALL, "--batch-size", "64", "--out", out)  # fmt: skip
    said = capsys.readouterr()
    begun = [line for line in said.err.splitlines() if line.startswith("[3/7] ")]
    assert len(begun) == 3 and begun[0] == "[3/7] gmd, seed 0"
    told = r"\[3/7\] gmd, seed 0, epoch 1/1: train loss [0-9.]+, lr 0.001, valid mae [0-9.]+"
    assert re.fullmatch(told, begun[1])
    table = (out / "table.md").read_text()
    assert table in said.out
    titles = [line for line in table.splitlines() if line[:1] == "#"]
    assert len(titles) >= 6 and all("SYNTHETIC" in title for title in titles)
    assert outcome(out)["data"]["synthetic"] is True
    _, verdict, *rest = table.split("\n\n")
    assert verdict.startswith("gmd against sum, mean MAE: ")
    measures = ["conflict", "opposed", "merged", "dominance", "alignment", "share"]
    defined = re.findall(r"^- \*\*(.+)\*\*: .{20,}[.]$", rest[-1], re.M)
    assert defined == [*METHODS, *measures]
    (part,) = [part for part in rest if "pairs in conflict" in part]
    assert all(measure in part for measure in measures)


def test_full_alone_has_no_gradient_pictures(
    tmp_path: Path, utterances: Path, no_pictures: None
) -> None:
    run(main, "--data", utterances, "--methods", "full", "--seeds", "1", "--epochs", "1", *SMALL,
        "--out", tmp_path / "out")  # fmt: skip
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*WRITTEN, "scores.png"])


def test_what_an_utterance_lacks_counts_nowhere(
    tmp_path: Path, utterances: Path, no_pictures: None
) -> None:
    """Not in training, validation or test: the label of one without anything changes nothing."""
    layout = pickle.loads(utterances.read_bytes())
    for part in layout.values():
        part["text"][:5] = part["audio"][4:6] = part["vision"][4:6] = 0
    outcomes = []
    for label in (3.0, -3.0):
        for part in layout.values():
            part["regression_labels"][4] = label
        (tmp_path / "lacking.pkl").write_bytes(pickle.dumps(layout))
        out = tmp_path / f"out{label}"
        run(main, "--data", tmp_path / "lacking.pkl", "--methods", "sum,gmd", *SMALL,
            "--seeds", "2", "--epochs", "2", "--out", out)  # fmt: skip
        outcomes.append(outcome(out))
    assert outcomes[0]["runs"] == outcomes[1]["runs"]
    found = outcomes[1]
    assert found["data"]["cleaning"]["test"]["text"]["empty_utterances"] == 5
    counts = {"text": 19, "audio": 22, "vision": 22, "audio+vision": 22}
    assert found["test_utterances"] == {name: counts.get(name, 18) for name in NAMES}
    table = (out / "table.md").read_text()
    assert re.search(r"^\| text +\| 19 \|", table, re.M)
    assert re.search(r"^\| \(train mean\) +\| 24 \|", table, re.M)
    assert "gmd against sum, mean MAE over the 18 to 22 of 24 test utterances" in table


def test_what_is_odd_in_the_data_is_said(
    tmp_path: Path, utterances: Path, no_pictures: None, capsys: Capsys
) -> None:
    layout = pickle.loads(utterances.read_bytes())
    layout["train"]["regression_labels"][:2] = 1e30, -4
    layout["valid"]["regression_labels"] = -abs(layout["valid"]["regression_labels"])
    layout["train"]["audio"][0, 0, :3] = -np.inf
    layout["test"]["audio"][0, 0, 3] = 1e9
    layout["valid"]["text"][:, -3:] = 0
    layout["valid"]["text"][1] = np.roll(layout["valid"]["text"][1], 3, axis=0)
    layout["test"]["vision"][:2] = layout["train"]["vision"][..., 0] = 0
    odd, out = tmp_path / "odd.pkl", tmp_path / "out"
    odd.write_bytes(pickle.dumps(layout))
    run(main, "--data", odd, "--methods", "sum", "--seeds", "1", "--epochs", "1", *SMALL,
        "--out", out)  # fmt: skip
    expected = [
        f"warning: {odd}: split 'train', key 'regression_labels': 2 of 24 labels are outside "
        "[-3, 3], from -4 to 1e+30",
        f"warning: {odd}: split 'valid', key 'regression_labels': no label is positive",
        f"{odd}: key 'text': utterances with frames of zeros at the front, taken for padding: "
        "train 0, valid 1, test 0",
        f"{odd}: key 'audio': values that are not finite, replaced by 0: train 3, valid 0, test 0",
        f"{odd}: key 'audio': values beyond 10 standard deviations, clipped: train 0, valid 0, "
        "test 1",
        f"{odd}: key 'vision': utterances without a frame or of zeros alone, where it is "
        "unavailable: left out of every loss and score that needs it: train 0, valid 0, test 2",
        f"{odd}: key 'vision': features that are the same in all frames of train, not scaled: 1 of "
        "12",
    ]
    for text in (capsys.readouterr().err, (out / "table.md").read_text().replace("\n- ", "\n")):
        said = [line for line in text.splitlines() if f"{odd}: " in line]
        assert len(said) == len(expected), said
        for line, start in zip(said, expected, strict=True):
            assert line.startswith(start)


@pytest.mark.parametrize(("size", "what"), [("8", "the loss"), ("24", "a score")])
def test_divergence_is_an_error_that_says_what_to_do(
    tmp_path: Path, utterances: Path, capsys: Capsys, size: str, what: str
) -> None:
    arguments = ["--data", str(utterances), "--methods", "sum", "--lr", "1e30", *SMALL]
    assert main([*arguments, "--batch-size", size, "--out", str(tmp_path / "out")]) == 1
    expected = f"sum, seed 0, epoch 1: {what} is not a finite number; try a lower --lr"
    assert expected in capsys.readouterr().err


@pytest.mark.skipif(not REAL.exists(), reason=f"the real MOSI data is not here ({REAL})")
def test_real_data_from_end_to_end(tmp_path: Path, no_pictures: None) -> None:
    out = tmp_path / "out"
    run(main, "--data", REAL, "--methods", "sum,gmd", "--seeds", "1", "--epochs", "2",
        "--width", "16", "--depth", "1", "--out", out)  # fmt: skip
    found = json.loads((out / "results.json").read_text())
    assert found["data"]["shapes"]["train"]["text"] == [449, 50, 96]
    for one in found["runs"]:
        assert one["history"][-1]["train_loss"] < one["history"][0]["train_loss"]
        assert one["summary"]["mae"] < 1.5
