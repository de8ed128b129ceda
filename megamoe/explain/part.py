"""The place where an output departs from its life.

Each step between two stages is judged by what the class allows for the earlier stage of the output
itself. For a stage outside, the catalogue of deviations of that step is tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.explain import element, overflow
from megamoe.explain import life as lives
from megamoe.explain.causes import (
    OfCodes,
    TokenOutput,
    decide,
    explain_codes,
    explain_staging,
    explain_y,
)
from megamoe.explain.channels import pattern
from megamoe.explain.life import Life, live, same_codes
from megamoe.explain.match import Names
from megamoe.explain.points import Bools, outside
from megamoe.explain.predict import Acts
from megamoe.explain.sources import Source
from megamoe.spec.formats import GROUP, U16, bf16_round
from megamoe.spec.forms import BF16

Array = npt.NDArray[Any]
Plain = dict[str, Any]


def part(
    life: Life, source: Source, actual: Mapping[str, Array], at: int, only: Names | None = None
) -> Plain:
    """``actual``: the token's rows of ``tensors.STAGES`` as bits, ``y`` ``(H,)`` at least.

    Returns the comparison of each stage with its worst element, the first stage outside, and the
    explanation of each wrong step; ``wrong_slots`` are those with a wrong code or scale byte.
    ``only``: the deviations to try, by default all.
    """
    output = TokenOutput.of(life, actual)
    stages, explanations = [], []
    wrong = _staged_outside(life, output)
    for name, mask in wrong.items():
        row: Any = output.x if name == "x" else output.x_sf
        worst = element.of_staging(life, name, row, mask) if mask.any() else None
        stages.append(_stage(name, "staging", mask, worst))
    if any(mask.any() for mask in wrong.values()):
        of_x = explain_staging(life, source, output, wrong, only)
        explanations.append({**of_x, "overflow": _staged_overflow(life, output, wrong)})
    base, follows = _base(life, source, output)
    codes: OfCodes | None = None
    wrong_slots: list[int] = []
    if output.acts is not None:
        by_slot = _acts_outside(base, output.acts)
        stages += _acts_stages(base, output.acts, by_slot, follows)
        if by_slot.any():
            routed = [slot.slot for slot in life.slots if slot.slot in output.acts]
            wrong_slots = [routed[k] for k in np.flatnonzero(by_slot.any(axis=1))]
            codes = explain_codes(base, source, output.acts, by_slot, only)
            codes.explanation["overflow"] = overflow.of_codes(base, output.acts, by_slot)
            explanations.append(codes.explanation)
    low, high, of_codes = _y_interval(base, output)
    beyond = outside(output.y, low, high)
    last = "linear 2 or combine" if output.acts is not None else "any step: the output has no codes"
    worst = element.of_y(life, output.y, low, high, beyond) if beyond.any() else None
    y = _stage("y", last, beyond, worst)
    # Where zeros are right in every channel, the values are what was there before: no pattern.
    channels = pattern(beyond, int(base.channels[0])) if ((low | high) & 0x7FFF).any() else ""
    stages.append({**y, "channels": channels})
    if beyond.any():
        of_y = explain_y(base, source, output, beyond, only, wrong_slots)
        explanations.append({**of_y, "overflow": overflow.of_y(output.y, low, high, beyond)})
    if codes is not None:
        decide(codes, explanations[-1] if beyond.any() else None, output.y)
    return {
        "y": BF16.hex(output.y[at]),
        "y_channels": [int(life.channels[0]), int(life.channels[-1])],
        "allowed": [BF16.hex(low[at]), BF16.hex(high[at])],
        "given_the_codes_shown": of_codes,
        "outside": bool(beyond[at]),
        "stages": stages,
        "parts_at": next((s for s in stages if s["outside"]), None),
        "explanations": explanations,
        "wrong_slots": wrong_slots,
    }


def _stage(stage: str, where: str, beyond: Bools, worst: Plain | None) -> Plain:
    return {
        "stage": stage,
        "where": where,
        "outside": int(beyond.sum()),
        "of": int(beyond.size),
        "first": int(np.argmax(beyond)) if beyond.any() else None,
        "worst": worst,
    }


# --- the stages outside -------------------------------------------------------------------------


def _staged_outside(life: Life, output: TokenOutput) -> dict[str, Bools]:
    out = {}
    if output.x is not None:
        out["x"] = output.x != life.x
    if output.x_sf is not None:
        out["x_sf"] = output.x_sf != life.x_sf
    return out


def _staged_overflow(life: Life, output: TokenOutput, wrong: Mapping[str, Bools]) -> list[Plain]:
    pairs: dict[str, Any] = {"x": (output.x, life.x), "x_sf": (output.x_sf, life.x_sf)}
    return [overflow.overflow(name, pairs[name][0], pairs[name][1], pairs[name][1], mask)
            for name, mask in wrong.items()]  # fmt: skip


def _base(life: Life, source: Source, output: TokenOutput) -> tuple[Life, str]:
    """The life from the ``x`` of the output, unless the later stages follow from the right
    ``x``."""
    if output.x is None and output.x_sf is None:
        return life, ""
    x = life.x if output.x is None else output.x
    sf = life.x_sf if output.x_sf is None else output.x_sf
    if np.array_equal(x, life.x) and np.array_equal(sf, life.x_sf):
        return life, ""
    channels = life.channels.tolist()
    other = live(source, life.at, channels, life.accumulator.name, life.contract, (x, sf))
    if _is_inside(life, output):
        return life, ", given the right x"
    return other, ", given x as it was shown"


def _is_inside(life: Life, output: TokenOutput) -> bool:
    if output.acts is not None:
        return not _acts_outside(life, output.acts).any()
    return not outside(output.y, life.y_low, life.y_high).any()


def _acts_outside(life: Life, acts: Acts) -> Bools:
    """``(S, I/32 + I)``: scale bytes, then codes, of the routed slots."""
    rows = []
    for slot in life.slots:
        if slot.slot not in acts:
            continue
        codes, sf = acts[slot.slot]
        low, high = lives.code_interval(slot, sf)
        key = same_codes(codes)
        wrong_sf = (sf < slot.exponent_low) | (sf > slot.exponent_high)
        rows.append(np.concatenate([wrong_sf, (key < low) | (key > high)]))
    return np.stack(rows) if rows else np.zeros((0, 0), np.bool_)


def _acts_stages(life: Life, acts: Acts, by_slot: Bools, follows: str) -> list[Plain]:
    groups = life.token.intermediate // GROUP
    where = f"between linear 1 and requantisation{follows}"
    out = []
    for name, mask in (("l2_acts_sf", by_slot[:, :groups]), ("l2_acts", by_slot[:, groups:])):
        worst = element.of_acts(life, name, acts, mask) if mask.any() else None
        stage = _stage(name, where, mask.ravel(), worst)
        if name == "l2_acts":
            stage["channels"] = pattern(np.any(mask, axis=0))
        out.append(stage)
    return out


def _y_interval(life: Life, output: TokenOutput) -> tuple[U16, U16, bool]:
    """The envelope of ``y``: from the output's own codes, unless it follows from the right
    codes."""
    if output.acts is None:
        return life.y_low, life.y_high, False
    low, high = {}, {}
    for slot in life.slots:
        if slot.slot not in output.acts:  # a shared expert's codes are no stage
            low[slot.slot], high[slot.slot] = slot.down.row_low, slot.down.row_high
            continue
        operands = *output.acts[slot.slot], slot.down.packed, slot.down.sf
        ends = lives.down_ends(*operands, life.accumulator)
        low[slot.slot], high[slot.slot] = (bf16_round(end) for end in ends)
    least, most = life.ends(low, high)
    differs = outside(output.y, least, most).any()
    if differs and not outside(output.y, life.y_low, life.y_high).any():
        return life.y_low, life.y_high, False
    return least, most, True


__all__ = ["part"]
