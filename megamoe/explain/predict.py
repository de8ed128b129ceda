"""The intervals that a way gives for one token, for outputs with the codes of linear 2.

A way gets the freedom that the accumulator class gives to the contract: both ends of each sum go
through its steps, and silu may err by as much as the contract's form at the same gate.
:mod:`megamoe.explain.points` treats outputs with ``y`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.explain.blocks import signed_blocks
from megamoe.explain.life import SHARED, Life, Slot, down_ends, linear1, same_codes
from megamoe.explain.points import Bools, Points, outside
from megamoe.explain.sources import Source
from megamoe.explain.ways import I32, TOTALS, Operands, Reader, Rows, Way, bits_of, right
from megamoe.oracle.gates import Bounds, form_of, gate_bounds, gate_table, up_bounds, up_table
from megamoe.spec.formats import (
    E4M3_NAN,
    F32,
    F64,
    GROUP,
    U8,
    U16,
    UE8M0_NAN,
    bf16_key,
    bf16_round,
)

Acts = Mapping[int, tuple[U8, U8]]
"""Codes ``(I,)`` and scale bytes ``(I/32,)`` by slot."""


@dataclass
class Predictor:
    """Runs ways on one life; a stage that no way changes is computed once."""

    life: Life
    source: Source
    acts: Acts
    """The output of the backend."""
    _second: dict[int, tuple[F64, F64]] = field(default_factory=dict)
    _rows: dict[tuple[int, int, Reader | None], tuple[F32, F32]] = field(default_factory=dict)
    _own: npt.NDArray[np.int64] | None = None
    _cache: tuple[F32, F32, F32] | None = None

    # --- from x to the codes

    def outside_codes(self, way: Way) -> Bools:
        """``(S, I/32 + I)``: scale bytes, then codes, that were shown and the way does not give.

        ``S`` are the routed slots.
        """
        sf, codes = self._sample(slice(None), slice(None))
        with np.errstate(all="ignore"):
            sums = np.stack([self._sums13(way, slot) for slot in self.routed()])
            return self._differ(way, sums, sf, codes)

    def outside_mix(self, way: Way, at: Bools) -> Bools:
        """:meth:`outside_codes` where the way holds in the channels ``at`` ``(I,)`` only. It must
        not change amax or the scale byte of a group."""
        own = right(self.life)
        sf, codes = self._sample(slice(None), slice(None))
        with np.errstate(all="ignore"):
            sums = np.stack([self._sums13(way, slot) for slot in self.routed()])
            pairs = zip(
                self._values(way, sums, self._weights(way)), self._right_values, strict=True
            )
            value, low, high = (np.where(at, one, other) for one, other in pairs)
            mix = own
            if "codes" in way.steps:
                mix = replace(own, codes=lambda v, e, m: np.where(
                    at, way.codes(v, e, m), own.codes(v, e, m)
                ))  # fmt: skip
            return self._differ_values(mix, (value, low, high), sf, codes)

    @cached_property
    def _right_values(self) -> tuple[F32, F32, F32]:
        """:meth:`_values` of the contract."""
        own = right(self.life)
        sums = np.stack([self._sums13(own, slot) for slot in self.routed()])
        return self._values(own, sums, self._weights(own))

    def improves(self, way: Way, contract: Bools, groups: npt.NDArray[np.int64] | None) -> bool:
        """Whether a way that changes operands of linear 1 is worth a full computation.

        By exact sums, and on ``groups`` alone if these are given, it must come nearer to the output
        by a quarter of the differences: ``contract`` ``(S, I/32 + I)``. Groups that it makes worse
        do not count: it may hold in some slots or channels only.
        """
        at: Any = slice(None)
        rows = None
        if groups is not None:
            at = (groups[:, None] * GROUP + np.arange(GROUP)).ravel()
            rows = np.concatenate([at, at + self.life.token.intermediate])
        every = slice(None) if groups is None else groups
        sf, codes = self._sample(every, at)

        def count(one: Way) -> npt.NDArray[np.int64]:
            sums = [self._points.sums13(one, s, TOTALS["exact"], rows) for s in self.routed()]
            three = np.repeat(np.stack(sums)[:, None], 3, axis=1)
            wrong = self._differ(one, three, sf, codes)
            width = sf.shape[1]
            of_codes = wrong[:, width:].reshape(len(wrong), width, GROUP).sum(axis=2)
            return np.asarray(wrong[:, :width] + of_codes)

        with np.errstate(all="ignore"):
            if self._own is None:
                self._own = count(right(self.life))
            gain = np.maximum(self._own - count(way), 0).sum()
        size = self.life.token.intermediate // GROUP
        differences = contract[:, :size][:, every].sum() + contract[:, size:][:, at].sum()
        return bool(gain > 0 and gain >= differences / 4)

    def gives_zeros(self, way: Way, slot: Slot) -> bool:
        """Whether all activations of a slot are zero before requantisation."""
        with np.errstate(all="ignore"):
            sums, weight = self._sums13(way, slot)[None], np.full((1, 1), way.weight(slot))
            return not any(values.any() for values in self._values(way, sums, weight))

    def gives_zero_row(self, way: Way, slot: Slot) -> bool:
        """Whether all sums of linear 2 of a slot are zero, from the codes shown."""
        with np.errstate(all="ignore"):
            return not any(end.any() for end in self._sums2(way, slot))

    def _sample(self, groups: Any, channels: Any) -> tuple[U8, U8]:
        acts = [self.acts[slot.slot] for slot in self.routed()]
        return (
            np.stack([sf[groups] for _, sf in acts]),
            np.stack([codes[channels] for codes, _ in acts]),
        )

    def _differ(self, way: Way, sums: F64, sf: U8, codes: U8) -> Bools:
        """Compare ``sums`` ``(S, 3, 2n)`` with the output of ``n`` channels."""
        values = self._kept_values(way, sums, self._weights(way))
        return self._differ_values(way, values, sf, codes)

    def _differ_values(self, way: Way, values: tuple[F32, F32, F32], sf: U8, codes: U8) -> Bools:
        """The same of the ``values`` before requantisation."""
        least, most, low, high = self._codes(way, values, sf.astype(np.int32))
        key = same_codes(codes)
        return np.concatenate([(sf < least) | (sf > most), (key < low) | (key > high)], axis=1)

    @cached_property
    def _points(self) -> Points:
        return Points(self.life, self.source)

    def routed(self) -> list[Slot]:
        """The slots whose codes a backend can show."""
        return [slot for slot in self.life.slots if slot.expert != SHARED]

    def _sums13(self, way: Way, slot: Slot) -> F64:
        """``(3, 2I)``: the exact sums of linear 1, and both ends of the class's interval."""
        if way.total is not None:
            point = way.total(slot.blocks)
            return np.stack([point, point, point])
        if way.reads13 is None:
            return np.stack([slot.exact, slot.low, slot.high])
        read = way.reads13(
            Operands.of(self.life, self.source, slot, 1, self.life.x, self.life.x_sf)
        )
        return np.concatenate(linear1(*read.select(), self.life.accumulator)[1:])

    def _weights(self, way: Way) -> F32:
        """``(S, 1)``."""
        return np.array([[way.weight(slot)] for slot in self.routed()], np.float32)

    def _codes(self, way: Way, values: tuple[F32, F32, F32], exponents: I32) -> Any:
        """Lowest and highest scale byte ``(S, G)``, lowest and highest key ``(S, n)``."""
        value, low, high = values
        crosses = (low <= 0) & (high >= 0)
        small = np.where(np.abs(low) < np.abs(high), low, high)
        large = np.where(np.abs(low) < np.abs(high), high, low)
        amax = way.amax(np.stack([value, np.where(crosses, 0, small), large]))
        bytes_ = np.clip(way.exponent(amax), 0, 255)
        least, most = bytes_.min(axis=0), bytes_.max(axis=0)
        exponent = np.clip(exponents, least, most)
        codes = way.codes(np.stack([value, low, high]), exponent, amax[0])
        keys = same_codes(np.where(_per_value(exponent) == UE8M0_NAN, E4M3_NAN, codes))
        return least, most, keys.min(axis=0), keys.max(axis=0)

    def _kept_values(self, way: Way, sums: F64, weights: F32) -> tuple[F32, F32, F32]:
        """See :meth:`_values`; one call for all ways that change only the later steps."""
        if (
            not way.steps
            or not way.steps <= {"amax", "exponent", "codes"}
            or sums.shape[2] != self._width
        ):
            return self._values(way, sums, weights)
        if self._cache is None:
            self._cache = self._values(way, sums, weights)
        return self._cache

    @property
    def _width(self) -> int:
        return 2 * self.life.token.intermediate

    def _values(self, way: Way, sums: F64, weights: F32) -> tuple[F32, F32, F32]:
        """Activations ``(S, I)`` before requantisation: the value, and both ends.

        ``sums`` ``(S, 3, 2I)``, ``weights`` ``(S, 1)``.
        """
        gate, up = way.gate_up(sums, weights)
        form = form_of(self.life.token.act, self.life.contract)
        gated = _all_ends(way.silu(gate), gate, gate_table(form), gate_bounds(form))
        ups = _all_ends(way.up(up), up, up_table(form), up_bounds(form))
        value = way.values(way.product(gated[0], ups[0], weights))
        corners = [way.values(way.product(g, u, weights)) for g in gated[1:] for u in ups[1:]]
        low, high = (pick.reduce([value, *corners]) for pick in (np.fmin, np.fmax))
        is_nan = np.isnan(value)
        return value, np.where(is_nan, value, low), np.where(is_nan, value, high)

    # --- from the codes to y

    def outside_y(self, way: Way, y: U16) -> Bools:
        """``(n,)``: elements that were shown and the way does not give, from the codes shown."""
        low: dict[int, F32] = {}
        high: dict[int, F32] = {}
        with np.errstate(all="ignore"):
            for slot in [*self.life.slots, *(way.more() if way.more else [])]:
                low[slot.slot], high[slot.slot] = self._row_ends(way, slot)
            if not low and not self.life.is_special:
                return y != way.empty
            least, most = self._ends(way, low, high)
        return outside(y, least, most)

    def rows_of(self, way: Way) -> dict[int, tuple[F32, F32]]:
        """Both ends ``(n,)`` of each slot row of a way, from the codes shown."""
        with np.errstate(all="ignore"):
            return {slot.slot: self._row_ends(way, slot) for slot in self.life.slots}

    def outside_rows(self, way: Way, rows: Mapping[int, tuple[F32, F32]], y: U16) -> Bools:
        """``(n,)``: elements of ``y`` that the combine of ``way`` does not give, from the rows of
        :meth:`rows_of`, whichever way each is of."""
        with np.errstate(all="ignore"):
            low, high = ({k: ends[side] for k, ends in rows.items()} for side in (0, 1))
            return outside(y, *self._ends(way, low, high))

    def _row_ends(self, way: Way, slot: Slot) -> tuple[F32, F32]:
        """Both ends of a slot row; one call for all ways that change only the combine, and for
        each way that changes only what linear 2 reads."""
        key = slot.slot, slot.expert, way.reads2
        is_kept = way.changes_combine_only or way.steps == {"reads2"}
        if is_kept and key in self._rows:
            return self._rows[key]
        weight = way.weight(slot)
        ends = [way.row(end, weight) for end in self._sums2(way, slot)]
        bounds = np.minimum(*ends), np.maximum(*ends)
        if is_kept:
            self._rows[key] = bounds
        return bounds

    def _sums2(self, way: Way, slot: Slot) -> tuple[F64, F64]:
        """Both ends of linear 2, ``(n,)`` each."""
        if slot.slot not in self.acts:
            return slot.down.low, slot.down.high
        codes, sf = self.acts[slot.slot]
        if way.total is not None:
            point = way.total(signed_blocks(codes, sf, slot.down.packed, slot.down.sf))
            return point, point
        if way.reads2 is None:
            if slot.slot not in self._second:
                operands = codes, sf, slot.down.packed, slot.down.sf
                self._second[slot.slot] = down_ends(*operands, self.life.accumulator)
            return self._second[slot.slot]
        read = way.reads2(Operands.of(self.life, self.source, slot, 2, codes, sf))
        return down_ends(*read.select(), self.life.accumulator)

    def _ends(self, way: Way, low: Rows, high: Rows) -> tuple[U16, U16]:
        own = "combine" not in way.steps and way.more is None
        if own and ("row" not in way.steps or self.life.is_special):
            bits = [{k: bf16_round(r) for k, r in rows.items()} for rows in (low, high)]
            return self.life.ends(*bits)
        first, last = way.combine(low), way.combine(high)
        swap = bf16_key(first) > bf16_key(last)
        return np.where(swap, last, first), np.where(swap, first, last)


def _all_ends(values: F32, at: F32, table: F32, bounds: Bounds) -> list[F32]:
    """``(S, 3, n)`` of a value and both ends to the value and all ends, ``(S, n)`` each.

    ``table`` and ``bounds`` are the contract's function of ``at``: its relative error is allowed.
    """
    if bounds.low is bounds.high:  # none
        return [values[:, k] for k in range(3)]
    exact = bits_of(at)
    bits = bf16_round(at) if exact is None else exact
    point = table[bits].astype(np.float64)
    out = [values[:, 0]]
    for end in (bounds.low, bounds.high):
        factor = end[bits] / point
        factor = np.where(np.isfinite(factor), factor, 1.0)
        scaled = (values * factor).astype(np.float32)
        out += [scaled[:, 1], scaled[:, 2]]
    return out


def _per_value(of_groups: I32) -> I32:
    return np.repeat(of_groups, GROUP, axis=-1)
