"""The laws of the rules (Gramian -> weights), each a named helper, against the float64 oracle."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradsplit import ModalityDecoupledOptimizer
from gradsplit.rules import draw_order, gmd, pcgrad
from tests.reference import gmd_loop, linear_losses, pcgrad_loop, pcgrad_rows, same
from tests.strategies import jacobians, jacobians_with_orders, orders

THREE = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -2.0]], dtype=torch.float64)
both = pytest.mark.parametrize("name", ["gmd", "pcgrad"])

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


@st.composite
def drawn(draw: st.DrawFn, name: str, min_rows: int = 1, max_rows: int = 5) -> tuple[Rule, Tensor]:
    """The rule of that name, pcgrad in some order, and a Jacobian."""
    jacobian = draw(jacobians(min_rows, max_rows))
    return (gmd if name == "gmd" else with_order(draw(orders(len(jacobian))))), jacobian


# --- laws of both rules ---------------------------------------------------------------------------


def without_conflict_weights_are_ones(rule: Rule, jacobian: Tensor) -> None:
    weights = rule(gramian_of(jacobian.abs()))
    assert torch.equal(weights, torch.ones(len(jacobian), dtype=torch.float64))


def weights_are_at_least_one(rule: Rule, jacobian: Tensor) -> None:
    assert (rule(gramian_of(jacobian)) >= 1).all()


def zero_rows_have_weight_one(rule: Rule, jacobian: Tensor) -> None:
    """Nobody projects onto a zero row, and it divides nothing."""
    weights = rule(gramian_of(jacobian))
    assert weights.isfinite().all()
    assert (weights[jacobian.norm(dim=1) == 0] == 1).all()


def a_common_scale_is_irrelevant(rule: Rule, jacobian: Tensor) -> None:
    for factor in (-1.0, 0.5, -4.0, 3.0, 1e-3, -700.0):
        after = rule(gramian_of(factor * jacobian))
        assert_same_weights(rule(gramian_of(jacobian)), after, jacobian)


def two_rows_are_left_without_conflict(rule: Rule, jacobian: Tensor) -> None:
    result = merged(rule, jacobian[:2])
    for row in jacobian[:2]:
        slack = PRECISION * largest_norm(jacobian[:2]) * float(row.norm())
        assert float(result @ row) >= -slack


def a_rule_is_pure(rule: Rule, jacobian: Tensor) -> None:
    """The input stays as it was, and the same input gives the same weights in the same dtype."""
    gramian = gramian_of(jacobian)
    for dtype in (torch.float64, torch.float32):
        given = gramian.to(dtype)
        before = given.clone()
        first, second = rule(given), rule(given)
        assert torch.equal(given, before)
        assert same(first, second)
        assert first.dtype == dtype and first.device == gramian.device


LAWS = [
    without_conflict_weights_are_ones,
    weights_are_at_least_one,
    zero_rows_have_weight_one,
    a_common_scale_is_irrelevant,
    a_rule_is_pure,
]


@both
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@given(data=st.data())
def test_law(law: Callable[[Rule, Tensor], None], name: str, data: st.DataObject) -> None:
    law(*data.draw(drawn(name)))


@both
@given(data=st.data())
def test_law_of_two_rows(name: str, data: st.DataObject) -> None:
    two_rows_are_left_without_conflict(*data.draw(drawn(name, 2, 2)))


@both
@given(data=st.data())
def test_a_batch_is_mapped(name: str, data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 4))
    stack = [data.draw(jacobians(m, m)) for _ in range(4)]
    order = torch.stack([data.draw(orders(m)) for _ in range(4)])
    gramians = torch.stack([gramian_of(j) for j in stack])

    def rule(gramian: Tensor, order: Tensor) -> Tensor:
        return gmd(gramian) if name == "gmd" else pcgrad(gramian, order)

    weights = rule(gramians, order)
    assert weights.shape == (4, m)
    twice = rule(gramians.view(2, 2, m, m), order.view(2, 2, m, m))
    assert torch.equal(twice, weights.view(2, 2, m))
    for jacobian, own_order, one in zip(stack, order, weights, strict=True):
        assert_same_weights(one, rule(gramian_of(jacobian), own_order), jacobian)


@both
@pytest.mark.parametrize("at", [(0, 0), (0, 1), (1, 2), (2, 2)])
def test_nan_is_kept(name: str, at: tuple[int, int]) -> None:
    """A NaN in the Gramian reaches the weight of a row it belongs to: it is not compared away."""
    gramian = gramian_of(THREE)
    gramian[at] = gramian[at[::-1]] = float("nan")
    if name == "gmd":
        assert gmd(gramian)[list(at)].isnan().any()
    else:
        assert pcgrad(gramian, torch.tensor([[0, 1, 2]] * 3)).isnan().any()


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_wider(name: str, dtype: torch.dtype) -> None:
    gramian = gramian_of(THREE).to(dtype)
    order = torch.tensor([[0, 1, 2]] * 3)
    weights, exact = (
        gmd(g) if name == "gmd" else pcgrad(g, order) for g in (gramian, gramian.double())
    )
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("call", "mention"),
    [
        (lambda: gmd([[1.0]]), "gramian must be a floating-point tensor, got list"),
        (lambda: gmd(torch.eye(2, dtype=torch.long)), "floating-point tensor, got torch.int64"),
        (lambda: gmd(torch.ones(3)), r"shape \(..., m, m\), got \(3,\)"),
        (lambda: gmd(torch.ones(2, 3)), r"shape \(..., m, m\), got \(2, 3\)"),
        (lambda: pcgrad(torch.eye(2), torch.eye(2)), "LongTensor, got torch.float32.*long"),
        (lambda: pcgrad(torch.eye(2), [[0, 1], [0, 1]]), "LongTensor, got list"),
        (lambda: pcgrad(torch.eye(3), torch.tensor([[0, 1]] * 2)), r"got \(2, 2\)"),
        (lambda: pcgrad(torch.eye(2), torch.tensor([0, 1])), r"got \(2,\)"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Tensor], mention: str) -> None:
    with pytest.raises((TypeError, ValueError), match=mention):
        call()


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


def test_gmd_by_hand() -> None:
    """g1 = (1, 0) and g2 = (-3, 4): K = [[1, -3], [-3, 25]], so w = (1 + 3, 1 + 3/25)."""
    gramian = torch.tensor([[1.0, -3.0], [-3.0, 25.0]], dtype=torch.float64)
    expected = torch.tensor([4.0, 1.12], dtype=torch.float64)
    torch.testing.assert_close(gmd(gramian), expected, rtol=1e-15, atol=0)


# --- pcgrad ---------------------------------------------------------------------------------------


def projected_row(jacobian: Tensor, order: Tensor, i: int) -> Tensor:
    """Row i after projection, seen from outside: doubling row i adds it to the merged gradient."""
    doubled = jacobian.clone()
    doubled[i] *= 2
    return merged(with_order(order), doubled) - merged(with_order(order), jacobian)


@given(jacobians_with_orders())
def test_pcgrad_equals_the_pairwise_loop(case: tuple[Tensor, Tensor]) -> None:
    jacobian, order = case
    assert_close(merged(with_order(order), jacobian), pcgrad_loop(jacobian, order), jacobian)


@given(jacobians_with_orders(2, 2))
def test_pcgrad_equals_gmd_on_two_rows(case: tuple[Tensor, Tensor]) -> None:
    jacobian, order = case
    assert_close(merged(with_order(order), jacobian), merged(gmd, jacobian), jacobian)


@given(jacobians_with_orders(), st.data())
def test_pcgrad_projected_rows(case: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    """Those of the loop, so that nobody else's order matters; never grown; at peace with the last.

    The last row that it met, that is: not with those that it met before.
    """
    jacobian, order = case
    i = data.draw(st.integers(0, len(jacobian) - 1))
    row = projected_row(jacobian, order, i)
    assert_close(row, pcgrad_rows(jacobian, order)[i], 4 * jacobian)
    slack = 4 * PRECISION * largest_norm(jacobian)
    assert float(row.norm()) <= float(jacobian[i].norm()) + slack
    met = [j for j in order[i].tolist() if j != i]
    if met:
        last = jacobian[met[-1]]
        assert float(row @ last) >= -slack * float(last.norm())


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
    order = torch.tensor([[1, 2, 0], [1, 0, 2], [2, 0, 1]])
    row = pcgrad_rows(THREE, order)[0]
    assert float(row @ THREE[0]) < -1e-3, "the example lost its point"
    assert_close(projected_row(THREE, order, 0), row, THREE)


def test_pcgrad_depends_on_the_order_and_leaves_it_alone() -> None:
    results = []
    for order in (torch.tensor([[0, 1, 2]] * 3), torch.tensor([[2, 1, 0]] * 3)):
        before = order.clone()
        results.append(merged(with_order(order), THREE))
        assert torch.equal(order, before)
    assert float((results[0] - results[1]).abs().max()) > 1e-3


# --- the order that pcgrad draws ------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(-(2**70), 2**70), st.integers(0, 2**40))
def test_an_order_is_a_permutation_for_each_row(m: int, seed: int, step: int) -> None:
    order = draw_order(m, seed, step)
    assert order.dtype == torch.long
    assert order.sort(dim=-1).values.tolist() == [list(range(m))] * m
    assert torch.equal(order, draw_order(m, seed, step)), "seed and step decide"


def test_orders_are_equally_likely_and_independent() -> None:
    """Chi-squared over the 36 pairs of orders of two rows of three; over steps and over seeds."""
    for along in ("step", "seed"):
        draws = 3600
        pairs = ((0, n) if along == "step" else (n, 0) for n in range(draws))
        orders = [draw_order(3, seed, step)[:2].tolist() for seed, step in pairs]
        counts = Counter(str(order) for order in orders)
        statistic = sum((count - 100) ** 2 / 100 for count in counts.values())
        assert len(counts) == 36 and statistic < 67  # p < 0.001, 35 degrees of freedom


def test_steps_of_one_seed_are_not_those_of_the_next() -> None:
    """(seed, step) and (seed + 1, step - 1) would share a sum."""
    orders = {str(draw_order(6, seed, step).tolist()) for seed in range(8) for step in range(8)}
    assert len(orders) == 64


def test_drawing_and_meeting_leave_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    pcgrad(torch.eye(3, dtype=torch.float64), draw_order(3, 0, 0))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_order_is_the_same_on_every_device() -> None:
    for step in range(5):
        on_gpu = draw_order(7, 3, step, torch.device("cuda"))
        assert torch.equal(on_gpu.cpu(), draw_order(7, 3, step))


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
    ways = [[(1, 2, 0), (2, 1, 0)], [(0, 2, 1), (2, 0, 1)], [(0, 1, 2), (1, 0, 2)]]
    ours = [pcgrad(gramian_of(THREE), torch.tensor(order)) for order in itertools.product(*ways)]
    weighting = aggregation.PCGradWeighting()
    seen = set()
    for seed in range(24):
        torch.manual_seed(seed)
        theirs = weighting(gramian_of(THREE))
        matches = [i for i, w in enumerate(ours) if torch.allclose(w, theirs, rtol=1e-12)]
        assert matches, f"torchjd's {theirs} is none of ours"
        seen.update(matches)
    assert len(seen) > 1


AGGREGATORS: dict[str, Callable[[Any], Any]] = {
    "UPGrad": lambda a: a.UPGrad(),
    "NashMTL": lambda a: a.NashMTL(2),
    "Mean": lambda a: a.Mean(),
    "PCGrad": lambda a: a.PCGrad(),
    "Krum": lambda a: a.Krum(1),
    "ConFIG": lambda a: a.ConFIG(),
    "GramianWeightedAggregator": lambda a: a.GramianWeightedAggregator(a.UPGradWeighting()),
    "a subclass": lambda a: type("Mine", (a.UPGrad,), {})(),
}


@pytest.mark.parametrize("kind", AGGREGATORS)
def test_torchjd_aggregators_are_refused_and_their_weighting_is_named(kind: str) -> None:
    """An aggregator maps a Jacobian to a vector: as a rule it would give nonsense or NaN."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    try:
        aggregator = AGGREGATORS[kind](aggregation)
    except ImportError as missing:
        pytest.skip(str(missing))
    base = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)
    with pytest.raises(TypeError, match="rule is an aggregator of TorchJD") as caught:
        ModalityDecoupledOptimizer(base, rule=aggregator)
    named = re.findall(r"\b\w+Weighting\b", str(caught.value))
    for name in named:
        assert hasattr(aggregation, name), f"there is no {name}"
    if kind == "ConFIG":
        assert not named, "it has none"
    else:
        expected = "UPGrad" if kind in ("GramianWeightedAggregator", "a subclass") else kind
        assert f"{expected}Weighting" in named


STATEFUL: dict[str, Callable[[Any], Any]] = {
    "GradVac": lambda a: a.GradVacWeighting(),
    "PCD": lambda a: a.PCDWeighting(),
    "CRMOGM": lambda a: a.CRMOGMWeighting(a.PCGradWeighting()),
}


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("kind", STATEFUL)
def test_what_a_stateful_weighting_remembers(kind: str, how: str) -> None:
    """Copies keep it; the ``state_dict`` of the optimizer does not, nor does that of TorchJD."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    if not hasattr(aggregation, f"{kind}Weighting"):
        pytest.skip("an older torchjd")
    make = STATEFUL[kind]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(6)]

    def fresh() -> ModalityDecoupledOptimizer:
        p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        base = torch.optim.SGD([p], lr=1.0)
        return ModalityDecoupledOptimizer(base, rule=make(aggregation))

    def go(opt: ModalityDecoupledOptimizer, jacobians: list[Tensor]) -> Tensor:
        (p,) = opt.param_groups[0]["params"]
        torch.manual_seed(0)  # some draw an order
        for jacobian in jacobians:
            opt.step(linear_losses([p], [[row] for row in jacobian]))
        return p.detach()

    assert make(aggregation).state_dict() == {}
    opt = fresh()
    reached = go(opt, rows[:3]).clone()
    if how == "state_dict":
        twin = fresh()
        twin.load_state_dict(opt.state_dict())
        twin.param_groups[0]["params"][0].data.copy_(reached)
    else:
        twin = copy.deepcopy(opt) if how == "deepcopy" else pickle.loads(pickle.dumps(opt))
    assert torch.equal(go(twin, rows[3:]), go(opt, rows[3:])) == (how != "state_dict")
