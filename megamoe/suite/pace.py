"""The time that a run still takes, by recorded durations and by the cases that have run.

The durations are those of another backend on another machine. So the seconds of a case are taken
for ``a + b * baseline``: a backend may be so much slower for each case, as one that starts anew for
each call, or so many times as slow. Small cases run first and show ``a``; the large ones show
``b``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_LEAST: Final = 0.05
"""Added to the recorded seconds where cases are weighed, so that tiny ones do not decide alone."""
_NO_MORE: Final = 1.0
"""Weight of the first guess that ``a`` is 0, as of so many cases with one second."""
_SLOPE_PRIOR: Final = 0.03
"""Weight of the first guess that ``b`` is 1: little, since each machine has a speed of its own."""


class Pace:
    """The line through the cases that have run; before the first of them, the durations
    themselves."""

    def __init__(self) -> None:
        self._count, self._baseline, self._square = _NO_MORE, 0.0, _SLOPE_PRIOR
        self._took, self._product = 0.0, _SLOPE_PRIOR

    def add(self, baseline: float, took: float) -> None:
        """A case has run. Its error counts in proportion to its length."""
        weight = 1 / (baseline + _LEAST)
        self._count += weight
        self._baseline += weight * baseline
        self._square += weight * baseline * baseline
        self._took += weight * took
        self._product += weight * baseline * took

    def line(self) -> tuple[float, float]:
        """``a`` and ``b`` with the least squared error; neither is below 0."""
        whole = self._count * self._square - self._baseline**2
        a = (self._took * self._square - self._baseline * self._product) / whole
        b = (self._count * self._product - self._baseline * self._took) / whole
        if a < 0:
            return 0.0, self._product / self._square
        if b < 0:
            return self._took / self._count, 0.0
        return a, b

    def eta(
        self, waiting: int, baseline: float, running: Iterable[tuple[float, float]], workers: int
    ) -> float:
        """Seconds until the end. ``waiting`` cases have ``baseline`` seconds together; of each that
        is ``running``, its recorded seconds and those since it began."""
        a, b = self.line()
        work = a * waiting + b * baseline
        rest = [max(0.0, a + b * duration - since) for duration, since in running]
        together = max(1, min(workers, waiting + len(rest)))
        return max((work + sum(rest)) / together, *rest, 0.0)
