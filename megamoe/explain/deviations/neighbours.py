"""Linear 2 of the activations of another row of the same expert: the row before, or after.

The row's activations are computed as they should be, so each of them costs a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Final

from megamoe.explain.deviations.rows import ExpertRows
from megamoe.explain.life import SHARED, Life, live
from megamoe.explain.sources import Source
from megamoe.explain.ways import Operands, Reader
from megamoe.spec.formats import U8

_SMALL: Final = 1 << 22
"""Weights of linear 1 of a token up to which this is tried."""
_PARTS: Final = {
    "{of}": (True, True),
    "codes of {of}, its own scales": (True, False),
    "scales of {of}, its own codes": (False, True),
}
"""The words, and whether codes and scales are those of the other row."""
Row = Callable[[], tuple[U8, U8]]


def readers(life: Life, source: Source) -> Iterator[tuple[str, Reader]]:
    """One slot that reads another row, by name."""
    if len(life.slots) * life.x.size * life.token.intermediate > _SMALL:
        return
    experts = ExpertRows.of(source)
    place = {
        (int(source.token(token).ids[slot]), row): (token, slot)
        for (token, slot), row in experts.at.items()
    }
    for slot in life.slots:
        own = experts.at.get((life.at, slot.slot))
        if slot.expert == SHARED or own is None:
            continue
        for by, side in ((-1, "before"), (1, "after")):
            if (slot.expert, own + by) not in place:
                continue
            row = cache(partial(_acts, life, source, *place[slot.expert, own + by]))
            for words, (codes, scales) in _PARTS.items():
                row_text = words.format(of=f"the row {side} within its expert")
                name = f"slot {slot.slot} (expert {slot.expert}) reads {row_text}"
                yield name, partial(_read, slot.slot, row, codes, scales)


def _acts(life: Life, source: Source, token: int, slot: int) -> tuple[U8, U8]:
    other = live(source, token, life.channels.tolist(), life.accumulator.name, life.contract)
    neighbour = next(one for one in other.slots if one.slot == slot)
    return neighbour.codes, neighbour.exponent


def _read(slot: int, row: Row, codes: bool, scales: bool, o: Operands) -> Operands:
    if o.where.slot.slot != slot:
        return o
    other = row()
    return replace(o, codes=other[0] if codes else o.codes, sf=other[1] if scales else o.sf)
