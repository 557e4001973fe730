"""Decoupling: what one merge saw. Kept as tensors on the device; nothing waits for the host."""

import itertools
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Decoupling"]


@dataclass(frozen=True, eq=False)
class Decoupling:
    """The report of one :meth:`ModalityDecoupledOptimizer.backward`.

    Everything is derived from the Gramian K (m, m) and the weights w (m,), measured on the scope
    of the optimizer. Reading ``losses``, ``gramian``, ``weights`` and the methods that return
    tensors does not synchronise with the host; ``conflicts``, ``conflict_rate``, ``opposed``,
    ``alignment`` and ``as_scalars`` do.

    Attributes:
        names: the m rows that were present, in the order of all (m,) and (m, m) tensors.
        unavailable: names that came as None and have no row.
        losses: (m,), detached. Of accumulated micro-batches, rows and losses are means over those
            in which the loss was available.
        gramian: (m, m), float64, K_jk = <g_j, g_k>.
        weights: (m,), float64, the rule's weights before the reduction.

    >>> K = torch.tensor([[4.0, -2.0], [-2.0, 4.0]])
    >>> seen = Decoupling(("text", "audio"), (), torch.ones(2), K, torch.tensor([1.5, 1.5]))
    >>> seen.conflicts(), seen.angles()
    ([('text', 'audio')], tensor([120.0000]))
    >>> print(seen)
    loss   value   norm  share  weight
    text   1.000  2.000   0.50    1.50
    audio  1.000  2.000   0.50    1.50
    text and audio conflict (120 degrees)
    the plain sum lowers every loss all the same: alignment 1.00
    """

    names: tuple[str, ...]
    unavailable: tuple[str, ...]
    losses: Tensor
    gramian: Tensor
    weights: Tensor

    def norms(self) -> Tensor:
        """(m,): ||g_i||."""
        return self.gramian.diagonal().sqrt()

    def cosine(self) -> Tensor:
        """(m, m): cosine similarity of each pair of rows; 0 where a row is zero."""
        norms = self.norms()
        # One division after the other: the product of two tiny norms could underflow.
        cosine = self.gramian / _nonzero(norms)[:, None] / _nonzero(norms)
        return cosine.clamp(-1.0, 1.0)

    def angles(self) -> Tensor:
        """(m(m-1)/2,): angle of each pair in degrees, pairs in the order (0, 1), (0, 2), ...

        A zero row is counted as orthogonal to every other. The paper's Fig. 3 is the histogram
        of these.
        """
        return self._pairs(self.cosine()).acos().rad2deg()

    def shares(self) -> Tensor:
        """(m,): ||g_i|| / sum_k ||g_k||."""
        norms = self.norms()
        return norms / _nonzero(norms.sum())

    def dominance(self) -> Tensor:
        """(m, m): ``|cos_jk| ||g_j|| / ||g_k||``, how far row j dominates row k (paper, Eq. 6).

        Much larger than 1 in a conflicting pair: the plain sum moves against row k. Pairs that do
        not conflict are included; the diagonal is 1. 0 where g_k is zero.
        """
        dominance = self.gramian.abs() / _nonzero(self.gramian.diagonal())
        itself = torch.eye(len(self.names), dtype=torch.bool, device=dominance.device)
        return torch.where(itself, 1.0, dominance)

    def conflicts(self) -> list[tuple[str, str]]:
        """Pairs of names with <g_j, g_k> < 0."""
        conflicting = (self._pairs(self.gramian) < 0).tolist()
        pairs = itertools.combinations(self.names, 2)
        return [pair for pair, conflict in zip(pairs, conflicting, strict=True) if conflict]

    def conflict_rate(self) -> float:
        """Share of the m(m-1)/2 pairs that conflict; 0.0 for one row, NaN if a row has NaN."""
        return float(self._conflict_rate())

    def opposed(self) -> list[str]:
        """Names of the losses that the plain sum of the rows moves against: sum_j K_jk < 0.

        To first order a step along the plain sum raises them, measured on the scope of the
        optimizer. A conflict alone does not make a loss opposed: the others must outweigh it.

        >>> K = torch.tensor([[9.0, -2.0], [-2.0, 1.0]])
        >>> Decoupling(("text", "audio"), (), torch.ones(2), K, torch.ones(2)).opposed()
        ['audio']
        """
        opposed = self._opposed().tolist()
        return [name for name, against in zip(self.names, opposed, strict=True) if against > 0]

    def alignment(self) -> float:
        """Cosine between the merged gradient and the plain sum of the rows, over the scope.

        w^T K 1 / sqrt(w^T K w  1^T K 1). 1.0 means that decoupling changed nothing but the step
        length; it is also what a single row and all-one weights give. 0.0 where the rows cancel
        so that one of the two is zero.
        """
        return float(self._alignment())

    def as_scalars(self, prefix: str = "gradsplit/") -> dict[str, float]:
        """A flat mapping for any logger: ``add_scalar``, Lightning's ``log_dict``, W&B.

        With ``GradScaler``, losses and norms are those of the scaled losses; all else is a ratio.

        Per row: ``loss/NAME``, ``norm/NAME``, ``share/NAME``, ``weight/NAME``. Over all pairs:
        ``conflict_rate``, ``cosine_min``, ``dominance_max``, ``alignment``. Over all rows:
        ``opposed_rate``, the share of losses that are opposed. In a NAME, what some loggers refuse
        ("+" of a combination) becomes "-"; names that become one by that are numbered.
        """
        per_row = {
            "loss": self.losses,
            "norm": self.norms(),
            "share": self.shares(),
            "weight": self.weights,
        }
        names = [re.sub(r"[^\w .-]", "-", name) for name in self.names]
        if len(set(names)) < len(names):
            names = [f"{name}-{index}" for index, name in enumerate(names)]
        keys = [f"{prefix}{kind}/{name}" for kind in per_row for name in names]
        tensors = [tensor.to(self.gramian.device, torch.float64) for tensor in per_row.values()]
        pairs = self._pairs(self.cosine())
        if pairs.numel() > 0:
            keys += [f"{prefix}cosine_min", f"{prefix}dominance_max"]
            itself = torch.eye(len(self.names), dtype=torch.bool, device=pairs.device)
            dominance = torch.where(itself, 0.0, self.dominance())
            tensors += [pairs.min().reshape(1).double(), dominance.max().reshape(1).double()]
        over_all = {
            "conflict_rate": self._conflict_rate(),
            "opposed_rate": self._opposed().mean(),
            "alignment": self._alignment(),
        }
        keys += [prefix + key for key in over_all]
        tensors += [value.reshape(1) for value in over_all.values()]
        return dict(zip(keys, torch.cat(tensors).tolist(), strict=True))  # the one transfer

    def __str__(self) -> str:
        """A small table, the conflicts, and one sentence of verdict: for people."""
        columns = [
            ["loss", *self.names],
            ["value", *(f"{value:#.4g}" for value in self.losses.tolist())],
            ["norm", *(f"{norm:#.4g}" for norm in self.norms().tolist())],
            ["share", *(f"{share:.2f}" for share in self.shares().tolist())],
            ["weight", *(f"{weight:.2f}" for weight in self.weights.tolist())],
        ]
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])])
            for first, *others in zip(*columns, strict=True)
        ]
        if self.unavailable:
            lines.append(f"unavailable: {', '.join(self.unavailable)}")
        return "\n".join([*lines, *self._quarrels(), self._verdict()])

    def _quarrels(self, most: int = 10) -> list[str]:
        """A line for each conflicting pair, the widest angle first."""
        if not bool(self.gramian.isfinite().all()):
            return []
        pairs = itertools.combinations(self.names, 2)
        angles = dict(zip(pairs, self.angles().tolist(), strict=True))
        conflicts = sorted(self.conflicts(), key=lambda pair: -angles[pair])
        place = {name: index for index, name in enumerate(self.names)}
        dominance = self.dominance().tolist()
        lines = []
        for j, k in conflicts[:most]:
            line = f"{j} and {k} conflict ({angles[j, k]:.0f} degrees)"
            for one, other in ((j, k), (k, j)):
                times = dominance[place[one]][place[other]]
                if times > 1.0:
                    line += f"; {one} dominates {other} ({times:.1f} times)"
            lines.append(line)
        if len(conflicts) > most:
            lines.append(f"and {len(conflicts) - most} more of {len(angles)} pairs conflict")
        return lines

    def _verdict(self) -> str:
        for name, loss, norm in zip(
            self.names, self.losses.tolist(), self.norms().tolist(), strict=True
        ):
            if math.isnan(loss):
                return f"{name} is NaN: where a loss has no sample to average, give None for it"
            if not math.isfinite(norm):
                return f"the gradient of {name} is not finite: nothing can be said of conflicts"
        if len(self.names) == 1:
            return "one loss alone: there is nothing to decouple"
        conflicts = self.gramian < 0
        if not bool(conflicts.any()):
            return "no pair conflicts: decoupling changes nothing in this step"
        left = bool((self.weights == 1).all())
        result = "the weights leave it so" if left else f"alignment {self.alignment():.2f}"
        opposed = self.opposed()
        if not opposed:
            return f"the plain sum lowers every loss all the same: {result}"
        return f"the plain sum raises {', '.join(opposed)} (opposed): {result}"

    def _alignment(self) -> Tensor:
        gramian, weights = self.gramian.double(), self.weights.double()
        plain = gramian.sum(-1)  # K 1
        inner, plain_square = weights @ plain, plain.sum()
        merged_square = weights @ gramian @ weights
        # A cancelled sum can come out as a tiny negative square: it is zero.
        scale = plain_square.clamp(min=0.0).sqrt() * merged_square.clamp(min=0.0).sqrt()
        cosine = (inner / _nonzero(scale)).clamp(-1.0, 1.0)
        return torch.where((weights == 1).all(), 1.0, cosine)

    def _opposed(self) -> Tensor:
        """(m,): 1.0 where the plain sum raises the loss; NaN where that cannot be said."""
        inner = self.gramian.double().sum(0)  # <g_k, sum_j g_j>
        return torch.where(inner.isnan(), inner, (inner < 0).double())

    def _conflict_rate(self) -> Tensor:
        pairs = self._pairs(self.gramian).double()
        # A comparison alone would call NaN "no conflict".
        conflicts = torch.where(pairs.isnan(), pairs, (pairs < 0).double())
        return conflicts.sum() / max(1, pairs.numel())

    def _pairs(self, matrix: Tensor) -> Tensor:
        """(m(m-1)/2,): the entries above the diagonal, row by row."""
        # Built from slices: an index tensor would have to be copied to the device.
        return torch.cat([matrix[j, j + 1 :] for j in range(len(self.names))])


def _nonzero(tensor: Tensor) -> Tensor:
    return torch.where(tensor == 0, 1.0, tensor)
