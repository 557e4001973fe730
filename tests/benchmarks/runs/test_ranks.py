"""The benchmarks on several ranks: the numbers of one process, one voice, an end to go on from.

Ranks are started as torchrun starts them, by a server that has imported what they need; one test
runs torchrun itself. What is compared with one process is equal up to the order of additions.
"""

import dataclasses
import json
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load_weights
from torch import Tensor
from torch.distributed import TCPStore

from benchmarks.brats import __main__ as brats
from benchmarks.brats.phantom import write_phantoms
from benchmarks.brats.presets import OPTIMIZERS, Config
from benchmarks.brats.training import Training
from benchmarks.runs import command, ranks
from benchmarks.runs.checkpoint import load_checkpoint, save_checkpoint
from benchmarks.sentiment import __main__ as sentiment
from benchmarks.sentiment import training as sentiment_training
from benchmarks.sentiment.data import SentimentData, Split, load_file, synthetic_layout
from tests.benchmarks import running
from tests.benchmarks.running import (
    TINY,
    Capsys,
    Silent,
    assert_same_run,
    cut_off,
    outcome,
    printed,
    refused,
    run,
    wait_for_epochs,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent as on POSIX")


# --- starting ranks ------------------------------------------------------------------------------


class Started:
    """``program`` on some ranks; when one fails all are ended, as torchrun does."""

    def __init__(self, log: Path, count: int, program: Callable[..., int], *given: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["pytest", "benchmarks.brats.__main__", "benchmarks.sentiment.__main__"]
        )
        self.store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.log = log
        self.processes = []
        log.mkdir(exist_ok=True)
        for rank in range(count):
            environment = {
                "TORCHELASTIC_RUN_ID": "test",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(self.store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(count),
            }
            process = context.Process(target=_rank, args=(environment, log, program, given))
            process.start()
            self.processes.append(process)

    def codes(self) -> list[int | None]:
        """The exit codes, once all have ended."""
        deadline = time.monotonic() + 300
        while any(process.is_alive() for process in self.processes):
            assert time.monotonic() < deadline, "ranks wait for each other"
            if any(process.exitcode for process in self.processes):
                for process in self.processes:
                    process.terminate()
            time.sleep(0.02)
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def said(self, rank: int) -> str:
        """On stderr; what the transport says of lost connections apart."""
        lines = (self.log / f"{rank}.err").read_text().splitlines()
        return "\n".join(line for line in lines if "gloo" not in line.lower())


def _rank(
    environment: Mapping[str, str], log: Path, program: Callable[..., int], given: Sequence[Any]
) -> None:
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        path = log / f"{environment['RANK']}.{name}"
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    multiprocessing.set_start_method("fork", force=True)  # of a DataLoader's workers, as usual
    torch.set_num_threads(1)
    sys.exit(program(*given))


Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start(count, program, *given)``."""
    running: list[Started] = []

    def begin(count: int, program: Callable[..., int], *given: Any) -> Started:
        running.append(Started(tmp_path / f"log{len(running)}", count, program, *given))
        return running[-1]

    yield begin
    for one in running:
        one.kill()


def assert_close(found: Any, expected: Any, tolerance: float, where: str = "") -> None:
    """Nested mappings and lists: floats and tensors to a tolerance, all else equal."""
    if isinstance(expected, Mapping):
        assert list(found) == list(expected), where
        for key in expected:
            assert_close(found[key], expected[key], tolerance, f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert_close(*pair, tolerance, f"{where}/{number}")
    elif isinstance(expected, float | Tensor):
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=tolerance, equal_nan=True,
            msg=lambda text: f"{where}: {text}",
        )  # fmt: skip
    else:
        assert found == expected, where


# --- sentiment -----------------------------------------------------------------------------------

SMALL = [*running.SMALL, "--threads", "1"]
TRAINED = {"combinations": "k=4", "lr": 0.03, "dropout": 0.0, "batch_size": 8,
           "width": 8, "depth": 1, "heads": 2,
           "missing": {"text": 0.2, "audio": 0.5, "vision": 0.5}}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 utterances to train on: batches of 8, and one of 1. 70 to test on: two batches."""
    counts = {"train": 25, "valid": 24, "test": 70}
    layout = {
        split: {key: values[: counts[split]] for key, values in part.items()}
        for split, part in synthetic_layout().items()
    }
    path = tmp_path_factory.mktemp("data") / "small.pkl"
    path.write_bytes(pickle.dumps(layout))
    return path


def train_in_float64(file: Path, method: str, out: Path) -> int:
    """Three epochs; every rank writes what it has."""
    torch.set_default_dtype(torch.float64)
    data = load_file(file, 50)
    splits = {
        name: Split({k: x.double() for k, x in part.features.items()}, part.lengths,
                    part.labels.double())
        for name, part in data.splits.items()
    }  # fmt: skip
    data = SentimentData(splits, data.source, data.digest, data.cleaning)

    def program() -> int:
        config = dataclasses.replace(sentiment_training.PRESETS["quick"], **TRAINED)
        training = sentiment_training.Training(config, data, method, 0)
        for _ in range(3):
            training.train_epoch(Silent())
        kept = {"model": training.model.state_dict(), **training.finish(lambda: None)}
        del kept["result"]["seconds"]
        torch.save(kept, out / f"{ranks.rank()}.pt")
        return 0

    try:
        return ranks.run(program)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("count", "method"), [(2, "gmd"), (3, "pcgrad")])
def test_sentiment_ranks_train_as_one_process_does(
    tmp_path: Path, file: Path, start: Start, count: int, method: str
) -> None:
    ours, theirs = tmp_path / "one", tmp_path / "many"
    ours.mkdir()
    theirs.mkdir()
    many = start(count, train_in_float64, file, method, theirs)
    assert train_in_float64(file, method, ours) == 0
    assert many.codes() == [0] * count, many.said(0)
    expected = torch.load(ours / "0.pt")
    found = [torch.load(theirs / f"{rank}.pt") for rank in range(count)]
    assert (expected["records"]["weights"] > 1).any(), "else nothing was decoupled"
    assert_close(found[0], expected, 1e-9)
    for other in found[1:]:
        assert_close(other, found[0], 0.0)


def test_a_sentiment_run_on_ranks(
    tmp_path: Path, file: Path, start: Start, no_pictures: None
) -> None:
    arguments = ["--data", str(file), *SMALL, "--methods", "full,gmd", "--seeds", "1"]
    arguments += ["--epochs", "2", "--dropout", "0"]
    many = start(2, sentiment.main, [*arguments, "--out", str(tmp_path / "two")])
    run(sentiment.main, *arguments, "--out", tmp_path / "one")
    assert many.codes() == [0, 0], many.said(0)
    assert sorted(os.listdir(tmp_path / "two")) == sorted(os.listdir(tmp_path / "one"))
    # float32, AdamW: what is a rounding error in a small gradient is one in the step
    found, expected = outcome(tmp_path / "two"), outcome(tmp_path / "one")
    for one in (*found["runs"], *expected["runs"]):
        one.get("gradients", {}).pop("angle_counts", None)  # they jump
    assert_close(found["runs"], expected["runs"], 2e-4)
    assert found["environment"]["ranks"] == "2"
    begun = [line for line in many.said(0).splitlines() if line.startswith("[2/2] ")]
    assert len(begun) == 4 and begun[0] == "[2/2] gmd, seed 0"
    assert many.said(1) == (many.log / "1.out").read_text() == ""


LAUNCHER = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "benchmarks.sentiment"]
LONG = ["--methods", "gmd", "--combinations", "k=3", "--seeds", "1", "--epochs", "10"]


@pytest.fixture(scope="module")
def uninterrupted(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On two ranks, with dropout: of each rank its own."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = ["--data", str(file), *SMALL, *LONG, "--out", str(folder / "out")]
    assert Started(folder / "log", 2, sentiment.main, arguments).codes() == [0, 0]
    return folder / "out"


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_sentiment_ranks_that_are_ended_continue_exactly(
    tmp_path: Path, file: Path, start: Start, uninterrupted: Path, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    ended = start(2, sentiment.main, ["--data", str(file), *SMALL, *LONG, "--out", str(out)])
    wait_for_epochs(out, 2)
    for process in ended.processes:
        os.kill(process.pid or 0, number)
    codes, said = ended.codes(), ended.said(0)
    if number == signal.SIGKILL:
        assert codes == [-signal.SIGKILL] * 2
    else:
        assert codes[0] == 130, said
        assert printed(said) == [sys.executable, "-m", *LAUNCHER, "--resume", str(out)]
        assert ended.said(1) == ""
    current = load_checkpoint(out / "checkpoint.pt")["current"]
    assert current["epoch"] < 10
    assert not torch.equal(*(random["cpu"] for random in current["random"]))
    again = start(2, sentiment.main, ["--resume", str(out)])
    assert again.codes() == [0, 0], again.said(0)
    assert_same_run(out, uninterrupted)


def test_another_number_of_ranks_is_refused(
    tmp_path: Path, file: Path, start: Start, capsys: Capsys
) -> None:
    out = tmp_path / "out"
    arguments = ["--data", file, *SMALL, "--out", out]
    cut_off(sentiment.Training, "train_epoch", 0, sentiment.main, *arguments)
    many = start(3, sentiment.main, ["--resume", str(out)])
    assert many.codes() == [2, 2, 2]
    assert "argument --resume: the run began on 1 rank, this is 3; only the" in many.said(0)
    assert many.said(1) == many.said(2) == ""
    content = load_checkpoint(out / "checkpoint.pt")
    content["environment"]["ranks"] = "2"
    save_checkpoint(out / "checkpoint.pt", content)
    said = refused(sentiment.main, capsys, "--resume", out)
    assert "the run began on 2 ranks, this is 1" in said


def test_ranks_diverge_together(tmp_path: Path, file: Path, start: Start) -> None:
    arguments = ["--data", str(file), *SMALL, "--methods", "sum"]
    arguments += ["--lr", "1e30", "--out", str(tmp_path / "out")]
    many = start(2, sentiment.main, arguments)
    assert many.codes() == [1, 1]
    assert "sum, seed 0, epoch 1: the loss is not a finite number" in many.said(0)
    assert many.said(1) == ""


def one_fails(out: Path) -> int:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("item 3")
        return item * item

    def program() -> int:
        squares = ranks.divided(work, [0, 1, 2])
        try:
            ranks.divided(work, range(5))
        except ValueError as error:
            torch.save([squares, str(error)], out / f"{ranks.rank()}.pt")
        return 0

    return ranks.run(program)


def test_what_one_rank_raises_all_raise(tmp_path: Path, start: Start) -> None:
    assert start(2, one_fails, tmp_path).codes() == [0, 0]
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)] == [[[0, 1, 4], "item 3"]] * 2


def only_one_stops() -> int:
    ranks.PATIENCE = 0.1

    def program() -> int:
        if ranks.rank() == 1:
            print("no such file", file=sys.stderr)
            raise SystemExit(2)
        ranks.divided(str, [1, 2])
        return 0

    return ranks.run(program)


def test_a_mistake_of_one_rank_alone_is_heard(start: Start) -> None:
    many = start(2, only_one_stops)
    assert many.codes()[1] == 2
    assert "rank 1: no such file" in many.said(1)


@pytest.mark.slow
def test_ctrl_c_under_torchrun_prints_the_command_that_continues_exactly(
    tmp_path: Path, file: Path, uninterrupted: Path
) -> None:
    out = tmp_path / "out"
    process = running.start(*LAUNCHER, "--data", file, *SMALL, *LONG, "--out", out)
    wait_for_epochs(out, 1)
    error = running.end(process, signal.SIGINT)
    assert process.returncode != 0
    assert "[rank" not in error, error  # a traceback; torchrun has one of its own
    again = printed(error)
    assert again == [sys.executable, "-m", *LAUNCHER, "--resume", str(out)]
    process = running.start(*again[2:])
    error = running.end(process)
    assert process.returncode == 0, error
    assert_same_run(out, uninterrupted)


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (brats.main, ["--check"], "argument --check: measures one process; start it without"),
        (sentiment.main, ["--lr", "-1"], "--lr: must be positive, got '-1'"),
    ],
)
def test_what_is_refused_is_told_once(
    start: Start, main: Callable[[list[str]], int], arguments: list[str], message: str
) -> None:
    many = start(2, main, arguments)
    assert many.codes() == [2, 2]
    assert message in many.said(0)
    assert many.said(1) == ""


# --- BraTS ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight cases, of which 001, 002, 003 and 006 lack modalities."""
    where = write_phantoms(tmp_path_factory.mktemp("phantoms"), cases=8, size=(20, 20, 16), seed=0)
    lacking = {"001": ["t1ce"], "002": ["flair", "t2"], "003": ["t1", "t1ce", "flair"],
               "006": ["t1", "t2"]}  # fmt: skip
    for number, names in lacking.items():
        for name in names:
            (where / f"Phantom_{number}/Phantom_{number}_{name}.nii.gz").unlink()
    return where


@pytest.fixture(scope="module")
def split(folder: Path) -> Path:
    """Five cases to train on, one to choose by, two to test."""
    names = [f"Phantom_{number:03d}" for number in range(8)]
    path = folder.parent / "split.json"
    path.write_text(json.dumps({"train": names[:5], "valid": names[5:6], "test": names[6:]}))
    return path


def models(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {path.name: load_weights(path) for path in sorted(folder.glob("*.safetensors"))}


def score(out: Path) -> Any:
    """The tests of a finished run's only training, by its best model, in this process."""
    config = command.restored(Config, outcome(out)["config"])
    training = Training(config, brats._prepare(config), config.methods[0], 0)
    training.best_model = load_weights(next(out.glob("best-*")))
    return training.finish(lambda: None)["result"]["test"]


def brats_by_sgd(arguments: list[str]) -> int:
    """Adam would make much of rounding errors in gradients that are near zero."""
    OPTIMIZERS["adamw"] = torch.optim.SGD
    return brats.main(arguments)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("count", "more"),
    [
        # micro-batches of 2, 2 and 1, cases that lack modalities: some losses on one rank only
        (2, ["--combinations", "k=7", "--accumulate", "3", "--loss", "dice"]),
        pytest.param(2, ["--combinations", "all", "--scope", "all"], marks=pytest.mark.slow),
        pytest.param(
            3, ["--combinations", "k=5", "--methods", "pcgrad", "--accumulate", "2"],
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_brats_ranks_train_as_one_process_does(
    tmp_path: Path,
    folder: Path,
    split: Path,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    more: list[str],
) -> None:
    arguments = ["--data", str(folder), "--split", str(split), "--allow-missing", *TINY]
    arguments += ["--methods", "gmd", "--batch-size", "2", "--epochs", "2", "--lr", "0.3", *more]
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*arguments, "--out", str(two), "--predict", str(tmp_path / "masks")]
    many = start(count, brats_by_sgd, options)
    with monkeypatch.context() as patch:
        patch.setitem(OPTIMIZERS, "adamw", torch.optim.SGD)
        run(brats_by_sgd, *arguments, "--out", one)
    assert many.codes() == [0] * count, many.said(0)
    assert all(many.said(rank) == "" for rank in range(1, count))
    assert sorted(os.listdir(two)) == sorted(os.listdir(one))
    assert_close(models(two), models(one), 1e-5)
    (found,), (expected,) = outcome(two)["runs"], outcome(one)["runs"]
    for step, other in zip(found["history"], expected["history"], strict=True):
        assert_close(step["train_loss"], other["train_loss"], 1e-5)
    # A score jumps where a voxel does: the ranks' own model, in one process.
    assert list(found["test"]) == ["Phantom_006", "Phantom_007"]
    assert found["test"] == score(two)
    masks = sorted(path.name for path in (tmp_path / "masks").glob("*/*"))
    assert masks == ["Phantom_006.nii.gz", "Phantom_007.nii.gz"]
