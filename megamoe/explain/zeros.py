"""Causes by which a slot becomes zero, as one cause.

The last 128 of K, where these are all of K; another expert's weights, where these are zeros; a row
of zeros in place of the token's: each gives zeros and nothing else, so no value tells them apart.
The cause is that the sums are zero, and the others are ways to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from megamoe.explain.deviations.combine import lost_slot
from megamoe.explain.deviations.requantise import NO_CODES
from megamoe.explain.deviations.zeros import ACTIVATIONS, SUMS
from megamoe.explain.match import Fit
from megamoe.explain.places import ZERO_SLOT, ZERO_Y
from megamoe.explain.points import Bools, Points
from megamoe.explain.predict import Predictor
from megamoe.explain.ways import TOTALS, Way

Plain = dict[str, Any]
Ways = Mapping[tuple[str, str], Way]
OF_CODES: Final = (SUMS, ACTIVATIONS, ZERO_SLOT)
"""Deviations of codes that say no more than that the values are zero."""
_OF_SUMS: Final = frozenset({"reads13", "reads2", "total"})
"""The steps of deviations of sums."""


def of_codes(report: Plain, fits: Sequence[Fit], ways: Ways, run: Predictor, wrong: Bools) -> None:
    """Join the causes of wrong codes in ``report``, what :func:`megamoe.explain.match.report` says
    of ``fits``. ``wrong`` ``(S, n)``: the values outside, by routed slot."""
    slots = [slot for slot, row in zip(run.routed(), wrong, strict=True) if row.any()]

    def gives(_: Fit, way: Way) -> bool:
        if way.name in (*OF_CODES, NO_CODES):
            return True
        return way.steps <= _OF_SUMS and all(run.gives_zeros(way, slot) for slot in slots)

    _join(report, fits, ways, OF_CODES, gives)


def of_y(report: Plain, fits: Sequence[Fit], ways: Ways, run: Predictor | Points) -> None:
    """The same for ``y``: from the codes that ``run`` knows, or of points, from ``x`` on."""
    slots = run.life.slots
    by_name = {ZERO_Y: slots, **{lost_slot(slot): [slot] for slot in slots}}

    def gives(head: Fit, way: Way) -> bool:
        if way.name in by_name:
            return len(by_name[way.name]) == len(by_name[head.name])
        if isinstance(run, Predictor):
            return way.steps <= _OF_SUMS and all(
                run.gives_zero_row(way, slot) for slot in by_name[head.name]
            )
        if not way.steps <= _OF_SUMS and way.name not in (ZERO_SLOT, NO_CODES):
            return False
        rows = run.rows(way, "exact", TOTALS["exact"])
        return not any(rows[slot.slot].any() for slot in by_name[head.name])

    _join(report, fits, ways, by_name, gives)


def _join(
    report: Plain, fits: Sequence[Fit], ways: Ways, heads: Iterable[str],
    gives: Callable[[Fit, Way], bool],
) -> None:  # fmt: skip
    """Put the first of ``heads`` that is exact before the other causes; those that give the same
    zeros come next, with its name as ``same_as``.

    A cause in some slots only is among them even where the causes of all slots are ways to zeros:
    a slot that takes the zeros of another expert is no better than a slot that is zero.
    """
    exact = [one for one in fits if one.is_exact]
    head = next((one for name in heads for one in exact if one.name == name), None)
    if head is None:
        return
    same = [one for one in exact if one is not head and gives(head, ways[one.stage, one.name])]
    others = [one for one in exact if one is not head and one not in same]
    if not head.where:
        same = [one for one in same if not one.where]
    if not all(one.where for one in exact):
        others = [one for one in others if not one.where]
        if head.where and others:
            return
    report["exact"] = [
        head.plain(), *({**one.plain(), "same_as": head.name} for one in same),
        *(one.plain() for one in others),
    ]  # fmt: skip


__all__ = ["OF_CODES", "of_codes", "of_y"]
