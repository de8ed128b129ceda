"""What somebody may have meant by a name that nothing has."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from difflib import get_close_matches

MAX_NAMES = 6
"""Names that contain a word, as far as they are listed."""
SYNONYMS = {
    "gpu": "cuda", "remap": "eplb", "ls": "list", "cases": "list",
    **dict.fromkeys(("test", "run", "judge", "verify"), "check"),
    **dict.fromkeys(("float32", "f32", "float", "float64", "fp64", "double"), "fp32"),
}  # fmt: skip
"""Words that mean a name which they are not like. A sum wider than fp32 is of the class fp32."""


def nearest(word: str, names: Iterable[str]) -> str:
    """The name in ``names`` that is most like ``word``, one that begins with it before others;
    empty if none is alike."""
    names = list(names)
    if SYNONYMS.get(word) in names:
        return SYNONYMS[word]
    names = [name for name in names if len(word) > 2 and name.startswith(word)] or names
    of_lower = {name.lower(): name for name in reversed(names)}  # the first of two that are alike
    return next((of_lower[n] for n in get_close_matches(word.lower(), of_lower, 1, 0.6)), "")


def hint(word: str, names: Iterable[str]) -> str:
    """``; did you mean NAME?``, to put behind a message; empty if no name is alike. What stands
    behind it is added by :func:`follow`.

    Where several names contain the word, these are named: at most :data:`MAX_NAMES`.
    """
    names = list(names)
    name = nearest(word, names)
    holders = [one for one in names if len(word) > 2 and word in one]
    if len(holders) > 1:
        more = f" and {len(holders) - MAX_NAMES} more" if len(holders) > MAX_NAMES else ""
        return f"; did you mean one of {', '.join(holders[:MAX_NAMES])}{more}?"
    name = holders[0] if holders else name
    return f"; did you mean {name}?" if name else ""


def follow(text: str, more: str) -> str:
    """``text; more``, and ``text? More`` where ``text`` ends with a question."""
    return f"{text} {more[:1].upper()}{more[1:]}" if text.endswith("?") else f"{text}; {more}"


if __name__ == "__main__":  # the Makefile asks: the word, then the names
    print(hint(sys.argv[1], sys.argv[2:]))
