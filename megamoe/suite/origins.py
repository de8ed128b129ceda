"""The lines of the backend that raised the exceptions of a run: what a last line says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from megamoe.judge import origin_of
from megamoe.printable import quantity

OWN_FAULTS: Final = (
    "NameError", "UnboundLocalError", "AttributeError", "ImportError", "ModuleNotFoundError",
    "SyntaxError", "IndentationError", "TypeError",
)  # fmt: skip
"""Exceptions that a smaller problem does not explain: the line that raised them does."""
CALL: Final = "in _invoke"
"""The end of a place in the worker's own line that calls the backend."""
MOST_ALIKE: Final = 3
"""Earlier reds that a command names."""


def own_fault(case: Mapping[str, Any]) -> str:
    """What to mend where the backend's code is wrong whatever the problem is: ``FILE, line N, in
    NAME``. If that line is the worker's call, the backend's arguments are wrong."""
    origin = origin_of(case["reason"]) if case["status"] == "error" else None
    if origin is None or origin.rest or origin.type not in OWN_FAULTS:
        return ""
    return "the arguments of the backend's method" if origin.place.endswith(CALL) else origin.place


def what_raises(case: Mapping[str, Any]) -> str:
    """``what raises at FILE, line N, in NAME``: the line need not be the wrong one. Empty where the
    case tells of no exception, or of one in the worker's own line."""
    place = _type_and_place(case)
    return f"what raises at {place[1]}" if place and not place[1].endswith(CALL) else ""


def line_beside(case: Mapping[str, Any], reds: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line that names the place where a red that passes alone raised, and how many ``reds``
    raised there; none where there is no place."""
    if not what_raises(case):
        return []
    kind, place = _type_and_place(case) or ("", "")
    count = quantity(sum(_type_and_place(red) == (kind, place) for red in reds), "red")
    return [f"{count} raised {kind} at {place}: what that line uses may be what outlives a call"]


def alike_before(
    case: Mapping[str, Any], reds: Sequence[Mapping[str, Any]], order: Sequence[str]
) -> list[str]:
    """The ids of the last ``reds`` that stand before a red in the ``order`` of a run and raised the
    same type of exception at the same line, at most :data:`MOST_ALIKE`: what made the one raise is
    likely to have made the other raise."""
    place = _type_and_place(case)
    if place is None or case["id"] not in order:
        return []
    alike = {red["id"] for red in reds if _type_and_place(red) == place}
    earlier = order[: order.index(case["id"])]
    return [name for name in earlier if name in alike][-MOST_ALIKE:]


def _type_and_place(case: Mapping[str, Any]) -> tuple[str, str] | None:
    origin = origin_of(case["reason"]) if case["status"] == "error" else None
    return None if origin is None else (origin.type, origin.place)
