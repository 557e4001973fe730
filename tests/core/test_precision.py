"""Precision: what is rounded, when, and what neither underflows nor overflows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.core.cases import assert_rows_equal, optimizer_of, parameters_like, vector
from tests.reference import (
    Row,
    decouple,
    decouple_window,
    grads,
    linear_losses,
    towers,
)

HALF = [torch.float16, torch.bfloat16]


def merged_in(dtype: torch.dtype, jacobian: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """The merged gradient of rows in ``dtype`` and the oracle's on the very same rows."""
    rows: list[Row] = [[row.to(dtype)] for row in jacobian]
    p = nn.Parameter(torch.zeros(jacobian.shape[1], dtype=dtype))
    optimizer_of([p], **options).backward(linear_losses([p], rows))
    assert p.grad.dtype == dtype
    return p.grad, decouple(rows, reduction=str(options.get("reduction", "mean")))[0]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_the_merged_gradient_is_rounded_once(dtype: torch.dtype, seed: int) -> None:
    """Against the oracle on the same rows: half a unit in the last place for the half types."""
    torch.manual_seed(seed)
    jacobian = torch.randn(5, 200) - 0.3 * torch.randn(1, 200)
    ours, expected = merged_in(dtype, jacobian)
    unit = torch.finfo(dtype).eps
    relative = 0.51 * unit if dtype in HALF else 4 * unit
    wide = torch.promote_types(dtype, torch.float32)
    tiny = 8 * torch.finfo(wide).eps * float(jacobian.norm(dim=1).max())
    torch.testing.assert_close(ours.double(), expected, rtol=relative, atol=tiny)


@pytest.mark.parametrize("dtype", HALF)
def test_sums_outside_the_scope_are_taken_wide_and_rounded_once(dtype: torch.dtype) -> None:
    """1 + 300 times 2^-11: each alone would vanish in a half-precision sum."""
    p, q = nn.Parameter(torch.zeros(1, dtype=dtype)), nn.Parameter(torch.zeros(1))
    opt = optimizer_of([p, q], scope=[q], reduction="sum")
    losses = [p.sum() + q.sum(), *(2.0**-11 * p.sum() + q.sum() for _ in range(300))]
    opt.backward(losses)
    assert float(p.grad) == float(torch.tensor(1 + 300 * 2.0**-11).to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_dot_products_of_half_precision_rows_do_not_overflow(dtype: torch.dtype) -> None:
    """100 000 ones: their dot product is 1e5, beyond float16, and beyond bfloat16's counting."""
    p = nn.Parameter(torch.zeros(100_000, dtype=dtype))
    ones = torch.ones(100_000, dtype=dtype)
    report = optimizer_of([p]).backward(linear_losses([p], [[ones], [-ones]]))
    assert report.gramian.tolist() == [[1e5, -1e5], [-1e5, 1e5]]


@pytest.mark.parametrize("dtype", HALF)
def test_weights_are_not_cast_to_the_row_dtype(dtype: torch.dtype) -> None:
    """A norm ratio of 2e5 makes a weight of 2e5, which float16 does not have."""
    jacobian = torch.tensor([[-1024.0, 0.25], [2.0**-8, 2.0**-9]])
    ours, expected = merged_in(dtype, jacobian, reduction="sum")
    relative = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), expected, rtol=relative, atol=1e-4)


def test_the_mean_does_not_overflow_where_the_sum_would() -> None:
    """Cast last: (60000 + 60000) / 2 is a float16, 60000 + 60000 is not."""
    for scope in ("shared", "outside"):
        p, q = nn.Parameter(torch.zeros(1, dtype=torch.float16)), nn.Parameter(torch.zeros(1))
        opt = optimizer_of([p, q], scope="shared" if scope == "shared" else [q])
        opt.backward([p.sum() * 60000 + q.sum(), p.sum() * 60000 + q.sum()])
        assert p.grad.tolist() == [60000.0]


@pytest.mark.parametrize("scale", [1e-18, 1e-22, 1e-30, 1e15, 1e25])
@pytest.mark.parametrize("rule", ["gmd", "pcgrad"])
def test_tiny_and_huge_float32_rows_are_decoupled_like_any(scale: float, rule: str) -> None:
    """Their squares do not fit float32: the Gramian must not underflow to zero, nor overflow."""
    rows: list[Row] = [[torch.tensor([1.0, 0.0]) * scale], [torch.tensor([-3.0, 4.0]) * scale]]
    p = nn.Parameter(torch.zeros(2))
    opt = optimizer_of([p], rule=rule, reduction="sum")
    report = opt.backward(linear_losses([p], rows))
    assert report.weights.tolist() == pytest.approx([4.0, 1.12], rel=1e-6)
    assert_rows_equal([p.grad], decouple(rows, reduction="sum"), rows, within=1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_rows_of_very_different_length_keep_their_weights(order: int) -> None:
    """1e25 against 1e-15: each relative to itself, in one Gramian."""
    rows: list[Row] = [[torch.tensor([1e25, 0.0])], [torch.tensor([-3e-15, 4e-15])]][::order]
    p = nn.Parameter(torch.zeros(2))
    report = optimizer_of([p]).backward(linear_losses([p], rows))
    assert report.cosine()[0, 1] == pytest.approx(-0.6, rel=1e-6)
    assert report.weights.tolist()[::order] == pytest.approx([1.0, 1 + 3e10 / 25e-30], rel=1e-6)


@pytest.mark.parametrize("row_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_parameters_of_several_dtypes(row_dtype: torch.dtype | None, micro_batches: int) -> None:
    """Each gets a ``.grad`` of its own; rounded rows are of those that are wider."""
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    params = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in dtypes]
    rows: list[Row] = [
        [torch.tensor([1.0, 0.5], dtype=dtype) for dtype in dtypes],
        [torch.tensor([-2.0, 0.25], dtype=dtype) for dtype in dtypes],
    ]
    opt = optimizer_of(params, row_dtype=row_dtype)
    for _ in range(micro_batches - 1):
        opt.accumulate(linear_losses(params, rows))
    opt.backward(linear_losses(params, rows))
    for p, expected in zip(params, decouple(rows), strict=True):
        assert p.grad.dtype == p.dtype
        narrow = torch.float32 if row_dtype and p.dtype == torch.float64 else p.dtype
        relative = 4 * torch.finfo(narrow).eps
        torch.testing.assert_close(p.grad.double(), expected, rtol=relative, atol=relative / 8)


# --- rows in bfloat16 -----------------------------------------------------------------------------

ROUNDED = {"row_dtype": torch.bfloat16}


@pytest.mark.parametrize("rule", ["gmd", "pcgrad"])
@pytest.mark.parametrize("scope", ["shared", "all"])
@pytest.mark.parametrize("seed", range(3))
def test_bfloat16_rows_give_what_the_exact_rows_give(rule: str, scope: str, seed: int) -> None:
    exact, ours = towers(torch.float32, seed), towers(torch.float32, seed)
    options = {"rule": rule, "scope": scope}
    theirs = optimizer_of(exact.parameters(), **options).backward(exact.losses(seed))
    report = optimizer_of(ours.parameters(), **ROUNDED, **options).backward(ours.losses(seed))
    torch.testing.assert_close(report.cosine(), theirs.cosine(), rtol=0, atol=2e-3)
    for one, other in zip(grads(ours), grads(exact), strict=True):
        assert one.dtype == torch.float32
        assert float((one - other).norm()) <= 2.0**-8 * float(theirs.norms().sum())


def test_each_gradient_is_rounded_once_and_the_sum_is_not() -> None:
    torch.manual_seed(0)
    rows: list[Row] = [[torch.randn(300)] for _ in range(3)]
    params = parameters_like(rows, torch.float32)
    optimizer_of(params, rule="sum", reduction="sum", **ROUNDED).backward(
        linear_losses(params, rows)
    )
    rounded = sum(row[0].bfloat16().double() for row in rows)
    torch.testing.assert_close(params[0].grad.double(), rounded, rtol=1e-6, atol=1e-6)
    assert not torch.equal(params[0].grad, params[0].grad.bfloat16().float())


def test_what_is_outside_the_scope_is_not_rounded() -> None:
    rows: list[Row] = [[vector(1), vector(1 / 3)], [vector(1), None]]
    params = parameters_like(rows)
    optimizer_of(params, reduction="sum", **ROUNDED).backward(linear_losses(params, rows))
    assert params[1].grad.tolist() == [1 / 3]


def test_micro_batches_are_added_before_rounding() -> None:
    p = nn.Parameter(torch.zeros(2))
    opt = optimizer_of([p], **ROUNDED)
    opt.accumulate([p.sum()])
    above_half = 2.0**-8 + 2.0**-17  # of the last bit of 1; rounded on its own it is the half
    opt.backward([(p * above_half).sum()])
    assert p.grad.tolist() == [(1 + 2.0**-7) / 2] * 2


def test_windows_of_bfloat16_rows_equal_the_oracle() -> None:
    """Also what leaves the rows half-way, for ``a`` is unavailable once."""
    model = towers(torch.float32)
    opt, window = optimizer_of(model.parameters(), **ROUNDED), []
    for seed in range(4):
        losses = model.losses(seed)
        window.append(dict(zip(losses, model.rows(seed), strict=True)))
        if seed == 2:
            losses["a"] = window[-1]["a"] = None
        (opt.backward if seed == 3 else opt.accumulate)(losses)
    for ours, theirs in zip(grads(model), decouple_window(window), strict=True):
        assert float((ours - theirs).norm()) <= 2.0**-5 * float(theirs.norm()) + 1e-5


def test_scaled_losses_skip_and_clip_with_bfloat16_rows() -> None:
    p = nn.Parameter(torch.ones(2))
    opt = optimizer_of([p], **ROUNDED)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    for factor in (float("inf"), 1.0):
        opt.zero_grad()
        opt.backward([scaler.scale(factor * p.sum()), scaler.scale(p.square().sum())])
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    assert scaler.get_scale() == 2.0**19
    assert p.tolist() == pytest.approx([1 - 0.1 * 1.5] * 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, "bfloat16"])
def test_other_row_dtypes_are_refused(dtype: object) -> None:
    with pytest.raises(ValueError, match=r"row_dtype must be None or torch\.bfloat16"):
        optimizer_of([nn.Parameter(torch.zeros(1))], row_dtype=dtype)
