"""Command lines, made from the dataclasses that decide the numbers.

A benchmark's configuration is a frozen dataclass that inherits its groups of options, such as
:class:`Machine`; presets are instances of it. What is wrong ends the program with a message that
names the option.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import torch
import tyro

from benchmarks.runs import ranks
from benchmarks.runs.methods import METHODS

__all__ = [
    "Compared",
    "File",
    "Folder",
    "Fraction",
    "FromZero",
    "Machine",
    "Optimised",
    "Positive",
    "PositiveFloat",
    "Refused",
    "Results",
    "Whole",
    "Written",
    "alone",
    "blaming",
    "checked",
    "list_of",
    "parse",
    "refuse",
    "restored",
    "said",
]

C = TypeVar("C")


# --- types ---------------------------------------------------------------------------------------


def checked(convert: Callable[[str], Any], what: str, metavar: str, show: Any = str) -> Any:
    """For ``Annotated``: an option of one word, which ``convert`` takes, or refuses by ValueError.

    Args:
        convert: from the word. It refuses without words of its own where ``what`` says it all.
        what: the user was to write.
        metavar: for ``--help``.
        show: the word of a default.
    """

    def read(words: list[str]) -> Any:
        try:
            return convert(words[0])
        except ValueError as error:
            reason = "" if str(error).startswith(("could not", "invalid literal")) else str(error)
            raise ValueError(reason or f"must be {what}, got {words[0]!r}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda _: True,
        str_from_instance=lambda value: [show(value)],
    )


def _number(kind: Callable[[str], Any], holds: Callable[[Any], bool], what: str, name: str) -> Any:
    def convert(word: str) -> Any:
        value = kind(word)
        if not holds(value):
            raise ValueError
        return value

    return checked(convert, what, name)


Positive = Annotated[int, _number(int, lambda x: x >= 1, "a whole number of at least 1", "N")]
# Below 2^32: also of seeds, from which generators of 64 bits are seeded.
Whole = Annotated[int, _number(int, lambda x: 0 <= x < 2**32, "whole, from 0 to below 2^32", "N")]
PositiveFloat = Annotated[float, _number(float, lambda x: 0 < x < math.inf, "positive", "X")]
FromZero = Annotated[float, _number(float, lambda x: 0 <= x < math.inf, "at least 0", "X")]
Fraction = Annotated[float, _number(float, lambda x: 0 <= x < 1, "from 0 to below 1", "X")]


def _absolute(word: str) -> str:
    """A path that still holds when --resume is called from elsewhere."""
    return str(Path(word).absolute())


File = Annotated[str | None, checked(_absolute, "a path", "FILE")]
Folder = Annotated[str | None, checked(_absolute, "a path", "FOLDER")]


def list_of(known: Sequence[str], kind: str) -> Any:
    """For ``Annotated``: comma-separated, of ``known``, each once."""

    def convert(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known:
                raise ValueError(f"unknown {kind} {name!r} (choose from {', '.join(known)})")
        if len(set(names)) < len(names):
            raise ValueError(f"{text!r} names a {kind} twice")
        return names

    return checked(convert, "a list", "LIST", ",".join)


def _combinations(text: str) -> str:
    drawn = text.startswith("k=") and text[2:].isdecimal()
    if text not in ("all", "singles") and not drawn:
        raise ValueError(f"{text!r} (choose from all, singles, k=N)")
    return text


def _device(text: str) -> str:
    try:
        device = torch.device(text)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
        if device.type == "cuda" and ranks.count() > 1 and device.index is not None:
            raise RuntimeError("every rank has its own GPU; say cuda")
        if device.type == "cuda" and not ranks.has_own_gpu():
            raise RuntimeError(
                f"more ranks here than GPUs, of which there are {torch.cuda.device_count()}"
            )
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{text!r} cannot be used here: {reason}") from None
    return str(device)


# --- groups of options ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it runs."""

    device: Annotated[str, checked(_device, "a device", "DEVICE")] = "cpu"
    """cpu, cuda, cuda:1, ..."""
    threads: Positive = dataclasses.field(default_factory=torch.get_num_threads)
    """of torch; sums depend on it"""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What is compared."""

    methods: Annotated[tuple[str, ...], list_of(list(METHODS), "method")]
    """comma-separated, of full, sum, gmd, gmd-all, pcgrad, balance, balance+gmd-all"""
    combinations: Annotated[str, checked(_combinations, "", "{all,singles,k=N}")]
    """trained on: all, singles, or k=N drawn per step"""
    seeds: Positive
    """number of seeds"""
    first_seed: Whole = 0
    """the others follow it"""

    @property
    def plan(self) -> list[tuple[str, int]]:
        """Every method for a seed, then the next seed: what is there early can be compared."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return [(method, seed) for seed in seeds for method in self.methods]


@dataclass(frozen=True, kw_only=True)
class Optimised:
    """How a model is trained."""

    epochs: Positive
    """passes over train"""
    batch_size: Positive
    """samples per micro-batch, of all ranks together"""
    lr: PositiveFloat
    """learning rate at the start"""
    weight_decay: FromZero
    """of the optimizer"""


@dataclass(frozen=True, kw_only=True)
class Written:
    """Where the results go."""

    out: Annotated[Path | None, checked(Path, "a path", "DIR")] = None
    """result folder; without it results/NAME-DATE"""


@dataclass(frozen=True, kw_only=True)
class Results(Written):
    """Where the results go."""

    resume: Annotated[Path | None, checked(Path, "a path", "DIR")] = None
    """continue the interrupted run in DIR"""


# --- reading -------------------------------------------------------------------------------------


def parse(
    arguments: Sequence[str],
    prog: str,
    description: str,
    presets: Mapping[str, C],
    where: type[Any] = Results,
) -> tuple[C, Any, list[str]]:
    """What the user wants.

    Args:
        arguments: the words after the program.
        prog: "python -m benchmarks.NAME".
        description: for ``--help``.
        presets: by name, the default first; each has the field ``preset``.
        where: a dataclass of options that decide no numbers.

    Returns:
        The configuration, an instance of ``where``, and the options that were given beside
        --resume, as they are written.
    """
    names = tuple(presets)
    preset: Any = Annotated[Literal[names], tyro.conf.arg(help="sets the other defaults")]
    first = dataclasses.make_dataclass("First", [("preset", preset, names[0])])
    early: Any = tyro.cli(first, args=arguments, return_unknown_args=True, add_help=False)[0]
    default: Any = presets[early.preset]
    # Each base of the configuration is a group in --help.
    groups = [*(_part(base, default) for base in type(default).__bases__), where()]
    fields = [(type(one).__name__, _unprefixed(one), _default(one)) for one in groups]
    options: Any = tyro.cli(
        dataclasses.make_dataclass("Options", [("preset", preset, early.preset), *fields]),
        args=arguments,
        prog=prog,
        description=description,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    *parts, chosen = (getattr(options, name) for name, _, _ in fields)
    merged = {name: value for part in parts for name, value in vars(part).items()}
    config = dataclasses.replace(default, **merged)
    words = (word.partition("=")[0].replace("_", "-") for word in arguments)
    given = [word for word in words if word.startswith("--") and word != "--resume"]
    return config, chosen, given


def _part(base: type[Any], whole: Any) -> Any:
    return base(**{field.name: getattr(whole, field.name) for field in dataclasses.fields(base)})


def _unprefixed(value: Any) -> Any:
    """Its options are ``--threads``, not ``--machine.threads``."""
    return tyro.conf.OmitArgPrefixes[type(value)]  # type: ignore[misc]


def _default(value: Any) -> Any:
    return dataclasses.field(default_factory=lambda: value)


def restored(kind: type[C], content: Mapping[str, Any]) -> C:
    """The configuration that a run began with, from its checkpoint or its results.

    Raises:
        ValueError: it is not one, or its device is not here.
    """
    try:
        # JSON has no tuples.
        plain: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in content.items()
        }
        config = kind(**plain)
    except TypeError as error:
        raise ValueError("written by another version of the benchmarks") from error
    if "device" in plain:
        _device(plain["device"])
    return config


# --- refusing ------------------------------------------------------------------------------------


class Refused(ValueError):
    """What the user asked for cannot be done; says which option is to blame."""


def refuse(option: str, reason: str) -> NoReturn:
    raise Refused(f"argument {option}: {reason}")


def alone() -> None:
    """For a benchmark that divides nothing among ranks: each would do all of it again."""
    if ranks.launched():
        raise Refused("this benchmark runs in one process; start it without torchrun")


@contextmanager
def blaming(option: str) -> Iterator[None]:
    """Whatever file or value is wrong within this block was given by ``option``."""
    try:
        yield
    except Refused:
        raise
    except OSError as error:
        # Not every OSError knows its file.
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise Refused(f"argument {option}: cannot use {what}") from error
    except ValueError as error:
        raise Refused(f"argument {option}: {error}") from error


def said(prog: str, program: Callable[[], int]) -> int:
    """The exit code of ``program``; says what was refused, and leaves as for a usage error."""
    try:
        return program()
    except Refused as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:  # while data were read, or segmentations written
        print("\ninterrupted", file=sys.stderr)
        return 130
