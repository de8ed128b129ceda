"""The combine: the place of a shared expert's row, E4M3 rows, and what is added in the end."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from megamoe.oracle.combine import Combine, fp8_rows
from megamoe.spec.contract import BASE, MEGAMOE_2026_11
from megamoe.spec.formats import bf16_decode, bf16_key, bf16_round, e4m3_encode, e4m3_value


def bf16(*values: float) -> np.ndarray:
    return bf16_round(np.array([values]))


def combine(slots: int, contract=BASE, **more) -> Combine:
    live = np.ones((1, slots), bool)
    return Combine(live, np.ones((1, slots), np.float32), contract, **more)


@pytest.mark.parametrize(("contract", "want"), [(BASE, 0.0), (MEGAMOE_2026_11, 2.0**-30)])
def test_a_shared_row_is_added_last_or_first(contract, want):
    """(-1 + 2^-30) + 1 loses the small row, (1 - 1) + 2^-30 does not."""
    rows = np.stack([bf16(-1.0), bf16(2.0**-30)], 1)
    y = combine(2, contract).point(rows, bf16(1.0))
    assert bf16_decode(y).tolist() == [[want]]


def test_a_shared_row_comes_to_a_token_without_slots():
    call = replace(combine(1), live=np.zeros((1, 1), bool))
    assert bf16_decode(call.point(bf16(5.0)[:, None], bf16(3.0))).tolist() == [[3.0]]


def test_what_is_added_in_the_end_meets_a_rounded_result():
    """256 + 1 is no bfloat16 (256 or 258): rounding first loses the 1, adding in fp32 keeps it."""
    rows = np.stack([bf16(256.0), bf16(1.0)], 1)
    y = combine(2, output=bf16(1.0)).point(rows)
    assert bf16_decode(y).tolist() == [[256.0]]


def row_of_e4m3(values: list[Fraction]) -> list[Fraction]:
    amax = np.float32(max(map(abs, values)))
    scaled = Fraction(float(amax * (np.float32(1) / np.float32(448))))
    e = next(e for e in range(-126, 128) if Fraction(2) ** e >= scaled)
    codes = [e4m3_encode(v / Fraction(2) ** e) for v in values]
    return [Fraction(e4m3_value(c)) * Fraction(2) ** e for c in codes]


def test_rows_as_e4m3_have_a_scale_for_128_channels():
    rng = np.random.default_rng(0)
    rows = bf16_round(np.ldexp(rng.normal(size=(3, 256)), rng.integers(-20, 20, (3, 256))))
    low, high = fp8_rows(rows, rows)
    assert (low == high).all()
    for row, got in zip(bf16_decode(rows), low, strict=True):
        exact = [Fraction(float(v)) for v in row]
        want = row_of_e4m3(exact[:128]) + row_of_e4m3(exact[128:])
        assert [Fraction(float(v)) for v in got] == want


def test_rows_of_zero_infinity_and_nan():
    """An amax of 0 reads as 0; an infinite one as -inf of each, NaN of a zero; NaN counts not."""
    zero, infinite, nan = np.zeros((1, 128)), np.ones((1, 128)), np.ones((1, 128))
    infinite[0, :2] = np.inf, 0
    nan[0, 5] = np.nan
    assert (fp8_rows(bf16_round(zero), bf16_round(zero))[0] == 0).all()
    bits = bf16_round(infinite)
    read = fp8_rows(bits, bits)[0][0]
    assert np.isnan(read[1]) and np.isneginf(np.delete(read, 1)).all()
    bits = bf16_round(nan)
    read = fp8_rows(bits, bits)[0][0]
    assert np.isnan(read[5]) and (np.delete(read, 5) == 1).all()


def test_rows_that_are_known_as_intervals_enclose_every_row_between():
    """Also where the largest member decides between two scales."""
    rng = np.random.default_rng(1)
    centre = bf16_key(bf16_round(rng.normal(size=(4, 128))))
    centre[:, 7] = bf16_key(bf16_round(np.array([448.0 * 2.0**-8])))
    wide = rng.integers(0, 9, centre.shape)

    def bits(key: np.ndarray) -> np.ndarray:
        return np.where(key < 0, 0x8000 | -key, key).astype(np.uint16)

    low, high = fp8_rows(bits(centre - wide), bits(centre + wide))
    for _ in range(200):
        row = bits(centre + rng.integers(-wide, wide + 1))
        got = fp8_rows(row, row)[0]
        assert (low <= got).all() and (got <= high).all()
