"""One result folder: started, interrupted, resumed, finished. Knows neither data nor models."""

import datetime
import io
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.runs import ranks, results
from benchmarks.runs.checkpoint import load_checkpoint, save_checkpoint
from benchmarks.runs.command import blaming, refuse, restored

__all__ = [
    "CHECKPOINT",
    "Diverged",
    "Session",
    "begin",
    "finished",
    "new_folder",
    "same_data",
    "show",
    "told",
]

CHECKPOINT = "checkpoint.pt"

C = TypeVar("C")
D = TypeVar("D")


class Diverged(RuntimeError):
    """A loss or a score is no longer a number."""


class Session:
    """What is kept of a run until it is finished, and where.

    Args:
        folder: where everything is written.
        kept: of plain values and tensors: ``benchmark``, whose run it is ("python -m
            benchmarks.NAME"); ``config``, what decides the numbers; ``command``, the line that
            began it; ``environment``, of :func:`benchmarks.runs.results.environment`; ``digest``,
            of the data; ``done``, what is finished; ``current``, the state of what was cut off.
    """

    def __init__(self, folder: Path, kept: dict[str, Any]) -> None:
        self.folder = folder
        self.kept = kept

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says of the run."""
        return {name: self.kept[name] for name in ("config", "command", "environment", "done")}

    @property
    def done(self) -> list[dict[str, Any]]:
        done: list[dict[str, Any]] = self.kept["done"]
        return done

    def save(self, current: dict[str, Any] | None = None) -> None:
        """Keep ``done``, and the state ``current`` of what is under way."""
        self.kept["current"] = current
        ranks.first(lambda: save_checkpoint(self.folder / CHECKPOINT, self.kept))

    def carry_out(
        self,
        work: Callable[[], str],
        afterwards: Callable[[], None] = lambda: None,
        options: Sequence[str] = (),
    ) -> int:
        """Print the table that ``work`` returns when it has written all; the exit code.

        Args:
            work: raises :class:`Diverged` where there is nothing to hope for.
            afterwards: what follows, without which the run is finished, too.
            options: to be given anew when the run is continued.
        """
        benchmark = self.kept["benchmark"]
        try:
            self.save(self.kept["current"])  # from here on a kill loses at most an epoch
            table = work()
            ranks.first((self.folder / CHECKPOINT).unlink)
            afterwards()
        except KeyboardInterrupt:
            started = [*ranks.command(sys.executable), *benchmark.split()[1:]]
            again = shlex.join([*started, "--resume", str(self.folder), *options])
            print(f"\ninterrupted; to continue:\n  {again}", file=sys.stderr)
            return 130
        except Diverged as error:
            print(f"{benchmark.split('-m ')[1]}: {error}; try a lower --lr", file=sys.stderr)
            return 1
        show(table)
        print(f"written to {self.folder}")
        return 0


def show(table: str) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal has no plus-minus sign
    print(table)


def finished(prog: str, folder: Path | None, given: Sequence[str]) -> dict[str, Any] | None:
    """What the finished run in ``folder`` has written; None: there is something to do."""
    if folder is None or given or not (folder / results.RESULTS).exists():
        return None
    with blaming("--resume"):
        content: dict[str, Any] = json.loads((folder / results.RESULTS).read_text("utf-8"))
        if content.get("benchmark") != prog.rpartition(".")[2]:
            raise ValueError(f"{folder} holds the results of another benchmark")
    return content


def told(folder: Path) -> int:
    """The exit code, where there is nothing to resume: the folder's table is shown."""
    with blaming("--resume"):
        table = (folder / results.TABLE).read_text("utf-8")
    show(f"{folder} is already finished:\n\n{table}")
    return 0


def begin(
    prog: str,
    arguments: Sequence[str],
    config: C,
    given: Sequence[str],
    where: Any,
    load: Callable[[C], D],
    packages: Sequence[str],
) -> tuple[Session, C, D]:
    """A new session, or the one to resume; with its configuration and data.

    Args:
        prog, config, given, where: of :func:`benchmarks.runs.command.parse`, from ``arguments``.
        load: the data, with ``source`` and ``digest``.
        packages: whose versions are kept.
    """
    environment = results.environment(packages)
    if where.resume is not None:
        session = _resume(prog, where.resume, given, environment)
        with blaming("--resume"):
            config = restored(type(config), session.kept["config"])
        data = _loaded(config, load)
        same_data(data, session.kept["digest"])
        return session, config, data
    data = _loaded(config, load)
    folder = new_folder(prog, where.out)
    kept = {
        "benchmark": prog,
        "config": asdict(config),  # type: ignore[call-overload]
        "command": shlex.join([*ranks.command("python"), *prog.split()[1:], *arguments]),
        "environment": environment,
        "digest": data.digest,  # type: ignore[attr-defined]
        "done": [],
        "current": None,
    }
    return Session(folder, kept), config, data


def new_folder(prog: str, out: Path | None) -> Path:
    """``out`` or results/NAME-DATE, or one beside it where that holds another run."""
    wanted = out or Path("results") / f"{prog.rpartition('.')[2]}-{datetime.date.today()}"
    with blaming("--out"):
        markers = (results.RESULTS, CHECKPOINT)
        folder = ranks.first(lambda: results.new_folder(wanted, markers))
    if folder != wanted:
        print(f"{wanted} holds another run; writing to {folder}", file=sys.stderr)
    return folder


def _loaded(config: Any, load: Callable[[Any], D]) -> D:
    torch.set_num_threads(config.threads)  # sums depend on how they are split
    return load(config)


def _resume(prog: str, folder: Path, given: Sequence[str], environment: dict[str, str]) -> Session:
    if given:
        refuse(
            "--resume",
            f"takes everything from {folder}; leave out {', '.join(given)}, or start a new run",
        )
    if not (folder / CHECKPOINT).exists():
        refuse("--resume", f"{folder} holds no {CHECKPOINT} of an interrupted run")
    with blaming("--resume"):
        kept = ranks.first(lambda: _load(folder))
        if "benchmark" not in kept:
            raise ValueError(f"{folder / CHECKPOINT}: not a checkpoint of a run; start again")
        if kept["benchmark"] != prog:
            raise ValueError(f"{folder} holds a run of {kept['benchmark']}")
        before = kept["environment"]
        began, now = (int(some.get("ranks", 1)) for some in (before, environment))
        if began != now:
            raise ValueError(
                f"the run began on {began} rank{'s' * (began > 1)}, this is {now}; only the same "
                "number can continue it"
            )
    for name, version in environment.items():
        if before.get(name) != version:
            print(
                f"warning: the run began with {name} {before.get(name)}, this is {version}: the "
                "numbers may differ from those of an uninterrupted run",
                file=sys.stderr,
            )
    return Session(folder, kept)


def _load(folder: Path) -> dict[str, Any]:
    results.remove_stale(folder)  # of a run that was killed while it wrote
    return load_checkpoint(folder / CHECKPOINT)


def same_data(data: Any, expected: str) -> None:
    """Refuse to go on with other data than those that the run began with."""
    if data.digest != expected:
        refuse(
            "--resume",
            f"the data has changed since the run began: {data.source} has SHA-256 {data.digest}, "
            f"the run says {expected}; put the old data back",
        )
