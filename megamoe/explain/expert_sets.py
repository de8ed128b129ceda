"""Rules of experts whose numbers follow a pattern: odd ones, a half, those of one rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from megamoe.explain.rules import Bools, Ids, Rule
from megamoe.printable import quantity

_FEWEST: Final = 3
"""Experts with rows that follow a pattern; two are a pair, which has a rule of its own."""
_OTHERS: Final = 2
"""Experts with rows outside of it."""
_STEPS: Final = (2, 4, 8)


def expert_rules(ids: Ids, experts: int, wrong: Bools) -> Iterator[Rule]:
    """Rules for ``(T, K)`` expert ids: all rows of experts whose numbers follow a pattern; of
    several that give the same slots, the simplest. ``wrong`` ``(T,)``: the tokens."""
    live = (ids >= 0) & (ids < experts)
    used_experts, keys = np.unique(ids[live]), set()
    if not wrong.any() or len(used_experts) <= _FEWEST:
        return
    least = int(ids[live & wrong[:, None]].min(initial=experts))
    for name, members in (*_patterns(experts), *_later(experts, used_experts, least)):
        own = members[used_experts]
        slots = live & members[np.where(live, ids, 0)]
        is_open = name.endswith("and later")
        if own.sum() < _FEWEST or (~own).sum() < (1 if is_open else _OTHERS):
            continue
        if slots.tobytes() in keys:
            continue
        keys.add(slots.tobytes())
        of = quantity(int(slots.sum()), "row")
        yield Rule(
            f"{name}, at all of their {of}",
            f"{name} are dropped: none of their rows is computed ({of})",
            slots, is_pattern=not is_open,
        )  # fmt: skip


def _patterns(experts: int) -> Iterator[tuple[str, Bools]]:
    """Names and members ``(E,)``: halves, every n-th, and runs as ranks have them."""
    number = np.arange(experts)
    ranks = [n for n in (2, 4, 8, 16, 32, 64) if experts % n == 0 and experts // n > 1]
    for count in ranks[:1]:
        half = experts // count
        yield f"experts 0 to {half - 1} (the first half)", number < half
        yield f"experts {half} to {experts - 1} (the second half)", number >= half
    for step in (n for n in _STEPS if n < experts):
        for rest in range(step):
            which = f"n with n modulo {step} = {rest}"
            if step == 2:
                which = f"with {('even', 'odd')[rest]} numbers"
            yield f"experts {which}", number % step == rest
    for count in ranks[1:]:
        size = experts // count
        for rank in range(count):
            first, last = rank * size, (rank + 1) * size - 1
            name = f"experts {first} to {last} (those of rank {rank}, if {count} ranks share them)"
            yield name, number // size == rank


def _later(experts: int, used_experts: Ids, least: int) -> Iterator[tuple[str, Bools]]:
    """Expert N and all later ones; ``least``: the first of a wrong token."""
    for e in used_experts[1:][used_experts[1:] >= least].tolist():
        yield f"experts {e} and later", np.arange(experts) >= e


__all__ = ["expert_rules"]
