"""Rules for the slots of a batch that a fault makes wrong: experts, rows of experts, tokens.

A *row* of an expert is one of its slots, counted over the batch in the order of tokens and slots:
row 0 is its first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from megamoe.printable import quantity

Bools = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]
WrongSlots = Mapping[int, set[int]]
"""Slots by token."""
TILES: Final = (8, 16, 32, 64, 128)
"""Rows of a tile of an expert."""
EACH: Final = "each expert"


@dataclass(frozen=True)
class Rule:
    """One rule: the slots of a batch that it makes wrong."""

    where: str
    """"expert 5, all of its rows": completes "wrong are exactly the tokens of"."""
    loss: str
    """The same where the slots are left out: "expert 5 is dropped"."""
    slots: Bools
    """(T, K); of tokens without an expert all slots, where the rule speaks of these."""
    experts: Ids | None = None
    """(T, K): whose weights the slots meet, -1 where they are lost; None where the rule does not
    say it."""
    is_rare: bool = False
    """One wrong token is enough: no other is of its sort."""
    is_pattern: bool = False
    """It names experts by a pattern of their numbers: few experts follow one by chance."""

    def gives(self, wrong_slots: WrongSlots) -> bool:
        """Whether it makes exactly these slots wrong, of the tokens that are named."""
        return all(
            set(np.flatnonzero(self.slots[at]).tolist()) == slots
            for at, slots in wrong_slots.items()
        )

    def loses(self) -> bool:
        """Whether it can be that the slots are left out."""
        return self.experts is None or bool((self.experts[self.slots] < 0).all())

    def takes(self, experts: Collection[int], token: int) -> bool:
        """Whether a slot of ``token`` can meet one of ``experts``, if there are any."""
        if self.experts is None or not experts:
            return True
        return not set(self.experts[token][self.slots[token]].tolist()).isdisjoint(experts)


def rows_of_experts(ids: Ids, live: Bools) -> Ids:
    """``(T, K)``: the row of each slot within its expert; -1 for a slot without an expert."""
    rows = np.full(ids.shape, -1, np.int64)
    flat, at = ids[live], np.flatnonzero(live)
    order = np.argsort(flat, kind="stable")
    _, first, count = np.unique(flat[order], return_index=True, return_counts=True)
    ranks = np.arange(len(flat)) - np.repeat(first, count)
    rows.ravel()[at[order]] = ranks
    return rows


def rules(ids: Ids, experts: int, wrong: Bools) -> Iterator[Rule]:
    """Rules for ``(T, K)`` expert ids that could give the ``(T,)`` wrong tokens; the more likely
    ones stand first."""
    live = (ids >= 0) & (ids < experts)
    if not wrong.any():
        return
    yield from _of_masks(live)
    rows, first = rows_of_experts(ids, live), int(np.argmax(wrong))
    used_experts = np.unique(ids[live])
    mine = [int(e) for e in np.unique(ids[first][live[first]])]
    for e in mine:
        own = live & (ids == e)
        of = quantity(int(own.sum()), "row")
        yield Rule(
            f"expert {e}, at all of its {of}",
            f"expert {e} is dropped: none of its rows is computed ({of})",
            own,
        )
    for e in mine:
        for other in used_experts.tolist():
            if other != e:
                both = live & ((ids == e) | (ids == other))
                pair = f"experts {min(e, other)} and {max(e, other)}"
                of = quantity(int(both.sum()), "row")
                yield Rule(
                    f"{pair}, at all of their {of}",
                    f"{pair} are dropped: none of their rows is computed ({of})",
                    both,
                )
    whole = np.where(live, rows, -1)
    yield from _cuts(whole, wrong, EACH)
    yield from _tiles(whole, first, EACH)
    for e in mine:
        if used_experts.size > 1:
            own = np.where(ids == e, whole, -1)
            yield from _cuts(own, wrong, f"expert {e}")
            yield from _tiles(own, first, f"expert {e}")
    for row in sorted({int(r) for r in rows[first][live[first]]}):
        yield Rule(f"row {row} of an expert", f"row {row} of an expert is dropped", rows == row)
    for size in (n for n in TILES if 8 < n <= (rows.max() + 1) // 2):
        slots = live & (rows % size == size - 1)
        where = f"the last row of each tile of {size} rows of each expert"
        of = quantity(int(slots.sum()), "row")
        yield Rule(f"{where}: {of}", f"{where} is dropped: {of}", slots)
    last = live & (rows == _last(ids, live, rows))
    yield Rule("the last row of an expert", "the last row of each expert is dropped", last)
    yield from _of_slots(live)
    yield from _of_tokens(live, wrong)


def phrase(wrong: Bools) -> str:
    """The wrong tokens in words; empty where all are."""
    at, tokens = np.flatnonzero(wrong), len(wrong)
    if len(at) == tokens:
        return ""
    if len(at) == 1:
        return f"token {at[0]} only" + (", the last" if at[0] == tokens - 1 else "")
    if at[-1] - at[0] + 1 == len(at):
        if at[-1] == tokens - 1:
            return f"tokens {at[0]} and later"
        return f"tokens {at[0]} to {at[-1]}"
    more = f" and {len(at) - 6} more" if len(at) > 6 else ""
    return f"tokens {', '.join(map(str, at[:6]))}{more}"


def _last(ids: Ids, live: Bools, rows: Ids) -> Ids:
    """``(T, K)``: the last row of each slot's expert."""
    last = np.full(int(ids[live].max(initial=0)) + 1, -1, np.int64)
    np.maximum.at(last, ids[live], rows[live])
    return np.where(live, last[np.where(live, ids, 0)], -2)


def _cuts(rows: Ids, wrong: Bools, of: str) -> Iterator[Rule]:
    """Rows from some number on. A range of numbers can give the same tokens: the one with most
    factors of two stands for it."""
    most = rows.max(axis=1)
    low = max(int(most[~wrong].max(initial=-1)) + 1, 1)
    high = int(most[wrong].min())
    if low > high:
        return
    cut = max(range(low, high + 1), key=lambda row: row & -row)
    other = f" (or another of {low} to {high})" if low < high else ""
    slots = rows >= cut
    many, tail = quantity(int(slots.sum()), "row"), _tail(rows, cut, of)
    yield Rule(
        f"{of}, at rows {cut}{other} and later: {many}{tail}",
        f"rows {cut}{other} and later of {of} are dropped: {many} beyond a capacity or a tile"
        f"{tail}",
        slots,
    )


def _tail(rows: Ids, cut: int, of: str) -> str:
    """As ", those after its last full tile of 8 or 16 rows", of one expert; else empty."""
    last = int(rows.max()) + 1
    sizes = [str(size) for size in TILES if cut == last // size * size < last]
    if not sizes or of == EACH:
        return ""
    return f", those after its last full tile of {' or '.join(sizes)} rows"


def _tiles(rows: Ids, first: int, of: str) -> Iterator[Rule]:
    """Rules of one tile of rows, of those that hold a row of token ``first``; the last tile is a
    cut."""
    for size in TILES:
        for number in sorted({int(row) // size for row in rows[first] if row >= 0}):
            slots = (rows >= 0) & (rows // size == number)
            if rows.max() < (number + 1) * size:
                continue
            tile = f"rows {number * size} to {(number + 1) * size - 1}"
            many = quantity(int(slots.sum()), "row")
            yield Rule(
                f"{of}, at {tile}: {many}", f"{tile} of {of} are dropped: {many} of a tile", slots
            )


def _of_masks(live: Bools) -> Iterator[Rule]:
    """Rules of slots without an expert."""
    if live.all():
        return
    count = live.sum(axis=1)
    dead, some = count == 0, count < live.shape[1]
    if dead.any():
        where = f"the tokens without a live slot: {quantity(int(dead.sum()), 'token')}"
        yield Rule(where, where, np.repeat(dead[:, None], live.shape[1], 1), is_rare=True)
    of = live & some[:, None]
    if dead.any():
        where = "the tokens with a masked slot"
        yield Rule(where, f"{where} are dropped", of | dead[:, None])
    also = " and a live one" if dead.any() else ""
    where = f"the tokens with a masked slot{also}: {quantity(int(of.any(axis=1).sum()), 'token')}"
    yield Rule(where, f"all slots of {where} are dropped", of)
    after = live & (np.cumsum(~live, axis=1) > 0)
    many = quantity(int(after.sum()), "slot")
    where = "the slots after a masked slot of their token"
    yield Rule(f"{where}: {many}", f"{where} are dropped: {many}", after)


def _of_slots(live: Bools) -> Iterator[Rule]:
    for k in range(live.shape[1]):
        slots = np.zeros_like(live)
        slots[:, k] = live[:, k]
        yield Rule(f"slot {k} of all tokens", f"slot {k} of each token is dropped", slots)


def _of_tokens(live: Bools, wrong: Bools) -> Iterator[Rule]:
    tokens = len(wrong)
    if wrong.all():
        yield Rule("all tokens", "all tokens are dropped", live)
        return
    at = int(np.argmax(wrong))
    if at == 0 and not live.any(axis=1).all():
        yield Rule("all tokens with a live slot", "all tokens are dropped", live)
        return
    slots = live.copy()
    slots[:at] = False
    if at == tokens - 1:
        yield Rule("the last token", "the last token is dropped", slots)
    else:
        yield Rule(f"tokens {at} and later", f"tokens {at} and later are dropped", slots)
        alone = slots.copy()
        alone[at + 1 :] = False
        yield Rule(f"token {at} alone", f"token {at} is dropped", alone)
