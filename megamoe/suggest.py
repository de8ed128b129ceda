"""What somebody may have meant by a name that nothing has."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from difflib import get_close_matches

MEANT = {"gpu": "cuda"}
"""Words that mean a name which they are not like."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The name in ``known`` that is most like ``word``; empty if none is alike."""
    known = list(known)
    if MEANT.get(word) in known:
        return MEANT[word]
    return next(iter(get_close_matches(word, known, 1, 0.6)), "")


def hint(word: str, known: Iterable[str]) -> str:
    """``; did you mean NAME?``, to put behind a message; empty if no name is alike."""
    name = nearest(word, known)
    return f"; did you mean {name}?" if name else ""


if __name__ == "__main__":  # the Makefile asks: the word, then the names
    print(hint(sys.argv[1], sys.argv[2:]))
