"""Silu of fp32 gates: the value, and the set of results of the contract's instructions.

Gates that are rounded to bfloat16 have tables (:mod:`megamoe.oracle.gates`); fp32 gates are too
many for one. The bound is one relative error over an interval (``docs/numerics.md``, section 13).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from megamoe.oracle.elementary import EXPF_ULPS, F64_SLACK, ULP, exp_rounded, fast_exp_ulps
from megamoe.oracle.gates import Hull
from megamoe.spec.formats import F32, F64

_LOWEST_AT: Final = -1.2784645427610738
_LOWEST: Final = -0.27846454276107380
"""Silu falls to this gate and rises from it on; its least value."""
_REST: Final = 3.0
"""Ulps of the sum, the reciprocal (1 where it is approximate), the product, and products of
errors."""
_FLUSH: Final = -87.0
"""From here down the reciprocal may be subnormal, and flushed to zero."""


def silu(gate: F32, division: str) -> F32:
    """``g * fl(1 / d)`` or ``g / d`` with ``d = fl(1 + fl(exp(-g)))``, each operation rounded
    correctly; ``division`` as the clause ``precise_silu`` has it."""
    with np.errstate(all="ignore"):
        power = exp_rounded(-gate.astype(np.float64).ravel()).reshape(gate.shape)
        below = np.float32(1) + power
        return gate / below if division == "g/d" else gate * (np.float32(1) / below)


def silu_hull(low: F32, high: F32, fast: bool) -> Hull:
    """Every result for gates from ``low`` to ``high``. NaN gives NaN."""
    first, last = low.astype(np.float64), high.astype(np.float64)
    with np.errstate(all="ignore"):
        ends = _value(first), _value(last)
        least, most = np.minimum(*ends), np.maximum(*ends)
        least = np.where((first < _LOWEST_AT) & (last > _LOWEST_AT), _LOWEST, least)
        size = np.maximum(np.abs(first), np.abs(last))
        ulps = fast_exp_ulps(size) if fast else np.full(size.shape, EXPF_ULPS)
        # The error of exp counts by its share of 1 + exp, which is largest at the lower end.
        share = 1.0 / (1.0 + np.exp(first))
        relative = (ulps * share + _REST) * ULP + F64_SLACK
        tiny = 2.0**-149
        least = np.where(least == 0, least, least - np.abs(least) * relative - tiny * _small(least))
        most = np.where(most == 0, most, most + np.abs(most) * relative + tiny * _small(most))
        infinite = np.isposinf(first), np.isposinf(last)  # silu of it is infinity, without an error
        least, most = (
            np.where(at, np.inf, e) for at, e in zip(infinite, (least, most), strict=True)
        )
        may_flush = first < _FLUSH
        most = np.where(may_flush, np.maximum(most, -0.0), most)
        least = np.where(may_flush, np.minimum(least, -0.0), least)
        out = least.astype(np.float32), most.astype(np.float32)
    return Hull(*out, np.isnan(out[0]))


def _value(gate: F64) -> F64:
    """Silu in float64; -0 at minus infinity, as the precise form has it for a quotient of 0."""
    return np.where(np.isneginf(gate), np.nan, gate / (1.0 + np.exp(-gate)))


def _small(value: F64) -> F64:
    """1 where a product may be subnormal, else 0."""
    return (np.abs(value) < 2.0**-125).astype(np.float64)


__all__ = ["silu", "silu_hull"]
