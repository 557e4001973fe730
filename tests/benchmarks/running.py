"""Runs of the benchmarks, as tests start, refuse, cut off and compare them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.runs.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[2]
WRITTEN = ["results.json", "scores.csv", "table.md"]
OF_GRADIENTS = ["before_after.png", "gradients.png"]  # not of `full` alone
SMALL = ["--width", "8", "--depth", "1", "--heads", "2", "--batch-size", "8"]  # of sentiment
TINY = ["--crop", "16", "--width", "8", "--validate-every", "1", "--threads", "1"]  # of BraTS

Main = Callable[[list[str]], int]
Capsys = pytest.CaptureFixture[str]


class Silent:
    """A progress bar that shows nothing."""

    disable = True

    def update(self, samples: int) -> None: ...


def run(main: Main, *arguments: Any) -> None:
    assert main(list(map(str, arguments))) == 0


def refused(main: Main, capsys: Capsys, *arguments: Any) -> str:
    """The message of a usage error, in one line, without the box around it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, arguments)))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(re.sub("[│╭╮╰╯─]", " ", error).split())


def cut_off(owner: Any, name: str, calls: int, main: Main, *arguments: Any) -> None:
    """Ctrl-C in the place of call number ``calls`` of ``owner.name``."""
    original, left = getattr(owner, name), [calls]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert main(list(map(str, arguments))) == 130


# --- what lies in a folder -----------------------------------------------------------------------


def outcome(folder: Path) -> dict[str, Any]:
    """results.json, without what differs between equal runs."""
    content: dict[str, Any] = json.loads(
        (folder / "results.json").read_text(), parse_constant=pytest.fail
    )
    del content["command"]  # names the folder
    for one in content.get("runs", []):
        del one["seconds"]
    return content


def assert_same_run(one: Path, two: Path) -> None:
    """Scores and models, bit for bit; nothing left over."""
    assert sorted(os.listdir(one)) == sorted(os.listdir(two))
    assert outcome(one) == outcome(two)
    for path in one.glob("*.safetensors"):
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def wait_for_epochs(out: Path, epochs: int) -> None:
    """Until the training under way has made so many."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (out / "checkpoint.pt").exists():
            current = load_checkpoint(out / "checkpoint.pt")["current"]
            if current is not None and current["epoch"] >= epochs:
                return
        time.sleep(0.02)
    raise AssertionError("no checkpoint in time")


# --- processes -----------------------------------------------------------------------------------


def start(*command: Any) -> subprocess.Popen[str]:
    """A process of its own, which hears Ctrl-C; what it says on stderr is piped.

    Tests that run in the background have SIGINT ignored, and would pass that on.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)


def end(process: subprocess.Popen[str], number: signal.Signals | None = None) -> str:
    """What it has said when it has ended, by itself or by a signal."""
    if number is not None:
        process.send_signal(number)
    try:
        return process.communicate(timeout=200)[1]
    finally:
        process.kill()


def printed(error: str) -> Sequence[str]:
    """The command that continues, from what an interrupted run says."""
    assert error.count("interrupted; to continue:") == 1, error
    (line,) = [line for line in error.splitlines() if "--resume" in line]
    return line.split()
