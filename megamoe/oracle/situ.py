"""SiTU: ``alpha * tanh(g / alpha) * sigmoid(g)`` and ``beta * tanh(u / beta)``, as kernels have it.

Three forms are known (clause ``situ_tanh``). The points round every operation correctly; the
bounds carry an interval through the same operations, each end rounded by the same operation, which
is monotone, and widened where an instruction is approximate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from megamoe.oracle.elementary import (
    EXPF_ULPS,
    F64_SLACK,
    RCP_ULPS,
    TANH_APPROX,
    TANHF_ULPS,
    ULP,
    bf16_values,
    exp_rounded,
    fast_exp_ulps,
    tanh_rounded,
)
from megamoe.oracle.fused import fma
from megamoe.spec.formats import F32, F64

Span = tuple[F32, F32]
"""Lowest and highest."""


class Function(NamedTuple):
    """Three tables ``(65536,)`` float32 by bf16 bits: the point, and its two bounds."""

    point: F32
    low: F32
    high: F32


Ends = Span | tuple[np.float32, np.float32]
ONE, TWO = np.float32(1), np.float32(2)
QUOTIENT = (4.0, 25.0)
"""The scales for which the form 'quotient' has a formula of its own."""


@cache
def gate_function(division: str, alpha: float, beta: float, form: str) -> Function:
    """The gate's function, ``alpha * tanh(g / alpha) * sigmoid(g)``."""
    return _function(_gate, division, alpha, beta, form)


@cache
def up_function(division: str, alpha: float, beta: float, form: str) -> Function:
    """The up projection's function, ``beta * tanh(u / beta)``."""
    return _function(_up, division, alpha, beta, form)


def _function(
    step: Callable[..., Span], division: str, alpha: float, beta: float, form: str
) -> Function:
    """The point and its bounds. Infinity and NaN have no freedom: IEEE decides their results."""
    point, _ = step(division, alpha, beta, form, point=True)
    low, high = step(division, alpha, beta, form, point=False)
    special = ~np.isfinite(bf16_values())
    low, high = np.fmin(low, point), np.fmax(high, point)
    low[special] = high[special] = point[special]
    return Function(point, low, high)


def _gate(division: str, alpha: float, beta: float, form: str, *, point: bool) -> Span:
    gate, scale = bf16_values(), np.float32(alpha)
    with np.errstate(all="ignore"):
        if form == "sigmoid":
            tanh = _tanh_of_sigmoid(gate * (ONE / scale), division, point)
            return _times(_times(tanh, (scale, scale)), _sigmoid(gate, division, point))
        if form == "tanhf":
            tanh = _tanhf(gate / scale, point)
            return _times(_sigmoid(gate, division, point), _times((scale, scale), tanh))
        if (alpha, beta) == QUOTIENT:
            return _quotient(gate, division, point)
        tanh = _tanh_either(gate / scale, division, point)
        return _times(_times(tanh, (scale, scale)), _sigmoid(gate, division, point))


def _up(division: str, alpha: float, beta: float, form: str, *, point: bool) -> Span:
    up, scale = bf16_values(), np.float32(beta)
    with np.errstate(all="ignore"):
        if form == "sigmoid":
            tanh = _tanh_of_sigmoid(up * (ONE / scale), division, point)
        elif form == "tanhf":
            tanh = _tanhf(up / scale, point)
        elif division == "fast" and (alpha, beta) == QUOTIENT:
            tanh = _tanh_either(up * np.float32(0.04), division, point)
        else:
            tanh = _tanh_either(up / scale, division, point)
        return _times(tanh, (scale, scale))


def _quotient(gate: F32, division: str, point: bool) -> Span:
    """``2T(1+T)**2 / (1+T*T)``, T = tanh(g/4)."""
    low, high = _tanh_either(gate * np.float32(0.25), division, point)
    above = (low + ONE, high + ONE)
    top = _times((low + low, high + high), (above[0] * above[0], above[1] * above[1]))
    near = np.where((low <= 0) & (high >= 0), np.float32(0), np.fmin(np.abs(low), np.abs(high)))
    far = np.fmax(np.abs(low), np.abs(high))
    one = np.full_like(gate, ONE)
    bottom = (fma(near, near, one), fma(far, far, one))
    corners = [t / b for t in top for b in bottom]
    low, high = np.fmin.reduce(corners), np.fmax.reduce(corners)
    if point or division != "fast":
        return low, high
    return _widened((low, high), RCP_ULPS * ULP)


def _times(a: Ends, b: Ends) -> Span:
    corners = [x * y for x in a for y in b]
    return np.fmin.reduce(corners), np.fmax.reduce(corners)


def _widened(span: Span, relative: float) -> Span:
    """Both ends moved outwards by a relative error; a value that may be subnormal may become 0."""
    low, high = (end.astype(np.float64) for end in span)
    error = relative + F64_SLACK
    wide = low - np.abs(low) * error, high + np.abs(high) * error
    least, most = wide[0].astype(np.float32), wide[1].astype(np.float32)
    tiny = np.fmin(np.abs(least), np.abs(most)) < 2.0**-126
    return np.where(tiny, np.fmin(least, 0), least), np.where(tiny, np.fmax(most, 0), most)


def _tanhf(argument: F32, point: bool) -> Span:
    value = tanh_rounded(argument.astype(np.float64))
    if point:
        return value, value
    low, high = _widened((value, value), (TANHF_ULPS + 0.5) * ULP)
    return np.fmax(low, -ONE), np.fmin(high, ONE)


def _tanh_either(argument: F32, division: str, point: bool) -> Span:
    """tanhf, or in the fast form tanh.approx; the point of both is the correctly rounded one."""
    if point or division != "fast":
        return _tanhf(argument, point)
    value = tanh_rounded(argument.astype(np.float64))
    low, high = _widened((value, value), TANH_APPROX + ULP)
    return np.fmax(low, -ONE), np.fmin(high, ONE)


def _tanh_of_sigmoid(argument: F32, division: str, point: bool) -> Span:
    """``2 * sigmoid(2x) - 1``: twice is exact, the difference is rounded."""
    low, high = _sigmoid(TWO * argument, division, point)
    return TWO * low - ONE, TWO * high - ONE


def _sigmoid(argument: F32, division: str, point: bool) -> Span:
    """``1 / (1 + exp(-x))``, by rcp.approx of __expf in the fast form."""
    wide: F64 = argument.astype(np.float64)
    if point:
        value = ONE / (ONE + exp_rounded(-wide))
        return value, value
    exp = np.exp(-wide)
    ulps = fast_exp_ulps(wide) if division == "fast" else np.full_like(wide, EXPF_ULPS)
    relative = ulps * ULP + F64_SLACK
    exp_low = np.fmax(exp * (1 - relative), 0.0)
    exp_low = np.where(exp_low < 2.0**-126, 0.0, exp_low)  # may be flushed
    den_low = np.nextafter(1.0 + exp_low, -np.inf).astype(np.float32)
    den_high = np.nextafter(1.0 + exp * (1 + relative), np.inf).astype(np.float32)
    low, high = ONE / den_high, ONE / den_low
    # exp may overflow in one kernel and not in another: the sigmoid is 0, or as small as it is.
    far = wide <= -85.0
    high = np.where(far, np.fmax(high, (2 / (1.0 + exp)).astype(np.float32)), high)
    low = np.where(far, np.float32(0), low)
    return (low, high) if division != "fast" else _widened((low, high), RCP_ULPS * ULP)
