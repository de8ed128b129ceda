"""The weights of experts go from one placement to another: the list of moves, and the moves.

A *place* holds one physical expert. Places are counted over all ranks: of P places on N ranks, rank
``r`` has those from ``r * P / N`` on. :mod:`megamoe.layer.rebalance` decides the placement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from megamoe.layer.checks import IDS, check_count, describe
from megamoe.layer.messages import all_to_all


class Move(NamedTuple):
    """The weights of one expert go into ``place`` of ``rank``, from ``source_place`` of
    ``source_rank``. Both places are counted over all ranks."""

    rank: int
    place: int
    source_rank: int
    source_place: int


def moves(old: torch.Tensor, new: torch.Tensor, num_ranks: int) -> list[Move]:
    """What has to move, in the order of places, so that one layer goes from ``old`` to ``new``.

    Both are (P,) integer: the logical expert in each place. A place that keeps its expert does not
    move. The source is a place of the same rank if one holds the expert, the lowest; else the
    holder with the fewest moves so far, the lowest of these. So all ranks compute the same list
    without asking one another. All sources are meant as before the first move: places may swap.
    ``ValueError`` for maps that do not fit, and for an expert that ``old`` does not hold.
    """
    before, after = _places("moves", "old", old), _places("moves", "new", new)
    check_count("moves", "num_ranks", num_ranks)
    if len(before) != len(after) or len(before) % num_ranks:
        raise ValueError(
            f"moves: old has {len(before)} places and new has {len(after)}, expected the same "
            f"multiple of the {num_ranks} ranks"
        )
    local = len(before) // num_ranks
    holders: dict[int, list[int]] = {}
    for place, expert in enumerate(before):
        holders.setdefault(expert, []).append(place)
    uses = dict.fromkeys(range(len(before)), 0)
    out = []
    for place, expert in enumerate(after):
        if before[place] == expert:
            continue
        if expert not in holders:
            raise ValueError(
                f"moves: place {place} is to hold logical expert {expert}, which no place of old "
                "holds; load its weights from the checkpoint"
            )
        rank = place // local
        near = [s for s in holders[expert] if s // local == rank]
        source = near[0] if near else min(holders[expert], key=lambda s: uses[s])
        if not near:
            uses[source] += 1
        out.append(Move(rank, place, source // local, source))
    return out


def move_expert_weights(
    weights: Sequence[torch.Tensor], old: torch.Tensor, new: torch.Tensor
) -> None:
    """Move the weights of one layer from the places ``old`` to the places ``new``, in place.

    ``weights`` are the (P, n) tensors of ``get_expert_weights``, of a module that holds all P
    places; ``old`` and ``new`` are (P,) integer. Rows move as bytes, and swapped places come out
    right: all sources are copied before the first write. That copy takes the memory of the moved
    rows of one tensor. ``ValueError`` as of :func:`moves`, and for a tensor of other rows; then
    nothing has moved.
    """
    plan = moves(old, new, 1)
    for index, tensor in enumerate(weights):
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != 2 or len(tensor) != len(old):
            raise ValueError(
                f"move_expert_weights: weights[{index}] is {describe(tensor)}, expected a row for "
                f"each of the {len(old)} places"
            )
    if not plan:
        return
    with torch.no_grad():
        for tensor in weights:
            # Not every device can index a type like float8_e8m0fnu; all can index bytes.
            rows = tensor.view(torch.uint8)
            targets = torch.tensor([m.place for m in plan], device=tensor.device)
            sources = torch.tensor([m.source_place for m in plan], device=tensor.device)
            rows.index_copy_(0, targets, rows.index_select(0, sources))


def move_over_ranks(
    weights: Sequence[torch.Tensor], old: torch.Tensor, new: torch.Tensor, group: Any
) -> None:
    """As :func:`move_expert_weights`, where each rank of ``group`` holds its own P / N places.

    ``weights`` are the (P / N, n) tensors of ``get_expert_weights`` of this rank. Collective: all
    ranks call it with the same ``old`` and ``new``.
    """
    ranks, me = group.size(), group.rank()
    plan, local = moves(old, new, ranks), len(old) // ranks
    with torch.no_grad():
        for tensor in weights:
            rows = tensor.view(torch.uint8)
            at = {
                "out": [[m.source_place - local * me for m in plan
                         if (m.source_rank, m.rank) == (me, r)] for r in range(ranks)],
                "into": [[m.place - local * me for m in plan
                          if (m.rank, m.source_rank) == (me, r)] for r in range(ranks)],
            }  # fmt: skip
            out, into = (
                torch.tensor([i for part in at[way] for i in part], dtype=torch.int64)
                for way in ("out", "into")
            )
            counts = [[len(part) for part in at[way]] for way in ("out", "into")]
            sends, gets = counts
            came = all_to_all(rows[out.to(rows.device)], sends, gets, group)
            rows[into.to(rows.device)] = came


def _places(name: str, argument: str, tensor: Any) -> list[int]:
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 1 or tensor.dtype not in IDS:
        raise ValueError(
            f"{name}: {argument} is {describe(tensor)}, expected (P,) of "
            f"{' or '.join(map(str, IDS))}: the places of one layer"
        )
    places: list[int] = tensor.tolist()
    return places
