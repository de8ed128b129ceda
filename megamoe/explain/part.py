"""Where an output that somebody got leaves the life that it should have had.

Stage by stage where the stages are there: each is held to what the class allows, given the one
before it as it really was. Then the catalogue of single deviations is tried from the last good
stage on, and the one that gives the bits is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.explain import life as lives
from megamoe.explain.deviations import TOTALS, Run, catalogue, right
from megamoe.explain.life import SHARED, Life, same_codes
from megamoe.judge.judgements import observable_codes
from megamoe.spec.formats import U8, U16, bf16_key, unpack_sf
from megamoe.spec.forms import BF16

Array = npt.NDArray[Any]
Acts = dict[int, tuple[U8, U8]]


def part(life: Life, actual: Mapping[str, Array], at: int) -> dict[str, Any]:
    """``actual``: the token's rows of ``tensors.STAGES`` as bits, ``y`` ``(H,)`` at least.

    Returns what each stage shows, the first that is outside, and the deviations that explain it.
    """
    y = actual["y"][life.channels]
    stages = []
    if "x" in actual:
        stages.append(_said("x", "staging", actual["x"] != life.x))
    if "x_sf" in actual:
        stages.append(_said("x_sf", "staging", unpack_sf(actual["x_sf"]) != life.x_sf))
    acts: Acts | None = None
    if "l2_acts" in actual and "l2_acts_sf" in actual:
        shown = observable_codes(actual["l2_acts"], actual["l2_acts_sf"])
        acts = {
            s.slot: (shown[s.slot], actual["l2_acts_sf"][s.slot])
            for s in life.slots if s.expert != SHARED
        }  # fmt: skip
        stages += _acts_stages(life, acts)
    low, high = _y_interval(life, acts)
    last = "linear 2 or combine" if acts is not None else "not known: only y is there"
    stages.append(_said("y", last, _outside(y, low, high)))
    first = next((s for s in stages if s["outside"]), None)
    found: dict[str, Any] = {
        "y": BF16.hex(y[at]),
        "allowed": [BF16.hex(low[at]), BF16.hex(high[at])],
        "given_the_codes_shown": acts is not None,
        "outside": bool(_outside(y[at : at + 1], low[at : at + 1], high[at : at + 1])[0]),
        "stages": stages,
        "parts_at": first,
        "deviations": None,
    }
    if first is not None and first["stage"] not in ("x", "x_sf"):
        found["deviations"] = _tried(life, y, acts, first["stage"])
    return found


def _said(stage: str, where: str, outside: npt.NDArray[np.bool_]) -> dict[str, Any]:
    return {
        "stage": stage,
        "where": where,
        "outside": int(outside.sum()),
        "of": int(outside.size),
        "first": int(np.argmax(outside)) if outside.any() else None,
    }


def _acts_stages(life: Life, acts: Acts) -> list[dict[str, Any]]:
    exponents, codes = [], []
    for slot in life.slots:
        if slot.slot not in acts:
            continue
        shown, sf = acts[slot.slot]
        exponents.append((sf < slot.exponent_low) | (sf > slot.exponent_high))
        low, high = lives.code_interval(slot, sf)
        codes.append((same_codes(shown) < low) | (same_codes(shown) > high))
    empty = np.zeros(0, np.bool_)
    where = "between linear 1 and requantisation"
    return [
        _said("l2_acts_sf", where, np.concatenate([empty, *exponents])),
        _said("l2_acts", where, np.concatenate([empty, *codes])),
    ]


def _y_interval(life: Life, acts: Acts | None) -> tuple[U16, U16]:
    """What ``y`` may be: given the codes that were shown, or end to end."""
    if acts is None:
        return life.y_low, life.y_high
    low, high = {}, {}
    for slot in life.slots:
        if slot.slot not in acts:  # a shared expert's codes are no stage
            low[slot.slot], high[slot.slot] = slot.down.row_low, slot.down.row_high
            continue
        low[slot.slot], high[slot.slot] = lives.down_interval(
            *acts[slot.slot], slot.down.packed, slot.down.sf, life.accumulator
        )
    return life.ends(low, high)


def _outside(y: U16, low: U16, high: U16) -> npt.NDArray[np.bool_]:
    """As the judge has it: inclusive, NaN only where NaN is expected."""
    nan = BF16.is_nan(low)
    inside = (bf16_key(y) >= bf16_key(low)) & (bf16_key(y) <= bf16_key(high)) & ~BF16.is_nan(y)
    only_zero = (bf16_key(low) == 0) & (bf16_key(high) == 0)
    inside &= ~only_zero | (y == low) | (y == high)
    return ~np.where(nan, BF16.is_nan(y), inside)


def _tried(life: Life, y: U16, acts: Acts | None, stage: str) -> dict[str, Any]:
    """The catalogue against the bits of the first stage that is outside."""
    of_codes = acts is not None and stage != "y"
    run = Run(life, given=None if of_codes else acts)
    # From codes that were shown on, only what comes after them can be at fault.
    late = ("linear 2", "linear 1 and 2", "combine", "routing weight")
    ways = [w for w in catalogue(life) if of_codes or acts is None or w.stage in late]

    def score(way: Any) -> int:
        best = 0
        for total in TOTALS.values():
            if of_codes:
                assert acts is not None
                made = run.acts(way, total)
                same = sum(
                    int((made[k][0] == acts[k][0]).sum() + (made[k][1] == acts[k][1]).sum())
                    for k in made
                )
            else:
                same = int((run.y(way, total) == y).sum())
            best = max(best, same)
        return best

    own = score(right(life))
    of = sum(c.size + e.size for c, e in acts.values()) if of_codes and acts else y.size
    scored = sorted(((score(w), w) for w in ways), key=lambda pair: -pair[0])
    best = scored[0][0] if scored else 0
    named = [w for s, w in scored if s == best] if best > own else []
    return {
        "compared": "codes and exponents" if of_codes else "elements of y",
        "of": int(of),
        "as_the_contract_says": own,
        "best": best,
        "explains": bool(named) and (of - best) * 2 <= of - own,
        "named": [{"stage": w.stage, "what": w.name} for w in named],
    }
