"""Frameworks with two ranks of gloo, started by their own launchers.

Every framework trains the same small model; both ranks must end with the same bits, which are to
1e-12 those of a plain loop in one process on the batches of both.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed.frameworks import CASES, SCRIPTS, SEEDS, Run
from tests.reference import Row, decouple, same

LIMIT = 180  # seconds for all launchers; an idle machine takes a fraction
ROOT = Path(__file__).parents[2]
PACKAGES = {"lightning": "lightning", "accelerate": "accelerate", "torchrun": "transformers"}


def command(launcher: str) -> list[str]:
    """How its users start two ranks."""
    if launcher == "lightning":  # the script starts the other rank
        return ["-m"]
    if launcher == "torchrun":
        return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--module"]
    with socket.socket() as free:  # accelerate 1.0 takes port 0 at its word
        free.bind(("127.0.0.1", 0))
        port = f"--main_process_port={free.getsockname()[1]}"
    # Accelerator(cpu=True) makes of it what it says; --cpu would start one process, without MPI.
    two = ["--multi_gpu", "--num_processes=2", port]
    return ["-m", "accelerate.commands.launch", *two, "--module"]


def name(script: Callable[[Run], None]) -> str:
    return script.__name__


NAMES = [name(script) for scripts in SCRIPTS.values() for script in scripts]
Saved = Callable[[str, str], list[tuple[list[Tensor], str]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    """``saved(script, case)``: what each rank has saved. Started at once, as imports take long."""
    folder = tmp_path_factory.mktemp("frameworks")
    processes = {k: start(k, folder) for k, package in PACKAGES.items() if find_spec(package)}
    deadline = time.monotonic() + LIMIT

    def load(script: str, case: str) -> list[tuple[list[Tensor], str]]:
        (launcher,) = (key for key, some in SCRIPTS.items() if script in map(name, some))
        if launcher not in processes:
            pytest.skip(f"needs {PACKAGES[launcher]}")
        try:
            status: int | str = processes[launcher].wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = f"still running after {LIMIT} s"
        if status != 0:
            output = (folder / f"{launcher}.txt").read_text()
            pytest.fail(f"{launcher}: {status}\n{output[-4000:]}", pytrace=False)
        files = [folder / f"{script}-{case}-{rank}.pt" for rank in (0, 1)]
        return [torch.load(file, weights_only=True) for file in files]

    yield load
    for process in processes.values():
        end(process)


def start(launcher: str, folder: Path) -> subprocess.Popen[bytes]:
    with (folder / f"{launcher}.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, *command(launcher), "tests.distributed.frameworks", folder, launcher],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """With its ranks: those of torchrun are in sessions of their own, and die of its SIGTERM."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def by_hand(
    asked: dict[str, Any], at_once: int, merge: Callable[[list[Row]], Row] = decouple
) -> list[Tensor]:
    """One process; ``at_once`` samples are one batch, of which each loss is the mean."""
    run = Run(**asked)
    parameters = list(run.model.parameters())
    scheduler = run.scheduler(run.base)
    samples = 2 * run.window  # of a step
    for end in range(at_once, len(SEEDS) + 1, at_once):
        each = [run.model(seed) for seed in SEEDS[end - at_once : end]]
        losses = [[some[name] for some in each if some[name] is not None] for name in each[0]]
        rows = [
            torch.autograd.grad(
                torch.stack(one).mean(), parameters, retain_graph=True, allow_unused=True
            )
            for one in losses
            if one
        ]
        for p, g in zip(parameters, merge([list(row) for row in rows]), strict=True):
            if g is not None:
                g = g * at_once / samples
                p.grad = g if p.grad is None else p.grad + g
        if end % samples == 0:
            if run.clip:
                nn.utils.clip_grad_norm_(parameters, run.clip)
            run.base.step()
            scheduler.step()
            run.base.zero_grad()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("case", ["plain", "all"])
@pytest.mark.parametrize("script", NAMES)
def test_two_ranks_train_as_one_process(script: str, case: str, saved: Saved) -> None:
    (ours, error), (theirs, other_error) = saved(script, case)
    assert not error and not other_error
    assert same(ours, theirs)
    window = CASES[case].get("window", 1)
    # A manual loop accumulates; elsewhere each micro-batch is decoupled on its own.
    expected = by_hand(CASES[case], 2 * window if script == "lightning_manual" else 2)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("script", NAMES)
def test_who_does_not_tell_of_the_ranks_is_told_on_each(script: str, saved: Saved) -> None:
    """Before anything is trained, with the line to write."""
    untrained = [p.detach() for p in Run().model.parameters()]
    for parameters, error in saved(script, "untold"):
        assert "opt.module = model" in error
        assert same(parameters, untrained)


def test_the_cases_differ() -> None:
    """Nothing above could pass by ignoring what was asked, or by not decoupling."""
    ends = [by_hand(CASES["plain"], 2), by_hand(CASES["all"], 2), by_hand(CASES["all"], 4)]
    ends.append(by_hand(CASES["plain"], 2, lambda rows: decouple(rows, lambda j: j.sum(0))))
    flat = torch.stack([torch.cat([v.flatten() for v in end]) for end in ends])
    assert (torch.cdist(flat, flat) + torch.eye(len(ends))).min() > 1e-3
