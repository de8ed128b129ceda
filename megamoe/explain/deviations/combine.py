"""Deviations from the sums of linear 2 to ``y``: the slot's row and the combine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np

from megamoe.explain.deviations import fp8_rows, orders, weights
from megamoe.explain.deviations.combiner import Combiner, as_it_is, output_of, y_of_sum
from megamoe.explain.deviations.roundings import BF16_ROUNDINGS, truncated
from megamoe.explain.life import Life, Slot, live_slot
from megamoe.explain.places import ZERO_Y
from megamoe.explain.sources import Source
from megamoe.explain.ways import Rows, Way, combine_slots, in_bf16, right
from megamoe.spec.formats import F32, F64, U16, bf16_decode, bf16_round

Combine = Callable[[Rows], U16]
LARGEST: Final = 2.0**128 - 2.0**120
"""The largest bfloat16."""
_MINUS_ZERO: Final = np.array([0x8000], np.uint16)


def catalogue(life: Life, source: Source) -> Iterator[Way]:
    """Deviations of the slot rows and of the combine."""
    own = right(life)
    rows: dict[str, Callable[[F64, np.float32], F32]] = {
        "slot rows are not rounded to bfloat16": lambda s, w: s.astype(np.float32),
        "slot rows are truncated to bfloat16": lambda s, w: truncated(s.astype(np.float32)),
        "slot rows are rounded to fp16": lambda s, w: s.astype(np.float16).astype(np.float32),
    }
    for name, rounding in BF16_ROUNDINGS.items():
        rows[f"slot rows: {name}"] = lambda s, w, r=rounding: in_bf16(r(s.astype(np.float32)))  # type: ignore[misc]
    for name, row in rows.items():
        yield own.variant(name, "linear 2", row=row)
    for name, steps in weights.again(life):
        yield own.variant(name, "routing weight", **steps)
    for name, combine in _combines(life):
        yield own.variant(name, "combine", combine=combine)
    missing = [k for k, e in enumerate(life.token.ids) if not 0 <= e < life.token.experts]
    if missing:
        for expert in (0, life.token.experts - 1):
            yield own.variant(
                f"slots without an expert go to expert {expert}",
                "combine",
                more=lambda e=expert: [live_slot(source, life, slot, e) for slot in missing],
            )
        yield own.variant(
            "a slot without an expert adds its routing weight times 0", "combine",
            combine=partial(_with_masked_weights, life, missing),
        )  # fmt: skip
    yield own.variant("y of a token without a slot is -0", "combine", empty=_MINUS_ZERO)


def _combines(life: Life) -> Iterator[tuple[str, Combine]]:
    own = Combiner.of(life)
    for name, sums in orders.SUMS.items():
        yield name, partial(own, sums)
    yield "slots are added in the order of their experts", partial(own, partial(_by_expert, life))
    for many in (4, 8):
        if len(life.token.ids) > many:
            yield (
                f"slots are added in groups of {many}",
                partial(own, partial(orders.in_groups, many)),
            )
            yield (
                f"slots beyond a multiple of {many} are lost",
                partial(own, partial(orders.first, len(life.token.ids) // many * many)),
            )
    live = sum(slot.slot < len(life.token.ids) for slot in life.slots)
    if live < len(life.token.ids):
        yield (
            "only the first slots are added, as many as are live",
            partial(own, partial(orders.first, live)),
        )
    yield (
        "y is truncated to bfloat16",
        partial(
            replace(own, finish=partial(y_of_sum, life, lambda t: bf16_round(truncated(t)))),
            orders.plain_sum,
        ),
    )
    for name, rounding in BF16_ROUNDINGS.items():
        yield (
            f"y: {name}",
            partial(
                replace(own, finish=partial(y_of_sum, life, _before(rounding))), orders.plain_sum
            ),
        )
    yield ZERO_Y, lambda r: np.zeros(len(life.channels), np.uint16)
    yield (
        "infinity is held to the largest bfloat16 in slot rows",
        partial(
            replace(own, read=lambda r: np.clip(own.read(r), -LARGEST, LARGEST)), orders.plain_sum
        ),
    )
    yield (
        "infinity is held to the largest bfloat16 in y",
        partial(replace(own, finish=partial(y_of_sum, life, _before(_clip))), orders.plain_sum),
    )
    yield (
        "NaN of a slot row is left out",
        partial(
            replace(
                own,
                read=lambda r: np.nan_to_num(own.read(r), nan=0.0, posinf=np.inf, neginf=-np.inf),
            ),
            orders.plain_sum,
        ),
    )
    for name, combine in _of_output(life, own):
        yield name, combine
    if life.token.dtype == "fp8":
        for name, reading in fp8_rows.READS.items():
            yield name, partial(replace(own, read=reading), orders.plain_sum)
    yield from _of_slots(life)


def _before(rounding: Callable[[F32], F32]) -> Callable[[F32], U16]:
    return lambda total: bf16_round(rounding(total))


def _clip(total: F32) -> F32:
    return np.clip(total, -LARGEST, LARGEST)


def _of_output(life: Life, own: Combiner) -> Iterator[tuple[str, Combine]]:
    """What is added after the combine, in wrong ways."""
    shared = len(life.token.ids)
    if any(slot.slot == shared for slot in life.slots):
        yield (
            "the shared expert's row is added third",
            partial(own, partial(orders.at_place, shared, 2)),
        )
        yield (
            "the shared expert's row is added to y after its rounding",
            partial(_apart, own, shared),
        )
        if life.token.dtype == "fp8":
            yield "the shared expert's row is left in bfloat16", partial(_one_in_bf16, own, shared)
    if life.token.output is None:
        return
    output = output_of(life)
    ways: dict[str, Callable[[F32], U16]] = {
        "the output is left out": bf16_round,
        "the output is added before y is rounded": lambda t: bf16_round(t + output),
        "the output is subtracted": lambda t: bf16_round(in_bf16(t) - output),
        "the output stands for y": lambda t: bf16_round(output),
        "the sum with the output is truncated": lambda t: bf16_round(
            truncated(in_bf16(t) + output)
        ),
        "the sum with the output has ties away from zero": lambda t: bf16_round(
            BF16_ROUNDINGS["ties are rounded away from zero"](in_bf16(t) + output)
        ),
    }
    for name, finish in ways.items():
        yield name, partial(replace(own, finish=finish), orders.plain_sum)


def _by_expert(life: Life, rows: orders.Terms) -> F32:
    ids = {slot.slot: slot.expert for slot in life.slots}
    return orders.in_order(rows, sorted(rows, key=lambda k: (ids.get(k, 0), k)))


def _of_slots(life: Life) -> Iterator[tuple[str, Combine]]:
    def only(rows: Rows, slots: set[int]) -> U16:
        few = {k: r for k, r in rows.items() if k in slots}
        own = Combiner.of(life)
        return combine_slots(few, life, life.contract) if few else own(orders.plain_sum, {})

    def without(slot: int, rows: Rows) -> U16:
        return only(rows, set(rows) - {slot})

    def alone(slot: int, rows: Rows) -> U16:
        return only(rows, {slot})

    def twice(slot: int, rows: Rows) -> U16:
        return Combiner.of(life)(lambda r: orders.in_order(r, [*r, slot]), rows)

    for slot in life.slots:
        k, name = slot.slot, f"slot {slot.slot} ({_expert(slot)})"
        yield lost_slot(slot), partial(without, k)
        yield f"{name} is added twice", partial(twice, k)
        if len(life.slots) > 2:
            yield f"only {name} is there", partial(alone, k)


def lost_slot(slot: Slot) -> str:
    """The name of the deviation by which a slot is not added."""
    return f"slot {slot.slot} ({_expert(slot)}) is lost"


def _expert(slot: Slot) -> str:
    return "the shared expert" if slot.expert < 0 else f"expert {slot.expert}"


def _with_masked_weights(life: Life, missing: list[int], rows: Rows) -> U16:
    y = (
        combine_slots(rows, life, life.contract)
        if rows
        else np.zeros(len(life.channels), np.uint16)
    )
    has_nonfinite = not np.isfinite(life.token.weights[missing]).all()
    return np.full_like(y, 0x7FC0) if has_nonfinite else y


def _apart(own: Combiner, slot: int, rows: Rows) -> U16:
    """A row that is added to ``y`` in bfloat16."""
    y = own(orders.plain_sum, {k: row for k, row in rows.items() if k != slot})
    return bf16_round(bf16_decode(y) + rows[slot]) if slot in rows else y


def _one_in_bf16(own: Combiner, slot: int, rows: Rows) -> U16:
    """All rows but one are read as FP8."""
    read = {k: own.read(row).astype(np.float32) for k, row in rows.items() if k != slot}
    plain = replace(own, read=as_it_is)
    return plain(orders.plain_sum, read | {slot: rows[slot]} if slot in rows else read)
