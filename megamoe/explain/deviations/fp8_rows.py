"""Slot rows on their way through the combine of E4M3 rows with a scale per 128, in wrong ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from megamoe.explain.deviations.roundings import bits_of_fp32
from megamoe.oracle.groups import RECIP_448
from megamoe.spec.formats import (
    F32,
    F64,
    FP8_COMBINE_GROUP,
    U8,
    e4m3_cast,
    e4m3_decode,
    ue8m0_ceil,
)

Read = Callable[[F32], F64]
"""``(n,)`` rows of whole groups to what the combine reads of them."""


def _byte(amax: F32) -> Any:
    return ue8m0_ceil((amax * RECIP_448).astype(np.float32)).astype(np.int64)


def _cast(values: F64) -> U8:
    return e4m3_cast(values)


def _ties_away(values: F64) -> U8:
    tie = (bits_of_fp32(values.astype(np.float32)) & np.uint32(0xFFFFF)) == 0x80000
    return e4m3_cast(np.where(tie, values * (1 + 2.0**-20), values))


def _truncated(values: F64) -> U8:
    bits = bits_of_fp32(values.astype(np.float32)) & np.uint32(0xFFF00000)
    return e4m3_cast(bits.view(np.float32))


def _flushed(values: F64) -> U8:
    codes = e4m3_cast(values)
    return np.where((codes & 0x7F) < 8, codes & 0x80, codes).astype(np.uint8)


def read(
    size: int = FP8_COMBINE_GROUP,
    byte: Callable[[F32], Any] = _byte,
    cast: Callable[[F64], U8] = _cast,
    bias: int = 127,
) -> Read:
    """The combine's reading of a row; ``size`` 0 is the whole of what is there.

    By default it is the contract's (:func:`megamoe.oracle.combine.fp8_rows`).
    """

    def of(row: F32) -> F64:
        groups = row.reshape(-1, size or len(row)).astype(np.float64)
        amax = np.fmax.reduce(np.abs(groups), axis=1, initial=0.0).astype(np.float32)
        at = np.asarray(byte(amax))[:, None]
        factor = np.where(at == 255, -np.inf, np.exp2(127.0 - at))
        scale = np.where(at == 0, 0.0, np.where(at == 255, np.inf, np.exp2(at * 1.0 - bias)))
        values: F64 = (e4m3_decode(cast(groups * factor)) * scale).ravel()
        return values

    return of


def _continuous(row: F32) -> F64:
    """The codes by 448 / amax, the scale a power of two still."""
    groups = row.reshape(-1, FP8_COMBINE_GROUP).astype(np.float64)
    amax = np.fmax.reduce(np.abs(groups), axis=1, initial=0.0)
    at = _byte(amax.astype(np.float32))[:, None]
    codes = e4m3_cast((groups * (448.0 / np.maximum(amax, 1e-30)[:, None])).astype(np.float32))
    scale = np.where(at == 0, 0.0, np.exp2(at - 127.0))
    values: F64 = (e4m3_decode(codes) * scale).ravel()
    return values


def _nan_byte(amax: F32) -> Any:
    at = _byte(amax)
    return np.where(at == 0, 255, at)


READS: Final[Mapping[str, Read]] = {
    "slot rows are left in bfloat16": lambda row: row.astype(np.float64),
    "FP8 rows have a scale for each 32": read(32),
    "FP8 rows have a scale for each 64": read(64),
    "FP8 rows have the exponent rounded down": read(
        byte=lambda m: (bits_of_fp32((m * RECIP_448).astype(np.float32)) >> 23).astype(np.int64)
    ),
    "FP8 rows have an exponent one too large": read(byte=lambda m: _byte(m) + 1),
    "FP8 rows have an amax of at least 1e-4": read(
        byte=lambda m: _byte(np.maximum(m, np.float32(1e-4)))
    ),
    "FP8 rows have codes by 448 / amax, which is no power of two": _continuous,
    "FP8 rows have truncated codes": read(cast=_truncated),
    "FP8 rows have codes with ties away from zero": read(cast=_ties_away),
    "FP8 rows lose subnormal codes": read(cast=_flushed),
    "FP8 rows are read an octave too large": read(bias=126),
    "a zero FP8 row has the scale byte 255": read(byte=_nan_byte),
}
"""Wrong readings, by name. Of a group wider than 128 a life has not all channels."""
