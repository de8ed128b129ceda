"""Weights of the expert before or after, of the experts that have rows in the batch.

A grouped kernel that looks up the expert of a tile in the offsets of rows passes over experts
without a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise

from megamoe.explain.deviations.rows import ExpertRows
from megamoe.explain.sources import Source
from megamoe.explain.ways import Operands, Reader


def readers(source: Source) -> Iterator[tuple[str, Reader]]:
    """By name; none where the expert beside each one has rows, since that is the same then. The
    first has none before it, and the last none after it: these keep their own."""
    experts = sorted(ExpertRows.of(source).tokens)
    pairs = [*pairwise(experts)]
    if all(second == first + 1 for first, second in pairs):
        return
    name = "weights and scales are those of the expert"
    yield f"{name} before, of those with rows", partial(_read, {b: a for a, b in pairs})
    yield f"{name} after, of those with rows", partial(_read, dict(pairs))


def _read(other: Mapping[int, int], o: Operands) -> Operands:
    expert = other.get(o.where.slot.expert)
    if expert is None:
        return o
    packed, sf = o.where.weights(expert)
    return replace(o, packed=packed, weight_sf=sf)


__all__ = ["readers"]
