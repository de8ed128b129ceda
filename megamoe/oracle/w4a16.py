"""The layer with MXFP4 weights beside bfloat16: the reference point of y, and its envelope.

Hidden states and activations are bfloat16 numbers, and no step quantises them.
``docs/numerics.md``, section 14.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.oracle.bf16_linear import EXACT, Ends, Rows, Weights, linear
from megamoe.oracle.combine import Combine
from megamoe.oracle.gates import Hull
from megamoe.oracle.nvfp4 import Output
from megamoe.oracle.silu import silu, silu_hull
from megamoe.spec.accumulators import Accumulator
from megamoe.spec.dialects import Dialect, dialect_of
from megamoe.spec.features import Activation
from megamoe.spec.formats import F32, F64, GROUP, U8, U16, bf16_decode, bf16_round
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem

ROWS: Final = 64
BYTES: Final = (2, 251)
"""Scale bytes with which each E2M1 number that is not zero is a normal bfloat16 number."""


@dataclass(frozen=True)
class Expert:
    """The weights of one expert: of 2I outputs, and of H."""

    w13: Weights
    w2: Weights

    @classmethod
    def of(cls, problem: Problem, at: int) -> Expert:
        """One expert of a problem. ``ValueError`` for a scale byte on which kernels differ."""
        weights = []
        for name in ("w13_weight", "w2_weight"):
            packed = getattr(problem, name)[at].numpy()
            scale = getattr(problem, f"{name}_scale")[at].numpy()
            if (fault := _fault(packed, scale)) is not None:
                raise ValueError(
                    f"{problem.weight_format}: {name}_scale of expert {at} has byte {fault}; "
                    f"give bytes from {BYTES[0]} to {BYTES[1]}: kernels differ on the others"
                )
            weights.append(Weights(packed, scale))
        return cls(*weights)


def _fault(packed: U8, scale: U8) -> int | None:
    """A byte outside of :data:`BYTES` whose group has a weight that is not zero, or byte 255."""
    nonzero = (packed & 0x77).reshape(*scale.shape, GROUP // 2).any(axis=-1)
    bad = scale[(nonzero & ((scale < BYTES[0]) | (scale > BYTES[1]))) | (scale == 0xFF)]
    return int(bad[0]) if bad.size else None


@dataclass(frozen=True)
class Layer:
    """The data that all rows of a call share."""

    act: Activation
    contract: Dialect
    any_silu: bool

    def linear(
        self, low: F64, high: F64, weights: Weights, classes: list[Accumulator],
        exact: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """A linear of rows of bfloat16 numbers, as :func:`megamoe.oracle.bf16_linear.linear`."""
        sums = linear(Rows(low, high), weights, classes, exact)
        return {n: within(v) if n == EXACT else outward(*v) for n, v in sums.items()}

    def halves(self, sums: F64) -> tuple[F32, F32]:
        """Clamped gate and up ``(R, I)`` of linear 1's sums; the bound is an fp32 number."""
        is_bf16 = self.contract.gate_up.value == "bf16"
        rounded = bf16_decode(bf16_round(sums)) if is_bf16 else sums.astype(np.float32)
        first, second = np.split(rounded, 2, axis=-1)
        gate_first = self.contract.gate_up_order.value == "gate-up"
        gate, up = (first, second) if gate_first else (second, first)
        if self.act.clamp is None:
            return gate, up
        bound = np.float32(self.act.clamp)
        lower = -bound if self.contract.gate_clamped_below.value else -np.float32(np.inf)
        of_nan = bound if self.contract.clamp_nan.value == "upper" else -bound
        return _clamped(gate, lower, bound, bound), _clamped(up, -bound, bound, of_nan)

    def point(self, sums: F64, weight: F32, expert: Expert) -> U16:
        """The bfloat16 row of linear 1's exact sums."""
        gate, up = self.halves(sums)
        gated = silu(gate, self.contract.precise_silu.value)
        acts = self.product(Hull(gated, gated, np.isnan(gated)), Hull(up, up, np.isnan(up)))
        operand = acts.low.astype(np.float64)
        row = self.linear(operand, operand, expert.w2, [], exact=True)[EXACT]
        return self.rounded(row, weight)

    def ends(self, sums: Ends, weight: F32, expert: Expert, a: Accumulator) -> tuple[U16, U16]:
        """Lowest and highest bfloat16 row, from the ends of linear 1."""
        (gate_low, up_low), (gate_high, up_high) = (self.halves(end) for end in sums)
        gated = silu_hull(gate_low, gate_high, self.act.fast_math or self.any_silu)
        acts = self.product(gated, Hull(up_low, up_high, np.isnan(up_low)))
        # Where a sum may leave fp32, or NaN is possible beside numbers, nothing is known.
        maybe = acts.nan & ~np.isnan(acts.low)
        maybe |= _leaves(gate_low, gate_high) | _leaves(up_low, up_high)
        low, high = (
            np.where(maybe, end, side).astype(np.float64)
            for end, side in zip((-np.inf, np.inf), acts[:2], strict=True)
        )
        rows = self.linear(low, high, expert.w2, [a])[a.name]
        first, last = (self.rounded(end, weight) for end in rows)
        if self.contract.routing_weight.value == "accumulator":
            return np.where(weight < 0, last, first), np.where(weight < 0, first, last)
        return first, last

    def product(self, gated: Hull, up: Hull) -> Hull:
        """``bf16(silu * up)``: the fp32 product is rounded too."""
        if self.contract.silu_type.value == "bf16":
            gated = _bf16(gated)
        return _bf16(gated.times(up))

    def rounded(self, row: F64, weight: F32) -> U16:
        """The bfloat16 row of linear 2's sums; falling where its weight is below 0."""
        if self.contract.routing_weight.value != "accumulator":
            return bf16_round(row)
        with np.errstate(over="ignore", invalid="ignore"):
            return bf16_round(row.astype(np.float32) * weight)


def _bf16(hull: Hull) -> Hull:
    """Its ends as bfloat16 numbers."""
    low, high = (bf16_decode(bf16_round(end)) for end in hull[:2])
    return Hull(low, high, hull.nan)


def _clamped(value: F32, low: np.float32, high: np.float32, of_nan: np.float32) -> F32:
    """Both bounds, and the number that NaN becomes."""
    return np.where(np.isnan(value), of_nan, np.clip(value, low, high)).astype(np.float32)


def _leaves(low: F32, high: F32) -> npt.NDArray[np.bool_]:
    """An end is infinite beside another one."""
    return np.asarray((np.isinf(low) | np.isinf(high)) & (low != high))


def outward(low: F64, high: F64) -> Ends:
    """The fp32 numbers around both ends, since the accumulator holds one: as float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        down, up = low.astype(np.float32), high.astype(np.float32)
        down = np.where(down > low, np.nextafter(down, np.float32(-np.inf)), down)
        up = np.where(up < high, np.nextafter(up, np.float32(np.inf)), up)
    return down.astype(np.float64), up.astype(np.float64)


def within(sums: F64) -> F64:
    """The same. ``ValueError`` where a number leaves fp32: no rule covers what follows."""
    if (np.isfinite(sums) & (np.abs(sums) >= 2.0**128 - 2.0**103)).any():
        raise ValueError("a sum leaves fp32, for which the contract has no rule")
    return sums


def forward(
    problem: Problem, classes: list[Accumulator], contract: Any, any_silu: bool,
    trace: dict[str, npt.NDArray[Any]] | None, of: type[Layer] = Layer,
    expert_of: Callable[[Problem, int], Expert] = Expert.of,
) -> Output:  # fmt: skip
    """Point and envelopes; ``ValueError`` for a call that the contract does not know."""
    contract = dialect_of(problem, contract)
    layer = of(problem.act, contract, any_silu)
    ids, weights = problem.topk_ids.numpy(), problem.topk_weights.numpy()
    if contract.routing_type.value == "bf16":
        weights = bf16_decode(bf16_round(weights))
    x = bf16_decode(bits(problem.hidden_states)).astype(np.float64)
    shape = (*ids.shape, problem.hidden_size)
    point = np.zeros(shape, np.uint16)
    rows = {a.name: (np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)) for a in classes}
    sums = np.zeros((*ids.shape, 2 * problem.intermediate_size if trace is not None else 0))
    for at in np.unique(ids[ids >= 0]):
        expert = expert_of(problem, int(at))
        places = np.argwhere(ids == at)
        for start in range(0, len(places), ROWS):
            here = tuple(places[start : start + ROWS].T)
            weight, operand = weights[here][:, None], x[here[0]]
            gate_up = layer.linear(operand, operand, expert.w13, classes, exact=True)
            point[here] = layer.point(gate_up[EXACT], weight, expert)
            if trace is not None:
                sums[here] = gate_up[EXACT]
            for a in classes:
                for end, target in zip(layer.ends(gate_up[a.name], weight, expert, a), rows[a.name],
                                     strict=True):  # fmt: skip
                    target[here] = end
    if trace is not None:
        trace |= {"gate_up": sums, "slot_rows": point}
    combine = Combine(ids >= 0, weights, contract)
    ends = {name: combine.ends(*both) for name, both in rows.items()}
    return Output(combine.point(point), ends)


__all__ = ["Expert", "Layer", "forward", "outward", "within"]
