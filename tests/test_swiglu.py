"""SwiGLU and requantisation: the table against decimals, the bounds against every gate."""

from __future__ import annotations

from decimal import Context, Decimal
from fractions import Fraction

import numpy as np
import pytest

from megamoe.backends import simulate
from megamoe.oracle import gates, swiglu
from megamoe.spec.contract import BASE
from megamoe.spec.features import Activation
from megamoe.spec.formats import bf16_decode, bf16_key, bf16_round, e4m3_key

BITS = np.arange(1 << 16, dtype=np.uint16)
with np.errstate(invalid="ignore"):
    GATES = bf16_decode(BITS)
FINITE = np.isfinite(GATES)


def bf16(*values: float) -> np.ndarray:
    return bf16_round(np.array(values))


def clamped(clamp: float | None, fast_math: bool = True) -> Activation:
    """Plain SwiGLU."""
    return Activation("swiglu", clamp, 1.0, 0.0, fast_math)


def fl32(value: Decimal) -> float:
    """Nearest fp32 of a decimal, ties to even: the best neighbour of a double-rounded guess."""
    guess = np.float32(float(value))
    near = [
        np.nextafter(guess, np.float32(-np.inf)),
        guess,
        np.nextafter(guess, np.float32(np.inf)),
    ]
    return float(
        min(near, key=lambda v: (abs(Decimal(float(v)) - value), int(v.view(np.uint32)) & 1))
    )


@pytest.mark.parametrize("start", range(0, 97, 16))
def test_silu_table_is_the_contract_s_sequence_in_decimal(start):
    """exp by 50 digits, each operation then rounded once: every 97th gate between -80 and 80."""
    context = Context(prec=50)
    table = gates.silu_table("g/d")
    sample = BITS[FINITE & (np.abs(GATES) < 80) & (np.abs(GATES) > 2.0**-20)][start::97]
    for bits in sample:
        gate = Decimal(float(bf16_decode(np.array([bits]))[0]))
        e = fl32(context.exp(-gate))
        d = fl32(1 + Decimal(e))
        assert table[bits] == np.float32(fl32(context.divide(gate, Decimal(d)))), gate


def test_silu_at_the_ends():
    table = gates.silu_table("g/d")
    assert table[0] == 0
    assert np.isnan(table[0x7FC0])
    assert table[0x7F80] == np.inf
    assert table[bf16(100.0)[0]] == 100


@pytest.mark.parametrize("fast_math", [True, False])
@pytest.mark.parametrize("where", ["low", "high", "none", "mixed"])
def test_every_gate_of_an_erring_kernel_is_within_the_bounds(fast_math, where):
    low, high = gates.silu_bounds("fast" if fast_math else "g/d")
    actual = simulate.silu(GATES, fast_math, where, np.random.default_rng(1))
    assert ((low <= actual) & (actual <= high))[FINITE].all()


@pytest.mark.parametrize("fast_math", [True, False])
def test_the_bounds_are_not_idly_wide(fast_math):
    """Kernels at the documented error of each instruction use most of the width."""
    low, high = (t.astype(np.float64) for t in gates.silu_bounds("fast" if fast_math else "g/d"))
    rng = np.random.default_rng(1)
    ends = [simulate.silu(GATES, fast_math, w, rng).astype(np.float64) for w in ("low", "high")]
    usual = FINITE & (np.abs(GATES) < 30) & (np.abs(GATES) > 0.1)
    usual &= np.where(FINITE, high, 0) > np.where(FINITE, low, 0)
    share = np.abs(ends[0][usual] - ends[1][usual]) / (high[usual] - low[usual])
    assert np.median(share) > 0.2


@pytest.mark.parametrize("fast_math", [True, False])
def test_the_reference_is_within_the_bounds(fast_math):
    low, high = gates.silu_bounds("fast" if fast_math else "g/d")
    table = gates.silu_table("g/d")
    assert ((low <= table) & (table <= high))[FINITE].all()


def test_fifty_gates_tell_the_two_precise_forms_apart():
    """Each form has one value there, whatever a correct exponential does."""
    (low, high), (other, other_high) = map(gates.silu_bounds, ("g/d", "g*(1/d)"))
    apart = FINITE & ((high < other) | (other_high < low))
    assert apart.sum() == 50 and GATES[apart].min() == 1.59375 and GATES[apart].max() == 9.625
    assert (low == high)[apart].all() and (other == other_high)[apart].all()
    ulps = (other.view(np.int32) - low.view(np.int32))[apart]
    assert set(ulps.tolist()) == {-1, 1}


@pytest.mark.parametrize("fast_math", [True, False])
def test_range_over_gates_encloses_every_gate_between(fast_math):
    """Also across the minimum near -1.278, where silu turns."""
    low, high = gates.silu_bounds("fast" if fast_math else "g/d")
    bounds = gates.Bounds.of(low, high)
    order = BITS[FINITE][np.argsort(bf16_key(BITS[FINITE]), kind="stable")]
    rng = np.random.default_rng(2)
    centre = np.searchsorted(bf16_key(order), bf16_key(bf16(-1.278))[0])
    for start in [*rng.integers(0, len(order) - 400, 100), *range(centre - 300, centre, 20)]:
        part = order[start : start + int(rng.integers(1, 400))]
        lowest, highest, _ = bounds.over(part[:1], part[-1:])
        assert lowest == low[part].min()
        assert highest == high[part].max()


def test_clamp_bounds_the_gate_above_only_and_the_up_on_both_sides():
    gate, up = swiglu.clamp_gate_up(
        bf16(-50, 50, np.nan), bf16(-50, 50, np.nan), clamped(10.0), contract=BASE
    )
    assert bf16_decode(gate).tolist() == [-50, 10, 10]
    assert bf16_decode(up).tolist() == [-10, 10, -10]


def test_clamp_is_rounded_to_bfloat16_first():
    gate, _ = swiglu.clamp_gate_up(bf16(20.0), bf16(0.0), clamped(10.02), contract=BASE)
    assert bf16_decode(gate) == 10.0


@pytest.mark.parametrize("power", [-30, -1, 0, 5])
def test_exponent_at_448_times_a_power_of_two(power):
    """A product with fl32(1/448), which is below 1/448: the boundary is one step above it."""
    at = np.float32(448 * 2.0**power)
    around = np.array([np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(1e30))])
    expected = []
    for amax in around:
        exact = Fraction(float(amax)) * Fraction(float(swiglu.RECIP_448))
        nearest = float(np.float32(float(exact)))  # a product of two fp32 is exact in float64
        mantissa, exponent = np.frexp(nearest)
        expected.append(int(exponent) - 1 + 127 + (mantissa != 0.5))
    assert swiglu.requant_exponent(around, contract=BASE).tolist() == expected


def test_a_group_of_zeros_has_exponent_zero_and_nan_is_not_its_amax():
    values = np.zeros((1, 64), np.float32)
    values[0, 32:34] = [np.nan, -3.0]
    assert swiglu.group_amax(values, contract=BASE).tolist() == [[0.0, 3.0]]
    assert swiglu.requant_exponent(np.zeros(1, np.float32), contract=BASE).tolist() == [0]


def interval_of(rng, clamp, fast_math):
    rows, inter = 4, 64
    keys = rng.integers(0, 1 << 16, (2, rows, inter), dtype=np.uint16)
    keys = np.where((keys & 0x7F80) > 0x4380, keys & 0xC3FF, keys).astype(np.uint16)
    width = rng.integers(0, 12, (2, rows, inter))
    ends = []
    for bits, wide in zip(keys, width, strict=True):
        key = bf16_key(bits)
        high = key + wide
        ends.append((bits, np.where(high < 0, 0x8000 | -high, high).astype(np.uint16), key, wide))
    weight = rng.uniform(0.25, 1, (rows, 1)).astype(np.float32)
    (g_lo, g_hi, *_), (u_lo, u_hi, *_) = ends
    return (
        ends,
        weight,
        swiglu.activation_interval(
            (g_lo, g_hi), (u_lo, u_hi), weight, clamped(clamp, fast_math), contract=BASE
        ),
    )


@pytest.mark.parametrize("clamp", [None, 10.0, 0.5, 0.0])
@pytest.mark.parametrize("fast_math", [True, False])
def test_activation_interval_encloses_kernels_with_any_gate_and_up_inside(clamp, fast_math):
    """And the exponents and codes that follow from it enclose theirs."""
    rng = np.random.default_rng([3, fast_math])
    ends, weight, acts = interval_of(rng, clamp, fast_math)
    first, last = acts.exponents()
    for _ in range(40):
        picked = []
        for _, _, key, wide in ends:
            at = key + (rng.random(key.shape) * (wide + 1)).astype(np.int64)
            picked.append(bf16_decode(np.where(at < 0, 0x8000 | -at, at).astype(np.uint16)))
        gate_up = np.concatenate(picked, axis=1).astype(np.float64)
        values = simulate.swiglu(gate_up, weight, clamp, fast_math, "mixed", rng)
        assert ((acts.low <= values) & (values <= acts.high)).all()
        codes, sf = simulate.requantise(values)
        assert ((first <= sf) & (sf <= last)).all()
        low, high = acts.code_keys(sf)
        assert ((low <= e4m3_key(codes)) & (e4m3_key(codes) <= high)).all()
