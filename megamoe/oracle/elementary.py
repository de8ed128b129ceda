"""Exponential and hyperbolic tangent in fp32: the correctly rounded value, and documented errors.

Only these are no IEEE operations. They are evaluated in float64 and, where that lies too near a
rounding boundary of fp32 to decide, again in decimal, so no entry of a table depends on a platform.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Context, Decimal

import numpy as np

from megamoe.spec.formats import F32, F64, bf16_decode

EXPF_ULPS = 2.0
"""Error allowed to expf. CUDA documents 1, glibc and SLEEF about 1."""
RCP_ULPS = 1.0
"""Error of rcp.approx.ftz.f32 (PTX ISA)."""
TANHF_ULPS = 2.0
"""Error allowed to tanhf. CUDA documents 1."""
TANH_APPROX = 2.0**-11
"""Relative error of tanh.approx.f32 (PTX ISA), which __tanhf is."""
ULP = 2.0**-23
"""An ulp is at most this fraction of a normal fp32 number."""
F64_SLACK = 2.0**-48
"""Covers the error of the float64 evaluation itself: a few units of 2**-53."""


def bf16_values() -> F32:
    """``(65536,)`` float32: the value of every bfloat16, by its bits."""
    return bf16_decode(np.arange(65536, dtype=np.uint16))


def fast_exp_ulps(argument: F64) -> F64:
    """Documented error of ``__expf(argument)`` in ulps: 2 + floor(abs(1.173 * argument)).

    None at infinity, where the result is 0 or infinity.
    """
    return np.where(np.isinf(argument), 0.0, 2.0 + np.floor(np.abs(1.173 * argument)))


def exp_rounded(argument: F64) -> F32:
    """``(n,)`` float64 to exp rounded once to fp32, subnormals and overflow included."""
    return _rounded(argument, np.exp, _exp_decimal)


def tanh_rounded(argument: F64) -> F32:
    """``(n,)`` float64 to tanh rounded once to fp32."""
    return _rounded(argument, np.tanh, _tanh_decimal)


def _rounded(argument: F64, wide: np.ufunc, exactly: Callable[[Decimal], Decimal]) -> F32:
    with np.errstate(all="ignore"):
        value = wide(argument)
        out = value.astype(np.float32)
        low = (value * (1 - F64_SLACK)).astype(np.float32)
        high = (value * (1 + F64_SLACK)).astype(np.float32)
    for index in np.flatnonzero((low != high) & np.isfinite(argument)):
        # 60 digits always decide: the value at a rational other than 0 is transcendental, so it
        # is never half-way between two fp32 numbers.
        middle = (Decimal(float(low[index])) + Decimal(float(high[index]))) / 2
        above = exactly(Decimal(float(argument[index]))) > middle
        out[index] = max(low[index], high[index]) if above else min(low[index], high[index])
    return out


def _exp_decimal(argument: Decimal) -> Decimal:
    return Context(prec=60).exp(argument)


def _tanh_decimal(argument: Decimal) -> Decimal:
    context = Context(prec=120)  # e**2x - 1 loses the digits of a small x
    power = context.exp(argument * 2)
    return context.divide(context.subtract(power, Decimal(1)), context.add(power, Decimal(1)))
