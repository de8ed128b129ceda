"""The fused multiply-add in fp32."""

from __future__ import annotations

import numpy as np

from megamoe.spec.formats import F32, F64


def fma(a: F32, b: F32, c: F32) -> F32:
    """``a * b + c`` rounded once: the product of two fp32 numbers is exact in float64."""
    return rounded_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))


def rounded_sum(a: F64, b: F64) -> F32:
    """``a + b`` of float64 numbers, rounded once to fp32.

    The sum is rounded to odd in float64 first, so that rounding it to fp32 is one rounding.
    """
    total = a + b
    back = total - a
    error = (a - (total - back)) + (b - back)  # the exact error of the sum
    bits = total.view(np.int64)
    away = (error != 0) & np.isfinite(total) & ((error > 0) != (total > 0))
    odd = (bits - away) | ((error != 0) & np.isfinite(total))
    return odd.view(np.float64).astype(np.float32)
