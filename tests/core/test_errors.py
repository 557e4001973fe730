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
from tests.reference import Row, Snapshot, TwoTowers, decouple, decouple_window, grads, towers

METHODS = ["backward", "accumulate", "step"]
NAMES = ("a", "b", "a+b")
BAD = (ValueError, TypeError)

notes = pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take no notes")


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

    def closures(self, seed: int = 0, **others: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
        """A closure per loss, but for the ``others``."""
        names = {name: functools.partial(self.loss, name, seed) for name in NAMES}
        return names | others

    def loss(self, name: str, seed: int = 0) -> Tensor:
        return self.losses(seed)[name]

    def shot(self) -> Snapshot:
        return Snapshot(self.opt, [self.outside, self.elsewhere])

    def assert_intact(self) -> None:
        """Everything as it was before the bad call; then a good one does what it should."""
        self.snapshot.assert_unchanged()
        self.assert_works([self.model.rows()])

    def assert_works(self, micro_batches: list[list[Row]]) -> None:
        """One good ``backward`` merges these micro-batches, the last of which is ``losses()``."""
        window = [dict(zip(NAMES, rows, strict=True)) for rows in micro_batches]
        for p in self.model.parameters():
            p.grad = None  # and not zero_grad, which would drop pending rows
        self.opt.backward(self.losses())
        for ours, theirs in zip(grads(self.model), decouple_window(window), strict=True):
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


# --- losses ---------------------------------------------------------------------------------------

BAD_LOSSES_AT_ALL: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "an empty mapping": (lambda x: {}, "losses is empty"),
    "an empty list": (lambda x: [], "losses is empty"),
    "an empty tuple": (lambda x: (), "losses is empty"),
    "all unavailable": (
        lambda x: {"a": None, "b": None},
        r"all are unavailable \(None\): 'a', 'b'",
    ),
    "closures of None": (lambda x: [None, lambda: None], r"all are unavailable \(None\): '0', '1'"),
    "one loss alone": (lambda x: x["a"], r"losses must be a mapping .* or a sequence"),
    "a number": (lambda x: 3.0, "losses must be a mapping .*float 3.0"),
    "a set": (lambda x: set(x.values()), "losses must be a mapping .*set"),
    "a string": (lambda x: "ab", "losses must be a mapping .*'ab'"),
    "bytes": (lambda x: b"ab", "losses must be a mapping .*b'ab'"),
    "an iterator": (lambda x: iter(x.values()), "losses must be a mapping .*iterator"),
    "a number as key": (lambda x: {"a": x["a"], 1: x["b"]}, "losses has the key 1"),
    "a number in a key": (lambda x: {("a", 1): x["a"]}, r"losses has the key \('a', 1\)"),
    "an empty key": (lambda x: {(): x["a"]}, r"losses has the key \(\)"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", list(BAD_LOSSES_AT_ALL))
def test_bad_losses_at_all(kind: str, method: str) -> None:
    make, mention = BAD_LOSSES_AT_ALL[kind]
    training = Training()
    refuse(training, method, make(training.losses()), mention)
    training.assert_intact()


BadLoss = Callable[[TwoTowers], Any]

BAD_LOSSES: dict[str, tuple[BadLoss, str]] = {
    "not scalar": (lambda m: m.losses()["a"] * torch.ones(3), r"\(3,\)"),
    "empty": (lambda m: m.losses()["a"] * torch.ones(0), r"\(0,\)"),
    "one by one": (lambda m: m.losses()["a"].view(1, 1), r"\(1, 1\)"),
    "requires no grad": (lambda m: m.losses()["a"].detach(), "grad"),
    "reaches nothing": (lambda m: towers(seed=1).losses()["a"], "parameter"),
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
    bad = NAMES[place]
    entries = training.closures(**{bad: functools.partial(make, training.model)})
    refuse(training, method, entries, rf"loss {place + 1} of 3 \('{re.escape(bad)}'\)", mention)
    training.assert_intact()


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        return p.sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        return None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["gradient is None", "parameters are frozen"])
def test_a_loss_that_reaches_nothing(how: str, method: str) -> None:
    training = Training()
    p = training.model.a.weight
    if how == "gradient is None":
        loss = _NoGradient.apply(p)
    else:
        p.requires_grad_(False)
        loss = (p * training.outside).sum()
    losses = {"a": training.losses()["a"], "b": loss}
    refuse(training, method, losses, r"loss 2 of 2 \('b'\)", "parameter")
    training.snapshot.assert_unchanged()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_losses_on_two_real_devices() -> None:
    training = Training()
    losses = training.losses()
    refuse(training, "backward", {"a": losses["a"], "b": losses["b"].cuda()}, "'b'", "cuda")
    training.assert_intact()


# --- closures -------------------------------------------------------------------------------------


class Unplugged(Exception):
    """An error of the user's own."""


class _RaisesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        raise Unplugged("in backward")


def raising(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("what", ["closure", "ctrl-c", "backward", "backward of a closure"])
def test_what_raises(what: str, place: int, method: str) -> None:
    """The very exception passes through, whatever it is and wherever it comes from."""
    training = Training()
    bad = NAMES[place]
    if what in ("closure", "ctrl-c"):
        error = Unplugged("camera") if what == "closure" else KeyboardInterrupt()
        losses: dict[str, Any] = training.closures(**{bad: lambda: raising(error)})
        caught = refuse(training, method, losses, of=type(error))
        assert caught.value is error
    else:
        losses = training.losses()
        losses[bad] = _RaisesInBackward.apply(losses[bad])
        if what == "backward of a closure":
            losses = training.closures(
                **{bad: lambda: _RaisesInBackward.apply(training.losses()[bad])}
            )
        refuse(training, method, losses, "in backward", of=Unplugged)
    training.assert_intact()


CALLING: dict[str, Callable[[Training], Any]] = {
    "keeps": lambda t: backward_of(t.loss("b")),
    "retains": lambda t: backward_of(t.loss("b"), retain_graph=True),
    "detaches": lambda t: backward_of(t.loss("b")).detach(),
    "returns None": lambda t: backward_of(t.loss("b")) and None,
    # a graph that torch would let run backward twice
    "saves nothing": lambda t: backward_of(t.model.a.weight.sum()),
}


def backward_of(loss: Tensor, **options: Any) -> Tensor:
    loss.backward(**options)
    return loss


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("kind", list(CALLING))
def test_a_closure_that_calls_backward_itself(kind: str, place: int, method: str) -> None:
    training = Training()
    entries = training.closures(**{NAMES[place]: lambda: CALLING[kind](training)})
    # a leaf outside keeps what the closure's own backward gave it: nobody can tell it apart
    training.snapshot = Snapshot(training.opt)
    refuse(training, method, entries, "closure", "backward")
    training.assert_intact()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("called", ["backward", "accumulate", "step", "joint", "zero_grad"])
def test_a_closure_that_calls_its_optimizer(called: str, method: str) -> None:
    """``zero_grad`` would drop the rows that are being taken."""
    training = Training()

    def closure() -> Tensor:
        getattr(training.opt, called)(*([] if called == "zero_grad" else [training.losses()]))
        return training.loss("b")

    refuse(training, method, training.closures(b=closure), "closure", called, of=ValueError)
    training.assert_intact()


# --- rules ----------------------------------------------------------------------------------------

BAD_RULES: dict[str, Callable[[Tensor], Any]] = {
    "too many": lambda gramian: torch.ones(gramian.shape[-1] + 1),
    "a matrix": lambda gramian: gramian,
    "a scalar": lambda gramian: torch.ones(()),
    "a column": lambda gramian: torch.ones(gramian.shape[-1], 1),
    "a list": lambda gramian: [1.0] * gramian.shape[-1],
    "none": lambda gramian: None,
    "raises": lambda gramian: raising(Unplugged("from the rule")),
}


@pytest.mark.parametrize("method", ["backward", "step"])
@pytest.mark.parametrize("kind", list(BAD_RULES))
def test_a_rule_that_does_the_wrong_thing(kind: str, method: str) -> None:
    bad = False

    def rule(gramian: Tensor) -> Any:
        return BAD_RULES[kind](gramian) if bad else torch.ones_like(gramian[..., 0])

    training = Training(rule=rule)
    bad = True
    refuse(training, method, training.losses(), "rule", of=(*BAD, Unplugged))
    training.snapshot.assert_unchanged()
    bad = False
    training.opt.step(training.losses())


ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        (lambda: ONES, False),
        (lambda gramian, order: ONES, False),
        (lambda *, gramian: ONES, False),
        (pcgrad, False),
        (lambda gramian, power=2: ONES, True),
        (lambda *gramians: ONES, True),
        (functools.partial(lambda power, gramian: ONES, 2), True),
    ],
    ids=["none", "two", "keyword", "pcgrad itself", "default", "star", "partial"],
)
def test_a_rule_takes_one_argument(rule: Any, fits: bool) -> None:
    p = nn.Parameter(torch.zeros(1))
    if fits:
        ModalityDecoupledOptimizer(SGD([p], lr=0.1), rule=rule).step([p.sum(), p.prod()])
        return
    with pytest.raises(TypeError, match="rule must take one argument, the Gramian"):
        ModalityDecoupledOptimizer(SGD([p], lr=0.1), rule=rule)


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
        ({"seed": 1.5}, "float"),
        ({"seed": None}, "NoneType"),
        ({"row_dtype": torch.float16}, "float16"),
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
    options = {"rule": "gmd", "scope": "shared", "reduction": "mean", "seed": "int"}
    known = options.get(argument, "bfloat16")
    assert known in str(caught.value), "what to do instead"
    snapshot.assert_unchanged()
    assert all("gradsplit_seed" not in group for group in base.param_groups)
    ModalityDecoupledOptimizer(base)


@pytest.mark.parametrize("option", ["scope", "conflict_parameters"])
@pytest.mark.parametrize(
    ("given", "mention"),
    [
        (lambda p: [p, nn.Parameter(torch.zeros(7, 5))], r"element 1, of shape \(7, 5\)"),
        (lambda p: [p, 3.0], "element 1 is a float"),
        (lambda p: p, "Parameter; put parameters in a list"),
        (lambda p: [], "got none"),
        (lambda p: iter(()), "got none"),
    ],
    ids=["foreign", "a float", "one alone", "empty", "run out"],
)
def test_bad_parameters(option: str, given: Callable[[Tensor], Any], mention: str) -> None:
    """``scope=[]`` too is a mistake, such as a generator that has run out."""
    base = SGD(towers().parameters(), lr=0.1)
    with pytest.raises(BAD, match=f"{option}.*{mention}"):
        ModalityDecoupledOptimizer(base, **{option: given(base.param_groups[0]["params"][0])})
    ModalityDecoupledOptimizer(base)


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
    with pytest.raises(TypeError, match="base must be a torch.optim.Optimizer, got"):
        ModalityDecoupledOptimizer(base)


def test_wrapping_twice_and_options_without_keywords() -> None:
    training = Training()
    with pytest.raises(TypeError, match="already a ModalityDecoupledOptimizer"):
        ModalityDecoupledOptimizer(training.opt)
    training.assert_intact()
    with pytest.raises(TypeError):
        ModalityDecoupledOptimizer(SGD(towers().parameters(), lr=0.1), "gmd")


# --- sparse gradients -----------------------------------------------------------------------------


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


@pytest.mark.parametrize("how", ["step", "losses", "closure"])
def test_step_with_rows_that_were_never_merged(how: str) -> None:
    """Refused before anything is done; with a torch closure, once it has run."""
    training = Training()
    model = training.model
    training.opt.accumulate(training.losses(1))
    before = [p.detach().clone() for p in model.parameters()]
    called: list[None] = []
    given = {"step": [], "losses": [training.losses()], "closure": [lambda: called.append(None)]}
    with pytest.raises(RuntimeError, match=r"step\(\) with 3 pending rows.*backward.*zero_grad"):
        training.opt.step(*given[how])
    assert len(called) == (how == "closure")
    assert all(map(torch.equal, model.parameters(), before))
    training.assert_works([model.rows(1), model.rows()])


def test_a_torch_closure_that_leaves_rows_pending_takes_no_step() -> None:
    p = nn.Parameter(torch.ones(2))
    opt = ModalityDecoupledOptimizer(SGD([p], lr=0.1))
    with pytest.raises(RuntimeError, match="pending"):
        opt.step(lambda: opt.accumulate([p.sum()]))
    assert p.tolist() == [1.0, 1.0]


def test_a_torch_closure_that_returns_several_losses_is_refused() -> None:
    """Otherwise the step would silently do nothing: nobody called backward."""
    p = nn.Parameter(torch.ones(2))
    opt = ModalityDecoupledOptimizer(SGD([p], lr=0.1))
    for losses in ({"text": p.sum(), "audio": p.sum()}, [p.sum()], (p.sum(), None)):
        p.grad = torch.ones(2)
        with pytest.raises(TypeError, match="several losses"):
            opt.step(lambda losses=losses: losses)
        assert p.tolist() == [1.0, 1.0]


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


def notes_of(caught: pytest.ExceptionInfo[BaseException]) -> str:
    return " ".join(getattr(caught.value, "__notes__", []))


@notes
@pytest.mark.filterwarnings("ignore:.*pending")
@pytest.mark.parametrize("method", ["backward", "accumulate"])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("error", ["closure", "backward", "ctrl-c"])
def test_a_window_that_fails_is_whole_or_dropped_never_half(
    place: int, method: str, error: str
) -> None:
    """Whole where nothing was added to its rows; else a note on the exception says it is gone."""
    training = Training()
    first = training.model.rows(1)
    training.opt.accumulate(training.losses(1))
    training.snapshot = training.shot()

    def failing() -> Tensor:
        if error == "backward":
            return _RaisesInBackward.apply(training.losses()["b"])
        return raising(KeyboardInterrupt() if error == "ctrl-c" else Unplugged("camera"))

    entries = training.closures(2, **{NAMES[place]: failing})
    caught = refuse(training, method, entries, of=(Unplugged, KeyboardInterrupt))
    training.snapshot.assert_unchanged()
    assert ("dropped" in notes_of(caught)) == (place > 0)
    rows = training.model.rows()
    training.assert_works([rows] if place else [first, rows])


@notes
def test_a_rule_that_fails_drops_pending_rows_and_says_so() -> None:
    bad = False

    def rule(gramian: Tensor) -> Tensor:
        return torch.ones(99) if bad else torch.ones_like(gramian[..., 0])

    p = nn.Parameter(torch.zeros(1))
    opt = ModalityDecoupledOptimizer(SGD([p], lr=0.1), rule=rule, reduction="sum")
    opt.accumulate([(p * 10).sum(), (p * 20).sum()])
    bad = True
    with pytest.raises(BAD, match="rule") as caught:
        opt.backward([(p * 1).sum(), (p * 2).sum()])
    assert p.grad is None and "dropped" in notes_of(caught)
    bad = False
    opt.backward([(p * 3).sum(), (p * 4).sum()])
    assert p.grad is not None and float(p.grad) == 7.0


def test_an_error_counts_no_merge_and_leaves_the_last_report() -> None:
    training = Training(rule="pcgrad")
    group, last = training.opt.param_groups[0], training.opt.last
    before = group["gradsplit_merges"]
    refuse(training, "backward", training.closures(b=lambda: raising(Unplugged())), of=Unplugged)
    assert group["gradsplit_merges"] == before and training.opt.last is last
    training.opt.backward(training.losses())
    assert group["gradsplit_merges"] == before + 1 and training.opt.last is not last


# --- notes on exceptions that pass through --------------------------------------------------------


@notes
def test_an_exception_says_from_which_loss_it_came() -> None:
    p = nn.Parameter(torch.ones(2))
    opt = ModalityDecoupledOptimizer(SGD([p], lr=0.1))
    with pytest.raises(Unplugged) as caught:
        opt.backward({"text": lambda: p.sum(), "audio": lambda: raising(Unplugged("camera"))})
    assert "in the closure of loss 2 of 2 ('audio')" in notes_of(caught)
    losses = [p.sum(), _RaisesInBackward.apply(p).sum()]
    with pytest.raises(Unplugged) as caught:
        opt.backward(losses)
    assert "in the backward of loss 2 of 2 ('1')" in notes_of(caught)
    assert p.grad is None


def _freed_by_the_user(p: Tensor) -> list[Any]:
    loss = p.exp().sum()
    loss.backward()
    return [p.sum(), loss]


def _closures_that_share_a_forward(p: Tensor) -> list[Any]:
    shared = p.exp()
    return [lambda: shared.sum(), lambda: shared.square().sum()]


def _closures_that_called_backward_on_a_shared_forward(p: Tensor) -> list[Any]:
    shared = p.exp()
    shared.prod().backward()
    return [lambda: p.sum(), lambda: shared.sum()]


@notes
@pytest.mark.parametrize(
    "make",
    [
        _freed_by_the_user,
        _closures_that_share_a_forward,
        _closures_that_called_backward_on_a_shared_forward,
    ],
)
@pytest.mark.parametrize("measured", [False, True], ids=["exact", "conflict parameters"])
def test_a_graph_that_is_gone(make: Callable[[Tensor], list[Any]], measured: bool) -> None:
    """torch's own message would advise ``retain_graph``."""
    p = nn.Parameter(torch.ones(2))
    options = {"conflict_parameters": [p]} if measured else {}
    opt = ModalityDecoupledOptimizer(SGD([p], lr=0.1), **options)
    losses = make(p)
    p.grad = None
    if measured and make is _closures_that_share_a_forward:
        opt.backward(losses)  # there the graphs are kept until the one backward
        return
    with pytest.raises(RuntimeError, match="second time") as caught:
        opt.backward(losses)
    assert "loss 2 of 2 ('1')" in notes_of(caught)
    for advice in ("do not call backward yourself", "a closure run its own forward"):
        assert advice in notes_of(caught)
    assert p.grad is None
