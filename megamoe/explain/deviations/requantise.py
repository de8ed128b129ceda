"""Requantisation: from fp32 activations to codes and scale bytes, in known wrong ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megamoe.explain.deviations.casts import CASTS, GROUPS, continuous_codes, regrouped
from megamoe.explain.life import Life
from megamoe.explain.ways import I32, Way, in_bf16, right
from megamoe.oracle.groups import RECIP_448, group_amax, scaled_codes
from megamoe.spec.contract import Contract
from megamoe.spec.formats import F32, GROUP, ue8m0_ceil


def catalogue(life: Life) -> Iterator[Way]:
    """Deviations of the amax, of the scale byte, and of the cast."""
    own, c = right(life), life.contract
    for name, steps in (*_before(), *_amaxes(c), *_exponents(own), *_casts(own, c)):
        yield own.replaced(name, "requantise", **steps)


Named = tuple[str, dict[str, Any]]


def _before() -> Iterator[Named]:
    def in_half(values: F32) -> F32:
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(np.float16).astype(np.float32)

    yield "activations are rounded to bfloat16 before requantisation", {"values": in_bf16}
    yield "activations are rounded to fp16 before requantisation", {"values": in_half}


def _amaxes(c: Contract) -> Iterator[Named]:
    def right_amax(values: F32) -> F32:
        return group_amax(values, c)

    def signed(values: F32) -> F32:
        grouped = values.reshape(*values.shape[:-1], -1, GROUP)
        return np.fmax.reduce(grouped, axis=-1, initial=np.float32(0))

    drops = c.amax_drops_nan.value
    other = c.changed(c.revision, "a deviation", amax_drops_nan=not drops)
    yield "amax is taken without magnitudes", {"amax": signed}
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


def _down(amax: F32) -> I32:
    return (_scaled(amax).view(np.uint32) >> 23).astype(np.int32)


def _exponents(own: Way) -> Iterator[Named]:
    def byte(amax: F32) -> I32:
        return own.exponent(amax)

    def floored(least: float) -> Callable[[F32], I32]:
        return lambda m: byte(np.maximum(m, np.float32(least)))

    yield "the exponent is rounded down", {"exponent": _down}
    yield "the exponent is rounded to nearest", {"exponent": _nearest}
    yield "the exponent is one too large", {"exponent": lambda m: byte(m) + 1}
    yield "the exponent is one too small", {"exponent": lambda m: byte(m) - 1}
    yield "an exact power of two is rounded up too", {"exponent": lambda m: _down(m) + 1}
    for least in (1e-4, 1e-10, 1e-12):
        yield f"amax has a floor of {least:g}", {"exponent": floored(least)}
    if own.contract.requant_exponent_min.value != 105:
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


def _casts(own: Way, c: Contract) -> Iterator[Named]:
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
    yield "codes are zero", {"codes": lambda v, e, m: np.zeros(v.shape, np.uint8)}
    yield (
        "a slot is left out: codes and scale bytes are zero",
        {
            "codes": lambda v, e, m: np.zeros(v.shape, np.uint8),
            "exponent": lambda m: np.zeros(m.shape, np.int32),
        },
    )
    yield "codes are swapped in pairs", {"codes": lambda v, e, m: _pairs(own.codes(v, e, m))}


def _pairs(codes: Any) -> Any:
    return codes.reshape(*codes.shape[:-1], -1, 2)[..., ::-1].reshape(codes.shape)
