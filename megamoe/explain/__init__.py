"""``megamoe explain``: the whole life of one output element, and where an actual one leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megamoe.explain.describe import describe
from megamoe.explain.life import live
from megamoe.explain.only_y import explain_only_y
from megamoe.explain.part import part
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
    channels = [channel]
    if actual is not None:
        first = channel // TILE * TILE
        channels = [*range(first, min(first + TILE, source.hidden_size))]
    if source.token(0).dtype == "fp8":  # an element's scale is that of its group
        first = channel // FP8_COMBINE_GROUP * FP8_COMBINE_GROUP
        channels = [*range(first, min(first + FP8_COMBINE_GROUP, source.hidden_size))]
    if channel not in channels:
        channels = [channel]  # beyond H: reported in one line below
    life = live(source, token, channels, accumulator, contract)
    at = channels.index(channel)
    departs = None if actual is None else part(life, source, actual, at)
    worst = None if departs is None else _worst(departs, stage)
    said = describe(life, at, top, worst if worst and worst["slot"] is not None else None)
    said["actual"] = None if departs is None else {**departs, "worst": worst}
    return said


def _worst(departs: Mapping[str, Any], stage: str | None) -> Any:
    """The worst element of ``stage`` or of the first wrong stage; None where it is inside."""
    first = departs["parts_at"] or {"stage": stage, "worst": None}
    found = {one["stage"]: one["worst"] for one in departs["stages"]}
    return found.get(stage or first["stage"])


__all__ = ["FromCase", "FromProblem", "Source", "explain"]
