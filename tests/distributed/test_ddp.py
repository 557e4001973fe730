"""What a user tells the optimizer of DDP or a group, what is refused, and what stays local."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from gradsplit import ModalityDecoupledOptimizer
from tests.distributed.cases import NAMES, Case, error_of, loss_of, place, report_of, start, whole
from tests.reference import Row, grads, same

CASE = Case()


def first_use(wrap: Callable[[nn.Module], nn.Module], call: str, told: bool) -> str:
    """The error of making an optimizer and of its first call."""
    net = CASE.model(0)
    model = wrap(net)

    def use() -> None:
        opt = CASE.optimizer(net, **({"module": model} if told else {}))
        getattr(opt, call)(CASE.losses(model, 0, 0, *place()))

    return error_of(use)


def as_it_is(net: nn.Module) -> nn.Module:
    return net


def static_graph(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net, static_graph=True)


def communication_hook(net: nn.Module) -> nn.Module:
    ddp = DistributedDataParallel(net)
    ddp.register_comm_hook(None, fp16_compress_hook)
    return ddp


def fsdp1(net: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)


def over_tensor_parallelism(net: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    plan = {"trunk.1": ColwiseParallel(), "trunk.3": RowwiseParallel()}
    parallelize_module(net, mesh["tensor"], plan)
    return DistributedDataParallel(net, device_mesh=mesh["data"])


@pytest.mark.parametrize("call", ["backward", "accumulate"])
@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (static_graph, "static_graph"),
        (communication_hook, "hook"),
        (fsdp1, "fully_shard"),
        (over_tensor_parallelism, "tensor parallelism"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_the_reason(
    ranks, wrap: Any, reason: str, call: str
) -> None:
    for message in ranks(2).run(first_use, wrap, call, True):
        assert reason in message


@pytest.mark.parametrize("call", ["backward", "accumulate", "step"])
@pytest.mark.parametrize("wrap", [as_it_is, DistributedDataParallel])
def test_ranks_that_nobody_told_of_are_an_error(ranks, wrap: Any, call: str) -> None:
    """With both lines to write; whether there is a DDP or not."""
    for message in ranks(2).run(first_use, wrap, call, False):
        assert all(word in message for word in ("RuntimeError", "module=", "process_group="))


def one_backward(options: dict[str, Any], how: str) -> tuple[Row, Tensor, Any, Any]:
    """With an optimizer of the trunk alone, and a leaf that belongs to nobody."""
    net = CASE.model(0)
    model = DistributedDataParallel(net) if how == "ddp" else net
    more: dict[str, Any] = {"module": model} if "module" in how or how == "ddp" else {}
    if "group" in how:
        more["process_group"] = dist.group.WORLD
    base = torch.optim.SGD(net.trunk.parameters(), lr=0.1)
    opt = ModalityDecoupledOptimizer(base, **options, **more)
    scale = torch.ones((), dtype=CASE.dtype, requires_grad=True)
    losses = CASE.losses(model, 0, 0, *place())
    own = {name: loss.detach() for name, loss in losses.items()}
    returned = opt.step({name: scale * loss for name, loss in losses.items()})
    return [whole(g) for g in grads(net)], scale.grad, own, returned


@pytest.mark.parametrize("how", ["ddp", "group, module", "group"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_leaves_outside_the_optimizer(ranks, how: str, reduction: str) -> None:
    """Those of the module are averaged over the ranks, others are each rank's own.

    So are the losses that a step returns.
    """
    net, options = CASE.model(0), {"reduction": reduction}
    base = torch.optim.SGD(net.trunk.parameters(), lr=0.1)
    ModalityDecoupledOptimizer(base, **options).backward(CASE.all_losses(net, 0, [0], 2))
    results = ranks(2).run(one_backward, options, how)
    for gradients, scale, own, returned in results:
        assert same(own, returned)
        total = torch.stack(list(own.values())).sum()
        torch.testing.assert_close(scale, total / (len(own) if reduction == "mean" else 1))
        for (name, parameter), ours in zip(net.named_parameters(), gradients, strict=True):
            if how != "group" or name.startswith("trunk"):
                torch.testing.assert_close(ours, parameter.grad, rtol=0, atol=1e-12)
    assert not same(results[0][2], results[1][2])


def buffers_seen(missing: str) -> list[list[Tensor]]:
    """In each of three backwards before its first forward, and of a forward in evaluation."""
    net, opt, case, rank, world = start(Case(net="batch norm", given="closures", missing=missing))
    seen: list[list[Tensor]] = []

    def first(given: Callable[[], Tensor | None] | None) -> Tensor | None:
        seen.append([buffer.clone() for buffer in net.buffers()])
        return given() if given is not None else None

    for step in range(3):
        losses = case.losses(net, step, 0, rank, world)
        opt.step(losses | {"a": partial(first, losses["a"])})
    net.eval()
    net(*case.samples(3, 0, rank, world), NAMES)
    return [*seen, list(net.buffers())]


@pytest.mark.parametrize("missing", ["nowhere", "one rank"])
def test_buffers_are_those_of_the_first_rank(ranks, missing: str) -> None:
    """Broadcast once per backward, though the ranks run different numbers of forwards."""
    outcomes = ranks(2).run(buffers_seen, missing)
    assert same(outcomes[0], outcomes[1])
    assert not same(*outcomes[0][:2])


def other_buffers(told: bool) -> list[Tensor]:
    """Each rank comes with buffers and parameters of its own."""
    net = Case(net="batch norm").model(dist.get_rank())
    for buffer in net.buffers():
        buffer += 1 + dist.get_rank()
    CASE.optimizer(net, process_group=dist.group.WORLD, **({"module": net} if told else {}))
    return [tensor.detach() for tensor in net.state_dict().values()]


def test_a_group_begins_with_what_its_first_rank_has(ranks) -> None:
    outcomes = ranks(2).run(other_buffers, True)
    assert same(outcomes[0], outcomes[1])
    net = Case(net="batch norm").model(0)
    for buffer in net.buffers():
        buffer += 1
    assert same(outcomes[0], [tensor.detach() for tensor in net.state_dict().values()])


def copies() -> tuple[bool, list[str], list[bool]]:
    net, opt, case, rank, world = start(CASE)
    opt.step(case.losses(net, 0, 0, rank, world))
    module, errors, equal = net.module, [], []
    for twin, copied in (
        copy.deepcopy((module, opt)),
        pickle.loads(pickle.dumps((module, opt))),
    ):
        assert copied.module is None
        errors.append(error_of(lambda: copied.backward(case.losses(twin, 1, 0, rank, world))))  # noqa: B023
        copied.module = ddp = DistributedDataParallel(twin)
        copied.step(case.losses(ddp, 1, 0, rank, world))
        equal.append(copied)
    opt.step(case.losses(net, 1, 0, rank, world))
    equal = [same(report_of(opt), report_of(copied)) for copied in equal]
    return opt.module is net, errors, equal


def backward_without_a_forward() -> Row:
    """On the first rank, right after a plain step, when DDP is about to rebuild its buckets."""
    net, opt, case, *here = start(Case(given="closures", missing="all"))
    plain = replace(case, given="one forward", missing="nowhere")
    torch.stack(list(plain.losses(net, 0, 0, *here).values())).mean().backward()
    opt.zero_grad()
    opt.backward(case.losses(net, 0, 0, *here))
    return [whole(g) for g in grads(net.module)]


def test_ddp_rebuilds_no_buckets_in_a_closure(ranks) -> None:
    first, second = ranks(2).run(backward_without_a_forward)
    assert same(first, second)


def in_a_window() -> list[Tensor]:
    """``q`` is reached in the first micro-batch only: private, though every loss reaches it."""
    p, q = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    told = {"process_group": dist.group.WORLD} if dist.is_initialized() else {}
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p, q], lr=0.1), **told)
    x = torch.tensor([1.0, 0.5], dtype=torch.float64)
    opt.accumulate({"a": (p + q) @ x, "b": -((p + 2 * q) @ x).exp()})
    weights = opt.backward({"a": p @ x, "b": -(p @ x).exp()}).weights
    return [p.grad, q.grad, weights]


def test_what_a_micro_batch_misses_is_private_on_all_ranks(ranks) -> None:
    expected = in_a_window()
    assert (expected[-1] > 1).all(), "no conflicts: this shows nothing"
    for found in ranks(2).run(in_a_window):
        torch.testing.assert_close(found, expected)


def drawn(gramian: Tensor) -> Tensor:
    return 1 + torch.rand(len(gramian), dtype=gramian.dtype)


def backward_by_lot() -> tuple[Tensor, Row]:
    net, opt, case, rank, world = start(Case(options={"rule": drawn}))
    torch.manual_seed(rank)
    weights = opt.backward(case.losses(net, 0, 0, rank, world)).weights
    return weights, [whole(g) for g in grads(net)]


def test_a_rule_that_draws_at_random_is_that_of_the_first_rank(ranks) -> None:
    first, second = ranks(2).run(backward_by_lot)
    torch.manual_seed(0)
    torch.testing.assert_close(first[0], drawn(torch.eye(3, dtype=torch.float64)))
    assert same(first, second)


def test_copies_leave_the_module_behind(ranks) -> None:
    """They say so when they are used, and go on once they are told of one."""
    for kept, errors, equal in ranks(2).run(copies):
        assert kept and all(equal) and all("module=" in error for error in errors)


@pytest.mark.parametrize("initialised", [False, True])
def test_one_process_may_be_told_too(initialised: bool, tmp_path: Path) -> None:
    """And nothing changes: a script runs without torchrun as well."""
    plain, net = CASE.model(0), CASE.model(0)
    if initialised:
        store = f"file://{tmp_path}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = DistributedDataParallel(net) if initialised else net
        ours, theirs = CASE.optimizer(net, module=model), CASE.optimizer(plain)
        for step in range(3):
            ours.step(CASE.losses(model, step, 0, 0, 1))
            theirs.step(CASE.losses(plain, step, 0, 0, 1))
    finally:
        if initialised:
            dist.destroy_process_group()
    assert same(list(net.parameters()), list(plain.parameters()))
    assert same(report_of(ours), report_of(theirs))


def synchronised() -> Any:
    case = Case(net="batch norm")
    net = nn.SyncBatchNorm.convert_sync_batchnorm(case.model(0)).cuda()
    ddp = DistributedDataParallel(net)
    opt = case.optimizer(net, module=ddp)
    rank, world = place()
    for step in range(3):
        x, y = (t.cuda() for t in case.samples(step, 0, rank, world))
        outputs = ddp(x, y, NAMES)
        opt.step({n: loss_of(outputs, n) for n in NAMES})
    return [p.detach().cpu() for p in net.parameters()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="SyncBatchNorm needs CUDA")
def test_sync_batch_norm(ranks) -> None:
    """Statistics of all samples: one process on the concatenated batch."""
    case, world = Case(net="batch norm"), 2
    net = case.model(0)
    opt = case.optimizer(net)
    for step in range(3):
        x, y = case.samples(step, 0, 0, 1)
        outputs = net(x, y, NAMES)
        opt.step({n: loss_of(outputs, n) for n in NAMES})
    for ours in ranks(world).run(synchronised):
        for one, other in zip(ours, net.parameters(), strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=0, atol=1e-10)
