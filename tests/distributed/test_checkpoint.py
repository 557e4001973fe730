"""A checkpoint of two ranks goes on with two (bit for bit), with four, and with one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from gradsplit import ModalityDecoupledOptimizer
from tests.distributed.cases import Case, place, start, take_step, whole
from tests.reference import same

CASE = Case(options={"rule": "pcgrad", "seed": 7})
SAVED, END = 3, 6
MORE = [pytest.param(how, marks=pytest.mark.slow) for how in ("group", "flat", "hybrid")]


def save(net: nn.Module, opt: ModalityDecoupledOptimizer, kind: str, folder: str) -> None:
    full = StateDictOptions(full_state_dict=kind == "full", cpu_offload=True)
    state = {
        "model": get_model_state_dict(net, options=full),
        "optimizer": get_optimizer_state_dict(net, opt, options=full),
    }
    if kind == "sharded":
        dcp.save(state, checkpoint_id=folder)
    elif place()[0] == 0:
        torch.save(state, f"{folder}/all.pt")


def load(net: nn.Module, opt: ModalityDecoupledOptimizer, kind: str, folder: str) -> None:
    full = StateDictOptions(full_state_dict=kind == "full")
    if kind == "full":
        state: dict[str, Any] = torch.load(f"{folder}/all.pt")
    else:
        state = {
            "model": get_model_state_dict(net),
            "optimizer": get_optimizer_state_dict(net, opt),
        }
        dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(net, state["model"], options=full)
    set_optimizer_state_dict(net, opt, state["optimizer"], options=full)


def proceed(
    net: nn.Module, opt: ModalityDecoupledOptimizer, case: Case, share: tuple[int, int], steps: Any
) -> tuple[list[Tensor], list[Any]]:
    for step in steps:
        take_step(case, opt, step, [lambda: case.losses(net, step, 0, *share)])  # noqa: B023
    counters = [{k: v for k, v in g.items() if "gradsplit" in k} for g in opt.param_groups]
    return [whole(p) for p in net.parameters()], counters


def train_and_save(how: str, kind: str, folder: str) -> Any:
    net, opt, case, *share = start(replace(CASE, how=how))
    proceed(net, opt, case, share, range(SAVED))
    save(net, opt, kind, folder)
    return proceed(net, opt, case, share, range(SAVED, END))


def load_and_train(how: str, kind: str, folder: str) -> Any:
    """A new model with other parameters, and an optimizer with another seed."""
    other = replace(CASE, how=how, seed=5, options={"rule": "pcgrad", "seed": 1})
    net, opt, case, *share = start(other)
    load(net, opt, kind, folder)
    return proceed(net, opt, case, share, range(SAVED, END))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # with one process it is
@pytest.mark.parametrize("kind", ["sharded", "full"])
@pytest.mark.parametrize("how", ["ddp", "nested", *MORE])
def test_training_goes_on_from_a_checkpoint(ranks, how: str, kind: str, tmp_path: Path) -> None:
    """Parameters, momentum, the seed and the number of merges come back."""
    place = (how, kind, str(tmp_path))
    whole_run, resumed = (ranks(2).run(s, *place) for s in (train_and_save, load_and_train))
    assert same(whole_run, resumed)
    parameters, counters = whole_run[0]
    net = CASE.model(5)
    opt = replace(CASE, options={"rule": "pcgrad", "seed": 1}).optimizer(net)
    load(net, opt, kind, str(tmp_path))
    alone = proceed(net, opt, CASE, (0, 1), range(SAVED, END))
    for others in (ranks(4).run(load_and_train, *place)[0], alone):
        assert others[1] == counters and counters[0]["gradsplit_seed"] == 7
        for one, other in zip(others[0], parameters, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
