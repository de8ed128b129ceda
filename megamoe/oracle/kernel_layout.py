"""Exact kernel-side weight layout: where each checkpoint byte must end up.

Written as an index law (destination row to source row), not as reshapes, so that it shares no
reasoning with the transform under test.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.spec.formats import U8, pack_sf

INTERLEAVE = 8
"""Gate and up rows alternate in runs of this many."""
SF_ROWS = 128
"""Scale factors are rearranged within runs of this many rows."""


def interleaved_source(row: int, intermediate: int) -> int:
    """Row of checkpoint w13 that stands at ``row`` kernel-side: gate 0-7, up 0-7, gate 8-15 ..."""
    pair, within = divmod(row, 2 * INTERLEAVE)
    if within < INTERLEAVE:
        return pair * INTERLEAVE + within
    return intermediate + pair * INTERLEAVE + within - INTERLEAVE


def sf_source(row: int) -> int:
    """Row whose packed scale factors stand at ``row``: within 128, (4, 32) becomes (32, 4)."""
    block, within = divmod(row, SF_ROWS)
    lane, quarter = divmod(within, 4)
    return block * SF_ROWS + quarter * 32 + lane


def layout(w13: U8, w13_scale: U8, w2: U8, w2_scale: U8) -> dict[str, npt.NDArray[Any]]:
    """Checkpoint tensors to the kernel's: shapes as in :class:`megamoe.spec.problem.Problem`.

    Returns ``w13`` and ``w2`` as bytes of the same shapes and ``w13_sf`` ``(E, 2I, H/128)``,
    ``w2_sf`` ``(E, H, I/128)`` as int32. MN-major storage is a matter of strides, which a tensor
    file does not hold; the judge checks the strides of the tensor under test.
    """
    rows = w13.shape[1]
    gate_up = np.array([interleaved_source(r, rows // 2) for r in range(rows)])
    utccp13 = np.array([sf_source(r) for r in range(rows)])
    utccp2 = np.array([sf_source(r) for r in range(w2.shape[1])])
    return {
        "w13": w13[:, gate_up],
        "w13_sf": pack_sf(w13_scale)[:, gate_up][:, utccp13],
        "w2": w2.copy(),
        "w2_sf": pack_sf(w2_scale)[:, utccp2],
    }
