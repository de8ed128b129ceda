"""Which worker of a pool serves which judge: all calls of a case are made in one process.

A law compares calls with each other, and an earlier call may leave something behind for a later
one. If each call went to whichever worker is free, luck would decide what the law sees.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

W = TypeVar("W")
"""A worker, or a team of them."""


class Seats(Generic[W]):
    """The workers, the judges that have one for their present case, and those at work."""

    def __init__(self, workers: Sequence[W]) -> None:
        self._workers = list(workers)
        self._is_busy = [False] * len(self._workers)
        self._places: dict[int, tuple[str, int]] = {}
        """By judge: its present case, and the index of the worker that serves it."""
        self._change = threading.Condition()

    @contextmanager
    def worker(self, judge: int, case: str) -> Iterator[W]:
        """The worker for a call of ``case``, for this caller alone meanwhile. For a case's first
        call an idle one, if possible one that no other judge is to come back to; later the same."""
        with self._change:
            self._change.wait_for(lambda: self._choice(judge, case) is not None)
            at = self._choice(judge, case)
            assert at is not None
            self._is_busy[at], self._places[judge] = True, (case, at)
        try:
            yield self._workers[at]
        finally:
            with self._change:
                self._is_busy[at] = False
                self._change.notify_all()

    def leave(self, judge: int) -> None:
        """The judge has no further call."""
        with self._change:
            self._places.pop(judge, None)

    def _choice(self, judge: int, case: str) -> int | None:
        """The index of a worker that is idle; None where the call has to wait."""
        place = self._places.get(judge)
        if place is not None and place[0] == case:
            return None if self._is_busy[place[1]] else place[1]
        others = [at for other, (_, at) in self._places.items() if other != judge]
        idle = (i for i, busy in enumerate(self._is_busy) if not busy)
        return min(idle, key=others.count, default=None)
