"""Rules of the last tile of each expert: a kernel that counts tiles wrong at a full or a part one.

``rows // tile`` leaves out the rows of a tile that is not full, and ``(rows - 1) // tile`` a last
tile that is; a mask of ``rows % tile`` leaves out its last row, or all of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megamoe.explain.rules import TILES, Ids, Rule, rows_of_experts
from megamoe.printable import quantity


def tail_rules(ids: Ids, experts: int) -> Iterator[Rule]:
    """Rules for ``(T, K)`` expert ids; tiles that give the same slots are one rule, of the
    smallest."""
    live = (ids >= 0) & (ids < experts)
    if not live.any():
        return
    rows, counts = rows_of_experts(ids, live), np.bincount(ids[live], minlength=experts)
    many = counts[np.where(live, ids, 0)]  # (T, K): the rows of each slot's expert
    keys = {live.tobytes()}
    for size in TILES:
        full = live & (many % size == 0)
        after = live & (rows >= many // size * size)
        tile = f"full tile of {size} rows"
        kinds = (
            (f"the rows of each expert after its last {tile}", "are", after),
            (f"the rows of each expert that has a {tile} after the last one", "are",
             after & (many > size)),
            (f"the last tile of {size} rows of each expert that ends with a full one", "is",
             full & (rows >= many - size)),
            (f"the last row of each expert that ends with a {tile}", "is",
             full & (rows == many - 1)),
        )  # fmt: skip
        for where, verb, slots in kinds:
            if slots.any() and slots.tobytes() not in keys:
                keys.add(slots.tobytes())
                of = quantity(int(slots.sum()), "row")
                yield Rule(f"{where}: {of}", f"{where} {verb} dropped: {of}", slots)
