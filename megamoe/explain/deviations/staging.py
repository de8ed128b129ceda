"""Staging: from the hidden states to ``x`` and ``x_sf``, in known wrong ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from megamoe.explain.deviations.casts import CASTS, GROUPS, continuous_codes, regrouped
from megamoe.explain.deviations.rows import other_tokens, staged_row
from megamoe.explain.life import Life
from megamoe.explain.sources import Tokens
from megamoe.explain.ways import I32
from megamoe.oracle.groups import group_amax, scaled_codes
from megamoe.oracle.staging import quantize
from megamoe.spec.contract import REVISIONS, Contract
from megamoe.spec.formats import F32, GROUP, U8, bf16_decode, e4m3_cast, ue8m0_ceil

STAGE: Final = "staging"
_TOKENS_AT_MOST: Final = 1024
"""Tokens whose hidden states are read for a scale of the whole tensor."""
StagedRow = tuple[U8, U8]
"""Codes ``(H,)`` and scale bytes ``(H/32,)``."""


@dataclass(frozen=True)
class StagedWay:
    """A deviation of staging."""

    name: str
    row: Callable[[], StagedRow | None]
    """The staged tensors; None if the deviation does not apply to this token."""
    stage: str = STAGE


def catalogue(life: Life, source: Tokens) -> Iterator[StagedWay]:
    """Every deviation of staging that is known."""
    hidden, c = bf16_decode(life.token.hidden), life.contract
    for name, amax in _amaxes(hidden, c, source):
        yield StagedWay(name, partial(_by_amax, hidden, amax, c))
    for name, exponent in _exponents(c):
        yield StagedWay(name, partial(_by_exponent, hidden, exponent, c))
    for name, cast in CASTS.items():
        yield StagedWay(name, partial(_recast, life, cast))
    yield StagedWay(
        "the scale is amax / 448 itself, not a power of two", partial(_continuous, hidden, life)
    )
    for name, variant in _clauses(c):
        yield StagedWay(name, partial(_row, life, variant))
    with np.errstate(over="ignore", invalid="ignore"):
        half = hidden.astype(np.float16).astype(np.float32)
    yield StagedWay("hidden states go through fp16", partial(_quantize, half, _amax(half, c), c))
    yield StagedWay("the exponent is not clamped", partial(_without_clamp, hidden, c))
    yield StagedWay("a group of zeros has the scale byte 127", partial(_zero_groups, hidden, c))
    yield from _of_storage(life)
    yield from _zeros(life)
    for by, side in ((-1, "before"), (1, "after")):
        token = (life.at + by) % source.tokens
        if token != life.at:
            name = f"scale bytes are those of the token {side}; the first stands after the last"
            yield StagedWay(name, partial(_scales_of, life, source, token))
    for name, token in other_tokens(life, source):
        yield StagedWay(f"x is {name}", partial(staged_row, life, source, token))
    for other in REVISIONS.values():
        if other.differences(c):
            name = f"all is as contract {other.revision} says"
            yield StagedWay(name, partial(_row, life, other))


def _by_amax(hidden: F32, amax: Callable[[], F32], contract: Contract) -> StagedRow:
    return _quantize(hidden, amax(), contract)


def _by_exponent(hidden: F32, exponent: Callable[[F32], I32], contract: Contract) -> StagedRow:
    return _encode(hidden, exponent(_floor_amax(hidden, contract)), contract)


def _amax(hidden: F32, contract: Contract) -> F32:
    return group_amax(hidden[None], contract)[0]


def _floor_amax(hidden: F32, contract: Contract) -> F32:
    floor = np.float32(contract.staging_amax_floor.value)
    return np.maximum(_amax(hidden, contract), floor)


def _byte(amax: F32) -> I32:
    return ue8m0_ceil((amax / np.float32(448)).astype(np.float32))


def _quantize(hidden: F32, amax: F32, contract: Contract) -> StagedRow:
    """Scale bytes from an ``amax`` ``(H/32,)``, with the contract's floor where it is larger."""
    floor = np.float32(contract.staging_amax_floor.value)
    return _encode(hidden, _byte(np.maximum(amax, floor)), contract)


def _encode(hidden: F32, exponent: I32, contract: Contract) -> StagedRow:
    byte = np.clip(
        exponent, contract.staging_exponent_min.value, contract.staging_exponent_max.value
    )
    codes = scaled_codes(_clipped(hidden, contract)[None], byte[None], contract)[0]
    return codes, byte.astype(np.uint8)


def _clipped(hidden: F32, contract: Contract) -> F32:
    """Values for the cast: a contract that clips first makes 448 of NaN, as of infinity."""
    is_nan = contract.staging_clips.value & np.isnan(hidden)
    return np.where(is_nan, np.float32(np.inf), hidden)


def _zero_groups(hidden: F32, contract: Contract) -> StagedRow:
    byte = np.where(_amax(hidden, contract) == 0, 127, _byte(_floor_amax(hidden, contract)))
    return _encode(hidden, byte.astype(np.int32), contract)


def _without_clamp(hidden: F32, contract: Contract) -> StagedRow:
    byte = np.clip(_byte(_floor_amax(hidden, contract)), 0, 255)
    factor = np.ldexp(1.0, 127 - np.repeat(byte, GROUP))
    codes = e4m3_cast(
        _clipped(hidden, contract).astype(np.float64) * factor, contract.cast_saturates.value
    )
    return codes, byte.astype(np.uint8)


def _row(life: Life, contract: Contract) -> StagedRow:
    codes, sf = quantize(life.token.hidden[None], contract)
    return codes[0], sf[0]


def _recast(life: Life, cast: Callable[[F32, I32], U8]) -> StagedRow:
    hidden = _clipped(bf16_decode(life.token.hidden), life.contract)
    return cast(hidden, life.x_sf.astype(np.int32)), life.x_sf


def _continuous(hidden: F32, life: Life) -> StagedRow:
    amax = _floor_amax(hidden, life.contract)
    return continuous_codes(_clipped(hidden, life.contract), amax, life.contract), life.x_sf


def _amaxes(hidden: F32, c: Contract, source: Tokens) -> Iterator[tuple[str, Callable[[], F32]]]:
    """An amax of another group of values."""
    for name, of_groups in GROUPS.items():
        yield name, partial(of_groups, hidden, partial(_amax, contract=c))
    for size in (64, 128):
        yield f"amax is that of {size} values", partial(regrouped, _amax(hidden, c), size)
    signed = np.fmax.reduce(hidden.reshape(-1, GROUP), axis=1, initial=np.float32(0))
    yield "amax is taken without magnitudes", lambda: signed
    if source.tokens <= _TOKENS_AT_MOST:
        yield "a group's amax is that of all tokens", lambda: _over_tokens(source, c)
        yield "one scale holds for the whole tensor", lambda: _of_all(source, c)
    for shift, side in ((1, "before"), (-1, "after")):
        yield f"amax is that of the group {side}", partial(np.roll, _amax(hidden, c), shift)


def _of_all(source: Tokens, contract: Contract) -> F32:
    largest = np.float32(0)
    for token in range(source.tokens):
        amax = _amax(bf16_decode(source.token(token).hidden), contract)
        largest = np.fmax(largest, np.fmax.reduce(amax))
    return np.full(source.hidden_size // GROUP, largest, np.float32)


def _over_tokens(source: Tokens, contract: Contract) -> F32:
    rows = (bf16_decode(source.token(token).hidden) for token in range(source.tokens))
    return np.fmax.reduce([_amax(row, contract) for row in rows])


def _exponents(c: Contract) -> Iterator[tuple[str, Callable[[F32], I32]]]:
    """Another scale byte of the right amax."""
    scaled = np.float32(1 / 448)

    def nearest(amax: F32) -> I32:
        with np.errstate(divide="ignore"):
            return np.rint(np.log2(amax.astype(np.float64) / 448)).astype(np.int32) + 127

    yield "the exponent is rounded down", lambda m: _byte(m) - _is_inexact(m / np.float32(448))
    yield "the exponent is rounded to nearest", nearest
    yield (
        "the exponent is rounded up from a mantissa of 1.5 on",
        lambda m: (_bits(m / np.float32(448)) + 0x400000) >> 23,
    )
    yield "the exponent is one too large", lambda m: _byte(m) + 1
    yield "the exponent is one too small", lambda m: _byte(m) - 1
    yield (
        "an exact power of two is rounded up too",
        lambda m: _byte(m) + 1 - _is_inexact(m / np.float32(448)),
    )
    yield "the scale is amax / 240", lambda m: ue8m0_ceil((m / np.float32(240)).astype(np.float32))
    yield "the scale is amax / 256", lambda m: ue8m0_ceil((m / np.float32(256)).astype(np.float32))
    yield "amax is multiplied by 1/448, not divided by 448", lambda m: ue8m0_ceil(m * scaled)


def _bits(scale: F32) -> I32:
    return np.ascontiguousarray(scale, np.float32).view(np.uint32).astype(np.int32)


def _is_inexact(scale: F32) -> I32:
    return ((_bits(scale) & 0x7FFFFF) != 0).astype(np.int32)


def _clauses(c: Contract) -> Iterator[tuple[str, Contract]]:
    """One clause of the contract has another value."""

    def but(**values: object) -> Contract:
        return c.variant(c.revision, "a deviation", **values)

    for floor in (0.0, 1e-30, 1e-12, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4):
        if floor != c.staging_amax_floor.value:
            name = f"amax has a floor of {floor:g}" if floor else "amax has no floor"
            yield name, but(staging_amax_floor=floor)
    own = c.staging_amax_floor.value
    if own:
        yield "the scale has the floor that amax should have", but(staging_amax_floor=448 * own)
    yield (
        "the exponent's upper bound is one too small",
        but(staging_exponent_max=c.staging_exponent_max.value - 1),
    )
    if c.amax_drops_nan.value:
        yield "NaN counts in amax", but(amax_drops_nan=False)
    else:
        yield "NaN is left out of amax", but(amax_drops_nan=True)
    yield (
        "the exponent is not clamped, its factor's bits run over",
        but(staging_exponent_min=0, staging_exponent_max=255),
    )
    if c.staging_clips.value:
        yield "NaN is not clipped to 448", but(staging_clips=False)
    else:
        yield "values are clipped before the cast, NaN too", but(staging_clips=True)


def _of_storage(life: Life) -> Iterator[StagedWay]:
    """Right codes or right scale bytes, the other one not as it should be stored."""
    x, sf = life.x, life.x_sf
    words = sf.reshape(-1, 4)
    others = (
        ("the four bytes of a scale word are in reverse order", words[:, ::-1].ravel()),
        ("the two halves of a scale word are swapped", words[:, [2, 3, 0, 1]].ravel()),
        ("scale words are not written: zeros", np.zeros_like(sf)),
        ("scale bytes have a bias of 126", _shifted(sf, -1)),
        ("scale bytes have a bias of 128", _shifted(sf, 1)),
        ("scale bytes are those of the group before", np.roll(sf, 1)),
        ("scale bytes are those of the group after", np.roll(sf, -1)),
    )
    for name, bytes_ in others:
        yield StagedWay(name, partial(_both, x, bytes_))
    yield StagedWay("x is not written: zeros", lambda: (np.zeros_like(x), sf))
    yield StagedWay("neither is written: zeros", lambda: (np.zeros_like(x), np.zeros_like(sf)))
    pairs = x.reshape(-1, 2)[:, ::-1].ravel()
    yield StagedWay("codes are swapped in pairs", lambda: (pairs, sf))


def _zeros(life: Life) -> Iterator[StagedWay]:
    """Zero codes with another sign: only here, since no later stage shows it."""
    x, value = life.x, bf16_decode(life.token.hidden)
    minus = x == 0x80
    yield StagedWay(
        "-0 becomes +0", partial(_both, np.where(minus, 0, x).astype(np.uint8), life.x_sf)
    )
    small = np.where(minus & (value != 0), 0, x).astype(np.uint8)
    yield StagedWay(
        "a negative value that rounds to zero loses its sign", partial(_both, small, life.x_sf)
    )
    other = np.where(np.repeat(life.x_sf == 255, GROUP), x ^ 0x80, x).astype(np.uint8)
    yield StagedWay(
        "codes beside the scale byte 255 have the other sign", partial(_both, other, life.x_sf)
    )


def _scales_of(life: Life, source: Tokens, token: int) -> StagedRow:
    return life.x, staged_row(life, source, token)[1]


def _both(codes: U8, sf: U8) -> StagedRow:
    return codes, sf


def _shifted(sf: U8, by: int) -> U8:
    return np.clip(sf.astype(np.int32) + by, 0, 255).astype(np.uint8)
