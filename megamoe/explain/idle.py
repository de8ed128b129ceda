"""Rules of which some rows are right, since the cause changes nothing there.

Rows whose scale bytes are all alike stay right if a kernel reads these in another order. So the
wrong tokens of a batch can be fewer than those of the rows that the fault meets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from megamoe.explain import deviations
from megamoe.explain.causes import TokenOutput
from megamoe.explain.life import live
from megamoe.explain.match import Names, is_among
from megamoe.explain.predict import Predictor
from megamoe.explain.rules import Bools, Rule
from megamoe.explain.sources import Source
from megamoe.explain.ways import right
from megamoe.judge.elements import TILE
from megamoe.spec.contract import Contract

_MOST: Final = 1 << 28
"""Weights of linear 1 of all tokens that are computed anew at most: a person waits for them."""
_TOKENS: Final = 64
"""Tokens that are computed anew at most, also of a small layer."""
Gives = Callable[[int, Bools], bool]
"""Whether a token's output follows if the cause holds in some of its slots ``(K,)``."""


def predictor(
    source: Source, stages: Mapping[str, Any], accumulator: str, contract: Contract, only: Names,
    channels: Mapping[int, int],
) -> Gives:  # fmt: skip
    """Of the deviations ``only``, which change what linear 2 reads: whether each of them gives
    ``y``. ``channels``: the first channel of the tile of each token that is compared, 0 of
    others."""
    runs: dict[int, tuple[Predictor, Any, list[Any]]] = {}

    def rows_of(token: int) -> tuple[Predictor, Any, list[Any]]:
        if token not in runs:
            first = channels.get(token, 0)
            tile = range(first, min(first + TILE, source.hidden_size))
            life = live(source, token, tile, accumulator, contract)
            output = TokenOutput.of(life, {name: stage[token] for name, stage in stages.items()})
            run = Predictor(life, source, output.acts or {})
            ways = [way for way in deviations.of_y(life, source)
                    if way.steps == {"reads2"} and is_among(only, way.stage, way.name)]  # fmt: skip
            own = run.rows_of(right(life))
            runs[token] = run, (output.y, own), [run.rows_of(way) for way in ways]
        return runs[token]

    def gives(token: int, slots: Bools) -> bool:
        run, (y, own), every = rows_of(token)
        mixes = [
            {k: other[k] if k < len(slots) and slots[k] else own[k] for k in own} for other in every
        ]
        return bool(mixes) and not any(
            run.outside_rows(right(run.life), mix, y).any() for mix in mixes
        )

    return gives


def with_idle_rows(
    rules: Sequence[Rule], wrong: Bools, gives: Gives, some: Sequence[int], weights: int
) -> list[Rule]:
    """The ``rules`` with all ``wrong`` tokens ``(T,)`` and others, if ``gives`` says of each of the
    others, and of ``some`` that are wrong, that the cause in the slots of the rule gives what is
    there. ``weights``: of linear 1, that one token meets."""
    out = []
    for rule in rules:
        tokens = np.asarray(rule.slots.any(axis=1))
        others = np.flatnonzero(tokens & ~wrong).tolist()
        if not len(others) or not tokens[wrong].all() or rule.experts is not None or rule.is_rare:
            continue
        many = len(others) + len(some)
        if many > _TOKENS or many * weights > _MOST:
            continue
        if all(gives(at, rule.slots[at]) for at in [*some, *others]):
            out.append(rule)
    return out


__all__ = ["Gives", "predictor", "with_idle_rows"]
