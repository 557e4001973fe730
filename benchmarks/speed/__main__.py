"""How long decoupling takes, and how much memory, side by side with other ways to do it.

    python -m benchmarks.speed                       # all parts, about 17 minutes on two cores
    python -m benchmarks.speed --preset quick        # the same with toy sizes: for CI
    python -m benchmarks.speed --parts projection,step --threads 1
    python -m benchmarks.speed --device cuda

The parts:

    projection  gradients -> flat rows -> Gramian, rule, merged gradient: m rows of n elements,
                against one read of the data, PCGrad pair by pair, and TorchJD's PCGrad and UPGrad;
                on a GPU also the bandwidth that the kernels reach
    step        forward and backward: the BraTS U-Net (15 losses), the sentiment transformer (7),
                and MLPs of 100 tensors (8) and of 6 (4), against plain backwards and TorchJD; once
                with a forward that all losses share, once with one forward per loss
    memory      of U-Net, MLP and private encoders with a small head: live gradients and resident
                memory, each in a process of its own; on the CPU
    growth      time against m and n, with fitted exponents
    ranks       elements sent, memory and time of a step of the MLP on 2 and on 4 ranks, with
                formulas, against plain backwards under DDP; gloo, on the CPU, one thread per rank

Results go to results/speed-DATE: results.json with every single time, table.md, projection.png,
step.png. Nothing is kept of a run that is interrupted.
"""

import datetime
import functools
import itertools
import os
import platform
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tqdm import tqdm

from benchmarks.runs import command, results
from benchmarks.runs.session import new_folder, show
from benchmarks.speed import ways
from benchmarks.speed.memory import in_own_process
from benchmarks.speed.ranks import measure_ranks
from benchmarks.speed.report import write_report
from benchmarks.speed.tasks import MLPTask, Rows, SentimentTask, Task, UNetTask
from benchmarks.speed.timing import Clock, Contender, Row

__all__ = ["PARTS", "SIZES", "Sizes", "main", "run_parts"]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        rounds: times of each, unless a single one takes seconds.
        rows, columns: of the projections: every m with every n, where the rows take no more than
            ``most_bytes``; the pairwise loop where m^2 n is no more than ``most_meetings``.
        modalities, width, crop: of the U-Net.
        frames, utterances: of the sentiment transformer's batch.
        mlp: layers and width.
        repeats: steps of the small MLP in one run, and most of a projection.
        memory: the widths of MLP, U-Net and encoders whose memory is measured; with
            ``one_process`` all ways in one, which is quicker and less exact.
        growing_losses, growing_widths: of the MLPs in the growth part.
        ranks, losses_on_ranks: every number of ranks with every number of losses, of the MLP that
            memory is measured with.
    """

    rounds: int = 7
    rows: tuple[int, ...] = (4, 7, 15, 31, 63)
    columns: tuple[int, ...] = (100_000, 1_000_000, 5_000_000, 20_000_000)
    most_bytes: float = 2.5e9
    most_meetings: float = 2e9
    modalities: int = 4
    width: int = 16
    crop: int = 32
    frames: int = 50
    utterances: int = 32
    mlp: tuple[int, int] = (50, 128)
    repeats: int = 20
    memory: tuple[int, int, int] = (256, 16, 1000)
    one_process: bool = False
    growing_losses: tuple[int, ...] = (2, 4, 8, 16, 32)
    growing_widths: tuple[int, ...] = (64, 128, 256, 512)
    ranks: tuple[int, ...] = (2, 4)
    losses_on_ranks: tuple[int, ...] = (4, 7, 15)


SIZES: Mapping[str, Sizes] = {
    "full": Sizes(),
    "quick": Sizes(
        rounds=1, rows=(4, 15), columns=(10_000, 100_000), modalities=2, width=8, crop=8, frames=10,
        utterances=8, mlp=(10, 32), repeats=2, memory=(64, 8, 64), one_process=True,
        growing_losses=(2, 4), growing_widths=(16, 32), ranks=(2,), losses_on_ranks=(4,),
    ),
}  # fmt: skip


# --- the parts -----------------------------------------------------------------------------------

Cells = Iterator[Row]
"""Of all cells of a part, one after another. The ways in one cell take turns."""


def _projections(sizes: Sizes, device: torch.device, clock: Clock) -> Cells:
    for n, m in itertools.product(sizes.columns, sizes.rows):
        if m * n * 4 <= sizes.most_bytes:
            yield from _projection(m, n, sizes, device, clock)


def _projection(m: int, n: int, sizes: Sizes, device: torch.device, clock: Clock) -> list[Row]:
    rows, gpu = Rows(m, n, device), device.type == "cuda"
    left_out = {ways.LOOP: m * m * n > sizes.most_meetings, ways.UNFUSED: not gpu}
    timed = {name: run for name, run in ways.PROJECTIONS.items() if not left_out.get(name)}
    repeats = min(sizes.repeats, max(1, 10_000_000 // (m * n)))
    found = clock.time(_all_on(rows, timed, repeats), task="rows", m=m, n=n)
    if gpu:
        kernels = {name: run for name, (_, run) in ways.KERNELS.items()}
        found += clock.time(_all_on(rows, kernels), task="kernels", m=m, n=n)
    return found


def _all_on(
    what: Any, timed: Mapping[str, Callable[[Any], Any]], repeats: int = 1
) -> dict[str, Contender]:
    return {
        name: Contender(functools.partial(run, what), repeats=repeats)
        for name, run in timed.items()
    }


def _steps(sizes: Sizes, device: torch.device, clock: Clock) -> Cells:
    def unet(apart: bool = False) -> UNetTask:
        crop = 16 if apart else sizes.crop  # TorchJD would take minutes for 15 graphs of 32^3
        return UNetTask(sizes.modalities, sizes.width, crop, 2, device)

    scenes: Mapping[str, Callable[[bool], Task]] = {
        "U-Net": unet,
        "sentiment": lambda apart: SentimentTask(sizes.frames, sizes.utterances, device),
        "MLP": lambda apart: MLPTask(*sizes.mlp, 8, sizes.utterances, device),
        "small MLP": lambda apart: MLPTask(3, 64, 4, sizes.utterances, device),
    }
    for apart, name in itertools.product((False, True), scenes):
        repeats = sizes.repeats if name == "small MLP" else 1
        tasks = {way: scenes[name](apart) for way in ways.WAYS}  # autogram changes its model
        task = tasks[ways.JOINT]
        yield from clock.time(
            _stepping(tasks, apart, repeats), task=name, apart=apart, m=task.losses,
            n=task.elements(), tensors=len(task.parameters()), repeats=repeats, shape=task.shape,
        )  # fmt: skip
    task = unet()
    yield from clock.time(
        _all_on(task, ways.FORWARDS), task="forwards", m=task.losses, shape=task.shape
    )


def _stepping(
    tasks: Mapping[str, Task], apart: bool = False, repeats: int = 1
) -> dict[str, Contender]:
    """Of the ways that have such a forward."""
    contenders = {}
    for way, task in tasks.items():
        if forward := ways.WAYS[way].forward(task, apart):
            backward = ways.WAYS[way].backward(task)
            contenders[way] = Contender(forward, backward, task.clear, repeats)
    return contenders


def _memories(sizes: Sizes, device: torch.device, clock: Clock) -> Cells:
    for group in [list(ways.WAYS)] if sizes.one_process else [[way] for way in ways.WAYS]:
        yield from in_own_process(group, sizes.memory, sizes.mlp[0], sizes.modalities)
        clock.tick()


def _growths(sizes: Sizes, device: torch.device, clock: Clock) -> Cells:
    layers, width = sizes.mlp
    shapes = [("m", width, m) for m in sizes.growing_losses]
    shapes += [("n", width, 8) for width in sizes.growing_widths]
    for along, wide, m in shapes:
        task = MLPTask(layers, wide, m, sizes.utterances, device)
        contenders = _stepping(dict.fromkeys(ways.GROWING, task))
        yield from clock.time(contenders, along=along, m=m, n=task.elements())


def _ranks(sizes: Sizes, device: torch.device, clock: Clock) -> Cells:
    mlp = sizes.mlp[0], sizes.memory[0]
    for size in sizes.ranks:
        yield from measure_ranks(size, sizes.losses_on_ranks, mlp, sizes.utterances, sizes.rounds)
        clock.tick()


PARTS: Mapping[str, Callable[[Sizes, torch.device, Clock], Cells]] = {
    "projection": _projections,
    "step": _steps,
    "memory": _memories,
    "growth": _growths,
    "ranks": _ranks,
}


def run_parts(
    parts: Sequence[str], sizes: Sizes, device: torch.device, progress: bool = False
) -> list[Row]:
    """What each of ``parts`` measured, as it is written to results.json."""

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    rows = []
    for part in [part for part in PARTS if part in parts]:
        with tqdm(desc=part, unit="run", disable=not progress, leave=False) as bar:
            clock = Clock(sizes.rounds, synchronise, bar.update)
            rows += [{"part": part, **row} for row in PARTS[part](sizes, device, clock)]
    return rows


# --- command line --------------------------------------------------------------------------------

PROG = "python -m benchmarks.speed"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is measured."""

    parts: Annotated[tuple[str, ...], command.list_of(list(PARTS), "part")] = tuple(PARTS)
    """comma-separated, of projection, step, memory, growth, ranks"""


@dataclass(frozen=True, kw_only=True)
class Config(Measured, command.Machine):
    """What is measured, and where; ``quick`` shows that it runs, not how fast."""

    preset: Literal["full", "quick"]


CONFIGS = {"full": Config(preset="full"), "quick": Config(preset="quick")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return command.said(PROG, lambda: _main(arguments))


def _main(arguments: list[str]) -> int:
    command.alone()
    config, where, _ = command.parse(arguments, PROG, __doc__ or "", CONFIGS, command.Written)
    torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    folder = new_folder(PROG, where.out)
    sizes = SIZES[config.preset]
    # Of attention's backward under TorchJD's vmap, which runs it once per loss; table.md says so.
    warnings.filterwarnings("ignore", "There is a performance drop")
    try:
        rows = run_parts(config.parts, sizes, device, sys.stderr.isatty())
        content = {
            "command": shlex.join([*PROG.split(), *arguments]),
            "date": str(datetime.date.today()),
            "machine": machine(device, config.threads),
            "environment": results.environment(["numpy", "torchjd", "monai", "quadprog"]),
            "preset": config.preset,
            "sizes": asdict(sizes),
            "rows": rows,
        }
        table = write_report(content, folder)
    except KeyboardInterrupt:
        if not any(folder.iterdir()):
            folder.rmdir()
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130
    show(table)
    print(f"written to {folder}")
    return 0


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What the numbers depend on: processor, cores, torch's threads; the GPU, if it ran there."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", info.read_text() if info.exists() else "")
    return {
        "processor": named[1] if named else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


if __name__ == "__main__":
    sys.exit(main())
