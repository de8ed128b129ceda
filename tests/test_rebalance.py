"""The placement of replicas by the public EPLB definition, and the moves that carry it out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megamoe.layer.eplb import eplb_map_to_physical_and_record
from megamoe.layer.experts import DeepseekV4MegaMoEExperts
from megamoe.layer.kernel_weights import per_expert, transform_weights
from megamoe.layer.moves import Move, move_expert_weights, moves
from megamoe.layer.rebalance import (
    initial_placement,
    logical_load,
    placement_of,
    rebalance_experts,
)


def placed(weight, *sizes):
    return rebalance_experts(torch.tensor(weight), *sizes)


# --- the placement ----------------------------------------------------------------------------


def test_the_published_worked_example():
    """Loads and places as printed in the definition's README; the policy is hierarchical.

    Outside of this repository, its code (DeepSeek's EPLB, d52c72d) was a witness for 9011 random
    inputs: 8109 hierarchical and 902 global, up to 256 experts on up to 32 ranks, most with equal
    loads (torch 2.13.0 CPU, 2026-11-29). With a stable sort in it, all three maps were equal each
    time. As it is, they were equal in all 795 inputs without equal loads, and in 4698 of all: the
    sort of that torch puts equal loads in another order.
    """
    placement = placed(
        [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
         [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]], 16, 4, 2, 8,
    )  # fmt: skip
    assert placement.physical_to_logical.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_by_hand_two_replicas_of_an_expert_may_share_a_rank():
    """Shares 4, 4, 4, 2 in the order 0, 1, 0 again, 2; the third goes to rank 0, as of a tie."""
    placement = placed([[8, 4, 2]], 4, 1, 1, 2)
    assert placement.physical_to_logical.tolist() == [[0, 0, 1, 2]]
    assert placement.logical_to_physical.tolist() == [[[0, 1], [2, -1], [3, -1]]]
    assert placement.replica_count.tolist() == [[2, 1, 1]]


def test_replicas_are_listed_by_age_and_not_by_place():
    """The newest replica of expert 1 comes to lie before its first one."""
    placement = placed([[5, 20, 6, 7]], 6, 1, 1, 2)
    # Shares: 5, 20/3, 6, 7, 20/3, 20/3. By weight: 3, 1, 1', 1'', 2, 0.
    assert placement.physical_to_logical.tolist() == [[3, 1, 0, 1, 1, 2]]
    assert placement.logical_to_physical[0, 1].tolist() == [3, 4, 1]


def test_with_one_place_a_rank_nothing_is_sorted():
    assert placed([[1, 5, 3]], 3, 1, 1, 3).physical_to_logical.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("groups", [1, 3, 5])
def test_groups_that_the_nodes_do_not_divide_count_as_one(groups):
    """As does the number of nodes: here it does not even divide the ranks."""
    weight = [[9, 1, 8, 2, 7, 3, 6, 4, 5, 0]]
    places = placed(weight, 12, groups, 4, 6).physical_to_logical
    assert torch.equal(places, placed(weight, 12, 1, 1, 6).physical_to_logical)


def test_ties_go_to_the_lowest_index_in_large_sets_too():
    """A sort that is not stable keeps equal loads in order only while they are few."""
    placement = placed([[1] * 256], 256, 1, 1, 2)
    assert placement.physical_to_logical[0].tolist() == [*range(0, 256, 2), *range(1, 256, 2)]


@st.composite
def problems(draw):
    """Loads and sizes of the hierarchical policy, up to 9 replicas more than experts.

    Loads are multiples of 2520 below 2^24 in all: each share of up to 10 replicas, and each sum,
    is exact in float32.
    """
    nodes, per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups = nodes * draw(st.integers(1, 3))
    logical = groups * draw(st.integers(1, 3))
    ranks = nodes * per_node
    most = (logical + 9) // ranks * ranks
    places = (
        draw(st.integers(-(-logical // ranks), max(most // ranks, -(-logical // ranks)))) * ranks
    )
    top = draw(st.sampled_from([1, 3, 200]))
    loads = st.lists(st.integers(0, top), min_size=logical, max_size=logical)
    weight = torch.tensor(draw(st.lists(loads, min_size=1, max_size=2))) * 2520
    return weight, places, groups, nodes, ranks


@settings(max_examples=120, deadline=None)
@given(problems())
def test_what_holds_for_every_placement(problem):
    weight, places, groups, nodes, ranks = problem
    layers, logical = weight.shape
    placement = rebalance_experts(*problem)
    place, table, count = (
        placement.physical_to_logical, placement.logical_to_physical, placement.replica_count,
    )  # fmt: skip
    assert place.shape == (layers, places)
    assert table.shape == (layers, logical, int(count.max()))
    assert {place.dtype, table.dtype, count.dtype} == {torch.int64}

    # Every expert has a replica, and the maps invert each other.
    for layer in range(layers):
        assert torch.equal(count[layer], place[layer].bincount(minlength=logical))
        for expert, row in enumerate(table[layer].tolist()):
            n = int(count[layer, expert])
            assert n >= 1 and set(row[n:]) <= {-1}
            assert sorted(row[:n]) == (place[layer] == expert).nonzero().flatten().tolist()

    # All experts of a group are on one node, and each node has equally many groups.
    node_of_group = place.unflatten(1, (nodes, -1)) // (logical // groups)
    for layer in node_of_group.tolist():
        assert [len(set(node)) for node in layer] == [groups // nodes] * nodes
        assert len(set().union(*layer)) == groups

    share = (weight.double() / count).gather(1, place).unflatten(1, (nodes, ranks // nodes, -1))
    assert share.shape[3] * ranks == places
    load = share.sum(3)
    heaviest = share.flatten(2).amax(2)
    # Of two ranks of a node, neither carries more than the other and the heaviest replica. So
    # none carries more than the mean and the heaviest replica.
    assert (load.amax(2) - load.amin(2) <= heaviest).all()
    assert (load.amax(2) <= load.mean(2) + heaviest).all()
    # The same for the groups of the nodes.
    group_load = weight.double().unflatten(1, (groups, -1)).sum(2)
    node_load = load.sum(2)
    assert (node_load.amax(1) - node_load.amin(1) <= group_load.amax(1)).all()
    # A replica fewer of any expert would give it at least the heaviest share of its node.
    fewer = (weight.double() / (count - 1)).gather(1, place).unflatten(1, (nodes, -1))
    replicated = (count > 1).gather(1, place).unflatten(1, (nodes, -1))
    assert (fewer >= heaviest.unsqueeze(2))[replicated].all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bfloat16])
def test_the_loads_may_be_of_any_real_type_and_stay_as_they_are(dtype):
    weight = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]], dtype=dtype)
    before = weight.clone()
    placement = rebalance_experts(weight, 12, 2, 2, 4)
    assert torch.equal(weight, before)
    assert torch.equal(
        placement.physical_to_logical, placed(weight.tolist(), 12, 2, 2, 4).physical_to_logical
    )


def test_what_an_engine_sets_as_default_has_no_effect():
    """Sums are float32: 2^24 + 1 is 2^24, so the first two ones go to the same rank."""
    weight = torch.tensor([[2.0**24, 2.0**24, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float32)
    load = torch.arange(6, dtype=torch.int32).view(1, 6)
    rows = torch.arange(6).view(6, 1)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            placement = rebalance_experts(weight, 6, 1, 1, 2)
            total = logical_load(load, placement)
            first = initial_placement(1, 6, 6)
            move_expert_weights(
                [rows], first.physical_to_logical[0], placement.physical_to_logical[0]
            )
    finally:
        torch.set_default_dtype(torch.float32)
    assert placement.physical_to_logical.tolist() == [[0, 2, 3, 1, 4, 5]]
    assert total.tolist() == [[0, 3, 1, 2, 4, 5]]
    assert rows.flatten().tolist() == [0, 2, 3, 1, 4, 5]


WEIGHT = torch.ones(1, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((WEIGHT, 7, 1, 1, 1), "num_replicas is 7, fewer than the 8 logical experts"),
     ((WEIGHT, 9, 1, 1, 2), "num_replicas is 9, not a multiple of the 2 ranks"),
     ((WEIGHT, 9, 2, 2, 3), "num_gpus is 3, not a multiple of the 2 nodes"),
     ((WEIGHT, 9, 3, 3, 3), "8 logical experts do not divide into 3 groups"),
     ((WEIGHT, 8, 0, 1, 1), "num_groups is 0 (int), expected an integer from 1 on"),
     ((WEIGHT, 8, 1, 1.0, 1), "num_nodes is 1.0 (float), expected an integer"),
     ((WEIGHT[0], 8, 1, 1, 1), "weight is a tensor of torch.float32 (8,), expected (layers, log"),
     ((WEIGHT[:, :0], 8, 1, 1, 1), "(1, 0), expected (layers, logical experts)"),
     ((WEIGHT > 0, 8, 1, 1, 1), "weight is torch.bool, expected a real number"),
     ((-WEIGHT, 8, 1, 1, 1), "a load is negative, not finite, or too large"),
     ((WEIGHT * torch.nan, 8, 1, 1, 1), "a load is negative, not finite, or too large"),
     ((WEIGHT * 1e38, 8, 1, 1, 1), "a load is negative, not finite, or too large")],
)  # fmt: skip
def test_a_placement_that_cannot_be_is_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError) as error:
        rebalance_experts(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_first_placement_is_where_the_loader_puts_the_checkpoint():
    experts = layer(6, 4)
    (placement,) = initial_placement(1, 6, 4).physical_to_logical.tolist()
    places = [experts._local_replicas(expert) for expert in range(4)]
    assert placement == [next(e for e in range(4) if p in places[e]) for p in range(6)]


def test_a_placement_of_given_places_lists_replicas_by_place():
    placement = placement_of(torch.tensor([[1, 0, 1, 1]], dtype=torch.int32), 2)
    assert placement.logical_to_physical.tolist() == [[[1, -1, -1], [0, 2, 3]]]
    assert placement.replica_count.tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("places", "message"),
    [([[0, 2]], "a place holds no expert of [0, 2)"), ([[0, -1]], "a place holds no expert"),
     ([[0, 1], [1, 1]], "no place of layer 1 holds logical expert 0"),
     ([0, 1], "expected (layers, P)")],
)  # fmt: skip
def test_places_that_are_no_placement_are_refused(places, message):
    with pytest.raises(ValueError) as error:
        placement_of(torch.tensor(places), 2)
    assert message in str(error.value)


def test_a_placement_with_fewer_places_than_experts_is_refused():
    with pytest.raises(ValueError, match="logical expert 3"):
        initial_placement(1, 3, 4)


def test_the_load_of_places_becomes_that_of_experts():
    """Recorded through the maps of the placement itself, it is the plain count of the ids."""
    placement = placed([[9, 1, 5, 2], [1, 1, 1, 8]], 8, 1, 1, 4)
    load = torch.zeros(2, 8, dtype=torch.int32)
    ids = torch.randint(4, (60, 3), generator=torch.Generator().manual_seed(0))
    for row in range(2):
        eplb_map_to_physical_and_record(
            ids, load[row], placement.logical_to_physical[row], placement.replica_count[row], True
        )
    counts = ids.flatten().bincount(minlength=4).tolist()
    assert logical_load(load, placement).tolist() == [counts, counts]
    with pytest.raises(ValueError, match=r"expected \(2, 8\)"):
        logical_load(load[0], placement)


# --- moves ------------------------------------------------------------------------------------


def test_a_place_that_keeps_its_expert_does_not_move_and_places_may_swap():
    old, new = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 1, 3])
    assert moves(old, new, 2) == [Move(0, 1, 1, 2), Move(1, 2, 0, 1)]
    assert moves(old, old, 4) == []


def test_of_sources_on_the_same_rank_the_lowest_comes_first():
    assert moves(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]), 1) == [Move(0, 2, 0, 0)]


def test_a_source_on_the_same_rank_comes_first_and_others_take_turns():
    old = torch.tensor([0, 1, 0, 2, 3, 3, 4, 4])
    new = torch.tensor([0, 1, 0, 0, 0, 0, 0, 4])
    assert moves(old, new, 4) == [
        Move(1, 3, 1, 2), Move(2, 4, 0, 0), Move(2, 5, 1, 2), Move(3, 6, 0, 0),
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_moves_give_the_new_placement_and_each_place_moves_once(data):
    ranks, local, experts = (data.draw(st.integers(1, 4)) for _ in range(3))
    places = st.lists(st.integers(0, experts - 1), min_size=ranks * local, max_size=ranks * local)
    new = data.draw(places)
    old = data.draw(places.filter(lambda candidate: set(new) <= set(candidate)))
    after = list(old)
    plan = moves(torch.tensor(old), torch.tensor(new), ranks)
    for move in plan:
        assert (move.rank, move.source_rank) == (move.place // local, move.source_place // local)
        after[move.place] = old[move.source_place]
    assert after == new
    assert [m.place for m in plan] == [p for p in range(len(old)) if old[p] != new[p]]


@pytest.mark.parametrize(
    ("old", "new", "ranks", "message"),
    [([0, 1], [0, 2], 1, "place 1 is to hold logical expert 2, which no place of old holds"),
     ([0, 1], [0, 1, 1], 1, "old has 2 places and new has 3, expected the same"),
     ([0, 1], [1, 0], 3, "the same multiple of the 3 ranks"),
     ([0.0, 1.0], [1, 0], 1, "old is a tensor of torch.float32 (2,), expected (P,)"),
     ([0, 1], [[1, 0]], 1, "new is a tensor of torch.int64 (1, 2), expected (P,)")],
)  # fmt: skip
def test_moves_that_cannot_be_are_refused_in_one_line(old, new, ranks, message):
    with pytest.raises(ValueError) as error:
        moves(torch.tensor(old), torch.tensor(new), ranks)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_move_in_place_as_bytes_also_around_a_circle():
    old, new = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 0, 3])
    words = torch.tensor([[10, 11], [20, 21], [30, 31], [40, 41]], dtype=torch.int32)
    scales = torch.tensor([[1], [2], [3], [4]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    memory = words.data_ptr()
    move_expert_weights([words, scales], old, new)
    assert words.tolist() == [[20, 21], [30, 31], [10, 11], [40, 41]]
    assert scales.view(torch.uint8).tolist() == [[2], [3], [1], [4]]
    assert words.data_ptr() == memory


def test_weights_in_the_kernel_s_layout_move_too():
    """As if the kernel's weights had been built from experts in the new order."""
    generator = torch.Generator().manual_seed(2)
    shapes = (256, 64), (256, 4), (128, 64), (128, 4)
    checkpoint = [
        torch.randint(256, (4, *shape), dtype=torch.uint8, generator=generator) for shape in shapes
    ]
    old, new = torch.tensor([0, 1, 2, 3]), torch.tensor([3, 1, 1, 0])
    expected = transform_weights(*(t[new] for t in checkpoint))
    weights = transform_weights(*checkpoint)
    move_expert_weights([per_expert(t) for t in weights], old, new)
    assert all(map(torch.equal, weights, expected))


def test_a_tensor_of_other_rows_is_refused_before_anything_moves():
    good = torch.arange(2).view(2, 1)
    with pytest.raises(ValueError, match=r"weights\[1\] is a tensor of torch.int64 \(3, 1\)"):
        move_expert_weights(
            [good, torch.arange(3).view(3, 1)], torch.tensor([0, 1]), torch.tensor([1, 0])
        )
    assert good.tolist() == [[0], [1]]


# --- with the module --------------------------------------------------------------------------


def layer(physical, logical):
    """A module of random weights; a replica has the bytes of its expert."""
    experts = DeepseekV4MegaMoEExperts(
        64, num_experts=physical, num_local_experts=physical, experts_start_idx=0, top_k=2,
        hidden_size=128, intermediate_size=128, prefix="layers.0.ffn.experts",
        num_logical_experts=logical, backend="eager",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    for name, parameter in experts.named_parameters():
        low, high = (118, 124) if name.endswith("_scale") else (0, 256)
        size = (logical, *parameter.shape[1:])
        rows = torch.randint(low, high, size, dtype=torch.uint8, generator=generator)
        parameter.data.copy_(rows[torch.arange(physical) % logical])
    experts.finalize_weights(without_loader=True)
    return experts


def test_the_output_stays_the_same_bit_for_bit_over_a_rebalance():
    """Load, new maps and moved weights, twice; a move left out changes the output."""
    experts = layer(6, 4)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(24, 128, generator=generator).bfloat16()
    weights = torch.rand(24, 2, generator=generator)
    # Expert 2 is in most rows.
    ids = torch.tensor([[2, (0, 1, 3, 2)[t % 4]] for t in range(24)])

    def run(placement):
        load = torch.zeros(1, 6, dtype=torch.int32)
        experts.set_eplb_state(0, load, placement.logical_to_physical, placement.replica_count)
        return experts(hidden, weights, ids, activation_clamp=10.0).view(torch.int16), load

    old = initial_placement(1, 6, 4)
    expected, load = run(old)
    assert logical_load(load, old).tolist() == [[6, 6, 30, 6]]
    for counts in (logical_load(load, old), torch.tensor([[1, 50, 1, 1]])):
        new = rebalance_experts(counts, 6, 1, 1, 2)
        before, after = old.physical_to_logical[0], new.physical_to_logical[0]
        assert len(moves(before, after, 2)) > 2
        assert not torch.equal(run(new)[0], expected)
        move_expert_weights(experts.get_expert_weights(), before, after)
        actual, load = run(new)
        assert torch.equal(actual, expected)
        assert logical_load(load, new).tolist() == [[6, 6, 30, 6]]
        old = new
