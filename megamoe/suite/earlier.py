"""The cases that ran before a case in its worker process: what a red can depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from megamoe.printable import quantity

LAST: Final = 3
"""Earlier cases that a line names: the last."""

Entry = Mapping[str, Any]
"""A case of a report, which may be somebody else's."""


class Turn(NamedTuple):
    """When a case ran: the process, and the first and the last of its calls there."""

    process: int
    first: int
    last: int


def turn_of(case: Entry) -> Turn | None:
    """When a case ran; None where it made no call, or where the report does not say."""
    process, calls = case.get("process"), case.get("calls")
    numbers = [process, *calls] if isinstance(calls, (list, tuple)) else []
    if len(numbers) != 3 or not all(type(n) is int and n > 0 for n in numbers):
        return None
    return Turn(*numbers)


def earlier(case: Entry, cases: Sequence[Entry]) -> list[str]:
    """The ids of the cases of the same process that began before the last call of ``case``, in
    their order. On a GPU, where judges share a process, a case can begin amid another."""
    turn = turn_of(case)
    if turn is None:
        return []
    turns = [(turn_of(one), str(one.get("id"))) for one in cases if one.get("id") != case.get("id")]
    before = [(t.first, name) for t, name in turns
              if t is not None and t.process == turn.process and t.first < turn.last]  # fmt: skip
    return [name for _, name in sorted(before)]


def line_of(case: Entry, cases: Sequence[Entry]) -> str:
    """``worker process 2, after 13 cases, the last of them forward/a, forward/b``; empty where the
    report does not say."""
    turn = turn_of(case)
    if turn is None:
        return ""
    before = earlier(case, cases)
    where = f"worker process {turn.process}"
    if not before:
        return f"{where}, as its first case"
    last = ", ".join(before[-LAST:])
    what = "" if len(before) <= LAST else ", the last of them"
    return f"{where}, after {quantity(len(before), 'case')}{what or ':'} {last}"
