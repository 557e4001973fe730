"""The sentiment benchmark: metrics, fairness between methods, resuming, what lies in the folder."""

import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from benchmarks.runs import results
from benchmarks.runs.checkpoint import load_checkpoint, save_checkpoint
from benchmarks.runs.methods import METHODS, plain_sum
from benchmarks.sentiment.__main__ import main
from benchmarks.sentiment.data import (
    MODALITIES,
    SentimentData,
    Split,
    draw_available,
    load_file,
    synthetic_layout,
)
from benchmarks.sentiment.report import (
    COMBINATIONS,
    METRICS,
    NAMES,
    Report,
    metrics,
    summarise,
)
from benchmarks.sentiment.training import Config, Training, evaluate, mean_error, predict

ROOT = Path(__file__).parents[3]
REAL = ROOT.parent / "shared/data/mosi_heldout/unaligned_50.pkl"
SMALL = ["--width", "8", "--depth", "1", "--heads", "2", "--batch-size", "8"]


class Silent:
    """A progress bar that shows nothing."""

    disable = True

    def update(self) -> None: ...


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training utterances of the synthetic set, as a pickle."""
    layout = {
        split: {key: values[:24] for key, values in part.items()}
        for split, part in synthetic_layout().items()
    }
    path = tmp_path_factory.mktemp("data") / "small.pkl"
    path.write_bytes(pickle.dumps(layout))
    return path


@pytest.fixture(scope="module")
def data(file: Path) -> SentimentData:
    return load_file(file, 50)


def small(**changes: Any) -> Config:
    return Config(**{"width": 8, "depth": 1, "heads": 2, "batch_size": 8, "epochs": 2, **changes})


def outcome(folder: Path) -> list[dict[str, Any]]:
    """The runs of a finished folder, without the time they took."""
    runs: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())["runs"]
    for run in runs:
        del run["seconds"]
    return runs


# --- metrics -------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    labels = np.array([-2.4, -0.6, 0.0, 0.4, 1.6, 3.0])
    predictions = np.array([-2.0, 0.2, 0.1, -0.2, 1.4, 4.0])
    found = metrics(predictions, labels)
    assert_allclose(found["mae"], (0.4 + 0.8 + 0.1 + 0.6 + 0.2 + 1.0) / 6)
    # x = labels, y = predictions: sums 2.0 and 3.5, squares 17.84 and 22.05, products 18.84
    correlation = (18.84 - 2.0 * 3.5 / 6) / np.sqrt((17.84 - 2.0**2 / 6) * (22.05 - 3.5**2 / 6))
    assert_allclose(found["corr"], correlation)
    # >= 0: truth 0 0 1 1 1 1, guess 0 1 1 0 1 1: four of six
    assert_allclose(found["acc2_has0"], 4 / 6)
    # class 0: precision 1/2, recall 1/2; class 1: 3/4 and 3/4; weights 2/6 and 4/6
    assert_allclose(found["f1_has0"], 2 / 6 * 0.5 + 4 / 6 * 0.75)
    # > 0 without the third: truth 0 0 1 1 1, guess 0 1 0 1 1: three of five
    assert_allclose(found["acc2_non0"], 3 / 5)
    assert_allclose(found["f1_non0"], 2 / 5 * 0.5 + 3 / 5 * (2 / 3))
    # rounded: truth -2 -1 0 0 2 3, guess -2 0 0 0 1 3 (4.0 is clipped)
    assert_allclose(found["acc7"], 4 / 6)


def test_zero_is_non_negative_but_not_positive() -> None:
    found = metrics(np.array([0.0, 0.0, 0.0]), np.array([0.0, 1.0, -1.0]))
    assert_allclose(found["acc2_has0"], 2 / 3)
    assert_allclose(found["acc2_non0"], 1 / 2)


def test_acc7_rounds_half_to_even_as_numpy_does() -> None:
    found = metrics(np.array([0.5, 1.5, -2.5, 2.6]), np.array([0.0, 2.0, -2.0, 2.5]))
    assert_allclose(found["acc7"], 3 / 4)


def test_a_constant_prediction_correlates_with_nothing() -> None:
    found = metrics(np.full(4, 0.3), np.array([1.0, -1.0, 2.0, 0.0]))
    assert found["corr"] == 0.0
    assert all(np.isfinite(value) for value in found.values())


def test_a_perfect_prediction() -> None:
    labels = np.array([-3.0, -1.2, 0.0, 2.2])
    found = metrics(labels, labels)
    assert_allclose(found.pop("mae"), 0)
    assert_allclose(list(found.values()), 1)


def test_summary_means_over_combinations_and_finds_the_worst() -> None:
    one = dict.fromkeys(METRICS, 1.0)
    two = {**one, "mae": 3.0, "corr": 0.0}
    found = summarise({"text": one, "audio": two})
    assert (found["mae"], found["corr"], found["acc7"], found["worst_mae"]) == (2.0, 0.5, 1.0, 3.0)


# --- training ------------------------------------------------------------------------------------


def test_missing_modalities_are_drawn_at_their_rates() -> None:
    rates = {"text": 0.2, "vision": 0.8}
    drawn = draw_available(everything(20_000), rates, torch.Generator().manual_seed(0))
    assert drawn[:, 1].all(), "audio is never missing"
    assert_allclose(1 - drawn.double().mean(0).numpy(), [0.2, 0, 0.8], atol=0.01)
    both = (~drawn[:, 0] & ~drawn[:, 2]).double().mean()
    assert_allclose(both, 0.2 * 0.8, atol=0.01)
    present = everything(2_000)
    present[:500, 0] = present[250:750, 1] = False
    present[0] = False
    high = dict.fromkeys(MODALITIES, 0.9)
    rare = draw_available(present, high, torch.Generator().manual_seed(0))
    assert rare[1:].any(1).all() and not (rare & ~present).any()
    assert torch.equal(rare, draw_available(present, high, torch.Generator().manual_seed(0)))


def everything(count: int) -> torch.Tensor:
    return torch.ones(count, len(MODALITIES), dtype=torch.bool)


def test_a_loss_is_over_the_samples_that_have_all_of_its_modalities(data: SentimentData) -> None:
    """And so is the score that validation selects by; what no sample has is unavailable."""
    rates = {"text": 0.97, "audio": 0.3}
    training = Training(small(dropout=0.0, missing=rates), data, "sum", 3)
    train, valid = data.splits["train"], data.splits["valid"]
    has, errors = {}, {}
    generator = torch.Generator().manual_seed(3)
    for name, split in (("train", train), ("valid", valid)):
        available = draw_available(split.available, rates, generator).tolist()
        for combination in COMBINATIONS:
            has[name, "+".join(combination)] = [
                number
                for number, here in enumerate(available)
                if all(here[MODALITIES.index(modality)] for modality in combination)
            ]
    scores = predict(training.model, train)
    expected = {}
    for number, name in enumerate(NAMES):
        some = has["train", name]
        if some:
            wrong = abs(scores[number][some] - train.labels.numpy()[some])
            expected[name] = float(wrong.mean())
    training.model.train()
    training._step(train, torch.arange(len(train)))
    report = training.optimizer.last
    assert report is not None and set(report.names) == set(expected) != set(NAMES)
    for name, loss in zip(report.names, report.losses.tolist(), strict=True):
        assert_allclose(loss, expected[name], rtol=1e-5)
    scores = predict(training.model, valid)
    for number, name in enumerate(NAMES):
        if has["valid", name]:
            wrong = abs(scores[number] - valid.labels.numpy())[has["valid", name]]
            errors[name] = float(wrong.mean())
    found = mean_error(training.model, valid, training.has["valid"])
    assert_allclose(found, np.mean(list(errors.values())), rtol=1e-6)


def test_what_an_utterance_lacks_counts_nowhere(tmp_path: Path, file: Path) -> None:
    """Not in training, validation or test: the label of one without anything changes nothing."""
    layout = pickle.loads(file.read_bytes())
    for part in layout.values():
        part["text"][:5] = part["audio"][4:6] = part["vision"][4:6] = 0
    outcomes = []
    for label in (3.0, -3.0):
        for part in layout.values():
            part["regression_labels"][4] = label
        (tmp_path / "lacking.pkl").write_bytes(pickle.dumps(layout))
        out = tmp_path / f"out{label}"
        arguments = ["--data", str(tmp_path / "lacking.pkl"), "--methods", "sum,gmd", *SMALL]
        assert main([*arguments, "--seeds", "2", "--epochs", "2", "--out", str(out)]) == 0
        outcomes.append(outcome(out))
    assert outcomes[0] == outcomes[1]
    found = json.loads((out / "results.json").read_text())
    assert found["data"]["cleaning"]["test"]["text"]["empty_utterances"] == 5
    counts = {"text": 19, "audio": 22, "vision": 22, "audio+vision": 22}
    assert found["test_utterances"] == {name: counts.get(name, 18) for name in NAMES}
    table = (out / "table.md").read_text()
    assert re.search(r"^\| text +\| 19 \|", table, re.M)
    assert re.search(r"^\| \(train mean\) +\| 24 \|", table, re.M)
    assert "gmd against sum, mean MAE over the 18 to 22 of 24 test utterances" in table


def test_a_batch_in_which_no_combination_has_a_sample_is_passed_over(data: SentimentData) -> None:
    training = Training(small(missing={"text": 0.9}, combinations="k=1"), data, "sum", 0)
    steps = [training._step(data.splits["train"], torch.tensor([n])) for n in range(24)]
    assert None in steps and len(training.merges.weights) == 24 - steps.count(None)


def test_balance_weighs_by_the_norms_of_the_first_steps(data: SentimentData) -> None:
    training = Training(small(combinations="singles", epochs=8), data, "balance", 0)
    for _ in range(8):
        training.train_epoch(Silent())
    gramians = training.merges.stacked()["gramians"][:20]
    inverse = 1 / gramians.diagonal(dim1=1, dim2=2).mean(0).sqrt()
    assert training.balance is not None
    weights = [training.balance.weights[name] for name in MODALITIES]
    assert_allclose(weights, inverse / inverse.mean(), rtol=1e-9)


def test_sum_takes_the_gradient_of_the_mean_loss(data: SentimentData) -> None:
    training = Training(small(dropout=0.0), data, "sum", 0)
    inputs, labels = data.splits["train"].batch(torch.arange(8))

    def losses() -> list[torch.Tensor]:
        scores = training.model(inputs, combinations=COMBINATIONS)
        return [torch.nn.functional.l1_loss(scores[i], labels) for i in range(7)]

    (sum(losses(), torch.zeros(())) / 7).backward()
    expected = [parameter.grad for parameter in training.model.parameters()]
    training.optimizer.zero_grad()
    training.optimizer.backward(losses())
    for parameter, gradient in zip(training.model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_plain_sum_is_batched() -> None:
    assert torch.equal(plain_sum(torch.zeros(5, 3, 3)), torch.ones(5, 3))


def test_methods_start_alike_and_see_the_same_batches(
    data: SentimentData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Any]] = {}
    for method in METHODS:
        training = Training(small(), data, method, 1)
        start = [parameter.clone() for parameter in training.model.parameters()]
        batches: list[Any] = []
        step = training._step

        def spy(train: Split, index: torch.Tensor, step: Any = step, to: Any = batches) -> float:
            to.append(index)
            return float(step(train, index))

        monkeypatch.setattr(training, "_step", spy)
        training.train_epoch(Silent())
        training.train_epoch(Silent())
        seen[method] = [*start, *batches]
    for other in seen.values():
        assert all(torch.equal(a, b) for a, b in zip(seen["full"], other, strict=True))
    first, second = seen["full"][-6:-3], seen["full"][-3:]
    assert not torch.equal(torch.cat(first), torch.cat(second)), "each epoch has its own order"


@pytest.mark.parametrize(("combinations", "rows"), [("all", 7), ("singles", 3), ("k=4", 4)])
def test_what_is_trained_on(data: SentimentData, combinations: str, rows: int) -> None:
    training = Training(small(combinations=combinations), data, "gmd", 0)
    training.train_epoch(Silent())
    records = training.merges.stacked()
    assert records["gramians"].shape == (3, rows, rows)
    assert records["weights"].shape == records["trained"].shape == (3, rows)
    drawn = {tuple(sorted(row)) for row in records["trained"].tolist()}
    assert (len(drawn) > 1) == (combinations == "k=4")


def test_sampled_combinations_are_the_same_for_every_method(data: SentimentData) -> None:
    drawn = []
    for method in ("sum", "gmd", "pcgrad"):
        training = Training(small(combinations="k=2"), data, method, 0)
        training.train_epoch(Silent())
        drawn.append(training.merges.stacked()["trained"])
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_full_trains_on_all_modalities_only(data: SentimentData) -> None:
    training = Training(small(combinations="singles"), data, "full", 0)
    training.train_epoch(Silent())
    assert training.merges.stacked()["trained"].tolist() == [[0]] * 3
    assert NAMES[0] == "+".join(MODALITIES)


def test_the_epoch_with_the_best_validation_is_tested(data: SentimentData) -> None:
    training = Training(small(lr=0.05, epochs=6), data, "sum", 0)
    weights = []
    for _ in range(6):
        training.train_epoch(Silent())
        weights.append({k: v.clone() for k, v in training.model.state_dict().items()})
    found = training.result()
    by_epoch = [entry["valid_mae"] for entry in training.history]
    assert found["best_epoch"] == int(np.argmin(by_epoch)) + 1 < 6, "else this shows nothing"
    assert found["valid_mae"] == min(by_epoch)
    training.model.load_state_dict(weights[found["best_epoch"] - 1])
    assert found["test"] == evaluate(training.model, data.splits["test"])


@pytest.mark.parametrize("count", [1, 65])
def test_a_remainder_of_one_utterance_is_evaluated(data: SentimentData, count: int) -> None:
    model = Training(small(), data, "sum", 0).model
    part = data.splits["test"]
    index = torch.arange(count) % len(part)
    split = Split(
        {name: x[index] for name, x in part.features.items()},
        {name: x[index] for name, x in part.lengths.items()},
        part.labels[index],
    )
    found = predict(model, split)
    assert_allclose(found, predict(model, part)[:, index.numpy()], rtol=1e-4, atol=1e-6)
    assert all(np.isfinite(list(row.values())).all() for row in
               evaluate(model, split).values())  # fmt: skip


def test_clipping_limits_the_merged_gradient(data: SentimentData) -> None:
    training = Training(small(clip_norm=1e-3, optimizer="sgd", lr=1.0, weight_decay=0.0), data,
                        "gmd", 0)  # fmt: skip
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    training._step(data.splits["train"], torch.arange(8))
    after = training.model.parameters()
    moved = [(p.detach() - b).norm() for p, b in zip(after, before, strict=True)]
    assert_allclose(float(torch.stack(moved).norm()), 1e-3, rtol=1e-3)


# --- result files --------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        results.write_json(path, {"a": float("nan")})
    with pytest.raises(KeyboardInterrupt), results.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["results.json"]


def test_folders_are_not_shared(tmp_path: Path) -> None:
    wanted = tmp_path / "run"
    names = []
    for _ in range(3):
        folder = results.new_folder(wanted, ["results.json"])
        (folder / "results.json").touch()
        names.append(folder.name)
    assert names == ["run", "run-2", "run-3"]


def test_tables_are_aligned() -> None:
    table = results.markdown_table(["a", "long"], [["wide cell", "1"]])
    assert table == "| a         | long |\n|-----------|------|\n| wide cell | 1    |\n"
    with pytest.raises(ValueError, match="1 cells, the header 2"):
        results.markdown_table(["a", "b"], [["1"]])


def test_spread_is_the_sample_standard_deviation() -> None:
    assert results.format_spread([1.0, 3.0], digits=2) == "2.00 ± 1.41"
    assert results.format_spread([1.0]) == "1.000"


def test_checkpoints_that_are_cut_off_or_of_another_format_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"a": torch.ones(2), "b": [1, None, "x"]})
    assert load_checkpoint(path)["b"] == [1, None, "x"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_checkpoint(path)
    torch.save({"format": 3, "made": Path("by another program")}, path)
    with pytest.raises(ValueError, match="not a checkpoint") as refused:
        load_checkpoint(path)
    assert "weights_only" not in "".join(traceback.format_exception(refused.value))
    torch.save({"format": 99}, path)
    with pytest.raises(ValueError, match="format 99"):
        load_checkpoint(path)


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "gmd,magic"], "--methods: unknown method 'magic' (choose from full, sum"),
        (["--methods", "gmd,gmd"], "--methods: 'gmd,gmd' names a method twice"),
        (["--combinations", "k=8"], "--combinations: 'k=8' (choose from all, singles, k=1 to k=7)"),
        (["--seeds", "0"], "--seeds: must be a whole number of at least 1, got '0'"),
        (["--lr", "-1"], "--lr: must be a positive number, got '-1'"),
        (["--lr", "nan"], "--lr: must be a positive number, got 'nan'"),
        (["--dropout", "1"], "--dropout: must be a number from 0 to below 1"),
        (["--optimizer", "lion"], "--optimizer: invalid choice: 'lion' (choose from"),
        (["--loss", "huber"], "--loss: invalid choice: 'huber' (choose from"),
        (["--width", "10", "--heads", "4"], "--width: must be even and a multiple of --heads"),
        (["--data", "nowhere.pkl"], "nowhere.pkl: No such file"),
        (["--resume", "nowhere"], "--resume: nowhere holds no checkpoint.pt"),
        (["--resume", "x", "--lr", "1", "--batch-size", "4"], "leave out --lr, --batch-size"),
        (["--resume", "x", "--out", "y"], "leave out --out"),
    ],
)
def test_bad_options_are_named_and_leave_nothing_behind(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bad_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.pkl").write_bytes(b"no pickle")
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path / "broken.pkl"), "--out", str(tmp_path / "out")])
    assert "--data: " in (error := capsys.readouterr().err)
    assert "broken.pkl: not a readable pickle" in error
    assert not (tmp_path / "out").exists()


def test_a_run_from_end_to_end(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(file), "--seeds", "2", "--epochs", "2", *SMALL]
    out = tmp_path / "out"
    assert main([*arguments, "--out", str(out)]) == 0
    assert sorted(os.listdir(out)) == [
        "before_after.png", "gradients.png", "results.json", "scores.png", "table.md",
    ]  # fmt: skip
    for picture in out.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    table = (out / "table.md").read_text()
    found = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    printed = capsys.readouterr()
    assert table in printed.out
    # in a log file, where there is no progress bar, what is going on
    begun = [line for line in printed.err.splitlines() if line.startswith("[3/8] ")]
    assert len(begun) == 4 and begun[0] == "[3/8] gmd, seed 0"
    told = r"\[3/8\] gmd, seed 0, epoch 2/2: train loss [0-9.]+, valid mae [0-9.]+"
    assert re.fullmatch(told, begun[2])
    assert "synthetic" not in table.lower()
    assert found["data"]["sha256"] == results.file_sha256(file)
    assert found["data"]["sha256"] in table
    assert shlex.join(arguments) in table
    assert found["config"]["methods"] == ["full", "sum", "gmd", "pcgrad"]
    assert [(run["seed"], run["method"]) for run in found["runs"]] == [
        (seed, method) for seed in (0, 1) for method in ("full", "sum", "gmd", "pcgrad")
    ]
    assert "gmd against sum, mean MAE: " in table
    assert "paired over 2 seeds" in table

    assert main([*arguments, "--out", str(out)]) == 0
    assert outcome(out) == outcome(tmp_path / "out-2"), "the same command, the same numbers"


def test_what_is_odd_in_the_data_is_said(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = pickle.loads(file.read_bytes())
    layout["train"]["regression_labels"][:2] = 1e30, -4
    layout["valid"]["regression_labels"] = -abs(layout["valid"]["regression_labels"])
    layout["train"]["audio"][0, 0, :3] = -np.inf
    layout["test"]["audio"][0, 0, 3] = 1e9
    layout["valid"]["text"][:, -3:] = 0
    layout["valid"]["text"][1] = np.roll(layout["valid"]["text"][1], 3, axis=0)
    layout["test"]["vision"][:2] = layout["train"]["vision"][..., 0] = 0
    odd, out = tmp_path / "odd.pkl", tmp_path / "out"
    odd.write_bytes(pickle.dumps(layout))
    arguments = ["--data", str(odd), "--methods", "sum", "--seeds", "1", "--epochs", "1", *SMALL]
    assert main([*arguments, "--out", str(out)]) == 0
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


def test_the_table_opens_with_the_verdict_and_says_what_its_words_mean(
    tmp_path: Path, file: Path
) -> None:
    out = tmp_path / "out"
    methods = ["--methods", ",".join(METHODS), "--seeds", "1", "--epochs", "1"]
    main(["--data", str(file), *methods, *SMALL, "--out", str(out)])
    title, verdict, *rest = (out / "table.md").read_text().split("\n\n")
    assert verdict.startswith("gmd against sum, mean MAE: ")
    measures = ["conflict", "opposed", "merged", "dominance", "alignment", "share"]
    defined = re.findall(r"^- \*\*(.+)\*\*: .{20,}[.]$", rest[-1], re.M)
    assert defined == [*METHODS, *measures]
    (table,) = [part for part in rest if "pairs in conflict" in part]
    assert all(measure in table for measure in measures)


def test_synthetic_results_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    main(["--methods", "sum", "--seeds", "1", "--epochs", "1", *SMALL, "--out", str(out)])
    titles = [line for line in (out / "table.md").read_text().splitlines() if line[:1] == "#"]
    assert len(titles) == 6
    assert all("SYNTHETIC" in title for title in titles)
    assert json.loads((out / "results.json").read_text())["data"]["synthetic"] is True


def test_pictures_say_what_data_they_show(data: SentimentData) -> None:
    def label(source: str) -> str:
        shown = SentimentData(data.splits, source, "0123456789abcdef", {})
        return Report(shown, {}, "", {}, [], {}, {}).label

    assert "SYNTHETIC" in label("synthetic")
    assert label("/data/mosi.pkl") == "mosi.pkl (SHA-256 0123456789ab)"


def test_full_alone_has_no_gradient_pictures(tmp_path: Path, file: Path) -> None:
    out = tmp_path / "out"
    main(["--data", str(file), "--methods", "full", "--seeds", "1", "--epochs", "1", *SMALL,
          "--out", str(out)])  # fmt: skip
    assert sorted(os.listdir(out)) == ["results.json", "scores.png", "table.md"]


@pytest.mark.parametrize(("size", "what"), [("8", "the loss"), ("24", "a score")])
def test_divergence_is_an_error_that_says_what_to_do(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str], size: str, what: str
) -> None:
    arguments = ["--data", str(file), "--methods", "sum", "--optimizer", "sgd", "--lr", "1e30"]
    arguments += [*SMALL, "--batch-size", size, "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    expected = f"sum, seed 0, epoch 1: {what} is not a finite number; try a lower --lr"
    assert expected in capsys.readouterr().err


# --- resuming ------------------------------------------------------------------------------------


RESUMED = [
    "--methods",
    "full,balance,pcgrad",
    "--combinations",
    "k=3",
    "--seeds",
    "2",
    "--epochs",
    "2",
]


@pytest.fixture(scope="module")
def uninterrupted(file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("whole") / "out"
    main(["--data", str(file), *RESUMED, *SMALL, "--out", str(out)])
    return outcome(out)


@pytest.mark.parametrize(
    "steps", [7, 17, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1, 4, 6, 28, 35))]
)
def test_a_run_cut_off_anywhere_continues_exactly(
    tmp_path: Path,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    uninterrupted: list[dict[str, Any]],
    steps: int,
) -> None:
    out = tmp_path / "out"
    left = [steps]
    step = Training._step

    def interrupted(self: Training, *batch: Any) -> float:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return step(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", interrupted)
        assert main(["--data", str(file), *RESUMED, *SMALL, "--out", str(out)]) == 130
    assert os.listdir(out) == ["checkpoint.pt"]
    assert f"-m benchmarks.sentiment --resume {out}" in capsys.readouterr().err
    torch.manual_seed(12345)  # whatever happened in between
    assert main(["--resume", str(out)]) == 0
    assert outcome(out) == uninterrupted

    capsys.readouterr()
    assert main(["--resume", str(out)]) == 0
    assert f"{out} is already finished" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="a terminal as on POSIX")
def test_resuming_on_a_terminal_says_from_where(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar takes what was done before for done, not for work of the last second."""
    import fcntl
    import pty
    import struct
    import termios

    train_epoch = Training.train_epoch

    def interrupted(self: Training, progress: Any) -> None:
        if self.epoch == 3:
            raise KeyboardInterrupt
        train_epoch(self, progress)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Training, "train_epoch", interrupted)
        main(["--data", str(file), "--methods", "full", "--epochs", "4", "--seeds", "1", *SMALL,
              "--out", str(out)])  # fmt: skip
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    command = [sys.executable, "-m", "benchmarks.sentiment", "--resume", str(out)]
    subprocess.run(command, cwd=ROOT, stderr=terminal, stdout=subprocess.DEVNULL, check=True)
    said = os.read(master, 100_000).decode()
    os.close(terminal)
    os.close(master)
    assert "[1/1] full, seed 0: continues after epoch 3 of 4" in said
    assert re.search(r"9/12 \[00:00<\?, ", said)


def test_resuming_with_other_data_is_refused(
    tmp_path: Path,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "copy.pkl"
    copy.write_bytes(file.read_bytes())
    out = tmp_path / "out"

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Training, "train_epoch", interrupted)
        main(["--data", str(copy), *SMALL, "--out", str(out)])
    layout = pickle.loads(copy.read_bytes())
    layout["train"]["text"][0, 0, 0] += 1
    copy.write_bytes(pickle.dumps(layout))
    with pytest.raises(SystemExit):
        main(["--resume", str(out)])
    assert "the data has changed since the run began" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is sent as on POSIX")
def test_ctrl_c_prints_the_command_that_continues_exactly(tmp_path: Path, file: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.sentiment", "--data", str(file), *SMALL,
               "--methods", "sum,gmd", "--seeds", "1", "--epochs", "10"]  # fmt: skip

    def start(*arguments: str) -> subprocess.Popen[str]:
        # A test run in the background has SIGINT ignored, and would pass that on.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                arguments,
                cwd=ROOT,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*command[3:], "--out", str(whole)]) == 0

    process = start(*command, "--out", str(cut))
    wait_for_epochs(process, cut / "checkpoint.pt", 3)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    resume = shlex.split(error.strip().splitlines()[-1])
    assert resume == [sys.executable, "-m", "benchmarks.sentiment", "--resume", str(cut)]

    process = start(*resume)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert outcome(cut) == outcome(whole)


def wait_for_epochs(process: subprocess.Popen[str], checkpoint: Path, epochs: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if checkpoint.exists():
            current = load_checkpoint(checkpoint)["current"]
            if current is not None and current["epoch"] >= epochs:
                return
        time.sleep(0.02)
    raise AssertionError("no checkpoint in time")


# --- the real file -------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.exists(), reason=f"the real MOSI data is not here ({REAL})")
def test_real_data_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(REAL), "--methods", "sum,gmd", "--seeds", "1", "--epochs", "2"]
    assert main([*arguments, "--width", "16", "--depth", "1", "--out", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["data"]["shapes"]["train"]["text"] == [449, 50, 96]
    for run in found["runs"]:
        assert run["history"][-1]["train_loss"] < run["history"][0]["train_loss"]
        assert run["summary"]["mae"] < 1.5
