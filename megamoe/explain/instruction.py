"""One dot product as an instruction computes it: a step at a time, bit by bit.

The numbers are those of ``spec.accumulators``; ``docs/numerics.md`` has the evidence. If a class
leaves the order open (``fp32``, ``fp32-ordered``), there is no instruction to model: then it is one
member, exact blocks of 32 added in ascending order, one fp32 addition each.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megamoe.oracle.linear import _E2M1_FIELD, _E4M3_FIELD, is_e4m3
from megamoe.oracle.units import Unit, fused
from megamoe.spec.accumulators import Accumulator
from megamoe.spec.formats import E2M1_TABLE, E4M3_TABLE, GROUP, U8, e2m1_unpack, ue8m0_decode

F64 = npt.NDArray[np.float64]


def unit_of(a: Accumulator) -> Unit:
    """The instruction of a class that has one."""
    assert a.align_bits is not None and a.result_bits is not None
    return Unit(a.name, GROUP, a.align_bits, a.result_bits, a.evidence)


def weight_values(packed: U8, sf: U8) -> tuple[U8, F64]:
    """Codes and values without scales, ``(N, C)`` each: E2M1 nibbles, or a shared expert's E4M3."""
    if is_e4m3(packed, sf):
        return packed, E4M3_TABLE[packed]
    nibbles = e2m1_unpack(packed)
    return nibbles, E2M1_TABLE[nibbles]


def products(codes: U8, sf: U8, packed: U8, weight_sf: U8) -> F64:
    """``(N, C)`` scaled products of one row ``(C,)`` with ``N`` rows of weights, exact."""
    x = E4M3_TABLE[codes] * np.repeat(ue8m0_decode(sf), GROUP)
    w = weight_values(packed, weight_sf)[1] * np.repeat(ue8m0_decode(weight_sf), GROUP, axis=-1)
    return x * w


def model_sums(a: Accumulator, codes: U8, sf: U8, packed: U8, weight_sf: U8) -> F64 | None:
    """``(N,)`` results as fp32 values; None for the class ``exact``, which has no rounding."""
    if a.align_bits is None:
        return None
    terms = products(codes, sf, packed, weight_sf)
    terms = terms.reshape(len(packed), -1, GROUP)
    if a.any_order_in_block:
        return blockwise(terms.sum(axis=2).T)
    scale = sf.astype(np.int32) + weight_sf.astype(np.int32) - 254
    factor = np.zeros_like(scale)
    if a.outside:  # the unit sees the products as they are; the factor comes after it
        terms, scale, factor = np.ldexp(terms, -scale[:, :, None]), factor, scale
    table = _E4M3_FIELD if is_e4m3(packed, weight_sf) else _E2M1_FIELD
    of_weights = table[weight_values(packed, weight_sf)[0]]
    if a.outside and table is _E2M1_FIELD:  # there the weight is an E4M3, where 0.5 is normal
        of_weights = of_weights - (weight_values(packed, weight_sf)[0] & 7 == 1)
    field = (_E4M3_FIELD[codes] + of_weights).reshape(terms.shape)
    field = field + scale[:, :, None]
    unit = unit_of(a)
    main, running = np.zeros(len(packed)), np.zeros(len(packed))
    groups = terms.shape[1]
    for g in range(groups):
        running = fused(unit, terms[:, g], field[:, g], running)
        if a.promote is not None and ((g + 1) % (a.promote // GROUP) == 0 or g + 1 == groups):
            scaled = np.ldexp(running, factor[:, g]).astype(np.float32)
            main = (main + scaled).astype(np.float32).astype(np.float64)
            running = np.zeros(len(packed))
    return running if a.promote is None else main


def blockwise(blocks: F64) -> F64:
    """``(G, ...)`` exact block sums, added in ascending order in fp32."""
    total = np.zeros(blocks.shape[1:], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for block in blocks.astype(np.float32):
            total += block
    return total.astype(np.float64)
