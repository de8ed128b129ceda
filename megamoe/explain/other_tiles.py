"""The channels of ``y`` beside the tile that is looked at: a fault of one tile spares them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

import numpy as np

from megamoe.explain import departure, refutations_of_y
from megamoe.explain.extent import Extent, join
from megamoe.explain.match import Names, general
from megamoe.explain.sources import FromProblem, Source
from megamoe.judge import Finding
from megamoe.judge.elements import GRID_LIMIT, TILE
from megamoe.spec.contract import Contract

Plain = dict[str, Any]
_MOST: Final = 4
"""Other tiles with wrong values on which a cause is tried."""


def compare(
    actual: Plain, rows: Mapping[str, Any], token: int, source: Source,
    findings: Sequence[Finding], accumulator: str, contract: Contract, is_large: bool,
) -> None:  # fmt: skip
    """Count what is outside of the other channels of ``y`` of ``token``, and try the causes of
    ``y`` on other tiles. ``rows``: its stages as bits. ``is_large``: a tile takes about a second.

    A cause that would change values of a tile where all is right is left out if others are there
    that would not. Else it holds in some channels only; where no words say in which, it has those
    of the right tile as ``right_at``.
    """
    finding = next((one for one in findings if one.stage == "y"), None)
    is_whole = isinstance(source, FromProblem) and source.problem.only_y
    if finding is None or is_whole or len(finding.grid) >= GRID_LIMIT:
        return
    counts = {tile: count for row, tile, count in finding.grid if row == token}
    first, last = actual["y_channels"]
    tiles = -(-source.hidden_size // TILE)
    others = [tile for tile in range(tiles) if tile != first // TILE]
    if not others or source.token(token).dtype == "fp8":
        return
    actual["y_elsewhere"] = {
        "outside": sum(counts.get(tile, 0) for tile in others),
        "of": source.hidden_size - (last - first + 1),
    }
    right = [tile for tile in others if tile not in counts]
    wrong = [tile for tile in others if tile in counts]
    some = {*right[:1], *right[-1:]}
    if not is_large:
        beside = {tile + by for tile in (first // TILE, *wrong) for by in (-1, 1)}
        some |= {*sorted(beside & {*right})[:_MOST]}
    for step in actual["explanations"]:
        ways = [way for way in step["exact"] if not way["where"]]
        if step["step"] != "y" or step["follows"] or not ways or "l2_acts" not in rows:
            continue
        only: Names = frozenset(_name(way) for way in ways)
        on_tile = partial(_of_right, source, token, accumulator, rows, contract, only)
        changes = {tile: on_tile(tile) for tile in sorted(some)}
        against = {name: tile for tile in sorted(some, reverse=True) for name in changes[tile]}
        survivors = [way for way in step["exact"] if _name(way) not in against]
        if survivors:
            step["exact"] = survivors
            continue
        peers = [] if is_large else _some(wrong)
        on_wrong = partial(departure, source, token)
        explained = [
            _of_y(on_wrong(tile * TILE, accumulator, rows, contract, only)) for tile in peers
        ]
        for way in step["exact"]:
            extents: list[Plain | None] = [one.get(_name(way)) for one in explained]
            extents += [one[_name(way)] for one in changes.values() if _name(way) in one]
            if not _joined(way, extents):
                start = against[_name(way)] * TILE
                way["right_at"] = [start, min(start + TILE, source.hidden_size) - 1]


def _name(way: Plain) -> tuple[str, str]:
    return way["stage"], general(way["what"])


def _some(tiles: Sequence[int]) -> list[int]:
    """At most :data:`_MOST` of the tiles, the first and the last among them."""
    if len(tiles) <= _MOST:
        return [*tiles]
    return [tiles[k * (len(tiles) - 1) // (_MOST - 1)] for k in range(_MOST)]


def _of_right(
    source: Source, token: int, accumulator: str, rows: Mapping[str, Any], contract: Contract,
    only: Names, tile: int,
) -> dict[tuple[str, str], Plain]:  # fmt: skip
    """The channels of a right tile that each of ``only`` would change."""
    changes = refutations_of_y(source, token, tile * TILE, accumulator, rows, contract, only)
    return {
        name: Extent(np.zeros_like(mask), mask, np.ones_like(mask))
        .within(source.hidden_size, tile * TILE).plain()
        for name, mask in changes.items()
    }  # fmt: skip


def _of_y(departs: Plain) -> dict[tuple[str, str], Plain]:
    """The channels of each deviation that explains a wrong tile."""
    steps = [one for one in departs["explanations"] if one["step"] == "y"]
    return {_name(way): way["extent"] for step in steps for way in step["exact"]}


def _joined(way: Plain, extents: Sequence[Plain | None]) -> bool:
    """Whether the deviation holds in the channels of all tiles, and words say which these are."""
    before = way["extent"], way["channels"]
    joins = all(one is not None and join(way, {"extent": one}) for one in extents)
    if joins and way["channels"]:
        return True
    way["extent"], way["channels"] = before
    return False


__all__ = ["compare"]
