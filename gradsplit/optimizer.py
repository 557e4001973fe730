"""ModalityDecoupledOptimizer: the only file that knows ``torch.optim``."""

import contextlib
import inspect
import itertools
import types
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from gradsplit import kernels, rules
from gradsplit.decoupling import Decoupling, join_losses
from gradsplit.gramian import check_fused, gramian, merge
from gradsplit.rows import (
    Losses,
    PartialRowTaker,
    Row,
    RowTaker,
    add_gradients,
    check_parameters,
    read_losses,
)

__all__ = ["ModalityDecoupledOptimizer"]

Rule = Callable[[Tensor], Tensor]
_RULES = ("gmd", "pcgrad")

# Scalars that must survive a checkpoint live in the param groups: every tool keeps those.
_SEED = "gradsplit_seed"
_MERGES = "gradsplit_merges"


class ModalityDecoupledOptimizer(Optimizer):
    r"""Wraps an optimizer; takes one loss per modality or combination, removes what conflicts.

    The gradients g_1 ... g_m of the losses are merged to sum_i w_i g_i with w = rule(K), where
    K_jk = <g_j, g_k> is their Gramian (GMD: Gradient-guided Modality Decoupling, AAAI 2024,
    arXiv 2402.16318).

    >>> import torch
    >>> from torch.optim import AdamW
    >>> shared, private = torch.nn.Linear(4, 1), torch.nn.Linear(3, 4)
    >>> opt = ModalityDecoupledOptimizer(AdamW([*shared.parameters(), *private.parameters()]))
    >>> text, audio = torch.randn(8, 4), torch.randn(8, 3)
    >>> losses = opt.step({"text": lambda: shared(text).square().mean(),
    ...                    "audio": lambda: shared(private(audio)).square().mean()})
    >>> sorted(losses)
    ['audio', 'text']
    >>> opt.last.cosine().shape
    torch.Size([2, 2])

    Args:
        base: any ``torch.optim.Optimizer``. Its groups and state are this optimizer's own.
        rule: ``"gmd"`` (the paper), ``"pcgrad"`` (what the released code runs; there a row also
            meets itself), or a callable Gramian (..., m, m) -> weights (..., m), for example a
            weighting of the TorchJD package; those that average, such as its ``UPGradWeighting``,
            divide by m themselves: give them ``reduction="sum"``. A lambda cannot be pickled; a
            function can.
        scope: where the Gramian is measured and the weights are applied. ``"shared"`` (the paper):
            the parameters that every loss of this step reaches. ``"all"`` (the released code):
            private parameters inflate the norms, and their gradients are rescaled by other
            losses' conflicts. Or an iterable of parameters. All other parameters get the plain
            sum (or mean) of their gradients. Where the scope is not reached at all, the weights
            are one.
        reduction: ``"mean"`` divides everything by m, the number of losses: with no conflict the
            result is the gradient of the mean loss. ``"sum"`` (the paper) divides nothing.
            ``"released"`` (the released code) divides by m on the parameters that every loss
            reaches, whatever the scope, and not on the others.
        seed: for ``"pcgrad"``, whose order is drawn from the seed and the number of merges so
            far: the same on every rank and every device, and after a resume.
        fused: whether Triton kernels measure and merge, in one launch each per dtype. None: where
            gradients are on a CUDA device, float32, bfloat16 or float16, there are at most 64
            losses and Triton is installed. True: everywhere, or an error. False: nowhere. The
            results agree to rounding.
        conflict_parameters: an iterable of parameters on which alone the Gramian is measured, by
            backwards that stop there; one backward of the weighted losses follows. An
            approximation: see below. None: all is exact.
        row_dtype: ``torch.bfloat16``: rows are rounded to it when each backward has ended, and
            memory for gradients peaks at (m + 2) / 2 times the parameters; sums stay in float32 or
            wider, the merged gradient and additions over micro-batches in the gradients' dtype.
            None: rows are as autograd leaves them.

    A loss *reaches* a parameter when autograd says so: its gradient is not None. Parameters that no
    loss reaches keep ``.grad`` as it was; frozen parameters are ignored. Gradients are taken with
    one backward per loss, so tensor hooks fire once per loss. Losses that share a graph need no
    ``retain_graph``. Dot products are accurate to 2e-6 of the product of the two norms or better,
    and in float64 for float64 gradients, however small or large the gradients are; the merged
    gradient is rounded to their dtype last. NaN and inf in a gradient reach ``.grad`` and are never
    dropped, so that ``torch.amp.GradScaler`` sees them. Memory for gradients peaks at m + 1 times
    the parameters and 8 MiB, besides what ``.grad`` held before, and nothing waits for the host
    until a report is read.

    *Cheaper steps.* With ``conflict_parameters``, every parameter gets the weights, private ones
    too: to spare them would take a second backward. ``scope`` does not apply, and the report is of
    the chosen parameters; each loss must reach some of them. All else is as in the exact step, at
    a price: the graphs of all losses are alive at once, those of closures and of accumulated
    micro-batches included. (To free them, call :meth:`backward` for every micro-batch: each is
    decoupled on its own then, and ``.grad`` adds up.) Tensor hooks on the chosen parameters fire
    m + 1 times, others once. Leaves outside the optimizer still get the plain sum, by a second
    backward. Autograd cannot stop inside a reentrant checkpoint. Under DDP each rank weighs its
    own losses.

    How good the weights are depends on the model; measure yours before you rely on them. The cost
    grows with the distance from the losses. On the sentiment transformer the last linear layer of
    the last block takes 1.3 joint steps (exact: 2.9), and its merged gradient is nearer to the
    exact one than the plain sum is (cosine 0.995 against 0.989). On the BraTS U-Net no choice is
    good: its head takes 1.0 joint steps (exact: 5.2), finds 18 % of the conflicts, and merges to
    the plain sum, in effect. So there is no default.

    Hooks registered on this optimizer or on the base fire once per step. torch's global optimizer
    hooks fire for both objects, twice per step. Hooks are not copied by deepcopy or pickle, as
    with every torch optimizer.

    Raises:
        TypeError: ``base`` is not an optimizer, or is already wrapped; ``rule``, ``scope`` or
            ``conflict_parameters`` is of the wrong type, or ``rule`` does not take exactly one
            argument.
        ValueError: unknown ``rule``, ``scope``, ``reduction`` or ``row_dtype``; a scope or
            ``conflict_parameters`` that are empty or not the base's; ``conflict_parameters`` with
            a scope or ``row_dtype``; a complex parameter.
        RuntimeError: ``fused=True`` without Triton.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        rule: str | Rule = "gmd",
        scope: str | Iterable[Tensor] = "shared",
        reduction: str = "mean",
        seed: int = 0,
        fused: bool | None = None,
        conflict_parameters: Iterable[Tensor] | None = None,
        row_dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(base, ModalityDecoupledOptimizer):
            raise TypeError("base is already a ModalityDecoupledOptimizer; wrap it once")
        if not isinstance(base, Optimizer):
            raise TypeError(f"base must be a torch.optim.Optimizer, got {type(base).__name__}")
        if reduction not in ("mean", "sum", "released"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'released', got {reduction!r}")
        if not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        if fused not in (None, True, False):
            raise TypeError(f"fused must be None, True or False, got {fused!r}")
        if fused and not kernels.has_triton():
            raise RuntimeError(
                "fused=True needs Triton, which is not installed: pip install triton, or let "
                "gradsplit choose with fused=None"
            )
        if row_dtype not in (None, torch.bfloat16):
            raise ValueError(
                f"row_dtype must be None or torch.bfloat16, got {row_dtype!r} (float16 would lose "
                "gradients below 6e-8 and above 65504)"
            )
        check_parameters(_parameters(base))
        rule, scope = _checked_rule(rule), _checked_scope(scope, base)
        measured: list[Tensor] | None = None
        if conflict_parameters is not None:
            expected = "conflict_parameters must be an iterable of the base's parameters"
            measured = _checked_parameters(conflict_parameters, base, expected)
            if scope != "shared":
                raise ValueError(
                    "conflict_parameters say where conflicts are measured, and every parameter "
                    "gets the weights: scope must be left at 'shared'"
                )
            if row_dtype is not None:
                raise ValueError(
                    "row_dtype saves memory for rows of all parameters, which conflict_parameters "
                    "does without: give one of the two"
                )
        # torch's __init__ assigns defaults, state and groups; ours are the base's, which must stay
        # as they are: a stand-in takes those assignments.
        self._base: Optimizer = SGD([torch.empty(0, requires_grad=True)], lr=0.0)
        super().__init__(self._base.param_groups, self._base.defaults)
        self._adopt(base, rule, scope, reduction, fused, measured, row_dtype)
        self._write_counters(seed, 0)

    def _adopt(
        self,
        base: Optimizer,
        rule: str | Rule,
        scope: str | list[Tensor],
        reduction: str,
        fused: bool | None,
        conflict_parameters: list[Tensor] | None,
        row_dtype: torch.dtype | None,
    ) -> None:
        self._base = base
        self._rule = rule
        self._scope = scope
        self._reduction = reduction
        self._fused = fused
        self._conflict_parameters = conflict_parameters
        self._row_dtype = row_dtype
        # Proxies (Lightning, Fabric) share these containers: they are changed, never rebound.
        self._pending: dict[str, Row] = {}
        self._absent: dict[str, None] = {}  # unavailable in some micro-batch, in order
        self._reports: list[Decoupling] = []
        self._active: list[RowTaker] = []

    # -- the decoupling ------------------------------------------------------------------------

    def backward(self, losses: Losses) -> Decoupling:
        """Add the merged gradient to ``.grad``, as ``loss.backward()`` would.

        Args:
            losses: a mapping from modality name, or tuple of modality names, to loss; or a
                sequence (rows "0", "1", ...). A loss is a scalar of shape () or (1,); or a closure
                that takes no argument, returns such a loss and does not call backward, so that
                only one graph is alive at a time (each closure runs its own forward: losses that
                share one are given as tensors); or None: unavailable in this batch. A closure may
                return None. One loss alone equals plain backward.

        Returns:
            The report. ``losses`` in it, and the rows, include what was accumulated before.

        Raises:
            TypeError, ValueError: no losses, all unavailable, a loss that is not a real scalar that
                requires grad, two devices, a loss that reaches no parameter of this optimizer, a
                closure that calls backward, sparse gradients, a rule that does not return (m,)
                weights, LBFGS as base, gradients that ``fused=True`` cannot take, a loss that
                reaches none of the ``conflict_parameters``. Parameters, ``.grad`` and optimizer
                state are as before.

        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> opt = ModalityDecoupledOptimizer(SGD([weight], lr=0.1), reduction="sum")
        >>> opt.backward([weight[0] + weight[1], -2 * weight[0]]).conflicts()
        [('0', '1')]
        >>> weight.grad  # of the plain sum: [-1., 1.]
        tensor([-1.,  2.])
        """
        return self._decouple(losses, replace=False)[0]

    def accumulate(self, losses: Losses) -> None:
        """Sum the gradients of one micro-batch into pending rows; ``.grad`` stays as it is.

        :meth:`backward` on the last micro-batch adds its own rows and merges all. Divide each loss
        by the number of micro-batches, as with plain torch. A combination may be absent from a
        micro-batch. :meth:`zero_grad` drops pending rows, and they are not part of
        :meth:`state_dict`.

        Args:
            losses: as in :meth:`backward`.

        Raises:
            TypeError, ValueError: as :meth:`backward`. Once rows are pending, a micro-batch in
                which everything is unavailable is no error, here or there.

        An error found before the first backward leaves the pending rows as they were. A closure
        that fails after rows of earlier micro-batches have been added to (in place: a copy would
        double the memory) drops them all, and a note on its exception says so.
        """
        with self._rows_of(losses) as (_, taken):
            self._absent.update(dict.fromkeys(name for name in taken if taken[name] is None))

    # torch declares step(closure); a mapping or sequence of losses is our extension of it.
    def step(self, closure: Any = None) -> Any:
        """Step the base; with losses: ``zero_grad()``, :meth:`backward` and the step in one.

        Args:
            closure: None; a torch closure, which calls backward itself, handed to the base; or
                losses as in :meth:`backward`.

        Returns:
            What the base returns; for losses, the detached losses in the same shape: a dict with
            the same keys, a list or a tuple; None where unavailable.

        With ``torch.amp.GradScaler`` call :meth:`backward` with the scaled losses and then
        ``scaler.step(optimizer)``: losses that are handed to a step are taken as they are, scaled
        or not, and nothing would unscale their gradients.

        Raises:
            RuntimeError: there are pending rows from :meth:`accumulate` that were never merged.
            TypeError, ValueError: as :meth:`backward`, and for a torch closure that returns several
                losses; nothing was touched and no step taken.

        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> opt = ModalityDecoupledOptimizer(SGD([weight], lr=0.1))
        >>> opt.step({"text": weight.sum(), "audio": None})
        {'text': tensor(3.), 'audio': None}
        """
        self._refuse_inside_closure("step()")
        self._refuse_pending()
        if closure is None:
            return self._base.step()
        if callable(closure) and not isinstance(closure, Mapping | Sequence):

            def checked() -> Any:
                result = closure()
                # Both before the base changes anything.
                self._refuse_pending()
                if isinstance(result, Mapping | Sequence):
                    raise TypeError(
                        "closure returned several losses; step takes the losses themselves, or a "
                        "mapping or sequence with one closure per loss"
                    )
                return result

            return self._base.step(checked)
        _, taken = self._decouple(closure, replace=True)
        self._base.step()
        if isinstance(closure, Mapping):
            return dict(zip(closure, taken.values(), strict=True))
        return (tuple if isinstance(closure, tuple) else list)(taken.values())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset ``.grad`` of all parameters, and drop pending rows.

        Raises:
            ValueError: called by a closure whose row is being taken.
        """
        self._refuse_inside_closure("zero_grad()")
        self._drop_pending()
        self._base.zero_grad(set_to_none)

    @property
    def last(self) -> Decoupling | None:
        """The latest report; None before the first merge."""
        return self._reports[-1] if self._reports else None

    def _decouple(
        self, losses: Losses, replace: bool
    ) -> tuple[Decoupling, dict[str, Tensor | None]]:
        with self._rows_of(losses) as (taker, taken):
            rows = [row.gradients for row in taker.rows.values()]
            counts = Counter(itertools.chain.from_iterable(rows))  # rows that hold a parameter
            reached = [p for p in taker.parameters if p in counts]
            common = {p for p in reached if counts[p] == len(rows)}
            scope = self._scope_of(reached, common)
            if self._fused:
                check_fused(rows)
            measured = gramian(rows, [p for p in reached if p in scope], self._fused)
            # One loss has no conflicts: exactly its gradient, NaN only where it has NaN.
            alone = not scope or len(rows) == 1
            weights = torch.ones_like(measured[0]) if alone else self._weights(measured)
            report = Decoupling(
                names=tuple(taker.rows),
                unavailable=tuple(n for n in self._absent | taken if n not in taker.rows),
                losses=join_losses([row.loss for row in taker.rows.values()]),
                gramian=measured,
                weights=weights,
            )
            taker.consume()
            merged: dict[Tensor, Tensor] = {}
            if isinstance(taker, PartialRowTaker):
                merged = self._merged_by_backward(taker, weights)
            else:
                for in_scope, by_all in itertools.product((True, False), repeat=2):
                    part = [p for p in reached if (p in scope, p in common) == (in_scope, by_all)]
                    factors = weights if in_scope else torch.ones_like(weights)
                    factors = factors / self._divisor(len(rows), by_all)
                    merged |= merge(rows, part, factors, self._fused, self._row_dtype)
        self._drop_pending()
        if replace:
            self._base.zero_grad()
        add_gradients(merged)
        self._write_counters(self._counter(_SEED), self._counter(_MERGES) + 1)
        self._reports[:] = [report]
        return report, taken

    def _merged_by_backward(self, taker: PartialRowTaker, weights: Tensor) -> dict[Tensor, Tensor]:
        m = len(weights)
        if self._reduction != "released":
            return taker.merge(weights / self._divisor(m, True))
        common = taker.reached_by_all()
        gradients = taker.merge(weights)
        return {p: g / self._divisor(m, p in common) for p, g in gradients.items()}

    def _scope_of(self, reached: Iterable[Tensor], common: set[Tensor]) -> set[Tensor]:
        if self._scope == "shared" and self._conflict_parameters is None:
            return common
        if isinstance(self._scope, str):  # "all", or all that partial rows hold
            return set(reached)
        return set(self._scope).intersection(reached)

    def _divisor(self, m: int, reached_by_all: bool) -> int:
        if self._reduction == "sum" or (self._reduction == "released" and not reached_by_all):
            return 1
        return m

    @torch.no_grad()
    def _weights(self, measured: Tensor) -> Tensor:
        m = len(measured)
        if self._rule == "gmd":
            return rules.gmd(measured)
        if self._rule == "pcgrad":
            return rules.pcgrad(measured, self._order(m, measured.device))
        assert callable(self._rule)
        weights = self._rule(measured.clone())  # the report keeps its own
        if not isinstance(weights, Tensor):
            raise TypeError(f"rule must return a tensor of weights, got {type(weights).__name__}")
        if weights.shape != (m,):
            raise ValueError(
                f"rule must return weights of shape ({m},) for a Gramian of shape ({m}, {m}), "
                f"got {tuple(weights.shape)}"
            )
        return weights.detach().to(measured)

    def _order(self, m: int, device: torch.device) -> Tensor:
        """(m, m): for each row a random permutation, from the seed and the number of merges.

        Drawn where it is used, and with integers alone, so that it is the same on every device.
        """
        # An odd multiplier keeps (seed, merges) and (seed + 1, merges - 1) apart.
        counter = _wrapped(self._counter(_SEED) * 0x9E3779B97F4A7C15 + self._counter(_MERGES))
        stream = _scrambled(torch.full((m, m), counter, dtype=torch.long, device=device))
        place = torch.arange(m * m, device=device, dtype=torch.long).view(m, m)
        return _scrambled(stream + place * _wrapped(0x9E3779B97F4A7C15)).argsort(
            dim=-1, stable=True
        )

    @contextlib.contextmanager
    def _rows_of(self, losses: Losses) -> Iterator[tuple[RowTaker, dict[str, Tensor | None]]]:
        """Take the rows of ``losses`` into the pending ones: all or nothing, to the end of with."""
        self._refuse_inside_closure("backward(), accumulate() or step()")
        if isinstance(self._base, LBFGS):
            raise TypeError(
                "LBFGS evaluates its closure several times per step and cannot take losses; "
                "use step(closure) with a closure that calls backward itself"
            )
        entries = read_losses(losses)
        taker = self._taker()
        self._active.append(taker)
        try:
            with taker:
                yield taker, taker.take(entries)
        finally:
            self._active.clear()

    def _taker(self) -> RowTaker:
        parameters = _parameters(self._base)
        if self._conflict_parameters is None:
            return RowTaker(parameters, self._pending, self._row_dtype)
        return PartialRowTaker(parameters, self._pending, self._conflict_parameters)

    def _refuse_pending(self) -> None:
        if self._pending:
            raise RuntimeError(
                f"step() with {len(self._pending)} pending rows from accumulate(); call "
                "backward(losses) with the last micro-batch first, or zero_grad() to drop them"
            )

    def _refuse_inside_closure(self, call: str) -> None:
        if self._active:
            raise ValueError(
                f"a closure given to this optimizer called its {call}; such a closure must only "
                "compute and return its loss"
            )

    # -- the contract of torch.optim -----------------------------------------------------------

    @property
    def base(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._base

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's."""
        return self._base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self._base.defaults = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base's."""
        return self._base.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self._base.state = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's, with the seed and the number of merges in each."""
        return self._base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self._base.param_groups = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base, at any time. Raises ValueError for complex parameters."""
        self._base.add_param_group(param_group)
        try:
            check_parameters(self._base.param_groups[-1]["params"])
        except ValueError:
            self._base.param_groups.pop()
            raise
        self._write_counters(self._counter(_SEED), self._counter(_MERGES))

    def state_dict(self) -> dict[str, Any]:
        """The state of the base. Warns when pending rows exist: they are not part of it."""
        self._warn_pending("state_dict()")
        return self._base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of a wrapped optimizer, or of a bare base; drops pending rows.

        The seed and the number of merges come from ``state_dict``; a bare base's has neither, and
        this optimizer's own are kept.
        """
        seed, merges = self._counter(_SEED), self._counter(_MERGES)
        self._base.load_state_dict(state_dict)
        self._drop_pending()
        first = self.param_groups[0]
        self._write_counters(first.get(_SEED, seed), first.get(_MERGES, merges))

    # State-dict hooks live where state_dict runs, on the base; they are handed this optimizer.

    def register_state_dict_pre_hook(
        self, hook: Callable[[Optimizer], None], prepend: bool = False
    ) -> RemovableHandle:
        return self._base.register_state_dict_pre_hook(lambda _: hook(self), prepend)

    def register_state_dict_post_hook(
        self,
        hook: Callable[[Optimizer, dict[str, Any]], dict[str, Any] | None],
        prepend: bool = False,
    ) -> RemovableHandle:
        return self._base.register_state_dict_post_hook(lambda _, s: hook(self, s), prepend)

    def register_load_state_dict_pre_hook(
        self,
        hook: Callable[[Optimizer, dict[str, Any]], dict[str, Any] | None],
        prepend: bool = False,
    ) -> RemovableHandle:
        return self._base.register_load_state_dict_pre_hook(lambda _, s: hook(self, s), prepend)

    def register_load_state_dict_post_hook(
        self, hook: Callable[[Optimizer], None], prepend: bool = False
    ) -> RemovableHandle:
        return self._base.register_load_state_dict_post_hook(lambda _: hook(self), prepend)

    def __getstate__(self) -> dict[str, Any]:
        self._warn_pending("a copy or pickle")
        return {
            "base": self._base,
            "rule": self._rule,
            "scope": self._scope,
            "reduction": self._reduction,
            "fused": self._fused,
            "conflict_parameters": self._conflict_parameters,
            "row_dtype": self._row_dtype,
            "scheduled": hasattr(self.step, "_wrapped_by_lr_sched"),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        options = dict(state)
        scheduled = options.pop("scheduled")
        self._adopt(**options)
        super().__setstate__({})
        if scheduled:
            # A learning-rate scheduler had patched step. Its patch holds on to the original
            # object, so the copy, which the copied scheduler drives, gets one of its own.
            self.step = types.MethodType(_scheduled_step, self)  # type: ignore[method-assign]

    def __repr__(self) -> str:
        scope = self._scope if isinstance(self._scope, str) else f"{len(self._scope)} parameters"
        measured = ""
        if self._conflict_parameters is not None:
            measured = f"conflict_parameters={len(self._conflict_parameters)} parameters, "
        return (
            f"{type(self).__name__}(rule={self._rule!r}, scope={scope!r}, "
            f"reduction={self._reduction!r}, fused={self._fused!r}, "
            f"{measured}row_dtype={self._row_dtype}, base={self._base!r})"
        )

    def _counter(self, key: str) -> int:
        value: int = self.param_groups[0].get(key, 0)
        return value

    def _write_counters(self, seed: int, merges: int) -> None:
        for group in self.param_groups:
            group[_SEED], group[_MERGES] = seed, merges

    def _drop_pending(self) -> None:
        self._pending.clear()
        self._absent.clear()

    def _warn_pending(self, what: str) -> None:
        if self._pending:
            warnings.warn(
                f"{what} does not include the {len(self._pending)} pending rows from "
                "accumulate(); call backward() first to keep them",
                stacklevel=3,
            )


def _scheduled_step(self: ModalityDecoupledOptimizer, *args: Any, **kwargs: Any) -> Any:
    """What torch's schedulers put in place of ``step``, to see that it was called."""
    self._opt_called = True  # type: ignore[attr-defined]
    return type(self).step(self, *args, **kwargs)


_scheduled_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _scrambled(keys: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele et al. 2014): 64 bits in, 64 well-mixed bits out."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        # The shift of a signed integer repeats its sign: the mask makes it a logical one.
        keys = (keys ^ ((keys >> shift) & ((1 << (64 - shift)) - 1))) * _wrapped(factor)
    return keys


def _wrapped(value: int) -> int:
    """The signed 64-bit integer with the low bits of ``value``."""
    return (value + 2**63) % 2**64 - 2**63


def _parameters(base: Optimizer) -> list[Tensor]:
    """Every parameter once."""
    return list(dict.fromkeys(p for group in base.param_groups for p in group["params"]))


def _checked_rule(rule: str | Rule) -> str | Rule:
    if isinstance(rule, str):
        if rule not in _RULES:
            raise ValueError(f"rule must be one of {_RULES} or a callable, got {rule!r}")
        return rule
    if not callable(rule):
        raise TypeError(f"rule must be one of {_RULES} or a callable, got {type(rule).__name__}")
    try:
        # A module's __call__ takes anything; its forward tells.
        signature = inspect.signature(getattr(rule, "forward", rule))
    except ValueError:  # a builtin that tells nothing
        return rule
    try:
        signature.bind(None)
    except TypeError:
        raise TypeError(
            "rule must take one argument, the Gramian (..., m, m), and return weights (..., m); "
            f"got a callable with signature {signature}. (PCGrad, which needs an order, is "
            "rule='pcgrad'.)"
        ) from None
    return rule


def _checked_scope(scope: str | Iterable[Tensor], base: Optimizer) -> str | list[Tensor]:
    expected = "scope must be 'shared', 'all' or an iterable of the base's parameters"
    if isinstance(scope, str):
        if scope not in ("shared", "all"):
            raise ValueError(f"{expected}, got {scope!r}")
        return scope
    return _checked_parameters(scope, base, expected)


def _checked_parameters(given: Iterable[Tensor], base: Optimizer, expected: str) -> list[Tensor]:
    if isinstance(given, Tensor | str) or not isinstance(given, Iterable):
        raise TypeError(f"{expected}, got {type(given).__name__}; put parameters in a list")
    parameters = list(given)
    known = set(_parameters(base))
    for index, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{expected}; element {index} is a {type(parameter).__name__}")
        if parameter not in known:
            raise ValueError(
                f"{expected}; element {index}, of shape {tuple(parameter.shape)}, is not one of "
                "them"
            )
    if not parameters:
        raise ValueError(f"{expected}, got none")
    return list(dict.fromkeys(parameters))
