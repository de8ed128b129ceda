"""Answers of a worker: the error that one stands for, or the tensors that it returned."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from megamoe.worker.files import open_file, read, tensor_of
from megamoe.worker.outcomes import BackendFailure, Missing, NoRoom, Refusal
from megamoe.worker.session import Session

TORCH_LACKS: Final = ("not implemented for '", "Could not run 'aten::")
"""Texts of a ``NotImplementedError`` from torch itself: that is a fault, no refusal."""
LIMIT: Final = 64 << 20
"""The least limit of one output, in bytes; the size of the inputs may raise it."""


class Opaque:
    """Something that a backend returned and that is no tensor: its type's name is all there is."""

    def __new__(cls, name: str) -> Any:
        return object.__new__(type(name, (Opaque,), {}))


def refuse(reply: Mapping[str, Any], folder: Path) -> None:
    """Raise the error that an answer without outputs stands for."""
    if "missing" in reply:
        raise Missing(reply["missing"])
    if "declined" in reply:
        if any(text in reply["declined"] for text in TORCH_LACKS):
            raise BackendFailure(f"the backend raised {reply['declined']}")
        raise Refusal(reply["declined"])
    if "broken" in reply:
        raise BackendFailure(reply["broken"])
    if "unwritten" in reply:
        why = reply["unwritten"]
        if folder.is_dir() and shutil.disk_usage(folder).free < LIMIT:
            raise NoRoom(f"the worker cannot write its outputs ({why}); make room")
        raise BackendFailure(f"its outputs cannot be written ({why})")
    if "raised" in reply:
        raise BackendFailure(f"the backend raised {_shorter(reply['raised'])}")


def refuse_rank(replies: Sequence[Mapping[str, Any]], session: Session, folder: Path) -> None:
    """Raise the error of the rank that failed first: the others failed because of it."""
    failures = [(rank, r) for rank, r in zip(session.identity.here, replies, strict=True)
              if "places" not in r]  # fmt: skip
    if not failures:
        return

    def is_echo(reply: Mapping[str, Any]) -> bool:
        return bool(reply.get("waited")) or str(reply.get("raised", "")).startswith("RankError")

    rank, reply = min(failures, key=lambda pair: is_echo(pair[1]))
    stage = f", in {reply['stage']}" if reply.get("stage") else ""
    who = f"rank {rank} of {session.identity.ranks}{stage}: "
    for key in ("raised", "broken", "unwritten"):
        if key in reply:
            raise BackendFailure(f"{who}{_shorter(str(reply[key]))}")
    refuse(reply, folder)


def _shorter(message: str) -> str:
    """torch's line of an exhausted GPU goes on with every process there: two sentences do."""
    if not message.startswith("OutOfMemoryError"):
        return message
    text, _, place = message.rpartition(" (")
    return f"{'. '.join(text.split('. ')[:2])}; use fewer --workers ({place}"


def result_of(reply: Mapping[str, Any], out: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The result, and the blank tensors."""
    tensors = {}
    with open_file(out) as file:
        for name, (kind, shape, offset) in reply["places"].items():
            size = math.prod(shape) * getattr(torch, kind).itemsize
            tensors[name] = tensor_of(read(file, offset, size), kind, shape)
    parts: dict[str, Any] = {}
    for name, layout in reply["shown"].items():
        if len(layout) == 1:
            parts[name] = Opaque(layout[0])
        elif f"out.{name}" in tensors:
            parts[name] = _strided(tensors[f"out.{name}"], layout[2])
        else:  # too large to be right: its dtype and shape are judged
            dtype = getattr(torch, layout[0])
            parts[name] = torch.empty_strided(layout[1], layout[2], dtype=dtype, device="meta")
    blank = {n.removeprefix("blank."): t for n, t in tensors.items() if n.startswith("blank.")}
    form = reply["form"]
    if form == "tensor":
        return parts["0"], blank
    if form == "mapping":
        return parts, blank
    if form == "sequence":
        return tuple(parts.values()), blank
    return (None if form == "NoneType" else Opaque(form)), blank


def _strided(tensor: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """The same values with the strides that the backend's tensor had.

    Dense ones in their place where two elements share memory, or where the holes are too large.
    """
    dense = _dense(tensor, stride)
    if all(n <= 1 or a == b for n, a, b in zip(dense.shape, dense.stride(), stride, strict=True)):
        return dense
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, stride, strict=True))
    if min(stride) < 1 or extent > LIMIT:
        return tensor
    return torch.empty(extent, dtype=tensor.dtype).as_strided(tensor.shape, stride).copy_(tensor)


def _dense(tensor: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    order = sorted(range(tensor.ndim), key=lambda axis: -stride[axis])
    transpose = tensor.permute(order).contiguous()
    back = [order.index(axis) for axis in range(tensor.ndim)]
    return transpose.permute(back)


__all__ = ["LIMIT", "Opaque", "refuse", "refuse_rank", "result_of"]
