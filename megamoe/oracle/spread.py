"""Linear 2 of activations that are known only as intervals.

A group whose exponent is decided has an interval for each code. A group whose exponent is not has
one such set for each candidate; the block sum is the hull over the candidates, never a mixture:
a kernel uses one exponent for the whole group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megamoe.oracle.groups import scaled_codes
from megamoe.oracle.linear import NO_TERM, Blocks, Columns, folded_field
from megamoe.oracle.swiglu import Activations
from megamoe.spec.formats import GROUP, U8, e4m3_decode

F64 = npt.NDArray[np.float64]

_SUBNORMAL_LOWBIT = -9
"""Every E4M3 value is a multiple of 2**-9."""


@dataclass(frozen=True)
class SpreadRows:
    """``R`` rows of ``I`` activations, as intervals, ``G = I/32`` groups."""

    low: F64
    high: F64
    """(G, R, 32) code values at the group's lowest exponent, without scale."""
    first: npt.NDArray[np.int32]
    last: npt.NDArray[np.int32]
    """(R, G) lowest and highest exponent, unbiased."""
    activations: Activations

    @classmethod
    def of(cls, activations: Activations, first: U8, last: U8) -> SpreadRows:
        count = activations.low.shape[0]

        def grouped(values: npt.NDArray[np.float32]) -> F64:
            numbers = e4m3_decode(scaled_codes(values, first, activations.contract))
            return np.ascontiguousarray(numbers.reshape(count, -1, GROUP).transpose(1, 0, 2))

        return cls(
            grouped(activations.low),
            grouped(activations.high),
            first.astype(np.int32) - 127,
            last.astype(np.int32) - 127,
            activations,
        )

    @classmethod
    def unless_decided(cls, activations: Activations) -> SpreadRows | None:
        """None where there is one possible set of codes and exponents."""
        first, last = activations.exponents()
        rows = cls.of(activations, first, last)
        return None if rows.is_decided().all() else rows

    def may_be_nan(self) -> npt.NDArray[np.bool_]:
        """``(R,)``: an activation, or a scale factor of byte 255, may be NaN: so any output may."""
        overflow = (self.last + 127 == 255).any(axis=1)
        nan = self.activations.nan
        return np.asarray(overflow if nan is None else overflow | nan.any(axis=1))

    def is_decided(self) -> npt.NDArray[np.bool_]:
        """``(R,)``: rows of one possible set of codes and exponents."""
        one_code = (self.low == self.high).all(axis=(0, 2))
        one_exponent = (self.first == self.last).all(axis=1)
        nan = self.activations.nan
        points = one_code & one_exponent
        return np.asarray(points if nan is None else points & ~nan.any(axis=1))


def spread_block_sums(rows: SpreadRows, columns: Columns) -> Blocks:
    """Intervals of the block sums of ``rows`` with known weights."""
    weights, absolute = columns.values, np.abs(columns.values)
    low, high, magnitude = _interval_product(rows.low, rows.high, weights, absolute)
    scale = np.exp2(rows.first.T[:, :, None] + columns.exponent.T[:, None, :])
    low, high, magnitude = low * scale, high * scale, magnitude * scale
    top_code = np.maximum(np.abs(rows.low), np.abs(rows.high)).max(axis=-1)
    field = np.where(top_code > 0, np.maximum(np.frexp(top_code)[1] - 1, -6), NO_TERM)

    for row, group in np.argwhere(rows.first != rows.last):
        last = min(rows.last[row, group], 127)  # byte 255 has no numbers: see may_be_nan
        for exponent in range(rows.first[row, group] + 1, last + 1):
            candidate = _candidate(rows, row, group, exponent)
            part = _interval_product(*candidate, weights[group], absolute[group])
            shift = np.exp2(exponent + columns.exponent[:, group])
            at = (group, row)
            low[at] = np.minimum(low[at], part[0][0] * shift)
            high[at] = np.maximum(high[at], part[1][0] * shift)
            magnitude[at] = np.maximum(magnitude[at], part[2][0] * shift)
    weight_exponent = np.nan_to_num(columns.exponent).T[:, None, :]
    point = (rows.low == rows.high).all(axis=-1) & (rows.first == rows.last).T
    lowbit = np.where(point, _point_lowbit(rows), float(_SUBNORMAL_LOWBIT))
    return Blocks(
        low,
        high,
        np.maximum((magnitude + high) / 2, 0.0),
        np.maximum((magnitude - low) / 2, 0.0),
        (lowbit + rows.first.T)[:, :, None] + columns.lowbit.T[:, None, :] + weight_exponent,
        (field + rows.last.T)[:, :, None] + columns.field.T[:, None, :] + weight_exponent,
        folded_field(field + rows.last.T)[:, :, None]
        + folded_field(columns.field + columns.exponent).T[:, None, :],
    )


def _interval_product(low: F64, high: F64, weights: F64, absolute: F64) -> tuple[F64, F64, F64]:
    """Ends of sum(w * v) over low <= v <= high, and an upper bound of sum(|w| |v|).

    Midpoint and radius: halves of dyadic numbers, so still exact in float64.
    """
    middle, radius = (low + high) / 2, (high - low) / 2
    centre = np.matmul(middle, weights)
    reach = np.matmul(radius, absolute)
    largest = np.maximum(np.abs(low), np.abs(high))
    return centre - reach, centre + reach, np.matmul(largest, absolute)


def _candidate(rows: SpreadRows, row: int, group: int, exponent: int) -> tuple[F64, F64]:
    """Code values ``(1, 32)`` of one group at another of its exponents."""
    part = slice(group * GROUP, (group + 1) * GROUP)
    byte = np.array([[exponent + 127]])
    acts = rows.activations
    low, high = (
        e4m3_decode(scaled_codes(end[row : row + 1, part], byte, acts.contract))
        for end in (acts.low, acts.high)
    )
    return low, high


def _point_lowbit(rows: SpreadRows) -> F64:
    """(G, R) lowest set bit over the codes of a group that has no freedom."""
    value = np.abs(rows.low)
    steps = np.nan_to_num(value * 2.0**-_SUBNORMAL_LOWBIT).astype(np.int64)
    lowest = (steps & -steps).astype(np.float64)
    exponent = np.where(steps > 0, np.frexp(lowest)[1] - 1 + _SUBNORMAL_LOWBIT, -NO_TERM)
    return exponent.min(axis=-1).astype(np.float64)
