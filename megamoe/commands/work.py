"""What a verb shows while it works on one thing: a line on a terminal, with the time."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Final

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from megamoe.console import Console

EVERY: Final = 10.0
"""Seconds between two lines of :meth:`Work.pulse` where nobody sees the line that is replaced."""


class Work:
    """A line on stderr while the verb works, if stderr is a terminal. Use as a context manager."""

    def __init__(self, what: str, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(),
            console=self.console, transient=True, disable=not self.console.is_terminal,
            # Results go to stdout, also where it is a file and stderr is a terminal.
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip
        self._task = self._bar.add_task(what, total=None)
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Work:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def now(self, what: str) -> None:
        """Replace the line."""
        self._bar.update(self._task, description=what)

    def pulse(self, what: str) -> None:
        """Replace the line; without a terminal, print it to stderr now and then, with the time."""
        self.now(what)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last >= EVERY:
            self._last = now
            print(f"  {now - self._start:.0f} s: {what}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a result to stdout; the line gives way to it."""
        self._bar.stop()
        print(text, flush=True)
        self._bar.start()
