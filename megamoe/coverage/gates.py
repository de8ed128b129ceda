"""Classes of gates: the region of silu, the side of the clamp, and special numbers."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.spec.features import Activation
from megamoe.spec.formats import F32, U16, bf16_decode, bf16_round

LOWEST: Final = -16
"""Octaves of a gate below this are one class: silu is half of the gate there."""
INFINITE_EXP: Final = 88.72
"""Below minus this, exp(-g) is infinite in fp32 and silu is -0."""

_FAULTS: Final = {
    "zero": "Silu of a zero is no zero, or loses its sign.",
    "subnormal": "Subnormal gates are flushed.",
    "tiny": "The quotient of a tiny gate loses its last bits.",
    "octave": "The exponential or the reciprocal is wrong in this octave.",
    "infinite": "A negative gate whose exponential is infinite gives NaN in place of zero.",
    "large": "Silu of a large gate is not the gate, or the exponential leaves fp32.",
    "inf": "An infinite gate gives NaN, or infinity where zero is right.",
    "nan": "A NaN of the gate is lost.",
}


def _regions() -> dict[str, str]:
    """Every region of a gate, in the order of magnitudes, with its fault."""
    out = {}
    for sign in "+-":
        out[f"{sign}0"] = _FAULTS["zero"]
        out[f"{sign}subnormal"] = _FAULTS["subnormal"]
        out[f"{sign}below 2^{LOWEST}"] = _FAULTS["tiny"]
        out |= {f"{sign}2^{n}": _FAULTS["octave"] for n in range(LOWEST, 7)}
        if sign == "-":
            out["-2^6, exp infinite"] = _FAULTS["infinite"]
        out[f"{sign}2^7 and above"] = _FAULTS["large"]
        out[f"{sign}inf"] = _FAULTS["inf"]
    return out | {"NaN": _FAULTS["nan"]}


REGIONS: Final = _regions()


@cache
def _region_of_bits() -> npt.NDArray[np.int64]:
    """``(65536,)`` index into :data:`REGIONS` by bfloat16 bits."""
    at = {name: index for index, name in enumerate(REGIONS)}
    values = bf16_decode(np.arange(65536, dtype=np.uint16)).tolist()
    return np.array([at[_region(bits, value)] for bits, value in enumerate(values)])


def _region(bits: int, value: float) -> str:
    sign, field = "-" if bits >> 15 else "+", bits >> 7 & 0xFF
    if field == 255:
        return "NaN" if bits & 0x7F else f"{sign}inf"
    if field == 0:
        return f"{sign}subnormal" if bits & 0x7F else f"{sign}0"
    octave = field - 127
    if octave < LOWEST:
        return f"{sign}below 2^{LOWEST}"
    if octave > 6:
        return f"{sign}2^7 and above"
    return "-2^6, exp infinite" if value < -INFINITE_EXP else f"{sign}2^{octave}"


def regions(gate: U16) -> set[str]:
    """Regions of clamped bfloat16 gates."""
    names = list(REGIONS)
    codes = np.flatnonzero(np.bincount(gate.reshape(-1), minlength=65536))
    return {names[i] for i in np.unique(_region_of_bits()[codes])}


# --- the clamp --------------------------------------------------------------------------------

CLAMPS: Final = {
    "no clamp": "A clamp is applied where none was asked for.",
    "clamp 0": "A clamp of 0 is taken for none.",
    "clamp that bfloat16 does not hold": "The clamp is not rounded to bfloat16 first.",
    "gate above": "The gate is not bounded from above.",
    "gate at the bound": "A gate of exactly the bound is changed.",
    "gate below minus the bound": "The gate is bounded from below too.",
    "gate between": "A gate inside the bounds is changed.",
    "gate infinite": "An infinite gate passes the clamp.",
    "gate NaN": "A NaN of the gate does not become the bound.",
    "up above": "The up projection is not bounded from above.",
    "up at the bound": "An up of exactly the bound is changed.",
    "up below": "The up projection is not bounded from below.",
    "up at minus the bound": "An up of exactly minus the bound is changed.",
    "up between": "An up inside the bounds is changed.",
    "up infinite": "An infinite up passes the clamp.",
    "up NaN": "A NaN of up does not become the bound.",
}
"""Sides of the clamp, and the fault that can hide if no case enters one."""


def clamp_sides(gate: U16, up: U16, act: Activation) -> set[str]:
    """Sides of the clamp that bfloat16 gates and ups, as linear 1 gave them, lie on."""
    if act.clamp is None:
        return {"no clamp"}
    clamp = np.array([act.clamp], np.float32)
    bound = bf16_decode(bf16_round(clamp))[0]
    out = {"clamp 0"} if bound == 0 else set()
    out |= {"clamp that bfloat16 does not hold"} if float(bound) != act.clamp else set()
    g, u = bf16_decode(gate), bf16_decode(up)
    with np.errstate(invalid="ignore"):
        parts = {
            "gate above": (g > bound) & np.isfinite(g), "gate at the bound": g == bound,
            "gate below minus the bound": (g < -bound) & np.isfinite(g),
            "gate between": np.abs(g) < bound, "gate infinite": np.isinf(g),
            "gate NaN": np.isnan(g),
            "up above": (u > bound) & np.isfinite(u), "up at the bound": u == bound,
            "up below": (u < -bound) & np.isfinite(u), "up at minus the bound": u == -bound,
            "up between": np.abs(u) < bound, "up infinite": np.isinf(u), "up NaN": np.isnan(u),
        }  # fmt: skip
    if act.name == "swiglustep":  # the gated value is bounded there
        parts = {name: mask for name, mask in parts.items() if name.startswith("up")}
    return out | {name for name, mask in parts.items() if mask.any()}


# --- specials ---------------------------------------------------------------------------------

SPECIALS: Final = ("+inf", "-inf", "NaN", "-0", "+0", "+subnormal", "-subnormal")


def special_bf16(bits: U16) -> list[str]:
    """Specials among bfloat16 bits."""
    codes = np.flatnonzero(np.bincount(bits.reshape(-1), minlength=65536)).astype(np.uint32)
    return special_f32((codes << 16).view(np.float32))


def special_f32(values: F32) -> list[str]:
    """Specials among fp32 numbers."""
    bits = np.ascontiguousarray(values).reshape(-1).view(np.uint32)
    field, rest, minus = bits >> 23 & 0xFF, bits & 0x7FFFFF, (bits >> 31).astype(bool)
    parts: dict[str, npt.NDArray[Any]] = {
        "+inf": (field == 255) & (rest == 0) & ~minus, "-inf": (field == 255) & (rest == 0) & minus,
        "NaN": (field == 255) & (rest != 0),
        "-0": (field == 0) & (rest == 0) & minus, "+0": (field == 0) & (rest == 0) & ~minus,
        "+subnormal": (field == 0) & (rest != 0) & ~minus,
        "-subnormal": (field == 0) & (rest != 0) & minus,
    }  # fmt: skip
    return [name for name in SPECIALS if parts[name].any()]
