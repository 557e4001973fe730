"""Result folders: atomic files, tables."""

import json
import os
from pathlib import Path

import pytest

from benchmarks.runs import results


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        results.write_json(path, {"a": float("nan")})
    with pytest.raises(KeyboardInterrupt), results.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["results.json"]


def test_tables_are_aligned_and_spread_is_the_sample_standard_deviation() -> None:
    spread = results.format_spread([1.0, 3.0], digits=2), results.format_spread([1.0])
    assert spread == ("2.00 ± 1.41", "1.000")
    table = results.markdown_table(["a", "long"], [["wide cell", "1"]])
    assert table == "| a         | long |\n|-----------|------|\n| wide cell | 1    |\n"
    with pytest.raises(ValueError):
        results.markdown_table(["a", "b"], [["1"]])
