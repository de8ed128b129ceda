"""One token computed for a few output channels only: the reference, and its certified intervals.

It uses the oracle's functions, as a golden does, and leaves out the work on which the wanted
elements do not depend. Slots are computed side by side in threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from megamoe.explain.blocks import row_blocks
from megamoe.explain.sources import Source, Token
from megamoe.oracle import swiglu
from megamoe.oracle.combine import Combine
from megamoe.oracle.gates import form_of, gate_bounds, gate_table
from megamoe.oracle.groups import group_amax, scaled_codes
from megamoe.oracle.linear import Blocks, Columns, Rows, block_sums
from megamoe.oracle.mlp import bf16_halves, class_interval, exact_total
from megamoe.oracle.spread import SpreadRows
from megamoe.oracle.staging import quantize
from megamoe.spec.accumulators import Accumulator, accumulator
from megamoe.spec.contract import Contract
from megamoe.spec.features import features_of
from megamoe.spec.formats import F32, U8, U16, bf16_round, e4m3_key

F64 = npt.NDArray[np.float64]
I16 = npt.NDArray[np.int16]
SHARED: Final = -1
"""The expert of the shared expert's slot."""
_OUTPUTS_AT_ONCE: Final = 3072
"""Rows of w13 at a time: few enough for the cache, enough to be worth a call."""


@dataclass(frozen=True)
class Down:
    """Linear 2 of one slot at the wanted channels, ``(n,)`` each."""

    packed: U8
    sf: U8
    exact: F64
    low: F64
    high: F64
    """The envelope of the class."""
    fixed_low: F64
    fixed_high: F64
    """The envelope if every code were the reference's: the freedom of accumulation alone."""
    row: U16
    row_low: U16
    row_high: U16


@dataclass(frozen=True)
class Slot:
    """One live slot: a row of linear 1, its activations, and linear 2.

    The fused shared expert is the slot after the last one, of the weight 1 and no expert, -1.
    """

    slot: int
    expert: int
    weight: np.float32
    packed: U8
    sf13: U8
    """w13 of the expert, ``(2I, H/2)`` and ``(2I, H/32)``; a shared one's ``(2S, H)``."""
    blocks: F64
    """(G, 2I) scaled block sums."""
    exact: F64
    low: F64
    high: F64
    """(2I,) sums of linear 1, gate first."""
    gate: U16
    up: U16
    """(I,) after the clamp."""
    value: F32
    exponent: U8
    codes: U8
    acts: swiglu.Activations
    exponent_low: U8
    exponent_high: U8
    key_low: I16
    key_high: I16
    """E4M3 keys, at the lowest exponent where that is not decided."""
    down: Down

    @property
    def open_codes(self) -> npt.NDArray[np.bool_]:
        """(I,) codes that the class leaves open."""
        open_group = np.repeat(self.exponent_low != self.exponent_high, 32)
        return (self.key_low != self.key_high) | open_group


@dataclass(frozen=True)
class Life:
    """One token, and some of its output channels."""

    at: int
    token: Token
    channels: npt.NDArray[np.int64]
    accumulator: Accumulator
    x: U8
    x_sf: U8
    slots: list[Slot]
    y: U16
    y_low: U16
    y_high: U16
    """(n,) bfloat16 bits."""
    contract: Contract

    @property
    def is_special(self) -> bool:
        """The combine takes more than the rows of routed slots in bfloat16."""
        shared = any(slot.expert == SHARED for slot in self.slots)
        return shared or self.token.dtype != "bf16" or self.token.output is not None

    def is_known_to(self, contract: Contract) -> bool:
        """``contract`` has a rule for all that the call asks."""
        token, shared = self.token, any(slot.expert == SHARED for slot in self.slots)
        features = features_of(token.act, token.dtype, shared, token.output is not None)
        return contract.takes(features)

    def ends(self, low: dict[int, U16], high: dict[int, U16]) -> tuple[U16, U16]:
        """Lowest and highest ``y`` of rows that are known as intervals."""
        return combine_rows(self.token, self.channels, low, high, self.contract)


def is_live(token: Token) -> npt.NDArray[np.bool_]:
    """(K,) slots that take part."""
    return (token.ids >= 0) & (token.ids < token.experts)


def combine_of(token: Token, channels: npt.NDArray[np.int64], contract: Contract) -> Combine:
    """The oracle's combine of one token at some channels."""
    output = None if token.output is None else token.output[channels][None]
    return Combine(is_live(token)[None], token.weights[None], contract, token.dtype, output)


def combine_rows(
    token: Token, channels: npt.NDArray[np.int64], low: dict[int, U16], high: dict[int, U16],
    contract: Contract,
) -> tuple[U16, U16]:  # fmt: skip
    """Lowest and highest ``y`` of rows by slot, ``(n,)`` each."""
    slots = len(token.ids)
    whole = np.zeros((2, 1, slots, len(channels)), np.uint16)
    shared = np.zeros((2, 1, len(channels)), np.uint16)
    for end, rows in enumerate((low, high)):
        for slot, row in rows.items():
            (shared if slot == slots else whole[:, :, slot])[end, 0] = row
    pair = (shared[0], shared[1]) if slots in low else None
    least, most = combine_of(token, channels, contract).ends(whole[0], whole[1], pair)
    return least[0], most[0]


def live(
    source: Source, at: int, channels: Sequence[int], class_name: str, contract: Contract,
    row: tuple[U8, U8] | None = None,
) -> Life:  # fmt: skip
    """The life of token ``at`` at ``channels``. ``ValueError`` for a token or channel that does not
    exist.

    If slot rows reach the combine as FP8, ``channels`` must be whole groups of 128. ``row``:
    codes ``(H,)`` and scale bytes ``(H/32,)`` that take the place of the right ones.
    """
    _check(source, at, channels)
    acc = accumulator(class_name)
    token = source.token(at)
    indices = np.array(channels, np.int64)
    if row is None:
        x, x_sf = (rows[0] for rows in quantize(token.hidden[None], contract))
    else:
        x, x_sf = row
    slots = np.flatnonzero(is_live(token)).tolist()
    if source.shared_w13() is not None:
        slots.append(len(token.ids))
    form = form_of(token.act, contract)
    gate_table(form), gate_bounds(form)  # computed once, not by every thread

    def one(slot: int) -> Slot:
        return _slot(source, token, slot, x, x_sf, indices, acc, contract)

    parts = side_by_side(one, slots)
    rows = [{s.slot: getattr(s.down, end) for s in parts} for end in ("row", "row_low", "row_high")]
    y, _ = combine_rows(token, indices, rows[0], rows[0], contract)
    low, high = combine_rows(token, indices, rows[1], rows[2], contract)
    return Life(at, token, indices, acc, x, x_sf, parts, y, low, high, contract)


def live_slot(source: Source, life: Life, slot: int, expert: int) -> Slot:
    """A slot of ``life`` as it would be if it went to ``expert``."""
    ids = life.token.ids.copy()
    ids[slot] = expert
    token = replace(life.token, ids=ids)
    operands = token, slot, life.x, life.x_sf, life.channels
    return _slot(source, *operands, life.accumulator, life.contract)


def side_by_side(one: Callable[[int], Any], items: Sequence[int]) -> list[Any]:
    """``one`` of each item, in a thread for each core; torch's own threads would be in the way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
            return list(pool.map(one, items))
    finally:
        torch.set_num_threads(threads)


def _check(source: Source, at: int, channels: Sequence[int]) -> None:
    if not 0 <= at < source.tokens:
        raise ValueError(f"token {at} is not there; the case has {source.tokens}, from 0 on")
    for channel in channels:
        if not 0 <= channel < source.hidden_size:
            raise ValueError(f"channel {channel} is not there; H is {source.hidden_size}")


def _slot(
    source: Source, token: Token, slot: int, x: U8, x_sf: U8, channels: npt.NDArray[np.int64],
    acc: Accumulator, contract: Contract,
) -> Slot:  # fmt: skip
    shared = source.shared_w13() if slot == len(token.ids) else None
    if shared is not None:
        expert, weight = SHARED, np.ones((1, 1), np.float32)
        packed, sf13 = shared
    else:
        expert, weight = int(token.ids[slot]), token.weights[slot : slot + 1, None]
        packed, sf13 = source.w13(expert)
    blocks, exact, low, high = linear1(x, x_sf, packed, sf13, acc)
    gate, up = swiglu.clamp_gate_up(*bf16_halves(exact, contract), token.act, contract)
    value = swiglu.activation(gate, up, weight, token.act, contract)
    exponent = swiglu.requant_exponent(group_amax(value, contract), contract)
    codes = scaled_codes(value, exponent, contract)
    codes = np.where(codes == 0x80, 0, codes).astype(np.uint8)
    gates, ups = zip(*(bf16_halves(e, contract) for e in (low, high)), strict=True)
    acts = swiglu.activation_interval(gates, ups, weight, token.act, contract)
    first, last = acts.exponents()
    key_low, key_high = acts.code_keys(first)
    second = source.w2(expert, channels) if shared is None else source.shared_w2(channels)
    down = _down(second, codes, exponent, acc, SpreadRows.unless_decided(acts))
    return Slot(
        slot, expert, weight[0, 0], packed, sf13, blocks, exact[0], low[0],
        high[0], gate[0], up[0], value[0], exponent[0], codes[0], acts, first[0], last[0],
        key_low[0], key_high[0], down,
    )  # fmt: skip


def linear1(x: U8, x_sf: U8, packed: U8, sf: U8, acc: Accumulator) -> tuple[F64, F64, F64, F64]:
    """Block sums ``(G, 2I)``; the exact sums and their interval, ``(1, 2I)`` each."""
    outputs, groups = sf.shape
    sums, whole = np.empty((groups, outputs)), np.empty((3, 1, outputs))
    row = Rows.of(x[None], x_sf[None])
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, outputs, _OUTPUTS_AT_ONCE):
            part = slice(start, start + _OUTPUTS_AT_ONCE)
            blocks = row_blocks(x, x_sf, packed[part], sf[part])
            exact = exact_total(blocks)
            columns = Columns.of(packed[part], sf[part])
            ends = class_interval(acc, blocks, exact, row, columns, None)
            sums[:, part] = blocks.low[:, 0]
            whole[:, :, part] = exact, *ends
    return sums, *whole


def _down(
    weights: tuple[U8, U8], codes: U8, exponent: U8, acc: Accumulator,
    spread: SpreadRows | None,
) -> Down:  # fmt: skip
    packed, sf = weights
    columns, rows = Columns.of(packed, sf), Rows.of(codes, exponent)
    with np.errstate(invalid="ignore", over="ignore"):
        blocks, exact = down_blocks(codes, exponent, packed, sf)
        point = class_interval(acc, blocks, exact, rows, columns, None)
        whole = point
        if spread is not None:
            whole = class_interval(acc, blocks, exact, rows, columns, {acc.name: spread})
    ends = (exact, *whole)
    return Down(packed, sf, exact[0], whole[0][0], whole[1][0], point[0][0], point[1][0],
                *(bf16_round(end[0]) for end in ends))  # fmt: skip


def down_blocks(codes: U8, exponent: U8, packed: U8, sf: U8) -> tuple[Blocks, F64]:
    """Blocks and exact sums of ``(1, I)`` codes with rows of w2."""
    rows = Rows.of(codes, exponent)
    blocks = block_sums(rows, Columns.of(packed, sf))
    return blocks, exact_total(blocks)


def down_ends(codes: U8, exponent: U8, packed: U8, sf: U8, acc: Accumulator) -> tuple[F64, F64]:
    """The envelope of the sums of linear 2, ``(n,)``, from ``(I,)`` known codes."""
    with np.errstate(invalid="ignore", over="ignore"):
        blocks, exact = down_blocks(codes[None], exponent[None], packed, sf)
        rows, columns = Rows.of(codes[None], exponent[None]), Columns.of(packed, sf)
        low, high = class_interval(acc, blocks, exact, rows, columns, None)
    return low[0], high[0]


def code_interval(slot: Slot, exponent: U8) -> tuple[I16, I16]:
    """``(I,)`` lowest and highest key, given the exponents that a backend chose."""
    inside = np.clip(exponent, slot.exponent_low, slot.exponent_high)[None]
    low, high = slot.acts.code_keys(inside)
    return low[0], high[0]


def same_codes(codes: U8) -> I16:
    """Codes as keys: no output shows the sign of a zero code."""
    return e4m3_key(codes)
