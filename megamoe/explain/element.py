"""The worst element of one stage of a token: what was expected there, and what the output has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.explain.life import SHARED, Life, code_interval
from megamoe.judge.elements import Place, from_key, place_of, worst_of
from megamoe.judge.verdict import Worst
from megamoe.spec.formats import E4M3_TABLE, GROUP, U8, U16, UE8M0_NAN
from megamoe.spec.forms import BF16, E4M3, UE8M0, Form

Array = npt.NDArray[Any]
Acts = Mapping[int, tuple[U8, U8]]


def of_staging(life: Life, stage: str, actual: U8, mask: Array) -> dict[str, Any]:
    """Of ``x`` ``(H,)`` or ``x_sf`` ``(H/32,)``; ``mask`` is true where ``actual`` is wrong."""
    form, right = (E4M3, life.x) if stage == "x" else (UE8M0, life.x_sf)
    return _plain(_worst(stage, form, (actual, right, right, mask), place_of(stage, [life.at])))


def of_acts(life: Life, stage: str, acts: Acts, mask: Array) -> dict[str, Any]:
    """Of ``l2_acts`` ``(S, I)`` or ``l2_acts_sf`` ``(S, I/32)``, S routed slots."""
    slots = [slot for slot in life.slots if slot.slot in acts and slot.expert != SHARED]
    codes, sf = (np.stack([acts[s.slot][k] for s in slots]) for k in (0, 1))
    if stage == "l2_acts_sf":
        form, actual = UE8M0, sf
        low = np.stack([s.exponent_low for s in slots])
        high = np.stack([s.exponent_high for s in slots])
    else:
        form, actual = E4M3, codes
        keys = [code_interval(slot, own) for slot, own in zip(slots, sf, strict=True)]
        low, high = (from_key(form, np.stack([pair[k] for pair in keys])) for k in (0, 1))
    place = place_of(stage, [life.at], np.array([[slot.expert for slot in slots]]))
    worst = _worst(stage, form, (actual, low, high, mask), place)
    row, channel = worst.slot or 0, worst.channel or 0
    means = ""
    if stage == "l2_acts":
        byte, value = int(sf[row, channel // GROUP]), float(slots[row].value[channel])
        means = value_of_code(int(codes[row, channel]), byte, value)
    return {**_plain(replace(worst, slot=slots[row].slot)), "means": means}


def value_of_code(code: int, byte: int, value: float) -> str:
    """What an E4M3 code beside the scale byte ``byte`` says of the fp32 activation, in a line;
    ``value`` is the right one. Empty where the two differ in more than their size."""
    at = code & 0x7F
    if at >= 0x7E or byte == UE8M0_NAN or not math.isfinite(value) or (code < 0x80) != (value > 0):
        return ""
    factor = 2.0 ** (byte - 127)
    ends = [0.0 if end < 0 else float(E4M3_TABLE[end : end + 2].mean()) for end in (at - 1, at)]
    low, high = (end * factor for end in ends)
    size = abs(value)
    if low <= size <= high or not size:
        return ""
    by, how = (low / size - 1, "large") if size < low else (1 - high / size, "small")
    return (
        f"code 0x{code:02x} means |v| from {low:.6g} to {high:.6g}; the right |v| is {size:.6g}, "
        f"so yours was too {how} by {100 * by:.2g} % at least"
    )


def of_y(life: Life, actual: U16, low: U16, high: U16, mask: Array) -> dict[str, Any]:
    """Of ``y`` ``(n,)`` at the life's channels."""
    worst = _worst("y", BF16, (actual, low, high, mask), place_of("y", [life.at]))
    return _plain(replace(worst, channel=int(life.channels[worst.channel or 0])))


def _worst(
    stage: str, form: Form, of_token: tuple[Array, Array, Array, Array], place: Place
) -> Worst:
    """``of_token``: the output, both ends and the mask, without the axis of tokens."""
    actual, low, high, mask = of_token
    return worst_of(stage, form, actual[None], low[None], high[None], mask[None], place)


def _plain(worst: Worst) -> dict[str, Any]:
    """JSON-able; ``line`` is the judge's own sentence."""
    return {**asdict(worst), "line": worst.line()}
