"""A deviation of linear 2 that only some slots of a token have.

Codes show which slots are wrong; ``y`` is a sum over slots. So the choice of slots is tried, with
the slots that have wrong codes first: a tile of a grouped kernel meets one expert in both linears.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import Final

import numpy as np

from megamoe.explain.match import Fit, in_slots
from megamoe.explain.points import Bools
from megamoe.explain.predict import Predictor
from megamoe.explain.ways import Operands, Scales, Way, right
from megamoe.spec.formats import U8, U16

_ALL_CHOICES: Final = 6
"""Slots up to which each choice is tried; of more, each one and all but each one."""


def fits(
    run: Predictor, ways: Iterable[Way], y: U16, contract: Bools, slots: Sequence[int]
) -> list[Fit]:  # fmt: skip
    """The exact fits to ``y`` ``(n,)`` of those ``ways`` that change what linear 2 reads, each in
    some slots only. ``contract`` ``(n,)``: elements outside. ``slots``: those with wrong codes."""
    own, exact = right(run.life), []
    rows = run.rows_of(own)
    for way in ways:
        if way.steps != {"reads2"}:
            continue
        other = run.rows_of(way)
        candidates = [k for k in rows if not np.array_equal(rows[k], other[k], equal_nan=True)]
        for choice in _choices(candidates, [k for k in slots if k in candidates]):
            mix = {**rows, **{k: other[k] for k in choice}}
            if not run.outside_rows(own, mix, y).any():
                many = int(contract.sum())
                repeats = _repeats(run, way, choice)
                exact.append(Fit(way.name, way.stage, in_slots(choice), many, many, 0, repeats))
                break
    return exact


def _repeats(run: Predictor, way: Way, choice: Sequence[int]) -> int:
    """See :attr:`Fit.repeats`, of the slots ``choice``: the longest."""
    if not isinstance(way.reads2, Scales):
        return 0
    longest = 0
    for slot in (one for one in run.routed() if one.slot in choice):
        own = Operands.of(run.life, run.source, slot, 2, *run.acts[slot.slot])
        other = way.reads2(own)
        for before, after in ((own.sf, other.sf), (own.weight_sf, other.weight_sf)):
            if np.array_equal(before, after):
                continue
            if not np.array_equal(np.sort(before), np.sort(after)):
                return 0
            period = _period(before)
            if not period:
                return 0
            longest = max(longest, period)
    return longest


def _period(sf: U8) -> int:
    """Groups after which ``(..., G)`` scale bytes repeat; 0 where they do not in half of them."""
    groups = sf.shape[-1]
    return next(
        (n for n in range(1, groups // 2 + 1) if np.array_equal(sf[..., n:], sf[..., :-n])), 0
    )


def _choices(candidates: Sequence[int], first: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Some of the slots ``candidates``, and not all: ``first`` before all others."""
    if 0 < len(first) < len(candidates):
        yield tuple(first)
    sizes = (
        range(1, len(candidates)) if len(candidates) <= _ALL_CHOICES else (1, len(candidates) - 1)
    )
    for size in sizes:
        yield from combinations(candidates, size)


__all__ = ["fits"]
