"""Expert-parallel load balancing: which replica of which expert lies on which rank.

The placement is the public definition of EPLB (DeepSeek's repository ``EPLB`` at d52c72d,
``rebalance_experts``): the same maps for the same loads. Three steps decide it:

1. *Pack the expert groups onto the nodes.* The heaviest comes first, and each goes to the lightest
   node that still has a place.
2. *Replicate within each node.* One replica more, until all places of the node are full, goes to
   the expert with the most load for each of its replicas.
3. *Pack the replicas onto the ranks of the node*, in the way of step 1.

Where the nodes do not divide the groups, all ranks count as one node and all experts as one group
(the *global* policy; else the *hierarchical* one). Where a pack has one place only, item ``i`` goes
to pack ``i``. Of equal loads the lowest index comes first, in every step. The definition's code
leaves the order of equal items to a sort that need not be stable, and torch's is not on every CPU:
there two torches can give two maps. Here all ranks get the same one.

Loads are float32, and so are their sums and quotients, as in the definition: they decide ties.
Nothing prevents two replicas of one expert from meeting on one rank.

A *place* holds one physical expert. Places are counted over all ranks: of P places on N ranks, rank
``r`` has those from ``r * P / N`` on. :mod:`megamoe.layer.moves` moves the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch

from megamoe.layer.checks import IDS, check_count, describe

F = TypeVar("F", bound=Callable[..., Any])
_NAME = "rebalance_experts"


@dataclass(frozen=True)
class Placement:
    """The replicas of all layers. The last two fields fit ``set_eplb_state``."""

    physical_to_logical: torch.Tensor
    """(layers, P) int64, the logical expert in each place."""
    logical_to_physical: torch.Tensor
    """(layers, L, R) int64, the places of each logical expert; -1 where it has fewer than R."""
    replica_count: torch.Tensor
    """(layers, L) int64, the replicas of each logical expert, from 1 on."""


def _on_the_host(function: F) -> F:
    """``function``, with the CPU as the default device of new tensors, whatever the engine's is."""

    @wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        with torch.device("cpu"):
            return function(*args, **options)

    return wrapper  # type: ignore[return-value]


@_on_the_host
def rebalance_experts(
    weight: torch.Tensor, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Placement:
    """The placement for the loads ``weight``, on the CPU.

    ``weight`` is (layers, L), the load of each logical expert, from 0 on, of any real dtype and
    device; ``num_replicas`` is P, the places of all ranks; ``num_gpus`` is the number of ranks.
    R of the result is the largest count of replicas. ``ValueError`` for sizes that do not divide,
    and for loads that are negative or not finite.
    """
    _check_sizes(weight, num_replicas, num_groups, num_nodes, num_gpus)
    load = _checked_load(weight)
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    elif num_gpus % num_nodes:
        raise ValueError(
            f"{_NAME}: num_gpus is {num_gpus}, not a multiple of the {num_nodes} nodes; give each "
            "node the same number of ranks"
        )
    elif load.shape[1] % num_groups:
        raise ValueError(
            f"{_NAME}: {load.shape[1]} logical experts do not divide into {num_groups} groups; "
            "num_groups must divide them"
        )
    layers, logical = load.shape

    # Step 1. `order` (layers, L): the logical experts node by node.
    by_group = load.unflatten(1, (num_groups, -1))
    groups = _packed(by_group.sum(-1), num_nodes)
    members = torch.arange(logical).view(num_groups, -1)
    order = members[groups].flatten(1)

    # Step 2. Each row is one node of one layer; experts are counted within it.
    of_node = load.gather(1, order).view(layers * num_nodes, -1)
    expert, rank_of_replica, count = _replicas(of_node, num_replicas // num_nodes)

    # Step 3. `places` (rows, places of a node): which of the replicas lies in each place.
    places = _packed((of_node / count).gather(1, expert), num_gpus // num_nodes)
    here = expert.gather(1, places).view(layers, num_nodes, -1)
    first = torch.arange(num_nodes).view(1, -1, 1) * (logical // num_nodes)
    physical_to_logical = order.gather(1, (here + first).flatten(1))
    replica = rank_of_replica.gather(1, places).view(layers, -1)
    return _placement(physical_to_logical, replica, logical)


@_on_the_host
def placement_of(physical_to_logical: torch.Tensor, num_logical_experts: int) -> Placement:
    """The placement with the places ``physical_to_logical``, (layers, P) int32 or int64.

    The replicas of an expert come in the order of their places. ``ValueError`` for an id outside
    [0, L), and for an expert without a place.
    """
    name = "placement_of"
    check_count(name, "num_logical_experts", num_logical_experts)
    table = physical_to_logical
    is_map = isinstance(table, torch.Tensor) and table.ndim == 2 and table.dtype in IDS
    if not is_map or 0 in table.shape:
        raise ValueError(
            f"{name}: physical_to_logical is {describe(table)}, expected (layers, P) "
            f"{' or '.join(map(str, IDS))}"
        )
    places = table.long().cpu()
    if ((places < 0) | (places >= num_logical_experts)).any():
        raise ValueError(f"{name}: a place holds no expert of [0, {num_logical_experts})")
    same = places.unsqueeze(2) == places.unsqueeze(1)
    replica = same.tril(-1).sum(2)
    placement = _placement(places, replica, num_logical_experts)
    if (placement.replica_count == 0).any():
        layer, expert = (placement.replica_count == 0).nonzero()[0].tolist()
        raise ValueError(f"{name}: no place of layer {layer} holds logical expert {expert}")
    return placement


@_on_the_host
def initial_placement(layers: int, num_experts: int, num_logical_experts: int) -> Placement:
    """Where the module loads a checkpoint: place ``p`` holds expert ``p % L``.

    ``num_experts`` is P. ``ValueError`` where there are fewer places than experts.
    """
    for name, value in (("layers", layers), ("num_experts", num_experts)):
        check_count("initial_placement", name, value)
    check_count("initial_placement", "num_logical_experts", num_logical_experts)
    places = (torch.arange(num_experts) % num_logical_experts).repeat(layers, 1)
    return placement_of(places, num_logical_experts)


@_on_the_host
def logical_load(load: torch.Tensor, placement: Placement) -> torch.Tensor:
    """The load of each expert, (layers, L) int64, from the recorded load of each place.

    ``load`` is (layers, P) int32 or int64. Sum it over the ranks first, if each rank has counted
    its own tokens.
    """
    places = placement.physical_to_logical
    if not isinstance(load, torch.Tensor) or load.shape != places.shape or load.dtype not in IDS:
        raise ValueError(
            f"logical_load: load is {describe(load)}, expected {tuple(places.shape)} of "
            f"{' or '.join(map(str, IDS))}"
        )
    total = torch.zeros(placement.replica_count.shape, dtype=torch.int64)
    return total.scatter_add_(1, places, load.long().cpu())


# --- the steps --------------------------------------------------------------------------------


def _packed(load: torch.Tensor, packs: int) -> torch.Tensor:
    """Items (rows, n) in the order of places, (rows, n) int64: the first n / packs of a row are
    those of pack 0, in the order in which they came to it."""
    rows, items = load.shape
    places = items // packs
    if places == 1:
        return torch.arange(items).repeat(rows, 1)
    row = torch.arange(rows)
    item_at = torch.empty(rows, packs, places, dtype=torch.int64)
    total = torch.zeros(rows, packs, dtype=torch.float32)
    sizes = torch.zeros(rows, packs, dtype=torch.int64)
    for item in load.sort(dim=1, descending=True, stable=True).indices.unbind(1):
        # argmin gives the first of equal packs.
        pack = torch.where(sizes < places, total, torch.inf).argmin(1)
        item_at[row, pack, sizes[row, pack]] = item
        total[row, pack] += load[row, item]
        sizes[row, pack] += 1
    return item_at.flatten(1)


def _replicas(load: torch.Tensor, places: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Replicas for experts of ``load`` (rows, n): the expert of each, (rows, places) int64; its
    number among the replicas of that expert, likewise; and the counts, (rows, n)."""
    rows, experts = load.shape
    row = torch.arange(rows)
    expert = torch.arange(places).repeat(rows, 1)
    number = torch.zeros(rows, places, dtype=torch.int64)
    count = torch.ones(rows, experts, dtype=torch.int64)
    for place in range(experts, places):
        heaviest = (load / count).argmax(1)
        expert[:, place] = heaviest
        number[:, place] = count[row, heaviest]
        count[row, heaviest] += 1
    return expert, number, count


def _placement(places: torch.Tensor, replica: torch.Tensor, logical: int) -> Placement:
    """The maps for the expert of each place and its number among the replicas, (layers, P)."""
    layers, physical = places.shape
    count = torch.zeros(layers, logical, dtype=torch.int64)
    count.scatter_add_(1, places, torch.ones_like(places))
    table = torch.full((layers, logical, int(count.max())), -1, dtype=torch.int64)
    layer = torch.arange(layers).unsqueeze(1)
    table[layer, places, replica] = torch.arange(physical).repeat(layers, 1)
    return Placement(places, table, count)


# --- checks -----------------------------------------------------------------------------------


def _check_sizes(weight: Any, replicas: Any, groups: Any, nodes: Any, gpus: Any) -> None:
    counts = {
        "num_replicas": replicas, "num_groups": groups, "num_nodes": nodes, "num_gpus": gpus,
    }  # fmt: skip
    for name, value in counts.items():
        check_count(_NAME, name, value)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"{_NAME}: weight is {describe(weight)}, expected (layers, logical experts)"
        )
    if replicas < weight.shape[1]:
        raise ValueError(
            f"{_NAME}: num_replicas is {replicas}, fewer than the {weight.shape[1]} logical "
            "experts; each needs a place"
        )
    if replicas % gpus:
        raise ValueError(
            f"{_NAME}: num_replicas is {replicas}, not a multiple of the {gpus} ranks; give each "
            "rank the same number of places"
        )


def _checked_load(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` in float32 on the CPU."""
    if weight.is_complex() or weight.dtype == torch.bool:
        raise ValueError(f"{_NAME}: weight is {weight.dtype}, expected a real number for each load")
    load = weight.detach().float().cpu()
    # A sum of infinity would count as a full pack.
    if not load.sum(1).isfinite().all() or (load < 0).any():
        raise ValueError(
            f"{_NAME}: a load is negative, not finite, or too large for float32; expected counts "
            "of tokens, or averages of them"
        )
    return load
