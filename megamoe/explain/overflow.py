"""Wrong values that look like an overflow, counted for each stage.

An overflow leaves NaN or infinity where a finite value is right. A cast that saturates leaves the
largest value of the format in its place, where a smaller one is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.explain.life import Life, code_interval
from megamoe.judge.elements import from_key
from megamoe.spec.formats import GROUP, U8, U16, UE8M0_NAN
from megamoe.spec.forms import BF16, E4M3, UE8M0, Form
from megamoe.spec.tensors import TENSORS

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Plain = dict[str, Any]
_LARGEST: Final = {E4M3: 0x7E, UE8M0: 0xFE, BF16: 0x7F7F}
"""The bits of the largest finite value of each format."""
_OR: Final = {E4M3: "a scale factor that is too small", UE8M0: "an infinite amax",
              BF16: "an infinite sum"}  # fmt: skip
"""Other origins of that value."""
_WORDS: Final = {"x": "codes", "x_sf": "scale bytes", "l2_acts": "codes",
                 "l2_acts_sf": "scale bytes", "y": "elements"}  # fmt: skip


def _form(stage: str) -> Form:
    form = TENSORS[stage].form
    assert form is not None  # only ids have none
    return form


def overflow(stage: str, actual: Array, low: Array, high: Array, wrong: Bools) -> Plain:
    """The counts for one stage: of ``wrong``, of those that are not finite, and of those that have
    the largest finite value, where the contract allows smaller finite values only.

    ``actual``, ``low``, ``high``: bits of one shape, in the format of the stage; scale bytes one by
    one. ``wrong``: true where ``actual`` is outside.
    """
    form = _form(stage)
    top = _LARGEST[form]
    size, most = (
        np.abs(form.key(actual)),
        np.maximum(*(np.abs(form.key(end)) for end in (low, high))),
    )
    return {
        "stage": stage,
        "wrong": int(wrong.sum()),
        "not_finite": int((wrong & (size > top) & (most <= top)).sum()),
        "largest": int((wrong & (size == top) & (most < top)).sum()),
    }


def of_codes(life: Life, acts: Mapping[int, tuple[U8, U8]], wrong: Bools) -> list[Plain]:
    """The counts of ``l2_acts_sf`` and ``l2_acts``.

    ``wrong`` ``(S, I/32 + I)``: scale bytes, then codes, that are outside. Codes beside the scale
    byte 255 are not counted: the byte makes them NaN.
    """
    slots = [slot for slot in life.slots if slot.slot in acts]
    groups = life.token.intermediate // GROUP
    codes, sf = (np.stack([acts[slot.slot][k] for slot in slots]) for k in (0, 1))
    low_sf = np.stack([slot.exponent_low for slot in slots])
    high_sf = np.stack([slot.exponent_high for slot in slots])
    keys = [code_interval(slot, own) for slot, own in zip(slots, sf, strict=True)]
    low, high = (from_key(E4M3, np.stack([pair[k] for pair in keys])) for k in (0, 1))
    own = wrong[:, groups:] & ~np.repeat(sf == UE8M0_NAN, GROUP, axis=1)
    return [
        overflow("l2_acts_sf", sf, low_sf, high_sf, wrong[:, :groups]),
        overflow("l2_acts", codes, low, high, own),
    ]


def lines(counts: list[Plain]) -> list[str]:
    """A line for each stage of which most wrong values look like an overflow."""
    out = []
    for one in counts:
        form, of = _form(one["stage"]), f"the {one['wrong']} wrong {_WORDS[one['stage']]}"
        top = _LARGEST[form]
        if 2 * one["not_finite"] > one["wrong"]:
            what = "NaN or infinite" if form is BF16 else "NaN"
            out.append(
                f"{one['not_finite']} of {of} of {one['stage']} are {what} where finite ones are "
                "right: may be an overflow or 0 * infinity (two scales multiplied with each other, "
                "a scale of zero, a row that was never written)"
            )
        elif 2 * one["largest"] > one["wrong"]:
            out.append(
                f"{one['largest']} of {of} of {one['stage']} are {form.text(top)}, the largest "
                f"finite value ({form.hex(top)}), where smaller ones are right: may be an overflow "
                f"that was cut off, or {_OR[form]}"
            )
    return out


def of_y(actual: U16, low: U16, high: U16, wrong: Bools) -> list[Plain]:
    """The counts of ``y``."""
    return [overflow("y", actual, low, high, wrong)]


__all__ = ["lines", "of_codes", "of_y", "overflow"]
