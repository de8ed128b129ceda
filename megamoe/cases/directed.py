"""Weights for a few chosen activations and a few chosen sums: recipe kind ``directed``.

They serve cases in which two ways to compute end in different bits. Token ``t`` must be a hidden
value of 1 in channel ``32 * t`` and zeros elsewhere, or 1 and 1/8 in the channel after it. Then its
gates and ups are one weight, or two, and any short number can be had. Linear 2 adds what ``sums``
lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megamoe.spec.formats import GROUP, U8, e2m1_pack

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def expert_weights(
    hidden: int, intermediate: int, recipe: Mapping[str, Any]
) -> tuple[U8, U8, U8, U8]:
    """``(2I, H/2)``, ``(2I, H/32)``, ``(H, I/2)``, ``(H, I/32)`` uint8, the same for every expert.

    ``acts`` lists ``[token, channel, count, gate, up]``: the gate and the up of ``count`` channels,
    each 1 or 1.5 times a power of two with a sign, or with 1/8 beside the 1 a sum of an E2M1 value
    and an eighth of one. Channels that are not listed have 0 and 0.

    ``sums`` lists ``{w, scale}``: ``w`` has ``[channel, count, E2M1 value]``, ``scale`` has the
    exponent of each group of 32. Row ``n`` of w2 is entry ``n`` modulo their number; every other
    round of them has the opposite sign.
    """
    unknown = sorted(set(recipe) - {"kind", "acts", "sums"})
    if unknown:
        raise ValueError(f"weights recipe 'directed': unknown {unknown}; known: acts, sums")
    w13 = np.zeros((2 * intermediate, hidden), np.uint8)
    w13_sf = np.full((2 * intermediate, hidden // GROUP), 127, np.uint8)
    for token, channel, count, gate, up in recipe["acts"]:
        for first, value in ((0, gate), (intermediate, up)):
            rows = slice(first + channel, first + channel + count)
            columns = slice(GROUP * token, GROUP * token + 2)
            w13[rows, columns], w13_sf[rows, token] = _short(value)
    w2 = np.zeros((hidden, intermediate), np.uint8)
    w2_sf = np.full((hidden, intermediate // GROUP), 127, np.uint8)
    sums = recipe["sums"]
    if any(len(one.get("scale", ())) > w2_sf.shape[1] for one in sums):
        raise ValueError(f"weights recipe 'directed': more scales than {w2_sf.shape[1]} groups")
    for row in range(hidden):
        turn, entry = divmod(row, len(sums))
        for channel, count, value in sums[entry]["w"]:
            w2[row, channel : channel + count] = _nibble(-value if turn % 2 else value)
        exponents: Sequence[int] = sums[entry].get("scale", ())
        w2_sf[row, : len(exponents)] = np.array(exponents, np.int64) + 127
    return e2m1_pack(w13), w13_sf, e2m1_pack(w2), w2_sf


def _short(value: float) -> tuple[list[int], int]:
    """``a + b / 8`` times a power of two as E2M1 codes of a and b, and a UE8M0 byte; b is 0 if it
    can be."""
    if value == 0:
        return [0, 0], 127
    fraction, exponent = np.frexp(abs(value))
    sign = 1 if value > 0 else -1
    for second in _MAGNITUDES:
        for shift in (1, 2, 4):
            first = float(shift * fraction) - second / 8
            if first in _MAGNITUDES:
                byte = int(exponent) + 127 - shift.bit_length() + 1
                return [_nibble(sign * first), _nibble(sign * second)], byte
    raise ValueError(f"weights recipe 'directed': {value} is no sum of two E2M1 values")


def _nibble(value: float) -> int:
    if abs(value) not in _MAGNITUDES:
        raise ValueError(f"weights recipe 'directed': {value} is no E2M1 value, scaled or not")
    return _MAGNITUDES.index(abs(value)) | (8 if value < 0 else 0)
