"""Training with gradient decoupling: what the trainings of sentiment and BraTS have in common.

A benchmark extends :class:`Training` by its model, its losses, its data and its scores;
:func:`train_all` runs the trainings of a session one after another.
"""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.runs import ranks
from benchmarks.runs.gradients import Merges
from benchmarks.runs.methods import METHODS, sampler_of
from benchmarks.runs.session import Diverged, Session
from gradsplit import LossBalance, ModalityDecoupledOptimizer

__all__ = ["Losses", "Training", "in_windows", "train_all"]

Combination = tuple[str, ...]
Losses = dict[str | Combination, Tensor | None]
T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


class Training(Generic[M]):
    """One model in training: a method and a seed.

    Args:
        config: the benchmark's; has the options of :class:`benchmarks.runs.command.Compared`,
            ``Optimised`` and ``Machine``.
        method, seed: of ``config``.
        model: made with this seed, so that all methods begin alike.
        optimizer: of its parameters, with one learning rate.
        combinations: all that the benchmark knows, in the order of its tables.
        scope, reduction: of the ModalityDecoupledOptimizer.
    """

    SCORE: ClassVar[str]  # what :meth:`validate` gives, by the name it has in the results
    SIGN: ClassVar[int] = 1  # -1: a lower score is better
    # What changes in training, all of it: values, or objects with a state of their own.
    MEMBERS: ClassVar[tuple[str, ...]] = (
        "epoch", "seconds", "skipped", "history", "best_epoch", "best_score", "best_model",
        "model", "optimizer", "scaler", "sampler", "balance", "merges",
    )  # fmt: skip

    def __init__(
        self,
        config: Any,
        method: str,
        seed: int,
        model: M,
        optimizer: torch.optim.Optimizer,
        combinations: Sequence[Combination],
        *,
        scope: str = "shared",
        reduction: str = "mean",
        scaled: bool = False,
    ) -> None:
        self.config, self.method, self.seed = config, method, seed
        self.device = torch.device(config.device)
        self.model = model
        self.optimizer = ModalityDecoupledOptimizer(
            optimizer,
            rule=METHODS[method].rule,
            scope=METHODS[method].scope or scope,
            reduction=reduction,
            seed=seed,
            process_group=ranks.group(),
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.balance = LossBalance() if METHODS[method].balanced else None
        self.sampler = sampler_of(method, config.combinations, max(combinations, key=len), seed)
        self.merges = Merges(["+".join(combination) for combination in combinations])
        self.epoch = 0
        self.seconds = 0.0
        self.skipped = 0  # steps that the GradScaler skipped
        self.history: list[dict[str, float | None]] = []
        self.best_epoch = 0
        self.best_score: float | None = None
        self.best_model: dict[str, Tensor] = {}

    # -- what a benchmark says ---------------------------------------------------------------------

    def windows(self) -> Iterable[tuple[int, Sequence[Any]]]:
        """What each step of this epoch trains on: its samples' number, its micro-batches."""
        raise NotImplementedError

    def possible(self, batch: Any, combinations: Sequence[Combination]) -> bool:
        """Whether some sample, on whichever rank, has all modalities of a combination."""
        raise NotImplementedError

    def losses(self, batch: Any, combinations: Sequence[Combination]) -> Losses:
        """One loss per combination; None for those that no sample has."""
        raise NotImplementedError

    def validate(self, epoch: int) -> float | None:
        """The score that decides whether this epoch is tested; None: it is not computed."""
        raise NotImplementedError

    def test(self, save: Callable[[], None]) -> dict[str, Any]:
        """Scores of the best model, by name; ``save`` keeps what has been tested so far."""
        raise NotImplementedError

    def save_models(self, folder: Path) -> None:
        """Write what others may want to use; nothing, unless a benchmark does."""

    # -- training ----------------------------------------------------------------------------------

    def train_epoch(self, progress: Any) -> None:
        """All windows of an epoch; then validation, which decides whether to keep the weights."""
        started = time.perf_counter()
        losses = []
        self.model.train()
        for samples, window in self.windows():
            loss = self.step(window)
            losses += [] if loss is None else [loss]
            report = self.optimizer.last
            if losses and report is not None and not progress.disable:
                conflicts = f"{report.conflict_rate():.0%}"
                progress.set_postfix(loss=f"{losses[-1]:.3f}", conflicts=conflicts, refresh=False)
            progress.update(samples)
        epoch = self.epoch + 1
        self.model.eval()
        score = self.validate(epoch)
        if score is not None and (
            self.best_score is None or self.SIGN * score > self.SIGN * self.best_score
        ):
            self.keep(epoch, score)
        mean = math.fsum(losses) / len(losses) if losses else None
        rate = self.optimizer.param_groups[0]["lr"]
        self.history.append({"train_loss": mean, "lr": rate, self.SCORE: score})
        self.epoch = epoch
        self.seconds += time.perf_counter() - started

    def keep(self, epoch: int, score: float | None) -> None:
        """Test the weights as they are now, unless better ones come."""
        self.best_epoch, self.best_score = epoch, score
        self.best_model = {
            name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()
        }

    def step(self, window: Sequence[Any]) -> float | None:
        """One optimizer step over some micro-batches; the mean loss.

        Micro-batches of which no sample has any of the combinations drawn are passed over; None
        where that leaves nothing to learn.
        """
        combinations = self.sampler()
        window = [batch for batch in window if self.possible(batch, combinations)]
        if not window:
            return None
        self.optimizer.zero_grad()
        for batch in window[:-1]:
            self.optimizer.accumulate(self._weighed(batch, combinations))
        report = self.optimizer.backward(self._weighed(window[-1], combinations))
        scale = self.scaler.get_scale()
        if self.balance is not None:
            self.balance.update(report, scale)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        mean = float(report.losses.mean()) / scale
        if not math.isfinite(mean):
            raise Diverged("the loss is not a finite number")
        if self.scaler.get_scale() < scale:  # a gradient overflowed: angles mean nothing
            self.skipped += 1
        else:
            self.merges.add(report, scale)
        return mean

    def _weighed(self, batch: Any, combinations: Sequence[Combination]) -> Any:
        losses = {
            combination: self.scaler.scale(loss) if loss is not None else None
            for combination, loss in self.losses(batch, combinations).items()
        }
        return losses if self.balance is None else self.balance(losses)

    # -- what is kept ------------------------------------------------------------------------------

    def finish(self, save: Callable[[], None]) -> dict[str, Any]:
        """Test the best model; what the report is made of."""
        started = time.perf_counter()
        before = self.seconds

        def saved() -> None:
            self.seconds = before + time.perf_counter() - started
            save()

        tested = self.test(saved)
        self.seconds = before + time.perf_counter() - started
        result = {
            "method": self.method,
            "seed": self.seed,
            "best_epoch": self.best_epoch,
            self.SCORE: self.best_score,
            "skipped_steps": self.skipped,
            "history": self.history,
            "seconds": round(self.seconds, 1),
        }
        return {
            "result": {**result, **tested.pop("result")},
            **tested,
            "records": self.merges.state_dict(),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that changes: tensors and plain values."""
        members = {name: _state(getattr(self, name)) for name in self.MEMBERS}
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {**members, "random": ranks.each({"cpu": torch.get_rng_state(), "cuda": cuda})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there, on a CPU bit for bit."""
        for name in self.MEMBERS:
            member = getattr(self, name)
            if hasattr(member, "load_state_dict"):
                member.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])
        random = ranks.own(state["random"])
        torch.set_rng_state(random["cpu"])
        if random["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.device)


def _state(member: Any) -> Any:
    return member.state_dict() if hasattr(member, "state_dict") else member


def in_windows(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """Groups of ``size``; the last one may be smaller."""
    while window := list(itertools.islice(items, size)):
        yield window


# --- all of them ---------------------------------------------------------------------------------


def train_all(
    session: Session,
    config: Any,
    begin: Callable[[str, int], Training[Any]],
    *,
    samples: int,
    unit: str,
    line: Callable[[Mapping[str, Any]], str],
) -> None:
    """Run what is left of ``config.plan``, with a checkpoint after every epoch.

    Args:
        session: whose ``done`` grows by what :meth:`Training.finish` returns.
        config: with ``plan`` and ``epochs``.
        begin: makes the training of a method and a seed.
        samples: of an epoch, for the progress bar.
        unit: of these.
        line: what to say of a finished training's result.

    Raises:
        Diverged: of a training, saying which one and where.
    """
    plan, epochs = config.plan, config.epochs
    current = session.kept["current"]
    before = len(session.done) * epochs + (0 if current is None else current["epoch"])
    with tqdm(
        total=len(plan) * epochs * samples,
        initial=before * samples,
        disable=not sys.stderr.isatty(),
        unit=unit,
    ) as progress:
        for number, (method, seed) in enumerate(plan[len(session.done) :], len(session.done) + 1):
            name = f"[{number}/{len(plan)}] {method}, seed {seed}"
            progress.set_description(name)
            if progress.disable:  # a log file: say at least what takes so long
                _say(name)
            training = begin(method, seed)
            try:
                _train(training, session, epochs, progress, name)
                kept = training.finish(partial(_save, training, session))
            except Diverged as error:
                epoch = min(training.epoch + 1, epochs)
                raise Diverged(f"{method}, seed {seed}, epoch {epoch}: {error}") from None
            session.done.append(kept)
            session.save()
            _say(f"[{number}/{len(plan)}] {line(kept['result'])}")


def _train(
    training: Training[Any], session: Session, epochs: int, progress: Any, name: str
) -> None:
    """Until the last epoch, from where the session was cut off."""

    def export() -> None:
        ranks.first(lambda: training.save_models(session.folder))

    if session.kept["current"] is not None:
        training.load_state_dict(session.kept["current"])
        export()  # the kill may have come before
        _say(f"{name}: continues after epoch {training.epoch} of {epochs}")
    while training.epoch < epochs:
        training.train_epoch(progress)
        _save(training, session)
        export()
        if progress.disable:
            told = ", ".join(
                f"{key.replace('_', ' ')} {value:.4g}"
                for key, value in training.history[-1].items()
                if value is not None
            )
            _say(f"{name}, epoch {training.epoch}/{epochs}: {told}")


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _save(training: Training[Any], session: Session) -> None:
    session.save(training.state_dict())  # asks all ranks
