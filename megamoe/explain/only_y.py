"""``megamoe explain`` where ``y`` alone is judged: the variants that fit the row of a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe import oracle
from megamoe.explain.channels import pattern
from megamoe.explain.describe import bf16
from megamoe.explain.match import Evidence, Fit, Names, fit, is_among, report
from megamoe.explain.overflow import of_y
from megamoe.explain.variants import Variant, variants
from megamoe.judge.elements import beyond, place_of, worst_of
from megamoe.spec.contract import Contract
from megamoe.spec.formats import U16
from megamoe.spec.forms import BF16
from megamoe.spec.problem import Problem

Plain = dict[str, Any]
Bools = npt.NDArray[np.bool_]
_ZERO: Final = "y is zero"


def explain_only_y(
    problem: Problem, token: int, channel: int, accumulator: str,
    actual: Mapping[str, Any] | None, contract: Contract, only: Names | None = None,
) -> Plain:  # fmt: skip
    """As :func:`megamoe.explain.explain`, without the stages before ``y``. ``only``: the variants
    to try, by default all."""
    if not 0 <= token < problem.num_tokens or not 0 <= channel < problem.hidden_size:
        raise ValueError(
            f"no element at token {token} channel {channel}: there are {problem.num_tokens} tokens "
            f"and {problem.hidden_size} channels"
        )
    candidates = variants(problem, token, contract)
    right = next(candidates)
    y = oracle.forward(right.problem, [accumulator], contract=contract).y[0]
    low, high = _interval(right, accumulator)
    description: Plain = {
        "token": token, "channel": channel, "accumulator": accumulator,
        "contract": contract.revision, "y": bf16(y[channel], low[channel], high[channel]),
        "actual": None,
    }  # fmt: skip
    if actual is None:
        return description
    row = actual["y"]
    wrong = beyond(BF16, row, low, high)
    # Where zeros are right in every channel, the values are what was there before: no pattern.
    channels = pattern(wrong) if ((low | high) & 0x7FFF).any() else ""
    stage = {
        "stage": "y", "where": "the one stage that is judged with these weights",
        "outside": int(wrong.sum()), "of": int(wrong.size), "channels": channels,
        "first": int(np.argmax(wrong)) if wrong.any() else None, "worst": None,
    }  # fmt: skip
    worst = _worst(row, low, high, wrong, token) if wrong.any() else None
    ways = []
    if wrong.any():
        selection = (v for v in candidates if is_among(only, "y", v.what))
        ways = [_way(v, accumulator, row, wrong) for v in selection]
    zero = not (row[wrong | (y != 0)] & 0x7FFF).any()
    if wrong.any() and is_among(only, "y", _ZERO) and zero:
        ways.insert(0, _fit(_ZERO, wrong, np.zeros_like(wrong)))
    steps = [_step(ways, wrong, row, low, high)] if wrong.any() else []
    return {**description, "actual": {
        "y": BF16.hex(row[channel]), "allowed": [BF16.hex(low[channel]), BF16.hex(high[channel])],
        "outside": bool(wrong[channel]), "stages": [{**stage, "worst": worst}],
        "parts_at": {**stage, "worst": worst} if wrong.any() else None, "worst": worst,
        "explanations": steps, "wrong_slots": [],
    }}  # fmt: skip


def _interval(variant: Variant, accumulator: str) -> tuple[U16, U16]:
    with np.errstate(divide="ignore"):  # a variant may lack the floor that keeps a scale from 0
        golden = oracle.forward(variant.problem, [accumulator], contract=variant.contract)
    envelope = golden.envelopes[accumulator]
    return envelope.y_lo[0], envelope.y_hi[0]


def _worst(row: U16, low: U16, high: U16, wrong: Bools, token: int) -> Plain:
    worst = worst_of(
        "y", BF16, row[None], low[None], high[None], wrong[None], place_of("y", [token])
    )
    return {**asdict(worst), "line": worst.line()}


def _way(variant: Variant, accumulator: str, row: U16, wrong: Bools) -> Fit:
    """How far the variant explains the row."""
    try:
        still = beyond(BF16, row, *_interval(variant, accumulator))
    except ValueError:  # the oracle has no such layer
        still = np.ones_like(wrong)
    return _fit(variant.what, wrong, still)


def _fit(what: str, wrong: Bools, still: Bools) -> Fit:
    return fit(what, "y", wrong[None], still[None])


def _step(ways: list[Fit], wrong: Bools, row: U16, low: U16, high: U16) -> Plain:
    """In the form of the other steps: :func:`megamoe.explain.words.explanation` prints it."""
    step = report(ways, Evidence.of_elements("y", wrong), int(wrong.size), "values of y", len(ways))
    return {**step, "overflow": of_y(row, low, high, wrong)}


__all__ = ["explain_only_y"]
