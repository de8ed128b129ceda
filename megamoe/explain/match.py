"""The deviations that explain an output: exactly, in part, or not at all.

A value *differs* if the contract does not allow it. A deviation *explains* it if the deviation
gives it, and *contradicts* a value that the contract allows and the deviation does not give. An
exact match explains every value that differs and contradicts none. An exact match in some slots
only explains at least eight values, and is offered where no deviation of the whole token is exact.
A match in part leaves at most half as many values wrong as the contract does, and explains at least
eight more than it leaves: a few values agree by chance. It is offered only where no match is exact.
If it contradicts a value, the output refutes it: it comes last, with the number of these values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.explain.extent import Extent
from megamoe.printable import quantity
from megamoe.spec.formats import GROUP

Bools = npt.NDArray[np.bool_]
MARGIN: Final = 8
"""Scale bytes take few values: 3 of 4 have agreed by chance (``tools/false_names.py``)."""
PARTIAL_AT_MOST: Final = 3
"""Matches in part that are offered, the best first."""
Names = frozenset[tuple[str, str]]
"""Stage and :func:`general` name of some deviations."""
_OWN: Final = (
    (re.compile(r"\bslot \d+ \([^)]*\)( takes the weights of expert \d+)?"), r"a slot\1"),
    (re.compile(r"\bslot \d+ is computed by expert \d+ and not by \d+"), "another expert"),
    (re.compile(r" takes the weights of expert \d+"), " takes other weights"),
    (re.compile(r"\bthose of other slots: .*$"), "those of other slots"),
    (re.compile(r"\bthose of token \d+$"), "those of a token beside"),
)
"""Parts of names that hold for one token only."""


def general(name: str) -> str:
    """A deviation's name without the slots and experts of one token: the same for all tokens."""
    for pattern, text in _OWN:
        name = pattern.sub(text, name)
    return name


def is_among(only: Names | None, stage: str, name: str) -> bool:
    """Whether a deviation is one of those that are wanted; None: all are."""
    return only is None or (stage, general(name)) in only


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
    repeats: int = 0
    """Groups after which the scale bytes of these slots repeat, where the deviation reads them in
    another order: further orders give the same values. 0 where they do not repeat."""
    extent: Extent | None = None
    """The channels that have the deviation, and those that have it not; None where nobody looked
    for them: then all have it."""

    @property
    def residue(self) -> int:
        """Values that differ and that the deviation does not give."""
        return self.differing - self.explains

    @property
    def misses(self) -> int:
        """Values that are wrong by this deviation."""
        return self.residue + self.contradicts

    @property
    def is_exact(self) -> bool:
        """It gives every value that was shown.

        A choice of slots or channels is one more freedom, so it needs as much evidence as a match
        in part.
        """
        is_choice = self.where or (self.extent is not None and self.extent.lacks.any())
        return not self.misses and self.explains >= (MARGIN if is_choice else 1)

    @property
    def is_partial(self) -> bool:
        """Whether it halves the wrong values at least, and leaves some."""
        halves = 0 < self.misses <= self.differing / 2
        return halves and self.explains - self.misses >= MARGIN

    @property
    def is_refuted(self) -> bool:
        """Whether it would change a value that is right: the kernel does not do exactly this."""
        return self.contradicts > 0

    def plain(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "stage": self.stage,
            "what": self.name,
            "where": self.where,
            "explains": self.explains,
            "unexplained": self.residue,
            "contradicts": self.contradicts,
            "repeats": self.repeats,
            "channels": "" if self.extent is None else self.extent.text,
            "extent": None if self.extent is None else self.extent.plain(),
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
        where = in_slots([slots[k] for k in np.flatnonzero(better)])
    explains = int((contract & ~way)[rows].sum())
    contradicts = int((~contract & way)[rows].sum())
    return Fit(name, stage, where, explains, differing, contradicts)


def in_slots(slots: Sequence[int]) -> str:
    """As "in slot 2 only", "in slots 0, 2 only"."""
    return f"in slot{'s' if len(slots) > 1 else ''} {', '.join(map(str, slots))} only"


@dataclass(frozen=True)
class Evidence:
    """The wrong values of one step, and how many decisions they are.

    A scale byte decides the codes of its group: a wrong byte is one decision, with all codes of
    the group. A wrong code beside a right byte is one, and so is an element of ``y``.
    """

    step: str
    """The name of the step: staging, codes or y."""
    values: int
    decisions: int
    text: str
    """What is wrong, as "one group of one slot"."""

    @classmethod
    def of_groups(cls, step: str, wrong: Bools) -> Evidence:
        """``wrong`` ``(S, G + 32 G)``: scale bytes, then codes."""
        groups = wrong.shape[1] // (GROUP + 1)
        codes = wrong[:, groups:].reshape(len(wrong), groups, GROUP)
        decisions = np.where(wrong[:, :groups], 1, codes.sum(axis=2))
        hits = decisions > 0
        text = count_in_words(int(hits.sum()), "group")
        if step == "codes":
            text += f" of {count_in_words(int(hits.any(axis=1).sum()), 'slot')}"
        return cls(step, int(wrong.sum()), int(decisions.sum()), text)

    @classmethod
    def of_elements(cls, step: str, wrong: Bools) -> Evidence:
        """Each of ``(n,)`` values is a decision."""
        count = int(wrong.sum())
        return cls(step, count, count, count_in_words(count, "element"))


def count_in_words(count: int, noun: str) -> str:
    """As "one group", "two groups", "3 groups"."""
    number, _, rest = quantity(count, noun).partition(" ")
    word = {"1": "one", "2": "two"}.get(number, number)
    return f"{word} {rest}"


def in_part(fits: Iterable[Fit]) -> list[Fit]:
    """The matches in part that are offered, the best first, those that are refuted last."""
    partial = sorted((f for f in fits if f.is_partial), key=lambda f: (f.is_refuted, f.misses))
    return partial[:PARTIAL_AT_MOST]


def report(
    fits: list[Fit], evidence: Evidence, of: int, subject: str, attempts: int,
    only: Names | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The result for one step between two stages: exact matches, or the best in part.

    ``overflow`` is filled by :mod:`megamoe.explain.overflow`.
    ``follows``: the exact matches are those of the step before, which explain this one too.
    ``tried_on`` and ``alone`` are of :mod:`megamoe.explain.others`. ``may_be``: a match that one
    token may give by chance; with its ``chance`` for this token, and whether it ``is_unique``. With
    ``only`` the deviations were chosen on another token, so few values are enough here.
    """
    differing = evidence.values
    if only is None:
        exact = [f for f in fits if f.is_exact]
        exact = [f for f in exact if not f.where] or exact
    else:
        exact = [f for f in fits if f.explains and not f.misses]
    return {
        "compared": subject,
        "of": of,
        "differing": differing,
        "step": evidence.step,
        "decisions": evidence.decisions,
        "evidence": evidence.text,
        "tried": attempts,
        "not_tried": 0,
        "overflow": [],
        "follows": False,
        "tried_on": [],
        "alone": [],
        "may_be": None,
        "exact": [f.plain() for f in exact],
        "partial": [] if exact else [f.plain() for f in in_part(fits)],
    }
