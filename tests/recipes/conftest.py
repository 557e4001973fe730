"""Recipes run in a folder of their own, in float64, and leave nothing behind in the process."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch._functorch.config


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    # Inductor would compile for two minutes; what joins the graphs of the losses is before it.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.set_default_dtype(torch.float64)
    with torch._functorch.config.patch(donated_buffer=True):
        yield
    torch.set_default_dtype(torch.float32)
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
