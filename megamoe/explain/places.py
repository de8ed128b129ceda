"""The part of a batch in which a fault shows: tokens, experts, and rows of experts.

One token alone cannot tell a lost slot from a lost expert. The tokens that are wrong, and those
that are right, can: each rule here predicts the wrong slots of the whole batch, and a rule is
offered only if it predicts exactly the tokens that are wrong.

A *row* of an expert is one of its slots, counted over the batch in the order of tokens and slots:
row 0 is its first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.explain.channels import FEWEST, MOST, in_words
from megamoe.judge import Finding
from megamoe.judge.elements import GRID_LIMIT, TILE
from megamoe.printable import counted
from megamoe.spec.problem import Problem

Bools = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]
WrongSlots = Mapping[int, set[int]]
"""Slots by token."""
LEFT_OUT: Final = "a slot is left out: codes and scale bytes are zero"
ALL_LOST: Final = "y is zero"
_STEPS: Final = (("x", "x_sf"), ("l2_acts", "l2_acts_sf"), ("y",))
"""The stages that one step computes."""
_TILES: Final = (8, 16, 32, 64, 128)
"""Rows of a tile of an expert."""
_LOST_SLOT: Final = re.compile(r"slot (\d+) \(.*\) is lost")
"""Names of deviations of one token by which slots are lost."""


@dataclass(frozen=True)
class Rule:
    """One rule: the slots of a batch that it makes wrong."""

    where: str
    """"expert 5, all of its rows": completes "wrong are exactly the tokens of"."""
    lost: str
    """The same where the slots are left out: "expert 5 is dropped"."""
    slots: Bools
    """(T, K)."""

    def gives(self, wrong_slots: WrongSlots) -> bool:
        """Whether it makes exactly these slots wrong, of the tokens that are named."""
        return all(
            set(np.flatnonzero(self.slots[at]).tolist()) == slots
            for at, slots in wrong_slots.items()
        )


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
    rows, first = rows_of_experts(ids, live), int(np.argmax(wrong))
    used = np.unique(ids[live])
    mine = [int(e) for e in np.unique(ids[first][live[first]])]
    for e in mine:
        own = live & (ids == e)
        of = counted(int(own.sum()), "row")
        yield Rule(
            f"expert {e}, at all of its {of}",
            f"expert {e} is dropped: none of its rows is computed ({of})",
            own,
        )
    for e in mine:
        for other in used.tolist():
            if other != e:
                both = live & ((ids == e) | (ids == other))
                pair = f"experts {min(e, other)} and {max(e, other)}"
                of = counted(int(both.sum()), "row")
                yield Rule(
                    f"{pair}, at all of their {of}",
                    f"{pair} are dropped: none of their rows is computed ({of})",
                    both,
                )
    whole = np.where(live, rows, -1)
    yield from _cuts(whole, wrong, "each expert")
    yield from _tiles(whole, first, "each expert")
    for e in mine:
        if used.size > 1:
            own = np.where(ids == e, whole, -1)
            yield from _cuts(own, wrong, f"expert {e}")
            yield from _tiles(own, first, f"expert {e}")
    for row in sorted({int(r) for r in rows[first][live[first]]}):
        yield Rule(f"row {row} of an expert", f"row {row} of an expert is dropped", rows == row)
    for size in (n for n in _TILES if 8 < n <= (rows.max() + 1) // 2):
        slots = live & (rows % size == size - 1)
        where = f"the last row of each tile of {size} rows of each expert"
        of = counted(int(slots.sum()), "row")
        yield Rule(f"{where}: {of}", f"{where} is dropped: {of}", slots)
    last = live & (rows == _last(ids, live, rows))
    yield Rule("the last row of an expert", "the last row of each expert is dropped", last)
    yield from _of_slots(live)
    yield from _of_tokens(live, wrong)


def fitting(
    ids: Ids, experts: int, wrong: Bools, slots: Bools | None = None,
    one: tuple[int, set[int]] | None = None,
) -> list[Rule]:  # fmt: skip
    """The rules that predict exactly the ``wrong`` tokens ``(T,)``.

    With ``slots`` ``(T, K)`` they predict exactly these slots; with ``one``, a token and its wrong
    slots, these of that token.
    """
    found = [r for r in rules(ids, experts, wrong) if (r.slots.any(axis=1) == wrong).all()]
    if slots is not None:
        found = [r for r in found if (r.slots == slots).all()]
    if one is not None:
        token, known = one
        found = [r for r in found if set(np.flatnonzero(r.slots[token]).tolist()) == known]
        if not found and len(known) == 1 and not wrong.all():
            # No rule of experts or tokens: the slot itself, in the tokens that are wrong.
            found = [_slot_of(known, wrong, ids.shape[1])]
    return found


def _slot_of(known: set[int], wrong: Bools, slots: int) -> Rule:
    (k,) = known
    which = np.zeros((len(wrong), slots), np.bool_)
    which[wrong, k] = True
    where = f"slot {k} of {phrase(wrong)}"
    return Rule(where, f"{where} is dropped", which)


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
    many = counted(int(slots.sum()), "row")
    yield Rule(
        f"{of}, at rows {cut}{other} and later: {many}",
        f"rows {cut}{other} and later of {of} are dropped: {many} beyond a capacity or a tile",
        slots,
    )


def _tiles(rows: Ids, first: int, of: str) -> Iterator[Rule]:
    """Rules of one tile of rows, of those that hold a row of token ``first``; the last tile is a
    cut."""
    for size in _TILES:
        for number in sorted({int(row) // size for row in rows[first] if row >= 0}):
            slots = (rows >= 0) & (rows // size == number)
            if rows.max() < (number + 1) * size:
                continue
            tile = f"rows {number * size} to {(number + 1) * size - 1}"
            many = counted(int(slots.sum()), "row")
            yield Rule(
                f"{of}, at {tile}: {many}", f"{tile} of {of} are dropped: {many} of a tile", slots
            )


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
    slots = live.copy()
    slots[:at] = False
    if at == tokens - 1:
        yield Rule("the last token", "the last token is dropped", slots)
    else:
        yield Rule(f"tokens {at} and later", f"tokens {at} and later are dropped", slots)
        alone = slots.copy()
        alone[at + 1 :] = False
        yield Rule(f"token {at} alone", f"token {at} is dropped", alone)


def batch_of(
    actual: Mapping[str, Any], shown: Mapping[str, Any], token: int, problem: Problem,
    findings: Sequence[Finding], wrong_slots: WrongSlots,
) -> dict[str, Any]:  # fmt: skip
    """``{"batch": ...}`` of :func:`in_batch`; empty where nothing is wrong, or not all wrong tokens
    are known. ``findings`` are those of all tokens."""
    if not actual["explanations"]:
        return {}
    wrong, is_whole = wrong_tokens(actual, findings, problem.num_tokens)
    if not is_whole:
        return {}
    ids, experts = problem.topk_ids.numpy(), problem.num_experts
    batch = in_batch(actual, shown, token, ids, experts, wrong, wrong_slots)
    return {"batch": {**batch, "tiles": _tiles_of(actual, findings)}}


def _tiles_of(actual: Mapping[str, Any], findings: Sequence[Finding]) -> str:
    """As "y in tiles 4 and 5 of 128 channels" if all wrong elements of the batch are in few."""
    stage = actual["parts_at"]["stage"]
    for finding in findings:
        tiles = sorted(finding.tiles)
        of_all = sum(finding.tiles.values()) == finding.outside
        few = 0 < len(tiles) <= min(MOST, finding.shape[1] // 2)
        if finding.stage == stage and finding.outside >= FEWEST and of_all and few:
            return f"{stage} in {in_words(tiles, TILE)}"
    return ""


def wrong_tokens(
    actual: Mapping[str, Any], findings: Sequence[Finding], tokens: int
) -> tuple[Bools, bool]:
    """``(T,)`` tokens that are outside in the first wrong step, and whether these are all."""
    step = next(step for step in _STEPS if actual["parts_at"]["stage"] in step)
    wrong, is_whole = np.zeros(tokens, np.bool_), True
    for finding in findings:
        if finding.stage in step:
            is_whole = is_whole and len(finding.grid) < GRID_LIMIT
            wrong[[row for row, _, _ in finding.grid]] = True
    return wrong, is_whole


def in_batch(
    actual: Mapping[str, Any], shown: Mapping[str, Any], token: int, ids: Ids, experts: int,
    wrong: Bools, wrong_slots: WrongSlots,
) -> dict[str, Any]:  # fmt: skip
    """The rules that fit the whole batch, with the cause that one token has; JSON-able.

    ``actual``: what :func:`megamoe.explain.part.part` says of ``token``. ``shown``: the stages of
    all tokens as bits. ``wrong`` ``(T,)``: tokens that are outside in the first wrong step.
    ``wrong_slots``: the slots with wrong codes, of tokens where they are known.
    """
    causes = [way["what"] for way in actual["explanations"][0]["exact"]]  # of the first wrong step
    lost = [int(one[1]) for one in map(_LOST_SLOT.fullmatch, causes) if one]
    live = (ids >= 0) & (ids < experts)
    slots, one, is_lost = None, None, True
    if ALL_LOST in causes:
        one = token, set(np.flatnonzero(live[token]).tolist())
    elif lost:
        one = token, {lost[0]}
    elif LEFT_OUT in causes:
        zero = ~(shown["l2_acts"].any(axis=-1) | shown["l2_acts_sf"].any(axis=-1))
        slots = zero & live & wrong[:, None]
    else:
        is_lost = False
    found = fitting(ids, experts, wrong, slots, one)
    if len(wrong) < 2:
        found = []  # a batch of one token says no more than the token
    elif not is_lost:
        # One token agrees with some rule by chance, and all tokens agree with many.
        found = [] if wrong.sum() < 2 or wrong.all() else found
        found = [rule for rule in found if rule.gives(wrong_slots)]
    return {
        "tokens": len(wrong),
        "wrong": int(wrong.sum()),
        "is_lost": is_lost,
        "rules": [rule.lost if is_lost else rule.where for rule in found],
    }
