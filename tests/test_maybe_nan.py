"""What may be NaN is carried apart from the numbers, and nothing is a point that is not the
reference: docs/numerics.md, 6.3 and 6.4."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe import oracle
from megamoe.backends import simulate
from megamoe.judge import elements
from megamoe.oracle.gates import Hull
from megamoe.oracle.swiglu import Activations
from megamoe.spec.contract import BASE
from megamoe.spec.formats import bf16_round, e4m3_key
from megamoe.spec.forms import BF16

f = np.float32


def alternating(positive, negative, up=None, clamp=None):
    """Hidden states of two signs, all weights 6: gates and ups that may leave fp32 both ways."""
    problem = simulate.problem(1, hidden=128, experts=1, top_k=1, tokens=1, clamp="none")
    hidden = torch.zeros((1, 128))
    hidden[0, 0::2], hidden[0, 1::2] = positive, -negative
    w13 = torch.full_like(problem.w13_weight, 0x77)
    if up is not None:
        w13[:, 128:] = up
    return replace(
        problem,
        activation_clamp=clamp,
        hidden_states=hidden.bfloat16(),
        topk_ids=torch.zeros((1, 1), dtype=torch.int64),
        w13_weight=w13,
        w13_weight_scale=torch.full_like(problem.w13_weight_scale, 127),
        w2_weight=torch.full_like(problem.w2_weight, 0x22),
        w2_weight_scale=torch.full_like(problem.w2_weight_scale, 127),
    )


KERNELS = [
    simulate.plain(order, rounding)
    for order in ("ascending", "by-sign", "random", "splits")
    for rounding in ("nearest", "zero", "mixed")
]


@pytest.mark.parametrize("clamp", [None, 10.0])
@pytest.mark.parametrize(("positive", "negative"), [(1e37, 1e37), (1e38, 1e38), (3e37, 1e35)])
def test_sums_that_leave_fp32_are_never_zero_freedom_and_every_kernel_is_inside(
    positive, negative, clamp
):
    problem = alternating(positive, negative, clamp=clamp)
    with np.errstate(all="ignore"):
        golden = oracle.forward(problem, contract=BASE)
    assert not golden.zero_freedom
    envelope = golden.envelopes["fp32"]
    outputs = set()
    for seed, kernel in enumerate(KERNELS):
        with np.errstate(all="ignore"):
            output = simulate.forward(problem, kernel, seed)
        outputs.add(output.y.tobytes())
        ends = (envelope.y_lo, envelope.y_hi)
        finding = elements.interval("y", BF16, output.y, *ends, elements.place_of("y"))
        assert not finding.bad, (kernel.name, finding.worst)
        low, high = envelope.code_interval(output.sf)
        key = e4m3_key(output.codes)
        nan = np.repeat(output.sf, 32, axis=-1) == 255
        assert (nan | ((low <= key) & (key <= high))).all(), kernel.name
    if positive == negative and clamp is None:
        assert len(outputs) > 1  # it is no theory


def test_an_infinite_gate_times_an_up_of_zero_may_be_nan():
    """P = 1.25 * 2^128, N = 0.5 * 2^128 or so, up 0: 0 where the sum is finite, NaN where not."""
    problem = alternating(1.25 * 2.0**119.4, 0.5 * 2.0**119.4, up=0)
    golden = oracle.forward(problem, contract=BASE)
    assert not golden.zero_freedom
    assert any("may leave fp32" in line for line in golden.why)
    envelope = golden.envelopes["fp32"]
    assert (envelope.key_lo == 0).all()
    assert (envelope.key_hi == 127).all()  # NaN
    assert not golden.y.any()
    assert (envelope.y_lo == 0xFF80).all()
    assert (envelope.y_hi == 0x7F80).all()


def ends(values):
    return np.array([min(values)], f), np.array([max(values)], f)


SPECIAL = [0.0, -0.0, 1.0, -2.0, 3e38, -3e38, np.inf, -np.inf, 1e-38]


@settings(max_examples=300, deadline=None)
@given(
    a=st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=2),
    b=st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=2),
)
def test_every_product_of_two_hulls_is_in_their_product(a, b):
    def members(values):
        low, high = ends(values)
        inner = np.array([*values, 0.0, 1.0, -1.0, 1e-30, 1e38, -1e38], f)
        return inner[(inner >= low) & (inner <= high)]

    none = np.zeros(1, bool)
    hull = Hull(*ends(a), none).times(Hull(*ends(b), none))
    with np.errstate(all="ignore"):
        products = np.multiply.outer(members(a), members(b)).ravel()
    numbers = products[~np.isnan(products)]
    assert ((numbers >= hull.low) & (numbers <= hull.high)).all()
    if np.isnan(products).any():
        assert hull.nan.all()
    if np.isnan(hull.low).all():
        assert not numbers.size


def test_a_nan_member_is_left_out_of_amax_or_it_is_not():
    low, high = np.full((1, 32), 1, f), np.full((1, 32), 1, f)
    low[0, 0] = high[0, 0] = 400
    plain = Activations(low, high, BASE)
    nan = np.zeros((1, 32), bool)
    nan[0, 0] = True
    both = Activations(low, high, BASE, nan)
    first, last = both.exponents()
    assert last == plain.exponents()[1]
    assert first < last
    assert both.code_keys(last)[1][0, 0] == 127
    assert both.code_keys(last)[0][0, 0] == plain.code_keys(last)[0][0, 0]


def test_a_point_that_is_not_the_reference_is_none():
    problem = simulate.problem(3)
    golden = oracle.forward(problem, contract=BASE)
    envelope = golden.envelopes["exact"]
    point = replace(
        envelope, y_lo=golden.y, y_hi=golden.y, sf_lo=golden.sf, sf_hi=golden.sf,
        key_lo=e4m3_key(golden.codes), key_hi=e4m3_key(golden.codes),
        open_groups=np.zeros(0, np.uint32),
    )  # fmt: skip
    assert point.is_point(golden.y, golden.codes, golden.sf)
    other = bf16_round(np.full(golden.y.shape, 3.0))
    assert not point.is_point(other, golden.codes, golden.sf)
    assert not point.is_point(golden.y, golden.codes ^ np.uint8(1), golden.sf)
    assert not point.is_point(golden.y, golden.codes, golden.sf + np.uint8(1))
