"""Classes of groups: the branch that computes a scale factor, and the rounding of each code."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.oracle.groups import group_amax
from megamoe.oracle.staging import quantize
from megamoe.oracle.swiglu import requant_exponent
from megamoe.spec.contract import Contract
from megamoe.spec.formats import E4M3_TABLE, F32, GROUP, U8, U16, bf16_decode

Mask = npt.NDArray[np.bool_]

# --- codes and bytes --------------------------------------------------------------------------


def hexes(values: Iterable[int]) -> list[str]:
    """``0x3f`` of each."""
    return [f"0x{v:02x}" for v in values]


CODES: Final = hexes([*range(0x80), *range(0x80, 0xFF)])
"""E4M3 codes that a cast gives: its NaN is 0x7f."""
BYTES: Final = hexes(range(256))


def present(codes: npt.NDArray[Any], size: int = 256) -> npt.NDArray[np.intp]:
    """The values below ``size`` that occur, ascending."""
    return np.flatnonzero(np.bincount(codes.reshape(-1), minlength=size))


def nibbles(packed: U8) -> list[str]:
    """``low 0x3``: E2M1 codes with their place in the byte."""
    bytes_ = present(packed)
    low, high = hexes_of_nibbles(bytes_ & 15), hexes_of_nibbles(bytes_ >> 4)
    return [f"low {n}" for n in low] + [f"high {n}" for n in high]


def hexes_of_nibbles(values: Iterable[int]) -> list[str]:
    """``0x3`` of each, once."""
    return sorted({f"0x{int(v):x}" for v in values})


@cache
def staging_bytes(contract: Contract) -> tuple[int, ...]:
    """Every byte that staging can give: by each bfloat16 number as amax of a group."""
    every = np.arange(0x7F81, dtype=np.uint16)
    _, sf = quantize(np.repeat(every[:, None], GROUP, axis=1), contract)
    return tuple(int(b) for b in present(sf))


@cache
def requant_bytes(contract: Contract) -> tuple[int, ...]:
    """Every byte that requantisation can give: by each fp32 exponent at the rule's edges."""
    fields = np.arange(256, dtype=np.uint32)[:, None] << 23
    bits = (fields | np.array([0, 1, 0x600000, 0x600001, 0x7FFFFF], np.uint32)).ravel()
    amax = bits[bits <= 0x7F800000].view(np.float32)
    return tuple(int(b) for b in present(requant_exponent(amax, contract)))


# --- branches of a scale ----------------------------------------------------------------------

BRANCHES: Final = {
    "zero": "A group of zeros gets a scale of zero, and NaN codes.",
    "NaN alone": "The amax of a group of NaN alone is taken for NaN.",
    "NaN beside numbers": "A NaN in a group reaches its amax.",
    "below the floor": "The floor is missing, or another number.",
    "infinite": "The scale of an infinite group is not held at the contract's byte.",
    "exact power": "A scale that is a power of two already is rounded up once more.",
    "one step above a power": "A scale barely above a power of two is rounded down.",
    "one step below a power": "A scale barely below a power of two is rounded to the one above it.",
    "rounded up": "A scale is rounded to the nearest power of two, or not at all.",
}
"""Branches that compute a scale byte, and the fault that can hide if no case enters one."""


def branch_goal(has_floor: bool) -> dict[str, str]:
    """The branches; without the floor where the contract has none."""
    return {name: f for name, f in BRANCHES.items() if has_floor or name != "below the floor"}


def staging_branches(hidden: U16, contract: Contract) -> set[str]:
    """Branches of the groups of ``(T, H)`` bfloat16 bits."""
    values = bf16_decode(hidden)
    amax = group_amax(values, contract)
    floor = np.float32(contract.staging_amax_floor.value)
    return _branches(values, amax, (amax < floor) & (amax > 0), step=1 << 16)


def requant_branches(acts: F32, contract: Contract) -> set[str]:
    """Branches of the groups of ``(R, I)`` fp32 activations."""
    amax = group_amax(acts, contract)
    least = contract.requant_exponent_min.value
    free = contract.variant("", "", requant_exponent_min=0)
    low = (requant_exponent(amax, free) < least) & (amax > 0)
    return _branches(acts, amax, low, step=1)


def _branches(values: F32, amax: F32, low: Mask, step: int) -> set[str]:
    """``step``: bits between one number of the format and the next."""
    nan = np.isnan(values).reshape(*amax.shape, GROUP)
    bits = np.ascontiguousarray(amax).view(np.uint32)
    mantissa = bits & 0x7FFFFF
    plain = (amax > 0) & np.isfinite(amax) & ~low & (bits >= 1 << 23)
    parts = {
        "NaN alone": nan.all(axis=-1),
        "NaN beside numbers": nan.any(axis=-1) & ~nan.all(axis=-1),
        "zero": (amax == 0) & ~nan.all(axis=-1),
        "below the floor": low,
        "infinite": np.isinf(amax),
        "exact power": plain & (mantissa == 0x600000),
        "one step above a power": plain & (mantissa == 0x600000 + step),
        "one step below a power": plain & (mantissa == 0x600000 - step),
        "rounded up": plain & (mantissa != 0x600000),
    }
    return {name for name, mask in parts.items() if mask.any()}


# --- rounding of codes ------------------------------------------------------------------------

_HOW: Final = ("exact", "down", "up", "tie down", "tie up")
_WORDS: Final = {
    "exact": "A number that E4M3 holds is changed.",
    "down": "Codes are rounded away from zero.",
    "up": "Codes are cut off.",
    "tie down": "Ties are rounded away from zero: half up in place of half to even.",
    "tie up": "Ties are rounded toward zero: half down in place of half to even.",
}


def rounding_goal() -> dict[str, str]:
    """Every way in which a code is rounded, of either sign."""
    goal: dict[str, str] = {}
    for sign in "+-":
        for region in ("normal", "subnormal"):
            goal |= {f"{sign}{region} {how}": _WORDS[how] for how in _HOW}
        goal |= {
            f"{sign}to zero": "A number below half of the least code does not become zero.",
            f"{sign}tie to zero": "Half of the least code becomes the least code.",
            f"{sign}saturated": "What is beyond 448 becomes NaN or wraps.",
        }
    goal["NaN"] = "NaN becomes a number, or another code than the contract's."
    return goal


def roundings(values: F32, sf: U8, codes: U8) -> set[str]:
    """The roundings of ``(..., C)`` numbers to ``codes`` under the bytes ``(..., C/32)``."""
    with np.errstate(invalid="ignore", over="ignore"):
        scale = np.repeat(127 - sf.astype(np.int32), GROUP, axis=-1)
        wide = np.ldexp(values.astype(np.float64), scale)
    plain = np.repeat(sf != 255, GROUP, axis=-1)
    nan = np.isnan(wide)
    size = np.where(nan, 0.0, np.abs(wide))
    code = np.where(nan, 0, codes & 0x7F).astype(np.int64)
    code = np.minimum(code, 0x7E)
    table = E4M3_TABLE[:0x7F]
    actual = table[code]
    other = np.where(
        size > actual, table[np.minimum(code + 1, 0x7E)], table[np.maximum(code - 1, 0)]
    )
    tie = (size != actual) & (2 * size == actual + other)
    how = np.where(size == actual, 0, np.where(size > actual, 1, 2)) + 2 * tie
    region = np.where(code > 7, 0, np.where(code > 0, 1, 2))
    index = 5 * region + how
    index = np.where(size > 448, 15, index)
    index = np.where(nan, 17, index)
    signed = 18 * np.signbit(wide) + index
    out = set()
    for at in present(signed[plain], 36):
        sign, kind = "+-"[at // 18], int(at) % 18
        if kind == 17:
            out.add("NaN")
        elif kind == 15:
            out.add(f"{sign}saturated")
        elif kind < 10:
            out.add(f"{sign}{('normal', 'subnormal')[kind // 5]} {_HOW[kind % 5]}")
        elif kind > 10:
            out.add(f"{sign}{'tie to zero' if kind > 12 else 'to zero'}")
    return out
