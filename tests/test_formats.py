"""The number formats: scalar specification, vector twin, ml_dtypes and torch, over every input."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamoe.spec import formats as f

BYTES = np.arange(256, dtype=np.uint8)
BF16 = np.arange(1 << 16, dtype=np.uint16)


def exact(value: float) -> Fraction:
    return Fraction(*float(value).as_integer_ratio())


# --- E4M3 -------------------------------------------------------------------------------------


def test_e4m3_decode_every_byte_against_the_specification():
    decoded = f.e4m3_decode(BYTES)
    for code in range(256):
        value = f.e4m3_value(code)
        if value is None:
            assert np.isnan(decoded[code])
        else:
            assert exact(decoded[code]) == value
            assert np.signbit(decoded[code]) == (code >= 0x80)


def test_e4m3_decode_every_byte_against_ml_dtypes_and_torch():
    theirs = BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(f.e4m3_decode(BYTES), theirs)
    torchs = torch.from_numpy(BYTES.copy()).view(torch.float8_e4m3fn).double().numpy()
    np.testing.assert_array_equal(f.e4m3_decode(BYTES), torchs)


def test_e4m3_known_values():
    assert f.e4m3_value(0x7E) == 448
    assert f.e4m3_value(0x01) == Fraction(1, 512)
    assert f.e4m3_value(0x08) == Fraction(1, 64)
    assert f.e4m3_value(0xB8) == -1
    assert f.e4m3_value(0x7F) is None
    assert f.e4m3_value(0xFF) is None


def test_e4m3_cast_every_bfloat16_against_ml_dtypes_and_torch():
    """Where the casts are defined alike: up to 464, the last value that rounds to 448."""
    values = f.bf16_decode(BF16)
    ours = f.e4m3_cast(values)
    in_range = np.abs(values) <= 464
    inside = values[in_range]
    np.testing.assert_array_equal(
        ours[in_range], inside.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )
    torchs = torch.from_numpy(inside).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(ours[in_range], torchs)


def test_e4m3_cast_every_bfloat16_outside_the_range():
    """Saturates, infinities included; every NaN is 0x7F, whatever its sign."""
    values = f.bf16_decode(BF16)
    ours = f.e4m3_cast(values)
    assert set(ours[values > 464]) == {0x7E}
    assert set(ours[values < -464]) == {0xFE}
    assert set(ours[np.isnan(values)]) == {0x7F}


def test_e4m3_cast_every_bfloat16_against_the_specification():
    """Every magnitude from 2^-11 to 1022; outside is zero or saturation, tested above."""
    values = f.bf16_decode(BF16[0x3A00:0x4480])
    codes = f.e4m3_cast(values)
    for value, code in zip(values, codes, strict=True):
        assert f.e4m3_encode(exact(value)) == code, value
    np.testing.assert_array_equal(f.e4m3_cast(-values), codes | 0x80)


@pytest.mark.parametrize("zero,code", [(0.0, 0x00), (-0.0, 0x80)])
def test_e4m3_cast_keeps_the_sign_of_zero(zero, code):
    assert f.e4m3_cast(np.array([zero])) == [code]
    assert f.e4m3_encode(Fraction(0), negative_zero=bool(code)) == code
    tiny = np.array([np.copysign(1e-30, zero)])
    assert f.e4m3_cast(tiny) == [code]
    assert f.e4m3_encode(exact(tiny[0])) == code


def test_e4m3_cast_at_every_tie_and_one_step_to_either_side():
    """Midpoints of all neighbours: to even; from float64 and float32 alike."""
    values = f.E4M3_TABLE[:0x7F]
    ties = (values[:-1] + values[1:]) / 2
    lower = np.arange(0x7E)
    even = lower + (lower & 1)
    np.testing.assert_array_equal(f.e4m3_cast(ties), even)
    np.testing.assert_array_equal(f.e4m3_cast(np.nextafter(ties, 0)), lower)
    np.testing.assert_array_equal(f.e4m3_cast(np.nextafter(ties, 1e9)), lower + 1)
    single = ties.astype(np.float32)
    np.testing.assert_array_equal(f.e4m3_cast(single), even)
    np.testing.assert_array_equal(f.e4m3_cast(np.nextafter(single, np.float32(0))), lower)
    np.testing.assert_array_equal(f.e4m3_cast(-ties), even | 0x80)


@given(st.floats(-500, 500))
def test_e4m3_cast_rounds_float64_once(value):
    code = f.e4m3_cast(np.array([value]))[0]
    assert code == f.e4m3_encode(exact(value), negative_zero=bool(np.signbit(value)))


def test_e4m3_round_trip():
    finite = BYTES[(BYTES & 0x7F) != 0x7F]
    np.testing.assert_array_equal(f.e4m3_cast(f.e4m3_decode(finite)), finite)


def test_e4m3_key_is_the_order_of_the_values():
    finite = BYTES[(BYTES & 0x7F) != 0x7F]
    keys = f.e4m3_key(finite)
    assert keys.dtype == np.int16
    order = np.argsort(keys, kind="stable")
    assert (np.diff(f.e4m3_decode(finite)[order]) >= 0).all()
    assert sorted(set(keys.tolist())) == list(range(-126, 127))
    assert f.e4m3_key(np.array([0x00, 0x80], np.uint8)).tolist() == [0, 0]


# --- E2M1 -------------------------------------------------------------------------------------


def test_e2m1_every_nibble():
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert [f.e2m1_value(n) for n in range(8)] == values
    assert [f.e2m1_value(n) for n in range(8, 16)] == [-v for v in values]
    assert f.E2M1_TABLE.tolist() == [float(f.e2m1_value(n)) for n in range(16)]
    assert np.signbit(f.E2M1_TABLE).tolist() == [False] * 8 + [True] * 8


def test_e2m1_every_nibble_against_ml_dtypes():
    theirs = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    np.testing.assert_array_equal(f.E2M1_TABLE, theirs)
    np.testing.assert_array_equal(np.signbit(f.E2M1_TABLE), np.signbit(theirs))


def test_e2m1_low_nibble_is_the_even_index():
    assert f.e2m1_unpack(np.array([[0x2F]], np.uint8)).tolist() == [[0xF, 0x2]]
    assert f.e2m1_decode(np.array([[0x2F]], np.uint8)).tolist() == [[-6.0, 1.0]]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_e2m1_decode_every_byte(dtype):
    decoded = f.e2m1_decode(BYTES[:, None], dtype)
    assert decoded.dtype == dtype
    expected = [[float(f.e2m1_value(b & 15)), float(f.e2m1_value(b >> 4))] for b in range(256)]
    assert decoded.tolist() == expected


def test_e2m1_pack_round_trips_every_byte():
    grid = BYTES.reshape(2, 8, 16)
    np.testing.assert_array_equal(f.e2m1_pack(f.e2m1_unpack(grid)), grid)


def test_e2m1_pack_refuses_odd_lengths_and_bytes():
    with pytest.raises(ValueError, match=r"even last dimension, got \(1, 3\)"):
        f.e2m1_pack(np.zeros((1, 3), np.uint8))
    with pytest.raises(ValueError, match="nibbles, 0 to 15"):
        f.e2m1_pack(np.array([[1, 16]], np.uint8))


# --- UE8M0 ------------------------------------------------------------------------------------


def test_ue8m0_every_byte_against_the_specification_and_ml_dtypes():
    decoded = f.ue8m0_decode(BYTES)
    theirs = BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    np.testing.assert_array_equal(decoded, theirs)
    assert np.isnan(decoded[255])
    assert f.ue8m0_value(255) is None
    assert [exact(v) for v in decoded[:255]] == [f.ue8m0_value(b) for b in range(255)]


@given(st.floats(0, width=32, allow_infinity=False))
def test_ue8m0_ceil_is_the_least_power_of_two_not_below(value):
    """Above 2^-127 the byte's power covers the scale and half of it would not.

    At 0 the byte is 0, and a subnormal scale gets 1, which is one more than needed for those
    below 2^-127: the exponent is read off the field, not the value.
    """
    byte = int(f.ue8m0_ceil(np.array([value], np.float32))[0])
    if value == 0:
        assert byte == 0
    elif value < 2.0**-126:
        assert byte == 1
    else:
        assert 2.0 ** (byte - 128) < value <= 2.0 ** (byte - 127)


@pytest.mark.parametrize("k", [-126, -1, 0, 1, 127])
def test_ue8m0_ceil_at_powers_of_two_and_one_step_either_side(k):
    power = np.float32(2.0**k)
    around = np.array([power, np.nextafter(power, np.float32(np.inf))], np.float32)
    assert f.ue8m0_ceil(around).tolist() == [k + 127, k + 128]
    below = np.nextafter(power, np.float32(0))
    assert f.ue8m0_ceil(np.array([below])).tolist() == [max(k + 127, 1)]


def test_ue8m0_ceil_of_infinity_and_nan():
    assert f.ue8m0_ceil(np.array([np.inf, np.nan], np.float32)).tolist() == [255, 256]


def test_sf_words_hold_the_first_group_in_the_low_byte():
    packed = f.pack_sf(np.array([[0x01, 0x02, 0x03, 0x84]], np.uint8))
    assert packed.dtype == np.int32
    assert packed.tolist() == [[0x84030201 - (1 << 32)]]
    assert f.unpack_sf(packed).tolist() == [[0x01, 0x02, 0x03, 0x84]]


def test_sf_round_trip_of_every_byte():
    grid = BYTES.reshape(4, 64)
    np.testing.assert_array_equal(f.unpack_sf(f.pack_sf(grid)), grid)


def test_sf_packing_refuses_a_remainder():
    with pytest.raises(ValueError, match="four to an int32, got 5 a row"):
        f.pack_sf(np.zeros((1, 5), np.uint8))


@pytest.mark.parametrize(
    "decode,bad", [(f.e4m3_value, 256), (f.e2m1_value, 16), (f.ue8m0_value, -1)]
)
def test_codes_that_do_not_fit_are_refused(decode, bad):
    with pytest.raises(ValueError, match=rf"code {bad} does not fit in \d bits"):
        decode(bad)


# --- bfloat16 ---------------------------------------------------------------------------------


def test_bf16_decode_every_pattern_against_torch():
    torchs = torch.from_numpy(BF16.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(f.bf16_decode(BF16).view(np.uint32), torchs.view(np.uint32))


def test_bf16_round_trips_every_pattern():
    values = f.bf16_decode(BF16)
    number = ~np.isnan(values)
    for dtype in (np.float32, np.float64):
        with np.errstate(invalid="ignore"):
            back = f.bf16_round(values.astype(dtype))
        np.testing.assert_array_equal(back[number], BF16[number])
        assert set(back[~number]) == {0x7FC0}


def bf16_spec(value: float) -> int:
    """Nearest bfloat16 to a finite value by exact distance, ties to the even pattern."""
    sign = 0x8000 if np.signbit(value) else 0
    magnitude = abs(exact(value))
    low, high = 0, 0x7F80  # 0x7F80 stands for 2^128, where the next value would be
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bf16_exact(middle) <= magnitude else (low, middle)
    below, above = magnitude - bf16_exact(low), bf16_exact(high) - magnitude
    return sign | (low if below < above or (below == above and low % 2 == 0) else high)


def bf16_exact(pattern: int) -> Fraction:
    exponent, mantissa = pattern >> 7, pattern & 0x7F
    if exponent == 0:
        return Fraction(mantissa) * Fraction(2) ** -133
    return Fraction(128 + mantissa) * Fraction(2) ** (exponent - 134)


@given(st.floats(-(2.0**128), 2.0**128))
def test_bf16_round_of_float64_is_correct(value):
    assert f.bf16_round(np.array([value]))[0] == bf16_spec(value)


@given(
    st.integers(0, 0x7F7F), st.sampled_from([-1, 0, 1]), st.sampled_from([2**-45, 2**-28, 2**-10])
)
def test_bf16_round_does_not_round_twice(pattern, side, distance):
    """Near a tie between two bfloat16 values, closer than fp32 can tell.

    A detour over fp32 would land on the tie and then go to even, whichever side it came from.
    """
    tie = float((bf16_exact(pattern) + bf16_exact(pattern + 1)) / 2)
    value = tie * (1 + side * distance)
    assert f.bf16_round(np.array([value]))[0] == bf16_spec(value)
    assert f.bf16_round(np.array([-value]))[0] == bf16_spec(-value)


def test_bf16_round_trap_by_hand():
    """1 + 2^-8 is the tie between 1 and 1 + 2^-7; a hair above it must go up."""
    trap = 1 + 2**-8 + 2**-40
    assert f.bf16_round(np.array([trap]))[0] == 0x3F81
    assert f.bf16_round(np.array([np.float32(trap)]))[0] == 0x3F80


def test_bf16_round_of_float32_against_torch():
    bits = np.random.default_rng(1).integers(0, 1 << 32, 200_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[~np.isnan(values)]
    torchs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(f.bf16_round(values), torchs)


def test_bf16_key_is_the_order_of_the_values():
    number = BF16[(BF16 & 0x7FFF) <= 0x7F80]
    keys = f.bf16_key(number)
    order = np.argsort(keys, kind="stable")
    values = f.bf16_decode(number)[order]
    assert (values[1:] >= values[:-1]).all()
    assert sorted(set(keys.tolist())) == list(range(-0x7F80, 0x7F81))
    back = f.bf16_from_key(keys)
    np.testing.assert_array_equal(back, np.where(number == 0x8000, 0, number))
