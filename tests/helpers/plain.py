"""The whole layer in plain Python, one number at a time: exact fractions, and rounding by hand.

It shares no line with the oracle or a backend, not even the formats: so that a wrong rule would
have to be misread twice. For finite inputs only. :data:`RULES` says what differs by contract.
"""

from __future__ import annotations

from decimal import Context, Decimal
from fractions import Fraction

RULES = {
    "2026-06": {"amax_floor": "1e-4", "byte_floor": 0, "reciprocal": False},
    "2026-09": {"amax_floor": "1e-4", "byte_floor": 105, "reciprocal": False},
    "2026-11": {"amax_floor": "1e-4", "byte_floor": 105, "reciprocal": False},
    "sgl": {"amax_floor": "1e-10", "byte_floor": 0, "reciprocal": True},
}
E2M1 = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]


def rounded(value: Fraction, bits: int, lowest: int) -> Fraction:
    """``value`` to ``bits`` significant bits, to nearest even; exponents from ``lowest`` on."""
    if not value:
        return value
    size, exponent = abs(value), lowest
    if size >= Fraction(2) ** lowest:
        exponent = size.numerator.bit_length() - size.denominator.bit_length()
        exponent -= Fraction(2) ** exponent > size
    step = Fraction(2) ** (exponent - bits + 1)
    return round(value / step) * step  # Python's round of a fraction is to even


def fp32(value: Fraction) -> Fraction:
    return rounded(value, 24, -126)


def bf16(value: Fraction) -> Fraction:
    return rounded(value, 8, -126)


def e4m3(value: Fraction) -> Fraction:
    return max(Fraction(-448), min(Fraction(448), rounded(value, 4, -6)))


def byte_above(scale: Fraction) -> int:
    """The UE8M0 byte of the least power of two that is not below ``scale``, an fp32 number."""
    if not scale:
        return 0
    exponent = scale.numerator.bit_length() - scale.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > scale
    if exponent < -126:  # a subnormal: its field is 0
        return 1
    return exponent + 127 + (Fraction(2) ** exponent != scale)


def staged(row: list[Fraction], rule: dict) -> tuple[list[Fraction], list[int]]:
    """Codes as values, and bytes, of one token."""
    floor = fp32(Fraction(rule["amax_floor"]))
    codes, sf = [], []
    for at in range(0, len(row), 32):
        group = row[at : at + 32]
        amax = max(max(map(abs, group)), floor)
        byte = byte_above(fp32(amax / 448))
        sf.append(min(max(byte, 1), 254))
        codes += [e4m3(v * Fraction(2) ** (127 - sf[-1])) for v in group]
    return codes, sf


def dot(codes: list[Fraction], sf: list[int], weights: list[Fraction], bytes_: list[int]):
    """The exact sum of scaled products."""
    total = Fraction(0)
    for group, (a, b) in enumerate(zip(sf, bytes_, strict=True)):
        part = slice(group * 32, group * 32 + 32)
        products = sum(x * w for x, w in zip(codes[part], weights[part], strict=True))
        total += products * Fraction(2) ** (a + b - 254)
    return total


def exponential(argument: Fraction) -> Fraction:
    """exp, rounded once to fp32."""
    context = Context(prec=60)
    value = context.divide(Decimal(argument.numerator), Decimal(argument.denominator))
    return fp32(Fraction(context.exp(value)))


def silu(gate: Fraction, fast: bool, rule: dict) -> Fraction:
    denominator = fp32(1 + exponential(-gate))
    if rule["reciprocal"] and not fast:
        return fp32(gate * fp32(1 / denominator))
    return fp32(gate / denominator)


def activations(gate: list, up: list, weight: Fraction, clamp, fast: bool, rule: dict):
    out = []
    for g, u in zip(gate, up, strict=True):
        g, u = bf16(g), bf16(u)
        if clamp is not None:
            g, u = min(g, bf16(clamp)), min(max(u, -bf16(clamp)), bf16(clamp))
        out.append(fp32(fp32(silu(g, fast, rule) * u) * weight))
    return out


def requantised(values: list[Fraction], rule: dict) -> tuple[list[Fraction], list[int]]:
    factor = fp32(Fraction(1, 448))
    codes, sf = [], []
    for at in range(0, len(values), 32):
        group = values[at : at + 32]
        byte = byte_above(fp32(max(map(abs, group)) * factor))
        sf.append(max(byte, rule["byte_floor"]))
        codes += [e4m3(v * Fraction(2) ** (127 - sf[-1])) for v in group]
    return codes, sf


def fraction(value) -> Fraction:
    return Fraction(float(value))


def unpacked(row) -> list[Fraction]:
    """Packed E2M1 bytes to values, the low nibble first."""
    nibbles = [n for byte in row.tolist() for n in (byte & 15, byte >> 4)]
    return [-E2M1[n & 7] if n & 8 else E2M1[n] for n in nibbles]


def forward(p, revision: str):
    """``(y, codes, sf)`` of a problem: values by (token, channel) and (token, slot, channel)."""
    rule, inter = RULES[revision], p.intermediate_size
    clamp = None if p.activation_clamp is None else fraction(p.activation_clamp)
    w13 = [[unpacked(row) for row in expert] for expert in p.w13_weight]
    w2 = [[unpacked(row) for row in expert] for expert in p.w2_weight]
    s13, s2 = p.w13_weight_scale.tolist(), p.w2_weight_scale.tolist()
    y, codes, sf = [], {}, {}
    for token, (ids, weights) in enumerate(
        zip(p.topk_ids.tolist(), p.topk_weights.tolist(), strict=True)
    ):
        x, x_sf = staged([fraction(v) for v in p.hidden_states[token].float().tolist()], rule)
        total = [Fraction(0)] * p.hidden_size
        for slot, (expert, weight) in enumerate(zip(ids, weights, strict=True)):
            if expert < 0:
                continue
            sums = [dot(x, x_sf, w, s) for w, s in zip(w13[expert], s13[expert], strict=True)]
            values = activations(
                sums[:inter], sums[inter:], fraction(weight), clamp, p.fast_math, rule
            )
            codes[token, slot], sf[token, slot] = requantised(values, rule)
            for n, (w, s) in enumerate(zip(w2[expert], s2[expert], strict=True)):
                row = bf16(dot(codes[token, slot], sf[token, slot], w, s))
                total[n] = fp32(total[n] + row)
        y.append([bf16(v) for v in total])
    return y, codes, sf
