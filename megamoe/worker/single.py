"""``megamoe worker --out FILE.py``: the worker as one file, to copy where megamoe is not seen."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from megamoe.files import write_atomically

HERE: Final = Path(__file__).resolve().parent
BESIDE: Final = ("state", "tensors")
"""Modules that ``serve.py`` loads from its own folder."""
_MAIN: Final = '\nif __name__ == "__main__":\n'


def source() -> str:
    """``serve.py`` with the modules beside it, as one Python file: torch is all that it needs."""
    text = (HERE / "serve.py").read_text(encoding="utf-8")
    parts = "".join(
        f"\n_here(\n    'megamoe_worker_{name}',\n    {(HERE / f'{name}.py').read_text()!r},\n)\n"
        for name in BESIDE
    )
    define = (
        "\n\ndef _here(name: str, source: str) -> None:\n"
        '    """A module that is part of this file."""\n'
        "    sys.modules[name] = module = type(sys)(name)\n"
        "    exec(compile(source, name, 'exec'), vars(module))\n\n"
    )
    head, _, tail = text.rpartition(_MAIN)
    return f"{head}{define}{parts}\n{_MAIN}{tail}"


def add(commands: Any, command: Any) -> None:
    """The parser of ``worker``."""
    c = command(commands, "worker", "write the worker as one file that needs torch only", _write)
    c.add_argument("--out", metavar="FILE.py", default="megamoe_worker.py")


def _write(a: argparse.Namespace) -> int:
    out = Path(a.out)
    if out.suffix != ".py" or out.is_dir():
        raise ValueError(f"--out {out}: name a file that ends in .py")
    write_atomically(out, source().encode())
    print(f"{out}: run it with a Python that has torch; docs/protocol.md says what it is told")
    return 0
