"""Staging, against the formats' scalar specification."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from megamoe.layer import staging
from megamoe.layer.staging import prepare_megamoe_inputs
from megamoe.spec import formats as f
from megamoe.spec.contract import BASE, NEWEST

FP8 = torch.float8_e4m3fn


def stage(hidden, weights=None, ids=None):
    """Fresh outputs of the kernel's forms: x as bytes, x_sf as bytes, ids, weights."""
    tokens, size = hidden.shape
    weights = torch.ones(tokens, 2) if weights is None else weights
    ids = torch.zeros(tokens, 2, dtype=torch.int64) if ids is None else ids
    x = torch.full((tokens, size), 7, dtype=torch.uint8).view(FP8)
    x_sf = torch.full((tokens, size // 128), -1, dtype=torch.int32)
    idx_out = torch.full(ids.shape, -9, dtype=torch.int64)
    weights_out = torch.full(weights.shape, -9.0)
    prepare_megamoe_inputs(hidden, weights, ids, x, x_sf, idx_out, weights_out)
    return x.view(torch.uint8), staging.unpack_sf(x_sf), idx_out, weights_out


def one_group(values):
    """Code bytes and the exponent byte of a group that starts with ``values``, then zeros."""
    hidden = torch.zeros(1, 128, dtype=torch.bfloat16)
    hidden[0, : len(values)] = torch.tensor(values, dtype=torch.bfloat16)
    x, sf, _, _ = stage(hidden)
    return x[0, : len(values)].tolist(), sf[0, 0].item()


def spec(values):
    """The contract over exact numbers, but for the one division, which is fp32."""
    amax = np.float32(max([abs(v) for v in values if v == v] + [1e-4]))
    exponent = int(f.ue8m0_ceil(np.array([amax / np.float32(448)]))[0])
    exponent = min(max(exponent, 1), 254)
    scale = Fraction(2) ** (127 - exponent)
    codes = [f.e4m3_encode(Fraction(v) * scale, negative_zero=bool(np.signbit(v))) for v in values]
    return codes, exponent


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e30])
def test_random_groups_follow_the_specification(seed, size):
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(1, 32, generator=generator) * size).bfloat16()
    values = hidden[0].tolist()
    assert one_group(values) == spec(values)


@pytest.mark.parametrize("k", [-30, -9, 0, 1, 100])
@pytest.mark.parametrize("step", [-1, 0, 1])
def test_amax_at_a_power_of_two_and_one_bf16_step_either_side(k, step):
    """448 * 2^k is the last amax of exponent k; one step more takes the next."""
    pattern = int(f.bf16_round(np.array([448.0 * 2.0**k]))[0]) + step
    amax = float(f.bf16_decode(np.array([pattern], np.uint16))[0])
    codes, exponent = one_group([amax, -amax, amax / 2])
    assert (codes, exponent) == spec([amax, -amax, amax / 2])
    assert exponent == max(127 + k + (step > 0), 105)


def test_small_groups_share_the_floor():
    """1e-4 / 448 lies between 2^-23 and 2^-22: byte 105 for zeros and all that is smaller."""
    assert one_group([0.0, -0.0]) == ([0x00, 0x80], 105)
    assert one_group([2.0**-130])[1] == 105
    assert one_group([2.0**-13])[1] == 106


def test_nan_is_dropped_from_the_amax_and_coded_7f():
    nan, minus_nan = float("nan"), -float("nan")
    codes, exponent = one_group([nan, 448.0, minus_nan, 1.0])
    clean, clean_exponent = one_group([0.0, 448.0, 0.0, 1.0])
    assert exponent == clean_exponent == 127
    assert codes == [0x7F, clean[1], 0x7F, clean[3]]


def test_a_group_of_nan_has_the_floor():
    assert one_group([float("nan")] * 32) == ([0x7F] * 32, 105)


def test_infinity_saturates_at_the_largest_exponent():
    assert one_group([float("inf"), -float("inf"), 1.0, -1.0]) == ([0x7E, 0xFE, 0x00, 0x80], 254)


def test_largest_finite_value():
    largest = float(torch.finfo(torch.bfloat16).max)
    assert one_group([largest, -largest]) == spec([largest, -largest])


def test_groups_of_32_are_scaled_alone_and_packed_low_byte_first():
    hidden = torch.zeros(1, 256, dtype=torch.bfloat16)
    hidden[0, ::32] = 448 * 2.0 ** torch.arange(8)
    x_sf = torch.zeros(1, 2, dtype=torch.int32)
    ids = torch.zeros(1, 1, dtype=torch.int32)
    x = torch.empty(1, 256, dtype=torch.uint8)
    prepare_megamoe_inputs(
        hidden, torch.ones(1, 1), ids, x, x_sf, torch.empty(1, 1).long(), torch.empty(1, 1)
    )
    assert x_sf.tolist() == [[0x8281807F - (1 << 32), 0x86858483 - (1 << 32)]]
    assert (x[0, ::32] == 0x7E).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_are_widened_and_weights_copied(dtype):
    ids = torch.tensor([[-1, 2**31 - 1], [0, 7]], dtype=dtype)
    weights = torch.tensor([[0.1, float("nan")], [-0.0, 3e38]])
    _, _, idx_out, weights_out = stage(
        torch.zeros(2, 128, dtype=torch.bfloat16), weights=weights, ids=ids
    )
    assert torch.equal(idx_out, ids.long())
    assert torch.equal(weights_out.view(torch.int32), weights.view(torch.int32))


def test_only_the_rows_of_the_batch_are_written():
    hidden = torch.ones(2, 128, dtype=torch.bfloat16)
    x = torch.full((5, 128), 9, dtype=torch.uint8)
    x_sf = torch.full((5, 1), 9, dtype=torch.int32)
    idx_out = torch.full((5, 1), 9, dtype=torch.int64)
    weights_out = torch.full((5, 1), 9.0)
    ids = torch.zeros(2, 1, dtype=torch.int32)
    prepare_megamoe_inputs(hidden, torch.ones(2, 1), ids, x, x_sf, idx_out, weights_out)
    for out in (x, x_sf, idx_out, weights_out):
        assert (out[:2] != 9).all()
        assert (out[2:] == 9).all()


# --- errors -----------------------------------------------------------------------------------


def outputs(hidden_size=128, top_k=2):
    return (
        torch.full((2, hidden_size), 9, dtype=torch.uint8),
        torch.full((2, 1), 9, dtype=torch.int32),
        torch.full((2, top_k), 9, dtype=torch.int64),
        torch.full((2, top_k), 9.0),
    )


def refusal(hidden, weights, ids) -> str:
    """The message in the newest words, after showing that nothing was written.

    And that the older face's differ in the prefix alone.
    """
    out, messages = outputs(), []
    for contract in (NEWEST, BASE):
        with pytest.raises(ValueError) as caught:
            prepare_megamoe_inputs(hidden, weights, ids, *out, contract=contract)
        assert all((tensor == 9).all() for tensor in out)
        messages.append(str(caught.value))
    assert messages[1] == f"DeepSeek V4 {messages[0]}"
    return messages[0]


def test_hidden_size_must_be_a_multiple_of_128():
    hidden = torch.ones(2, 96, dtype=torch.bfloat16)
    assert refusal(hidden, torch.ones(2, 2), torch.zeros(2, 2).long()) == (
        "MegaMoE input staging requires hidden_size to be a multiple of 128."
    )


def test_weights_and_ids_must_have_the_same_shape():
    hidden = torch.ones(2, 128, dtype=torch.bfloat16)
    assert refusal(hidden, torch.ones(2, 2), torch.zeros(2, 3).long()) == (
        "MegaMoE input staging requires topk_weights and topk_ids to have the same shape."
    )


@pytest.mark.parametrize("kernel", ["torch", "triton"])
@pytest.mark.parametrize(
    ("place", "out", "complaint"),
    [
        (0, torch.zeros(2, 256, dtype=torch.uint8), "x_fp8 is (2, 256) torch.uint8"),
        (0, torch.zeros(2, 128).bfloat16(), "x_fp8 is (2, 128) torch.bfloat16"),
        (1, torch.zeros(2, 1), "x_sf is (2, 1) torch.float32"),  # as SM90's fork has it
        (2, torch.zeros(2, 2, dtype=torch.int32), "topk_idx_out is (2, 2) torch.int32"),
        (3, torch.zeros(1, 2), "topk_weights_out is (1, 2) torch.float32"),
    ],
)
def test_an_output_of_another_type_or_size_is_named_before_any_write(kernel, place, out, complaint):
    prepare = prepare_megamoe_inputs
    if kernel == "triton":
        pytest.importorskip("triton", reason="Triton is not installed: Linux builds only")
        from megamoe.backends.triton.staging import prepare_megamoe_inputs as prepare
    tensors = [*outputs()[:place], out, *outputs()[place + 1 :]]
    hidden, ids = torch.ones(2, 128, dtype=torch.bfloat16), torch.zeros(2, 2).long()
    before = [t.clone() for t in tensors]
    with pytest.raises(ValueError) as caught:
        prepare(hidden, torch.ones(2, 2), ids, *tensors)
    assert str(caught.value).startswith(f"{complaint}; 2 tokens need at least (2, ")
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_no_tokens_returns_at_once():
    out = outputs()
    prepare_megamoe_inputs(
        torch.ones(0, 96, dtype=torch.bfloat16), torch.ones(0, 2), torch.zeros(0, 3), *out
    )
    assert all((tensor == 9).all() for tensor in out)


# --- the torch twins of megamoe.spec.formats ---------------------------------------------------


def test_e4m3_codes_of_every_bfloat16_equal_the_formats():
    values = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16).float()
    ours = staging.e4m3_codes(values, contract=BASE).numpy()
    np.testing.assert_array_equal(ours, f.e4m3_cast(values.numpy()))
    np.testing.assert_array_equal(staging.e4m3_codes(values.double(), contract=BASE).numpy(), ours)


def test_e4m3_codes_of_float32_equal_the_formats():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    near = (bits & 0x87FFFFFF | 0x38000000).view(np.float32)  # sizes from 2^-15 on
    for values in (bits.view(np.float32), near):
        ours = staging.e4m3_codes(torch.from_numpy(values), contract=BASE).numpy()
        np.testing.assert_array_equal(ours, f.e4m3_cast(values))


def test_ue8m0_ceil_equals_the_formats():
    bits = np.random.default_rng(0).integers(0, 0x7F800001, 100_000).astype(np.uint32)
    bits[:255] = np.arange(255, dtype=np.uint32) << 23  # exact powers of two, and zero
    bits[255:510] = bits[:255] + 1  # and one step above each
    values = bits.view(np.float32)
    ours = staging.ue8m0_ceil(torch.from_numpy(values)).numpy()
    np.testing.assert_array_equal(ours, f.ue8m0_ceil(values))


def test_packed_words_equal_the_formats():
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    packed = staging.pack_sf(codes)
    np.testing.assert_array_equal(packed.numpy(), f.pack_sf(codes.numpy()))
    assert torch.equal(staging.unpack_sf(packed), codes)


def test_scaling_is_exact_over_every_exponent():
    """The factor 2^(127 - e) for e from 0 to 255 leaves the normal range of fp32 at both ends."""
    exponent = torch.arange(256, dtype=torch.int32)
    scaled = staging.scale_down(torch.full((256, 1), 1.5), exponent)[:, 0]
    assert [Fraction(v) for v in scaled.tolist()] == [
        Fraction(3, 2) * Fraction(2) ** (127 - e) for e in range(256)
    ]
