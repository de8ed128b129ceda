"""Deviations of both quantisations: the amax of a group, and the cast to E4M3.

Values have the shape ``(..., C)``, scale bytes and amax ``(..., C/32)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from megamoe.explain.deviations.roundings import tf32, truncated
from megamoe.explain.ways import I32, in_bf16
from megamoe.oracle.groups import RECIP_448
from megamoe.spec.contract import BASE, Contract
from megamoe.spec.formats import E4M3_NAN, F32, F64, GROUP, U8, e4m3_cast

Bools = npt.NDArray[np.bool_]
Cast = Callable[[F32, I32], U8]
Amax = Callable[[F32], F32]
Narrow = Callable[[F32], F32]


def scaled(values: F32, exponent: I32) -> F64:
    """``value * 2**(127 - e)``, exact; NaN where the scale byte is 255."""
    per_value = np.repeat(exponent, GROUP, axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        wide = np.ldexp(values.astype(np.float64), 127 - per_value)
    return np.where(per_value == 255, np.nan, wide)


def _step(wide: F64) -> F64:
    """The distance of two E4M3 codes at each value."""
    size = np.where(np.isfinite(wide), np.abs(wide), 1.0)
    exponent = np.frexp(size)[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, -6) - 3)


def _rounded(rounding: Callable[[F64], F64]) -> Cast:
    """A cast that rounds the magnitude, in units of one step, by ``rounding``."""

    def cast(values: F32, exponent: I32) -> U8:
        wide = scaled(values, exponent)
        with np.errstate(invalid="ignore"):
            step = _step(wide)
            size = np.minimum(np.abs(wide), 2.0**20)
            return e4m3_cast(np.copysign(rounding(size / step) * step, wide))

    return cast


def _ties(up: Callable[[F64, F64], Bools]) -> Cast:
    """A cast that is right but for ties. ``up`` takes the scaled values and their magnitude in
    units of one step, and says where a tie goes to the larger magnitude."""

    def cast(values: F32, exponent: I32) -> U8:
        wide = scaled(values, exponent)
        with np.errstate(invalid="ignore"):
            step = _step(wide)
            size = np.minimum(np.abs(wide), 2.0**20) / step
            least = np.floor(size)
            other = np.copysign((least + up(wide, size)) * step, wide)
            return e4m3_cast(np.where(size - least == 0.5, other, wide))

    return cast


def _is_odd(size: F64) -> Bools:
    """Whether the number of whole steps is odd: rounding to even then goes up."""
    return np.floor(size) % 2 == 1


def _flushed(values: F32, exponent: I32) -> U8:
    codes = e4m3_cast(scaled(values, exponent))
    return np.where(codes & 0x78, codes, 0).astype(np.uint8)


def _signed_zero(values: F32, exponent: I32) -> U8:
    codes = e4m3_cast(scaled(values, exponent))
    return np.where(codes & 0x78, codes, codes & 0x80).astype(np.uint8)


def in_half(values: F32) -> F32:
    """Rounded to fp16, which may overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float16).astype(np.float32)


def _through(narrow: Narrow) -> Cast:
    # A product of an fp32 value and a power of two is an fp32 value, down to far below E4M3.
    return lambda v, e: e4m3_cast(narrow(scaled(v, e).astype(np.float32)).astype(np.float64))


def _nan_as(code: int) -> Cast:
    """NaN becomes a number; beside byte 255 any code is right."""

    def cast(values: F32, exponent: I32) -> U8:
        codes = e4m3_cast(scaled(values, exponent))
        return np.where(np.isnan(values), code, codes).astype(np.uint8)

    return cast


def _small_zero(values: F32, exponent: I32) -> U8:
    wide = scaled(values, exponent)
    return e4m3_cast(np.where(np.abs(wide) < 2.0**-6, 0.0, wide))


def _limit(limit: float) -> Cast:
    def cast(values: F32, exponent: I32) -> U8:
        wide = scaled(values, exponent)
        return np.where(np.isnan(wide), E4M3_NAN, e4m3_cast(np.clip(wide, -limit, limit))).astype(
            np.uint8
        )

    return cast


def _fnuz(values: F32, exponent: I32) -> U8:
    """E4M3 FNUZ has a bias of 8, so a code is that of twice the value, and ends at 240."""
    wide = scaled(values, exponent)
    codes = e4m3_cast(np.clip(wide, -240, 240) * 2, False)
    return np.where(np.isnan(wide), 0x80, np.where(np.abs(wide) >= 240, 0x7F, codes)).astype(
        np.uint8
    ) | np.where((np.abs(wide) >= 240) & (wide < 0), 0x80, 0).astype(np.uint8)


CASTS: Final[Mapping[str, Cast]] = {
    "ties of codes are rounded away from zero": _rounded(lambda q: np.floor(q + 0.5)),
    "ties of codes are rounded toward zero": _rounded(lambda q: np.ceil(q - 0.5)),
    "ties of codes are rounded up": _ties(lambda w, q: w > 0),
    "ties of codes are rounded down": _ties(lambda w, q: w < 0),
    "ties of codes are rounded to odd": _ties(lambda w, q: ~_is_odd(q)),
    "ties of subnormal codes are rounded away from zero": _ties(
        lambda w, q: _is_odd(q) | (np.abs(w) < 2.0**-6)
    ),
    "ties of subnormal codes are rounded toward zero": _ties(
        lambda w, q: _is_odd(q) & (np.abs(w) >= 2.0**-6)
    ),
    "ties of negative codes are rounded away from zero": _ties(lambda w, q: _is_odd(q) | (w < 0)),
    "codes are rounded toward zero": _rounded(np.floor),
    "codes are rounded away from zero": _rounded(np.ceil),
    "scaled values go through TF32 before the cast": _through(tf32),
    "scaled values go through fp16 before the cast": _through(in_half),
    "scaled values go through bfloat16 before the cast": _through(in_bf16),
    "NaN becomes 448": _nan_as(0x7E),
    "NaN becomes zero": _nan_as(0),
    "values lose 3 of 23 bits toward zero before the cast": lambda v, e: e4m3_cast(
        scaled((np.ascontiguousarray(v).view(np.uint32) & 0xFFF00000).view(np.float32), e)
    ),
    "values are shrunk by 2^-5 before the cast": lambda v, e: e4m3_cast(
        scaled((v * np.float32(1 - 2**-5)).astype(np.float32), e)
    ),
    "the cast does not saturate: beyond 448 is NaN": lambda v, e: e4m3_cast(scaled(v, e), False),
    "infinity becomes NaN, not 448": lambda v, e: np.where(
        np.isinf(np.asarray(v)), E4M3_NAN, e4m3_cast(scaled(v, e))
    ).astype(np.uint8),
    "codes end at 240, the limit of E4M3 FNUZ": _limit(240.0),
    "codes are those of E4M3 FNUZ": _fnuz,
    "E4M3 subnormals are flushed to zero": _flushed,
    "E4M3 subnormals are flushed to a zero with their sign": _signed_zero,
    "values below the normal E4M3 are flushed before rounding": _small_zero,
    "the sign is lost": lambda v, e: e4m3_cast(np.abs(scaled(v, e))),
}
"""Casts of right values by right scale bytes."""


def continuous_codes(values: F32, amax: F32, contract: Contract = BASE) -> U8:
    """Codes by the scale ``amax / 448`` itself, where the stored byte is its power of two."""
    scale = np.repeat(np.maximum(amax * RECIP_448, np.float32(1e-30)), GROUP, axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        return e4m3_cast((values / scale).astype(np.float32), contract.cast_saturates.value)


def regrouped(amax: F32, size: int) -> F32:
    """The largest amax of each ``size`` values, for each group of 32 of them."""
    count = size // GROUP
    shape = (*amax.shape[:-1], amax.shape[-1] // count, count)
    largest = np.fmax.reduce(amax.reshape(shape), axis=-1)
    return np.repeat(largest, count, axis=-1)


def _whole(values: F32, amax: Amax) -> F32:
    of_groups = amax(values)
    return np.broadcast_to(np.fmax.reduce(of_groups, axis=-1)[..., None], of_groups.shape)


def _half_group(first: int) -> Callable[[F32, Amax], F32]:
    """Only one half of a group counts, as where a reduction loses a lane."""

    def of(values: F32, amax: Amax) -> F32:
        groups = values.reshape(*values.shape[:-1], -1, GROUP).copy()
        groups[..., GROUP // 2 - first : GROUP - first] = 0
        return amax(groups.reshape(values.shape))

    return of


def _strided(values: F32, amax: Amax) -> F32:
    """Group g takes every G-th value from the g-th on, G the number of groups."""
    apart = values.reshape(*values.shape[:-1], GROUP, -1).swapaxes(-1, -2)
    return amax(np.ascontiguousarray(apart).reshape(values.shape))


def _without_member(at: int) -> Callable[[F32, Amax], F32]:
    def of(values: F32, amax: Amax) -> F32:
        groups = values.reshape(*values.shape[:-1], -1, GROUP).copy()
        groups[..., at] = 0
        return amax(groups.reshape(values.shape))

    return of


def _amax_of(narrow: Narrow) -> Callable[[F32, Amax], F32]:
    """The values are right, and amax alone is taken of rounded ones."""
    return lambda values, amax: amax(narrow(values))


GROUPS: Final[Mapping[str, Callable[[F32, Amax], F32]]] = {
    "one scale holds for the whole row": _whole,
    "amax is that of the first 16 of a group": _half_group(0),
    "amax is that of the last 16 of a group": _half_group(GROUP // 2),
    "amax misses the first of a group": _without_member(0),
    "amax misses the last of a group": _without_member(GROUP - 1),
    "a group's amax is that of values a number of groups apart": _strided,
    "amax is rounded to fp16": _amax_of(in_half),
    "amax is rounded to bfloat16": _amax_of(in_bf16),
    "amax is truncated to bfloat16": _amax_of(truncated),
    "amax is rounded to TF32": _amax_of(tf32),
}
"""The amax of other groups, from values and the right amax of any values."""
