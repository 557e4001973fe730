"""Bad input: what was wrong is named, nothing is touched, and the next good call works."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from gradsplit import ModalityDecoupledOptimizer
from gradsplit.rules import pcgrad
from tests.reference import Row, Snapshot, TwoTowers, decouple, grads, sum_rows, towers

METHODS = ["backward", "accumulate", "step"]
BAD = (ValueError, TypeError)


class Training:
    """A model in mid-training: it has gradients, optimizer state and a leaf outside."""

    def __init__(self, **options: Any) -> None:
        self.model = towers()
        self.outside = nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.elsewhere = nn.Parameter(torch.ones(1, dtype=torch.float64))  # its .grad is None
        self.opt = ModalityDecoupledOptimizer(AdamW(self.model.parameters(), lr=1e-2), **options)
        self.opt.step(self.losses())
        self.opt.zero_grad()
        self.opt.backward(self.losses(1))
        self.elsewhere.grad = None
        next(self.model.a.parameters()).grad = None
        self.snapshot = self.shot()

    def losses(self, seed: int = 0) -> dict[str, Tensor]:
        leaves = self.outside * self.elsewhere
        return {name: loss + leaves.sum() for name, loss in self.model.losses(seed).items()}

    def shot(self) -> Snapshot:
        return Snapshot(self.opt, [self.outside, self.elsewhere])

    def assert_intact(self) -> None:
        """Everything as it was before the bad call; then a good one does what it should."""
        self.snapshot.assert_unchanged()
        self.assert_works([self.model.rows()])

    def assert_works(self, micro_batches: list[list[Row]]) -> None:
        """One good ``backward`` merges these micro-batches, the last of which is ``losses()``."""
        rows = sum_rows(*micro_batches)
        for p in self.model.parameters():
            p.grad = None  # and not zero_grad, which would drop pending rows
        self.opt.backward(self.losses())
        for ours, theirs in zip(grads(self.model), decouple(rows), strict=True):
            assert ours is not None and theirs is not None
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
        self.opt.step()


def refuse(
    training: Training, method: str, losses: Any, *mentions: str, of: Any = BAD
) -> pytest.ExceptionInfo[BaseException]:
    """The call raises, and its message mentions every one of the patterns."""
    with pytest.raises(of) as caught:
        getattr(training.opt, method)(losses)
    for pattern in mentions:
        assert re.search(pattern, str(caught.value)), f"{caught.value} does not say {pattern!r}"
    return caught


def other_model_loss() -> Tensor:
    return towers(seed=1).losses()["a"]


# --- losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("losses", [{}, [], ()], ids=["mapping", "list", "tuple"])
def test_no_losses(method: str, losses: Any) -> None:
    training = Training()
    refuse(training, method, losses, "losses")
    training.assert_intact()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "losses",
    [{"a": None, "b": None}, [None], {"a": lambda: None}, [None, lambda: None]],
    ids=["mapping", "sequence", "closure", "mixed"],
)
def test_all_unavailable(method: str, losses: Any) -> None:
    training = Training()
    refuse(training, method, losses, "losses", of=ValueError)
    training.assert_intact()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "losses",
    [torch.ones(()), 3.0, {1.0, 2.0}, "ab", b"ab", iter([])],
    ids=lambda x: type(x).__name__,
)
def test_neither_a_mapping_nor_a_sequence(method: str, losses: Any) -> None:
    training = Training()
    refuse(training, method, losses, "losses|closure", of=TypeError)
    training.assert_intact()


def test_a_bare_loss() -> None:
    """What ``loss.backward()`` would invite: one tensor, not in a mapping or sequence."""
    training = Training()
    for method in METHODS:
        refuse(training, method, training.losses()["a"], "losses|closure", of=TypeError)
    training.assert_intact()


BadLoss = Callable[[TwoTowers], Any]

BAD_LOSSES: dict[str, tuple[BadLoss, str]] = {
    "not scalar": (lambda m: m.losses()["a"] * torch.ones(3), r"\(3,\)"),
    "empty": (lambda m: m.losses()["a"] * torch.ones(0), r"\(0,\)"),
    "one by one": (lambda m: m.losses()["a"].view(1, 1), r"\(1, 1\)"),
    "requires no grad": (lambda m: m.losses()["a"].detach(), "grad"),
    "reaches nothing": (lambda m: other_model_loss(), "parameter"),
    "a float": (lambda m: 3.5, "float"),
    "an array": (lambda m: np.ones(()), "ndarray"),
    "a string": (lambda m: "loss", "str"),
    "a list": (lambda m: [m.losses()["a"]], "list"),
    "another device": (lambda m: m.losses()["a"].to("meta"), "meta"),
    "complex": (lambda m: m.losses()["a"] * torch.ones((), dtype=torch.complex128), "complex"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ["mapping", "sequence"])
@pytest.mark.parametrize("kind", list(BAD_LOSSES))
def test_bad_loss(kind: str, shape: str, method: str) -> None:
    """Loss 2 of 4 is bad: the message says which one it is, by place and by name."""
    make, mention = BAD_LOSSES[kind]
    training = Training()
    losses = training.losses()
    entries = {
        "text": losses["a"],
        ("text", "audio"): make(training.model),
        "audio": losses["b"],
        "vision": None,
    }
    name = "text\\+audio" if shape == "mapping" else "1"
    given = entries if shape == "mapping" else list(entries.values())
    refuse(training, method, given, rf"loss 2 of 4 \('{name}'\)", mention)
    training.assert_intact()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", list(BAD_LOSSES))
@pytest.mark.parametrize("place", [0, 1, 2])
def test_closure_returns_a_bad_loss(kind: str, place: int, method: str) -> None:
    """Rows of other closures were taken before it; nothing of them stays."""
    make, mention = BAD_LOSSES[kind]
    if kind == "another device" and place == 0:
        pytest.skip("the first closure's device is the device")
    training = Training()
    entries: dict[str, Callable[[], Any]] = {
        name: lambda n=name: training.losses()[n] for name in ("a", "b", "a+b")
    }
    bad = list(entries)[place]
    entries[bad] = functools.partial(make, training.model)
    refuse(training, method, entries, rf"loss {place + 1} of 3 \('{re.escape(bad)}'\)", mention)
    training.assert_intact()


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_whose_only_gradient_is_none_reaches_nothing(method: str) -> None:
    class NoGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, p: Tensor) -> Tensor:
            return p.sum()

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            return None

    training = Training()
    p = next(training.model.parameters())
    losses = {"a": training.losses()["a"], "b": NoGradient.apply(p)}
    refuse(training, method, losses, r"loss 2 of 2 \('b'\)", "parameter")
    training.assert_intact()


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_of_frozen_parameters_reaches_nothing(method: str) -> None:
    training = Training()
    training.model.a.requires_grad_(False)
    frozen = (training.model.a.weight * training.outside).sum()
    losses = {"a": training.losses()["a"], "b": frozen}
    refuse(training, method, losses, r"loss 2 of 2 \('b'\)", "parameter")
    training.snapshot.assert_unchanged()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keys", [("a+b", ("a", "b")), (1, 2), (("a", 1), "b"), ((), "b")], ids=str)
def test_bad_keys(method: str, keys: tuple[Any, Any]) -> None:
    """Keys are names or tuples of names, and no two mean the same row."""
    training = Training()
    losses = training.losses()
    refuse(training, method, dict(zip(keys, losses.values(), strict=False)), "losses|name|key")
    training.assert_intact()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_losses_on_two_real_devices() -> None:
    training = Training()
    losses = training.losses()
    refuse(training, "backward", {"a": losses["a"], "b": losses["b"].cuda()}, "'b'", "cuda")
    training.assert_intact()


# --- closures -------------------------------------------------------------------------------------


class Unplugged(Exception):
    """An error of the user's own."""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("error", [Unplugged("camera"), KeyboardInterrupt()], ids=["own", "ctrl-c"])
def test_a_closure_that_raises(place: int, method: str, error: BaseException) -> None:
    """The very exception passes through."""
    training = Training()

    def raising() -> Tensor:
        raise error

    entries: dict[str, Callable[[], Tensor]] = {
        name: lambda n=name: training.losses()[n] for name in ("a", "b", "a+b")
    }
    entries[list(entries)[place]] = raising
    caught = refuse(training, method, entries, of=type(error))
    assert caught.value is error
    training.assert_intact()


class _RaisesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise Unplugged("in backward")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("closures", [False, True])
def test_a_backward_that_raises(place: int, method: str, closures: bool) -> None:
    training = Training()
    losses: dict[str, Any] = training.losses()
    bad = list(losses)[place]
    losses[bad] = _RaisesInBackward.apply(losses[bad])
    if closures:
        fresh = {name: lambda n=name: training.losses()[n] for name in losses}
        losses = {**fresh, bad: lambda: _RaisesInBackward.apply(training.losses()[bad])}
    refuse(training, method, losses, "in backward", of=Unplugged)
    training.assert_intact()


def _keeps_loss(training: Training) -> Tensor:
    loss = training.losses()["b"]
    loss.backward()
    return loss


def _retains(training: Training) -> Tensor:
    loss = training.losses()["b"]
    loss.backward(retain_graph=True)
    return loss


def _detaches(training: Training) -> Tensor:
    loss = training.losses()["b"]
    loss.backward()
    return loss.detach()


def _returns_none(training: Training) -> None:
    training.losses()["b"].backward()


def _saves_nothing(training: Training) -> Tensor:
    """A graph that torch would let run backward twice."""
    loss = next(training.model.parameters()).sum()
    loss.backward()
    return loss


def _calls_the_optimizer(training: Training) -> Tensor:
    training.opt.backward(training.losses())
    return training.losses()["b"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize(
    "closure",
    [_keeps_loss, _retains, _detaches, _returns_none, _saves_nothing, _calls_the_optimizer],
)
def test_a_closure_that_calls_backward_itself(
    closure: Callable[[Training], Any], place: int, method: str
) -> None:
    training = Training()
    entries: dict[str, Any] = {
        name: lambda n=name: training.losses()[n] for name in ("a", "b", "a+b")
    }
    entries[list(entries)[place]] = functools.partial(closure, training)
    # a leaf outside keeps what the closure's own backward gave it: nobody can tell it apart
    training.snapshot = Snapshot(training.opt)
    refuse(training, method, entries, "closure", "backward")
    training.assert_intact()


# --- rules ----------------------------------------------------------------------------------------

BAD_RULES: dict[str, Callable[[Tensor], Any]] = {
    "too many": lambda gramian: torch.ones(gramian.shape[-1] + 1),
    "a matrix": lambda gramian: gramian,
    "a scalar": lambda gramian: torch.ones(()),
    "a column": lambda gramian: torch.ones(gramian.shape[-1], 1),
    "a list": lambda gramian: [1.0] * gramian.shape[-1],
    "none": lambda gramian: None,
}


@pytest.mark.parametrize("method", ["backward", "step"])
@pytest.mark.parametrize("kind", list(BAD_RULES))
def test_a_rule_that_returns_the_wrong_thing(kind: str, method: str) -> None:
    bad = True

    def rule(gramian: Tensor) -> Any:
        return BAD_RULES[kind](gramian) if bad else torch.ones_like(gramian[..., 0])

    bad = False
    training = Training(rule=rule)
    bad = True
    refuse(training, method, training.losses(), "rule")
    training.snapshot.assert_unchanged()
    bad = False
    training.opt.step(training.losses())


@pytest.mark.parametrize("method", ["backward", "step"])
def test_a_rule_that_raises(method: str) -> None:
    error: Exception | None = None

    def rule(gramian: Tensor) -> Tensor:
        if error is not None:
            raise error
        return torch.ones_like(gramian[..., 0])

    training = Training(rule=rule)
    error = Unplugged("no such weights")
    refuse(training, method, training.losses(), "no such weights", of=Unplugged)
    training.snapshot.assert_unchanged()
    error = None
    training.opt.step(training.losses())


@pytest.mark.parametrize(
    "rule",
    [lambda: torch.ones(2), lambda gramian, order: gramian, lambda *, gramian: gramian, pcgrad],
    ids=["none", "two", "keyword", "pcgrad itself"],
)
def test_a_rule_of_another_arity(rule: Any) -> None:
    with pytest.raises(BAD, match="rule"):
        ModalityDecoupledOptimizer(SGD(towers().parameters(), lr=0.1), rule=rule)


@pytest.mark.parametrize(
    "rule",
    [
        lambda gramian, power=2: torch.ones(gramian.shape[-1]),
        lambda *gramians: torch.ones(gramians[0].shape[-1]),
        functools.partial(lambda power, gramian: torch.ones(gramian.shape[-1]), 2),
    ],
    ids=["default", "star", "partial"],
)
def test_a_rule_that_can_take_one_argument(rule: Any) -> None:
    p = nn.Parameter(torch.zeros(1))
    ModalityDecoupledOptimizer(SGD([p], lr=0.1), rule=rule).step([p.sum(), p.sum()])


# --- construction ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "mention"),
    [
        ({"rule": "gdm"}, "gdm"),
        ({"rule": 3}, "int"),
        ({"rule": None}, "NoneType|None"),
        ({"scope": "privat"}, "privat"),
        ({"scope": 3}, "int"),
        ({"scope": None}, "NoneType|None"),
        ({"scope": ["trunk.weight"]}, "str"),
        ({"reduction": "median"}, "median"),
        ({"reduction": None}, "None"),
    ],
    ids=str,
)
def test_unknown_option(options: dict[str, Any], mention: str) -> None:
    """The message names the argument, what came, and for words what there is."""
    base = SGD(towers().parameters(), lr=0.1)
    snapshot = Snapshot(base)
    (argument,) = options
    with pytest.raises(BAD) as caught:
        ModalityDecoupledOptimizer(base, **options)
    assert argument in str(caught.value)
    assert re.search(mention, str(caught.value))
    known = {"rule": "gmd", "scope": "shared", "reduction": "mean"}[argument]
    assert known in str(caught.value), "what to do instead"
    snapshot.assert_unchanged()
    assert all("gradsplit_seed" not in group for group in base.param_groups)
    ModalityDecoupledOptimizer(base)


def test_foreign_parameters_in_the_scope() -> None:
    base = SGD(towers().parameters(), lr=0.1)
    foreign = nn.Parameter(torch.zeros(7, 5))
    with pytest.raises(BAD, match="scope"):
        ModalityDecoupledOptimizer(base, scope=[base.param_groups[0]["params"][0], foreign])
    ModalityDecoupledOptimizer(base)


@pytest.mark.parametrize("empty", [[], iter(())], ids=["list", "iterator"])
def test_an_empty_scope(empty: Any) -> None:
    """``scope=[]`` is a mistake, such as a generator that has run out."""
    with pytest.raises(ValueError, match="scope"):
        ModalityDecoupledOptimizer(SGD(towers().parameters(), lr=0.1), scope=empty)


def test_a_generator_of_parameters_is_a_scope() -> None:
    model = towers()
    rows = model.rows()
    opt = ModalityDecoupledOptimizer(
        SGD(model.parameters(), lr=0.1), scope=model.trunk.parameters()
    )
    trunk = set(model.trunk.parameters())
    inside = [i for i, p in enumerate(model.parameters()) if p in trunk]
    for _ in range(2):
        opt.zero_grad()
        opt.backward(model.losses())
        for ours, theirs in zip(grads(model), decouple(rows, scope=inside), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "base", [towers(), list(towers().parameters()), AdamW, None, "adamw"], ids=lambda b: str(b)[:12]
)
def test_a_base_that_is_not_an_optimizer(base: Any) -> None:
    with pytest.raises(BAD, match="base"):
        ModalityDecoupledOptimizer(base)


def test_wrapping_twice() -> None:
    training = Training()
    with pytest.raises(BAD, match="ModalityDecoupledOptimizer"):
        ModalityDecoupledOptimizer(training.opt)
    training.assert_intact()


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        ModalityDecoupledOptimizer(SGD(towers().parameters(), lr=0.1), "gmd")


# --- complex and sparse ---------------------------------------------------------------------------


def test_complex_parameters_at_construction() -> None:
    p = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(BAD, match="complex"):
        ModalityDecoupledOptimizer(SGD([p], lr=0.1))


def test_complex_parameters_in_add_param_group() -> None:
    training = Training()
    with pytest.raises(BAD, match="complex"):
        training.opt.add_param_group(
            {"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]}
        )
    assert len(training.opt.param_groups) == 1
    training.assert_intact()


def test_complex_parameters_that_came_by_way_of_the_base() -> None:
    p = nn.Parameter(torch.zeros(2))
    z = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    base = SGD([p], lr=0.1)
    opt = ModalityDecoupledOptimizer(base)
    base.add_param_group({"params": [z]})
    p.grad = torch.ones(2)
    with pytest.raises(BAD, match="complex"):
        opt.backward([p.sum() + z.abs().sum(), p.sum()])
    assert p.grad.tolist() == [1.0, 1.0] and z.grad is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [0, 1])
def test_sparse_gradients(method: str, place: int) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(5, 2, sparse=True)
    head = nn.Linear(2, 1)
    opt = ModalityDecoupledOptimizer(SGD([*table.parameters(), *head.parameters()], lr=0.1))
    head.weight.grad = torch.ones_like(head.weight)
    snapshot = Snapshot(opt)

    def losses() -> list[Tensor]:
        pair = [head(torch.ones(2)).sum(), head(table(torch.tensor([1, 3]))).sum()]
        return pair if place == 1 else pair[::-1]

    with pytest.raises(BAD, match="sparse"):
        getattr(opt, method)(losses())
    snapshot.assert_unchanged()
    table.sparse = False
    getattr(opt, method)(losses())


# --- misuse of accumulation -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["step", "closure", "losses"])
def test_step_with_rows_that_were_never_merged(how: str) -> None:
    training = Training()
    training.opt.accumulate(training.losses(1))
    with pytest.raises(RuntimeError, match=r"backward|zero_grad"):
        if how == "step":
            training.opt.step()
        elif how == "closure":
            training.opt.step(lambda: 1.0)
        else:
            training.opt.step(training.losses())
    training.assert_works([training.model.rows(1), training.model.rows()])


@pytest.mark.filterwarnings("ignore:.*pending")
@pytest.mark.parametrize("method", ["backward", "accumulate"])
@pytest.mark.parametrize("kind", list(BAD_LOSSES))
def test_an_error_found_before_any_backward_keeps_pending_rows(kind: str, method: str) -> None:
    training = Training()
    first = training.model.rows(1)
    training.opt.accumulate(training.losses(1))
    training.snapshot = training.shot()
    losses = training.losses()
    refuse(training, method, {**losses, "b": BAD_LOSSES[kind][0](training.model)}, "'b'")
    training.snapshot.assert_unchanged()
    training.assert_works([first, training.model.rows()])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take no notes")
@pytest.mark.filterwarnings("ignore:.*pending")
@pytest.mark.parametrize("method", ["backward", "accumulate"])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("error", ["closure", "backward"])
def test_a_window_that_fails_is_whole_or_dropped_never_half(
    place: int, method: str, error: str
) -> None:
    """A note on the exception says when the rows of earlier micro-batches are gone."""
    training = Training()
    first = training.model.rows(1)
    training.opt.accumulate(training.losses(1))
    training.snapshot = training.shot()

    def failing() -> Tensor:
        if error == "closure":
            raise Unplugged("camera")
        return _RaisesInBackward.apply(training.losses()["b"])

    entries: dict[str, Callable[[], Tensor]] = {
        name: lambda n=name: training.losses(2)[n] for name in ("a", "b", "a+b")
    }
    entries[list(entries)[place]] = failing
    caught = refuse(training, method, entries, of=Unplugged)
    training.snapshot.assert_unchanged()
    dropped = any("dropped" in note for note in getattr(caught.value, "__notes__", []))
    if place > 0:
        assert dropped, "rows had been added to"
    rows = training.model.rows()
    training.assert_works([rows] if dropped else [first, rows])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take no notes")
def test_a_rule_that_fails_keeps_pending_rows_or_says_that_it_dropped_them() -> None:
    bad = False

    def rule(gramian: Tensor) -> Tensor:
        return torch.ones(99) if bad else torch.ones_like(gramian[..., 0])

    p = nn.Parameter(torch.zeros(1))
    opt = ModalityDecoupledOptimizer(SGD([p], lr=0.1), rule=rule, reduction="sum")
    opt.accumulate([(p * 10).sum(), (p * 20).sum()])
    bad = True
    with pytest.raises(BAD, match="rule") as caught:
        opt.backward([(p * 1).sum(), (p * 2).sum()])
    assert p.grad is None
    dropped = any("dropped" in note for note in getattr(caught.value, "__notes__", []))
    bad = False
    opt.backward([(p * 3).sum(), (p * 4).sum()])
    assert p.grad is not None and float(p.grad) == (7.0 if dropped else 37.0)


def test_a_good_call_after_an_error_counts_one_merge() -> None:
    training = Training(rule="pcgrad")
    before = training.opt.param_groups[0]["gradsplit_merges"]
    refuse(training, "backward", {"a": torch.ones(())}, "'a'")
    assert training.opt.param_groups[0]["gradsplit_merges"] == before
    training.opt.backward(training.losses())
    assert training.opt.param_groups[0]["gradsplit_merges"] == before + 1


def test_the_last_report_survives_an_error() -> None:
    training = Training()
    last = training.opt.last
    refuse(training, "backward", {"a": torch.ones(())}, "'a'")
    assert training.opt.last is last


def test_exceptions_that_pass_through_say_which_loss_they_came_from() -> None:
    """A closure that raises, and closures that share a forward made outside of them."""
    p = nn.Parameter(torch.ones(2))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=0.1))

    def broken() -> Tensor:
        raise KeyError("no such file")

    with pytest.raises(KeyError) as raised:
        opt.backward({"text": lambda: p.sum(), "audio": broken})
    if sys.version_info >= (3, 11):
        assert "loss 2 of 2 ('audio')" in raised.value.__notes__[0]
    shared = p.exp()
    with pytest.raises(RuntimeError, match="second time") as again:
        opt.backward([lambda: shared.sum(), lambda: shared.square().sum()])
    if sys.version_info >= (3, 11):
        assert "run its own forward" in again.value.__notes__[0]
    assert p.grad is None


def test_a_micro_batch_without_anything_ends_a_window_that_has_rows() -> None:
    p = nn.Parameter(torch.ones(2))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=0.1))
    opt.accumulate({"text": p.sum(), "audio": None})
    report = opt.backward({"text": None, "audio": None})
    assert (report.names, report.unavailable) == (("text",), ("audio",))
    assert p.grad is not None and p.grad.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="all are unavailable"):
        opt.backward({"text": None, "audio": None})


def test_a_torch_closure_that_leaves_rows_pending_takes_no_step() -> None:
    p = nn.Parameter(torch.ones(2))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=0.1))

    def accumulating() -> Tensor:
        opt.accumulate([p.sum()])
        return p.sum()

    with pytest.raises(RuntimeError, match="pending"):
        opt.step(accumulating)
    assert p.tolist() == [1.0, 1.0]


def test_a_torch_closure_that_returns_several_losses_is_refused() -> None:
    """Otherwise the step would silently do nothing: nobody called backward."""
    p = nn.Parameter(torch.ones(2))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=0.1))
    with pytest.raises(TypeError, match="several losses"):
        opt.step(lambda: {"text": p.sum(), "audio": p.sum()})
    assert p.tolist() == [1.0, 1.0]


def test_one_combination_in_two_orders_is_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=0.1))
    with pytest.raises(ValueError, match=r"'a\+t' and 't\+a'"):
        opt.backward({("a", "t"): p.sum(), ("t", "a"): p.sum()})
