"""The meaning of a change of bits: within the class, another contract, or a fault.

Two sides' bits are judged by the goldens of every contract (:mod:`.judged`). Bits that are right
under one contract both before and after have moved within the accumulator class. Bits that were
right under one contract and are now right under another have changed contract, perhaps on purpose.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

SAME: Final = "same bits"
WITHIN: Final = "other bits within the class"
CONTRACT: Final = "other contract"
OUTSIDE: Final = "outside"
CLASSES: Final = (SAME, WITHIN, CONTRACT, OUTSIDE)
"""The harmless first. These names stand in reports; a person reads :data:`WORDS`."""
WORDS: Final = {
    SAME: "the same",
    WITHIN: "right too",
    CONTRACT: "right under another contract",
    OUTSIDE: "right under no contract",
}
"""The end of a sentence on the bits that a change gives."""


def of_step(before: Sequence[str], after: Sequence[str]) -> str:
    """The class of bits that moved, from the contracts that they are right under."""
    if not after:
        return OUTSIDE
    return WITHIN if not before or set(before) & set(after) else CONTRACT


def worst(classes: Iterable[str]) -> str:
    """The one to look at; :data:`SAME` for none."""
    return max(classes, key=CLASSES.index, default=SAME)


def describe(name: str, before: Sequence[str], after: Sequence[str]) -> str:
    """``right under 2026-06 before, under 2026-09 now``."""
    if name != CONTRACT:
        return WORDS[name]
    return f"right under {', '.join(before)} before, under {', '.join(after)} now"
