"""Models, data and one training loop, on many ranks and, as the oracle, in one process.

In every step there is one batch, of which each rank has an equal share. The oracle is the ordinary
optimizer on all samples at once that have a loss, each loss from a forward of its own: it knows
nothing of ranks, of micro-batches, or of how the losses are handed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from gradsplit import ModalityDecoupledOptimizer
from tests.reference import TwoTowers, same

try:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
except ImportError:  # torch 2.4
    from torch.distributed._composable.fsdp import MixedPrecisionPolicy, fully_shard

NAMES = ("a", "b", "a+b")
TARGETS = {"a": 1.0, "b": -1.0, "a+b": 0.3}
BATCH = 12


class Towers(TwoTowers):
    """Private encoders and heads around a shared trunk."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.trunk[0] = norm(6)
        self.heads = nn.ModuleList(nn.Linear(1, 1) for _ in NAMES)

    def forward(self, x: Tensor, y: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        encoded: dict[str, Tensor] = {}
        if {"a", "a+b"} & set(names):
            encoded["a"] = self.a(x)
        if {"b", "a+b"} & set(names):
            encoded["b"] = self.b(y)
        if "a+b" in names:
            encoded["a+b"] = (encoded["a"] + encoded["b"]) / 2
        return {n: self.heads[NAMES.index(n)](self.trunk(encoded[n])) for n in names}


class OneTrunk(nn.Module):
    """Every loss reaches every parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor, y: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        outputs = self.trunk(torch.cat([x, y], 1))
        return {n: outputs[:, NAMES.index(n)] for n in names}


class Routed(OneTrunk):
    """An expert for rare samples, of which a rank may have none."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        both, rare = torch.cat([x, y], 1), y[:, :1] > 1
        outputs = self.trunk(both)
        if rare.any():
            outputs = torch.where(rare, self.expert(both), outputs)
        return {n: outputs[:, NAMES.index(n)] for n in names}


class Assorted(nn.Module):
    """Parameters of all sorts: complex, one number, frozen, unused, not in the usual order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (1, 2)).to(memory_format=torch.channels_last)
        self.phase = nn.Parameter(torch.randn(16, dtype=torch.complex128))
        self.gain = nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.ones(16), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.mix = nn.Parameter(torch.randn(3, 16).t() / 4)

    def forward(self, x: Tensor, y: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        seen = self.conv(x[:, :, None, None] * y[:, None, None, :]).tanh().flatten(1)
        outputs = ((seen * self.phase).real * self.frozen) @ self.mix * self.gain
        return {n: outputs[:, NAMES.index(n)] for n in names}


NETS: dict[str, Callable[[], nn.Module]] = {
    "towers": Towers,
    "one trunk": OneTrunk,
    "routed": Routed,
    "assorted": Assorted,
    "batch norm": lambda: Towers(nn.BatchNorm1d),
}


def fair(gramian: Tensor) -> Tensor:
    """A rule of the user's: long rows get shorter."""
    return (0.1 + gramian.diagonal(dim1=-2, dim2=-1)).rsqrt()


@dataclass(frozen=True)
class Case:
    """What is trained, and how the losses are handed over. ``str`` tells what is not default."""

    net: str = "towers"
    given: str = "one forward"  # or "several forwards", "closures", "joint"
    missing: str = "nowhere"  # a modality, on "one rank", "all but one", "everywhere"; or "all"
    micro: int = 1
    how: str = "ddp"  # see the wrappers
    options: Mapping[str, Any] = field(default_factory=dict)  # "trunk": its parameters
    dtype: torch.dtype = torch.float64
    plain: bool = False  # every other step is one of plain training
    clip: float | None = None
    within: float = 1e-12
    steps: int = 20
    seed: int = 0  # of the model in the oracle
    data: int = 0  # of the batches

    def __str__(self) -> str:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        options = given.pop("options")
        usual = vars(Case())
        del given["within"], given["steps"]
        told = [
            value if isinstance(value, str) else f"{name}={value}"
            for name, value in given.items()
            if value != usual[name]
        ]
        told += [f"{k}={getattr(v, '__name__', v)}" for k, v in options.items()]
        return ", ".join(told) or "default"

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        torch.set_default_dtype(self.dtype)
        net = NETS[self.net]()
        torch.set_default_dtype(torch.float32)
        return net

    def optimizer(self, net: nn.Module, **more: Any) -> ModalityDecoupledOptimizer:
        options = {
            key: list(net.trunk.parameters()) if value == "trunk" else value
            for key, value in self.options.items()
        }
        base = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
        return ModalityDecoupledOptimizer(base, **options, **more)

    def samples(self, step: int, micro: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.data + 10 * step + micro)
        both = (torch.randn(BATCH, width, generator=generator) for width in (3, 5))
        x, y = (whole.to(self.dtype).chunk(world)[rank] for whole in both)
        return x, y

    def names(self, step: int, micro: int, rank: int, world: int) -> list[str]:
        """Of the losses that a rank has."""
        chosen = {
            "nowhere": False,
            "one rank": rank == step % world,
            "all but one": rank != step % world,
            "everywhere": step % 3 == 1,
            "all": rank == step % world,
        }
        if not chosen[self.missing]:
            return list(NAMES)
        lacking = "ab"[(step + micro) % 2]
        return [n for n in NAMES if self.missing != "all" and lacking not in n.split("+")]

    def losses(self, net: nn.Module, step: int, micro: int, rank: int, world: int) -> Any:
        """What a rank hands over."""
        x, y = self.samples(step, micro, rank, world)
        have = self.names(step, micro, rank, world)
        if self.given == "closures":

            def closure(name: str) -> Tensor | None:
                return loss_of(net(x, y, [name]), name) if name in have else None

            # What is lacking is None, or a closure that returns it.
            return {
                n: None if step % 2 and n not in have else (lambda n=n: closure(n)) for n in NAMES
            }
        if self.given == "several forwards":
            outputs = {n: net(x, y, [n])[n] for n in have}
        else:
            outputs = net(x, y, have) if have else {}
        return {n: loss_of(outputs, n) if n in have else None for n in NAMES}

    def all_losses(self, net: nn.Module, step: int, micros: Sequence[int], world: int) -> Any:
        """Those of all ranks and some micro-batches in one."""
        losses: dict[str, Tensor | None] = {}
        places = [(micro, rank) for micro in micros for rank in range(world)]
        for name in NAMES:
            parts = [
                self.samples(step, *where, world)
                for where in places
                if name in self.names(step, *where, world)
            ]
            if self.net != "batch norm":  # its statistics are those of each rank's own share
                parts = [tuple(map(torch.cat, zip(*parts, strict=True)))] if parts else []
            outputs = [net(x, y, [name])[name] for x, y in parts]
            losses[name] = loss_of({name: torch.cat(outputs)}, name) if outputs else None
        return losses


def loss_of(outputs: Mapping[str, Tensor], name: str) -> Tensor:
    return (outputs[name] - TARGETS[name]).square().mean()


def take_step(
    case: Case, opt: ModalityDecoupledOptimizer, step: int, batches: Sequence[Callable[[], Any]]
) -> None:
    """One step on micro-batches."""
    opt.zero_grad()
    if case.plain and step % 2:
        for batch in batches:
            torch.stack(list(batch().values())).mean().backward()
    elif case.given == "joint":
        for batch in batches:
            opt.joint(batch()).backward()
    else:
        for batch in batches[:-1]:
            opt.accumulate(batch())
        opt.backward(batches[-1]())
    if case.clip is not None:
        parameters = [p for group in opt.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, case.clip)
    opt.step()


def place() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def error_of(call: Callable[[], object]) -> str:
    """What ``call`` raises, after its types ("KeyError LookupError Exception: ..."), or nothing."""
    try:
        call()
    except Exception as error:
        return f"{' '.join(kind.__name__ for kind in type(error).__mro__[:-2])}: {error}"
    return ""


@dataclass
class Outcome:
    parameters: list[Tensor]
    reports: list[tuple[Any, ...]]


def report_of(opt: ModalityDecoupledOptimizer) -> tuple[Any, ...]:
    last = opt.last
    return last.names, sorted(last.unavailable), last.losses, last.gramian, last.weights


def train(case: Case) -> Outcome:
    """On one rank of many."""
    net, opt, case, rank, world = start(case)
    reports = []
    for step in range(case.steps):
        micros = range(case.micro)
        batches = [partial(case.losses, net, step, micro, rank, world) for micro in micros]
        take_step(case, opt, step, batches)
        reports.append(report_of(opt))
    return Outcome([whole(p) for p in net.parameters()], reports)


def alone(case: Case, world: int) -> Outcome:
    """The oracle: one process on the samples of all."""
    net = case.model(case.seed)
    opt = case.optimizer(net)
    reports = []
    windows = [[m] for m in range(case.micro)] if case.given == "joint" else [range(case.micro)]
    for step in range(case.steps):
        # Each window is decoupled on its own, and .grad adds up.
        batches = [partial(case.all_losses, net, step, window, world) for window in windows]
        take_step(case, opt, step, batches)
        reports.append(report_of(opt))
    return Outcome(list(net.parameters()), reports)


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def start(
    case: Case, restore: str | None = None
) -> tuple[nn.Module, ModalityDecoupledOptimizer, Case, int, int]:
    """The wrapped model, its optimizer, the case as it is here, and our place among the shares."""
    rank, world = place()
    if case.how in SHARDED:
        net = case.model(case.seed)
        rank, world = SHARDED[case.how](net, rank, world)
        return net, case.optimizer(net), case, rank, world
    net = case.model(rank)  # all begin as the first rank does
    group = dist.group.WORLD
    if "halves" in case.how:  # two groups of two that know nothing of each other
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        half, rank, world = rank // 2, rank % 2, 2
        group, case = groups[half], replace(case, data=half)
    if case.how.startswith("group"):
        more = {"module": net} if "module" in case.how else {}
        return net, case.optimizer(net, process_group=group, **more), case, rank, world
    flags = {flag: True for flag in DDP_FLAGS if flag in case.how}
    ddp = DistributedDataParallel(net, process_group=group, **flags)
    model = {"wrapped": Holder, "compiled": compiled}.get(case.how, lambda module: module)(ddp)
    opt = case.optimizer(net, **({} if case.how == "late" else {"module": model}))
    if case.how == "late":
        opt.module = model
    return model, opt, case, rank, world


DDP_FLAGS = ("find_unused_parameters", "gradient_as_bucket_view")


class Holder(nn.Module):
    """As Fabric wraps a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.held = module

    def forward(self, *args: Any) -> Any:
        return self.held(*args)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


# -- FSDP2 ---------------------------------------------------------------------------------------


def flat(net: nn.Module, rank: int, world: int, **more: Any) -> tuple[int, int]:
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)), **more)
    return rank, world


def nested(net: nn.Module, rank: int, world: int) -> tuple[int, int]:
    for part in (net.a, net.b, net.trunk):
        flat(part, rank, world)
    return flat(net, rank, world)


def hybrid(net: nn.Module, rank: int, world: int) -> tuple[int, int]:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(net, mesh=mesh)
    return rank, world


def with_tensor_parallel(net: nn.Module, rank: int, world: int) -> tuple[int, int]:
    """Ranks that share a sample share the trunk's two linear layers."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"trunk.1": ColwiseParallel(), "trunk.3": RowwiseParallel()}
    parallelize_module(net, mesh["tensor"], plan)
    fully_shard(net, mesh=mesh["data"])
    return rank // 2, world // 2


def in_bfloat16(net: nn.Module, rank: int, world: int) -> tuple[int, int]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return flat(net, rank, world, mp_policy=policy)


SHARDED: dict[str, Callable[[nn.Module, int, int], tuple[int, int]]] = {
    "flat": flat,
    "nested": nested,
    "hybrid": hybrid,
    "tensor parallel": with_tensor_parallel,
    "bfloat16": in_bfloat16,
}


# -- the law -------------------------------------------------------------------------------------


def assert_exact(case: Case, outcomes: Sequence[Outcome], world: int) -> None:
    """The ranks agree bit for bit, and with one process up to ``case.within``."""
    expected = alone(case, world)
    assert case.options.get("rule", "gmd") not in ("gmd", "pcgrad") or any(
        (report[-1] > 1.001).any() for report in expected.reports
    ), "no conflicts: the case shows nothing"
    for rank, outcome in enumerate(outcomes):
        assert same(vars(outcome), vars(outcomes[0])), f"rank {rank} is not rank 0"
    for ours, theirs in zip(outcomes[0].reports, expected.reports, strict=True):
        assert ours[:2] == theirs[:2]
        for mine, other in zip(ours[2:], theirs[2:], strict=True):
            loose = 1e3 * case.within
            torch.testing.assert_close(mine, other, rtol=loose, atol=loose, check_dtype=False)
    for mine, other in zip(outcomes[0].parameters, expected.parameters, strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=0, atol=case.within)
