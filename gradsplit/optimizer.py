"""ModalityDecoupledOptimizer: the only file that knows ``torch.optim``."""

import contextlib
import inspect
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from gradsplit import rules
from gradsplit.backward import add_gradients, take_partial_rows, take_rows, weighted_backward
from gradsplit.decoupling import Decoupling
from gradsplit.jacobian import Jacobian
from gradsplit.joint import joint_loss
from gradsplit.losses import Entry, Losses, add_note, read_losses
from gradsplit.rows import has_triton

if TYPE_CHECKING:
    from gradsplit.distributed import Ranks, ShardedJacobian

__all__ = ["ModalityDecoupledOptimizer"]

Rule = Callable[[Tensor], Tensor]
_RULES = ("gmd", "pcgrad", "sum")

# Scalars that must survive a checkpoint live in the param groups: every tool keeps those.
_SEED = "gradsplit_seed"
_MERGES = "gradsplit_merges"

# torch.compile does not trace these methods: it would take a minute to compile and gain nothing.
# (torch.optim's own decorator; that of torch.compiler would import the compiler with gradsplit.)
_untraced = torch._disable_dynamo  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Options:
    """The constructor's, checked. The defaults are for pickles that are older than an option."""

    rule: str | Rule = "gmd"
    scope: str | list[Tensor] = "shared"
    reduction: str = "mean"
    fused: bool | None = None
    conflict_parameters: list[Tensor] | None = None
    row_dtype: torch.dtype | None = None


@dataclass
class _Window:
    """The micro-batches of one step, so far."""

    keyed: bool  # the losses came in a mapping
    jacobian: "Jacobian | ShardedJacobian"
    seen: dict[str, Any] = field(default_factory=dict)  # all names, unavailable ones too
    graphs: defaultdict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    used_up: bool = False  # merging has begun


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
        rule: ``"gmd"`` (the paper); ``"pcgrad"`` (what the released code runs; there a row also
            meets itself); ``"sum"``, which decouples nothing: all weights are one, and the report
            is a diagnosis of plain training; or a callable Gramian (..., m, m) -> weights (..., m),
            for example a weighting of the TorchJD package; those that average, such as its
            ``UPGradWeighting``, divide by m themselves: give them ``reduction="sum"``. A lambda
            cannot be pickled; a function can. What a rule remembers from step to step is not in
            :meth:`state_dict`: save it beside (TorchJD's stateful weightings are modules, but
            their ``state_dict`` leaves it out; ``copy.deepcopy`` and ``pickle`` keep it).
        scope: where the Gramian is measured and the weights are applied. ``"shared"`` (the paper):
            the parameters that every backward of this step reaches. ``"all"`` (the released code):
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
        fused: whether Triton kernels measure and merge. None: where gradients are on a CUDA
            device, float32, bfloat16 or float16, there are at most 64 losses and Triton is
            installed. True: everywhere, or an error. False: nowhere. The results agree to rounding.
            The kernels run in Triton's interpreter on every test; on a GPU they are untimed.
        conflict_parameters: an iterable of parameters on which alone the Gramian is measured, by
            backwards that stop there; one backward of the weighted losses follows. An
            approximation: see below. None: all is exact.
        row_dtype: ``torch.bfloat16``: rows are kept in it, and memory for gradients peaks at
            (m + 2) / 2 times the parameters; the merged gradient has the parameters' dtype.
            None: rows are as autograd leaves them.
        module: with several ranks of ``torch.distributed``, the ``DistributedDataParallel`` model,
            or what holds it. Can be set later, ``opt.module = model``. One process needs none.
        process_group: the ranks that train together, without DDP. Parameters, and the buffers of
            ``module``, are broadcast from the first of them, now.

    A loss *reaches* a parameter when autograd says so: its gradient is not None. Parameters that no
    loss reaches keep ``.grad`` as it was; frozen parameters are ignored. A parameter that a loss
    reaches in one micro-batch and not in another is not shared in that window. Leaves outside the
    optimizer that the losses reach are treated as private parameters are (those that only a
    reentrant checkpoint knows of cannot be seen, and get the plain sum). Gradients are taken with
    one backward per loss, so tensor hooks fire once per loss. Losses that share a graph need no
    ``retain_graph``. Dot products are accurate to 2e-6 of the product of the two norms or better,
    and in float64 for float64 gradients, however small or large the gradients are; the merged
    gradient is rounded to their dtype last. Complex parameters count as pairs of reals. NaN and inf
    in a gradient reach ``.grad`` and are never dropped, so that ``torch.amp.GradScaler`` sees them.
    (A loss that averages no sample is NaN: give None for it.) Memory for gradients peaks at m + 1
    times the shared parameters and about twice the private ones (with :meth:`accumulate`: once for
    each loss that reaches them), besides what ``.grad`` held before, and nothing waits for the host
    until a report is read.

    *Two optimizers.* Parameters that belong to another optimizer (Muon for matrices, AdamW for the
    rest) get the plain mean of their gradients. To decouple all of them, wrap one base that steps
    both: ``docs/recipes/two_bases.py``.

    *torch.compile.* A compiled forward that all losses share joins their graphs, so that every loss
    seems to reach every parameter: give ``scope=`` the parameters of the trunk that is really
    shared. Exact, but for what a whole batch lacks: it gets zeros, not None, and momentum moves it;
    leave it out of the forward. ``backward``, ``accumulate`` and ``step`` are never traced.

    *Many ranks.* ``docs/distributed.rst``. Each row is averaged over the ranks that have the loss;
    None says that this rank lacks it. All ranks call with the same names in the same order, or all
    raise. Parameters that are DTensors (``fully_shard``, tensor parallelism) need no argument; of
    them every rank has every loss, or none has. Copies and pickles leave ``module`` and
    ``process_group`` behind.

    *Cheaper steps.* With ``conflict_parameters``, every parameter gets the weights, private ones
    and leaves outside the optimizer too. ``scope`` does not apply, and the report is of the chosen
    parameters; each loss must reach some of them. All else is as in the exact step, at a price: the
    graphs of all losses are alive at once, those of closures and of accumulated micro-batches
    included. (To free them, call :meth:`backward` for every micro-batch: each is decoupled on its
    own then, and ``.grad`` adds up.) Tensor hooks on the chosen parameters fire m + 1 times, others
    once. Autograd cannot stop inside a reentrant checkpoint.

    How good the weights are depends on the model; measure yours before you rely on them. The cost
    grows with the distance from the losses. On the sentiment transformer the last linear layer of
    the last block takes 1.3 joint steps (exact: 2.9), and its merged gradient is nearer to the
    exact one than the plain sum is (cosine 0.995 against 0.989). On the BraTS U-Net no choice is
    good: its head takes 1.0 joint steps (exact: 5.3), finds 18 % of the conflicts, and merges to
    the plain sum, in effect. So there is no default.

    Hooks registered on this optimizer or on the base fire once per step. torch's global optimizer
    hooks fire for both objects, twice per step. Hooks are not copied by deepcopy or pickle, as
    with every torch optimizer.

    Raises:
        TypeError: ``base`` is not an optimizer, or is already wrapped; ``rule``, ``scope`` or
            ``conflict_parameters`` is of the wrong type, ``rule`` does not take exactly one
            argument, or is an aggregator of TorchJD.
        ValueError: unknown ``rule``, ``scope``, ``reduction`` or ``row_dtype``; a scope or
            ``conflict_parameters`` that are empty or not the base's; ``conflict_parameters`` with
            a scope or ``row_dtype``; a ``process_group`` that this rank is not in.
        RuntimeError: ``fused=True`` without Triton; ranks differ in what they would broadcast.
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
        module: nn.Module | None = None,
        process_group: Any = None,
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
        if fused and not has_triton():
            raise RuntimeError(
                "fused=True needs Triton, which is not installed: pip install triton, or let "
                "gradsplit choose with fused=None"
            )
        if row_dtype not in (None, torch.bfloat16):
            raise ValueError(
                f"row_dtype must be None or torch.bfloat16, got {row_dtype!r} (float16 would lose "
                "gradients below 6e-8 and above 65504)"
            )
        rule, scope = _checked_rule(rule), _checked_scope(scope, base)
        measured: list[Tensor] | None = None
        if conflict_parameters is not None:
            expected = "conflict_parameters must be an iterable of the base's parameters"
            measured = _checked_parameters(conflict_parameters, base, expected)
            if scope != "shared" or row_dtype is not None:
                raise ValueError(
                    "conflict_parameters say where conflicts are measured, every parameter gets "
                    "the weights, and there are no rows of all of them: leave scope and row_dtype"
                )
        # torch's __init__ assigns defaults, state and groups; ours are the base's, which must stay
        # as they are: a stand-in takes those assignments.
        stand_in = SGD([torch.empty(0, requires_grad=True)], lr=0.0)
        options = _Options(rule, scope, reduction, fused, measured, row_dtype)
        self._adopt(stand_in, options)
        super().__init__(stand_in.param_groups, stand_in.defaults)
        self._adopt(base, options)
        self._write_counters(seed, 0)
        self._process_group: Any = process_group
        self.module = module

    def _adopt(self, base: Optimizer, options: _Options) -> None:
        self._base, self._options = base, options
        self._process_group = None
        # Proxies (Lightning, Fabric) share these containers: they are changed, never rebound.
        self._windows: list[_Window] = []  # the one with pending rows, if there is one
        self._reports: list[Decoupling] = []
        self._active: list[None] = []  # not empty while rows are taken
        self._plain_steps: list[None] = []  # before the first merge
        self._modules: list[nn.Module] = []  # what holds the parameters, where that was told
        self._ranks: list[Ranks | None] = []  # who trains them, once that has been found out

    # -- the decoupling ------------------------------------------------------------------------

    @_untraced
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
            The report. Rows and ``losses`` in it are means over this and the accumulated
            micro-batches.

        Raises:
            TypeError, ValueError: no losses, all unavailable, a loss that is not a real scalar that
                requires grad, one given twice, two devices, a loss that reaches no parameter of
                this optimizer, a closure that calls backward, a sequence where a mapping was
                accumulated, sparse gradients, gradients that a hook has consumed, a rule that does
                not return (m,) weights, LBFGS as base, gradients that ``fused=True`` cannot take, a
                loss that reaches none of the ``conflict_parameters``. Parameters, ``.grad`` and
                optimizer state are as before, but for what hooks of yours have done.
            RuntimeError: ranks differ, or another has failed; this says which, and how. There are
                several, and neither ``module``, ``process_group`` nor DTensors. A setting of DDP
                or FSDP that cannot be right is a ValueError.

        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> opt = ModalityDecoupledOptimizer(SGD([weight], lr=0.1), reduction="sum")
        >>> opt.backward([weight[0] + weight[1], -2 * weight[0]]).conflicts()
        [('0', '1')]
        >>> weight.grad  # of the plain sum: [-1., 1.]
        tensor([-1.,  2.])
        """
        return self._decouple(losses, replace=False)[0]

    @_untraced
    def accumulate(self, losses: Losses) -> None:
        """Take the rows of one micro-batch and keep them pending; ``.grad`` stays as it is.

        :meth:`backward` on the last micro-batch adds its own rows and merges all. Each row, and
        each loss's part of what is outside the scope, is the mean over the micro-batches in which
        that loss was available: divide nothing. :meth:`zero_grad` drops pending rows, and they are
        not part of :meth:`state_dict`.

        Args:
            losses: as in :meth:`backward`. A loss may be absent from a micro-batch.

        Raises:
            TypeError, ValueError: as :meth:`backward`. Once rows are pending, a micro-batch in
                which everything is unavailable is no error, here or there.

        An error before the first backward of a call leaves the pending rows as they were. A later
        one (a closure that fails) drops them, for they have been added to; a note on the exception
        says so.
        """
        with self._taken(losses, last=False):
            pass  # that is all

    @_untraced
    def joint(self, losses: Losses) -> Tensor:
        """One scalar whose ``backward()`` is that of :meth:`backward`: for frameworks.

        Lightning's automatic optimization, Accelerate, the Hugging Face Trainer, ignite and others
        call ``backward`` themselves. Return this to them, and loss scaling, division by the number
        of micro-batches and clipping work as ever. Each micro-batch is decoupled on its own, and
        ``.grad`` adds up.

        Args:
            losses: as in :meth:`backward`, but tensors and None only.

        Returns:
            The mean of the losses (``reduction="sum"``: their sum), shape (). Its backward
            multiplies each loss by the gradient that arrives, and decouples; the report, of losses
            multiplied so, is :attr:`last`. (``backward(inputs=...)`` does not get there.) Without
            grad mode it is a plain number.

        Raises:
            TypeError, ValueError: as :meth:`backward`, here or when backward is called; a closure.
            RuntimeError: in a second backward.

        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> opt = ModalityDecoupledOptimizer(SGD([weight], lr=0.1))
        >>> loss = opt.joint({"text": weight.sum(), "audio": -2 * weight[0]})
        >>> loss.backward()
        >>> loss.item(), weight.grad, opt.last.conflicts()
        (0.5, tensor([-0.5000,  1.0000]), [('text', 'audio')])
        """
        self._refuse_inside_closure("joint()")
        ranks = self._found_ranks() if torch.is_grad_enabled() else None
        keyed = isinstance(losses, Mapping)

        def decouple(scaled: Any) -> None:
            self.backward(scaled if keyed else list(scaled.values()))

        with _telling(ranks):
            entries = read_losses(losses, needs_grad=torch.is_grad_enabled())
            empty = None if ranks is None else torch.zeros((), device=ranks.device)
            return joint_loss(entries, self._options.reduction, decouple, empty)

    # torch declares step(closure); a mapping or sequence of losses is our extension of it.
    @_untraced
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

        Warns:
            UserWarning: once, at the second step without any merge: ``loss.backward()`` decouples
                nothing. (The first belongs to tools that step fresh optimizers for a checkpoint.)

        Raises:
            RuntimeError: there are pending rows from :meth:`accumulate` that were never merged.
            TypeError, ValueError: as :meth:`backward`, and for a torch closure that returns several
                losses.

        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> opt = ModalityDecoupledOptimizer(SGD([weight], lr=0.1))
        >>> opt.step({"text": weight.sum(), "audio": None})
        {'text': tensor(3.), 'audio': None}
        """
        self._refuse_inside_closure("step()")
        if closure is None or (callable(closure) and not isinstance(closure, Mapping | Sequence)):
            if closure is None:
                self._refuse_pending()
                result: Any = self._base.step()
            else:
                result = self._base.step(self._checked(closure))
            self._warn_of_plain_steps()
            return result
        ranks = self._found_ranks()
        with _telling(ranks):
            self._refuse_pending()
        _, taken = self._decouple(closure, replace=True)
        self._base.step()
        if isinstance(closure, Mapping):
            return dict(zip(closure, taken.values(), strict=True))
        return (tuple if isinstance(closure, tuple) else list)(taken.values())

    def _checked(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A torch closure, with what must be seen to before the base changes anything."""

        def checked() -> Any:
            value = closure()
            self._refuse_pending()
            if isinstance(value, Mapping | Sequence):
                raise TypeError(
                    "closure returned several losses; step takes the losses themselves, or a "
                    "mapping or sequence with one closure per loss"
                )
            return value

        return checked

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset ``.grad`` of all parameters, and drop pending rows.

        Raises:
            ValueError: called by a closure whose row is being taken.
        """
        self._refuse_inside_closure("zero_grad()")
        self._windows.clear()
        self._base.zero_grad(set_to_none)

    @property
    def last(self) -> Decoupling | None:
        """The latest report; None before the first merge."""
        return self._reports[-1] if self._reports else None

    def _decouple(
        self, losses: Losses, replace: bool
    ) -> tuple[Decoupling, dict[str, Tensor | None]]:
        with self._taken(losses, last=True) as (window, taken):
            jacobian = window.jacobian
            gramian = jacobian.gramian(self._options.fused)
            # One loss has no conflicts: exactly its gradient, NaN only where it has NaN.
            alone = len(gramian) == 1 or not jacobian.blocks
            weights = torch.ones_like(gramian[0]) if alone else self._weights(gramian, jacobian)
            report = Decoupling(
                names=tuple(jacobian.names),
                unavailable=tuple(n for n in window.seen | taken if n not in jacobian.names),
                losses=jacobian.losses(),
                gramian=gramian,
                weights=weights,
            )
            window.used_up = True
            if self._options.conflict_parameters is None:
                merged = jacobian.merged(weights, self._options.fused)
            else:
                trainable, reduction = self._trainable(), self._options.reduction
                merged = weighted_backward(window.graphs, weights, trainable, jacobian, reduction)
            if replace:
                self._base.zero_grad()
            add_gradients({leaf: g for leaf, g in merged.items() if leaf.requires_grad})
        self._windows.clear()
        self._write_counters(self._counter(_SEED), self._counter(_MERGES) + 1)
        self._reports[:] = [report]
        return report, taken

    @contextlib.contextmanager
    def _taken(
        self, losses: Losses, last: bool
    ) -> Iterator[tuple[_Window, dict[str, Tensor | None]]]:
        """Take the rows of ``losses`` into the window: all or nothing, to the end of ``with``."""
        self._refuse_inside_closure("backward(), accumulate() or step()")
        if isinstance(self._base, LBFGS):
            raise TypeError(
                "LBFGS evaluates its closure several times per step and cannot take losses; "
                "use step(closure) with a closure that calls backward itself"
            )
        ranks = self._found_ranks()
        entries, window = self._read(losses, last, ranks)
        jacobian, earlier = window.jacobian, window.jacobian.backwards
        self._active.append(None)
        try:
            with ranks.muted() if ranks is not None else contextlib.nullcontext():
                taken = self._take(entries, window)
                if not jacobian.backwards:
                    names = ", ".join(repr(entry.name) for entry in entries)
                    raise ValueError(
                        f"losses: all are unavailable (None): {names}; skip this batch"
                    )
                yield window, taken
        except BaseException as error:
            if isinstance(error, Exception):
                jacobian.fail(error)
            if earlier and (jacobian.backwards > earlier or window.used_up):
                self._windows.clear()
                add_note(
                    error,
                    "rows accumulated from earlier micro-batches had already been added to, or "
                    "merged, and were dropped; start the accumulation again",
                )
            raise
        finally:
            self._active.clear()
        window.seen.update(taken)
        self._windows[:] = [window]

    def _read(
        self, losses: Losses, last: bool, ranks: "Ranks | None"
    ) -> tuple[list[Entry], _Window]:
        """What was handed over, and the window it goes into; all ranks agree on both, or raise."""
        with _telling(ranks):
            if ranks is not None:
                ranks.check()
            earlier_names = self._windows[0].jacobian.names if self._windows else ()
            entries = read_losses(losses, earlier=earlier_names)
            window = self._window(isinstance(losses, Mapping), last, ranks)
        if ranks is not None:
            closures = any(callable(entry.loss) for entry in entries)
            ranks.agree(self._said(entries, window, last, ranks), closures)
        return entries, window

    def _take(self, entries: list[Entry], window: _Window) -> dict[str, Tensor | None]:
        trainable = self._trainable()
        if self._options.conflict_parameters is None:
            scope = trainable if isinstance(self._options.scope, str) else self._options.scope
            return take_rows(entries, trainable, window.jacobian, set(scope))
        measured = [p for p in self._options.conflict_parameters if p.requires_grad]
        if not measured:
            raise ValueError(
                "conflict_parameters: none of them requires grad any more, so that conflicts "
                "cannot be measured"
            )
        return take_partial_rows(entries, trainable, measured, window.jacobian, window.graphs)

    def _window(self, keyed: bool, last: bool, ranks: "Ranks | None") -> _Window:
        """The one with pending rows, or a new one."""
        if not self._windows:
            reduction = self._options.reduction
            partial = self._options.conflict_parameters is not None
            shared = self._options.scope == "shared" and not partial
            # Over ranks each loss arrives once.
            single = last or ranks is not None
            jacobian = Jacobian(shared, single, reduction, self._options.row_dtype)
            if ranks is None:
                return _Window(keyed, jacobian)
            from gradsplit.distributed import ShardedJacobian

            if partial and ranks.sharded and reduction == "released":
                raise ValueError(
                    "conflict_parameters of DTensors: reduction='released' is not supported, as "
                    "FSDP hides which losses reach a parameter"
                )
            return _Window(keyed, ShardedJacobian(jacobian, ranks, last, partial))
        window = self._windows[0]
        if window.keyed != keyed:
            kinds = ("a sequence", "a mapping")
            raise ValueError(
                f"losses is {kinds[keyed]}, but {kinds[window.keyed]} was accumulated before it: "
                "name the losses of all micro-batches in one way"
            )
        return window

    def _trainable(self) -> list[Tensor]:
        return [parameter for parameter in _parameters(self._base) if parameter.requires_grad]

    def _weights(self, gramian: Tensor, jacobian: "Jacobian | ShardedJacobian") -> Tensor:
        m = len(gramian)
        if self._options.rule == "gmd":
            return rules.gmd(gramian)
        if self._options.rule == "pcgrad":
            seed, merges = self._counter(_SEED), self._counter(_MERGES)
            return rules.pcgrad(gramian, rules.draw_order(m, seed, merges, gramian.device))
        if self._options.rule == "sum":
            return torch.ones_like(gramian[0])
        return jacobian.weights(self._given_weights, gramian)

    def _given_weights(self, gramian: Tensor) -> Tensor:
        """Those of the user's rule, checked."""
        m = len(gramian)
        assert callable(self._options.rule)
        with torch.no_grad():
            weights = self._options.rule(gramian.clone())  # the report keeps its own
        if not isinstance(weights, Tensor):
            raise TypeError(f"rule must return a tensor of weights, got {type(weights).__name__}")
        if weights.shape != (m,):
            raise ValueError(
                f"rule must return weights of shape ({m},) for a Gramian of shape ({m}, {m}), "
                f"got {tuple(weights.shape)}"
            )
        return weights.to(gramian)

    def _refuse_pending(self) -> None:
        if self._windows:
            raise RuntimeError(
                f"step() with {len(self._windows[0].jacobian.names)} pending rows from "
                "accumulate(); call backward(losses) with the last micro-batch first, or "
                "zero_grad() to drop them"
            )

    def _refuse_inside_closure(self, call: str) -> None:
        if self._active:
            raise ValueError(
                f"a closure given to this optimizer called its {call}; such a closure must only "
                "compute and return its loss"
            )

    def _warn_of_plain_steps(self) -> None:
        if self._reports or len(self._plain_steps) > 1:
            return
        self._plain_steps.append(None)
        if len(self._plain_steps) == 2:
            warnings.warn(
                "two steps and nothing has been decoupled: give this optimizer the losses one by "
                "one, opt.backward(losses), or opt.joint(losses) where a framework calls backward; "
                "loss.backward() is plain training",
                stacklevel=6,  # of a bare step(), through what torch has wrapped around it
            )

    # -- many ranks ----------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module | None:
        """The module that holds the parameters; frameworks that wrap it late set it late."""
        return self._modules[0] if self._modules else None

    @module.setter
    def module(self, module: nn.Module | None) -> None:
        if not (module is None or isinstance(module, nn.Module)):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        self._modules[:] = [] if module is None else [module]
        self._ranks.clear()
        if self._process_group is not None:
            tensors = [p for group in self.param_groups for p in group["params"]]
            if module is not None:
                tensors += [*module.parameters(), *module.buffers()]
            self._broadcast(tensors)

    def _broadcast(self, tensors: Iterable[Tensor]) -> None:
        ranks = self._found_ranks()
        if ranks is not None:
            ranks.broadcast(tensors)

    def _found_ranks(self) -> "Ranks | None":
        """Who trains the parameters together; None where it is this process alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        parameters = _parameters(self._base)
        known = self._ranks[0].leaves if self._ranks and self._ranks[0] is not None else ()
        if not self._ranks or (known and not set(parameters).issubset(known)):
            from gradsplit.distributed import ranks_of

            self._ranks[:] = [ranks_of(parameters, self.module, self._process_group)]
        return self._ranks[0]

    def _said(
        self, entries: Sequence[Entry], window: _Window, last: bool, ranks: "Ranks"
    ) -> dict[str, Any]:
        """What must be the same on all ranks."""
        places = {p: place for place, p in enumerate(_parameters(self._base))}

        def plain(option: Any) -> Any:
            if isinstance(option, list):
                return [places[p] for p in option]
            return getattr(option, "__qualname__", type(option)) if callable(option) else option

        said = {
            "losses": [entry.name for entry in entries],
            "call": "backward" if last else "accumulate",
            "names accumulated before": list(window.seen),
            "options": {name: plain(option) for name, option in vars(self._options).items()},
            "seed and number of merges": (self._counter(_SEED), self._counter(_MERGES)),
            "parameters": [(tuple(p.shape), str(p.dtype)) for p in places],
            "what requires grad": [leaf.requires_grad for leaf in ranks.leaves],
        }
        if ranks.sharded:  # or torch's own collectives would wait for each other
            said["available losses"] = [e.name for e in entries if e.loss is not None]
        return said

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

    def train(self) -> None:
        """The base's, where it has one (schedule-free optimizers)."""
        if hasattr(self._base, "train"):
            self._base.train()

    def eval(self) -> None:
        """The base's, where it has one."""
        if hasattr(self._base, "eval"):
            self._base.eval()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base, at any time."""
        self._base.add_param_group(param_group)
        if self._process_group is not None:
            self._broadcast(self.param_groups[-1]["params"])
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
        self._windows.clear()
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
        scheduled = hasattr(self.step, "_wrapped_by_lr_sched")
        return {"base": self._base, "scheduled": scheduled, **vars(self._options)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        options = dict(state)
        base, scheduled = options.pop("base"), options.pop("scheduled", False)
        self._adopt(base, _Options(**options))
        super().__setstate__({})
        if scheduled:
            # A learning-rate scheduler had patched step. Its patch holds on to the original
            # object, so the copy, which the copied scheduler drives, gets one of its own.
            self.step = types.MethodType(_scheduled_step, self)  # type: ignore[method-assign]

    def __repr__(self) -> str:
        options = {
            name: f"{len(value)} parameters" if isinstance(value, list) else repr(value)
            for name, value in vars(self._options).items()
            if value is not None
        }
        listed = ", ".join(f"{name}={value}" for name, value in options.items())
        return f"{type(self).__name__}({listed}, base={self._base!r})"

    def _counter(self, key: str) -> int:
        value: int = self.param_groups[0].get(key, 0)
        return value

    def _write_counters(self, seed: int, merges: int) -> None:
        for group in self.param_groups:
            group[_SEED], group[_MERGES] = seed, merges

    def _warn_pending(self, what: str) -> None:
        if self._windows:
            warnings.warn(
                f"{what} does not include the {len(self._windows[0].jacobian.names)} pending rows "
                "from accumulate(); call backward() first to keep them",
                stacklevel=3,
            )


def _telling(ranks: "Ranks | None") -> contextlib.AbstractContextManager[None]:
    """Where this process fails inside ``with``, other ranks get to know."""
    return contextlib.nullcontext() if ranks is None else ranks.told()


def _scheduled_step(self: ModalityDecoupledOptimizer, *args: Any, **kwargs: Any) -> Any:
    """What torch's schedulers put in place of ``step``, to see that it was called."""
    self._opt_called = True  # type: ignore[attr-defined]
    return type(self).step(self, *args, **kwargs)


_scheduled_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _parameters(base: Optimizer) -> list[Tensor]:
    """Every parameter once."""
    return list(dict.fromkeys(p for group in base.param_groups for p in group["params"]))


def _checked_rule(rule: str | Rule) -> str | Rule:
    if isinstance(rule, str):
        if rule not in _RULES:
            raise ValueError(f"rule must be one of {_RULES} or a callable, got {rule!r}")
        return rule
    _refuse_of_torchjd(rule)
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


def _refuse_of_torchjd(rule: object) -> None:
    """What TorchJD has besides weightings of a Gramian would be taken, and give nonsense."""
    kinds = {kind.__name__ for kind in type(rule).__mro__ if kind.__module__.startswith("torchjd")}
    if "Aggregator" in kinds:
        weighting = getattr(rule, "gramian_weighting", getattr(rule, "weighting", None))
        name = type(weighting).__name__
        there = "WeightedAggregator" in kinds and not name.startswith("_")
        raise TypeError(
            f"rule is an aggregator of TorchJD, {type(rule).__name__}, which maps a Jacobian to a "
            "vector; a rule maps a Gramian to weights. "
            + (f"Give torchjd.aggregation.{name}" if there else "It has no weighting of a Gramian")
        )
    if kinds & {"ExcessMTLWeighting", "MoDoWeighting", "SDMGradWeighting"}:
        raise TypeError(
            f"rule is TorchJD's {type(rule).__name__}, which takes a Jacobian; a rule takes the "
            "Gramian"
        )


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
