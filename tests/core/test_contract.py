"""The contract of a wrapper, DESIGN section 4, line by line; each test is named after its line."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import runpy
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gradsplit import ModalityDecoupledOptimizer
from tests.reference import (
    Row,
    Snapshot,
    TwoTowers,
    decouple,
    grads,
    same,
    towers,
)

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"

Base = Callable[[Iterable[Tensor]], Optimizer]

adamw: Base = functools.partial(AdamW, lr=1e-2)
momentum: Base = functools.partial(SGD, lr=1e-2, momentum=0.9)


def wrapped(model: nn.Module, base: Base = adamw, **options: Any) -> ModalityDecoupledOptimizer:
    return ModalityDecoupledOptimizer(base(model.parameters()), **options)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def train(model: TwoTowers, opt: Optimizer, seeds: Iterable[int]) -> None:
    for seed in seeds:
        opt.zero_grad()
        opt.backward(model.losses(seed))
        opt.step()


def saved_and_loaded(state: Any) -> Any:
    """Through ``torch.save`` and ``torch.load`` with their defaults."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


# --- 1. a real torch.optim.Optimizer --------------------------------------------------------------


def test_it_is_an_optimizer_that_reads_its_base() -> None:
    """And wrapping changes nothing of the base."""
    model = towers()
    base = adamw(model.parameters())
    held = base.param_groups, dict(base.defaults), base.state
    before = copy.deepcopy(base.state_dict())
    opt = ModalityDecoupledOptimizer(base)
    assert isinstance(opt, Optimizer)
    assert base.param_groups is held[0] and base.state is held[2]
    assert {key: base.defaults[key] for key in held[1]} == held[1]
    after = base.state_dict()
    assert after["state"] == before["state"]
    for group, old in zip(after["param_groups"], before["param_groups"], strict=True):
        assert {key: group[key] for key in old} == old
    train(model, opt, [0])
    for _ in range(2):
        assert opt.param_groups is base.param_groups
        assert opt.state is base.state
        assert opt.defaults is base.defaults
        opt.load_state_dict(opt.state_dict())  # torch rebinds what the base holds
    assert len(opt.state) == len(list(model.parameters()))


def test_constructor_signature() -> None:
    parameters = inspect.signature(ModalityDecoupledOptimizer).parameters
    keywords = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords == {
        "rule": "gmd",
        "scope": "shared",
        "reduction": "mean",
        "seed": 0,
        "fused": None,
        "conflict_parameters": None,
        "row_dtype": None,
        "module": None,
        "process_group": None,
    }
    assert [n for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY] == ["base"]


class ScheduleFree(SGD):
    """As schedule-free optimizers have them: two modes, and other parameters in each."""

    modes: list[str]

    def train(self) -> None:
        self.modes.append("train")

    def eval(self) -> None:
        self.modes.append("eval")


def test_only_train_and_eval_are_forwarded() -> None:
    """No blanket ``__getattr__``: fused optimizers advertise themselves by attributes."""
    base = ScheduleFree(towers().parameters(), lr=0.1)
    base.modes, base.only_of_the_base = [], True
    opt = ModalityDecoupledOptimizer(base)
    assert not hasattr(opt, "only_of_the_base")
    opt.train()
    opt.eval()
    assert base.modes == ["train", "eval"]
    plain = wrapped(towers())
    plain.train()
    plain.eval()  # of a base that has no modes, nothing is wanted


def test_state_dict_is_that_of_the_base_and_load_state_dict_reaches_it() -> None:
    model, other = towers(), towers(seed=1)
    old = adamw(model.parameters())
    opt = ModalityDecoupledOptimizer(old)
    train(model, opt, range(2))
    assert same(opt.state_dict(), old.state_dict())
    base = AdamW(other.parameters(), lr=0.5)
    fresh = ModalityDecoupledOptimizer(base)
    fresh.load_state_dict(state_dict=saved_and_loaded(opt.state_dict()))
    assert same(base.state_dict(), opt.state_dict())
    assert fresh.param_groups[0]["lr"] == 1e-2
    assert fresh.param_groups is base.param_groups and fresh.state is base.state


def test_a_checkpoint_of_the_bare_base_loads() -> None:
    """Somebody starts to decouple in the middle of a training that began without."""
    model = towers()
    plain = adamw(model.parameters())
    sum(model.losses().values()).backward()
    plain.step()
    opt = wrapped(model, rule="pcgrad", seed=5)
    opt.load_state_dict(saved_and_loaded(plain.state_dict()))
    train(model, opt, range(2))
    assert opt.param_groups[0]["gradsplit_seed"] == 5
    assert opt.param_groups[0]["gradsplit_merges"] == 2


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("rule", ["gmd", "pcgrad", "function"])
@pytest.mark.parametrize("scope", ["shared", "all", "parameters"])
def test_copies_keep_base_rule_scope_reduction(how: str, rule: str, scope: str) -> None:
    """The copy, with the copied model, goes on exactly as the original does; each on its own."""
    model = towers()
    opt = ModalityDecoupledOptimizer(
        momentum(model.parameters()),
        rule=_tripled_first if rule == "function" else rule,
        scope=list(model.trunk.parameters()) if scope == "parameters" else scope,
        reduction="released",
        seed=3,
    )
    train(model, opt, range(2))
    twin, twin_opt = _copied((model, opt), how)
    assert type(twin_opt) is ModalityDecoupledOptimizer
    assert twin_opt.param_groups[0]["params"][0] is next(twin.parameters())
    before = values(model)
    train(twin, twin_opt, range(2, 5))
    assert same(values(model), before), "the copy stepped the original"
    assert not same(values(twin), before)
    train(model, opt, range(2, 5))
    assert same(values(model), values(twin))
    assert same(opt.state_dict(), twin_opt.state_dict())


def _tripled_first(gramian: Tensor) -> Tensor:
    weights = torch.ones_like(gramian[..., 0])
    weights[..., 0] = 3
    return weights


def _copied(whole: Any, how: str) -> Any:
    return copy.deepcopy(whole) if how == "deepcopy" else pickle.loads(pickle.dumps(whole))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_what_a_scheduler_patched(how: str) -> None:
    """Schedulers replace ``step``; the copy steps itself, and its scheduler sees that it did."""
    model = towers()
    opt = wrapped(model, momentum)
    scheduler = StepLR(opt, step_size=1, gamma=0.5)
    twin, twin_opt, twin_scheduler = _copied((model, opt, scheduler), how)
    before = values(model)
    fired: list[Optimizer] = []
    twin_opt.register_step_post_hook(lambda o, args, kwargs: fired.append(o))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(twin, twin_opt, [0])
        twin_scheduler.step()
    assert fired == [twin_opt]
    assert same(values(model), before) and not same(values(twin), before)
    assert twin_opt.param_groups[0]["lr"] == 0.005
    assert opt.param_groups[0]["lr"] == 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, opt, [0])
        scheduler.step()
    assert same(values(model), values(twin))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_optimizer_alone_steps_itself(how: str) -> None:
    p = nn.Parameter(torch.ones(2))
    opt = ModalityDecoupledOptimizer(SGD([p], lr=0.1))
    StepLR(opt, step_size=1)
    twin = _copied(opt, how)
    (q,) = twin.param_groups[0]["params"]
    twin.step([q.sum(), (q * 2).sum()])
    assert p.tolist() == [1.0, 1.0]
    assert q.tolist() == pytest.approx([0.85, 0.85])


def test_an_older_pickle_lacks_options_that_came_later() -> None:
    """What it lacks has its default; what it has is kept."""
    model = towers()
    opt = wrapped(model, rule="pcgrad", scope="all", seed=3, fused=False)
    train(model, opt, range(2))
    state = opt.__getstate__()
    later = [name for name in state if name not in ("base", "rule", "scope")]
    assert len(later) > 3
    for lacking in [*([name] for name in later), later]:
        old = ModalityDecoupledOptimizer.__new__(ModalityDecoupledOptimizer)
        old.__setstate__({name: state[name] for name in state if name not in lacking})
        assert old.base is opt.base and "rule='pcgrad', scope='all'" in repr(old)
    assert "reduction='mean'" in repr(old) and "fused=False" not in repr(old)
    before, seeds = copy.deepcopy((model, opt)), range(2, 4)
    train(before[0], before[1], seeds)
    train(model, old, seeds)
    assert same(values(model), values(before[0]))


def test_a_lambda_rule_cannot_be_pickled_and_the_error_says_so() -> None:
    model = towers()
    opt = wrapped(model, rule=lambda gramian: torch.ones_like(gramian[..., 0]))
    refusals = (pickle.PicklingError, TypeError, ValueError, AttributeError)
    with pytest.raises(refusals, match="lambda"):
        pickle.dumps(opt)
    twin, twin_opt = copy.deepcopy((model, opt))
    train(twin, twin_opt, [0])


# --- state_dict round trip, resume ----------------------------------------------------------------


@pytest.mark.parametrize("rule", ["gmd", "pcgrad"])
@pytest.mark.parametrize("base", [adamw, momentum])
def test_resume_in_mid_training_bit_for_bit(rule: str, base: Base) -> None:
    model = towers()
    opt = wrapped(model, base, rule=rule, seed=11)
    scheduler = StepLR(opt, step_size=2, gamma=0.5)
    for seed in range(4):
        train(model, opt, [seed])
        scheduler.step()
    checkpoint = saved_and_loaded([model.state_dict(), opt.state_dict(), scheduler.state_dict()])
    for seed in range(4, 9):
        train(model, opt, [seed])
        scheduler.step()

    resumed = towers(seed=1)
    resumed_opt = wrapped(resumed, base, rule=rule)
    resumed_scheduler = StepLR(resumed_opt, step_size=2, gamma=0.5)
    for target, state in zip([resumed, resumed_opt, resumed_scheduler], checkpoint, strict=True):
        target.load_state_dict(state)
    for seed in range(4, 9):
        train(resumed, resumed_opt, [seed])
        resumed_scheduler.step()
    assert same(values(resumed), values(model))
    assert same(resumed_opt.state_dict(), opt.state_dict())


def test_the_merge_counter_is_what_makes_pcgrad_resume() -> None:
    """The same checkpoint with the counter set back goes another way: the test above can fail."""
    results = []
    for merges in (0, 4):
        model = towers()
        opt = wrapped(model, rule="pcgrad", seed=11)
        for group in opt.param_groups:
            group["gradsplit_merges"] = merges
        train(model, opt, range(6))
        results.append(values(model))
    assert not same(*results)


def test_pending_rows_are_not_part_of_state_dict_and_a_warning_says_so() -> None:
    model = towers()
    opt = wrapped(model)
    clean = copy.deepcopy(opt.state_dict())
    opt.accumulate(model.losses())
    with pytest.warns(UserWarning, match="pending"):
        state = opt.state_dict()
    assert same(state, clean)
    opt.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.state_dict()


# --- 2. schedulers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "base"),
    [
        (lambda o: StepLR(o, step_size=2, gamma=0.3), adamw),
        (lambda o: OneCycleLR(o, max_lr=0.1, total_steps=12), adamw),
        (lambda o: OneCycleLR(o, max_lr=0.1, total_steps=12), momentum),
        (lambda o: CyclicLR(o, base_lr=1e-3, max_lr=0.1, step_size_up=3), momentum),
        (lambda o: CyclicLR(o, 1e-3, 0.1, step_size_up=3), adamw),
        (lambda o: ReduceLROnPlateau(o, patience=1, factor=0.5), adamw),
    ],
    ids=["Step", "OneCycle-AdamW", "OneCycle-SGD", "Cyclic-SGD", "Cyclic-AdamW", "Plateau"],
)
def test_schedulers_drive_the_base(make: Callable[[Optimizer], Any], base: Base) -> None:
    """One loss at a time, so plain torch with the same scheduler goes exactly the same way.

    No warning that the scheduler was stepped before the optimizer.
    """
    ours, plain = towers(), towers()
    plain_opt = base(plain.parameters())
    our_base = base(ours.parameters())
    opt = ModalityDecoupledOptimizer(our_base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [make(opt), make(plain_opt)]
        learning_rates = set()
        for seed in range(8):
            opt.step({"a": ours.losses(seed)["a"]})
            plain_opt.zero_grad()
            plain.losses(seed)["a"].backward()
            plain_opt.step()
            for scheduler in schedulers:
                plateau = isinstance(scheduler, ReduceLROnPlateau)
                scheduler.step(1.0) if plateau else scheduler.step()
            assert our_base.param_groups[0]["lr"] == plain_opt.param_groups[0]["lr"]
            learning_rates.add(our_base.param_groups[0]["lr"])
    assert len(learning_rates) > 2
    assert same(values(ours), values(plain))


# --- 3. GradScaler and half precision -------------------------------------------------------------


def scaler(scale: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rule", ["gmd", "pcgrad"])
def test_grad_scaler_leads_the_same_way(unscale_first: bool, fused: bool, rule: str) -> None:
    """The scale is a power of two, so not a bit differs."""
    base = functools.partial(AdamW, lr=1e-2, fused=fused)
    ours, plain = towers(torch.float32), towers(torch.float32)
    opt, unscaled = wrapped(ours, base, rule=rule), wrapped(plain, base, rule=rule)
    grad_scaler = scaler()
    for seed in range(3):
        opt.zero_grad()
        opt.backward({k: grad_scaler.scale(loss) for k, loss in ours.losses(seed).items()})
        if unscale_first:
            grad_scaler.unscale_(opt)
        grad_scaler.step(opt)
        grad_scaler.update()
    train(plain, unscaled, range(3))
    assert same(values(ours), values(plain))


@pytest.mark.parametrize("which", ["a", "b", "a+b"])
@pytest.mark.parametrize("rule", ["gmd", "pcgrad"])
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_a_step_with_inf_in_one_loss(which: str, rule: str, fused: bool) -> None:
    model = towers(torch.float32)
    opt = wrapped(model, functools.partial(AdamW, lr=1e-2, fused=fused), rule=rule)
    train(model, opt, [0])
    grad_scaler = scaler()
    for factor in (float("inf"), 1.0):
        before = values(model)
        opt.zero_grad()
        losses = model.losses()
        losses[which] = losses[which] * factor
        opt.backward({k: grad_scaler.scale(loss) for k, loss in losses.items()})
        grad_scaler.step(opt)
        grad_scaler.update()
        assert same(values(model), before) == (factor != 1.0)
        assert grad_scaler.get_scale() == 512.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_equal_the_oracle_on_their_rows(dtype: torch.dtype) -> None:
    model = towers(dtype)
    opt = wrapped(model, momentum)
    for seed in range(3):
        opt.zero_grad()
        expected = decouple(model.rows(seed))
        opt.backward(model.losses(seed))
        for ours, theirs in zip(grads(model), expected, strict=True):
            assert ours is not None and theirs is not None and ours.dtype == dtype
            unit = torch.finfo(dtype).eps
            torch.testing.assert_close(ours.double(), theirs, rtol=unit, atol=1e-6)
        opt.step()


def test_autocast() -> None:
    model = towers(torch.float32)
    opt = wrapped(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.losses()
    opt.step(losses)
    opt.step({name: functools.partial(_autocast_loss, model, name) for name in losses})
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def _autocast_loss(model: TwoTowers, name: str) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model.losses()[name]


# --- 4. hooks, add_param_group, plain step --------------------------------------------------------


@pytest.mark.filterwarnings("ignore:two steps")
@pytest.mark.parametrize("where", ["wrapper", "base"])
@pytest.mark.parametrize("how", ["step", "losses", "closure"])
def test_step_hooks_fire_once(where: str, how: str) -> None:
    model = towers()
    base = adamw(model.parameters())
    opt = ModalityDecoupledOptimizer(base)
    target = opt if where == "wrapper" else base
    fired: list[tuple[str, Optimizer]] = []
    target.register_step_pre_hook(lambda o, args, kwargs: fired.append(("pre", o)))
    target.register_step_post_hook(lambda o, args, kwargs: fired.append(("post", o)))
    StepLR(opt, step_size=1)  # patches step
    for _ in range(2):
        fired.clear()
        if how == "losses":
            opt.step(model.losses())
        elif how == "closure":
            opt.step(functools.partial(_backward_of_all, model))
        else:
            opt.backward(model.losses())
            opt.step()
        assert fired == [("pre", target), ("post", target)]


def _backward_of_all(model: TwoTowers) -> Tensor:
    """A closure as torch's own optimizers take it."""
    model.zero_grad()
    losses = list(model.losses().values())
    total = losses[0] + losses[1] + losses[2]
    total.backward()
    return total


def test_global_step_hooks_fire_for_wrapper_and_base() -> None:
    model = towers()
    base = adamw(model.parameters())
    opt = ModalityDecoupledOptimizer(base)
    fired: list[Optimizer] = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, args, kwargs: fired.append(o)),
        register_optimizer_step_post_hook(lambda o, args, kwargs: fired.append(o)),
    ]
    try:
        opt.step(model.losses())
    finally:
        for handle in handles:
            handle.remove()
    assert len(fired) == 4
    assert fired[0] is opt and fired[1] is base and fired[2] is base and fired[3] is opt


def test_state_dict_hooks_fire_once() -> None:
    model = towers()
    opt = wrapped(model)
    fired: list[str] = []
    opt.register_state_dict_pre_hook(lambda o: fired.append("save"))
    opt.register_state_dict_post_hook(lambda o, s: fired.append("saved"))
    opt.register_load_state_dict_pre_hook(lambda o, s: fired.append("load"))
    opt.register_load_state_dict_post_hook(lambda o: fired.append("loaded"))
    opt.load_state_dict(opt.state_dict())
    assert fired == ["save", "saved", "load", "loaded"]


@pytest.mark.parametrize("through", ["wrapper", "base"])
def test_add_param_group_after_construction(through: str) -> None:
    """The new group takes part, with its own settings, and its state is saved and loaded."""
    model = towers()
    base = AdamW([*model.a.parameters(), *model.b.parameters()], lr=1e-2)
    opt = ModalityDecoupledOptimizer(base, rule="pcgrad")
    train(model, opt, [0])
    model.zero_grad()  # the trunk was outside the optimizer until now
    (opt if through == "wrapper" else base).add_param_group(
        {"params": list(model.trunk.parameters()), "lr": 0.5}
    )
    before = values(model.trunk)
    report = opt.backward(model.losses())
    assert float(report.gramian[0, 0]) > 0, "the trunk is what the losses share"
    opt.step()
    assert not same(values(model.trunk), before)
    assert [group["lr"] for group in opt.param_groups] == [1e-2, 0.5]
    for group in opt.state_dict()["param_groups"]:
        assert group["gradsplit_seed"] == 0 and group["gradsplit_merges"] == 2
    opt.load_state_dict(saved_and_loaded(opt.state_dict()))
    train(model, opt, [1])


def test_add_param_group_between_accumulate_and_backward() -> None:
    p, q = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))
    opt = ModalityDecoupledOptimizer(SGD([p], lr=1.0), reduction="sum")
    opt.accumulate([(p * 3).sum(), (p * 5).sum()])
    opt.add_param_group({"params": [q]})
    opt.backward([(p + q * 7).sum(), (p + q * 9).sum()])
    assert p.grad is not None and p.grad.tolist() == [5.0]  # (3 + 1) / 2 + (5 + 1) / 2
    assert q.grad is not None and q.grad.tolist() == [8.0]  # 7 / 2 + 9 / 2


@pytest.mark.filterwarnings("ignore:two steps")
def test_plain_step_without_losses() -> None:
    """Also on a fresh optimizer, and by keyword, as checkpointing tools call it."""
    for call in (lambda o: o.step(), lambda o: o.step(None), lambda o: o.step(closure=None)):
        ours, plain = towers(), towers()
        opt, base = wrapped(ours), adamw(plain.parameters())
        call(opt)
        for model, optimizer in ((ours, opt), (plain, base)):
            for seed in range(3):
                optimizer.zero_grad()
                model.losses(seed)["a"].backward()
                assert call(optimizer) is None
        assert same(values(ours), values(plain))
        assert opt.param_groups[0]["gradsplit_merges"] == 0


@pytest.mark.filterwarnings("ignore:two steps")
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("base", [adamw, functools.partial(torch.optim.LBFGS, max_iter=4)])
def test_step_with_a_torch_closure(base: Base, keyword: bool) -> None:
    ours, plain = towers(), towers()
    opt, bare = wrapped(ours, base), base(plain.parameters())
    for _ in range(3):
        one, two = (functools.partial(_backward_of_all, model) for model in (ours, plain))
        result = opt.step(closure=one) if keyword else opt.step(one)
        assert torch.equal(result, bare.step(two))
    assert same(values(ours), values(plain))


@pytest.mark.parametrize("method", ["backward", "accumulate", "step"])
def test_lbfgs_as_base_refuses_losses(method: str) -> None:
    model = towers()
    opt = wrapped(model, torch.optim.LBFGS)
    snapshot = Snapshot(opt)
    for losses in (model.losses(), list(model.losses().values())):
        with pytest.raises(TypeError, match="LBFGS"):
            getattr(opt, method)(losses)
    snapshot.assert_unchanged()


def _takes_names() -> bool:
    """Not so before torch 2.6."""
    try:
        SGD(nn.Linear(1, 1).named_parameters(), lr=0.1)
    except TypeError:
        return False
    return True


def _bases() -> Iterator[Any]:
    for kind, options in (
        (SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
        (SGD, {"lr": 1e-2}),
        (Adam, {"lr": 1e-2, "amsgrad": True}),
        (AdamW, {"lr": 1e-2}),
        (RMSprop, {"lr": 1e-2, "momentum": 0.5}),
    ):
        for way in ("foreach", "fused"):
            if not (kind is RMSprop and way == "fused"):  # torch has none
                name = f"{kind.__name__}-{way}" + ("" if len(options) > 1 else "-bare")
                yield pytest.param(functools.partial(kind, **options, **{way: True}), id=name)


@pytest.mark.parametrize("base", list(_bases()))
@pytest.mark.parametrize("alone", [False, True], ids=["decoupled", "one loss"])
def test_bases_step_as_they_would_alone(base: Base, alone: bool) -> None:
    """A bare base goes the same way with the merged gradients; or on one loss, as plain torch.

    Unreached parameters included: no weight decay and no momentum touches them. All are reached
    first: torch's fused SGD wants every momentum buffer made in one step.
    """
    ours, plain = towers(torch.float32), towers(torch.float32)
    opt, bare = wrapped(ours, base), base(plain.parameters())
    for seed, name in enumerate(["a+b", "a", "b", "a"]):
        bare.zero_grad()
        if alone:
            opt.step({name: ours.losses(seed)[name]})
            plain.losses(seed)[name].backward()
        else:
            opt.step(ours.losses(seed) | {"b": None})
            for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
                assert p.grad is not None
                q.grad = p.grad.clone()
        bare.step()
    assert same(values(ours), values(plain))
    assert len(opt.state) == len(bare.state)


@pytest.mark.skipif(not _takes_names(), reason="this torch has no named parameters in groups")
def test_a_base_of_named_parameters() -> None:
    ours, plain = towers(), towers()
    opt = ModalityDecoupledOptimizer(AdamW(ours.named_parameters(), lr=1e-2))
    train(ours, opt, range(2))
    opt.load_state_dict(saved_and_loaded(opt.state_dict()))
    train(ours, opt, [2])
    train(plain, wrapped(plain), range(3))
    assert same(values(ours), values(plain))


def test_gradient_clipping_between_backward_and_step() -> None:
    model = towers()
    opt = wrapped(model, functools.partial(SGD, lr=1.0))
    before = values(model)
    opt.backward({name: 100 * loss for name, loss in model.losses().items()})
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    opt.step()
    moved = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
    assert float(torch.cat([step.flatten() for step in moved]).norm()) == pytest.approx(0.01)


# --- two bases wrapped together -------------------------------------------------------------------


def both(*parts: Optimizer) -> Optimizer:
    """One base that steps them all: the recipe, as it is."""
    made: Optimizer = runpy.run_path(str(RECIPES / "two_bases.py"))["Both"](*parts)
    return made


def parts_of(model: nn.Module) -> list[Optimizer]:
    """Muon for matrices and AdamW for the rest."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("needs torch 2.9, which has Muon")
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return [torch.optim.Muon(matrices, lr=1e-2), AdamW(others, lr=1e-3)]


@pytest.mark.parametrize("how", ["losses", "closure"])
def test_two_bases_step_on_what_is_decoupled_over_both(how: str) -> None:
    """As the parts do alone with the oracle's gradients; schedulers and state reach both."""
    ours, plain = towers(), towers()
    opt = ModalityDecoupledOptimizer(both(*parts_of(ours)))
    bare = parts_of(plain)
    schedulers = [StepLR(one, step_size=2, gamma=0.1) for one in (opt, *bare)]
    for seed in range(5):
        opt.zero_grad()
        if how == "losses":
            opt.step(ours.losses(seed))
        else:  # as Lightning's automatic optimization does it
            opt.step(lambda seed=seed: opt.joint(ours.losses(seed)).backward())
        for p, gradient in zip(plain.parameters(), decouple(plain.rows(seed)), strict=True):
            p.grad = gradient
        for part in bare:
            part.step()
        for scheduler in schedulers:
            scheduler.step()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    rates = [group["lr"] for group in opt.param_groups]
    assert rates == pytest.approx([1e-4, 1e-5])
    assert rates == [group["lr"] for part in bare for group in part.param_groups]


@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
def test_two_bases_resume_bit_for_bit(how: str) -> None:
    """State, seed and learning rates of both are there, and the scheduler still reaches them."""
    model = towers()
    opt = ModalityDecoupledOptimizer(both(*parts_of(model)), rule="pcgrad", seed=5)
    scheduler = StepLR(opt, step_size=3, gamma=0.5)
    whole = model, opt, scheduler

    def go(model: TwoTowers, opt: ModalityDecoupledOptimizer, scheduler: Any, seeds: Any) -> None:
        for seed in seeds:
            train(model, opt, [seed])
            scheduler.step()

    go(*whole, range(2))
    if how == "deepcopy":
        resumed = copy.deepcopy(whole)
    else:
        other = towers(seed=1)
        other_opt = ModalityDecoupledOptimizer(both(*parts_of(other)), rule="pcgrad")
        resumed = other, other_opt, StepLR(other_opt, step_size=3, gamma=0.5)
        for one, old in zip(resumed, whole, strict=True):
            one.load_state_dict(saved_and_loaded(old.state_dict()))
    go(*whole, range(2, 6))
    go(*resumed, range(2, 6))
    assert same(values(resumed[0]), values(model))


# --- 5. torch.distributed.checkpoint --------------------------------------------------------------


def test_every_key_of_state_is_a_parameter() -> None:
    model = towers()
    opt = wrapped(model, rule="pcgrad")
    opt.accumulate(model.losses())
    train(model, opt, range(2))
    parameters = set(model.parameters())
    assert set(opt.state) <= parameters
    state = opt.state_dict()
    assert set(state) == {"state", "param_groups"}
    assert set(state["state"]) == set(range(len(parameters)))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("base", [adamw, momentum])
def test_distributed_checkpoint_state_dicts_round_trip(
    flat: bool, base: Base, tmp_path: Path
) -> None:
    """In one process, through files; pcgrad goes on bit for bit: seed and counter survive."""
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    tools = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    options = tools.StateDictOptions(flatten_optimizer_state_dict=flat)
    model = towers()
    opt = wrapped(model, base, rule="pcgrad", seed=11)
    train(model, opt, range(3))
    before = copy.deepcopy(opt.state_dict())
    state = {
        "model": tools.get_model_state_dict(model),
        "optimizer": tools.get_optimizer_state_dict(model, opt, options=options),
    }
    assert same(opt.state_dict(), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=tmp_path / "checkpoint")

    resumed = towers(seed=1)
    resumed_opt = wrapped(resumed, base, rule="pcgrad", seed=11)
    target = {
        "model": tools.get_model_state_dict(resumed),
        "optimizer": tools.get_optimizer_state_dict(resumed, resumed_opt, options=options),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(target, checkpoint_id=tmp_path / "checkpoint")
    tools.set_model_state_dict(resumed, target["model"])
    tools.set_optimizer_state_dict(resumed, resumed_opt, target["optimizer"], options=options)
    assert resumed_opt.param_groups[0]["gradsplit_merges"] == 3
    train(model, opt, range(3, 6))
    train(resumed, resumed_opt, range(3, 6))
    assert same(values(resumed), values(model))


def test_distributed_checkpoint_of_a_fresh_optimizer_counts_no_merge() -> None:
    """It initialises the state by stepping with zero gradients."""
    tools = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = towers()
    before = values(model)
    opt = wrapped(model, rule="pcgrad")
    tools.get_optimizer_state_dict(model, opt)
    assert opt.param_groups[0]["gradsplit_merges"] == 0
    assert same(values(model), before)


# --- 6. frameworks where the loop calls ``backward`` itself (for the others see joint) ------------


@pytest.mark.filterwarnings("ignore")
def test_lightning_manual_optimization(tmp_path: Path) -> None:
    """Its optimizer is a proxy; training goes exactly as it does without Lightning."""
    pl = pytest.importorskip("lightning.pytorch")

    def step(opt: Any, model: TwoTowers, seed: int) -> None:
        opt.zero_grad()
        if seed == 1:  # plain, in between
            model.losses(seed)["a"].backward()
        else:
            if seed == 2:
                opt.accumulate(model.losses(seed + 10))
            report = opt.backward(model.losses(seed))
            assert opt.last is report
        opt.step()

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.inner = towers()

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            opt = self.optimizers()
            step(opt, self.inner, batch_idx)
            self.log_dict(opt.last.as_scalars())
            self.lr_schedulers().step()

        def configure_optimizers(self) -> Any:
            opt = wrapped(self.inner, rule="pcgrad")
            return [opt], [StepLR(opt, step_size=2, gamma=0.5)]

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(4, 1), batch_size=1))

    plain = towers()
    opt = wrapped(plain, rule="pcgrad")
    scheduler = StepLR(opt, step_size=2, gamma=0.5)
    for seed in range(4):
        step(opt, plain, seed)
        scheduler.step()
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.0025
    assert same(values(module.inner), values(plain))


@pytest.mark.filterwarnings("ignore")
def test_accelerate_in_one_process(tmp_path: Path) -> None:
    """Wrapped by Accelerate, saved and loaded by it: training goes exactly as it does without."""
    accelerate = pytest.importorskip("accelerate")
    model = towers()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, opt = accelerator.prepare(model, wrapped(model, rule="pcgrad"))

    def go(seeds: Iterable[int]) -> None:
        for seed in seeds:
            opt.zero_grad()
            opt.optimizer.backward(prepared.losses(seed))
            accelerator.clip_grad_norm_(prepared.parameters(), 1e6)
            opt.step()

    go(range(2))
    accelerator.save_state(str(tmp_path / "state"))
    go(range(5, 8))
    accelerator.load_state(str(tmp_path / "state"))
    go(range(2, 4))
    plain = towers()
    train(plain, wrapped(plain, rule="pcgrad"), range(4))
    assert same(values(model), values(plain))


# --- 7. DistributedDataParallel, as far as one process goes ---------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_ddp_of_one_process_with_a_closure_per_loss() -> None:
    """One forward per loss under ``no_sync()``."""
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    model = towers()
    expected: Row = decouple(model.rows())

    class Forward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, name: str) -> Tensor:
            return self.model.losses()[name]

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(Forward(), find_unused_parameters=True)
        opt = wrapped(model)
        with ddp.no_sync():
            opt.backward({name: functools.partial(ddp, name) for name in ("a", "b", "a+b")})
        for ours, theirs in zip(grads(model), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        opt.step()
    finally:
        distributed.destroy_process_group()
