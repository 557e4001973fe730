"""Cheaper steps: ``conflict_parameters`` and ``row_dtype``, against rows written by hand."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

from gradsplit import CombinationSampler, ModalityDecoupledOptimizer
from tests.reference import (
    Row,
    Snapshot,
    TwoTowers,
    decouple,
    gmd_loop,
    grads,
    linear_losses,
    sum_rows,
    towers,
)
from tests.strategies import partial_rows
from tests.test_backward import (
    SMALL,
    GraphWatch,
    assert_rows_equal,
    optimizer_of,
    parameters_like,
    peak_bytes,
    vector,
)


def trunk(model: TwoTowers) -> list[nn.Parameter]:
    return list(model.trunk[1].parameters())


def cheap(model: TwoTowers, **options: object) -> ModalityDecoupledOptimizer:
    return optimizer_of(list(model.parameters()), conflict_parameters=trunk(model), **options)


def weights_of(rows: Sequence[Row], measured: Iterable[int]) -> Tensor:
    """(m,): how often each row is in the sum of the projected rows, from gradient space alone.

    A row is followed by a column of its own that nothing else has, as small as it may be.
    """
    jacobian = torch.stack(
        [
            torch.cat([row[p].double().flatten() for p in measured if row[p] is not None])
            for row in rows
        ]
    )
    tags = torch.eye(len(rows), dtype=torch.float64) * 1e-9 * jacobian.norm()
    return gmd_loop(torch.cat([jacobian, tags], dim=1))[-len(rows) :] / tags.diagonal()


def expected(rows: Sequence[Row], measured: Iterable[int], reduction: str = "mean") -> Row:
    """What ``backward`` adds to .grad: every parameter has the weights of the measured ones."""
    weights, m = weights_of(rows, measured), len(rows)
    merged: Row = []
    for column in zip(*rows, strict=True):
        some = [w * g for w, g in zip(weights, column, strict=True) if g is not None]
        divide = reduction == "mean" or (reduction == "released" and len(some) == m)
        merged.append(torch.stack(some).sum(0) / (m if divide else 1) if some else None)
    return merged


def assert_close(ours: Sequence[Tensor | None], theirs: Row, rtol: float = 1e-7) -> None:
    for p, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert (one is None) == (other is None), f"parameter {p}: {one} instead of {other}"
        if one is not None and other is not None:
            torch.testing.assert_close(one.double(), other, rtol=rtol, atol=rtol)


def index_of(model: nn.Module, chosen: Iterable[Tensor]) -> list[int]:
    return [[p is c for p in model.parameters()].index(True) for c in chosen]


# --- conflict_parameters: weights and merge -------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "released"])
@pytest.mark.parametrize("seed", range(3))
def test_every_parameter_gets_the_weights_of_the_measured_ones(reduction: str, seed: int) -> None:
    model = towers(seed=seed)
    rows, measured = model.rows(seed), index_of(model, trunk(model))
    assert weights_of(rows, measured).max() > 1.001, "no conflict: the test would see nothing"
    report = cheap(model, reduction=reduction).backward(model.losses(seed))
    torch.testing.assert_close(report.weights, weights_of(rows, measured), rtol=1e-7, atol=0)
    assert_close(grads(model), expected(rows, measured, reduction))


def test_the_report_is_that_of_the_measured_parameters() -> None:
    model = towers()
    jacobian = torch.stack(
        [
            torch.cat([row[p].flatten() for p in index_of(model, trunk(model))])
            for row in model.rows()
        ]
    )
    losses = model.losses()
    report = cheap(model).backward(losses)
    assert report.names == ("a", "b", "a+b") and report.unavailable == ()
    torch.testing.assert_close(report.gramian, jacobian @ jacobian.T)
    torch.testing.assert_close(report.losses, torch.stack([*losses.values()]).detach())


@given(rows=partial_rows())
def test_measuring_everywhere_where_everything_is_shared_is_the_exact_step(rows: list[Row]) -> None:
    rows = [list(row) for row in rows]
    everywhere = [p for p, column in enumerate(zip(*rows, strict=True)) if None not in column]
    if not everywhere:
        return
    rows = [[row[p] for p in everywhere] for row in rows]
    params = parameters_like(rows)
    optimizer_of(params, conflict_parameters=params).backward(linear_losses(params, rows))
    assert_rows_equal([p.grad for p in params], decouple(rows), rows)


def test_without_conflict_it_is_the_gradient_of_the_mean_loss() -> None:
    p, q = nn.Parameter(vector(1.0, 1.0)), nn.Parameter(vector(1.0))
    losses = [(p * vector(1.0, 0.0)).sum() + 3 * q.sum(), (p * vector(1.0, 1.0)).sum()]
    optimizer_of([p, q], conflict_parameters=[p]).backward(losses)
    assert p.grad.tolist() == [1.0, 0.5] and q.grad.tolist() == [1.5]


def test_a_single_loss_equals_plain_backward_exactly() -> None:
    model = towers(torch.float32)
    plain = copy.deepcopy(model)
    plain.losses()["a"].backward()
    cheap(model).backward({"a": model.losses()["a"]})
    for ours, theirs in zip(grads(model), grads(plain), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


@pytest.mark.parametrize("rule", ["pcgrad", lambda gramian: gramian.diagonal()])
def test_rules_see_the_gramian_of_the_measured_parameters(rule: object) -> None:
    """With nothing else to merge it is the exact step."""
    rows: list[Row] = [[vector(2.0, 0.5)], [vector(-1.0, 1.0)], [vector(-0.5, -3.0)]]
    exact, ours = parameters_like(rows), parameters_like(rows)
    optimizer_of(exact, rule=rule, seed=4).backward(linear_losses(exact, rows))
    optimizer_of(ours, rule=rule, seed=4, conflict_parameters=ours).backward(
        linear_losses(ours, rows)
    )
    torch.testing.assert_close(ours[0].grad, exact[0].grad)


def test_it_adds_to_grad_and_steps_as_ever() -> None:
    model = towers()
    before = [p.detach().clone() for p in model.parameters()]
    theirs = expected(model.rows(), index_of(model, trunk(model)))
    opt = cheap(model)
    opt.backward(model.losses())
    opt.backward(model.losses())
    assert_close(grads(model), [None if g is None else 2 * g for g in theirs])
    values = opt.step(model.losses())  # zero_grad, backward and step
    assert_close(grads(model), theirs)
    assert list(values) == ["a", "b", "a+b"]
    for p, old, g in zip(model.parameters(), before, theirs, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * g, rtol=1e-7, atol=1e-7)


def test_closures_and_absent_losses() -> None:
    model = towers()
    calls: list[str] = []

    def closure(name: str) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            calls.append(name)
            return model.losses()[name]

        return loss

    report = cheap(model).backward({"a": closure("a"), "b": closure("b"), "a+b": None})
    assert calls == ["a", "b"] and report.unavailable == ("a+b",)
    rows = model.rows(names=("a", "b"))
    assert_close(grads(model), expected(rows, index_of(model, trunk(model))))


# --- conflict_parameters: accumulation, scaling, clipping, sampling -------------------------------


@pytest.mark.parametrize("reduction", ["mean", "released"])
def test_accumulation_is_exact(reduction: str) -> None:
    """The weights come from rows summed over the window, and weigh all of its graphs."""
    model = towers()
    opt = cheap(model, reduction=reduction)
    for seed in range(2):
        opt.accumulate(model.losses(seed))
        assert all(p.grad is None for p in model.parameters())
    report = opt.backward(model.losses(2))
    summed = sum_rows(*[model.rows(seed) for seed in range(3)])
    assert_close(grads(model), expected(summed, index_of(model, trunk(model)), reduction))
    torch.testing.assert_close(
        report.losses, sum(torch.stack([*model.losses(s).values()]).detach() for s in range(3))
    )


def test_a_combination_may_be_absent_from_a_micro_batch() -> None:
    model = towers()
    opt = cheap(model)
    opt.accumulate({**model.losses(0), "a": None})
    opt.backward({**model.losses(1), "b": None})
    b, both = model.rows(0, ("b", "a+b"))
    a, more = model.rows(1, ("a", "a+b"))
    rows = [b, *sum_rows([both], [more]), a]
    assert_close(grads(model), expected(rows, index_of(model, trunk(model))))


def test_accumulated_graphs_live_until_the_merge_or_zero_grad() -> None:
    model = towers()
    opt, watch = cheap(model), GraphWatch()
    for name in ("first", "second"):
        with watch.recording(name):
            opt.accumulate(model.losses())
    assert watch.alive() == {"first", "second"}
    opt.zero_grad()
    assert not watch.alive()
    with watch.recording("third"):
        opt.accumulate(model.losses())
    with watch.recording("last"):
        opt.backward(model.losses())
    assert not watch.alive()


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_scaled_losses_give_the_same_direction(scale: float) -> None:
    model = towers()
    cheap(model).backward({k: scale * v for k, v in model.losses().items()})
    theirs = expected(model.rows(), index_of(model, trunk(model)))
    assert_close([g / scale for g in grads(model)], theirs)


def test_grad_scaler_skips_the_step_where_any_loss_overflows() -> None:
    model = towers(torch.float32)
    opt, before = cheap(model), [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, moved in ((float("inf"), False), (1.0, True)):
        losses = model.losses()
        losses["b"] = losses["b"] * factor
        opt.zero_grad()
        opt.backward({k: scaler.scale(v) for k, v in losses.items()})
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == 2.0
        step = [
            float((p.detach() - old).norm())
            for p, old in zip(model.parameters(), before, strict=True)
        ]
        assert (sum(s * s for s in step) ** 0.5 > 0.9e-4) == moved
    assert sum(s * s for s in step) ** 0.5 == pytest.approx(0.1 * 1e-3, rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_what_is_not_finite_reaches_grad(bad: float, where: int) -> None:
    """Measured or not."""
    rows: list[Row] = [[vector(1.0, 2.0), vector(3.0)], [vector(-1.0, 1.0), vector(1.0)]]
    rows[0][where][0] = bad
    params = parameters_like(rows)
    optimizer_of(params, conflict_parameters=params[:1]).backward(linear_losses(params, rows))
    assert not params[where].grad.isfinite().all()


def test_it_composes_with_sampled_combinations() -> None:
    model, sampler = towers(), CombinationSampler(("a", "b"), k=2, seed=1)
    opt, seen = cheap(model), set()
    for seed in range(6):
        names = ["+".join(combination) for combination in sampler()]
        seen.add(tuple(names))
        losses = model.losses(seed)
        opt.zero_grad()
        assert opt.backward({name: losses[name] for name in names}).names == tuple(names)
        rows = model.rows(seed, names)
        assert_close(grads(model), expected(rows, index_of(model, trunk(model))))
    assert len(seen) > 1


# --- conflict_parameters: hooks, other leaves, graphs ---------------------------------------------


def test_one_backward_reaches_what_is_not_measured() -> None:
    model = towers()
    fired = {"private": 0, "measured": 0, "accumulated": 0}

    def count(key: str) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            fired[key] += 1

        return hook

    model.a.weight.register_hook(count("private"))
    trunk(model)[0].register_hook(count("measured"))
    trunk(model)[0].register_post_accumulate_grad_hook(count("accumulated"))
    cheap(model).backward(model.losses())
    assert fired == {"private": 1, "measured": 4, "accumulated": 1}


def test_leaves_outside_the_optimizer_get_the_plain_sum() -> None:
    model = towers()
    outside = [*model.a.parameters(), *model.b.parameters()]
    outside[0].grad = torch.full_like(outside[0], 5.0)
    rows = model.rows()
    opt = optimizer_of(list(model.trunk.parameters()), conflict_parameters=trunk(model))
    opt.accumulate(model.losses())
    opt.backward(model.losses(1))
    rows = sum_rows(rows, model.rows(1))
    theirs = expected(rows, index_of(model, trunk(model)))
    for p in range(4):
        parts = [row[p] for row in rows if row[p] is not None]
        theirs[p] = sum(parts) + (5.0 if p == 0 else 0.0)
    assert_close(grads(model), theirs)


def test_the_one_backward_frees_the_graphs() -> None:
    model = towers()
    losses = model.losses()
    cheap(model).backward(losses)
    for loss in losses.values():
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def test_losses_may_share_a_graph_or_have_their_own() -> None:
    model = towers()
    x = torch.randn(4, 3, dtype=torch.float64)
    hidden = model.a(x)
    shared = [model.trunk(hidden).square().mean(), -model.trunk(hidden).sum()]
    own = [model.trunk(model.a(x)).square().mean(), -model.trunk(model.a(x)).sum()]
    results = []
    for losses in (shared, own):
        opt = cheap(model)
        opt.zero_grad()
        opt.backward(losses)
        results.append([g.clone() for g in grads(model) if g is not None])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


# --- conflict_parameters: what is refused ---------------------------------------------------------


def test_a_loss_that_reaches_none_of_them_is_named() -> None:
    model = towers()
    opt = cheap(model)
    opt.backward(model.losses())
    opt.step()
    losses = model.losses()
    losses["b"] = model.b.weight.square().sum()
    snapshot = Snapshot(opt)
    with pytest.raises(ValueError, match=r"loss 2 of 3 \('b'\) reaches none of the conflict_param"):
        opt.backward(losses)
    snapshot.assert_unchanged()


@pytest.mark.filterwarnings("ignore:state_dict")
def test_an_error_leaves_pending_rows_as_they_were() -> None:
    model = towers()
    opt = cheap(model)
    opt.accumulate(model.losses(0))

    def fails() -> Tensor:
        raise RuntimeError("no data")

    snapshot = Snapshot(opt)
    with pytest.raises(RuntimeError, match="no data"):
        opt.accumulate({**model.losses(1), "a+b": fails})
    snapshot.assert_unchanged()
    opt.backward(model.losses(2))
    rows = sum_rows(model.rows(0), model.rows(2))
    assert_close(grads(model), expected(rows, index_of(model, trunk(model))))


@pytest.mark.filterwarnings("ignore:state_dict")
def test_an_error_in_the_one_backward_leaves_grad_as_it_was() -> None:
    model = towers()
    opt = cheap(model)
    opt.backward(model.losses())
    opt.step()

    def fails(_: Tensor) -> None:
        raise RuntimeError("hook")

    handle = model.a.weight.register_hook(fails)
    opt.accumulate(model.losses(0))  # stops before that parameter
    snapshot = Snapshot(opt)
    with pytest.raises(RuntimeError, match="hook"):
        opt.backward(model.losses(1))
    snapshot.assert_unchanged()
    handle.remove()
    opt.step()  # nothing is pending any more
    opt.zero_grad()
    opt.backward(model.losses())
    assert_close(grads(model), expected(model.rows(), index_of(model, trunk(model))))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scope": "all"}, ValueError, "scope must be left"),
        ({"row_dtype": torch.bfloat16}, ValueError, "one of the two"),
        ({"conflict_parameters": []}, ValueError, "got none"),
        ({"conflict_parameters": "trunk"}, TypeError, "conflict_parameters must be an iterable"),
        ({"conflict_parameters": torch.ones(2)}, TypeError, "put parameters in a list"),
        ({"conflict_parameters": [3]}, TypeError, "element 0 is a int"),
        ({"conflict_parameters": [torch.ones(2)]}, ValueError, "element 0, of shape"),
    ],
)
def test_options_that_do_not_fit(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    model = towers()
    with pytest.raises(error, match=message):
        optimizer_of(list(model.parameters()), **{"conflict_parameters": trunk(model), **options})


def test_parameters_that_were_frozen_since() -> None:
    model = towers()
    opt = cheap(model)
    trunk(model)[0].requires_grad_(False)
    opt.backward(model.losses())  # the other one is left
    trunk(model)[1].requires_grad_(False)
    snapshot = Snapshot(opt)
    with pytest.raises(ValueError, match="none of them requires grad"):
        opt.backward(model.losses())
    snapshot.assert_unchanged()


def test_a_sparse_gradient_is_refused() -> None:
    table, p = nn.Embedding(4, 2, sparse=True), nn.Parameter(torch.ones(2))
    opt = optimizer_of([table.weight, p], conflict_parameters=[p])
    with pytest.raises(ValueError, match=r"sparse gradient for a parameter of shape \(4, 2\)"):
        opt.backward([(table(torch.tensor([1])) * p).sum(), p.sum()])
    assert p.grad is None and table.weight.grad is None


# --- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("option", ["conflict_parameters", "row_dtype"])
def test_copies_keep_the_options(copied: Callable[..., object], option: str) -> None:
    model = towers(torch.float32)
    options = {} if option == "conflict_parameters" else {"row_dtype": torch.bfloat16}
    opt = cheap(model) if not options else optimizer_of(list(model.parameters()), **options)
    other_model, other = copied((model, opt))
    assert repr(other) == repr(opt) and option in repr(other)
    opt.step(model.losses())
    other.step(other_model.losses())
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert opt.state_dict().keys() == other.state_dict().keys()


# --- row_dtype ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["gmd", "pcgrad"])
@pytest.mark.parametrize("scope", ["shared", "all"])
@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_rows_give_what_the_exact_rows_give(rule: str, scope: str, seed: int) -> None:
    exact, ours = towers(torch.float32, seed), towers(torch.float32, seed)
    options = {"rule": rule, "scope": scope}
    theirs = optimizer_of(list(exact.parameters()), **options).backward(exact.losses(seed))
    opt = optimizer_of(list(ours.parameters()), row_dtype=torch.bfloat16, **options)
    report = opt.backward(ours.losses(seed))
    torch.testing.assert_close(report.cosine(), theirs.cosine(), rtol=0, atol=2e-3)
    for one, other in zip(grads(ours), grads(exact), strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm()) <= 2.0**-8 * float(theirs.norms().sum())


def test_each_gradient_is_rounded_once_and_the_sum_is_not() -> None:
    torch.manual_seed(0)
    rows: list[Row] = [[torch.randn(300)] for _ in range(3)]
    params = parameters_like(rows, torch.float32)
    opt = optimizer_of(params, row_dtype=torch.bfloat16, rule=ones, reduction="sum")
    opt.backward(linear_losses(params, rows))
    rounded = sum(row[0].bfloat16().double() for row in rows)
    assert params[0].grad.dtype == torch.float32
    torch.testing.assert_close(params[0].grad.double(), rounded, rtol=1e-6, atol=1e-6)
    assert not torch.equal(params[0].grad, params[0].grad.bfloat16().float())


def ones(gramian: Tensor) -> Tensor:
    return gramian.new_ones(gramian.shape[:-1])


def test_micro_batches_are_added_before_rounding() -> None:
    p = nn.Parameter(torch.zeros(2))
    opt = optimizer_of([p], row_dtype=torch.bfloat16)
    opt.accumulate([p.sum()])
    above_half = 2.0**-8 + 2.0**-17  # of the last bit of 1; rounded on its own it is the half
    opt.backward([(p * above_half).sum()])
    assert p.grad.tolist() == [1 + 2.0**-7] * 2


def test_accumulation_of_bfloat16_rows_equals_the_oracle() -> None:
    model = towers(torch.float32)
    opt = optimizer_of(list(model.parameters()), row_dtype=torch.bfloat16)
    for seed in range(3):
        opt.accumulate(model.losses(seed))
    opt.accumulate({"a": None, "a+b": model.losses(3)["a+b"]})
    opt.backward(model.losses(4))
    rows = sum_rows(*[model.rows(seed) for seed in (0, 1, 2, 4)])
    rows[2] = sum_rows([rows[2]], model.rows(3, ("a+b",)))[0]
    for ours, theirs in zip(grads(model), decouple(rows), strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm()) <= 2.0**-5 * float(theirs.norm()) + 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rounding_hides_nothing(bad: float) -> None:
    p = nn.Parameter(torch.zeros(3))
    opt = optimizer_of([p], row_dtype=torch.bfloat16)
    opt.backward([(p * torch.tensor([1.0, bad, 0.0])).sum(), p.sum()])
    assert not p.grad[1].isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_parameter_gets_a_grad_of_its_own_dtype(dtype: torch.dtype) -> None:
    p, q = nn.Parameter(torch.zeros(3, dtype=dtype)), nn.Parameter(torch.zeros(2))
    empty = nn.Parameter(torch.zeros(0))
    opt = optimizer_of([p, q, empty], row_dtype=torch.bfloat16)
    terms = p.float().sum() + q.sum() + empty.sum()
    opt.accumulate([terms.clone(), -2 * terms])
    opt.backward([terms.clone(), -2 * terms])
    assert (p.grad.dtype, q.grad.dtype, empty.grad.dtype) == (dtype, torch.float32, torch.float32)
    assert empty.grad.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, "bfloat16"])
def test_other_row_dtypes_are_refused(dtype: object) -> None:
    with pytest.raises(ValueError, match=r"row_dtype must be None or torch\.bfloat16"):
        optimizer_of([nn.Parameter(torch.zeros(1))], row_dtype=dtype)


def test_scaled_losses_skip_and_clip_with_bfloat16_rows() -> None:
    p = nn.Parameter(torch.ones(2))
    opt = optimizer_of([p], row_dtype=torch.bfloat16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    for factor in (float("inf"), 1.0):
        opt.zero_grad()
        opt.backward([scaler.scale(factor * p.sum()), scaler.scale(p.square().sum())])
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() == 2.0**19
    assert p.tolist() == pytest.approx([1 - 0.1 * 1.5] * 2)


# --- memory and cost ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [False, True])
def test_memory_of_rounded_rows(accumulate: bool, tmp_path: Path) -> None:
    """(m + 2) / 2 times the parameters, in elements of float32, and one parameter more."""
    m, pieces, n = 6, 32, 2**21
    params = [nn.Parameter(torch.ones(n // pieces)) for _ in range(pieces)]
    opt = optimizer_of(params, row_dtype=torch.bfloat16)
    closures = [_Dense.closure(params, float(i + 1)) for i in range(m)]

    def window() -> None:
        if accumulate:
            opt.accumulate(closures)
        opt.backward(closures)

    window()
    opt.zero_grad()
    peak = peak_bytes(window, tmp_path)
    assert m / 2 * n * 4 <= peak <= ((m + 2) / 2 + 3 / pieces) * n * 4 + SMALL


@pytest.mark.filterwarnings("ignore")
def test_memory_of_conflict_parameters_is_that_of_one_backward(tmp_path: Path) -> None:
    m, n = 6, 2**20
    params = [nn.Parameter(torch.ones(n // 32)) for _ in range(32)]
    opt = optimizer_of(params, conflict_parameters=params[:1])
    closures = [_Dense.closure(params, float(i + 1)) for i in range(m)]
    peak = peak_bytes(lambda: opt.backward(closures), tmp_path)
    # the merged gradient, and that of one loss, which this function makes all at once
    assert n * 4 <= peak <= (2 + m / 32) * n * 4 + SMALL


class _Dense(torch.autograd.Function):
    """A loss whose gradient is a constant everywhere, each a tensor of its own."""

    @staticmethod
    def forward(ctx: object, factor: float, *params: Tensor) -> Tensor:
        ctx.factor, ctx.shapes = factor, [p.shape for p in params]
        return sum(p.detach().flatten()[0] for p in params) * factor

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        sizes = zip(ctx.shapes, needed, strict=True)
        return None, *(gradient * torch.full(s, ctx.factor) if use else None for s, use in sizes)

    @classmethod
    def closure(cls, params: Sequence[Tensor], factor: float) -> Callable[[], Tensor]:
        return functools.partial(cls.apply, factor, *params)


@pytest.mark.parametrize("measured", [0, 1, 3])
def test_what_is_traversed(measured: int) -> None:
    """Graphs of their own once each; with conflict_parameters, their last layers once more."""
    depth, m = 6, 5
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
    traversed = 0

    def count(*_: object) -> None:
        nonlocal traversed
        traversed += 1

    block = [p for layer in layers[depth - measured :] for p in layer.parameters()]
    opt = optimizer_of(list(layers.parameters()), conflict_parameters=block or None)
    losses = []
    for _ in range(m):
        x = torch.randn(2, 4)
        for layer in layers:
            x = layer(x).tanh()
            x.grad_fn.register_hook(count)
        losses.append(x.mean())
    opt.backward(losses)
    assert traversed == m * (depth + measured)


def test_a_shared_forward_is_traversed_once_more_whatever_m() -> None:
    torch.manual_seed(0)
    encoder, heads = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(7))
    last = nn.Linear(4, 1)
    hidden = encoder(torch.randn(3, 4)).tanh()
    traversed: list[object] = []
    hidden.grad_fn.register_hook(lambda *_: traversed.append(None))
    params = [*encoder.parameters(), *heads.parameters(), *last.parameters()]
    opt = optimizer_of(params, conflict_parameters=last.parameters())
    opt.backward([last(head(hidden)).sum() for head in heads])
    assert len(traversed) == 1
