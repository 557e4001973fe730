"""``joint``: one scalar, for whoever calls ``backward`` themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.core.cases import REDUCTIONS, assert_rows_equal, optimizer_of, vector
from tests.reference import Snapshot, TwoTowers, decouple, grads, same, towers

OPTIONS: list[dict[str, Any]] = [
    {},
    {"rule": "pcgrad", "seed": 3},
    {"rule": "sum"},
    {"scope": "all"},
    {"row_dtype": torch.bfloat16},
    {"conflict_parameters": "trunk"},
]


def pair(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[Any]:
    """Twice the same model and optimizer."""
    made = []
    for model in (towers(dtype), towers(dtype)):
        own = dict(options)
        if "conflict_parameters" in own:
            own["conflict_parameters"] = model.trunk.parameters()
        made.append((model, optimizer_of(model.parameters(), **own)))
    return made


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_its_backward_is_backward_bit_for_bit(options: dict[str, Any], reduction: str) -> None:
    """Of the losses that are there, call by call; and its value is their mean, or sum."""
    (ours, opt), (plain, opt_plain) = pair({**options, "reduction": reduction})
    for seed in range(2):
        losses = {**ours.losses(seed), "c": None}
        joint = opt.joint(losses)
        assert joint.shape == () and joint.requires_grad
        present = torch.stack([loss for loss in losses.values() if loss is not None])
        value = present.sum() if reduction == "sum" else present.mean()
        assert torch.equal(joint.detach(), value.detach())
        joint.backward()
        report = opt_plain.backward({**plain.losses(seed), "c": None})
        assert same(grads(ours), grads(plain))
        assert same(opt.last.gramian, report.gramian) and same(opt.last.losses, report.losses)
        assert opt.last.names == report.names and opt.last.unavailable == ("c",)


def scaled(factor: float, rows: list[Any]) -> list[Any]:
    return [None if g is None else factor * g for g in rows]


@pytest.mark.parametrize("factor", [0.25, 2.0**16, -3.0])
def test_each_loss_is_multiplied_by_the_gradient_that_arrives(factor: float) -> None:
    (model, opt), _ = pair({}, torch.float64)
    (opt.joint(model.losses()) * factor).backward()
    assert_rows_equal(grads(model), scaled(factor, decouple(model.rows())), [grads(model)])
    expected = torch.stack([*model.losses().values()]).detach() * factor
    torch.testing.assert_close(opt.last.losses, expected)


def test_each_micro_batch_is_decoupled_on_its_own_and_grad_adds_up() -> None:
    """As frameworks accumulate: each joint loss divided by their number."""
    (model, opt), _ = pair({}, torch.float64)
    for seed in range(4):
        (opt.joint(model.losses(seed)) / 4).backward()
    parts = zip(*(decouple(model.rows(seed)) for seed in range(4)), strict=True)
    assert_rows_equal(grads(model), [sum(part) / 4 for part in parts], model.rows())


def test_it_merges_what_accumulate_has_taken() -> None:
    (ours, opt), (plain, opt_plain) = pair({})
    opt.accumulate(ours.losses(0))
    opt.joint(ours.losses(1)).backward()
    opt_plain.accumulate(plain.losses(0))
    opt_plain.backward(plain.losses(1))
    assert same(grads(ours), grads(plain))


def test_it_may_be_a_part_of_a_larger_loss() -> None:
    """What is added to it has its plain gradient."""
    (model, opt), _ = pair({}, torch.float64)
    penalty = sum(p.square().sum() for p in model.parameters())
    (opt.joint(model.losses()) + penalty).backward()
    pairs = zip(decouple(model.rows()), model.parameters(), strict=True)
    assert_rows_equal(grads(model), [g + 2 * p.detach() for g, p in pairs], model.rows())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("computed", ["under no_grad", "with a graph"])
def test_without_grad_mode_it_is_a_plain_number(reduction: str, computed: str) -> None:
    (model, opt), _ = pair({"reduction": reduction})
    with torch.set_grad_enabled(computed == "with a graph"):
        losses = {**model.losses(), "c": None}
    with torch.no_grad():
        value = opt.joint(losses)
    present = [float(loss.detach()) for loss in losses.values() if loss is not None]
    assert float(value) == pytest.approx(sum(present) / (3 if reduction == "mean" else 1))
    assert not value.requires_grad and opt.last is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_its_value_is_float32_or_wider(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """600 + 600.5 needs more digits than half precision has, and 60000 + 60000 more room."""
    p = nn.Parameter(torch.ones((), dtype=dtype))
    opt = optimizer_of([p], reduction="sum")
    losses = [(p * 40000).reshape(shape), (p * 40032).reshape(shape), (p / 4).reshape(shape)]
    exact = math.fsum(float(loss.detach()) for loss in losses)
    joint = opt.joint(losses)
    assert joint.dtype == torch.promote_types(dtype, torch.float32) and joint.shape == ()
    assert float(joint.detach()) == exact
    (joint / 2**10).backward()
    assert p.grad.dtype == dtype
    assert float(p.grad) == pytest.approx(80032.25 / 2**10, rel=torch.finfo(dtype).eps)


def test_losses_of_several_dtypes() -> None:
    p, q = nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), nn.Parameter(torch.ones(2).double())
    joint = optimizer_of([p, q], reduction="sum").joint([p.sum(), q.sum()])
    assert joint.dtype == torch.float64 and float(joint.detach()) == 4.0
    joint.backward()
    assert p.grad.tolist() == q.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("backward_inside", [False, True])
def test_it_works_inside_autocast(backward_inside: bool) -> None:
    (ours, opt), (plain, opt_plain) = pair({})
    with torch.autocast("cpu", torch.bfloat16):
        joint = opt.joint(ours.losses())
        expected = plain.losses()
        if backward_inside:
            joint.backward()
    if not backward_inside:
        joint.backward()
    opt_plain.backward(expected)
    assert joint.dtype == torch.float32
    for one, other in zip(grads(ours), grads(plain), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_grad_scaler_scales_unscales_and_skips() -> None:
    (model, opt), _ = pair({})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    expected = decouple(model.rows())
    before = [p.detach().clone() for p in model.parameters()]
    for spoilt in (True, False):
        losses = model.losses()
        if spoilt:
            losses["b"] = losses["b"] * float("inf")
        opt.zero_grad()
        scaler.scale(opt.joint(losses)).backward()
        scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == 2.0**9
        for p, old, g in zip(model.parameters(), before, expected, strict=True):
            moved = torch.zeros_like(old) if spoilt else -0.1 * g.float()
            torch.testing.assert_close(p.detach() - old, moved, rtol=1e-4, atol=1e-6)


# --- what is refused ------------------------------------------------------------------------------


def test_a_closure_points_to_backward() -> None:
    (model, opt), _ = pair({})
    losses = {**model.losses(), "b": lambda: model.losses()["b"]}
    with pytest.raises(
        TypeError, match=r"loss 2 of 3 \('b'\) is a closure.*use backward\(losses\)"
    ):
        opt.joint(losses)
    assert all(g is None for g in grads(model))


@pytest.mark.parametrize("grad_mode", [False, True])
def test_losses_that_are_all_unavailable(grad_mode: bool) -> None:
    (_, opt), _ = pair({})
    with (
        torch.set_grad_enabled(grad_mode),
        pytest.raises(ValueError, match=r"all are unavailable \(None\): 'a', 'b'"),
    ):
        opt.joint({"a": None, "b": None})


def test_a_second_backward() -> None:
    """Also with ``retain_graph``: the graphs are used up; ``.grad`` is that of the first."""
    p = nn.Parameter(vector(1.0, 2.0))
    joint = optimizer_of([p]).joint([p.square().sum(), p.sum()])
    joint.backward(retain_graph=True)
    once = p.grad.clone()
    with pytest.raises(RuntimeError, match="second"):
        joint.backward()
    assert torch.equal(p.grad, once)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda p: [p], "must be a scalar"),
        (lambda p: [p.sum(), p.detach().sum()], "requires no grad"),
        (lambda p: [], "losses is empty"),
    ],
)
def test_losses_are_checked_when_they_are_given(losses: Any, message: str) -> None:
    p = nn.Parameter(vector(1.0, 2.0))
    with pytest.raises(ValueError, match=message):
        optimizer_of([p]).joint(losses(p))


def in_hook(model: TwoTowers) -> None:
    def fails(_: Tensor) -> None:
        raise RuntimeError("no luck")

    model.b.weight.register_hook(fails)


@pytest.mark.parametrize("fault", ["hook", "rule", "unreached", "freed"])
def test_an_error_inside_leaves_grad_as_it_was(fault: str) -> None:
    model = towers()
    rule = (lambda gramian: gramian[0, :1]) if fault == "rule" else "gmd"
    opt = optimizer_of(model.parameters(), rule=rule)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    losses = model.losses()
    if fault == "hook":
        in_hook(model)
    if fault == "unreached":
        losses["c"] = nn.Parameter(torch.ones(())) * 1
    joint = opt.joint(losses)
    if fault == "freed":
        torch.autograd.grad(losses["b"], [model.b.weight])
    snapshot = Snapshot(opt)
    with pytest.raises((RuntimeError, ValueError)):
        joint.backward()
    snapshot.assert_unchanged()


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_it_ends_a_window_as_backward_does(kind: type) -> None:
    """Pending rows of a sequence are those of a sequence."""
    p = nn.Parameter(torch.zeros(2))
    opt = optimizer_of([p], reduction="sum")

    def losses(factor: float) -> Any:
        pair = [(p * factor).sum(), (p * -factor).sum() / 2]
        return dict(zip("ab", pair, strict=True)) if kind is dict else kind(pair)

    opt.accumulate(losses(2.0))
    opt.joint(losses(4.0)).backward()
    by_joint = p.grad
    opt.zero_grad()
    opt.accumulate(losses(2.0))
    opt.backward(losses(4.0))
    assert torch.equal(by_joint, p.grad)
