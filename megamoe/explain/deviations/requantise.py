"""Requantisation: from fp32 activations to codes and scale bytes, in known wrong ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from megamoe.explain.deviations.casts import CASTS, GROUPS, continuous_codes, in_half, regrouped
from megamoe.explain.deviations.roundings import bits_of_fp32, flushed, tf32, truncated
from megamoe.explain.life import Life
from megamoe.explain.places import ZERO_SLOT
from megamoe.explain.ways import I32, Way, in_bf16, right
from megamoe.oracle.groups import RECIP_448, group_amax, scaled_codes
from megamoe.spec.contract import Contract
from megamoe.spec.formats import F32, GROUP, ue8m0_ceil

NO_CODES: Final = "codes are zero"


def catalogue(life: Life) -> Iterator[Way]:
    """Deviations of the amax, of the scale byte, and of the cast."""
    own, c = right(life), life.contract
    for name, steps in (*_before(), *_amaxes(c), *_exponents(own), *_casts(own, c)):
        yield own.variant(name, "requantise", **steps)


Deviation = tuple[str, dict[str, Any]]


def _before() -> Iterator[Deviation]:
    def without_nan(values: F32) -> F32:
        groups = values.reshape(*values.shape[:-1], -1, GROUP)
        has_nan = np.isnan(groups).any(axis=-1, keepdims=True)
        return np.where(has_nan, np.float32(0), groups).reshape(values.shape)

    yield "NaN makes its group zero", {"values": without_nan}
    yield "subnormal activations are flushed to zero", {"values": flushed}
    yield "activations are rounded to bfloat16 before requantisation", {"values": in_bf16}
    yield "activations are truncated to bfloat16 before requantisation", {"values": truncated}
    yield "activations are rounded to fp16 before requantisation", {"values": in_half}
    yield "activations are rounded to TF32 before requantisation", {"values": tf32}


def _amaxes(c: Contract) -> Iterator[Deviation]:
    def right_amax(values: F32) -> F32:
        return group_amax(values, c)

    def signed_amax(values: F32) -> F32:
        groups = values.reshape(*values.shape[:-1], -1, GROUP)
        return np.fmax.reduce(groups, axis=-1, initial=np.float32(0))

    drops = c.amax_drops_nan.value
    other = c.variant(c.revision, "a deviation", amax_drops_nan=not drops)
    yield "amax is taken without magnitudes", {"amax": signed_amax}
    yield (
        "infinity is left out of amax",
        {"amax": lambda v: right_amax(np.where(np.isinf(v), np.float32(0), v))},
    )
    yield (
        "NaN counts in amax" if drops else "NaN is left out of amax",
        {"amax": lambda v: group_amax(v, other)},
    )
    for size in (64, 128):
        yield (
            f"amax is that of {size} values",
            {"amax": lambda v, n=size: regrouped(right_amax(v), n)},
        )
    for name, of_groups in GROUPS.items():
        yield name, {"amax": lambda v, f=of_groups: f(v, right_amax)}
    for shift, side in ((1, "before"), (-1, "after")):
        yield (
            f"amax is that of the group {side}",
            {"amax": lambda v, n=shift: np.roll(right_amax(v), n, axis=-1)},
        )


def _scaled(amax: F32) -> F32:
    return (amax * RECIP_448).astype(np.float32)


def _nearest(amax: F32) -> I32:
    with np.errstate(divide="ignore", invalid="ignore"):
        exponent = np.rint(np.log2(_scaled(amax).astype(np.float64)))
    return np.nan_to_num(exponent, nan=128, posinf=128, neginf=-127).astype(np.int32) + 127


def _by_log2(amax: F32) -> I32:
    """The logarithm of amax / 448, rounded to fp32 and then up."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient = (amax / np.float32(448)).astype(np.float32)
        exponent = np.ceil(np.log2(quotient.astype(np.float64)).astype(np.float32))
    return np.nan_to_num(exponent, nan=128, posinf=128, neginf=-127).astype(np.int32) + 127


def _down(amax: F32) -> I32:
    return (_scaled(amax).view(np.uint32) >> 23).astype(np.int32)


def _bits(amax: F32) -> I32:
    return bits_of_fp32(amax).astype(np.int32)


def _by_bits(amax: F32, carry: int) -> I32:
    """The exponent of amax / 256, after ``carry`` was added to the bits of amax."""
    return ((_bits(amax).astype(np.int64) + carry) >> 23).astype(np.int32) - 8


_AT_448: Final = 0x600000
"""The mantissa of 448 * 2**k."""


def _at_limit(amax: F32, beyond: int) -> I32:
    """1 where amax lies ``beyond`` units above a 448 * 2**k."""
    return ((_bits(amax) & 0x7FFFFF) == _AT_448 + beyond).astype(np.int32)


def _exponents(own: Way) -> Iterator[Deviation]:
    def byte(amax: F32) -> I32:
        return own.exponent(amax)

    def floor_at(least: float) -> Callable[[F32], I32]:
        return lambda m: byte(np.maximum(m, np.float32(least)))

    floor = own.contract.requant_exponent_min.value

    def rounded(exponent: Callable[[F32], I32]) -> dict[str, Any]:
        """Another rounding, and the contract's floor."""
        return {"exponent": lambda m: np.maximum(exponent(m), floor or 0)}

    yield "the exponent is rounded down", rounded(_down)
    yield "the exponent is rounded to nearest", rounded(_nearest)
    yield "the exponent is the logarithm in fp32, rounded up", rounded(_by_log2)
    yield "the exponent is one too large", {"exponent": lambda m: byte(m) + 1}
    yield "the exponent is one too small", {"exponent": lambda m: byte(m) - 1}
    yield (
        "an exact power of two is rounded up too",
        {"exponent": lambda m: byte(m) + _at_limit(m, 0)},
    )
    yield (
        "one unit above a power of two is rounded down",
        {"exponent": lambda m: byte(m) - _at_limit(m, 1)},
    )
    yield (
        "the exponent is rounded up from a mantissa of 1.5 on",
        rounded(lambda m: (_bits(_scaled(m)) + 0x400000) >> 23),
    )
    yield "the exponent is that of amax / 256, rounded down", rounded(lambda m: _by_bits(m, 0))
    yield (
        "a subnormal scale is flushed before its exponent is taken",
        {"exponent": lambda m: ue8m0_ceil(flushed(_scaled(m)))},
    )
    yield (
        "a group of zeros has the scale byte 127",
        {"exponent": lambda m: np.where(m == 0, 127, byte(m)).astype(np.int32)},
    )
    yield "the exponent is at most 254", {"exponent": lambda m: np.minimum(byte(m), 254)}
    yield (
        "an infinite amax gives the exponent 255",
        {"exponent": lambda m: np.where(np.isinf(m), 255, byte(m)).astype(np.int32)},
    )
    for least in (1e-4, 1e-10, 1e-12):
        yield f"amax has a floor of {least:g}", {"exponent": floor_at(least)}
    if floor:
        yield (
            "the exponent's floor is one too large",
            {"exponent": lambda m: np.maximum(byte(m), floor + 1)},
        )
        yield (
            "the exponent's floor is one too small",
            {
                "exponent": lambda m: np.where(
                    byte(m) > floor, byte(m), _floor_exponent(own, m, floor - 1)
                )
            },
        )
    if floor != 105:
        yield "the exponent has a floor of 105", {"exponent": lambda m: np.maximum(byte(m), 105)}
    else:
        yield (
            "the exponent has no floor",
            {"exponent": lambda m: ue8m0_ceil(_scaled(m))},
        )
    yield "the exponent has a floor of 1", {"exponent": lambda m: np.maximum(byte(m), 1)}
    yield (
        "amax is divided by 448, not multiplied by its reciprocal",
        {"exponent": lambda m: ue8m0_ceil((m / np.float32(448)).astype(np.float32))},
    )
    for limit in (240, 256, 480):
        yield (
            f"the scale is amax / {limit}",
            {"exponent": lambda m, n=limit: ue8m0_ceil((m / np.float32(n)).astype(np.float32))},
        )


def _floor_exponent(own: Way, amax: F32, floor: int) -> I32:
    """The contract's exponent with another floor."""
    if own.contract.requant_scale.value == "bits":
        return np.maximum(_by_bits(amax, 0x1FFFFF), floor)
    return np.maximum(ue8m0_ceil(_scaled(amax)), floor)


def _casts(own: Way, c: Contract) -> Iterator[Deviation]:
    for name, cast in CASTS.items():
        yield name, {"codes": lambda v, e, m, f=cast: f(v, e)}
    yield (
        "the scale is amax / 448 itself, not a power of two",
        {"codes": lambda v, e, m: continuous_codes(v, m, c)},
    )
    for by, text in ((-1, "an octave larger"), (1, "an octave smaller")):
        yield (
            f"codes are {text} than their scale byte says",
            {"codes": lambda v, e, m, n=by: scaled_codes(v, e + n, c)},
        )
    for shift, side in ((1, "before"), (-1, "after")):
        yield (
            f"codes are scaled by the group {side}",
            {"codes": lambda v, e, m, n=shift: scaled_codes(v, np.roll(e, n, axis=-1), c)},
        )
    yield NO_CODES, {"codes": lambda v, e, m: np.zeros(v.shape, np.uint8)}
    yield (
        ZERO_SLOT,
        {
            "codes": lambda v, e, m: np.zeros(v.shape, np.uint8),
            "exponent": lambda m: np.zeros(m.shape, np.int32),
        },
    )
    yield "codes are swapped in pairs", {"codes": lambda v, e, m: _pairs(own.codes(v, e, m))}


def _pairs(codes: Any) -> Any:
    return codes.reshape(*codes.shape[:-1], -1, 2)[..., ::-1].reshape(codes.shape)
