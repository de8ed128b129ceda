"""Rules of the first tile of each expert: a grouped kernel that looks up the expert of a tile.

It searches the number of the tile in the offsets of the experts. On the wrong side of an offset it
finds the expert before, for the first tile of each expert but the first.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megamoe.explain.rules import TILES, Ids, Rule, rows_of_experts
from megamoe.printable import quantity


def head_rules(ids: Ids, experts: int) -> Iterator[Rule]:
    """Rules for ``(T, K)`` expert ids; tiles that give the same slots are one rule, of the
    smallest."""
    live = (ids >= 0) & (ids < experts)
    owners = np.unique(ids[live])
    if len(owners) < 2:
        return
    rows = rows_of_experts(ids, live)
    before = np.full(experts, -1, np.int64)
    before[owners[1:]] = owners[:-1]
    previous = before[
        np.where(live, ids, owners[0])
    ]  # (T, K): the expert before, of those with rows
    candidates = live & (previous >= 0)
    keys = set()
    for size in TILES:
        slots = candidates & (rows < size)
        if slots.tobytes() in keys:
            continue
        keys.add(slots.tobytes())
        of, least = (
            quantity(int(slots.sum()), "row"),
            "" if (candidates & ~slots).any() else " or more",
        )
        where = f"the first tile of {size}{least} rows of each expert but expert {owners[0]}"
        yield Rule(
            f"{where}: {of}", f"{where} is dropped: {of}", slots, np.where(slots, previous, ids)
        )
