"""Handwritten digits in two halves, what is learnt of them, and where methods are compared."""

import hashlib
from dataclasses import dataclass
from functools import cache, cached_property

import sklearn
import torch
from sklearn.datasets import load_digits

__all__ = ["COMBINATIONS", "PARTS", "Digits", "Draw", "Setting", "settings"]

MODALITIES = ("left", "right")
COMBINATIONS = [*MODALITIES, "left+right"]
MEMBERS = torch.tensor([[name in some.split("+") for name in MODALITIES] for some in COMBINATIONS])

PARTS = {
    "units": "a regression target in units from raw to standardised",
    "long": "the raw unit, with five times as many steps",
    "contradiction": "one loss with labels that contradict the others', and a weight",
    "missing": "one modality is rare in training",
}

BATCH = 16
TRAIN = VALIDATION = 400
RATES = (0.8, 0.2)  # how often left and right are missing, before what has neither is redrawn
RAW, STANDARDISED = 1.0, 34.0


@dataclass(frozen=True)
class Setting:
    """One place where the methods are compared.

    Attributes:
        part: one of PARTS.
        optimizer: "SGD" or "Adam".
        steps: of every training.
        unit: what the ink, of standard deviation 34, is divided by; unused with a ``factor``.
        factor: weight of the loss of right, whose labels then contradict; None: they do not.
        missing: whether modalities are missing in train and validation.
    """

    part: str
    optimizer: str
    steps: int
    unit: float = STANDARDISED
    factor: float | None = None
    missing: bool = False

    @property
    def name(self) -> str:
        what = f"unit {self.unit:g}" if self.factor is None else f"weight {self.factor:g}"
        return f"{what}, {self.optimizer}"

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the m losses, in the order of the rows."""
        tasks = ("digit", "ink") if self.factor is None else ("digit",)
        return tuple(f"{some} {task}" for task in tasks for some in COMBINATIONS)


def settings(part: str, quick: bool) -> list[Setting]:
    """All of a part; a quick run has the ends of each scale and few steps."""
    steps = 12 if quick else 400
    found = []
    for optimizer in ("SGD", "Adam"):
        if part == "units":
            units = (RAW, STANDARDISED) if quick else (RAW, 3.0, 10.0, STANDARDISED)
            found += [Setting(part, optimizer, steps, unit) for unit in units]
        elif part == "long":
            found.append(Setting(part, optimizer, 5 * steps, RAW))
        elif part == "contradiction":
            factors = (1.0, 30.0) if quick else (1.0, 10.0, 30.0)
            found += [Setting(part, optimizer, steps, factor=factor) for factor in factors]
        else:
            units = (STANDARDISED, RAW)
            found += [Setting(part, optimizer, steps, unit, missing=True) for unit in units]
    return found


class Digits:
    """scikit-learn's copy of the test set of the UCI handwritten digits: 1797 images of 8 x 8.

    Attributes:
        views: (N, 2, 32), the left and the right half, from 0 to 1.
        digit: (N,), from 0 to 9.
        ink: (N,), the sum of the 64 grey levels from 0 to 16.
    """

    def __init__(self) -> None:
        pixels, digit = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).view(-1, 8, 8)
        halves = [half.flatten(1) for half in images.split(4, dim=2)]
        self.views = torch.stack(halves, 1) / 16
        self.digit = torch.from_numpy(digit).long()
        self.ink = images.sum((1, 2))

    @classmethod
    @cache
    def load(cls) -> "Digits":
        """The one copy."""
        return cls()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the pixels and labels."""
        parts = (self.views * 16).byte().numpy().tobytes(), self.digit.byte().numpy().tobytes()
        return hashlib.sha256(b"".join(parts)).hexdigest()

    @property
    def source(self) -> str:
        return f"sklearn.datasets.load_digits, scikit-learn {sklearn.__version__}"

    def provenance(self) -> dict[str, str]:
        """Where the data come from, for the result file."""
        return {"source": self.source, "images": str(len(self.digit)), "sha256": self.digest}


class Draw:
    """What a seed decides beside the initial weights: splits, what is missing, the batches.

    Attributes:
        train, validation, test: indices of images.
        complete: (N, 3), whether an image has all of a combination; in test it always has.
        batches: (steps, BATCH), indices of images, of which one at least is complete.
        center, spread: mean and standard deviation of the ink in train.
    """

    def __init__(self, seed: int, steps: int, missing: bool) -> None:
        ink = Digits.load().ink
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(ink), generator=generator)
        rest = len(order) - TRAIN - VALIDATION
        self.train, self.validation, self.test = order.split([TRAIN, VALIDATION, rest])
        available = torch.ones(len(ink), 2, dtype=torch.bool)
        wrong = order[:-rest] if missing else order[:0]
        while len(wrong) > 0:  # every image keeps a half
            drawn = torch.rand(len(wrong), 2, generator=generator)
            available[wrong] = drawn >= torch.tensor(RATES)
            wrong = wrong[~available[wrong].any(1)]
        self.complete = (available[:, None] | ~MEMBERS).all(2)
        self.batches = torch.empty(steps, BATCH, dtype=torch.long)
        wrong = torch.arange(steps)
        while len(wrong) > 0:  # a batch without a sample of a combination would lack its losses
            places = torch.randint(TRAIN, (len(wrong), BATCH), generator=generator)
            self.batches[wrong] = self.train[places]
            wrong = wrong[~self.complete[self.batches[wrong]].any(1).all(1)]
        self.center, self.spread = float(ink[self.train].mean()), float(ink[self.train].std())
