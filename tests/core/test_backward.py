"""``backward`` on one batch: scope, reduction and rule, reach, hooks and checkpoints, NaN."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradsplit.rules import pcgrad
from tests.core.cases import (
    REDUCTIONS,
    SCOPES,
    assert_rows_equal,
    merged,
    optimizer_of,
    parameters_like,
    vector,
)
from tests.reference import (
    Row,
    Snapshot,
    decouple,
    grads,
    linear_losses,
    pcgrad_loop,
    same,
    towers,
)
from tests.strategies import orders, partial_rows

# --- scope, reduction, rule -----------------------------------------------------------------------


@pytest.mark.parametrize("scope", [*SCOPES, "chosen"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(rows=partial_rows(), data=st.data())
def test_gmd_equals_the_oracle(
    rows: list[Row], data: st.DataObject, scope: str, reduction: str
) -> None:
    parameters = st.lists(st.integers(0, len(rows[0]) - 1), min_size=1, unique=True)
    options = {
        "scope": data.draw(parameters) if scope == "chosen" else scope,
        "reduction": reduction,
    }
    assert_rows_equal(merged(rows, **options), decouple(rows, **options), rows)


@pytest.mark.parametrize("scope", SCOPES)
@given(rows=partial_rows(), data=st.data())
def test_pcgrad_in_a_known_order_equals_the_oracle(
    rows: list[Row], data: st.DataObject, scope: str
) -> None:
    order = data.draw(orders(len(rows)))
    rule = functools.partial(pcgrad, order=order)
    loop = functools.partial(pcgrad_loop, order=order)
    assert_rows_equal(merged(rows, rule=rule, scope=scope), decouple(rows, loop, scope), rows)


def counting(gramian: Tensor) -> Tensor:
    return torch.arange(1, gramian.shape[-1] + 1, dtype=gramian.dtype, device=gramian.device)


@given(rows=partial_rows())
def test_any_callable_is_a_rule(rows: list[Row]) -> None:
    """Weights 1, 2, 3, ... inside the scope; the plain sum outside."""
    expected = decouple(rows, lambda j: counting(j @ j.T) @ j, reduction="sum")
    assert_rows_equal(merged(rows, rule=counting, reduction="sum"), expected, rows)


@pytest.mark.parametrize("scope", SCOPES)
@given(rows=partial_rows())
def test_the_rule_sum_decouples_nothing(rows: list[Row], scope: str) -> None:
    """Its weights are ones, and ``.grad`` is that of the mean loss."""
    params, plain = parameters_like(rows), parameters_like(rows)
    report = optimizer_of(params, rule="sum", scope=scope).backward(linear_losses(params, rows))
    assert report.weights.tolist() == [1.0] * len(rows)
    (sum(linear_losses(plain, rows)) / len(rows)).backward()
    assert_rows_equal([p.grad for p in params], [p.grad for p in plain], rows)


def test_the_defaults_are_gmd_shared_mean() -> None:
    rows: list[Row] = [
        [vector(1, 0), vector(9), None],
        [vector(-3, 4), None, vector(8)],
        [vector(0, -1), None, None],
    ]
    assert_rows_equal(merged(rows), decouple(rows, scope="shared", reduction="mean"), rows)


@pytest.mark.parametrize(
    ("reduction", "private"), [("sum", [5.0, 7.0]), ("mean", [2.5, 3.5]), ("released", [5.0, 7.0])]
)
def test_a_private_encoder_is_not_rescaled_by_somebody_elses_conflict(
    reduction: str, private: list[float]
) -> None:
    rows: list[Row] = [[vector(1), vector(5), None], [vector(-1), None, vector(7)]]
    assert [float(g) for g in merged(rows, reduction=reduction)[1:]] == private


@pytest.mark.parametrize("scope", [*SCOPES, [1]])
def test_released_divides_what_every_loss_reaches_whatever_the_scope(scope: object) -> None:
    rows: list[Row] = [[vector(2), vector(5)], [vector(4), None]]
    assert [float(g) for g in merged(rows, scope=scope, reduction="released")] == [3.0, 5.0]


def test_without_conflict_the_mean_is_the_gradient_of_the_mean_loss() -> None:
    torch.manual_seed(0)
    p, unreached = (nn.Parameter(torch.randn(3, 3, dtype=torch.float64)) for _ in range(2))
    optimizer_of([p, unreached]).backward([(p**2).sum(), (p**4).sum()])
    value = p.detach()
    torch.testing.assert_close(p.grad, (2 * value + 4 * value**3) / 2, rtol=1e-14, atol=0)
    assert unreached.grad is None


def test_the_scope_is_that_of_this_step() -> None:
    """What is shared by the losses of one step need not be shared by those of the next."""
    params = [nn.Parameter(vector(0, 0)) for _ in range(2)]
    opt = optimizer_of(params, reduction="sum")
    plus, minus = vector(1, 0), vector(-1, 1)
    for rows in ([[plus, plus], [minus, minus]], [[plus, plus], [minus, None]]):
        opt.zero_grad()
        opt.backward(linear_losses(params, rows))
        assert_rows_equal([p.grad for p in params], decouple(rows, reduction="sum"), rows)


@given(rows=partial_rows())
def test_gmd_does_not_depend_on_the_order_of_the_losses(rows: list[Row]) -> None:
    assert_rows_equal(merged(rows[::-1]), merged(rows), rows)


def test_a_rule_that_changes_its_argument_does_not_change_the_report() -> None:
    def clamping(gramian: Tensor) -> Tensor:
        return gramian.clamp_(min=0.0).new_ones(len(gramian))

    p = nn.Parameter(torch.ones(2))
    assert optimizer_of([p], rule=clamping).backward([p.sum(), -p.sum()]).conflict_rate() == 1.0


# --- a single loss, and what plain torch does -----------------------------------------------------


@pytest.mark.parametrize("rule", ["gmd", "pcgrad", counting])
@pytest.mark.parametrize("scope", [*SCOPES, "measured"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_single_loss_equals_plain_backward_exactly(
    rule: object, scope: str, reduction: str, dtype: torch.dtype
) -> None:
    ours, plain = towers(dtype), towers(dtype)
    where = {"scope": scope}
    if scope == "measured":
        where = {"conflict_parameters": ours.trunk.parameters()}
    opt = optimizer_of(ours.parameters(), rule=rule, reduction=reduction, **where)
    for seed in (0, 1):  # the second adds to the first
        opt.backward({"a": ours.losses(seed)["a"]})
        plain.losses(seed)["a"].backward()
    assert same(grads(ours), grads(plain))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("kind", [list, tuple])
def test_losses_of_either_shape_in_either_sequence(shape: tuple[int, ...], kind: type) -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    optimizer_of([p], reduction="sum").backward(kind([(p * 3).view(shape), (p * 4).view(shape)]))
    assert p.grad.tolist() == [7.0]


def test_it_adds_to_grad_in_place_as_torch_does() -> None:
    model = towers()
    opt = optimizer_of(model.parameters())
    opt.backward(model.losses(0))
    held = grads(model)
    opt.backward(model.losses(1))
    pairs = zip(decouple(model.rows(0)), decouple(model.rows(1)), strict=True)
    assert_rows_equal(grads(model), [one + other for one, other in pairs], model.rows())
    assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))


def test_merged_gradients_carry_no_graph() -> None:
    model = towers()
    optimizer_of(model.parameters()).backward(model.losses())
    assert not any(g.requires_grad for g in grads(model))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_is_that_of_torch(set_to_none: bool) -> None:
    p = nn.Parameter(torch.ones(2))
    opt = optimizer_of([p])
    opt.backward([p.sum(), p.sum() * 2])
    opt.zero_grad(set_to_none=set_to_none)
    assert (p.grad is None) if set_to_none else torch.equal(p.grad, torch.zeros(2))


# --- reach ----------------------------------------------------------------------------------------


def test_a_gradient_of_zeros_is_reached() -> None:
    """Autograd hands out a tensor of zeros: so the parameter is shared, and gets a .grad."""
    a, b = nn.Parameter(vector(1.0)), nn.Parameter(vector(1.0))
    report = optimizer_of([a, b]).backward([(a * 3 + b * 0).sum(), (a * 5 - b * 2).sum()])
    assert b.grad.tolist() == [-1.0]
    assert report.gramian.tolist() == [[9.0, 15.0], [15.0, 29.0]]


class GradientsAsGiven(torch.autograd.Function):
    """A sum whose gradients are whatever a function makes of the one that arrives."""

    @staticmethod
    def forward(ctx: Any, made: Callable[[Tensor], tuple[Any, ...]], *parts: Tensor) -> Tensor:
        ctx.made = made
        return sum(part.detach().real.sum() for part in parts)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return None, *ctx.made(upstream)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_gradient_of_none_is_not_reached(scope: str) -> None:
    """Although the graph shows the parameter."""
    a, b = nn.Parameter(vector(1, 1)), nn.Parameter(vector(1, 1))

    def first_only(upstream: Tensor) -> tuple[Tensor, None]:
        return upstream.expand(2).clone(), None

    opt = optimizer_of([a, b], scope=scope)
    opt.backward([GradientsAsGiven.apply(first_only, a, b), -3 * a.sum()])
    rows: list[Row] = [[vector(1, 1), None], [vector(-3, -3), None]]
    assert_rows_equal([a.grad, b.grad], decouple(rows, scope=scope), rows)
    opt.zero_grad()
    opt.backward([GradientsAsGiven.apply(first_only, a, b), -3 * a.sum() + b.sum()])
    rows[1][1] = vector(1, 1)
    assert_rows_equal([a.grad, b.grad], decouple(rows, scope=scope), rows)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("frozen", [False, True])
def test_unreached_and_frozen_parameters_keep_their_grad(scope: str, frozen: bool) -> None:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    b.grad = held = torch.tensor([3.0, -4.0])
    loss, opt = a.sum(), optimizer_of([a, b, c], scope=scope)
    if frozen:
        b.requires_grad_(False)
        loss = (a * b).sum()
    opt.backward([loss, loss * -2])
    assert b.grad is held and held.tolist() == [3.0, -4.0]
    assert c.grad is None
    if frozen:
        b.requires_grad_(True)
        report = opt.backward([(a * b).sum(), (a * 2 * b).sum()])
        assert b.grad is held and held.tolist() == [4.5, -2.5]
        assert report.gramian[0, 0] == 4.0


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scope", SCOPES)
def test_leaves_outside_the_optimizer_are_as_private_parameters(scope: str, reduction: str) -> None:
    """Not decoupled, reduced as everything else, and added to what is there."""
    leaves = [nn.Parameter(vector(0, 0)) for _ in range(3)]
    leaves[1].grad = vector(100, 100)
    rows: list[Row] = [
        [vector(1, 0), vector(1, 2), vector(1, 1)],
        [vector(-3, 4), vector(-3, 5), None],
    ]
    opt = optimizer_of(leaves[:1], scope=scope, reduction=reduction)
    opt.backward(linear_losses(leaves, rows))
    expected = decouple(rows, scope=[0], reduction=reduction)
    expected[1] = expected[1] + 100
    assert_rows_equal([leaf.grad for leaf in leaves], expected, rows)


# --- what may be handed over ----------------------------------------------------------------------


@pytest.mark.parametrize("kinds", ["ttt", "ccc", "tct", "tnt", "tet", "ncc"])
def test_losses_closures_and_none_in_any_mixture(kinds: str) -> None:
    """t: a tensor; c: a closure; n: None; e: a closure that returns None. None has no row."""
    model = towers()
    losses, entries = model.losses(), {}
    for kind, name in zip(kinds, losses, strict=True):
        kept = {"t": losses[name], "c": lambda n=name: model.losses()[n], "e": lambda: None}
        entries[name] = kept.get(kind)
    rows = model.rows(
        names=[name for kind, name in zip(kinds, losses, strict=True) if kind in "tc"]
    )
    report = optimizer_of(model.parameters()).backward(entries)
    assert_rows_equal(grads(model), decouple(rows), rows)
    assert len(report.names) + len(report.unavailable) == 3 and len(report.names) == len(rows)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("closures", [False, True])
def test_losses_that_share_nothing(scope: str, closures: bool) -> None:
    rows: list[Row] = [[vector(1, 2), None], [None, vector(3)]]
    params = parameters_like(rows)
    losses = [
        (lambda row=row: linear_losses(params, [row])[0])
        if closures
        else linear_losses(params, [row])[0]
        for row in rows
    ]
    report = optimizer_of(params, scope=scope).backward(losses)
    assert_rows_equal([p.grad for p in params], decouple(rows, scope=scope), rows)
    assert report.weights.tolist() == [1.0, 1.0]


def test_a_step_is_zero_grad_backward_and_step_of_the_base() -> None:
    ours, plain = towers(), towers()
    for p in ours.parameters():
        p.grad = torch.full_like(p, 1e3)
    for p, g in zip(plain.parameters(), decouple(plain.rows()), strict=True):
        p.grad = g
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    losses = optimizer_of(ours.parameters()).step({**ours.losses(), "c": None})
    assert list(losses) == ["a", "b", "a+b", "c"] and losses["c"] is None
    for name, value in towers().losses().items():
        assert torch.equal(losses[name], value.detach()) and not losses[name].requires_grad
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_a_step_returns_the_losses_in_the_shape_they_came_in() -> None:
    p = nn.Parameter(torch.tensor([2.0]))
    opt = optimizer_of([p])
    assert list(opt.step({("a", "b"): (p * 3).sum(), ("a",): p.sum()})) == [("a", "b"), ("a",)]
    for kind in (list, tuple):
        with torch.no_grad():
            p.fill_(2.0)
        found = opt.step(kind([lambda: (p * 3).sum(), None, (p * 5).sum()]))
        assert found == kind([torch.tensor(6.0), None, torch.tensor(10.0)])


def test_a_parameter_may_be_the_loss() -> None:
    p = nn.Parameter(torch.tensor(2.0))
    optimizer_of([p], reduction="sum").backward([p, p * 3])
    assert float(p.grad) == 4.0


@pytest.mark.parametrize("method", ["backward", "accumulate", "step", "joint"])
@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (lambda x, y: {"a": x, "b": y, "c": x}, r"loss 3 of 3 \('c'\).*loss 1 of 3 \('a'\)"),
        (lambda x, y: [x, x], r"loss 2 of 2 \('1'\).*loss 1 of 2 \('0'\)"),
        (lambda x, y: {"a": x, ("b", "b"): y}, r"'b\+b' names a modality twice"),
        (lambda x, y: {"a+a": x, "b": y}, r"'a\+a' names a modality twice"),
        (lambda x, y: {"a+b": x, ("b", "a"): y}, r"'a\+b' and 'b\+a'"),
    ],
)
def test_what_is_given_twice_is_refused(
    method: str, losses: Callable[..., object], message: str
) -> None:
    """One tensor under two names, a modality twice in a combination, a combination twice."""
    p = nn.Parameter(vector(1.0, 2.0))
    opt = optimizer_of([p])
    opt.step([p.sum()])
    snapshot = Snapshot(opt)
    with pytest.raises(ValueError, match=message):
        getattr(opt, method)(losses(p.sum(), p.prod()))
    snapshot.assert_unchanged()


def test_closures_run_with_gradients_on_even_under_no_grad() -> None:
    """As torch's own closures do."""
    p = nn.Parameter(torch.zeros(1))
    opt = optimizer_of([p], reduction="sum")
    with torch.no_grad():
        opt.step([lambda: (p * 3).sum(), lambda: (p * 5).sum()])
    assert p.tolist() == pytest.approx([-0.8])


# --- layouts: where gradients lie in memory -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("scope", [*SCOPES, "none of them"])
def test_parameters_of_any_layout(dtype: torch.dtype, scope: str) -> None:
    """Transposed, channels last, expanded, scalar, empty: ``.grad`` has torch's strides."""
    torch.manual_seed(0)
    values = [
        torch.zeros(3, 4, dtype=dtype).T,
        torch.zeros(2, 3, 2, 2, dtype=dtype).to(memory_format=torch.channels_last),
        torch.zeros(5, 8, dtype=dtype)[:, ::2],
        torch.zeros((), dtype=dtype),
        torch.zeros(0, 3, dtype=dtype),
        torch.zeros(7, dtype=torch.float64),
    ]
    params, plain = ([nn.Parameter(value.clone(memory_format=torch.preserve_format))
                      for value in values] for _ in range(2))  # fmt: skip
    anchor = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    everyone = [*params, anchor]
    rows: list[Row] = [[torch.randn_like(p) for p in everyone] for _ in range(3)]
    chosen = {"scope": [anchor]} if scope == "none of them" else {"scope": scope}
    optimizer_of(everyone, **chosen).backward(linear_losses(everyone, rows))
    wanted = [len(values)] if scope == "none of them" else scope
    assert_rows_equal([p.grad for p in everyone], decouple(rows, scope=wanted), rows)
    linear_losses(plain, [row[:-1] for row in rows])[0].backward()
    assert [(p.grad.dtype, p.grad.stride()) for p in params] == [
        (p.grad.dtype, p.grad.stride()) for p in plain
    ]


@given(rows=partial_rows(), data=st.data())
def test_complex_parameters_are_pairs_of_reals(rows: list[Row], data: st.DataObject) -> None:
    """Some of the parameters are complex: as if each were two real ones."""
    which = data.draw(st.lists(st.booleans(), min_size=len(rows[0]), max_size=len(rows[0])))
    options = {"scope": data.draw(st.sampled_from(SCOPES))}
    mixed: list[Row] = [
        [
            torch.complex(g, g.flip(0) - 1) if complex_ and g is not None else g
            for g, complex_ in zip(row, which, strict=True)
        ]
        for row in rows
    ]
    params = parameters_like(rows)
    for p, complex_ in enumerate(which):
        if complex_:
            params[p] = nn.Parameter(params[p].detach().to(torch.complex128))
    optimizer_of(params, **options).backward(linear_losses(params, mixed))
    assert_rows_equal([p.grad for p in params], decouple(mixed, **options), mixed)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("had_grad", [False, True])
def test_gradients_that_autograd_leaves_lazily_conjugated_or_negated(
    private: bool, had_grad: bool
) -> None:
    z, x = nn.Parameter(torch.zeros(2, dtype=torch.complex128)), nn.Parameter(vector(0, 0))
    anchor = nn.Parameter(vector(0))
    made = torch.complex(vector(1, 2), vector(3, 4))
    opt = optimizer_of([z, x, anchor], scope=[anchor] if private else "shared", reduction="sum")
    if had_grad:
        z.grad, x.grad = torch.zeros_like(z), torch.zeros_like(x)

    def lazily(_: Tensor) -> tuple[Tensor, Tensor]:
        assert made.conj().is_conj() and made.conj().imag.is_neg()
        return made.conj(), made.conj().imag

    losses = [GradientsAsGiven.apply(lazily, z, x) + anchor.sum() for _ in range(2)]
    opt.backward(losses)
    assert z.grad.tolist() == [2 - 6j, 4 - 8j] and x.grad.tolist() == [-6.0, -8.0]


@pytest.mark.parametrize("scope", [*SCOPES, "outside"])
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("how", ["one storage", "one tensor"])
def test_parameters_whose_gradients_autograd_puts_into_one_storage(
    scope: str, more: int, how: str
) -> None:
    """As for ``a[None] + b[None]``; ``more``: losses that reach ``a`` alone. Two micro-batches."""
    torch.manual_seed(0)
    factors = torch.randn(2 + more, 8, dtype=torch.float64)
    a, b = (nn.Parameter(torch.zeros(8, dtype=torch.float64)) for _ in range(2))
    anchor = nn.Parameter(vector(0))
    chosen = [anchor] if scope == "outside" else scope
    opt = optimizer_of([a, b, anchor], reduction="sum", scope=chosen)

    def losses() -> list[Tensor]:
        if how == "one storage":
            both = [((a[None] + b[None]) * factor).sum() for factor in factors[:2]]
        else:
            both = [GradientsAsGiven.apply(lambda g, f=f: [f * g] * 2, a, b) for f in factors[:2]]
        return [loss + anchor.sum() for loss in both + [(a * f).sum() for f in factors[2:]]]

    opt.accumulate(losses())
    opt.backward(losses())
    rows: list[Row] = [[f, f if i < 2 else None, vector(1)] for i, f in enumerate(factors)]
    wanted = [2] if scope == "outside" else scope
    expected = decouple(rows, scope=wanted, reduction="sum")
    assert_rows_equal([a.grad, b.grad, anchor.grad], expected, rows)
    a.grad.zero_()
    assert b.grad.any()  # they do not overlap


@pytest.mark.parametrize("m", [1, 2])
def test_grads_keep_no_row_alive(m: int) -> None:
    """All memory behind ``.grad`` is one merged vector: 128 bytes between pieces, 4 KiB at most."""
    params = [nn.Parameter(torch.zeros(size)) for size in (1000, 3, 50)]
    rows: list[Row] = [[torch.randn(p.shape) for p in params] for _ in range(m)]
    optimizer_of(params).backward(linear_losses(params, rows))
    storages = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage() for p in params}
    assert sum(storage.nbytes() for storage in storages.values()) <= 4 * 1053 + 2 * 128 + 4096


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("around", [0, 1])
def test_rows_do_not_alias_a_storage_that_the_next_backward_overwrites(
    around: int, detached: bool
) -> None:
    """As DDP's buckets with ``gradient_as_bucket_view=True``, played here by a hook."""
    p = nn.Parameter(torch.ones(2))
    bucket = torch.zeros(2 + 2 * around)

    def into_bucket(parameter: Tensor) -> None:
        view = bucket[around : around + 2]
        view.copy_(parameter.grad)
        parameter.grad = view.detach() if detached else view

    p.register_post_accumulate_grad_hook(into_bucket)
    report = optimizer_of([p], reduction="sum").backward([p[0] * 1.0, p[1] * 2.0])
    assert report.gramian.tolist() == [[1.0, 0.0], [0.0, 4.0]]
    assert p.grad.tolist() == [1.0, 2.0]


# --- the order that pcgrad draws ------------------------------------------------------------------

THREE = [vector(1.0, 0.0), vector(-1.0, 0.1), vector(-1.0, -2.0)]


def pcgrad_results(count: int, seed: int) -> list[tuple[float, ...]]:
    p = nn.Parameter(vector(0, 0))
    opt = optimizer_of([p], rule="pcgrad", reduction="sum", seed=seed)
    results = []
    for _ in range(count):
        opt.zero_grad()
        opt.backward(linear_losses([p], [[row] for row in THREE]))
        results.append(tuple(round(x, 9) for x in p.grad.tolist()))
    return results


def test_pcgrad_draws_every_order_about_equally_often() -> None:
    """Three rows, two orders each: eight sums, told apart by the oracle."""
    ways = [[(0, 1, 2), (0, 2, 1)], [(1, 0, 2), (1, 2, 0)], [(2, 0, 1), (2, 1, 0)]]
    possible: dict[tuple[float, ...], float] = {}
    for order in itertools.product(*ways):
        result = pcgrad_loop(torch.stack(THREE), torch.tensor(order)).tolist()
        key = tuple(round(x, 9) for x in result)
        possible[key] = possible.get(key, 0) + 1 / 8
    assert len(possible) > 3, "the example lost its point"
    draws = pcgrad_results(600, seed=0)
    statistic = sum(
        (draws.count(key) - 600 * share) ** 2 / (600 * share) for key, share in possible.items()
    )
    assert set(draws) == set(possible)
    assert statistic < 28  # p < 0.001 with at most 7 degrees of freedom


def test_pcgrad_order_comes_from_seed_and_merge_counter_alone() -> None:
    """And torch's global generator is neither read nor moved."""
    torch.manual_seed(0)
    first = pcgrad_results(12, seed=3)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    assert pcgrad_results(12, seed=3) == first
    assert pcgrad_results(12, seed=4) != first
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("rule", ["gmd", "pcgrad"])
def test_torchs_default_device_and_dtype_do_not_matter(rule: str) -> None:
    """The parameters say where and in what precision; pcgrad draws the same order."""
    results = []
    for device, dtype in ((None, torch.float32), ("meta", torch.float16)):
        p = nn.Parameter(vector(0, 0))
        losses = linear_losses([p], [[row] for row in THREE])
        opt = optimizer_of([p], rule=rule, seed=1)
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)
        try:
            opt.accumulate(linear_losses([p], [[row] for row in THREE]))
            opt.backward(losses)
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        results.append(p.grad)
    assert same(results[0], results[1])


# --- hooks, checkpointing -------------------------------------------------------------------------


def test_tensor_hooks_fire_once_per_loss() -> None:
    p = nn.Parameter(torch.zeros(2))
    fired: list[str] = []
    p.register_hook(lambda g: fired.append("gradient"))
    p.register_post_accumulate_grad_hook(lambda p: fired.append("accumulated"))
    optimizer_of([p]).backward([p.sum(), (p * 2).sum(), lambda: (p * 3).sum()])
    assert (fired.count("gradient"), fired.count("accumulated")) == (3, 3)


def test_a_hook_that_changes_the_gradient_changes_the_row() -> None:
    p = nn.Parameter(vector(0, 0))
    p.register_hook(lambda g: g * vector(1, -2))
    seen: list[Row] = [[vector(1, 1)], [vector(-3, -5)]]
    optimizer_of([p]).backward(linear_losses([p], [[vector(1, -0.5)], [vector(-3, 2.5)]]))
    assert_rows_equal([p.grad], decouple(seen), seen)


class Recomputed(nn.Module):
    """Its inner module under activation checkpointing; the reentrant kind wants an input that
    requires a gradient."""

    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("way", ["losses", "closures", "joint"])
def test_activation_checkpointing(use_reentrant: bool, way: str) -> None:
    """The trunk, shared by all losses, and one private encoder are recomputed in backward."""
    model = towers()
    rows, parameters, weight = model.rows(), list(model.parameters()), model.a.weight
    model.trunk = Recomputed(model.trunk, use_reentrant)
    model.a = Recomputed(model.a, use_reentrant)
    model.a.weight = weight
    opt = optimizer_of(parameters)
    if way == "closures":
        opt.backward({name: lambda n=name: model.losses()[n] for name in ("a", "b", "a+b")})
    elif way == "losses":
        opt.backward(model.losses())
    else:
        opt.joint(model.losses()).backward()
    assert_rows_equal([p.grad for p in parameters], decouple(rows), rows)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_checkpointing_of_one_forward_shared_by_all_losses(
    use_reentrant: bool, joint: bool
) -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    heads = nn.ModuleList(nn.Linear(4, 1).double() for _ in range(3))
    parameters = [*trunk.parameters(), *heads.parameters()]
    x = torch.randn(5, 4, dtype=torch.float64)

    def losses(hidden: Tensor) -> list[Tensor]:
        return [(head(hidden) - i).square().mean() for i, head in enumerate(heads)]

    rows: list[Row] = [
        list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
        for loss in losses(trunk(x))
    ]
    recomputed = losses(Recomputed(trunk, use_reentrant)(x))
    opt = optimizer_of(parameters)
    opt.joint(recomputed).backward() if joint else opt.backward(recomputed)
    assert_rows_equal([p.grad for p in parameters], decouple(rows), rows)


# --- NaN and inf ----------------------------------------------------------------------------------

BAD = [float("nan"), float("inf"), -float("inf")]
DTYPES = [torch.float16, torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("rule", ["gmd", "pcgrad", lambda gramian: torch.zeros(len(gramian))])
@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("mode", [*DTYPES, "rounded", "measured"])
def test_a_gradient_that_is_not_finite_reaches_grad(
    bad: float, rule: object, row: int, mode: object
) -> None:
    """In whichever row, conflicting or not, even of weight zero: ``.grad`` is not finite there."""
    dtype = mode if isinstance(mode, torch.dtype) else torch.float32
    jacobian = torch.stack(THREE).to(dtype)
    jacobian[row, 1] = bad
    p = nn.Parameter(torch.zeros(2, dtype=dtype))
    options = {"rounded": {"row_dtype": torch.bfloat16}, "measured": {"conflict_parameters": [p]}}
    opt = optimizer_of([p], rule=rule, **options.get(mode, {}))
    opt.backward(linear_losses([p], [[g] for g in jacobian]))
    assert not p.grad[1].isfinite()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("scope", ["shared", [0]])
def test_a_private_gradient_that_is_not_finite_stays_private(bad: float, scope: object) -> None:
    """It is outside the scope, so the Gramian does not see it; its own ``.grad`` does."""
    rows: list[Row] = [[vector(1, 0), vector(bad)], [vector(-3, 4), None]]
    shared, private = merged(rows, scope=scope)
    assert not private.isfinite().any()
    clean: list[Row] = [[vector(1, 0)], [vector(-3, 4)]]
    assert_rows_equal([shared], decouple(clean), clean)


@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_spoils_the_products_of_its_own_row_alone(bad: float) -> None:
    """With ``scope="all"`` a row of zeros where a loss does not reach makes no NaN: 0 x inf."""
    rows: list[Row] = [
        [vector(1, 0), vector(bad)],
        [vector(-3, 4), None],
        [vector(0, -1), None],
    ]
    params = parameters_like(rows)
    report = optimizer_of(params, scope="all").backward(linear_losses(params, rows))
    clean = torch.stack([row[0] for row in rows])
    expected = clean @ clean.T
    finite = report.gramian.isfinite()
    assert finite.sum() == 8 and not finite[0, 0]
    torch.testing.assert_close(report.gramian[finite], expected[finite], rtol=0, atol=0)


def test_one_loss_with_nan_equals_plain_backward_exactly() -> None:
    """NaN stays where it is: nothing is projected, so no weight spreads it."""
    factors = torch.tensor([1.0, float("nan"), 3.0])
    for rule in ("gmd", "pcgrad", lambda gramian: torch.full((1,), 0.5)):
        p = nn.Parameter(torch.ones(3))
        optimizer_of([p], rule=rule).backward([(p * factors).sum()])
        torch.testing.assert_close(p.grad, factors, equal_nan=True, rtol=0, atol=0)
