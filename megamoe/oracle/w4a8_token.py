"""The layer with MXFP4 weights and E4M3 rows that have one fp32 scale each: point and envelope.

It is :mod:`megamoe.oracle.w4a16` with a quantisation before each linear, and a product with the
row's scale after it. ``docs/numerics.md``, section 15.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.oracle import w4a16
from megamoe.oracle.bf16_linear import E4M3, EXACT, Rows, Weights, linear
from megamoe.oracle.nvfp4 import Output
from megamoe.spec.accumulators import Accumulator
from megamoe.spec.formats import F32, F64, GROUP, e4m3_cast, e4m3_decode
from megamoe.spec.problem import Problem

OCTAVES: Final = 11
"""A scale byte is at most so far below the largest of the expert's matrix: humming folds the powers
of two into E4M3 weights, and rounds weights below."""
_448: Final = np.float32(448)


@dataclass(frozen=True)
class Layer(w4a16.Layer):
    """The same data; linears of quantised rows."""

    def linear(
        self, low: F64, high: F64, weights: Weights, classes: list[Accumulator],
        exact: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """A linear of rows of bfloat16 numbers, quantised first, and its product with the scale."""
        rows, scale = self.quantised(low, high)
        products = linear(rows, weights, classes, exact)
        out: dict[str, Any] = {}
        for name, sums in products.items():
            if name == EXACT:
                out[name] = _times(w4a16.within(sums), scale[0])
            else:
                ends = zip(w4a16.outward(*sums), (scale, scale[::-1]), strict=True)
                out[name] = tuple(_times(end, np.where(end < 0, s[1], s[0])) for end, s in ends)
        return out

    def quantised(self, low: F64, high: F64) -> tuple[Rows, tuple[F32, F32]]:
        """Rows of E4M3 numbers, and their scales (R, 1), of bfloat16 rows from ``low`` to ``high``.

        A scale rises with the amax, and a factor falls. A code rises with its value, and with the
        factor by the sign of the value. Both are taken on their own. A row with an infinity or NaN
        has a NaN code, and so has each output.
        """
        size = np.maximum(np.abs(low), np.abs(high))
        near = np.where(low * high > 0, np.minimum(np.abs(low), np.abs(high)), 0.0)
        number = np.isfinite(size).all(axis=1, keepdims=True)
        least, most = (self._scale(np.where(number, v, 0.0)) for v in (near, size))
        ends = [
            pick(*(self._values(np.where(number, end, 0.0), s) for s in (least, most)))
            for pick, end in ((np.minimum, low), (np.maximum, high))
        ]
        same = (low == high) | np.isnan(low)
        of_nan = np.where(same.all(axis=1, keepdims=True), np.nan, -np.inf)
        first = np.where(number, ends[0], of_nan)
        return Rows(first, np.where(number, ends[1], np.abs(of_nan)), E4M3), (least, most)

    def _scale(self, magnitude: F64) -> F32:
        """(R, C) to (R, 1)."""
        amax = magnitude.max(axis=1, keepdims=True).astype(np.float32)
        return np.maximum(amax / _448, np.float32(self.contract.token_scale_floor.value))

    def _values(self, values: F64, scale: F32) -> F64:
        """The E4M3 numbers of finite values with a scale."""
        single = values.astype(np.float32)
        with np.errstate(over="ignore"):
            quotient = self.contract.token_codes.value == "quotient"
            wide = single / scale if quotient else single * (np.float32(1) / scale)
        codes = e4m3_cast(wide, self.contract.cast_saturates.value)
        return np.asarray(e4m3_decode(codes), np.float64)


def _times(sums: F64, scale: F32) -> F64:
    """fp32 accumulators times the scales of their rows, rounded once."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray((sums.astype(np.float32) * scale).astype(np.float64))


def expert_of(problem: Problem, at: int) -> w4a16.Expert:
    """One expert. ``ValueError`` for scale bytes on which kernels differ."""
    for name in ("w13_weight", "w2_weight"):
        packed, scale = getattr(problem, name)[at].numpy(), getattr(problem, f"{name}_scale")[at]
        nonzero = (packed & 0x77).reshape(*scale.shape, GROUP // 2).any(axis=-1)
        low = scale.numpy()[nonzero & (scale.numpy().astype(int) < int(scale.max()) - OCTAVES)]
        if low.size:
            raise ValueError(
                f"w4a8-token: {name}_scale of expert {at} has bytes {low[0]} and "
                f"{int(scale.max())}; give bytes at most {OCTAVES} apart: humming rounds the "
                "weights of the smaller one"
            )
    return w4a16.Expert.of(problem, at)


def forward(
    problem: Problem, classes: list[Accumulator], contract: Any, any_silu: bool,
    trace: dict[str, npt.NDArray[Any]] | None,
) -> Output:  # fmt: skip
    """As :func:`megamoe.oracle.w4a16.forward`."""
    return w4a16.forward(problem, classes, contract, any_silu, trace, Layer, expert_of)


__all__ = ["Layer", "forward"]
