"""Roundings of fp32 values on their way to bfloat16, and subnormal numbers that become zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from megamoe.spec.formats import F32

U32 = npt.NDArray[np.uint32]


def bits_of_fp32(values: F32) -> U32:
    """The bits of fp32 values."""
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def truncated(values: F32) -> F32:
    """To bfloat16, toward zero."""
    return (bits_of_fp32(values) & np.uint32(0xFFFF0000)).view(np.float32)


def flushed(values: F32) -> F32:
    """Subnormal fp32 values to zero."""
    return np.where(np.abs(values) < np.float32(2.0**-126), np.float32(0), values)


def tf32(values: F32) -> F32:
    """Rounded to the 11 bits of TF32, ties away from zero."""
    return ((bits_of_fp32(values) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def _moved_ties(by: int) -> Callable[[F32], F32]:
    """Values half-way between two bfloat16 numbers, moved by a unit of fp32."""

    def move(values: F32) -> F32:
        bits = bits_of_fp32(values)
        tie = (bits & np.uint32(0xFFFF)) == 0x8000
        return np.where(tie, bits + np.uint32(by & 0xFFFFFFFF), bits).view(np.float32)

    return move


BF16_ROUNDINGS: Final[Mapping[str, Callable[[F32], F32]]] = {
    "ties are rounded away from zero": _moved_ties(1),
    "ties are rounded toward zero": _moved_ties(-1),
    "values go through TF32 before bfloat16": tf32,
    "subnormal values are flushed to zero": flushed,
}
"""What is done to fp32 values before they are rounded to bfloat16, to nearest."""
