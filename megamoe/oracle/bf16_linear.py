"""Linears of bfloat16 or E4M3 rows and MXFP4 weights: exact sums, and the interval of each class.

A product of a bfloat16 and an E2M1 number has 10 significant bits. The 32 products of a block may
lie so far apart that float64 does not hold their sum; then the products of the whole row are added
without an error. ``docs/numerics.md``, section 14.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.oracle.block_scaled import total_to_odd
from megamoe.oracle.bounds import LOWEST, result_interval
from megamoe.oracle.linear import NO_TERM, Blocks, sum_to_odd
from megamoe.spec.accumulators import Accumulator
from megamoe.spec.formats import E2M1_TABLE, F64, GROUP, U8, e2m1_unpack, ue8m0_decode

CHUNK: Final = 1 << 20
"""Block sums held at once: blocks x rows x channels."""
BF16: Final = 7, LOWEST
E4M3: Final = 3, -6
"""Fraction bits, and the exponent field of the subnormal numbers."""
EXACT: Final = ""
"""The name of the exact sums among those of the classes."""
Bools = npt.NDArray[np.bool_]
I16 = npt.NDArray[np.int16]
Ends = tuple[F64, F64]


@dataclass(frozen=True)
class Rows:
    """``R`` rows of numbers of a format as float64, known or as intervals."""

    low: F64
    high: F64
    """(R, C), ``low`` not above ``high``; NaN in both. An end that is infinite beside another one
    says that nothing is known of the number, and it may be NaN."""
    format: tuple[int, int] = BF16
    """:data:`BF16` or :data:`E4M3`."""

    @classmethod
    def point(cls, values: F64, format_: tuple[int, int] = BF16) -> Rows:
        """Rows without freedom."""
        return cls(values, values, format_)

    @property
    def unbounded(self) -> Bools:
        """``(R,)``: an unknown number may be infinite or NaN, and so may each output."""
        same = (self.low == self.high) | np.isnan(self.low)
        number = np.isfinite(self.low) & np.isfinite(self.high)
        return np.asarray((~number & ~same).any(axis=1))

    @property
    def special(self) -> Bools:
        """``(R,)``: a number is certainly infinite or NaN, and so is each output."""
        return np.asarray((~np.isfinite(self.low)).any(axis=1) & ~self.unbounded)

    def finite(self) -> Rows:
        """The same with zeros for what is no number."""
        number = np.isfinite(self.low) & np.isfinite(self.high)
        low, high = (np.where(number, end, 0.0) for end in (self.low, self.high))
        return Rows(low, low if self.low is self.high else high, self.format)


@dataclass(frozen=True)
class Weights:
    """``N`` outputs' weights of the checkpoint, decoded on demand."""

    packed: U8
    """(N, C/2): two E2M1 numbers a byte."""
    scale: U8
    """(N, C/32) UE8M0."""

    def parts(self, rows: int) -> Iterator[tuple[slice, Weights]]:
        """Some outputs at a time, so that memory stays small."""
        size = max(GROUP, CHUNK // max(1, rows * self.scale.shape[1]))
        for start in range(0, len(self.packed), size):
            part = slice(start, min(start + size, len(self.packed)))
            yield part, Weights(self.packed[part], self.scale[part])

    @cached_property
    def _codes(self) -> U8:
        """(G, 32, N)."""
        codes = _grouped(e2m1_unpack(self.packed))
        return np.ascontiguousarray(codes.transpose(0, 2, 1))

    @cached_property
    def values(self) -> F64:
        """(G, 32, N)."""
        numbers = np.take(E2M1_TABLE.astype(np.float64), self._codes, mode="clip")
        numbers *= ue8m0_decode(self.scale).T[:, None, :]
        return numbers

    @cached_property
    def fields(self) -> I16:
        """(G, 32, N) the exponent field of each."""
        return self._exponents(_field(E2M1_TABLE.astype(np.float64)))

    @cached_property
    def lowbits(self) -> I16:
        """(G, 32, N) the exponent of the lowest set bit of each."""
        return self._exponents(_lowbit(E2M1_TABLE.astype(np.float64), 1))

    def _exponents(self, of_code: I16) -> I16:
        exponents = np.take(of_code, self._codes, mode="clip")
        exponents += (self.scale.T.astype(np.int16) - np.int16(127))[:, None, :]
        return exponents


def linear(
    rows: Rows, weights: Weights, classes: list[Accumulator], exact: bool = False
) -> dict[str, Any]:
    """``(R, N)`` ends by class of what the fp32 accumulator may hold.

    ``exact``: of known rows also the infinitely precise sums, rounded to odd into float64, under
    the name :data:`EXACT`.
    """
    shape = len(rows.low), len(weights.packed)
    out: dict[str, Any] = {a.name: (np.empty(shape), np.empty(shape)) for a in classes}
    if exact:
        out[EXACT] = np.empty(shape)
    unbounded, special, finite = rows.unbounded[:, None], rows.special, rows.finite()
    for part, own in weights.parts(len(rows.low)):
        certain = _ieee(rows.low, own, special)
        sums = _sums(finite, own)
        if exact:
            out[EXACT][:, part] = _exact(finite, own, sums[0], sums[2])
            out[EXACT][special, part] = certain
        if not classes:
            continue
        blocks = _blocks(finite, own, *sums)
        for a in classes:
            low, high = result_interval(blocks, a)
            out[a.name][0][:, part] = np.where(unbounded, -np.inf, low)
            out[a.name][1][:, part] = np.where(unbounded, np.inf, high)
            for end in out[a.name]:
                end[special, part] = certain
    return out


def _sums(rows: Rows, weights: Weights) -> tuple[F64, F64, F64]:
    """``(G, R, N)`` least and greatest sum of each block, and the sum of magnitudes. They are as
    exact as float64 adds; the bounds cover its error."""
    low, high = _grouped(rows.low), _grouped(rows.high)
    magnitude = np.matmul(np.maximum(np.abs(low), np.abs(high)), np.abs(weights.values))
    centre = np.matmul((low + high) / 2, weights.values)
    if rows.low is rows.high:
        return centre, centre, magnitude
    reach = np.matmul((high - low) / 2, np.abs(weights.values))
    return centre - reach, centre + reach, magnitude


def _exact(rows: Rows, weights: Weights, sums: F64, magnitude: F64) -> F64:
    """``(R, N)`` sums of known finite rows without an error, rounded to odd."""
    out, values = total_to_odd(sums), rows.low
    row, column = _grouped(_row_lowbit(rows)).min(axis=-1), weights.lowbits.min(axis=1)
    lowbit = row[:, :, None].astype(np.float64) + column[:, None, :]
    with np.errstate(over="ignore"):  # a block without terms has an infinitely coarse lattice
        is_exact = magnitude < np.exp2(lowbit + 53)
    for at, n in np.argwhere(~is_exact.all(axis=0)):
        out[at, n] = sum_to_odd(values[at] * weights.values[:, :, n].ravel())
    return out


def _blocks(rows: Rows, weights: Weights, low: F64, high: F64, magnitude: F64) -> Blocks:
    """The blocks for the bounds. A row of activations has a few that are far larger than the rest:
    fields and lowest bits are those of terms with a weight that is not zero."""
    field, lowbit = _grouped(_row_field(rows)), _grouped(_row_lowbit(rows))
    least, most = (
        np.full(low.shape, -2 * NO_TERM, np.int16),
        np.full(low.shape, 2 * NO_TERM, np.int16),
    )
    for k in range(GROUP):
        np.minimum(least, lowbit[:, :, k, None] + weights.lowbits[:, k, None, :], out=least)
        np.maximum(most, field[:, :, k, None] + weights.fields[:, k, None, :], out=most)
    fields = most.astype(np.float64)
    return Blocks(
        low, high,
        np.maximum((magnitude + high) / 2, 0.0), np.maximum((magnitude - low) / 2, 0.0),
        least.astype(np.float64), fields, fields,  # each operand reaches the unit as one number
        (weights.values != 0).sum(axis=1, keepdims=True).astype(np.float64),
    )  # fmt: skip


def _grouped(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(R, C) to (C/32, R, 32)."""
    return values.reshape(len(values), -1, GROUP).transpose(1, 0, 2)


def _field(values: F64, lowest: int = LOWEST) -> I16:
    """The exponent field of each number; a subnormal one is aligned at ``lowest``."""
    exponent = np.maximum(np.frexp(values)[1] - 1, lowest)
    return np.where(values == 0, NO_TERM, exponent).astype(np.int16)


def _row_field(rows: Rows) -> I16:
    return _field(np.maximum(np.abs(rows.low), np.abs(rows.high)), rows.format[1])


def _lowbit(values: F64, fraction: int) -> I16:
    """The exponent of the lowest set bit of each number, which has no more than ``fraction`` bits
    after the first; a large one for zero."""
    exponent = np.frexp(values)[1] - 1 - fraction
    whole = np.abs(np.ldexp(values, -exponent)).astype(np.int64)
    exponent = exponent + np.frexp((whole & -whole).astype(np.float64))[1] - 1
    return np.where(whole > 0, exponent, -NO_TERM).astype(np.int16)


def _row_lowbit(rows: Rows) -> I16:
    """The same of rows. Between two ends lies any number; their middle has a bit more."""
    low, high, (fraction, lowest) = rows.low, rows.high, rows.format
    near = np.where(low * high > 0, np.minimum(np.abs(low), np.abs(high)), 0.0)
    free = _field(np.maximum(near, 2.0**lowest)) - fraction - 1
    return np.where(low == high, _lowbit(low, fraction), free).astype(np.int16)


def _ieee(values: F64, weights: Weights, mask: Bools) -> F64:
    """``(n, N)`` sums of the chosen rows, each with an infinity or NaN: zero times it is NaN."""
    if not mask.any():
        return np.zeros((0, len(weights.packed)))
    numbers = weights.values.reshape(-1, len(weights.packed))
    with np.errstate(invalid="ignore"):
        return np.stack([(row[:, None] * numbers).sum(axis=0) for row in values[mask]])


__all__ = ["BF16", "E4M3", "EXACT", "Ends", "Rows", "Weights", "linear"]
