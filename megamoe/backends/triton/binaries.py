"""Launching a kernel and remembering what was compiled for it: half of the fingerprint."""

from __future__ import annotations

import hashlib
import struct
from contextlib import nullcontext
from typing import Any

import torch

_COMPILED: dict[str, Any] = {}
_CODE = (".text.", ".nv.constant", ".nv.info.")


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)`` on the device of its tensors.

    Triton launches on the current one. Its interpreter compiles nothing.
    """
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        made = kernel[grid](*arguments, **options)
    if made is not None:
        _COMPILED[f"{kernel.fn.__name__} {made.hash}"] = made


def digests() -> dict[str, str]:
    """Kernel and specialisation to the digest of its code, for all that this process ran."""
    return {name: code_digest(made.asm["cubin"]) for name, made in sorted(_COMPILED.items())}


def code_digest(cubin: bytes) -> str:
    """sha256 of what runs: instructions, constants, and what the driver is told of them.

    The rest of the file says where the sources lie on the machine that compiled them. A cubin is
    an ELF file of 64 bits, little-endian: the header holds at 40 the place of the section headers,
    at 58 their size, number and that of the names; a section header its name at 0 and its place
    and size at 24.
    """
    start = struct.unpack_from("<Q", cubin, 40)[0]
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [start + size * i for i in range(count)]

    def content(header: int) -> bytes:
        place, length = struct.unpack_from("<QQ", cubin, header + 24)
        return cubin[place : place + length]

    table = content(headers[names])
    sections = {}
    for header in headers:
        at = struct.unpack_from("<I", cubin, header)[0]
        sections[table[at : table.index(b"\0", at)].decode()] = header
    made = hashlib.sha256()
    for name in sorted(n for n in sections if n.startswith(_CODE)):
        made.update(name.encode() + b"\0" + content(sections[name]))
    return made.hexdigest()


__all__ = ["code_digest", "digests", "launch"]
