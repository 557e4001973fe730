"""The speed benchmark: what it counts and computes, never how long anything took."""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.speed import __main__ as speed
from benchmarks.speed import memory, ways
from benchmarks.speed.goals import goals
from benchmarks.speed.memory import LiveBytes, live_bytes, resident_growth
from benchmarks.speed.ranks import CLOSURES, DDP, SHARED, Traffic
from benchmarks.speed.report import write_report
from benchmarks.speed.tasks import EncodersTask, MLPTask, Rows, SentimentTask, Task, UNetTask
from benchmarks.speed.timing import Clock, Contender, fit_exponent, paired_ratio, paired_ratios
from tests import reference
from tests.benchmarks.running import cut_off

CPU = torch.device("cpu")
TINY = dataclasses.replace(
    speed.SIZES["quick"], rows=(2, 3), columns=(1000, 2000), modalities=1, frames=3, utterances=2,
    mlp=(3, 8), memory=(16, 8, 16), growing_losses=(1, 2), growing_widths=(8, 16),
)  # fmt: skip


# --- timing ---------------------------------------------------------------------------------------


def test_all_take_turns_and_each_is_first_at_some_time() -> None:
    log: list[str] = []
    contenders = {
        name: Contender(lambda name=name: log.append(name) or name, lambda made: log.append(made))
        for name in "abc"
    }
    ticks: list[int] = []
    rows = Clock(4, tick=lambda: ticks.append(1), slow=math.inf).time(contenders, m=2)
    assert [(row["m"], row["way"]) for row in rows] == [(2, "a"), (2, "b"), (2, "c")]
    assert all(len(row["seconds"]) == len(row["forward"]) == 4 for row in rows)
    assert all(
        0 <= f <= s for row in rows for f, s in zip(row["forward"], row["seconds"], strict=True)
    )
    assert len(ticks) == 3 * 5  # with the run that warms up
    assert log[1::2] == log[::2]  # a backward gets what its forward made
    turns = [log[::2][start : start + 3] for start in range(0, 15, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert {turn[0] for turn in turns} == {"a", "b", "c"}


@pytest.mark.parametrize(("very_slow", "runs"), [(math.inf, 3), (0.0, 1)])
def test_who_is_slow_runs_less_often(very_slow: float, runs: int) -> None:
    (row,) = Clock(7, slow=0.0, very_slow=very_slow).time({"a": Contender(time.perf_counter)})
    assert len(row["seconds"]) == runs


def test_a_run_of_several_repeats_is_their_mean() -> None:
    made: list[int] = []
    contender = Contender(
        lambda: time.sleep(0.002), lambda _: time.sleep(0.01), lambda: made.append(1), repeats=5
    )
    forward, both = contender.run(lambda: None)
    assert len(made) == 5 and 0.002 <= forward <= both - 0.01


def test_ratios_are_taken_within_rounds_and_to_the_fastest() -> None:
    # the machine was five times as slow in the second round: the ratio is 2 in each
    seconds = {"a": [2.0, 10.0, 2.0, 9.0], "b": [1.0, 5.0, 1.0], "c": [3.0, 3.0, 3.0]}
    assert paired_ratios(seconds, "a", "b", "c") == [2.0, 2.0, 2.0]
    assert paired_ratio(seconds, "a", "none", "c") == 2 / 3
    assert paired_ratio(seconds, "a", "none") is paired_ratio(seconds, "none", "a") is None


def test_an_exponent_is_found_again() -> None:
    sizes = [10.0, 30.0, 100.0, 1000.0]
    for p in (-0.5, 0.0, 2.25):
        assert fit_exponent(sizes, [3.7 * size**p for size in sizes]) == pytest.approx(p, abs=1e-9)


# --- memory ---------------------------------------------------------------------------------------


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


def backward_bytes(way: str, task: Task) -> float:
    """In multiples of n float32 elements."""
    losses, run = ways.WAYS[way].forward(task, False)(), ways.WAYS[way].backward(task)
    return live_bytes(lambda: run(losses)) / task.elements() / 4


def test_a_joint_step_holds_one_gradient() -> None:
    task = MLPTask(layers=10, width=64, losses=4, batch=2, device=CPU)
    assert task.elements() == 9 * (64 * 64 + 64) + 64 * 4 + 4
    assert 1 <= backward_bytes(ways.JOINT, task) <= 1.1


def test_private_encoders_cost_a_gradient_or_two_more_than_a_plain_loop() -> None:
    plain, ours = (
        backward_bytes(way, EncodersTask(width=400, device=CPU)) for way in (ways.PLAIN, ways.EXACT)
    )
    assert 1.0 <= plain <= 1.2 and plain + 0.5 <= ours <= plain + 2.2


def test_memory_of_a_way_is_that_of_every_model_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    names, threads = [ways.PLAIN, ways.BATCHED], torch.get_num_threads()
    memory.main(json.dumps([names, TINY.memory, 4, 1, threads]))  # what the child process runs
    rows = json.loads(capsys.readouterr().out)
    assert [(row["way"], row["task"]) for row in rows] == [
        (ways.PLAIN, "MLP"), (ways.PLAIN, "U-Net"), (ways.BATCHED, "U-Net"),
        (ways.PLAIN, "encoders"),
    ]  # fmt: skip
    for row in rows:
        assert row["live"] >= 4 * row["n"] * 0.9
        assert row["resident"] is None or row["resident"] >= 0


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_resident_memory_grows_by_what_is_touched() -> None:
    size = 64 * 2**20
    grown = resident_growth(lambda: torch.ones(size // 4))
    assert grown is not None and 0.9 * size <= grown <= 1.2 * size
    assert resident_growth(lambda: None) <= 0.5 * size, "the old peak is forgotten"


# --- projections ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n"), [(3, 1000), (1, 12_345)])
def test_rows_and_their_matrix_are_the_same_numbers(m: int, n: int) -> None:
    rows = Rows(m, n, CPU)
    assert rows.matrix.shape == (m, n) and len(rows.parameters) == 182
    assert torch.equal(torch.stack([torch.cat(parts) for parts in rows.gradients]), rows.matrix)
    assert all(len({part.data_ptr() for part in parts}) == 182 for parts in rows.gradients)
    assert all(sorted(order) == list(range(m)) for order in rows.orders)


@pytest.mark.parametrize("m", [1, 2, 9])
@pytest.mark.parametrize("way", ways.PROJECTIONS)
def test_projections_are_what_they_say_and_leave_the_rows_alone(way: str, m: int) -> None:
    torch.manual_seed(m)
    rows = Rows(m, 1000, CPU)
    before = rows.matrix.clone()
    found = ways.PROJECTIONS[way](rows)
    assert torch.equal(rows.matrix, before)
    assert torch.equal(torch.stack([torch.cat(parts) for parts in rows.gradients]), before)
    if way in (ways.COPYING, ways.UNFUSED):
        found = torch.cat([found[parameter] for parameter in rows.parameters])
    if way.startswith("ours"):
        expected = reference.gmd_loop(before)
    elif way == ways.LOOP or (way == ways.JD_PCGRAD and m <= 2):  # where one order is like another
        expected = reference.pcgrad_loop(before, torch.tensor(rows.orders))
    else:
        return
    torch.testing.assert_close(found.double(), expected, **CLOSE)


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def test_the_bandwidth_is_that_of_a_copy_a_gramian_and_a_merge() -> None:
    rows = Rows(4, 1000, CPU)
    wide = rows.matrix.double()
    for (_, run), expected in zip(
        ways.KERNELS.values(), (wide, wide @ wide.T, wide.sum(0)), strict=True
    ):
        torch.testing.assert_close(run(rows).double(), expected, **CLOSE)
    assert [moved(4) for moved, _ in ways.KERNELS.values()] == [8, 4, 5]


def test_rows_that_do_not_fit_and_loops_that_take_long_are_left_out() -> None:
    sizes = dataclasses.replace(TINY, most_bytes=2 * 2000 * 4, most_meetings=2 * 2 * 1000)
    rows = speed.run_parts(["projection"], sizes, CPU)
    assert {(row["m"], row["n"]) for row in rows} == {(2, 1000), (3, 1000), (2, 2000)}
    assert {(row["m"], row["n"]) for row in rows if row["way"] == ways.LOOP} == {(2, 1000)}


# --- whole steps ----------------------------------------------------------------------------------

TASKS = {
    "MLP": lambda: MLPTask(layers=4, width=8, losses=3, batch=4, device=CPU),
    "sentiment": lambda: SentimentTask(frames=4, batch=2, device=CPU),
    "U-Net": lambda: UNetTask(modalities=2, width=8, crop=16, batch=2, device=CPU),
}


def gradient(task: Task, way: str, apart: bool) -> Tensor:
    """The flat gradient that a way leaves in .grad."""
    torch.manual_seed(0)  # TorchJD's PCGrad draws its orders from here
    ways.WAYS[way].backward(task)(ways.WAYS[way].forward(task, apart)())
    assert all(p.grad is not None for p in task.parameters()), way
    return torch.cat([p.grad.flatten() for p in task.parameters()])


@pytest.mark.parametrize("name", TASKS)
def test_ways_that_should_agree_do(name: str) -> None:
    def found(way: str, apart: bool = False) -> Tensor:
        return gradient(TASKS[name](), way, apart)

    def close(left: Tensor, right: Tensor) -> None:
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))

    joint, torchjd = found(ways.JOINT), found(ways.AUTOJAC)
    close(found(ways.JOINT, apart=True), joint)
    close(found(ways.PLAIN), joint)
    if name == "U-Net":
        close(found(ways.BATCHED), joint)
    close(found(ways.EXACT, apart=True), found(ways.EXACT))
    close(found(ways.VMAP), torchjd)
    close(found(ways.AUTOJAC, apart=True), torchjd)


def test_our_exact_step_is_the_reference() -> None:
    task = TASKS["sentiment"]()
    rows = [
        list(torch.autograd.grad(loss, task.parameters(), retain_graph=True, allow_unused=True))
        for loss in task.together(range(task.losses))
    ]
    expected = torch.cat([g.flatten() for g in reference.decouple(rows) if g is not None])
    found = gradient(task, ways.EXACT, apart=False)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


def test_sampled_losses_change_from_step_to_step() -> None:
    forward = ways.WAYS[ways.SAMPLED].forward(TASKS["sentiment"](), False)
    draws = [tuple(round(loss.item(), 6) for loss in forward()) for _ in range(6)]
    assert {len(draw) for draw in draws} == {5} and len(set(draws)) > 1


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
    assert traffic.sent == (2 + 1 + 1) * 4000 * 3 / 4
    assert traffic.messages == [24]


@pytest.mark.slow  # tests/distributed/test_cost.py keeps the law in every run
def test_what_two_ranks_send_is_what_the_formula_says() -> None:
    rows = speed.run_parts(["ranks"], dataclasses.replace(TINY, memory=(64, 8, 16)), CPU)
    assert [row["way"] for row in rows] == [CLOSURES, SHARED, DDP]
    for row in rows:
        m, size, n = row["m"], row["ranks"], row["n"]
        travels = 2 * m if row["way"] == DDP else m + 1
        assert (size, m) == (2, 4)
        assert row["sent"] == pytest.approx(4 * travels * n * (size - 1) / size, rel=1e-3)
        if row["way"] != DDP:
            # that all do the same; of each loss, who has it; the Gramian
            assert len(row["messages"]) == 1 + m + 1 and row["messages"][-1] == 8 * m * m
            assert row["live"] >= 4 * n * m / size


# --- goals and tables -----------------------------------------------------------------------------


def rows_of(numbers: dict[str, Any], **cell: Any) -> list[dict[str, Any]]:
    """A row per way, which took a number of seconds, or those of several rounds."""
    seconds = {
        way: [taken] if isinstance(taken, float) else taken for way, taken in numbers.items()
    }
    return [{**cell, "way": way, "seconds": taken} for way, taken in seconds.items()]


def bytes_of(**cell: Any) -> dict[str, Any]:
    return {"part": "memory", "n": 1000, **cell}


PROJECTED = rows_of(
    {
        ways.READ: [0.01, 0.02], ways.COPYING: [0.08, 0.16], ways.FILLED: [0.024, 0.048],
        ways.LOOP: [0.9], ways.JD_PCGRAD: [0.072, 0.144],
    },
    task="rows", m=15, n=5_000_000,
)  # fmt: skip
COPIED = rows_of(
    dict(zip(ways.KERNELS, (0.03, 0.03, 0.02), strict=True)), task="kernels", m=15, n=20_000_000
)
ENCODERS = [
    bytes_of(task="encoders", m=7, way=ways.PLAIN, live=4000, resident=5000),
    bytes_of(task="encoders", m=7, way=ways.EXACT, live=14_000, resident=11_000),
]


def step(task: str, m: int, apart: bool = False, **seconds: float) -> list[dict[str, Any]]:
    return rows_of({getattr(ways, w): s for w, s in seconds.items()}, task=task, m=m, apart=apart)


@pytest.mark.parametrize(
    ("rows", "what", "measured", "verdict"),
    [
        (PROJECTED, "over one read (m = 15, n = 5e6)", 8.0, "reached"),
        (PROJECTED, "over one read (m = 15, n = 1e6)", None, "not measured"),
        (PROJECTED, "pairwise loop over", 37.5, "NOT REACHED"),
        (PROJECTED, "TorchJD's PCGrad over", 3.0, "reached"),
        (COPIED, "fused Gramian: bandwidth", 0.5, "NOT REACHED"),
        (COPIED, "fused merge: bandwidth", 16 / 30 * 1.5, "reached"),
        (step("MLP", 8, PLAIN=2.0, EXACT=3.5), "backwards (MLP", 1.75, "NOT REACHED"),
        (step("small MLP", 4, PLAIN=2.0, EXACT=3.4), "backwards (small", 1.7, "reached"),
        # What is shown counts, and the faster of two ways to take plain backwards.
        (step("sentiment", 7, PLAIN=1.0, EXACT=1.0604), "backwards (sent", 1.0604, "reached"),
        (step("U-Net", 15, PLAIN=2.0, BATCHED=1.0, EXACT=1.04), "(U-Net", 1.04, "NOT REACHED"),
        (step("U-Net", 15, apart=True, EXACT=1.0, VMAP=5.0), "fastest", 0.2, "reached"),
        (step("U-Net", 15, JOINT=1.0, ON_HEAD=1.4), "(head) step", 1.4, "NOT REACHED"),
        (ENCODERS, "live above a plain loop", 2.5, "NOT REACHED"),
        (ENCODERS, "resident above a plain loop", 1.5, "reached"),
        ([{**row, "resident": None} for row in ENCODERS], "resident above", None, "not measured"),
        ([bytes_of(task="U-Net", m=15, way=ways.EXACT, live=64_800)],
         "(U-Net, m = 15), goal m + 1", 16.2, "NOT REACHED"),
        ([bytes_of(task="U-Net", m=15, way=ways.HALF, live=34_400)],
         "(U-Net, m = 15), bfloat16 rows", 8.6, "reached"),
        ([{"ranks": 4, "m": 15, "n": 1000, "way": SHARED, "sent": 48_040, "live": 23_200}],
         "sent per rank", 12.01, "reached"),
        ([{"ranks": 4, "m": 15, "n": 1000, "way": SHARED, "sent": 48_040, "live": 23_200}],
         "live bytes of a rank", 5.8, "NOT REACHED"),
    ],
)  # fmt: skip
def test_goals_say_what_was_reached(
    rows: list[dict[str, Any]], what: str, measured: float | None, verdict: str
) -> None:
    goal, *_ = [goal for goal in goals(rows) if what in goal["what"]]
    assert goal["measured"] == (None if measured is None else pytest.approx(measured))
    assert goal["verdict"] == verdict


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes of the parts that take no other process."""
    folder = tmp_path_factory.mktemp("run") / "speed"
    arguments = ["--preset", "quick", "--parts", "step,growth,projection", "--out", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(speed.SIZES, "quick", TINY)
        assert speed.main(arguments) == 0
    return folder


def test_every_scene_times_the_ways_that_fit(folder: Path) -> None:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    timed: dict[Any, set[str]] = {}
    for row in [row for row in rows if row["part"] == "step"]:
        timed.setdefault((row["task"], row.get("apart")), set()).add(row["way"])
        assert len(row["seconds"]) == len(row["forward"]) == 1
    everything, shared_only = set(ways.WAYS), {ways.BATCHED, "TorchJD mtl_backward"}
    for name in ("U-Net", "sentiment", "MLP", "small MLP"):
        assert timed[name, False] == everything - ({ways.BATCHED} if name != "U-Net" else set())
        assert timed[name, True] == everything - shared_only
    assert timed["forwards", None] == set(ways.FORWARDS)
    (small,) = {(r["tensors"], r["m"], r["n"]) for r in rows if r.get("task") == "small MLP"}
    assert small == (6, 4, 2 * (64 * 64 + 64) + 64 * 4 + 4)


def test_the_command_writes_rows_tables_and_pictures(folder: Path) -> None:
    names = {"projection.png", "results.json", "step.png", "table.md"}
    assert {path.name for path in folder.iterdir()} == names
    content = json.loads((folder / "results.json").read_text())
    assert {row["part"] for row in content["rows"]} == {"projection", "step", "growth"}
    assert content["preset"] == "quick"
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert {"torch", "torchjd", "gradsplit"} <= set(content["environment"])
    table = (folder / "table.md").read_text()
    for heading in ("Projection alone", "Whole step", "Growth"):
        assert f"## {heading}" in table


def test_toy_sizes_neither_reach_nor_miss_a_goal(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "results.json").read_text())
    table = (folder / "table.md").read_text()
    assert content["goals"] == [] and "## Goals" not in table and "Toy sizes" in table
    growth = [row for row in content["rows"] if row["part"] == "growth"]
    table = write_report({**content, "preset": "full", "rows": growth}, tmp_path)
    assert "## Goals" in table and "Toy sizes" not in table
    assert (tmp_path / "table.md").read_text() == table


def test_another_run_goes_beside_the_first(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(speed.SIZES, "quick", TINY)
    assert speed.main(["--preset", "quick", "--parts", "growth", "--out", str(folder)]) == 0
    table = (folder.with_name("speed-2") / "table.md").read_text()
    assert table in capsys.readouterr().out and "## Growth" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "projection,speed"], "unknown part 'speed'"),
        (["--device", "tpu9"], "cannot be used here"),
        (["--threads", "0"], "at least 1"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        speed.main(arguments)
    assert message in capsys.readouterr().err


def test_ctrl_c_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "speed"
    cut_off(Clock, "time", 0, speed.main, "--parts", "projection", "--out", folder)
    assert "interrupted: nothing was written" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.slow
def test_everything_quickly(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    assert speed.main(["--preset", "quick", "--out", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {
        "projection.png", "results.json", "step.png", "table.md"
    }  # fmt: skip
    content = json.loads((folder / "results.json").read_text())
    assert {row["part"] for row in content["rows"]} == set(speed.PARTS)
