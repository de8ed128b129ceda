"""The worker as one file, to copy where megamoe is not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
BESIDE: Final = ("loading", "offer", "sources", "state", "tensors")
"""Modules that ``serve.py`` loads from its own folder."""
_FIRST: Final = "\nHERE = "
"""Begins the first line after the imports: what stands before it needs no module of the folder."""


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
        "    module.__file__ = __file__\n"
        "    exec(compile(source, name, 'exec'), vars(module))\n\n"
    )
    head, _, tail = text.partition(_FIRST)
    return f"{head}{define}{parts}\n{_FIRST}{tail}"
