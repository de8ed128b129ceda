"""The combine: bf16 slot rows to one bf16 row a token, in fp32, slot by slot, from zero."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megamoe.spec.contract import Contract
from megamoe.spec.formats import F32, U16, bf16_decode, bf16_round


def combine(slot_rows: U16, live: npt.NDArray[np.bool_], weights: F32, contract: Contract) -> U16:
    """``(T, K, H)`` bfloat16 bits, ``(T, K)`` live slots and weights to ``(T, H)`` bfloat16 bits.

    Each step is one fp32 addition, or one fused multiply-add where the weight is applied here,
    rounded to nearest; so the result is a point. It is a monotone function of every slot row,
    rising where the weight is not negative.
    """
    tokens, slots, hidden_size = slot_rows.shape
    total = np.zeros((tokens, hidden_size), dtype=np.float32)
    order = range(slots) if contract.combine_order.value == "ascending-slot" else range(slots)[::-1]
    weighted = contract.routing_weight.value == "combine"
    with np.errstate(invalid="ignore", over="ignore"):
        for slot in order:
            row = bf16_decode(slot_rows[:, slot])
            added = fma(row, weights[:, slot, None], total) if weighted else total + row
            total = np.where(live[:, slot, None], added, total)
    return bf16_round(total)


def combine_ends(
    low: U16, high: U16, live: npt.NDArray[np.bool_], weights: F32, contract: Contract
) -> tuple[U16, U16]:
    """Lowest and highest combine of slot rows that are known as intervals."""
    falling = (weights < 0) & (contract.routing_weight.value == "combine")
    falling = falling[:, :, None]
    least, most = np.where(falling, high, low), np.where(falling, low, high)
    return combine(least, live, weights, contract), combine(most, live, weights, contract)


def fma(a: F32, b: F32, c: F32) -> F32:
    """``a * b + c`` rounded once, for ``a`` of 8 significant bits: the product is exact in float64.

    The sum is rounded to odd in float64 first, so that rounding it to fp32 is one rounding.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    back = total - product
    lost = (product - (total - back)) + (addend - back)  # the exact error of the sum
    bits = total.view(np.int64)
    away = (lost != 0) & np.isfinite(total) & ((lost > 0) != (total > 0))
    odd = (bits - away) | ((lost != 0) & np.isfinite(total))
    return odd.view(np.float64).astype(np.float32)
