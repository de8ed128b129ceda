"""The layer with NVFP4 weights in plain Python, one number at a time, as exact fractions.

Written from a description of the kernel; it shares :mod:`tests.helpers.plain` with nothing but the
tests. For finite inputs only.
"""

from __future__ import annotations

from fractions import Fraction

from tests.helpers.plain import (
    E2M1,
    bf16,
    e4m3,
    e4m3_values,
    exponential,
    fp32,
    fraction,
    fraction32,
)

UNIT = 1024
"""A code times a scale is a whole number of 1/1024: products of such are summed as integers."""
DOUBLED = [int(2 * v) for v in (*E2M1, *(-v for v in E2M1))]
"""Twice the E2M1 numbers, by code."""
TINY, SIXTH, SHARE = Fraction(1, 512), fp32(Fraction(1, 6)), fp32(Fraction(1, 2688))


def nearest(value: Fraction) -> Fraction:
    """The E2M1 number that is nearest, of two the one whose code is even."""
    code = min(range(8), key=lambda c: (abs(E2M1[c] - abs(value)), c % 2))
    return -E2M1[code] if value < 0 else E2M1[code]


def scale_of(quotient: Fraction) -> Fraction:
    return e4m3(min(max(quotient, TINY), Fraction(448)))


def staged(row: list[Fraction]) -> tuple[list[Fraction], Fraction]:
    """Numbers with the scale of their group in them, and the scale of the token."""
    token = fp32(max(max(map(abs, row)), fp32(Fraction("1e-12"))) * SHARE)
    out = []
    for at in range(0, len(row), 16):
        group = [fp32(v / token) for v in row[at : at + 16]]
        scale = scale_of(fp32(max(map(abs, group)) * SIXTH))
        out += [nearest(fp32(v / scale)) * scale for v in group]
    return out, token


def requantised(acts: list[Fraction], layer: Fraction) -> list[Fraction]:
    """Numbers with the scale of their group in them; the layer's is left out."""
    divisor = fp32(6 * layer)
    out = []
    for at in range(0, len(acts), 16):
        group = acts[at : at + 16]
        scale = scale_of(fp32(min(max(map(abs, group)), fp32(448 * divisor)) / divisor))
        inverse = fp32(1 / fp32(scale * layer))
        out += [nearest(fp32(v * inverse)) * scale for v in group]
    return out


def matrix(packed, scales) -> list[list[int]]:
    """Weights with the scales of their groups in them, as integers."""
    out = []
    for row, own in zip(packed, scales, strict=True):
        factors = [int(v * UNIT // 2) for v in e4m3_values(own)]
        codes = [n for byte in row.tolist() for n in (byte & 15, byte >> 4)]
        out.append([DOUBLED[n] * factors[k // 16] for k, n in enumerate(codes)])
    return out


def product(weights: list[list[int]], x: list[Fraction], factor: Fraction) -> list[Fraction]:
    """bfloat16 of each fp32 sum times a factor."""
    whole = [int(v * UNIT) for v in x]
    sums = (Fraction(sum(a * b for a, b in zip(w, whole, strict=True)), UNIT**2) for w in weights)
    return [bf16(fp32(fp32(s) * factor)) for s in sums]


def activated(g: Fraction, u: Fraction, p) -> Fraction:
    if p.activation_clamp is not None:
        bound = bf16(fraction32(p.activation_clamp))
        g, u = min(g, bound), max(min(u, bound), -bound)
    argument = fp32(fraction32(p.activation_alpha) * g)
    gated = fp32(g / fp32(1 + exponential(-argument)))
    return fp32(gated * fp32(u + fraction32(p.activation_beta)))


def forward(p, weight_first: bool = False) -> list[list[Fraction]]:
    """``y`` by token and channel. ``weight_first``: the routing weight before requantisation."""
    layer = fraction32(p.l2_activation_scale)
    w13 = [matrix(*both) for both in zip(p.w13_weight, p.w13_weight_scale, strict=True)]
    w2 = [matrix(*both) for both in zip(p.w2_weight, p.w2_weight_scale, strict=True)]
    first, second = ([fraction(v) for v in t] for t in (p.w13_weight_scale_2, p.w2_weight_scale_2))
    y = []
    for token, ids in enumerate(p.topk_ids.tolist()):
        x, own = staged([fraction(v) for v in p.hidden_states[token].float().tolist()])
        total = [Fraction(0)] * p.hidden_size
        for slot, e in enumerate(ids):
            if e < 0:
                continue
            weight = fraction(p.topk_weights[token, slot])
            both = product(w13[e], x, fp32(own * first[e]))
            half = len(both) // 2
            acts = [activated(g, u, p) for g, u in zip(both[:half], both[half:], strict=True)]
            if weight_first:
                acts, weight = [fp32(a * weight) for a in acts], Fraction(1)
            row = product(w2[e], requantised(acts, layer), fp32(second[e] * layer))
            total = [fp32(r * weight + t) for r, t in zip(row, total, strict=True)]
        y.append([bf16(t) for t in total])
    return y
