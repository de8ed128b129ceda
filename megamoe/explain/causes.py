"""The deviations that explain what one token shows, for each step that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.explain import deviations, some_channels, some_slots, zeros
from megamoe.explain.deviations.shown import (
    LEAST,
    OTHER_SLOTS,
    other_slots,
    zeros_of_codes,
    zeros_of_staging,
)
from megamoe.explain.formulas import add_formulas
from megamoe.explain.life import SHARED, Life
from megamoe.explain.match import Evidence, Fit, Names, fit, general, is_among, report
from megamoe.explain.points import Bools, Points
from megamoe.explain.predict import Acts, Predictor
from megamoe.explain.sources import Source
from megamoe.explain.ways import AFTER_CODES, Scales, Way
from megamoe.judge.judgements import observable_codes
from megamoe.spec.formats import GROUP, U8, U16, unpack_sf

Array = npt.NDArray[Any]
Plain = dict[str, Any]
_SAMPLE: Final = 4
"""Groups of a slot on which a deviation of linear 1 must do better before all are computed."""
_SMALL: Final = 1 << 22
"""Weights of linear 1 below which all groups are computed at once."""

_LARGE: Final = 1 << 25
"""Weights of linear 1 beyond which it is not computed anew for each deviation that changes codes
or weights, where only ``y`` is there: on V4-Pro that is 6 times 44 million."""


@dataclass(frozen=True)
class TokenOutput:
    """One token's stages, decoded; None where a backend does not show one."""

    x: U8 | None
    x_sf: U8 | None
    acts: Acts | None
    y: U16
    """(n,) at the life's channels."""

    @classmethod
    def of(cls, life: Life, actual: Mapping[str, Array]) -> TokenOutput:
        acts: Acts | None = None
        if "l2_acts" in actual and "l2_acts_sf" in actual:
            codes = observable_codes(actual["l2_acts"], actual["l2_acts_sf"])
            routed = [s.slot for s in life.slots if s.expert != SHARED]
            acts = {k: (codes[k], actual["l2_acts_sf"][k]) for k in routed}
        sf = unpack_sf(actual["x_sf"]) if "x_sf" in actual else None
        return cls(actual.get("x"), sf, acts, actual["y"][life.channels])


def explain_staging(
    life: Life, source: Source, output: TokenOutput, wrong: Mapping[str, Bools],
    only: Names | None = None,
) -> Plain:  # fmt: skip
    """Of ``x`` and ``x_sf``; ``wrong``: the elements outside of each that is shown."""
    contract = np.concatenate([*wrong.values()])[None]
    fits, attempts = [], 0
    proposals = () if output.x is None else zeros_of_staging(life, output.x)
    for way in (*deviations.of_staging(life, source), *proposals):
        if not is_among(only, way.stage, way.name):
            continue
        with np.errstate(all="ignore"):
            pair = way.row()
        if pair is None:
            continue
        attempts += 1
        masks = []
        if output.x is not None:
            masks.append(output.x != pair[0])
        if output.x_sf is not None:
            masks.append(output.x_sf != pair[1])
        fits.append(fit(way.name, way.stage, contract, np.concatenate(masks)[None]))
    what = "codes and scale bytes of x" if len(wrong) == 2 else f"values of {next(iter(wrong))}"
    what += f" of token {life.at}"
    if len(wrong) == 2:
        evidence = Evidence.of_groups("staging", np.concatenate([wrong["x_sf"], wrong["x"]])[None])
    else:
        evidence = Evidence.of_elements("staging", contract[0])
    return report(fits, evidence, contract.size, what, attempts, only)


@dataclass(frozen=True)
class OfCodes:
    """The explanation of wrong codes, and the ways that were tried, by stage and name."""

    explanation: Plain
    ways: Mapping[tuple[str, str], Way]
    run: Predictor


def decide(codes: OfCodes, of_y: Plain | None, y: U16) -> None:
    """Of the ways that give the codes, keep those that give ``y`` too, where there are any; these
    are then the explanation of a wrong ``y``.

    A way without a step after the codes gives ``y`` where ``y`` follows from the codes. Ways that
    are left and have the same codes get the same number as ``alike``.
    """

    def gives_y(one: Plain) -> bool:
        way = codes.ways[one["stage"], one["what"]]
        if not way.steps & AFTER_CODES:
            return of_y is None
        # y is computed with the deviation in all slots and channels.
        return not (one["where"] or one["channels"]) and not codes.run.outside_y(way, y).any()

    exact = codes.explanation["exact"]
    both = [one for one in exact if gives_y(one)]
    if both:
        exact = codes.explanation["exact"] = both
        if of_y is not None:
            of_y.update(exact=both, partial=[], follows=True)
    numbers: dict[Any, int] = {}
    for one in exact:
        steps = codes.ways[one["stage"], one["what"]].code_steps
        one["alike"] = numbers.setdefault((steps, one["where"]), len(numbers))


def explain_codes(
    life: Life, source: Source, acts: Acts, contract: Bools, only: Names | None = None
) -> OfCodes:
    """Of the codes of linear 2; ``contract`` ``(S, I/32 + I)``: scale bytes, codes outside."""
    run = Predictor(life, source, acts)
    slots = [s.slot for s in run.routed()]
    sample = _sample(life, contract)
    fits, ways, masks, attempts = [], {}, {}, 0
    for way in (*deviations.of_codes(life, source), *zeros_of_codes(life, acts)):
        if not is_among(only, way.stage, way.name):
            continue
        attempts += 1
        if way.reads13 is not None and not run.improves(way, contract, sample):
            continue
        key = way.stage, way.name
        ways[key], masks[key] = way, run.outside_codes(way)
        fits.append(fit(way.name, way.stage, contract, masks[key], slots))
    may_be = None
    if only is None or OTHER_SLOTS in only:
        attempts += 1
        # Chosen on another token, it needs no more evidence here.
        others = other_slots(run, contract, LEAST if only is None else 1)
        if others is not None:
            way = others.way
            key = way.stage, way.name
            mask = run.outside_codes(way)
            one = fit(way.name, way.stage, contract, mask, slots)
            may_be = {**one.plain(), "chance": others.chance, "is_unique": others.is_unique}
            if only is not None or (others.is_certain and not any(f.is_exact for f in fits)):
                fits.append(one)
                ways[key], masks[key] = way, mask
    fits = some_channels.of_codes(run, fits, ways, masks, contract, only is not None)
    what = f"codes and scale bytes of token {life.at}"
    evidence = Evidence.of_groups("codes", contract)
    explanation = report(fits, evidence, contract.size, what, attempts, only)
    if only is None:
        zeros.of_codes(explanation, fits, ways, run, contract)
    add_formulas(explanation, life)
    return OfCodes({**explanation, "may_be": may_be}, ways, run)


def contradictions(life: Life, source: Source, output: TokenOutput, only: Names) -> Names:
    """Those of the deviations ``only``, of staging and of codes, that would change what a token
    that is right shows. Right values do not refute that others are zero: no rule makes zeros."""
    names: set[tuple[str, str]] = set()
    with np.errstate(all="ignore"):
        for deviation in deviations.of_staging(life, source):
            if not is_among(only, deviation.stage, deviation.name):
                continue
            pair = deviation.row()
            pairs = zip((output.x, output.x_sf), pair or (), strict=False)
            if any(actual is not None and (actual != expected).any() for actual, expected in pairs):
                names.add((deviation.stage, general(deviation.name)))
        if output.acts:
            run = Predictor(life, source, output.acts)
            for way in deviations.of_codes(life, source):
                if way.name in zeros.OF_CODES or not is_among(only, way.stage, way.name):
                    continue
                if run.outside_codes(way).any():
                    names.add((way.stage, general(way.name)))
    return frozenset(names)


def contradictions_by_y(
    life: Life, source: Source, output: TokenOutput, only: Names
) -> dict[tuple[str, str], Bools]:
    """Those of the deviations ``only`` that would change the right ``y`` of a token, with the
    elements ``(n,)`` that they would change."""
    wrong, catalogue, _ = _of_y(life, source, output, len(output.y))
    changes: dict[tuple[str, str], Bools] = {}
    with np.errstate(all="ignore"):
        for way in catalogue:
            if is_among(only, way.stage, way.name) and (mask := wrong(way)).any():
                name = way.stage, general(way.name)
                changes[name] = changes.get(name, np.zeros_like(mask)) | mask
    return changes


def _sample(life: Life, contract: Bools) -> npt.NDArray[np.int64] | None:
    """The groups with most and with fewest values outside; None where all are cheap."""
    groups = life.token.intermediate // GROUP
    if len(contract) * life.x.size * life.token.intermediate <= _SMALL or groups <= _SAMPLE:
        return None
    count = contract[:, :groups].sum(axis=0) + contract[:, groups:].reshape(
        len(contract), groups, GROUP
    ).sum(axis=(0, 2))
    order = np.argsort(-count, kind="stable")
    return np.sort(np.concatenate([order[: _SAMPLE - 1], order[-1:]]))


def explain_y(
    life: Life, source: Source, output: TokenOutput, contract: Bools, only: Names | None = None,
    slots: Sequence[int] = (),
) -> Plain:  # fmt: skip
    """Of ``y``; ``contract`` ``(n,)``: elements outside; ``slots``: those with wrong codes, which
    linear 2 may have wrong too."""
    wrong, catalogue, run = _of_y(life, source, output, int(contract.sum()) // 2)
    every = [w for w in catalogue if is_among(only, w.stage, w.name)]
    ways = every
    if output.acts is None and len(life.slots) * life.x.size * life.token.intermediate > _LARGE:
        ways = [w for w in every if w.reads13 is None or isinstance(w.reads13, Scales)]
    masks = [wrong(w) for w in ways]
    fits = [fit(w.name, w.stage, contract[None], mask[None])
            for w, mask in zip(ways, masks, strict=True)]  # fmt: skip
    more = []
    if isinstance(run, Predictor) and not any(one.is_exact for one in fits):
        more = some_slots.fits(run, ways, output.y, contract, slots)
    if not more:
        fits = _in_channels(life, source, run, ways, masks, fits, contract, only is not None)
    fits += more
    at = life.channels
    what = f"elements of y of token {life.at} at channels {at[0]} to {at[-1]}"
    evidence = Evidence.of_elements("y", contract)
    explanation = report(fits, evidence, contract.size, what, len(ways), only)
    if only is None:
        zeros.of_y(explanation, fits, {(w.stage, w.name): w for w in ways}, run)
    add_formulas(explanation, life)
    return {**explanation, "not_tried": len(every) - len(ways)}


def _in_channels(
    life: Life, source: Source, run: Predictor | Points, ways: Sequence[Way],
    masks: Sequence[Bools], fits: Sequence[Fit], contract: Bools, is_other: bool,
) -> list[Fit]:  # fmt: skip
    """``fits`` with the channels of each, of those ``ways`` that do not change the codes: a channel
    of these shows in all of ``y``."""
    steps = AFTER_CODES | {"total"} if isinstance(run, Predictor) else AFTER_CODES
    at = [k for k, way in enumerate(ways) if way.steps <= steps or not fits[k].misses]
    some = some_channels.of_y([fits[k] for k in at], [masks[k] for k in at], contract, is_other)
    out, first = list(fits), int(life.channels[0])
    for k, one in zip(at, some, strict=True):
        extent = one.extent and one.extent.within(source.hidden_size, first)
        out[k] = replace(one, extent=extent)
    return out


def _of_y(
    life: Life, source: Source, output: TokenOutput, enough: int
) -> tuple[Callable[[Way], Bools], Iterator[Way], Predictor | Points]:
    """The elements of ``y`` that a way does not give; the catalogue; and what predicts them: from
    the codes shown, else from ``x``, where ``enough`` is as in :meth:`Points.outside`."""
    if output.acts is None:
        points = Points(life, source)
        return (
            lambda way: points.outside(way, output.y, enough), deviations.of_all(life, source),
            points,
        )  # fmt: skip
    run = Predictor(life, source, output.acts)
    return lambda way: run.outside_y(way, output.y), deviations.of_y(life, source), run
