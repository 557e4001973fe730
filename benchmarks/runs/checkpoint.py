"""Checkpoints of a benchmark: one file, written atomically, read without running code from it."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.runs.results import atomic_path

__all__ = ["load_checkpoint", "save_checkpoint"]

FORMAT = 5  # raise when what a benchmark stores changes


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain Python values; the old checkpoint stays until the new is whole."""
    with atomic_path(path) as temporary:
        torch.save({"format": FORMAT, **content}, temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote.

    Raises:
        OSError: there is no such file.
        ValueError: it was written by another version of the benchmarks, or is no checkpoint.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # whatever the bytes make of torch's unpickler
        # Its own words advise weights_only=False, which would run code from the file.
        raise ValueError(
            f"{path}: not a checkpoint of a benchmark, or cut off; put the right file back, "
            "or start again"
        ) from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"{path}: checkpoint format {found}, this version reads {FORMAT}; "
            "resume with the version that wrote it, or start again"
        )
    del content["format"]
    return content
