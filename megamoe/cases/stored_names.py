"""Names for the files of stored problems that a command writes: none is ever overwritten."""

from __future__ import annotations

from itertools import count
from pathlib import Path


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
