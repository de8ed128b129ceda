"""Scale bytes of the groups beside: neighbours, or pairs of neighbours, in each other's place.

A lane that computes its group as ``g ^ 1`` or ``g ^ 2``, or a word whose halves are exchanged,
reads them so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np

from megamoe.explain.ways import Operands, Reader, Scales
from megamoe.spec.formats import U8

_SWAPS: Final = {1: "each two neighbouring groups", 2: "each two neighbouring pairs of groups"}
"""The bit of a group's number that is inverted, and what is swapped then."""


def readers() -> Iterator[tuple[str, Reader]]:
    """Deviations of either linear by name."""
    for bit, what in _SWAPS.items():
        yield f"weight scales of {what} are swapped", Scales(partial(_weights, bit))
        yield f"activation scales of {what} are swapped", Scales(partial(_activations, bit))


def _swapped(bit: int, sf: U8) -> U8:
    """``(..., G)`` scale bytes; a last group without a neighbour stays."""
    group = np.arange(sf.shape[-1])
    other = group ^ bit
    out: U8 = sf[..., np.where(other < len(group), other, group)]
    return out


def _weights(bit: int, o: Operands) -> Operands:
    return replace(o, weight_sf=_swapped(bit, o.weight_sf))


def _activations(bit: int, o: Operands) -> Operands:
    return replace(o, sf=_swapped(bit, o.sf))
