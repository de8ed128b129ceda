"""The symmetric buffer: its forms, its capacity, and its cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megamoe.layer import symm_buffer as sb
from megamoe.spec.problem import Sizes

CPU = torch.device("cpu")
SIZES = Sizes(num_experts=8, max_num_tokens=5, top_k=2, hidden_size=256, intermediate_size=128)


@pytest.fixture(autouse=True)
def no_buffers():
    sb.clear_symm_buffers()
    yield
    sb.clear_symm_buffers()


@pytest.mark.parametrize(
    "tokens,capacity", [(0, 384), (1, 384), (384, 384), (385, 768), (8192, 8448)]
)
def test_capacity_is_aligned_up_to_384(tokens, capacity):
    assert sb.aligned_capacity(tokens) == capacity


def test_a_new_buffer_holds_zeros_of_the_kernel_s_forms():
    buffer = sb.new_symm_buffer(None, CPU, SIZES)
    form = {
        name: (tuple(t.shape), t.dtype)
        for name, t in vars(buffer).items()
        if isinstance(t, torch.Tensor)
    }
    assert form == {
        "x": ((384, 256), torch.float8_e4m3fn),
        "x_sf": ((384, 2), torch.int32),
        "topk_idx": ((384, 2), torch.int64),
        "topk_weights": ((384, 2), torch.float32),
        "l2_acts": ((384, 2, 128), torch.float8_e4m3fn),
        "l2_acts_sf": ((384, 2, 4), torch.uint8),
    }
    assert not any(getattr(buffer, name).view(torch.uint8).any() for name in form)
    assert (buffer.capacity, buffer.max_num_tokens) == (384, 5)


def test_the_same_sizes_share_one_buffer():
    first = sb.get_symm_buffer(None, CPU, SIZES)
    assert sb.get_symm_buffer(None, torch.device("cpu"), SIZES) is first


@pytest.mark.parametrize("name,other", [(n, v * 2) for n, v in vars(SIZES).items()])
def test_any_other_size_has_its_own(name, other):
    first = sb.get_symm_buffer(None, CPU, SIZES)
    assert sb.get_symm_buffer(None, CPU, replace(SIZES, **{name: other})) is not first


def test_device_and_group_have_their_own():
    first = sb.get_symm_buffer(None, CPU, SIZES)
    assert sb.get_symm_buffer(None, torch.device("meta"), SIZES) is not first
    group = object()
    mine = sb.get_symm_buffer(group, CPU, SIZES)
    assert mine is not first
    assert mine.group is group
    assert sb.get_symm_buffer(group, CPU, SIZES) is mine


def test_a_group_s_buffer_is_never_found_by_a_later_group():
    """Ids are given out again when an object dies, so the cache keeps the group alive."""

    def own_buffer(*arguments):
        return object()

    buffers = [sb.get_symm_buffer(object(), CPU, SIZES, factory=own_buffer) for _ in range(20)]
    assert len({id(b) for b in buffers}) == 20


def test_a_backend_s_own_factory_is_kept_apart():
    def own(group, device, sizes):
        return ("own", sizes)

    first = sb.get_symm_buffer(None, CPU, SIZES)
    mine = sb.get_symm_buffer(None, CPU, SIZES, factory=own)
    assert mine == ("own", SIZES)
    assert sb.get_symm_buffer(None, CPU, SIZES, factory=own) is mine
    assert sb.get_symm_buffer(None, CPU, SIZES) is first
