"""Simulated correct kernels: members of the accumulator classes, to test what is certified.

Nothing that judges imports this; it shares :mod:`megamoe.spec.formats` with the oracle and nothing
else. A kernel here is a way to sum one dot product and a way to err in silu, both within the
class: plain additions in random or hostile orders, each rounded in any direction; and the
tensor-core instructions as the package ``mmasim`` models them.

Sums in plain additions are float64 numbers held to fp32's spacing (subnormals included), so that
every rounding direction is at hand. Products are exact in fp32 unless they are subnormal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megamoe.cases import Case
from megamoe.cases.recipes import forward_problem
from megamoe.spec.formats import (
    E2M1_TABLE,
    E4M3_TABLE,
    F32,
    F64,
    GROUP,
    U8,
    U16,
    bf16_decode,
    bf16_round,
    e2m1_unpack,
    e4m3_cast,
    ue8m0_ceil,
    ue8m0_decode,
)
from megamoe.spec.problem import Problem

Rng = np.random.Generator
Linear = Callable[[U8, U8, U8, U8, Rng], F64]
"""(R, C) codes, (R, C/32) sf, (N, C/2) packed weights, (N, C/32) sf to (R, N) fp32 values."""

_HALF, _BELOW = np.int64(1 << 28), np.int64((1 << 29) - 1)
"""Half a unit of fp32 in the bits of a float64, and all bits below that unit."""
ROUNDINGS = ("nearest", "zero", "away", "up", "down", "mixed")
ORDERS = ("ascending", "random", "by-sign", "tree", "splits")


@dataclass(frozen=True)
class Kernel:
    """One simulated correct kernel."""

    name: str
    accumulator: str
    """The class it is a member of."""
    linear: Linear
    silu: str = "mixed"
    """Where in its documented error each instruction of silu lies: low, high, none or mixed."""


# --- plain additions --------------------------------------------------------------------------


def to_fp32(value: F64, rounding: str, rng: Rng) -> F64:
    """Float64 to fp32's spacing, in any direction: one rounding, either neighbour is correct.

    ``mixed`` draws a direction for each element (stochastic rounding included).
    """
    if rounding == "nearest":
        with np.errstate(over="ignore"):
            return value.astype(np.float32).astype(np.float64)
    bits = np.ascontiguousarray(value).view(np.int64)
    if rounding == "zero":
        offset: Any = np.int64(0)
    elif rounding == "away":
        offset = _BELOW
    elif rounding in ("up", "down"):
        offset = np.where((bits < 0) == (rounding == "up"), np.int64(0), _BELOW)
    else:
        offset = rng.integers(0, 1 << 29, value.shape, dtype=np.int64)
    out = ((bits + offset) & ~_BELOW).view(np.float64)
    small = np.abs(value) < 2.0**-126
    if small.any():
        steps = value[small] * 2.0**149
        floor = {"up": np.ceil, "down": np.floor, "zero": np.trunc}.get(rounding, np.rint)
        out[small] = floor(steps) * 2.0**-149
    return _held(value, out, rounding, rng)


LARGEST = 2.0**128 - 2.0**104
"""fp32's largest number."""


def _held(value: F64, out: F64, rounding: str, rng: Rng) -> F64:
    """``out`` held to fp32's range: a sum that leaves it saturates or becomes infinite."""
    over = ~(np.abs(value) <= LARGEST)
    if not over.any():
        return out
    stays = {
        "zero": np.ones_like(over), "away": np.zeros_like(over), "up": value < 0, "down": value > 0,
    }.get(rounding)  # fmt: skip
    if stays is None:
        stays = rng.random(value.shape) < 0.5
    inf = np.copysign(np.where(stays & np.isfinite(value), LARGEST, np.inf), value)
    return np.where(np.isnan(value), np.nan, np.where(over, inf, out))


def products(codes: U8, sf: U8, packed: U8, weight_sf: U8) -> F64:
    """``(C, R, N)`` scaled products."""
    x, w = _scaled(codes, sf, packed, weight_sf)
    return x.T[:, :, None] * w.T[:, None, :]


def add_up(terms: F64, order: str, rounding: str, rng: Rng) -> F64:
    """``(n, ...)`` terms to one fp32 sum each, by n - 1 additions."""
    count = len(terms)
    if order == "random":
        terms = terms[rng.permutation(count)]
    elif order == "by-sign":  # positive terms first: the largest partial sums there can be
        terms = np.sort(terms, axis=0)[::-1]
    if order == "tree":
        terms = terms[rng.permutation(count)]
        while len(terms) > 1:
            half = len(terms) // 2
            joined = to_fp32(terms[:half] + terms[half : 2 * half], rounding, rng)
            terms = np.concatenate([joined, terms[2 * half :]])
        return terms[0]
    if order == "splits":  # as split-K or vector lanes: strided partial sums, added at the end
        lanes = int(rng.choice([2, 4, 8, 16]))
        parts = [add_up(terms[lane::lanes], "ascending", rounding, rng) for lane in range(lanes)]
        return add_up(np.stack(parts), "ascending", rounding, rng)
    total = terms[0].copy()
    with np.errstate(invalid="ignore"):  # infinities of both signs
        for term in terms[1:]:
            total = to_fp32(total + term, rounding, rng)
    return total


_AT_ONCE = 1 << 22
"""Products held in memory at a time."""


def _in_chunks(one: Callable[[F64, Rng], F64]) -> Linear:
    def linear(codes: U8, sf: U8, packed: U8, weight_sf: U8, rng: Rng) -> F64:
        rows, depth = codes.shape
        outputs = packed.shape[0]
        out = np.empty((rows, outputs))
        step = max(1, _AT_ONCE // (rows * depth))
        for start in range(0, outputs, step):
            part = slice(start, start + step)
            out[:, part] = one(products(codes, sf, packed[part], weight_sf[part]), rng)
        return out

    return linear


def plain(order: str, rounding: str) -> Kernel:
    """Class ``fp32``: additions in any order over the whole of K."""

    def one(terms: F64, rng: Rng) -> F64:
        return add_up(to_fp32(terms, rounding, rng), order, rounding, rng)

    return Kernel(f"plain/{order}/{rounding}", "fp32", _in_chunks(one))


def ordered(order: str, rounding: str, block: int, *, fresh: bool) -> Kernel:
    """Class ``fp32-ordered``: any order within ascending blocks of K.

    ``fresh``: a block is summed on its own and then added; otherwise the running sum takes part
    in the block's additions as one more term.
    """

    def one(terms: F64, rng: Rng) -> F64:
        terms = to_fp32(terms, rounding, rng)
        total = np.zeros(terms.shape[1:])
        for start in range(0, len(terms), block):
            part = terms[start : start + block]
            if fresh:
                inner = add_up(part, order, rounding, rng)
                total = to_fp32(total + inner, rounding, rng)
            else:
                total = add_up(np.concatenate([total[None], part]), order, rounding, rng)
        return total

    name = f"ordered{block}/{order}/{rounding}/{'fresh' if fresh else 'running'}"
    return Kernel(name, "fp32-ordered", _in_chunks(one))


def _scaled(codes: U8, sf: U8, packed: U8, weight_sf: U8) -> tuple[F64, F64]:
    """Both operands with their scales, ``(R, C)`` and ``(N, C)``."""
    x = E4M3_TABLE[codes] * np.repeat(ue8m0_decode(sf), GROUP, axis=1)
    return x, E2M1_TABLE[e2m1_unpack(packed)] * np.repeat(ue8m0_decode(weight_sf), GROUP, axis=1)


class NotAMemberError(ValueError):
    """The operands are outside the range in which the kernel is a member of its class."""


def _held_as(scaled: F64, dtype: torch.dtype) -> torch.Tensor:
    """Scaled operands in a format that must hold them."""
    held = torch.from_numpy(scaled).to(dtype)
    if not np.array_equal(held.double().numpy(), scaled, equal_nan=True):
        raise NotAMemberError(f"an operand, scaled, is no {dtype} number")
    return held


def blas() -> Kernel:
    """Class ``fp32``: a library's fp32 matrix product over a random permutation of K.

    :class:`NotAMemberError` where an operand, scaled, is no fp32 number: there it is no member.
    """

    def linear(codes: U8, sf: U8, packed: U8, weight_sf: U8, rng: Rng) -> F64:
        order = torch.from_numpy(rng.permutation(codes.shape[1]))
        x, w = (_held_as(v, torch.float32) for v in _scaled(codes, sf, packed, weight_sf))
        return (x[:, order] @ w[:, order].T).double().numpy()

    return Kernel("blas/permuted", "fp32", linear)


def blockwise(rounding: str) -> Kernel:
    """Class ``fp32-ordered``: blocks of 32 summed exactly, each rounded and added in turn."""

    def linear(codes: U8, sf: U8, packed: U8, weight_sf: U8, rng: Rng) -> F64:
        x, w = _scaled(codes, sf, packed, weight_sf)
        total = np.zeros((len(x), len(w)))
        for start in range(0, codes.shape[1], GROUP):
            k = slice(start, start + GROUP)
            block = to_fp32(x[:, k] @ w[:, k].T, rounding, rng)
            total = to_fp32(total + block, rounding, rng)
        return total

    return Kernel(f"blockwise/{rounding}", "fp32-ordered", linear)


# --- instruction models -----------------------------------------------------------------------


def _fp4(packed: U8) -> torch.Tensor:
    """Nibbles as the hardware holds one FP4 value a byte: in bits 5 to 2."""
    return torch.from_numpy(e2m1_unpack(packed) << 2)


def hopper_bf16() -> Kernel:
    """wgmma with bf16 operands: scales multiplied in beforehand, exactly; a member of
    ``fp32-ordered``. 16 terms, 25 bits, truncated. :class:`NotAMemberError` where an operand,
    scaled, is no bfloat16 number."""
    from mmasim.arithmetic.fdpa import MMA_T_FDPA

    unit = MMA_T_FDPA(25, "RZ-FP32", 16, -133, "bf16", "bf16")

    def linear(codes: U8, sf: U8, packed: U8, weight_sf: U8, rng: Rng) -> F64:
        del rng
        x, w = _scaled(codes, sf, packed, weight_sf)
        a, b = (_held_as(operand, torch.bfloat16) for operand in (x, w))
        c = torch.zeros(len(x), len(w))
        for start in range(0, codes.shape[1], 16):
            k = slice(start, start + 16)
            c = unit.dpa(_expand(a[:, None, k], c), _expand(b[None, :, k], c), c)
        return c.double().numpy()

    return Kernel("mmasim/hopper-bf16", "fp32-ordered", linear)


def hopper_e4m3(weights: str = "e2m1") -> Kernel:
    """wgmma with e4m3 operands, promoted to fp32 every 128; class ``sm90-e4m3``.

    The instruction has no block scales; the contract has one for each 32. They are folded in as
    exponents (``MMA_ST_FDPA`` with this instruction's numbers). ``weights`` says in which format
    the FP4 values reach the unit: it decides the exponent field of 0.5.
    """
    from mmasim.arithmetic.fdpa import MMA_ST_FDPA

    unit = MMA_ST_FDPA(13, "RZ-E8M13", 32, -133, "e4m3", weights)
    return Kernel(f"mmasim/hopper-e4m3/{weights}", "sm90-e4m3", _block_scaled(unit, weights, 4))


def hopper_e4m3_outside(run: int, rounding: str, accumulator: str) -> Kernel:
    """wgmma with e4m3 operands, each ``run`` of K from zero, scaled and added in fp32.

    The run takes the scale factors of its first group: they must be the same in all of it.
    """
    from mmasim.arithmetic.fdpa import MMA_T_FDPA

    unit = MMA_T_FDPA(13, "RZ-E8M13", 32, -133, "e4m3", "e4m3")

    def linear(codes: U8, sf: U8, packed: U8, weight_sf: U8, rng: Rng) -> F64:
        a = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        b = torch.from_numpy(E2M1_TABLE[e2m1_unpack(packed)]).to(torch.float8_e4m3fn)
        scale, weight_scale = (ue8m0_decode(s[:, :: run // GROUP]) for s in (sf, weight_sf))
        main = np.zeros((len(codes), len(packed)))
        for i in range(scale.shape[1]):
            k = slice(i * run, (i + 1) * run)
            zero = torch.zeros(main.shape)
            part = unit.dpa(_expand(a[:, None, k], zero), _expand(b[None, :, k], zero), zero)
            factor = scale[:, i, None] * weight_scale[None, :, i]
            with np.errstate(invalid="ignore"):
                scaled = to_fp32(part.double().numpy() * factor, rounding, rng)
                main = to_fp32(main + scaled, rounding, rng)
        return main

    return Kernel(f"mmasim/hopper-e4m3-k{run}/{rounding}", accumulator, linear)


def blackwell_mxf8f6f4() -> Kernel:
    """tcgen05 kind::mxf8f6f4, scale block 32, never promoted; class ``sm100-mxf8f6f4``."""
    from mmasim.arithmetic.fdpa import MMA_ST_FDPA

    unit = MMA_ST_FDPA(25, "RZ-FP32", 32, -133, "e4m3", "e2m1")
    return Kernel("mmasim/blackwell-mxf8f6f4", "sm100-mxf8f6f4", _block_scaled(unit, "e2m1", 0))


def _block_scaled(unit: Any, weights: str, promote: int) -> Linear:
    def linear(codes: U8, sf: U8, packed: U8, weight_sf: U8, rng: Rng) -> F64:
        del rng
        a = torch.from_numpy(codes).view(torch.float8_e4m3fn)
        if weights == "e2m1":
            b = _fp4(packed)
        else:
            b = torch.from_numpy(E2M1_TABLE[e2m1_unpack(packed)]).to(torch.float8_e4m3fn)
        alpha = torch.from_numpy(sf).view(torch.float8_e8m0fnu)
        beta = torch.from_numpy(weight_sf).view(torch.float8_e8m0fnu)
        c = main = torch.zeros(len(codes), len(packed))
        for group in range(sf.shape[1]):
            k, g = slice(group * GROUP, (group + 1) * GROUP), slice(group, group + 1)
            c = unit.dpa(
                _expand(a[:, None, k], c), _expand(b[None, :, k], c), c,
                _expand(alpha[:, None, g], c), _expand(beta[None, :, g], c),
            )  # fmt: skip
            if promote and (group + 1) % promote == 0:
                main, c = main + c, torch.zeros_like(c)
        return (main + c if promote else c).double().numpy()

    return linear


def _expand(operand: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return operand.expand(*out.shape, operand.shape[-1])


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
    known = np.isfinite(value) & (value != 0)
    _, exponent = np.frexp(np.where(known, value, 1.0))
    unit = np.ldexp(1.0, np.maximum(exponent - 24, -149))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(known, value + ulps * unit, value).astype(np.float32)


# --- the whole layer --------------------------------------------------------------------------


@dataclass(frozen=True)
class Simulated:
    """Everything a simulated kernel computed; shapes as in ``megamoe.spec.tensors``."""

    y: U16
    codes: U8
    sf: U8
    slots: U16
    """(T, K, H) bfloat16 bits before the combine."""


def stage(hidden: U16) -> tuple[U8, U8]:
    """Staging: every operation is a single IEEE rounding, so there is nothing to simulate."""
    grouped = bf16_decode(hidden).reshape(len(hidden), -1, GROUP)
    amax = np.maximum(np.abs(grouped).max(axis=-1), np.float32(1e-4))
    exponent = np.clip(ue8m0_ceil(amax / np.float32(448)), 1, 254)
    codes = e4m3_cast(np.ldexp(grouped.astype(np.float64), 127 - exponent[..., None]))
    return codes.reshape(hidden.shape), exponent.astype(np.uint8)


def requantise(values: F32) -> tuple[U8, U8]:
    """``(R, I)`` activations to codes and UE8M0 bytes."""
    grouped = values.reshape(len(values), -1, GROUP)
    amax = np.abs(grouped).max(axis=-1)
    exponent = ue8m0_ceil(amax * (np.float32(1) / np.float32(448)))
    codes = e4m3_cast(np.ldexp(grouped.astype(np.float64), 127 - exponent[..., None]))
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


def forward(problem: Problem, kernel: Kernel, seed: int) -> Simulated:
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
        gate_up = kernel.linear(x[at[0]], x_sf[at[0]], w13, w13_sf, rng)
        values = swiglu(
            gate_up, weight, problem.activation_clamp, problem.fast_math, kernel.silu, rng
        )
        codes[at], sf[at] = requantise(values)
        slots[at] = bf16_round(kernel.linear(codes[at], sf[at], w2, w2_sf, rng))
    return Simulated(combine(slots, ids >= 0), codes, sf, slots)


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
