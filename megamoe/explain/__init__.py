"""``megamoe explain``: the whole life of one output element, and where an actual one leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamoe.explain.causes import TokenOutput, contradictions, contradictions_by_y
from megamoe.explain.describe import describe
from megamoe.explain.life import live
from megamoe.explain.match import Names
from megamoe.explain.only_y import explain_only_y
from megamoe.explain.part import part
from megamoe.explain.points import Bools
from megamoe.explain.sources import FromCase, FromProblem, Source
from megamoe.judge.elements import TILE
from megamoe.spec.contract import Contract
from megamoe.spec.formats import FP8_COMBINE_GROUP


def explain(
    source: Source,
    token: int,
    channel: int,
    accumulator: str,
    actual: Mapping[str, Any] | None = None,
    top: int = 3,
    *,
    contract: Contract,
    stage: str | None = None,
) -> dict[str, Any]:
    """The life of ``y[token, channel]`` as plain data.

    ``actual``: rows of ``tensors.STAGES`` of this token as bits. With them the other channels of
    the tile are computed too: one element alone would not tell deviations apart. The life then
    follows the worst code of ``stage``, by default of the first wrong stage. ``ValueError`` for a
    token, channel or class that is not there.

    Where ``y`` alone is judged, :func:`megamoe.explain.only_y.explain_only_y` answers: without the
    stages before ``y``.
    """
    if isinstance(source, FromProblem) and source.problem.only_y:
        return explain_only_y(source.problem, token, channel, accumulator, actual, contract)
    channels = _channels(source, channel, actual is not None)
    life = live(source, token, channels, accumulator, contract)
    at = channels.index(channel)
    departs = None if actual is None else part(life, source, actual, at)
    worst = None if departs is None else _worst(departs, stage)
    description = describe(life, at, top, worst if worst and worst["slot"] is not None else None)
    description["actual"] = None if departs is None else {**departs, "worst": worst}
    return description


def departure(
    source: Source, token: int, channel: int, accumulator: str, actual: Mapping[str, Any],
    contract: Contract, only: Names,
) -> dict[str, Any]:  # fmt: skip
    """``actual`` of :func:`explain` alone, by the deviations ``only``: they were chosen on another
    token, so few values are enough."""
    if isinstance(source, FromProblem) and source.problem.only_y:
        description = explain_only_y(
            source.problem, token, channel, accumulator, actual, contract, only
        )
        outcome: dict[str, Any] = description["actual"]
        return outcome
    channels = _channels(source, channel, True)
    life = live(source, token, channels, accumulator, contract)
    return part(life, source, actual, channels.index(channel), only)


def refutations(
    source: Source, token: int, accumulator: str, actual: Mapping[str, Any], contract: Contract,
    only: Names, with_y: bool = False,
) -> Names:  # fmt: skip
    """Those of the deviations ``only`` that would change right codes or scale bytes of ``token``,
    whose stages ``actual`` are all right; ``with_y``: or one of its first 128 values of ``y``."""
    if isinstance(source, FromProblem) and source.problem.only_y:
        return frozenset()
    life = live(source, token, _channels(source, 0, with_y), accumulator, contract)
    output = TokenOutput.of(life, actual)
    against = contradictions(life, source, output, only)
    return (
        against | frozenset(contradictions_by_y(life, source, output, only - against))
        if with_y else against
    )  # fmt: skip


def refutations_of_y(
    source: Source, token: int, channel: int, accumulator: str, actual: Mapping[str, Any],
    contract: Contract, only: Names,
) -> dict[tuple[str, str], Bools]:  # fmt: skip
    """Those of the deviations ``only`` that would change ``y`` of ``token`` in the tile of
    ``channel``, where all of it is right, with the elements that they would change. ``actual``:
    rows of ``tensors.STAGES`` of the token."""
    life = live(source, token, _channels(source, channel, True), accumulator, contract)
    return contradictions_by_y(life, source, TokenOutput.of(life, actual), only)


def _channels(source: Source, channel: int, is_compared: bool) -> list[int]:
    """The channels of ``y`` that are computed with ``channel``."""
    channels = [channel]
    if is_compared:
        first = channel // TILE * TILE
        channels = [*range(first, min(first + TILE, source.hidden_size))]
    if source.token(0).dtype == "fp8":  # an element's scale is that of its group
        first = channel // FP8_COMBINE_GROUP * FP8_COMBINE_GROUP
        channels = [*range(first, min(first + FP8_COMBINE_GROUP, source.hidden_size))]
    return channels if channel in channels else [channel]  # beyond H: `live` says it in one line


def _worst(departs: Mapping[str, Any], stage: str | None) -> Any:
    """The worst element of ``stage`` or of the first wrong stage; None where it is inside."""
    first = departs["parts_at"] or {"stage": stage, "worst": None}
    by_stage = {one["stage"]: one["worst"] for one in departs["stages"]}
    return by_stage.get(stage or first["stage"])


__all__ = ["FromCase", "FromProblem", "Source", "departure", "explain", "refutations",
           "refutations_of_y"]  # fmt: skip
