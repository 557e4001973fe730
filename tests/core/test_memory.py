"""Which graphs live how long, what is traversed, and how much memory gradients take."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.core.cases import SCOPES, GraphWatch, optimizer_of, peak_bytes
from tests.reference import towers

# --- graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["backward", "accumulate", "joint", "measured"])
def test_shared_graphs_need_no_retain_graph_and_are_freed(way: str) -> None:
    """By the time the call returns, although the losses are still held."""
    model, watch = towers(), GraphWatch()
    measured = {"conflict_parameters": model.trunk.parameters()} if way == "measured" else {}
    opt = optimizer_of(model.parameters(), **measured)
    with watch.recording("all"):
        losses = model.losses()
    assert watch.alive() == {"all"}
    if way == "joint":
        opt.joint(losses).backward()
    else:
        (opt.accumulate if way == "accumulate" else opt.backward)(losses)
    for loss in losses.values():
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert watch.alive() == set()


def test_the_last_backward_frees_the_graph() -> None:
    """One trunk, three losses that save nothing of their own."""
    p, watch = nn.Parameter(torch.ones(3)), GraphWatch()
    with watch.recording("trunk"):
        hidden = p.exp().tanh()
    losses = [hidden.sum(), -hidden.sum(), hidden.mean()]
    assert watch.alive() == {"trunk"}
    optimizer_of([p]).backward(losses)
    assert watch.alive() == set()


def test_graphs_that_are_not_shared_are_freed_one_by_one() -> None:
    """While the last loss runs backward, only its own graph is left."""
    p, watch = nn.Parameter(torch.ones(3)), GraphWatch()
    alive: list[set[str]] = []
    losses = {}
    for name in "abcd":
        with watch.recording(name):
            losses[name] = (p.exp().tanh() * (ord(name) - 98)).sum()
    p.register_hook(lambda g: alive.append(watch.alive()))
    optimizer_of([p]).backward(losses)
    assert len(alive) == 4
    assert all(len(names) <= left for names, left in zip(alive, (4, 3, 2, 1), strict=True)), alive


def test_only_graphs_that_are_really_shared_are_retained() -> None:
    """Two trunks, two losses each, interleaved: the first trunk goes when its last loss is done."""
    p, watch = nn.Parameter(torch.ones(3)), GraphWatch()
    trunks = {}
    for name in "ab":
        with watch.recording(name):
            trunks[name] = p.exp().tanh()
    losses = [trunks["a"].sum(), trunks["b"].sum(), -trunks["a"].mean(), -trunks["b"].mean()]
    trunks.clear()
    alive: list[set[str]] = []
    p.register_hook(lambda g: alive.append(watch.alive()))
    optimizer_of([p]).backward(losses)
    assert len(alive) == 4 and len(alive[-1]) <= 1
    assert watch.alive() == set()


def test_a_graph_that_branches_and_joins_is_not_shared_by_that() -> None:
    model, losses = towers(), []
    for _ in range(2):
        hidden = model.a(torch.randn(4, 3, dtype=torch.float64))
        losses.append((hidden + hidden.tanh()).square().mean())
    optimizer_of(model.parameters()).backward(losses)
    for loss in losses:
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


@pytest.mark.parametrize("method", ["backward", "accumulate", "step"])
def test_closures_keep_one_graph_alive_at_a_time(method: str) -> None:
    model, watch = towers(), GraphWatch()
    before: list[set[str]] = []

    def closure(name: str) -> Tensor:
        before.append(watch.alive())
        with watch.recording(name):
            return model.losses()[name]

    opt = optimizer_of(model.parameters())
    getattr(opt, method)({name: functools.partial(closure, name) for name in ("a", "b", "a+b")})
    assert before == [set(), set(), set()]
    assert watch.alive() == set()


def test_measured_graphs_live_until_the_merge_or_zero_grad() -> None:
    """The price of ``conflict_parameters``."""
    model, watch = towers(), GraphWatch()
    opt = optimizer_of(model.parameters(), conflict_parameters=model.trunk.parameters())
    for name in ("first", "second"):
        with watch.recording(name):
            opt.accumulate(model.losses())
    assert watch.alive() == {"first", "second"}
    opt.zero_grad()
    assert not watch.alive()
    for name, take in (("third", opt.accumulate), ("last", opt.backward)):
        with watch.recording(name):
            take(model.losses())
    assert not watch.alive()


@pytest.mark.parametrize("measured", [0, 1, 3])
def test_what_is_traversed(measured: int) -> None:
    """Graphs of their own once each; with conflict_parameters, their last layers once more."""
    depth, m = 6, 5
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
    traversed: list[object] = []
    block = [p for layer in layers[depth - measured :] for p in layer.parameters()]
    losses = []
    for _ in range(m):
        x = torch.randn(2, 4)
        for layer in layers:
            x = layer(x).tanh()
            x.grad_fn.register_hook(lambda *_: traversed.append(None))
        losses.append(x.mean())
    optimizer_of(layers.parameters(), conflict_parameters=block or None).backward(losses)
    assert len(traversed) == m * (depth + measured)


def test_a_shared_forward_is_traversed_once_more_whatever_m() -> None:
    """With ``conflict_parameters`` behind it."""
    torch.manual_seed(0)
    encoder, heads = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(7))
    last = nn.Linear(4, 1)
    hidden = encoder(torch.randn(3, 4)).tanh()
    traversed: list[object] = []
    hidden.grad_fn.register_hook(lambda *_: traversed.append(None))
    params = nn.ModuleList([encoder, heads, last]).parameters()
    opt = optimizer_of(params, conflict_parameters=last.parameters())
    opt.backward([last(head(hidden)).sum() for head in heads])
    assert len(traversed) == 1


# --- memory for gradients -------------------------------------------------------------------------

MEBI = 1 << 20
SMALL = 3 * MEBI  # "plus a small constant", where one row takes 8 MiB or more
BUFFER = 8 * MEBI  # what is multiplied at once

pytestmark = pytest.mark.filterwarnings("ignore")  # of the profiler


def closures_of(params: Sequence[Tensor], m: int) -> list[Callable[[], Tensor]]:
    """m losses, every second opposed; their gradients are made one after the other."""
    direction = torch.randn(params[0].numel()).to(params[0].dtype)

    def closure(i: int) -> Tensor:
        # On CPUs with AMX, oneDNN's dot of bfloat16 takes the memory of several rows itself.
        with torch.backends.mkldnn.flags(enabled=False):
            return torch.stack([torch.dot(p, direction) * (-1) ** i for p in params]).sum()

    return [functools.partial(closure, i) for i in range(m)]


@pytest.mark.parametrize(
    ("dtype", "row_dtype"),
    [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)],
)
@pytest.mark.parametrize("pieces", [1, 32])
@pytest.mark.parametrize("had_grad", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_where_all_is_shared_it_peaks_at_the_rows_and_the_merged_gradient(
    dtype: torch.dtype,
    row_dtype: torch.dtype | None,
    pieces: int,
    had_grad: bool,
    micro_batches: int,
    tmp_path: Path,
) -> None:
    """(m + 1) n, and (m + 2) n / 2 of rounded rows, whatever the pieces; ``.grad`` not counted.

    (Adding a float32 gradient to a rounded row takes three times that parameter for a moment.)
    """
    m, n = 4, 4 * MEBI
    params = [nn.Parameter(torch.zeros(n // pieces, dtype=dtype)) for _ in range(pieces)]
    if had_grad:
        for p in params:
            p.grad = torch.zeros_like(p)
    opt = optimizer_of(params, row_dtype=row_dtype)
    closures = closures_of(params, m)

    def window() -> None:
        for _ in range(micro_batches - 1):
            opt.accumulate(closures)
        opt.backward(closures)

    peak = peak_bytes(window, tmp_path)
    rows = m * n * (row_dtype or dtype).itemsize
    passing = 3 * n // pieces * dtype.itemsize if row_dtype and micro_batches > 1 else 0
    assert rows <= peak, "the probe sees nothing"
    assert peak <= rows + max(n * dtype.itemsize, passing, BUFFER) + SMALL


def test_rows_are_stored_only_where_a_loss_reaches(tmp_path: Path) -> None:
    """Six losses with an encoder each: six encoders' worth of rows, not thirty-six."""
    m, size = 6, MEBI
    shared = nn.Parameter(torch.zeros(8))
    private = [nn.Parameter(torch.zeros(size)) for _ in range(m)]
    direction = torch.randn(size)
    closures = [
        lambda i=i: torch.dot(private[i], direction) + shared.sum() * (-1) ** i for i in range(m)
    ]
    for scope in SCOPES:
        opt = optimizer_of([shared, *private], scope=scope)
        peak = peak_bytes(functools.partial(opt.backward, closures), tmp_path)
        assert m * size * 4 <= peak <= 2 * m * size * 4 + SMALL
        opt.zero_grad()


@pytest.mark.parametrize("kind", ["closures", "tensors"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_private_encoders_cost_no_rows(kind: str, micro_batches: int, tmp_path: Path) -> None:
    """Three encoders and a head of 0.1 %, losses of all combinations: at most 2 n above plain.

    While a window is open each loss has a sum of its own: then at most what the losses reach.
    """
    size = 8 * 10**5
    encoders = [nn.Parameter(torch.zeros(size)) for _ in range(3)]
    head = nn.Parameter(torch.zeros(2400))
    direction, n = torch.randn(size), 3 * size + 2400
    combinations = [c for k in (1, 2, 3) for c in itertools.combinations(range(3), k)]

    def loss(combination: tuple[int, ...]) -> Tensor:
        parts = [torch.dot(encoders[i], direction) for i in combination]
        return torch.stack(parts).sum() * head.sum() * (-1) ** len(combination)

    closures = [functools.partial(loss, combination) for combination in combinations]

    def plain() -> None:
        for _ in range(micro_batches):
            for closure in closures:
                closure().backward()

    opt = optimizer_of([*encoders, head], scope="shared")

    def decoupled() -> None:
        for batch in range(micro_batches):
            take = opt.backward if batch == micro_batches - 1 else opt.accumulate
            take([closure() for closure in closures] if kind == "tensors" else closures)

    base = peak_bytes(plain, tmp_path)
    opt.zero_grad()
    peak = peak_bytes(decoupled, tmp_path)
    reached = 12 * size if micro_batches > 1 else 2 * n
    assert n * 4 <= base and peak - base <= reached * 4 + SMALL


class Dense(torch.autograd.Function):
    """A loss whose gradient is a constant everywhere, all made at once."""

    @staticmethod
    def forward(ctx: object, factor: float, *params: Tensor) -> Tensor:
        ctx.factor, ctx.shapes = factor, [p.shape for p in params]
        return sum(p.detach().flatten()[0] for p in params) * factor

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        return None, *(gradient * torch.full(s, ctx.factor) if use else None for s, use in pairs)


def test_conflict_parameters_take_the_memory_of_one_backward(tmp_path: Path) -> None:
    m, n = 6, 2**20
    params = [nn.Parameter(torch.ones(n // 32)) for _ in range(32)]
    opt = optimizer_of(params, conflict_parameters=params[:1])
    closures = [functools.partial(Dense.apply, float(i + 1), *params) for i in range(m)]
    peak = peak_bytes(lambda: opt.backward(closures), tmp_path)
    # the merged gradient, and that of one loss, which this function makes all at once
    assert n * 4 <= peak <= (2 + m / 32) * n * 4 + SMALL
