"""The eager backend, against the contract written out once more in NumPy and Python floats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megamoe.backends import eager
from megamoe.backends.eager import EagerBackend
from megamoe.spec import formats as f
from megamoe.spec.contract import BASE
from megamoe.spec.features import Activation
from megamoe.spec.problem import Problem

H, I, E, K = 256, 128, 4, 3


def bytes_(shape, low=0, high=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)


def problem(tokens=5, *, seed=0, hidden=H, inter=I, experts=E, top_k=K, **changes) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    fields = {
        "hidden_states": torch.randn(tokens, hidden, generator=generator).bfloat16(),
        "topk_ids": scores.argsort(-1)[:, :top_k].contiguous(),
        "topk_weights": torch.rand(tokens, top_k, generator=generator),
        "w13_weight": bytes_((experts, 2 * inter, hidden // 2), seed=seed + 1),
        "w13_weight_scale": bytes_((experts, 2 * inter, hidden // 32), 116, 122, seed=seed + 2),
        "w2_weight": bytes_((experts, hidden, inter // 2), seed=seed + 3),
        "w2_weight_scale": bytes_((experts, hidden, inter // 32), 116, 122, seed=seed + 4),
        "activation_clamp": 10.0,
        "fast_math": True,
        "max_num_tokens": 384,
    }
    return Problem(**(fields | changes))


def run(p: Problem) -> dict[str, torch.Tensor]:
    return EagerBackend().forward(p)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# --- the linear: blocks of 32 summed exactly, then added in fp32 in ascending order ------------


def linear_spec(codes, sf, weight, weight_sf):
    """One output at a time, in the order of the class fp32-ordered."""
    x = f.e4m3_decode(codes).reshape(len(codes), -1, 32) * f.ue8m0_decode(sf)[..., None]
    w = f.e2m1_decode(weight).reshape(len(weight), -1, 32) * f.ue8m0_decode(weight_sf)[..., None]
    out = np.zeros((len(x), len(w)), np.float32)
    for r, n in np.ndindex(*out.shape):
        acc = np.float32(0)
        for group in range(x.shape[1]):
            exact = math.fsum(x[r, group] * w[n, group])
            with np.errstate(over="ignore", invalid="ignore"):
                acc = acc + np.float32(exact)
        out[r, n] = acc
    return out


def finite_codes(shape, seed):
    codes = bytes_(shape, seed=seed)
    return torch.where((codes & 0x7F) == 0x7F, 0, codes)


@pytest.mark.parametrize("low,high", [(100, 150), (55, 65), (0, 1), (254, 255)])
def test_linear_adds_exact_blocks_in_ascending_order(low, high):
    """Every bit, with scale factors at both ends of their range too."""
    operands = (
        finite_codes((3, 160), 1),
        bytes_((3, 5), low, high, seed=2),
        bytes_((40, 80), seed=3),
        bytes_((40, 5), low, high, seed=4),
    )
    expected = linear_spec(*(t.numpy() for t in operands))
    actual = eager.linear(*operands).numpy()
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(
    "code,x_sf,nibble,w_sf", [(0x01, 227, 0x1, 162), (0x7E, 27, 0x7, 72), (0x00, 254, 0x1, 254)]
)
def test_linear_scales_in_range_whose_product_is_not(code, x_sf, nibble, w_sf):
    """2^-10 * 2^100 * 2^35, then 2688 * 2^-100 * 2^-55, then zero at the largest scales."""
    codes, weight = torch.zeros(1, 32, dtype=torch.uint8), torch.zeros(1, 16, dtype=torch.uint8)
    codes[0, 0], weight[0, 0] = code, nibble
    out = eager.linear(codes, torch.tensor([[x_sf]]), weight, torch.tensor([[w_sf]]))
    exact = float(f.e4m3_value(code) * f.e2m1_value(nibble)) * 2.0 ** (x_sf + w_sf - 254)
    assert out.item() == exact


def test_linear_rounds_a_block_once():
    """7 * 448 * 6 - 2^-10 at 2^-157 is just under 73.5 of fp32's smallest steps: 73.

    Rounded to 24 bits before it is scaled it would be 73.5, and then 74.
    """
    codes, weight = torch.zeros(1, 32, dtype=torch.uint8), torch.zeros(1, 16, dtype=torch.uint8)
    codes[0, :8] = torch.tensor([0x7E] * 7 + [0x81])
    weight[0, :4] = torch.tensor([0x77, 0x77, 0x77, 0x17])
    out = eager.linear(codes, torch.tensor([[47]]), weight, torch.tensor([[50]]))
    assert out.item() == 73 * 2.0**-149


def test_linear_is_not_split_by_chunks(monkeypatch):
    """How many weights are decoded at once is a matter of memory, not of bits."""
    operands = (
        finite_codes((3, 512), 1),
        bytes_((3, 16), 100, 150, seed=2),
        bytes_((40, 256), seed=3),
        bytes_((40, 16), 100, 150, seed=4),
    )
    whole = eager.linear(*operands)
    monkeypatch.setattr(eager, "_WEIGHTS_AT_ONCE", 3 * 40 * 32)  # three groups: 16 = 5 * 3 + 1
    assert same(eager.linear(*operands), whole)


@pytest.mark.parametrize("nan_code", [0x7F, 0xFF])
def test_linear_nan_stays_in_its_row(nan_code):
    codes = finite_codes((2, 64), 1)
    codes[0, 40] = nan_code
    out = eager.linear(
        codes, torch.full((2, 2), 127, dtype=torch.uint8), bytes_((8, 32)), bytes_((8, 2), 120, 130)
    )
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_linear_scale_255_is_nan():
    sf = torch.full((1, 2), 127, dtype=torch.uint8)
    weight_sf = torch.full((3, 2), 127, dtype=torch.uint8)
    weight_sf[1, 1] = 255
    out = eager.linear(finite_codes((1, 64), 1), sf, bytes_((3, 32)), weight_sf)
    assert out.isnan().tolist() == [[False, True, False]]


# --- SwiGLU -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
def test_silu_of_every_bfloat16_gate(fast):
    """The exponential is correctly rounded, so its place in a vector cannot matter."""
    gates = f.bf16_decode(np.arange(1 << 16, dtype=np.uint16))
    gates = gates[np.abs(gates) < 80]
    ones = torch.ones(len(gates), 1)
    rows = torch.stack([torch.from_numpy(gates), ones[:, 0]], dim=1)
    actual = eager.activate(rows, ones, plain(None, fast), contract=BASE)[:, 0].numpy()
    one = np.float32(1)
    denominator = one + np.exp(-gates.astype(np.float64)).astype(np.float32)
    expected = gates * (one / denominator) if fast else gates / denominator
    np.testing.assert_array_equal(actual, expected)


def plain(clamp, fast):
    return Activation("swiglu", clamp, 1.0, 0.0, fast)


def swiglu_one(gate, up, weight=1.0, clamp=None, fast=True):
    rows = torch.tensor([[gate, up]], dtype=torch.float32)
    return eager.activate(rows, torch.tensor([[weight]]), plain(clamp, fast), contract=BASE).item()


@pytest.mark.parametrize("fast", [True, False])
def test_swiglu_is_silu_of_gate_times_up_times_weight(fast):
    actual = swiglu_one(1.5, -3.0, 0.25, fast=fast)
    assert actual == pytest.approx(1.5 / (1 + math.exp(-1.5)) * -3.0 * 0.25, rel=1e-6)


def test_swiglu_rounds_gate_and_up_to_bfloat16_first():
    """1 + 2^-8 is a tie between two bfloat16 values and goes to the even one, 1."""
    assert swiglu_one(1 + 2**-8, 1.0) == swiglu_one(1.0, 1.0)
    assert swiglu_one(1.0, 1 + 2**-8) == swiglu_one(1.0, 1.0)
    assert swiglu_one(1 + 2**-8 + 2**-20, 1.0) == swiglu_one(1 + 2**-7, 1.0)


def test_swiglu_clamps_gate_above_and_up_on_both_sides():
    assert swiglu_one(100.0, 1.0, clamp=7.0) == swiglu_one(7.0, 1.0)
    assert swiglu_one(-9.0, 1.0, clamp=7.0) == swiglu_one(-9.0, 1.0)
    assert swiglu_one(1.0, 100.0, clamp=7.0) == swiglu_one(1.0, 7.0)
    assert swiglu_one(1.0, -100.0, clamp=7.0) == swiglu_one(1.0, -7.0)


def test_swiglu_rounds_the_clamp_to_bfloat16():
    assert swiglu_one(1.0, 100.0, clamp=7.01) == swiglu_one(1.0, 7.0)


def test_swiglu_clamp_turns_nan_into_the_bound_that_meets_it_first():
    nan = math.nan
    assert swiglu_one(nan, 1.0, clamp=7.0) == swiglu_one(7.0, 1.0)
    assert swiglu_one(1.0, nan, clamp=7.0) == swiglu_one(1.0, -7.0)
    assert math.isnan(swiglu_one(nan, 1.0))
    assert math.isnan(swiglu_one(1.0, nan))


def test_swiglu_clamp_zero_keeps_the_sign_of_zero():
    assert math.copysign(1, swiglu_one(-0.0, 5.0, clamp=0.0)) == -1
    assert math.copysign(1, swiglu_one(3.0, -5.0, clamp=0.0)) == -1
    assert math.copysign(1, swiglu_one(3.0, 5.0, clamp=0.0)) == 1


@pytest.mark.parametrize("fast", [True, False])
def test_swiglu_of_a_large_negative_gate_is_minus_zero(fast):
    actual = swiglu_one(-1000.0, 1.0, fast=fast)
    assert (actual, math.copysign(1, actual)) == (0.0, -1)


def test_fast_reciprocal_flushes_a_subnormal():
    """exp(88) is finite and above 2^126: its reciprocal is subnormal, so rcp.ftz gives 0."""
    assert swiglu_one(-88.0, 1.0, fast=True) == 0.0
    assert swiglu_one(-88.0, 1.0, fast=False) < 0.0


# --- requantisation ---------------------------------------------------------------------------


def requantise(group):
    """One group of 32 through the backend: (code bytes, exponent byte)."""
    codes, sf = eager.requantise(torch.tensor([group], dtype=torch.float32), contract=BASE)
    return codes[0].tolist(), sf[0, 0].item()


@pytest.mark.parametrize("k", [-100, -20, 0, 20, 100])
def test_requantise_at_448_times_a_power_of_two_and_one_fp32_step_either_side(k):
    """448 * 2^k is the last amax of exponent k.

    The product with fl32(1/448) is exactly 2^k for one step below, too. A division would not be,
    but has the same exponent there: the two differ nowhere that shows.
    """
    amax = np.float32(448 * 2.0**k)
    around = [np.nextafter(amax, np.float32(0)), amax, np.nextafter(amax, np.float32(np.inf))]
    exponents = [requantise([float(a)] + [0.0] * 31)[1] for a in around]
    assert exponents == [127 + k, 127 + k, 128 + k]


@pytest.mark.parametrize("amax", [447.0, 449.0, 3.0, 2.0**-120, 1e-4, 3e38])
def test_requantise_scale_covers_the_amax(amax):
    codes, sf = requantise([amax, -amax, amax / 3] + [0.0] * 29)
    value = float(f.e4m3_value(codes[0])) * 2.0 ** (sf - 127)
    assert value == pytest.approx(amax, rel=1 / 16)
    assert codes[1] == codes[0] | 0x80


def test_requantise_has_no_floor():
    """A group of zeros has exponent 0, and a tiny one a byte far below that of 1e-4 / 448."""
    assert requantise([0.0] * 31 + [-0.0]) == ([0] * 31 + [0x80], 0)
    assert requantise([2.0**-140] * 32)[1] == 1
    assert requantise([2.0**-100] * 32)[1] < 30


def test_requantise_drops_nan_from_the_amax():
    codes, sf = requantise([math.nan, 448.0, -math.nan] + [1.0] * 29)
    clean, clean_sf = requantise([0.0, 448.0, 0.0] + [1.0] * 29)
    assert sf == clean_sf
    assert codes == [0x7F, clean[1], 0x7F, *clean[3:]]


def test_requantise_of_infinity():
    codes, sf = requantise([math.inf, -math.inf] + [1.0] * 30)
    assert (sf, codes[:3]) == (255, [0x7E, 0xFE, 0x00])


# --- combine ----------------------------------------------------------------------------------


def test_combine_adds_live_slots_in_ascending_order():
    """In fp32 the 1 is lost when it is added to 2^24, and kept when it comes last."""
    slots = torch.tensor([[[2.0**24], [1.0], [-(2.0**24)]]], dtype=torch.bfloat16)
    live = torch.ones(1, 3, dtype=torch.bool)
    assert eager.combine(slots, live, weights=None, contract=BASE).item() == 0.0
    assert eager.combine(slots[:, [0, 2, 1]], live, weights=None, contract=BASE).item() == 1.0


def test_combine_adds_in_fp32():
    """256 + 1 + 1 in bfloat16 would stay 256, a tie each time."""
    slots = torch.tensor([[[256.0], [1.0], [1.0]]], dtype=torch.bfloat16)
    assert (
        eager.combine(slots, torch.ones(1, 3, dtype=torch.bool), weights=None, contract=BASE).item()
        == 258.0
    )


def test_combine_skips_dead_slots_whatever_they_hold():
    slots = torch.tensor([[[1.0], [math.nan], [2.0]]], dtype=torch.bfloat16)
    assert (
        eager.combine(
            slots, torch.tensor([[True, False, True]]), weights=None, contract=BASE
        ).item()
        == 3.0
    )


def test_combine_starts_from_plus_zero():
    slots = torch.tensor([[[-0.0]]], dtype=torch.bfloat16)
    for live in (True, False):
        y = eager.combine(slots, torch.tensor([[live]]), weights=None, contract=BASE)
        assert y.view(torch.int16).item() == 0


# --- the whole layer --------------------------------------------------------------------------


def forward_spec(p: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The contract one (token, slot) at a time: bfloat16 bits of y, and the activation codes."""
    hidden = p.hidden_states.float().numpy().reshape(p.num_tokens, -1, 32)
    amax = np.maximum(np.abs(hidden).max(-1), np.float32(1e-4))
    x_sf = np.clip(f.ue8m0_ceil(amax / np.float32(448)), 1, 254)
    x = f.e4m3_cast(np.ldexp(hidden, 127 - x_sf[..., None])).reshape(p.num_tokens, -1)
    y = np.zeros((p.num_tokens, p.hidden_size), np.float32)
    acts = np.zeros((p.num_tokens, p.top_k, p.intermediate_size), np.uint8)
    one = np.float32(1)
    for t, k in np.ndindex(p.num_tokens, p.top_k):
        w13, s13, w2, s2 = (
            getattr(p, name)[p.topk_ids[t, k]].numpy()
            for name in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
        )
        acc = linear_spec(x[t : t + 1], x_sf[t : t + 1].astype(np.uint8), w13, s13)[0]
        g, u = np.split(f.bf16_decode(f.bf16_round(acc)), 2)
        g, u = np.minimum(g, np.float32(10)), np.clip(u, np.float32(-10), np.float32(10))
        silu = g * (one / (one + np.exp(-g.astype(np.float64)).astype(np.float32)))
        groups = (silu * u * p.topk_weights[t, k].numpy()).reshape(-1, 32)
        sf = f.ue8m0_ceil(np.abs(groups).max(-1) * np.float32(1 / 448))
        acts[t, k] = f.e4m3_cast(np.ldexp(groups, 127 - sf[:, None])).ravel()
        row = linear_spec(acts[t, k][None], sf[None].astype(np.uint8), w2, s2)[0]
        y[t] += f.bf16_decode(f.bf16_round(row))
    return f.bf16_round(y), acts


def test_forward_computes_the_layer():
    """Bit for bit: the class leaves freedom, but these two take the same steps."""
    p = problem(3)
    y, acts = forward_spec(p)
    out = run(p)
    np.testing.assert_array_equal(out["l2_acts"].numpy(), acts)
    np.testing.assert_array_equal(out["y"].view(torch.uint16).numpy(), y)


def test_forward_exposes_every_stage_in_its_form():
    out = run(problem(5))
    form = {name: (tuple(t.shape), t.dtype) for name, t in out.items()}
    assert form == {
        "y": ((5, H), torch.bfloat16),
        "x": ((5, H), torch.uint8),
        "x_sf": ((5, H // 128), torch.int32),
        "l2_acts": ((5, K, I), torch.uint8),
        "l2_acts_sf": ((5, K, I // 32), torch.uint8),
    }


def test_forward_of_no_tokens():
    out = run(problem(0))
    assert out["y"].shape == (0, H)


def test_masked_slots_take_no_part():
    """-1, num_experts and 2^31-1: as if the slot had no weight and no expert."""
    p = problem(4)
    ids = p.topk_ids.clone()
    ids[0, 1], ids[1, 0], ids[2, 2] = -1, E, 2**31 - 1
    ids[3] = -1
    out = run(problem(4, topk_ids=ids))
    whole = run(p)
    assert not out["y"][3].any()
    assert not out["l2_acts"][3].any()
    assert not out["l2_acts"][0, 1].any()
    assert same(out["l2_acts"][0, 0], whole["l2_acts"][0, 0])
    assert not same(out["y"][0], whole["y"][0])


def test_untouched_experts_are_not_read():
    """An engine with hundreds of experts reads the few it is routed to: the rest may be NaN."""
    p = problem(4, experts=3)
    more = {
        name: torch.cat([getattr(p, name), torch.full_like(getattr(p, name), 255)])
        for name in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale")
    }
    assert same(run(problem(4, experts=3, **more))["y"], run(p)["y"])


# --- bitwise invariance -----------------------------------------------------------------------


def test_a_token_does_not_depend_on_its_batch():
    p = problem(33, seed=7)
    whole = run(p)
    for rows in ([0], [32], [5, 4], list(range(32, -1, -1))):
        part = run(
            problem(
                33,
                seed=7,
                hidden_states=p.hidden_states[rows],
                topk_ids=p.topk_ids[rows],
                topk_weights=p.topk_weights[rows],
            )
        )
        for stage in whole:
            assert same(part[stage], whole[stage][rows]), stage


def test_threads_do_not_matter():
    p = problem(9, seed=3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(p)
        torch.set_num_threads(2)
        two = run(p)
    finally:
        torch.set_num_threads(before)
    assert all(same(one[stage], two[stage]) for stage in one)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_gives_the_bits_of_the_cpu():
    p = problem(9, seed=3)
    there = run(p.to("cuda"))
    assert all(same(there[stage].cpu(), value) for stage, value in run(p).items())
