"""What ``megamoe`` prints with: a terminal obeys no text from outside, and a pipe may close.

In :func:`guarded` each ``print`` goes through :func:`megamoe.printable.printable`. Colours and bars
are drawn by :class:`Console`, which writes past that filter and filters the texts that it is given.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import IO, Any, NoReturn

import rich.console
from rich.console import ConsoleOptions, ConsoleRenderable, RenderResult
from rich.measure import Measurement
from rich.segment import Segment

from megamoe.printable import printable


class _Filtered:
    """A stream whose text is printable; all else is the stream's own."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(printable(text, lines=True))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def guarded() -> Iterator[None]:
    """In it, what is printed moves no cursor and changes no colour."""
    with redirect_stdout(_filtered(sys.stdout)), redirect_stderr(_filtered(sys.stderr)):
        yield


def _filtered(stream: Any) -> Any:
    """None, for a descriptor that is closed, stays None: ``print`` knows it."""
    return stream if stream is None or isinstance(stream, _Filtered) else _Filtered(stream)


def _unfiltered(stream: Any) -> Any:
    return stream.stream if isinstance(stream, _Filtered) else stream


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


class Console(rich.console.Console):
    """rich's console, for texts from outside. A closed pipe is a ``BrokenPipeError``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.push_render_hook(_Hook())

    @property
    def file(self) -> IO[str]:
        """Where it writes: past the filter, since its own sequences are meant."""
        found: IO[str] = _unfiltered(super().file)
        return found

    @file.setter
    def file(self, new: IO[str]) -> None:
        self._file = new

    def on_broken_pipe(self) -> NoReturn:
        """Whoever owns the run decides what a closed pipe means."""
        raise BrokenPipeError
