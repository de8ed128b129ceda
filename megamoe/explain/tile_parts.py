"""Rules of one half of each tile: a warp, or a half of a warpgroup, that does something else."""

from __future__ import annotations

from collections.abc import Iterator

from megamoe.explain.rules import TILES, Ids, Rule, rows_of_experts
from megamoe.printable import quantity


def part_rules(ids: Ids, experts: int) -> Iterator[Rule]:
    """Rules for ``(T, K)`` expert ids: each half of each tile, where some expert has more than one
    tile. Of a single tile a half is a cut of rows."""
    live = (ids >= 0) & (ids < experts)
    if not live.any():
        return
    rows = rows_of_experts(ids, live)
    for size in TILES:
        if rows.max() < size:
            return
        is_second = rows % size >= size // 2
        for part, slots in (("first", live & ~is_second), ("second", live & is_second)):
            where = f"the {part} half of each tile of {size} rows of each expert"
            of = quantity(int(slots.sum()), "row")
            yield Rule(f"{where}: {of}", f"{where} is dropped: {of}", slots)
