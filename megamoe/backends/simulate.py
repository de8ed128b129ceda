"""Simulated correct kernels: members of the accumulator classes, to test the certified intervals.

Nothing that judges imports this; it shares :mod:`megamoe.spec.formats` with the oracle and nothing
else. A kernel here is a way to sum one dot product and a way to err in silu, both within the
class: plain additions in random or hostile orders, each rounded in any direction
(:mod:`megamoe.backends.simulated_sums`); and the tensor-core instructions as the package
``mmasim`` models them (:mod:`megamoe.backends.simulated_units`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megamoe.backends.simulated_sums import (
    ORDERS,
    ROUNDINGS,
    Kernel,
    Linear,
    NotAMemberError,
    Rng,
    add_up,
    blas,
    blockwise,
    ordered,
    plain,
    products,
    scaled,
    to_fp32,
)
from megamoe.backends.simulated_units import (
    blackwell_mxf8f6f4,
    block_scaled,
    hopper_bf16,
    hopper_e4m3,
    hopper_e4m3_outside,
)
from megamoe.cases import Case
from megamoe.cases.recipes import forward_problem
from megamoe.spec.formats import (
    F32,
    F64,
    GROUP,
    U8,
    U16,
    bf16_decode,
    bf16_round,
    e4m3_cast,
    ue8m0_ceil,
)
from megamoe.spec.problem import Problem

# --- silu -------------------------------------------------------------------------------------


def silu(gate: F32, fast_math: bool, where: str, rng: Rng) -> F32:
    """The contract's instruction sequence with each instruction off by its documented error.

    CUDA: ``__expf`` 2 + floor(|1.173 x|) ulps, ``expf`` 2 (documented: 1); PTX: ``rcp.approx``
    1 ulp, subnormal results flushed. ``where``: low, high, none or mixed.
    """

    def off() -> F64:
        if where == "mixed":
            return rng.choice([-1.0, 0.0, 1.0], gate.shape) * rng.uniform(0.5, 1.0, gate.shape)
        return np.full(gate.shape, {"low": -1.0, "high": 1.0, "none": 0.0}[where])

    with np.errstate(all="ignore"):
        wide = gate.astype(np.float64)
        ulps = 2.0 + np.floor(np.abs(1.173 * wide)) if fast_math else np.full(wide.shape, 2.0)
        # Half an ulp is left for the rounding to fp32 itself.
        e = _erring(np.exp(-wide), off() * (ulps - 0.5))
        if fast_math:
            e = np.where(e < np.float32(2.0**-126), np.float32(0), e)
            d = np.float32(1) + e
            r = _erring(1 / d.astype(np.float64), off() * 0.5)
            r = np.where(np.abs(r) < np.float32(2.0**-126), np.float32(0), r)
            return (gate * r).astype(np.float32)
        return (gate / (np.float32(1) + e)).astype(np.float32)


def _erring(value: F64, ulps: F64) -> F32:
    """``value`` off by ``ulps`` of its own fp32 spacing, rounded to fp32."""
    regular = np.isfinite(value) & (value != 0)
    _, exponent = np.frexp(np.where(regular, value, 1.0))
    unit = np.ldexp(1.0, np.maximum(exponent - 24, -149))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(regular, value + ulps * unit, value).astype(np.float32)


PRODUCTS = 1 << 24
"""Products of one sum of columns that are held at a time: 128 MiB as float64."""


# --- the whole layer --------------------------------------------------------------------------


@dataclass(frozen=True)
class Simulation:
    """Everything a simulated kernel computed; shapes as in ``megamoe.spec.tensors``."""

    y: U16
    codes: U8
    sf: U8
    slots: U16
    """(T, K, H) bfloat16 bits before the combine."""


def stage(hidden: U16) -> tuple[U8, U8]:
    """Staging: every operation is a single IEEE rounding, so there is nothing to simulate."""
    groups = bf16_decode(hidden).reshape(len(hidden), -1, GROUP)
    amax = np.fmax.reduce(np.abs(groups), axis=-1, initial=np.float32(1e-4))  # leaves NaN out
    exponent = np.clip(ue8m0_ceil(amax / np.float32(448)), 1, 254)
    codes = e4m3_cast(np.ldexp(groups.astype(np.float64), 127 - exponent[..., None]))
    return codes.reshape(hidden.shape), exponent.astype(np.uint8)


def requantise(values: F32) -> tuple[U8, U8]:
    """``(R, I)`` activations to codes and UE8M0 bytes."""
    groups = values.reshape(len(values), -1, GROUP)
    amax = np.fmax.reduce(np.abs(groups), axis=-1, initial=np.float32(0))  # leaves NaN out
    exponent = ue8m0_ceil(amax * (np.float32(1) / np.float32(448)))
    codes = e4m3_cast(np.ldexp(groups.astype(np.float64), 127 - exponent[..., None]))
    return codes.reshape(values.shape), exponent.astype(np.uint8)


def swiglu(
    gate_up: F64, weight: F32, clamp: float | None, fast_math: bool, where: str, rng: Rng
) -> F32:
    """``(R, 2I)`` fp32 sums and ``(R, 1)`` routing weights to ``(R, I)`` activations."""
    gate, up = np.split(bf16_decode(bf16_round(gate_up)), 2, axis=1)
    if clamp is not None:
        bound = bf16_decode(bf16_round(np.array([clamp])))[0]
        gate, up = np.fmin(gate, bound), np.fmin(np.fmax(up, -bound), bound)
    with np.errstate(all="ignore"):
        return (silu(gate, fast_math, where, rng) * up) * weight


def combine(slots: U16, live: npt.NDArray[np.bool_]) -> U16:
    """``(T, K, H)`` bfloat16 rows to ``(T, H)``: fp32, ascending slots."""
    total = np.zeros((len(slots), slots.shape[2]), np.float32)
    for k in range(slots.shape[1]):
        total[live[:, k]] += bf16_decode(slots[live[:, k], k])
    return bf16_round(total)


def problem(seed: int, **params: Any) -> Problem:
    """A problem from the recipes of cases, with defaults for a small layer."""
    base: dict[str, Any] = {
        "hidden": 256, "intermediate": 128, "experts": 4, "top_k": 2, "tokens": 4, "clamp": 10.0,
        "fast_math": True, "capacity": 384,
    }  # fmt: skip
    return forward_problem(
        Case("forward/simulated", "forward", "full", "", seed, {**base, **params}, Path())
    )


def head(problem: Problem, tokens: int) -> Problem:
    """The first ``tokens`` rows of a problem."""
    return replace(
        problem,
        hidden_states=problem.hidden_states[:tokens],
        topk_ids=problem.topk_ids[:tokens],
        topk_weights=problem.topk_weights[:tokens],
    )


def forward(problem: Problem, kernel: Kernel, seed: int) -> Simulation:
    """The layer as ``kernel`` would compute it."""
    rng = np.random.default_rng(seed)
    ids = problem.topk_ids.numpy()
    tokens, top_k = ids.shape
    inter = problem.intermediate_size
    hidden = problem.hidden_states.contiguous().view(torch.int16).numpy().view(np.uint16)
    x, x_sf = stage(hidden)
    codes = np.zeros((tokens, top_k, inter), np.uint8)
    sf = np.zeros((tokens, top_k, inter // GROUP), np.uint8)
    slots = np.zeros((tokens, top_k, problem.hidden_size), np.uint16)
    for expert in np.unique(ids[ids >= 0]):
        at = np.nonzero(ids == expert)
        w13, w13_sf = problem.w13_weight[expert].numpy(), problem.w13_weight_scale[expert].numpy()
        w2, w2_sf = problem.w2_weight[expert].numpy(), problem.w2_weight_scale[expert].numpy()
        weight = problem.topk_weights.numpy()[at][:, None]
        gate_up = _linear(kernel, x[at[0]], x_sf[at[0]], w13, w13_sf, rng)
        values = swiglu(
            gate_up, weight, problem.activation_clamp, problem.fast_math, kernel.silu, rng
        )
        codes[at], sf[at] = requantise(values)
        slots[at] = bf16_round(_linear(kernel, codes[at], sf[at], w2, w2_sf, rng))
    return Simulation(combine(slots, ids >= 0), codes, sf, slots)


def _linear(kernel: Kernel, codes: U8, sf: U8, packed: U8, weight_sf: U8, rng: Rng) -> F64:
    """``kernel.linear`` by as many columns at a time as keep the products in memory."""
    step = max(1, PRODUCTS // max(1, codes.size))
    parts = [
        kernel.linear(codes, sf, packed[i : i + step], weight_sf[i : i + step], rng)
        for i in range(0, len(packed), step)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def kernels() -> list[Kernel]:
    """Every simulated kernel: plain and ordered additions, and the three instruction models."""
    out = [plain(order, rounding) for order in ORDERS for rounding in ROUNDINGS]
    for block in (16, 32):
        for order, rounding in (
            ("random", "mixed"), ("random", "up"), ("ascending", "nearest"), ("by-sign", "down"),
            ("by-sign", "away"), ("tree", "zero"),
        ):  # fmt: skip
            out.append(ordered(order, rounding, block, fresh=False))
            out.append(ordered(order, rounding, block, fresh=True))
    out += [blas(), *(blockwise(rounding) for rounding in ROUNDINGS)]
    models = [hopper_bf16(), hopper_e4m3(), hopper_e4m3("e4m3"), blackwell_mxf8f6f4()]
    models += [
        hopper_e4m3_outside(GROUP, rounding, "sm90-e4m3-k32") for rounding in ("nearest", "mixed")
    ]
    return out + models


__all__ = [
    "ORDERS", "ROUNDINGS", "Kernel", "Linear", "NotAMemberError", "Rng", "Simulation", "add_up",
    "blackwell_mxf8f6f4", "blas", "block_scaled", "blockwise", "combine", "forward", "head",
    "hopper_bf16", "hopper_e4m3", "hopper_e4m3_outside", "kernels", "ordered", "plain", "problem",
    "products", "requantise", "scaled", "silu", "stage", "swiglu", "to_fp32",
]  # fmt: skip
