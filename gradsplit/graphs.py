"""What the autograd graphs of several losses show, before any backward."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

__all__ = ["Graphs", "survey"]


@dataclass
class Graphs:
    """What the graphs of some losses show."""

    leaves: dict[Tensor, int]  # leaf -> bits of the losses that reach it
    hidden: int  # bits of the losses behind which there may be leaves that the graph does not show
    retained: list[bool]  # whether a later loss needs some of a loss's graph

    def reached_by_all(self, leaf: Tensor, surely: bool = False) -> bool:
        """Whether every loss reaches the leaf; or, unless ``surely``, may behind what is hidden."""
        hidden = 0 if surely else self.hidden
        return self.leaves.get(leaf, 0) | hidden == (1 << len(self.retained)) - 1


def survey(losses: Sequence[Tensor]) -> Graphs:
    """Look through the graphs of all losses, each node once."""
    roots = [get_gradient_edge(loss).node for loss in losses]
    marks = {root: _Mark() for root in roots}
    nodes = list(marks)
    for node in nodes:  # which grows on the way
        mark = marks[node]
        for following, _ in node.next_functions:
            if following is not None:
                if following not in marks:
                    marks[following] = _Mark()
                    nodes.append(following)
                marks[following].waiting += 1
                mark.following.append(marks[following])
        if not mark.following:
            mark.leaf = getattr(node, "variable", None)
        elif isinstance(node, BackwardCFunction):
            mark.hides = True
    for place, root in enumerate(roots):
        marks[root].losses |= 1 << place
    leaves: dict[Tensor, int] = {}
    hidden = retained = 0
    ready = [mark for mark in marks.values() if mark.waiting == 0]
    while ready:
        mark = ready.pop()
        if mark.leaf is not None:
            leaves[mark.leaf] = mark.losses  # with nothing that a backward frees
            continue
        retained |= mark.losses ^ (1 << (mark.losses.bit_length() - 1))  # all but the last
        if mark.hides:
            hidden |= mark.losses
        for other in mark.following:
            other.losses |= mark.losses
            other.waiting -= 1
            if other.waiting == 0:
                ready.append(other)
    return Graphs(leaves, hidden, [bool(retained >> place & 1) for place in range(len(losses))])


class _Mark:
    """What is noted of a node."""

    __slots__ = ("following", "hides", "leaf", "losses", "waiting")

    def __init__(self) -> None:
        self.following: list[_Mark] = []
        self.waiting = 0  # edges into it that are still to be followed
        self.losses = 0  # bits of the losses in whose graph it is
        self.leaf: Tensor | None = None
        self.hides = False  # leaves, as a reentrant checkpoint does: its backward will tell
