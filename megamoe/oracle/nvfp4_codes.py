"""NVFP4 codes: how hidden states are staged, and how activations are requantised.

E2M1 with an E4M3 byte per 16 values, never 0 and never NaN, and one fp32 scale over them: of a
token where hidden states are staged, of the layer where activations are requantised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.oracle.bounds import floor_log2
from megamoe.spec.formats import (
    F32,
    F64,
    NVFP4_GROUP,
    U8,
    U16,
    bf16_decode,
    e4m3_cast,
    e4m3_decode,
)

LEAST: Final = np.float32(2.0**-9)
MOST: Final = np.float32(448.0)
"""Scales are held between these two, the least and the largest E4M3 number above 0."""
LARGEST: Final = 6.0
"""The largest E2M1 number, which also stands for NaN in requantised activations."""


def e2m1_nearest(values: F32 | F64) -> F64:
    """The nearest E2M1 number, ties to the even code; 6 beyond. NaN stays NaN."""
    wide = np.minimum(np.abs(values.astype(np.float64)), 8.0)
    step = np.exp2(np.clip(floor_log2(wide), 0, 2) - 1)  # spacing: 1/2 below 2, 1 below 4, then 2
    return np.copysign(np.minimum(np.rint(wide / step) * step, LARGEST), values)


def grouped(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """``(..., C)`` to ``(..., C/16, 16)``."""
    return values.reshape(*values.shape[:-1], values.shape[-1] // NVFP4_GROUP, NVFP4_GROUP)


def _scale_bytes(quotient: F32) -> U8:
    return e4m3_cast(np.fmin(np.fmax(quotient, LEAST), MOST))


def staged(hidden: U16) -> tuple[F64, U8, F32]:
    """``(T, H)`` bfloat16 bits to E2M1 numbers (T, H), scale bytes (T, H/16) and scales (T, 1)."""
    value = bf16_decode(hidden)
    with np.errstate(invalid="ignore", over="ignore"):
        amax = np.fmax.reduce(np.abs(value), axis=-1, keepdims=True, initial=np.float32(0))
        x_scale = np.fmax(amax, np.float32(1e-12)) * np.float32(1 / 2688)
        groups = grouped(value / x_scale)
        largest = np.fmax.reduce(np.abs(groups), axis=-1)
        sf = _scale_bytes(largest * np.float32(1 / 6))
        scaled = groups / e4m3_decode(sf).astype(np.float32)[..., None]
    return np.nan_to_num(e2m1_nearest(scaled)).reshape(value.shape), sf, x_scale


@dataclass(frozen=True)
class Requantise:
    """Activations to E2M1 with an E4M3 byte per 16, relative to one scale of the layer."""

    scale: np.float32

    def bytes_of(self, magnitudes: F32) -> U8:
        """``(R, I)`` to ``(R, I/16)``; NaN does not count."""
        divisor = np.float32(6) * self.scale
        with np.errstate(invalid="ignore", over="ignore"):
            amax = np.fmax.reduce(grouped(magnitudes), axis=-1, initial=np.float32(0))
            return _scale_bytes(np.fmin(amax, MOST * divisor) / divisor)

    def values_of(self, acts: F32, sf: U8) -> F64:
        """``(R, I)`` numbers, each a code times the scale of its byte."""
        own = e4m3_decode(sf)[..., None]
        with np.errstate(invalid="ignore", over="ignore"):
            inverse = np.float32(1) / (own.astype(np.float32) * self.scale)
            codes = e2m1_nearest(grouped(acts) * inverse)
        return np.asarray((np.where(np.isnan(codes), LARGEST, codes) * own).reshape(acts.shape))
