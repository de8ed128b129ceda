"""The two linears against a second, independent way: rational arithmetic, no float anywhere."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from megamoe.oracle.linear import Columns, Rows, block_sums, exact_dot, float_to_odd, sum_to_odd
from megamoe.oracle.mlp import linear
from megamoe.spec.accumulators import accumulator
from megamoe.spec.formats import E2M1_TABLE, E4M3_TABLE, e2m1_pack


def operands(seed: int, rows: int, columns: int, depth: int, octaves: int):
    """Random operands, every finite code, scales over ``octaves`` on either side."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, depth), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    packed = rng.integers(0, 256, (columns, depth // 2), dtype=np.uint8)
    sf = rng.integers(127 - octaves, 128, (rows, depth // 32), dtype=np.uint8)
    weight_sf = rng.integers(127 - octaves, 128, (columns, depth // 32), dtype=np.uint8)
    return codes, sf, packed, weight_sf


def reference(codes, sf, packed, weight_sf) -> list[list[Fraction]]:
    return [
        [exact_dot(c, s, p, w) for p, w in zip(packed, weight_sf, strict=True)]
        for c, s in zip(codes, sf, strict=True)
    ]


@pytest.mark.parametrize("octaves", [1, 6, 60])
def test_the_sum_is_the_rational_one_also_where_float64_cannot_hold_it(octaves):
    codes, sf, packed, weight_sf = operands(octaves, 3, 5, 256, octaves)
    out = linear(Rows.of(codes, sf), packed, weight_sf, [])["reference"]
    exact = block_sums(Rows.of(codes, sf), Columns.of(packed, weight_sf)).exact_in_float64()
    assert exact.all() == (octaves < 60)
    for row, values in enumerate(reference(codes, sf, packed, weight_sf)):
        for column, value in enumerate(values):
            if exact[row, column]:
                assert Fraction(float(out[row, column])) == value
            else:
                assert out[row, column] == float_to_odd(value)


def test_exact_dot_by_hand():
    codes = np.zeros(64, np.uint8)
    codes[[0, 33]] = [0x38, 0xB9]  # 1.0 and -1.125
    nibbles = np.zeros(64, np.uint8)
    nibbles[[0, 33]] = [7, 9]  # 6.0 and -0.5
    scales = np.array([127, 130], np.uint8), np.array([126, 127], np.uint8)
    value = exact_dot(codes, scales[0], e2m1_pack(nibbles), scales[1])
    assert value == 6 * Fraction(1, 2) + Fraction(9, 8) * Fraction(1, 2) * 8


def test_exact_dot_refuses_nan():
    codes = np.full(32, 0x7F, np.uint8)
    with pytest.raises(ValueError, match="NaN operand"):
        exact_dot(codes, np.array([127], np.uint8), np.zeros(16, np.uint8), np.array([127]))


def test_what_bounds_need_of_the_terms_holds_for_every_term():
    """Parts of either sign, the common lattice, and the largest exponent field."""
    codes, sf, packed, weight_sf = operands(5, 2, 3, 64, 3)
    blocks = block_sums(Rows.of(codes, sf), Columns.of(packed, weight_sf))
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(3, 64)
    for row in range(2):
        for column in range(3):
            for group in range(2):
                scale = Fraction(2) ** (int(sf[row, group]) + int(weight_sf[column, group]) - 254)
                at = (group, row, column)
                terms = [
                    Fraction(float(E4M3_TABLE[codes[row, k]] * E2M1_TABLE[nibbles[column, k]]))
                    * scale
                    for k in range(group * 32, group * 32 + 32)
                ]
                assert Fraction(float(blocks.positive[at])) == sum(t for t in terms if t > 0)
                assert Fraction(float(blocks.negative[at])) == -sum(t for t in terms if t < 0)
                lattice = Fraction(2) ** int(blocks.lowbit[at])
                assert all((t / lattice).denominator == 1 for t in terms)
                assert all(abs(t) < Fraction(2) ** (int(blocks.field[at]) + 2) for t in terms)


def test_the_exponent_field_of_subnormals_is_that_of_the_smallest_normal():
    """As the hardware aligns: E4M3 2**-9 at -6, E2M1 0.5 at 0."""
    codes = np.zeros((1, 32), np.uint8)
    codes[0, 0] = 1
    packed = np.zeros((1, 16), np.uint8)
    packed[0, 0] = 1
    one = np.full((1, 1), 127, np.uint8)
    blocks = block_sums(Rows.of(codes, one), Columns.of(packed, one))
    assert blocks.field.item() == -6
    assert blocks.lowbit.item() == -10
    assert blocks.low.item() == 2.0**-10


def test_nan_in_an_operand_or_a_scale_reaches_its_outputs_and_no_other():
    codes, sf, packed, weight_sf = operands(6, 2, 2, 64, 2)
    codes[0, 5], weight_sf[1, 0] = 0x7F, 0xFF
    total = block_sums(Rows.of(codes, sf), Columns.of(packed, weight_sf)).total()[0]
    assert np.isnan(total).tolist() == [[True, True], [False, True]]


def test_columns_in_chunks_are_the_columns():
    codes, sf, packed, weight_sf = operands(7, 2, 70, 64, 2)
    whole = block_sums(Rows.of(codes, sf), Columns.of(packed, weight_sf)).total()[0]
    parts = [
        block_sums(Rows.of(codes, sf), columns).total()[0]
        for _, columns in Columns.chunks(packed, weight_sf, 32)
    ]
    assert np.array_equal(np.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize(
    ("value", "odd"),
    [
        (Fraction(3, 4), 0.75),
        (1 + Fraction(1, 2**60), float(np.nextafter(1.0, 2.0))),
        (-1 - Fraction(1, 2**60), float(np.nextafter(-1.0, -2.0))),
        (2 - Fraction(1, 2**60), float(np.nextafter(2.0, 0.0))),
    ],
)
def test_rounding_to_odd_never_lands_on_a_boundary_it_did_not_start_on(value, odd):
    assert float_to_odd(value) == odd
    whole = Fraction(round(value))
    parts = [float(whole), float(value - whole)]
    assert sum(map(Fraction, parts)) == value
    for some in (parts, [2.0**90, *parts, -(2.0**90)]):
        assert sum_to_odd(np.array(some)) == odd


def test_weights_of_a_byte_a_value_are_e4m3():
    """A shared expert's: products need 41 bits in a block, which float64 holds in any order."""
    codes, sf, _, weight_sf = operands(7, 3, 5, 256, 20)
    weights = operands(8, 5, 1, 256, 1)[0]
    out = linear(Rows.of(codes, sf), weights, weight_sf, [])["reference"]
    for row, column in np.ndindex(out.shape):
        exact = exact_dot(codes[row], sf[row], weights[column], weight_sf[column])
        products = sum(
            Fraction(float(E4M3_TABLE[x]))
            * Fraction(float(E4M3_TABLE[w]))
            * Fraction(2) ** (int(sf[row][k // 32]) + int(weight_sf[column][k // 32]) - 254)
            for k, (x, w) in enumerate(zip(codes[row], weights[column], strict=True))
        )
        assert exact == products
        assert out[row, column] == float_to_odd(exact)


@pytest.mark.parametrize("name", ["fp32", "fp32-ordered", "sm90-e4m3", "sm100-mxf8f6f4"])
def test_every_class_holds_the_exact_sum_of_e4m3_weights(name):
    codes, sf, _, weight_sf = operands(9, 3, 6, 256, 4)
    weights = operands(10, 6, 1, 256, 1)[0]
    out = linear(Rows.of(codes, sf), weights, weight_sf, [accumulator(name)])
    low, high = out[name]
    assert (low <= out["reference"]).all() and (out["reference"] <= high).all()
    assert (low < high).any()
