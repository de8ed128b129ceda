"""The FP8 instruction, followed product by product, against mmasim's model of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.backends import simulate
from megamoe.oracle import stepwise as module
from megamoe.oracle.bounds import result_interval
from megamoe.oracle.linear import Columns, Rows, block_sums
from megamoe.oracle.stepwise import replay
from megamoe.oracle.units import HOPPER_8BIT, fused, narrowed
from megamoe.spec.accumulators import accumulator
from megamoe.spec.formats import E4M3_TABLE

SM90 = accumulator("sm90-e4m3")
KERNELS = (simulate.hopper_e4m3("e2m1"), simulate.hopper_e4m3("e4m3"))


def operands(seed, depth=256, columns=12, low=100, octaves=8, nibbles=0xFF, zeros=0.0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (2, depth), dtype=np.uint8)
    codes[((codes & 0x7F) == 0x7F) | (rng.random(codes.shape) < zeros)] = 0
    packed = rng.integers(0, 256, (columns, depth // 2), dtype=np.uint8) & nibbles
    sf, weight_sf = (
        rng.integers(low, low + octaves, (n, depth // 32)).astype(np.uint8) for n in (2, columns)
    )
    return codes, sf, packed, weight_sf


def ends(args):
    return replay(Rows.of(*args[:2]), Columns.of(*args[2:]), SM90)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    depth=st.sampled_from([128, 256, 384]),
    low=st.sampled_from([2, 20, 60, 110, 120]),
    octaves=st.sampled_from([1, 4, 20]),
    nibbles=st.sampled_from([0xFF, 0x99]),  # 0x99: only 0.5 and 0, where the two formats differ
    zeros=st.sampled_from([0.0, 0.9, 0.99]),
)
def test_both_models_of_the_instruction_lie_inside(seed, depth, low, octaves, nibbles, zeros):
    args = operands(seed, depth, 12, low, octaves, nibbles, zeros)
    lowest, highest = ends(args)
    for kernel in KERNELS:
        actual = kernel.linear(*args, np.random.default_rng(0))
        assert ((actual >= lowest) & (actual <= highest)).all(), kernel.name


def test_one_run_of_128_is_one_of_the_two_results_bit_for_bit():
    """Nothing is promoted yet but onto zero, so nothing is open but the format of the weight."""
    args = operands(1, depth=128, columns=200)
    results = [kernel.linear(*args, np.random.default_rng(0)) for kernel in KERNELS]
    lowest, highest = ends(args)
    assert np.array_equal(lowest, np.minimum(*results))
    assert np.array_equal(highest, np.maximum(*results))
    assert (lowest < highest).any()  # the format of 0.5 does show


def test_it_is_inside_the_bound_and_far_narrower():
    args = operands(2, depth=1024, columns=64)
    lowest, highest = ends(args)
    low, high = result_interval(block_sums(Rows.of(*args[:2]), Columns.of(*args[2:])), SM90)
    assert ((low <= lowest) & (highest <= high)).all()
    assert (highest - lowest).mean() < 0.02 * (high - low).mean()


def one_in_each_run(*terms):
    """Operands with one product, a sign and an exponent, at the start of each run of 128."""
    codes = np.zeros((1, 128 * len(terms)), np.uint8)
    sf, weight_sf = (np.full((1, 4 * len(terms)), 127, np.uint8) for _ in range(2))
    for i, (sign, exponent) in enumerate(terms):
        codes[0, 128 * i] = 0x38 if sign > 0 else 0xB8
        sf[0, 4 * i] = 127 + exponent // 2
        weight_sf[0, 4 * i] = 127 + exponent - exponent // 2
    return codes, sf, np.full((1, codes.shape[1] // 2), 0x22, np.uint8), weight_sf


@pytest.mark.parametrize(
    ("terms", "low", "high"),
    [
        ([(1, 0), (1, -24)], 1, 1 + 2.0**-23),
        ([(1, 0), (1, -23), (1, -24)], 1 + 2.0**-23, 1 + 2.0**-22),  # nearest is the upper one
        ([(1, 0), (-1, -80)], 1 - 2.0**-24, 1),  # float64 cannot hold the sum
        ([(1, 0), (1, -80)], 1, 1 + 2.0**-23),
        ([(1, 0), (1, -10)], 1 + 2.0**-10, 1 + 2.0**-10),
    ],
)
def test_a_promotion_may_round_either_way(terms, low, high):
    lowest, highest = ends(one_in_each_run(*terms))
    assert (lowest.item(), highest.item()) == (low, high)


@pytest.mark.parametrize(
    ("exponents", "result"),
    [
        ((-140,), 2.0**-135),  # thirty-two of them: nothing is cut above 2^-146
        ((-147,), 0.0),  # that far below the exponent at which a zero is aligned
        ((-135, -141), 2.0**-130),  # a subnormal running sum is aligned as 2^-126
        ((-132, -140), 2.0**-127),
        ((-131, -139), 2.0**-126 + 2.0**-134),
    ],
)
def test_at_the_lower_end_of_the_range(exponents, result):
    """Groups of thirty-two equal products, one group for each exponent."""
    codes = np.zeros((1, 128), np.uint8)
    sf, weight_sf = (np.full((1, 4), 127, np.uint8) for _ in range(2))
    for group, exponent in enumerate(exponents):
        codes[0, 32 * group : 32 * group + 32] = 0x38
        sf[0, group], weight_sf[0, group] = 127 - 100, 127 + exponent + 100
    args = codes, sf, np.full((1, 64), 0x22, np.uint8), weight_sf
    for kernel in KERNELS:
        assert kernel.linear(*args, np.random.default_rng(0)).item() == result
    lowest, highest = ends(args)
    assert (lowest.item(), highest.item()) == (result, result)


def test_pieces_do_not_show(monkeypatch):
    args = operands(3, columns=70)
    whole = ends(args)
    monkeypatch.setattr(module, "PIECE", 1)
    for one, other in zip(whole, ends(args), strict=True):
        assert np.array_equal(one, other)


def test_nan_stays_nan():
    codes, sf, packed, weight_sf = operands(4)
    codes[0, 40], sf[1, 0] = 0x7F, 0xFF
    lowest, highest = ends((codes, sf, packed, weight_sf))
    assert np.isnan(lowest).all()
    assert np.isnan(highest).all()


def test_a_class_without_an_instruction_is_refused():
    args = operands(5)
    with pytest.raises(ValueError, match="class fp32 has no instruction to follow"):
        replay(Rows.of(*args[:2]), Columns.of(*args[2:]), accumulator("fp32"))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_step_is_that_of_the_bit_model(seed):
    """A step whose scale is apart from its products, as the replay has it."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 127, (2, 32, 24))
    weights = E4M3_TABLE[rng.integers(0, 127, (32, 24))] * rng.choice([-1, 1], (32, 24))
    values = np.where(rng.random(codes.shape) < 0.3, 0, E4M3_TABLE[codes])
    fields = module._token_fields(values).astype(int) + module._token_fields(weights)
    scale = rng.integers(-90, 40, (2, 24)).astype(float)
    running = narrowed(np.ldexp(rng.uniform(-1, 1, (2, 24)), rng.integers(-90, 40, (2, 24))), 13)
    running[rng.random((2, 24)) < 0.3] = 0
    products = (values * weights).astype(np.float32)
    actual = module._step(HOPPER_8BIT, products, fields.max(axis=1).astype(np.int8), scale, running)
    scaled = np.ldexp(products.astype(float), scale[:, None].astype(int))
    expected = fused(HOPPER_8BIT, np.moveaxis(scaled, 1, -1),
                     np.moveaxis(fields + scale[:, None].astype(int), 1, -1), running)  # fmt: skip
    assert np.array_equal(actual + 0.0, expected)
