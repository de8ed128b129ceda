"""A draft of a staging kernel that leaves its roundings to ml_dtypes.

The contract takes the scale *up* to the next power of two; this draft casts it to the nearest one.
It is wrong, and meant to be: `docs/bisect.md` shows what can be said of such code all the same.
"""

import ml_dtypes
import numpy as np
import torch


class NearestScale:
    """Offers `prepare` alone: what it lacks is not asked of it."""

    name = "nearest-scale"
    accumulator = "fp32"

    def prepare(self, hidden_states, topk_weights, topk_ids, x, x_sf, topk_idx, weights):
        tokens, hidden = hidden_states.shape
        if not tokens:
            return
        groups = hidden_states.float().numpy().reshape(tokens, hidden // 32, 32)
        amax = np.maximum(np.abs(groups).max(axis=-1), np.float32(1e-4))
        scale = (amax / np.float32(448)).astype(ml_dtypes.bfloat16)
        exponent = scale.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
        scaled = np.ldexp(groups, 127 - exponent.astype(np.int32)[:, :, None])
        codes = scaled.clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        x[:tokens].view(torch.uint8).copy_(torch.from_numpy(codes.reshape(tokens, hidden)))
        words = torch.from_numpy(exponent.reshape(tokens, hidden // 32)).view(torch.int32)
        x_sf[:tokens] = words
        topk_idx[:tokens] = topk_ids
        weights[:tokens] = topk_weights
