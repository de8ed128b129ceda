"""The channels of ``y`` beside the tile that is looked at: a fault of one tile spares them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megamoe.explain import refutations_of_y
from megamoe.explain.match import Names, general
from megamoe.explain.sources import FromProblem, Source
from megamoe.judge import Finding
from megamoe.judge.elements import GRID_LIMIT, TILE
from megamoe.spec.contract import Contract

Plain = dict[str, Any]


def compare(
    actual: Plain, rows: Mapping[str, Any], token: int, source: Source,
    findings: Sequence[Finding], accumulator: str, contract: Contract,
) -> None:  # fmt: skip
    """Count what is outside of the other channels of ``y`` of ``token``, and try the causes of
    ``y`` on tiles where all is right. ``rows``: its stages as bits.

    A cause that would change right values there is left out if others are there that would not;
    else it has the channels as ``right_at``.
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
    for step in actual["explanations"]:
        ways = [way for way in step["exact"] if not way["where"]]
        if step["step"] != "y" or step["follows"] or not ways or "l2_acts" not in rows:
            continue
        only: Names = frozenset((way["stage"], general(way["what"])) for way in ways)
        against: dict[tuple[str, str], int] = {}
        for tile in sorted({*right[:1], *right[-1:]}):
            names = refutations_of_y(source, token, tile * TILE, accumulator, rows, contract, only)
            for name in names:
                against.setdefault(name, tile)
        survivors = [
            way for way in step["exact"] if (way["stage"], general(way["what"])) not in against
        ]
        if survivors:
            step["exact"] = survivors
            continue
        for way in step["exact"]:
            start = against[way["stage"], general(way["what"])] * TILE
            way["right_at"] = [start, min(start + TILE, source.hidden_size) - 1]


__all__ = ["compare"]
