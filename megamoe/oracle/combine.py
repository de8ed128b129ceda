"""The combine: bf16 slot rows to one bf16 row a token, in fp32, slot by slot, from zero.

A fused shared expert is one more slot, of weight 1, that every token takes. Each step is one fp32
addition, or one fused multiply-add where the weight is applied here, rounded to nearest; so the
result is a point. It is a monotone function of every slot row, rising where the weight is not
negative. Where a contract leaves the multiply-add or a product and a sum to the compiler, the point
has the former and the ends hold both, at each step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megamoe.oracle.fused import fma, rounded_sum
from megamoe.oracle.groups import RECIP_448
from megamoe.spec.contract import Contract
from megamoe.spec.formats import (
    F32,
    F64,
    FP8_COMBINE_GROUP,
    U16,
    bf16_decode,
    bf16_round,
    e4m3_cast,
    e4m3_decode,
    ue8m0_ceil,
)

_MINUS_INF, _PLUS_INF = np.uint16(0xFF80), np.uint16(0x7F80)


@dataclass(frozen=True)
class Combine:
    """The data of one combine besides the rows: ``T`` tokens, ``K`` slots."""

    live: npt.NDArray[np.bool_]
    """(T, K) slots that take part."""
    weights: F32
    """(T, K) routing weights."""
    contract: Contract
    dtype: str = "bf16"
    """The format of the rows, as :attr:`megamoe.spec.problem.Problem.combine_dtype`."""
    output: U16 | None = None
    """(T, H) bfloat16 bits that are added to the result in the end."""

    def point(self, rows: U16, shared: U16 | None = None) -> U16:
        """``(T, K, H)`` bfloat16 bits, and the shared expert's ``(T, H)``, to ``(T, H)`` bits."""
        return self.ends(rows, rows, None if shared is None else (shared, shared))[0]

    def ends(self, low: U16, high: U16, shared: tuple[U16, U16] | None = None) -> tuple[U16, U16]:
        """Lowest and highest result of rows that are known as intervals.

        Both ends are infinite where NaN is possible and not certain: a row between two infinities
        may be NaN, and where one end of the sum is NaN, infinities of both signs may meet and need
        not.
        """
        is_point = low is high and (shared is None or shared[0] is shared[1])
        totals = [np.zeros((low.shape[0], low.shape[2]), np.float32) for _ in range(2 - is_point)]
        may, must = (np.zeros(totals[0].shape, np.bool_) for _ in range(2))
        with np.errstate(invalid="ignore", over="ignore"):
            for slot in self.order(low.shape[1], shared is not None):
                if slot is None:
                    assert shared is not None
                    rows = self.read(*shared)
                else:
                    rows = self.read(low[:, slot], high[:, slot])
                if not is_point:
                    live = np.True_ if slot is None else self.live[:, slot, None]
                    may |= live & (rows[0] == -np.inf) & (rows[1] == np.inf)
                    must |= live & np.isnan(rows[0]) & np.isnan(rows[1])
                totals = [
                    self.accumulate(slot, t, rows, end, is_point) for end, t in enumerate(totals)
                ]
        results = [self._finish(total) for total in totals]
        if is_point:
            return results[0], results[0]
        first, last = results
        one_end = np.isnan(bf16_decode(first)) != np.isnan(bf16_decode(last))
        maybe_nan = (may & ~must) | one_end
        return np.where(maybe_nan, _MINUS_INF, first), np.where(maybe_nan, _PLUS_INF, last)

    def order(self, slots: int, shared: bool) -> list[int | None]:
        """The slots as they are added; None is the shared expert's."""
        out: list[int | None] = list(range(slots))
        if self.contract.combine_order.value != "ascending-slot":
            out.reverse()
        if shared:
            out.insert(0 if self.contract.shared_expert.value == "first" else slots, None)
        return out

    def accumulate(
        self, slot: int | None, total: F32, rows: tuple[F64, F64], end: int = 0,
        is_point: bool = True,
    ) -> F32:  # fmt: skip
        """``total`` after one slot, whose rows :meth:`read` gave; ``end`` 1 takes the high one.

        If not ``is_point``, the result is an end over all forms that the contract allows.
        """
        if slot is None:
            return rounded_sum(rows[end], total.astype(np.float64))
        if self.contract.routing_weight.value in ("combine", "row"):
            weight = self.weights[:, slot, None]
            row = np.where(weight < 0, rows[1 - end], rows[end]).astype(np.float32)  # falling there
            new_total = fma(row, weight, total)
            if self.contract.routing_weight.value == "row" and not is_point:
                new_total = (np.fmin, np.fmax)[end](new_total, total + row * weight)
        elif self.dtype == "fp8":
            new_total = rounded_sum(rows[end], total.astype(np.float64))
        else:
            new_total = total + rows[end].astype(np.float32)
        return np.where(self.live[:, slot, None], new_total, total)

    def read(self, low: U16, high: U16) -> tuple[F64, F64]:
        """The values that the combine reads from rows in the call's format."""
        if self.dtype == "fp8":
            return fp8_rows(low, high)
        return bf16_decode(low).astype(np.float64), bf16_decode(high).astype(np.float64)

    def _finish(self, total: F32) -> U16:
        rounded = bf16_round(total)
        if self.output is None:
            return rounded
        with np.errstate(invalid="ignore", over="ignore"):  # as torch adds two bfloat16
            return bf16_round(bf16_decode(rounded) + bf16_decode(self.output))


def fp8_rows(low: U16, high: U16) -> tuple[F64, F64]:
    """``(T, H)`` bfloat16 bits to their values as E4M3 with a scale per 128 channels.

    ``e = ceil_log2(fl(amax * fl32(1/448)))``, code = E4M3 of ``v * 2**-e``; the combine reads
    ``code * 2**e``, exactly. Byte 0, of an amax of 0, reads as 0; byte 255, of an infinite one, as
    infinity, its codes being those of ``v * -inf``. Rows that are known as intervals may have one
    of several exponents: the hull over them.
    """
    with np.errstate(invalid="ignore"):
        ends = [bf16_decode(end).astype(np.float64) for end in (low, high)]
    shape = ends[0].shape
    groups = (*shape[:-1], shape[-1] // FP8_COMBINE_GROUP, FP8_COMBINE_GROUP)
    first, last = (end.reshape(groups) for end in ends)
    size = np.abs(first), np.abs(last)
    near = np.where((first <= 0) & (last >= 0), 0.0, np.fmin(*size))
    bytes_ = [_byte(amax) for amax in (near, np.fmax(*size))]
    # An infinite member that need not be there: NaN, infinity and numbers are all possible.
    free = (low != high).reshape(first.shape).any(axis=-1, keepdims=True)
    unbounded = free & (bytes_[1] == 255)
    top = np.where(unbounded, bytes_[0], bytes_[1])
    out = _dequantised(first, bytes_[0]), _dequantised(last, bytes_[0])
    for step in range(1, int((top - bytes_[0]).max(initial=0)) + 1):
        byte = np.minimum(bytes_[0] + step, top)
        out = (
            np.minimum(out[0], _dequantised(first, byte)),
            np.maximum(out[1], _dequantised(last, byte)),
        )
    least, most = np.where(unbounded, -np.inf, out[0]), np.where(unbounded, np.inf, out[1])
    return least.reshape(shape), most.reshape(shape)


def _byte(magnitude: F64) -> npt.NDArray[np.int64]:
    """(..., 1) UE8M0 bytes of the groups; NaN is ignored."""
    amax = np.fmax.reduce(magnitude, axis=-1, keepdims=True, initial=0.0).astype(np.float32)
    return ue8m0_ceil((amax * RECIP_448).astype(np.float32)).astype(np.int64)


def _dequantised(values: F64, byte: npt.NDArray[np.int64]) -> F64:
    with np.errstate(invalid="ignore", over="ignore"):
        factor = np.where(byte == 255, -np.inf, np.exp2(127.0 - byte))
        scale = np.where(byte == 0, 0.0, np.where(byte == 255, np.inf, np.exp2(byte - 127.0)))
        return e4m3_decode(e4m3_cast(values * factor)) * scale


__all__ = ["Combine", "fp8_rows"]
