"""The whole layer in plain Python, one number at a time: exact fractions, and rounding by hand.

It shares no line with the oracle or a backend, not even the formats: so that a wrong rule would
have to be misread twice. For finite inputs only. :data:`RULES` says what differs by contract.
"""

from __future__ import annotations

from decimal import Context, Decimal
from fractions import Fraction

VLLM = {"amax_floor": "1e-4", "byte_floor": 105, "reciprocal": False, "tanh": "sigmoid"}
RULES = {
    "2026-06": {**VLLM, "byte_floor": 0, "shared": "last", "tanh": "tanhf"},
    "2026-09": {**VLLM, "shared": "last"},
    "2026-11": {**VLLM, "shared": "first"},
    "sgl": {
        "amax_floor": "1e-10", "byte_floor": 0, "reciprocal": True, "shared": "last",
        "tanh": "quotient",
    },
}  # fmt: skip
E2M1 = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]


def rounded(value: Fraction, bits: int, lowest: int) -> Fraction:
    """``value`` to ``bits`` significant bits, to nearest even; exponents from ``lowest`` on."""
    if not value:
        return value
    top, below = abs(value.numerator), value.denominator
    exponent = top.bit_length() - below.bit_length()  # or one more than that of the value
    exponent -= top < below << exponent if exponent >= 0 else top << -exponent < below
    step = max(exponent, lowest) - bits + 1  # the exponent of a unit in the last place
    top, below = (top << -step, below) if step < 0 else (top, below << step)
    units, rest = divmod(top, below)
    units += 2 * rest > below or (2 * rest == below and units & 1)
    units = -units if value < 0 else units
    return Fraction(units, 1 << -step) if step < 0 else Fraction(units << step)


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


def hyperbolic_tangent(argument: Fraction) -> Fraction:
    """tanh, rounded once to fp32."""
    if not argument:
        return argument
    context = Context(prec=150)
    power = context.exp(
        2 * context.divide(Decimal(argument.numerator), Decimal(argument.denominator))
    )
    value = context.divide(context.subtract(power, 1), context.add(power, 1))
    return fp32(Fraction(value))


def sigmoid(argument: Fraction) -> Fraction:
    return fp32(1 / fp32(1 + exponential(-argument)))


def silu(gate: Fraction, fast: bool, rule: dict, alpha: Fraction) -> Fraction:
    denominator = fp32(1 + exponential(-fp32(alpha * gate)))
    if rule["reciprocal"] and not fast:
        return fp32(gate * fp32(1 / denominator))
    return fp32(gate / denominator)


def tanh_by_sigmoid(argument: Fraction) -> Fraction:
    return fp32(2 * sigmoid(2 * argument) - 1)


def situ(g: Fraction, u: Fraction, p, rule: dict) -> tuple[Fraction, Fraction]:
    alpha, beta = fraction32(p.activation_alpha), fraction32(p.activation_beta)
    if rule["tanh"] == "sigmoid":
        bent = fp32(tanh_by_sigmoid(fp32(g * fp32(1 / alpha))) * alpha)
        return fp32(bent * sigmoid(g)), fp32(tanh_by_sigmoid(fp32(u * fp32(1 / beta))) * beta)
    up = fp32(hyperbolic_tangent(fp32(u / beta)) * beta)
    if rule["tanh"] == "quotient" and (alpha, beta) == (4, 25):
        if p.fast_math:
            up = fp32(25 * hyperbolic_tangent(fp32(u * fraction32(0.04))))
        t = hyperbolic_tangent(fp32(g / 4))
        s = fp32(t + 1)
        return fp32(fp32(2 * t * fp32(s * s)) / fp32(t * t + 1)), up
    return fp32(fp32(alpha * hyperbolic_tangent(fp32(g / alpha))) * sigmoid(g)), up


def activations(gate: list, up: list, weight: Fraction, p, rule: dict):
    clamp = None if p.activation_clamp is None else fraction32(p.activation_clamp)
    out = []
    for g, u in zip(gate, up, strict=True):
        g, u = bf16(g), bf16(u)
        if clamp is not None:
            u = min(max(u, -bf16(clamp)), bf16(clamp))
            g = g if p.activation == "swiglustep" else min(g, bf16(clamp))
        if p.activation == "situ":
            gated, u = situ(g, u, p, rule)
        else:
            gated = silu(g, p.fast_math, rule, fraction32(p.activation_alpha))
            u = fp32(u + fraction32(p.activation_beta))
            if p.activation == "swiglustep":
                gated = min(gated, clamp)
        out.append(fp32(fp32(gated * u) * weight))
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


def fraction32(value: float) -> Fraction:
    """A Python number as the nearest fp32."""
    return fp32(Fraction(value))


def e4m3_values(row) -> list[Fraction]:
    """E4M3 bytes to values, written out."""
    out = []
    for byte in row.tolist():
        field, rest = byte >> 3 & 15, byte & 7
        size = Fraction(8 + rest, 8) * Fraction(2) ** (field - 7) if field else Fraction(rest, 512)
        out.append(-size if byte & 128 else size)
    return out


def as_fp8(row: list[Fraction]) -> list[Fraction]:
    """What E4M3 with a power of two per 128 channels makes of a bfloat16 row."""
    out = []
    for at in range(0, len(row), 128):
        group = row[at : at + 128]
        byte = byte_above(fp32(max(map(abs, group)) * fp32(Fraction(1, 448))))
        scale = Fraction(2) ** (byte - 127)
        out += [e4m3(v / scale) * scale if byte else Fraction(0) for v in group]
    return out


def mlp(x, x_sf, weights: tuple, weight: Fraction, p, rule: dict):
    """Codes, bytes and the bfloat16 row of one expert; ``weights``: w13, s13, w2, s2 as lists."""
    w13, s13, w2, s2 = weights
    sums = [dot(x, x_sf, w, s) for w, s in zip(w13, s13, strict=True)]
    half = len(sums) // 2
    codes, sf = requantised(activations(sums[:half], sums[half:], weight, p, rule), rule)
    return codes, sf, [bf16(dot(codes, sf, w, s)) for w, s in zip(w2, s2, strict=True)]


def forward(p, revision: str):
    """``(y, codes, sf)`` of a problem: values by (token, channel) and (token, slot, channel)."""
    rule = RULES[revision]
    w13 = [[unpacked(row) for row in expert] for expert in p.w13_weight]
    w2 = [[unpacked(row) for row in expert] for expert in p.w2_weight]
    s13, s2 = p.w13_weight_scale.tolist(), p.w2_weight_scale.tolist()
    shared = None
    if p.shared_w13_weight is not None:
        shared = (
            [e4m3_values(row) for row in p.shared_w13_weight], p.shared_w13_weight_scale.tolist(),
            [e4m3_values(row) for row in p.shared_w2_weight], p.shared_w2_weight_scale.tolist(),
        )  # fmt: skip
    y, codes, sf = [], {}, {}
    for token, (ids, weights) in enumerate(
        zip(p.topk_ids.tolist(), p.topk_weights.tolist(), strict=True)
    ):
        x, x_sf = staged([fraction(v) for v in p.hidden_states[token].float().tolist()], rule)
        rows = []
        for slot, (e, weight) in enumerate(zip(ids, weights, strict=True)):
            if e >= 0:
                own = w13[e], s13[e], w2[e], s2[e]
                result = mlp(x, x_sf, own, fraction(weight), p, rule)
                codes[token, slot], sf[token, slot] = result[:2]
                rows.append(result[2])
        if shared is not None:
            row = mlp(x, x_sf, shared, Fraction(1), p, rule)[2]
            rows.insert(0 if rule["shared"] == "first" else len(rows), row)
        total = [Fraction(0)] * p.hidden_size
        for row in rows:
            read = as_fp8(row) if p.combine_dtype == "fp8" else row
            total = [fp32(a + b) for a, b in zip(total, read, strict=True)]
        total = [bf16(v) for v in total]
        if p.shared_output is not None:
            more = [fraction(v) for v in p.shared_output[token].float().tolist()]
            total = [bf16(fp32(a + b)) for a, b in zip(total, more, strict=True)]
        y.append(total)
    return y, codes, sf
