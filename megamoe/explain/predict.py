"""What a way makes of one token: intervals where a stage before is shown, points where none is.

Where ``x`` or the codes of linear 2 are shown, a way gets the freedom that the accumulator class
gives the contract's: both ends of each sum are followed through its steps, and silu may err by as
much as the contract's form may at the same gate. Where only ``y`` is shown, ``y`` is predicted with
exact and with fp32 sums, and may lie as far off as the contract's own ``y`` may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.explain.blocks import signed_blocks
from megamoe.explain.instruction import weight_values
from megamoe.explain.life import SHARED, Life, Slot, down_ends, linear1, same_codes
from megamoe.explain.sources import Source
from megamoe.explain.ways import I32, TOTALS, Operands, Rows, Total, Way, Where, bits_of, right
from megamoe.oracle.gates import Bounds, form_of, gate_bounds, gate_table, up_bounds, up_table
from megamoe.spec.formats import (
    E4M3_NAN,
    E4M3_TABLE,
    F32,
    F64,
    GROUP,
    U8,
    U16,
    UE8M0_NAN,
    bf16_decode,
    bf16_key,
    bf16_round,
    ue8m0_decode,
)
from megamoe.spec.forms import BF16

Bools = npt.NDArray[np.bool_]
Acts = Mapping[int, tuple[U8, U8]]
"""Codes ``(I,)`` and scale bytes ``(I/32,)`` by slot."""


@dataclass
class Predictor:
    """Runs ways on one life; what no way changes is computed once."""

    life: Life
    source: Source
    acts: Acts | None = None
    """What was shown; None where only ``y`` is there."""
    _second: dict[int, tuple[F64, F64]] = field(default_factory=dict)
    _columns: dict[tuple[int, int], F64] = field(default_factory=dict)
    _own: npt.NDArray[np.int64] | None = None
    _kept: tuple[F32, F32, F32] | None = None
    _first: dict[Any, dict[int, tuple[U8, U8]]] = field(default_factory=dict)

    # --- from x to the codes

    def outside_codes(self, way: Way) -> Bools:
        """``(S, I/32 + I)``: scale bytes, then codes, that were shown and the way does not give.

        ``S`` are the routed slots.
        """
        sf, codes = self._shown(slice(None), slice(None))
        with np.errstate(all="ignore"):
            sums = np.stack([self._sums13(way, slot) for slot in self.routed()])
            return self._differ(way, sums, sf, codes)

    def improves(self, way: Way, groups: npt.NDArray[np.int64] | None) -> bool:
        """Whether a way that changes operands of linear 1 gives more of some slot than the right.

        By exact sums, and on ``groups`` alone where these are given: a quick look.
        """
        at: Any = slice(None)
        rows = None
        if groups is not None:
            at = (groups[:, None] * GROUP + np.arange(GROUP)).ravel()
            rows = np.concatenate([at, at + self.life.token.intermediate])
        sf, codes = self._shown(slice(None) if groups is None else groups, at)

        def count(one: Way) -> npt.NDArray[np.int64]:
            sums = [self._point13(one, s, TOTALS["exact"], rows) for s in self.routed()]
            three = np.repeat(np.stack(sums)[:, None], 3, axis=1)
            return self._differ(one, three, sf, codes).sum(axis=1)

        with np.errstate(all="ignore"):
            if self._own is None:
                self._own = count(right(self.life))
            return bool((count(way) < self._own).any())

    def _shown(self, groups: Any, channels: Any) -> tuple[U8, U8]:
        assert self.acts is not None
        acts = [self.acts[slot.slot] for slot in self.routed()]
        return (
            np.stack([sf[groups] for _, sf in acts]),
            np.stack([codes[channels] for codes, _ in acts]),
        )

    def _differ(self, way: Way, sums: F64, sf: U8, codes: U8) -> Bools:
        """``sums`` ``(S, 3, 2n)`` against what was shown of ``n`` channels."""
        weights = np.array([way.weight(s) for s in self.routed()], np.float32)
        least, most, low, high = self._codes(way, sums, weights, sf.astype(np.int32))
        key = same_codes(codes)
        return np.concatenate([(sf < least) | (sf > most), (key < low) | (key > high)], axis=1)

    def routed(self) -> list[Slot]:
        """The slots whose codes a backend can show."""
        return [slot for slot in self.life.slots if slot.expert != SHARED]

    def _operands(self, slot: Slot, linear: int, codes: U8, sf: U8) -> Operands:
        where = Where(self.life, self.source, slot, linear)
        if linear == 1:
            return Operands(codes, sf, slot.packed, slot.sf13, where)
        return Operands(codes, sf, slot.down.packed, slot.down.sf, where)

    def _sums13(self, way: Way, slot: Slot) -> F64:
        """``(3, 2I)``: the exact sums of linear 1, and both ends of what the class allows."""
        if way.total is not None:
            point = way.total(slot.blocks)
            return np.stack([point, point, point])
        if way.reads13 is None:
            return np.stack([slot.exact, slot.low, slot.high])
        read = way.reads13(self._operands(slot, 1, self.life.x, self.life.x_sf))
        return np.concatenate(linear1(*read.chosen(), self.life.accumulator)[1:])

    def _codes(self, way: Way, sums: F64, weights: F32, shown: I32) -> Any:
        """Lowest and highest scale byte ``(S, G)``, lowest and highest key ``(S, n)``."""
        value, low, high = self._kept_values(way, sums, weights[:, None])
        crosses = (low <= 0) & (high >= 0)
        small = np.where(np.abs(low) < np.abs(high), low, high)
        large = np.where(np.abs(low) < np.abs(high), high, low)
        amax = way.amax(np.stack([value, np.where(crosses, 0, small), large]))
        bytes_ = np.clip(way.exponent(amax), 0, 255)
        least, most = bytes_.min(axis=0), bytes_.max(axis=0)
        used = np.clip(shown, least, most)
        made = way.codes(np.stack([value, low, high]), used, amax[0])
        keys = same_codes(np.where(_per_value(used) == UE8M0_NAN, E4M3_NAN, made))
        return least, most, keys.min(axis=0), keys.max(axis=0)

    def _kept_values(self, way: Way, sums: F64, weights: F32) -> tuple[F32, F32, F32]:
        """As :meth:`_values`, once for all ways that change what follows alone."""
        if (
            not way.steps
            or not way.steps <= {"amax", "exponent", "codes"}
            or sums.shape[2] != self._width
        ):
            return self._values(way, sums, weights)
        if self._kept is None:
            self._kept = self._values(way, sums, weights)
        return self._kept

    @property
    def _width(self) -> int:
        return 2 * self.life.token.intermediate

    def _values(self, way: Way, sums: F64, weights: F32) -> tuple[F32, F32, F32]:
        """Activations ``(S, I)`` before requantisation: the value, and both ends.

        ``sums`` ``(S, 3, 2I)``, ``weights`` ``(S, 1)``.
        """
        gate, up = way.clamp(*way.halves(sums))
        form = form_of(self.life.token.act, self.life.contract)
        gated = _freed(way.silu(gate), gate, gate_table(form), gate_bounds(form))
        upped = _freed(way.up(up), up, up_table(form), up_bounds(form))
        value = way.values(way.product(gated[0], upped[0], weights))
        corners = [way.values(way.product(g, u, weights)) for g in gated[1:] for u in upped[1:]]
        low, high = (pick.reduce([value, *corners]) for pick in (np.fmin, np.fmax))
        lost = np.isnan(value)
        return value, np.where(lost, value, low), np.where(lost, value, high)

    # --- from the codes to y

    def outside_y(self, way: Way, y: U16) -> Bools:
        """``(n,)``: elements that were shown and the way does not give, from the codes shown."""
        assert self.acts is not None
        low: dict[int, F32] = {}
        high: dict[int, F32] = {}
        with np.errstate(all="ignore"):
            for slot in [*self.life.slots, *(way.more() if way.more else [])]:
                weight = way.weight(slot)
                ends = [way.row(end, weight) for end in self._sums2(way, slot)]
                low[slot.slot], high[slot.slot] = np.minimum(*ends), np.maximum(*ends)
            if not low and not self.life.is_special:
                return y != 0
            least, most = self._ends(way, low, high)
        return outside(y, least, most)

    def _sums2(self, way: Way, slot: Slot) -> tuple[F64, F64]:
        """Both ends of linear 2, ``(n,)`` each."""
        assert self.acts is not None
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
        read = way.reads2(self._operands(slot, 2, codes, sf))
        return down_ends(*read.chosen(), self.life.accumulator)

    def _ends(self, way: Way, low: Rows, high: Rows) -> tuple[U16, U16]:
        own = "combine" not in way.steps and way.more is None
        if own and ("row" not in way.steps or self.life.is_special):
            bits = [{k: bf16_round(r) for k, r in rows.items()} for rows in (low, high)]
            return self.life.ends(*bits)
        first, last = way.combine(low), way.combine(high)
        swapped = bf16_key(first) > bf16_key(last)
        return np.where(swapped, last, first), np.where(swapped, first, last)

    # --- from x to y

    def outside_all(self, way: Way, y: U16, enough: int) -> Bools:
        """``(n,)``: elements of ``y`` that the way does not give, from ``x`` on.

        Where exact sums leave more than ``enough`` of them, fp32 sums are not tried.
        """
        points: list[U16] = []
        for name, total in TOTALS.items():
            with np.errstate(all="ignore"):
                points.append(self.point(way, name, total))
            wrong = self._outside_points(points, y)
            if way.total is not None or not wrong.any() or wrong.sum() > enough:
                break
        return wrong

    def _outside_points(self, points: list[U16], y: U16) -> Bools:
        """As far from a prediction as the contract's ``y`` may be from its own."""
        life, value = self.life, [_wide(p) for p in points]
        own = _wide(life.y)
        size = [np.sqrt(np.nanmean(np.square(v))) if np.isfinite(v).any() else 0.0
                for v in (own, value[0])]  # fmt: skip
        ratio = size[1] / size[0] if size[0] and np.isfinite(size).all() else 1.0
        with np.errstate(all="ignore"):
            below = (own - _wide(life.y_low)) * ratio
            above = (_wide(life.y_high) - own) * ratio
            low = np.fmin.reduce(value) - np.nan_to_num(below)
            high = np.fmax.reduce(value) + np.nan_to_num(above)
            return outside(y, bf16_round(low), bf16_round(high))

    def point(self, way: Way, name: str, total: Total) -> U16:
        """``y`` of the way with one kind of sums."""
        acts = self._point_acts(way, name, total)
        rows = {}
        for slot in [*self.life.slots, *(way.more() if way.more else [])]:
            codes, sf = acts.get(slot.slot, (slot.codes, slot.exponent))
            operands = self._operands(slot, 2, codes, sf)
            if way.reads2 is None:
                blocks = self._blocks2(slot, codes, sf)
            else:
                blocks = signed_blocks(*way.reads2(operands).chosen())
            rows[slot.slot] = way.row((way.total or total)(blocks), way.weight(slot))
        if not rows and not self.life.is_special:
            return np.zeros(len(self.life.channels), np.uint16)
        return way.combine(rows)

    def _blocks2(self, slot: Slot, codes: U8, sf: U8) -> F64:
        """``(G, n)`` block sums of linear 2 with the right weights, which are decoded once."""
        at = slot.slot, slot.expert
        if at not in self._columns:
            packed, weight_sf = slot.down.packed, slot.down.sf
            values = weight_values(packed, weight_sf)[1] * np.repeat(
                ue8m0_decode(weight_sf), GROUP, axis=1
            )
            shape = len(packed), -1, GROUP
            self._columns[at] = np.ascontiguousarray(values.reshape(shape).swapaxes(0, 1))
        operand = E4M3_TABLE[codes].reshape(-1, GROUP, 1)
        blocks = np.matmul(self._columns[at], operand)[..., 0]  # products of 32 fit in float64
        return blocks * ue8m0_decode(sf)[:, None]

    def _point_acts(self, way: Way, name: str, total: Total) -> dict[int, tuple[U8, U8]]:
        """Codes and scale bytes, kept for the ways that share what comes before them."""
        is_shared = way.steps <= {"reads13", "reads2"} or not way.moves_codes
        kept = (name, way.reads13)
        if is_shared and kept in self._first:
            return self._first[kept]
        out = {}
        for slot in [*self.life.slots, *(way.more() if way.more else [])]:
            gate, up = way.clamp(*way.halves(self._point13(way, slot, total)))
            weight = np.full(1, way.weight(slot), np.float32)
            value = way.values(way.product(way.silu(gate), way.up(up), weight))
            amax = way.amax(value)
            used = np.clip(way.exponent(amax), 0, 255)
            codes = way.codes(value, used, amax)
            codes = np.where(codes == 0x80, 0, codes).astype(np.uint8)
            out[slot.slot] = codes, used.astype(np.uint8)
        if is_shared and not way.more:
            self._first[kept] = out
        return out

    def _point13(self, way: Way, slot: Slot, total: Total, rows: Any = None) -> F64:
        """``(n,)`` sums of some rows of linear 1, or of all."""
        every = slice(None) if rows is None else rows
        total = way.total or total
        if way.reads13 is None:
            return slot.exact[every] if total is TOTALS["exact"] else total(slot.blocks[:, every])
        x, x_sf = self.life.x, self.life.x_sf
        operands = way.reads13(self._operands(slot, 1, x, x_sf))
        scales_alone = operands.packed is slot.packed and operands.codes is x and not operands.late
        codes, sf, packed, weight_sf = operands.chosen(rows)
        own_sf = slot.sf13[every]
        if scales_alone and not (own_sf == UE8M0_NAN).any() and not (x_sf == UE8M0_NAN).any():
            # The blocks are the contract's, times powers of two.
            shift = weight_sf.astype(np.int32) - own_sf + (sf.astype(np.int32) - x_sf)
            lost = (weight_sf == UE8M0_NAN) | (sf == UE8M0_NAN)
            return total(np.where(lost.T, np.nan, np.ldexp(slot.blocks[:, every], shift.T)))
        return total(signed_blocks(codes, sf, packed, weight_sf))


def _freed(values: F32, at: F32, table: F32, bounds: Bounds) -> list[F32]:
    """``(S, 3, n)`` of a value and both ends to the value and all ends, ``(S, n)`` each.

    ``table`` and ``bounds`` are the contract's function of ``at``: its relative error is allowed.
    """
    if bounds.low is bounds.high:  # none
        return [values[:, k] for k in range(3)]
    found = bits_of(at)
    bits = bf16_round(at) if found is None else found
    point = table[bits].astype(np.float64)
    out = [values[:, 0]]
    for end in (bounds.low, bounds.high):
        factor = end[bits] / point
        factor = np.where(np.isfinite(factor), factor, 1.0)
        moved = (values * factor).astype(np.float32)
        out += [moved[:, 1], moved[:, 2]]
    return out


def _per_value(of_groups: I32) -> I32:
    return np.repeat(of_groups, GROUP, axis=-1)


def _wide(bits: U16) -> F64:
    return bf16_decode(bits).astype(np.float64)


def outside(y: U16, low: U16, high: U16) -> Bools:
    """As the judge has it: inclusive, NaN only where NaN is expected."""
    nan = BF16.is_nan(low)
    inside = (bf16_key(y) >= bf16_key(low)) & (bf16_key(y) <= bf16_key(high)) & ~BF16.is_nan(y)
    only_zero = (bf16_key(low) == 0) & (bf16_key(high) == 0)
    inside &= ~only_zero | (y == low) | (y == high)
    return ~np.where(nan, BF16.is_nan(y), inside)
