"""A layer in larger sizes gives the bits of the layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.backends import simulate
from megamoe.backends.eager import EagerBackend
from megamoe.backends.padding import padded

SIZES = st.integers(1, 5).map(lambda n: 128 * n)


def same_rows(wide: torch.Tensor, narrow: torch.Tensor) -> bool:
    columns = wide[..., : narrow.shape[-1]].contiguous()
    return torch.equal(columns.view(torch.uint8), narrow.view(torch.uint8))


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 99), hidden=SIZES, inter=SIZES, poison=st.sampled_from("nif-"))
@pytest.mark.parametrize("clamp", [10.0, "none"])
def test_more_channels_of_zeros_change_no_bit(clamp, seed, hidden, inter, poison):
    """Nor where a token holds NaN or infinity, which would reach every channel."""
    p = simulate.problem(
        seed, hidden=hidden, intermediate=inter, top_k=2, experts=3, tokens=4, clamp=clamp
    )
    if poison != "-":
        p.hidden_states[1, 5] = {"n": float("nan"), "i": float("inf"), "f": 3e38}[poison]
    q = padded(p, 512)
    assert (q.hidden_size % 512, q.intermediate_size % 512) == (0, 0)
    a, b = EagerBackend().forward(p), EagerBackend().forward(q)
    for stage in ("y", "x", "l2_acts", "l2_acts_sf"):
        assert same_rows(b[stage], a[stage]), stage


def test_nor_in_blackwell_s_accumulator():
    p = simulate.problem(3, hidden=384, intermediate=128, top_k=2, experts=3, tokens=4)
    kernel = replace(simulate.blackwell_mxf8f6f4(), silu="none")  # no draws, which sizes change
    one, two = (simulate.forward(x, kernel, seed=0) for x in (p, padded(p, 512)))
    assert (two.y[:, :384] == one.y).all() and one.y.any()


def test_sizes_that_fit_stay_as_they_are():
    p = simulate.problem(1, hidden=512, intermediate=1024, top_k=2, experts=3, tokens=4)
    assert padded(p, 512) is p
