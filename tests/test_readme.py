"""README's first program, as a newcomer copies it."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

README = Path(__file__).parents[1] / "README.rst"


def test_the_program_runs_by_itself(tmp_path: Path) -> None:
    text = README.read_text("utf-8")
    (program,) = re.findall(r"\.\. code-block:: python\n\n((?: {4}.*\n|\n)+)", text)
    lines = textwrap.dedent(program).strip().splitlines()
    assert len([line for line in lines if line]) <= 40
    (tmp_path / "program.py").write_text("\n".join(lines), "utf-8")
    ran = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert "text+audio" in ran.stdout and "('audio',)" in ran.stdout
    assert (tmp_path / "checkpoint.pt").exists()
