"""The data that a report draws of a failure: the distances of elements from the envelope, and their
places.

A finding says how many elements are outside and which is the worst. Its *detail* holds the rest in
a small form: a histogram of signed distances and a map of the tensor with at most :data:`ROWS` x
:data:`COLUMNS` cells. It decides nothing: the judge has already decided, and a detail is kept only
if its count is that of the finding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe import oracle
from megamoe.golden import StoredGolden
from megamoe.judge import Finding
from megamoe.judge.elements import near
from megamoe.judge.judgements import STAGING, observable_codes
from megamoe.spec.forms import Bits, Form, bits
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import TENSORS

ROWS: Final = 48
COLUMNS: Final = 64
NAN_LEVEL: Final = 35
"""Level of a cell with a NaN on one side; other levels are bit lengths of ULPs, at most 34."""
LEVELS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
"""A map's characters: ``.`` is nothing outside, 0 the sign of a zero only, 1 one ULP, 2 two and
three, 3 four to seven, ..., z a NaN."""

Detail = dict[str, Any]
Keys = npt.NDArray[np.int64]


def measure(
    stage: str, form: Form, actual: Bits, low: Bits, high: Bits, axes: Sequence[str],
    per_channel: int = 1, live: Any = None, tokens: Sequence[int] | None = None,
) -> Detail:  # fmt: skip
    """The detail of ``actual`` against ``low..high`` (the same array twice: bitwise).

    ``axes``, ``per_channel`` and ``tokens`` are those of :class:`megamoe.judge.Place`, ``live``
    that of the comparer, whose rules these are: any NaN equals any NaN, and where the one value
    allowed is zero, its sign counts.
    """
    nan, nan_low = form.is_nan(actual), form.is_nan(low)
    key, key_low, key_high = form.key(actual), form.key(low), form.key(high)
    zero = (key == 0) & (key_low == 0) & (key_high == 0) & (actual != low) & (actual != high)
    return _detail(
        stage, key, key_low, key_high, nan != nan_low, nan & nan_low,
        zero & ~nan & ~nan_low, (axes, per_channel, tokens), live,
    )  # fmt: skip


def measure_keys(
    stage: str, form: Form, actual: Bits, low: Any, high: Any, axes: Sequence[str],
    live: Any = None, tokens: Sequence[int] | None = None,
) -> Detail:  # fmt: skip
    """:func:`measure` with ends as keys, which do not show NaN and the sign of a zero."""
    none = np.zeros(actual.shape, np.bool_)
    place = (axes, 1, tokens)
    return _detail(stage, form.key(actual), low, high, none, none, none, place, live)


def forward(
    actual: Mapping[str, Bits], golden: StoredGolden, accumulator: str, problem: Problem,
    tokens: Sequence[int] | None, findings: Sequence[Finding],
) -> list[Detail]:  # fmt: skip
    """Details of the bad ``findings`` of a forward; the arguments are those it was judged with."""
    out = []
    for stage in dict.fromkeys(f.stage for f in findings if f.outside):
        detail = _forward_stage(stage, actual, golden, accumulator, problem, tokens)
        if detail is not None:
            out.append(detail)
    return agreeing(out, findings)


def agreeing(details: Sequence[Detail], findings: Sequence[Finding]) -> list[Detail]:
    """The details whose count of elements outside equals that of a finding of their stage."""
    pairs = {(f.stage, f.outside) for f in findings}
    return [d for d in details if (d["stage"], d["outside"]) in pairs]


# --- parts ------------------------------------------------------------------------------------


def _forward_stage(
    stage: str, actual: Mapping[str, Bits], golden: StoredGolden, accumulator: str,
    problem: Problem, tokens: Sequence[int] | None,
) -> Detail | None:  # fmt: skip
    """The detail of one stage, against the same allowed values as in
    :mod:`megamoe.judge.judgements`."""
    if stage not in actual:
        return None
    tensor = TENSORS[stage]
    live = None if tensor.reads_masked else problem.topk_ids.numpy()[:, :, None] >= 0
    output: Any = (
        actual[stage] if live is None else np.where(live, actual[stage], 0).astype(np.uint8)
    )
    if stage in STAGING:
        expected = oracle.staging(
            bits(problem.hidden_states), problem.topk_weights.numpy(), problem.topk_ids.numpy(),
            golden.contract,
        )  # fmt: skip
        output, low = tensor.elements(output), tensor.elements(expected[stage])
        high = low
    elif golden.zero_freedom:
        if stage == "l2_acts":
            output = observable_codes(output, actual.get("l2_acts_sf"))
        low = high = golden.get(stage)
    elif "l2_acts" in actual and "l2_acts_sf" in actual:
        return _staged_detail(stage, actual, golden, accumulator, problem, tokens)
    elif stage == "y":
        low, high = golden.get(f"{accumulator}.y_lo"), golden.get(f"{accumulator}.y_hi")
    else:
        return None
    return _measure(stage, output, low, high, live, tokens)


def _staged_detail(
    stage: str, actual: Mapping[str, Bits], golden: StoredGolden, accumulator: str,
    problem: Problem, tokens: Sequence[int] | None,
) -> Detail:  # fmt: skip
    names = [n for n in golden.names() if "." not in n or n.rpartition(".")[0] == accumulator]
    oracle_golden = oracle.ForwardGolden.from_tensors(
        {name: golden.get(name) for name in names}, golden.contract
    )
    envelope = oracle_golden.envelopes[accumulator]
    live = problem.topk_ids.numpy()[:, :, None] >= 0
    sf = np.where(live, actual["l2_acts_sf"], 0).astype(np.uint8)
    codes = np.where(live, actual["l2_acts"], 0).astype(np.uint8)
    if stage == "l2_acts_sf":
        return _measure(stage, sf, envelope.sf_lo, envelope.sf_hi, live, tokens)
    if stage == "l2_acts":
        low, high = envelope.code_interval(sf)
        of = TENSORS[stage]
        return measure_keys(stage, of.form_of(codes), codes, low, high, of.places, live, tokens)
    y_low, y_high = oracle.combine_interval(problem, codes, sf, accumulator, golden.contract)
    return _measure(stage, actual["y"], y_low, y_high, None, tokens)


def _measure(
    stage: str, actual: Bits, low: Bits, high: Bits, live: Any, tokens: Sequence[int] | None
) -> Detail:
    """A stage by the form and the axes that it has."""
    of = TENSORS[stage]
    form = of.form_of(actual)
    return measure(stage, form, actual, low, high, of.places, of.channels, live, tokens)


def _detail(
    stage: str, key: Keys, low: Keys, high: Keys, nan: Any, both_nan: Any, zero: Any,
    place: tuple[Sequence[str], int, Sequence[int] | None], live: Any,
) -> Detail:  # fmt: skip
    key, low, high = near(key), near(low), near(high)
    mask = np.ones(key.shape, np.bool_) if live is None else np.broadcast_to(live, key.shape)
    number = mask & ~nan & ~both_nan
    below = np.where(number, np.maximum(low - key, 0), 0)
    above = np.where(number, np.maximum(key - high, 0), 0)
    zero, nan = zero & mask, nan & mask
    outside = (below > 0) | (above > 0) | zero | nan
    # An id may be 2**62 off; a map has no use for more than 34 bits.
    level = np.where(outside, np.minimum(_length(below + above), NAN_LEVEL - 1), -1)
    level = np.where(nan, NAN_LEVEL, level)
    widths = (high - low)[number]
    return {
        "stage": stage,
        "outside": int(outside.sum()),
        "inside": int((mask & ~outside).sum()),
        "below": _counts(below[below > 0]),
        "above": _counts(above[above > 0]),
        "zero": int(zero.sum()),
        "nan": int(nan.sum()),
        # How wide the envelope itself is; 0 where one value is right.
        "widths": _counts(widths),
        "map": _map(level, *place),
    }


def _length(ulps: Keys) -> Keys:
    """Bits of each number: 0, 1, 2 for 2 and 3, 3 for 4 to 7, ..."""
    return np.frexp(ulps.astype(np.float64))[1].astype(np.int64)


def _counts(ulps: Keys) -> dict[str, int]:
    lengths, counts = np.unique(_length(ulps), return_counts=True)
    return {str(int(f)): int(c) for f, c in zip(lengths, counts, strict=True)}


def _map(
    level: Keys, axes: Sequence[str], per_channel: int, tokens: Sequence[int] | None
) -> dict[str, Any]:
    """The worst level of each cell: axis 0 down, channels across, other axes folded."""
    if "channel" in axes:
        flat = np.moveaxis(level, axes.index("channel"), -1)
        flat = flat.reshape(flat.shape[0], -1, flat.shape[-1]).max(axis=1)
    else:
        flat = level.reshape(level.shape[0], -1).max(axis=1, keepdims=True)
    rows, columns = flat.shape
    down, across = -(-rows // ROWS), 1
    while -(-columns // across) > COLUMNS:
        across *= 2
    cells = np.maximum.reduceat(flat, np.arange(0, rows, down), axis=0)
    cells = np.maximum.reduceat(cells, np.arange(0, columns, across), axis=1)
    out = {
        "axis": axes[0],
        "rows": rows,
        "channels": columns * per_channel if "channel" in axes else 1,
        "row_step": down,
        "channel_step": across * per_channel,
        "cells": ["".join("." if c < 0 else LEVELS[c] for c in line) for line in cells.tolist()],
    }
    if tokens is not None and axes[0] == "token":  # the case judges some of its rows
        out["labels"] = [int(t) for t in tokens[::down]]
    return out
