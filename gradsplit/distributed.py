"""Rows over ranks: who trains together, what they agree on, and a Jacobian that lies on all.

Imported only where ``torch.distributed`` is initialised.
"""

import contextlib
import gc
import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradsplit.jacobian import Gradients, Jacobian, in_memory

try:
    from torch.distributed.tensor import DTensor
except ImportError:  # torch 2.4
    from torch.distributed._tensor import DTensor  # type: ignore[attr-defined]

__all__ = ["RankError", "Ranks", "ShardedJacobian", "ranks_of"]


class RankError(RuntimeError):
    """Raised on every rank at once: nobody waits for it to be told."""


class Ranks:
    """The processes that train one model together.

    Args:
        group: all of them.
        ddps: what must not average while rows are taken.
        fsdps: modules whose settings must let every backward average.
        sharded: whether some parameters are DTensors.
        leaves: parameters that all ranks have, one at least. Messages lie on their device.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        ddps: Sequence[DistributedDataParallel],
        fsdps: Sequence[nn.Module],
        sharded: bool,
        leaves: Sequence[Tensor],
    ) -> None:
        self.group, self.sharded, self.leaves = group, sharded, leaves
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._ddps, self._fsdps, self.device = ddps, fsdps, leaves[0].device

    def agree(self, said: Mapping[str, Any] | Exception, closures: bool = False) -> None:
        """The first message of a call, 24 bytes: every rank says the same, or all raise.

        Args:
            said: what must be equal, or what kept this rank from saying it.
            closures: whether this rank has some. If one has, buffers of DDP are broadcast now:
                forwards in closures, of which ranks may run different numbers, do without.

        Raises:
            RankError: ranks differ, or one has failed. Not on a rank that has failed itself.
        """
        text = repr(said)
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        message = torch.tensor([number, -number, closures], device=self.device)
        dist.all_reduce(message, dist.ReduceOp.MAX, group=self.group)
        most, least, some = message.tolist()
        if most != -least:
            self._raise(said)
        for ddp in self._ddps if some else ():
            if ddp.will_sync_module_buffers():
                ddp._sync_buffers()

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Where this rank fails inside ``with``, it says so in place of its first message."""
        try:
            yield
        except Exception as error:
            self.agree(error)
            raise

    def sum(self, loss: Tensor | None, message: Sequence[float]) -> list[float]:
        """A loss (None: zero) and numbers, summed over ranks.

        Raises:
            RankError: a rank has called :meth:`fail` instead.
        """
        numbers = torch.tensor([0.0, 0.0, *message], dtype=torch.float64, device=self.device)
        if loss is not None:
            numbers[1] = loss.detach().reshape(())
        dist.all_reduce(numbers, group=self.group)
        failed, *summed = numbers.tolist()
        if failed:
            self._raise({})
        return summed

    def fail(self, error: Exception, length: int) -> None:
        """Tell the others, who wait for :meth:`sum` of ``length`` numbers, that none will come."""
        numbers = torch.zeros(length + 2, dtype=torch.float64, device=self.device)
        numbers[0] = 1.0
        dist.all_reduce(numbers, group=self.group)
        self._raise(error)

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """DDP averages nothing and broadcasts nothing inside ``with``."""
        before = [(d.require_backward_grad_sync, d.require_forward_param_sync) for d in self._ddps]
        for ddp in self._ddps:
            # A forward has armed it for one backward, and a plain backward for a collective in the
            # next forward, which not every rank may run.
            ddp.reducer._reset_state()
            ddp.require_backward_grad_sync = ddp.require_forward_param_sync = False
        try:
            yield
        finally:
            for ddp, (backward, forward) in zip(self._ddps, before, strict=True):
                ddp.require_backward_grad_sync = backward
                ddp.require_forward_param_sync = forward

    def check(self) -> None:
        """Raises ValueError where DDP or FSDP is set to something that cannot be right."""
        for ddp in self._ddps:
            refused = {
                "static_graph=True promises one backward per forward": ddp.static_graph,
                "a communication hook would not see the rows": bool(ddp._comm_hooks),
                "join() is for ranks that stop early, and rows need all": ddp._join_config.enable,
                "its mixed_precision casts gradients in hooks of one backward; use "
                "torch.autocast": ddp.mixed_precision is not None,
            }
            for why, so in refused.items():
                if so:
                    raise ValueError(f"module: this DistributedDataParallel cannot be used: {why}")
        for module in self._fsdps:
            state: Any = module._get_fsdp_state()  # type: ignore[operator]
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for group in groups:
                if group is not None and not (group.reduce_grads and group.all_reduce_grads):
                    raise ValueError(
                        "set_requires_gradient_sync(False): each backward must leave averaged "
                        "gradients; set it to True, and use accumulate() for micro-batches"
                    )
                if group is not None and not group.reshard_after_backward:
                    raise ValueError(
                        "set_reshard_after_backward(False): several backwards of one forward need "
                        "True"
                    )

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """From the first rank of the group, once, as DDP's constructor does.

        Raises:
            RankError: shapes or dtypes differ between ranks.
        """
        found = [t.detach() for t in dict.fromkeys(tensors) if not isinstance(t, DTensor)]
        self.agree({"parameters and buffers": [(tuple(t.shape), t.dtype) for t in found]})
        source = dist.get_global_rank(self.group, 0)
        for tensor in found:
            dense = tensor.contiguous()
            dist.broadcast(dense, src=source, group=self.group)
            if dense is not tensor:
                tensor.copy_(dense)

    def _raise(self, said: Mapping[str, Any] | Exception) -> None:
        """RankError with what each rank has to say; but a rank that has failed knows already."""
        mine = f"{type(said).__name__}: {said}" if isinstance(said, Exception) else dict(said)
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine, group=self.group)
        if isinstance(said, Exception):
            return
        failed = [f"rank {r}: {text}" for r, text in enumerate(everyone) if isinstance(text, str)]
        if failed:
            raise RankError(f"stopped, as another rank has failed; {'; '.join(failed)}")
        lines = []
        for key in dict.fromkeys(key for one in everyone for key in one):
            who: defaultdict[str, list[int]] = defaultdict(list)
            for rank, one in enumerate(everyone):
                who[repr(one.get(key))[:500]].append(rank)
            if len(who) > 1:
                what = (f"rank {', '.join(map(str, some))}: {text}" for text, some in who.items())
                lines.append(f"{key}: {'; '.join(what)}")
        raise RankError(f"ranks differ in {'; and in '.join(lines)}")


def ranks_of(
    parameters: Sequence[Tensor], module: nn.Module | None, group: dist.ProcessGroup | None
) -> Ranks | None:
    """Who trains these parameters together; None: this process alone.

    Raises:
        ValueError: ``module`` and ``group`` do not go together, or with the parameters.
        RuntimeError: there are more ranks, and nothing says how they belong together.
    """
    ddps: list[DistributedDataParallel] = []
    for one in module.modules() if module is not None else ():
        if isinstance(one, DistributedDataParallel):
            ddps.append(one)
        name = type(one).__name__
        if name == "FullyShardedDataParallel" or type(one).__module__.startswith("deepspeed"):
            raise ValueError(f"module: {name} is not supported; use fully_shard (FSDP2) or DDP")
    for parameter in parameters:
        if type(parameter).__name__ == "FlatParameter" or hasattr(parameter, "ds_id"):
            raise ValueError(
                "base: its parameters are those of FSDP1 or DeepSpeed ZeRO-3, which is not "
                "supported; use fully_shard (FSDP2) or DDP"
            )
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    world = dist.get_world_size()
    for ddp in ddps:
        slice_of_mesh = getattr(ddp, "device_mesh", None) is not None
        if sharded or (slice_of_mesh and dist.get_world_size(ddp.process_group) < world):
            raise ValueError(
                "module: DistributedDataParallel over tensor parallelism is not supported, as no "
                "rank sees a whole gradient; use fully_shard over it"
            )
    if ddps and group is not None:
        raise ValueError("process_group: leave it out, the DistributedDataParallel has its own")
    if ddps:
        group = ddps[0].process_group
        if not set(parameters) <= {p for ddp in ddps for p in ddp.parameters()}:
            raise ValueError(
                "module: some of the base's parameters are not in it; wrap all that is trained"
            )
    elif sharded:
        group = group or dist.group.WORLD
        if all(p.device_mesh.size() != dist.get_world_size(group) for p in sharded):
            raise ValueError(
                "process_group: give the group of all ranks that train this model; no parameter "
                f"lies on all {dist.get_world_size(group)} ranks"
            )
    elif group is None:
        if world == 1:
            return None
        of = "its module holds no DistributedDataParallel" if module is not None else "no module"
        raise RuntimeError(
            f"there are {world} ranks, and this optimizer has {of} and no process_group, so that "
            "ranks would drift apart: write ModalityDecoupledOptimizer(base, module=model) with "
            "the DistributedDataParallel model (or opt.module = model, once it is wrapped), or "
            "process_group=torch.distributed.group.WORLD where there is no DDP. (Ranks that train "
            "models of their own give a group of one rank.)"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("process_group: this rank is not in it")
    assert group is not None
    fsdps = _fsdps(parameters, module) if sharded else []
    modules = [module] if module is not None else fsdps
    leaves = [*parameters, *(p for m in modules for p in m.parameters())]
    return Ranks(group, ddps, fsdps, bool(sharded), list(dict.fromkeys(leaves)))


def _fsdps(parameters: Iterable[Tensor], module: nn.Module | None) -> list[nn.Module]:
    """The FSDP2 modules that hold parameters: in the module; where none is told, anywhere."""
    modules: Iterable[Any] = gc.get_objects() if module is None else module.modules()
    mine = set(parameters)
    return [
        one
        for one in modules
        if issubclass(type(one), nn.Module)
        and hasattr(one, "set_requires_gradient_sync")
        and not mine.isdisjoint(one.parameters())
    ]


class ShardedJacobian:
    """A :class:`Jacobian` of which each rank has its part of every row, averaged over ranks.

    Of a plain parameter with n elements each of R ranks has ceil(n / R), in the order of memory,
    the last ones fewer; of a DTensor what it has anyway. All leaves that other ranks do not have
    stay on this rank alone, and are in no row.

    Args:
        part: of this rank, empty.
        ranks: all.
        single: as for :class:`Jacobian`: rows leave as they come, and are in transit during the
            next backward. Else they leave when the window is merged.
        partial: whether rows tell weights for a backward that follows.
    """

    def __init__(self, part: Jacobian, ranks: Ranks, single: bool, partial: bool) -> None:
        self.shared, self.names, self.backwards = part.shared, part.names, 0
        self.leaves = leaves = [leaf for leaf in ranks.leaves if leaf.requires_grad]
        self.blocks = part.blocks  # the same on all ranks, but for the lengths of rows
        self.graphs_tell, self.stops = False, not ranks.sharded
        self._part, self._ranks, self._single, self._partial = part, ranks, single, partial
        self._following = 1 + len(leaves)  # numbers in the next message; 0: there is none
        self._stand_ins = {leaf: _stand_in(leaf, ranks) for leaf in leaves}
        self._leaves = {stand_in: leaf for leaf, stand_in in self._stand_ins.items()}
        part.uncounted = {self._stand_ins[p] for p in leaves if not _counted(p, ranks)}
        self._heard: list[float] = []
        self._pending: dict[str, _Row] = {}
        self._counts: dict[str, float] = {}
        self._common = set(leaves)  # reached by every backward of any rank so far
        self._in_transit: tuple[str, Tensor, _Transit, set[Tensor]] | None = None
        self._eligible: Collection[Tensor] = ()

    def add(
        self, name: str, loss: Tensor | None, gradients: Gradients, eligible: Collection[Tensor]
    ) -> None:
        """As :meth:`Jacobian.add`; ``loss`` None: this rank lacks it, and another may have it.

        Raises:
            RankError: another rank has failed, or lacks a loss under FSDP.
        """
        found = {leaf: self._local(leaf, gradient) for leaf, gradient in gradients.items()}
        have = float(loss is not None)
        total, count, *reach = self._heard or self._hear(name, loss, found)
        self._heard = []
        if count == 0:
            return
        if self._ranks.sharded:  # it was said before the backward, and is the same on all
            reach = [float(leaf in found) for leaf in self._stand_ins]
        self.backwards += 1
        reached = {leaf for leaf, n in zip(self._stand_ins, reach, strict=True) if n > 0}
        self._common &= reached
        self._counts[name] = self._counts.get(name, 0.0) + count
        if self._single:
            self._send(name, _Row(found, int(have), count, total, reached), eligible)
            return
        window = self._pending.setdefault(name, _Row())
        for leaf, gradient in found.items():
            if leaf in window.gradients:
                window.gradients[leaf] += gradient
            else:
                wide = torch.promote_types(gradient.dtype, torch.float32)
                window.gradients[leaf] = gradient.to(wide, copy=True)
        window.mine, window.count = window.mine + int(have), window.count + count
        window.loss, window.reached = window.loss + total, window.reached | reached
        self._eligible = eligible

    def ready(self, name: str, loss: Tensor) -> None:
        """Before a backward: FSDP's waits for all ranks, and one may have failed in its closure."""
        if self._ranks.sharded:
            self._heard = self._hear(name, loss, ())

    def _hear(self, name: str, loss: Tensor | None, found: Collection[Tensor]) -> list[float]:
        """The message of a row, summed: loss, how many have it, how many reach each leaf."""
        have = float(loss is not None)
        message = [have, *(float(leaf in found) for leaf in self._stand_ins)]
        heard = self._ranks.sum(loss, message)
        if self._ranks.sharded and 0 < heard[1] < self._ranks.size:
            raise RankError(
                f"{name!r} is unavailable on {self._ranks.size - heard[1]:.0f} of "
                f"{self._ranks.size} ranks; FSDP and tensor parallelism need every loss on every "
                "rank: where the modality is missing, run it on zeros and multiply its loss by zero"
            )
        return heard

    def gramian(self, fused: bool | None) -> Tensor:
        """(m, m), float64, of whole rows; bit for bit the same on all ranks."""
        for name in list(self._pending):
            self._send(name, self._pending.pop(name), self._eligible)
        self._arrive()
        self._following = self._following if self._partial else 0
        total = self._part.gramian(fused)
        dist.all_reduce(total, group=self._ranks.group)
        return total

    def losses(self) -> Tensor:
        """(m,): means over micro-batches and ranks."""
        return self._part.losses()

    def share(self, name: str) -> float:
        """Of one backward on one rank in the mean of a loss, times the number of ranks."""
        return self._ranks.size / self._counts[name]

    def merged(self, weights: Tensor, fused: bool | None) -> dict[Tensor, Tensor]:
        """As :meth:`Jacobian.merged`; every rank has all of it, or of DTensors its part.

        Uses the rows up too.
        """
        parts = self._part.merged(weights, fused)
        self.blocks.clear()  # what is gathered needs the memory
        return self._whole(parts)

    def weights(self, rule: Callable[[Tensor], Tensor], gramian: Tensor) -> Tensor:
        """(m,): those of the first rank, for a rule may draw at random, or fail on one."""
        following, self._following = self._following, len(gramian)
        mine = rule(gramian)
        mine = mine if self._ranks.rank == 0 else torch.zeros_like(mine)
        _, *weights = self._ranks.sum(None, mine.tolist())
        self._following = following
        return mine.new_tensor(weights)

    def everywhere(self, reached: Sequence[set[Tensor]]) -> set[Tensor]:
        """As :meth:`Jacobian.everywhere`, each on some rank."""
        common = set(self._stand_ins)
        for some in reached:
            _, _, *counts = self._ranks.sum(
                None, [0.0, *(float(p in some) for p in self._stand_ins)]
            )
            common &= {p for p, n in zip(self._stand_ins, counts, strict=True) if n > 0}
        return common

    def averaged(self, gradients: Gradients) -> dict[Tensor, Tensor]:
        """Gradients of one backward on each rank -> their mean over ranks, by leaf."""
        row = ShardedJacobian(Jacobian(False, True, "sum", None), self._ranks, True, False)
        row.add("", torch.zeros(()), gradients, ())
        self._following = 0
        row._arrive()
        return row.merged(torch.ones(1), None)

    def fail(self, error: Exception) -> None:
        """Tell the others, where they wait for this rank's next message."""
        self._heard = []
        if self._following and not isinstance(error, RankError):
            self._ranks.fail(error, self._following)

    def _send(self, name: str, row: "_Row", eligible: Collection[Tensor]) -> None:
        """Take the row in transit out of it, and put this one into it."""
        self._arrive()
        if self.shared:
            eligible = self._common.intersection(eligible)
        chosen = {self._stand_ins[leaf] for leaf in eligible}
        dtype = torch.promote_types(next(iter(self._stand_ins)).dtype, torch.float32)
        loss = torch.tensor(row.loss / row.count, dtype=dtype, device=self._ranks.device)
        self._in_transit = (name, loss, self._start(row), chosen)
        if not self._single:
            self._arrive()

    def _arrive(self) -> None:
        if self._in_transit is not None:
            (name, loss, transit, chosen), self._in_transit = self._in_transit, None
            self._part.add(name, loss, transit.wait(), chosen)

    def _start(self, row: "_Row") -> "_Transit":
        """Scatter what is whole; what is not is there already."""
        transit = _Transit({}, [])
        groups: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for leaf, stand_in in self._stand_ins.items():
            if leaf not in row.reached:
                continue
            if not isinstance(leaf, DTensor) and leaf.numel() > 0:
                groups[leaf.device, leaf.dtype].append(leaf)
            else:  # what reaches other ranks only is zero here
                part = row.gradients.get(leaf, torch.zeros_like(stand_in))
                transit.parts[stand_in] = (part / row.mine).to(stand_in.dtype)
        for leaf, gradient in row.gradients.items():
            if leaf not in self._stand_ins:
                transit.parts[leaf] = gradient / row.mine
        for leaves in groups.values():
            flat = [_flat(leaf, row.gradients.get(leaf)) for leaf in leaves]
            lines = torch._chunk_cat(flat, 0, self._ranks.size).div_(row.count)
            stand_ins = [self._stand_ins[leaf] for leaf in leaves]
            lines = lines.to(stand_ins[0].dtype)
            line = lines.new_empty(lines.shape[1])
            new = hasattr(dist, "reduce_scatter_single")  # torch deprecates the other
            scatter = dist.reduce_scatter_single if new else dist.reduce_scatter_tensor
            work = scatter(line, lines.view(-1), group=self._ranks.group, async_op=True)
            transit.works.append((work, line, lines, self._lengths(leaves), stand_ins))
        return transit

    def _whole(self, parts: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """By leaf, gathered from all ranks where it is whole."""
        found = {key: part for key, part in parts.items() if key not in self._leaves}
        groups: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for leaf, stand_in in self._stand_ins.items():
            if stand_in not in parts:
                continue
            if isinstance(leaf, DTensor):
                found[leaf] = DTensor.from_local(
                    parts[stand_in],
                    leaf.device_mesh,
                    leaf.placements,
                    run_check=False,
                    shape=leaf.shape,
                    stride=leaf.stride(),
                )
            else:
                groups[leaf.device, leaf.dtype].append(leaf)
        for leaves in groups.values():
            mine = [parts[self._stand_ins[leaf]] for leaf in leaves]
            lengths = self._lengths(leaves)
            line = mine[0].new_zeros(sum(lengths))
            for piece, part in zip(line.split(lengths), mine, strict=True):
                piece[: len(part)] = part
            lines = line.new_empty(self._ranks.size * len(line))
            new = hasattr(dist, "all_gather_single")
            gather = dist.all_gather_single if new else dist.all_gather_into_tensor
            gather(lines, line, group=self._ranks.group)
            for leaf, columns in zip(
                leaves, lines.view(-1, len(line)).split(lengths, 1), strict=True
            ):
                whole = columns.contiguous().as_strided(*in_memory(leaf))
                found[leaf] = torch.view_as_complex(whole) if leaf.is_complex() else whole
        return found

    def _lengths(self, leaves: Iterable[Tensor]) -> list[int]:
        return [_length(leaf, self._ranks.size) for leaf in leaves]

    def _local(self, leaf: Tensor, gradient: Tensor) -> Tensor:
        """What this rank holds of a gradient: of a DTensor, its part of the parameter."""
        if not isinstance(gradient, DTensor):
            return gradient
        if isinstance(leaf, DTensor) and gradient.placements != leaf.placements:
            gradient = gradient.redistribute(placements=leaf.placements)
        return gradient.to_local()


@dataclass
class _Row:
    """A loss on its way: sums over micro-batches of this rank, and what all ranks say of it."""

    gradients: dict[Tensor, Tensor] = field(default_factory=dict)
    mine: int = 0  # backwards on this rank
    count: float = 0.0  # on all ranks
    loss: float = 0.0
    reached: set[Tensor] = field(default_factory=set)


@dataclass
class _Transit:
    """A row that is being scattered."""

    parts: dict[Tensor, Tensor]
    works: list[tuple[Any, ...]]

    def wait(self) -> dict[Tensor, Tensor]:
        """This rank's part, by stand-in."""
        for work, line, _, lengths, stand_ins in self.works:
            work.wait()
            for piece, stand_in in zip(line.split(lengths), stand_ins, strict=True):
                self.parts[stand_in] = piece[: len(stand_in)]
        self.works.clear()
        return self.parts


def _stand_in(leaf: Tensor, ranks: Ranks) -> Tensor:
    """A view of the part of a parameter that is this rank's."""
    if isinstance(leaf, DTensor):
        local: Tensor = leaf.to_local().detach()
        return local
    flat = _flat(leaf, leaf.detach())
    length = _length(leaf, ranks.size)
    return flat[ranks.rank * length : (ranks.rank + 1) * length]


def _length(leaf: Tensor, ranks: int) -> int:
    """How much of a plain leaf each rank has, in reals; the last ones have less."""
    return -(-math.prod(in_memory(leaf)[0]) // ranks)


def _flat(leaf: Tensor, gradient: Tensor | None) -> Tensor:
    """The gradient of a leaf as one vector of reals, in the order of the leaf's memory."""
    shape, strides = in_memory(leaf)
    if gradient is None:
        dtype = leaf.dtype.to_real() if leaf.is_complex() else leaf.dtype
        return torch.zeros(math.prod(shape), dtype=dtype, device=leaf.device)
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient.resolve_conj())
    if gradient.stride() != tuple(strides):
        gradient = gradient.new_empty(0).new_empty_strided(shape, strides).copy_(gradient)
    return gradient.as_strided((math.prod(shape),), (1,))


def _counted(leaf: Tensor, ranks: Ranks) -> bool:
    """Whether this rank counts its part of a leaf: of ranks with the same part, the first does."""
    if not isinstance(leaf, DTensor):
        return True
    mesh = leaf.device_mesh
    here = zip(mesh.get_coordinate() or (), leaf.placements, strict=True)
    first = dist.get_global_rank(ranks.group, 0)
    # A mesh that not all ranks are in has sisters with the same parameter.
    return bool((mesh.mesh == first).any()) and all(
        place == 0 or not placement.is_replicate() for place, placement in here
    )
