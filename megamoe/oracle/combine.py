"""The combine: bf16 slot rows to one bf16 row a token, in fp32, ascending slots, from zero."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megamoe.spec.formats import U16, bf16_decode, bf16_round


def combine(slot_rows: U16, live: npt.NDArray[np.bool_]) -> U16:
    """``(T, K, H)`` bfloat16 bits and ``(T, K)`` live slots to ``(T, H)`` bfloat16 bits.

    Each step is one fp32 addition, rounded to nearest; so the result is a point, and a
    non-decreasing function of every slot row. The second fact is what makes
    ``combine(lo) <= y <= combine(hi)`` hold for slot rows known only as intervals.
    """
    tokens, slots, hidden_size = slot_rows.shape
    total = np.zeros((tokens, hidden_size), dtype=np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for slot in range(slots):
            row = bf16_decode(slot_rows[:, slot])
            total = np.where(live[:, slot, None], total + row, total)
    return bf16_round(total)
