"""Sums of slot rows in other orders and formats.

Each takes the rows ``(n,)`` by slot, in the order in which the contract adds them, at least one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import numpy as np

from megamoe.explain.deviations.roundings import bits_of_fp32
from megamoe.explain.ways import in_bf16
from megamoe.spec.formats import F32

Terms = Mapping[int, F32]


def in_order(rows: Terms, order: list[int]) -> F32:
    """The fp32 sum of some rows, from zero."""
    total = np.zeros_like(next(iter(rows.values())))
    for slot in order:
        total = total + rows[slot]
    return total


def plain_sum(rows: Terms) -> F32:
    """As the contract adds them."""
    return in_order(rows, list(rows))


def first(count: int, rows: Terms) -> F32:
    """The slots below ``count`` alone."""
    return in_order(rows, [k for k in rows if k < count])


def at_place(slot: int, place: int, rows: Terms) -> F32:
    """One slot at another place."""
    order = [k for k in rows if k != slot]
    order.insert(place, slot)
    return in_order(rows, order)


def in_groups(many: int, rows: Terms) -> F32:
    """Each ``many`` slots on their own first."""
    total = np.zeros_like(next(iter(rows.values())))
    for start in range(0, max(rows) + 1, many):
        total = total + in_order(rows, [k for k in rows if start <= k < start + many])
    return total


def _pairs(rows: Terms) -> F32:
    """Even slots and odd slots apart, then both sums."""
    even, odd = (in_order(rows, [k for k in rows if k % 2 == part]) for part in (0, 1))
    return even + odd


def _tree(rows: Terms) -> F32:
    """Neighbours first, then neighbours of sums."""
    level = list(rows.values())
    while len(level) > 1:
        level = [sum(level[i + 1 : i + 2], level[i]) for i in range(0, len(level), 2)]
    return level[0]


def _kahan(rows: Terms) -> F32:
    """Kahan's sum."""
    total = compensation = np.zeros_like(next(iter(rows.values())))
    for row in rows.values():
        term = row - compensation
        larger = total + term
        total, compensation = larger, (larger - total) - term
    return total


def _in_float64(rows: Terms) -> F32:
    total: F32 = np.sum([row.astype(np.float64) for row in rows.values()], axis=0)
    return total


def _running(rounded: Callable[[F32], F32], rows: Terms) -> F32:
    total = np.zeros_like(next(iter(rows.values())))
    for row in rows.values():
        total = rounded(total + row)
    return total


def _half(values: F32) -> F32:
    return values.astype(np.float16).astype(np.float32)


def _eleven_bits(values: F32) -> F32:
    return (bits_of_fp32(values) & np.uint32(0xFFFFF000)).view(np.float32)


def _from_ninth(rows: Terms) -> F32:
    order = [k for k in rows if k < 8]
    return in_order(rows, [*order, *(k for k in list(rows)[::-1] if k >= 8)])


SUMS: Final[Mapping[str, Callable[[Terms], F32]]] = {
    "slots are added in descending order": lambda r: in_order(r, list(r)[::-1]),
    "slots are added in pairs": _pairs,
    "slots are added as a tree": _tree,
    "slots are added in bfloat16": partial(_running, in_bf16),
    "slots are added in fp16": partial(_running, _half),
    "slots are added in float64": _in_float64,
    "slots from the ninth on are added in descending order": _from_ninth,
    "every eighth slot is added first": lambda r: in_order(r, sorted(r, key=lambda k: k % 8)),
    "the last slot is added first": lambda r: in_order(r, [list(r)[-1], *list(r)[:-1]]),
    "the rounding of each addition is compensated": _kahan,
    "the sum of slots keeps 11 bits": partial(_running, _eleven_bits),
    "y is the mean of the slots": lambda r: plain_sum(r) / np.float32(len(r)),
}
