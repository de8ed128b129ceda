"""Names of stored problems: of the files that a command writes, none of which is ever overwritten,
and what a file is called in an output."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, Final

from megamoe.printable import printable

MAX_ORIGIN: Final = 100
"""Characters of what a file says of itself, in a title."""


def new_file(name: str) -> Path:
    """The file that ``--out`` names; ``ValueError`` where it cannot be a new one."""
    out = Path(name)
    if out.suffix != ".safetensors" or out.is_dir():
        raise ValueError(f"--out {out}: name a file that ends in .safetensors")
    if out.exists():
        raise ValueError(f"--out {out}: the file exists already; name another, or remove it")
    return out


def free_names(stem: str) -> list[Path]:
    """The names ``STEM.safetensors``, ``STEM-2.safetensors``, ...: those that exist already, then
    the first that is free."""
    names = list[Path]()
    for n in count(1):
        names.append(Path(f"{stem}{f'-{n}' if n > 1 else ''}.safetensors"))
        if not names[-1].exists():
            break
    return names


def origin(about: Mapping[str, Any]) -> str:
    """The whole problem of which a file's problem is, from what the file says of itself; empty
    where it does not say. Files of files keep the ``origin`` of the first."""
    fuzz = about.get("fuzz")
    if isinstance(fuzz, Mapping):
        return f"problem {fuzz.get('number')} of seed {fuzz.get('seed')}"
    call = str(about.get("captured_from", "")).rpartition(".")[2]
    names = (about.get("origin"), call and f"a call of {call}", about.get("reduced_from"))
    return next((str(name) for name in names if name), "")


def title(file: str, about: Mapping[str, Any]) -> str:
    """``FILE (forward/name, reduced)``: a stored problem, and what it is of where the file says
    so."""
    words = [printable(origin(about))[:MAX_ORIGIN]] if origin(about) else []
    words += ["reduced"] if "reduced_from" in about else []
    return f"{file} ({', '.join(words)})" if words else file
