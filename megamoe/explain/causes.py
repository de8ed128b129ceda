"""The deviations that explain what one token shows, for each step that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.explain import deviations, some_slots, zeros
from megamoe.explain.deviations.shown import (
    LEAST,
    OTHER_SLOTS,
    other_slots,
    zeros_of_codes,
    zeros_of_staging,
)
from megamoe.explain.formulas import add_formulas
from megamoe.explain.life import SHARED, Life
from megamoe.explain.match import Evidence, Names, fit, general, is_among, report
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
class Shown:
    """One token's stages, decoded; None where a backend does not show one."""

    x: U8 | None
    x_sf: U8 | None
    acts: Acts | None
    y: U16
    """(n,) at the life's channels."""

    @classmethod
    def of(cls, life: Life, actual: Mapping[str, Array]) -> Shown:
        acts: Acts | None = None
        if "l2_acts" in actual and "l2_acts_sf" in actual:
            codes = observable_codes(actual["l2_acts"], actual["l2_acts_sf"])
            routed = [s.slot for s in life.slots if s.expert != SHARED]
            acts = {k: (codes[k], actual["l2_acts_sf"][k]) for k in routed}
        sf = unpack_sf(actual["x_sf"]) if "x_sf" in actual else None
        return cls(actual.get("x"), sf, acts, actual["y"][life.channels])


def explain_staging(
    life: Life, source: Source, shown: Shown, wrong: Mapping[str, Bools],
    only: Names | None = None,
) -> Plain:  # fmt: skip
    """Of ``x`` and ``x_sf``; ``wrong``: the elements outside of each that is shown."""
    contract = np.concatenate([*wrong.values()])[None]
    fits, tried = [], 0
    proposed = () if shown.x is None else zeros_of_staging(life, shown.x)
    for way in (*deviations.of_staging(life, source), *proposed):
        if not is_among(only, way.stage, way.name):
            continue
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
    if len(wrong) == 2:
        evidence = Evidence.of_groups("staging", np.concatenate([wrong["x_sf"], wrong["x"]])[None])
    else:
        evidence = Evidence.of_elements("staging", contract[0])
    return report(fits, evidence, contract.size, what, tried, only)


@dataclass(frozen=True)
class OfCodes:
    """The explanation of wrong codes, and the ways that were tried, by stage and name."""

    said: Plain
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
        # y is computed with the deviation in all slots.
        return not one["where"] and not codes.run.outside_y(way, y).any()

    exact = codes.said["exact"]
    both = [one for one in exact if gives_y(one)]
    if both:
        exact = codes.said["exact"] = both
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
    sample = _sampled(life, contract)
    fits, ways, tried = [], {}, 0
    for way in (*deviations.of_codes(life, source), *zeros_of_codes(life, acts)):
        if not is_among(only, way.stage, way.name):
            continue
        tried += 1
        if way.reads13 is not None and not run.improves(way, contract, sample):
            continue
        fits.append(fit(way.name, way.stage, contract, run.outside_codes(way), slots))
        ways[way.stage, way.name] = way
    may_be = None
    if only is None or OTHER_SLOTS in only:
        tried += 1
        # Chosen on another token, it needs no more evidence here.
        found = other_slots(run, contract, LEAST if only is None else 1)
        if found is not None:
            way = found.way
            one = fit(way.name, way.stage, contract, run.outside_codes(way), slots)
            may_be = {**one.plain(), "chance": found.chance, "is_unique": found.is_unique}
            if only is not None or (found.is_certain and not any(f.is_exact for f in fits)):
                fits.append(one)
                ways[way.stage, way.name] = way
    what = f"codes and scale bytes of token {life.at}"
    evidence = Evidence.of_groups("codes", contract)
    said = report(fits, evidence, contract.size, what, tried, only)
    if only is None:
        zeros.of_codes(said, fits, ways, run, contract)
    add_formulas(said, life)
    return OfCodes({**said, "may_be": may_be}, ways, run)


def contradicted(life: Life, source: Source, shown: Shown, only: Names) -> Names:
    """Those of the deviations ``only``, of staging and of codes, that would change what a token
    that is right shows. Right values do not refute that others are zero: no rule makes zeros."""
    found: set[tuple[str, str]] = set()
    with np.errstate(all="ignore"):
        for staged in deviations.of_staging(life, source):
            if not is_among(only, staged.stage, staged.name):
                continue
            made = staged.staged()
            pairs = zip((shown.x, shown.x_sf), made or (), strict=False)
            if any(got is not None and (got != want).any() for got, want in pairs):
                found.add((staged.stage, general(staged.name)))
        if shown.acts:
            run = Predictor(life, source, shown.acts)
            for way in deviations.of_codes(life, source):
                if way.name in zeros.OF_CODES or not is_among(only, way.stage, way.name):
                    continue
                if run.outside_codes(way).any():
                    found.add((way.stage, general(way.name)))
    return frozenset(found)


def contradicted_by_y(life: Life, source: Source, shown: Shown, only: Names) -> Names:
    """Those of the deviations ``only`` that would change the right ``y`` of a token."""
    wrong, catalogue, _ = _of_y(life, source, shown, len(shown.y))
    ways = [way for way in catalogue if is_among(only, way.stage, way.name)]
    with np.errstate(all="ignore"):
        return frozenset((way.stage, general(way.name)) for way in ways if wrong(way).any())


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


def explain_y(
    life: Life, source: Source, shown: Shown, contract: Bools, only: Names | None = None,
    slots: Sequence[int] = (),
) -> Plain:  # fmt: skip
    """Of ``y``; ``contract`` ``(n,)``: elements outside; ``slots``: those with wrong codes, which
    linear 2 may have wrong too."""
    wrong, catalogue, run = _of_y(life, source, shown, int(contract.sum()) // 2)
    every = [w for w in catalogue if is_among(only, w.stage, w.name)]
    ways = every
    if shown.acts is None and len(life.slots) * life.x.size * life.token.intermediate > _LARGE:
        ways = [w for w in every if w.reads13 is None or isinstance(w.reads13, Scales)]
    fits = [fit(w.name, w.stage, contract[None], wrong(w)[None]) for w in ways]
    if isinstance(run, Predictor) and not any(one.is_exact for one in fits):
        fits += some_slots.fits(run, ways, shown.y, contract, slots)
    at = life.channels
    what = f"elements of y of token {life.at} at channels {at[0]} to {at[-1]}"
    evidence = Evidence.of_elements("y", contract)
    said = report(fits, evidence, contract.size, what, len(ways), only)
    if only is None:
        zeros.of_y(said, fits, {(w.stage, w.name): w for w in ways}, run)
    add_formulas(said, life)
    return {**said, "not_tried": len(every) - len(ways)}


def _of_y(
    life: Life, source: Source, shown: Shown, enough: int
) -> tuple[Callable[[Way], Bools], Iterator[Way], Predictor | Points]:
    """The elements of ``y`` that a way does not give; the catalogue; and what predicts them: from
    the codes shown, else from ``x``, where ``enough`` is as in :meth:`Points.outside`."""
    if shown.acts is None:
        points = Points(life, source)
        return (
            lambda way: points.outside(way, shown.y, enough), deviations.of_all(life, source),
            points,
        )  # fmt: skip
    run = Predictor(life, source, shown.acts)
    return lambda way: run.outside_y(way, shown.y), deviations.of_y(life, source), run
