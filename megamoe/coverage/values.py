"""Classes of the values of a forward call: codes, bytes, branches, roundings, gates, specials.

They are counted from the oracle's exact point. For a large call, a part of its work stands for the
rest: a class with a count is entered for certain, and a class without a count may be entered.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe import oracle
from megamoe.coverage import gates, groups
from megamoe.coverage.calls import Call
from megamoe.oracle import swiglu
from megamoe.oracle.combine import Combine
from megamoe.oracle.gates import form_of, gate_table
from megamoe.oracle.groups import group_amax, scaled_codes
from megamoe.oracle.linear import Rows
from megamoe.oracle.mlp import Weights, bf16_halves, linear
from megamoe.oracle.staging import quantize
from megamoe.spec.contract import Contract
from megamoe.spec.formats import F32, F64, GROUP, U8, U16, bf16_decode, bf16_round

BUDGET: Final = 6_000_000
"""The largest number of multiplications of one call; work beyond it is left out."""
EXPERTS: Final = 2
"""The largest number of experts of a large call: their weights must be computed."""
SLOTS: Final = 12
"""Rows of one expert then."""

Classes = dict[str, set[str]]


def values(call: Call, contract: Contract) -> Classes:
    """Dimension -> classes of the numbers of one call."""
    return _Count(call, contract).all()


class _Count:
    """The classes of one call, collected step by step."""

    def __init__(self, call: Call, contract: Contract) -> None:
        self.call, self.contract = call, contract
        self.classes: Classes = defaultdict(set)

    def all(self) -> Classes:
        """Every stage in the order of computation."""
        call, contract = self.call, self.contract
        self._weights_of_slots()
        self._special("hidden", gates.special_bf16(call.states))
        if "nvfp4" in call.features:
            self._nvfp4()
            return self.classes
        x, x_sf = quantize(call.states, contract)
        live = call.live[call.rows].any(axis=1)
        self.add("x-codes", groups.hexes(groups.present(x[live])))
        self.add("x-bytes", groups.hexes(groups.present(x_sf[live])))
        self.add("x-branches", groups.staging_branches(call.states[live], contract))
        self.add(
            "x-rounding", groups.roundings(bf16_decode(call.states[live]), x_sf[live], x[live])
        )
        self._experts(x, x_sf)
        return self.classes

    def add(self, dimension: str, classes: Any) -> None:
        """Some classes of a dimension."""
        self.classes[dimension].update(classes)

    def _special(self, stage: str, names: list[str]) -> None:
        self.add("specials", (f"{stage} {name}" for name in names))

    def _weights_of_slots(self) -> None:
        """Routing weights that count, and those that do not."""
        rows = self.call.rows
        live, weights = self.call.live[rows], self.call.weights[rows]
        self._special("routing weight", gates.special_f32(weights[live]))
        self._special("masked weight", gates.special_f32(weights[~live]))
        finite = weights[live & np.isfinite(weights)]
        self.add("weights", {
            name for name, mask in (
                ("below 0", finite < 0), ("above 0", finite > 0), ("1", finite == 1),
                ("above 1", finite > 1), ("below 2^-24", (finite > 0) & (finite < 2.0**-24)),
            ) if mask.any()
        })  # fmt: skip

    # --- experts ------------------------------------------------------------------------------

    def _experts(self, x: U8, x_sf: U8) -> None:
        call = self.call
        ids = call.ids[call.rows]
        names = np.unique(ids[ids >= 0])
        count = int((ids >= 0).sum())
        whole = 3 * count * call.hidden * call.inter <= BUDGET
        if not whole:  # spread over the experts: the first and the last
            choice = np.linspace(0, len(names) - 1, min(EXPERTS, len(names))).astype(int)
            names = names[np.unique(choice)]
        rows_out = np.zeros((*ids.shape, call.hidden), np.uint16)
        for expert in names.tolist():
            weights = call.expert(expert)
            self._operands("w13", weights[0], weights[1])
            self._operands("w2", weights[2], weights[3])
            at = np.nonzero(ids == expert)
            if not whole:
                some = np.unique(np.linspace(0, len(at[0]) - 1, min(SLOTS, len(at[0]))).astype(int))
                at = at[0][some], at[1][some]
            weight = call.weights[call.rows][at][:, None]
            channels = None if whole else self._channels(len(at[0]), len(names))
            acts = self._first(x[at[0]], x_sf[at[0]], weight, weights, channels)
            if whole:
                rows_out[at] = self._second(*acts, weights)
        shared = self._shared(x, x_sf) if call.shared is not None else None
        if whole:
            self._combine(rows_out, shared)

    def _operands(self, name: str, packed: U8, sf: U8) -> None:
        self.add(f"{name}-nibbles", groups.nibbles(packed))
        self.add(f"{name}-bytes", groups.hexes(groups.present(sf)))

    def _channels(self, rows: int, experts: int) -> npt.NDArray[np.intp]:
        """Channels of I that a large call is counted by: whole groups, spread evenly."""
        share = BUDGET // (2 * experts * rows * self.call.hidden * GROUP)
        every = self.call.inter // GROUP
        choice = np.linspace(0, every - 1, min(every, max(1, share))).astype(int)
        return (GROUP * np.unique(choice)[:, None] + np.arange(GROUP)).ravel()

    def _first(
        self, x: U8, x_sf: U8, weight: F32, weights: Weights, channels: Any
    ) -> tuple[U8, U8]:
        """Linear 1, SwiGLU and requantisation; codes and bytes of the chosen channels."""
        act, contract = self.call.act, self.contract
        w13, w13_sf = weights[0], weights[1]
        if channels is not None:
            at = np.concatenate([channels, channels + self.call.inter])
            w13, w13_sf = w13[at], w13_sf[at]
        sums: F64 = linear(Rows.of(x, x_sf), w13, w13_sf, [])["reference"]
        self.add("gate-up-rounding", roundings(sums))
        gate, up = bf16_halves(sums, contract)
        self._special("gate", gates.special_bf16(gate))
        self._special("up", gates.special_bf16(up))
        self.add("clamp", gates.clamp_sides(gate, up, act) if act.name != "situ" else ())
        gate, up = swiglu.clamp_gate_up(gate, up, act, contract)
        mode = "fast" if act.fast_math else "precise"
        if act.name == "swiglu":
            self.add("silu", (f"{mode} {name}" for name in gates.regions(gate)))
        self._special("gated", gates.special_f32(gate_table(form_of(act, contract))[gate]))
        value = swiglu.activation(gate, up, weight, act, contract)
        self._special("activation", gates.special_f32(value))
        sf = swiglu.requant_exponent(group_amax(value, contract), contract)
        codes = scaled_codes(value, sf, contract)
        self.add("act-rounding", groups.roundings(value, sf, codes))
        codes = np.where(codes == 0x80, 0, codes).astype(np.uint8)  # no output shows that sign
        plain = codes.reshape(-1, GROUP)[sf.ravel() != 255]
        self.add("act-codes", groups.hexes(groups.present(plain)))
        self.add("act-bytes", groups.hexes(groups.present(sf)))
        self.add("act-branches", groups.requant_branches(value, contract))
        return codes, sf

    def _second(self, codes: U8, sf: U8, weights: Weights) -> U16:
        sums: F64 = linear(Rows.of(codes, sf), weights[2], weights[3], [])["reference"]
        self.add("row-rounding", roundings(sums))
        return bf16_round(sums)

    def _shared(self, x: U8, x_sf: U8) -> U16:
        """Rows of the shared expert, which every token takes."""
        weights = self.call.shared
        assert weights is not None
        for name, packed, sf in (("w13", *weights[:2]), ("w2", *weights[2:])):
            self.add(f"shared-{name}-codes", groups.hexes(groups.present(packed)))
            self.add(f"shared-{name}-bytes", groups.hexes(groups.present(sf)))
        apart = _Count(self.call, self.contract)  # its codes are no stage that is judged
        codes = apart._first(x, x_sf, np.ones((1, 1), np.float32), weights, None)
        row = apart._second(*codes, weights)
        self._special("shared row", gates.special_bf16(row))
        return row

    def _combine(self, rows: U16, shared: U16 | None) -> None:
        call = self.call
        at = call.rows
        live = call.live[at]
        self._special("slot row", gates.special_bf16(rows[live]))
        combine = Combine(live, call.weights[at], self.contract, call.combine_dtype, call.output)
        self._special("y", gates.special_bf16(combine.point(rows, shared)))

    # --- NVFP4 --------------------------------------------------------------------------------

    def _nvfp4(self) -> None:
        """Nibbles and scale bytes; its stages have formats of their own, and only y is judged."""
        problem = self.call.problem
        assert problem is not None
        for expert in np.unique(problem.topk_ids.numpy()[problem.topk_ids.numpy() >= 0]).tolist():
            w13, w13_sf, w2, w2_sf = self.call.expert(expert)
            for name, packed, sf in (("w13", w13, w13_sf), ("w2", w2, w2_sf)):
                self.add(f"nvfp4-{name}-nibbles", groups.nibbles(packed))
                self.add(f"nvfp4-{name}-bytes", groups.hexes(groups.present(sf)))
        golden = oracle.forward(problem, (), contract=self.contract)
        self._special("y", gates.special_bf16(golden.y))


def roundings(sums: F64) -> set[str]:
    """The roundings of exact sums to bfloat16, as classes."""
    nearest = bf16_decode(bf16_round(sums)).astype(np.float64)
    with np.errstate(invalid="ignore"):
        size, near = np.abs(sums), np.abs(nearest)
        other = np.where(size > near, _next(near, 1), _next(near, -1))
        tie = 2 * size == near + other
        parts = {
            "exact": (size == near) & np.isfinite(size),
            "down": (size > near) & ~tie & (near > 0),
            "up": (size < near) & ~tie & np.isfinite(near),
            "tie down": tie & (size > near), "tie up": tie & (size < near),
            "to infinity": np.isfinite(size) & np.isinf(near), "to zero": (near == 0) & (size > 0),
            "subnormal": (near > 0) & (near < 2.0**-126), "NaN": np.isnan(sums),
        }  # fmt: skip
    return {name for name, mask in parts.items() if mask.any()}


def _next(magnitude: F64, step: int) -> F64:
    """The bfloat16 number beside a magnitude, towards zero or away from it."""
    bits = magnitude.astype(np.float32).view(np.uint32) >> 16
    neighbour = np.clip(bits.astype(np.int64) + step, 0, 0x7F80).astype(np.uint16)
    return bf16_decode(neighbour).astype(np.float64)
