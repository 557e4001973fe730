"""Writes what the source tells: recipes, messages, presets, and a page for each public name."""

import ast
import re
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from types import ModuleType

from messages import ADVICE, messages

import gradsplit

# What a recipe does for gradsplit; "# gradsplit" marks other lines.
_OURS = (
    "ModalityDecoupledOptimizer(",
    ".joint(",
    "opt.backward(",
    "opt.accumulate(",
    "opt.step(losses",
    "# gradsplit",
)


def write(docs: Path) -> None:
    """All of them, into docs/generated; what has not changed is not touched."""
    wanted = {
        **{f"recipes/{path.stem}.rst": _recipe(path) for path in _recipes(docs)},
        **{f"api/{name}.rst": _api(name) for name in _public()},
        "messages.rst": "\n".join(_messages(docs.parent / "gradsplit")),
        "presets.rst": "\n\n".join(_presets(docs.parent / "benchmarks")),
    }
    generated = docs / "generated"
    for path in generated.rglob("*.rst"):
        if str(path.relative_to(generated)) not in wanted:
            path.unlink()
    for name, text in wanted.items():
        path = generated / name
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def _recipes(docs: Path) -> list[Path]:
    return sorted((docs / "recipes").glob("[!_]*.py"))


def _recipe(path: Path) -> str:
    """The docstring as text, the program below it, with what it does for gradsplit emphasised."""
    source = path.read_text()
    text = ast.get_docstring(ast.parse(source))
    title = re.split(r": |\.$", text.splitlines()[0])[0]
    lines = source.splitlines()
    docstring = ast.parse(source).body[0]
    start = docstring.end_lineno + 2  # past the blank line after it
    ours = [n for n, line in enumerate(lines, 1) if n >= start and any(o in line for o in _OURS)]
    emphasised = ",".join(str(n - start + 1) for n in ours)
    return "\n".join(
        [
            *_title(title),
            text,
            "",
            f".. literalinclude:: /recipes/{path.name}",
            f"   :caption: docs/recipes/{path.name}",
            f"   :lines: {start}-",
            *([f"   :emphasize-lines: {emphasised}"] if ours else []),
            "",
        ]
    )


def _public() -> Iterator[str]:
    """Every public name below gradsplit."""
    for name in gradsplit.__all__:
        yield name
        if isinstance(getattr(gradsplit, name), ModuleType):
            yield from (f"{name}.{inner}" for inner in getattr(gradsplit, name).__all__)


def _api(name: str) -> str:
    thing, full = attrgetter(name)(gradsplit), f"gradsplit.{name}"
    if isinstance(thing, ModuleType):
        inner = [f"- :doc:`{name}.{inner}`" for inner in thing.__all__]
        lines = [f".. automodule:: {full}", "   :no-members:", "", *inner]
    elif isinstance(thing, type):
        lines = [f".. autoclass:: {full}"]
        lines += ["   :show-inheritance:"] if thing.__base__ is not object else []
    else:
        lines = [f".. autofunction:: {full}"]
    return "\n".join([*_title(name), *lines, ""])


def _title(text: str) -> list[str]:
    return [text, "=" * len(text), ""]


def _presets(benchmarks: Path) -> Iterator[str]:
    """What the BraTS benchmark says of its presets; the source is read, for it imports MONAI."""
    for path in sorted(benchmarks.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name in ("paper", "released"):
                yield f"**{node.name}**. {ast.get_docstring(node)}"


def _messages(package: Path) -> Iterator[str]:
    """A section per file, an entry per message, with advice where there is some."""
    used = set()
    for path in sorted(package.glob("*.py")):
        found = messages(path.read_text())
        if not found:
            continue
        yield from [path.name, "-" * len(path.name), ""]
        for message in found:
            kind = f"``{message.kind}`` in " if message.kind else ""
            yield from [re.sub(r"([\\*`_|])", r"\\\1", message.text)]
            yield from [f"   {kind}``{message.function}``", ""]
            for piece in (piece for piece in ADVICE if piece in message.text):
                used.add(piece)
                yield from [f"   {ADVICE[piece]}", ""]
    if unused := ADVICE.keys() - used:
        raise ValueError(f"docs/messages.py has advice for what is no message: {unused}")
