"""A search for counterexamples to section 3 of docs/numerics.md, most of all at the range's ends.

Operands are drawn with scale bytes from the whole of UE8M0, or near one of its ends, and with few
terms, many, or terms that cancel. Every simulated member of a class must lie in its interval.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.backends import simulate
from megamoe.oracle.bounds import result_interval, within_fp32
from megamoe.oracle.linear import Columns, Rows, block_sums
from megamoe.oracle.stepwise import replay
from megamoe.spec.accumulators import SM90_E4M3_K128, accumulator

KERNELS = simulate.kernels()
# Where the sum of both scale bytes lies, less 254: usual, at both ends of fp32, beyond them.
CENTRES = (0, -110, -126, -133, -140, -149, -165, -230, 100, 112, 118, 125, 140, 200)


def draw(rng, rows=4, columns=64, run=32):
    """Operands whose products have exponents around one of :data:`CENTRES`."""
    depth = int(rng.choice([32, 64, 128, 256])) if run == 32 else int(rng.choice([128, 256]))
    codes = rng.integers(0, 256, (rows, depth), dtype=np.uint8)
    kind = int(rng.integers(5))
    if kind == 1:  # subnormal codes and the smallest normal ones
        codes &= 0x8F
    codes[((codes & 0x7F) == 0x7F) | (rng.random(codes.shape) < rng.choice([0, 0.5, 0.95]))] = 0
    packed = rng.integers(0, 256, (columns, depth // 2), dtype=np.uint8)
    if kind == 2:  # one sign: every truncation errs the same way
        codes, packed = codes & 0x7F, packed & 0x77
    octaves = int(rng.choice([1, 3, 8, 30]))
    total = int(rng.choice(CENTRES)) + 254
    first = int(np.clip(rng.choice([total // 2, 0, 127, 254, total]), 0, min(254, total)))
    second = int(np.clip(total - first, 0, 254))
    groups = depth // run

    def scales(count, middle):
        low, high = max(0, middle - octaves // 2), min(254, middle + octaves // 2)
        exponents = rng.integers(low, high + 1, (count, groups)).astype(np.uint8)
        return exponents.repeat(run // 32, axis=1)

    sf, weight_sf = scales(rows, first), scales(columns, second)
    if kind == 4:  # few bits, and rows whose operands are subnormal in bfloat16 in some groups
        codes, packed = codes & np.uint8(0xF8), packed & np.uint8(0xAA)
        low = rng.integers(0, 12, sf.shape).astype(np.uint8)
        if run == 32:
            sf = np.where(rng.random(sf.shape) < 0.5, low, sf).astype(np.uint8)
            near = np.where(sf[:1] < 12, rng.integers(215, 235), weight_sf)
            weight_sf = near.astype(np.uint8)
    if kind == 3 and depth > 32:  # the second half cancels most of the first
        half = depth // 2
        codes[:, half:] = codes[:, :half] ^ np.uint8(0x80)
        packed[:, half // 2 :] = packed[:, : half // 2]
        packed[rng.random(packed.shape) < 0.02] ^= 0x21
        sf[:, groups * (run // 32) // 2 :] = sf[:, : groups * (run // 32) // 2]
        weight_sf[:, groups * (run // 32) // 2 :] = weight_sf[:, : groups * (run // 32) // 2]
    return codes, sf, packed, weight_sf


def ends(args, a):
    """What the oracle allows, as ``oracle.reference`` takes it for known operands."""
    rows, columns = Rows.of(*args[:2]), Columns.of(*args[2:])
    blocks = block_sums(rows, columns)
    low, high = result_interval(blocks, a)
    narrow = within_fp32(blocks, *replay(rows, columns, a), a) if a.replayed else (low, high)
    exact = blocks.total()[0]
    return (low, high), (np.minimum(narrow[0], exact), np.maximum(narrow[1], exact))


def outside(actual, low, high):
    """NaN only where both ends are infinite."""
    overflow = np.isnan(actual) & (low == -np.inf) & (high == np.inf)
    return ~(((actual >= low) & (actual <= high)) | overflow)


def check(args, kernel, a, rng):
    """How many outputs were judged; none where the operands are outside the member's range."""
    try:
        with np.errstate(all="ignore"):
            actual = kernel.linear(*args, rng)
    except simulate.NotAMemberError:  # not bfloat16 numbers
        return 0
    for low, high in ends(args, a):
        wrong = np.argwhere(outside(actual, low, high))
        assert not len(wrong), (kernel.name, wrong[0], actual[tuple(wrong[0])], len(wrong))
    return actual.size


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kernel=st.sampled_from(KERNELS))
def test_no_member_leaves_its_class_anywhere_in_the_range(seed, kernel):
    rng = np.random.default_rng(seed)
    check(draw(rng, 2, 16), kernel, accumulator(kernel.accumulator), rng)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["plain", "ordered", "b", "mmasim"])
def test_a_million_draws_find_no_counterexample(family):
    """More than a million with all four families."""
    kernels = [k for k in KERNELS if k.name.startswith(family)]
    rng = np.random.default_rng([16, len(family)])
    count = number = 0
    while count < 300_000:
        kernel = kernels[number % len(kernels)]
        number += 1
        count += check(draw(rng, 8, 512), kernel, accumulator(kernel.accumulator), rng)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_runs_of_128_scaled_outside_the_unit_are_followed_too(seed):
    rng = np.random.default_rng(seed)
    for rounding in ("nearest", "mixed"):
        kernel = simulate.hopper_e4m3_outside(128, rounding, SM90_E4M3_K128.name)
        check(draw(rng, 2, 16, run=128), kernel, SM90_E4M3_K128, rng)


def test_a_run_of_128_with_two_scale_factors_has_no_member():
    args = draw(np.random.default_rng(0))
    sf = np.arange(4, dtype=np.uint8)[None] + 120
    rows, columns = Rows.of(np.zeros((1, 128), np.uint8), sf), args
    columns = Columns.of(np.zeros((1, 64), np.uint8), np.full((1, 4), 127, np.uint8))
    with pytest.raises(ValueError, match="one scale factor on a side for each 128"):
        replay(rows, columns, SM90_E4M3_K128)


# --- the counterexamples that were found ------------------------------------------------------


def products(*terms, groups=None):
    """One row and one column; a term is (k, code, sf, nibble, weight sf)."""
    groups = groups or 1 + max(t[0] for t in terms) // 32
    codes, nibbles = np.zeros((1, 32 * groups), np.uint8), np.zeros((1, 32 * groups), np.uint8)
    sf, weight_sf = (np.full((1, groups), 127, np.uint8) for _ in range(2))
    for k, code, scale, nibble, weight_scale in terms:
        codes[0, k], nibbles[0, k] = code, nibble
        sf[0, k // 32], weight_sf[0, k // 32] = scale, weight_scale
    return codes, sf, nibbles[:, ::2] | (nibbles[:, 1::2] << 4), weight_sf


@pytest.mark.parametrize("name", ["fp32", "fp32-ordered", "sm100-mxf8f6f4"])
def test_a_sum_that_saturates_lies_inside(name):
    """P = 1.375 * 2^128 is cut to the largest number, then N = 0.9375 * 2^128 is taken away."""
    scale = 127 + 121
    big = [(0, 0x6B, scale, 2, 127), (1, 0x6B, scale, 2, 127)]  # 88 * 2^121 each: 1.375 * 2^128
    small = [(32, 0xEF, scale, 2, 127)]  # -120 * 2^121
    args = products(*big, *small)
    exact = block_sums(Rows.of(*args[:2]), Columns.of(*args[2:])).total()[0].item()
    assert exact == 0.4375 * 2.0**128
    kernel = simulate.ordered("ascending", "zero", 32, fresh=True)
    actual = kernel.linear(*args, np.random.default_rng(0)).item()
    assert actual == 0.0625 * 2.0**128 - 2.0**104
    low, high = ends(args, accumulator(name))[1]
    assert low.item() <= actual <= high.item()
    assert low.item() > 0.06 * 2.0**128  # and not much below it


@pytest.mark.parametrize(("exponent", "code"), [(-133, 0x08), (-130, 0x20)])
def test_a_bfloat16_subnormal_aligns_where_its_field_is(exponent, code):
    """x = 2^-133 or 2^-130 has field -126 as a bfloat16: its product, 2^-33 or 2^-30, is aligned at
    2^-26, twenty-five bits are kept, and the 31.5 units of 2^-56 that were there are cut off."""
    before = [(0, 0x67, 70, 2, 127), (1, 0x44, 70, 2, 127)]  # 60 and 3, times 2^-57
    args = products(*before, (32, code, 0, 2, 227))
    actual = simulate.hopper_bf16().linear(*args, np.random.default_rng(0)).item()
    blocks = block_sums(Rows.of(*args[:2]), Columns.of(*args[2:]))
    exact = blocks.total()[0].item()
    assert (exact - actual) * 2.0**56 == 31.5
    for name in ("fp32-ordered", "fp32"):
        low, high = ends(args, accumulator(name))[1]
        assert low.item() <= actual <= high.item()
        native = result_interval(replace(blocks, bf16_field=blocks.field), accumulator(name))
        if name == "fp32-ordered" or exponent == -133:
            assert actual < native[0].item()  # by the field of code and scale alone it is outside


def test_a_bfloat16_subnormal_makes_an_exact_sum_inexact():
    """The same with 31 units, which 24 bits can hold beside 2^-33: no class may call it exact."""
    args = products((0, 0x5F, 71, 2, 127), (1, 0x38, 71, 2, 127), (32, 0x08, 0, 2, 227))
    actual = simulate.hopper_bf16().linear(*args, np.random.default_rng(0)).item()
    exact = block_sums(Rows.of(*args[:2]), Columns.of(*args[2:])).total()[0].item()
    assert (exact - actual) * 2.0**56 == 31
    for name in ("fp32-ordered", "fp32"):
        low, high = ends(args, accumulator(name))[1]
        assert low.item() <= actual <= high.item()


@settings(max_examples=300, deadline=None)
@given(
    before=st.tuples(st.integers(1, 126), st.integers(1, 126)),
    place=st.integers(60, 80),
    code=st.sampled_from([0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x38, 0x3C]),
    weight=st.integers(215, 235),
    sign=st.booleans(),
)
def test_no_small_sum_beside_a_bfloat16_subnormal_leaves_its_class(
    before, place, code, weight, sign
):
    """The family of both, around the places where the class begins to cut."""
    args = products(
        (0, before[0], place, 2, 127),
        (1, before[1] | (0x80 if sign else 0), place, 2, 127),
        (32, code, 0, 2, weight),
    )
    actual = simulate.hopper_bf16().linear(*args, np.random.default_rng(0))
    for name in ("fp32-ordered", "fp32"):
        low, high = ends(args, accumulator(name))[1]
        assert not outside(actual, low, high).any()


def test_an_operand_that_bfloat16_cannot_hold_is_outside_the_member_s_range():
    args = products((0, 0x01, 0, 2, 227))  # x = 2^-136
    with pytest.raises(simulate.NotAMemberError, match="no torch"):
        simulate.hopper_bf16().linear(*args, np.random.default_rng(0))
