"""Block sums of one row with many weights, fast: the bits of ``oracle.linear.block_sums``.

The oracle multiplies in float64. Here an operand row is split, as ``eager`` does it, into its part
of magnitude 1 and above and the part below: sums of 32 products of either with E2M1 values fit in
21 bits, so fp32 products are exact, and four nibbles are decoded by one look-up.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from megamoe.oracle.linear import (
    NO_TERM,
    Blocks,
    Columns,
    Rows,
    block_sums,
    folded_field,
    is_e4m3,
)
from megamoe.spec.formats import E2M1_TABLE, E4M3_TABLE, GROUP, U8, ue8m0_decode

F64 = npt.NDArray[np.float64]
_AT_ONCE: Final = 1 << 18
"""Decoded weights in memory at a time: 1 MiB of fp32."""


def row_blocks(codes: U8, sf: U8, packed: U8, weight_sf: U8) -> Blocks:
    """``(H,)`` codes with ``(G,)`` scales against ``N`` rows of weights with ``(N, G)`` scales.

    The blocks have the shape ``(G, 1, N)``, G = H/32.
    """
    rows = Rows.of(codes[None], sf[None])
    if is_e4m3(packed, weight_sf):
        return block_sums(rows, Columns.of(packed, weight_sf))
    signed, absolute = _sums(codes, packed)
    lowbit, field = _weight_bits(packed)
    exponents, powers = _of_scales()
    weight_sf = np.ascontiguousarray(weight_sf.T)
    own = rows.exponent.T
    # A product of two powers of two of this range is exact in float64. In place: these arrays are
    # large, and fresh pages cost more than the arithmetic.
    scale = powers[weight_sf]
    scale *= np.exp2(own)
    signed *= scale
    absolute *= scale
    positive = np.add(absolute, signed, out=scale)
    positive *= 0.5
    negative = np.subtract(absolute, signed, out=absolute)
    negative *= 0.5
    whole = exponents[weight_sf]
    whole += own
    if np.isnan(whole).any():
        whole = np.nan_to_num(whole)
    lowbit += whole
    lowbit += rows.lowbit.T
    bf16_field = folded_field(field + exponents[weight_sf])
    bf16_field += folded_field(rows.field.T + own)
    field += whole
    field += rows.field.T
    parts = (signed, signed, positive, negative, lowbit, field, bf16_field)
    return Blocks(*(part[:, None] for part in parts))


def signed_blocks(codes: U8, sf: U8, packed: U8, weight_sf: U8) -> F64:
    """``(G, N)`` block sums alone, without the data of their terms that bounds need."""
    if is_e4m3(packed, weight_sf):
        return row_blocks(codes, sf, packed, weight_sf).low[:, 0]
    _, powers = _of_scales()
    signed, _ = _sums(codes, packed, absolutes=False)
    signed *= powers[weight_sf.T] * powers[sf][:, None]
    return signed


@cache
def _of_scales() -> tuple[F64, F64]:
    """UE8M0 byte to exponent and to power of two, ``(256,)``; NaN for 0xFF."""
    powers = ue8m0_decode(np.arange(256, dtype=np.uint8))
    return np.log2(powers), powers


def _sums(codes: U8, packed: U8, absolutes: bool = True) -> tuple[F64, F64]:
    """Sums of 32 products without scales, and of their magnitudes: ``(G, N)`` each."""
    outputs, groups = packed.shape[0], packed.shape[1] * 2 // GROUP
    x = torch.from_numpy(E4M3_TABLE[codes]).float()
    large = x.abs() >= 1.0
    zero = torch.zeros(())
    parts = [torch.where(large, x, zero), torch.where(large, zero, x)]  # NaN is in the second
    operand = torch.stack([p for p in parts if bool((p != 0).any())] or parts[:1], -1)
    operand = operand.view(groups, GROUP, -1)
    magnitude = operand.abs()
    signed, absolute = np.empty((groups, outputs)), np.empty((groups, outputs))
    step = max(1, _AT_ONCE // (groups * GROUP))
    for start in range(0, outputs, step):
        part = slice(start, start + step)
        four = np.ascontiguousarray(packed[part]).view("<u2")
        values = torch.from_numpy(_quads()[four]).view(torch.float16).float()
        values = values.view(-1, groups, GROUP).transpose(0, 1)
        products = [torch.bmm(values, operand)]
        if absolutes:
            products.append(torch.bmm(values.abs_(), magnitude))
        for out, both in zip((signed, absolute), products, strict=False):
            out[:, part] = both[..., 0].numpy()
            for other in range(1, both.shape[2]):
                out[:, part] += both[..., other].numpy()
    return signed, absolute


@cache
def _quads() -> npt.NDArray[np.int64]:
    """Two packed bytes to four halves in an int64, ``(65536,)``."""
    nibbles = (np.arange(65536)[:, None] >> np.array([0, 4, 8, 12])) & 0xF
    return E2M1_TABLE.astype(np.float16)[nibbles].view(np.int64).ravel()


# Flags of the E2M1 magnitudes, by nibble: the lowest bit at 2**-1, 0, 1, 2 (bits 0 to 3), and the
# exponent field 0, 1, 2 (bits 4 to 6).
_CLASSES: Final = (0x00, 0x11, 0x12, 0x11, 0x24, 0x22, 0x48, 0x44)


@cache
def _class_quads() -> U8:
    """Two packed bytes to the union of the classes of their nibbles, ``(65536,)``."""
    one = np.array(_CLASSES * 2, np.uint8)
    both = np.arange(65536)
    return one[both & 15] | one[both >> 4 & 15] | one[both >> 8 & 15] | one[both >> 12]


@cache
def _of_classes() -> tuple[F64, F64]:
    """Union of classes to lowest bit and largest field."""
    union = np.arange(256)
    lowbit = np.select([(union >> b) & 1 == 1 for b in range(4)], [-1, 0, 1, 2], -NO_TERM)
    field = np.select([(union >> b) & 1 == 1 for b in (6, 5, 4)], [2, 1, 0], NO_TERM)
    return lowbit.astype(np.float64), field.astype(np.float64)


def _weight_bits(packed: U8) -> tuple[F64, F64]:
    """Lowest set bit and largest exponent field of each group's weights, ``(G, N)``."""
    union = _class_quads()[np.ascontiguousarray(packed).view("<u2")].view("<u8")
    for shift in (32, 16, 8):
        union = union | (union >> np.uint64(shift))
    group = np.ascontiguousarray((union & np.uint64(0xFF)).T.astype(np.uint8))
    lowbit, field = _of_classes()
    return lowbit[group], field[group]
