"""Exact staging: hidden states to E4M3 codes with UE8M0 scale factors, ids and weights copied.

Every operation is either exact or a single IEEE rounding, so the result is one point: there is
nothing a correct kernel could do differently (``docs/numerics.md``, section Staging).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.oracle.groups import group_amax, scaled_codes
from megamoe.spec.contract import Contract
from megamoe.spec.formats import (
    F32,
    GROUP,
    U8,
    U16,
    bf16_decode,
    e4m3_cast,
    pack_sf,
    ue8m0_ceil,
)


def quantize(hidden: U16, contract: Contract) -> tuple[U8, U8]:
    """``(T, H)`` bfloat16 bits to E4M3 codes ``(T, H)`` and UE8M0 bytes ``(T, H/32)``."""
    values = bf16_decode(hidden)
    amax = np.maximum(group_amax(values, contract), np.float32(contract.staging_amax_floor.value))
    with np.errstate(invalid="ignore"):
        scale = amax / np.float32(448.0)  # IEEE division, as in every staging that is known
    exponent = np.clip(
        ue8m0_ceil(scale.astype(np.float32)),
        contract.staging_exponent_min.value,
        contract.staging_exponent_max.value,
    ).astype(np.uint8)
    codes = scaled_codes(values, exponent, contract)
    if contract.staging_clips.value or (exponent == 255).any():
        codes = _unusual_codes(values, exponent, contract)
    return codes, exponent


def _unusual_codes(values: F32, exponent: U8, contract: Contract) -> U8:
    """:func:`scaled_codes` with a clip before the cast, and with the factor of byte 255."""
    factor = np.where(exponent == 255, -np.inf, np.ldexp(1.0, 127 - exponent.astype(np.int32)))
    with np.errstate(invalid="ignore", over="ignore"):
        wide = values.astype(np.float64) * np.repeat(factor, GROUP, axis=-1)
    if contract.staging_clips.value:
        wide = np.fmax(np.fmin(wide, 448.0), -448.0)
    return e4m3_cast(wide, contract.cast_saturates.value)


def staging(
    hidden: U16, topk_weights: npt.NDArray[np.float32], topk_ids: npt.NDArray[Any],
    contract: Contract, is_padding: npt.NDArray[np.bool_] | None = None,
) -> dict[str, npt.NDArray[Any]]:  # fmt: skip
    """The tensors that ``prepare_megamoe_inputs`` must write.

    ``hidden`` ``(T, H)`` bfloat16 bits, ``topk_weights`` ``(T, K)`` float32, ``topk_ids``
    ``(T, K)`` int32 or int64, ``is_padding`` ``(T,)`` where the call has one. Returns ``x``
    ``(T, H)`` uint8, ``x_sf`` ``(T, H/128)`` int32, ``topk_idx`` ``(T, K)`` int64 and
    ``topk_weights`` ``(T, K)`` float32.
    """
    codes, exponent = quantize(hidden, contract)
    if is_padding is not None and contract.padding_known.value:
        topk_ids = np.where(is_padding[:, None], -1, topk_ids)
        topk_weights = np.where(is_padding[:, None], np.float32(0), topk_weights)
    return {
        "x": codes,
        "x_sf": pack_sf(exponent),
        "topk_idx": topk_ids.astype(np.int64),
        "topk_weights": topk_weights.astype(np.float32),
    }
