"""MXFP4 weights beside bfloat16 in plain Python, one number at a time, as exact fractions.

Written from a description of the kernel; it shares :mod:`tests.helpers.plain` with nothing but the
tests. For finite inputs only.
"""

from __future__ import annotations

from fractions import Fraction

from tests.helpers.plain import E2M1, bf16, exponential, fp32, fraction, fraction32


def weights(packed, scale) -> list[list[Fraction]]:
    """Rows of (N, C/2) bytes and (N, C/32) scale bytes as numbers."""
    out = []
    for row, bytes_ in zip(packed.tolist(), scale.tolist(), strict=True):
        codes = [code for byte in row for code in (byte & 15, byte >> 4)]
        numbers = [(-1) ** (code >> 3) * E2M1[code & 7] for code in codes]
        out.append([n * Fraction(2) ** (bytes_[k // 32] - 127) for k, n in enumerate(numbers)])
    return out


def product(rows: list[list[Fraction]], x: list[Fraction], kind: str) -> list[Fraction]:
    """A sum of products a row. ``kind``: 'exact', or 'blocks': fp32, a rounding each 32 of K."""
    out = []
    for row in rows:
        total = Fraction(0)
        for at in range(0, len(x), 32):
            part = slice(at, at + 32)
            total += sum(a * b for a, b in zip(x[part], row[part], strict=True))
            total = total if kind == "exact" else fp32(total)
        out.append(total)
    return out


def activated(
    g: Fraction, u: Fraction, clamp: float | None, division: str = "g*(1/d)"
) -> Fraction:  # fmt: skip
    """Of bfloat16 gate and up."""
    if clamp is not None:
        bound = fraction32(clamp)
        g, u = min(g, bound), max(min(u, bound), -bound)
    below = fp32(1 + exponential(-g))
    gated = g * fp32(1 / below) if division == "g*(1/d)" else g / below
    return bf16(fp32(fp32(gated) * u))


def forward(p, kind: str = "exact") -> list[list[Fraction]]:
    """``y`` by token and channel."""
    tensors = (p.w13_weight, p.w13_weight_scale, p.w2_weight, p.w2_weight_scale)
    y = []
    for token, ids in enumerate(p.topk_ids.tolist()):
        x = [fraction(v) for v in p.hidden_states[token].float().tolist()]
        total = [Fraction(0)] * p.hidden_size
        for slot, e in enumerate(ids):
            if e < 0:
                continue
            w13, s13, w2, s2 = (t[e] for t in tensors)
            both = [bf16(v) for v in product(weights(w13, s13), x, kind)]
            half, weight = len(both) // 2, fraction(p.topk_weights[token, slot])
            acts = [
                activated(g, u, p.activation_clamp)
                for g, u in zip(both[:half], both[half:], strict=True)
            ]
            row = [bf16(v) for v in product(weights(w2, s2), acts, kind)]
            total = [fp32(r * weight + t) for r, t in zip(row, total, strict=True)]
        y.append([bf16(t) for t in total])
    return y
