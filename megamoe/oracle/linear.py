"""The two linears, exactly: block sums of code products, and operands decoded once.

A *block* is one scale group of 32 along the contraction, for one (row, output) pair. Its terms
are ``x[k] * w[k] * 2**e`` with one exponent ``e`` a block. A product of an E4M3 and an E2M1 value
is a multiple of 2**-10 below 2**12, one of two E4M3 values (a shared expert's) of 2**-18 below
2**18, so 32 of them sum exactly in float64, in any order: matrix products of float64 are used for
speed, and any BLAS on any machine returns the same bits.

Weights are E2M1, two a byte, or E4M3, one a byte: the number of bytes that a scale factor stands
for says which.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.spec.formats import (
    E2M1_TABLE,
    E4M3_TABLE,
    GROUP,
    U8,
    e2m1_decode,
    e2m1_unpack,
    e2m1_value,
    e4m3_decode,
    e4m3_value,
    ue8m0_decode,
)

F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]

NO_TERM = -(10**4)
"""Exponent of a block without a non-zero term: below every other."""


def _lowbit(table: F64) -> I32:
    """Exponent of the lowest set bit of each table entry; a large number for zero and NaN."""
    out = np.full(table.shape, -NO_TERM, dtype=np.int32)
    for code, value in enumerate(table):
        if np.isfinite(value) and value != 0:
            fraction = Fraction(float(value))
            top = fraction.numerator & -fraction.numerator
            out[code] = top.bit_length() - fraction.denominator.bit_length()
    return out


def _field(table: F64, lowest: int) -> I32:
    """Exponent as the hardware aligns it: the exponent field, subnormals at the lowest normal."""
    out = np.full(table.shape, NO_TERM, dtype=np.int32)
    for code, value in enumerate(table):
        if np.isfinite(value) and value != 0:
            out[code] = max(int(np.frexp(abs(value))[1]) - 1, lowest)
    return out


_E4M3_LOWBIT, _E2M1_LOWBIT = _lowbit(E4M3_TABLE), _lowbit(E2M1_TABLE)
_E4M3_FIELD, _E2M1_FIELD = _field(E4M3_TABLE, -6), _field(E2M1_TABLE, 0)


def _per_group(table: I32, codes: U8, reduce: np.ufunc) -> I32:
    return reduce.reduce(np.take(table, codes).reshape(*codes.shape[:-1], -1, GROUP), axis=-1)


# The fields and lowest bits that occur in each group of nibbles: the flags of a byte's two nibbles
# are or-ed over the sixteen bytes of a group, eight at a time.
_FIELDS, _LOWBITS = (0, 1, 2), (-1, 0, 1, 2)
_CACHE = 1 << 18
"""Bytes of weights that are looked at together."""


def _flags() -> U8:
    """A table over bytes of two nibbles: bits 0 to 2 hold the fields, bits 3 to 6 the lowest
    bits."""
    of_nibble = np.zeros(16, np.uint8)
    for code in range(16):
        if _E2M1_FIELD[code] != NO_TERM:
            of_nibble[code] = 1 << _FIELDS.index(int(_E2M1_FIELD[code]))
            of_nibble[code] |= 8 << _LOWBITS.index(int(_E2M1_LOWBIT[code]))
    return np.bitwise_or.outer(of_nibble, of_nibble).ravel()


_PAIR_FLAGS: U8 = _flags()
_FLAGS_FIELD = np.array(
    [
        max((f for i, f in enumerate(_FIELDS) if byte >> i & 1), default=NO_TERM)
        for byte in range(256)
    ],
    np.int32,
)
_FLAGS_LOWBIT = np.array(
    [
        min((b for i, b in enumerate(_LOWBITS) if byte >> (i + 3) & 1), default=-NO_TERM)
        for byte in range(256)
    ],
    np.int32,
)


def _group_flags(packed: U8) -> U8:
    """``(N, C/2)`` bytes of nibbles to ``(N, C/32)`` flags of :func:`_flags`."""
    out = np.empty((len(packed), packed.shape[1] * 2 // GROUP), np.uint8)
    size = max(1, _CACHE // max(1, packed.shape[1]))
    for start in range(0, len(packed), size):
        part = slice(start, start + size)
        # A byte is never out of range; "clip" spares NumPy a copy of the indices.
        flags = np.take(_PAIR_FLAGS, packed[part], mode="clip").view(np.uint64)
        both = flags[:, 0::2] | flags[:, 1::2]
        for shift in (32, 16, 8):
            both |= both >> np.uint64(shift)
        out[part] = both.astype(np.uint8)
    return out


@dataclass(frozen=True)
class Rows:
    """Left operand: ``R`` rows of ``C`` codes with their scale exponents, ``G = C/32`` groups."""

    codes: U8
    values: F64
    """(G, R, 32), without scale."""
    exponent: F64
    """(R, G), unbiased; NaN for a NaN scale factor."""
    lowbit: I32
    field: I32
    """(R, G): lowest set bit, and largest exponent field, of the group's non-zero codes."""

    @classmethod
    def of(cls, codes: U8, sf: U8) -> Rows:
        rows = codes.shape[0]
        values = E4M3_TABLE[codes].reshape(rows, -1, GROUP).transpose(1, 0, 2)
        with np.errstate(divide="ignore"):
            exponent = np.log2(ue8m0_decode(sf))
        return cls(
            codes,
            np.ascontiguousarray(values),
            exponent,
            _per_group(_E4M3_LOWBIT, codes, np.minimum),
            _per_group(_E4M3_FIELD, codes, np.maximum),
        )

    def only(self, mask: npt.NDArray[np.bool_]) -> Rows:
        """Some of the rows, by a mask ``(R,)``."""
        return Rows(
            self.codes[mask],
            self.values[:, mask],
            self.exponent[mask],
            self.lowbit[mask],
            self.field[mask],
        )


def is_e4m3(codes: U8, sf: npt.NDArray[Any]) -> bool:
    """Whether weights ``(N, C)`` or ``(N, C/2)`` with scales ``(N, C/32)`` have one byte per
    value."""
    return codes.shape[-1] == sf.shape[-1] * GROUP


@dataclass(frozen=True)
class Columns:
    """The right operand: ``N`` output channels of codes with their scale exponents.

    Derived arrays are computed on demand.
    """

    packed: U8
    """(N, C/2) E2M1, or (N, C) E4M3."""
    exponent: F64
    """(N, G), unbiased; NaN for a NaN scale factor."""

    @classmethod
    def chunks(cls, packed: U8, sf: U8, size: int) -> Iterator[tuple[slice, Columns]]:
        """Take ``size`` output channels at a time, so that memory stays small."""
        for start in range(0, packed.shape[0], size):
            part = slice(start, min(start + size, packed.shape[0]))
            yield part, cls.of(packed[part], sf[part])

    @classmethod
    def of(cls, packed: U8, sf: U8) -> Columns:
        with np.errstate(divide="ignore"):
            return cls(packed, np.log2(ue8m0_decode(sf)))

    @property
    def is_e4m3(self) -> bool:
        """A byte a value."""
        return is_e4m3(self.packed, self.exponent)

    @cached_property
    def values(self) -> F64:
        """(G, 32, N), without scale."""
        decode = e4m3_decode if self.is_e4m3 else e2m1_decode
        values: F64 = np.asarray(decode(self.packed), np.float64)
        return values.reshape(self.packed.shape[0], -1, GROUP).transpose(1, 2, 0)

    @cached_property
    def lowbit(self) -> I32:
        """(N, G): lowest set bit of the group's non-zero codes."""
        if self.is_e4m3:
            return _per_group(_E4M3_LOWBIT, self.packed, np.minimum)
        return _FLAGS_LOWBIT[self._flags]

    @cached_property
    def field(self) -> I32:
        """(N, G): largest exponent field of the group's non-zero codes."""
        if self.is_e4m3:
            return _per_group(_E4M3_FIELD, self.packed, np.maximum)
        return _FLAGS_FIELD[self._flags]

    @cached_property
    def _flags(self) -> U8:
        return _group_flags(self.packed)


@dataclass(frozen=True)
class Blocks:
    """Block sums of ``R`` rows by ``N`` outputs, with the data of their terms that bounds need.

    All arrays are ``(G, R, N)``. ``low == high`` for known operands; an interval of block sums
    where the left operand itself is only known as an interval.
    """

    low: F64
    high: F64
    positive: F64
    negative: F64
    """Sum of the positive terms and, as a magnitude, of the negative ones (upper bounds)."""
    lowbit: F64
    """Every term is a multiple of 2**lowbit."""
    field: F64
    """Exponent field of the largest term is at most this."""
    bf16_field: F64
    """The same where each operand, with its scale, is one bfloat16: a subnormal has field -126."""
    terms: F64 | None = None
    """``(G, 1, N)`` the weights of each block that are not zero; None: 32, which is no less."""

    def only(self, mask: npt.NDArray[np.bool_]) -> Blocks:
        """Some of the rows, by a mask ``(R,)``."""
        arrays = (part.name for part in fields(self) if part.name != "terms")
        rows: dict[str, Any] = {name: getattr(self, name)[:, mask] for name in arrays}
        return replace(self, **rows)

    def most_terms(self, block: int) -> F64 | float:
        """A bound of the terms of one block that are not zero; a zero is added exactly."""
        return float(GROUP) if self.terms is None else self.terms[block]

    def total(self) -> tuple[F64, F64]:
        """Sum over all blocks, ``(R, N)``: exact where :meth:`exact_in_float64` holds."""
        return self.low.sum(axis=0), self.high.sum(axis=0)

    def exact_in_float64(self) -> npt.NDArray[np.bool_]:
        """``(R, N)``: every partial sum in any order is a float64, so the total is exact."""
        magnitude = (self.positive + self.negative).sum(axis=0)
        return magnitude < np.exp2(self.lowbit.min(axis=0) + 53)


def block_sums(rows: Rows, columns: Columns) -> Blocks:
    """Blocks of known operands."""
    exponent = rows.exponent.T[:, :, None] + columns.exponent.T[:, None, :]
    scale = np.exp2(exponent)
    signed = np.matmul(rows.values, columns.values) * scale
    absolute = np.matmul(np.abs(rows.values), np.abs(columns.values)) * scale
    whole = np.nan_to_num(exponent)  # NaN sums are NaN already; their bounds do not matter
    return Blocks(
        signed,
        signed,
        (absolute + signed) / 2,
        (absolute - signed) / 2,
        rows.lowbit.T[:, :, None] + columns.lowbit.T[:, None, :] + whole,
        rows.field.T[:, :, None] + columns.field.T[:, None, :] + whole,
        _bf16_field(rows.field + rows.exponent, columns.field + columns.exponent),
    )


def _bf16_field(row_field: F64, column_field: F64) -> F64:
    """``(R, G)`` and ``(N, G)`` fields with their scales, each as a bfloat16's, added."""
    row, column = (folded_field(field) for field in (row_field, column_field))
    return np.asarray(row.T[:, :, None] + column.T[:, None, :])


def folded_field(field: F64) -> F64:
    """Fields of scaled operands as bfloat16 has them; no term stays no term, NaN becomes 0."""
    return np.where(field > NO_TERM // 2, np.maximum(field, -126.0), np.nan_to_num(field))


def exact_dot(codes: U8, sf: U8, packed: U8, weight_sf: U8) -> Fraction:
    """One output by rational arithmetic: ``(C,)`` codes against one row of weights.

    The slow, independent way: no float anywhere. ``ValueError`` for a NaN operand.
    """
    total = Fraction(0)
    weights = packed if is_e4m3(packed, weight_sf) else e2m1_unpack(packed)
    value_of = e4m3_value if is_e4m3(packed, weight_sf) else e2m1_value
    for group in range(len(sf)):
        inner = Fraction(0)
        for k in range(group * GROUP, (group + 1) * GROUP):
            value, weight = e4m3_value(int(codes[k])), value_of(int(weights[k]))
            if value is None or weight is None:
                raise ValueError("NaN operand: the dot product has no value")
            inner += value * weight
        total += inner * Fraction(2) ** (int(sf[group]) + int(weight_sf[group]) - 254)
    return total


def sum_to_odd(parts: F64) -> float:
    """:func:`float_to_odd` of the exact sum of finite float64 ``parts`` ``(G,)``, fast."""
    nearest = math.fsum(parts)
    rest = math.fsum([*parts, -nearest])  # rounded once, so its sign is that of the exact rest
    if rest == 0:
        return nearest
    if (rest < 0) == (nearest > 0):
        nearest = math.nextafter(nearest, 0.0)
    bits = np.float64(nearest).view(np.uint64) | np.uint64(1)
    return float(bits.view(np.float64))


def float_to_odd(value: Fraction) -> float:
    """Float64 nearest toward zero, last bit set if inexact: rounding it on gives one rounding."""
    nearest = float(value)
    exact = Fraction(nearest)
    if exact == value:
        return nearest
    if abs(exact) > abs(value):
        nearest = float(np.nextafter(nearest, 0.0))
    bits = np.float64(nearest).view(np.uint64) | np.uint64(1)
    return float(bits.view(np.float64))
