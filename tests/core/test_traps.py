"""What a new user trips over: each has a behaviour of its own, and words that help."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from gradsplit import ModalityDecoupledOptimizer
from tests.reference import TwoTowers, decouple, grads, same, towers

CALLS = ["backward", "accumulate", "step"]


def wrapped(model: nn.Module, **options: Any) -> ModalityDecoupledOptimizer:
    return ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2), **options)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# --- the loop still calls loss.backward() ---------------------------------------------------------


def plain_step(model: TwoTowers, opt: Optimizer, seed: int) -> None:
    opt.zero_grad()
    sum(model.losses(seed).values()).backward()
    opt.step()


def closure_step(model: TwoTowers, opt: Optimizer, seed: int) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        total = sum(model.losses(seed).values())
        total.backward()
        return total

    opt.step(closure)


def decoupled_step(model: TwoTowers, opt: Optimizer, seed: int) -> None:
    opt.step(model.losses(seed))


COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda whole: whole,
    "deepcopy": copy.deepcopy,
    "pickle": lambda whole: pickle.loads(pickle.dumps(whole)),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize(
    ("steps", "heard"),
    [
        ([plain_step] * 4, [0, 1, 0, 0]),
        ([closure_step] * 3, [0, 1, 0]),
        ([plain_step, closure_step, plain_step], [0, 1, 0]),
        ([decoupled_step, plain_step, plain_step, plain_step], [0, 0, 0, 0]),
        ([plain_step, decoupled_step, plain_step, plain_step], [0, 0, 0, 0]),
    ],
    ids=["plain", "closures", "both", "merged first", "merged second"],
)
def test_the_second_step_without_a_merge_warns_once(
    steps: list[Callable[..., None]], heard: list[int], scheduled: bool, copied: str
) -> None:
    """The first belongs to tools that step a fresh optimizer for a checkpoint."""
    model = towers()
    opt = wrapped(model)
    if scheduled:
        StepLR(opt, step_size=1)  # patches step
    model, opt = COPIES[copied]((model, opt))
    counts = []
    for seed, step in enumerate(steps):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(model, opt, seed)
        counts.append(len(caught))
        for warning in caught:
            assert warning.category is UserWarning
            for word in ("opt.backward(losses)", "opt.joint(losses)", "loss.backward()"):
                assert word in str(warning.message)
    assert counts == heard


# --- a loss that averages no sample ---------------------------------------------------------------


def test_what_to_give_for_a_loss_without_a_sample_is_written_where_one_looks() -> None:
    p = nn.Parameter(torch.ones(2))
    opt = ModalityDecoupledOptimizer(SGD([p], lr=0.1))
    empty = (p * torch.ones(0, 2)).sum(1).mean()
    report = opt.backward({"text": p.sum(), "audio": empty})
    assert "audio is NaN" in str(report) and "give None" in str(report)
    words = " ".join(str(ModalityDecoupledOptimizer.__doc__).split())
    assert "A loss that averages no sample is NaN: give None for it." in words


# --- optimizers that step inside backward ---------------------------------------------------------


def step_in_backward(parameters: list[Tensor]) -> list[Any]:
    """As PyTorch's tutorial has it: one optimizer per parameter, in a post-accumulate hook."""

    def hook(p: Tensor) -> None:
        inner[p].step()
        inner[p].zero_grad()

    inner = {p: SGD([p], lr=0.1) for p in parameters}
    return [p.register_post_accumulate_grad_hook(hook) for p in parameters]


@pytest.mark.parametrize("method", [*CALLS, "joint", "measured"])
@pytest.mark.parametrize("which", ["all", "some", "private"])
@pytest.mark.parametrize("closures", [False, True])
def test_a_hook_that_consumes_gradients(closures: bool, which: str, method: str) -> None:
    model = towers()
    trunk = list(model.trunk.parameters())
    opt = wrapped(model, conflict_parameters=trunk if method == "measured" else None)
    opt.backward(model.losses())
    chosen = {
        "all": list(model.parameters()),
        "some": [model.trunk[1].weight],
        "private": [model.a.bias],
    }[which]
    handles = step_in_backward(chosen)
    held = [p.grad.clone() for p in model.parameters()]
    losses: dict[str, Any] = model.losses(1)
    if closures:
        if method == "joint":
            pytest.skip("joint takes no closures")
        losses = {name: lambda n=name: model.losses(1)[n] for name in losses}
    with pytest.raises(ValueError, match=r"post-accumulate hook.*step inside backward") as caught:
        if method == "joint":
            opt.joint(losses).backward()
        else:
            getattr(opt, "backward" if method == "measured" else method)(losses)
    if method != "measured":  # by one backward for all
        assert "loss 1 of 3 ('a')" in str(caught.value)
    assert same(grads(model), held), ".grad is as it was"
    for handle in handles:
        handle.remove()
    if method == "measured":
        return
    opt.zero_grad()
    opt.backward(model.losses(1))
    for ours, theirs in zip(grads(model), decouple(model.rows(1)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_a_hook_that_leaves_gradients_alone_is_welcome() -> None:
    model = towers()
    fired: list[Tensor] = []
    model.trunk[1].weight.register_post_accumulate_grad_hook(fired.append)
    wrapped(model).backward(model.losses())
    assert len(fired) == 3
    for ours, theirs in zip(grads(model), decouple(model.rows()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


# --- torch.compile --------------------------------------------------------------------------------


class Recorder:
    """A backend of torch.compile that compiles nothing and keeps the graphs."""

    def __init__(self) -> None:
        self.operations: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.operations += [str(node.target) for node in graph.graph.nodes]
        return graph.forward


def one_step(model: TwoTowers, opt: ModalityDecoupledOptimizer, how: str, seed: int) -> None:
    losses: dict[str, Any] = model.losses(seed)
    if how == "closures":
        losses = {name: functools.partial(model.loss, name, seed) for name in losses}
    if how in ("step", "closures"):
        opt.step(losses)
        return
    opt.zero_grad()
    if how == "accumulate":
        opt.accumulate(model.losses(seed + 10))
    opt.joint(losses).backward() if how == "joint" else opt.backward(losses)
    opt.step()


class Model(TwoTowers):
    def loss(self, name: str, seed: int) -> Tensor:
        return self.losses(seed)[name]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", [*CALLS, "joint", "closures"])
def test_a_compiled_step_is_not_traced(how: str) -> None:
    """What is compiled is the model's forward, and the result is the same."""
    ends, backend = [], Recorder()
    torch.compiler.reset()
    for step in (one_step, torch.compile(one_step, backend=backend)):
        torch.manual_seed(0)
        model = Model().double()
        opt = wrapped(model)
        for seed in range(3):
            step(model, opt, how, seed)
        ends.append(values(model))
    assert same(*ends)
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9)  # 2.4 breaks at the generator
    if how != "closures" and not old:  # closures run inside
        assert any("layer_norm" in operation for operation in backend.operations)
    ours = [o for o in backend.operations if "foreach" in o or "bmm" in o or "addcmul" in o]
    assert not ours and len(backend.operations) < 300


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reduction", ["mean", "sum", "released"])
def test_a_compiled_forward_that_losses_share_is_exact_on_the_trunk(reduction: str) -> None:
    """It joins the graphs, so that every loss seems to reach every parameter, with zeros."""
    torch.compiler.reset()
    model = towers()
    compiled = torch.compile(model.losses, backend="aot_eager")
    rows = model.rows(3)
    trunk = list(model.trunk.parameters())
    inside = [i for i, p in enumerate(model.parameters()) if any(p is q for q in trunk)]
    wrapped(model, scope=trunk, reduction=reduction).backward(compiled(3))
    if reduction == "released":  # divides what is reached by all, and that is everything
        rows = [
            [
                torch.zeros_like(p) if g is None else g
                for g, p in zip(row, model.parameters(), strict=True)
            ]
            for row in rows
        ]
    expected = decouple(rows, scope=inside, reduction=reduction)
    for ours, theirs in zip(grads(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


class _DropsOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, kept: Tensor, dropped: Tensor) -> Tensor:
        return kept.sum() + dropped.sum()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.expand(2), None


def test_a_harmless_hook_on_a_parameter_without_gradient_is_no_error() -> None:
    p, q = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    q.register_post_accumulate_grad_hook(lambda leaf: None)
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p, q], lr=0.1))
    opt.backward([_DropsOne.apply(p, q), p.sum()])
    assert p.grad is not None and q.grad is None


def test_a_name_may_have_a_plus_and_none_may_be_empty() -> None:
    p = nn.Parameter(torch.zeros(2))
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([p], lr=0.1))
    assert opt.backward({"c++": p.sum()}).names == ("c++",)
    with pytest.raises(TypeError, match="not empty"):
        opt.backward({"": p.sum()})
