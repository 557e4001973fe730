"""Result folders: names that are free, atomic writes, versions; Markdown tables and their cells."""

import hashlib
import json
import os
import platform
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import gradsplit
from benchmarks.runs import ranks

__all__ = [
    "RESULTS",
    "SCORES",
    "TABLE",
    "atomic_path",
    "environment",
    "file_sha256",
    "format_spread",
    "markdown_table",
    "new_folder",
    "remove_stale",
    "write_json",
    "write_text",
]

RESULTS = "results.json"
SCORES = "scores.csv"
TABLE = "table.md"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that becomes ``path`` when the block ends without error.

    A reader, or a run that is killed, sees the old file or the new one, never half of one.
    """
    # The suffix stays last: matplotlib chooses the format by it.
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_stale(folder: Path) -> None:
    """Delete what :func:`atomic_path` leaves in ``folder`` when its process is killed."""
    for path in folder.glob(".*-*.*"):
        if re.fullmatch(r"[.].+-[0-9]+[.](pt|json|md|png|csv|safetensors)", path.name):
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically; NaN and infinities, which JSON has not, are a ValueError."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def new_folder(wanted: Path, markers: Sequence[str]) -> Path:
    """Create and return ``wanted``, or ``wanted-2``, ``wanted-3``, ...: the first that is free.

    A folder is taken when it holds one of the files ``markers``.
    """
    folder, attempt = wanted, 1
    while any((folder / marker).exists() for marker in markers):
        attempt += 1
        folder = wanted.with_name(f"{wanted.name}-{attempt}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def file_sha256(path: Path) -> str:
    """SHA-256 of a file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def environment(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python, gradsplit, torch and the distributions ``packages``; the platform; ranks.

    One process does not say that it is one.
    """
    return {
        "python": platform.python_version(),
        "gradsplit": gradsplit.__version__,
        "torch": str(torch.__version__),  # a plain string: checkpoints hold nothing else
        **{name: metadata.version(name) for name in packages},
        "platform": f"{sys.platform} {platform.machine()}",
        **({"ranks": str(ranks.count())} if ranks.count() > 1 else {}),
    }


def format_spread(values: Sequence[float], digits: int = 3) -> str:
    """``mean ± sample std`` over seeds; the mean alone for one value."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns are padded, so that it reads well in a terminal too."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row has {len(row)} cells, the header {len(header)}: {row}")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, cells, widths)) + " |\n" for cells in (header, *rows)]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|\n")
    return "".join(lines)
