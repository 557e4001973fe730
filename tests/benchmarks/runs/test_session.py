"""Runs of every benchmark: cut off anywhere they continue exactly, or are refused by reason.

On several ranks: test_ranks.py.
"""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from benchmarks.brats import __main__ as brats
from benchmarks.brats import training as brats_training
from benchmarks.regimes import __main__ as regimes
from benchmarks.regimes.data import settings
from benchmarks.runs import results, session
from benchmarks.runs.checkpoint import load_checkpoint, save_checkpoint
from benchmarks.sentiment import __main__ as sentiment
from tests.benchmarks.running import (
    ROOT,
    SMALL,
    Capsys,
    assert_same_run,
    cut_off,
    end,
    printed,
    refused,
    run,
    start,
    wait_for_epochs,
)

MAINS = {"sentiment": sentiment.main, "brats": brats.main, "regimes": regimes.main}

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals and terminals as on POSIX")


@pytest.fixture(scope="module")
def regimes_options() -> Iterator[list[str]]:
    """Two settings are enough here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regimes, "settings", lambda part, quick: settings(part, quick)[:2])
        yield ["--preset", "quick", "--parts", "contradiction", "--threads", "1"]


@pytest.fixture(scope="module")
def regimes_run(regimes_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("regimes") / "out"
    run(regimes.main, *regimes_options, "--out", out)
    return out


# --- cut off -------------------------------------------------------------------------------------

# Where Ctrl-C comes, and what is kept then: trainings done, the epoch of the one under way.
# Sentiment's trainings have two epochs of three steps, those of BraTS two of two.
CUTS = [
    ("sentiment", sentiment.Training, "step", 8, 1, None),
    ("sentiment", sentiment.Training, "step", 22, 3, 1),  # of pcgrad, whose order is random
    ("sentiment", sentiment.Training, "step", 28, 4, 1),  # of balance, while it measures
    ("sentiment", session, "save_checkpoint", 2, 0, 1),  # instead of what the epoch's end keeps
    ("sentiment", results, "atomic_path", 1, 10, None),  # half of the report is written
    ("brats", brats.Training, "step", 3, 0, 1),
    ("brats", brats.Training, "save_models", 3, 1, 2),
    ("brats", brats_training, "case_scores", 7, 0, 2),
    ("brats", results, "atomic_path", 1, 2, None),
    ("regimes", regimes, "study", 1, 1, None),
    ("regimes", results, "atomic_path", 1, 2, None),
]
FAST = {0, 1, 4, 6, 7, 9}


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "calls", "done", "epoch"),
    [pytest.param(*cut, marks=[] if n in FAST else pytest.mark.slow,
                  id=f"{cut[0]}-{cut[2]}{cut[3]}") for n, cut in enumerate(CUTS)],
)  # fmt: skip
def test_a_run_cut_off_anywhere_continues_exactly(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: Capsys,
    name: str,
    owner: Any,
    attribute: str,
    calls: int,
    done: int,
    epoch: int | None,
) -> None:
    """And writes into no other run's folder, and clears up after a process that was killed."""
    whole = request.getfixturevalue(f"{name}_run")
    request.getfixturevalue("no_pictures")
    taken, out = tmp_path / "out", tmp_path / "out-2"
    taken.mkdir()
    (taken / "results.json").touch()
    options = [*request.getfixturevalue(f"{name}_options"), "--out", taken]
    cut_off(owner, attribute, calls, MAINS[name], *options)
    assert os.listdir(taken) == ["results.json"]
    assert "results.json" not in os.listdir(out)
    said = capsys.readouterr().err
    assert f"{taken} holds another run; writing to {out}" in said
    assert said.endswith(f"-m benchmarks.{name} --resume {out}\n")
    content = load_checkpoint(out / "checkpoint.pt")
    assert len(content["done"]) == done
    assert (content["current"] or {}).get("epoch") == epoch

    for file in ("checkpoint.pt", *os.listdir(whole)):
        stem, _, suffix = file.rpartition(".")
        (out / f".{stem}-99999.{suffix}").write_bytes(b"half of it")
    torch.manual_seed(12345)  # whatever happened in between
    run(MAINS[name], "--resume", out)
    assert_same_run(out, whole)

    capsys.readouterr()
    run(MAINS[name], "--resume", out)
    table = (out / "table.md").read_text()
    assert f"{out} is already finished:\n\n{table}" in capsys.readouterr().out
    assert "leave out --seeds" in refused(MAINS[name], capsys, "--resume", out, "--seeds", "2")


@pytest.mark.parametrize(
    ("name", "owner", "attribute"),
    [("sentiment", sentiment, "load_file"), ("brats", nibabel.Nifti1Image, "from_bytes")],
)
def test_ctrl_c_while_the_data_are_read(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: Capsys,
    name: str,
    owner: Any,
    attribute: str,
) -> None:
    options = request.getfixturevalue(f"{name}_options")
    cut_off(owner, attribute, 0, MAINS[name], *options, "--out", tmp_path / "out")
    assert capsys.readouterr().err == "\ninterrupted\n"
    assert not list(tmp_path.iterdir())


# --- refused -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cut_once(sentiment_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cut") / "out"
    cut_off(sentiment.Training, "step", 8, sentiment.main, *sentiment_options, "--out", out)
    return out


@pytest.fixture
def cut(cut_once: Path, tmp_path: Path) -> Path:
    """A copy of a sentiment run that was cut off in its second training."""
    return Path(shutil.copytree(cut_once, tmp_path / "cut"))


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_model(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, path)


def changed(**entries: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = load_checkpoint(path)
        save_checkpoint(path, {**content, "config": {**content["config"], **entries}})

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b""), "not a checkpoint of a benchmark, or cut off"),
        (lambda path: path.write_bytes(b"text"), "not a checkpoint of a benchmark, or cut off"),
        (half, "not a checkpoint of a benchmark, or cut off"),
        (a_model, "not a checkpoint of a benchmark, or cut off"),
        (lambda path: torch.save({"made": path}, path), "not a checkpoint of a benchmark"),
        (lambda path: torch.save([1], path), "checkpoint format None, this version reads"),
        (lambda path: torch.save({"format": 99}, path), "checkpoint format 99, this version reads"),
        (lambda path: save_checkpoint(path, {"a": 1}), "not a checkpoint of a run; start again"),
        (lambda path: path.unlink(), "holds no checkpoint.pt of an interrupted run"),
        (changed(clip_norm=1.0), "written by another version of the benchmarks"),
        (changed(device="abacus"), "'abacus' cannot be used here"),
    ],
    ids=["empty", "text", "half", "model", "program", "list", "format", "content", "none",
         "version", "device"],
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_used(
    cut: Path, capsys: Capsys, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(cut / "checkpoint.pt")
    left = sorted(os.listdir(cut))
    said = refused(sentiment.main, capsys, "--resume", cut)
    assert said.startswith("python -m benchmarks.sentiment: error: argument --resume: ")
    assert message in said
    assert "weights_only" not in said, "torch's own advice would run code from the file"
    assert sorted(os.listdir(cut)) == left


def test_a_bad_checkpoint_relays_no_advice_of_torch(tmp_path: Path) -> None:
    torch.save({"made": tmp_path}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="not a checkpoint") as caught:
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("name", ["brats", "regimes"])
def test_another_benchmarks_run_is_not_continued(
    cut: Path, sentiment_run: Path, capsys: Capsys, name: str
) -> None:
    said = refused(MAINS[name], capsys, "--resume", cut)
    assert f"{cut} holds a run of python -m benchmarks.sentiment" in said
    said = refused(MAINS[name], capsys, "--resume", sentiment_run)
    assert f"--resume: {sentiment_run} holds the results of another benchmark" in said


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("sentiment", ["--lr", "1", "--batch-size=4"], "--lr, --batch-size"),
        ("sentiment", ["--epochs", "20"], "--epochs"),  # the default
        ("sentiment", ["--preset", "study"], "--preset"),
        ("sentiment", ["--out", "elsewhere"], "--out"),
        ("brats", ["--predict", "masks", "--check"], "--check"),
        ("brats", ["--allow-missing"], "--allow-missing"),
        ("regimes", ["--first-seed", "0"], "--first-seed"),
    ],
)
def test_what_a_run_began_with_cannot_be_changed(
    cut: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capsys,
    name: str,
    options: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(cut)
    said = refused(MAINS[name], capsys, "--resume", cut, *options)
    assert f"--resume: takes everything from {cut}; leave out {named}, or start a new run" in said


def test_changed_data_are_refused(
    cut: Path, tmp_path: Path, utterances: Path, capsys: Capsys
) -> None:
    layout = pickle.loads(utterances.read_bytes())
    layout["train"]["text"][0, 0, 0] += 1
    other = tmp_path / "other.pkl"
    other.write_bytes(pickle.dumps(layout))
    changed(data=str(other))(cut / "checkpoint.pt")
    said = refused(sentiment.main, capsys, "--resume", cut)
    assert f"--resume: the data has changed since the run began: {other} has SHA-256" in said
    other.unlink()
    assert f"cannot use {other}: No such file" in refused(sentiment.main, capsys, "--resume", cut)


def test_changed_cases_are_refused(
    brats_run: Path, phantoms: Path, tmp_path: Path, capsys: Capsys
) -> None:
    """Nor does a finished run segment them: with folds, what was trained on may be tested."""
    cases = Path(shutil.copytree(phantoms, tmp_path / "cases"))
    out = Path(shutil.copytree(brats_run, tmp_path / "out"))
    content = json.loads((out / "results.json").read_text())
    content["config"]["data"] = str(cases)
    (out / "results.json").write_text(json.dumps(content))
    predict = ["--resume", out, "--predict", tmp_path / "masks"]
    run(brats.main, *predict)
    path = cases / "Phantom_001/Phantom_001_t1.nii.gz"
    image: Any = nibabel.load(path)
    array = np.asarray(image.dataobj).copy()
    array[10, 10, 8] += 1
    nibabel.save(nibabel.Nifti1Image(array, image.affine), path)
    assert "the data has changed since the run began" in refused(brats.main, capsys, *predict)
    shutil.rmtree(cases)
    assert "there is no such folder" in refused(brats.main, capsys, *predict)
    content["config"]["device"] = "abacus"
    (out / "results.json").write_text(json.dumps(content))
    assert "--resume: 'abacus' cannot be used here" in refused(brats.main, capsys, *predict)


def test_other_versions_are_warned_of(cut: Path, no_pictures: None, capsys: Capsys) -> None:
    content = load_checkpoint(cut / "checkpoint.pt")
    content["environment"]["torch"] = "0.4"
    save_checkpoint(cut / "checkpoint.pt", content)
    run(sentiment.main, "--resume", cut)
    assert f"the run began with torch 0.4, this is {torch.__version__}" in capsys.readouterr().err


# --- in processes of their own -------------------------------------------------------------------


@posix
def test_ctrl_c_prints_the_command_that_continues_exactly(tmp_path: Path, utterances: Path) -> None:
    command = ["benchmarks.sentiment", "--data", utterances, *SMALL, "--methods", "gmd",
               "--seeds", "1", "--epochs", "30"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(*command, "--out", cut)
    run(sentiment.main, *command[1:], "--out", whole)
    wait_for_epochs(cut, 3)
    error = end(process, signal.SIGINT)
    assert process.returncode == 130, error
    again = printed(error)
    assert again == [sys.executable, "-m", "benchmarks.sentiment", "--resume", str(cut)]
    process = start(*again[2:])
    error = end(process)
    assert process.returncode == 0, error
    assert_same_run(cut, whole)


@pytest.mark.slow
@posix
@pytest.mark.parametrize("workers", ["0", "2"])
def test_brats_killed_in_the_middle_of_an_epoch_twice(
    tmp_path: Path, brats_options: list[str], workers: str
) -> None:
    # An epoch is long against the time it takes to see that another one has ended.
    long = ["--methods", "gmd", "--combinations", "k=5", "--epochs", "8", "--workers", workers]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(brats.main, *brats_options, *long, "--out", whole)
    command = [*brats_options, *long, "--out", cut]
    for epochs in (2, 5):
        process = start("benchmarks.brats", *command)
        wait_for_epochs(cut, epochs)
        time.sleep(0.3)  # into the next one
        end(process, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert epochs <= load_checkpoint(cut / "checkpoint.pt")["current"]["epoch"] < 8
        command = ["--resume", cut]
    process = start("benchmarks.brats", *command)
    error = end(process)
    assert process.returncode == 0, error
    assert_same_run(cut, whole)


@posix
def test_resuming_on_a_terminal_says_from_where(tmp_path: Path, utterances: Path) -> None:
    """The bar takes what was done before for done, not for work of the last second."""
    import fcntl
    import pty
    import struct
    import termios

    out = tmp_path / "out"
    cut_off(sentiment.Training, "train_epoch", 3, sentiment.main, "--data", utterances, *SMALL,
            "--methods", "full", "--epochs", "4", "--seeds", "1", "--out", out)  # fmt: skip
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    command = [sys.executable, "-m", "benchmarks.sentiment", "--resume", str(out)]
    subprocess.run(command, cwd=ROOT, stderr=terminal, stdout=subprocess.DEVNULL, check=True)
    said = os.read(master, 100_000).decode()
    os.close(terminal)
    os.close(master)
    assert "[1/1] full, seed 0: continues after epoch 3 of 4" in said
    assert re.search(r"72/96 \[00:00<\?, ", said)
