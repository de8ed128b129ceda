"""The expert remap, against an integer specification."""

from __future__ import annotations

import pytest
import torch

from megamoe.layer.eplb import EplbLayerState, eplb_map_to_physical_and_record


def spec(ids, load, mapping, count, record):
    """The contract's sentence, one (token, slot) at a time, in Python integers."""
    out, load = [], list(load)
    for t, row in enumerate(ids):
        out.append([])
        for wide in row:
            l = (wide + 2**31) % 2**32 - 2**31  # to int32
            if 0 <= l < len(mapping):
                replica = (t * 2654435769) % 2**32 % max(count[l], 1)
                p = mapping[l][replica]
            else:
                p = -1
            if record and 0 <= p < len(load):
                load[p] += 1
            out[-1].append(p)
    return out, load


def both(ids, load, mapping, count, record=True, dtype=torch.int64):
    """Runs the specification and the function; gives the ids, after comparing ids and load."""
    expected, expected_load = spec(ids, load, mapping, count, record)
    topk_ids = torch.tensor(ids, dtype=dtype)
    before = topk_ids.clone()
    view = torch.tensor(load, dtype=torch.int32)
    out = eplb_map_to_physical_and_record(
        topk_ids, view, torch.tensor(mapping), torch.tensor(count), torch.tensor(record)
    )
    assert out.tolist() == expected
    assert view.tolist() == expected_load
    assert (out.dtype, view.dtype) == (dtype, torch.int32)
    assert torch.equal(topk_ids, before)
    return out.tolist()


# Four logical experts on eight physical ones: 3, 1, 4 and 0 replicas.
MAP = [[0, 4, 5, -1], [1, -1, -1, -1], [2, 6, 7, 3], [-1, -1, -1, -1]]
COUNT = [3, 1, 4, 0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("record", [True, False])
def test_random_ids_on_an_uneven_map(dtype, record):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4, (200, 3), generator=generator).tolist()
    out = both(ids, [5] * 8, MAP, COUNT, record, dtype)
    assert {p for row in out for p in row} == {-1, *range(8)}


def test_the_replica_is_chosen_by_the_row_not_by_the_slot():
    out = both([[2, 2, 2]] * 40, [0] * 8, MAP, COUNT)
    assert all(len(set(row)) == 1 for row in out)
    assert len({row[0] for row in out}) == 4


def test_the_hash_wraps_at_32_bits():
    """Seven replicas: mod 2^32 and then mod 7 differs from mod 7 of the whole product."""
    rows = 64
    out = both([[0]] * rows, [0] * 7, [list(range(7))], [7])
    assert [row[0] for row in out] != [t * 2654435769 % 7 for t in range(rows)]


def test_invalid_ids_give_minus_one_and_are_not_counted():
    ids = [[-1, 3, 2**31 - 1, -(2**31)]]
    assert both(ids, [0] * 8, MAP[:3], COUNT[:3]) == [[-1] * 4]


def test_wide_ids_wrap_to_int32_first():
    """2^32 + 1 is the logical expert 1, and 2^31 is negative."""
    assert both([[2**32 + 1, 2**31]], [0] * 8, MAP, COUNT) == [[1, -1]]


def test_a_map_entry_beyond_the_load_is_kept_and_not_counted():
    assert both([[0], [0]], [0, 0], [[9]], [1]) == [[9], [9]]


def test_no_replica_counts_as_one():
    """A count of 0 reads the first entry of the map."""
    assert both([[0]], [0] * 8, [[6, 7]], [0]) == [[6]]


def test_counts_add_to_what_is_there_and_a_duplicate_counts_twice():
    view = torch.tensor([10, 20], dtype=torch.int32)
    eplb_map_to_physical_and_record(
        torch.tensor([[1, 1, 0]]), view, torch.tensor([[0], [1]]), torch.tensor([1, 1]), True
    )
    assert view.tolist() == [11, 22]


def test_the_load_may_be_a_row_of_a_larger_tensor():
    loads = torch.zeros(3, 2, dtype=torch.int32)
    eplb_map_to_physical_and_record(
        torch.tensor([[0]]), loads[1], torch.tensor([[1]]), torch.tensor([1]), torch.tensor([True])
    )
    assert loads.tolist() == [[0, 0], [0, 1], [0, 0]]


def test_int32_maps_and_counts():
    view = torch.zeros(8, dtype=torch.int32)
    out = eplb_map_to_physical_and_record(
        torch.tensor([[2]] * 9),
        view,
        torch.tensor(MAP, dtype=torch.int32),
        torch.tensor(COUNT, dtype=torch.int32),
        True,
    )
    assert out.tolist() == spec([[2]] * 9, [0] * 8, MAP, COUNT, True)[0]


@pytest.mark.parametrize("shape", [(0, 6), (5, 0)])
def test_an_empty_input_comes_back_as_it_is(shape):
    empty = torch.empty(shape, dtype=torch.int32)
    view = torch.zeros(8, dtype=torch.int32)
    out = eplb_map_to_physical_and_record(empty, view, torch.tensor(MAP), torch.tensor(COUNT), True)
    assert out is empty
    assert not view.any()


def test_a_layer_state_is_active_once_it_has_a_map():
    assert not EplbLayerState().active
    assert EplbLayerState(logical_to_physical_map=torch.tensor(MAP)).active
