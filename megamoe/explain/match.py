"""The deviations that explain an output: exactly, in part, or not at all.

A value *differs* if the contract does not allow it. A deviation *explains* it if the deviation
gives it, and *contradicts* a value that the contract allows and the deviation does not give. An
exact match explains every value that differs and contradicts none. An exact match in some slots
only explains at least eight values, and is offered where no deviation of the whole token is exact.
A match in part leaves at most half as many values wrong as the contract does, and explains at least
eight more than it leaves: a few values agree by chance. It is offered only where no match is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
_MARGIN: Final = 8
"""Scale bytes take few values: 3 of 4 have agreed by chance (``tools/false_names.py``)."""
PARTIAL_AT_MOST: Final = 3
"""Matches in part that are offered, the best first."""


@dataclass(frozen=True)
class Fit:
    """The fit of one deviation to the values of the backend."""

    name: str
    stage: str
    where: str
    """The slots to which it is limited; empty if it holds for the whole token."""
    explains: int
    differing: int
    contradicts: int

    @property
    def unexplained(self) -> int:
        """Values that differ and that the deviation does not give."""
        return self.differing - self.explains

    @property
    def left(self) -> int:
        """Values that are wrong by this deviation."""
        return self.unexplained + self.contradicts

    @property
    def is_exact(self) -> bool:
        """It gives every value that was shown.

        A choice of slots is one more freedom, so it needs as much evidence as a match in part.
        """
        return not self.left and self.explains >= (_MARGIN if self.where else 1)

    @property
    def is_partial(self) -> bool:
        """Whether it halves the wrong values at least, and leaves some."""
        halves = 0 < self.left <= self.differing / 2
        return halves and self.explains - self.left >= _MARGIN

    def plain(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "stage": self.stage,
            "what": self.name,
            "where": self.where,
            "explains": self.explains,
            "unexplained": self.unexplained,
            "contradicts": self.contradicts,
        }


def fit(name: str, stage: str, contract: Bools, way: Bools, slots: list[int] | None = None) -> Fit:
    """The fit of a deviation: ``(S, n)`` values that contract and deviation do not give.

    ``slots``: the name of each row. A deviation that makes some rows better and others worse is
    taken to hold in the better rows alone. Without ``slots`` there is one row.
    """
    differing = int(contract.sum())
    before, after = contract.sum(axis=1), way.sum(axis=1)
    better, worse = after < before, after > before
    where, rows = "", np.ones(len(contract), np.bool_)
    if slots is not None and worse.any() and better.any():
        rows = better
        names = [str(slots[k]) for k in np.flatnonzero(better)]
        where = (
            f"in slot {names[0]} only" if len(names) == 1 else f"in slots {', '.join(names)} only"
        )
    explains = int((contract & ~way)[rows].sum())
    contradicts = int((~contract & way)[rows].sum())
    return Fit(name, stage, where, explains, differing, contradicts)


def report(fits: list[Fit], differing: int, of: int, compared: str, tried: int) -> dict[str, Any]:
    """The result for one step between two stages: exact matches, or the best in part.

    ``follows``: the exact matches are those of the step before, which explain this one too.
    """
    exact = [f for f in fits if f.is_exact]
    exact = [f for f in exact if not f.where] or exact
    partial: list[Fit] = []
    if not exact:
        partial = sorted((f for f in fits if f.is_partial), key=lambda f: f.left)
    return {
        "compared": compared,
        "of": of,
        "differing": differing,
        "tried": tried,
        "not_tried": 0,
        "follows": False,
        "exact": [f.plain() for f in exact],
        "partial": [f.plain() for f in partial[:PARTIAL_AT_MOST]],
    }
