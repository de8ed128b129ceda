"""What ``megamoe`` prints with: a terminal obeys no text from outside, and a pipe may close.

Each ``print`` of a verb goes through :func:`megamoe.printable.guard`. :class:`Console` draws
colours and bars. It writes past that filter and filters the texts that it is given.
"""

from __future__ import annotations

import os
from typing import IO, Any, Final, NoReturn

import rich.console
from rich.console import ConsoleOptions, ConsoleRenderable, RenderResult
from rich.measure import Measurement
from rich.segment import Segment

from megamoe.printable import printable, unfiltered


class _Clean:
    """A renderable whose text is printable; its styles stay."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self.inner = inner

    def __rich_console__(
        self, console: rich.console.Console, options: ConsoleOptions
    ) -> RenderResult:
        for part in console.render(self.inner, options):
            text = part.text if part.control else printable(part.text, lines=True)
            yield Segment(text, part.style, part.control)

    def __rich_measure__(
        self, console: rich.console.Console, options: ConsoleOptions
    ) -> Measurement:
        return Measurement.get(console, options, self.inner)


class _Hook(rich.console.RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Clean(one) for one in renderables]


NO_WIDTH: Final = 100_000
"""Columns of what is no terminal: as many as no line has."""


class Console(rich.console.Console):
    """rich's console, for texts from outside. A closed pipe is a ``BrokenPipeError``. A pipe or a
    file has no width, unless the variable COLUMNS gives it one: no line there is wrapped or cut."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if "width" not in options and not self.is_terminal and not os.environ.get("COLUMNS"):
            self.width = NO_WIDTH
        self.push_render_hook(_Hook())

    @property
    def file(self) -> IO[str]:
        """The stream below the filter, which would remove the colours of this console."""
        stream: IO[str] = unfiltered(super().file)
        return stream

    @file.setter
    def file(self, new: IO[str]) -> None:
        self._file = new

    def on_broken_pipe(self) -> NoReturn:
        """Whoever owns the run decides what a closed pipe means."""
        raise BrokenPipeError
