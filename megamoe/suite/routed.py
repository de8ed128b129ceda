"""What the routing of a case has: a fault that needs it shows in no case without it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from megamoe.cases import Case
from megamoe.cases.recipes import own_tokens, routing
from megamoe.cases.stored import is_stored
from megamoe.printable import part, quantity, verb

_TILES: Final = (8, 16, 32, 64, 128)
"""Rows of a tile of an expert."""
MANY_ROWS: Final = "an expert with more than"
FULL_TILE: Final = "an expert whose last tile"
"""The starts of two features: the second needs rows as well."""
LIST_LIMIT: Final = 16
"""Experts whose rows are all shown."""
_BUSIEST: Final = 3
_SKEW: Final = 2
"""The busiest expert has so many times the mean rows."""


def _list(rows: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{expert}: {many}" for expert, many in rows)


@dataclass(frozen=True)
class Routed:
    """The rows of each expert, and the slots without one."""

    rows: dict[int, int]
    """By expert, of those with a row."""
    masked: int
    """Slots without an expert."""
    slots: int
    empty_tokens: int
    """Tokens without a live slot."""

    @staticmethod
    def of(ids: npt.NDArray[np.int64], experts: int) -> Routed:
        """Of expert ids ``(T, K)``."""
        live = (ids >= 0) & (ids < experts)
        numbers, counts = np.unique(ids[live], return_counts=True)
        rows = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
        empty = int((live.sum(axis=1) == 0).sum())
        return Routed(rows, int((~live).sum()), ids.size, empty)

    def lines(self, experts: int) -> str:
        """The rows of ``experts`` experts in one line; of many the range, and
        the busiest."""
        ranking = sorted(self.rows.items(), key=lambda one: (-one[1], one[0]))
        if experts <= LIST_LIMIT:
            text = _list([(e, self.rows.get(e, 0)) for e in range(experts)])
        elif not ranking:
            text = f"none of {quantity(experts, 'expert')} has a row"
        elif len(ranking) <= LIST_LIMIT:
            others = quantity(experts - len(ranking), "other expert")
            text = f"{_list(sorted(ranking))}; none of {others}"
        else:
            text = (
                f"{ranking[-1][1]} to {ranking[0][1]} each of {len(ranking)} of {experts} experts; "
                f"most of {_list(ranking[:_BUSIEST])}"
            )
        if self.masked:
            text += f"; {part(self.masked, self.slots, 'slot')} {verb(self.masked)} masked"
        if self.empty_tokens:
            text += f", {quantity(self.empty_tokens, 'token')} without a live slot"
        return text

    @property
    def tile(self) -> int:
        """Rows of the largest tile that is full at the end of an expert; 0 for none."""
        full = [size for size in _TILES for many in self.rows.values() if many % size == 0]
        return max(full, default=0)

    @property
    def most(self) -> int:
        """Rows of the busiest expert."""
        return max(self.rows.values(), default=0)

    @property
    def is_skewed(self) -> bool:
        """Whether one expert has at least twice the mean rows."""
        counts = [*self.rows.values()]
        return bool(counts) and max(counts) * len(counts) >= _SKEW * sum(counts)

    def beyond(self, other: Routed) -> list[str]:
        """What this routing has and ``other`` lacks, in words."""
        features = {
            "masked slots": self.masked and not other.masked,
            "a token without a live slot": self.empty_tokens and not other.empty_tokens,
            f"{MANY_ROWS} {_TILES[0]} rows": self.most > _TILES[0] >= other.most,
            f"{FULL_TILE} of {self.tile} rows is full": self.tile > other.tile,
            "an expert with twice the mean rows": self.is_skewed and not other.is_skewed,
        }
        return [what for what, lacks in features.items() if lacks]


def routed(case: Case) -> Routed | None:
    """The routing of a case of one call; None where no recipe says it."""
    p = case.params
    if case.kind not in ("forward", "property") or is_stored(case):
        return None
    tokens, at = own_tokens(case.seed, p, np.arange(p["tokens"]))
    ids, _ = routing(case.seed, tokens, p["experts"], p["top_k"], p.get("routing_recipe", {}))
    return Routed.of(ids[at], p["experts"])
