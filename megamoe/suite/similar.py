"""Other cases that a fault of one case should show in: larger, of several tiles, or of plain data.

Apart from :mod:`megamoe.suite.telling`, since these draw the routing, which takes torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from megamoe.cases import Case
from megamoe.cases import form_of as form
from megamoe.suite.routed import Routed, routed
from megamoe.suite.telling import rank, size, special_slots, special_values, telling

_TILE: Final = 16
"""Rows of a small tile of an expert."""
_PLAIN: Final = Routed({0: 1 << 20 | 1}, 0, 1 << 20 | 1, 0)
"""Many rows, no tile of which is full at the end."""


def larger(case: Case, cases: Iterable[Case]) -> list[Case]:
    """Those of ``cases`` with the subject and the features of ``case`` that are larger, have no
    fewer tokens, and tell causes apart better or are more than twice as large; the best first. A
    case of another subject need not be red by the same fault."""
    own = telling(case)
    candidates = [
        other for other in cases
        if _is_alike(case, other)
        and (telling(other) > own
             or (telling(other) >= own and size(other) > 2 * size(case)))
    ]  # fmt: skip
    return sorted(candidates, key=rank)


def plain(case: Case, cases: Iterable[Case]) -> list[Case]:
    """Those of ``cases`` of the quick tier with plain data that tell causes apart best, and with
    the features of ``case``; those with its clamp before others, then the smallest first."""
    candidates = [
        other for other in cases
        if other.kind == "forward" and other.tier == "quick" and other.id != case.id
        and telling(other) == 2 and _has_features_of(case, other)
    ]  # fmt: skip
    clamp = case.params.get("clamp")
    return sorted(candidates, key=lambda other: (other.params.get("clamp") != clamp, size(other)))


def of_tiles(case: Case, cases: Iterable[Case]) -> list[Case]:
    """Those of ``cases`` with the subject and the features of ``case`` that tell in which rows of
    an expert a fault is: each expert with rows has more than two tiles of :data:`_TILE`. Those
    whose routing has most that a fault may need stand first. None where ``case`` is of this sort.
    """
    if _has_tiles(routed(case)):
        return []
    ranking = []
    for other in cases:
        if _is_alike(case, other) and telling(other) and other.rows is None:
            its = routed(other)
            if its is not None and _has_tiles(its):
                ranking.append((-len(its.beyond(_PLAIN)), size(other), other))
    return [other for *_, other in sorted(ranking, key=lambda one: one[:2])]


def _has_tiles(own: Routed | None) -> bool:
    """Whether each of several experts with rows has more than two tiles."""
    return own is not None and len(own.rows) > 1 and min(own.rows.values()) > 2 * _TILE


def _has_features_of(case: Case, other: Case) -> bool:
    return (
        form(other.kind).features(other) == form(case.kind).features(case)
        and other.params.get("fast_math") == case.params.get("fast_math")
        and _has_clamp(other) == _has_clamp(case)
    )


def _is_alike(case: Case, other: Case) -> bool:
    """Whether ``other`` is a case of the subject and the features of ``case``, and not smaller."""
    return (
        other.kind == case.kind
        and _has_features_of(case, other)
        and other.params["tokens"] >= case.params["tokens"]
        and size(other) >= size(case)
        and _has_subject_of(case, other)
    )


def _has_subject_of(case: Case, other: Case) -> bool:
    """Whether ``other`` has all that is special in ``case``. Chosen values are those of one
    subject only, whose cases have names that begin alike."""
    values, slots = special_values(case.params), special_slots(case.params)
    if not slots <= special_slots(other.params):
        return False
    return not values or (
        values <= special_values(other.params)
        and case.name.split("-")[:2] == other.name.split("-")[:2]
    )


def _has_clamp(case: Case) -> bool:
    return case.params.get("clamp", "none") not in (None, "none")
