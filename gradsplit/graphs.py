"""What the autograd graphs of several losses show, before any backward."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node, get_gradient_edge

__all__ = ["Graphs", "survey"]


@dataclass
class Graphs:
    """What the graphs of some losses show."""

    leaves: dict[Tensor, int]  # leaf -> bits of the losses that reach it
    hidden: int  # bits of the losses behind which there may be leaves that the graph does not show
    retained: list[bool]  # whether a later loss needs some of a loss's graph

    def reached_by_all(self, leaf: Tensor) -> bool:
        """Whether every loss reaches the leaf, or may."""
        return self.leaves.get(leaf, 0) | self.hidden == (1 << len(self.retained)) - 1


def survey(losses: Sequence[Tensor]) -> Graphs:
    """Look through the graphs of all losses, each node once."""
    roots = [get_gradient_edge(loss).node for loss in losses]
    following: dict[Node, list[Node]] = {}
    waiting = dict.fromkeys(roots, 0)  # node -> edges into it that are still to be followed
    stack = list(waiting)
    while stack:
        node = stack.pop()
        following[node] = [other for other, _ in node.next_functions if other is not None]
        for other in following[node]:
            if other not in waiting:
                waiting[other] = 0
                stack.append(other)
            waiting[other] += 1
    bits = dict.fromkeys(waiting, 0)  # node -> bits of the losses in whose graph it is
    for place, root in enumerate(roots):
        bits[root] |= 1 << place
    leaves: dict[Tensor, int] = {}
    hidden = retained = 0
    ready = [node for node in dict.fromkeys(roots) if waiting[node] == 0]
    while ready:
        node = ready.pop()
        own = bits[node]
        if not following[node] and (leaf := getattr(node, "variable", None)) is not None:
            leaves[leaf] = own  # with nothing that a backward frees
            continue
        retained |= own ^ (1 << (own.bit_length() - 1))  # all losses but the last
        if isinstance(node, BackwardCFunction):
            hidden |= own  # behind a reentrant checkpoint: its backward will tell
        for other in following[node]:
            bits[other] |= own
            waiting[other] -= 1
            if waiting[other] == 0:
                ready.append(other)
    return Graphs(leaves, hidden, [bool(retained >> place & 1) for place in range(len(losses))])
