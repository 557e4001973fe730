"""Gramian and merge, by plain torch and by Triton kernels, against float64.

Without a GPU the kernels run in Triton's interpreter (see conftest.py); with one, natively.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gradsplit.gramian import check_fused, gramian, merge
from torch import Tensor, nn
from torch.optim import SGD

from gradsplit import ModalityDecoupledOptimizer, kernels
from gradsplit.rules import gmd
from tests.reference import TwoTowers, same, towers

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

needs_triton = pytest.mark.skipif(not kernels.has_triton(), reason="Triton is not installed")
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a GPU")
# numpy, on which the interpreter runs, warns where a GPU would not
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
both_paths = pytest.mark.parametrize(
    "fused", [pytest.param(False, id="plain"), pytest.param(True, id="fused", marks=needs_triton)]
)

Rows = list[dict[Tensor, Tensor]]
"""Loss by loss, the gradients by parameter. Absent: the loss does not reach the parameter."""


def random_rows(
    m: int,
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    absent: Callable[[int, int], bool] = lambda row, parameter: False,
) -> tuple[Rows, list[Tensor]]:
    """Rows of very different norms; dtypes take turns; ``absent`` says what is not reached."""
    generator = torch.Generator().manual_seed(m + len(shapes))
    like = [
        torch.zeros(shape, dtype=dtypes[i % len(dtypes)], device=DEVICE)
        for i, shape in enumerate(shapes)
    ]
    common = [torch.randn(shape, generator=generator) for shape in shapes]  # rows conflict
    rows: Rows = []
    for i in range(m):
        scale = (-1) ** i * 4.0 ** (i % 5)
        values = [scale * c + torch.randn(c.shape, generator=generator) for c in common]
        pairs = zip(like, values, strict=True)
        rows.append({p: v.to(p) for k, (p, v) in enumerate(pairs) if not absent(i, k)})
    return rows, like


def columns(rows: Rows, parameter: Tensor) -> list[Tensor]:
    """What each row holds, in float64 on the CPU; zeros where it is absent."""
    zero = torch.zeros(parameter.shape, dtype=torch.float64)
    return [row[parameter].double().cpu() if parameter in row else zero for row in rows]


def exact_gramian(rows: Rows, parameters: Sequence[Tensor]) -> Tensor:
    """From the definition, pair by pair, over what both rows reach."""
    m = len(rows)
    total = torch.zeros(m, m, dtype=torch.float64)
    for j in range(m):
        for k in range(m):
            for p in parameters:
                if p in rows[j] and p in rows[k]:
                    left, right = rows[j][p].double(), rows[k][p].double()
                    total[j, k] += (left * right).sum().cpu()
    return total


def error(measured: Tensor, exact: Tensor) -> float:
    """The largest error in units of ||g_j|| ||g_k||."""
    norms = exact.diagonal().sqrt()
    norms = torch.where(norms == 0, 1.0, norms)
    return float(((measured.cpu() - exact) / norms / norms[:, None]).abs().max())


def assert_right(rows: Rows, parameters: Sequence[Tensor], fused: bool) -> None:
    """Gramian and merged gradient, to the rounding of the dtypes; the rows are consumed."""
    weights = torch.linspace(0.5, 3.0, len(rows), dtype=torch.float64)
    assert error(gramian(rows, parameters, fused), exact_gramian(rows, parameters)) < 1e-6
    expected = {
        p: sum(w * column for w, column in zip(weights, columns(rows, p), strict=True))
        for p in parameters
        if any(p in row for row in rows)
    }
    size = {
        p: max(column.abs().max() for column in columns(rows, p)) for p in parameters if p.numel()
    }
    layout = {p: next(row[p] for row in rows if p in row).stride() for p in expected}
    merged = merge(rows, parameters, weights.to(DEVICE), fused)
    assert merged.keys() == expected.keys()
    for p, gradient in merged.items():
        assert (
            gradient.dtype == p.dtype and gradient.shape == p.shape and gradient.device == p.device
        )
        assert p.numel() == 0 or gradient.stride() == layout[p]
        # The interpreter cuts float32 to bfloat16 where a GPU rounds.
        cut = fused and not CUDA and p.dtype == torch.bfloat16
        relative = torch.finfo(p.dtype).eps * (1.0 if cut else 0.51)
        absolute = 1e-6 * len(rows) * float(size[p]) if p.numel() else 0.0
        torch.testing.assert_close(
            gradient.double().cpu(), expected[p], rtol=relative, atol=absolute
        )
    assert not any(p in row for row in rows for p in merged)


# --- shapes, dtypes, layouts ----------------------------------------------------------------------

SIZES = [1, 2, 3, 127, 128, 129, 4095, 4096, 4097]


@both_paths
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes(size: int, dtype: torch.dtype, fused: bool) -> None:
    assert_right(*random_rows(3, [(size,)], [dtype]), fused)


@both_paths
@pytest.mark.parametrize("m", [1, 2, 12, 13, 15, 16, 17, 33, 64])
def test_numbers_of_rows(m: int, fused: bool) -> None:
    assert_right(*random_rows(m, [(5, 3), (600,)]), fused)


def test_more_rows_than_the_kernels_take() -> None:
    assert_right(*random_rows(70, [(5, 3), (600,)]), False)


@both_paths
def test_several_blocks_and_chunks(fused: bool) -> None:
    """Parameters that begin and end anywhere in the blocks."""
    assert_right(*random_rows(3, [(70_001,), (3,), (65_536,), (9_000,)]), fused)


@both_paths
def test_mixed_shapes_dtypes_and_absent_rows(fused: bool) -> None:
    shapes = [(4, 5), (), (0, 3), (129,), (2, 3, 4, 5), (1,), (4100,)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    rows, parameters = random_rows(5, shapes, dtypes, lambda i, p: (i + p) % 3 == 0 and p != 3)
    assert_right(rows, parameters, fused)


@both_paths
def test_a_parameter_of_one_row_and_one_of_none(fused: bool) -> None:
    rows, parameters = random_rows(3, [(7,), (8,), (9,)], absent=lambda i, p: p == 2 or i * p > 0)
    assert_right(rows, parameters, fused)


def test_float64_stays_float64() -> None:
    rows, (p,) = random_rows(4, [(3000,)], [torch.float64])
    expected = exact_gramian(rows, [p])
    assert error(gramian(rows, [p]), expected) < 1e-14


@both_paths
def test_no_parameters(fused: bool) -> None:
    rows, _ = random_rows(2, [(3,)])
    assert gramian(rows, [], fused).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert merge(rows, [], torch.ones(2, dtype=torch.float64), fused) == {}


@both_paths
def test_parameters_without_elements(fused: bool) -> None:
    rows, parameters = random_rows(2, [(0,), (3, 0)])
    assert gramian(rows, parameters, fused).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    merged = merge(rows, parameters, torch.ones(2, dtype=torch.float64).to(DEVICE), fused)
    assert [merged[p].shape for p in parameters] == [(0,), (3, 0)]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda g: g,
    "channels last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda g: torch.stack([g, -g], -1)[..., 0],
    "unaligned": lambda g: torch.cat([g.new_zeros(1), g.reshape(-1)])[1:].view(g.shape),
    "expanded": lambda g: g[:, :1].expand(g.shape),
}


@both_paths
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_layouts(first: str, second: str, fused: bool) -> None:
    """The elements of all rows are listed in the same order, whatever their strides."""
    rows, (p,) = random_rows(3, [(6, 5, 4, 3)])
    rows[0][p], rows[1][p] = LAYOUTS[first](rows[0][p]), LAYOUTS[second](rows[1][p])
    if first in ("every other", "expanded"):  # the merged gradient is dense
        assert error(gramian(rows, [p], fused), exact_gramian(rows, [p])) < 1e-6
        expected = torch.stack(columns(rows, p)).sum(0)
        merged = merge(rows, [p], torch.ones(3, dtype=torch.float64).to(DEVICE), fused)[p]
        torch.testing.assert_close(merged.double().cpu(), expected, rtol=1e-6, atol=1e-4)
    else:
        assert_right(rows, [p], fused)


# --- precision ------------------------------------------------------------------------------------


def two_rows(left: Tensor, right: Tensor) -> tuple[Rows, Tensor]:
    p = torch.zeros(left.shape, device=DEVICE)
    return [{p: left.to(p)}, {p: right.to(p)}], p


def test_products_of_float32_are_good_to_a_ten_millionth_of_the_norms() -> None:
    rows, parameters = random_rows(15, [(300_000,)])
    assert error(gramian(rows, parameters, False), exact_gramian(rows, parameters)) < 1e-7


@both_paths
@pytest.mark.parametrize("cosine", [3e-6, -3e-6, 1e-5, -1e-5, 0.0])
def test_signs_of_small_cosines_survive(cosine: float, fused: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    left, noise = torch.randn(2, 20_000, generator=generator, dtype=torch.float64)
    left, noise = left / left.norm(), noise - noise @ left / (left @ left) * left
    rows, p = two_rows(left, noise / noise.norm() + cosine * left)
    measured, exact = gramian(rows, [p], fused).cpu(), exact_gramian(rows, [p])
    assert error(measured, exact) < 1e-6
    if cosine:
        assert measured[0, 1].sign() == exact[0, 1].sign() == torch.tensor(cosine).sign()


@both_paths
@pytest.mark.parametrize("values", [(0.1, -0.3), (0.7, -1 / 3)])
def test_rounding_that_always_goes_one_way(values: tuple[float, float], fused: bool) -> None:
    """Equal elements: every addition rounds alike, and errors add up instead of cancelling."""
    rows, p = two_rows(*(torch.full((50_000,), value) for value in values))
    assert error(gramian(rows, [p], fused), exact_gramian(rows, [p])) < 2e-6


@both_paths
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-22, 1e-18, 1e18, 1e25, 1e37])
@pytest.mark.parametrize("other", [1.0, None])
def test_squares_that_do_not_fit_float32(scale: float, other: float | None, fused: bool) -> None:
    """One row of such a size beside an ordinary one, or both."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 5000, generator=generator)
    rows, p = two_rows(left * scale, (right - left) * (other or scale))
    assert error(gramian(rows, [p], fused), exact_gramian(rows, [p])) < 1e-6


@both_paths
def test_tiny_rows_with_absent_ones(fused: bool) -> None:
    rows, parameters = random_rows(3, [(40,), (5000,)], absent=lambda i, p: i == 1 and p == 0)
    for row in rows:
        for p in row:
            row[p] = row[p] * 1e-25
    assert error(gramian(rows, parameters, fused), exact_gramian(rows, parameters)) < 1e-6


@both_paths
def test_a_row_of_zeros(fused: bool) -> None:
    rows, p = two_rows(torch.zeros(300), torch.ones(300))
    assert gramian(rows, [p], fused).tolist() == [[0.0, 0.0], [0.0, 300.0]]


@both_paths
def test_the_gramian_is_symmetric(fused: bool) -> None:
    rows, parameters = random_rows(20, [(5000,)])
    measured = gramian(rows, parameters, fused)
    torch.testing.assert_close(measured, measured.T, rtol=1e-6, atol=0)


@both_paths
@pytest.mark.parametrize("weights", [[1e60, 1e-60], [1e-60, -1e-60], [1e39, 1.0], [1.0, 1e-45]])
def test_weights_that_float32_does_not_have(weights: list[float], fused: bool) -> None:
    rows, p = two_rows(torch.tensor([1e-30, 1e-37]), torch.tensor([1e30, -1e20]))
    exact = torch.stack(columns(rows, p))
    factors = torch.tensor(weights, dtype=torch.float64)
    merged = merge(rows, [p], factors.to(DEVICE), fused)[p]
    torch.testing.assert_close(merged.cpu(), (factors @ exact).float(), rtol=1e-6, atol=0)


@both_paths
def test_a_sum_that_is_too_large_only_on_the_way(fused: bool) -> None:
    p = torch.zeros(3, device=DEVICE)
    rows = [{p: torch.full_like(p, value)} for value in (3e38, 3e38, -3e38)]
    merged = merge(rows, [p], torch.ones(3, dtype=torch.float64).to(DEVICE), fused)[p]
    torch.testing.assert_close(merged, torch.full_like(p, 3e38))


@pytest.mark.parametrize("lowered", ["medium", "high"])
def test_torchs_matmul_precision_does_not_matter(lowered: str) -> None:
    """On recent CPUs "medium" multiplies float32 matrices in bfloat16."""
    rows, parameters = random_rows(16, [(40_000,)])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(lowered)
    try:
        measured = gramian(rows, parameters, False)
    finally:
        torch.set_float32_matmul_precision(before)
    assert error(measured, exact_gramian(rows, parameters)) < 1e-7


# --- what is not finite ---------------------------------------------------------------------------


@both_paths
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_not_finite_stays_so_and_in_its_place(
    bad: float, dtype: torch.dtype, fused: bool
) -> None:
    rows, (p, other) = random_rows(3, [(200,), (30,)], [dtype])
    rows[1][p][130] = bad
    measured = gramian(rows, [p, other], fused)
    assert not measured[1].isfinite().any() and not measured[:, 1].isfinite().any()
    assert measured[0, 0].isfinite() and measured[0, 2].isfinite() and measured[2, 2].isfinite()
    ones = torch.ones(3, dtype=torch.float64, device=DEVICE)
    merged = merge(rows, [p, other], ones, fused)
    assert merged[p].isfinite().logical_not().nonzero().tolist() == [[130]]
    assert merged[other].isfinite().all()


@both_paths
def test_zero_times_infinity_of_an_absent_row(fused: bool) -> None:
    rows, (p,) = random_rows(3, [(50,)], absent=lambda i, p: i == 0)
    rows[1][p][3] = float("inf")
    measured = gramian(rows, [p], fused)
    assert measured[0].tolist() == [0.0, 0.0, 0.0] and measured[2, 2].isfinite()
    weights = torch.tensor([float("nan"), 1.0, 1.0], dtype=torch.float64, device=DEVICE)
    assert merge(rows, [p], weights, fused)[p].isfinite().sum() == 49


@both_paths
def test_weights_that_are_not_finite_show(fused: bool) -> None:
    rows, (p,) = random_rows(2, [(50,)])
    weights = torch.tensor([1.0, float("nan")], dtype=torch.float64, device=DEVICE)
    assert merge(rows, [p], weights, fused)[p].isnan().all()


# --- fused=None, True, False ----------------------------------------------------------------------


def wrapped(model: nn.Module, **options: Any) -> ModalityDecoupledOptimizer:
    return ModalityDecoupledOptimizer(SGD(model.parameters(), lr=0.1, momentum=0.9), **options)


def trained(model: TwoTowers, opt: ModalityDecoupledOptimizer, steps: int = 3) -> list[Tensor]:
    for seed in range(steps):
        opt.zero_grad()
        losses = {name: loss for name, loss in model.losses(seed).items()}
        opt.accumulate({name: losses[name] * 0.5 for name in ("a", "b")})
        opt.backward(model.losses(seed))
        opt.step()
    return [p.detach() for p in model.parameters()]


@needs_triton
@pytest.mark.parametrize("rule", ["gmd", "pcgrad"])
@pytest.mark.parametrize("scope", ["shared", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fused_trains_as_plain(rule: str, scope: str, dtype: torch.dtype) -> None:
    """Two private encoders, a shared trunk, accumulation: all that goes into a merge."""
    results = []
    for fused in (True, False):
        model = towers(dtype)
        results.append(trained(model, wrapped(model, rule=rule, scope=scope, fused=fused)))
    unit = torch.finfo(dtype).eps
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=20 * unit, atol=20 * unit)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("fused", [None, False, pytest.param(True, marks=needs_triton)])
def test_copies_keep_fused(how: str, fused: bool | None) -> None:
    opt = wrapped(towers(torch.float32), fused=fused)
    twin = copy.deepcopy(opt) if how == "deepcopy" else pickle.loads(pickle.dumps(opt))
    assert f"fused={fused!r}" in repr(opt) and f"fused={fused!r}" in repr(twin)


def test_fused_is_none_true_or_false() -> None:
    with pytest.raises(TypeError, match="fused must be None, True or False, got 'yes'"):
        wrapped(towers(), fused="yes")


def test_fused_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="fused=True needs Triton.*pip install triton"):
        wrapped(towers(), fused=True)
    model = towers(torch.float32)
    trained(model, wrapped(model))  # None chooses what there is


def losses_that_cannot_be_fused(kind: str) -> tuple[nn.Module, list[Tensor]]:
    if kind == "float64":
        model: nn.Module = towers(torch.float64)
        return model, list(model.losses().values())
    model = towers(torch.float32)
    many = 65 if kind == "65 rows" else 2
    return model, [next(iter(model.losses(seed).values())) for seed in range(many)]


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


@needs_triton
def test_rows_of_several_dtypes_in_one_parameter_are_not_fused() -> None:
    rows, p = two_rows(torch.ones(3), torch.ones(3))
    rows[1][p] = rows[1][p].half()
    with pytest.raises(ValueError, match="several dtypes or devices"):
        check_fused(rows)
    assert gramian(rows, [p]).tolist() == [[3.0, 3.0], [3.0, 3.0]]


@needs_triton
def test_rows_on_several_devices_in_one_parameter_are_not_fused() -> None:
    rows, p = two_rows(torch.ones(3), torch.ones(3))
    rows[1][p] = rows[1][p].to("meta")
    with pytest.raises(ValueError, match="several dtypes or devices"):
        check_fused(rows)


def test_one_row_in_float64_makes_the_products_float64() -> None:
    """Whichever it is."""
    for wide in (0, 1):
        rows, p = two_rows(torch.full((3000,), 0.7), torch.full((3000,), -1 / 3))
        rows[wide][p] = rows[wide][p].double()
        assert error(gramian(rows, [p], False), exact_gramian(rows, [p])) < 1e-14


def test_kernels_are_imported_only_when_used() -> None:
    """A CPU model trains without them."""
    program = (
        "import sys, torch, gradsplit\n"
        "weight = torch.nn.Parameter(torch.ones(2))\n"
        "opt = gradsplit.ModalityDecoupledOptimizer(torch.optim.SGD([weight], lr=0.1))\n"
        "opt.step([weight.sum(), -weight[0]])\n"
        "assert not [name for name in sys.modules if name.startswith('gradsplit.kernels.')]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton.language as tl
from gradsplit.kernels import programs

table = {"addresses": "*i64", "sizes": "*i64", "chunks": "*i64"}
shape = {"TYPE": tl.%s, "M": 16, "CHUNK": 4096, "TILE": 256}
for kernel, arguments, constants in (
    (programs.gramian_kernel, {"partial": "*fp64"}, {"ALIGNED": True}),
    (programs.rescue_kernel, {"rescued": "*fp64", "resolved": "*i1", "total": "i32"}, {}),
    (programs.merge_kernel, {"weights": "*fp64"}, {"ALIGNED": True, "RESULT": tl.float32}),
):
    constants = constants | shape
    types = table | arguments | {"m": "i32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_compile_for_a_gpu_that_is_not_there(dtype: str, tmp_path: Path) -> None:
    """What the interpreter accepts, the compiler may not."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE % dtype]
    subprocess.run(command, check=True, timeout=120, env=environment)


# --- on a GPU -------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("rule", ["gmd", "pcgrad"])
@pytest.mark.parametrize("scope", ["shared", "all"])
def test_nothing_waits_for_the_host(rule: str, scope: str, fused: bool | None) -> None:
    """A whole step of a model with private encoders, after one to warm up."""
    model = towers(torch.float32).to("cuda")
    opt = wrapped(model, rule=rule, scope=scope, fused=fused)
    inputs = torch.randn(4, 3, device="cuda"), torch.randn(4, 5, device="cuda")

    def losses() -> dict[str, Tensor]:
        left, right = model.a(inputs[0]), model.b(inputs[1])
        features = {"a": left, "b": right, "a+b": left + right}
        return {name: (model.trunk(f) - 1).square().mean() for name, f in features.items()}

    opt.step(losses())
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step(losses())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@needs_triton
def test_gmd_can_be_captured_in_a_graph() -> None:
    """Rows that stay where they are; a replay sees what they hold by then."""
    rows, parameters = random_rows(5, [(70_000,), (33,)])
    ones = torch.ones(5, dtype=torch.float64, device=DEVICE)

    def step() -> dict[Tensor, Tensor]:
        weights = gmd(gramian(rows, parameters, True)) * ones
        return merge([dict(row) for row in rows], parameters, weights, True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for row in rows:
        for gradient in row.values():
            gradient.copy_(torch.randn_like(gradient))
    graph.replay()
    assert same(dict(captured), step())


@needs_cuda
def test_pcgrad_draws_the_same_order_on_every_device() -> None:
    results = []
    for device in ("cpu", "cuda"):
        p = nn.Parameter(torch.zeros(8, dtype=torch.float64, device=device))
        opt = ModalityDecoupledOptimizer(SGD([p], lr=0.1), rule="pcgrad", seed=3)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            rows = torch.randn(6, 8, generator=generator, dtype=torch.float64).to(device)
            opt.backward([(p * row).sum() for row in rows])
        assert p.grad is not None
        results.append(p.grad.cpu())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
