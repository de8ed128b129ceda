"""The layer in steps that can be replaced one at a time: known ways to be wrong.

A *way* computes one token's codes and outputs. :func:`right` is the contract's; each deviation
replaces one step of it. Where one of them gives the bits that somebody got and the right way does
not, that is the stage to look at. Another revision of the contract is a way too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.explain.instruction import blockwise, weight_values
from megamoe.explain.life import Life, Slot, combine_rows
from megamoe.oracle import swiglu
from megamoe.oracle.fused import fma
from megamoe.oracle.gates import Form, form_of, gate_table, up_table
from megamoe.oracle.groups import RECIP_448, group_amax, scaled_codes
from megamoe.spec.contract import BASE, REVISIONS, Contract
from megamoe.spec.features import Activation
from megamoe.spec.formats import (
    E4M3_TABLE,
    F32,
    F64,
    GROUP,
    U8,
    U16,
    bf16_decode,
    bf16_round,
    ue8m0_ceil,
)

Total = Callable[[F64], F64]
"""``(G, n)`` exact block sums to ``(n,)`` sums."""
TOTALS: Final[Mapping[str, Total]] = {"exact": lambda b: b.sum(axis=0), "fp32": blockwise}
"""Exactly, and in fp32 block by block: two members of most classes."""


@dataclass(frozen=True)
class Operand:
    """Weights of one slot as blocks need them: values without scales, and scale exponents."""

    values: F64
    """(n, I) of w2 at the wanted channels."""
    exponent: npt.NDArray[np.int32]
    """(n, I/32), unbiased."""

    @classmethod
    def of(cls, slot: Slot) -> Operand:
        values = weight_values(slot.down.packed, slot.down.sf)[1]
        return cls(values, slot.down.sf.astype(np.int32) - 127)


def _blocks13(slot: Slot) -> F64:
    return slot.blocks


def _halves(sums: F64, contract: Contract = BASE) -> tuple[F32, F32]:
    first, second = np.split(bf16_decode(bf16_round(sums)), 2)
    return (first, second) if contract.gate_up_order.value == "gate-up" else (second, first)


def _clamp(
    gate: F32, up: F32, clamp: float | None, contract: Contract = BASE, name: str = "swiglu"
) -> tuple[F32, F32]:
    bits = bf16_round(gate), bf16_round(up)
    if clamp is None:
        return gate, up
    pairs = zip(bits, (gate, up), strict=True)
    if all(np.array_equal(bf16_decode(b), v, equal_nan=True) for b, v in pairs):
        low, high = swiglu.clamp_gate_up(*bits, Activation(name, clamp, 1.0, 0.0, True), contract)
        return bf16_decode(low), bf16_decode(high)
    bound = _bound(clamp)  # of a way that does not round to bfloat16
    return np.fmin(gate, bound), np.fmin(np.fmax(up, -bound), bound)


def _bound(clamp: float) -> np.float32:
    bound: np.float32 = bf16_decode(bf16_round(np.array([clamp], np.float32)))[0]
    return bound


_PLAIN: Final = Form("swiglu", "fast", 1.0, 0.0, None, "")


def _silu(gate: F32, form: Form = _PLAIN) -> F32:
    """By the reference table where the gate is a bfloat16, plain silu in fp32 where it is not."""
    exact = gate_table(form)[bf16_round(gate)]
    wide = gate / (np.float32(1) + np.exp(-gate.astype(np.float64)).astype(np.float32))
    return np.where(bf16_decode(bf16_round(gate)) == gate, exact, wide.astype(np.float32))


def _product(silu: F32, up: F32, weight: np.float32, contract: Contract = BASE) -> F32:
    return (silu * up) * weight if contract.routing_weight.value == "activation" else silu * up


def _exponent(amax: F32, contract: Contract = BASE) -> npt.NDArray[np.int32]:
    return swiglu.requant_exponent(amax, contract).astype(np.int32)


def _codes(values: F32, exponent: npt.NDArray[np.int32], contract: Contract = BASE) -> U8:
    return scaled_codes(values, exponent, contract)


def _blocks2(codes: U8, exponent: U8, operand: Operand) -> F64:
    """``(I/32, n)`` exact block sums."""
    x = E4M3_TABLE[codes]
    blocks = (operand.values * x).reshape(len(operand.values), -1, GROUP).sum(axis=2)
    return np.ldexp(blocks, operand.exponent + exponent.astype(np.int32) - 127).T


def _row(sums: F64, weight: np.float32) -> F32:
    del weight
    return bf16_decode(bf16_round(sums))


def _combine(rows: list[F32], life: Life | None = None, contract: Contract = BASE) -> U16:
    """Rows of the live slots, in fp32; ``life`` has their weights where the contract adds them."""
    if life is not None and life.is_special:
        bits = {s.slot: bf16_round(row) for s, row in zip(life.slots, rows, strict=True)}
        return combine_rows(life.token, life.channels, bits, bits, contract)[0]
    total = np.zeros_like(rows[0]) if rows else np.zeros(0, np.float32)
    weighted = life is not None and contract.routing_weight.value == "combine"
    weights = [slot.weight for slot in life.slots] if weighted and life else [None] * len(rows)
    pairs = list(zip(rows, weights, strict=False))
    for row, weight in pairs if contract.combine_order.value == "ascending-slot" else pairs[::-1]:
        total = total + row if weight is None else fma(row, np.full(1, weight, np.float32), total)
    return bf16_round(total)


@dataclass(frozen=True)
class Way:
    """One way to compute the layer, step by step."""

    name: str = "as the contract says"
    stage: str = ""
    contract: Contract = BASE
    """Of the steps that are not replaced."""
    blocks13: Callable[[Slot], F64] = _blocks13
    halves: Callable[[F64], tuple[F32, F32]] = _halves
    clamp: Callable[[F32, F32, float | None], tuple[F32, F32]] = _clamp
    silu: Callable[[F32], F32] = _silu
    up: Callable[[F32], F32] = lambda u: u
    product: Callable[[F32, F32, np.float32], F32] = _product
    values: Callable[[F32], F32] = lambda v: v
    exponent: Callable[[F32], npt.NDArray[np.int32]] = _exponent
    codes: Callable[[F32, npt.NDArray[np.int32]], U8] = _codes
    blocks2: Callable[[U8, U8, Operand], F64] = _blocks2
    row: Callable[[F64, np.float32], F32] = _row
    combine: Callable[[list[F32]], U16] = _combine
    total: Total | None = None
    """How sums are accumulated, where that is the deviation."""


def right(life: Life, contract: Contract | None = None) -> Way:
    """Every step as the contract says, by default that of ``life``."""
    c = contract or life.contract
    act = life.token.act
    form = form_of(act, c)
    rounded = c.bf16_before_requant.value
    return Way(
        contract=c,
        halves=lambda s: _halves(s, c),
        clamp=lambda g, u, clamp: _clamp(g, u, clamp, c, act.name),
        silu=lambda g: _silu(g, form),
        up=lambda u: u if up_table(form) is up_table(_PLAIN) else up_table(form)[bf16_round(u)],
        product=lambda s, u, w: _product(s, u, w, c),
        values=(lambda v: bf16_decode(bf16_round(v))) if rounded else (lambda v: v),
        exponent=lambda m: _exponent(m, c),
        codes=lambda v, e: _codes(v, e, c),
        combine=lambda rows: _combine(rows, life, c),
    )


@dataclass
class Run:
    """One token, computed in one way after another."""

    life: Life
    given: Mapping[int, tuple[U8, U8]] | None = None
    """Codes and exponents by slot, to start from instead of linear 1."""
    operands: dict[int, Operand] = field(default_factory=dict)

    def acts(self, way: Way, total: Total) -> dict[int, tuple[U8, U8]]:
        """Codes ``(I,)`` and exponents ``(I/32,)`` by slot."""
        out = dict(self.given or {})
        with np.errstate(all="ignore"):
            for slot in self.life.slots:
                if slot.slot in out:
                    continue
                sums = (way.total or total)(way.blocks13(slot))
                gate, up = way.clamp(*way.halves(sums), self.life.token.act.clamp)
                value = way.values(way.product(way.silu(gate), way.up(up), slot.weight))
                exponent = way.exponent(group_amax(value[None], way.contract)[0])
                codes = way.codes(value, exponent)
                codes = np.where(codes == 0x80, 0, codes).astype(np.uint8)
                out[slot.slot] = codes, np.clip(exponent, 0, 255).astype(np.uint8)
        return out

    def y(self, way: Way, total: Total) -> U16:
        """``(n,)`` bfloat16 bits."""
        acts, rows = self.acts(way, total), []
        with np.errstate(all="ignore"):
            for slot in self.life.slots:
                if slot.slot not in self.operands:
                    self.operands[slot.slot] = Operand.of(slot)
                blocks = way.blocks2(*acts[slot.slot], self.operands[slot.slot])
                rows.append(way.row((way.total or total)(blocks), slot.weight))
            if not rows and not self.life.is_special:
                return np.zeros(len(self.life.channels), np.uint16)
            return way.combine(rows)


# --- the catalogue ----------------------------------------------------------------------------


def _late13(axis: int) -> Callable[[Slot], F64]:
    def blocks(slot: Slot) -> F64:
        shift = np.roll(slot.sf13, 1, axis).astype(np.int32) - slot.sf13.astype(np.int32)
        return np.ldexp(slot.blocks, shift.T)

    return blocks


def _late2(axis: int) -> Callable[[U8, U8, Operand], F64]:
    def blocks(codes: U8, exponent: U8, operand: Operand) -> F64:
        late = replace(operand, exponent=np.roll(operand.exponent, 1, axis))
        return _blocks2(codes, exponent, late)

    return blocks


def _running(rounded: Callable[[F32], F32]) -> Total:
    def total(blocks: F64) -> F64:
        out = np.zeros(blocks.shape[1:], np.float32)
        for block in blocks.astype(np.float32):
            out = rounded(out + block)
        return out.astype(np.float64)

    return total


def _truncated(sums: F64) -> tuple[F32, F32]:
    bits = sums.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    gate, up = np.split(bits.view(np.float32), 2)
    return gate, up


def _bf16(values: F32) -> F32:
    return bf16_decode(bf16_round(values))


def _gate_below(gate: F32, up: F32, clamp: float | None) -> tuple[F32, F32]:
    gate, up = _clamp(gate, up, clamp)
    return (gate if clamp is None else np.fmax(gate, np.float32(-clamp))), up


def _up_clamped(bound: np.ufunc, sign: int) -> Callable[[F32, F32, float | None], Any]:
    """Up is clamped on one side only."""

    def clamped(gate: F32, up: F32, clamp: float | None) -> tuple[F32, F32]:
        one_side = up if clamp is None else bound(up, sign * _bound(clamp))
        return _clamp(gate, up, clamp)[0], one_side

    return clamped


def _after(sums: F64, weight: np.float32) -> F32:
    return _bf16((sums.astype(np.float32) * weight).astype(np.float32))


def _pairs(rows: list[F32]) -> U16:
    even, odd = (sum(rows[k::2], np.zeros_like(rows[0])) for k in (0, 1))
    return bf16_round(even + odd)


def _in_bf16(rows: list[F32]) -> U16:
    total = np.zeros_like(rows[0])
    for row in rows:
        total = _bf16(total + row)
    return bf16_round(total)


def _in_float64(rows: list[F32]) -> U16:
    return bf16_round(np.sum([row.astype(np.float64) for row in rows], axis=0))


def _toward_zero(values: F32, exponent: npt.NDArray[np.int32]) -> U8:
    return _codes((values * np.float32(1 - 2**-5)).astype(np.float32), exponent)


def _keeping(bits: int) -> Callable[[F32], F32]:
    mask = np.uint32(0xFFFFFFFF << (23 - bits) & 0xFFFFFFFF)
    return lambda v: (v.view(np.uint32) & mask).view(np.float32)


def _reciprocal(amax: F32) -> F32:
    return (amax * RECIP_448).astype(np.float32)


def catalogue(life: Life) -> list[Way]:
    """Every known deviation; one for each slot that may be lost."""
    made: list[tuple[str, str, Mapping[str, Any]]] = [
        ("weight scales are read one group late", "linear 1", {"blocks13": _late13(1)}),
        ("weight scales are read one row late", "linear 1", {"blocks13": _late13(0)}),
        ("the last block of K is lost", "linear 1", {"blocks13": lambda s: s.blocks[:-1]}),
        ("weight scales are read one group late", "linear 1 and 2",
         {"blocks13": _late13(1), "blocks2": _late2(1)}),
        ("weight scales are read one row late", "linear 1 and 2",
         {"blocks13": _late13(0), "blocks2": _late2(0)}),
        ("the last block of K is lost", "linear 1 and 2",
         {"blocks13": lambda s: s.blocks[:-1], "blocks2": lambda c, e, o: _blocks2(c, e, o)[:-1]}),
        ("weight scales are an octave too small", "linear 1 and 2",
         {"blocks13": lambda s: s.blocks / 2, "blocks2": lambda c, e, o: _blocks2(c, e, o) / 2}),
        ("sums are kept in bfloat16", "linear 1 and 2", {"total": _running(_bf16)}),
        ("sums keep 13 bits", "linear 1 and 2", {"total": _running(_keeping(13))}),
        ("gate and up are swapped", "SwiGLU", {"halves": lambda s: _halves(s)[::-1]}),
        ("gate and up are read interleaved", "SwiGLU",
         {"halves": lambda s: (lambda b: (b[0::2], b[1::2]))(bf16_decode(bf16_round(s)))}),
        ("gate and up are not rounded to bfloat16", "SwiGLU",
         {"halves": lambda s: tuple(np.split(s.astype(np.float32), 2))}),
        ("gate and up are truncated to bfloat16", "SwiGLU", {"halves": _truncated}),
        ("the clamp is missing", "clamp", {"clamp": lambda g, u, c: (g, u)}),
        ("the gate is clamped from below too", "clamp", {"clamp": _gate_below}),
        ("only the gate is clamped", "clamp", {"clamp": lambda g, u, c: (_clamp(g, u, c)[0], u)}),
        ("the gate is not clamped", "clamp", {"clamp": lambda g, u, c: (g, _clamp(g, u, c)[1])}),
        ("up is not clamped from below", "clamp",
         {"clamp": _up_clamped(np.fmin, 1)}),
        ("up is not clamped from above", "clamp",
         {"clamp": _up_clamped(np.fmax, -1)}),
        ("silu is missing", "silu", {"silu": lambda g: g}),
        ("relu stands for silu", "silu", {"silu": lambda g: np.maximum(g, np.float32(0))}),
        ("silu is rounded to bfloat16", "silu", {"silu": lambda g: _bf16(_silu(g))}),
        ("a sigmoid stands for silu", "silu",
         {"silu": lambda g: (1 / (1 + np.exp(-g.astype(np.float64)))).astype(np.float32)}),
        ("the routing weight is dropped", "routing weight", {"product": lambda s, u, w: s * u}),
        ("the routing weight is applied after requantisation", "routing weight",
         {"product": lambda s, u, w: s * u, "row": _after}),
        ("the routing weight is that of slot 0", "routing weight",
         {"product": lambda s, u, w: (s * u) * life.token.weights[0]}),
        ("the routing weight is rounded to bfloat16", "routing weight",
         {"product": lambda s, u, w: (s * u) * _bf16(np.array([w]))}),
        ("activations are rounded to bfloat16 before requantisation", "requantise",
         {"values": _bf16}),
        ("amax has a floor of 1e-4", "requantise",
         {"exponent": lambda m: _exponent(np.maximum(m, np.float32(1e-4)))}),
        ("the exponent has a floor of 105", "requantise",
         {"exponent": lambda m: np.maximum(_exponent(m), 105)}),
        ("the exponent is one too large", "requantise", {"exponent": lambda m: _exponent(m) + 1}),
        ("the exponent is rounded down", "requantise",
         {"exponent": lambda m: (_reciprocal(m).view(np.uint32) >> 23).astype(np.int32)}),
        ("amax is divided by 448, not multiplied by its reciprocal", "requantise",
         {"exponent": lambda m: ue8m0_ceil((m / np.float32(448)).astype(np.float32))}),
        ("codes are rounded toward zero", "requantise", {"codes": _toward_zero}),
        ("weight scales are read one group late", "linear 2", {"blocks2": _late2(1)}),
        ("weight scales are read one row late", "linear 2", {"blocks2": _late2(0)}),
        ("the last block of K is lost", "linear 2",
         {"blocks2": lambda c, e, o: _blocks2(c, e, o)[:-1]}),
        ("slot rows are not rounded to bfloat16", "linear 2",
         {"row": lambda s, w: s.astype(np.float32)}),
        ("slots are added in descending order", "combine",
         {"combine": lambda r: _combine(r[::-1])}),
        ("slots are added in pairs", "combine", {"combine": _pairs}),
        ("slots are added in bfloat16", "combine", {"combine": _in_bf16}),
        ("slots are added in float64", "combine", {"combine": _in_float64}),
        ("y is zero", "combine", {"combine": lambda r: np.zeros(r[0].shape, np.uint16)}),
    ]  # fmt: skip
    for at, slot in enumerate(life.slots):
        lost = {"combine": lambda r, at=at: _combine(r[:at] + r[at + 1 :] or [r[0] * 0])}
        made.append((f"slot {slot.slot} (expert {slot.expert}) is lost", "combine", lost))
    own = right(life)
    ways = [replace(own, name=name, stage=stage, **step) for name, stage, step in made]
    for other in REVISIONS.values():
        if other.differences(life.contract) and life.is_known_to(other):
            name = f"all is as contract {other.revision} says"
            ways.append(replace(right(life, other), name=name, stage="contract"))
    return ways
