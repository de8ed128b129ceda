"""Launching a kernel and remembering what was compiled for it: half of the fingerprint."""

from __future__ import annotations

import hashlib
from typing import Any

_COMPILED: dict[str, Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)``; Triton's interpreter compiles nothing."""
    made = kernel[grid](*arguments, **options)
    if made is not None:
        _COMPILED[f"{kernel.fn.__name__} {made.hash}"] = made


def digests() -> dict[str, str]:
    """Kernel and specialisation to the sha256 of its binary, for all that this process ran."""
    return {
        name: hashlib.sha256(made.asm["cubin"]).hexdigest()
        for name, made in sorted(_COMPILED.items())
    }
