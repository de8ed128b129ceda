"""Run the commands of examples/README.md again, and write their outputs into it.

    python tools/examples.py

A block that begins with ``$ megamoe ...`` holds the output of that command, run in a copy of
``examples/``. ``tests/test_examples.py`` compares the outputs, but for the times.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
PAGE: Final = ROOT / "examples" / "README.md"
WIDTH: Final = "100"

Run = Callable[..., subprocess.CompletedProcess[str]]
"""``run("check", ...)``: a ``megamoe`` in the current folder, its output captured."""

_BLOCK = re.compile(r"(?<=^```\n)\$ megamoe (.+)\n(?:.*\n)*?(?=```$)", re.MULTILINE)


def renewed(text: str, run: Run) -> str:
    """``text`` with the output of each command replaced. ``ValueError`` where one is not run."""

    def output(match: re.Match[str]) -> str:
        arguments = shlex.split(match[1])
        process = run(*arguments)
        lines = [line.rstrip() for line in process.stdout.splitlines()]
        if not lines:
            raise ValueError(f"megamoe {match[1]} printed nothing: {process.stderr.strip()}")
        return "\n".join([f"$ megamoe {match[1]}", *lines, ""])

    return _BLOCK.sub(output, text)


def _run(folder: Path) -> Run:
    settings = {"COLUMNS": WIDTH, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "megamoe", *arguments]
        return subprocess.run(
            command, cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True
        )

    return run


def main() -> int:
    """Write the page."""
    with tempfile.TemporaryDirectory() as folder:
        for path in PAGE.parent.glob("*.py"):
            shutil.copy(path, folder)
        PAGE.write_text(renewed(PAGE.read_text(), _run(Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
