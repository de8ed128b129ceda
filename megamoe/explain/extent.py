"""The channels in which a deviation holds: a range of them, or the same part of each tile.

Each token shows channels that have the deviation, and channels that have it not: there it would
change right values. Where it changes nothing, a channel says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Plain = dict[str, Any]
_PERIODS: Final = (2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Channels after which a part of a tile or of a vector comes again."""
_FEWEST: Final = 2
"""Periods that show their part; one alone is a range."""


@dataclass(frozen=True)
class Extent:
    """What was compared of the channels of a deviation, ``(n,)`` each."""

    has: Bools
    """Channels that only the deviation gives."""
    lacks: Bools
    """Channels where it would change right values."""
    compared: Bools
    """Channels that were looked at."""

    def join(self, other: Extent) -> Extent | None:
        """What both show; None where they contradict each other."""
        if (self.has & other.lacks).any() or (self.lacks & other.has).any():
            return None
        pairs = ((getattr(self, f), getattr(other, f)) for f in ("has", "lacks", "compared"))
        return Extent(*(a | b for a, b in pairs))

    def within(self, count: int, first: int) -> Extent:
        """The same channels as part of ``count``, from ``first`` on."""
        masks = [np.zeros(count, np.bool_) for _ in range(3)]
        for mask, own in zip(masks, (self.has, self.lacks, self.compared), strict=True):
            mask[first : first + len(own)] = own
        return Extent(*masks)

    @property
    def text(self) -> str:
        """As "in channels 576 to 639 only"; empty where all channels may have the deviation, or
        where no range and no part of a tile has what it ``has`` and nothing of what it
        ``lacks``."""
        if not self.lacks.any() or not self.has.any():
            return ""
        ends = _ends(self.has, self.lacks, self.compared)
        if ends is not None:
            return f"in channels {ends[0]} to {ends[1]} only"
        part = part_of_tiles(self.has, self.lacks)
        if part is None:
            return ""
        period, first, last = part
        which = f"= {first}" if first == last else f"from {first} to {last}"
        return f"in channels n with n modulo {period} {which} only"

    @property
    def is_known(self) -> bool:
        """Whether the channels are all, or have a :attr:`text`."""
        return not self.lacks.any() or bool(self.text)

    def plain(self) -> Plain:
        """JSON-able: the first and the last channel of each run."""
        names = ("has", "lacks", "compared")
        return {"of": len(self.has), **{name: _runs(getattr(self, name)) for name in names}}

    @classmethod
    def read(cls, plain: Plain) -> Extent:
        """What :meth:`plain` wrote."""
        masks = [np.zeros(plain["of"], np.bool_) for _ in range(3)]
        for mask, name in zip(masks, ("has", "lacks", "compared"), strict=True):
            for first, last in plain[name]:
                mask[first : last + 1] = True
        return cls(*masks)


def join(way: Plain, other: Plain) -> bool:
    """Whether a deviation of one token or tile holds in the same channels as on another one;
    ``way`` then has the channels of both."""
    if way["extent"] is None or other["extent"] is None:
        return not (way["channels"] or other.get("channels"))
    both = Extent.read(way["extent"]).join(Extent.read(other["extent"]))
    if both is None or not both.is_known:
        return False
    way.update(extent=both.plain(), channels=both.text)
    return True


def part_of_tiles(has: Bools, lacks: Bools, fewest: int = _FEWEST) -> tuple[int, int, int] | None:
    """The shortest period, and the first and the last place of it, with all that a deviation
    ``has`` and nothing that it ``lacks``; None where ``fewest`` such periods are not there."""
    for period in _PERIODS:
        if period * fewest > len(has):
            return None
        own, others = _folded(has, period), _folded(lacks, period)
        if (own & others).any() or not others.any():
            continue
        ends = _ends(own, others, np.ones(period, np.bool_))
        if ends is not None:
            return period, *ends
    return None


def _runs(mask: Bools) -> list[list[int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [[int(first), int(after) - 1] for first, after in edges.reshape(-1, 2)]


def _ends(has: Bools, lacks: Bools, compared: Bools) -> tuple[int, int] | None:
    """The first and the last channel of the range with all that a deviation ``has`` and nothing
    that it ``lacks``; None where there is none. Of several ends the roundest is taken."""
    at = np.flatnonzero(has)
    first, last = int(at[0]), int(at[-1])
    if lacks[first : last + 1].any():
        return None
    closed = lacks | ~compared
    before, after = np.flatnonzero(closed[:first]), np.flatnonzero(closed[last + 1 :])
    least = int(before[-1]) + 1 if len(before) else 0
    most = last + int(after[0]) + 1 if len(after) else len(has)
    return _roundest(least, first), _roundest(last + 1, most) - 1


def _roundest(low: int, high: int) -> int:
    """The number from ``low`` to ``high`` with most factors of two; 0 has all."""
    return 0 if low == 0 else max(range(low, high + 1), key=lambda n: n & -n)


def _folded(mask: Bools, period: int) -> Bools:
    """``(period,)``: the places of a period that are true in some period."""
    whole = np.zeros(-(-len(mask) // period) * period, np.bool_)
    whole[: len(mask)] = mask
    folded: Bools = np.any(whole.reshape(-1, period), axis=0)
    return folded


__all__ = ["Extent", "join", "part_of_tiles"]
