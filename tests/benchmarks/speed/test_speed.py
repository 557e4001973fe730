"""The speed benchmark: what it counts and computes, never how long anything took."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.speed import __main__ as speed
from benchmarks.speed import report as speed_report
from benchmarks.speed import ways
from benchmarks.speed.memory import in_own_process, measure
from benchmarks.speed.ranks import WAYS, Traffic
from benchmarks.speed.tasks import EncodersTask, MLPTask, SentimentTask, Task, UNetTask
from benchmarks.speed.timing import (
    Contender,
    LiveBytes,
    fit_exponent,
    paired_ratio,
    reset_peak_resident,
    resident_bytes,
    round_robin,
)
from benchmarks.speed.ways import KERNELS, METHODS, PROJECTIONS, Jacobian
from tests import reference

CPU = torch.device("cpu")
BY_NAME = {method.name: method for method in METHODS}


# --- timing ---------------------------------------------------------------------------------------


def contender(name: str, log: list[str]) -> Contender:
    stages = (
        lambda value: log.append(name) or value + 1,
        lambda value: log.append(f"{name}{value}"),
    )
    return Contender(stages, lambda: 1)


def test_everyone_runs_in_every_round_and_stages_hand_on_their_results() -> None:
    log: list[str] = []
    told: dict[str, int] = {"a": 0, "b": 0, "c": 0}
    samples = round_robin(
        {name: contender(name, log) for name in told},
        rounds=4,
        slow=math.inf,
        done=lambda name, runs: told.__setitem__(name, told[name] + runs),
    )
    assert {name: len(runs) for name, runs in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(len(run) == 2 for runs in samples.values() for run in runs)  # one per stage
    assert told == {"a": 5, "b": 5, "c": 5}  # with the one that warms up
    assert log[1::2] == [f"{name}2" for name in log[::2]]
    turns = [log[::2][start : start + 3] for start in range(0, 15, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert {turn[0] for turn in turns} == {"a", "b", "c"}  # each is first at some time


def test_a_run_of_several_repeats_is_their_mean() -> None:
    log: list[str] = []
    stages = (lambda value: log.append(value), lambda nothing: time.sleep(0.01))
    first, second = Contender(stages, lambda: "made", repeats=5).run(lambda: None)
    assert log == ["made"] * 5
    assert 0 <= first < 0.01 <= second


@pytest.mark.parametrize(("very_slow", "runs"), [(math.inf, 3), (0.0, 1)])
def test_who_is_slow_runs_less_often(very_slow: float, runs: int) -> None:
    told: list[int] = []
    samples = round_robin(
        {"a": contender("a", [])},
        rounds=7,
        slow=0.0,
        very_slow=very_slow,
        done=lambda name, runs: told.append(runs),
    )
    assert len(samples["a"]) == runs
    assert sum(told) == 8  # the bar is full all the same


def test_an_exponent_is_found_again() -> None:
    sizes = [10.0, 30.0, 100.0, 1000.0]
    for p in (-0.5, 0.0, 1.0, 2.25):
        assert fit_exponent(sizes, [3.7 * size**p for size in sizes]) == pytest.approx(p, abs=1e-9)
    with pytest.raises(ValueError, match="two or more sizes"):
        fit_exponent([5, 5], [1.0, 2.0])


def test_ratios_are_taken_within_rounds() -> None:
    # the machine was five times as slow in the second round: the ratio is 2 in each
    assert paired_ratio([2.0, 10.0, 2.0, 9.0], [1.0, 5.0, 1.0]) == 2.0


# --- live memory ----------------------------------------------------------------------------------


def test_live_bytes_of_a_known_pattern() -> None:
    before = torch.ones(1000)
    with LiveBytes() as live:
        first = torch.ones(1000)
        second = before + first
        assert (live.now, live.peak) == (8000, 8000)
        del first
        assert (live.now, live.peak) == (4000, 8000)
        third = second.view(10, 100).double()
        assert (live.now, live.peak) == (12000, 12000)
        second.mul_(2)
        views = [second[:5], before[1:], third.t()]
        before += 1
        assert (live.now, live.peak) == (12000, 12000)
        del second
        assert live.now == 12000, "a view holds it"
        views.clear()
        assert live.now == 8000
    assert live.peak == 12000


def test_live_bytes_sees_what_a_backward_makes() -> None:
    n = 5000
    weight = nn.Parameter(torch.ones(n))
    losses = [torch.dot(weight, torch.ones(n)) for _ in range(3)]
    with LiveBytes() as live:
        rows = [torch.autograd.grad(loss, weight)[0] for loss in losses]
        assert 3 * n * 4 <= live.now <= 3 * n * 4 + 100
        assert len(rows) == 3
    del rows
    assert live.now <= 100


def test_memory_of_a_joint_step_is_one_gradient() -> None:
    def make() -> Task:
        return MLPTask(layers=10, width=64, losses=4, batch=2, device=CPU)

    found = measure(BY_NAME[ways.JOINT], make)
    assert found["losses"] == 4
    assert found["elements"] == 9 * (64 * 64 + 64) + 64 * 4 + 4
    assert found["elements"] * 4 <= found["live"] <= 1.1 * found["elements"] * 4


def test_memory_in_a_process_of_its_own() -> None:
    entries = in_own_process([ways.PLAIN, ways.BATCHED], (16, 8, 16), 4, 1)
    assert [(entry["method"], entry["task"]) for entry in entries] == [
        (ways.PLAIN, "MLP"),
        (ways.PLAIN, "U-Net"),
        (ways.PLAIN, "encoders"),
        (ways.BATCHED, "U-Net"),  # which the MLP has not
    ]
    for entry in entries:
        assert entry["live"] >= 4 * entry["elements"] * 0.9
        assert entry["resident"] is None or entry["resident"] >= 0


def test_private_encoders_cost_a_gradient_or_two_more_than_a_plain_loop() -> None:
    found = [
        measure(BY_NAME[name], lambda: EncodersTask(width=400, device=CPU))
        for name in (ways.PLAIN, ways.EXACT)
    ]
    assert all(entry["losses"] == 7 for entry in found)
    (n,) = {entry["elements"] for entry in found}
    assert n == 24 * (400 * 400 + 400) + 9 * 401
    plain, ours = (entry["live"] / n / 4 for entry in found)
    assert 1.0 <= plain <= 1.2 and plain + 0.5 <= ours <= plain + 2.2


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_resident_memory_grows_by_what_is_touched() -> None:
    assert reset_peak_resident()
    before, _ = resident_bytes()
    size = 64 * 2**20
    filled = torch.ones(size // 4)
    now, peak = resident_bytes()
    assert 0.9 * size <= now - before <= 1.2 * size
    del filled
    assert peak - before >= 0.9 * size
    assert reset_peak_resident()
    assert resident_bytes()[1] - before <= 0.5 * size, "the old peak is forgotten"


# --- projections ----------------------------------------------------------------------------------


def random_jacobian(rows: int, sizes: list[int], seed: int) -> Jacobian:
    torch.manual_seed(seed)
    return Jacobian.random(rows, sizes, CPU)


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
@pytest.mark.parametrize("seed", range(4))
def test_the_pairwise_loop_is_pcgrad(rows: int, seed: int) -> None:
    jacobian = random_jacobian(rows, [7, 4], seed)
    expected = reference.pcgrad_loop(jacobian.matrix, jacobian.orders)
    found = ways.pairwise_pcgrad(jacobian.matrix.double(), jacobian.orders)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_rows_and_matrix_of_a_jacobian_are_the_same_numbers() -> None:
    jacobian = random_jacobian(3, [4, 1, 9], 0)
    rows = [torch.cat([row[p] for p in jacobian.parameters]) for row in jacobian.rows]
    assert torch.equal(torch.stack(rows), jacobian.matrix)
    owners = {row[p].untyped_storage().data_ptr() for row in jacobian.rows for p in row}
    assert len(owners) == 9, "each gradient is a tensor of its own"
    assert torch.equal(jacobian.orders.sort(1).values, torch.arange(3).expand(3, 3))


@pytest.mark.parametrize("columns", [1000, 100_000, 12_345_678])
def test_sizes_of_the_unet_scaled(columns: int) -> None:
    sizes = ways.unet_sizes(columns)
    assert sum(sizes) == columns and min(sizes) >= 1 and len(sizes) == 182


def test_our_projection_is_gmd() -> None:
    jacobian = random_jacobian(5, [30, 3, 40], 1)
    expected = reference.gmd_loop(jacobian.matrix)
    merged = PROJECTIONS[ways.OURS](jacobian)
    found = torch.cat([merged[p] for p in jacobian.parameters])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in PROJECTIONS if name != ways.FUSED])
def test_every_projection_leaves_the_rows_as_they_were(name: str) -> None:
    jacobian = random_jacobian(3, [5, 2], 2)
    before = jacobian.matrix.clone()
    PROJECTIONS[name](jacobian)
    rows = [torch.cat([row[p] for p in jacobian.parameters]) for row in jacobian.rows]
    assert torch.equal(torch.stack(rows), before) and torch.equal(jacobian.matrix, before)


def test_rows_that_are_filled_give_the_same_projection() -> None:
    jacobian = random_jacobian(5, [32, 64], 3)  # multiples of 128 bytes: no gaps
    expected = PROJECTIONS[ways.OURS](jacobian)
    found = PROJECTIONS[ways.FILLED](jacobian)
    assert torch.equal(found, torch.cat([expected[p] for p in jacobian.parameters]))


def test_what_is_timed_for_the_bandwidth_is_a_copy_a_gramian_and_a_merge() -> None:
    jacobian = random_jacobian(4, [30, 7], 5)
    (copied, gramian, merged), rows = (
        [run(jacobian) for _, run in KERNELS.values()],
        jacobian.matrix.double(),
    )
    assert torch.equal(copied, jacobian.matrix)
    torch.testing.assert_close(gramian, rows @ rows.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged.double(), rows.sum(0), rtol=1e-5, atol=1e-5)
    assert [moved(4) for moved, _ in KERNELS.values()] == [8, 4, 5]


def test_torchjd_projects_the_same_matrix() -> None:
    jacobian = random_jacobian(2, [30, 30], 3)
    jacobian.matrix[1] = -0.5 * jacobian.matrix[0] + 0.1 * jacobian.matrix[1]
    found = PROJECTIONS[ways.JD_PCGRAD](jacobian)  # two rows: there is one order only
    expected = reference.pcgrad_loop(jacobian.matrix, torch.tensor([[0, 1], [0, 1]]))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


# --- whole steps ----------------------------------------------------------------------------------


def tasks() -> dict[str, Task]:
    return {
        "mlp": MLPTask(layers=4, width=8, losses=3, batch=4, device=CPU),
        "sentiment": SentimentTask(frames=4, batch=2, device=CPU),
        "unet": UNetTask(modalities=2, width=8, crop=16, batch=2, device=CPU),
    }


def gradient(task: Task, name: str, apart: bool) -> Tensor:
    """The flat gradient that a method leaves in .grad."""
    method = BY_NAME[name]
    task.clear()
    torch.manual_seed(0)  # TorchJD's PCGrad draws its orders from here
    run = method.backward(task)
    run(method.forward_of(task, apart)())
    assert all(p.grad is not None for p in task.parameters()), name
    return torch.cat([p.grad.flatten() for p in task.parameters()])


@pytest.mark.parametrize("task", ["mlp", "sentiment", "unet"])
def test_ways_that_should_agree_do(task: str) -> None:
    def found(name: str, apart: bool = False) -> Tensor:
        return gradient(tasks()[task], name, apart)  # autogram changes its model

    def close(left: Tensor, right: Tensor) -> None:
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))

    joint = found(ways.JOINT)
    close(found(ways.JOINT, apart=True), joint)
    close(found(ways.PLAIN), joint)
    if task == "unet":
        close(found(ways.BATCHED), joint)
    close(found(ways.EXACT, apart=True), found(ways.EXACT))
    torchjd = found(ways.AUTOJAC)
    close(found(ways.VMAP), torchjd)
    close(found(ways.AUTOJAC, apart=True), torchjd)


def test_our_exact_step_is_the_reference() -> None:
    task = tasks()["sentiment"]
    rows = []
    for loss in task.together(range(task.losses)):
        gradients = torch.autograd.grad(
            loss, task.parameters(), retain_graph=True, allow_unused=True
        )
        rows.append(list(gradients))
    expected = torch.cat([g.flatten() for g in reference.decouple(rows) if g is not None])
    found = gradient(task, ways.EXACT, apart=False)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


def test_sampled_losses_change_from_step_to_step() -> None:
    task = tasks()["sentiment"]
    forward = BY_NAME[ways.SAMPLED].forward_of(task, apart=False)
    draws = [tuple(round(loss.item(), 6) for loss in forward()) for _ in range(6)]
    assert {len(draw) for draw in draws} == {5}
    assert len(set(draws)) > 1


# --- goals and tables -----------------------------------------------------------------------------


def projection(ours: float, filled: float, loop: float, torchjd: float) -> dict[str, object]:
    seconds = {
        ways.READ: [0.01, 0.02],
        ways.OURS: [0.01 * ours, 0.02 * ours],
        ways.FILLED: [0.01 * filled, 0.02 * filled],
        ways.LOOP: [0.01 * loop],
        ways.JD_PCGRAD: [0.01 * torchjd, 0.02 * torchjd],
    }
    cell = {"rows": 15, "columns": 5_000_000, "seconds": seconds, "skipped": {}}
    return {"projection": [cell]}


def test_goals_say_what_was_reached() -> None:
    found = {goal.what: goal for goal in speed_report.goals(projection(8.0, 2.4, 90.0, 7.2))}
    read, loop, torchjd = [goal for what, goal in found.items() if "n = 5e6" in what]
    assert read.measured == pytest.approx(8.0) and read.verdict == "reached"
    assert loop.measured == pytest.approx(37.5) and loop.verdict == "NOT REACHED"
    assert torchjd.measured == pytest.approx(3.0) and torchjd.verdict == "reached"
    others = [goal for what, goal in found.items() if "n = 5e6" not in what]
    assert others and all(goal.verdict == "not measured" for goal in others)


@pytest.mark.parametrize(
    ("scene", "m", "wanted"),
    [("small MLP", 4, 1.7), ("MLP", 8, 1.7), ("sentiment", 7, 1.06), ("U-Net", 15, 1.03)],
)
def test_a_step_is_compared_with_plain_backwards_forward_included(
    scene: str, m: int, wanted: float
) -> None:
    def taken(backward: float) -> dict[str, list[float]]:
        return {"forward": [1.0, 1.0], "backward": [backward, backward]}

    seconds = {ways.PLAIN: taken(3.0), ways.EXACT: taken(4 * wanted - 1)}
    scenes = [{"scene": scene, "losses": m, "apart": False, "seconds": seconds}]
    goals = speed_report.goals({"step": {"scenes": scenes, "forwards": {}}})
    (goal,) = [goal for goal in goals if f"plain backwards ({scene}, m = {m})" in goal.what]
    assert (goal.sign, goal.wanted, goal.verdict) == ("<=", wanted, "reached")
    assert goal.measured == pytest.approx(wanted)


def test_bandwidth_is_told_where_kernels_were_timed() -> None:
    cell = projection(8.0, 2.4, 90.0, 7.2)["projection"][0]
    seconds = dict(zip(KERNELS, ([0.03], [0.03], [0.02]), strict=True))
    goals = speed_report.goals(
        {"projection": [{**cell, "columns": 20_000_000, "kernels": seconds}]}
    )
    gramian, merge = [goal for goal in goals if "bandwidth" in goal.what]
    assert gramian.measured == pytest.approx(0.5) and gramian.verdict == "NOT REACHED"
    assert merge.measured == pytest.approx(16 / 30 * 1.5) and merge.verdict == "reached"


def test_a_goal_is_reached_where_the_number_shown_reaches_it() -> None:
    for sign, measured, verdict in (
        ("<=", 1.0004, "reached"),
        ("<=", 1.006, "NOT REACHED"),
        (">=", 39.96, "reached"),
        (">=", 39.9, "NOT REACHED"),
    ):
        wanted = 1.0 if sign == "<=" else 40.0
        assert speed_report.Goal("", sign, wanted, measured).verdict == verdict


def test_goals_of_memory_are_multiples_of_float32_elements() -> None:
    n = 1000
    entry = {"task": "U-Net", "losses": 15, "elements": n, "resident": None}
    entries = [
        {**entry, "method": ways.EXACT, "live": int(4 * n * 16.2)},
        {**entry, "method": ways.HALF, "live": int(4 * n * 8.6)},
    ]
    verdicts = {
        goal.what.split("goal ")[1]: goal.verdict
        for goal in speed_report.goals({"memory": entries})
        if "U-Net, m = 15" in goal.what and "goal" in goal.what
    }
    assert verdicts == {"m + 1": "NOT REACHED", "(m + 2) / 2 + 0.1": "reached"}


def test_memory_of_private_encoders_is_compared_with_a_plain_loop() -> None:
    entry = {"task": "encoders", "losses": 7, "elements": 1000}
    entries = [
        {**entry, "method": ways.PLAIN, "live": 4000, "resident": 5000},
        {**entry, "method": ways.EXACT, "live": 14000, "resident": 11000},
    ]
    goals = speed_report.goals({"memory": entries})
    live, resident = [goal for goal in goals if "encoders" in goal.what]
    assert (live.measured, live.verdict) == (2.5, "NOT REACHED")
    assert (resident.measured, resident.verdict) == (1.5, "reached")
    goals = speed_report.goals({"memory": [{**entry, "resident": None} for entry in entries]})
    assert [g.measured for g in goals if "encoders" in g.what] == [2.5, None]


# --- many ranks -----------------------------------------------------------------------------------


def test_what_collectives_send_is_counted(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=(tmp_path / "s").as_uri(), rank=0, world_size=1)
    try:
        whole, part = torch.zeros(1000), torch.zeros(1000)
        with Traffic(size=4, small=10) as traffic:  # as if there were four ranks
            dist.all_reduce(whole)
            getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(part, whole)
            getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(whole, part)
            dist.all_reduce(torch.zeros(3, dtype=torch.float64))
            whole + part
    finally:
        dist.destroy_process_group()
    assert traffic.sent == (2 + 1 + 1) * 1000 * 3 / 4
    assert traffic.messages == [24]


def test_what_two_ranks_send_is_what_the_formula_says() -> None:
    (cell,) = speed.run_parts(["ranks"], dataclasses.replace(TINY, mlp=(3, 8)))["ranks"]
    m, size, n = cell["losses"], cell["ranks"], cell["elements"]
    assert (size, m) == (2, 4) and set(cell["seconds"]) == set(WAYS)
    assert cell["sent"] == pytest.approx((m + 1) * n * (size - 1) / size, rel=1e-3)
    assert cell["sent_by_ddp"] == pytest.approx(2 * m * n * (size - 1) / size, rel=1e-3)
    # that all do the same; of each loss, who has it; the Gramian
    assert len(cell["messages"]) == 1 + m + 1 and cell["messages"][-1] == 8 * m * m
    assert cell["live"] >= 4 * n * m / size


def test_goals_of_ranks_are_multiples_of_float32_elements() -> None:
    cell = {"ranks": 4, "losses": 15, "elements": 1000, "sent": 12_010.0, "live": 4 * 5800}
    goals = speed_report.goals({"ranks": [cell]})
    found = {goal.wanted: goal.verdict for goal in goals if "R = 4" in goal.what}
    assert found == {12: "reached", 5.75: "NOT REACHED"}


# --- end to end -----------------------------------------------------------------------------------

TINY = dataclasses.replace(
    speed.QUICK, rounds=1, rows=(2, 3), columns=(1000, 2000), modalities=1, frames=3, utterances=2,
    mlp=(3, 8), growing_losses=(1, 2), growing_widths=(8, 16),
)  # fmt: skip


def test_all_steps_at_tiny_sizes() -> None:
    measured = speed.run_parts(["step"], TINY)["step"]
    assert len(measured["forwards"]) == 4
    scenes = {(scene["scene"], scene["apart"]): scene for scene in measured["scenes"]}
    assert len(scenes) == 8
    everything = {method.name for method in METHODS if method.exists()}
    assert set(scenes["U-Net", False]["seconds"]) == everything
    assert set(scenes["MLP", False]["seconds"]) == everything - {ways.BATCHED}
    small = scenes["small MLP", False]
    assert (small["tensors"], small["losses"]) == (6, 4)
    assert small["elements"] == 2 * (64 * 64 + 64) + 64 * 4 + 4
    apart = set(scenes["MLP", True]["seconds"])
    assert apart == everything - {ways.BATCHED, "TorchJD mtl_backward"}
    for scene in scenes.values():
        for taken in scene["seconds"].values():
            assert len(taken["forward"]) == len(taken["backward"]) == 1


def test_rows_that_do_not_fit_and_loops_that_take_long_are_left_out_and_say_so() -> None:
    sizes = dataclasses.replace(TINY, most_bytes=2 * 2000 * 4, longest_loop=0.0)
    cells = speed.run_parts(["projection"], sizes)["projection"]
    assert [(c["rows"], c["columns"]) for c in cells] == [
        (2, 1000),
        (3, 1000),
        (2, 2000),
        (3, 2000),
    ]
    assert all(ways.LOOP in cell["skipped"] for cell in cells)
    assert [bool(cell["seconds"]) for cell in cells] == [True, True, True, False]


def test_two_parts_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "speed"
    arguments = ["--quick", "--parts", "growth,projection", "--out", str(folder)]
    assert speed.main(arguments) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "projection.png", "results.json", "table.md",
    ]  # fmt: skip
    content = json.loads((folder / "results.json").read_text())
    assert list(content["parts"]) == ["projection", "growth"]
    assert content["quick"] and content["machine"]["threads"] == torch.get_num_threads()
    assert {"torch", "torchjd", "gradsplit"} <= set(content["environment"])
    table = (folder / "table.md").read_text()
    assert table in capsys.readouterr().out
    for heading in ("Projection alone", "Growth"):
        assert f"## {heading}" in table
    # toy sizes neither reach nor miss a goal
    assert content["goals"] == [] and "## Goals" not in table
    assert "## Goals" in speed_report.write_report({**content, "quick": False}, folder)
    assert "Toy sizes" in table
    # another run goes beside it
    assert speed.main([*arguments[:2], "projection", *arguments[3:]]) == 0
    assert (tmp_path / "speed-2" / "results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "projection,speed"], "unknown part 'speed'"),
        (["--device", "tpu9"], "must be cpu, cuda"),
        (["--threads", "0"], "at least 1"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        speed.main(arguments)
    assert message in capsys.readouterr().err


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "speed"
    command = [sys.executable, "-m", "benchmarks.speed", "--parts", "projection", "--threads", "1"]
    process = subprocess.Popen(
        [*command, "--out", str(folder)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not folder.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted: nothing was written" in errors and "Traceback" not in errors
    assert not folder.exists()


@pytest.mark.slow
def test_everything_quickly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.speed", "--quick", "--out", str(tmp_path / "all")]
    subprocess.run(command, check=True, capture_output=True)
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == [
        "projection.png", "results.json", "step.png", "table.md",
    ]  # fmt: skip
    content = json.loads((tmp_path / "all" / "results.json").read_text())
    assert list(content["parts"]) == ["projection", "step", "memory", "growth", "ranks"]
