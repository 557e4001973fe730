"""How long decoupling takes, and how much memory, side by side with other ways to do it.

    python -m benchmarks.speed                       # all parts, about 17 minutes on two cores
    python -m benchmarks.speed --quick               # the same with toy sizes: for CI
    python -m benchmarks.speed --parts projection,step --threads 1
    python -m benchmarks.speed --device cuda

projection  gradients -> flat rows -> Gramian, rule, merged gradient: m rows of n elements, against
            one read of the data, PCGrad pair by pair, and TorchJD's PCGrad and UPGrad; on a GPU
            also the bandwidth that the kernels reach
step        forward and backward: the BraTS U-Net (15 losses), the sentiment transformer (7), and
            MLPs of 100 tensors (8) and of 6 (4), against plain backwards and TorchJD; once with a
            forward that all losses share, once with one forward per loss
memory      of U-Net, MLP and private encoders with a small head: live gradients and resident
            memory, each in a process of its own; on the CPU
growth      time against m and n, with fitted exponents
ranks       elements sent, memory and time of a step of the MLP on 2 and on 4 ranks, with formulas,
            against plain backwards under DDP; gloo, on the CPU, one thread per rank

Results go to results/speed-DATE: results.json with every single time, table.md, projection.png,
step.png. Nothing is kept of a run that is interrupted.
"""

import argparse
import datetime
import functools
import io
import itertools
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.runs import results
from benchmarks.runs.command import positive_int
from benchmarks.speed.memory import in_own_process
from benchmarks.speed.ranks import measure_ranks
from benchmarks.speed.report import PARTS, write_report
from benchmarks.speed.tasks import MLPTask, SentimentTask, Task, UNetTask
from benchmarks.speed.timing import Contender, round_robin
from benchmarks.speed.ways import (
    FUSED,
    GROWING,
    KERNELS,
    LOOP,
    METHODS,
    PROJECTIONS,
    READ,
    Jacobian,
    unet_sizes,
)

__all__ = ["FULL", "QUICK", "Sizes", "main", "run_parts"]


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        rounds: times of each, unless a single one takes seconds.
        rows, columns: of the projections: every m with every n, where the rows take no more than
            ``most_bytes``.
        longest_loop: seconds; where the pairwise loop would take longer it is left out.
        modalities, width, crop, batch: of the U-Net; ``crop_apart`` with one forward per loss:
            TorchJD's differentiation of 15 graphs would take minutes.
        frames, utterances: of the sentiment transformer's batch.
        mlp, small_mlp: layers and width.
        repeats: steps of the small MLP in one run, and most of a projection.
        memory: the widths of MLP, U-Net and encoders whose memory is measured; with
            ``one_process`` all methods in one, which is quicker and less exact.
        growing_losses, growing_widths: of the MLPs in the growth part.
        ranks, losses_on_ranks: every number of ranks with every number of losses, of the MLP that
            memory is measured with.
    """

    rounds: int = 7
    rows: tuple[int, ...] = (4, 7, 15, 31, 63)
    columns: tuple[int, ...] = (100_000, 1_000_000, 5_000_000, 20_000_000)
    most_bytes: float = 2.5e9
    longest_loop: float = 4.0
    modalities: int = 4
    width: int = 16
    crop: int = 32
    crop_apart: int = 16
    batch: int = 2
    frames: int = 50
    utterances: int = 32
    mlp: tuple[int, int] = (50, 128)
    small_mlp: tuple[int, int] = (3, 64)
    repeats: int = 20
    memory: tuple[int, int, int] = (256, 16, 1000)
    one_process: bool = False
    growing_losses: tuple[int, ...] = (2, 4, 8, 16, 32)
    growing_widths: tuple[int, ...] = (64, 128, 256, 512)
    ranks: tuple[int, ...] = (2, 4)
    losses_on_ranks: tuple[int, ...] = (4, 7, 15)


FULL = Sizes()
QUICK = Sizes(
    rounds=1,
    rows=(4, 15),
    columns=(10_000, 100_000),
    modalities=2,
    width=8,
    crop=8,
    frames=10,
    utterances=8,
    mlp=(10, 32),
    repeats=2,
    memory=(64, 8, 64),
    one_process=True,
    growing_losses=(2, 4),
    growing_widths=(16, 32),
    ranks=(2,),
    losses_on_ranks=(4,),
)


# --- the parts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What all parts need to know."""

    sizes: Sizes
    device: torch.device
    progress: bool

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def bar(self, part: str, runs: int) -> Iterator[Any]:
        with tqdm(total=runs, desc=part, unit="run", disable=not self.progress, leave=False) as bar:
            yield bar

    def time(self, contenders: Mapping[str, Contender], bar: Any, where: str) -> dict[str, Any]:
        """{name: [[seconds of each stage], ...]}."""

        def done(name: str, runs: int) -> None:
            bar.set_postfix_str(f"{where}: {name}", refresh=False)
            bar.update(runs)

        return dict(
            round_robin(contenders, self.sizes.rounds, synchronise=self.synchronise, done=done)
        )


def measure_projection(setting: Setting) -> list[dict[str, Any]]:
    """For every m and n, seconds by name; "skipped" says what was left out, and why."""
    sizes = setting.sizes
    names = [name for name in PROJECTIONS if name != FUSED or setting.device.type == "cuda"]
    cells: list[dict[str, Any]] = []
    runs = len(sizes.rows) * len(sizes.columns) * len(names) * (sizes.rounds + 1)
    with setting.bar("projection", runs) as bar:
        for n, m in itertools.product(sizes.columns, sizes.rows):
            cell: dict[str, Any] = {"rows": m, "columns": n, "seconds": {}, "skipped": {}}
            cells.append(cell)
            if m * n * 4 > sizes.most_bytes:
                reason = f"the rows take {m * n * 4 / 1e9:.1f} GB"
                cell["skipped"] = dict.fromkeys(names, reason)
                bar.update(len(names) * (sizes.rounds + 1))
                continue
            jacobian = Jacobian.random(m, unet_sizes(n), setting.device)
            repeats = min(sizes.repeats, max(1, 10_000_000 // (m * n)))
            contenders = {name: _projecting(PROJECTIONS[name], jacobian, repeats) for name in names}
            # A meeting of two rows reads and writes about as much as six reads of a row.
            contenders[READ].run(setting.synchronise)
            expected = 6 * m * sum(contenders[READ].run(setting.synchronise))
            if expected > sizes.longest_loop:
                cell["skipped"][LOOP] = f"would take about {expected:.0f} s"
                del contenders[LOOP]
                bar.update(sizes.rounds + 1)
            taken = setting.time(contenders, bar, f"m = {m}, n = {n:.0e}")
            cell["seconds"] = {name: [run[0] for run in runs] for name, runs in taken.items()}
            if FUSED in names:
                kernels = {name: _projecting(run, jacobian) for name, (_, run) in KERNELS.items()}
                taken = round_robin(kernels, sizes.rounds, synchronise=setting.synchronise)
                cell["kernels"] = {name: [run[0] for run in runs] for name, runs in taken.items()}
                del kernels
            del jacobian, contenders
    return cells


def _projecting(
    project: Callable[[Jacobian], Any], jacobian: Jacobian, repeats: int = 1
) -> Contender:
    return Contender([project], lambda: jacobian, repeats)


def measure_step(setting: Setting) -> dict[str, Any]:
    """Seconds of forward and backward by scene and method; and of the U-Net's forwards."""
    sizes, device = setting.sizes, setting.device

    def unet(crop: int) -> UNetTask:
        return UNetTask(sizes.modalities, sizes.width, crop, sizes.batch, device)

    makers: dict[str, Callable[[bool], Task]] = {
        "U-Net": lambda apart: unet(sizes.crop_apart if apart else sizes.crop),
        "sentiment": lambda apart: SentimentTask(sizes.frames, sizes.utterances, device),
        "MLP": lambda apart: MLPTask(*sizes.mlp, 8, sizes.utterances, device),
        "small MLP": lambda apart: MLPTask(*sizes.small_mlp, 4, sizes.utterances, device),
    }
    scenes: list[dict[str, Any]] = []
    runs = (2 * len(makers) * len(METHODS) + len(_FORWARDS)) * (sizes.rounds + 1)
    with setting.bar("step", runs) as bar:
        for forwards_apart, name in itertools.product((False, True), makers):
            make = functools.partial(makers[name], forwards_apart)
            repeats = sizes.repeats if name == "small MLP" else 1
            tasks = {method.name: make() for method in METHODS}  # autogram changes its model
            contenders = {
                method.name: Contender(
                    [
                        _ignoring(method.forward_of(tasks[method.name], forwards_apart)),
                        method.backward(tasks[method.name]),
                    ],
                    tasks[method.name].clear,
                    repeats,
                )
                for method in METHODS
                if method.fits(tasks[method.name], forwards_apart)
            }
            bar.update((len(METHODS) - len(contenders)) * (sizes.rounds + 1))
            taken = setting.time(contenders, bar, name)
            task = next(iter(tasks.values()))
            scenes.append(
                {
                    "scene": name,
                    "apart": forwards_apart,
                    "losses": task.losses,
                    "elements": sum(parameter.numel() for parameter in task.parameters()),
                    "tensors": len(task.parameters()),
                    "seconds": {
                        method: {
                            "forward": [run[0] for run in runs],
                            "backward": [run[1] for run in runs],
                        }
                        for method, runs in taken.items()
                    },
                }
            )
            del tasks, contenders, task
        ways = {name: _forwarding(run, unet(sizes.crop)) for name, run in _FORWARDS.items()}
        taken = setting.time(ways, bar, "U-Net's forwards")
    return {
        "scenes": scenes,
        "forwards": {name: [run[0] for run in runs] for name, runs in taken.items()},
    }


def _ignoring(forward: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda nothing: forward()


def _forwarding(run: Callable[[UNetTask], Any], task: UNetTask) -> Contender:
    return Contender([lambda nothing: run(task)], lambda: None)


def _loop_over_modalities(task: UNetTask) -> Any:
    """(B, R, D, H, W): what a plain loop makes of it."""
    names = task.model.config.modalities
    return sum(task.model(task.volume, available=(name,)) for name in names) / len(names)


@torch.no_grad()
def _branch_passes(task: UNetTask) -> list[Any]:
    names = task.model.config.modalities
    return [task.model(task.volume, available=(name,)) for name in names]


@torch.no_grad()
def _evaluation(task: UNetTask) -> Any:
    return task.model(task.volume, combinations=task.combinations)


_FORWARDS: Mapping[str, Callable[[UNetTask], Any]] = {
    "forward, all modalities": lambda task: task.model(task.volume),
    "loop over modalities": _loop_over_modalities,
    "evaluation, all combinations": _evaluation,
    "one pass per modality, no gradients": _branch_passes,
}


def measure_memory(setting: Setting) -> list[dict[str, Any]]:
    """By task and method: losses, elements, live and resident bytes."""
    names = [method.name for method in METHODS if method.exists()]
    layers, modalities = setting.sizes.mlp[0], setting.sizes.modalities
    groups = [names] if setting.sizes.one_process else [[name] for name in names]
    found: list[dict[str, Any]] = []
    with setting.bar("memory", len(names)) as bar:
        for group in groups:
            bar.set_postfix_str(group[0])
            found += in_own_process(group, setting.sizes.memory, layers, modalities)
            bar.update(len(group))
    return sorted(found, key=lambda entry: str(entry["task"]))


def measure_growth(setting: Setting) -> list[dict[str, Any]]:
    """Seconds of whole steps of MLPs, first against m, then against n."""
    sizes, device = setting.sizes, setting.device
    layers, width = sizes.mlp
    shapes = [("m", width, m) for m in sizes.growing_losses]
    shapes += [("n", width, 8) for width in sizes.growing_widths]
    methods = [method for method in METHODS if method.name in GROWING]
    cells = []
    with setting.bar("growth", len(shapes) * len(methods) * (sizes.rounds + 1)) as bar:
        for along, wide, m in shapes:
            task = MLPTask(layers, wide, m, sizes.utterances, device)
            contenders = {
                method.name: Contender(
                    [_ignoring(method.forward_of(task, False)), method.backward(task)], task.clear
                )
                for method in methods
            }
            taken = setting.time(contenders, bar, f"m = {m}, width {wide}")
            elements = sum(parameter.numel() for parameter in task.parameters())
            seconds = {name: [sum(run) for run in runs] for name, runs in taken.items()}
            cells.append({"along": along, "losses": m, "elements": elements, "seconds": seconds})
    return cells


def measure_on_ranks(setting: Setting) -> list[dict[str, Any]]:
    """What many ranks cost, by numbers of ranks and losses: see :func:`measure_ranks`."""
    sizes, found = setting.sizes, list[dict[str, Any]]()
    mlp = sizes.mlp[0], sizes.memory[0]
    with setting.bar("ranks", len(sizes.ranks)) as bar:
        for size in sizes.ranks:
            bar.set_postfix_str(f"R = {size}")
            found += measure_ranks(size, sizes.losses_on_ranks, mlp, sizes.utterances, sizes.rounds)
            bar.update()
    return found


_MEASURES: Mapping[str, Callable[[Setting], Any]] = {
    "projection": measure_projection,
    "step": measure_step,
    "memory": measure_memory,
    "growth": measure_growth,
    "ranks": measure_on_ranks,
}


def run_parts(
    parts: Sequence[str],
    sizes: Sizes,
    *,
    device: torch.device | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """What each of ``parts`` measured, as it is written to results.json."""
    setting = Setting(sizes, torch.device("cpu") if device is None else device, progress)
    return {part: _MEASURES[part](setting) for part in PARTS if part in parts}


# --- command line --------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA device here")
    threads = torch.get_num_threads() if options.threads is None else options.threads
    torch.set_num_threads(threads)
    wanted = options.out or Path("results") / f"speed-{datetime.date.today()}"
    try:
        folder = results.new_folder(wanted, (results.RESULTS,))
    except OSError as error:
        parser.error(f"argument --out: cannot create {wanted}: {error.strerror}")
    if folder != wanted:
        print(f"{wanted} holds another run; writing to {folder}", file=sys.stderr)
    sizes = QUICK if options.quick else FULL
    # Of attention's backward under TorchJD's vmap, which runs it once per loss; table.md says so.
    warnings.filterwarnings("ignore", "There is a performance drop")
    try:
        measured = run_parts(
            options.parts, sizes, device=options.device, progress=sys.stderr.isatty()
        )
        content = {
            "command": shlex.join(["python", "-m", "benchmarks.speed", *arguments]),
            "date": str(datetime.date.today()),
            "machine": machine(options.device, threads),
            "environment": results.environment(["numpy", "torchjd", "monai", "quadprog"]),
            "quick": options.quick,
            "sizes": asdict(sizes),
            "parts": measured,
        }
        table = write_report(content, folder)
    except KeyboardInterrupt:
        if not any(folder.iterdir()):
            folder.rmdir()
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for an ASCII terminal
    print(table)
    print(f"written to {folder}")
    return 0


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """What the numbers depend on: processor, cores, torch's threads; the GPU, if it ran there."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = models[0] if models else processor
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": str(device),
        "gpu": gpu,
    }


def _parts(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    for part in chosen:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(
                f"unknown part {part!r} (choose from {', '.join(PARTS)})"
            )
    return chosen


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text!r}")
    return device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes: that it runs, not how fast"
    )
    parser.add_argument(
        "--parts", type=_parts, default=PARTS, metavar="LIST",
        help=f"comma-separated, of {', '.join(PARTS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive_int, metavar="N", help="default: torch's own")
    parser.add_argument(
        "--device", type=_device, default=torch.device("cpu"), help="cpu or cuda (default: cpu)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="result folder (default: results/speed-DATE)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
