"""What the site's pages take from the source: no message is left out."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch

from gradsplit import CombinationSampler, LossBalance, ModalityDecoupledOptimizer, rules

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from messages import messages  # noqa: E402

SOURCES = sorted((ROOT / "gradsplit").glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_each_raise_and_warning_has_its_message(path: Path) -> None:
    source = path.read_text()
    lines = {message.line for message in messages(source) if message.kind}
    for node in ast.walk(ast.parse(source)):
        call = node.exc if isinstance(node, ast.Raise) else getattr(node, "value", None)
        if not isinstance(call, ast.Call):
            continue
        called = ast.unparse(call.func)
        if called.endswith("Error") or called == "warnings.warn":
            assert call.end_lineno is not None
            assert lines & set(range(call.lineno, call.end_lineno + 1)), ast.unparse(call)


def test_what_is_raised_is_on_the_page() -> None:
    opt = ModalityDecoupledOptimizer(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]))
    texts = [message.text for path in SOURCES for message in messages(path.read_text())]
    patterns = [".*".join(map(re.escape, text.split("…"))) for text in texts]
    for call in (
        lambda: opt.backward({"text": None}),
        lambda: opt.backward({"text": torch.zeros(2, requires_grad=True)}),
        lambda: rules.gmd(torch.zeros(2)),
        lambda: CombinationSampler("text"),
        lambda: LossBalance(steps=0),
    ):
        with pytest.raises((TypeError, ValueError)) as raised:
            call()
        assert any(re.fullmatch(pattern, str(raised.value)) for pattern in patterns)
