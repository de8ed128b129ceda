"""The layer in FP8 blocks: the reference point of y, and its envelope under each class.

Weights are E4M3 with an fp32 scale per 128 x 128, hidden states E4M3 with an fp32 scale per 128,
activations E4M3 with one per 64 (:mod:`megamoe.spec.dialects`). ``docs/numerics.md``, section 13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.oracle.block_scaled import Codes, Ends, exact, linear
from megamoe.oracle.combine import Combine
from megamoe.oracle.gates import Hull
from megamoe.oracle.groups import RECIP_448
from megamoe.oracle.nvfp4 import Output
from megamoe.oracle.silu import silu, silu_hull
from megamoe.spec.accumulators import Accumulator
from megamoe.spec.dialects import Dialect, dialect_of
from megamoe.spec.features import Activation
from megamoe.spec.formats import (
    F32,
    F64,
    U8,
    U16,
    bf16_decode,
    bf16_key,
    bf16_round,
    e4m3_cast,
    e4m3_key,
    ue8m0_ceil,
)
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem

ROWS: Final = 64
_448: Final = np.float32(448)


def grouped(values: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """``(..., C)`` to ``(..., C/size, size)``."""
    return values.reshape(*values.shape[:-1], values.shape[-1] // size, size)


def staged(hidden: U16, contract: Dialect) -> tuple[U8, F32]:
    """``(T, H)`` bfloat16 bits to E4M3 codes (T, H) and float32 scales (T, H/128)."""
    groups = grouped(bf16_decode(hidden), contract.activation_group.value)
    with np.errstate(invalid="ignore", over="ignore"):
        amax = np.fmax.reduce(np.abs(groups), axis=-1)
        scale = np.fmax(amax, np.float32(contract.staging_amax_floor.value)) / _448
        own = scale[..., None]
        quotient = contract.activation_scale.value == "quotient"
        scaled = groups / own if quotient else groups * (np.float32(1) / own)
        codes = e4m3_cast(scaled, contract.cast_saturates.value)
    return codes.reshape(hidden.shape), scale


@dataclass(frozen=True)
class Requantise:
    """Activations ``(R, I)`` to E4M3 codes with one fp32 scale a group, by the contract."""

    contract: Dialect

    def scales(self, magnitudes: F32) -> tuple[F32, F32]:
        """Scale and factor ``(R, I/64)`` of magnitudes; NaN does not count."""
        groups = grouped(magnitudes, self.contract.requant_group.value)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            amax = np.fmax.reduce(groups, axis=-1, initial=np.float32(0))
            amax = np.fmax(amax, np.float32(self.contract.requant_amax_floor.value))
            scale = amax * RECIP_448
            if self.contract.requant_scale.value == "continuous":
                return scale, np.float32(1) / scale
        byte = ue8m0_ceil(scale).astype(np.int32)  # byte 0 has the bits of zero
        power = np.where(byte == 0, np.float32(0), np.ldexp(np.float32(1), byte - 127))
        return power.astype(np.float32), np.ldexp(np.float32(1), 127 - byte)

    def codes(self, acts: F32, factor: F32) -> U8:
        """``(R, I)`` codes."""
        with np.errstate(invalid="ignore", over="ignore"):
            wide = grouped(acts, self.contract.requant_group.value) * factor[..., None]
        codes = e4m3_cast(wide, self.contract.cast_saturates.value).reshape(acts.shape)
        return np.where(codes == 0x80, 0, codes).astype(np.uint8)  # the sign of a zero is free

    def point(self, acts: F32) -> tuple[U8, F32]:
        """Codes and scales of known activations."""
        scale, factor = self.scales(np.abs(acts))
        return self.codes(acts, factor), scale

    def between(self, low: F32, high: F32) -> Codes:
        """The codes and scales that activations from ``low`` to ``high`` may become.

        A code rises with its activation, and with the factor by the sign of the activation; a
        factor falls as the scale rises. Both are taken on their own.
        """
        near = np.where((low <= 0) & (high >= 0), np.float32(0), np.fmin(np.abs(low), np.abs(high)))
        least, most = self.scales(near), self.scales(np.fmax(np.abs(low), np.abs(high)))
        ends = []
        for end, pick in ((low, np.minimum), (high, np.maximum)):
            both = [e4m3_key(self.codes(end, factor)) for factor in (most[1], least[1])]
            ends.append(_code(pick(*both)))
        nan = np.isnan(low)
        return Codes(
            np.where(nan, 0x7F, ends[0]).astype(np.uint8),
            np.where(nan, 0x7F, ends[1]).astype(np.uint8), least[0], most[0],
        )  # fmt: skip


def _code(key: npt.NDArray[np.int16]) -> U8:
    """The code of an E4M3 key; of zero +0."""
    return np.where(key < 0, 0x80 - key, key).astype(np.uint8)


@dataclass(frozen=True)
class Expert:
    """Weights of one expert: E4M3 codes (2I, H) and (H, I), float32 scales per 128 x 128."""

    w13: U8
    w13_scale: F32
    w2: U8
    w2_scale: F32

    @classmethod
    def of(cls, problem: Problem, at: int) -> Expert:
        """One expert of a problem. ``ValueError`` for a NaN code or an unusable scale."""
        w13, w2 = problem.w13_weight[at].numpy(), problem.w2_weight[at].numpy()
        s13, s2 = problem.w13_weight_scale[at].numpy(), problem.w2_weight_scale[at].numpy()
        for name, codes, scale in (("w13", w13, s13), ("w2", w2, s2)):
            if ((codes & 0x7F) == 0x7F).any():
                raise ValueError(f"fp8-block: {name}_weight of expert {at} has a NaN code")
            if not (np.isfinite(scale) & (scale >= 0)).all():
                raise ValueError(
                    f"fp8-block: {name}_weight_scale of expert {at} has a value below 0, an "
                    "infinity or NaN; give finite scales"
                )
        return cls(w13, s13, w2, s2)


@dataclass(frozen=True)
class Layer:
    """The data that all rows of a call share."""

    act: Activation
    contract: Dialect
    any_silu: bool

    @property
    def rule(self) -> Requantise:
        """The requantisation."""
        return Requantise(self.contract)

    def halves(self, sums: F32) -> tuple[F32, F32]:
        """Clamped gate and up ``(R, I)`` of linear 1's fp32 sums."""
        first, second = np.split(sums, 2, axis=-1)
        gate_first = self.contract.gate_up_order.value == "gate-up"
        gate, up = (first, second) if gate_first else (second, first)
        if self.contract.gate_up.value == "bf16":
            gate, up = (bf16_decode(bf16_round(half)) for half in (gate, up))
        if self.act.clamp is None:
            return gate, up
        bound = np.float32(self.act.clamp)  # as it is: the kernel has it in fp32
        lower = -bound if self.contract.gate_clamped_below.value else -np.float32(np.inf)
        of_nan = bound if self.contract.clamp_nan.value == "upper" else -bound
        return _clamped(gate, lower, bound, bound), _clamped(up, -bound, bound, of_nan)

    def point(self, x: U8, x_scale: F32, weight: F32, expert: Expert) -> tuple[F32, F64]:
        """Linear 1 in fp32, and the row in float64, each the exact sum rounded once (to odd)."""
        sums = _fp32(exact(x, x_scale, expert.w13, expert.w13_scale))
        gate, up = self.halves(sums)
        acts = self.weighted(
            _point(silu(gate, self.contract.precise_silu.value)), _point(up), weight
        ).low
        codes, scale = self.rule.point(acts)
        return sums, exact(codes, scale, expert.w2, expert.w2_scale)

    def ends(self, sums: Ends, weight: F32, expert: Expert, a: Accumulator) -> Ends:
        """fp32 ends of the row, from those of linear 1."""
        (gate_low, up_low), (gate_high, up_high) = (self.halves(end) for end in sums)
        gated = silu_hull(gate_low, gate_high, self.act.fast_math or self.any_silu)
        acts = self.weighted(gated, Hull(up_low, up_high, np.isnan(up_low)), weight)
        codes = self.rule.between(acts.low, acts.high)
        return linear(codes, expert.w2, expert.w2_scale, [a])[a.name]

    def weighted(self, gated: Hull, up: Hull, weight: F32) -> Hull:
        """``(gated * up) * weight``, each product rounded once."""
        product = gated.times(up)
        if self.contract.routing_weight.value == "activation":
            product = product.times(_point(weight))
        if self.contract.bf16_before_requant.value:
            ends = [bf16_decode(bf16_round(end)) for end in product[:2]]
            product = Hull(ends[0], ends[1], product.nan)
        return product


def _point(value: F32) -> Hull:
    """A known value."""
    return Hull(value, value, np.isnan(value))


def _clamped(value: F32, low: np.float32, high: np.float32, of_nan: np.float32) -> F32:
    """Both bounds, and the number that NaN becomes."""
    return np.where(np.isnan(value), of_nan, np.clip(value, low, high)).astype(np.float32)


def _fp32(sums: F64) -> F32:
    """Rounded once. ``ValueError`` where a number leaves fp32: no rule covers what follows."""
    with np.errstate(over="ignore"):
        out = sums.astype(np.float32)
    if np.isinf(out).any():
        raise ValueError("fp8-block: a sum leaves fp32, for which the contract has no rule")
    return out


def forward(
    problem: Problem, classes: list[Accumulator], contract: Any, any_silu: bool,
    trace: dict[str, npt.NDArray[Any]] | None,
) -> Output:  # fmt: skip
    """Point and envelopes; ``ValueError`` for a call that the contract does not know."""
    contract = dialect_of(problem, contract)
    layer = Layer(problem.act, contract, any_silu)
    ids, weights = problem.topk_ids.numpy(), problem.topk_weights.numpy()
    x, x_scale = staged(bits(problem.hidden_states), contract)
    wide = [a for a in classes if a.align_bits is not None]
    shape = (*ids.shape, problem.hidden_size)
    point = np.zeros(shape, np.uint16)
    rows = {a.name: (np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)) for a in wide}
    sums = np.zeros((*ids.shape, 2 * problem.intermediate_size if trace is not None else 0))
    for at in np.unique(ids[ids >= 0]):
        expert = Expert.of(problem, int(at))
        places = np.argwhere(ids == at)
        for start in range(0, len(places), ROWS):
            here = tuple(places[start : start + ROWS].T)
            weight = weights[here][:, None]
            codes, scale = x[here[0]], x_scale[here[0]]
            first, row = layer.point(codes, scale, weight, expert)
            _fp32(row)
            point[here] = bf16_round(row)
            if trace is not None:
                sums[here] = first
            operand = Codes.point(codes, scale)
            gate_up = linear(operand, expert.w13, expert.w13_scale, wide)
            for a in wide:
                for end, target in zip(layer.ends(gate_up[a.name], weight, expert, a), rows[a.name],
                                     strict=True):  # fmt: skip
                    target[here] = bf16_round(end)
    if trace is not None:
        trace |= {"gate_up": sums, "slot_rows": point, "x": x, "x_sf": x_scale}
    combine = Combine(ids >= 0, weights, contract)
    y = combine.point(point)
    points = {a.name: (y, y) for a in classes if a.align_bits is None}
    return Output(y, points | {name: _with(*combine.ends(*ends), y) for name, ends in rows.items()})


def _with(low: U16, high: U16, y: U16) -> tuple[U16, U16]:
    """The hull of an interval and the reference point, which belongs to every envelope."""
    return (
        np.where(bf16_key(y) < bf16_key(low), y, low),
        np.where(bf16_key(y) > bf16_key(high), y, high),
    )


__all__ = ["forward", "staged"]
