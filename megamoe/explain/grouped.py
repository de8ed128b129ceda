"""Rules of a grouped layout: rows sorted by expert, where the offsets of experts disagree.

A grouped kernel puts the rows of each expert into one buffer, rounded up to tiles. Two parts of it
need the offsets: the one that writes a row, and the one that takes the weights of an expert for a
tile. Where one of them counts otherwise, rows meet the weights of another expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final

import numpy as np

from megamoe.explain.rules import TILES, Bools, Ids, Rule, rows_of_experts
from megamoe.printable import quantity

_IN_TILES: Final = ", in tiles of "
_ROW: Final = re.compile(r"row (\d+) of an expert")


def grouped_rules(ids: Ids, experts: int) -> Iterator[Rule]:
    """Rules for ``(T, K)`` expert ids; layouts that give the same slots the same experts are one
    rule, of the smallest tile."""
    live = (ids >= 0) & (ids < experts)
    if not live.any():
        return
    rows, counts = rows_of_experts(ids, live), np.bincount(ids[live], minlength=experts)
    keys = set()
    for size in (1, *TILES):
        for text, other in _counts(counts, int((~live).sum()), size):
            right, wrong = -(-counts // size) * size, other
            for source, target in ((right, wrong), (wrong, right)):
                actual = _experts_of(ids, live, rows, source, target)
                slots = live & (actual != ids)
                key = actual.tobytes()
                if not slots.any() or key in keys:
                    continue
                keys.add(key)
                many = quantity(int(slots.sum()), "row")
                if_so = f"if {text}" + (f"{_IN_TILES}{size} rows" if size > 1 else "")
                yield Rule(
                    f"the {many} with another expert's weights {if_so}",
                    f"the {many} beyond the last expert are dropped {if_so}",
                    slots, experts=actual,
                )  # fmt: skip


def one_of_each(candidates: Iterable[Rule]) -> list[Rule]:
    """``candidates``, with one rule of those that differ in the tile only, or in the number of one
    row of each expert only."""
    out: dict[str, list[Rule]] = {}
    for rule in candidates:
        key = rule.where if rule.experts is None else rule.where.partition(_IN_TILES)[0]
        out.setdefault(_ROW.sub("row N of an expert", key), []).append(rule)
    return [_of_one_row(rules) for rules in out.values()]


def _of_one_row(rules: list[Rule]) -> Rule:
    """The first of ``rules``; of one row each, it names the other rows."""
    first, *others = rules
    if not others or not _ROW.fullmatch(first.where):
        return first
    numbers = [int(n) for rule in rules for n in _ROW.findall(rule.where)]
    low, high = min(numbers), max(numbers)
    is_range = high - low == len(others)
    these = f"{low} to {high}" if is_range else _join(sorted(numbers))
    row = f"row {numbers[0]} (or another of {these}) of an expert"
    return replace(first, where=row, loss=f"{row} is dropped")


def _counts(counts: Ids, masked: int, size: int) -> Iterator[tuple[str, Ids]]:
    """What a kernel may count in place of ``counts`` ``(E,)``, and the rows that it gives each
    expert."""
    if masked:
        more = counts + masked * (np.arange(len(counts)) == 0)
        text = f"masked slots ({masked}) count as rows of expert 0"
        yield text, -(-more // size) * size
    full = np.flatnonzero((counts > 0) & (counts % size == 0))
    if size > 1 and len(full):
        first = int(full[0])
        text = f"a full last tile counts twice (expert {first} has {counts[first]} rows)"
        yield text, (counts // size + (counts > 0)) * size


def _experts_of(ids: Ids, live: Bools, rows: Ids, source: Ids, target: Ids) -> Ids:
    """``(T, K)``: whose weights each slot meets, if experts have ``source`` ``(E,)`` rows where
    rows are written, and ``target`` where weights are taken; -1 beyond the last."""
    starts = np.cumsum(source) - source
    at = starts[np.where(live, ids, 0)] + rows
    index = np.searchsorted(np.cumsum(target), at, side="right")
    return np.where(live & (index < len(target)), index, -1)


def before(ids: Ids, experts: int, slots: Bools) -> str:
    """The rows of the expert before the first with wrong ``slots`` ``(T, K)``, where they are
    whole tiles: tiles that are counted wrong there shift what follows. Else empty."""
    live = (ids >= 0) & (ids < experts)
    wrong, used_experts = np.unique(ids[slots & live]), np.unique(ids[live])
    earlier = used_experts[used_experts < wrong[0]] if len(wrong) else used_experts[:0]
    if not len(earlier):
        return ""
    expert = int(earlier[-1])
    many = int((live & (ids == expert)).sum())
    sizes = [size for size in TILES if many % size == 0]
    if not sizes:
        return ""
    return (
        f"expert {wrong[0]} comes after expert {expert}, which has {quantity(many, 'row')}: "
        f"full tiles of {_join(sizes)}"
    )


def _join(sizes: list[int]) -> str:
    *first, last = map(str, sizes)
    return f"{', '.join(first)} or {last}" if first else last
