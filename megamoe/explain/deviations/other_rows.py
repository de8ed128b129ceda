"""Deviations of operands: the row of another token, or the weights of another expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Final

from megamoe.explain.deviations.rows import ExpertRows, other_tokens_of, staged_row
from megamoe.explain.life import SHARED, Life
from megamoe.explain.sources import Source
from megamoe.explain.ways import Operands, Reader
from megamoe.spec.formats import U8

_EXPERTS_AT_MOST: Final = 96
"""Slots times experts up to which one slot is tried with each other expert."""
_SMALL: Final = 1 << 20
"""Weights of linear 1 of a token up to which it is tried."""


def token_readers(life: Life, source: Source) -> dict[str, Reader]:
    """Linear 1 of another token's row, staged as it should be."""
    experts = ExpertRows.of(source)
    tokens = {s.slot: other_tokens_of(life, s, source, experts) for s in life.slots}
    row_of = cache(partial(staged_row, life, source))
    out: dict[str, Reader] = {}
    for name in dict.fromkeys(name for own in tokens.values() for name in own):
        row = partial(_row_of, tokens, name, row_of)
        out[f"a slot reads {name}"] = partial(_read_row, row, True, True)
        out[f"a slot reads codes of {name}, its own scales"] = partial(_read_row, row, True, False)
        out[f"a slot reads scales of {name}, its own codes"] = partial(_read_row, row, False, True)
    return out


def expert_of_slot(life: Life, source: Source) -> dict[str, Reader]:
    """One slot with the weights of another expert that has rows; of a small layer only."""
    experts = sorted(ExpertRows.of(source).tokens)
    out: dict[str, Reader] = {}
    if len(life.slots) * len(experts) > _EXPERTS_AT_MOST or (
        len(life.slots) * life.x.size * life.token.intermediate > _SMALL
    ):
        return out
    for slot in life.slots:
        for other in experts:
            if slot.expert not in (SHARED, other):
                name = f"slot {slot.slot} (expert {slot.expert}) takes the weights of expert"
                out[f"{name} {other}"] = partial(_slot_takes, slot.slot, other)
    return out


def _slot_takes(slot: int, expert: int, o: Operands) -> Operands:
    if o.where.slot.slot != slot:
        return o
    packed, sf = o.where.weights(expert)
    return replace(o, packed=packed, weight_sf=sf)


Row = tuple[U8, U8]


def _row_of(
    tokens: Mapping[int, Mapping[str, int]], name: str, row_of: Callable[[int], Row], o: Operands
) -> Row | None:
    token = tokens[o.where.slot.slot].get(name)
    return None if token is None else row_of(token)


def _read_row(
    row: Callable[[Operands], tuple[U8, U8] | None], codes: bool, scales: bool, o: Operands
) -> Operands:
    pair = row(o)
    if pair is None:
        return o
    return replace(o, codes=pair[0] if codes else o.codes, sf=pair[1] if scales else o.sf)
