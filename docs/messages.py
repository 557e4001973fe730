"""Every message of the library, read from its source: exceptions, warnings, notes, verdicts."""

import ast
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["ADVICE", "Message", "messages"]

_SPEAKING = {"warnings.warn": "warning", "add_note": "note", "noted": "note"}
_FEWEST_WORDS = 4  # of a string outside such a call that is taken for a piece of a message


class Message(NamedTuple):
    text: str  # "…" stands for a value
    kind: str  # of exception, "warning" or "note"; "": a piece, or what print(report) says
    function: str
    line: int


def messages(source: str) -> list[Message]:
    """Of one file, in the order of its lines."""
    tree = ast.parse(source)
    return sorted(_found(tree, (), ""), key=lambda message: message.line)


def _found(node: ast.AST, names: tuple[str, ...], kind: str) -> Iterator[Message]:
    """The strings below a node that are messages, or pieces of one."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        names = (*names, node.name)
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        kind = called if called.endswith("Error") else _SPEAKING.get(called, kind)
    if isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str):
        text = _text(node)
        if kind or text.count(" ") >= _FEWEST_WORDS - 1:
            yield Message(text, kind, ".".join(names), node.lineno)
        return
    for child in ast.iter_child_nodes(node):
        docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        if not docstring:
            yield from _found(child, names, kind)


def _text(node: ast.AST) -> str:
    pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(p.value if isinstance(p, ast.Constant) else "…" for p in pieces)


# What to do where a message does not say it, by a piece of it.
ADVICE = {
    "does not depend on any parameter of this": (
        "Give the optimizer the parameters that the loss uses, or leave the loss out while "
        "they are frozen."
    ),
    "in the closure of": "The exception above it is your closure's own.",
    "must be real": "Take its real part, or its magnitude.",
    "requires no grad": "For a modality that is missing give ``None``, not a constant.",
    "ranks differ in": (
        "Give all ranks the same names in one order, ``None`` where a batch lacks it, and the same "
        "options: :doc:`distributed`."
    ),
    "as another rank has failed": "The cause is what it quotes; that rank's log has all of it.",
    "this rank is not in it": "Make the optimizer on the group's ranks only.",
    "this DistributedDataParallel cannot be used": (
        "One of the four reasons above follows; :doc:`distributed` says what to use instead."
    ),
    "features: no modality is available": "Skip this batch, or give its loss as ``None``.",
    "features must have one shape": "Let each encoder end in one width before the fusion.",
    "cannot be the name of a parameter": (
        "Names without a dot, that are no method of ``nn.ParameterDict`` (``keys``, ``values``)."
    ),
    "rule must return": "It gets one Gramian (m, m), and returns a weight for each of its rows.",
}
