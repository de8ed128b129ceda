"""``y`` of a way from ``x`` on, where no stage between the two is shown.

It is predicted with exact and with fp32 sums, and may lie as far from the prediction as the
contract's own ``y`` may lie from its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.explain.blocks import signed_blocks
from megamoe.explain.instruction import weight_values
from megamoe.explain.life import Life, Slot
from megamoe.explain.sources import Source
from megamoe.explain.ways import TOTALS, Operands, Reader, Total, Way
from megamoe.judge.elements import beyond
from megamoe.spec.formats import (
    E4M3_TABLE,
    F32,
    F64,
    GROUP,
    U8,
    U16,
    UE8M0_NAN,
    bf16_decode,
    bf16_round,
    ue8m0_decode,
)
from megamoe.spec.forms import BF16

Bools = npt.NDArray[np.bool_]

_REACH: Final = 512
"""Two scale bytes move a block by less than this many octaves."""
_POWERS: Final = np.exp2(np.arange(-_REACH, _REACH + 1, dtype=np.float64))


def outside(y: U16, low: U16, high: U16) -> Bools:
    """By the judge's rule."""
    return beyond(BF16, y, low, high)


@dataclass
class Points:
    """Runs ways on one life; a stage that no way changes is computed once."""

    life: Life
    source: Source
    _columns: dict[tuple[int, int], F64] = field(default_factory=dict)
    _rows: dict[str, dict[int, F32]] = field(default_factory=dict)
    _fp32: dict[int, F64] = field(default_factory=dict)
    _first: dict[tuple[str, Reader | None], dict[int, tuple[U8, U8]]] = field(default_factory=dict)

    def outside(self, way: Way, y: U16, enough: int) -> Bools:
        """``(n,)``: elements of ``y`` that the way does not give, from ``x`` on.

        If exact sums leave more than ``enough`` of them, fp32 sums are not tried.
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
        """The elements of ``y`` further from each prediction than the contract's ``y`` may be from
        its own."""
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
        if way.changes_combine_only and name in self._rows:
            return self._combine(way, self._rows[name])
        rows = self.rows(way, name, total)
        if way.changes_combine_only:
            self._rows[name] = rows
        return self._combine(way, rows)

    def rows(self, way: Way, name: str, total: Total) -> dict[int, F32]:
        """The slot rows of the way, ``(n,)`` each, with one kind of sums."""
        acts = self._acts(way, name, total)
        rows = {}
        for slot in [*self.life.slots, *(way.more() if way.more else [])]:
            codes, sf = acts.get(slot.slot, (slot.codes, slot.exponent))
            operands = Operands.of(self.life, self.source, slot, 2, codes, sf)
            if way.reads2 is None:
                blocks = self._blocks2(slot, codes, sf)
            else:
                blocks = signed_blocks(*way.reads2(operands).select())
            rows[slot.slot] = way.row((way.total or total)(blocks), way.weight(slot))
        return rows

    def _combine(self, way: Way, rows: dict[int, F32]) -> U16:
        if not rows and not self.life.is_special:
            return np.repeat(way.empty, len(self.life.channels))
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

    def _acts(self, way: Way, name: str, total: Total) -> dict[int, tuple[U8, U8]]:
        """Codes and scale bytes, cached for the ways that share the earlier steps."""
        is_shared = way.steps <= {"reads13", "reads2"} or not way.moves_codes
        key = (name, way.reads13)
        if is_shared and key in self._first:
            return self._first[key]
        out: dict[int, tuple[U8, U8]] = {}
        slots = [*self.life.slots, *(way.more() if way.more else [])]
        for size in {len(slot.codes) for slot in slots}:  # a shared expert may have another one
            alike = [slot for slot in slots if len(slot.codes) == size]
            sums = np.stack([self.sums13(way, slot, total) for slot in alike])
            weights = np.array([[way.weight(slot)] for slot in alike], np.float32)
            gate, up = way.gate_up(sums, weights)
            value = way.values(way.product(way.silu(gate), way.up(up), weights))
            amax = way.amax(value)
            exponent = np.clip(way.exponent(amax), 0, 255)
            codes = way.codes(value, exponent, amax)
            codes = np.where(codes == 0x80, 0, codes).astype(np.uint8)
            for k, slot in enumerate(alike):
                out[slot.slot] = codes[k], exponent[k].astype(np.uint8)
        if is_shared and not way.more:
            self._first[key] = out
        return out

    def sums13(self, way: Way, slot: Slot, total: Total, rows: Any = None) -> F64:
        """``(n,)`` sums of some rows of linear 1, or of all."""
        every = slice(None) if rows is None else rows
        total = way.total or total
        if way.reads13 is None:
            if total is TOTALS["exact"]:
                return slot.exact[every]
            if total is TOTALS["fp32"] and rows is None:
                if slot.slot not in self._fp32:
                    self._fp32[slot.slot] = total(slot.blocks)
                return self._fp32[slot.slot]
            return total(slot.blocks[:, every])
        x, x_sf = self.life.x, self.life.x_sf
        operands = way.reads13(Operands.of(self.life, self.source, slot, 1, x, x_sf))
        scales_alone = operands.packed is slot.packed and operands.codes is x and not operands.late
        codes, sf, packed, weight_sf = operands.select(rows)
        own_sf = slot.sf13[every]
        if scales_alone and not (own_sf == UE8M0_NAN).any() and not (x_sf == UE8M0_NAN).any():
            # The blocks are the contract's, times powers of two.
            shift = weight_sf.astype(np.int32) - own_sf + (sf.astype(np.int32) - x_sf)
            is_nan = (weight_sf == UE8M0_NAN) | (sf == UE8M0_NAN)
            factor = _POWERS[shift + _REACH]
            factor[is_nan] = np.nan
            return total(slot.blocks[:, every] * factor.T)
        return total(signed_blocks(codes, sf, packed, weight_sf))


def _wide(bits: U16) -> F64:
    return bf16_decode(bits).astype(np.float64)
