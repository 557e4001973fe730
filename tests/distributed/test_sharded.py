"""FSDP2: ``fully_shard`` flat, nested, hybrid and with tensor parallelism, against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradsplit import ModalityDecoupledOptimizer
from tests.distributed.cases import SHARDED, Case, assert_exact, error_of, start, train, whole
from tests.reference import same

pytestmark = pytest.mark.usefixtures("sharding")

FEW = {"steps": 6}  # each is slow
# The forward is rounded to 2^-9.
ROUNDED: dict[str, Any] = {"dtype": torch.float32, "within": 1e-2, **FEW}
CASES = [
    *(Case(how=how) for how in ("flat", "hybrid", "tensor parallel")),
    Case(how="nested", **FEW),
    *(Case(how=how, given="closures", **FEW) for how in ("flat", "tensor parallel")),
    Case(how="bfloat16", **ROUNDED),
    Case(how="nested", given="joint", **FEW),
    Case(how="flat", micro=3, net="one trunk", **FEW),
    Case(how="tensor parallel", missing="everywhere", **FEW),
    Case(how="hybrid", given="closures", clip=0.3, options={"rule": "pcgrad"}, **FEW),
    Case(how="flat", clip=0.3, options={"scope": "all", "reduction": "released"}, **FEW),
    Case(how="flat", options={"conflict_parameters": "trunk"}, missing="everywhere", **FEW),
]
MORE = [
    Case(how="nested", given="closures"),
    Case(how="bfloat16", given="closures", **ROUNDED),
    Case(how="hybrid", missing="everywhere"),
    Case(how="tensor parallel", options={"scope": "all", "reduction": "sum"}),
    Case(how="tensor parallel", options={"conflict_parameters": "trunk"}),
    Case(how="flat", options={"scope": "trunk"}, missing="everywhere"),
]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)], ids=str
)
def test_sharded_ranks_equal_one_process(ranks, case: Case) -> None:
    world = 4 if case.how in ("hybrid", "tensor parallel") else 2
    shares = 2 if case.how == "tensor parallel" else world  # of the batch
    assert_exact(case, ranks(world).run(train, case), shares)


def placements(how: str) -> list[tuple[Any, ...]]:
    net, opt, case, rank, world = start(Case(how=how))
    opt.backward(case.losses(net, 0, 0, rank, world))
    return [
        (type(p.grad) is type(p.data), p.grad.placements == p.placements, p.grad.dtype == p.dtype)
        for p in net.parameters()
    ]


@pytest.mark.parametrize("how", SHARDED)
def test_gradients_lie_as_parameters_do(ranks, how: str) -> None:
    for outcome in ranks(4).run(placements, how):
        assert all(all(equal) for equal in outcome)


def refused(setting: str, where: str) -> str:
    net, opt, case, rank, world = start(Case(how="nested"))
    part = net if where == "all" else net.trunk
    getattr(part, setting)(False)
    return error_of(lambda: opt.backward(case.losses(net, 0, 0, rank, world)))


@pytest.mark.parametrize("where", ["all", "a part"])
@pytest.mark.parametrize("setting", ["set_requires_gradient_sync", "set_reshard_after_backward"])
def test_settings_that_take_gradients_away_are_refused(ranks, setting: str, where: str) -> None:
    for error in ranks(2).run(refused, setting, where):
        assert setting in error or setting.removeprefix("set_") in error


def replicated(parallel: bool) -> list[Tensor]:
    """A parameter that two ranks hold, each with its part of the batch: its gradient is Partial."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    weight, x = torch.randn(5, 2, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    if parallel:
        mesh = init_device_mesh("cpu", (2,))
        weight = distribute_tensor(weight, mesh, [Replicate()])
        x = distribute_tensor(x, mesh, [Shard(0)])
    p = torch.nn.Parameter(weight)
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=0.1))
    output = (x @ p).mean(0)
    output = output.full_tensor() if parallel else output
    report = opt.backward([(output[0] - 3).square(), (output.sum() + 5).square()])
    return [whole(p.grad), report.gramian, report.weights]


def test_partial_gradients_are_summed(ranks, sharding) -> None:
    for found in ranks(2).run(replicated, True):
        for mine, expected in zip(found, replicated(False), strict=True):
            torch.testing.assert_close(mine, expected)


def suffer(fault: str) -> tuple[str, str]:
    """One rank hands over something else; then comes a good step."""
    closures = fault == "closure"
    kind = "closures" if closures else "one forward"
    net, opt, case, rank, world = start(Case(how="flat", given=kind))
    losses = given = case.losses(net, 0, 0, rank, world)

    def fails() -> None:
        losses["b"]()
        raise ValueError("no data on rank 1")

    if rank == 1:
        given = {
            "order": dict(reversed(losses.items())),
            "names": {name.replace("b", "c"): loss for name, loss in losses.items()},
            "unavailable": losses | {"b": None},
            "not a loss": losses | {"b": torch.ones(3)},
            "closure": losses | {"b": fails},
        }[fault]
    sharded = opt.param_groups[0]["params"]  # the model's are whole between forward and backward
    before = [p.to_local().clone() for p in sharded]
    error = error_of(lambda: opt.step(given))
    assert same([p.to_local() for p in sharded], before)
    assert all(p.grad is None for p in sharded)
    return error, error_of(lambda: opt.step(case.losses(net, 1, 0, rank, world)))


@pytest.mark.parametrize("fault", ["order", "names", "unavailable", "not a loss", "closure"])
def test_a_fault_on_one_rank_is_told_on_all(ranks, fault: str) -> None:
    """Where FSDP itself would wait for ever, in the forward or backward of a loss.

    (A closure that fails before its forward leaves the others in theirs.)
    """
    for error, afterwards in ranks(2).run(suffer, fault):
        assert error and ("rank 1" in error or "must be a scalar" in error)
        assert not afterwards
