"""Deviations of a linear's sums: how they are accumulated, and how gate and up come of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np

from megamoe.explain.deviations.roundings import BF16_ROUNDINGS
from megamoe.explain.ways import Total, halves, in_bf16
from megamoe.spec.formats import F32, F64, GROUP

Pair = tuple[F32, F32]


# --- gate and up --------------------------------------------------------------------------------


def _truncated(sums: F64) -> Pair:
    bits = sums.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    gate, up = np.split(bits.view(np.float32), 2, axis=-1)
    return gate, up


def _unrounded(sums: F64) -> Pair:
    gate, up = np.split(sums.astype(np.float32), 2, axis=-1)
    return gate, up


def _in_half(sums: F64) -> Pair:
    with np.errstate(over="ignore", invalid="ignore"):
        gate, up = np.split(sums.astype(np.float16).astype(np.float32), 2, axis=-1)
    return gate, up


def _by_parts(gate: bool) -> Callable[[F64], Pair]:
    """Only one of the two is rounded to bfloat16."""

    def read(sums: F64) -> Pair:
        wide, narrow = _unrounded(sums), halves(sums)
        return (narrow[0], wide[1]) if gate else (wide[0], narrow[1])

    return read


unrounded_gate: Final = _by_parts(False)
"""The gate in fp32, up in bfloat16."""


def _rounded(rounding: Callable[[F32], F32]) -> Callable[[F64], Pair]:
    def read(sums: F64) -> Pair:
        gate, up = np.split(in_bf16(rounding(sums.astype(np.float32))), 2, axis=-1)
        return gate, up

    return read


def _of_one(change: Callable[[F64], Pair], gate: bool) -> Callable[[F64], Pair]:
    """``change`` of one of the two alone: a last tile of columns may have up only."""

    def read(sums: F64) -> Pair:
        other, right = change(sums), halves(sums)
        return (other[0], right[1]) if gate else (right[0], other[1])

    return read


def _in_turn(run: int) -> Callable[[F64], Pair]:
    def read(sums: F64) -> Pair:
        rows = in_bf16(sums)
        rows = rows.reshape(*rows.shape[:-1], -1, 2, run)
        shape = (*sums.shape[:-1], sums.shape[-1] // 2)
        return rows[..., 0, :].reshape(shape), rows[..., 1, :].reshape(shape)

    return read


def _halves_of_turns(run: int) -> Callable[[F64], Pair]:
    """Rows of gate and up in turn by ``run``, cut in halves."""

    def read(sums: F64) -> Pair:
        rows = in_bf16(sums)
        rows = rows.reshape(*rows.shape[:-1], 2, -1, run).swapaxes(-2, -3).reshape(sums.shape)
        gate, up = np.split(rows, 2, axis=-1)
        return gate, up

    return read


LAST: Final = 128
"""Rows of the weights of linear 1 in a tile."""


def without_last(sums: F64) -> F64:
    """``(..., 2I)`` sums where nobody computes the last tile: the last of up are zero."""
    out = sums.copy()
    out[..., -LAST:] = 0
    return out


_NARROWINGS: Final[Mapping[str, Callable[[F64], Pair]]] = {
    "truncated to bfloat16": _truncated,
    "rounded to fp16": _in_half,
}
"""Of gate and up, or of one of them."""
GATE_UP: Final[Mapping[str, Callable[[F64], Pair]]] = {
    "gate and up are swapped": lambda s: halves(s)[::-1],
    "gate and up are read interleaved": _in_turn(1),
    "gate and up are read interleaved by 8": _in_turn(8),
    "gate and up are read interleaved by 16": _in_turn(16),
    "gate and up rows are in turn and are read as halves": _halves_of_turns(1),
    "gate and up rows are in turn by 8 and are read as halves": _halves_of_turns(8),
    "gate and up rows are in turn by 16 and are read as halves": _halves_of_turns(16),
    "gate and up are not rounded to bfloat16": _unrounded,
    **{f"gate and up are {how}": change for how, change in _NARROWINGS.items()},
    **{f"the gate is {how}": _of_one(change, True) for how, change in _NARROWINGS.items()},
    **{f"up is {how}": _of_one(change, False) for how, change in _NARROWINGS.items()},
    "the gate is not rounded to bfloat16": unrounded_gate,
    "up is not rounded to bfloat16": _by_parts(True),
    **{f"gate and up: {name}": _rounded(rounding) for name, rounding in BF16_ROUNDINGS.items()},
    **{
        f"{what} alone: {name}": _of_one(_rounded(rounding), what == "the gate")
        for name, rounding in BF16_ROUNDINGS.items()
        for what in ("the gate", "up")
    },
    "up is the gate": lambda s: (halves(s)[0], halves(s)[0]),
    "the gate is up": lambda s: (halves(s)[1], halves(s)[1]),
}


# --- accumulation -------------------------------------------------------------------------------


def _exactly(values: F32) -> F32:
    return values


def _running(
    rounded: Callable[[F32], F32], k: int = GROUP, of_block: Callable[[F32], F32] = _exactly
) -> Total:
    """Sums of ``k`` of K, each changed by ``of_block``, are added in fp32; the running sum is
    changed by ``rounded`` after each."""

    def total(blocks: F64) -> F64:
        starts = np.arange(0, len(blocks), k // GROUP)
        out = np.zeros(blocks.shape[1:], np.float32)
        for block in np.add.reduceat(blocks, starts, axis=0).astype(np.float32):
            out = rounded(out + of_block(block))
        return out.astype(np.float64)

    return total


def _in_fp16(values: F32) -> F32:
    return values.astype(np.float16).astype(np.float32)


def _keeping(bits: int) -> Callable[[F32], F32]:
    mask = np.uint32(0xFFFFFFFF << (23 - bits) & 0xFFFFFFFF)
    return lambda v: (v.view(np.uint32) & mask).view(np.float32)


def _flushed_blocks(blocks: F64) -> F64:
    return np.where(np.abs(blocks) < 2.0**-126, 0.0, blocks).sum(axis=0)


def _of_blocks() -> Iterator[tuple[str, Total]]:
    """Sums of some length of K that lose bits on their way from one block of K to the next."""
    for k in (32, 64, 128, 256):
        for name, rounded in (("bfloat16", in_bf16), ("fp16", _in_fp16)):
            if k > GROUP:  # of 32: the names without a length
                yield f"sums are kept in {name} after each {k} of K", _running(rounded, k)
            yield (
                f"the sum of each {k} of K is rounded to {name}",
                _running(_exactly, k, rounded),
            )


TOTALS_OFF: Final[Mapping[str, Total]] = {
    "subnormal sums of 32 are flushed to zero": _flushed_blocks,
    "sums are kept in bfloat16": _running(in_bf16),
    "sums are kept in fp16": _running(_in_fp16),
    "sums keep 13 bits": _running(_keeping(13)),
    "sums keep 10 bits": _running(_keeping(10)),
    **dict(_of_blocks()),
}
