"""The kernel-side weight layout, index by index."""

from __future__ import annotations

import pytest
import torch

from megamoe.layer.kernel_weights import (
    check_sizes,
    checkpoint_layout,
    interleave_gate_up,
    kernel_rows,
    transform_sf,
    transform_weights,
)

E, H, I = 2, 256, 128


def random_bytes(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def checkpoint():
    return (
        random_bytes(E, 2 * I, H // 2, seed=1),
        random_bytes(E, 2 * I, H // 32, seed=2),
        random_bytes(E, H, I // 2, seed=3),
        random_bytes(E, H, I // 32, seed=4),
    )


def interleaved_from(row: int) -> int:
    """Which checkpoint row of w13 stands at ``row``: 8 gate rows, 8 up rows, in turn."""
    block, within = divmod(row, 16)
    is_up, channel = divmod(within, 8)
    return is_up * I + block * 8 + channel


def test_gate_and_up_rows_alternate_by_eight(checkpoint):
    w13, *_ = transform_weights(*checkpoint)
    for row in range(2 * I):
        assert torch.equal(w13[:, row], checkpoint[0][:, interleaved_from(row)]), row


def test_w2_keeps_its_bytes(checkpoint):
    assert torch.equal(transform_weights(*checkpoint)[2], checkpoint[2])


def sf_spec(scale, source_row):
    """int32 words (E, rows, K/128), each from its four bytes, at its permuted place."""
    experts, rows, groups = scale.shape
    out = torch.zeros(experts, rows, groups // 4, dtype=torch.int64)
    for old in range(rows):
        block, within = divmod(old, 128)
        a, b = divmod(within, 32)
        new = block * 128 + 4 * b + a
        for word in range(groups // 4):
            four = scale[:, source_row(old), 4 * word : 4 * word + 4].long()
            out[:, new, word] = (four << torch.tensor([0, 8, 16, 24])).sum(-1)
    return out.to(torch.int32)


def test_w13_scale_factors_are_interleaved_packed_and_permuted(checkpoint):
    w13_sf = transform_weights(*checkpoint)[1]
    assert torch.equal(w13_sf, sf_spec(checkpoint[1], interleaved_from))


def test_w2_scale_factors_are_packed_and_permuted(checkpoint):
    w2_sf = transform_weights(*checkpoint)[3]
    assert torch.equal(w2_sf, sf_spec(checkpoint[3], lambda row: row))


def test_scale_factors_are_mn_major(checkpoint):
    """One word of all rows is contiguous; an expert is one stretch of memory."""
    _, w13_sf, _, w2_sf = transform_weights(*checkpoint)
    for sf, rows, words in ((w13_sf, 2 * I, H // 128), (w2_sf, H, I // 128)):
        assert sf.dtype == torch.int32
        assert sf.shape == (E, rows, words)
        # With a single word a row, its own stride says nothing.
        assert (sf.stride(0), sf.stride(1)) == (rows * words, 1)
        assert words == 1 or sf.stride(2) == rows


def test_a_scale_lands_where_the_sketch_says():
    """Row 33 of the first 128 is (a, b) = (1, 1): place 5. Group 6 is byte 2 of word 1."""
    scale = torch.zeros(1, 128, 8, dtype=torch.uint8)
    scale[0, 33, 6] = 0x7F
    assert transform_sf(scale).nonzero().tolist() == [[0, 5, 1]]
    assert transform_sf(scale)[0, 5, 1] == 0x7F << 16


def test_nothing_is_lost(checkpoint):
    out = transform_weights(*checkpoint)
    for before, after in zip(checkpoint, out, strict=True):
        after = after.contiguous().view(torch.uint8)
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)


def test_interleaving_is_a_copy_and_leaves_the_checkpoint_alone(checkpoint):
    before = checkpoint[0].clone()
    interleave_gate_up(checkpoint[0]).zero_()
    assert torch.equal(checkpoint[0], before)


@pytest.mark.parametrize("hidden,inter", [(96, 128), (192, 128), (128, 64), (4096, 2047)])
def test_sizes_that_are_not_multiples_of_128_are_refused(hidden, inter):
    with pytest.raises(ValueError) as caught:
        check_sizes(hidden, inter)
    assert str(caught.value) == (
        "DeepGEMM MegaMoE requires hidden and intermediate sizes to be multiples of 128."
    )


def test_transform_refuses_such_sizes_too():
    with pytest.raises(ValueError, match="multiples of 128"):
        transform_weights(
            random_bytes(1, 128, 64),
            random_bytes(1, 128, 4),
            random_bytes(1, 128, 32),
            random_bytes(1, 128, 2),
        )


@pytest.mark.parametrize("hidden,inter", [(128, 128), (256, 384)])
def test_the_way_back_gives_the_checkpoint_s_bytes(hidden, inter):
    shapes = ((2 * inter, hidden // 2), (2 * inter, hidden // 32), (hidden, inter // 2),
              (hidden, inter // 32))  # fmt: skip
    weights = [torch.randint(0, 256, (E, *s), dtype=torch.uint8) for s in shapes]
    back = checkpoint_layout(*transform_weights(*weights))
    assert all(torch.equal(a, b) for a, b in zip(back, weights, strict=True))


def test_kernel_rows_say_where_each_row_of_a_shard_goes():
    column = torch.arange(2 * I).view(1, -1, 1)
    there = interleave_gate_up(column).flatten().argsort()
    assert torch.equal(kernel_rows(I, 0, scale=False), there[:I])
    assert torch.equal(kernel_rows(I, 1, scale=False), there[I:])
    assert kernel_rows(I, None, scale=False).tolist() == list(range(I))
    assert kernel_rows(I, None, scale=True)[[0, 1, 32, 33, 127]].tolist() == [0, 4, 1, 5, 127]
