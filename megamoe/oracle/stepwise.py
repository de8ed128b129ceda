"""The FP8 instruction followed product by product, for the class that is too wide to bound.

Thirteen bits, cut toward zero, 32 products a step: a worst case over such steps says little
(``docs/numerics.md``, 3.4). But the instruction leaves nothing open. Where both operands are
known, its result is computed here and not bounded; what stays open is in which format the FP4
weight reaches the unit, and the direction of the fp32 additions that promote its sums.

Scale factors enter the unit as exponents, or, where the class is ``outside``, come after it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from megamoe.oracle.bounds import LOWEST, SUBNORMAL
from megamoe.oracle.linear import Columns, Rows
from megamoe.oracle.units import HOPPER_8BIT, Unit, aligned
from megamoe.spec.accumulators import Accumulator
from megamoe.spec.formats import E2M1_TABLE, E4M3_TABLE, GROUP, U8

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I8 = npt.NDArray[np.int8]

_NO_TERM = -60
"""Field of a zero, before both are added: no sum of two others is below -7."""
_VALUE = E2M1_TABLE.astype(np.float32)
PIECE = 1 << 17
"""Products held at once: as many as a core's cache takes."""


def replay(rows: Rows, columns: Columns, accumulator: Accumulator) -> tuple[F64, F64]:
    """``(R, N)`` lowest and highest fp32 result of the class's instruction. NaN in, NaN out.

    ``ValueError`` for a class without promotion or without aligned steps, and for a run with more
    than one scale factor if the scaling is outside of the unit.
    """
    if accumulator.promote is None or accumulator.align_bits is None:
        raise ValueError(f"class {accumulator.name} has no instruction to follow step by step")
    if accumulator.outside:
        _one_scale_a_run(rows, columns, accumulator)
    shape = rows.exponent.shape[0], columns.exponent.shape[0]
    low, high = np.empty(shape), np.empty(shape)
    size = max(32, PIECE // (32 * max(1, shape[0])))
    for start in range(0, shape[1], size):
        part = slice(start, start + size)
        low[:, part], high[:, part] = _piece(rows, columns, part, accumulator)
    return low, high


def _piece(rows: Rows, columns: Columns, part: slice, accumulator: Accumulator) -> tuple[F64, F64]:
    assert accumulator.promote is not None
    span = accumulator.promote // 32
    unit = _unit_of(accumulator)
    groups, count = rows.values.shape[:2]
    shape = count, columns.exponent[part].shape[0]
    x = rows.values.astype(np.float32)[:, :, :, None]
    x_field = _token_fields(rows.values)[:, :, :, None]
    ends = [(np.zeros(shape), np.zeros(shape)) for _ in range(2)]
    as_e2m1, as_e4m3 = np.zeros(shape), np.zeros(shape)
    for j in range(groups):
        width = 32 if columns.is_e4m3 else 16
        own = columns.packed[part, width * j : width * (j + 1)]
        weights, *weight_fields = _weights(own)
        if accumulator.outside:  # Hopper's unit, which takes no E2M1
            weight_fields = [weight_fields[1]] * 2
        products = x[j] * weights  # exact: 4 + 4 significant bits at most
        factor = rows.exponent[:, j, None] + columns.exponent[part, j]
        scale = np.zeros(shape) if accumulator.outside else factor
        fields = [(x_field[j] + field).max(axis=1) for field in weight_fields]
        # In few outputs the two formats differ, so the second follows those alone.
        apart = np.flatnonzero(((fields[0] != fields[1]) | (as_e2m1 != as_e4m3)).any(axis=0))
        second = _step(
            unit, products[:, :, apart], fields[1][:, apart], scale[:, apart], as_e4m3[:, apart]
        )
        as_e2m1 = _step(unit, products, fields[0], scale, as_e2m1)
        as_e4m3 = as_e2m1.copy()
        as_e4m3[:, apart] = second
        if (j + 1) % span == 0 or j + 1 == groups:
            for i, running in enumerate((as_e2m1, as_e4m3)):
                down, up = _scaled(running, factor) if accumulator.outside else (running, running)
                ends[i] = _promote(ends[i][0], down)[0], _promote(ends[i][1], up)[1]
            as_e2m1, as_e4m3 = np.zeros(shape), np.zeros(shape)
    return np.minimum(ends[0][0], ends[1][0]), np.maximum(ends[0][1], ends[1][1])


def _unit_of(accumulator: Accumulator) -> Unit:
    """The unit with the numbers of the class."""
    assert accumulator.align_bits is not None and accumulator.result_bits is not None
    return replace(
        HOPPER_8BIT, align_bits=accumulator.align_bits, result_bits=accumulator.result_bits
    )


def _one_scale_a_run(rows: Rows, columns: Columns, accumulator: Accumulator) -> None:
    assert accumulator.promote is not None
    span = accumulator.promote // GROUP
    for exponent in (rows.exponent, columns.exponent):
        for start in range(0, exponent.shape[1], span):
            run = np.nan_to_num(exponent[:, start : start + span])
            if (run != run[:, :1]).any():
                raise ValueError(
                    f"class {accumulator.name} needs one scale factor on a side for each "
                    f"{accumulator.promote} values of K"
                )


def _scaled(running: F64, factor: F64) -> tuple[F64, F64]:
    """A run's result times its scale factors, rounded down and up where it is subnormal."""
    exact = running * np.exp2(factor)
    steps = exact / SUBNORMAL
    small = np.abs(exact) < 2.0**LOWEST
    return (
        np.where(small, np.floor(steps) * SUBNORMAL, exact),
        np.where(small, np.ceil(steps) * SUBNORMAL, exact),
    )


def _token_fields(values: F64) -> I8:
    """Exponent fields of E4M3 values, subnormals at -6; far below every other for a zero."""
    field = np.maximum(np.frexp(np.nan_to_num(values))[1] - 1, -6)
    return np.where(values == 0, _NO_TERM, field).astype(np.int8)


def _weights(packed: U8) -> tuple[F32, I8, I8]:
    """``(N, 16)`` E2M1 bytes to ``(32, N)`` values and their fields, as E2M1 and as E4M3.

    ``(N, 32)`` bytes are E4M3 themselves, and reach the unit as nothing else.
    """
    if packed.shape[1] == GROUP:
        values = E4M3_TABLE[packed.T]
        field = _token_fields(values)
        return values.astype(np.float32), field, field
    codes = np.empty((GROUP, len(packed)), np.uint8)
    codes[0::2], codes[1::2] = packed.T & 15, packed.T >> 4
    size = codes & 7
    zero = (size == 0).view(np.int8) * np.int8(_NO_TERM + 1)
    as_e4m3 = (size >> 1).view(np.int8) - np.int8(1) + zero  # -1 for 0.5, a normal number there
    as_e2m1 = as_e4m3 + (size == 1).view(np.int8)
    return np.take(_VALUE, codes), as_e2m1, as_e4m3


def _step(unit: Unit, products: F32, field: I8, scale: F64, running: F64) -> F64:
    """One aligned sum of ``products`` ``(R, 32, N)`` without scale; the other tensors are ``(R,
    N)``."""
    whole = np.nan_to_num(scale).astype(np.int64)
    largest = np.where(field > _NO_TERM // 2, field + whole, unit.floor)
    return aligned(unit, products.astype(np.float64), largest, running, scale, axis=1)


def _promote(main: F64, running: F64) -> tuple[F64, F64]:
    """Their fp32 sum, rounded down and rounded up."""
    with np.errstate(over="ignore", invalid="ignore"):  # beyond fp32 the ends are replaced later
        total = main + running
        back = total - main
        error = (main - (total - back)) + (running - back)  # float64's own error, exactly
        near = total.astype(np.float32)
        above = (near > total) | ((near == total) & (error < 0))
        below = (near < total) | ((near == total) & (error > 0))
        down = np.where(above, np.nextafter(near, np.float32(-np.inf)), near)
        up = np.where(below, np.nextafter(near, np.float32(np.inf)), near)
    return down.astype(np.float64), up.astype(np.float64)
