"""The layer in steps that can be replaced one at a time.

A *way* computes one token. :func:`right` is the contract's way; a deviation replaces a step of it
(:mod:`megamoe.explain.deviations`). Steps between the linears work on arrays whose last axis is
the channel; any axes may stand before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.explain.instruction import blockwise
from megamoe.explain.life import SHARED, Life, Slot, combine_rows
from megamoe.explain.sources import Source
from megamoe.oracle import swiglu
from megamoe.oracle.fused import fma
from megamoe.oracle.gates import Form, form_of, gate_table, up_table
from megamoe.oracle.groups import group_amax, scaled_codes
from megamoe.spec.contract import BASE, Contract
from megamoe.spec.features import Activation
from megamoe.spec.formats import F32, F64, U8, U16, bf16_decode, bf16_round

I32 = npt.NDArray[np.int32]
Total = Callable[[F64], F64]
"""``(G, n)`` exact block sums to ``(n,)`` sums."""
TOTALS: Final[Mapping[str, Total]] = {"exact": lambda b: b.sum(axis=0), "fp32": blockwise}
"""Exactly, and in fp32 block by block: two members of most classes."""
PLAIN: Final = Form("swiglu", "fast", 1.0, 0.0, None, "")


@dataclass(frozen=True)
class Where:
    """The data of a deviation besides the operands: other tokens, experts and channels."""

    life: Life
    source: Source
    slot: Slot
    linear: int
    """1 or 2."""

    def weights(self, expert: int) -> tuple[U8, U8]:
        """Another expert's weights of this linear and their scale bytes."""
        if self.linear == 1:
            return self.source.w13(expert)
        return self.source.w2(expert, self.life.channels)

    def scales_of(self, row: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]) -> U8:
        """The scale bytes of other rows of the weights: ``row`` gives the index that is read for
        each index, modulo the rows."""
        if self.linear == 1:
            rows = len(self.slot.sf13)
            return self.slot.sf13[row(np.arange(rows)) % rows]
        channels = row(self.life.channels) % self.source.hidden_size
        if self.slot.expert == SHARED:
            return self.source.shared_w2(channels)[1]
        return self.source.w2(self.slot.expert, channels)[1]


@dataclass(frozen=True)
class Operands:
    """The operands of one linear for one slot: a row of codes, and rows of weights."""

    codes: U8
    """(C,) E4M3."""
    sf: U8
    """(C/32,) UE8M0 bytes."""
    packed: U8
    """(N, C/2) packed E2M1; of a shared expert (N, C) E4M3."""
    weight_sf: U8
    """(N, C/32) UE8M0 bytes."""
    where: Where
    late: tuple[Callable[[U8, U8], tuple[U8, U8]], ...] = ()
    """The change of ``packed`` and ``weight_sf`` after the choice of the wanted rows."""

    @classmethod
    def of(cls, life: Life, source: Source, slot: Slot, linear: int, codes: U8, sf: U8) -> Operands:
        """The operands of linear 1 or 2 of a slot besides a row of codes, by the contract."""
        where = Where(life, source, slot, linear)
        if linear == 1:
            return cls(codes, sf, slot.packed, slot.sf13, where)
        return cls(codes, sf, slot.down.packed, slot.down.sf, where)

    def select(self, rows: Any = None) -> tuple[U8, U8, U8, U8]:
        """Codes, scale bytes, and weights with scale bytes of some rows, or of all."""
        packed, weight_sf = self.packed, self.weight_sf
        if rows is not None:
            packed, weight_sf = packed[rows], weight_sf[rows]
        for change in self.late:
            packed, weight_sf = change(packed, weight_sf)
        return self.codes, self.sf, np.ascontiguousarray(packed), np.ascontiguousarray(weight_sf)


Reader = Callable[[Operands], Operands]


@dataclass(frozen=True)
class Scales:
    """A reader of other scale bytes, which leaves codes and weights as they are."""

    read: Reader

    def __call__(self, operands: Operands) -> Operands:
        return self.read(operands)


AFTER_CODES: Final = frozenset({"reads2", "row", "combine", "empty", "more"})
"""Steps that no code shows."""
Rows = Mapping[int, F32]
"""Values by slot, ``(n,)`` each."""


@dataclass(frozen=True)
class Way:
    """One way to compute the steps after staging."""

    halves: Callable[[F64], tuple[F32, F32]]
    clamp: Callable[[F32, F32], tuple[F32, F32]]
    silu: Callable[[F32], F32]
    up: Callable[[F32], F32]
    product: Callable[[F32, F32, F32], F32]
    values: Callable[[F32], F32]
    amax: Callable[[F32], F32]
    """``(..., I)`` to ``(..., I/32)``."""
    exponent: Callable[[F32], I32]
    codes: Callable[[F32, I32, F32], U8]
    """Values ``(..., I)``, scale bytes and amax ``(..., I/32)`` to codes."""
    row: Callable[[F64, np.float32], F32]
    combine: Callable[[Rows], U16]
    weight: Callable[[Slot], np.float32]
    contract: Contract
    name: str = "as the contract says"
    stage: str = ""
    weigh: Callable[[F64, F32], tuple[F32, F32]] | None = None
    """Stands for ``halves`` where the routing weight is applied before silu."""
    reads13: Reader | None = None
    reads2: Reader | None = None
    total: Total | None = None
    """The accumulation of sums, if that is the deviation."""
    empty: U16 = field(default_factory=lambda: np.zeros(1, np.uint16))
    """``y`` of a token without a slot."""
    more: Callable[[], list[Slot]] | None = None
    """Slots that take part although the contract says that they do not."""
    steps: frozenset[str] = field(default_factory=frozenset)
    """Names of the steps that are not the contract's."""

    def variant(self, name: str, stage: str, **steps: Any) -> Way:
        """A deviation from this way."""
        return replace(self, name=name, stage=stage, steps=frozenset(steps), **steps)

    @cached_property
    def changes_combine_only(self) -> bool:
        """Whether slot rows are the contract's."""
        return self.steps <= {"combine", "empty"}

    def gate_up(self, sums: F64, weights: F32) -> tuple[F32, F32]:
        """Gate and up of ``(S, ..., 2I)`` sums of slots with ``(S, 1)`` weights, clamped."""
        if self.weigh is None:
            return self.clamp(*self.halves(sums))
        of_slot = weights.reshape(-1, *[1] * (sums.ndim - 1))
        return self.clamp(*self.weigh(sums, of_slot))

    @cached_property
    def moves_codes(self) -> bool:
        """Whether a step up to the codes differs from the contract's."""
        return bool(self.steps - AFTER_CODES)

    @cached_property
    def code_steps(self) -> frozenset[tuple[str, int]]:
        """What gives the codes: ways with the same steps here show the same codes."""
        before = self.steps - AFTER_CODES
        return frozenset((name, id(getattr(self, name))) for name in before)

    @cached_property
    def moves_y(self) -> bool:
        """Whether a step after the codes differs from the contract's."""
        return bool(self.steps & {"reads2", "row", "combine", "empty", "more", "total"})


def right(life: Life, contract: Contract | None = None) -> Way:
    """Every step as the contract says, by default that of ``life``."""
    c = contract or life.contract
    act = life.token.act
    form = form_of(act, c)
    return Way(
        contract=c,
        halves=lambda s: halves(s, c),
        clamp=lambda g, u: clamped(g, u, act, c),
        silu=lambda g: silu(g, form),
        up=lambda u: u if up_table(form) is up_table(PLAIN) else up_table(form)[bf16_round(u)],
        product=lambda s, u, w: s * u * w if c.routing_weight.value == "activation" else s * u,
        values=in_bf16 if c.bf16_before_requant.value else lambda v: v,
        amax=lambda v: group_amax(v, c),
        exponent=lambda m: swiglu.requant_exponent(m, c).astype(np.int32),
        codes=lambda v, e, m: scaled_codes(v, e, c),
        row=lambda sums, w: in_bf16(sums),
        combine=lambda rows: combine_slots(rows, life, c),
        weight=lambda slot: slot.weight,
    )


# --- the contract's steps, for deviations to build on -------------------------------------------


def in_bf16(values: F32 | F64) -> F32:
    """Rounded to bfloat16, once."""
    return bf16_decode(bf16_round(values))


def halves(sums: F64, contract: Contract = BASE) -> tuple[F32, F32]:
    """Gate and up of ``(..., 2I)`` sums, rounded to bfloat16."""
    first, second = np.split(in_bf16(sums), 2, axis=-1)
    return (first, second) if contract.gate_up_order.value == "gate-up" else (second, first)


def clamped(gate: F32, up: F32, act: Activation, contract: Contract = BASE) -> tuple[F32, F32]:
    """The contract's clamp, also of values that are no bfloat16."""
    if act.clamp is None:
        return gate, up
    bits = bits_of(gate), bits_of(up)
    if bits[0] is not None and bits[1] is not None:
        low, high = swiglu.clamp_gate_up(bits[0], bits[1], act, contract)
        return bf16_decode(low), bf16_decode(high)
    bound = bound_of(act)
    return np.fmin(gate, bound), np.fmin(np.fmax(up, -bound), bound)


def bits_of(values: F32) -> U16 | None:
    """Bits of values that are all bfloat16; None where one is not."""
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return None if (words & 0xFFFF).any() else (words >> 16).astype(np.uint16)


def bound_of(act: Activation) -> np.float32:
    """The clamp's bound, which is a bfloat16."""
    bound: np.float32 = in_bf16(np.array([act.clamp], np.float32))[0]
    return bound


def silu(gate: F32, form: Form = PLAIN) -> F32:
    """Silu by the oracle's table for a bfloat16 gate, and in plain fp32 for any other gate."""
    bits = bits_of(gate)
    if bits is not None:
        return gate_table(form)[bits]
    exact = gate_table(form)[bf16_round(gate)]
    wide = gate / (np.float32(1) + np.exp(-gate.astype(np.float64)).astype(np.float32))
    return np.where(in_bf16(gate) == gate, exact, wide.astype(np.float32))


def combine_slots(rows: Rows, life: Life, contract: Contract) -> U16:
    """Slot rows as the contract adds them; a slot without a row is not added."""
    if life.is_special:
        bits = {slot: bf16_round(row) for slot, row in rows.items()}
        return combine_rows(life.token, life.channels, bits, bits, contract)[0]
    order = sorted(rows)
    if contract.combine_order.value != "ascending-slot":
        order.reverse()
    total = np.zeros(len(life.channels), np.float32)
    for slot in order:
        if contract.routing_weight.value == "combine":
            total = fma(rows[slot], np.full(1, life.token.weights[slot], np.float32), total)
        else:
            total = total + rows[slot]
    return bf16_round(total)
