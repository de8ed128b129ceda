"""Scale bytes of an earlier block of K: a stage of a pipeline that is read before it is filled.

A kernel copies blocks of 128 of K into a ring of a few stages. Block j of a ring of N stages lies
where block j - N lay, so a copy that comes too late leaves the scales of block j - N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np

from megamoe.explain.life import Life
from megamoe.explain.ways import Operands, Reader, Scales
from megamoe.spec.formats import GROUP, U8

_BLOCK: Final = 128
"""K of one stage."""
_STAGES: Final = (1, 2, 3, 4)
"""Of a ring; 1 stands for the block before."""


def readers(life: Life, linear: int) -> Iterator[tuple[str, Reader]]:
    """Deviations of linear 1 or 2 by name, of the rings that have fewer stages than K has
    blocks."""
    length = life.x.size if linear == 1 else life.token.intermediate
    sides: dict[str, Callable[[Stale, Operands], Operands]] = {
        "weight scales": _weights, "activation scales": _activations,
    }  # fmt: skip
    if linear == 1:
        sides |= {"scales of the gate": partial(_half, 0), "scales of up": partial(_half, 1)}
    for what, read in sides.items():
        for where, stale in _rings(-(-length // _BLOCK)):
            yield f"{what} of block {where}", Scales(partial(read, stale))


Stale = Callable[[U8], U8]


def _rings(blocks: int) -> Iterator[tuple[str, Stale]]:
    """In words, and as a change of ``(..., G)`` scale bytes."""
    for stages in (n for n in _STAGES if n < blocks):
        of = f"j of 128 of K are those of block j - {stages}"
        yield of, partial(_stale, stages, None)
        for one in range(stages if stages > 1 else 0):
            if stages + one < blocks:
                yield f"{of}, where j modulo {stages} is {one}", partial(_stale, stages, one)


def _stale(stages: int, one: int | None, sf: U8) -> U8:
    group = np.arange(sf.shape[-1])
    block = group // (_BLOCK // GROUP)
    is_late = (block >= stages) & (True if one is None else block % stages == one)
    out: U8 = sf[..., np.where(is_late, group - stages * (_BLOCK // GROUP), group)]
    return out


def _weights(stale: Stale, o: Operands) -> Operands:
    return replace(o, weight_sf=stale(o.weight_sf))


def _activations(stale: Stale, o: Operands) -> Operands:
    return replace(o, sf=stale(o.sf))


def _half(which: int, stale: Stale, o: Operands) -> Operands:
    """``which``: 0 for the gate, 1 for up."""
    if o.where.life.contract.gate_up_order.value != "gate-up":
        which = 1 - which
    halves: list[Any] = np.split(o.weight_sf, 2)
    halves[which] = stale(halves[which])
    return replace(o, weight_sf=np.concatenate(halves))
