"""The bit models of tensor cores against every witness at hand.

MMA-Sim is one (package ``mmasim``). Words that real chips gave are another: public recordings of
B200 and H100, read from ``MEGAMOE_SILICON`` or from ``shared/silicon`` beside the checkout; they
are no part of this project, and the test says so where they are missing.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmasim.arithmetic.fdpa import MMA_T_FDPA

from megamoe.backends import simulate
from megamoe.oracle import units
from megamoe.oracle.linear import Columns, Rows
from megamoe.oracle.units import (
    BLACKWELL_16BIT,
    BLACKWELL_MX,
    HOPPER_8BIT,
    HOPPER_16BIT,
    INTERLEAVED,
    chain,
    dense,
    fused,
    words,
)
from tests.test_bounds_search import draw

SEEDS = st.integers(0, 2**32 - 1)
KERNELS = {
    "blackwell-mx": (simulate.blackwell_mxf8f6f4(), BLACKWELL_MX, False),
    "hopper-16bit": (simulate.hopper_bf16(), HOPPER_16BIT, True),
}


def same(one, other):
    return (one == other) | (np.isnan(one) & np.isnan(other))


def chained(kernel, unit, folded, args):
    """Results of both; None where the operands are no bfloat16 numbers."""
    rows, columns = Rows.of(*args[:2]), Columns.of(*args[2:])
    try:
        with np.errstate(all="ignore"):
            expected = kernel.linear(*args, np.random.default_rng(0))
    except simulate.NotAMemberError:
        with pytest.raises(ValueError, match="not a bfloat16 number"):
            chain(unit, rows, columns, folded=folded)
        return None
    return chain(unit, rows, columns, folded=folded), expected


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=40, deadline=None)
@given(seed=SEEDS)
def test_a_chain_is_mmasim_s_bit_for_bit_anywhere_in_the_range(name, seed):
    both = chained(*KERNELS[name], draw(np.random.default_rng(seed), 3, 32))
    assert both is None or same(*both).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_a_chain_is_mmasim_s_in_many_outputs(name):
    rng, count = np.random.default_rng(20), 0
    while count < 50_000:
        both = chained(*KERNELS[name], draw(rng, 8, 256))
        if both is not None:
            assert same(*both).all()
            count += both[0].size


@pytest.mark.parametrize("name", KERNELS)
def test_the_path_with_cut_bits_is_taken_and_the_other_too(name, monkeypatch):
    """Otherwise the comparisons above say nothing about one of them."""
    sizes = []

    def counting(unit, products, fields, running):
        sizes.append(len(products))
        return fused(unit, products, fields, running)

    monkeypatch.setattr(units, "fused", counting)
    _, unit, folded = KERNELS[name]
    problem = simulate.problem(7, hidden=512)
    hidden = problem.hidden_states.view(torch.int16).numpy().view(np.uint16)
    rows = Rows.of(*simulate.stage(hidden))
    columns = Columns.of(problem.w13_weight[0].numpy(), problem.w13_weight_scale[0].numpy())
    outputs = chain(unit, rows, columns, folded=folded).size
    steps = outputs * rows.exponent.shape[1] * (32 // unit.step)
    assert 0 < sum(sizes) < steps


def test_the_order_of_a_group_decides_which_sixteen_meet():
    """49152 is there. Seven products of 2688 lift it above 2^16, from where on 2^-10 is cut off.

    Ascending, eight products of 2^-10 come in the same step, before; interleaved, all sixteen come
    in the next one."""
    codes, nibbles = np.zeros((1, 64), np.uint8), np.zeros((1, 64), np.uint8)
    codes[0, 0], nibbles[0, 0] = 0x7C, 6  # 384 * 4 * 2^5
    first, tiny = 32 + np.array([0, 1, 2, 3, 8, 9, 10]), 32 + np.flatnonzero(np.arange(32) & 4)
    codes[0, first], nibbles[0, first] = 0x7E, 7  # 448 * 6
    codes[0, tiny], nibbles[0, tiny] = 0x01, 1  # 2^-9 * 0.5
    packed = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    rows = Rows.of(codes, np.array([[132, 127]], np.uint8))
    columns = Columns.of(packed, np.full((1, 2), 127, np.uint8))
    assert chain(HOPPER_16BIT, rows, columns, folded=True).item() == 67968 + 2.0**-7
    assert chain(HOPPER_16BIT, rows, columns, folded=True, order=INTERLEAVED).item() == 67968


# --- dense steps ------------------------------------------------------------------------------

DENSE = {
    "bf16": (HOPPER_16BIT, torch.bfloat16, "RZ-FP32", -126),
    "fp16": (HOPPER_16BIT, torch.float16, "RZ-FP32", -14),
    "e4m3": (HOPPER_8BIT, torch.float8_e4m3fn, "RZ-E8M13", -6),
}


def operands(rng, dtype, count):
    """Bits of the whole format, specials among them; sparse, cancelling, or of few exponents."""
    width = 8 if dtype == torch.float8_e4m3fn else 16
    shape = (count, 32)
    bits = rng.integers(0, 1 << width, shape)
    kind = int(rng.integers(4))
    if kind:  # finite numbers only, of exponents near each other
        high = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00, torch.float8_e4m3fn: 0x38}[dtype]
        step = {torch.bfloat16: 7, torch.float16: 10, torch.float8_e4m3fn: 3}[dtype]
        spread = int(rng.choice([1, 4, 6])) << step
        bits = high + rng.integers(-spread, spread, shape)
        bits = np.where(rng.random(shape) < 0.5, bits | 1 << (width - 1), bits)
    if kind == 2:
        bits[rng.random(shape) < 0.7] = 0
    if kind == 3:  # subnormal operands
        bits[rng.random(shape) < 0.5] &= (1 << (width - 1)) | 3
    unsigned = {8: np.uint8, 16: np.uint16}[width]
    return torch.from_numpy(bits.astype(unsigned).view(f"int{width}")).view(dtype)


@pytest.mark.parametrize("name", DENSE)
@settings(max_examples=60, deadline=None)
@given(seed=SEEDS)
def test_a_step_is_mmasim_s_word_for_word(name, seed):
    unit, dtype, rounding, smallest = DENSE[name]
    model = MMA_T_FDPA(unit.align_bits, rounding, unit.step, unit.floor, name, name)
    rng = np.random.default_rng(seed)
    a, b = operands(rng, dtype, 64), operands(rng, dtype, 64)
    c = np.where(rng.random(64) < 0.3, 0, np.ldexp(rng.uniform(-1, 1, 64), rng.integers(-30, 30)))
    with np.errstate(all="ignore"):
        c = units.narrowed(c, unit.result_bits)
        expected = model.dpa(a, b, torch.from_numpy(c).float()).numpy().view(np.uint32)
        actual = dense(unit, a.double().numpy(), b.double().numpy(), c, smallest)
    assert np.array_equal(words(actual), expected)


def test_an_infinity_beside_finite_products_beyond_fp32_is_an_infinity():
    a = np.array([[-(2.0**100), np.inf], [2.0**100, -np.inf], [np.inf, -np.inf], [0.0, np.inf]])
    b = np.array([[2.0**90, 2.0**117], [2.0**90, 2.0**117], [2.0**117, 2.0**117], [1.0, 0.0]])
    actual = dense(HOPPER_16BIT, a, b, np.zeros(4), -126)
    assert words(actual).tolist() == [0x7F800000, 0xFF800000, units.NAN_WORD, units.NAN_WORD]


def test_a_zero_is_plus_zero_and_nan_is_one_word():
    minus = np.array([[-1.0, 1.0], [np.nan, 1.0], [np.inf, -np.inf], [-(2.0**-20), 0.0]])
    actual = dense(
        BLACKWELL_16BIT, minus, np.ones_like(minus), np.array([-0.0, 0, 0, 2.0**20]), -126
    )
    assert words(actual).tolist() == [0, units.NAN_WORD, units.NAN_WORD, 0x49800000]


# --- words of real chips ----------------------------------------------------------------------

SILICON = Path(os.environ.get("MEGAMOE_SILICON", Path(__file__).parents[2] / "shared" / "silicon"))
RECORDINGS = {
    "b200-bf16": (BLACKWELL_16BIT, -126, True),
    "b200-fp16": (BLACKWELL_16BIT, -14, True),
    "h100-bf16": (HOPPER_16BIT, -126, True),
    "h100-e4m3": (HOPPER_8BIT, -6, False),
    "h100-e5m2": (HOPPER_8BIT, -14, False),
    "h200-e4m3": (HOPPER_8BIT, -6, False),
}
"""File: unit, field of the operands' subnormals, whether the running sum ``c`` took part."""


@pytest.mark.parametrize("name", RECORDINGS)
def test_the_words_of_a_real_chip(name):
    path = SILICON / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"no public recording {name}.npz; set MEGAMOE_SILICON to their folder")
    data = np.load(path)
    unit, smallest, has_addend = RECORDINGS[name]
    a, b = (data[key].view(np.float32).astype(np.float64) for key in "ab")
    c = data["c"].view(np.float32).astype(np.float64) if has_addend else np.zeros(len(a))
    assert np.array_equal(words(dense(unit, a, b, c, smallest)), data["d"])


@pytest.mark.parametrize("name", RECORDINGS)
@pytest.mark.parametrize("other", [-1, 1])
def test_another_number_of_bits_is_refuted_by_the_words(name, other):
    path = SILICON / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"no public recording {name}.npz; set MEGAMOE_SILICON to their folder")
    data = np.load(path)
    unit, smallest, has_addend = RECORDINGS[name]
    unit = units.Unit("other", unit.step, unit.align_bits + other, unit.result_bits, "none")
    a, b = (data[key].view(np.float32).astype(np.float64) for key in "ab")
    c = data["c"].view(np.float32).astype(np.float64) if has_addend else np.zeros(len(a))
    assert (words(dense(unit, a, b, c, smallest)) != data["d"]).sum() > 100
