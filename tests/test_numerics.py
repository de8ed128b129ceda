"""One search for a counterexample for each numbered statement of docs/numerics.md.

Others are elsewhere: section 3's bounds in tests/test_bounds_search.py; single facts of 4.2 to 4.4
in tests/test_swiglu.py and tests/test_gates.py, of 6.3 and 6.4 in tests/test_maybe_nan.py. The slow
tests here and there draw at least a million each.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.backends import simulate
from megamoe.oracle import bounds, swiglu
from megamoe.oracle.combine import Combine
from megamoe.oracle.linear import Columns, Rows, block_sums, exact_dot
from megamoe.oracle.mlp import linear
from megamoe.oracle.spread import SpreadRows, spread_block_sums
from megamoe.spec.accumulators import ACCUMULATORS
from megamoe.spec.contract import BASE, REVISIONS
from megamoe.spec.features import Activation
from megamoe.spec.formats import (
    E2M1_TABLE,
    E4M3_TABLE,
    bf16_decode,
    bf16_key,
    bf16_round,
    e4m3_cast,
    e4m3_decode,
    e4m3_key,
    ue8m0_decode,
)

SEEDS = st.integers(0, 2**32 - 1)
FINITE = np.flatnonzero(np.isfinite(E4M3_TABLE)).astype(np.uint8)


def random_operands(rng, depth, spread, columns=8):
    """Operands with scale factors over ``spread`` octaves a side."""
    codes = rng.choice(FINITE, (2, depth))
    packed = rng.integers(0, 256, (columns, depth // 2), dtype=np.uint8)
    sf, weight_sf = (
        rng.integers(127 - spread // 2, 128 + spread // 2, (n, depth // 32)).astype(np.uint8)
        for n in (2, columns)
    )
    return codes, sf, packed, weight_sf


def blocks_of(args):
    return block_sums(Rows.of(*args[:2]), Columns.of(*args[2:]))


def test_2_1_products_are_short():
    """All of them: a multiple of 2^-10 below 2^12, of six significant bits."""
    for x in E4M3_TABLE[FINITE]:
        for w in E2M1_TABLE:
            units = Fraction(float(x)) * Fraction(float(w)) * 2**10
            assert units.denominator == 1
            size = abs(units.numerator)
            assert size < 2**22
            assert size == 0 or (size // (size & -size)).bit_length() <= 6


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, depth=st.sampled_from([32, 64, 256]), spread=st.sampled_from([1, 8, 17, 40]))
def test_2_2_and_2_3_what_is_called_exact_is_the_rational_sum(seed, depth, spread):
    args = random_operands(np.random.default_rng(seed), depth, spread)
    blocks = blocks_of(args)
    total, exact = blocks.total()[0], blocks.exact_in_float64()
    for row, column in np.argwhere(exact):
        sums = [exact_dot(args[0][row], args[1][row], args[2][column], args[3][column])]
        assert Fraction(float(total[row, column])) == sums[0]
    group = args[0][0, :32], args[1][0, :1], args[2][0, :16], args[3][0, :1]
    assert Fraction(float(blocks.low[0, 0, 0])) == exact_dot(*group)


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS, depth=st.sampled_from([32, 128, 256]), kernel=st.sampled_from(simulate.kernels())
)
def test_3_1_where_a_class_is_called_exact_its_members_give_the_sum(seed, depth, kernel):
    """Few significant bits, so that the condition often holds, and often just fails."""
    rng = np.random.default_rng(seed)
    codes, sf, packed, weight_sf = random_operands(rng, depth, int(rng.choice([1, 3, 8])), 64)
    mask = np.uint8(rng.choice([0xF8, 0xB8, 0xFC]))
    codes = codes & mask
    codes[rng.random(codes.shape) < rng.choice([0.0, 0.5, 0.9])] = 0
    args = codes, sf, packed & np.uint8(rng.choice([0xAA, 0xEE, 0xFF])), weight_sf
    blocks = blocks_of(args)
    a = ACCUMULATORS[kernel.accumulator]
    low, high = bounds.result_interval(blocks, a)
    with np.errstate(over="ignore"):
        exact = low == high if a.block is None else bounds._always_exact(blocks, a)
    try:
        actual = kernel.linear(*args, rng)
    except simulate.NotAMemberError:
        return
    assert np.array_equal(actual[exact], blocks.total()[0][exact])


@pytest.mark.parametrize("name", ACCUMULATORS)
def test_3_6_the_exact_sum_is_in_every_interval(name):
    rng = np.random.default_rng(36)
    for spread in (1, 12, 40):
        codes, sf, packed, weight_sf = random_operands(rng, 256, spread, 64)
        out = linear(Rows.of(codes, sf), packed, weight_sf, [ACCUMULATORS[name]])
        assert (out[name][0] <= out["reference"]).all()
        assert (out["reference"] <= out[name][1]).all()


def test_4_1_rounding_to_bfloat16_is_monotone():
    rng = np.random.default_rng(41)
    values = np.ldexp(rng.uniform(-1, 1, 1_000_000), rng.integers(-150, 129, 1_000_000))
    every = bf16_decode(np.arange(65536, dtype=np.uint16))
    values = np.sort(np.concatenate([values, every[~np.isnan(every)].astype(np.float64)]))
    keys = bf16_key(bf16_round(values))
    assert (np.diff(keys.astype(np.int32)) >= 0).all()


def bf16_of(key):
    """The inverse of ``bf16_key``."""
    return np.where(key < 0, 0x8000 | -key, key).astype(np.uint16)


def random_interval(rng, shape):
    """Keys of the ends of intervals of bfloat16 numbers: a point, a few places, or half of all."""
    key = bf16_key(rng.integers(0, 1 << 16, shape, dtype=np.uint16)).astype(np.int64)
    usual = rng.random(shape) < 0.7  # |value| between 2^-8 and 2^7
    key = np.where(usual, np.sign(key) * rng.integers(0x3B80, 0x4300, shape), key)
    wide = rng.choice([0, 3, 100, 0x7F80], shape, p=[0.5, 0.3, 0.15, 0.05])
    top = 0x7F80  # infinity
    return np.clip(key, -top, top), np.clip(key + rng.integers(0, wide + 1), -top, top)


def picked(rng, low, high):
    """A member of each interval: one of its ends, or any."""
    part = np.where(rng.random(low.shape) < 0.5, rng.random(low.shape), rng.integers(0, 2))
    return bf16_decode(bf16_of(low + np.rint(part * (high - low)).astype(np.int64)))


@pytest.mark.slow
@pytest.mark.parametrize("clamp", [None, 10.0, 0.5, 0.0])
@pytest.mark.parametrize("fast_math", [True, False])
def test_4_2_to_5_2_every_activation_exponent_and_code_of_an_erring_kernel_is_inside(
    clamp, fast_math
):
    """The whole range of gates and ups, infinities included, each instruction at its error's end:
    more than a million activations in all."""
    rng = np.random.default_rng([42, fast_math, 0 if clamp is None else int(10 * clamp)])
    act = Activation("swiglu", clamp, 1.0, 0.0, fast_math)
    for number in range(140):
        ends = [random_interval(rng, (8, 128)) for _ in range(2)]
        weight = rng.choice([0.0, 1.0, 2.0**-126, 3e38], (8, 1), p=[0.1, 0.7, 0.1, 0.1])
        weight = (weight * rng.uniform(0.25, 1, (8, 1))).astype(np.float32)
        gate, up = ([bf16_of(key) for key in pair] for pair in ends)
        acts = swiglu.activation_interval(gate, up, weight, act, contract=BASE)
        member = [picked(rng, *pair) for pair in ends]
        where = ("low", "high", "mixed")[number % 3]
        with np.errstate(all="ignore"):
            gate_up = np.concatenate(member, axis=1).astype(np.float64)
            values = simulate.swiglu(gate_up, weight, clamp, fast_math, where, rng)
        is_nan = np.isnan(values)
        may = np.isnan(acts.low) if acts.nan is None else np.isnan(acts.low) | acts.nan
        assert (may | ~is_nan).all()
        assert (is_nan | ((acts.low <= values) & (values <= acts.high))).all()
        with np.errstate(all="ignore"):
            amax = swiglu.group_amax(values, BASE)
            sf = swiglu.requant_exponent(amax, BASE)
            first, last = acts.exponents()
            key = e4m3_key(swiglu.scaled_codes(values, sf, BASE))
            low, high = acts.code_keys(sf)
        assert ((first <= sf) & (sf <= last)).all()
        assert ((low <= key) & (key <= high)).all()


@pytest.mark.parametrize("revision", REVISIONS)
def test_5_1_the_byte_does_not_fall_with_amax(revision):
    rng = np.random.default_rng(51)
    bits = np.sort(rng.integers(0, 0x7F800001, 1_000_000)).astype(np.uint32)
    near = np.array([448 * 2.0**k for k in range(-130, 119)], np.float32).view(np.uint32)
    bits = np.unique(np.concatenate([bits, near - 1, near, near + 1]))
    byte = swiglu.requant_exponent(bits.view(np.float32), REVISIONS[revision])
    assert (np.diff(byte.astype(int)) >= 0).all()


def test_5_1_both_rules_agree_above_the_floor():
    rng = np.random.default_rng(52)
    bits = rng.integers(0, 0x7F800000, 1_000_000).astype(np.uint32)
    near = np.array([448 * 2.0**k for k in range(-22, 119)], np.float32).view(np.uint32)
    amax = np.concatenate([bits, near - 1, near, near + 1]).view(np.float32)
    amax = amax[amax > 448 * 2.0**-23]
    product, by_bits = (swiglu.requant_exponent(amax, REVISIONS[r]) for r in ("2026-06", "2026-09"))
    assert np.array_equal(product, by_bits)


def test_5_2_codes_are_monotone():
    rng = np.random.default_rng(52)
    values = np.ldexp(rng.uniform(-1, 1, 1_000_000), rng.integers(-14, 12, 1_000_000))
    values = np.sort(values)
    assert (np.diff(e4m3_key(e4m3_cast(values)).astype(int)) >= 0).all()


def combined(rng, rows, channels):
    """How many outputs were judged; the rows are members of intervals over the whole range."""
    shape = (rows, 4, channels)
    low, high = random_interval(rng, shape)
    whole = Combine(rng.random((rows, 4)) < 0.8, np.ones((rows, 4), np.float32), BASE)
    ends = [bf16_key(end) for end in whole.ends(bf16_of(low), bf16_of(high))]
    y = whole.point(bf16_round(picked(rng, low, high)))
    is_nan = np.isnan(bf16_decode(y))
    open_ = (ends[0] == bf16_key(np.uint16(0xFF80))) & (ends[1] == bf16_key(np.uint16(0x7F80)))
    both_nan = ends[0] == bf16_key(y)
    assert (~is_nan | open_ | both_nan).all()
    assert (is_nan | ((ends[0] <= bf16_key(y)) & (bf16_key(y) <= ends[1]))).all()
    return y.size


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_6_1_every_y_between_lies_between(seed):
    combined(np.random.default_rng(seed), 3, 32)


@pytest.mark.slow
def test_6_1_a_million_draws_find_no_counterexample():
    rng = np.random.default_rng(61)
    assert sum(combined(rng, 64, 512) for _ in range(40)) > 1_000_000


def block_sums_inside(rng):
    """How many block sums were judged."""
    count = 0
    low = np.ldexp(rng.uniform(-1, 1, (3, 128)), rng.integers(-4, 9, (3, 128))).astype(np.float32)
    width = np.abs(low) * rng.choice([0, 1e-3, 0.1], low.shape)
    high = (low + width).astype(np.float32)
    acts = swiglu.Activations(low, high, BASE)
    packed = rng.integers(0, 256, (16, 64), dtype=np.uint8)
    columns = Columns.of(packed, rng.integers(110, 140, (16, 4)).astype(np.uint8))
    blocks = spread_block_sums(SpreadRows.of(acts, *acts.exponents()), columns)
    for _ in range(8):
        part = np.where(
            rng.random(low.shape) < 0.5, rng.random(low.shape), rng.integers(0, 2, low.shape)
        )
        values = np.clip((low + part * width).astype(np.float32), low, high)
        amax = np.abs(values).reshape(3, 4, 32).max(axis=-1)
        sf = swiglu.requant_exponent(amax, BASE)
        codes = e4m3_cast(values / np.repeat(ue8m0_decode(sf), 32, axis=1))
        assert np.isfinite(e4m3_decode(codes)).all()
        member = blocks_of((codes, sf, packed, (columns.exponent + 127).astype(np.uint8)))
        assert (blocks.low <= member.low).all()
        assert (member.high <= blocks.high).all()
        assert (member.positive <= blocks.positive).all()
        assert (member.negative <= blocks.negative).all()
        assert (blocks.lowbit <= member.lowbit).all()
        assert (member.field <= blocks.field).all()
        assert (member.bf16_field <= blocks.bf16_field).all()
        count += member.low.size
    return count


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_6_2_every_choice_of_codes_has_its_block_sums_inside(seed):
    """Activations drawn within their intervals, requantised, and multiplied with the weights."""
    block_sums_inside(np.random.default_rng(seed))


@pytest.mark.slow
def test_6_2_a_million_draws_find_no_counterexample():
    rng, count = np.random.default_rng(62), 0
    while count < 1_000_000:
        count += block_sums_inside(rng)
