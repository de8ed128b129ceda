"""The seconds that a case may take: as asked for, until a case hangs; then what passed teaches.

A hang costs its whole limit, and one fault can make dozens of cases hang. The cases that passed
before show how slow the backend is, so the limit of the others may be a multiple of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from megamoe.cases.shards import DEFAULT_SECONDS
from megamoe.judge import BAD, HANG, Verdict

ENOUGH: Final = 5
"""Cases that must have passed."""
TIMES: Final = 5.0
"""A limit is so many times what the slowest case that passed leads to expect."""
LEAST: Final = 10.0
"""Seconds of a limit, at least: a kernel may be compiled in its first call."""
_OVERHEAD: Final = 0.5
"""Seconds that a case takes besides its recorded ones without being a slow one: workers share
cores."""


class Patience:
    """The limit of each case of a run. ``timeout``: seconds, of ``--timeout`` or by default;
    ``learns``: nobody asked for them. ``durations``: seconds of each case on another machine."""

    def __init__(self, timeout: float, learns: bool, durations: Mapping[str, float]) -> None:
        self.timeout, self.learns, self._durations = timeout, learns, durations
        self._passes, self._slowest, self._ratio = 0, 0.0, 1.0
        self.has_hang = False

    def add(self, verdict: Verdict) -> str:
        """Take note of a case; a line to print where the limits change."""
        if verdict.status == "pass":
            self._passes += 1
            self._slowest = max(self._slowest, verdict.seconds)
            expected = self._seconds(verdict.case_id) + _OVERHEAD
            self._ratio = max(self._ratio, verdict.seconds / expected)
        if verdict.status not in BAD or HANG not in verdict.reason or self.has_hang:
            return ""
        self.has_hang = True
        if not self._is_short:
            return ""
        return (
            f"a case hangs; from now on one of a second has {self._limit(1.0):.0f} s, not "
            f"{self.timeout:g}: {TIMES:g} times what the {self._passes} that passed took "
            "(--timeout S: S for each case; --maxfail 1: stop at a red)"
        )

    def of(self, case_id: str) -> float | None:
        """The seconds of a case; None: those that were asked for."""
        limit = self._limit(self._seconds(case_id))
        return limit if self._is_short and limit < self.timeout else None

    @property
    def _is_short(self) -> bool:
        return self.learns and self.has_hang and self._passes >= ENOUGH

    def _limit(self, duration: float) -> float:
        """The seconds of a case with these recorded ones: no case may be slower than both the
        slowest so far and the slowest so far in proportion."""
        expected = max(self._slowest, self._ratio * (duration + _OVERHEAD))
        return min(self.timeout, math.ceil(max(LEAST, TIMES * expected)))

    def _seconds(self, case_id: str) -> float:
        return self._durations.get(case_id, DEFAULT_SECONDS)
