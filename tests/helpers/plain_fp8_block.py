"""The layer in FP8 blocks in plain Python, one number at a time, as exact fractions.

Written from a description of the kernel; it shares :mod:`tests.helpers.plain` with nothing but the
tests. For finite inputs only.
"""

from __future__ import annotations

from fractions import Fraction
from operator import mul

import numpy as np

from tests.helpers.plain import (
    bf16,
    byte_above,
    e4m3,
    e4m3_values,
    exponential,
    fp32,
    fraction,
    fraction32,
)

FLOOR, SHARE = fp32(Fraction("1e-10")), fp32(Fraction(1, 448))
WHOLE = [int(value * 512) for value in e4m3_values(np.arange(256))]
"""E4M3 in units of 1/512, by its byte."""


def staged(row: list[Fraction]) -> tuple[list[Fraction], list[Fraction]]:
    """Codes, and a scale per 128."""
    codes, scales = [], []
    for at in range(0, len(row), 128):
        group = row[at : at + 128]
        scale = fp32(max(*map(abs, group), FLOOR) / 448)
        factor = fp32(1 / scale)
        codes += [e4m3(fp32(v * factor)) for v in group]
        scales.append(scale)
    return codes, scales


def requantised(acts: list[Fraction], old: bool) -> tuple[list[Fraction], list[Fraction]]:
    """Codes, and a scale per 64. ``old``: as in 0.1.4, a power of two and no floor."""
    codes, scales = [], []
    for at in range(0, len(acts), 64):
        group = acts[at : at + 64]
        amax = max(map(abs, group))
        scale = fp32((amax if old else max(amax, FLOOR)) * SHARE)
        factor = None if old else fp32(1 / scale)
        if old:
            byte = byte_above(scale)
            scale = Fraction(2) ** (byte - 127) if byte else Fraction(0)
            factor = Fraction(2) ** (127 - byte)
        codes += [e4m3(fp32(v * factor)) for v in group]
        scales.append(scale)
    return codes, scales


def product(weights, own, codes: list[Fraction], scales: list[Fraction], kind: str):
    """Sums over the runs. ``kind``: 'exact', or how a run is added: 'fma' or 'apart'."""
    run, out = len(codes) // len(scales), []
    x = [int(c * 512) for c in codes]  # E4M3 has multiples of 1/512
    for n, row in enumerate(weights):
        w, total = [WHOLE[byte] for byte in row.tolist()], Fraction(0)
        for at, scale in enumerate(scales):
            part = slice(at * run, (at + 1) * run)
            factor = fp32(scale * fraction(own[n // 128, at * run // 128]))
            inner = Fraction(sum(map(mul, x[part], w[part])), 512**2)
            if kind == "exact":
                total += factor * inner
            elif kind == "fma":
                total = fp32(total + factor * fp32(inner))
            else:
                total = fp32(total + fp32(factor * fp32(inner)))
        out.append(total)
    return out


def activated(g: Fraction, u: Fraction, weight: Fraction, clamp: float | None) -> Fraction:
    if clamp is not None:
        bound = fraction32(clamp)
        g, u = min(g, bound), max(min(u, bound), -bound)
    gated = fp32(g * fp32(1 / fp32(1 + exponential(-g))))
    return fp32(fp32(gated * u) * weight)


def forward(p, old: bool = False, kind: str = "exact") -> list[list[Fraction]]:
    """``y`` by token and channel."""
    tensors = (p.w13_weight, p.w13_weight_scale, p.w2_weight, p.w2_weight_scale)
    y = []
    for token, ids in enumerate(p.topk_ids.tolist()):
        x = staged([fraction(v) for v in p.hidden_states[token].float().tolist()])
        total = [Fraction(0)] * p.hidden_size
        for slot, e in enumerate(ids):
            if e < 0:
                continue
            w13, s13, w2, s2 = (t[e] for t in tensors)
            both = [fp32(v) for v in product(w13, s13, *x, kind)]
            half, weight = len(both) // 2, fraction(p.topk_weights[token, slot])
            acts = [
                activated(g, u, weight, p.activation_clamp)
                for g, u in zip(both[:half], both[half:], strict=True)
            ]
            row = [bf16(v) for v in product(w2, s2, *requantised(acts, old), kind)]
            total = [fp32(r + t) for r, t in zip(row, total, strict=True)]
        y.append([bf16(t) for t in total])
    return y
