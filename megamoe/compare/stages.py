"""The difference between two sides' bits, stage by stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load, save

from megamoe.files import write_atomically
from megamoe.judge import Finding, Place, bitwise
from megamoe.spec.forms import BYTE, INT32, INT64, UE8M0
from megamoe.spec.tensors import OPERATIONS, TENSORS, Tensor

Array = npt.NDArray[Any]

BEYOND: Final = Tensor(
    "beyond", ("N",), (torch.int64,), INT64,
    "bytes written beyond the batch's rows, a count for each tensor that staging writes", ("row",),
)  # fmt: skip
_RESULTS: Final = {name for o in OPERATIONS.values() for name in o.returns}
STAGES: Final = {n: t for n, t in TENSORS.items() if n in _RESULTS} | {BEYOND.name: BEYOND}
ORDER: Final = [name for name in STAGES if name != BEYOND.name]
"""Stages in the order in which they are computed: the first that moved is where to look."""
ORDER.insert(ORDER.index("topk_weights") + 1, BEYOND.name)


@dataclass(frozen=True)
class Change:
    """One stage on two sides."""

    elements: int
    count: int = 0
    """Elements whose bits differ, payloads of NaN and signs of zero included."""
    max_ulps: int | None = 0
    """The largest distance; None: NaN on one side only."""
    finding: Finding | None = None
    text: str = ""
    """The reason why the two cannot be compared element by element; empty if they can."""


# --- on the disk ------------------------------------------------------------------------------


def write_bits(path: Path, bits: Mapping[str, Array]) -> None:
    """Keep ``{stage: integers}`` as safetensors. Raises ``OSError``."""
    whole = {name: np.ascontiguousarray(array) for name, array in bits.items()}
    write_atomically(path, save(whole))


def read_bits(path: Path) -> dict[str, Array]:
    """``{stage: integers}`` as they were kept, in the order of computation."""
    return in_order(load(path.read_bytes()))


def in_order(bits: Mapping[str, Array]) -> dict[str, Array]:
    """The same in the order of computation; unknown stages last."""
    return {name: bits[name] for name in sorted(bits, key=place)}


def place(name: str) -> int:
    """The place of a stage in the order of computation."""
    return ORDER.index(name) if name in ORDER else len(ORDER)


# --- between two ------------------------------------------------------------------------------


def compare(
    left: Mapping[str, Array], right: Mapping[str, Array], ids: Array | None
) -> dict[str, Change]:
    """Every stage that both sides show. A stage shown by one side only says nothing of it."""
    shared = [name for name in left if name in right]
    return {name: stage_change(name, left[name], right[name], ids) for name in shared}


def stage_change(name: str, left: Array, right: Array, ids: Array | None) -> Change:
    """``right`` against ``left``, bit for bit."""
    if left.shape != right.shape or left.dtype.itemsize != right.dtype.itemsize:
        text = f"{left.dtype} {left.shape} became {right.dtype} {right.shape}"
        return Change(max(left.size, right.size), max(left.size, right.size, 1), None, text=text)
    stage, size = STAGES.get(name), left.dtype.itemsize
    a: Array = left.astype(np.int64)
    b: Array = right.astype(np.int64)
    form = None if stage is None else stage.form
    if stage is None or form is None or size != (4 if stage.packed else form.width // 8):
        form = INT64 if size == 8 else INT32  # not as a stage is: whole numbers
    elif stage.packed:
        a, b = stage.elements(left), stage.elements(right)
    elif form.signed_zero or form in (UE8M0, BYTE):
        a, b = unsigned(left), unsigned(right)
    count = int((a != b).sum())
    if not count:
        return Change(int(a.size))
    axes, per = (("row",), 1) if stage is None else (stage.places, stage.channels)
    if len(axes) != a.ndim:
        axes = ("row",) * a.ndim
    depth = sum(axis in ("token", "slot") for axis in axes)
    theirs = ids if ids is not None and a.shape[:depth] == ids.shape[:depth] else None
    finding = bitwise(name, form, b, a, Place(axes, per, None, theirs))
    far = finding.worst.ulps if finding.worst else 0  # 0: only payloads of NaN differ
    return Change(int(a.size), count, far, finding)


def unsigned(x: Array) -> Array:
    """The same bits as unsigned integers."""
    return x.view(np.dtype(f"u{x.dtype.itemsize}"))


def signature(digests: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Stages that both show and whose digests differ, in the order of computation."""
    names = [name for name in digests if name in other and digests[name] != other[name]]
    return sorted(names, key=place)


def worst_dict(name: str, finding: Finding | None) -> dict[str, Any] | None:
    """The element farthest off, JSON-able: ``expected`` is the left side's, or the good one's."""
    if finding is None or finding.worst is None:
        return None
    plain: dict[str, Any] = json.loads(json.dumps(asdict(finding.worst)))
    return plain
