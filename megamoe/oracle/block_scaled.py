"""Linears whose scale factors come after the sums: ``sum over runs of fl(a * w) * run``.

A *run* is the stretch of K with one fp32 scale a of the row and one w of the weights. The sum of a
run starts from zero; how it is taken is the accumulator class's. The scaling is the contract's: the
scales are multiplied and rounded, and the runs are added in ascending K, each by one fma or by a
product and a sum, to nearest. ``docs/numerics.md``, section 13, has the bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from megamoe.oracle.bounds import floor_log2, result_interval
from megamoe.oracle.fused import fma
from megamoe.oracle.linear import NO_TERM, Blocks, Columns, Rows, sum_to_odd
from megamoe.oracle.stepwise import replay
from megamoe.spec.accumulators import Accumulator
from megamoe.spec.formats import BLOCK, F32, F64, GROUP, U8, e4m3_decode, e4m3_key

CHUNK: Final = 1 << 20
"""Block sums held at once: blocks x rows x channels."""
_ONE: Final = np.uint8(127)
"""The UE8M0 byte of 1."""


@dataclass(frozen=True)
class Codes:
    """``R`` rows of E4M3 codes with fp32 scales, known or as intervals."""

    low: U8
    high: U8
    """(R, C), ``low`` not above ``high`` in value."""
    scale_low: F32
    scale_high: F32
    """(R, C/run), not below 0."""

    @classmethod
    def point(cls, codes: U8, scale: F32) -> Codes:
        """Rows without freedom."""
        return cls(codes, codes, scale, scale)

    @property
    def run(self) -> int:
        """Values of K with one scale."""
        return int(self.low.shape[1] // self.scale_low.shape[1])

    def part(self, first: int, last: int) -> tuple[U8, U8]:
        """Codes of the columns from ``first`` to ``last``."""
        return self.low[:, first:last], self.high[:, first:last]


Ends = tuple[F32, F32]


def linear(rows: Codes, weights: U8, scales: F32, classes: list[Accumulator]) -> dict[str, Ends]:
    """``(R, N)`` fp32 ends by class, of rows times ``weights`` ``(N, C)`` E4M3 codes.

    ``scales`` ``(N/128, C/128)`` float32.
    """
    shape = len(rows.low), len(weights)
    out = {a.name: (np.zeros(shape, np.float32), np.zeros(shape, np.float32)) for a in classes}
    size = max(BLOCK, CHUNK // max(1, len(rows.low) * 4) // BLOCK * BLOCK)
    for start in range(0, shape[1], size):
        part = slice(start, min(start + size, shape[1]))
        for first in range(0, weights.shape[1], rows.run):
            last = first + rows.run
            own = scales[part.start // BLOCK : -(-part.stop // BLOCK), first // BLOCK]
            beside = np.repeat(own, BLOCK)[None, : part.stop - part.start]
            at = first // rows.run
            factor = [s[:, at, None] * beside for s in (rows.scale_low, rows.scale_high)]
            codes = rows.part(first, last)
            for a in classes:
                ends = run_ends(*codes, weights[part, first:last], a)
                low, high = out[a.name]
                low[:, part], high[:, part] = accumulate(low[:, part], high[:, part], factor, ends)
    return out


def accumulate(low: F32, high: F32, factor: list[F32], ends: tuple[F64, F64]) -> Ends:
    """``sum + factor * run`` in both forms, from the ends of all three.

    Each form is monotone in the sum and in the run, and in the factor by the sign of the run.
    """
    out = []
    for end, total, run in zip((0, 1), (low, high), _fp32_outward(*ends), strict=True):
        rising = factor[end], factor[1 - end]
        with np.errstate(over="ignore", invalid="ignore"):
            scale = np.where(run >= 0, *rising)
            fused, apart = fma(scale, run, total), total + scale * run
            out.append(np.minimum(fused, apart) if end == 0 else np.maximum(fused, apart))
    return out[0], out[1]


def _fp32_outward(low: F64, high: F64) -> Ends:
    """Ends as fp32 numbers. A sum that an fp32 register holds stays as it is."""
    with np.errstate(over="ignore", invalid="ignore"):
        down, up = low.astype(np.float32), high.astype(np.float32)
        down = np.where(down > low, np.nextafter(down, np.float32(-np.inf)), down)
        up = np.where(up < high, np.nextafter(up, np.float32(np.inf)), up)
    return down, up


def run_ends(low: U8, high: U8, weights: U8, a: Accumulator) -> tuple[F64, F64]:
    """``(R, N)`` ends of a run's sum under a class. A row with NaN gives NaN."""
    open_row = (e4m3_key(low) != e4m3_key(high)).any(axis=1)
    if not a.replayed:
        ends = result_interval(blocks(low, high, weights), a)
        return _with_nan(low, *ends)
    ones = np.full((len(low), low.shape[1] // GROUP), _ONE)
    columns = Columns.of(weights, np.full((len(weights), ones.shape[1]), _ONE))
    least, most = replay(Rows.of(low, ones), columns, a)
    if open_row.any():
        bound = result_interval(blocks(low[open_row], high[open_row], weights), a)
        least[open_row], most[open_row] = bound
    return _with_nan(low, least, most)


def _with_nan(codes: U8, low: F64, high: F64) -> tuple[F64, F64]:
    nan = ((codes & 0x7F) == 0x7F).any(axis=1)[:, None]
    return np.where(nan, np.nan, low), np.where(nan, np.nan, high)


def _grouped(values: F64) -> F64:
    """(R, C) to (C/32, R, 32)."""
    return values.reshape(len(values), -1, GROUP).transpose(1, 0, 2)


def _lowbit(values: F64) -> F64:
    """(..., 32) to (...): the exponent of the lowest set bit of a group's numbers; E4M3 has
    multiples of 2**-9."""
    steps = np.abs(np.nan_to_num(values) * 2.0**9).astype(np.int64)
    together = np.bitwise_or.reduce(steps, axis=-1)
    exponent = np.frexp((together & -together).astype(np.float64))[1] - 10.0
    return np.where(together > 0, exponent, -NO_TERM)


def _field(values: F64) -> F64:
    """(..., 32) to (...): the largest exponent field; subnormals are aligned at -6."""
    top = np.abs(np.nan_to_num(values)).max(axis=-1)
    return np.where(top > 0, np.maximum(floor_log2(top), -6), float(NO_TERM))


def blocks(low: U8, high: U8, weights: U8) -> Blocks:
    """Block sums of codes from ``low`` to ``high`` ``(R, C)`` with known weights ``(N, C)``.

    Midpoints and radii are halves of E4M3 numbers, so float64 is exact.
    """
    ends = [_grouped(np.nan_to_num(np.asarray(e4m3_decode(c), np.float64))) for c in (low, high)]
    groups = _grouped(np.asarray(e4m3_decode(weights), np.float64))
    columns = groups.transpose(0, 2, 1)
    middle, radius = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2
    largest = np.maximum(np.abs(ends[0]), np.abs(ends[1]))
    absolute = np.abs(columns)
    centre, reach = np.matmul(middle, columns), np.matmul(radius, absolute)
    least, most = centre - reach, centre + reach
    magnitude = np.matmul(largest, absolute)
    free = (ends[0] != ends[1]).any(axis=-1)
    lowbit = np.where(free, -9.0, _lowbit(ends[0]))  # whatever the code is
    field = _field(largest)[:, :, None] + _field(groups)[:, None, :]
    above, below = (magnitude + most) / 2, (magnitude - least) / 2
    return Blocks(
        least, most, np.maximum(above, 0.0), np.maximum(below, 0.0),
        lowbit[:, :, None] + _lowbit(groups)[:, None, :], field, field,
    )  # fmt: skip


def exact(codes: U8, scale: F32, weights: U8, scales: F32) -> F64:
    """``(R, N)`` the infinitely precise sum of ``fl(a * w) * run``, rounded to odd into float64."""
    shape, run = (len(codes), len(weights)), codes.shape[1] // scale.shape[1]
    x = np.asarray(e4m3_decode(codes), np.float64)
    w = np.asarray(e4m3_decode(weights), np.float64)
    beside = np.repeat(scales, BLOCK, axis=0)[: len(weights)].T
    parts = []
    for at in range(scale.shape[1]):
        cut = slice(at * run, (at + 1) * run)
        whole = x[:, cut] @ w[:, cut].T  # a multiple of 2**-18 below 2**25: exact
        with np.errstate(over="ignore", invalid="ignore"):
            factor = (scale[:, at, None] * beside[at * run // BLOCK]).astype(np.float64)
            upper = whole.astype(np.float32).astype(np.float64)
            parts += [factor * upper, factor * (whole - upper)]  # exact: 24 bits on each side
    return total_to_odd(np.stack(parts)) if parts else np.zeros(shape)


def total_to_odd(parts: F64) -> F64:
    """The sum over the first axis, rounded to odd."""
    total, rest = np.zeros(parts.shape[1:]), np.zeros(parts.shape[1:])
    doubtful = np.zeros(total.shape, np.bool_)
    with np.errstate(over="ignore", invalid="ignore"):
        for part in parts:
            total, error = _two_sum(total, part)
            rest, loss = _two_sum(rest, error)
            doubtful |= loss != 0
        total, rest = _two_sum(total, rest)
    doubtful &= np.isfinite(total)
    inexact = (rest != 0) & np.isfinite(total)
    near = np.where(inexact & ((rest > 0) != (total > 0)), np.nextafter(total, 0.0), total)
    out = (near.view(np.int64) | inexact).view(np.float64)
    for at in zip(*np.nonzero(doubtful), strict=True):
        out[at] = sum_to_odd(parts[(slice(None), *at)])
    return out


def _two_sum(a: F64, b: F64) -> tuple[F64, F64]:
    """Their float64 sum and its error, exactly."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


__all__ = ["Codes", "exact", "linear", "run_ends", "total_to_odd"]
