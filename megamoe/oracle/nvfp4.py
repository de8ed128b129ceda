"""The layer with NVFP4 weights: the reference point of y, and its envelope under each class.

Both operands of both linears are E2M1 codes with an E4M3 byte per 16, so a product is a multiple of
2**-20 below 2**23, and the sums of whole dot products are integers of at most 57 bits. A code times
its scale is one float64 number here. ``docs/numerics.md``, section NVFP4, derives the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megamoe.oracle import swiglu
from megamoe.oracle.bounds import floor_log2, result_interval
from megamoe.oracle.combine import Combine
from megamoe.oracle.linear import NO_TERM, Blocks, float_to_odd
from megamoe.oracle.mlp import bf16_halves
from megamoe.oracle.nvfp4_codes import Requantise, grouped, staged
from megamoe.spec.accumulators import FP32, Accumulator
from megamoe.spec.contract import Contract
from megamoe.spec.features import Activation, nvfp4_fault
from megamoe.spec.formats import (
    E4M3_NAN,
    F32,
    F64,
    GROUP,
    U16,
    bf16_round,
    e2m1_decode,
    e4m3_decode,
)
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem

UNIT: Final = 2.0**-20
"""Every product is a multiple of it."""
ROWS: Final = 64
CHUNK: Final = 1 << 20
"""Block sums held at once: blocks x rows x channels."""
_ONE: Final = np.ones((1, 1), np.float32)
"""The weight of activations: the routing weight comes in the combine."""


@dataclass(frozen=True)
class Operand:
    """``R`` rows of codes times scales, known or as intervals."""

    low: F64
    high: F64
    lowbit: F64
    """(R, C/32): each possible number of the block is a multiple of 2**lowbit."""

    @classmethod
    def point(cls, values: F64) -> Operand:
        """Rows without freedom."""
        return cls(values, values, _lowbit(values))

    @classmethod
    def between(cls, low: F32, high: F32, rule: Requantise) -> Operand:
        """The codes and scale bytes that activations from ``low`` to ``high`` may become.

        For one scale byte, a code rises with its activation. The result is the hull over all
        possible bytes of a group.
        """
        near = np.where((low <= 0) & (high >= 0), np.float32(0), np.fmin(np.abs(low), np.abs(high)))
        first, last = rule.bytes_of(near), rule.bytes_of(np.maximum(np.abs(low), np.abs(high)))
        least, most = rule.values_of(low, first), rule.values_of(high, first)
        for step in range(1, int((last - first).max(initial=0)) + 1):
            sf = np.minimum(first + step, last).astype(np.uint8)
            ends = rule.values_of(low, sf), rule.values_of(high, sf)
            least, most = np.minimum(least, ends[0]), np.maximum(most, ends[1])
        free = (least != most).reshape(len(least), -1, GROUP).any(axis=-1)
        return cls(least, most, np.where(free, -10.0, _lowbit(least)))  # half the least scale


def _lowbit(values: F64) -> F64:
    """(R, C/32) exponent of the lowest set bit of each block; a large one for zeros alone."""
    steps = np.abs(values / 2.0**-10).astype(np.int64).reshape(*values.shape[:-1], -1, GROUP)
    together = np.bitwise_or.reduce(steps, axis=-1)
    exponent = np.frexp((together & -together).astype(np.float64))[1] - 11.0
    return np.where(together > 0, exponent, -NO_TERM)


def _field(magnitude: F64) -> F64:
    """(R, C/32) at least the sum of both fields, of a code (from 0 on) and a scale (from -6 on)."""
    top = magnitude.reshape(*magnitude.shape[:-1], -1, GROUP).max(axis=-1)
    return np.where(top > 0, np.maximum(floor_log2(top) + 1, -4), NO_TERM)


def _blocked(values: F64) -> F64:
    """(R, C) to (C/32, R, 32)."""
    return values.reshape(len(values), -1, GROUP).transpose(1, 0, 2)


def block_sums(rows: Operand, weights: F64) -> Blocks:
    """Blocks of 32, two groups each, with known weights ``(N, C)``: exact in float64."""
    columns = _blocked(weights).transpose(0, 2, 1)
    absolute = np.abs(columns)
    middle, radius = (rows.low + rows.high) / 2, (rows.high - rows.low) / 2
    largest = np.maximum(np.abs(rows.low), np.abs(rows.high))
    centre = np.matmul(_blocked(middle), columns)
    reach = np.matmul(_blocked(radius), absolute)
    low, high = centre - reach, centre + reach
    magnitude = np.matmul(_blocked(largest), absolute)
    field = _field(largest).T[:, :, None] + _field(np.abs(weights)).T[:, None, :]
    return Blocks(
        low, high, np.maximum((magnitude + high) / 2, 0.0), np.maximum((magnitude - low) / 2, 0.0),
        rows.lowbit.T[:, :, None] + _lowbit(weights).T[:, None, :],
        field, field,  # folded into bfloat16 no operand would be subnormal
    )  # fmt: skip


def total(blocks: Blocks) -> F64:
    """``(R, N)`` exact sums, in integers; rounded to odd where float64 does not hold one."""
    whole = (blocks.low / UNIT).astype(np.int64).sum(axis=0)
    out = whole.astype(np.float64)
    for at in zip(*np.nonzero(np.abs(whole) >= 1 << 53), strict=True):
        out[at] = float_to_odd(Fraction(int(whole[at])))
    return out * UNIT


def linear(rows: Operand, weights: F64, freedom: bool) -> tuple[F64, F64]:
    """Ends of the sums ``(R, N)``: the exact sum twice, or the bounds of any order in fp32."""
    shape = len(rows.low), len(weights)
    low, high = np.empty(shape), np.empty(shape)
    size = max(32, CHUNK // max(1, rows.lowbit.size))
    for start in range(0, shape[1], size):
        part = slice(start, start + size)
        blocks = block_sums(rows, weights[part])
        if freedom:
            low[:, part], high[:, part] = result_interval(blocks, FP32)
        else:
            low[:, part] = high[:, part] = total(blocks)
    return low, high


def scaled(sums: F64, factor: F32 | np.float32) -> F64:
    """fp32 accumulators times a factor: two roundings. Infinity times 0 is NaN, as IEEE has it."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.asarray((sums.astype(np.float32) * factor).astype(np.float64))


@dataclass(frozen=True)
class Expert:
    """Weights of one expert as numbers, and its factors."""

    w13: F64
    w2: F64
    factor_13: np.float32
    l2_alpha: np.float32

    @classmethod
    def of(cls, problem: Problem, at: int) -> Expert:
        """Decode the checkpoint's form. ``ValueError`` for an invalid scale or factor."""
        factors = [float(t[at]) for t in problem.expert_factors.values()]
        alpha = np.float32(factors[1]) * np.float32(problem.l2_activation_scale)
        if not all(0 < f < np.inf for f in (*factors, float(alpha))):
            raise ValueError(f"nvfp4: the factors of expert {at} are {factors}; above 0, finite")
        numbers = []
        for name in ("w13_weight", "w2_weight"):
            sf = getattr(problem, f"{name}_scale")[at].numpy()
            if (sf >= E4M3_NAN).any():
                raise ValueError(f"nvfp4: {name}_scale of expert {at} has a byte above 0x7E")
            codes = np.asarray(e2m1_decode(getattr(problem, name)[at].numpy()), np.float64)
            numbers.append((grouped(codes) * e4m3_decode(sf)[..., None]).reshape(codes.shape))
        return cls(numbers[0], numbers[1], np.float32(factors[0]), alpha)

    def factor(self, x_scale: F32) -> F32:
        """The factor of linear 1's accumulators, ``(R, 1)``; infinite for an infinite row only."""
        with np.errstate(over="ignore"):
            factor = x_scale * self.factor_13
        if (np.isinf(factor) & np.isfinite(x_scale)).any():
            raise ValueError("nvfp4: a token's scale times w13_weight_scale_2 leaves fp32")
        return factor


@dataclass(frozen=True)
class Layer:
    """The data that all rows of a call share."""

    act: Activation
    rule: Requantise
    contract: Contract

    def point(self, x: Operand, x_scale: F32, expert: Expert) -> tuple[F64, U16]:
        """Linear 1's exact sums, and the bfloat16 row."""
        sums, _ = linear(x, expert.w13, False)
        halves = bf16_halves(scaled(sums, expert.factor(x_scale)), self.contract)
        gate, up = swiglu.clamp_gate_up(*halves, self.act, self.contract)
        acts = swiglu.activation(gate, up, _ONE, self.act, self.contract)
        codes = self.rule.values_of(acts, self.rule.bytes_of(np.abs(acts)))
        row, _ = linear(Operand.point(codes), expert.w2, False)
        return sums, bf16_round(scaled(row, expert.l2_alpha))

    def ends(self, x: Operand, x_scale: F32, expert: Expert, any_form: bool) -> tuple[U16, U16]:
        """Lowest and highest bfloat16 row that sums in any order allow."""
        factor = expert.factor(x_scale)
        halves = [
            bf16_halves(scaled(e, factor), self.contract) for e in linear(x, expert.w13, True)
        ]
        gate, up = ((halves[0][i], halves[1][i]) for i in range(2))
        acts = swiglu.activation_interval(
            gate, up, _ONE, self.act, self.contract, any_form=any_form
        )
        # If NaN is possible beside numbers, any number is: its code is that of the largest.
        free = np.False_ if acts.nan is None else acts.nan
        low = np.where(free, -np.float32(np.inf), acts.low)
        high = np.where(free, np.float32(np.inf), acts.high)
        rows = linear(Operand.between(low, high, self.rule), expert.w2, True)
        first, last = (bf16_round(scaled(end, expert.l2_alpha)) for end in rows)
        return first, last


@dataclass(frozen=True)
class Output:
    """``(T, H)`` bfloat16 bits: the point, and the ends of each class."""

    y: U16
    ends: Mapping[str, tuple[U16, U16]]


def forward(
    problem: Problem, classes: list[Accumulator], contract: Contract, any_silu: bool,
    trace: dict[str, npt.NDArray[Any]] | None,
) -> Output:  # fmt: skip
    """Point and envelopes; ``ValueError`` for a problem of another format."""
    fault = nvfp4_fault(problem.features, problem.hidden_size, problem.intermediate_size,
                        problem.l2_activation_scale)  # fmt: skip
    if fault:
        raise ValueError(fault)
    own = contract.variant(
        contract.revision, "vLLM 0.33, sm100_nvfp4_mega_moe.cuh: the combine's fma",
        routing_weight="combine", bf16_before_requant=False,
    )  # fmt: skip
    layer = Layer(problem.act, Requantise(np.float32(problem.l2_activation_scale)), own)
    ids, weights = problem.topk_ids.numpy(), problem.topk_weights.numpy()
    numbers, sf, x_scale = staged(bits(problem.hidden_states))
    x = (grouped(numbers) * e4m3_decode(sf)[..., None]).reshape(numbers.shape)
    freedom = any(a.align_bits is not None for a in classes)
    rows = np.zeros((3, *ids.shape, problem.hidden_size), np.uint16)
    sums = np.zeros((*ids.shape, 2 * problem.intermediate_size if trace is not None else 0))
    for at in np.unique(ids[ids >= 0]):
        expert = Expert.of(problem, int(at))
        places = np.argwhere(ids == at)
        for start in range(0, len(places), ROWS):
            token, slot = places[start : start + ROWS].T
            operands = Operand.point(x[token]), x_scale[token], expert
            gate_up, rows[0][token, slot] = layer.point(*operands)
            if trace is not None:
                sums[token, slot] = gate_up
            if freedom:
                rows[1][token, slot], rows[2][token, slot] = layer.ends(*operands, any_silu)
    if trace is not None:
        trace |= {
            "gate_up": sums, "slot_rows": rows[0], "x": numbers, "x_sf": sf, "x_scale": x_scale
        }  # fmt: skip
    combine = Combine(ids >= 0, weights, own)
    y = combine.point(rows[0])
    wide = combine.ends(rows[1], rows[2]) if freedom else (y, y)
    return Output(y, {a.name: (y, y) if a.align_bits is None else wide for a in classes})
