"""Whether a kernel that folds scale factors into bfloat16 operands can compute a problem.

Such a kernel multiplies a code by its scale factor first and rounds the product to bfloat16. The
classes ``fp32`` and ``fp32-ordered`` allow that where the product is a bfloat16 number, so that
nothing is rounded (``docs/numerics.md``, 3.0). Elsewhere the kernel computes another layer.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megamoe.spec.formats import GROUP, bf16_decode, bf16_round, e4m3_decode
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem

Bytes = npt.NDArray[np.uint8]

_STAGED_ABOVE = 0x7F78
"""The least bfloat16 magnitude that staging rounds to a code and scale of 2**128 or more."""
_SAFE = range(3, 247)
"""UE8M0 bytes with which every E4M3 code is a bfloat16 number."""
_WEIGHT_LIMIT = 252
"""The largest UE8M0 byte with which every E2M1 code is a bfloat16 number; 255 is NaN."""


def leaves_bf16(problem: Problem, codes: Bytes | None = None, sf: Bytes | None = None) -> bool:
    """Whether an operand of a product, with its scale factor, is no bfloat16 number.

    ``codes`` (T, K, I) E4M3 bytes and ``sf`` (T, K, I/32) UE8M0 bytes are the requantised
    activations; without them only hidden states and weights are looked at. Weights of
    other formats than MXFP4 have no such kernel here: False.
    """
    if problem.only_y:
        return False
    magnitude = bits(problem.hidden_states) & 0x7FFF
    if ((magnitude >= _STAGED_ABOVE) & (magnitude <= 0x7F80)).any():
        return True
    ids = problem.topk_ids
    experts = ids[(ids >= 0) & (ids < problem.num_experts)].unique().numpy()
    for scale in (problem.w13_weight_scale, problem.w2_weight_scale):
        byte = scale.numpy()[experts]
        if ((byte > _WEIGHT_LIMIT) & (byte < 255)).any():
            return True
    if codes is None or sf is None:
        return False
    at = np.nonzero((sf < _SAFE.start) | ((sf >= _SAFE.stop) & (sf < 255)))
    values = e4m3_decode(codes.reshape(*sf.shape, GROUP)[at]).astype(np.float64)
    scaled = np.ldexp(values, sf[at].astype(np.int32)[:, None] - 127)
    scaled = scaled[~np.isnan(scaled)]
    return bool((bf16_decode(bf16_round(scaled)).astype(np.float64) != scaled).any())
