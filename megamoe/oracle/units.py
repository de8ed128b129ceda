"""Tensor cores bit by bit: the sum of one instruction, and of a chain of instructions.

A *step* takes up to ``step`` products and the running sum. It aligns all of them to the largest
exponent field, cuts each toward zero ``align_bits`` below it, adds the rest exactly, and cuts the
sum toward zero to ``result_bits`` fraction bits. A zero takes part at the field ``floor``, a
subnormal operand at the field of the smallest normal. A result of zero is +0, and NaN is one word.

:func:`fused` is that sentence in float64, product by product. :func:`chain` gives the same bits
for whole linears: where no bit is cut off, and that is decided exactly, a step is a block sum of a
float64 matrix product and one addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.oracle.linear import NO_TERM, Columns, Rows
from megamoe.spec.formats import E2M1_TABLE, E4M3_TABLE, GROUP, U8, e2m1_unpack

F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

SMALLEST: Final = -126
"""Exponent field of fp32's and bfloat16's subnormals."""
NAN_WORD: Final = 0x7FFFFFFF
CHUNK: Final = 1 << 22
"""Step sums held at once."""
CACHE: Final = 1 << 18
"""Decoded weights held at once."""


_PAIRS: Final = (
    E2M1_TABLE[np.arange(256)[:, None] >> np.array([0, 4]) & 15].copy().view(np.complex128)[:, 0]
)
"""Both values of a byte of E2M1, the even one first, as one element."""


@dataclass(frozen=True)
class Unit:
    """The numbers of one unit's steps."""

    name: str
    step: int
    """Products of one step."""
    align_bits: int
    """Fraction bits kept below the largest field."""
    result_bits: int
    """Fraction bits of the result: 23 is fp32."""
    evidence: str
    floor: int = -133
    """Field of a zero, and the lowest to which anything is aligned."""


HOPPER_16BIT: Final = Unit(
    "hopper-16bit", 16, 25, 23, "MMA-Sim 2.1.1 for wgmma and mma.sync with bf16 and fp16 operands"
)
HOPPER_8BIT: Final = Unit(
    "hopper-8bit", 32, 13, 13, "MMA-Sim 2.1.1 for wgmma with e4m3 and e5m2 operands"
)
BLACKWELL_16BIT: Final = Unit(
    "blackwell-16bit", 16, 25, 23, "MMA-Sim 2.1.1 for tcgen05 with bf16 and fp16 operands"
)
BLACKWELL_MX: Final = Unit(
    "blackwell-mx", 32, 25, 23, "MMA-Sim 2.1.1 for tcgen05 mxf8f6f4, block scales as exponents"
)
UNITS: Final = {u.name: u for u in (HOPPER_16BIT, HOPPER_8BIT, BLACKWELL_16BIT, BLACKWELL_MX)}

ASCENDING: Final = tuple(range(GROUP))
INTERLEAVED: Final = tuple(sorted(range(GROUP), key=lambda k: (k >> 2 & 1, k)))
"""Each 32 values of K as two steps of 16: those with bit 2 clear, then those with it set."""


def fused(unit: Unit, products: F64, fields: npt.NDArray[np.integer], running: F64) -> F64:
    """One step. ``products`` and ``fields`` ``(..., n)``, ``running`` ``(...)``: fp32 numbers.

    ``products`` are exact, and ``fields`` are the exponent fields of the finite products that are
    not zero. The result is an fp32 number held as float64; NaN and infinities as IEEE adds them.
    """
    # The exponent field of an infinity would shift all of them out, itself too.
    counts = (products != 0) & np.isfinite(products)
    largest = np.where(counts, fields, unit.floor).max(axis=-1)
    return aligned(unit, products, largest, running)


def aligned(
    unit: Unit, products: F64, largest: npt.NDArray[Any], running: F64,
    scale: F64 | float = 0.0, axis: int = -1,
) -> F64:  # fmt: skip
    """One step, as :func:`fused`, for a caller that knows the largest exponent field.

    It adds ``products * 2**scale`` along ``axis``. The other arrays have no such axis. ``largest``
    is the largest field of the scaled products. A ``scale`` of NaN gives NaN.
    """
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        own = np.where(running == 0, unit.floor, np.maximum(_exponent(running), SMALLEST))
        last = np.maximum(np.maximum(largest, own), unit.floor) - unit.align_bits
        shift = np.expand_dims(np.exp2(scale - last), axis)
        aligned_sum = np.trunc(products * shift).sum(axis=axis)
        total = np.ldexp(aligned_sum + np.trunc(np.ldexp(running, -last)), last)
    return narrowed(total, unit.result_bits)


def narrowed(value: F64, bits: int) -> F64:
    """Toward zero to ``bits`` fraction bits, spaced as fp32 below 2**-126; infinite from 2**128.

    A zero is +0.
    """
    mask = np.int64(-1 << (52 - bits))
    out = (np.ascontiguousarray(value).view(np.int64) & mask).view(np.float64)
    size = np.abs(value)
    usual = (size >= 2.0**SMALLEST) & (size < 2.0**128)
    if not usual.all():
        small = (size < 2.0**SMALLEST) & (size > 0)
        out[small] = np.trunc(np.ldexp(value[small], bits - SMALLEST)) * 2.0 ** (SMALLEST - bits)
        large = size >= 2.0**128
        out[large] = np.copysign(np.inf, value[large])
        out[np.isnan(value)] = np.nan
        out = out + 0.0  # a zero is +0
    return out


def words(result: F64) -> npt.NDArray[np.uint32]:
    """fp32 words of results of :func:`fused`; every NaN is :data:`NAN_WORD`."""
    bits = result.astype(np.float32).view(np.uint32)
    return np.where(np.isnan(result), np.uint32(NAN_WORD), bits)


def dense(unit: Unit, a: F64, b: F64, c: F64, smallest: int) -> F64:
    """``(...)`` dot products of ``(..., n)`` operands, added to ``c``, step after step.

    ``smallest`` is the field of the operands' subnormals: -126 bf16, -14 fp16 and e5m2, -6 e4m3.
    """
    running = c
    with np.errstate(invalid="ignore"):
        products = a * b
    fields = np.maximum(_exponent(a), smallest) + np.maximum(_exponent(b), smallest)
    for start in range(0, a.shape[-1], unit.step):
        part = slice(start, start + unit.step)
        running = fused(unit, products[..., part], fields[..., part], running)
    return running


def chain(
    unit: Unit,
    rows: Rows,
    columns: Columns,
    *,
    folded: bool = False,
    order: tuple[int, ...] = ASCENDING,
) -> F64:
    """``(R, N)`` fp32 results of a linear from zero, K ascending by groups of 32. NaN in, NaN out.

    ``folded``: each scale factor is multiplied into its operand, which is held as bfloat16;
    ``ValueError`` where that is not exact. Otherwise it reaches the unit as an exponent. ``order``
    gives the values of a group in the order in which steps take them.
    """
    if folded:
        _require_bfloat16(rows.field + rows.exponent, rows.lowbit + rows.exponent)
        _require_bfloat16(columns.field + columns.exponent, columns.lowbit + columns.exponent)
    count, groups = rows.exponent.shape
    out = np.empty((count, len(columns.exponent)))
    size = max(32, CHUNK // max(1, count * groups * (GROUP // unit.step)))
    for start in range(0, out.shape[1], size):
        part = slice(start, start + size)
        piece = Columns(columns.packed[part], columns.exponent[part])
        out[:, part] = _chain(unit, rows, piece, folded, np.array(order))
    return out


def _chain(unit: Unit, rows: Rows, columns: Columns, folded: bool, order: I64) -> F64:
    groups, count = rows.values.shape[:2]
    parts = GROUP // unit.step
    left = rows.values[:, :, order].reshape(groups, count, parts, unit.step)
    x: F64 = np.ascontiguousarray(left.transpose(0, 2, 1, 3)).reshape(-1, count, unit.step)
    codes, table = columns.packed, E4M3_TABLE
    if not columns.is_e4m3:
        is_ascending = tuple(order) == ASCENDING
        codes, table = (codes, _PAIRS) if is_ascending else (e2m1_unpack(codes), E2M1_TABLE)
    if tuple(order) != ASCENDING:
        codes = codes.reshape(len(codes), groups, GROUP)[:, :, order]
    codes = codes.reshape(len(codes), groups * parts, -1)
    sums = _step_sums(x, codes, table)
    row_scale, column_scale = (
        np.nan_to_num(o.exponent.T).astype(np.int32) for o in (rows, columns)
    )
    scale = np.exp2(rows.exponent.T[:, :, None] + columns.exponent.T[:, None, :])
    row_field, column_field = rows.field.T + row_scale, columns.field.T + column_scale
    if folded:
        row_field, column_field = (
            np.maximum(row_field, SMALLEST),
            np.maximum(column_field, SMALLEST),
        )
    top = np.maximum(row_field[:, :, None] + column_field[:, None, :], unit.floor)
    row_lowest, column_lowest = rows.lowbit.T + row_scale, columns.lowbit.T + column_scale
    lowest = row_lowest[:, :, None] + column_lowest[:, None, :]
    running = np.zeros(scale.shape[1:])
    for step, (own_rows, block) in enumerate(zip(x, sums, strict=True)):
        group = step // parts
        own = np.maximum(_exponent(running), SMALLEST)
        # No product and no running sum has a bit below ``last`` where ``cut`` is false.
        last = np.maximum(top[group], own) - unit.align_bits
        cut = (own - 23 < last) & (running != 0)
        cut |= lowest[group] < last
        with np.errstate(invalid="ignore"):
            result = narrowed(running + block * scale[group], unit.result_bits)
        r, n = np.nonzero(cut)
        if len(r):
            right = table[codes[n, step]].view(np.float64)
            with np.errstate(invalid="ignore"):
                products = own_rows[r] * right * scale[group, r, n][:, None]
            sides = (own_rows[r], row_scale[group, r]), (right, column_scale[group, n])
            fields = _fields(sides, folded, columns.is_e4m3)
            result[r, n] = fused(unit, products, fields, running[r, n])
        running = result
    return running


def _step_sums(x: F64, codes: U8, table: npt.NDArray[Any]) -> F64:
    """``(steps, R, N)`` exact sums of products of ``(steps, R, step)`` with ``N`` columns.

    ``codes`` ``(N, steps, step)``, or ``(N, steps, step / 2)`` bytes with a table of pairs.
    """
    out = np.empty((len(x), x.shape[1], len(codes)))
    size = max(16, CACHE // max(1, x.shape[0] * x.shape[2]))
    for start in range(0, len(codes), size):
        part = slice(start, start + size)
        # A code is never out of range; "clip" spares NumPy a copy of the indices.
        values = np.take(table, codes[part], mode="clip").view(np.float64)
        out[:, :, part] = np.matmul(x, values.transpose(1, 2, 0))
    return out


def _fields(sides: tuple[tuple[F64, I32], tuple[F64, I32]], folded: bool, is_e4m3: bool) -> I32:
    """``(n, step)`` fields of products of E4M3 by E2M1 (or E4M3) values, each with its scale."""
    out = np.zeros(sides[0][0].shape, np.int32)
    for (value, scale), smallest in zip(sides, (-6, -6 if is_e4m3 else 0), strict=True):
        if folded:
            out += np.maximum(_exponent(value) + scale[:, None], SMALLEST)
        else:
            out += np.maximum(_exponent(value), smallest) + scale[:, None]
    return out


def _require_bfloat16(field: F64, lowbit: F64) -> None:
    is_bfloat16 = (field < NO_TERM // 2) | np.isnan(field) | ((field < 128) & (lowbit >= -133))
    if not is_bfloat16.all():
        raise ValueError("an operand with its scale factor is not a bfloat16 number")


def _exponent(value: F64) -> I32:
    """floor(log2 |value|) of a normal float64; far below all others for zero."""
    bits = np.ascontiguousarray(value, np.float64).view(np.int64)
    return ((bits >> 52 & 0x7FF) - 1023).astype(np.int32)
