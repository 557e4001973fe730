"""LossBalance: constant weights from the gradient norms of the first steps."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsplit.decoupling import Decoupling
from gradsplit.losses import Entry, Losses

__all__ = ["LossBalance"]


class LossBalance:
    r"""Brings losses to one scale: weights from the gradient norms of the first steps, then frozen.

    The weights are 1 until every loss that had a gradient so far has been measured ``steps`` times,
    and from there on constant, with mean 1:

    .. math:: w_k = c / \|g_k\|, \quad \|g_k\|^2 = \text{mean of } K_{kk}
       \text{ over the measurements}

    A loss that comes later is measured ``steps`` times at weight 1 and then gets the weight of the
    same c. A loss whose gradient was zero keeps 1; one whose gradient was *nearly* zero takes all
    the weight there is.

    It helps where a loss dominates by its scale and opposes others (``report.opposed()``): two
    tasks in raw units. Losses on one scale rarely gain and may lose, as may unstandardised inputs
    under Adam (1.7 points in a scan before the study); standardised targets may do as much.
    Compare on a validation split. What was measured: ``benchmarks/STUDY.rst``.

    Measure *before the first step*, where the loop is yours: steps at weight 1 with a learning rate
    that suits the balanced losses can do harm that stays, above all with SGD.

    ``balance(losses)`` weighs what :meth:`ModalityDecoupledOptimizer.backward`, ``accumulate``,
    ``step`` or ``joint`` take, and ``balance.update(report)`` measures, once per report. Reports
    and joint values are those of the weighted losses. All ranks get the same weights, as they get
    the same reports. Once ``frozen``, one backward of the mean of the weighted losses is as good as
    ``rule="sum"``, and costs as much as plain training.

    Args:
        steps: measurements of each loss, at least.

    Raises:
        TypeError: ``steps`` is not an int.
        ValueError: ``steps`` is below 1.

    >>> import torch
    >>> from gradsplit import LossBalance, ModalityDecoupledOptimizer
    >>> shared = torch.nn.Parameter(torch.ones(2))
    >>> opt = ModalityDecoupledOptimizer(torch.optim.SGD([shared], lr=0.1), scope="all")
    >>> def losses():
    ...     return {"text": shared.sum(), "audio": -3.0 * shared.square().sum()}
    >>> balance = LossBalance(steps=2)
    >>> for _ in range(2):  # batches: no step, so that the model stays as it is
    ...     opt.zero_grad()
    ...     balance.update(opt.backward(balance(losses())))
    >>> {name: round(weight, 3) for name, weight in balance.weights.items()}
    {'text': 1.714, 'audio': 0.286}
    >>> weighed = opt.step(balance(losses()))  # and so on, in training
    """

    def __init__(self, steps: int = 20) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise TypeError(f"steps must be an int, got {type(steps).__name__} {steps!r}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.steps = steps
        self._weights: dict[str, float] = {}
        self._measured: dict[str, tuple[float, int]] = {}  # sum of K_kk, how many; no weight yet
        self._constant = 0.0  # c; 0: not frozen
        self._waiting: dict[str, int] = {}  # how often weighed since the last measurement

    @property
    def weights(self) -> dict[str, float]:
        """Name -> weight, of the losses whose weight is fixed; empty before."""
        return dict(self._weights)

    @property
    def frozen(self) -> bool:
        """Whether the weights are fixed; those of losses that come later are added."""
        return self._constant > 0.0

    def __call__(self, losses: Losses) -> Any:
        """``losses`` in the same form, each tensor, or what each closure returns, times its weight.

        Raises:
            TypeError: not a mapping or sequence, or of something that is no tensor, closure or
                None. All else the optimizer finds, on all ranks.
        """
        if isinstance(losses, str | bytes) or not isinstance(losses, Mapping | Sequence):
            raise TypeError(
                "losses must be a mapping from modality or combination to loss, or a sequence of "
                f"losses; got {type(losses).__name__}"
            )
        items: list[tuple[Any, Any]]
        items = list(losses.items() if isinstance(losses, Mapping) else enumerate(losses))
        weighed: dict[Any, Any] = {}
        for place, (key, loss) in enumerate(items, 1):  # a warning counts the frames up to here
            name = "+".join(map(str, key)) if isinstance(key, tuple) else str(key)
            weighed[key] = self._weighed(Entry(name, loss, place, len(items)))
        if isinstance(losses, Mapping):
            return weighed
        return (tuple if isinstance(losses, tuple) else list)(weighed.values())

    def update(self, report: Decoupling, scale: float = 1.0) -> None:
        """Measure. A report with a gradient that is not finite does not count.

        Args:
            report: of the losses that this object has weighed.
            scale: what the losses were multiplied by, such as ``scaler.get_scale()``. Only ratios
                count: it is needed where the scale changes while different losses are measured.

        Raises:
            TypeError: ``report`` is not one, or ``scale`` is no number.
            ValueError: ``scale`` is not positive and finite.
        """
        if not isinstance(report, Decoupling):
            raise TypeError(f"report must be a Decoupling, got {type(report).__name__}")
        if not isinstance(scale, int | float):
            raise TypeError(f"scale must be a number, got {type(scale).__name__} {scale!r}")
        if not 0.0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        if all(name in self._weights for name in report.names):
            return  # nothing waits for the device any more
        norms = report.norms().double().tolist()
        if not all(map(math.isfinite, norms)):
            return
        for name, norm in zip(report.names, norms, strict=True):
            if name not in self._weights:
                total, count = self._measured.get(name, (0.0, 0))
                self._measured[name] = total + (norm / scale) * (norm / scale), count + 1
                self._waiting.pop(name, None)
        self._freeze()

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to continue; plain Python values."""
        measured = {name: list(value) for name, value in self._measured.items()}
        return {"weights": dict(self._weights), "constant": self._constant, "measured": measured}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where the object, made with the same ``steps``, wrote ``state_dict``.

        Raises:
            ValueError: it is not one of a LossBalance; nothing has changed.
        """
        try:
            weights, constant = dict(state_dict["weights"]), float(state_dict["constant"])
            measured = {name: (total, n) for name, (total, n) in state_dict["measured"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"state_dict is not one of a LossBalance ({type(error).__name__}: {error}); give "
                "what its state_dict() returned"
            ) from error
        self._weights, self._constant, self._measured = weights, constant, measured
        self._waiting.clear()

    def _freeze(self) -> None:
        """Give weights, once all have been measured; later to each that has been."""
        norms = {
            name: math.sqrt(total / count)
            for name, (total, count) in self._measured.items()
            if count >= self.steps
        }
        if not self.frozen:
            inverse = [1.0 / norm for norm in norms.values() if norm > 0.0]
            if len(norms) < len(self._measured) or not inverse:
                return
            self._constant = len(inverse) / math.fsum(inverse)
        for name, norm in norms.items():
            self._weights[name] = self._constant / norm if norm > 0.0 else 1.0
            del self._measured[name]

    def _weighed(self, entry: Entry) -> Any:
        name, loss = entry.name, entry.loss
        if isinstance(loss, Tensor):
            return self._times(name, loss)
        if loss is None:
            return None
        if not callable(loss):
            raise TypeError(
                f"{entry} must be a scalar loss tensor, a closure or None; got "
                f"{type(loss).__name__} {loss!r}"
            )

        def weighed() -> Any:
            value = loss()
            return self._times(name, value) if isinstance(value, Tensor) else value

        return weighed

    def _times(self, name: str, loss: Tensor) -> Tensor:
        if name not in self._weights and torch.is_grad_enabled():
            self._notice(name)
        return loss * self._weights.get(name, 1.0)

    def _notice(self, name: str) -> None:
        """A loop that never calls ``update`` would train with weights of 1, and not know it."""
        if len(self._waiting) > 0 and max(self._waiting.values()) >= 10 * self.steps:
            return  # it has been said
        self._waiting[name] = calls = self._waiting.get(name, 0) + 1
        if calls == 10 * self.steps:
            warnings.warn(
                f"LossBalance has weighed {name!r} {calls} times without measuring it: call "
                "balance.update(report) with the report of each backward (opt.last after joint); "
                "reports with gradients that are not finite do not count",
                stacklevel=5,
            )
