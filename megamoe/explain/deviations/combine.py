"""Deviations from the sums of linear 2 to ``y``: the slot's row and the combine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from megamoe.explain.deviations.activation import after
from megamoe.explain.life import Life, Slot, live_slot
from megamoe.explain.sources import Source
from megamoe.explain.ways import Rows, Way, combined, in_bf16, right
from megamoe.spec.formats import F32, F64, U16, bf16_round

Combined = Callable[[Rows], U16]


def catalogue(life: Life, source: Source) -> Iterator[Way]:
    """Deviations of the slot rows and of the combine."""
    own = right(life)
    rows: dict[str, Callable[[F64, np.float32], F32]] = {
        "slot rows are not rounded to bfloat16": lambda s, w: s.astype(np.float32),
        "slot rows are truncated to bfloat16": lambda s, w: _truncated(s.astype(np.float32)),
        "slot rows are rounded to fp16": lambda s, w: s.astype(np.float16).astype(np.float32),
        "slot rows are multiplied by the routing weight, after requantisation": after,
    }
    for name, row in rows.items():
        yield own.replaced(name, "linear 2", row=row)
    for name, combine in _combines(life):
        yield own.replaced(name, "combine", combine=combine)
    missing = [k for k, e in enumerate(life.token.ids) if not 0 <= e < life.token.experts]
    if missing:
        for expert in (0, life.token.experts - 1):
            yield own.replaced(
                f"slots without an expert go to expert {expert}",
                "combine",
                more=lambda e=expert: [live_slot(source, life, slot, e) for slot in missing],
            )


def _combines(life: Life) -> Iterator[tuple[str, Combined]]:
    def own(rows: Rows) -> U16:
        return combined(rows, life, life.contract)

    def only(rows: Rows, slots: set[int]) -> U16:
        kept = {k: r for k, r in rows.items() if k in slots}
        return own(kept) if kept else np.zeros(len(life.channels), np.uint16)

    def without(slot: int, rows: Rows) -> U16:
        return only(rows, set(rows) - {slot})

    def alone(slot: int, rows: Rows) -> U16:
        return only(rows, {slot})

    yield "slots are added in descending order", lambda r: _sum(r, sorted(r)[::-1])
    yield "slots are added in the order of their experts", lambda r: _sum(r, _by_expert(life, r))
    yield "slots are added in pairs", _pairs
    yield "slots are added as a tree", _tree
    yield "slots are added in bfloat16", lambda r: _running(r, in_bf16)
    yield (
        "slots are added in fp16",
        lambda r: _running(r, lambda v: v.astype(np.float16).astype(np.float32)),
    )
    yield (
        "slots are added in float64",
        lambda r: bf16_round(np.sum([row.astype(np.float64) for row in r.values()], axis=0)),
    )
    yield "y is truncated to bfloat16", lambda r: _bits(_truncated(_added(r, sorted(r))))
    yield "y is zero", lambda r: np.zeros(len(life.channels), np.uint16)
    yield "y is the mean of the slots", lambda r: bf16_round(_added(r, sorted(r)) / len(r))
    for slot in life.slots:
        k, name = slot.slot, f"slot {slot.slot} ({_expert(slot)})"
        yield f"{name} is lost", partial(without, k)
        yield f"{name} is added twice", partial(_twice, k)
        if len(life.slots) > 2:
            yield f"only {name} is there", partial(alone, k)


def _expert(slot: Slot) -> str:
    return "the shared expert" if slot.expert < 0 else f"expert {slot.expert}"


def _added(rows: Rows, order: list[int]) -> F32:
    total = np.zeros_like(rows[order[0]]) if order else np.zeros(0, np.float32)
    for slot in order:
        total = total + rows[slot]
    return total


def _sum(rows: Rows, order: list[int]) -> U16:
    return bf16_round(_added(rows, order))


def _twice(slot: int, rows: Rows) -> U16:
    return _sum(rows, sorted([*rows, slot]))


def _by_expert(life: Life, rows: Rows) -> list[int]:
    ids = {slot.slot: slot.expert for slot in life.slots}
    return sorted(rows, key=lambda k: (ids.get(k, 0), k))


def _pairs(rows: Rows) -> U16:
    """Even slots and odd slots apart, then both sums."""
    order = sorted(rows)
    zero = np.zeros_like(rows[order[0]])
    even, odd = (sum((rows[k] for k in order if k % 2 == part), zero) for part in (0, 1))
    return bf16_round(even + odd)


def _tree(rows: Rows) -> U16:
    """Neighbours first, then neighbours of sums."""
    level = [rows[k] for k in sorted(rows)]
    while len(level) > 1:
        level = [sum(level[i + 1 : i + 2], level[i]) for i in range(0, len(level), 2)]
    return bf16_round(level[0])


def _running(rows: Rows, rounded: Callable[[F32], F32]) -> U16:
    order = sorted(rows)
    total = np.zeros_like(rows[order[0]])
    for slot in order:
        total = rounded(total + rows[slot])
    return bf16_round(total)


def _truncated(values: F32) -> F32:
    bits = np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def _bits(values: F32) -> U16:
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
