"""Thousands of steps, and ranks that are killed. Slow."""

from __future__ import annotations

import copy
import gc
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.distributed.cases import NAMES, Case, start, whole
from tests.reference import same

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def environment(**more: str) -> dict[str, str]:
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    return os.environ | ours | more


def test_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    """With an error, at the latest when the group's 20 s are over. (torchrun would hide it.)"""
    command = [sys.executable, str(HERE / "loop.py"), str(tmp_path), "7"]
    first, second = (
        subprocess.Popen(command, env=environment(RANK=rank), stderr=subprocess.PIPE)
        for rank in "01"
    )
    assert second.wait(60) == -9
    try:
        _, told = first.communicate(timeout=30)
    finally:
        first.kill()
    assert first.returncode == 1 and b"RuntimeError" in told


def test_torchrun_resumes_to_the_same_weights(tmp_path: Path) -> None:
    ends = []
    for kill in ("0", "7"):
        folder = tmp_path / kill
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", "--max-restarts=1", str(HERE / "loop.py")]
        subprocess.run([*command, str(folder), kill], env=environment(), check=True, timeout=120)
        ends.append([torch.load(folder / f"rank{rank}.pt") for rank in range(2)])
    undisturbed, killed = ends
    assert same(undisturbed[0], undisturbed[1]) and same(undisturbed, killed)


def endure(steps: int) -> tuple[dict[str, int], list[Any], tuple[int, int]]:
    """Losses are missing at random, some are infinite, and now and then all is set back.

    What all ranks must do alike is drawn from ``common``, the rest from each rank's ``own``.
    """
    case = Case(dtype=torch.float32, given="closures")
    net, opt, case, rank, world = start(case)
    common, own = random.Random(0), random.Random(1 + rank)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=20)
    counts = dict.fromkeys(("merged", "stepped", "skipped", "nothing"), 0)
    hooked: list[None] = []
    opt.register_step_post_hook(lambda *_: hooked.append(None))
    saved: Any = None
    early = 0
    for step in range(steps):
        closures = case.losses(net, step, 0, rank, world)
        factors = {n: own.choices((None, 1.0, math.inf), (40, 59, 1))[0] for n in NAMES}
        losses = {
            n: factor and (lambda n=n, f=factor: scaler.scale(f * closures[n]()))  # noqa: B023
            for n, factor in factors.items()
        }
        before = len(hooked), scaler.get_scale()
        opt.zero_grad()
        try:
            opt.backward(losses)
        except ValueError:  # no rank has anything
            counts["nothing"] += 1
            continue
        counts["merged"] += 1
        scaler.step(opt)
        scaler.update()
        stepped = len(hooked) > before[0]
        assert stepped == (scaler.get_scale() >= before[1])
        counts["stepped" if stepped else "skipped"] += 1
        if common.random() < 0.02:
            saved = copy.deepcopy((net.state_dict(), opt.state_dict(), scaler.state_dict(), counts))
        if saved and common.random() < 0.01:
            states = copy.deepcopy(saved)
            for one, state in zip((net, opt, scaler), states, strict=False):
                one.load_state_dict(state)
            counts = states[-1]
        if step == steps // 4:
            gc.collect()
            early = psutil.Process().memory_info().rss
    gc.collect()
    assert opt.param_groups[0]["gradsplit_merges"] == counts["merged"]
    memory = early, psutil.Process().memory_info().rss
    return counts, [whole(p) for p in net.parameters()], memory


def test_two_thousand_steps(ranks) -> None:
    """The ranks stay equal, no step is lost, and memory stays as it is."""
    first, second = ranks(2).run(endure, 2000, timeout=600)
    assert same(first[:2], second[:2])
    counts, parameters, _ = first
    assert counts["merged"] == counts["stepped"] + counts["skipped"]
    assert min(counts.values()) > 5 and all(p.isfinite().all() for p in parameters)
    for *_, (early, late) in (first, second):
        assert late < 1.02 * early
