"""One result folder: started, interrupted, resumed, finished. Knows neither data nor models."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from benchmarks.runs import ranks, results
from benchmarks.runs.checkpoint import load_checkpoint, save_checkpoint

__all__ = ["CHECKPOINT", "Diverged", "Session", "Training", "check_digest"]

CHECKPOINT = "checkpoint.pt"


class Diverged(RuntimeError):
    """A loss or a score is no longer a number."""


class Training(Protocol):
    """One model in training: a method and a seed."""

    method: str
    seed: int
    epoch: int
    history: list[dict[str, float | None]]  # of the epochs: what there is to tell

    def train_epoch(self, progress: Any) -> None:
        """Train and validate; adds what it did to the bar ``progress``."""

    def state_dict(self) -> dict[str, Any]:
        """All that changes: tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there, bit for bit."""

    def finish(self, save: Callable[[], None]) -> dict[str, Any]:
        """Test it. Returns what is kept: tensors and plain values; among them {"result": {...}}.

        ``save`` writes a checkpoint, for tests that take long.
        """


def _nothing(training: Any) -> None:
    """In place of what rank 0 does alone."""


def _told(epoch: Mapping[str, float | None]) -> str:
    known = {name: value for name, value in epoch.items() if value is not None}
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in known.items())


class Session:
    """All trainings of one result folder, in order, with a checkpoint after every epoch.

    Args:
        folder: where everything is written.
        benchmark: whose run it is, "python -m benchmarks.NAME".
        config: plain values: what decides the numbers.
        command: the command line that began it.
        environment: versions, as :func:`benchmarks.runs.results.environment` gives them.
        digest: of the data.
    """

    def __init__(
        self,
        folder: Path,
        benchmark: str,
        config: Mapping[str, Any],
        command: str,
        environment: dict[str, str],
        digest: str,
    ) -> None:
        self.folder = folder
        self.benchmark = benchmark
        self.config = dict(config)
        self.command = command
        self.environment = environment
        self.digest = digest
        self.done: list[dict[str, Any]] = []  # what finish() returned, per training
        self.current: dict[str, Any] | None = None  # state of the training that was cut off

    @classmethod
    def start(
        cls,
        parser: argparse.ArgumentParser,
        wanted: Path,
        config: Mapping[str, Any],
        command: str,
        environment: dict[str, str],
        digest: str,
    ) -> "Session":
        """In ``wanted``, or beside it where that holds another run."""
        try:
            markers = (results.RESULTS, CHECKPOINT)
            folder = ranks.first(lambda: results.new_folder(wanted, markers))
        except OSError as error:
            parser.error(f"argument --out: cannot create {wanted}: {error.strerror}")
        if folder != wanted:
            print(f"{wanted} holds another run; writing to {folder}", file=sys.stderr)
        return cls(folder, parser.prog, config, command, environment, digest)

    @classmethod
    def resume(
        cls,
        parser: argparse.ArgumentParser,
        folder: Path,
        given: Iterable[str],
        environment: Mapping[str, str],
    ) -> "Session":
        """The interrupted one in ``folder``; ``given`` are options that cannot be changed now."""
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        if options:
            parser.error(
                f"argument --resume: takes everything from {folder}; leave out {options}, "
                "or start a new run"
            )
        try:
            session = ranks.first(lambda: cls.load(folder))
        except OSError:
            parser.error(f"argument --resume: {folder} holds no {CHECKPOINT} of an interrupted run")
        except ValueError as error:
            parser.error(f"argument --resume: {error}")
        if session.benchmark != parser.prog:
            parser.error(f"argument --resume: {folder} holds a run of {session.benchmark}")
        began, now = (int(some.get("ranks", 1)) for some in (session.environment, environment))
        if began != now:
            parser.error(
                f"argument --resume: the run began on {began} rank{'s' * (began > 1)}, this is "
                f"{now}; only the same number can continue it"
            )
        for name, version in environment.items():
            if session.environment.get(name) != version:
                print(
                    f"warning: the run began with {name} {session.environment.get(name)}, this is "
                    f"{version}: the numbers may differ from those of an uninterrupted run",
                    file=sys.stderr,
                )
        return session

    @classmethod
    def load(cls, folder: Path) -> "Session":
        """Raises OSError, ValueError as :func:`load_checkpoint`."""
        results.remove_stale(folder)  # of a run that was killed while it wrote
        content = load_checkpoint(folder / CHECKPOINT)
        if "benchmark" not in content:
            raise ValueError(f"{folder / CHECKPOINT}: not a checkpoint of a run; start again")
        session = cls(
            folder,
            content["benchmark"],
            content["config"],
            content["command"],
            content["environment"],
            content["digest"],
        )
        session.done, session.current = content["done"], content["current"]
        return session

    def save(self) -> None:
        if ranks.rank() > 0:
            return
        content = {
            "benchmark": self.benchmark,
            "config": self.config,
            "command": self.command,
            "environment": self.environment,
            "digest": self.digest,
            "done": self.done,
            "current": self.current,
        }
        save_checkpoint(self.folder / CHECKPOINT, content)

    def _save(self, training: Training) -> None:
        self.current = training.state_dict()  # asks all ranks
        self.save()

    def train(
        self,
        plan: Sequence[tuple[str, int]],
        begin: Callable[[str, int], Training],
        *,
        epochs: int,
        epoch_length: int,
        unit: str,
        line: Callable[[Mapping[str, Any]], str],
        saved: Callable[[Any], None] = _nothing,
    ) -> None:
        """Run what is left of ``plan``.

        Args:
            plan: (method, seed) in order.
            begin: makes the training of a method and a seed.
            epochs: of each training.
            epoch_length: what a training adds to the progress bar per epoch.
            unit: of that.
            line: what to say of a finished training's result.
            saved: called on rank 0 with the training after each checkpoint.

        Raises:
            Diverged: of a training, saying which one and where.
        """
        if ranks.rank() > 0:
            saved = _nothing
        before = len(self.done) * epochs + (self.current["epoch"] if self.current else 0)
        with tqdm(
            total=len(plan) * epochs * epoch_length,
            initial=before * epoch_length,
            disable=not sys.stderr.isatty(),
            unit=unit,
        ) as progress:
            for number, (method, seed) in enumerate(plan[len(self.done) :], len(self.done) + 1):
                progress.set_description(f"{method}, seed {seed}")
                name = f"[{number}/{len(plan)}] {method}, seed {seed}"
                if progress.disable:  # a log file: say at least what takes so long
                    print(name, file=sys.stderr)
                training = begin(method, seed)
                if self.current is not None:
                    training.load_state_dict(self.current)
                    saved(training)  # the kill may have come before
                    said = f"{name}: continues after epoch {training.epoch} of {epochs}"
                    progress.write(said, file=sys.stderr)
                epoch = training.epoch
                try:
                    while training.epoch < epochs:
                        epoch = training.epoch + 1
                        training.train_epoch(progress)
                        self._save(training)
                        saved(training)
                        if progress.disable:
                            said = f"{name}, epoch {epoch}/{epochs}: {_told(training.history[-1])}"
                            print(said, file=sys.stderr)
                    kept = training.finish(partial(self._save, training))
                except Diverged as error:
                    where = f"{method}, seed {seed}, epoch {epoch}"
                    raise Diverged(f"{where}: {error}; try a lower --lr") from None
                self.done.append(kept)
                self.current = None
                self.save()
                said = f"[{number}/{len(plan)}] {line(kept['result'])}"
                progress.write(said, file=sys.stderr)

    def how_to_continue(self, *options: str) -> str:
        """The command that resumes, with ``options`` that are given anew."""
        module = self.benchmark.split()[1:]
        started = ranks.command(sys.executable)
        return shlex.join([*started, *module, "--resume", str(self.folder), *options])

    def close(self) -> None:
        """Everything is written: the checkpoint is not needed any more."""
        ranks.first((self.folder / CHECKPOINT).unlink)


def check_digest(parser: argparse.ArgumentParser, source: str, found: str, expected: str) -> None:
    """End the program where the data in ``source`` are not those that the run began with."""
    if found != expected:
        parser.error(
            f"argument --resume: the data has changed since the run began: {source} has SHA-256 "
            f"{found}, the run says {expected}; put the old data back"
        )
