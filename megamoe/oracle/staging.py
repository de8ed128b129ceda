"""Exact staging: hidden states to E4M3 codes with UE8M0 scale factors, ids and weights copied.

Every operation is either exact or a single IEEE rounding, so the result is one point: there is
nothing a correct kernel could do differently (``docs/numerics.md``, section Staging).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.spec.contract import CURRENT, Contract
from megamoe.spec.formats import GROUP, U8, U16, bf16_decode, e4m3_cast, pack_sf, ue8m0_ceil


def quantize(hidden: U16, contract: Contract = CURRENT) -> tuple[U8, U8]:
    """``(T, H)`` bfloat16 bits to E4M3 codes ``(T, H)`` and UE8M0 bytes ``(T, H/32)``."""
    tokens, hidden_size = hidden.shape
    values = bf16_decode(hidden).reshape(tokens, hidden_size // GROUP, GROUP)
    with np.errstate(invalid="ignore"):
        magnitude = np.abs(values)
        amax = np.fmax.reduce(magnitude, axis=-1, initial=np.float32(0.0))
        amax = np.maximum(amax, np.float32(contract.staging_amax_floor.value))
        scale = (amax / np.float32(448.0)).astype(np.float32)  # IEEE division, as the contract
        exponent = np.clip(
            ue8m0_ceil(scale),
            contract.staging_exponent_min.value,
            contract.staging_exponent_max.value,
        )
        # Float64 holds h * 2**(127 - e) exactly, subnormal products included.
        wide = values.astype(np.float64)
        codes = e4m3_cast(np.ldexp(wide, 127 - exponent[..., None]))
    return codes.reshape(tokens, hidden_size), exponent.astype(np.uint8)


def staging(
    hidden: U16, topk_weights: npt.NDArray[np.float32], topk_ids: npt.NDArray[Any]
) -> dict[str, npt.NDArray[Any]]:
    """What ``prepare_megamoe_inputs`` must write.

    ``hidden`` ``(T, H)`` bfloat16 bits, ``topk_weights`` ``(T, K)`` float32, ``topk_ids``
    ``(T, K)`` int32 or int64. Returns ``x`` ``(T, H)`` uint8, ``x_sf`` ``(T, H/128)`` int32,
    ``topk_idx`` ``(T, K)`` int64 and ``topk_weights`` ``(T, K)`` float32.
    """
    codes, exponent = quantize(hidden)
    return {
        "x": codes,
        "x_sf": pack_sf(exponent),
        "topk_idx": topk_ids.astype(np.int64),
        "topk_weights": topk_weights.astype(np.float32),
    }
