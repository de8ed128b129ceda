"""The FP8 instruction followed product by product, for the class that is too wide to bound.

Thirteen bits, cut toward zero, 32 products a step: a worst case over such steps says little
(``docs/numerics.md``, 3.4). But the instruction leaves nothing open. Where both operands are
known, its result is computed here and not bounded; what stays open is in which format the FP4
weight reaches the unit, and the direction of the fp32 additions that promote its sums.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megamoe.accumulators import Accumulator
from megamoe.oracle.bounds import LOWEST, floor_log2, toward_zero
from megamoe.oracle.linear import Columns, Rows

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I16 = npt.NDArray[np.int16]

ZERO_FIELD = -133
"""Exponent at which a zero takes part in the alignment (MMA-Sim 2.1.1)."""
WEIGHT_LOWEST = (0, -1)
"""Exponent field of the weight 0.5: a subnormal of E2M1, a normal number of E4M3."""
_NO_TERM = -1000
PIECE = 1 << 18
"""Products held at once: as many as a core's cache takes."""


def replay(rows: Rows, columns: Columns, accumulator: Accumulator) -> tuple[F64, F64]:
    """``(R, N)`` lowest and highest fp32 result of the class's instruction. NaN in, NaN out.

    ``ValueError`` for a class that is not promoted, or not made of aligned steps.
    """
    if accumulator.promote is None or accumulator.align_bits is None:
        raise ValueError(f"class {accumulator.name} has no instruction to follow step by step")
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
    groups, count = rows.values.shape[:2]
    width = columns.exponent[part].shape[0]
    x = rows.values.astype(np.float32)[:, :, :, None]
    x_field = _fields(rows.values, -6)[:, :, :, None]
    running = [np.zeros((count, width)) for _ in WEIGHT_LOWEST]
    ends = [(np.zeros((count, width)), np.zeros((count, width))) for _ in WEIGHT_LOWEST]
    for j in range(groups):
        values = columns.values[j][:, part]
        products = x[j] * values.astype(np.float32)  # exact: 4 + 2 significant bits
        scale = rows.exponent[:, j, None] + columns.exponent[part, j]
        for i, lowest in enumerate(WEIGHT_LOWEST):
            field = (x_field[j] + _fields(values, lowest)).max(axis=1)
            running[i] = _step(products, field, scale, running[i], accumulator)
            if (j + 1) % span == 0 or j + 1 == groups:
                ends[i] = _promoted(ends[i][0], running[i])[0], _promoted(ends[i][1], running[i])[1]
                running[i] = np.zeros((count, width))
    return np.minimum(ends[0][0], ends[1][0]), np.maximum(ends[0][1], ends[1][1])


def _fields(values: F64, lowest: int) -> I16:
    """Exponent fields, subnormals at ``lowest``; far below every other for a zero."""
    field = np.maximum(np.frexp(values)[1] - 1, lowest)
    return np.where(values == 0, _NO_TERM, field).astype(np.int16)


def _step(products: F32, field: I16, scale: F64, running: F64, accumulator: Accumulator) -> F64:
    """One aligned sum. ``products`` ``(R, 32, N)`` without scale; the rest ``(R, N)``."""
    assert accumulator.align_bits is not None and accumulator.result_bits is not None
    whole = np.nan_to_num(scale)
    aligned = np.maximum(np.where(field > _NO_TERM // 2, field + whole, ZERO_FIELD), ZERO_FIELD)
    of_running = np.maximum(floor_log2(np.abs(running)), LOWEST)
    aligned = np.maximum(aligned, np.where(running == 0, ZERO_FIELD, of_running))
    last = (aligned - accumulator.align_bits).astype(np.int32)
    # In units of the last bit kept every product is below 2**16: float32 holds their sum.
    shift = np.exp2(np.minimum(scale - last, 64)).astype(np.float32)
    kept = products * shift[:, None]
    np.trunc(kept, out=kept)
    total = kept.sum(axis=1, dtype=np.float32) + np.trunc(np.ldexp(running, -last))
    return toward_zero(np.ldexp(total, last), accumulator.result_bits)


def _promoted(main: F64, running: F64) -> tuple[F64, F64]:
    """Their fp32 sum, rounded down and rounded up."""
    total = main + running
    back = total - main
    error = (main - (total - back)) + (running - back)  # what float64 itself lost, exactly
    near = total.astype(np.float32)
    above = (near > total) | ((near == total) & (error < 0))
    below = (near < total) | ((near == total) & (error > 0))
    down = np.where(above, np.nextafter(near, np.float32(-np.inf)), near)
    up = np.where(below, np.nextafter(near, np.float32(np.inf)), near)
    return down.astype(np.float64), up.astype(np.float64)
