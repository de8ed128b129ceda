"""SwiGLU and requantisation: the reference point, and the set of correct results.

:mod:`megamoe.oracle.gates` has the functions of gate and up. ``docs/numerics.md``, section SwiGLU,
has the derivation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megamoe.oracle.gates import (
    Form,
    Hull,
    form_of,
    gate_bounds,
    gate_table,
    up_bounds,
    up_table,
)
from megamoe.oracle.groups import RECIP_448, group_amax, scaled_codes
from megamoe.spec.contract import Contract
from megamoe.spec.features import Activation
from megamoe.spec.formats import (
    F32,
    F64,
    GROUP,
    U8,
    U16,
    bf16_decode,
    bf16_round,
    e4m3_decode,
    e4m3_key,
    ue8m0_ceil,
)

I16 = npt.NDArray[np.int16]


def clamp_gate_up(gate: U16, up: U16, act: Activation, contract: Contract) -> tuple[U16, U16]:
    """The contract's clamp on bfloat16 bits: up on both sides, the gate from above at least.

    Where min and max return the operand that is a number, NaN becomes a bound. ``swiglustep``
    bounds the gated value in place of the gate.
    """
    if act.clamp is None:
        return gate, up
    bound = bf16_decode(bf16_round(np.array([act.clamp], dtype=np.float32)))[0]
    drops = contract.clamp_drops_nan.value
    least, most = (np.fmin, np.fmax) if drops else (np.minimum, np.maximum)
    with np.errstate(invalid="ignore"):
        new_up = least(most(bf16_decode(up), -bound), bound)
        if act.name == "swiglustep":
            return gate, bf16_round(new_up)
        new_gate = bf16_decode(gate)
        if contract.gate_clamped_below.value:
            new_gate = most(new_gate, -bound)
        new_gate = least(new_gate, bound)
    return bf16_round(new_gate), bf16_round(new_up)


def activation(gate: U16, up: U16, weight: F32, act: Activation, contract: Contract) -> F32:
    """``a`` in fp32 of clamped bfloat16 gate and up ``(R, I)`` and the weight ``(R, 1)``."""
    form = form_of(act, contract)
    return product(gate_table(form)[gate], up_table(form)[up], weight, contract)


def product(gated: F32, up: F32, weight: F32, contract: Contract) -> F32:
    """``(gated * up) * weight`` in fp32: two products, each rounded once. Broadcasts."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        value = gated * up
        if contract.routing_weight.value == "activation":
            value = value * weight
    return bf16_decode(bf16_round(value)) if contract.bf16_before_requant.value else value


def requant_exponent(amax: F32, contract: Contract) -> U8:
    """UE8M0 byte of a group from its amax, rounded up."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if contract.requant_scale.value == "bits":
            bits = np.ascontiguousarray(amax, np.float32).view(np.uint32)
            byte = ((bits + np.uint32(0x1FFFFF)) >> 23).astype(np.int32) - 8
        else:
            byte = ue8m0_ceil((amax * RECIP_448).astype(np.float32))
    return np.clip(byte, contract.requant_exponent_min.value, 255).astype(np.uint8)


@dataclass(frozen=True)
class Activations:
    """Interval of the fp32 activations before requantisation, ``(R, I)`` each, low <= high.

    If the value is NaN, both ends are NaN. If it may be NaN or a number, ``nan`` is true. An end at
    which ``high`` alone is NaN means the same (:meth:`open_ends`).
    """

    low: F32
    high: F32
    contract: Contract
    nan: npt.NDArray[np.bool_] | None = None
    """Elements that may be NaN; None: only elements whose ends are both NaN."""

    def exponents(self) -> tuple[U8, U8]:
        """Lowest and highest UE8M0 byte per group, ``(R, I/32)``."""
        smallest = np.where(
            (self.low <= 0) & (self.high >= 0),
            np.float32(0.0),
            np.minimum(np.abs(self.low), np.abs(self.high)),
        )
        if self.nan is not None:  # left out of the maximum
            smallest = np.where(self.nan & ~np.isnan(self.low), np.float32(0.0), smallest)
        largest = np.maximum(np.abs(self.low), np.abs(self.high))
        first, last = (
            requant_exponent(group_amax(end, self.contract), self.contract)
            for end in (smallest, largest)
        )
        if self.nan is not None and not self.contract.amax_drops_nan.value:
            amax = group_amax(np.where(self.nan, np.float32(np.nan), largest), self.contract)
            byte = requant_exponent(amax, self.contract)
            first, last = np.minimum(first, byte), np.maximum(last, byte)
        return first, last

    def open_ends(self) -> tuple[F32, F32]:
        """Both ends, the higher one NaN where the value may be: the highest key is a NaN's."""
        if self.nan is None:
            return self.low, self.high
        return self.low, np.where(self.nan, np.float32(np.nan), self.high)

    def code_keys(self, exponent: U8) -> tuple[I16, I16]:
        """Lowest and highest E4M3 code, as keys, given each group's exponent ``(R, I/32)``."""
        low, high = self.open_ends()
        return (
            e4m3_key(scaled_codes(low, exponent, self.contract)),
            e4m3_key(scaled_codes(high, exponent, self.contract)),
        )

    def dequantized(self, exponent: U8) -> tuple[F64, F64]:
        """Lowest and highest value of code times scale given each group's exponent."""
        scale = np.repeat(exponent.astype(np.int32) - 127, GROUP, axis=-1)
        low, high = (
            np.ldexp(e4m3_decode(scaled_codes(end, exponent, self.contract)), scale)
            for end in (self.low, self.high)
        )
        return low, high


def activation_interval(
    gate: tuple[U16, U16],
    up: tuple[U16, U16],
    weight: F32,
    act: Activation,
    contract: Contract,
    *,
    any_form: bool = False,
) -> Activations:
    """Interval of ``a`` from intervals of the bf16 gate and up ``(R, I)``, weight ``(R, 1)``.

    fl32 of a product is monotone in each factor, so the extremes of ``(gated * up) * weight``
    are among the rounded corner products (:meth:`Hull.times`). ``any_form`` allows the fast
    instructions' errors even where ``fast_math`` is off.
    """
    ends = [clamp_gate_up(g, u, act, contract) for g, u in zip(gate, up, strict=True)]
    form: Form = form_of(act, contract)
    form = form.fast() if any_form else form
    gated = gate_bounds(form).over(ends[0][0], ends[1][0])
    ups = up_bounds(form).over(ends[0][1], ends[1][1])
    product = gated.times(ups)
    if contract.routing_weight.value == "activation":
        product = product.times(Hull(weight, weight, np.isnan(weight)))
    low, high = product.low, product.high
    if contract.bf16_before_requant.value:
        low, high = (bf16_decode(bf16_round(end)) for end in (low, high))
    nan = product.nan & ~np.isnan(low)
    return Activations(
        low.astype(np.float32), high.astype(np.float32), contract, nan if nan.any() else None
    )


__all__ = [
    "RECIP_448", "Activations", "activation", "activation_interval", "clamp_gate_up", "product",
    "requant_exponent",
]  # fmt: skip
