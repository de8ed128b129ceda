"""The worker as one file, to copy where megamoe is not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
BESIDE: Final = ("offer", "sources", "state", "tensors")
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
