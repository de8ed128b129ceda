"""What somebody may have meant by a name that nothing has."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from difflib import get_close_matches

NAMED = 6
"""Names that contain a word, as far as they are listed."""
MEANT = {"gpu": "cuda"}
"""Words that mean a name which they are not like."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The name in ``known`` that is most like ``word``; empty if none is alike."""
    known = list(known)
    if MEANT.get(word) in known:
        return MEANT[word]
    return next(iter(get_close_matches(word, known, 1, 0.6)), "")


def hint(word: str, known: Iterable[str]) -> str:
    """``; did you mean NAME?``, to put behind a message; empty if no name is alike.

    Where several names contain the word, these are named: at most :data:`NAMED`.
    """
    known = list(known)
    name = nearest(word, known)
    holders = [one for one in known if len(word) > 2 and word in one]
    if len(holders) > 1:
        more = f" and {len(holders) - NAMED} more" if len(holders) > NAMED else ""
        return f"; did you mean one of {', '.join(holders[:NAMED])}{more}?"
    name = holders[0] if holders else name
    return f"; did you mean {name}?" if name else ""


if __name__ == "__main__":  # the Makefile asks: the word, then the names
    print(hint(sys.argv[1], sys.argv[2:]))
