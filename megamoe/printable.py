"""Text from outside (a backend, a commit, a file) without what a terminal would obey."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import IO, Any, Final

_CONTROL: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
    "\ufffe\uffff]"
)
"""Control characters, separators of lines, changes of writing direction, halves of surrogates."""
_LINES_TOO: Final = re.compile(_CONTROL.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))
"""The same without tab and newline."""


def printable(text: str, lines: bool = False) -> str:
    """``text`` with a ``?`` for each character that moves a cursor, changes a colour or turns the
    writing round; with ``lines`` tabs and newlines stay."""
    return (_LINES_TOO if lines else _CONTROL).sub("?", text)


def all_printable(value: Any) -> Any:
    """JSON data with :func:`printable` applied to every string, keys too; lines stay."""
    if isinstance(value, str):
        return printable(value, lines=True)
    if isinstance(value, dict):
        return {all_printable(key): all_printable(below) for key, below in value.items()}
    if isinstance(value, list):
        return [all_printable(below) for below in value]
    return value


class _Filter:
    """A stream whose text is printable; all else is the stream's own."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return self.stream.write(printable(text, lines=True))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def guard() -> Iterator[None]:
    """In it, what is printed moves no cursor and changes no colour."""
    with redirect_stdout(_filtered(sys.stdout)), redirect_stderr(_filtered(sys.stderr)):
        yield


def _filtered(stream: Any) -> Any:
    """None, for a descriptor that is closed, stays None: ``print`` knows it."""
    return stream if stream is None or isinstance(stream, _Filter) else _Filter(stream)


def unfiltered(stream: Any) -> Any:
    """The stream below the filter of :func:`guard`."""
    return stream.stream if isinstance(stream, _Filter) else stream


def quantity(count: int, noun: str, plural: str = "") -> str:
    """``1 case``, ``2 cases``; ``plural`` where it is not the noun and an s."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def verb(count: int, singular: str = "is", plural: str = "are") -> str:
    """``is`` for one, else ``are``; or another verb in its two forms."""
    return singular if count == 1 else plural


def part(count: int, total: int, noun: str, plural: str = "") -> str:
    """``2 of 3 cases``; ``the one case`` where one of one is meant. :func:`verb` of ``count`` goes
    with both."""
    if count == total == 1:
        return f"the one {noun}"
    return f"{count} of {quantity(total, noun, plural)}"
