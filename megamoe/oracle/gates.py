"""The functions of the gate and of the up projection: their values and their correct bounds.

Both are bfloat16, so each of these functions is a table of 65,536 entries. :func:`gate_table` and
:func:`up_table` hold the value with every operation rounded correctly; :func:`gate_bounds` and
:func:`up_bounds` enclose every result of the contract's instructions under the documented error of
each (``docs/numerics.md``, section SwiGLU). :mod:`megamoe.oracle.situ` has the tables of SiTU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megamoe.oracle import situ
from megamoe.oracle.elementary import (
    EXPF_ULPS,
    F64_SLACK,
    RCP_ULPS,
    ULP,
    bf16_values,
    exp_rounded,
    fast_exp_ulps,
)
from megamoe.spec.contract import Contract
from megamoe.spec.features import Activation
from megamoe.spec.formats import F32, F64, U16, bf16_decode, bf16_key


@dataclass(frozen=True)
class Form:
    """The functions of gate and up, and the instructions that compute them."""

    name: str
    """'swiglu' or 'situ'."""
    division: str
    """'fast', or how the precise sigmoid divides: 'g/d' or 'g*(1/d)'."""
    alpha: float
    beta: float
    most: float | None
    """Upper bound of the gated value."""
    tanh: str
    """The clause ``situ_tanh`` of the contract, for SiTU."""

    def fast(self) -> Form:
        """Whether instructions are approximate; their bounds include those of the precise ones."""
        return replace(self, division="fast")


def form_of(act: Activation, contract: Contract) -> Form:
    """The functions of an activation under ``contract``."""
    division = "fast" if act.fast_math else contract.precise_silu.value
    most = act.clamp if act.name == "swiglustep" else None
    if act.name == "situ":
        return Form("situ", division, act.alpha, act.beta, None, contract.situ_tanh.value)
    return Form("swiglu", division, act.alpha, act.beta, most, "")


def gate_table(form: Form) -> F32:
    """``(65536,)`` float32 by bf16 bits of the gate: the factor of up."""
    if form.name == "situ":
        return situ.gate_function(form.division, form.alpha, form.beta, form.tanh).point
    table = silu_table(form.division, form.alpha)
    return table if form.most is None else np.fmin(table, np.float32(form.most))


def up_table(form: Form) -> F32:
    """``(65536,)`` float32 by bf16 bits of up."""
    if form.name == "situ":
        return situ.up_function(form.division, form.alpha, form.beta, form.tanh).point
    return _plus(form.beta)


@cache
def _plus(beta: float) -> F32:
    up = bf16_values()
    with np.errstate(over="ignore", invalid="ignore"):
        return up if beta == 0 else up + np.float32(beta)


@cache
def gate_bounds(form: Form) -> Bounds:
    """The same, enclosed."""
    if form.name == "situ":
        return Bounds.of(*situ.gate_function(form.division, form.alpha, form.beta, form.tanh)[1:])
    low, high = silu_bounds(form.division, form.alpha)
    if form.most is not None:
        low, high = (np.fmin(end, np.float32(form.most)) for end in (low, high))
    return Bounds.of(low, high)


@cache
def up_bounds(form: Form) -> Bounds:
    """The same, enclosed."""
    if form.name == "situ":
        return Bounds.of(*situ.up_function(form.division, form.alpha, form.beta, form.tanh)[1:])
    table = up_table(form)  # one addition, which IEEE leaves no freedom
    return Bounds.of(table, table)


@cache
def silu_table(division: str, alpha: float = 1.0) -> F32:
    """``(65536,)`` float32 by bf16 bits: the form with every operation correctly rounded.

    ``e = fl(exp(-fl(alpha * g)))``, ``d = fl(1 + e)``, then ``fl(g / d)`` or ``fl(g * fl(1 / d))``:
    the contract's rounding points, so the point lies in the set of the form (the correctly rounded
    silu itself need not). The fast form has the point of 'g/d', which lies in its set.
    """
    gate = bf16_values()
    with np.errstate(all="ignore"):
        denominator = np.float32(1) + exp_rounded(-_scaled(gate, alpha).astype(np.float64))
        reciprocal = division == "g*(1/d)"
        table = gate * (np.float32(1) / denominator) if reciprocal else gate / denominator
    table.setflags(write=False)
    return table


def _scaled(gate: F32, alpha: float) -> F32:
    return gate if alpha == 1 else gate * np.float32(alpha)


@cache
def silu_bounds(division: str, alpha: float = 1.0) -> tuple[F32, F32]:
    """Two ``(65536,)`` float32 tables, lowest and highest silu of a correct kernel."""
    with np.errstate(all="ignore"):
        gates = bf16_values().astype(np.float64)
        argument = _scaled(bf16_values(), alpha).astype(np.float64)
        exp = np.exp(-argument)
        ulps = fast_exp_ulps(argument) if division == "fast" else np.full_like(gates, EXPF_ULPS)
        relative = ulps * ULP + F64_SLACK
        exp_low, exp_high = exp * (1 - relative), exp * (1 + relative)
        exp_low = np.where(exp_low < 2.0**-126, 0.0, np.maximum(exp_low, 0.0))  # may be flushed
        # One float64 step outwards first, so that rounding twice cannot move an end inwards.
        den_low = np.nextafter(1.0 + exp_low, -np.inf).astype(np.float32).astype(np.float64)
        den_high = np.nextafter(1.0 + exp_high, np.inf).astype(np.float32).astype(np.float64)
        if division == "fast":
            low = gates * (1 / den_low) * (1 + RCP_ULPS * ULP + F64_SLACK)
            high = gates * (1 / den_high) * (1 - RCP_ULPS * ULP - F64_SLACK)
        elif division == "g*(1/d)":  # each reciprocal is one fp32 division; the product is exact
            low = gates * (np.float32(1) / den_low.astype(np.float32)).astype(np.float64)
            high = gates * (np.float32(1) / den_high.astype(np.float32)).astype(np.float64)
        else:
            low, high = gates / den_low, gates / den_high
        # For a negative gate, low is the larger magnitude; for a positive gate, high is.
        low, high = np.minimum(low, high), np.maximum(low, high)
        # A reciprocal or a product below the normal range may be flushed to zero.
        zero = np.copysign(0.0, gates)
        tiny = (den_high > 2.0**126) | (np.abs(high) < 2.0**-126) | (np.abs(low) < 2.0**-126)
        low = np.where(tiny, np.minimum(low, zero), low)
        high = np.where(tiny, np.maximum(high, zero), high)
        # exp(90) overflows fp32 under any of the errors: g / inf is 0. Not flushing anywhere
        # would leave the true value, which is smaller than 1e-37.
        overflow = argument <= -90.0
        tail = gates / (1.0 + exp) * (1 + F64_SLACK)
        low = np.where(overflow, np.minimum(tail, zero), low)
        high = np.where(overflow, np.maximum(tail, zero), high)
        low32, high32 = low.astype(np.float32), high.astype(np.float32)
    infinite = np.isinf(gates)  # no freedom: the IEEE rules for infinity and 0
    low32[infinite] = high32[infinite] = silu_table(division, alpha)[infinite]
    return low32, high32


class Hull(NamedTuple):
    """Numbers from ``low`` to ``high``, and whether NaN is possible beside them.

    If only NaN is possible, both ends are NaN.
    """

    low: F32
    high: F32
    nan: npt.NDArray[np.bool_]

    def times(self, other: Hull) -> Hull:
        """All products, each rounded once: monotone in each factor, so the ends are at corners.

        0 times infinity is NaN. Where an infinite end belongs to an interval with numbers in it, 0
        times these is 0.
        """
        corners, maybe = [], self.nan | other.nan
        for a, x in zip(self[:2], self[1::-1], strict=True):
            for b, y in zip(other[:2], other[1::-1], strict=True):
                with np.errstate(over="ignore", invalid="ignore", under="ignore"):
                    corner = a * b
                numbers = ((a == 0) & (b != y)) | ((b == 0) & (a != x))
                invalid = np.isnan(corner) & ~np.isnan(a) & ~np.isnan(b)
                corners.append(np.where(invalid & numbers, np.float32(0), corner))
        with np.errstate(invalid="ignore"):
            for one, two in ((self, other), (other, self)):
                zero = (one.low <= 0) & (one.high >= 0)
                maybe = maybe | (zero & (np.isinf(two.low) | np.isinf(two.high)))
            low, high = np.fmin.reduce(corners), np.fmax.reduce(corners)
        return Hull(low, high, maybe | np.isnan(low))


@dataclass(frozen=True)
class Bounds:
    """A function of a bfloat16, known as an interval: its extremes over any run of arguments."""

    low: F32
    high: F32
    """``(65536,)`` by bf16 bits."""
    least: F32
    most: F32
    """``(17, n)``: extremes over 2**level arguments from the n-th on, in the order of values, of
    those that are numbers; +inf and -inf where none of them is a number."""
    nan: npt.NDArray[np.bool_]
    """``(17, n)``: whether one of them may have NaN."""

    @classmethod
    def of(cls, low: F32, high: F32) -> Bounds:
        """The bounds from the two tables."""
        bits = np.arange(65536, dtype=np.uint16)
        number = bits[~np.isnan(bf16_values())]
        at = _position(number)
        nan = np.isnan(low) | np.isnan(high)
        levels = []
        for table, pick, start in (
            (low, np.fmin, np.float32(np.inf)), (high, np.fmax, np.float32(-np.inf)),
            (nan, np.logical_or, False),
        ):  # fmt: skip
            row = np.full(at.max() + 1, start)
            pick.at(row, at, table[number])  # both zeros have one place
            rows = [row]
            for level in range(16):
                last, step = rows[-1], 1 << level
                shift = np.concatenate([last[step:], np.repeat(last[-1:], step)])
                rows.append(pick(last, shift))
            levels.append(np.stack(rows))
        return cls(low, high, *levels)

    def over(self, first: U16, last: U16) -> Hull:
        """Extremes over the arguments from ``first`` to ``last`` (bf16 bits, inclusive).

        A NaN argument has the table's value for it. Between two infinities the argument may be NaN
        as well (``docs/numerics.md``, 3.5).
        """
        start, end = _position(first), _position(last)
        level = np.frexp((end - start + 1).astype(np.float32))[1] - 1
        second = end - (1 << level) + 1
        low = np.minimum(self.least[level, start], self.least[level, second])
        high = np.maximum(self.most[level, start], self.most[level, second])
        maybe = self.nan[level, start] | self.nan[level, second]
        none = low > high
        low, high = (np.where(none, np.float32(np.nan), end) for end in (low, high))
        unbounded = (bf16_decode(first) == -np.inf) & (bf16_decode(last) == np.inf)
        if unbounded.any():  # of a NaN argument the table may say a number
            of_nan = self.low[0x7FC0], self.high[0x7FC0]
            maybe |= unbounded & bool(np.isnan(of_nan[0]))
            low = np.where(unbounded, np.fmin(low, of_nan[0]), low)
            high = np.where(unbounded, np.fmax(high, of_nan[1]), high)
        nan = np.isnan(bf16_decode(first)) | np.isnan(bf16_decode(last))
        if nan.any():
            low, high = np.where(nan, self.low[first], low), np.where(nan, self.high[first], high)
        return Hull(low, high, maybe | np.isnan(low))


_LOWEST = int(bf16_key(np.array([0xFF80], np.uint16))[0])
"""The key of -inf."""


def _position(bits: U16) -> npt.NDArray[np.int64]:
    """Place of a number in the order of values; any place for a NaN."""
    key = bf16_key(bits).astype(np.int64) - _LOWEST
    return np.clip(key, 0, -2 * _LOWEST)


__all__ = [
    "F64",
    "Bounds",
    "Form",
    "Hull",
    "form_of",
    "gate_bounds",
    "gate_table",
    "silu_bounds",
    "silu_table",
    "up_bounds",
    "up_table",
]  # fmt: skip
