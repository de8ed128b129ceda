"""The place where an output departs from its life.

Each step between two stages is judged by what the class allows for the earlier stage of the output
itself. For a stage outside, the catalogue of deviations of that step is tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.explain import deviations, element
from megamoe.explain import life as lives
from megamoe.explain.life import SHARED, Life, live, same_codes
from megamoe.explain.match import fit, report
from megamoe.explain.points import Bools, Points, outside
from megamoe.explain.predict import Acts, Predictor
from megamoe.explain.sources import Source
from megamoe.explain.ways import Scales, Way
from megamoe.judge.judgements import observable_codes
from megamoe.spec.formats import GROUP, U8, U16, bf16_round, unpack_sf
from megamoe.spec.forms import BF16

Array = npt.NDArray[Any]
Plain = dict[str, Any]
_SAMPLE: Final = 4
"""Groups of a slot on which a deviation of linear 1 must do better before all are computed."""
_SMALL: Final = 1 << 22
"""Weights of linear 1 below which all groups are computed at once."""

_LARGE: Final = 1 << 25
"""Weights of linear 1 beyond which it is not computed anew for each deviation that changes codes
or weights, where only ``y`` is there: on V4-Pro that is 6 times 44 million."""


def part(life: Life, source: Source, actual: Mapping[str, Array], at: int) -> Plain:
    """``actual``: the token's rows of ``tensors.STAGES`` as bits, ``y`` ``(H,)`` at least.

    Returns the comparison of each stage with its worst element, the first stage outside, and the
    explanation of each wrong step.
    """
    shown = _Shown.of(life, actual)
    stages, explanations = [], []
    wrong = _staged_outside(life, shown)
    for name, mask in wrong.items():
        got: Any = shown.x if name == "x" else shown.x_sf
        worst = element.of_staging(life, name, got, mask) if mask.any() else None
        stages.append(_said(name, "staging", mask, worst))
    if any(mask.any() for mask in wrong.values()):
        explanations.append(_explain_staging(life, source, shown, wrong))
    given, follows = _given(life, source, shown)
    if shown.acts is not None:
        by_slot = _acts_outside(given, shown.acts)
        stages += _acts_stages(given, shown.acts, by_slot, follows)
        if by_slot.any():
            explanations.append(_explain_codes(given, source, shown.acts, by_slot))
    low, high, of_codes = _y_interval(given, shown)
    beyond = outside(shown.y, low, high)
    last = "linear 2 or combine" if shown.acts is not None else "any step: the output has no codes"
    worst = element.of_y(life, shown.y, low, high, beyond) if beyond.any() else None
    stages.append(_said("y", last, beyond, worst))
    if beyond.any():
        explanations.append(_explain_y(given, source, shown, beyond))
    return {
        "y": BF16.hex(shown.y[at]),
        "allowed": [BF16.hex(low[at]), BF16.hex(high[at])],
        "given_the_codes_shown": of_codes,
        "outside": bool(beyond[at]),
        "stages": stages,
        "parts_at": next((s for s in stages if s["outside"]), None),
        "explanations": explanations,
    }


@dataclass(frozen=True)
class _Shown:
    """One token's stages, decoded; None where a backend does not show one."""

    x: U8 | None
    x_sf: U8 | None
    acts: Acts | None
    y: U16
    """(n,) at the life's channels."""

    @classmethod
    def of(cls, life: Life, actual: Mapping[str, Array]) -> _Shown:
        acts: Acts | None = None
        if "l2_acts" in actual and "l2_acts_sf" in actual:
            codes = observable_codes(actual["l2_acts"], actual["l2_acts_sf"])
            routed = [s.slot for s in life.slots if s.expert != SHARED]
            acts = {k: (codes[k], actual["l2_acts_sf"][k]) for k in routed}
        sf = unpack_sf(actual["x_sf"]) if "x_sf" in actual else None
        return cls(actual.get("x"), sf, acts, actual["y"][life.channels])


def _said(stage: str, where: str, beyond: Bools, worst: Plain | None) -> Plain:
    return {
        "stage": stage,
        "where": where,
        "outside": int(beyond.sum()),
        "of": int(beyond.size),
        "first": int(np.argmax(beyond)) if beyond.any() else None,
        "worst": worst,
    }


# --- the stages outside -------------------------------------------------------------------------


def _staged_outside(life: Life, shown: _Shown) -> dict[str, Bools]:
    out = {}
    if shown.x is not None:
        out["x"] = shown.x != life.x
    if shown.x_sf is not None:
        out["x_sf"] = shown.x_sf != life.x_sf
    return out


def _given(life: Life, source: Source, shown: _Shown) -> tuple[Life, str]:
    """The life from the ``x`` of the output, unless the later stages follow from the right
    ``x``."""
    if shown.x is None and shown.x_sf is None:
        return life, ""
    x = life.x if shown.x is None else shown.x
    sf = life.x_sf if shown.x_sf is None else shown.x_sf
    if np.array_equal(x, life.x) and np.array_equal(sf, life.x_sf):
        return life, ""
    channels = life.channels.tolist()
    other = live(source, life.at, channels, life.accumulator.name, life.contract, (x, sf))
    if _is_inside(life, shown):
        return life, ", given the right x"
    return other, ", given x as it was shown"


def _is_inside(life: Life, shown: _Shown) -> bool:
    if shown.acts is not None:
        return not _acts_outside(life, shown.acts).any()
    return not outside(shown.y, life.y_low, life.y_high).any()


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
        out.append(_said(name, where, mask.ravel(), worst))
    return out


def _y_interval(life: Life, shown: _Shown) -> tuple[U16, U16, bool]:
    """The envelope of ``y``: from the output's own codes, unless it follows from the right
    codes."""
    if shown.acts is None:
        return life.y_low, life.y_high, False
    low, high = {}, {}
    for slot in life.slots:
        if slot.slot not in shown.acts:  # a shared expert's codes are no stage
            low[slot.slot], high[slot.slot] = slot.down.row_low, slot.down.row_high
            continue
        operands = *shown.acts[slot.slot], slot.down.packed, slot.down.sf
        ends = lives.down_ends(*operands, life.accumulator)
        low[slot.slot], high[slot.slot] = (bf16_round(end) for end in ends)
    least, most = life.ends(low, high)
    from_shown = outside(shown.y, least, most).any()
    if from_shown and not outside(shown.y, life.y_low, life.y_high).any():
        return life.y_low, life.y_high, False
    return least, most, True


# --- the explanation ----------------------------------------------------------------------------


def _explain_staging(
    life: Life, source: Source, shown: _Shown, wrong: Mapping[str, Bools]
) -> Plain:
    contract = np.concatenate([*wrong.values()])[None]
    fits, tried = [], 0
    for way in deviations.of_staging(life, source):
        with np.errstate(all="ignore"):
            made = way.staged()
        if made is None:
            continue
        tried += 1
        masks = []
        if shown.x is not None:
            masks.append(shown.x != made[0])
        if shown.x_sf is not None:
            masks.append(shown.x_sf != made[1])
        fits.append(fit(way.name, way.stage, contract, np.concatenate(masks)[None]))
    what = "codes and scale bytes of x" if len(wrong) == 2 else f"values of {next(iter(wrong))}"
    what += f" of token {life.at}"
    return report(fits, int(contract.sum()), contract.size, what, tried)


def _explain_codes(life: Life, source: Source, acts: Acts, contract: Bools) -> Plain:
    run = Predictor(life, source, acts)
    slots = [s.slot for s in run.routed()]
    sample = _sampled(life, contract)
    fits, tried = [], 0
    for way in deviations.of_codes(life, source):
        tried += 1
        if way.reads13 is not None and not run.improves(way, contract, sample):
            continue
        fits.append(fit(way.name, way.stage, contract, run.outside_codes(way), slots))
    return report(
        fits, int(contract.sum()), contract.size, f"codes and scale bytes of token {life.at}", tried
    )


def _sampled(life: Life, contract: Bools) -> npt.NDArray[np.int64] | None:
    """The groups with most and with fewest values outside; None where all are cheap."""
    groups = life.token.intermediate // GROUP
    if len(contract) * life.x.size * life.token.intermediate <= _SMALL or groups <= _SAMPLE:
        return None
    count = contract[:, :groups].sum(axis=0) + contract[:, groups:].reshape(
        len(contract), groups, GROUP
    ).sum(axis=(0, 2))
    order = np.argsort(-count, kind="stable")
    return np.sort(np.concatenate([order[: _SAMPLE - 1], order[-1:]]))


def _explain_y(life: Life, source: Source, shown: _Shown, contract: Bools) -> Plain:
    differing = int(contract.sum())
    points = Points(life, source)
    run = None if shown.acts is None else Predictor(life, source, shown.acts)

    def wrong(way: Way) -> Bools:
        if run is not None:
            return run.outside_y(way, shown.y)
        return points.outside(way, shown.y, differing // 2)

    catalogue = deviations.of_all if shown.acts is None else deviations.of_y
    every = [*catalogue(life, source)]
    ways = every
    if shown.acts is None and len(life.slots) * life.x.size * life.token.intermediate > _LARGE:
        ways = [w for w in every if w.reads13 is None or isinstance(w.reads13, Scales)]
    fits = [fit(w.name, w.stage, contract[None], wrong(w)[None]) for w in ways]
    at = life.channels
    what = f"elements of y of token {life.at} at channels {at[0]} to {at[-1]}"
    said = report(fits, differing, contract.size, what, len(ways))
    return {**said, "not_tried": len(every) - len(ways)}


__all__ = ["part"]
