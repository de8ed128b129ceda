"""What ``--case`` and ``-k`` mean: one syntax in every verb, in the environment and under pytest.

A pattern is words with commas between them. A word is a glob over the whole id (``kind/name``) or
the whole name: ``*`` is any text, ``?`` one character, ``[ab]`` one of these; a word without them
is one case. A case is chosen if a word matches it. A word after ``!`` takes cases away; where all
words do, they take away from all cases. The order of words does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Final, Protocol, TypeVar

from megamoe.cases.kind import CaseError


class Named(Protocol):
    """What a pattern looks at: a case, or a line of its file."""

    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)

HELP: Final = (
    "cases whose id or name matches: globs with commas between them, !GLOB takes away, as "
    "'forward/*,!*-t384'"
)
MARKS: Final = "*?,!"
"""Characters of a pattern that an expression of pytest's own ``-k`` cannot have."""


def matching(cases: Iterable[N], pattern: str) -> list[N]:
    """The cases that ``pattern`` means, in their order.

    Raises :class:`CaseError` for an empty word, a word that matches no case, and a pattern that
    leaves none.
    """
    cases = list(cases)
    chosen: set[str] = set()
    taken: set[str] = set()
    words = [word.strip() for word in pattern.split(",")]
    for word in words:
        glob = word.removeprefix("!")
        if not glob:
            raise CaseError(f"pattern {pattern!r} has an empty word; write globs with a comma "
                            "between two")  # fmt: skip
        found = {c.id for c in cases if fnmatchcase(c.id, glob) or fnmatchcase(c.name, glob)}
        if not found:
            raise CaseError(_unknown(cases, glob))
        (taken if word.startswith("!") else chosen).update(found)
    if all(word.startswith("!") for word in words):
        chosen = {c.id for c in cases}
    left = [c for c in cases if c.id in chosen - taken]
    if not left:
        raise CaseError(f"pattern {pattern!r} takes away every case that it chooses")
    return left


def _unknown(cases: list[N], glob: str) -> str:
    inside = sum(glob in c.id for c in cases)
    hint = f"'*{glob}*' matches {inside}; " if inside else ""
    return f"unknown case: nothing matches {glob!r}; {hint}`megamoe list` shows all"
