"""MXFP4 weights and E4M3 rows with one scale each, in plain Python, as exact fractions.

The quantisation is written from a description of the kernel; the rest is
:mod:`tests.helpers.plain_w4a16`. For finite inputs only.
"""

from __future__ import annotations

from fractions import Fraction

from tests.helpers.plain import bf16, e4m3, fp32, fraction
from tests.helpers.plain_w4a16 import activated, product, weights

FLOOR = fp32(Fraction("1e-30"))


def quantised(row: list[Fraction]) -> tuple[list[Fraction], Fraction]:
    """Codes as values, and the row's scale."""
    scale = max(fp32(max(map(abs, row)) / 448), FLOOR)
    factor = fp32(1 / scale)
    return [e4m3(fp32(v * factor)) for v in row], scale


def linear(rows: list[list[Fraction]], x: list[Fraction], kind: str) -> list[Fraction]:
    """The fp32 accumulators times the scale, rounded, then bfloat16 numbers."""
    codes, scale = quantised(x)
    return [bf16(fp32(fp32(v) * scale)) for v in product(rows, codes, kind)]


def forward(p, kind: str = "exact") -> list[list[Fraction]]:
    """``y`` by token and channel."""
    tensors = (p.w13_weight, p.w13_weight_scale, p.w2_weight, p.w2_weight_scale)
    y = []
    for token, ids in enumerate(p.topk_ids.tolist()):
        x = [fraction(v) for v in p.hidden_states[token].float().tolist()]
        total = [Fraction(0)] * p.hidden_size
        for slot, e in enumerate(ids):
            w13, s13, w2, s2 = (t[e] for t in tensors)
            both = linear(weights(w13, s13), x, kind)
            half, weight = len(both) // 2, fraction(p.topk_weights[token, slot])
            acts = [
                activated(g, u, p.activation_clamp, "g/d")
                for g, u in zip(both[:half], both[half:], strict=True)
            ]
            row = linear(weights(w2, s2), acts, kind)
            total = [fp32(r * weight + t) for r, t in zip(row, total, strict=True)]
        y.append([bf16(t) for t in total])
    return y
