"""Linear 2 of activations known as intervals: the hull holds every choice a kernel may make."""

from __future__ import annotations

import numpy as np
import pytest

from megamoe.oracle.linear import Columns, Rows, block_sums
from megamoe.oracle.spread import SpreadRows, spread_block_sums
from megamoe.oracle.swiglu import Activations, scaled_codes
from megamoe.spec.contract import BASE
from megamoe.spec.formats import E4M3_TABLE, e2m1_decode, ue8m0_decode


def case(seed: int, width: float):
    """Two rows of 96 activations with relative width; weights of five outputs."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(2, 96)) * np.exp2(rng.integers(-3, 3, (2, 3))).repeat(32, axis=1)
    radius = np.abs(centre) * width * rng.random((2, 96))
    acts = Activations(
        (centre - radius).astype(np.float32), (centre + radius).astype(np.float32), contract=BASE
    )
    packed = rng.integers(0, 256, (5, 48), dtype=np.uint8)
    weight_sf = rng.integers(120, 128, (5, 3)).astype(np.uint8)
    return rng, acts, packed, weight_sf


def spread(acts):
    return SpreadRows.of(acts, *acts.exponents())


@pytest.mark.parametrize("width", [0.0, 0.01, 0.3, 4.0])
def test_block_sums_enclose_every_kernel_s(width):
    rng, acts, packed, weight_sf = case(7, width)
    blocks = spread_block_sums(spread(acts), Columns.of(packed, weight_sf))
    first, last = acts.exponents()
    weights = e2m1_decode(packed) * ue8m0_decode(weight_sf).repeat(32, axis=1)
    for _ in range(100):
        share = rng.integers(0, 3, acts.low.shape) / 2  # at the ends and half-way
        values = (acts.low + share * (acts.high - acts.low)).astype(np.float32)
        sf = rng.integers(first, last.astype(np.int64) + 1).astype(np.uint8)
        terms = E4M3_TABLE[scaled_codes(values, sf, contract=BASE)] * ue8m0_decode(sf).repeat(
            32, axis=1
        )
        terms = (terms[:, None] * weights[None]).reshape(2, 5, 3, 32).transpose(2, 0, 1, 3)
        total = terms.sum(-1)
        assert ((blocks.low <= total) & (total <= blocks.high)).all()
        assert (np.where(terms > 0, terms, 0).sum(-1) <= blocks.positive).all()
        assert (-np.where(terms < 0, terms, 0).sum(-1) <= blocks.negative).all()
        steps = terms / np.exp2(blocks.lowbit)[..., None]
        assert (steps == np.rint(steps)).all()
        assert (np.abs(terms) < np.exp2(blocks.field + 2)[..., None]).all()


def test_known_activations_give_the_block_sums_of_their_codes():
    _, acts, packed, weight_sf = case(8, 0.0)
    sf = acts.exponents()[0]
    expected = block_sums(
        Rows.of(scaled_codes(acts.low, sf, contract=BASE), sf), Columns.of(packed, weight_sf)
    )
    blocks = spread_block_sums(spread(acts), Columns.of(packed, weight_sf))
    for name in ("low", "high", "positive", "negative", "lowbit", "field"):
        assert np.array_equal(getattr(blocks, name), getattr(expected, name)), name


def test_an_open_exponent_is_a_hull_and_never_a_mixture():
    """amax straddles 448 * 2**k: all codes move together."""
    edge = np.float32(448)
    low = np.full((1, 32), 1.0, np.float32)
    high = low.copy()
    low[0, 0], high[0, 0] = edge * np.float32(0.9999), edge * np.float32(1.0001)
    acts = Activations(low, high, contract=BASE)
    first, last = acts.exponents()
    assert (first.item(), last.item()) == (127, 128)
    packed = np.full((1, 16), 0x22, np.uint8)
    blocks = spread_block_sums(spread(acts), Columns.of(packed, np.full((1, 1), 127, np.uint8)))
    one = [E4M3_TABLE[scaled_codes(v, np.array([[e]]), contract=BASE)].sum() * 2.0 ** (e - 127)
           for e in (127, 128) for v in (low, high)]  # fmt: skip
    assert blocks.lowbit.item() == -9  # any code may come up between the ends
    assert blocks.low.item() == min(one)
    assert blocks.high.item() == max(one)
