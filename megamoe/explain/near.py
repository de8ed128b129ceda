"""The rule that comes near to the wrong tokens of a batch, where none gives exactly these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from megamoe.explain.rules import Bools, Rule

_SHARE: Final = 8
"""A rule is near if at most one token in so many of it is right."""
_FEWEST: Final = 8
"""Wrong tokens that a near rule has at least."""
_MOST_NAMES: Final = 4
"""Tokens that are named one by one."""


def nearest(rules: Sequence[Rule], wrong: Bools) -> str:
    """The rule with all ``wrong`` tokens ``(T,)`` and fewest others, if these are few; in words,
    else empty. Nothing says why the others are right."""
    near = []
    for rule in rules:
        tokens = np.asarray(rule.slots.any(axis=1))
        others = np.flatnonzero(tokens & ~wrong).tolist()
        is_few = len(others) * _SHARE <= tokens.sum() <= len(wrong) * 3 / 4
        if others and tokens[wrong].all() and is_few and rule.experts is None:
            near.append((len(others), rule.where, others))
    if not near or wrong.sum() < _FEWEST:
        return ""
    many, where, others = min(near, key=lambda one: one[0])
    if many == 1:
        return f"nearly: {where}; but token {others[0]} of these is right"
    if many <= _MOST_NAMES:
        *first, last = map(str, others)
        return f"nearly: {where}; but tokens {', '.join(first)} and {last} of these are right"
    return f"nearly: {where}; but {many} tokens of these are right"
