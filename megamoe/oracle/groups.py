"""The common part of staging and requantisation: the amax of a group, and the cast to E4M3."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megamoe.spec.contract import Contract
from megamoe.spec.formats import F32, GROUP, U8, e4m3_cast

RECIP_448 = np.float32(1) / np.float32(448)
"""fl32(1/448)."""


def group_amax(values: F32, contract: Contract) -> F32:
    """``(..., C)`` to ``(..., C/32)``: largest magnitude per group, 0 for a group of NaN alone."""
    magnitudes = np.abs(values).reshape(*values.shape[:-1], values.shape[-1] // GROUP, GROUP)
    largest = np.fmax if contract.amax_drops_nan.value else np.maximum
    with np.errstate(invalid="ignore"):
        amax: F32 = largest.reduce(magnitudes, axis=-1, initial=np.float32(0.0))
    return amax


def scaled_codes(values: F32, exponent: npt.NDArray[np.integer], contract: Contract) -> U8:
    """``(..., C)`` values and ``(..., C/32)`` UE8M0 bytes to E4M3 codes of ``value * 2**(127-e)``.

    Float64 holds the product exactly, subnormal ones included. Byte 255 is NaN, whatever the codes
    beside it are; they read as NaN here, and nobody compares them.
    """
    per_value = np.repeat(exponent.astype(np.int32), GROUP, axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        wide = np.ldexp(values.astype(np.float64), 127 - per_value)
    wide = np.where(per_value == 255, np.nan, wide)
    return e4m3_cast(wide, contract.cast_saturates.value)
