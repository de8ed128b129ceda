"""Accumulator bounds: each class's own kernels stay inside, and a kernel outside the class shows.

The bounds are stated in float64 and derived in docs/numerics.md; here hostile members of each
class try to leave them.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from megamoe.backends import simulate
from megamoe.oracle import bounds
from megamoe.oracle.linear import Blocks, Columns, Rows, block_sums
from megamoe.spec.accumulators import ACCUMULATORS, accumulator

CLASSES = [name for name in ACCUMULATORS if name != "exact"]


def operands(rng, rows=2, columns=24, depth=256, octaves=6, centre=127):
    codes = rng.integers(0, 256, (rows, depth), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    packed = rng.integers(0, 256, (columns, depth // 2), dtype=np.uint8)
    low, high = centre - octaves, centre + 1
    sf = rng.integers(low, high, (rows, depth // 32)).astype(np.uint8)
    weight_sf = rng.integers(low, high, (columns, depth // 32)).astype(np.uint8)
    return codes, sf, packed, weight_sf


def interval(args, name):
    codes, sf, packed, weight_sf = args
    blocks = block_sums(Rows.of(codes, sf), Columns.of(packed, weight_sf))
    return bounds.result_interval(blocks, accumulator(name))


@pytest.mark.parametrize("centre", [127, 69, 60], ids=["usual", "subnormal", "vanishing"])
@pytest.mark.parametrize("octaves", [1, 12])
def test_every_simulated_kernel_stays_in_the_interval_of_its_class(octaves, centre):
    """Scales down to where products lie below fp32's subnormal spacing (2**-149)."""
    rng = np.random.default_rng([octaves, centre])
    args = operands(rng, octaves=octaves, centre=centre)
    ends = {name: interval(args, name) for name in CLASSES}
    for kernel in simulate.kernels():
        actual = kernel.linear(*args, rng)
        low, high = ends[kernel.accumulator]
        assert ((actual >= low) & (actual <= high)).all(), kernel.name


@pytest.mark.parametrize("name", CLASSES)
def test_an_interval_a_fifth_as_wide_would_be_wrong(name):
    """Positive terms only, so that every truncation errs the same way: some kernel needs it."""
    rng = np.random.default_rng(3)
    codes, sf, packed, weight_sf = operands(rng, rows=2, columns=32, depth=512, octaves=10)
    args = codes & 0x7F, sf, packed & 0x77, weight_sf
    low, high = interval(args, name)
    centre = block_sums(Rows.of(*args[:2]), Columns.of(*args[2:])).total()[0]
    share = 0.0
    for kernel in simulate.kernels():
        if kernel.accumulator == name:
            actual = kernel.linear(*args, rng)
            room = np.where(actual > centre, high - centre, centre - low)
            share = max(share, float((np.abs(actual - centre) / np.where(room > 0, room, 1)).max()))
    assert 0.2 < share <= 1


@pytest.mark.parametrize(
    ("kernel", "too_narrow"),
    [
        (simulate.plain("by-sign", "away"), "fp32-ordered"),
        (simulate.plain("by-sign", "up"), "sm100-mxf8f6f4"),
        (simulate.hopper_e4m3(), "fp32"),
    ],
    ids=lambda v: getattr(v, "name", v),
)
def test_a_kernel_of_a_wider_class_leaves_a_narrower_interval(kernel, too_narrow):
    rng = np.random.default_rng(4)
    args = operands(rng, rows=4, columns=64, depth=1024, octaves=10)
    low, high = interval(args, too_narrow)
    actual = kernel.linear(*args, rng)
    assert ((actual < low) | (actual > high)).any()


def test_classes_nest():
    """fp32 contains fp32-ordered contains sm100: a set may only grow with its freedom."""
    args = operands(np.random.default_rng(5), rows=3, columns=40, depth=512, octaves=8)
    ends = [interval(args, n) for n in ("sm100-mxf8f6f4", "fp32-ordered", "fp32")]
    for (low, high), (wider_low, wider_high) in pairwise(ends):
        assert (wider_low <= low).all()
        assert (high <= wider_high).all()


@pytest.mark.parametrize("name", CLASSES)
def test_small_integers_leave_no_freedom(name):
    """One scale, codes of few bits: every partial sum is exact in every class."""
    rng = np.random.default_rng(6)
    codes = np.where(rng.random((2, 256)) < 0.5, 0x38, 0xB8).astype(np.uint8)  # +-1
    packed = np.full((4, 128), 0x22, np.uint8)  # 1.0
    args = codes, np.full((2, 8), 120, np.uint8), packed, np.full((4, 8), 125, np.uint8)
    low, high = interval(args, name)
    assert np.array_equal(low, high)


@pytest.mark.parametrize("name", CLASSES)
def test_one_odd_bit_too_many_leaves_freedom(name):
    """A term 2**26 below a sum of the other terms: somebody rounds it away."""
    codes = np.zeros((1, 256), np.uint8)
    codes[0, :32], codes[0, 32] = 0x7E, 0x38
    packed = np.full((1, 128), 0x77, np.uint8)
    sf = np.full((1, 8), 127, np.uint8)
    sf[0, 1] = 127 - 28
    low, high = interval((codes, sf, packed, np.full((1, 8), 127, np.uint8)), name)
    assert (low < high).all()
    assert low.item() <= 32 * 448 * 6 <= high.item()


@pytest.mark.parametrize(
    ("kernel", "scale"),
    [(simulate.hopper_e4m3(), 127), (simulate.blackwell_mxf8f6f4(), 117)],
    ids=lambda v: getattr(v, "name", ""),
)
@pytest.mark.parametrize("sign", [0, 0x80])
def test_a_running_sum_lost_in_alignment_moves_the_result_away_from_zero(kernel, scale, sign):
    """A small sum of the other sign than the large term after it: truncated to nothing first."""
    codes = np.zeros((1, 128), np.uint8)
    codes[0, 0], codes[0, 32] = 0x39 | sign ^ 0x80, 0x7E | sign
    packed = np.zeros((1, 64), np.uint8)
    packed[0, [0, 16]] = 3, 7
    sf = np.full((1, 4), 127, np.uint8)
    sf[0, :2] = scale, 135
    args = codes, sf, packed, np.full((1, 4), 127, np.uint8)
    actual = kernel.linear(*args, np.random.default_rng(0)).item()
    assert abs(actual) == 448 * 6 * 256
    low, high = interval(args, kernel.accumulator)
    assert low.item() <= actual <= high.item()


def test_sums_that_may_overflow_have_infinite_ends():
    """inf - inf of an unlucky order is covered by both ends being infinite."""
    codes = np.full((1, 128), 0x7E, np.uint8)
    codes[0, 64:] |= 0x80
    packed = np.full((1, 64), 0x77, np.uint8)
    args = codes, np.full((1, 4), 254, np.uint8), packed, np.full((1, 4), 127, np.uint8)
    low, high = interval(args, "fp32")
    assert (low.item(), high.item()) == (-np.inf, np.inf)
    positive = codes & 0x7F
    low, high = interval((positive, *args[1:]), "fp32-ordered")
    assert low.item() >= 0
    assert high.item() == np.inf


def test_exact_with_uncertain_codes_allows_for_float64_s_own_rounding():
    """Three blocks of an interval, whose float64 sum is not the sum: 1, 2^-60 and -1."""
    ends = np.array([1.0, 2.0**-60, -1.0]).reshape(3, 1, 1)
    size, top = np.abs(ends), np.floor(np.log2(np.abs(ends)))
    blocks = Blocks(ends, ends, np.maximum(ends, 0), np.maximum(-ends, 0), top, top, top)
    assert blocks.total()[0].item() == 0.0
    low, high = bounds.result_interval(blocks, accumulator("exact"))
    assert low.item() <= 2.0**-60 <= high.item()
    assert high.item() <= bounds.SLACK * size.sum()
    small = Blocks(*(part[:1] for part in (ends, ends, ends, 0 * ends, top, top, top)))
    assert [end.item() for end in bounds.result_interval(small, accumulator("exact"))] == [1, 1]


def test_nan_stays_nan():
    codes = np.full((1, 32), 0x7F, np.uint8)
    one = np.full((1, 1), 127, np.uint8)
    for name in ACCUMULATORS:
        low, high = interval((codes, one, np.full((1, 16), 0x22, np.uint8), one), name)
        assert np.isnan(low).all()
        assert np.isnan(high).all()


def test_truncation_is_that_of_the_unit():
    value = np.array([1.0, -1.9999999, 3.0 + 2.0**-12, -(2.0**-130) * 1.999])
    cut = bounds.toward_zero(value, 13)
    assert cut.tolist() == [1.0, -(2 - 2.0**-13), 3.0 + 2.0**-12, -(2.0**-130) * (2 - 2.0**-9)]
    assert all(Fraction(v).denominator <= 2**139 for v in cut)


def test_promotion_costs_one_rounding_and_saves_alignment():
    """Without promotion the 13-bit running sum loses more than with it."""
    args = operands(np.random.default_rng(8), rows=2, columns=32, depth=1024, octaves=4)
    blocks = block_sums(Rows.of(*args[:2]), Columns.of(*args[2:]))
    promoted = accumulator("sm90-e4m3")
    low, high = bounds.result_interval(blocks, promoted)
    far_low, far_high = bounds.result_interval(blocks, replace(promoted, promote=None))
    assert (high - low).mean() < (far_high - far_low).mean()
