"""``LossBalance``: constant weights, against norms and loops written by hand in float64."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradsplit import CombinationSampler, LossBalance, modality_combinations
from tests.core.cases import optimizer_of
from tests.reference import grads, linear_losses, same, towers

NAMES = ("a", "b", "a+b")
DONE = {"a": 3.0, "b": 4.0, "a+b": 12.0}  # the norms that ``frozen`` balances


def by_norms(norms: Mapping[str, float]) -> dict[str, float]:
    """w_k = c / ||g_k||, of mean one."""
    c = len(norms) / math.fsum(1 / norm for norm in norms.values())
    return {name: c / norm for name, norm in norms.items()}


def row(norm: float, turn: float = 1.0) -> Tensor:
    """In R^6, of that norm, in a direction of its own."""
    direction = torch.arange(1.0, 7.0, dtype=torch.float64).mul(turn).cos()
    return direction * (norm / direction.norm())


class Lines:
    """One parameter, an optimizer, and losses with the gradients that are asked for."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.p = nn.Parameter(torch.ones(6, dtype=dtype))
        self.opt = optimizer_of([self.p])

    def losses(self, rows: Mapping[Any, Tensor | None]) -> dict[Any, Any]:
        return {n: g if g is None else linear_losses([self.p], [[g]])[0] for n, g in rows.items()}

    def measure(self, balance: LossBalance, rows: Mapping[Any, Tensor | None]) -> None:
        self.opt.zero_grad()
        balance.update(self.opt.backward(balance(self.losses(rows))))


def frozen(norms: Mapping[Any, float] = DONE) -> LossBalance:
    balance = LossBalance(steps=1)
    Lines().measure(balance, {n: row(norm, norm) for n, norm in norms.items()})
    return balance


def used(balance: LossBalance, names: Any = NAMES) -> dict[str, float]:
    """The weights that losses are multiplied by."""
    return {n: balance.weights.get(n, 1.0) for n in names}


some_rows = st.builds(lambda e, turn: row(10.0**e, turn), st.floats(-5, 5), st.floats(0.1, 3.0))


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_weights_are_inverse_norms_of_mean_one_then_constant(
    steps: int, m: int, data: st.DataObject
) -> None:
    names = ["a", "b", "a+b", "c"][:m]
    table = {n: data.draw(st.lists(some_rows, min_size=steps, max_size=steps)) for n in names}
    balance, lines = LossBalance(steps=steps), Lines()
    for step in range(steps):
        assert not balance.frozen and set(balance.weights.values()) <= {1.0}
        lines.measure(balance, {n: rows[step] for n, rows in table.items()})
    weights = balance.weights
    rms = {n: float(torch.stack(g).square().sum(1).mean().sqrt()) for n, g in table.items()}
    assert weights == pytest.approx(by_norms(rms), rel=1e-9)
    for _ in range(2):
        lines.measure(balance, {n: data.draw(some_rows) for n in names})
        assert balance.weights == weights and balance.frozen


@pytest.mark.parametrize("scope", ["shared", "all"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_training_is_a_plain_loop_with_constant_weights(scope: str, reduction: str) -> None:
    """The oracle takes its norms on the scope from autograd, and sums by itself."""
    ours, plain, balance = towers(), towers(), LossBalance(steps=3)
    opt = optimizer_of(ours.parameters(), rule="sum", scope=scope, reduction=reduction)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    squares, weights = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 1.0)
    inside = [scope == "all" or n.startswith("trunk") for n, _ in plain.named_parameters()]
    for step in range(8):
        opt.zero_grad()
        balance.update(opt.backward(balance(ours.losses(step))))
        opt.step()
        for name, gs in zip(NAMES, plain.rows(step), strict=True):
            chosen = [g for g, there in zip(gs, inside, strict=True) if there and g is not None]
            squares[name] += sum(float(g.square().sum()) for g in chosen)
        sgd.zero_grad()
        total = sum(weights[n] * loss for n, loss in plain.losses(step).items())
        (total / (3 if reduction == "mean" else 1)).backward()
        sgd.step()
        if step == 2:
            weights = by_norms({n: math.sqrt(s / 3) for n, s in squares.items()})
    assert max(weights.values()) > 1.2
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"rule": "sum", "reduction": "sum"}], ids=str)
def test_joint_and_before_freezing_not_a_bit_differs(options: Any, dtype: torch.dtype) -> None:
    """From training without it; then from ``backward``. Under no_grad it is the same number."""
    (ours, plain), balance = (towers(dtype), towers(dtype)), LossBalance()
    opt, other = (optimizer_of(model.parameters(), **options) for model in (ours, plain))
    for step in range(22):
        opt.zero_grad(), other.zero_grad()
        losses = plain.losses(step)
        other.backward(balance(losses) if step >= 20 else losses)
        joint = opt.joint(balance(ours.losses(step)))
        with torch.no_grad():
            assert torch.equal(joint.detach(), opt.joint(balance(ours.losses(step))))
        value = sum(float(losses[n].detach()) * w for n, w in used(balance).items())
        assert float(joint) == pytest.approx(value / (1 if options else 3), rel=1e-2)
        joint.backward()
        balance.update(opt.last)
        assert same(grads(ours), grads(plain)) and balance.frozen == (step >= 19)
        opt.step(), other.step()


def test_once_frozen_one_backward_of_the_sum_is_enough() -> None:
    ours, plain, balance = towers(), towers(), frozen()
    optimizer_of(ours.parameters(), rule="sum", reduction="sum").backward(balance(ours.losses()))
    sum(balance(plain.losses()).values()).backward()
    for mine, other in zip(grads(ours), grads(plain), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


HANDED: dict[str, Callable[[list[Any]], Any]] = {
    "strings": lambda values: dict(zip(NAMES, values, strict=True)),
    "tuples": lambda values: dict(zip([("a",), "b", ("a", "b")], values, strict=True)),
    "list": list,
    "tuple": tuple,
}


@pytest.mark.parametrize("closures", [False, True])
@pytest.mark.parametrize("handed", HANDED)
def test_each_loss_is_multiplied_in_its_place(handed: str, closures: bool) -> None:
    """Closures by what they return, when they are called; None stays None."""
    names = NAMES if handed in ("strings", "tuples") else "012"
    balance = frozen(dict(zip(names, DONE.values(), strict=True)))
    p, called = nn.Parameter(torch.ones(2)), []
    plain = [(p * 2).sum(), None, (p * 5).sum()]
    functions = [lambda loss=loss: called.append(loss) or loss for loss in plain]
    losses = HANDED[handed](functions if closures else plain)
    weighted = balance(losses)
    assert type(weighted) is type(losses) and not called
    values = weighted
    if isinstance(losses, dict):
        assert list(weighted) == list(losses)
        values = weighted.values()
    first, none, last = (value() if closures else value for value in values)
    assert none is None and len(called) == 3 * closures
    w = by_norms(DONE)
    assert torch.autograd.grad(first, p)[0].tolist() == pytest.approx([2 * w["a"]] * 2)
    assert torch.autograd.grad(last, p)[0].tolist() == pytest.approx([5 * w["a+b"]] * 2)


@given(st.integers(0, 200), st.integers(1, 3))
def test_sampled_combinations_and_latecomers(seed: int, steps: int) -> None:
    """Who comes after the weights are fixed gets c / ||g||, by measurements of its own."""
    norms = {c: 1.5**i for i, c in enumerate(modality_combinations(("x", "y", "z")))}
    rows = {c: row(norm, norm) for c, norm in norms.items()}
    sampler = CombinationSampler(("x", "y", "z"), k=3, seed=seed)
    balance, lines = LossBalance(steps=steps), Lines()
    count: dict[Any, int] = {}
    c, fixed = None, {}
    for _ in range(10 * steps):
        drawn = sampler()
        report = lines.opt.backward(balance(lines.losses({n: rows[n] for n in drawn})))
        balance.update(report)
        for name in drawn:
            count[name] = count.get(name, 0) + 1
        if c is None and min(count.values()) >= steps:
            c = len(count) / math.fsum(1 / norms[n] for n in count)
        if c is not None:
            fixed = {n: c / norms[n] for n in count if count[n] >= steps}
        assert balance.frozen == (c is not None)
        weights = {"+".join(n): fixed.get(n, 1.0) for n in count}
        assert used(balance, weights) == pytest.approx(weights, rel=1e-9)


@given(st.lists(st.sampled_from(["a", "b", "ab", "inf"]), max_size=8), st.sampled_from("ab"))
def test_weights_depend_on_the_reports_alone(kinds: list[str], lacks: str) -> None:
    """As on a rank that has None for a loss that others have."""
    whole, part, lines = LossBalance(steps=2), LossBalance(steps=2), Lines()
    for kind in kinds:
        rows = {n: row(math.inf if kind == "inf" else ord(n)) for n in kind if n in "ab"}
        part({n: None if n == lacks else (lambda: None) for n in "ab"})
        report = lines.opt.backward(whole(lines.losses(rows or {"a": row(math.inf)})))
        whole.update(report), part.update(report)
        assert whole.frozen == part.frozen and used(whole, "ab") == used(part, "ab")


@pytest.mark.parametrize("never", [None, lambda: None], ids=["None", "a closure of None"])
def test_a_loss_that_never_comes_keeps_nobody_waiting_nor_warns(never: Any) -> None:
    balance, lines = LossBalance(steps=2), Lines()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(30):
            losses = {**lines.losses({"a": row(3.0), "b": row(5.0, 2)}), "c": never}
            balance.update(lines.opt.backward(balance(losses)))
            assert balance.frozen == (step >= 1)
    assert used(balance, "ab") == pytest.approx(by_norms({"a": 3, "b": 5}))


def test_a_window_is_one_measurement_of_mean_rows() -> None:
    balance, lines = LossBalance(steps=2), Lines()
    batches = [{"a": row(3.0), "b": row(7.0, 2)}, {"a": row(5.0, 2), "b": None}, {"a": row(1.0, 3)}]
    for _ in range(2):
        assert not balance.frozen
        for batch in batches[:2]:
            lines.opt.accumulate(balance(lines.losses(batch)))
        balance.update(lines.opt.backward(balance(lines.losses(batches[2]))))
    a = sum(batch["a"] for batch in batches) / 3
    assert balance.weights == pytest.approx(by_norms({"a": float(a.norm()), "b": 7.0}))


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("spoilt", [(), (0,), (1, 2)])
def test_grad_scaler(spoilt: tuple[int, ...], told: bool) -> None:
    """Ratios are those without it; a step with inf counts for nobody. Told of the scale, all is."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    balance, alone, lines = LossBalance(steps=2), LossBalance(steps=2), Lines(torch.float32)
    names = ["a", "b", "late"] if told else ["a", "b"]
    for step in range(9):
        # of mean Gramians that mix scales, ratios are right where the gradients are constant
        rows = {"a": row(3.0 + step * told), "b": row(11.0, 2.0)}
        if step > 5:
            rows["late"] = row(5.0, 3.0)
        if step in spoilt:
            rows["b"] = rows["b"] * math.inf
        else:
            Lines().measure(alone, rows)
        lines.opt.zero_grad()
        scaled = {n: scaler.scale(x) for n, x in balance(lines.losses(rows)).items()}
        report = lines.opt.backward(scaled)
        balance.update(report, **({"scale": scaler.get_scale()} if told else {}))
        scaler.step(lines.opt)
        scaler.update()
        assert balance.frozen == alone.frozen
        assert used(balance, names) == pytest.approx(used(alone, names), rel=1e-5)
    assert alone.frozen and scaler.get_scale() == 2.0 ** (10 - len(spoilt))


@pytest.mark.parametrize("zeros", [["a"], ["a", "b"], ["late"], ["a", "b", "c"]], ids=str)
def test_a_gradient_that_is_always_zero_spoils_no_other_weight(zeros: list[str]) -> None:
    balance, lines = LossBalance(steps=2), Lines()
    for step in range(6):
        norms = {"a": 3.0, "b": 5.0, "c": 7.0, **({"late": 2.0} if step >= 3 else {})}
        lines.measure(balance, {n: row(0.0 if n in zeros else v, v) for n, v in norms.items()})
        assert lines.p.grad.isfinite().all()
    assert all(balance.weights[n] == 1.0 for n in zeros) and balance.frozen
    assert math.fsum(balance.weights[n] for n in "abc") == pytest.approx(3.0)
    products = [balance.weights[n] * norm for n, norm in norms.items() if n not in zeros]
    assert products == pytest.approx([products[0]] * len(products))


@pytest.mark.parametrize("cut", range(12))
def test_resumes_at_any_step_bit_for_bit(cut: int) -> None:
    """Zeros, a step with inf and a latecomer included; the state does not move on by itself."""
    balance, resumed, lines = LossBalance(steps=4), LossBalance(steps=4), Lines()

    def rows(step: int) -> dict[Any, Tensor]:
        c = row(math.inf if step == 2 else 3.0 + step, 2.0)
        late = {"late": row(1.3**step, 3.0)} if step > 6 else {}
        return {"a": row(1.1**step), ("a", "b"): row(0.0), "c": c, **late}

    for step in range(12):
        if step == cut:
            state = balance.state_dict()
        lines.measure(balance, rows(step))
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert same(loaded, state) and json.loads(json.dumps(state, allow_nan=False)) == state
    resumed.load_state_dict(loaded)
    assert same(resumed.state_dict(), state)
    for step in range(cut, 12):
        lines.measure(resumed, rows(step))
    assert len(balance.weights) == 4 and same(resumed.weights, balance.weights)
    assert same(resumed.state_dict(), balance.state_dict())


P = nn.Parameter(torch.ones(2))
REPORT = optimizer_of([P]).backward({"a": P.sum(), "b": P[0] * 1})
ERRORS: dict[str, tuple[Callable[[LossBalance], object], type[Exception], str]] = {
    **{f"steps={n!r}": (lambda _, n=n: LossBalance(n), ValueError, "steps") for n in (0, -1)},
    **{f"steps={n!r}": (lambda _, n=n: LossBalance(n), TypeError, "steps") for n in (1.5, True)},
    "a tensor": (lambda b: b(P.sum()), TypeError, "losses"),
    "a number": (lambda b: b({"a": P.sum(), "b": 3.0}), TypeError, "loss 2 of 2"),
    "no report": (lambda b: b.update(None), TypeError, "report"),
    **{
        f"scale={s}": (lambda b, s=s: b.update(REPORT, scale=s), ValueError, "scale")
        for s in (0.0, -2.0, math.inf, math.nan)
    },
    "scale='1'": (lambda b: b.update(REPORT, scale="1"), TypeError, "scale"),
    "no state": (lambda b: b.load_state_dict({}), ValueError, "state_dict"),
    "half a state": (lambda b: b.load_state_dict({"weights": {}}), ValueError, "state_dict"),
    "a list": (lambda b: b.load_state_dict([]), ValueError, "state_dict"),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("updates", [1, 2])
def test_an_error_names_the_argument_and_changes_nothing(error: str, updates: int) -> None:
    balance = LossBalance(steps=2)
    for _ in range(updates):
        balance.update(REPORT)
    before = balance.state_dict(), balance.weights
    call, kind, match = ERRORS[error]
    with pytest.raises((TypeError, ValueError, KeyError)) as caught:
        call(balance)
    assert same((balance.state_dict(), balance.weights), before), "something changed"
    assert isinstance(caught.value, kind) and match in str(caught.value), repr(caught.value)


@pytest.mark.parametrize("measured", ["nothing", "the other", "inf", "all"])
def test_a_loss_that_is_weighed_and_never_measured_warns_once(measured: str) -> None:
    balance, lines = LossBalance(steps=2), Lines()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in range(1, 50):
            b = row(math.inf if measured == "inf" else 2.0, 2)
            losses = balance(lines.losses({"a": row(1.0), "b": b}))
            if measured != "nothing":
                losses = {"a": losses["a"]} if measured == "the other" else losses
                balance.update(lines.opt.backward(losses))
            assert not caught or (call >= 20 and measured != "all")
    assert len(caught) == (measured != "all")
    for warning in caught:
        assert measured != "the other" or "'b'" in str(warning.message)
        assert warning.filename == __file__


def test_nothing_is_read_back_but_by_measuring() -> None:
    """On the meta device values do not exist, so whoever reads one raises."""
    p = nn.Parameter(torch.ones(2, device="meta"))
    opt, balance = optimizer_of([p]), frozen()
    balance.update(opt.backward(balance({n: (p * 2).sum() for n in NAMES})))
    opt.backward(LossBalance(steps=2)({"a": p.sum()}))
