"""The laws of the rules (Gramian -> weights), each a named helper, against the float64 oracle."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradsplit import ModalityDecoupledOptimizer
from gradsplit.rules import gmd, pcgrad
from tests.reference import gmd_loop, linear_losses, pcgrad_loop, pcgrad_rows
from tests.strategies import jacobians, jacobians_with_orders, orders

Rule = Callable[[Tensor], Tensor]
PRECISION = 1e-12  # of the largest row norm: the merged gradient itself can cancel


def gramian_of(jacobian: Tensor) -> Tensor:
    return jacobian @ jacobian.T


def merged(rule: Rule, jacobian: Tensor) -> Tensor:
    return rule(gramian_of(jacobian)) @ jacobian


def with_order(order: Tensor) -> Rule:
    return functools.partial(pcgrad, order=order)


def largest_norm(jacobian: Tensor) -> float:
    return float(jacobian.norm(dim=1).max())


def assert_close(left: Tensor, right: Tensor, jacobian: Tensor) -> None:
    """Equal merged gradients, up to rounding measured against the largest row."""
    assert left.shape == right.shape
    error = float((left - right).abs().max())
    assert error <= PRECISION * largest_norm(jacobian), f"{left} is {error:.3g} off {right}"


def assert_same_weights(left: Tensor, right: Tensor, jacobian: Tensor) -> None:
    """Equal weights, row by row, up to rounding measured in gradient space."""
    norms = jacobian.norm(dim=1)
    assert_close(left * norms, right * norms, jacobian)
    assert torch.equal(left[norms == 0], right[norms == 0])


def assert_ones_without_conflict(rule: Rule, jacobian: Tensor) -> None:
    positive = jacobian.abs()
    assert torch.equal(rule(gramian_of(positive)), torch.ones(len(jacobian), dtype=jacobian.dtype))


def assert_at_least_one(rule: Rule, jacobian: Tensor) -> None:
    assert (rule(gramian_of(jacobian)) >= 1).all()


def assert_zero_rows_have_weight_one(rule: Rule, jacobian: Tensor) -> None:
    """Nobody projects onto a zero row, and it divides nothing."""
    weights = rule(gramian_of(jacobian))
    assert weights.isfinite().all()
    assert (weights[jacobian.norm(dim=1) == 0] == 1).all()


def assert_common_scale_is_irrelevant(rule: Rule, jacobian: Tensor, factor: float) -> None:
    before, after = rule(gramian_of(jacobian)), rule(gramian_of(factor * jacobian))
    assert_same_weights(before, after, jacobian)


def assert_no_conflict_left_between_two(rule: Rule, jacobian: Tensor) -> None:
    result = merged(rule, jacobian)
    for row in jacobian:
        slack = PRECISION * largest_norm(jacobian) * float(row.norm())
        assert float(result @ row) >= -slack


def assert_is_pure(rule: Rule, gramian: Tensor) -> None:
    """The input stays as it was, and the same input gives the same weights in the same dtype."""
    before = gramian.clone()
    first, second = rule(gramian), rule(gramian)
    assert torch.equal(gramian, before)
    assert torch.equal(first, second)
    assert first.dtype == gramian.dtype and first.device == gramian.device


def projected_row(jacobian: Tensor, order: Tensor, i: int) -> Tensor:
    """Row i after projection, seen from outside: doubling row i adds it to the merged gradient."""
    doubled = jacobian.clone()
    doubled[i] *= 2
    return merged(with_order(order), doubled) - merged(with_order(order), jacobian)


# --- gmd ------------------------------------------------------------------------------------------


@given(jacobians())
def test_gmd_equals_the_pairwise_loop(jacobian: Tensor) -> None:
    assert_close(merged(gmd, jacobian), gmd_loop(jacobian), jacobian)


@given(jacobians())
def test_gmd_weights_follow_the_closed_form(jacobian: Tensor) -> None:
    """w_k = 1 - sum over j != k of min(0, K_jk) / K_kk, written out in python floats."""
    gramian = gramian_of(jacobian)
    k_list = gramian.tolist()
    expected = []
    for k in range(len(k_list)):
        lost = sum(min(0.0, k_list[j][k]) for j in range(len(k_list)) if j != k)
        expected.append(1.0 if k_list[k][k] == 0 else 1.0 - lost / k_list[k][k])
    torch.testing.assert_close(
        gmd(gramian), torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0
    )


@given(jacobians(), st.randoms(use_true_random=False))
def test_gmd_is_permutation_equivariant(jacobian: Tensor, random) -> None:
    shuffle = list(range(len(jacobian)))
    random.shuffle(shuffle)
    assert_same_weights(
        gmd(gramian_of(jacobian[shuffle])), gmd(gramian_of(jacobian))[shuffle], jacobian[shuffle]
    )


@given(jacobians())
def test_gmd_without_conflict_gives_ones(jacobian: Tensor) -> None:
    assert_ones_without_conflict(gmd, jacobian)


@given(jacobians())
def test_gmd_weights_are_at_least_one(jacobian: Tensor) -> None:
    assert_at_least_one(gmd, jacobian)


@given(jacobians())
def test_gmd_gives_zero_rows_weight_one(jacobian: Tensor) -> None:
    assert_zero_rows_have_weight_one(gmd, jacobian)


@given(jacobians(), st.sampled_from([-1.0, 0.5, -4.0, 3.0, 1e-3, -700.0]))
def test_gmd_ignores_a_common_scale(jacobian: Tensor, factor: float) -> None:
    assert_common_scale_is_irrelevant(gmd, jacobian, factor)


@given(jacobians(min_rows=2, max_rows=2))
def test_gmd_leaves_no_conflict_between_two_rows(jacobian: Tensor) -> None:
    assert_no_conflict_left_between_two(gmd, jacobian)


@given(jacobians())
def test_gmd_is_pure(jacobian: Tensor) -> None:
    assert_is_pure(gmd, gramian_of(jacobian))


@given(st.integers(1, 4), st.data())
def test_gmd_batched_equals_mapped(m: int, data: st.DataObject) -> None:
    stack = [data.draw(jacobians(m, m)) for _ in range(4)]
    gramians = torch.stack([gramian_of(j) for j in stack])
    weights = gmd(gramians)
    assert weights.shape == (4, m)
    assert torch.equal(gmd(gramians.view(2, 2, m, m)), weights.view(2, 2, m))
    for jacobian, one in zip(stack, weights, strict=True):
        assert_same_weights(one, gmd(gramian_of(jacobian)), jacobian)


def test_gmd_by_hand() -> None:
    """g1 = (1, 0) and g2 = (-3, 4): K = [[1, -3], [-3, 25]], so w = (1 + 3, 1 + 3/25)."""
    gramian = torch.tensor([[1.0, -3.0], [-3.0, 25.0]], dtype=torch.float64)
    expected = torch.tensor([4.0, 1.12], dtype=torch.float64)
    torch.testing.assert_close(gmd(gramian), expected, rtol=1e-15, atol=0)


# --- pcgrad ---------------------------------------------------------------------------------------


@given(jacobians_with_orders())
def test_pcgrad_equals_the_pairwise_loop(case: tuple[Tensor, Tensor]) -> None:
    jacobian, order = case
    assert_close(merged(with_order(order), jacobian), pcgrad_loop(jacobian, order), jacobian)


@given(jacobians_with_orders())
def test_pcgrad_without_conflict_gives_ones(case: tuple[Tensor, Tensor]) -> None:
    jacobian, order = case
    assert_ones_without_conflict(with_order(order), jacobian)


@given(jacobians_with_orders())
def test_pcgrad_weights_are_at_least_one(case: tuple[Tensor, Tensor]) -> None:
    jacobian, order = case
    assert_at_least_one(with_order(order), jacobian)


@given(jacobians_with_orders())
def test_pcgrad_gives_zero_rows_weight_one(case: tuple[Tensor, Tensor]) -> None:
    jacobian, order = case
    assert_zero_rows_have_weight_one(with_order(order), jacobian)


@given(jacobians_with_orders(), st.sampled_from([-1.0, 0.5, -4.0, 3.0, 1e-3, -700.0]))
def test_pcgrad_ignores_a_common_scale(case: tuple[Tensor, Tensor], factor: float) -> None:
    jacobian, order = case
    assert_common_scale_is_irrelevant(with_order(order), jacobian, factor)


@given(jacobians_with_orders(2, 2))
def test_pcgrad_leaves_no_conflict_between_two_rows(case: tuple[Tensor, Tensor]) -> None:
    jacobian, order = case
    assert_no_conflict_left_between_two(with_order(order), jacobian)


@given(jacobians_with_orders(2, 2))
def test_pcgrad_equals_gmd_on_two_rows(case: tuple[Tensor, Tensor]) -> None:
    jacobian, order = case
    assert_close(merged(with_order(order), jacobian), merged(gmd, jacobian), jacobian)


@given(jacobians_with_orders(), st.data())
def test_pcgrad_projected_rows_are_those_of_the_loop(
    case: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    """Hence a projected row depends on nobody else's order and scales with its own row."""
    jacobian, order = case
    i = data.draw(st.integers(0, len(jacobian) - 1))
    assert_close(projected_row(jacobian, order, i), pcgrad_rows(jacobian, order)[i], 4 * jacobian)


@given(jacobians_with_orders(), st.data())
def test_pcgrad_projected_row_never_grows(case: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    jacobian, order = case
    i = data.draw(st.integers(0, len(jacobian) - 1))
    length = float(projected_row(jacobian, order, i).norm())
    assert length <= float(jacobian[i].norm()) + 4 * PRECISION * largest_norm(jacobian)


@given(jacobians_with_orders(2), st.data())
def test_pcgrad_projected_row_does_not_conflict_with_the_last_it_met(
    case: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    jacobian, order = case
    i = data.draw(st.integers(0, len(jacobian) - 1))
    last = jacobian[[j for j in order[i].tolist() if j != i][-1]]
    slack = 4 * PRECISION * largest_norm(jacobian) * float(last.norm())
    assert float(projected_row(jacobian, order, i) @ last) >= -slack


@given(jacobians_with_orders(2), st.data())
def test_pcgrad_skips_the_row_itself_wherever_it_stands(
    case: tuple[Tensor, Tensor], data: st.DataObject
) -> None:
    jacobian, order = case
    moved = []
    for i, row in enumerate(order.tolist()):
        row.remove(i)
        row.insert(data.draw(st.integers(0, len(row))), i)
        moved.append(row)
    gramian = gramian_of(jacobian)
    assert torch.equal(pcgrad(gramian, order), pcgrad(gramian, torch.tensor(moved)))


def test_pcgrad_skips_the_row_itself_where_that_matters() -> None:
    """After two projections the first row points against its former self; nothing happens."""
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -2.0]], dtype=torch.float64)
    order = torch.tensor([[1, 2, 0], [1, 0, 2], [2, 0, 1]])
    row = pcgrad_rows(jacobian, order)[0]
    assert float(row @ jacobian[0]) < -1e-3, "the example lost its point"
    assert_close(projected_row(jacobian, order, 0), row, jacobian)


def test_pcgrad_depends_on_the_order() -> None:
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -2.0]], dtype=torch.float64)
    one = merged(with_order(torch.tensor([[0, 1, 2]] * 3)), jacobian)
    other = merged(with_order(torch.tensor([[2, 1, 0]] * 3)), jacobian)
    assert float((one - other).abs().max()) > 1e-3


@given(jacobians_with_orders())
def test_pcgrad_is_pure(case: tuple[Tensor, Tensor]) -> None:
    jacobian, order = case
    before = order.clone()
    assert_is_pure(with_order(order), gramian_of(jacobian))
    assert torch.equal(order, before)


@given(st.integers(1, 4), st.data())
def test_pcgrad_batched_equals_mapped(m: int, data: st.DataObject) -> None:
    stack = [data.draw(jacobians(m, m)) for _ in range(4)]
    order = torch.stack([data.draw(orders(m)) for _ in range(4)])
    gramians = torch.stack([gramian_of(j) for j in stack])
    weights = pcgrad(gramians, order)
    assert weights.shape == (4, m)
    assert torch.equal(
        pcgrad(gramians.view(2, 2, m, m), order.view(2, 2, m, m)), weights.view(2, 2, m)
    )
    for jacobian, own_order, one in zip(stack, order, weights, strict=True):
        assert_same_weights(one, pcgrad(gramian_of(jacobian), own_order), jacobian)


def test_pcgrad_draws_no_random_numbers() -> None:
    state = torch.random.get_rng_state()
    pcgrad(torch.eye(3, dtype=torch.float64), torch.tensor([[0, 1, 2]] * 3))
    assert torch.equal(torch.random.get_rng_state(), state)


# --- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rules_keep_the_dtype(dtype: torch.dtype) -> None:
    gramian = torch.tensor([[1.0, -0.5], [-0.5, 2.0]], dtype=dtype)
    assert gmd(gramian).dtype == dtype
    assert pcgrad(gramian, torch.tensor([[0, 1], [1, 0]])).dtype == dtype


@pytest.mark.parametrize("at", [(0, 0), (0, 1), (1, 2), (2, 2)])
def test_rules_keep_nan(at: tuple[int, int]) -> None:
    """A NaN in the Gramian reaches the weight of a row it belongs to: it is not compared away."""
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -2.0]], dtype=torch.float64)
    gramian = gramian_of(jacobian)
    gramian[at] = gramian[at[::-1]] = float("nan")
    assert gmd(gramian)[list(at)].isnan().any()
    assert pcgrad(gramian, torch.tensor([[0, 1, 2]] * 3)).isnan().any()


# --- peers ----------------------------------------------------------------------------------------


def through_optimizer(rule: Rule | str, jacobian: Tensor) -> Tensor:
    """The merged gradient of a Jacobian, by way of losses, ``backward`` and ``.grad``."""
    p = nn.Parameter(torch.zeros(jacobian.shape[1], dtype=torch.float64))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=1.0), rule=rule, reduction="sum")
    opt.backward(linear_losses([p], [[row] for row in jacobian]))
    assert p.grad is not None
    return p.grad


@pytest.mark.parametrize(
    "name", ["UPGrad", "DualProj", "MGDA", "IMTLG", "AlignedMTL", "PCGrad", "Mean", "Sum"]
)
@pytest.mark.parametrize("seed", range(3))
def test_torchjd_weightings_plug_in_as_rules(name: str, seed: int) -> None:
    """torchjd's weighting as our rule gives what torchjd's aggregator gives on the Jacobian."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    m = 2 if name == "PCGrad" else 4  # torchjd's PCGrad draws its order; on two rows there is none
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(m, 10, generator=generator, dtype=torch.float64) + 0.1
    try:
        weighting = getattr(aggregation, name + "Weighting")()
        aggregator = getattr(aggregation, name)()
    except ImportError as missing:
        pytest.skip(str(missing))
    expected = aggregator(jacobian)
    torch.testing.assert_close(
        through_optimizer(weighting, jacobian), expected, rtol=1e-6, atol=1e-6
    )


def test_torchjd_pcgrad_is_pcgrad_in_some_order() -> None:
    """Three rows, two orders each: what torchjd draws is one of the eight, not always the same."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    jacobian = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -2.0]], dtype=torch.float64)
    ways = [[(1, 2, 0), (2, 1, 0)], [(0, 2, 1), (2, 0, 1)], [(0, 1, 2), (1, 0, 2)]]
    ours = [pcgrad(gramian_of(jacobian), torch.tensor(order)) for order in itertools.product(*ways)]
    weighting = aggregation.PCGradWeighting()
    seen = set()
    for seed in range(24):
        torch.manual_seed(seed)
        theirs = weighting(gramian_of(jacobian))
        matches = [i for i, w in enumerate(ours) if torch.allclose(w, theirs, rtol=1e-12)]
        assert matches, f"torchjd's {theirs} is none of ours"
        seen.update(matches)
    assert len(seen) > 1
