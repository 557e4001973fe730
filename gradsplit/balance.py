"""LossBalance: constant weights from the gradient norms of the first steps."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from gradsplit.decoupling import Decoupling
from gradsplit.losses import Entry, Losses, read_losses

__all__ = ["LossBalance"]


class LossBalance:
    r"""Brings losses to one scale: weights from the gradient norms of the first steps, then frozen.

    The weights are 1 until every loss seen so far has been measured ``steps`` times, and from there
    on constant, with mean 1:

    .. math:: w_k = c / \|g_k\|, \quad \|g_k\|^2 = \text{mean of } K_{kk}
       \text{ over the measurements}

    A loss that comes later is measured ``steps`` times at weight 1 and then gets the weight of the
    same c. Losses without gradient keep 1.

    It helps where a loss dominates by its scale and opposes others (``report.opposed()``): two
    tasks in raw units. Where the dominant loss helps the others, or where unstandardised inputs
    meet Adam, it costs accuracy. Standardising the targets does as much. Compare on a validation
    split.

    ``balance(losses)`` weighs what :meth:`ModalityDecoupledOptimizer.backward`, ``accumulate``,
    ``step`` or ``joint`` take, and ``balance.update(report)`` measures, once per report; all ranks
    get the same. Once ``frozen``, the loop may go on without rows, at the price of one backward:
    ``sum(balance(losses).values()).backward()``.

    Args:
        steps: measurements of each loss.

    Raises:
        TypeError: ``steps`` is not an int.
        ValueError: ``steps`` is below 1.

    >>> import torch
    >>> from gradsplit import LossBalance, ModalityDecoupledOptimizer
    >>> shared = torch.nn.Parameter(torch.ones(2))
    >>> opt = ModalityDecoupledOptimizer(torch.optim.SGD([shared], lr=0.1), rule="sum")
    >>> balance = LossBalance(steps=2)
    >>> for _ in range(3):
    ...     losses = {"text": shared.sum(), "audio": -3.0 * shared.sum()}
    ...     opt.zero_grad()
    ...     balance.update(opt.backward(balance(losses)))
    ...     opt.step()
    >>> {name: round(weight, 6) for name, weight in balance.weights.items()}, shared.grad
    ({'text': 1.5, 'audio': 0.5}, tensor([0., 0.]))
    """

    def __init__(self, steps: int = 20) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise TypeError(f"steps must be an int, got {type(steps).__name__} {steps!r}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps = steps
        self._weights: dict[str, float] = {}
        self._scale = 0.0  # c; 0: not frozen yet
        self._measured: dict[str, tuple[float, int]] = {}  # sum of K_kk, how many
        self._unmeasured: dict[str, int] = {}  # how often weighed without one measurement

    @property
    def weights(self) -> dict[str, float]:
        """Name -> weight, of the losses that have been measured; empty before."""
        return dict(self._weights)

    @property
    def frozen(self) -> bool:
        """Whether the weights are fixed; those of losses that come later are added."""
        return self._scale > 0.0

    def __call__(self, losses: Losses) -> Any:
        """``losses`` in the same form, each tensor, or what each closure returns, times its weight.

        Raises:
            TypeError, ValueError: as ``backward`` does, of ``losses``.
        """
        weighed = [self._weighed(entry) for entry in read_losses(losses, needs_grad=False)]
        if isinstance(losses, Mapping):
            return dict(zip(losses, weighed, strict=True))
        return tuple(weighed) if isinstance(losses, tuple) else weighed

    def update(self, report: Decoupling, scale: float = 1.0) -> None:
        """Measure. A report with a gradient that is not finite does not count.

        Args:
            report: of the losses that this object has weighed.
            scale: what the losses were multiplied by, ``scaler.get_scale()``. Needed where the
                losses that are measured differ from step to step and the scale changes meanwhile.

        Raises:
            TypeError: ``report`` is not one.
            ValueError: ``scale`` is not positive and finite.
        """
        if not isinstance(report, Decoupling):
            raise TypeError(f"report must be a Decoupling, got {type(report).__name__}")
        if not 0.0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        for name in report.names:
            self._unmeasured.pop(name, None)
        if all(name in self._weights for name in report.names):
            return  # nothing waits for the device any more
        squares = report.gramian.diagonal().double().tolist()
        if not all(map(math.isfinite, squares)):
            return
        for name, square in zip(report.names, squares, strict=True):
            if name not in self._weights:
                total, count = self._measured.get(name, (0.0, 0))
                self._measured[name] = total + square / scale**2, count + 1
        self._freeze()

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to continue; plain Python values."""
        measured = {name: list(value) for name, value in self._measured.items()}
        return {"weights": dict(self._weights), "scale": self._scale, "measured": measured}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where the object, made with the same ``steps``, wrote ``state_dict``."""
        self._weights = dict(state_dict["weights"])
        self._scale = state_dict["scale"]
        self._measured = {name: (total, n) for name, (total, n) in state_dict["measured"].items()}

    def _freeze(self) -> None:
        """Give weights, once all have been measured; later to each that has been."""
        enough = {name for name, (_, count) in self._measured.items() if count >= self.steps}
        if not self.frozen:
            if len(enough) < len(self._measured):
                return
            inverse = [1.0 / norm for norm in map(self._norm, enough) if norm > 0.0]
            self._scale = len(inverse) / math.fsum(inverse) if inverse else 1.0
        for name in [name for name in self._measured if name in enough]:
            norm = self._norm(name)
            self._weights[name] = self._scale / norm if norm > 0.0 else 1.0
            del self._measured[name]

    def _norm(self, name: str) -> float:
        total, count = self._measured[name]
        return math.sqrt(total / count)

    def _weighed(self, entry: Entry) -> Tensor | Callable[[], Tensor | None] | None:
        weight, loss = self._weights.get(entry.name, 1.0), entry.loss
        if loss is None:
            return None
        if entry.name not in self._weights:
            self._notice(entry.name)
        if isinstance(loss, Tensor):
            return loss * weight

        def closure() -> Tensor | None:
            value = loss()
            return value * weight if isinstance(value, Tensor) else value

        return closure

    def _notice(self, name: str) -> None:
        """A loop that never calls ``update`` would train with weights of 1, and not know it."""
        self._unmeasured[name] = calls = self._unmeasured.get(name, 0) + 1
        if calls == 10 * self.steps and name not in self._measured:
            warnings.warn(
                f"LossBalance has weighed {name!r} {calls} times and not measured it once: call "
                "balance.update(report) with the report of each backward (opt.last after joint)",
                stacklevel=4,
            )
