"""Launching a kernel and remembering what was compiled for it: half of the fingerprint."""

from __future__ import annotations

import hashlib
import struct
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

_CODE = (".text.", ".nv.constant", ".nv.info.")


@dataclass(frozen=True)
class _Ready:
    """A kernel as compiled for one key, and its last parameters: those that options give.

    Keys name a kernel by its id; held here, no other can come to have it.
    """

    kernel: Any
    made: Any
    constants: tuple[Any, ...]


_READY: dict[tuple[Any, ...], _Ready] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)`` on the device of its tensors.

    Triton launches on the current one. And at every launch it looks at each argument and option to
    find what it has compiled, which costs the host time; here that is found by a key. Triton's
    interpreter compiles nothing.
    """
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    key = (id(kernel), device, *map(specialisation, arguments), *options.items())
    ready = _READY.get(key)
    with torch.cuda.device(device) if elsewhere else nullcontext():
        if ready is not None:
            ready.made[(*grid, 1, 1)[:3]](*arguments, *ready.constants)
            return
        made = kernel[grid](*arguments, **options)
    if made is not None:
        defaults = {n: p.default for n, p in kernel.signature.parameters.items()}
        named = {**defaults, **options}
        constants = tuple(named[name] for name in kernel.arg_names[len(arguments) :])
        _READY[key] = _Ready(kernel, made, constants)


def specialisation(argument: Any) -> Any:
    """What tells arguments apart that Triton compiles a kernel anew for."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        types = -(2**31) <= argument < 2**31, argument < 2**63  # of 32 bits, of 64 with a sign
        return type(argument), types, argument == 1, argument % 16 == 0
    if isinstance(argument, float):
        return float
    # A tensor map's description.
    return argument.base.dtype, *argument.block_shape, argument.layout


def digests() -> dict[str, str]:
    """Kernel and specialisation to the digest of its code, for all that this process ran."""
    ran = {f"{r.kernel.fn.__name__} {r.made.hash}": r.made for r in _READY.values()}
    return {name: code_digest(made.asm["cubin"]) for name, made in sorted(ran.items())}


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
