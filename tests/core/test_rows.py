"""Gramian and merge of flat rows, by plain torch and by Triton kernels, against float64.

Without a GPU the kernels run in Triton's interpreter (see conftest.py); with one, natively.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from gradsplit import ModalityDecoupledOptimizer, rows
from tests.reference import TwoTowers, decouple, linear_losses, towers

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HALVES = [torch.bfloat16, torch.float16]

needs_triton = pytest.mark.skipif(not rows.has_triton(), reason="Triton is not installed")
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")
# numpy, on which the interpreter runs, warns where a GPU would not
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
both_paths = pytest.mark.parametrize(
    "fused", [pytest.param(False, id="plain"), pytest.param(True, id="fused", marks=needs_triton)]
)


def random_rows(m: int, n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Rows of very different norms, many of which conflict."""
    generator = torch.Generator().manual_seed(m + n)
    common = torch.randn(n, generator=generator)
    scales = [(-1) ** i * 4.0 ** (i % 5) for i in range(m)]
    return [(s * common + torch.randn(n, generator=generator)).to(DEVICE, dtype) for s in scales]


def on_device(*values: Any, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.as_tensor(value, dtype=dtype, device=DEVICE) for value in values]


def exact(jacobian: Sequence[Tensor]) -> Tensor:
    """The rows in float64 on the CPU, (m, n)."""
    return torch.stack([row.double().cpu() for row in jacobian])


def error(measured: Tensor, jacobian: Sequence[Tensor]) -> float:
    """The largest error of a Gramian in units of ||g_j|| ||g_k||."""
    expected = exact(jacobian) @ exact(jacobian).T
    assert measured.shape == expected.shape and measured.dtype == torch.float64
    norms = expected.diagonal().sqrt()
    norms = torch.where(norms == 0, 1.0, norms)
    return float(((measured.cpu() - expected) / norms / norms[:, None]).abs().max())


def weights_of(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(DEVICE)


def assert_right(
    jacobian: list[Tensor], fused: bool | None, dtype: torch.dtype | None = None
) -> None:
    """Gramian and merged row, to the rounding of the dtype; the rows stay as they are."""
    m, dtype = len(jacobian), dtype or jacobian[0].dtype
    before = [row.clone() for row in jacobian]
    assert error(rows.gramian(jacobian, fused), jacobian) < 1e-6
    weights = torch.linspace(0.5, 3.0, m, dtype=torch.float64)
    result = rows.merged(jacobian, weights.to(DEVICE), dtype, fused)
    assert result.dtype == dtype and result.device == jacobian[0].device
    # The interpreter cuts float32 to bfloat16 where a GPU rounds.
    cut = fused and not CUDA and dtype == torch.bfloat16
    relative = torch.finfo(dtype).eps * (1.0 if cut else 0.51)
    size = float(exact(jacobian).abs().max()) if jacobian[0].numel() else 0.0
    torch.testing.assert_close(
        result.double().cpu(), weights @ exact(jacobian), rtol=relative, atol=1e-6 * m * size
    )
    assert all(map(torch.equal, jacobian, before))


# --- sizes, dtypes --------------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("n", [0, 1, 3, 127, 128, 129, 1023, 1025, 4095, 4096, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_sizes(n: int, dtype: torch.dtype, fused: bool) -> None:
    assert_right(random_rows(3, n, dtype), fused)


@both_paths
def test_many_columns(fused: bool) -> None:
    """More than are multiplied, or merged, at once."""
    assert_right(random_rows(9, 140_001), fused)


@both_paths
@pytest.mark.parametrize("m", [1, 2, 12, 13, 15, 16, 17, 33, 64])
def test_numbers_of_rows(m: int, fused: bool) -> None:
    assert_right(random_rows(m, 615), fused)


def test_more_rows_than_the_kernels_take() -> None:
    for fused in (False, None):
        assert_right(random_rows(70, 615), fused)


@both_paths
@pytest.mark.parametrize("dtype", HALVES)
def test_a_merged_row_may_be_wider_than_the_rows(dtype: torch.dtype, fused: bool) -> None:
    """As with ``row_dtype``: rounded once, to its own dtype."""
    assert_right(random_rows(5, 5000, dtype), fused, torch.float32)


def test_float64_stays_float64() -> None:
    jacobian = random_rows(4, 3000, torch.float64)
    assert error(rows.gramian(jacobian), jacobian) < 1e-14
    weights = weights_of([1 / 3, -7.0, 1e-9, 0.1])
    expected = weights.cpu() @ exact(jacobian)
    result = rows.merged(jacobian, weights, torch.float64).cpu()
    torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-14)


@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_that_begin_anywhere_in_memory(dtype: torch.dtype, fused: bool) -> None:
    """A kernel that counts on aligned addresses would fail, or read what is beside them."""
    jacobian = [
        torch.cat([row.new_full((1 + i,), 1e4), row, row.new_full((7,), 1e4)])[1 + i : -7]
        for i, row in enumerate(random_rows(3, 4999, dtype))
    ]
    assert_right(jacobian, fused)


# --- precision ------------------------------------------------------------------------------------


def test_products_of_float32_are_good_to_a_ten_millionth_of_the_norms() -> None:
    jacobian = random_rows(15, 300_000)
    assert error(rows.gramian(jacobian, False), jacobian) < 1e-7


@both_paths
@pytest.mark.parametrize("cosine", [3e-6, -3e-6, 1e-5, -1e-5, 0.0])
def test_signs_of_small_cosines_survive(cosine: float, fused: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    left, noise = torch.randn(2, 20_000, generator=generator, dtype=torch.float64)
    left, noise = left / left.norm(), noise - noise @ left / (left @ left) * left
    jacobian = on_device(left, noise / noise.norm() + cosine * left)
    measured = rows.gramian(jacobian, fused)
    assert error(measured, jacobian) < 1e-6
    if cosine:
        sign = (exact(jacobian)[0] @ exact(jacobian)[1]).sign()
        assert measured[0, 1].sign() == sign == torch.tensor(cosine).sign()


@both_paths
@pytest.mark.parametrize("values", [(0.1, -0.3), (0.7, -1 / 3)])
def test_rounding_that_always_goes_one_way(values: tuple[float, float], fused: bool) -> None:
    """Equal elements: every addition rounds alike, and errors add up instead of cancelling."""
    jacobian = on_device(*(torch.full((50_000,), value) for value in values))
    assert error(rows.gramian(jacobian, fused), jacobian) < 2e-6


@both_paths
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-22, 1e-18, 1e18, 1e25, 1e37])
@pytest.mark.parametrize("other", [1.0, None])
def test_squares_that_do_not_fit_float32(scale: float, other: float | None, fused: bool) -> None:
    """One row of such a size beside an ordinary one, or both."""
    left, right = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    jacobian = on_device(left * scale, (right - left) * (other or scale))
    assert error(rows.gramian(jacobian, fused), jacobian) < 1e-6


@both_paths
def test_a_row_whose_size_changes_on_the_way(fused: bool) -> None:
    """Squares that fit, those that do not, and zeros, in one row."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1e-25, 1.0, 0.0, 1e12, 1e-10]).repeat_interleave(4096)
    jacobian = [(sizes * torch.randn(sizes.shape, generator=generator)).to(DEVICE) for _ in "abc"]
    jacobian[1][8192:] *= 1e-30
    assert error(rows.gramian(jacobian, fused), jacobian) < 1e-6


@both_paths
def test_a_row_of_zeros(fused: bool) -> None:
    jacobian = on_device(torch.zeros(300), torch.ones(300))
    assert rows.gramian(jacobian, fused).tolist() == [[0.0, 0.0], [0.0, 300.0]]


@both_paths
def test_the_gramian_is_symmetric(fused: bool) -> None:
    measured = rows.gramian(random_rows(20, 5000), fused)
    torch.testing.assert_close(measured, measured.T, rtol=1e-6 if fused else 0, atol=0)


@both_paths
@pytest.mark.parametrize("weights", [[1e60, 1e-60], [1e-60, -1e-60], [1e39, 1.0], [1.0, 1e-45]])
def test_weights_that_float32_does_not_have(weights: list[float], fused: bool) -> None:
    jacobian = on_device([1e-30, 1e-37], [1e30, -1e20])
    expected = (torch.tensor(weights, dtype=torch.float64) @ exact(jacobian)).float()
    result = rows.merged(jacobian, weights_of(weights), torch.float32, fused)
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("lowered", ["medium", "high"])
def test_torchs_matmul_precision_does_not_matter(lowered: str) -> None:
    """On recent CPUs "medium" multiplies float32 matrices in bfloat16."""
    jacobian = random_rows(16, 40_000)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(lowered)
    try:
        measured = rows.gramian(jacobian, False)
    finally:
        torch.set_float32_matmul_precision(before)
    assert error(measured, jacobian) < 1e-7


@both_paths
def test_autocast_does_not_matter(fused: bool) -> None:
    jacobian = random_rows(4, 5000)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert_right(jacobian, fused)


# --- what is not finite ---------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_what_is_not_finite_stays_so_and_in_its_place(
    bad: float, dtype: torch.dtype, weight: float, fused: bool
) -> None:
    """A weight of zero hides nothing, and only the row itself is touched."""
    jacobian = random_rows(3, 5000, dtype)
    jacobian[1][130] = bad
    measured = rows.gramian(jacobian, fused)
    assert not measured[1].isfinite().any() and not measured[:, 1].isfinite().any()
    assert error(measured[::2, ::2], jacobian[::2]) < 1e-6
    result = rows.merged(jacobian, weights_of([1.0, weight, 1.0]), dtype, fused)
    assert result.isfinite().logical_not().nonzero().tolist() == [[130]]


@both_paths
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_show(bad: float, fused: bool) -> None:
    jacobian = on_device(torch.ones(50), torch.ones(50))
    result = rows.merged(jacobian, weights_of([1.0, bad]), torch.float32, fused)
    assert not result.isfinite().any()


# --- fused=None, True, False ----------------------------------------------------------------------


def wrapped(model: nn.Module, **options: Any) -> ModalityDecoupledOptimizer:
    return ModalityDecoupledOptimizer(SGD(model.parameters(), lr=0.1, momentum=0.9), **options)


def trained(model: TwoTowers, opt: ModalityDecoupledOptimizer, steps: int = 3) -> list[Tensor]:
    for seed in range(steps):
        opt.zero_grad()
        losses = model.losses(seed + 10)
        opt.accumulate({name: losses[name] for name in ("a", "b")})
        opt.backward(model.losses(seed))
        opt.step()
    return [p.detach() for p in model.parameters()]


@needs_triton
@pytest.mark.parametrize(
    ("rule", "scope", "dtype", "row_dtype"),
    [
        ("gmd", "shared", torch.float32, None),
        ("pcgrad", "all", torch.float32, None),
        ("gmd", "all", torch.float16, None),
        ("pcgrad", "shared", torch.bfloat16, None),
        ("gmd", "shared", torch.float32, torch.bfloat16),
    ],
)
def test_fused_trains_as_plain(
    rule: str, scope: str, dtype: torch.dtype, row_dtype: torch.dtype | None
) -> None:
    """Two private encoders, a shared trunk, accumulation: all that goes into a merge."""
    results = []
    for fused in (True, False):
        model = towers(dtype)
        opt = wrapped(model, rule=rule, scope=scope, fused=fused, row_dtype=row_dtype)
        results.append(trained(model, opt))
    unit = torch.finfo(dtype).eps
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=20 * unit, atol=20 * unit)


@both_paths
def test_absent_rows_and_several_dtypes(fused: bool) -> None:
    shapes = [(4, 5), (), (0, 3), (129,), (2, 3, 4, 5), (1,), (4100,)]
    dtypes = [torch.float32, *HALVES] * 3
    params = [
        nn.Parameter(torch.zeros(shape, dtype=dtype, device=DEVICE))
        for shape, dtype in zip(shapes, dtypes, strict=False)
    ]
    generator = torch.Generator().manual_seed(0)
    given = [
        [
            torch.randn(p.shape, generator=generator).to(p) if (i + k) % 3 else None
            for k, p in enumerate(params)
        ]
        for i in range(5)
    ]
    opt = ModalityDecoupledOptimizer(SGD(params, lr=0.1), scope="all", fused=fused, reduction="sum")
    report = opt.backward(linear_losses(params, given))
    zeros = [torch.zeros_like(p) for p in params]
    dense = [
        torch.cat(
            [(z if g is None else g).flatten().double() for z, g in zip(zeros, r, strict=True)]
        )
        for r in given
    ]
    assert error(report.gramian, dense) < 1e-6
    for p, g in zip(params, decouple(given, scope="all", reduction="sum"), strict=True):
        assert p.grad is not None and g is not None and p.grad.dtype == p.dtype
        unit = torch.finfo(p.dtype).eps
        torch.testing.assert_close(p.grad.double(), g, rtol=unit, atol=max(unit, 1e-6))


@both_paths
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_zero_times_infinity_of_an_absent_row(bad: float, fused: bool) -> None:
    """A loss that does not reach a parameter has nothing to do with what others have there."""
    p, q = (nn.Parameter(torch.zeros(50, device=DEVICE)) for _ in range(2))
    ones = torch.ones(50)
    given = [[None, ones], [ones.clone().index_fill_(0, torch.tensor(3), bad), None], [ones, ones]]
    opt = ModalityDecoupledOptimizer(SGD([p, q], lr=0.1), scope="all", fused=fused)
    measured = opt.backward(linear_losses([p, q], given)).gramian
    assert measured[0].tolist() == [50.0, 0.0, 50.0] and float(measured[2, 2]) == 100.0
    assert not measured[1, 1].isfinite() and not measured[1, 2].isfinite()


@pytest.mark.parametrize("fused", [None, False, pytest.param(True, marks=needs_triton)])
def test_fused_is_none_true_or_false_and_copied(fused: bool | None) -> None:
    opt = wrapped(towers(torch.float32), fused=fused)
    assert (f"fused={fused}" in repr(opt)) == (fused is not None)
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert repr(twin) == repr(opt)
    with pytest.raises(TypeError, match="fused must be None, True or False, got 'yes'"):
        wrapped(towers(), fused="yes")


@needs_triton
def test_fused_says_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradsplit import kernels

    used: list[str] = []
    for name in ("gramian", "merged"):
        original = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *given, n=name, f=original: used.append(n) or f(*given)
        )
    for fused, expected in ((False, []), (None, ["gramian", "merged"] * CUDA), (True, None)):
        used.clear()
        assert_right(random_rows(3, 50), fused)
        assert used == (["gramian", "merged"] if expected is None else expected)


def losses_that_cannot_be_fused(kind: str) -> tuple[nn.Module, list[Tensor]]:
    model = towers(torch.float64 if kind == "float64" else torch.float32)
    many = 65 if kind == "65 rows" else 2
    return model, [model.losses(seed)["a"] for seed in range(many)]


@needs_triton
@pytest.mark.parametrize(
    ("kind", "mention"),
    [
        ("float64", "a gradient is torch.float64; the kernels take float32, bfloat16, float16"),
        ("65 rows", "the kernels take at most 64 rows, got 65"),
        ("CPU", "a gradient is on cpu; the kernels need a CUDA device"),
    ],
)
def test_fused_is_obeyed_or_an_error(
    kind: str, mention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "CPU":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model, losses = losses_that_cannot_be_fused(kind)
    opt = wrapped(model, fused=True)
    with pytest.raises(ValueError, match=f"fused=True, but {mention}"):
        opt.backward(losses)
    assert all(p.grad is None for p in model.parameters()) and opt.last is None
    model, losses = losses_that_cannot_be_fused(kind)
    wrapped(model, fused=None).backward(losses)


def run_alone(program: str, **environment: str) -> None:
    """In a process of its own."""
    command = [sys.executable, "-c", program]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, **environment})


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, gradsplit
weight = torch.nn.Parameter(torch.ones(2))
base = torch.optim.SGD([weight], lr=0.1)
gradsplit.ModalityDecoupledOptimizer(base).step([weight.sum(), -weight[0]])
try:
    gradsplit.ModalityDecoupledOptimizer(base, fused=True)
except RuntimeError as error:
    assert "fused=True needs Triton" in str(error) and "pip install triton" in str(error)
else:
    raise AssertionError("fused=True is obeyed or an error")
"""


def test_a_cpu_model_trains_without_triton() -> None:
    """The kernels are imported only when used."""
    run_alone(WITHOUT_TRITON)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton.language as tl
from gradsplit import kernels

for kernel, arguments, lines in (
    (kernels._gramian_kernel, {"partial": "*fp64"}, 16),
    (kernels._gramian_kernel, {"partial": "*fp64"}, 64),
    (kernels._merge_kernel, {"weights": "*fp64", "result": "*fp32"}, 16),
):
    constants = {"TYPE": tl.%s, "ALIGNED": True, "M": lines, "COLUMNS": 4096, "TILE": 4096 // lines}
    types = {"addresses": "*i64", "m": "i32", "n": "i32"} | arguments
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_compile_for_a_gpu_that_is_not_there(dtype: str, tmp_path: Path) -> None:
    """What the interpreter accepts, the compiler may not."""
    run_alone(COMPILE % dtype, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


# --- on a GPU -------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("rule", ["gmd", "pcgrad", "sum"])
@pytest.mark.parametrize("scope", ["shared", "all"])
@pytest.mark.parametrize("how", ["step", "accumulate", "joint"])
def test_nothing_waits_for_the_host(how: str, rule: str, scope: str, fused: bool | None) -> None:
    """A whole step of a model with private encoders, after one to warm up."""
    model = towers(torch.float32).to("cuda")
    opt = wrapped(model, rule=rule, scope=scope, fused=fused)
    inputs = torch.randn(4, 3, device="cuda"), torch.randn(4, 5, device="cuda")

    def losses() -> dict[str, Tensor]:
        left, right = model.a(inputs[0]), model.b(inputs[1])
        features = {"a": left, "b": right, "a+b": left + right}
        return {name: (model.trunk(f) - 1).square().mean() for name, f in features.items()}

    def go() -> None:
        if how == "joint":
            opt.joint(losses()).backward()
            opt.step()
        else:
            if how == "accumulate":
                opt.accumulate({**losses(), "b": None})
                opt.backward(losses())
            opt.step(None if how == "accumulate" else losses())

    go()
    torch.cuda.set_sync_debug_mode("error")
    try:
        go()
    finally:
        torch.cuda.set_sync_debug_mode("default")
