"""Routing weights by the slot's place after the sort by expert, not by the slot.

A grouped kernel sorts its slots by expert. It then holds two indices of a row: the flat number
``t * K + k`` of its slot, and its place in the sorted order. In many kernels the rows of each
expert begin at a multiple of the tile, so places leave gaps and run past the number of slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from megamoe.explain.sources import Tokens

_TOKENS_AT_MOST: Final = 1024
"""Tokens whose ids and weights are read."""
_TILES: Final = (16, 32, 64, 128)
"""Rows of a tile at whose multiples each expert's rows may begin."""
Ints = npt.NDArray[np.int64]


def sorted_weights(source: Tokens, at: int) -> Iterator[tuple[str, dict[int, np.float32]]]:
    """The routing weight of each live slot of token ``at`` under each such mistake, by name.

    None of a batch that is too long to be read, and none where the mistake moves no weight.
    """
    if source.tokens > _TOKENS_AT_MOST:
        return
    tokens = [source.token(t) for t in range(source.tokens)]
    ids, weights = (np.stack([getattr(t, n) for t in tokens]) for n in ("ids", "weights"))
    live = (ids >= 0) & (ids < tokens[0].experts)
    slots, flat = np.flatnonzero(live), weights.ravel()
    if not len(slots):
        return
    first = at * ids.shape[1]
    distinct: list[npt.NDArray[np.float32]] = [flat[slots]]
    for name, read in _reads(ids.ravel()[slots], slots, len(flat)):
        if not any(np.array_equal(flat[read], other, equal_nan=True) for other in distinct):
            distinct.append(flat[read])
            own = zip((slots - first).tolist(), flat[read], strict=True)
            yield name, {k: weight for k, weight in own if 0 <= k < ids.shape[1]}


def _reads(experts: Ints, slots: Ints, count: int) -> Iterator[tuple[str, Ints]]:
    """For each of ``slots``, flat numbers in ascending order, the flat number that is read."""
    order = np.argsort(experts, kind="stable")
    name = "routing weights are read at the slot's place in the order by expert"
    yield name, _places(experts, order, 1)
    clamps: dict[bytes, list[int]] = {}
    wraps: dict[bytes, list[int]] = {}
    for tile in _TILES:
        place = _places(experts, order, tile)
        clamps.setdefault(place.clip(0, count - 1).tobytes(), []).append(tile)
        if place.max() >= count:
            wraps.setdefault((place % count).tobytes(), []).append(tile)
    ends = "past the last slot they"
    for reads, past in ((clamps, f"{ends} are that of the last"), (wraps, f"{ends} start again")):
        for read, tiles in reads.items():  # small batches do not tell some tiles apart
            *few, last = map(str, tiles)
            multiples = f"{', '.join(few)} or {last}" if few else last
            yield (
                f"{name}, where each expert begins at a multiple of {multiples}; {past}",
                np.frombuffer(read, np.int64),
            )
    yield "routing weights are in the order by expert and are read by slot", slots[order]


def _places(experts: Ints, order: Ints, tile: int) -> Ints:
    """The row of each slot where each expert's rows begin at a multiple of ``tile``."""
    _, expert, counts = np.unique(experts, return_inverse=True, return_counts=True)
    padded = -(-counts // tile) * tile
    shift = (np.cumsum(padded) - padded) - (np.cumsum(counts) - counts)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return np.asarray(place + shift[expert], np.int64)
