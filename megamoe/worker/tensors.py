"""Tensors in files, and the result of a call. Part of ``serve.py``: needs Python 3.10 and torch."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

ALIGN = 64  # of every tensor in a file, in bytes
Place = tuple[str, list[int], int]
"""The place of a tensor in a file: torch's name of the dtype, the shape, the offset in bytes."""


def read_tensors(path: str, places: Mapping[str, Place]) -> dict[str, Any]:
    """Tensors over the file's own memory: a write into one goes to the file."""
    with Path(path).open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    out = {}
    for name, (kind, shape, offset) in places.items():
        dtype, count = getattr(torch, kind), math.prod(shape)
        out[name] = torch.empty(shape, dtype=dtype, device="cpu") if not count else (
            torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
        )  # fmt: skip
    return out


def device_tensors(
    path: str, places: Mapping[str, Place], subsets: Mapping[str, list[int]], device: str
) -> dict[str, Any]:
    """The tensors of one file on the device. For one in ``subsets``, all other rows are zeros."""
    tensors = read_tensors(path, places)
    if device == "cpu":
        return tensors
    for name, host in tensors.items():
        tensors[name] = torch.zeros(host.shape, dtype=host.dtype, device=device)
        for row in subsets.get(name, (...,)):
            tensors[name][row].copy_(host[row])
    return tensors


def fill_blanks(
    blanks: Mapping[str, tuple[str, list[int]]], byte: int, device: str
) -> dict[str, Any]:
    """New tensors of these dtypes and shapes, filled with ``byte``."""
    out = {}
    for name, (kind, shape) in blanks.items():
        dtype = getattr(torch, kind)
        flat = torch.full((math.prod(shape) * dtype.itemsize,), byte, dtype=torch.uint8,
                          device=device)  # fmt: skip
        out[name] = flat.view(dtype).view(shape)
    return out


def write_back(
    path: str,
    places: Mapping[str, Place],
    subsets: Mapping[str, list[int]],
    tensors: Mapping[str, Any],
) -> None:
    """Write a file's tensors, as the call left them, into the file, where the judge reads them."""
    for name, host in read_tensors(path, places).items():
        now = tensors[name]
        rows: Any = subsets.get(name, (...,))
        if name in subsets:  # of the others, those that are zeros no more
            rows = {*rows, *now.flatten(1).amax(1).nonzero().flatten().tolist()}
        for row in rows:
            host[row].copy_(now[row])


def write_tensors(path: str, tensors: Mapping[str, Any]) -> dict[str, Place]:
    """Write tensors one after the other; returns their places."""
    places = {}
    with Path(path).open("wb") as file:
        for name, tensor in tensors.items():
            host = tensor.detach().as_subclass(torch.Tensor).resolve_neg().contiguous().cpu()
            file.write(bytes(-file.tell() % ALIGN))
            kind = str(host.dtype).removeprefix("torch.")
            places[name] = (kind, list(host.shape), file.tell())
            if host.nbytes:  # without numpy, which need not be here
                file.write((ctypes.c_char * host.nbytes).from_address(host.data_ptr()))
    return places


def layout_of(part: Any) -> list[Any]:
    """Dtype, shape and strides of a tensor that has bytes; the type of anything else."""
    if not isinstance(part, torch.Tensor):
        return [type(part).__name__]
    if part.layout != torch.strided or part.is_meta:
        kind = "meta" if part.is_meta else str(part.layout).removeprefix("torch.")
        return [f"{kind} tensor"]
    return [str(part.dtype).removeprefix("torch."), list(part.shape), list(part.stride())]


def parts_of(result: Any) -> tuple[str, dict[str, Any]]:
    """The form of a result and its parts by name, 16 at most; a sequence's are its indices."""
    if isinstance(result, torch.Tensor):
        return "tensor", {"0": result}
    if hasattr(result, "items"):
        return "mapping", {str(k): value for k, value in list(result.items())[:16]}
    if isinstance(result, tuple | list):
        return "sequence", {str(i): value for i, value in enumerate(result[:16])}
    return type(result).__name__, {}
