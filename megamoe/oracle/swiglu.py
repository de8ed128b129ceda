"""SwiGLU and requantisation: the reference point, and everything a correct kernel may return.

A gate is a bfloat16, so there are 65,536 of them, and silu is a table. :func:`silu_table` is the
correctly rounded value; :func:`silu_bounds` encloses what the contract's instruction sequence can
return under the documented error of each instruction. The derivation is in ``docs/numerics.md``,
section SwiGLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Context, Decimal
from functools import cache

import numpy as np
import numpy.typing as npt

from megamoe.oracle.groups import RECIP_448, group_amax, scaled_codes
from megamoe.spec.contract import Contract
from megamoe.spec.formats import (
    F32,
    F64,
    GROUP,
    U8,
    U16,
    bf16_decode,
    bf16_key,
    bf16_round,
    e4m3_decode,
    e4m3_key,
    ue8m0_ceil,
)

I16 = npt.NDArray[np.int16]

EXPF_ULPS = 2.0
"""Error allowed to expf of the precise form. CUDA documents 1, glibc and SLEEF about 1."""
RCP_ULPS = 1.0
"""Error of rcp.approx.ftz.f32 (PTX ISA)."""
_ULP = 2.0**-23
"""An ulp is at most this fraction of a normal fp32 number."""
_F64_SLACK = 2.0**-48
"""Covers the error of the float64 evaluation itself: a few units of 2**-53."""


def fast_exp_ulps(gate: F64) -> F64:
    """Documented error of ``__expf(-gate)`` in ulps: 2 + floor(abs(1.173 * gate))."""
    return 2.0 + np.floor(np.abs(1.173 * gate))


def _gates() -> F64:
    with np.errstate(invalid="ignore"):  # widening a signalling NaN raises the flag
        return bf16_decode(np.arange(65536, dtype=np.uint16)).astype(np.float64)


def silu_form(fast_math: bool, contract: Contract) -> str:
    """'fast', or how the precise form divides: 'g/d' or 'g*(1/d)'."""
    return "fast" if fast_math else contract.precise_silu.value


@cache
def silu_table(form: str) -> F32:
    """``(65536,)`` float32 by bf16 bits: the form with every operation correctly rounded.

    ``e = fl(exp(-g))``, ``d = fl(1 + e)``, then ``fl(g / d)`` or ``fl(g * fl(1 / d))``: the
    contract's rounding points, so the point lies in the set of the form (the correctly rounded
    silu itself need not). The fast form has the point of 'g/d', which lies in its set. Only the
    exponential is not an IEEE operation: it is evaluated in float64, and where that lies too near
    a rounding boundary of fp32 to decide, again in decimal, so no entry depends on a platform.
    """
    gates = _gates()
    with np.errstate(all="ignore"):
        gate, denominator = gates.astype(np.float32), np.float32(1) + exp_rounded(-gates)
        reciprocal = form == "g*(1/d)"
        table = gate * (np.float32(1) / denominator) if reciprocal else gate / denominator
    table.setflags(write=False)
    return table


def exp_rounded(argument: F64) -> F32:
    """``(n,)`` float64 to exp rounded once to fp32, subnormals and overflow included."""
    with np.errstate(all="ignore"):
        wide = np.exp(argument)
        out = wide.astype(np.float32)
        low = (wide * (1 - _F64_SLACK)).astype(np.float32)
        high = (wide * (1 + _F64_SLACK)).astype(np.float32)
    for index in np.flatnonzero((low != high) & np.isfinite(argument)):
        out[index] = _exp_decimal(Decimal(float(argument[index])), low[index], high[index])
    return out


def _exp_decimal(argument: Decimal, low: np.float32, high: np.float32) -> np.float32:
    """Which of two neighbouring fp32 numbers is nearer to exp: 60 digits always decide, since
    exp of a non-zero rational is transcendental and so never half-way."""
    middle = (Decimal(float(low)) + Decimal(float(high))) / 2
    return high if Context(prec=60).exp(argument) > middle else low


@cache
def silu_bounds(form: str) -> tuple[F32, F32]:
    """Two ``(65536,)`` float32 tables, lowest and highest silu of a correct kernel, by bf16 bits.

    Along each monotone branch of silu the tables are made monotone (outwards), so the extremes
    over an interval of gates are at its ends or at the minimum near -1.278.
    """
    gates = _gates()
    with np.errstate(all="ignore"):
        exp = np.exp(-gates)
        ulps = fast_exp_ulps(gates) if form == "fast" else np.full_like(gates, EXPF_ULPS)
        relative = ulps * _ULP + _F64_SLACK
        exp_low, exp_high = exp * (1 - relative), exp * (1 + relative)
        exp_low = np.where(exp_low < 2.0**-126, 0.0, np.maximum(exp_low, 0.0))  # may be flushed
        # One float64 step outwards first, so that rounding twice cannot move an end inwards.
        den_low = np.nextafter(1.0 + exp_low, -np.inf).astype(np.float32).astype(np.float64)
        den_high = np.nextafter(1.0 + exp_high, np.inf).astype(np.float32).astype(np.float64)
        if form == "fast":
            low = gates * (1 / den_low) * (1 + RCP_ULPS * _ULP + _F64_SLACK)
            high = gates * (1 / den_high) * (1 - RCP_ULPS * _ULP - _F64_SLACK)
        elif form == "g*(1/d)":  # each reciprocal is one fp32 division; the product is exact here
            low = gates * (np.float32(1) / den_low.astype(np.float32)).astype(np.float64)
            high = gates * (np.float32(1) / den_high.astype(np.float32)).astype(np.float64)
        else:
            low, high = gates / den_low, gates / den_high
        # For a negative gate, low is the larger magnitude; for a positive one the other way round.
        low, high = np.minimum(low, high), np.maximum(low, high)
        # A reciprocal or a product below the normal range may be flushed to zero.
        tiny = (den_high > 2.0**126) | (np.abs(high) < 2.0**-126) | (np.abs(low) < 2.0**-126)
        low = np.where(tiny, np.minimum(low, 0.0), low)
        high = np.where(tiny, np.maximum(high, np.copysign(0.0, gates)), high)
        # exp(90) overflows fp32 under any of the errors: g / inf is -0. Not flushing anywhere
        # would leave the true value, which is smaller than 1e-37.
        gone = gates <= -90.0
        low = np.where(gone, gates / (1.0 + exp) * (1 + _F64_SLACK), low)
        high = np.where(gone, -0.0, high)
        low32, high32 = low.astype(np.float32), high.astype(np.float32)
    minus_infinity = np.isneginf(gates)  # -inf / inf, or -inf * 0: NaN in either form
    low32[minus_infinity] = high32[minus_infinity] = np.float32(np.nan)
    low32[np.isposinf(gates)] = high32[np.isposinf(gates)] = np.float32(np.inf)
    return _monotone(low32, high32)


def _monotone(low: F32, high: F32) -> tuple[F32, F32]:
    """Widen the tables so that each is monotone on both branches of silu."""
    bits = np.arange(65536, dtype=np.uint16)
    finite = np.flatnonzero(np.isfinite(bf16_decode(bits)))
    order = finite[np.argsort(bf16_key(bits[finite]), kind="stable")]
    split = int(np.searchsorted(bf16_key(order.astype(np.uint16)), bf16_key(SILU_ARGMIN)[0]))
    falling, rising = order[: split + 1], order[split:]
    low, high = low.copy(), high.copy()
    low[falling] = np.minimum.accumulate(low[falling])
    high[falling] = np.maximum.accumulate(high[falling][::-1])[::-1]
    low[rising] = np.minimum.accumulate(low[rising][::-1])[::-1]
    high[rising] = np.maximum.accumulate(high[rising])
    low.setflags(write=False)
    high.setflags(write=False)
    return low, high


SILU_ARGMIN: U16 = bf16_round(np.array([-1.278464543]))
"""The bfloat16 nearest to the minimum of silu, as bits, shape (1,)."""


def silu_range(gate_low: U16, gate_high: U16, form: str) -> tuple[F32, F32]:
    """Extremes of silu over the gates from ``gate_low`` to ``gate_high`` (bf16 bits, inclusive)."""
    table_low, table_high = silu_bounds(form)
    low = np.minimum(table_low[gate_low], table_low[gate_high])
    high = np.maximum(table_high[gate_low], table_high[gate_high])
    bottom = bf16_key(SILU_ARGMIN)[0]
    inside = (bf16_key(gate_low) <= bottom) & (bf16_key(gate_high) >= bottom)
    low = np.where(inside, np.minimum(low, table_low[SILU_ARGMIN[0]]), low)
    return low, high


def clamp_gate_up(gate: U16, up: U16, clamp: float | None, contract: Contract) -> tuple[U16, U16]:
    """The contract's clamp on bfloat16 bits: up on both sides, the gate from above at least.

    Where min and max return the operand that is a number, NaN becomes a bound.
    """
    if clamp is None:
        return gate, up
    bound = bf16_decode(bf16_round(np.array([clamp], dtype=np.float32)))[0]
    drops = contract.clamp_drops_nan.value
    least, most = (np.fmin, np.fmax) if drops else (np.minimum, np.maximum)
    with np.errstate(invalid="ignore"):
        new_gate = bf16_decode(gate)
        if contract.gate_clamped_below.value:
            new_gate = most(new_gate, -bound)
        new_gate = least(new_gate, bound)
        new_up = least(most(bf16_decode(up), -bound), bound)
    return bf16_round(new_gate), bf16_round(new_up)


def activation(silu: F32, up: U16, weight: F32, contract: Contract) -> F32:
    """``(silu * up) * weight`` in fp32: two products, each rounded once. Broadcasts."""
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        value = silu * bf16_decode(up)
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

    Where the value is NaN both ends are NaN.
    """

    low: F32
    high: F32
    contract: Contract

    def exponents(self) -> tuple[U8, U8]:
        """Lowest and highest UE8M0 byte per group, ``(R, I/32)``."""
        smallest = np.where(
            (self.low <= 0) & (self.high >= 0),
            np.float32(0.0),
            np.minimum(np.abs(self.low), np.abs(self.high)),
        )
        largest = np.maximum(np.abs(self.low), np.abs(self.high))
        first, last = (
            requant_exponent(group_amax(end, self.contract), self.contract)
            for end in (smallest, largest)
        )
        return first, last

    def code_keys(self, exponent: U8) -> tuple[I16, I16]:
        """Lowest and highest E4M3 code, as keys, given each group's exponent ``(R, I/32)``."""
        return (
            e4m3_key(scaled_codes(self.low, exponent, self.contract)),
            e4m3_key(scaled_codes(self.high, exponent, self.contract)),
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
    gate_low: U16,
    gate_high: U16,
    up_low: U16,
    up_high: U16,
    weight: F32,
    clamp: float | None,
    fast_math: bool,
    contract: Contract,
) -> Activations:
    """Interval of ``a`` from intervals of the bf16 gate and up ``(R, I)``, weight ``(R, 1)``.

    fl32 of a product is monotone in each factor, so the extremes of ``(silu * up) * weight``
    are among the rounded corner products.
    """
    gate_low, up_low = clamp_gate_up(gate_low, up_low, clamp, contract)
    gate_high, up_high = clamp_gate_up(gate_high, up_high, clamp, contract)
    silu_low, silu_high = silu_range(gate_low, gate_high, silu_form(fast_math, contract))
    corners = [
        activation(silu, up, weight, contract)
        for silu in (silu_low, silu_high)
        for up in (up_low, up_high)
    ]
    stacked = np.stack(corners)
    nan = np.isnan(stacked).any(axis=0)
    low = np.where(nan, np.float32(np.nan), np.minimum.reduce(stacked))
    high = np.where(nan, np.float32(np.nan), np.maximum.reduce(stacked))
    return Activations(low.astype(np.float32), high.astype(np.float32), contract)
